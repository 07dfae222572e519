//! The Watch actor: looks at the installation each few seconds, and tells what is wrong and what no longer is.
//!
//! ```text
//! tick ─► facts ─► rules ─► store (rows and deliveries, one transaction) ─► WebSocket, Prometheus
//!                             └ away ─► told at once, the row follows when the database is back
//! ```
//! Owns: which alerts are active, as a cache of the store. Never: looks twice at a time: a look that takes long delays the next.
//! A crash here costs nothing: what comes up reads the active rows.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use actix::{Actor, ActorFutureExt, AsyncContext, Context, WrapFuture};
use actix_web::web;

use super::facts::{self, Memory};
use super::routes::AlertView;
use super::rules::{self, Change, Key, Known, Rule, Severity};
use super::store;
use crate::app::App;
use crate::live::Frame;
use crate::store::entities::alerts;

/// How often what is long over is removed.
const TIDY: Duration = Duration::from_secs(24 * 3600);

/// What the actor knows between two looks.
struct State {
    /// Absent until the store was read once.
    active: Option<BTreeMap<Key, Known>>,
    memory: Memory,
    /// Told while the database was away: its row is still to be stored.
    unsaved: Option<alerts::Model>,
    tidied: Option<Instant>,
}

/// The actor.
pub struct Watch {
    app: web::Data<App>,
    /// Absent only while it looks.
    state: Option<Box<State>>,
}

/// Starts it on this thread's actix system; it goes on until the process ends.
pub fn start(app: web::Data<App>) {
    let memory = Memory::new(shared::clock::now().timestamp_millis());
    let state = State { active: None, memory, unsaved: None, tidied: None };
    Watch { app, state: Some(Box::new(state)) }.start();
}

impl Actor for Watch {
    type Context = Context<Self>;

    fn started(&mut self, context: &mut Self::Context) {
        let interval = Duration::from_secs(self.app.config.alerts.interval_seconds);
        context.run_interval(interval, |watch, context| {
            let Some(mut state) = watch.state.take() else { return };
            let app = watch.app.clone();
            let look = async move {
                if !app.is_draining() {
                    state.look(&app).await;
                }
                state
            };
            context.spawn(look.into_actor(watch).map(|state, watch, _| watch.state = Some(state)));
        });
    }
}

impl State {
    async fn look(&mut self, app: &App) {
        let at = &app.config.alerts;
        let (report, facts) = facts::look(app, at.job_failures, &mut self.memory).await;
        app.metrics.health_score.set(i64::from(report.score));
        if let Some(ms) = report.database.ping_ms {
            app.metrics.database_ping.set(ms / 1000.0);
        }
        self.recall(app).await;
        let none = BTreeMap::new();
        let active = match (&self.active, &facts.database_away) {
            (Some(active), _) => active,
            // A database that was away from the start is told all the same.
            (None, Some(_)) => &none,
            (None, None) => return,
        };
        let keys: BTreeSet<Key> = active.keys().cloned().collect();
        let found = rules::evaluate(&facts, at, &keys);
        let changes = rules::changes(&facts, active, &found);
        if facts.database_away.is_some() {
            self.told_without_store(app, &changes, facts.now);
        } else if let Err(error) = self.carry_out(app, changes, facts.now).await {
            tracing::warn!(%error, "alerts could not be stored; the next look tries again");
        }
        self.count(app);
        self.tidy(app, facts.now).await;
    }

    /// Takes the active alerts from the store, once.
    async fn recall(&mut self, app: &App) {
        if self.active.is_some() {
            return;
        }
        match store::active(&app.store).await {
            Ok(rows) => {
                let known = |row: alerts::Model| {
                    let key = Key { rule: Rule::from_word(&row.rule)?, resource: row.resource };
                    Some((key, Known { id: row.id, severity: Severity::from_word(&row.severity)? }))
                };
                let mut active: BTreeMap<Key, Known> = rows.into_iter().filter_map(known).collect();
                if let Some(row) = self.unsaved.clone()
                    && let (Some(rule), Some(severity)) = (Rule::from_word(&row.rule), Severity::from_word(&row.severity))
                {
                    let key = Key { rule, resource: row.resource };
                    match active.contains_key(&key) {
                        true => self.unsaved = None,
                        false => drop(active.insert(key, Known { id: row.id, severity })),
                    }
                }
                self.active = Some(active);
            }
            Err(error) => tracing::warn!(%error, "active alerts could not be read yet"),
        }
    }

    async fn carry_out(&mut self, app: &App, changes: Vec<Change>, now: i64) -> Result<(), crate::store::Error> {
        self.save_unsaved(app, now).await?;
        // What was saved a moment ago may be over by these same facts; the next look resolves it.
        if changes.is_empty() {
            return Ok(());
        }
        let new = |change: &Change| match change {
            Change::Raise(finding) => Some(store::row(finding, now)),
            _ => None,
        };
        let raised = changes.iter().filter_map(new).collect();
        for row in store::apply(&app.store, changes, raised, now).await? {
            self.tell(app, &row);
        }
        Ok(())
    }

    /// The alert of a database that was away gets its row now; that it is over comes with the next changes.
    async fn save_unsaved(&mut self, app: &App, now: i64) -> Result<(), crate::store::Error> {
        let Some(row) = self.unsaved.clone() else { return Ok(()) };
        let Some(rule) = Rule::from_word(&row.rule) else { return Ok(()) };
        let key = Key { rule, resource: row.resource.clone() };
        let severity = Severity::from_word(&row.severity).unwrap_or(Severity::Critical);
        let finding = rules::Finding { key: key.clone(), severity, message: row.message.clone() };
        store::apply(&app.store, vec![Change::Raise(finding)], vec![row.clone()], now).await?;
        self.unsaved = None;
        Ok(())
    }

    /// The database is away: who watches is told at once, and the row waits.
    fn told_without_store(&mut self, app: &App, changes: &[Change], now: i64) {
        for change in changes {
            if self.active.is_none() && self.unsaved.is_some() {
                return;
            }
            if let Change::Raise(finding) = change {
                let row = store::row(finding, now);
                self.tell(app, &row);
                self.unsaved = Some(row);
            }
        }
    }

    /// Takes a change over, and tells it.
    fn tell(&mut self, app: &App, row: &alerts::Model) {
        let (Some(rule), Some(severity)) = (Rule::from_word(&row.rule), Severity::from_word(&row.severity)) else { return };
        let key = Key { rule, resource: row.resource.clone() };
        let mut unread = BTreeMap::new();
        let active = self.active.as_mut().unwrap_or(&mut unread);
        if row.state == "active" {
            tracing::warn!(alert = row.id, rule = row.rule, resource = row.resource, severity = row.severity, "{}", row.message);
            active.insert(key, Known { id: row.id.clone(), severity });
        } else {
            tracing::info!(alert = row.id, rule = row.rule, resource = row.resource, "alert is resolved");
            active.remove(&key);
        }
        app.live.publish(Frame::new("alert", vec!["alerts".to_owned()], AlertView::json(row)));
    }

    fn count(&self, app: &App) {
        let Some(active) = &self.active else { return };
        for severity in [Severity::Info, Severity::Warning, Severity::Critical] {
            let count = active.values().filter(|known| known.severity == severity).count();
            app.metrics.alerts.with_label_values(&[severity.word()]).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
    }

    async fn tidy(&mut self, app: &App, now: i64) {
        if self.tidied.is_some_and(|when| when.elapsed() < TIDY) {
            return;
        }
        match store::forget_old(&app.store, now).await {
            Ok(()) => self.tidied = Some(Instant::now()),
            Err(error) => tracing::debug!(%error, "old alerts could not be removed"),
        }
    }
}

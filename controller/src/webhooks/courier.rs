//! The Courier actor: takes the first delivery in line of each webhook and calls.
//!
//! ```text
//! tick ─► jobs that ended since the last look become rows ─► heads of the lines whose time has come ─► one call for each webhook ─► settle
//! ```
//! Owns: which webhook is being called. Never: calls one webhook twice at a time, lets one that does not answer hold up another.
//! A crash here costs nothing: a call whose outcome was not stored is made again.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::{Duration, Instant};

use actix::{Actor, ActorFutureExt, AsyncContext, Context, WrapFuture};
use actix_web::web;

use super::service;
use super::signature;
use super::store::{self, Ended};
use crate::app::App;
use crate::jobs::core::Outbox;
use crate::jobs::record::Job;
use crate::jobs::view::View;
use crate::store::Error;
use crate::store::entities::{jobs, webhook_deliveries as deliveries, webhooks};

/// Between two looks.
const TICK: Duration = Duration::from_millis(500);
/// How often ended jobs are looked for although the totals did not change.
const LOOK_AGAIN: Duration = Duration::from_secs(30);
/// How often what is long over is removed.
const TIDY: Duration = Duration::from_secs(3600);
/// Calls at a time.
const CALLS: usize = 16;

/// What one look found.
struct Found {
    state: Box<State>,
    due: Vec<(webhooks::Model, deliveries::Model)>,
}

/// What is kept between two looks.
#[derive(Default)]
struct State {
    /// How far ended jobs were looked through.
    cursor: Option<i64>,
    /// Events noted lately and when they happened, so that the overlap of two looks writes nothing.
    noted: HashMap<String, i64>,
    /// Totals by status at the last look for jobs, and when.
    looked: Option<(Instant, BTreeMap<&'static str, u64>)>,
    tidied: Option<Instant>,
}

/// The actor.
pub struct Courier {
    app: web::Data<App>,
    /// Absent only while it looks.
    state: Option<Box<State>>,
    /// Webhooks that are being called.
    busy: HashSet<String>,
    /// The last call of each webhook whose outcome is stored: number of the delivery and of the call. A look that began before saw it open.
    settled: HashMap<String, (i32, i32)>,
}

/// Starts it on this thread's actix system; it goes on until the process ends.
pub fn start(app: web::Data<App>) {
    Courier { app, state: Some(Box::default()), busy: HashSet::new(), settled: HashMap::new() }.start();
}

impl Actor for Courier {
    type Context = Context<Self>;

    fn started(&mut self, context: &mut Self::Context) {
        context.run_interval(TICK, |courier, context| {
            let Some(state) = courier.state.take() else { return };
            let look = look(courier.app.clone(), state);
            context.spawn(look.into_actor(courier).map(|found, courier, context| {
                courier.state = Some(found.state);
                for (webhook, delivery) in found.due {
                    courier.call(webhook, delivery, context);
                }
            }));
        });
    }
}

impl Courier {
    fn call(&mut self, webhook: webhooks::Model, delivery: deliveries::Model, context: &mut Context<Self>) {
        let this = (delivery.id, delivery.attempt);
        if self.busy.len() >= CALLS || self.settled.get(&webhook.id) == Some(&this) || !self.busy.insert(webhook.id.clone()) {
            return;
        }
        let (app, id) = (self.app.clone(), webhook.id.clone());
        let call = async move { deliver(&app, &webhook, &delivery).await };
        context.spawn(call.into_actor(self).map(move |stored, courier, _| {
            courier.busy.remove(&id);
            if stored {
                courier.settled.insert(id, this);
            }
        }));
    }
}

/// One call, and its outcome in the store; answers whether that was stored.
async fn deliver(app: &App, webhook: &webhooks::Model, delivery: &deliveries::Model) -> bool {
    let id = delivery.id.to_string();
    let called = service::call(app, webhook, &delivery.kind, &id, &delivery.body).await;
    let attempt = delivery.attempt.saturating_add(1);
    let now = shared::clock::now().timestamp_millis();
    let next = called.error.as_ref().and_then(|_| signature::pause(attempt)).map(|pause| now.saturating_add(pause));
    let outcome = match (&called.error, next) {
        (None, _) => "delivered",
        (Some(_), Some(_)) => "retried",
        (Some(_), None) => "failed",
    };
    app.metrics.webhook_calls.with_label_values(&[outcome]).inc();
    if let Some(error) = &called.error {
        tracing::warn!(webhook = webhook.id, delivery = delivery.id, attempt, error, "webhook was not delivered");
    }
    if let Err(error) = store::settle(&app.store, delivery, &called, next).await {
        // It is called again: at least once is what is promised.
        tracing::warn!(%error, webhook = webhook.id, delivery = delivery.id, "the outcome of a webhook's call could not be stored");
        tokio::time::sleep(Duration::from_secs(1)).await;
        return false;
    }
    true
}

async fn look(app: web::Data<App>, mut state: Box<State>) -> Found {
    if app.is_draining() {
        return Found { state, due: Vec::new() };
    }
    match look_once(&app, &mut state).await {
        Ok(due) => Found { state, due },
        Err(error) => {
            tracing::debug!(%error, "deliveries could not be read; the next look tries again");
            Found { state, due: Vec::new() }
        }
    }
}

async fn look_once(app: &App, state: &mut State) -> Result<Vec<(webhooks::Model, deliveries::Model)>, Error> {
    let webhooks = store::all(&app.store).await?;
    if webhooks.is_empty() {
        app.metrics.webhook_pending.set(0);
        return Ok(Vec::new());
    }
    let now = shared::clock::now().timestamp_millis();
    note_ended_jobs(app, state, &webhooks).await?;
    if state.tidied.is_none_or(|when| when.elapsed() > TIDY) {
        store::forget_old(&app.store, now).await?;
        state.tidied = Some(Instant::now());
    }
    let due = store::heads(&app.store, now).await?;
    app.metrics.webhook_pending.set(i64::try_from(store::pending(&app.store).await?).unwrap_or(i64::MAX));
    let with_webhook = |delivery: deliveries::Model| {
        let webhook = webhooks.iter().find(|webhook| webhook.id == delivery.webhook)?.clone();
        Some((webhook, delivery))
    };
    Ok(due.into_iter().filter_map(with_webhook).collect())
}

/// Jobs that ended become rows. What ended while nobody looked is found by the cursor in the store.
async fn note_ended_jobs(app: &App, state: &mut State, webhooks: &[webhooks::Model]) -> Result<(), Error> {
    let totals = app.queue.observe().by_status;
    let is_new = state.looked.as_ref().is_none_or(|(when, before)| when.elapsed() > LOOK_AGAIN || *before != totals);
    if !is_new {
        return Ok(());
    }
    let mut cursor = match state.cursor {
        Some(cursor) => cursor,
        None => {
            let oldest = webhooks.iter().map(|webhook| webhook.created_at).min().unwrap_or_default();
            store::cursor(&app.store).await?.unwrap_or(oldest)
        }
    };
    let from = cursor;
    for page in 0.. {
        let rows = store::ended(&app.store, from, page).await?;
        let is_last = rows.len() < store::MOST_JOBS;
        cursor = rows.iter().filter_map(|row| row.finished_at).max().unwrap_or(cursor).max(cursor);
        let events: Vec<Ended> =
            rows.into_iter().filter_map(|row| event(app, row)).filter(|event| !state.noted.contains_key(&event.key)).collect();
        let noted: Vec<(String, i64)> = events.iter().map(|event| (event.key.clone(), event.time)).collect();
        if !events.is_empty() {
            store::note_ended(&app.store, events, cursor).await?;
        }
        state.noted.extend(noted);
        state.cursor = Some(cursor);
        if is_last {
            break;
        }
    }
    state.noted.retain(|_, time| *time > cursor.saturating_sub(2 * store::OVERLAP));
    state.looked = Some((Instant::now(), totals));
    Ok(())
}

fn event(app: &App, row: jobs::Model) -> Option<Ended> {
    let kind = match row.status.as_str() {
        "completed" => "job.completed",
        "failed" => "job.failed",
        "cancelled" => "job.cancelled",
        _ => return None,
    };
    let (key, time) = (format!("{kind} {} {}", row.id, row.finished_at?), row.finished_at?);
    let job = Job::from_row(row)?;
    let data = serde_json::to_value(View::of(&job, |agent| app.fleet.name(agent))).ok()?;
    Some(Ended { kind, key, time, data })
}

//! The clock of the schedules: one look each second, as long as the controller takes new work.
//!
//! Owns: the loops of planner and runner, and the runner's door to the jobs, the fleet and the users. Never: decides what is due (plan) or who takes it (runner).
//! A crash here costs the schedules of this controller until it is started again; due times are rows by then or are caught up.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use actix_web::web;
use async_trait::async_trait;
use shared::error::Code;

use super::runner::{Door, Planner, Runner};
use crate::access::{Role, users};
use crate::app::App;
use crate::http::idempotency::Idempotency;
use crate::http::reply::Error;
use crate::jobs;
use crate::jobs::record::{Job, NewJob};
use crate::jobs::service::Create;
use crate::store::Error as StoreError;

/// How often.
const TICK: Duration = Duration::from_secs(1);
/// How long after an agent's last word another controller may still have it, in milliseconds: the store knows it to the minute.
const HEARD: i64 = 150_000;

/// The controller, as a run sees it.
pub struct Controller(pub web::Data<App>);

/// A runner of this process.
pub fn runner(app: &web::Data<App>) -> Runner<Controller> {
    static ME: OnceLock<String> = OnceLock::new();
    let me = ME.get_or_init(shared::ids::random_hex::<8>).clone();
    Runner::new(app.store.clone(), Controller(app.clone()), me)
}

/// Looks each second until the drain, at the due times and at the runs, neither waiting for the other.
pub async fn run(app: web::Data<App>) {
    let (mut planner, mut runner) = (Planner::new(app.store.clone()), runner(&app));
    tokio::join!(
        each_second(&app, "due times", async || planner.tick(shared::clock::now()).await),
        each_second(&app, "runs", async || runner.tick(shared::clock::now(), Instant::now()).await),
    );
}

/// What the database could not do is done a second later.
async fn each_second(app: &App, what: &str, mut look: impl AsyncFnMut() -> Result<(), StoreError>) {
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut failing = false;
    while !app.is_draining() {
        ticks.tick().await;
        match look().await {
            Ok(()) => failing = false,
            Err(error) if !failing => {
                tracing::warn!(%error, what, "schedules wait for the store");
                failing = true;
            }
            Err(_) => {}
        }
    }
}

#[async_trait(?Send)]
impl Door for Controller {
    async fn check(&self, owner: &str, wanted: Create) -> Result<NewJob, Error> {
        let user = users::find(&self.0.store, owner).await?;
        let role = user.and_then(|user| Role::from_word(&user.role));
        match role {
            Some(role) if role >= Role::Operator => jobs::service::check(&self.0, owner, wanted).await,
            Some(_) => Err(Error::new(Code::Forbidden, format!("the schedule's owner `{owner}` may not run jobs any more"))),
            None => Err(Error::new(Code::Forbidden, format!("the schedule's owner `{owner}` was removed; let another user make it anew"))),
        }
    }

    async fn submit(&self, new: NewJob, key: Idempotency) -> Result<Job, jobs::core::Error> {
        self.0.queue.submit(new, Some(key)).await
    }

    fn has(&self, agent: &str) -> bool {
        self.0.fleet.is_connected(agent)
    }

    async fn is_elsewhere(&self, agent: &str) -> Result<bool, StoreError> {
        // SQLite has one controller.
        if !self.0.store.is_postgres() {
            return Ok(false);
        }
        let known = crate::fleet::store::by_id(&self.0.store, agent).await?;
        let heard = known.and_then(|agent| agent.last_seen);
        Ok(heard.is_some_and(|heard| shared::clock::now().timestamp_millis().saturating_sub(heard) < HEARD))
    }
}

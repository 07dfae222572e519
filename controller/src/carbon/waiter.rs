//! The task that looks at the grid for carbon-aware jobs, and for migrations, whose grams are counted.
//!
//! Each second it looks whether a job is new to it; each `carbon.poll_seconds` at all of them. What [`super::decision`] says goes to the queue.
//! Owns: the rhythm. Never: changes a job itself, keeps a state of its own. A crash here costs nothing: the queue's clock releases jobs.

use std::time::{Duration, Instant};

use actix_web::web;
use shared::job::{Hold, Status};

use super::decision::{self, Decision, Task};
use super::service::Reading;
use crate::app::App;
use crate::jobs::core::Error;
use crate::jobs::footprint::Grid;
use crate::jobs::holds;
use crate::jobs::record::{Job, now_millis};

/// How often new jobs are looked for.
const LOOK: Duration = Duration::from_secs(1);

/// Runs until the drain.
pub async fn run(app: web::Data<App>) {
    let every = Duration::from_secs(app.config.carbon.poll_seconds);
    let mut polled: Option<Instant> = None;
    let mut ticks = tokio::time::interval(LOOK);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    while !app.is_draining() {
        ticks.tick().await;
        let is_due = polled.is_none_or(|polled| polled.elapsed() >= every);
        let jobs = app.queue.board().counted();
        let jobs: Vec<Job> = jobs.into_iter().filter(|job| is_due || is_new(job)).collect();
        if is_due {
            polled = Some(Instant::now());
        }
        if jobs.is_empty() {
            continue;
        }
        let reading = app.carbon.reading(&app.config.carbon.zone).await;
        for job in jobs {
            let id = job.id.clone();
            if let Err(error) = look(&app, job, &reading).await {
                tracing::warn!(%error, job = id, "what the grid says did not reach the job");
            }
        }
    }
}

/// It was not planned yet.
fn is_new(job: &Job) -> bool {
    let waits = job.state.hold == Hold::Carbon;
    job.carbon.as_ref().is_some_and(|carbon| carbon.zone.is_empty() || (waits && carbon.planned_start.is_none()))
}

async fn look(app: &App, job: Job, reading: &Reading) -> Result<(), Error> {
    let settings = &app.config.carbon;
    let grid = Grid {
        zone: reading.zone.clone(),
        source: reading.source.to_owned(),
        estimated: reading.estimated,
        intensity: reading.intensity,
        kilowatts: settings.watts * settings.pue / 1000.0,
    };
    let now = now_millis();
    let waits = job.state.status == Status::Queued && job.state.hold == Hold::Carbon;
    if !job.waits_for_grid() || !(waits || job.is_copying()) {
        // A job that an agent works on, or that a person told to go, is only accounted for.
        let is_aware = job.options.carbon_aware == Some(true);
        let plan = match decision::decide(&task(&job, true), &reading.forecast(now), now) {
            Decision::Stay(plan) if is_aware && is_new(&job) => plan,
            _ => None,
        };
        let is_live = matches!(job.state.status, Status::Running | Status::Cancelling);
        return if is_live || is_new(&job) { app.queue.note_grid(job.id, plan, grid).await } else { Ok(()) };
    }
    let from = format!("({}, {} g/kWh now)", reading.source, reading.intensity.round());
    let copies = job.is_copying();
    match decision::decide(&task(&job, copies), &reading.forecast(now), now) {
        Decision::Go(plan) => {
            let why = format!("the grid is as clean as it will be for the run: {} g/kWh on average {from}", plan.average.round());
            app.queue.release(job.id, plan, grid, why).await
        }
        Decision::Wait(plan) => {
            let what = if copies { "parked with its checkpoint kept, the grid turned dirty" } else { "waits for a cleaner grid" };
            let start = crate::http::rfc3339(plan.start);
            let why = format!("{what}: planned start {start}, {} g/kWh on average {from}", plan.average.round());
            app.queue.hold(job.id, plan, grid, why).await
        }
        Decision::Stay(plan) => app.queue.note_grid(job.id, plan, grid).await,
    }
}

fn task(job: &Job, copies: bool) -> Task {
    Task {
        not_before: holds::not_before(job).unwrap_or(i64::MIN),
        latest_start: holds::latest_start(job),
        done_by: holds::done_by(job),
        length: holds::remaining(job),
        copies,
        planned: job.carbon.as_ref().and_then(|carbon| carbon.planned_average),
        parks: job.carbon.as_ref().map_or(0, |carbon| carbon.parks),
    }
}

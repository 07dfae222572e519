//! Whether a carbon-aware job starts, waits or is parked.
//!
//! ```text
//!                    ┌ latest start reached ─────────────────────────────► go
//! waits for the grid ┤ best window ≥ 5 % better than at once ─► wait for it
//!                    └ else ─────────────────────────────────────────────► go (at not_before, where that lies ahead)
//!
//! copies ─ grid > 1.25 × the plan's mean, and a later window ≥ 10 % better than to go on, before the latest start ─► park until then
//! ```
//! Owns: those margins. Pure: the queue applies what is decided, and its clock keeps the latest start even without us.
//! A crash here costs one look; the next follows after `carbon.poll_seconds`.

use super::windows::{Bounds, Forecast};
use crate::jobs::footprint::Plan;

/// A window must be better than a start at once by this much to be waited for, in percent.
pub const WORTH_WAITING: f64 = 5.0;
/// The grid is dirty for a running job when it is above the plan's mean by this factor.
pub const DIRTY: f64 = 1.25;
/// A later window must be better than to go on by this much for a job to be parked, in percent: a park costs a new attempt.
pub const WORTH_PARKING: f64 = 10.0;
/// A job is parked this often at most.
pub const PARKS: u32 = 10;

/// What matters of a job.
#[derive(Clone, Copy, Debug)]
pub struct Task {
    /// It may not begin before this; milliseconds since 1970.
    pub not_before: i64,
    /// It does not wait after this.
    pub latest_start: i64,
    /// By when it shall be done.
    pub done_by: i64,
    /// Milliseconds that are left of it.
    pub length: i64,
    /// It copies now; else it waits for the grid.
    pub copies: bool,
    /// Mean intensity of the window it was started for.
    pub planned: Option<f64>,
    /// How often it was parked.
    pub parks: u32,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Decision {
    /// Start now.
    Go(Plan),
    /// Wait, or park, until the plan's start.
    Wait(Plan),
    /// Go on as it is.
    Stay(Option<Plan>),
}

/// Decides. `forecast` begins at `now` with what was measured.
pub fn decide(task: &Task, forecast: &Forecast, now: i64) -> Decision {
    let from = now.max(task.not_before);
    let at_once = forecast.average(from, from.saturating_add(task.length));
    let here = forecast.at(now);
    // A forecast that is too short for the whole run cannot compare: the run begins, with what is known as its plan.
    let known = at_once.or(here).unwrap_or_default();
    let plan = |start: i64, average: f64| Plan { start, average, at_once: known };
    let bounds = Bounds { from, latest: task.latest_start, until: task.done_by };
    let best = at_once.and_then(|at_once| Some((at_once, forecast.best(bounds, task.length, 1).first().copied()?)));
    let gain = |at_once: f64, average: f64| if at_once > 0.0 { (at_once - average) / at_once * 100.0 } else { 0.0 };
    if task.copies {
        let Some(planned) = task.planned else { return Decision::Stay(Some(plan(now, known))) };
        let dirty = here.is_some_and(|here| here > planned * DIRTY) && task.parks < PARKS && now < task.latest_start;
        return match best.filter(|_| dirty) {
            Some((on, window)) if window.start > now && gain(on, window.average) >= WORTH_PARKING => {
                Decision::Wait(plan(window.start, window.average))
            }
            _ => Decision::Stay(None),
        };
    }
    match best {
        _ if task.latest_start <= now && from <= now => Decision::Go(plan(now, known)),
        Some((at_once, window)) if window.start > from && gain(at_once, window.average) >= WORTH_WAITING => {
            Decision::Wait(plan(window.start, window.average))
        }
        _ if from > now => Decision::Wait(plan(from, known)),
        _ => Decision::Go(plan(now, known)),
    }
}

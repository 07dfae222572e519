//! Jobs that wait for their time or for a clean grid, and deadlines.
//!
//! ```text
//! submit, retry ─► begin: hold_until ─► tick: due? ─► Release ─► dispatch
//!                            ▲ hold (re-planned, or parks what runs), release: the carbon room's waiter
//! ```
//! A carbon-aware job waits until `hold_until`, which is never later than its latest start: deadline − 1.2 × the seconds that are left of it.
//! That holds without the waiter, too: before a job was planned it is held until its latest start, and the tick releases it by the clock.
//! A person's `resume` of a job that waits means "now": it does not wait again. `pause` and `resume` of one whose time has not come
//! go back to waiting. A deadline that passes ends nothing: the job goes on, its log and the watchers (`alert`, word `deadline_missed`) say so.
//! Owns: the columns `hold_until`, `deadline`, `deadline_missed`, `carbon`. Never: decides what a clean grid is.
//! A crash here costs nothing: all of it is in the store.

use shared::job::{Event, Hold, Stage, State, Status, step};
use shared::options::JobType;

use super::core::{Core, Error};
use super::footprint::{Footprint, Grid, Plan};
use super::record::{Job, now_millis};
use super::store;
use crate::store::Error as StoreError;

/// A deadline for carbon-aware jobs that name none, in milliseconds after they were made (or may begin).
const DAY: i64 = 24 * 3600 * 1000;
/// Bytes of capacity a second that are assumed before anything was measured; few, so that a deadline is kept.
const UNMEASURED: u64 = 32 << 20;

fn millis(text: Option<&String>) -> Option<i64> {
    text.and_then(|text| chrono::DateTime::parse_from_rfc3339(text).ok()).map(|time| time.timestamp_millis())
}

/// Milliseconds that the whole job is thought to take.
pub fn length(job: &Job) -> i64 {
    let guess = || {
        let limited = job.options.bandwidth_limit.map_or(0, |limit| job.capacity / limit.max(1));
        (job.capacity / UNMEASURED).max(limited)
    };
    i64::try_from(job.estimate.unwrap_or_else(guess).max(1)).unwrap_or(i64::MAX).saturating_mul(1000)
}

/// Milliseconds that are left of it.
pub fn remaining(job: &Job) -> i64 {
    let all = job.counters.data.saturating_mul(if job.options.verifies() { 2 } else { 1 });
    let done = if all == 0 { 0.0 } else { (job.safe_bytes() as f64 / all as f64).clamp(0.0, 1.0) };
    ((length(job) as f64 * (1.0 - done)) as i64).max(1000)
}

/// The time before which it may not begin.
pub fn not_before(job: &Job) -> Option<i64> {
    millis(job.options.not_before.as_ref())
}

/// By when a carbon-aware job shall be done: its deadline, else a day after it was made or may begin.
pub fn done_by(job: &Job) -> i64 {
    job.deadline.unwrap_or_else(|| not_before(job).unwrap_or(job.created_at).max(job.created_at).saturating_add(DAY))
}

/// After this it does not wait, whatever the grid says.
pub fn latest_start(job: &Job) -> i64 {
    done_by(job).saturating_sub((remaining(job) as f64 * 1.2) as i64)
}

/// Works out what a new job, or one that is tried again, waits for.
pub(super) fn begin(job: &mut Job, now: i64) {
    job.deadline = millis(job.options.deadline.as_ref());
    let not_before = not_before(job);
    if job.options.carbon_aware == Some(true) {
        let carbon = job.carbon.get_or_insert_with(Box::default);
        // A job that is tried again is planned again.
        (carbon.planned_start, carbon.planned_average) = (None, None);
    } else if job.kind == JobType::Migrate {
        // Its receipt says what it cost; it waits for nothing.
        job.carbon.get_or_insert_with(|| Box::new(Footprint { by_hand: true, ..Footprint::default() }));
    }
    let until = if job.waits_for_grid() { Some(latest_start(job).max(not_before.unwrap_or(i64::MIN))) } else { not_before };
    job.hold_until = until.filter(|until| *until > now);
}

/// Why a queued job may not be given out at `now`.
pub(super) fn due(job: &Job, now: i64) -> Option<Hold> {
    job.hold_until.filter(|until| *until > now).map(|_| if job.waits_for_grid() { Hold::Carbon } else { Hold::NotBefore })
}

/// What a transition changes beside the state: who ends a wait ends it for good, and the grams count while an agent works.
pub(super) fn follow(job: &mut Job, before: &State, next: &State, event: &Event, now: i64) {
    let waited = matches!(before.hold, Hold::NotBefore | Hold::Carbon);
    if waited && matches!(event, Event::Resume | Event::Release) {
        job.hold_until = None;
    }
    let is_live = |state: &State| matches!(state.status, Status::Running | Status::Cancelling);
    if let Some(carbon) = &mut job.carbon {
        match (is_live(before), is_live(next)) {
            (false, true) => carbon.begin(now),
            (true, false) => carbon.end(now),
            _ => {}
        }
        carbon.by_hand |= waited && *event == Event::Resume;
        carbon.parks += u32::from(is_live(before) && matches!(event, Event::Hold(_)));
    }
}

impl Core {
    /// What is queued and held by nothing waits for its time or the grid, else for its agent while that is away.
    pub(super) fn settled(&self, job: &Job, state: State, now: i64) -> State {
        if state.status != Status::Queued || state.hold != Hold::None {
            return state;
        }
        let held = due(job, now).and_then(|hold| step(&state, &Event::Hold(hold)).ok());
        let away = || if self.is_here(&job.owner) { None } else { step(&state, &Event::AgentHere(false)).ok() };
        held.or_else(away).map_or(state, |(waiting, _)| waiting)
    }

    /// Releases what is due and says which deadlines have passed.
    pub(super) async fn tick_holds(&mut self, now: i64) -> Result<(), StoreError> {
        let (mut due, mut missed) = (Vec::new(), Vec::new());
        for job in self.jobs.values().map(|live| &live.job) {
            let ends = match job.state.hold {
                Hold::NotBefore => job.hold_until.is_none_or(|until| until <= now),
                Hold::Carbon => job.hold_until.is_none_or(|until| until <= now) || is_late(job, now),
                Hold::None | Hold::Paused | Hold::Agent => false,
            };
            if ends && let Ok(mut change) = self.plan(job, &Event::Release) {
                let why = match job.state.hold {
                    Hold::Carbon if is_late(job, now) => "waits no longer: its deadline leaves just the time that it needs",
                    Hold::Carbon => "the planned start has come",
                    _ => "its time has come",
                };
                change.line = Some(("info", why.to_owned()));
                due.push(change);
            }
            if !job.deadline_missed && job.deadline.is_some_and(|deadline| deadline < now) {
                missed.push(Job { deadline_missed: true, ..job.clone() });
            }
        }
        self.commit(due).await?;
        for job in missed {
            // Its hold may have ended a moment ago.
            let Some(job) = self.jobs.get(&job.id).map(|live| Job { deadline_missed: true, ..live.job.clone() }) else { continue };
            if !self.save_hold(&job).await? {
                continue;
            }
            let deadline = super::view::time(job.deadline.unwrap_or_default());
            let text = format!("the deadline {deadline} has passed; the job goes on");
            self.write(&job, "warn", &text);
            let alert = serde_json::json!({
                "severity": "warning", "code": "deadline_missed", "resource": job.id, "message": format!("{}: {text}", job.id),
            });
            (self.ports.news)("alert", &job.id, alert);
        }
        Ok(())
    }

    /// Lets a carbon-aware job wait until a planned start, or moves that start; one that runs is parked with its checkpoint kept.
    /// A start later than the latest one is moved to that. Jobs that a person paused, and those that may not wait, are left alone.
    pub async fn hold(&mut self, id: &str, plan: Plan, grid: Grid, why: &str) -> Result<(), Error> {
        let Some(mut job) = self.waiting_for_grid(id) else { return Ok(()) };
        let now = now_millis();
        let start = plan.start.min(latest_start(&job)).max(not_before(&job).unwrap_or(i64::MIN));
        if start <= now {
            return self.note_grid(id, None, grid).await;
        }
        let moved = job.hold_until.is_none_or(|until| (until - start).abs() > 1000) || job.state.hold != Hold::Carbon;
        job.hold_until = Some(start);
        note(&mut job, Some(Plan { start, ..plan }), &grid, now);
        let mut change = self.plan(&job, &Event::Hold(Hold::Carbon))?;
        if change.before != change.after.state {
            change.line = Some(("info", why.to_owned()));
            self.commit(vec![change]).await?;
        } else if self.save_hold(&job).await? && moved {
            self.write(&job, "info", why);
            self.tell("job.progress", &job);
        }
        Ok(())
    }

    /// The grid is clean enough: a job that waits for it starts now.
    pub async fn release(&mut self, id: &str, plan: Plan, grid: Grid, why: &str) -> Result<(), Error> {
        let Some(mut job) = self.waiting_for_grid(id).filter(|job| job.state.hold == Hold::Carbon) else { return Ok(()) };
        note(&mut job, Some(plan), &grid, now_millis());
        let mut change = self.plan(&job, &Event::Release)?;
        change.line = Some(("info", why.to_owned()));
        self.commit(vec![change]).await?;
        self.dispatch().await;
        Ok(())
    }

    /// Takes what the grid says while a job goes on as it is.
    pub async fn note_grid(&mut self, id: &str, plan: Option<Plan>, grid: Grid) -> Result<(), Error> {
        let Some(mut job) = self.jobs.get(id).map(|live| live.job.clone()) else { return Ok(()) };
        let first = job.carbon.as_ref().is_some_and(|carbon| carbon.zone.is_empty());
        note(&mut job, plan, &grid, now_millis());
        if self.save_hold(&job).await? && first {
            self.tell("job.progress", &job);
        }
        Ok(())
    }

    fn waiting_for_grid(&self, id: &str) -> Option<Job> {
        self.jobs.get(id).map(|live| &live.job).filter(|job| job.waits_for_grid() && job.state.hold != Hold::Paused).cloned()
    }

    /// Stores what changed beside the state. Whether that was so: where another controller was quicker, its word stands.
    async fn save_hold(&mut self, job: &Job) -> Result<bool, StoreError> {
        let held = store::save_hold(&self.ports.store, job).await?;
        match held {
            true => self.remember(job.clone()),
            false => self.reload(&job.id).await?,
        }
        Ok(held)
    }
}

fn is_late(job: &Job, now: i64) -> bool {
    latest_start(job) <= now && not_before(job).is_none_or(|start| start <= now)
}

fn note(job: &mut Job, plan: Option<Plan>, grid: &Grid, now: i64) {
    if let Some(carbon) = &mut job.carbon {
        carbon.note(grid, now);
        if let Some(plan) = plan {
            carbon.plan(&plan);
        }
    }
}

impl Job {
    /// Whether it may be held for the grid: it is carbon-aware and nobody told it to go.
    pub fn waits_for_grid(&self) -> bool {
        self.carbon.as_ref().is_some_and(|carbon| !carbon.by_hand)
    }

    /// Whether parking it keeps what it has: it copies, and nothing is granted.
    pub fn is_copying(&self) -> bool {
        self.state.status == Status::Running && self.state.stage == Stage::Copying
    }
}

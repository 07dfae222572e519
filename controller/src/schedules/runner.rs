//! From a due time to a job.
//!
//! ```text
//! Planner:  due times ─advance→ rows: pending
//! Runner:   pending ─overlap? check, agent here? claim→ claimed ─submit, key of (schedule, due)→ started
//!                                                          └ 10 s without its controller: taken over, the key finds the job
//! ```
//! Owns: the order of these steps, who takes a run, when a claim is taken over. Never: trusts its memory for anything but waiting; lets a
//! due time wait for a check, which an agent that hangs holds up: the two do not wait for each other.
//! A crash here costs nothing: before the claim another one claims; after it the claim is taken over; the job's key makes one job.
//!
//! Several controllers may share a Postgres, and a job runs only where its agent is connected. So a run is taken by the controller that
//! has the agent; by another one after 20 s, and only where no controller has heard that agent lately.

use std::cell::Cell;
use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use futures_util::stream::{self, StreamExt as _};
use shared::error::Code;

use super::claims::{self, Claim, Outcome};
use super::plan::{self, CatchUp, Kind, Timetable, missed_words};
use super::store::{self, cause};
use crate::http::idempotency::Idempotency;
use crate::http::reply::Error;
use crate::jobs;
use crate::jobs::record::{Job, NewJob};
use crate::jobs::service::Create;
use crate::store::entities::{schedule_runs as runs, schedules};
use crate::store::{Error as StoreError, Store};

/// How long a run waits for the controller that its agent is connected to.
const GRACE: Duration = Duration::from_secs(20);
/// How long a claim may stand before another controller takes it over.
const CLAIM: Duration = Duration::from_secs(10);
/// Schedules that are looked at side by side.
const AT_ONCE: usize = 16;
/// How far the clock may go back unnoticed; less than a minute, the distance of two due times.
const BACK: chrono::Duration = chrono::Duration::seconds(5);

/// What a run needs of the rest of the controller.
#[async_trait(?Send)]
pub trait Door {
    /// The check of `POST /jobs`, for this user.
    async fn check(&self, owner: &str, wanted: Create) -> Result<NewJob, Error>;
    /// Makes the job; it is in the store when this answers.
    async fn submit(&self, new: NewJob, key: Idempotency) -> Result<Job, jobs::core::Error>;
    /// Whether the agent is connected to this controller.
    fn has(&self, agent: &str) -> bool;
    /// Whether another controller may have heard the agent lately.
    async fn is_elsewhere(&self, agent: &str) -> Result<bool, StoreError>;
}

/// Gives due times their rows, on one controller.
pub struct Planner {
    store: Store,
    /// The clock at the last look; none before the first.
    looked: Option<DateTime<Utc>>,
}

/// Makes the jobs of the schedules, on one controller.
pub struct Runner<D> {
    store: Store,
    door: D,
    me: String,
    /// When this process saw each pending run first, and each claim of another controller.
    waiting: HashMap<String, Instant>,
    claims: HashMap<(String, String), Instant>,
}

/// What the steps of a run end with, for who waits for it.
pub enum Made {
    /// The job.
    Job(String),
    /// The check refused it; the run says so.
    Refused(Error),
    /// Not now: the database, the queue or an agent is away. The run is pending again.
    NotNow(Error),
}

impl Planner {
    /// One that has not looked yet.
    pub fn new(store: Store) -> Self {
        Self { store, looked: None }
    }

    /// One look at the due times.
    pub async fn tick(&mut self, now: DateTime<Utc>) -> Result<(), StoreError> {
        // A clock that went back, or one that was put right while this controller was down.
        if self.looked.is_none_or(|looked| now < looked - BACK) {
            self.rewind(now).await?;
        }
        self.looked = Some(now);
        self.plan(now).await
    }

    async fn rewind(&self, now: DateTime<Utc>) -> Result<(), StoreError> {
        for schedule in store::waiting(&self.store).await? {
            let (Some(timetable), Some(next)) = (timetable(&schedule), schedule.next_run.and_then(DateTime::from_timestamp_millis)) else {
                continue;
            };
            if let Some(earlier) = plan::rewind(&timetable, next, now) {
                store::advance(&self.store, &schedule, Some(earlier.timestamp_millis()), Vec::new()).await?;
            }
        }
        Ok(())
    }

    /// Gives every due time its row.
    async fn plan(&self, now: DateTime<Utc>) -> Result<(), StoreError> {
        for schedule in store::due(&self.store, now.timestamp_millis()).await? {
            let Some(next_run) = schedule.next_run.and_then(DateTime::from_timestamp_millis) else { continue };
            let Some(timetable) = timetable(&schedule) else { continue };
            let catch_up = CatchUp::from_word(&schedule.catch_up).unwrap_or(CatchUp::Skip);
            let plan = plan::due(&timetable, next_run, catch_up, now);
            let rows = plan.due.iter().map(|due| row(&schedule.id, due, now)).collect();
            store::advance(&self.store, &schedule, plan.next.map(|next| next.timestamp_millis()), rows).await?;
        }
        Ok(())
    }
}

impl<D: Door> Runner<D> {
    /// One that signs its claims with `me`, unique to the process.
    pub fn new(store: Store, door: D, me: String) -> Self {
        Self { store, door, me, waiting: HashMap::new(), claims: HashMap::new() }
    }

    /// One look at what is open: takes what is pending, and claims that their controllers left. Schedules go side by side, the runs of one
    /// after each other.
    pub async fn tick(&mut self, now: DateTime<Utc>, clock: Instant) -> Result<(), StoreError> {
        let open = claims::open(&self.store).await?;
        self.waiting.retain(|id, _| open.iter().any(|run| run.id == *id && run.status == store::PENDING));
        self.claims.retain(|(id, by), _| open.iter().any(|run| run.id == *id && run.claimed_by.as_ref() == Some(by)));
        let mut by_schedule: BTreeMap<String, Vec<(runs::Model, Instant)>> = BTreeMap::new();
        for run in open {
            let since = match &run.claimed_by {
                Some(by) => *self.claims.entry((run.id.clone(), by.clone())).or_insert(clock),
                None => *self.waiting.entry(run.id.clone()).or_insert(clock),
            };
            by_schedule.entry(run.schedule.clone()).or_default().push((run, since));
        }
        let (this, failed) = (&*self, Cell::new(false));
        let looks = by_schedule.into_values().map(|runs| async {
            // Where the store is away, those that have not begun need not ask.
            let looked = if failed.get() { Ok(()) } else { this.look(runs, now, clock).await };
            failed.set(failed.get() || looked.is_err());
            looked
        });
        let mut looks = stream::iter(looks).buffer_unordered(AT_ONCE);
        let mut all = Ok(());
        while let Some(looked) = looks.next().await {
            all = all.and(looked);
        }
        all
    }

    /// Looks at the open runs of one schedule.
    async fn look(&self, runs: Vec<(runs::Model, Instant)>, now: DateTime<Utc>, clock: Instant) -> Result<(), StoreError> {
        // One check for all of them: an agent that hangs is asked once.
        let mut checked = None;
        for (run, since) in runs {
            let waited = clock.saturating_duration_since(since);
            let made = if run.status == store::PENDING {
                self.try_take(&run, waited, &mut checked, now).await?
            } else if waited >= CLAIM && claims::take_over(&self.store, &run, &self.me).await? {
                tracing::warn!(schedule = run.schedule, run = run.id, "a run is taken over: its controller left between claim and job");
                match store::by_id(&self.store, &run.schedule).await? {
                    Some(schedule) => Some(self.make(&schedule, &run, now).await?),
                    None => None,
                }
            } else {
                None
            };
            if let Some(Made::NotNow(_)) = made {
                return Ok(());
            }
        }
        Ok(())
    }

    async fn try_take(
        &self,
        run: &runs::Model,
        waited: Duration,
        checked: &mut Option<Result<NewJob, Error>>,
        now: DateTime<Utc>,
    ) -> Result<Option<Made>, StoreError> {
        let Some(schedule) = store::by_id(&self.store, &run.schedule).await? else { return Ok(None) };
        // What another run stands before needs no check.
        if !claims::is_free(&self.store, run).await? {
            return Ok(None);
        }
        let checked = match checked {
            Some(checked) => checked,
            None => checked.insert(self.check(&schedule).await),
        };
        // Looked at before the claim: only the controller with the agent should take it.
        match checked {
            Ok(new) if self.door.has(&new.owner) => {}
            Ok(new) => {
                if waited < GRACE || self.door.is_elsewhere(&new.owner).await? {
                    return Ok(None);
                }
            }
            Err(error) if is_passing(error) => {
                tracing::debug!(run = run.id, %error, "a run waits");
                return Ok(None);
            }
            Err(_) => {}
        }
        match claims::claim(&self.store, run, &self.me).await? {
            Claim::Mine(schedule) => self.make(&schedule, run, now).await.map(Some),
            Claim::Waits | Claim::Gone => Ok(None),
        }
    }

    async fn check(&self, schedule: &schedules::Model) -> Result<NewJob, Error> {
        let wanted = wanted(&schedule.job, schedule.carbon_aware)?;
        self.door.check(&schedule.created_by, wanted).await
    }

    /// Makes the job of a run that is claimed by this controller, or finds the one that was made before a crash, and settles the run.
    pub async fn make(&self, schedule: &schedules::Model, run: &runs::Model, now: DateTime<Utc>) -> Result<Made, StoreError> {
        let key = Idempotency::derived("schedule run", &format!("{}\n{}", run.schedule, run.due_at));
        let made = match key.first_location(&self.store).await? {
            Some(location) => Made::Job(job_of(&location)),
            None => match self.check(schedule).await {
                Ok(new) => self.submit(new, key).await?,
                Err(error) if is_passing(&error) => Made::NotNow(error),
                Err(error) => Made::Refused(error),
            },
        };
        let outcome = match &made {
            Made::Job(job) => Outcome::Job(job.clone()),
            Made::Refused(error) => Outcome::Failed(error.message().to_owned()),
            Made::NotNow(error) => {
                tracing::warn!(schedule = schedule.id, run = run.id, %error, "a run could not make its job yet");
                claims::give_back(&self.store, &run.id, &self.me).await?;
                return Ok(made);
            }
        };
        tracing::info!(schedule = schedule.id, name = schedule.name, run = run.id, ?outcome, "a schedule ran");
        claims::settle(&self.store, run, &self.me, outcome, now.timestamp_millis()).await?;
        Ok(made)
    }

    async fn submit(&self, new: NewJob, key: Idempotency) -> Result<Made, StoreError> {
        use jobs::core::Error as Refusal;
        match self.door.submit(new, key.clone()).await {
            Ok(job) => Ok(Made::Job(job.id)),
            // Another controller was quicker with the same run: its job is the job.
            Err(Refusal::Store(StoreError::Conflict(cause))) => match key.first_location(&self.store).await? {
                Some(location) => Ok(Made::Job(job_of(&location))),
                None => Err(StoreError::Other(cause)),
            },
            Err(error @ (Refusal::Draining | Refusal::Gone | Refusal::Store(_))) => Ok(Made::NotNow(error.into())),
            Err(error) => Ok(Made::Refused(error.into())),
        }
    }

    /// Its signature.
    pub fn me(&self) -> &str {
        &self.me
    }
}

/// A stored timetable; one that cannot be read any more (a zone that was removed, say) is left alone and told.
fn timetable(schedule: &schedules::Model) -> Option<Timetable> {
    match Timetable::of(&schedule.cron, &schedule.timezone) {
        Ok(timetable) => Some(timetable),
        Err(error) => {
            tracing::error!(schedule = schedule.id, %error, "a stored schedule cannot be read; change or remove it");
            None
        }
    }
}

/// The job that a schedule asks for: as it was given, and carbon-aware where the schedule is.
pub fn wanted(job: &str, carbon_aware: bool) -> Result<Create, Error> {
    let mut wanted: Create = serde_json::from_str(job).map_err(|e| Error::bad_request(format!("job: {e}")))?;
    if carbon_aware {
        wanted.options.get_or_insert_default().carbon_aware = Some(true);
    }
    Ok(wanted)
}

fn row(schedule: &str, due: &plan::Due, now: DateTime<Utc>) -> runs::Model {
    let (cause, status, missed) = match due.kind {
        Kind::OnTime => (cause::CRON, store::PENDING, 0),
        Kind::CatchUp(missed) => (cause::CATCH_UP, store::PENDING, missed),
        Kind::Missed(missed) => (cause::CRON, store::SKIPPED, missed),
    };
    let reason = format!("{} missed: no controller was there", missed_words(missed));
    runs::Model {
        id: new_id(),
        schedule: schedule.to_owned(),
        due_at: due.at.timestamp_millis(),
        cause: cause.to_owned(),
        status: status.to_owned(),
        claimed_by: None,
        missed: i64::try_from(missed).unwrap_or(i64::MAX),
        job: None,
        reason: (status == store::SKIPPED).then_some(reason),
        created_at: now.timestamp_millis(),
        started_at: None,
    }
}

/// A new run's id.
pub fn new_id() -> String {
    format!("run-{}", shared::ids::random_hex::<8>())
}

fn job_of(location: &str) -> String {
    location.rsplit('/').next().unwrap_or_default().to_owned()
}

/// Whether the same may work in a moment.
fn is_passing(error: &Error) -> bool {
    matches!(error.code(), Code::Unavailable | Code::BadGateway | Code::RateLimited)
}

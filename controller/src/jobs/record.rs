//! A job as the queue holds it: the durable state of `shared::job`, what was asked, the counters, and its row in the store.
//!
//! Owns: the translation between a row and a job. Never: changes a state (only `step` does, called by the queue).
//! A crash here costs nothing: every field is read from the store again.

use std::time::Instant;

use proto::v1::{Assign, Connection};
use sea_orm::ActiveValue::Set;
use shared::job::{Hold, Stage, State, Status};
use shared::options::{Format, JobType, Options};
use shared::progress::Progress;

use super::footprint::Footprint;
use crate::store::entities::jobs as row;

/// What a new job is asked to do, after every check.
#[derive(Clone, Debug)]
pub struct NewJob {
    /// What kind of work.
    pub kind: JobType,
    /// The connection's name.
    pub provider: String,
    /// The connection's kind.
    pub provider_kind: String,
    /// Folder of the connection on its agent's host, or empty.
    pub provider_path: String,
    /// Agent that serves the connection; the job runs there.
    pub owner: String,
    /// The provider's id of the VM.
    pub vm_id: String,
    /// The VM's name.
    pub vm_name: String,
    /// Path of the source where the job names no VM; else empty.
    pub source: String,
    /// Capacity of all disks in bytes.
    pub capacity: u64,
    /// Output format.
    pub format: Format,
    /// Options as they were asked for.
    pub options: Options,
    /// Who asks.
    pub created_by: String,
    /// What was accepted but does nothing here; goes into the job's log.
    pub notes: Vec<String>,
}

/// A measured speed, as EWMA so that it follows a fast or slow week.
#[derive(Clone, Debug, Default)]
pub struct Speed {
    last: Option<(Instant, u64)>,
    /// Bytes of finished work (durable plus verified) a second.
    pub bytes_per_second: f64,
}

impl Speed {
    /// Takes the counters of `work` bytes at `now`.
    pub fn note(&mut self, now: Instant, work: u64) {
        let Some((then, before)) = self.last else {
            self.last = Some((now, work));
            return;
        };
        let seconds = now.saturating_duration_since(then).as_secs_f64();
        if seconds < 0.2 {
            return;
        }
        let rate = work.saturating_sub(before) as f64 / seconds;
        // A time constant of 10 s: quick enough to follow a stall, slow enough to be read.
        let weight = 1.0 - (-seconds / 10.0).exp();
        self.bytes_per_second =
            if self.bytes_per_second == 0.0 { rate } else { self.bytes_per_second + weight * (rate - self.bytes_per_second) };
        self.last = Some((now, work));
    }
}

/// Jobs that were made together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// `batch-…`.
    pub id: String,
    /// How many of them may run at once; absent: any number.
    pub limit: Option<u32>,
}

/// One job.
#[derive(Clone, Debug)]
pub struct Job {
    /// `job-…`.
    pub id: String,
    /// The durable state.
    pub state: State,
    /// What kind of work.
    pub kind: JobType,
    /// The connection's name.
    pub provider: String,
    /// The connection's kind.
    pub provider_kind: String,
    /// Folder of the connection on its agent's host, or empty.
    pub provider_path: String,
    /// Agent that it is pinned to.
    pub owner: String,
    /// The provider's id of the VM.
    pub vm_id: String,
    /// The VM's name.
    pub vm_name: String,
    /// Path of the source, or empty.
    pub source: String,
    /// Capacity of all disks in bytes.
    pub capacity: u64,
    /// Output format.
    pub format: Format,
    /// Options.
    pub options: Options,
    /// 0–100, higher first.
    pub priority: u8,
    /// Counters of the current or last attempt.
    pub counters: Progress,
    /// Highest percentage shown in this attempt, so that it never falls.
    pub shown: u8,
    /// Estimated seconds for the whole job.
    pub estimate: Option<u64>,
    /// Why it failed.
    pub error: Option<String>,
    /// The stable word for why it failed.
    pub error_code: Option<String>,
    /// What came of it.
    pub result: Option<serde_json::Value>,
    /// The batch that it was made in.
    pub batch: Option<Batch>,
    /// Who made it.
    pub created_by: String,
    /// Milliseconds since 1970.
    pub created_at: i64,
    /// Milliseconds since 1970.
    pub updated_at: i64,
    /// Milliseconds since 1970.
    pub started_at: Option<i64>,
    /// Milliseconds since 1970.
    pub finished_at: Option<i64>,
    /// Until when it waits for its time or for the grid; milliseconds since 1970.
    pub hold_until: Option<i64>,
    /// By when it should be done; milliseconds since 1970.
    pub deadline: Option<i64>,
    /// Whether the deadline has passed and was told.
    pub deadline_missed: bool,
    /// What the grid says, of a carbon-aware job and of a migration.
    pub carbon: Option<Box<Footprint>>,
    /// Speed of the running attempt; not stored.
    pub speed: Speed,
}

/// The word under which the speed of such a job is kept.
pub fn rate_word(kind: JobType, format: Format) -> &'static str {
    if kind == JobType::Verify { kind.word() } else { format.word() }
}

/// A stored number as a count; what is negative was never written by us.
fn count(value: i64) -> u64 {
    u64::try_from(value).unwrap_or(0)
}

/// A count as the databases keep it.
pub fn stored(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// Milliseconds since 1970 UTC.
pub fn now_millis() -> i64 {
    shared::clock::now().timestamp_millis()
}

impl Job {
    /// A new job, queued.
    pub fn new(id: String, new: NewJob) -> Self {
        let now = now_millis();
        Self {
            id,
            state: State::queued(),
            kind: new.kind,
            provider: new.provider,
            provider_kind: new.provider_kind,
            provider_path: new.provider_path,
            owner: new.owner,
            vm_id: new.vm_id,
            vm_name: new.vm_name,
            source: new.source,
            capacity: new.capacity,
            format: new.format,
            priority: new.options.priority.unwrap_or(50),
            options: new.options,
            counters: Progress::default(),
            shown: 0,
            estimate: None,
            error: None,
            error_code: None,
            result: None,
            batch: None,
            created_by: new.created_by,
            created_at: now,
            updated_at: now,
            started_at: None,
            finished_at: None,
            hold_until: None,
            deadline: None,
            deadline_missed: false,
            carbon: None,
            speed: Speed::default(),
        }
    }

    /// Bytes safe by now: what an attempt brought.
    pub fn safe_bytes(&self) -> u64 {
        self.counters.durable.saturating_add(self.counters.verified)
    }

    /// Name and id, lower case: what is searched, and what a sort by name goes by.
    pub fn folded(&self) -> String {
        crate::store::fold(&format!("{}\n{}", self.vm_name, self.id))
    }

    /// What it works on, as people call it: the VM, or the path of the source.
    pub fn subject(&self) -> &str {
        if self.source.is_empty() { &self.vm_name } else { &self.source }
    }

    /// The word under which its speed is kept: the format, and all checks as one.
    pub fn rate_word(&self) -> &'static str {
        rate_word(self.kind, self.format)
    }

    /// Takes newer counters of the running attempt.
    pub fn note_progress(&mut self, counters: Progress, now: Instant) {
        self.counters = counters;
        self.speed.note(now, self.safe_bytes());
        self.shown = self.shown.max(self.percent());
    }

    /// Whole percent by the counters alone. Before the source was opened nothing is known, so nothing is claimed.
    fn percent(&self) -> u8 {
        let unknown = self.counters.data == 0 && self.state.stage == Stage::Preparing;
        if unknown { 0 } else { self.counters.percent(self.options.verifies() || self.kind == JobType::Verify) }
    }

    /// Reads a row; `None` where a word or JSON in it is none of ours.
    pub fn from_row(row: row::Model) -> Option<Self> {
        let state = State {
            status: Status::from_word(&row.status)?,
            hold: Hold::from_word(&row.hold)?,
            stage: Stage::from_word(&row.stage)?,
            epoch: count(row.epoch),
            attempt: u32::try_from(row.attempt).ok()?,
            strikes: u32::try_from(row.strikes).ok()?,
            agent: row.agent,
            mark: count(row.mark),
        };
        let result = match row.result.as_deref().map(serde_json::from_str) {
            Some(result) => Some(result.ok()?),
            None => None,
        };
        let mut job = Self {
            id: row.id,
            state,
            kind: JobType::from_word(&row.kind)?,
            provider: row.provider,
            provider_kind: row.provider_kind,
            provider_path: row.provider_path,
            owner: row.owner,
            vm_id: row.vm_id,
            vm_name: row.vm_name,
            source: row.source,
            capacity: count(row.capacity),
            format: Format::from_word(&row.format)?,
            options: serde_json::from_str(&row.options).ok()?,
            priority: u8::try_from(row.priority).ok()?,
            counters: Progress {
                data: count(row.data),
                read: count(row.read),
                durable: count(row.durable),
                verified: count(row.verified),
                resumed: count(row.resumed),
            },
            shown: 0,
            estimate: row.estimate.map(count),
            error: row.error,
            error_code: row.error_code,
            result,
            batch: row.batch.map(|id| Batch { id, limit: row.batch_limit.and_then(|limit| u32::try_from(limit).ok()) }),
            created_by: row.created_by,
            created_at: row.created_at,
            updated_at: row.updated_at,
            started_at: row.started_at,
            finished_at: row.finished_at,
            hold_until: row.hold_until,
            deadline: row.deadline,
            deadline_missed: row.deadline_missed,
            carbon: match row.carbon.as_deref().map(serde_json::from_str) {
                Some(carbon) => Some(carbon.ok()?),
                None => None,
            },
            speed: Speed::default(),
        };
        job.shown = job.percent();
        Some(job)
    }

    /// As its agent is told to begin.
    pub fn to_assign(&self) -> Assign {
        // When it runs is none of the agent's business, and one of an older version would refuse the words.
        let options = Options { not_before: None, deadline: None, carbon_aware: None, ..self.options.clone() };
        Assign {
            job: self.id.clone(),
            epoch: self.state.epoch,
            attempt: self.state.attempt,
            r#type: self.kind.word().to_owned(),
            connection: self.source.is_empty().then(|| Connection {
                name: self.provider.clone(),
                kind: self.provider_kind.clone(),
                path: self.provider_path.clone(),
                account: None,
            }),
            vm_id: self.vm_id.clone(),
            source: self.source.clone(),
            format: self.format.word().to_owned(),
            options_json: serde_json::to_string(&options).unwrap_or_else(|_| "{}".to_owned()),
        }
    }

    /// The whole row, to insert.
    pub fn to_row(&self) -> row::ActiveModel {
        row::ActiveModel {
            id: Set(self.id.clone()),
            kind: Set(self.kind.word().to_owned()),
            provider: Set(self.provider.clone()),
            provider_kind: Set(self.provider_kind.clone()),
            provider_path: Set(self.provider_path.clone()),
            owner: Set(self.owner.clone()),
            vm_id: Set(self.vm_id.clone()),
            vm_name: Set(self.vm_name.clone()),
            vm_folded: Set(self.folded()),
            source: Set(self.source.clone()),
            capacity: Set(stored(self.capacity)),
            format: Set(self.format.word().to_owned()),
            options: Set(serde_json::to_string(&self.options).unwrap_or_else(|_| "{}".to_owned())),
            priority: Set(i64::from(self.priority)),
            batch: Set(self.batch.as_ref().map(|batch| batch.id.clone())),
            batch_limit: Set(self.batch.as_ref().and_then(|batch| batch.limit).map(i64::from)),
            created_by: Set(self.created_by.clone()),
            created_at: Set(self.created_at),
            ..self.to_changes()
        }
    }

    /// The columns that a transition may change.
    pub fn to_changes(&self) -> row::ActiveModel {
        row::ActiveModel {
            status: Set(self.state.status.word().to_owned()),
            hold: Set(self.state.hold.word().to_owned()),
            stage: Set(self.state.stage.word().to_owned()),
            epoch: Set(stored(self.state.epoch)),
            attempt: Set(i64::from(self.state.attempt)),
            strikes: Set(i64::from(self.state.strikes)),
            agent: Set(self.state.agent.clone()),
            mark: Set(stored(self.state.mark)),
            estimate: Set(self.estimate.map(stored)),
            error: Set(self.error.clone()),
            error_code: Set(self.error_code.clone()),
            result: Set(self.result.as_ref().map(ToString::to_string)),
            updated_at: Set(self.updated_at),
            started_at: Set(self.started_at),
            finished_at: Set(self.finished_at),
            ..self.to_holds()
        }
    }

    /// What may change while the state stays: the hold, the record of the grid, and the counters.
    pub fn to_holds(&self) -> row::ActiveModel {
        row::ActiveModel {
            hold_until: Set(self.hold_until),
            deadline: Set(self.deadline),
            deadline_missed: Set(self.deadline_missed),
            carbon: Set(self.carbon.as_ref().and_then(|carbon| serde_json::to_string(carbon).ok())),
            ..self.to_counters()
        }
    }

    /// The counters alone.
    pub fn to_counters(&self) -> row::ActiveModel {
        row::ActiveModel {
            data: Set(stored(self.counters.data)),
            read: Set(stored(self.counters.read)),
            durable: Set(stored(self.counters.durable)),
            verified: Set(stored(self.counters.verified)),
            resumed: Set(stored(self.counters.resumed)),
            ..Default::default()
        }
    }
}

//! Schedules and runs as the API shows them.
//!
//! Owns: the names and meaning of the fields. Never: looks anything up. A crash here costs one answer.

use chrono::{DateTime, Utc};
use serde::Serialize;
use utoipa::ToSchema;

use super::plan::Timetable;
use super::store;
use crate::http::rfc3339;
use crate::jobs;
use crate::store::entities::{schedule_runs as runs, schedules};

/// How many due times are shown.
const SHOWN: usize = 5;

/// A schedule.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[schema(as = Schedule, example = json!({
    "id": "sched-5f0c2a9be1d34c77", "name": "nightly web", "cron": "30 2 * * 1-5", "timezone": "Europe/Berlin",
    "job": {"type": "export", "provider": "local", "vm_name": "web-server-01", "format": "qcow2", "options": {"compress": true}},
    "provider": "local", "enabled": true, "overlap": "skip", "catch_up": "skip", "carbon_aware": false,
    "next_run": "2026-01-02T01:30:00.000Z",
    "next_runs": ["2026-01-02T01:30:00.000Z", "2026-01-05T01:30:00.000Z", "2026-01-06T01:30:00.000Z", "2026-01-07T01:30:00.000Z", "2026-01-08T01:30:00.000Z"],
    "last_run": "2026-01-01T01:30:00.000Z", "last_status": "started", "last_job": "job-5f0c2a9be1d34c77",
    "created_by": "admin", "created_at": "2025-12-24T09:00:00.000Z", "updated_at": "2025-12-24T09:00:00.000Z"
}))]
pub struct View {
    /// `sched-` and hex digits.
    pub id: String,
    /// What people call it.
    pub name: String,
    /// Five fields, or `@daily` and its like, as it was given.
    pub cron: String,
    /// IANA name.
    pub timezone: String,
    /// The body of `POST /jobs` that each run sends.
    #[schema(value_type = Object)]
    pub job: serde_json::Value,
    /// Name of the job's connection; null for jobs that have none.
    pub provider: Option<String>,
    /// Whether its times count.
    pub enabled: bool,
    /// `skip`, `queue` or `allow`: what becomes of a run while the job of the last one is not finished.
    pub overlap: String,
    /// `skip` or `once`: what becomes of due times at which no controller was there.
    pub catch_up: String,
    /// Its jobs wait for clean power.
    pub carbon_aware: bool,
    /// RFC 3339; null while it is switched off.
    pub next_run: Option<String>,
    /// The next five due times, RFC 3339.
    pub next_runs: Vec<String>,
    /// Due time of the newest run that is settled, RFC 3339.
    pub last_run: Option<String>,
    /// What came of it: `started`, `skipped` or `failed`.
    pub last_status: Option<String>,
    /// The job it made.
    pub last_job: Option<String>,
    /// Who made it; its jobs are theirs.
    pub created_by: String,
    /// RFC 3339.
    pub created_at: String,
    /// RFC 3339.
    pub updated_at: String,
}

impl View {
    /// Of a row, with the due times after `now`.
    pub fn of(row: schedules::Model, now: DateTime<Utc>) -> Self {
        let timetable = if row.enabled { Timetable::of(&row.cron, &row.timezone).ok() } else { None };
        let next = timetable.map(|timetable| timetable.next(now, SHOWN)).unwrap_or_default();
        let next_runs: Vec<String> = next.into_iter().map(shared::clock::rfc3339).collect();
        Self {
            id: row.id,
            name: row.name,
            cron: row.cron,
            timezone: row.timezone,
            job: serde_json::from_str(&row.job).unwrap_or_default(),
            provider: Some(row.provider).filter(|provider| !provider.is_empty()),
            enabled: row.enabled,
            overlap: row.overlap,
            catch_up: row.catch_up,
            carbon_aware: row.carbon_aware,
            next_run: next_runs.first().cloned(),
            next_runs,
            last_run: row.last_run.map(rfc3339),
            last_status: row.last_status,
            last_job: row.last_job,
            created_by: row.created_by,
            created_at: rfc3339(row.created_at),
            updated_at: rfc3339(row.updated_at),
        }
    }
}

/// A run of a schedule.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[schema(as = ScheduleRun, example = json!({
    "id": "run-5f0c2a9be1d34c77", "schedule": "sched-5f0c2a9be1d34c77", "cause": "cron", "due_at": "2026-01-01T01:30:00.000Z",
    "started_at": "2026-01-01T01:30:00.412Z", "status": "started", "job": "job-5f0c2a9be1d34c77", "reason": null, "error": null, "missed": 0
}))]
pub struct Run {
    /// `run-` and hex digits.
    pub id: String,
    /// The schedule's id.
    pub schedule: String,
    /// `cron`: its time came; `catch_up`: it had come while no controller was there; `manual`: somebody asked.
    pub cause: String,
    /// RFC 3339.
    pub due_at: String,
    /// When its job was made, RFC 3339.
    pub started_at: Option<String>,
    /// `waiting`, `started`, `skipped` or `failed`.
    pub status: &'static str,
    /// Id of the job it made.
    pub job: Option<String>,
    /// Why it waits or was skipped.
    pub reason: Option<String>,
    /// Why it failed.
    pub error: Option<String>,
    /// How many missed due times it stands for.
    pub missed: i64,
}

impl From<runs::Model> for Run {
    fn from(row: runs::Model) -> Self {
        let status = match row.status.as_str() {
            store::STARTED => "started",
            store::SKIPPED => "skipped",
            store::FAILED => "failed",
            _ => "waiting",
        };
        let (reason, error) = if status == "failed" { (None, row.reason) } else { (row.reason, None) };
        Self {
            id: row.id,
            schedule: row.schedule,
            cause: row.cause,
            due_at: rfc3339(row.due_at),
            started_at: row.started_at.map(rfc3339),
            status,
            job: row.job,
            reason,
            error,
            missed: row.missed,
        }
    }
}

/// A run that somebody asked for, and its job.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[schema(as = ScheduleRunNow)]
pub struct RunNow {
    /// The run.
    pub run: Run,
    /// Its job.
    pub job: jobs::view::View,
}

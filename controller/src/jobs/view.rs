//! A job as the API shows it.
//!
//! Owns: the names and meaning of the fields. Never: looks anything up. A crash here costs one answer.

use serde::Serialize;
use shared::job::{Stage, Status};
use shared::options::{JobType, Options};
use utoipa::ToSchema;

use super::record::Job;

/// A job. Byte counts are bytes of data extents: holes count nothing.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[schema(as = Job, example = json!({
    "id": "job-5f0c2a9be1d34c77", "type": "export", "status": "running", "stage": "copying", "provider": "local", "vm_name": "web-server-01",
    "format": "qcow2", "progress": 42, "bytes_done": 4509715660u64, "bytes_total": 5368709120u64, "rate_bps": 734003200u64,
    "eta_seconds": 9, "estimated_duration": "15s", "attempt": 1, "agent": "local", "error": null, "error_code": null,
    "created_at": "2025-06-15T10:30:00.000Z", "updated_at": "2025-06-15T10:30:02.000Z", "started_at": "2025-06-15T10:30:00.000Z",
    "finished_at": null, "priority": 50, "bytes_verified": 0, "bytes_resumed": 0, "bytes_read": 4571348992u64, "created_by": "admin",
    "options": {"compress": true, "destination": "exports/"}, "result": null
}))]
pub struct View {
    /// `job-` and hex digits.
    pub id: String,
    /// What kind of work.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// `queued`, `running`, `completed`, `failed` or `cancelled`.
    pub status: &'static str,
    /// Finer than the status: `queued`, `waiting` (for its agent), `not_before`, `carbon` (waits for a clean grid), `paused`, `preparing`, `copying`, `verifying`, `publishing`, `cancelling`, or the end.
    pub stage: &'static str,
    /// Why it waits, where it does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waiting_for: Option<String>,
    /// Name of the connection; null where the job reads a file.
    pub provider: Option<String>,
    /// The VM's name; where the job reads a file, what its output is named after.
    pub vm_name: String,
    /// The file that it reads, `ROOT/…`; absent where it names a VM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// Output format; of `verify` the artifact's.
    pub format: &'static str,
    /// Whole percent; 100 only when published.
    pub progress: u8,
    /// Bytes safe on the output.
    pub bytes_done: u64,
    /// Bytes of data; null until the source was opened.
    pub bytes_total: Option<u64>,
    /// Bytes read back and compared.
    pub bytes_verified: u64,
    /// Bytes that the current attempt found done by earlier ones.
    pub bytes_resumed: u64,
    /// Bytes that the current attempt has read from the source; with `bytes_resumed` it shows what an interruption cost.
    pub bytes_read: u64,
    /// Bytes a second, copied or read back, while running.
    pub rate_bps: u64,
    /// Seconds to the end at that rate; null where there is none, and while a guest is adapted and booted: nobody knows how long that takes.
    pub eta_seconds: Option<u64>,
    /// The whole job's length in words, from measured rates; null before anything was measured.
    pub estimated_duration: Option<String>,
    /// Attempts begun.
    pub attempt: u32,
    /// Name of the agent it is or was with.
    pub agent: Option<String>,
    /// What went wrong, of a failed job or of the last attempt.
    pub error: Option<String>,
    /// The stable word for it.
    pub error_code: Option<String>,
    /// 0–100, higher first.
    pub priority: u8,
    /// The batch that it was made in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub batch: Option<String>,
    /// Who made it.
    pub created_by: String,
    /// RFC 3339.
    pub created_at: String,
    /// RFC 3339.
    pub updated_at: String,
    /// RFC 3339; the first attempt's beginning.
    pub started_at: Option<String>,
    /// RFC 3339.
    pub finished_at: Option<String>,
    /// As they were asked for.
    #[schema(value_type = Object)]
    pub options: Options,
    /// Files, manifest, `verified`, receipt; null before the end.
    #[schema(value_type = Option<Object>)]
    pub result: Option<serde_json::Value>,
    /// True once the deadline passed before the end.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub deadline_missed: bool,
    /// What the grid costs, of a carbon-aware job that was planned, and of a migration.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub carbon: Option<super::footprint::Shown>,
}

impl View {
    /// Of a job; `agent_name` gives an agent's name for its id.
    pub fn of(job: &Job, agent_name: impl Fn(&str) -> String) -> Self {
        let (rate, eta) = rate_and_eta(job);
        let until = job.hold_until.map(time).unwrap_or_default();
        let waiting_for = match job.state.public_stage() {
            "waiting" => Some(format!("agent {}, which is away or draining", agent_name(&job.owner))),
            "not_before" => Some(format!("its time, {until}")),
            "carbon" => Some(format!("a cleaner grid, until {until} at the latest plan")),
            _ => None,
        };
        Self {
            id: job.id.clone(),
            kind: job.kind.word(),
            status: job.state.status.public(),
            stage: job.state.public_stage(),
            waiting_for,
            provider: (!job.provider.is_empty()).then(|| job.provider.clone()),
            vm_name: job.vm_name.clone(),
            source: (!job.source.is_empty()).then(|| job.source.clone()),
            format: job.format.word(),
            progress: progress(job),
            bytes_done: job.counters.durable,
            bytes_total: is_opened(job).then_some(job.counters.data),
            bytes_verified: job.counters.verified,
            bytes_resumed: job.counters.resumed,
            bytes_read: job.counters.read,
            rate_bps: rate,
            eta_seconds: eta,
            estimated_duration: estimate(job, eta).map(shared::clock::duration_words),
            attempt: job.state.attempt,
            agent: job.state.agent.as_deref().map(agent_name),
            error: job.error.clone(),
            error_code: job.error_code.clone(),
            priority: job.priority,
            batch: job.batch.as_ref().map(|batch| batch.id.clone()),
            created_by: job.created_by.clone(),
            created_at: time(job.created_at),
            updated_at: time(job.updated_at),
            started_at: job.started_at.map(time),
            finished_at: job.finished_at.map(time),
            options: job.options.clone(),
            result: job.result.clone(),
            deadline_missed: job.deadline_missed,
            carbon: job.carbon.as_ref().and_then(|carbon| carbon.shown(super::record::now_millis())),
        }
    }
}

/// Milliseconds since 1970 as the API writes a time.
pub fn time(millis: i64) -> String {
    shared::clock::rfc3339(chrono::DateTime::from_timestamp_millis(millis).unwrap_or_default())
}

/// The source was opened, so its data is known.
fn is_opened(job: &Job) -> bool {
    job.counters.data > 0 || job.state.stage > Stage::Preparing || job.state.status == Status::Completed
}

/// Whole percent as shown.
pub fn progress(job: &Job) -> u8 {
    if job.state.status == Status::Completed { 100 } else { job.shown.min(99) }
}

fn rate_and_eta(job: &Job) -> (u64, Option<u64>) {
    let rate = job.speed.bytes_per_second;
    // How long a guest takes to be adapted and to boot nobody knows, and no bytes say.
    let moves = !matches!(job.state.stage, Stage::Adapting | Stage::Deploying | Stage::Publishing);
    if !matches!(job.state.status, Status::Running) || rate < 1.0 || !moves {
        return (0, None);
    }
    // A check moves both counters at once.
    let passes = if job.options.verifies() || job.kind == JobType::Verify { 2 } else { 1 };
    let all = job.counters.data.saturating_mul(passes);
    let left = all.saturating_sub(job.safe_bytes());
    (rate as u64, is_opened(job).then(|| (left as f64 / rate).ceil() as u64))
}

/// Seconds of the whole job: what it took, else what has passed and what is left, else the forecast.
fn estimate(job: &Job, eta: Option<u64>) -> Option<u64> {
    let seconds = |from: i64, to: i64| u64::try_from(to.saturating_sub(from) / 1000).unwrap_or(0);
    match (job.started_at, job.finished_at, eta) {
        (Some(start), Some(end), _) if job.state.status == Status::Completed => Some(seconds(start, end)),
        (Some(start), None, Some(eta)) => Some(seconds(start, super::record::now_millis()).saturating_add(eta)),
        _ => job.estimate,
    }
}

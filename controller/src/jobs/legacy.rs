//! The paths of the product's first API: `/jobs/submit`, `/jobs/query`, `/jobs/cancel`, `/jobs/progress/{id}`, `/status`.
//!
//! Owns: the old shapes, as the public Go daemon of the same name has them, mapped on the services of today. What they cannot say truly is left
//! out; what old clients sent and nobody takes here (a vCenter's password in each job) is refused by name.
//! Never: decides anything. A crash here costs one answer.

use actix_web::{HttpRequest, HttpResponse, web};
use serde::{Deserialize, Serialize};
use shared::error::Code;
use shared::job::Status;
use utoipa::ToSchema;

use super::lists;
use super::record::Job;
use super::routes::{id_of, job_of, make_all, view};
use super::service::{self, Create, Wishes};
use super::store::{self, Filter, SortBy};
use crate::app::App;
use crate::http::body::Json;
use crate::http::guard::{Operator, Viewer};
use crate::http::idempotency::Idempotency;
use crate::http::query::{Order, Paging};
use crate::http::reply::{Error, ErrorBody};
use crate::system::audit;
use crate::{providers, vms};

/// Jobs in one request.
const MOST: usize = super::batch::MOST;
/// Most jobs of one answer; the old API knew no pages.
const ANSWERED: u64 = 1000;
/// Statuses in the old words.
const STATUSES: &[&str] = &["pending", "running", "completed", "failed", "cancelled"];

fn now() -> String {
    shared::clock::rfc3339(shared::clock::now())
}

/// An export in the old words.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
#[schema(example = json!({"vm_path": "/web-server-01", "output_dir": "/var/lib/hypersdk/exports/", "format": "ova", "compress": true}))]
pub struct Definition {
    /// Name, inventory path or id of the VM.
    pub vm_path: String,
    /// Connection or kind, where VMs of several connections bear that name; the old API had one vCenter only.
    pub provider: Option<String>,
    /// Folder inside a root of the agent.
    pub output_dir: Option<String>,
    /// The same.
    pub output_path: Option<String>,
    /// Default `ovf`.
    pub format: Option<String>,
    /// Compress where the format can.
    pub compress: bool,
    /// Always so here; false is refused.
    pub thin: Option<bool>,
    /// Not used: ids are given here.
    pub id: Option<String>,
    /// Not used.
    pub name: Option<String>,
    /// Not used.
    pub created_at: Option<String>,
}

/// One definition, or several.
#[derive(Clone, Debug, ToSchema)]
pub enum Submit {
    /// In `jobs`.
    Several {
        /// The definitions.
        jobs: Vec<Definition>,
    },
    /// Alone.
    One(Definition),
}

impl<'de> Deserialize<'de> for Submit {
    // By hand: of an untagged enum serde says only that nothing fits, and not which field was unknown.
    fn deserialize<D: serde::Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Several {
            jobs: Vec<Definition>,
        }
        let value = serde_json::Value::deserialize(input)?;
        let fail = |e: serde_json::Error| serde::de::Error::custom(e.to_string());
        if value.get("jobs").is_some() {
            return serde_json::from_value::<Several>(value).map(|several| Self::Several { jobs: several.jobs }).map_err(fail);
        }
        serde_json::from_value(value).map(Self::One).map_err(fail)
    }
}

/// What became of them.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[schema(example = json!({"job_ids": ["job-5f0c2a9be1d34c77"], "accepted": 1, "rejected": 0, "timestamp": "2025-06-15T10:30:00.000Z"}))]
pub struct Submitted {
    /// Ids of those that were made.
    job_ids: Vec<String>,
    /// How many.
    accepted: usize,
    /// Those that were not.
    rejected: usize,
    /// Why not, a sentence each.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    errors: Vec<String>,
    /// Now.
    timestamp: String,
}

/// Legacy: makes export jobs; use POST /jobs or /jobs/batch. Fields with a vCenter's address and password are refused: connect it once with
/// POST /providers/connect.
#[utoipa::path(post, path = "/jobs/submit", tag = "Legacy", security(("token" = [])), request_body = Submit,
    params(("Idempotency-Key" = Option<String>, Header, description = "the same key and body give the first answer again")),
    responses(
        (status = 200, description = "what became of them", body = Submitted),
        (status = 400, description = "the body cannot be read, or is empty", body = ErrorBody),
        (status = 401, description = "no valid token", body = ErrorBody),
        (status = 403, description = "not an operator", body = ErrorBody),
        (status = 409, description = "the Idempotency-Key came with another body", body = ErrorBody),
        (status = 413, description = "the body is too large", body = ErrorBody),
        (status = 415, description = "no JSON", body = ErrorBody),
        (status = 429, description = "too many requests", body = ErrorBody),
        (status = 503, description = "the database is away or the controller drains", body = ErrorBody),
    ))]
pub async fn submit(caller: Operator, request: HttpRequest, app: web::Data<App>, body: Json<Submit>) -> Result<HttpResponse, Error> {
    Idempotency::once(&request, &caller, &body.digest, &app.store, async |key| {
        let definitions = match body.value {
            Submit::One(definition) => vec![definition],
            Submit::Several { jobs } => jobs,
        };
        if definitions.is_empty() || definitions.len() > MOST {
            return Err(Error::bad_request(format!("submit 1 to {MOST} jobs, not {}", definitions.len())));
        }
        let (mut new, mut errors) = (Vec::new(), Vec::new());
        for definition in definitions {
            let vm = definition.vm_path.clone();
            match translate(&app, &caller.name, definition).await {
                Ok(job) => new.push(job),
                Err(e) if matches!(e.code(), Code::Unavailable | Code::Internal) => return Err(e),
                Err(e) => errors.push(format!("{}: {}", service::clip(&vm), e.message())),
            }
        }
        make_all(&app, new, None, key, |views| {
            let job_ids: Vec<String> = views.into_iter().map(|view| view.id).collect();
            let submitted = Submitted { accepted: job_ids.len(), rejected: errors.len(), job_ids, errors, timestamp: now() };
            (200, serde_json::to_value(submitted))
        })
        .await
    })
    .await
}

async fn translate(app: &App, caller: &str, definition: Definition) -> Result<super::record::NewJob, Error> {
    let vm_path = service::required("vm_path", Some(definition.vm_path), "a VM's name, path or id; GET /vms/list lists them")?;
    if definition.thin == Some(false) {
        return Err(Error::new(Code::Unprocessable, "thick outputs are not made: leave `thin` out"));
    }
    let provider = match definition.provider {
        Some(provider) => provider,
        None => connection_of(app, &vm_path).await?,
    };
    let options = Wishes {
        compress: definition.compress.then_some(true),
        destination: definition.output_dir.or(definition.output_path).filter(|path| !path.is_empty()),
        ..Wishes::default()
    };
    let wanted = Create {
        kind: Some("export".to_owned()),
        provider: Some(provider),
        vm_name: Some(vm_path),
        format: Some(definition.format.filter(|format| !format.is_empty()).unwrap_or_else(|| "ovf".to_owned())),
        options: Some(options),
        ..Create::default()
    };
    service::check(app, caller, wanted).await
}

/// The one connection that has such a VM.
async fn connection_of(app: &App, vm: &str) -> Result<String, Error> {
    let mut having = Vec::new();
    for row in providers::service::all(&app.store).await? {
        match vms::service::resolve(&app.store, &row, vm).await {
            Ok(_) => having.push(row.name),
            Err(e) if e.code() == Code::NotFound => {}
            Err(e) => return Err(e),
        }
    }
    match having.as_slice() {
        [only] => Ok(only.clone()),
        [] => Err(Error::not_found(format!("no VM `{}`; GET /vms/list lists them", service::clip(vm)))),
        _ => Err(Error::new(Code::Ambiguous, format!("several connections have it; name one in `provider`: {}", having.join(", ")))),
    }
}

/// A word or several.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum Words {
    /// One.
    One(String),
    /// Several.
    Several(Vec<String>),
}

/// Which jobs.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"status": ["pending", "running"], "limit": 10}))]
pub struct Query {
    /// These; those that are not there are left out.
    #[serde(default)]
    job_ids: Vec<String>,
    /// In one of these statuses: pending, running, completed, failed, cancelled.
    status: Option<Words>,
    /// All of them.
    #[serde(default)]
    all: bool,
    /// Most jobs of the answer, at most 1,000.
    limit: Option<i64>,
}

/// What was asked for, in the old words.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Defined {
    id: String,
    name: String,
    vm_path: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    output_dir: Option<String>,
    format: &'static str,
    compress: bool,
    created_at: String,
}

/// How far it is, in the old words.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Progress {
    /// The stage.
    phase: &'static str,
    /// Bytes safe on the output.
    bytes_downloaded: u64,
    /// The same.
    bytes_transferred: u64,
    /// Bytes of data; 0 until the source was opened.
    total_bytes: u64,
    /// Whole percent.
    percent_complete: u8,
    /// Absent where nothing is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    estimated_remaining: Option<String>,
}

/// What came of it, in the old words.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Made {
    vm_name: String,
    output_dir: String,
    /// Empty where no OVF was made.
    ovf_path: String,
    files: Vec<String>,
    total_size: u64,
    /// Nanoseconds, as Go writes a duration.
    duration: u64,
    success: bool,
}

/// A job in the old words.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Old {
    definition: Defined,
    status: &'static str,
    progress: Progress,
    #[serde(skip_serializing_if = "Option::is_none")]
    result: Option<Made>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    started_at: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    completed_at: Option<String>,
    updated_at: String,
}

/// Jobs.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Queried {
    jobs: Vec<Old>,
    /// Of this answer.
    total: usize,
    timestamp: String,
}

fn word(status: &str) -> &'static str {
    match status {
        "queued" => "pending",
        other => STATUSES.iter().find(|word| **word == other).copied().unwrap_or("running"),
    }
}

fn progress_of(app: &App, job: &Job) -> Progress {
    let view = view(app, job);
    Progress {
        phase: view.stage,
        bytes_downloaded: view.bytes_done,
        bytes_transferred: view.bytes_done,
        total_bytes: view.bytes_total.unwrap_or(0),
        percent_complete: view.progress,
        estimated_remaining: view.eta_seconds.map(shared::clock::duration_words),
    }
}

fn made(job: &Job) -> Option<Made> {
    let files = job.result.as_ref()?.get("files")?.as_array()?;
    let paths: Vec<String> = files.iter().filter_map(|file| Some(file.get("path")?.as_str()?.to_owned())).collect();
    let parent = |path: &String| path.rsplit_once('/').map_or(String::new(), |(parent, _)| parent.to_owned());
    let took = job.started_at.zip(job.finished_at).map_or(0, |(start, end)| u64::try_from(end.saturating_sub(start)).unwrap_or(0));
    Some(Made {
        vm_name: job.vm_name.clone(),
        output_dir: paths.first().map(parent).unwrap_or_default(),
        ovf_path: paths.iter().find(|path| path.ends_with(".ovf")).cloned().unwrap_or_default(),
        total_size: files.iter().filter_map(|file| file.get("size")?.as_u64()).fold(0, u64::saturating_add),
        files: paths,
        duration: took.saturating_mul(1_000_000),
        success: job.state.status == Status::Completed,
    })
}

fn old(app: &App, job: &Job) -> Old {
    let shown = view(app, job);
    Old {
        definition: Defined {
            id: job.id.clone(),
            name: job.vm_name.clone(),
            vm_path: job.subject().to_owned(),
            output_dir: job.options.destination.clone(),
            format: job.format.word(),
            compress: job.options.compress == Some(true),
            created_at: shown.created_at,
        },
        status: word(shown.status),
        progress: progress_of(app, job),
        result: made(job),
        error: shown.error,
        started_at: shown.started_at,
        completed_at: shown.finished_at,
        updated_at: shown.updated_at,
    }
}

/// Legacy: jobs by id, status, or all, newest first; use GET /jobs, which has pages.
#[utoipa::path(post, path = "/jobs/query", tag = "Legacy", security(("token" = [])), request_body = Query, responses(
    (status = 200, description = "jobs", body = Queried),
    (status = 400, description = "the body cannot be read, or an unknown status", body = ErrorBody),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 413, description = "the body is too large", body = ErrorBody),
    (status = 415, description = "no JSON", body = ErrorBody),
    (status = 429, description = "too many requests", body = ErrorBody),
    (status = 503, description = "the database is away", body = ErrorBody),
))]
pub async fn query(_: Viewer, app: web::Data<App>, body: Json<Query>) -> Result<web::Json<Queried>, Error> {
    let asked = body.value;
    let limit = match asked.limit {
        None | Some(0) => ANSWERED,
        Some(limit) => match u64::try_from(limit) {
            Ok(limit) => limit.min(ANSWERED),
            Err(_) => return Err(Error::bad_request(format!("limit must be 1 to {ANSWERED}, not {limit}"))),
        },
    };
    let jobs = if asked.job_ids.is_empty() {
        let words = match asked.status {
            _ if asked.all => Vec::new(),
            Some(Words::One(word)) => vec![word],
            Some(Words::Several(words)) => words,
            None => Vec::new(),
        };
        let status = words.iter().map(|word| statuses(word)).collect::<Result<Vec<_>, _>>()?.concat();
        let filter = Filter { status, ..Filter::default() };
        let asked = lists::service::Asked {
            filter,
            by: SortBy::Created,
            order: Order::Desc,
            paging: Paging { offset: 0, limit },
            after: None,
            caller: String::new(),
            query: "legacy".to_owned(),
        };
        lists::service::page(&app.store, app.queue.board().lists(), asked).await?.0
    } else {
        if asked.job_ids.len() as u64 > ANSWERED {
            return Err(Error::bad_request(format!("at most {ANSWERED} jobs are asked for at once")));
        }
        // What is no id is no job.
        let ids = asked.job_ids.iter().filter_map(|id| id_of(id).ok()).collect();
        store::load_many(&app.store, ids).await?
    };
    let board = app.queue.board();
    let jobs: Vec<Old> = jobs.into_iter().map(|job| old(&app, &board.freshen(job))).collect();
    Ok(web::Json(Queried { total: jobs.len(), jobs, timestamp: now() }))
}

fn statuses(word: &str) -> Result<Vec<Status>, Error> {
    match word {
        "pending" | "queued" => Ok(vec![Status::Queued]),
        "running" => Ok(vec![Status::Running, Status::Cancelling]),
        "completed" => Ok(vec![Status::Completed]),
        "failed" => Ok(vec![Status::Failed]),
        "cancelled" => Ok(vec![Status::Cancelled]),
        other => Err(Error::bad_request(format!("status `{}` is unknown; known: {}", service::clip(other), STATUSES.join(", ")))),
    }
}

/// Which jobs to cancel.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"job_ids": ["job-5f0c2a9be1d34c77"]}))]
pub struct Cancel {
    /// Their ids, at most 500.
    job_ids: Vec<String>,
}

/// What became of them.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Cancelled {
    /// Those that end now.
    cancelled: Vec<String>,
    /// Those that do not.
    failed: Vec<String>,
    /// Why not, by id.
    #[serde(skip_serializing_if = "std::collections::BTreeMap::is_empty")]
    errors: std::collections::BTreeMap<String, String>,
    timestamp: String,
}

/// Legacy: cancels jobs; use DELETE /jobs/{id}.
#[utoipa::path(post, path = "/jobs/cancel", tag = "Legacy", security(("token" = [])), request_body = Cancel, responses(
    (status = 200, description = "what became of each", body = Cancelled),
    (status = 400, description = "the body cannot be read, or names none or too many", body = ErrorBody),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 403, description = "not an operator", body = ErrorBody),
    (status = 413, description = "the body is too large", body = ErrorBody),
    (status = 415, description = "no JSON", body = ErrorBody),
    (status = 429, description = "too many requests", body = ErrorBody),
    (status = 503, description = "the database is away", body = ErrorBody),
))]
pub async fn cancel(caller: Operator, app: web::Data<App>, body: Json<Cancel>) -> Result<web::Json<Cancelled>, Error> {
    let ids = body.value.job_ids;
    if ids.is_empty() || ids.len() > MOST {
        return Err(Error::bad_request(format!("name 1 to {MOST} jobs in `job_ids`, not {}", ids.len())));
    }
    let mut answer = Cancelled { cancelled: Vec::new(), failed: Vec::new(), errors: Default::default(), timestamp: now() };
    for given in ids {
        match cancel_one(&app, &caller.name, &given).await {
            Ok(()) => answer.cancelled.push(given),
            Err(e) if e.code() == Code::Unavailable => return Err(e),
            Err(e) => {
                answer.errors.insert(given.clone(), e.message().to_owned());
                answer.failed.push(given);
            }
        }
    }
    Ok(web::Json(answer))
}

async fn cancel_one(app: &App, caller: &str, given: &str) -> Result<(), Error> {
    let id = id_of(given)?;
    let act = audit::begin(&app.store, caller, "job.cancel", &id).await?;
    let done = app.queue.cancel(id, caller.to_owned()).await.map_err(Error::from);
    act.finish(&done).await;
    done.map(drop)
}

/// How far a job is.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Far {
    job_id: String,
    /// pending, running, completed, failed or cancelled.
    status: &'static str,
    progress: Progress,
    /// MiB a second, while it runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    transfer_rate_mbps: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    started_at: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    elapsed_seconds: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    completed_at: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    timestamp: String,
}

/// Legacy: how far a job is; use GET /jobs/{id}.
#[utoipa::path(get, path = "/jobs/progress/{id}", tag = "Legacy", security(("token" = [])), params(("id" = String, Path)), responses(
    (status = 200, description = "how far it is", body = Far),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 404, description = "no such job", body = ErrorBody),
    (status = 429, description = "too many requests", body = ErrorBody),
    (status = 503, description = "the database is away", body = ErrorBody),
))]
pub async fn progress(_: Viewer, app: web::Data<App>, id: web::Path<String>) -> Result<web::Json<Far>, Error> {
    let job = job_of(&app, &id).await?;
    let shown = view(&app, &job);
    let end = job.finished_at.unwrap_or_else(super::record::now_millis);
    Ok(web::Json(Far {
        status: word(shown.status),
        progress: progress_of(&app, &job),
        transfer_rate_mbps: (shown.rate_bps > 0).then(|| shown.rate_bps as f64 / f64::from(1 << 20)),
        elapsed_seconds: job.started_at.map(|start| end.saturating_sub(start) as f64 / 1000.0),
        job_id: shown.id,
        started_at: shown.started_at,
        completed_at: shown.finished_at,
        error: shown.error,
        timestamp: now(),
    }))
}

/// The daemon, in the old words.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[schema(as = LegacyStatus, example = json!({
    "version": "0.1.0", "uptime": "12m", "total_jobs": 142, "running_jobs": 4, "completed_jobs": 130, "failed_jobs": 2,
    "timestamp": "2025-06-15T10:30:00.000Z"
}))]
pub struct Daemon {
    version: &'static str,
    uptime: String,
    total_jobs: u64,
    running_jobs: u64,
    completed_jobs: u64,
    failed_jobs: u64,
    timestamp: String,
}

/// Legacy: totals; use GET /jobs/stats and GET /system/health.
#[utoipa::path(get, path = "/status", tag = "Legacy", security(("token" = [])), responses(
    (status = 200, description = "totals", body = Daemon),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 429, description = "too many requests", body = ErrorBody),
    (status = 503, description = "the database is away", body = ErrorBody),
))]
pub async fn status(_: Viewer, app: web::Data<App>) -> Result<web::Json<Daemon>, Error> {
    let counts = store::count_by_status(&app.store).await?;
    let of = |wanted: &[Status]| wanted.iter().filter_map(|status| counts.get(status)).sum::<u64>();
    let up = (shared::clock::now() - app.started_at).num_seconds();
    Ok(web::Json(Daemon {
        version: env!("CARGO_PKG_VERSION"),
        uptime: shared::clock::duration_words(u64::try_from(up).unwrap_or(0)),
        total_jobs: counts.values().sum(),
        running_jobs: of(&[Status::Running, Status::Cancelling]),
        completed_jobs: of(&[Status::Completed]),
        failed_jobs: of(&[Status::Failed]),
        timestamp: now(),
    }))
}

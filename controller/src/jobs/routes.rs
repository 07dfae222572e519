//! `/jobs`: make, list, look at, follow and steer.
//!
//! Owns: the HTTP side. Never: decides anything (service and queue do). A crash here costs one answer.

use actix_web::http::header;
use actix_web::{HttpRequest, HttpResponse, web};
use serde::Serialize;
use shared::ids::JobId;
use shared::job::Status;
use shared::options::JobType;
use utoipa::ToSchema;

use super::batch::{self, Batch};
use super::lists;
use super::logs::{self, Form};
use super::plan::{self, Plan};
use super::record::{self, Job, NewJob};
use super::service::{self, Create};
use super::store::{self, Filter, SortBy};
use super::view::View;
use super::{batches, core};
use crate::app::App;
use crate::http::body::Json;
use crate::http::guard::{Operator, Viewer};
use crate::http::idempotency::Idempotency;
use crate::http::limits;
use crate::http::query::{Order, Query};
use crate::http::reply::{Error, ErrorBody, Page};
use crate::jobs::core::Outbox;
use crate::store::Error as StoreError;
use crate::system::audit;

const STATUSES: &[&str] = &["queued", "running", "completed", "failed", "cancelled"];
const SORTS: &[&str] = &["created_at", "updated_at", "vm_name", "status", "priority"];

pub(super) fn view(app: &App, job: &Job) -> View {
    View::of(job, |agent| app.fleet.name(agent))
}

/// What is no id is no job.
pub(super) fn id_of(text: &str) -> Result<String, Error> {
    let missing = || Error::not_found(format!("no job `{}`; GET /jobs lists them", text.chars().take(60).collect::<String>()));
    text.parse::<JobId>().map(String::from).map_err(|_| missing())
}

pub(super) async fn job_of(app: &App, id: &str) -> Result<Job, Error> {
    let id = id_of(id)?;
    match store::load(&app.store, &id).await? {
        Some(job) => Ok(app.queue.board().freshen(job)),
        None => Err(core::Error::NotFound(id).into()),
    }
}

/// Makes a job. It is in the store when this answers.
///
/// `export` reads a VM of a connection. `convert`, `import` and `verify` read the file `source` at the agent that has its root; the file is
/// opened before the job is made, so one that is missing, refused or outside the roots is refused here. `convert` writes into a folder of its own
/// in the destination, as an export does. `import` writes into the agent's root `images`, as a folder that bears the VM's name, which is then a
/// VM of the connection `images` and can be exported, compared and deployed from there. `verify` writes nothing: where a manifest lies beside the
/// file every block, size and SHA-256 is compared with it and its signature checked; else the structure is checked, every block read, and
/// `result.verified` is false. A bad block fails the job with `verification_failed` and is named.
#[utoipa::path(post, path = "/jobs", tag = "Jobs", security(("token" = [])), request_body = Create,
    params(("Idempotency-Key" = Option<String>, Header, description = "the same key and body give the first answer again")),
    responses(
        (status = 200, description = "`options.dry_run`: what it would do; nothing was made", body = Plan),
        (status = 201, description = "the job, queued", body = View, headers(("Location" = String, description = "where it is"))),
        (status = 400, description = "the body cannot be read, a field is wrong or an unknown word; the known ones are listed", body = ErrorBody),
        (status = 401, description = "no valid token", body = ErrorBody),
        (status = 403, description = "not an operator, or the destination lies outside the roots", body = ErrorBody),
        (status = 404, description = "no such VM or file", body = ErrorBody),
        (status = 409, description = "several VMs bear the name, several agents have the source's root, the catalogue has the name already, or the Idempotency-Key came with another body", body = ErrorBody),
        (status = 413, description = "the body is too large", body = ErrorBody),
        (status = 415, description = "no JSON", body = ErrorBody),
        (status = 422, description = "not built yet, or the image is refused", body = ErrorBody),
        (status = 429, description = "too many requests", body = ErrorBody),
        (status = 502, description = "the agent did not answer, or could not read the source", body = ErrorBody),
        (status = 503, description = "the database is away or the controller drains; for a dry run also: the agent is away", body = ErrorBody),
    ))]
pub async fn create(caller: Operator, request: HttpRequest, app: web::Data<App>, mut body: Json<Create>) -> Result<HttpResponse, Error> {
    Idempotency::once(&request, &caller, &body.digest, &app.store, async |key| {
        let dry_run = body.value.options.as_mut().and_then(|options| options.dry_run.take()) == Some(true);
        let new = service::check(&app, &caller.name, body.value).await?;
        if dry_run {
            return Ok(HttpResponse::Ok().json(plan::of(&app, new).await?));
        }
        let job = app.queue.submit(new, key.cloned()).await?;
        Ok(HttpResponse::Created().insert_header((header::LOCATION, format!("/api/v1/jobs/{}", job.id))).json(view(&app, &job)))
    })
    .await
}

/// Makes many jobs, at most 500, of which at most `concurrency` run at once.
///
/// Those that pass their checks are made together, or none of them; the others have their error in their place.
#[utoipa::path(post, path = "/jobs/batch", tag = "Jobs", security(("token" = [])), request_body = Batch,
    params(("Idempotency-Key" = Option<String>, Header, description = "the same key and body give the first answer again")),
    responses(
        (status = 201, description = "every one was made", body = batch::Answer),
        (status = 207, description = "some or all were not; `results` says which and why", body = batch::Answer),
        (status = 400, description = "the body cannot be read, is empty or has more than 500 jobs", body = ErrorBody),
        (status = 401, description = "no valid token", body = ErrorBody),
        (status = 403, description = "not an operator", body = ErrorBody),
        (status = 409, description = "the Idempotency-Key came with another body", body = ErrorBody),
        (status = 413, description = "the body is too large", body = ErrorBody),
        (status = 415, description = "no JSON", body = ErrorBody),
        (status = 429, description = "too many requests", body = ErrorBody),
        (status = 503, description = "the database is away or the controller drains", body = ErrorBody),
    ))]
pub async fn batch(caller: Operator, request: HttpRequest, app: web::Data<App>, body: Json<Batch>) -> Result<HttpResponse, Error> {
    Idempotency::once(&request, &caller, &body.digest, &app.store, async |key| {
        let (checked, new) = batch::check(&app, &caller.name, body.value).await?;
        let made = record::Batch { id: checked.id.clone(), limit: checked.limit };
        make_all(&app, new, Some(made), key, |views| {
            let answer = checked.answer(views);
            (answer.status(), serde_json::to_value(answer))
        })
        .await
    })
    .await
}

/// Makes jobs together; `compose` makes status and body of the answer from what is shown of them.
pub(super) async fn make_all(
    app: &App,
    new: Vec<NewJob>,
    batch: Option<record::Batch>,
    key: Option<&Idempotency>,
    compose: impl FnOnce(Vec<View>) -> (u16, serde_json::Result<serde_json::Value>) + Send + 'static,
) -> Result<HttpResponse, Error> {
    let answered = |status: u16, body: serde_json::Value| {
        let status = actix_web::http::StatusCode::from_u16(status).map_err(Error::internal)?;
        Ok(HttpResponse::build(status).json(body))
    };
    if new.is_empty() {
        let (status, body) = compose(Vec::new());
        let body = body.map_err(Error::internal)?;
        if let Some(key) = key {
            key.keep(&app.store, status, "", &body).await?;
        }
        return answered(status, body);
    }
    // The answer is composed where the jobs get their ids, so that it is stored with them.
    let (tell, told) = tokio::sync::oneshot::channel();
    let key = key.cloned();
    let answer: batches::Answer = Box::new(move |views| {
        let (status, body) = compose(views.to_vec());
        let body = body.map_err(|e| StoreError::Other(e.to_string()))?;
        let row = key.map(|key| key.row(status, "", body.to_string()));
        // Who asked may be gone; the jobs are made all the same.
        let _ = tell.send((status, body));
        Ok(row)
    });
    app.queue.submit_all(new, batch, Some(answer)).await?;
    let (status, body) = told.await.map_err(Error::internal)?;
    answered(status, body)
}

/// Jobs, newest first.
#[utoipa::path(get, path = "/jobs", tag = "Jobs", security(("token" = [])), params(
    ("offset" = Option<u64>, Query), ("limit" = Option<u64>, Query),
    ("sort" = Option<String>, Query, description = "created_at, updated_at, vm_name, status, priority"), ("order" = Option<String>, Query, description = "asc, desc"),
    ("status" = Option<String>, Query, description = "queued, running, completed, failed, cancelled"),
    ("provider" = Option<String>, Query, description = "connection or kind"), ("type" = Option<String>, Query, description = "job type"),
    ("created_after" = Option<String>, Query, description = "RFC 3339"), ("created_before" = Option<String>, Query, description = "RFC 3339"),
    ("search" = Option<String>, Query, description = "part of the VM's name or the id"),
    ("after" = Option<String>, Query, description = "`pagination.next` of the page before, in place of offset"),
), responses(
    (status = 200, description = "one page", body = Page<View>),
    (status = 400, description = "an unknown parameter or value; the known ones are listed", body = ErrorBody),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 429, description = "too many requests", body = ErrorBody),
    (status = 503, description = "the database is away", body = ErrorBody),
))]
pub async fn list(caller: Viewer, request: HttpRequest, app: web::Data<App>) -> Result<web::Json<Page<View>>, Error> {
    let query = Query::of(&request, &["status", "provider", "type", "created_after", "created_before", "search", "after"])?;
    let paging = query.paging()?;
    if query.has("after") && query.has("offset") {
        return Err(Error::bad_request("give `offset` or `after`, not both"));
    }
    let sort = query.sort(SORTS, "created_at", Order::Desc)?;
    let status = match query.word("status", STATUSES)? {
        Some("running") => vec![Status::Running, Status::Cancelling],
        Some(word) => Status::from_word(word).into_iter().collect(),
        None => Vec::new(),
    };
    let filter = Filter {
        status,
        provider: query.text("provider").map(str::to_owned),
        kind: query.word("type", JobType::ALL)?.map(str::to_owned),
        created_after: query.time("created_after")?.map(|time| time.timestamp_millis()),
        created_before: query.time("created_before")?.map(|time| time.timestamp_millis()),
        search: query.text("search").map(str::to_owned),
    };
    let by = match sort.field {
        "updated_at" => SortBy::Updated,
        "vm_name" => SortBy::VmName,
        "status" => SortBy::Status,
        "priority" => SortBy::Priority,
        _ => SortBy::Created,
    };
    let address = limits::client_address(&request, &app.config.trusted_proxies);
    let asked = lists::service::Asked {
        filter,
        by,
        order: sort.order,
        paging,
        after: query.text("after").map(str::to_owned),
        caller: format!("{} {address}", caller.session),
        query: query.without_place(),
    };
    let (jobs, pagination) = lists::service::page(&app.store, app.queue.board().lists(), asked).await?;
    let board = app.queue.board();
    let data = jobs.into_iter().map(|job| view(&app, &board.freshen(job))).collect();
    Ok(web::Json(Page { data, pagination }))
}

/// One job.
#[utoipa::path(get, path = "/jobs/{id}", tag = "Jobs", security(("token" = [])), params(("id" = String, Path)), responses(
    (status = 200, description = "the job", body = View),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 404, description = "no such job", body = ErrorBody),
    (status = 429, description = "too many requests", body = ErrorBody),
    (status = 503, description = "the database is away", body = ErrorBody),
))]
pub async fn get(_: Viewer, app: web::Data<App>, id: web::Path<String>) -> Result<web::Json<View>, Error> {
    Ok(web::Json(view(&app, &job_of(&app, &id).await?)))
}

/// A person steers a job: audit row, act, answer.
macro_rules! act {
    ($app:expr, $caller:expr, $id:expr, $action:literal, $verb:ident) => {{
        let id = id_of(&$id)?;
        let act = audit::begin(&$app.store, &$caller.name, $action, &id).await?;
        let done = $app.queue.$verb(id, $caller.name.clone()).await.map_err(Error::from);
        act.finish(&done).await;
        view(&$app, &done?)
    }};
}

/// Cancels: the bytes stop within 5 s, partial files go.
#[utoipa::path(delete, path = "/jobs/{id}", tag = "Jobs", security(("token" = [])), params(("id" = String, Path)), responses(
    (status = 202, description = "the job; `cancelling` while its agent stops", body = View),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 403, description = "not an operator", body = ErrorBody),
    (status = 404, description = "no such job", body = ErrorBody),
    (status = 409, description = "it has ended or is being published", body = ErrorBody),
    (status = 429, description = "too many requests", body = ErrorBody),
    (status = 503, description = "the database is away", body = ErrorBody),
))]
pub async fn cancel(caller: Operator, app: web::Data<App>, id: web::Path<String>) -> Result<HttpResponse, Error> {
    Ok(HttpResponse::Accepted().json(act!(app, caller, id, "job.cancel", cancel)))
}

/// Another try for a failed or cancelled job; what is on the disk already is used.
#[utoipa::path(post, path = "/jobs/{id}/retry", tag = "Jobs", security(("token" = [])), params(("id" = String, Path)), responses(
    (status = 200, description = "the job, queued", body = View),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 403, description = "not an operator", body = ErrorBody),
    (status = 404, description = "no such job", body = ErrorBody),
    (status = 409, description = "it has not failed", body = ErrorBody),
    (status = 429, description = "too many requests", body = ErrorBody),
    (status = 503, description = "the database is away", body = ErrorBody),
))]
pub async fn retry(caller: Operator, app: web::Data<App>, id: web::Path<String>) -> Result<web::Json<View>, Error> {
    Ok(web::Json(act!(app, caller, id, "job.retry", retry)))
}

/// Stops the bytes and keeps the checkpoint.
#[utoipa::path(post, path = "/jobs/{id}/pause", tag = "Jobs", security(("token" = [])), params(("id" = String, Path)), responses(
    (status = 200, description = "the job, paused", body = View),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 403, description = "not an operator", body = ErrorBody),
    (status = 404, description = "no such job", body = ErrorBody),
    (status = 409, description = "it has ended or is being published", body = ErrorBody),
    (status = 429, description = "too many requests", body = ErrorBody),
    (status = 503, description = "the database is away", body = ErrorBody),
))]
pub async fn pause(caller: Operator, app: web::Data<App>, id: web::Path<String>) -> Result<web::Json<View>, Error> {
    Ok(web::Json(act!(app, caller, id, "job.pause", pause)))
}

/// Stops the VM of a warm migration behind the pass that runs or comes next, copies the rest and starts the new one, whatever the downtime.
/// The word stands over a crash of whichever part.
#[utoipa::path(post, path = "/jobs/{id}/cutover", tag = "Jobs", security(("token" = [])), params(("id" = String, Path)), responses(
    (status = 202, description = "it stands, and the job's agent is told", body = View),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 403, description = "not an operator", body = ErrorBody),
    (status = 404, description = "no such job", body = ErrorBody),
    (status = 409, description = "it is no warm migration, or has ended or is being published", body = ErrorBody),
    (status = 429, description = "too many requests", body = ErrorBody),
    (status = 503, description = "the database is away", body = ErrorBody),
))]
pub async fn cutover(caller: Operator, app: web::Data<App>, id: web::Path<String>) -> Result<HttpResponse, Error> {
    let view = act!(app, caller, id, "job.cutover", cutover);
    Ok(HttpResponse::Accepted().json(view))
}

/// Lets a paused job go on from its checkpoint.
#[utoipa::path(post, path = "/jobs/{id}/resume", tag = "Jobs", security(("token" = [])), params(("id" = String, Path)), responses(
    (status = 200, description = "the job, queued", body = View),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 403, description = "not an operator", body = ErrorBody),
    (status = 404, description = "no such job", body = ErrorBody),
    (status = 409, description = "it is not paused", body = ErrorBody),
    (status = 429, description = "too many requests", body = ErrorBody),
    (status = 503, description = "the database is away", body = ErrorBody),
))]
pub async fn resume(caller: Operator, app: web::Data<App>, id: web::Path<String>) -> Result<web::Json<View>, Error> {
    Ok(web::Json(act!(app, caller, id, "job.resume", resume)))
}

/// A job's log. NDJSON `{"time","level","stage","message"}` so far, with `follow=true` until the job ends; with
/// `Accept: text/event-stream` as server-sent events, which follow unless `follow=false`.
#[utoipa::path(get, path = "/jobs/{id}/logs", tag = "Jobs", security(("token" = [])), params(
    ("id" = String, Path), ("follow" = Option<bool>, Query), ("Last-Event-ID" = Option<i64>, Header, description = "goes on after this line"),
), responses(
    (status = 200, description = "lines", content_type = "application/x-ndjson", body = String),
    (status = 400, description = "an unknown parameter or value", body = ErrorBody),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 404, description = "no such job", body = ErrorBody),
    (status = 429, description = "too many requests", body = ErrorBody),
    (status = 503, description = "the database is away", body = ErrorBody),
))]
pub async fn logs(_: Viewer, request: HttpRequest, app: web::Data<App>, id: web::Path<String>) -> Result<HttpResponse, Error> {
    let query = Query::only(&request, &["follow"])?;
    let header_text = |name: &str| request.headers().get(name).and_then(|value| value.to_str().ok());
    let form = if header_text("Accept").is_some_and(|accept| accept.contains("text/event-stream")) { Form::Events } else { Form::Lines };
    let asked = query.flag("follow")?;
    let follows = asked || (form == Form::Events && query.text("follow").is_none());
    let after = match header_text("Last-Event-ID") {
        None => 0,
        Some(text) => text
            .trim()
            .parse::<i64>()
            .ok()
            .filter(|seq| *seq >= 0)
            .ok_or_else(|| Error::bad_request("Last-Event-ID must be a line's number"))?,
    };
    let job = job_of(&app, &id).await?;
    let follow = if follows {
        Some(app.queue.follow(job.id.clone()).await?)
    } else {
        app.queue.flush_logs().await?;
        None
    };
    let media_type = if form == Form::Events { "text/event-stream" } else { "application/x-ndjson" };
    // Identity: a compressing layer would hold lines back until its buffer is full.
    Ok(HttpResponse::Ok()
        .content_type(media_type)
        .insert_header(header::ContentEncoding::Identity)
        .insert_header((header::CACHE_CONTROL, "no-store"))
        .insert_header(("X-Accel-Buffering", "no"))
        .streaming(logs::stream(app.store.clone(), job.id, form, after, follow)))
}

/// Totals over all jobs.
#[derive(Serialize, ToSchema)]
#[schema(as = JobStats, example = json!({
    "total": 142, "by_status": {"queued": 3, "running": 4, "completed": 130, "failed": 2, "cancelled": 3}
}))]
pub struct Stats {
    /// All jobs.
    total: u64,
    /// Jobs in each status.
    by_status: std::collections::BTreeMap<&'static str, u64>,
}

/// How many jobs stand where.
#[utoipa::path(get, path = "/jobs/stats", tag = "Jobs", security(("token" = [])), responses(
    (status = 200, description = "totals", body = Stats),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 429, description = "too many requests", body = ErrorBody),
    (status = 503, description = "the database is away", body = ErrorBody),
))]
pub async fn stats(_: Viewer, app: web::Data<App>) -> Result<web::Json<Stats>, Error> {
    let counts = store::count_by_status(&app.store).await?;
    let mut by_status: std::collections::BTreeMap<&'static str, u64> = STATUSES.iter().map(|word| (*word, 0)).collect();
    for (status, count) in counts {
        *by_status.entry(status.public()).or_default() += count;
    }
    Ok(web::Json(Stats { total: by_status.values().sum(), by_status }))
}

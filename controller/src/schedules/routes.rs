//! `/schedules*`.
//!
//! Owns: the HTTP side. Never: decides anything (service and runner do). A crash here costs one answer.

use actix_web::http::header;
use actix_web::{HttpRequest, HttpResponse, web};

use super::claims;
use super::service::{self, Create, Update};
use super::store::{self, Filter, SortBy};
use super::view::{Run, RunNow, View};
use crate::app::App;
use crate::http::body::{self, Json};
use crate::http::guard::{Operator, Viewer};
use crate::http::idempotency::Idempotency;
use crate::http::query::{Order, Query};
use crate::http::reply::{Error, ErrorBody, Page};
use crate::jobs;
use crate::jobs::core::Outbox;
use crate::store::entities::schedules;
use crate::system::audit;

fn view(row: schedules::Model) -> View {
    View::of(row, shared::clock::now())
}

/// Makes a schedule. Its job is checked as `POST /jobs` does.
#[utoipa::path(post, path = "/schedules", tag = "Schedules", security(("token" = [])), request_body = Create,
    params(("Idempotency-Key" = Option<String>, Header, description = "the same key and body give the first answer again")),
    responses(
        (status = 201, description = "the schedule with its next due times", body = View, headers(("Location" = String, description = "where it is"))),
        (status = 400, description = "the body cannot be read, or a field is wrong; of `cron` the message names the field", body = ErrorBody),
        (status = 401, description = "no valid token", body = ErrorBody),
        (status = 403, description = "not an operator, or the job's destination lies outside the roots", body = ErrorBody),
        (status = 404, description = "the job's VM is not there", body = ErrorBody),
        (status = 409, description = "several VMs bear the name, or the Idempotency-Key came with another body", body = ErrorBody),
        (status = 413, description = "the body is too large", body = ErrorBody),
        (status = 415, description = "no JSON", body = ErrorBody),
        (status = 422, description = "the job asks for what is not built yet, or the image is refused", body = ErrorBody),
        (status = 429, description = "too many requests", body = ErrorBody),
        (status = 503, description = "the database is away", body = ErrorBody),
    ))]
pub async fn create(caller: Operator, request: HttpRequest, app: web::Data<App>, body: Json<Create>) -> Result<HttpResponse, Error> {
    Idempotency::once(&request, &caller, &body.digest, &app.store, async |key| {
        let show: service::Show = |row| serde_json::to_string(&view(row)).map_err(Error::internal);
        let act = audit::begin(&app.store, &caller.name, "schedule.create", &body.value.name).await?;
        let made = service::create(&app, &caller.name, body.value, key.map(|key| (key, show))).await;
        act.finish(&made).await;
        let row = made?;
        Ok(HttpResponse::Created().insert_header((header::LOCATION, service::location(&row.id))).json(view(row)))
    })
    .await
}

/// Schedules, by name.
#[utoipa::path(get, path = "/schedules", tag = "Schedules", security(("token" = [])), params(
    ("offset" = Option<u64>, Query), ("limit" = Option<u64>, Query),
    ("sort" = Option<String>, Query, description = "name, created_at, updated_at, next_run"), ("order" = Option<String>, Query, description = "asc, desc"),
    ("provider" = Option<String>, Query, description = "connection or kind"), ("enabled" = Option<bool>, Query),
    ("created_after" = Option<String>, Query, description = "RFC 3339"), ("created_before" = Option<String>, Query, description = "RFC 3339"),
    ("search" = Option<String>, Query, description = "part of the name or the id"),
), responses(
    (status = 200, description = "one page", body = Page<View>),
    (status = 400, description = "an unknown parameter or value; the known ones are listed", body = ErrorBody),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 429, description = "too many requests", body = ErrorBody),
    (status = 503, description = "the database is away", body = ErrorBody),
))]
pub async fn list(_: Viewer, request: HttpRequest, app: web::Data<App>) -> Result<web::Json<Page<View>>, Error> {
    let query = Query::of(&request, &["provider", "enabled", "created_after", "created_before", "search"])?;
    let paging = query.paging()?;
    let sort = query.sort(&["name", "created_at", "updated_at", "next_run"], "name", Order::Asc)?;
    let filter = Filter {
        provider: query.text("provider").map(str::to_owned),
        enabled: query.word("enabled", &["true", "false"])?.map(|word| word == "true"),
        created_after: query.time("created_after")?.map(|time| time.timestamp_millis()),
        created_before: query.time("created_before")?.map(|time| time.timestamp_millis()),
        search: query.text("search").map(str::to_owned),
    };
    let by = match sort.field {
        "created_at" => SortBy::Created,
        "updated_at" => SortBy::Updated,
        "next_run" => SortBy::NextRun,
        _ => SortBy::Name,
    };
    let (rows, total) = store::list(&app.store, filter, (by, sort.order.into()), paging.offset, paging.limit).await?;
    Ok(web::Json(paging.page(rows.into_iter().map(view).collect(), total)))
}

/// One schedule.
#[utoipa::path(get, path = "/schedules/{id}", tag = "Schedules", security(("token" = [])), params(("id" = String, Path)), responses(
    (status = 200, description = "the schedule", body = View),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 404, description = "no such schedule", body = ErrorBody),
    (status = 429, description = "too many requests", body = ErrorBody),
    (status = 503, description = "the database is away", body = ErrorBody),
))]
pub async fn get(_: Viewer, id: web::Path<String>, app: web::Data<App>) -> Result<web::Json<View>, Error> {
    Ok(web::Json(view(service::by_id(&app, &id).await?)))
}

/// Changes a schedule; what is absent stays. Switched on again, its times count from now on.
#[utoipa::path(patch, path = "/schedules/{id}", tag = "Schedules", security(("token" = [])), params(("id" = String, Path)), request_body = Update,
    responses(
        (status = 200, description = "the schedule as it is now", body = View),
        (status = 400, description = "the body cannot be read, or a field is wrong", body = ErrorBody),
        (status = 401, description = "no valid token", body = ErrorBody),
        (status = 403, description = "not an operator, or the job's destination lies outside the roots", body = ErrorBody),
        (status = 404, description = "no such schedule, or the job's VM is not there", body = ErrorBody),
        (status = 409, description = "it changed at the same moment, or several VMs bear the name", body = ErrorBody),
        (status = 413, description = "the body is too large", body = ErrorBody),
        (status = 415, description = "no JSON", body = ErrorBody),
        (status = 422, description = "the job asks for what is not built yet, or the image is refused", body = ErrorBody),
        (status = 429, description = "too many requests", body = ErrorBody),
        (status = 503, description = "the database is away", body = ErrorBody),
    ))]
pub async fn update(caller: Operator, id: web::Path<String>, app: web::Data<App>, body: Json<Update>) -> Result<web::Json<View>, Error> {
    let row = service::by_id(&app, &id).await?;
    let act = audit::begin(&app.store, &caller.name, "schedule.update", &row.id).await?;
    let changed = service::update(&app, row, body.value).await;
    act.finish(&changed).await;
    Ok(web::Json(view(changed?)))
}

/// Removes a schedule and the list of its runs; the jobs that it made go on.
#[utoipa::path(delete, path = "/schedules/{id}", tag = "Schedules", security(("token" = [])), params(("id" = String, Path)), responses(
    (status = 204, description = "gone"),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 403, description = "not an operator", body = ErrorBody),
    (status = 404, description = "no such schedule", body = ErrorBody),
    (status = 429, description = "too many requests", body = ErrorBody),
    (status = 503, description = "the database is away", body = ErrorBody),
))]
pub async fn remove(caller: Operator, id: web::Path<String>, app: web::Data<App>) -> Result<HttpResponse, Error> {
    let row = service::by_id(&app, &id).await?;
    let act = audit::begin(&app.store, &caller.name, "schedule.delete", &row.id).await?;
    let gone = store::delete(&app.store, &row.id).await.map_err(Error::from);
    act.finish(&gone).await;
    gone?;
    Ok(HttpResponse::NoContent().finish())
}

/// Runs a schedule now, whatever its times and its overlap policy say.
#[utoipa::path(post, path = "/schedules/{id}/run", tag = "Schedules", security(("token" = [])), params(
    ("id" = String, Path), ("Idempotency-Key" = Option<String>, Header, description = "the same key makes no second run"),
), responses(
    (status = 201, description = "the run and its job", body = RunNow, headers(("Location" = String, description = "where the job is"))),
    (status = 400, description = "the key or the stored job is wrong by now", body = ErrorBody),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 403, description = "not an operator, or the schedule's owner may not run jobs any more", body = ErrorBody),
    (status = 404, description = "no such schedule, or the job's VM is gone; the run says failed", body = ErrorBody),
    (status = 409, description = "the job conflicts with what is there", body = ErrorBody),
    (status = 422, description = "the job cannot be done as things are; the run says failed", body = ErrorBody),
    (status = 429, description = "too many requests", body = ErrorBody),
    (status = 503, description = "the database is away, or the controller drains; the run waits", body = ErrorBody),
))]
pub async fn run(caller: Operator, request: HttpRequest, id: web::Path<String>, app: web::Data<App>) -> Result<HttpResponse, Error> {
    let row = service::by_id(&app, &id).await?;
    Idempotency::once(&request, &caller, &body::digest(b""), &app.store, async |key| {
        let act = audit::begin(&app.store, &caller.name, "schedule.run", &row.id).await?;
        let made = service::run_now(&app, &row, key).await;
        act.finish(&made).await;
        let (run, job) = made?;
        let location = format!("/api/v1/jobs/{}", job.id);
        let answer = RunNow { run: run.into(), job: jobs::view::View::of(&job, |agent| app.fleet.name(agent)) };
        if let Some(key) = key {
            key.keep(&app.store, 201, &location, &answer).await?;
        }
        Ok(HttpResponse::Created().insert_header((header::LOCATION, location)).json(answer))
    })
    .await
}

/// Runs of a schedule, the newest first.
#[utoipa::path(get, path = "/schedules/{id}/runs", tag = "Schedules", security(("token" = [])), params(
    ("id" = String, Path), ("offset" = Option<u64>, Query), ("limit" = Option<u64>, Query),
    ("sort" = Option<String>, Query, description = "due_at"), ("order" = Option<String>, Query, description = "asc, desc"),
    ("status" = Option<String>, Query, description = "waiting, started, skipped, failed"),
), responses(
    (status = 200, description = "one page", body = Page<Run>),
    (status = 400, description = "an unknown parameter or value; the known ones are listed", body = ErrorBody),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 404, description = "no such schedule", body = ErrorBody),
    (status = 429, description = "too many requests", body = ErrorBody),
    (status = 503, description = "the database is away", body = ErrorBody),
))]
pub async fn runs(_: Viewer, request: HttpRequest, id: web::Path<String>, app: web::Data<App>) -> Result<web::Json<Page<Run>>, Error> {
    let query = Query::of(&request, &["status"])?;
    let (paging, sort) = (query.paging()?, query.sort(&["due_at"], "due_at", Order::Desc)?);
    let status = match query.word("status", &["waiting", "started", "skipped", "failed"])? {
        Some("waiting") => Some(vec![store::PENDING, store::CLAIMED]),
        Some("started") => Some(vec![store::STARTED]),
        Some("skipped") => Some(vec![store::SKIPPED]),
        Some(_) => Some(vec![store::FAILED]),
        None => None,
    };
    let row = service::by_id(&app, &id).await?;
    let (rows, total) = claims::list(&app.store, &row.id, status, sort.order.into(), paging.offset, paging.limit).await?;
    Ok(web::Json(paging.page(rows.into_iter().map(Run::from).collect(), total)))
}

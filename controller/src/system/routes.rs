//! `/health`, `/livez`, `/readyz`, `/metrics`, `/audit`.

use actix_web::{HttpRequest, HttpResponse, web};
use serde::Serialize;
use shared::error::Code;
use utoipa::ToSchema;

use super::audit;
use crate::access::Role;
use crate::app::App;
use crate::http::guard::{self, Admin};
use crate::http::query::{Order, Query};
use crate::http::reply::{Error, ErrorBody, Page};
use crate::http::rfc3339;
use crate::store;

/// How it is.
#[derive(Serialize, ToSchema)]
pub struct Health {
    /// Always `ok`.
    #[schema(example = "ok")]
    status: &'static str,
    /// Version of the controller.
    #[schema(example = "0.1.0")]
    version: &'static str,
    /// Since the start.
    uptime_seconds: i64,
}

/// Whether the controller works.
#[utoipa::path(get, path = "/health", tag = "System", responses(
    (status = 200, description = "it does", body = Health),
    (status = 429, description = "too many requests", body = ErrorBody),
    (status = 503, description = "the database is away", body = ErrorBody),
))]
pub async fn health(app: web::Data<App>) -> Result<web::Json<Health>, Error> {
    app.store.ping().await?;
    let uptime_seconds = (shared::clock::now() - app.started_at).num_seconds();
    Ok(web::Json(Health { status: "ok", version: env!("CARGO_PKG_VERSION"), uptime_seconds }))
}

/// Whether the process lives; for orchestrators.
#[utoipa::path(get, path = "/livez", tag = "System", responses(
    (status = 200, description = "it does", body = Probe),
    (status = 429, description = "too many requests", body = ErrorBody),
))]
pub async fn livez() -> web::Json<Probe> {
    web::Json(Probe { status: "ok" })
}

/// A probe's answer.
#[derive(Serialize, ToSchema)]
pub struct Probe {
    /// Always `ok`.
    #[schema(example = "ok")]
    status: &'static str,
}

/// Whether requests should come here: the database answers and no drain has begun.
#[utoipa::path(get, path = "/readyz", tag = "System", responses(
    (status = 200, description = "they should", body = Probe),
    (status = 429, description = "too many requests", body = ErrorBody),
    (status = 503, description = "the database is away or the controller drains", body = ErrorBody),
))]
pub async fn readyz(app: web::Data<App>) -> Result<web::Json<Probe>, Error> {
    if app.is_draining() {
        return Err(Error::new(Code::Unavailable, "the controller drains; try another one").retry_after(5));
    }
    app.store.ping().await?;
    Ok(web::Json(Probe { status: "ok" }))
}

/// Figures for Prometheus.
#[utoipa::path(get, path = "/metrics", tag = "System", security(("token" = []), ()), responses(
    (status = 200, description = "text format 0.0.4", content_type = "text/plain", body = String),
    (status = 401, description = "no valid token, and `metrics.public` is false", body = ErrorBody),
    (status = 429, description = "too many requests", body = ErrorBody),
))]
pub async fn metrics(request: HttpRequest, app: web::Data<App>) -> Result<HttpResponse, Error> {
    if !app.config.metrics_public {
        guard::identity(&request).require(Role::Viewer)?;
    }
    let text = app.metrics.render().map_err(Error::internal)?;
    Ok(HttpResponse::Ok().content_type("text/plain; version=0.0.4; charset=utf-8").body(text))
}

/// One act.
#[derive(Serialize, ToSchema)]
pub struct AuditRow {
    /// Number of the row.
    id: i32,
    /// When it was begun.
    #[schema(example = "2026-01-02T03:04:05.678Z")]
    time: String,
    /// Who.
    caller: String,
    /// What.
    #[schema(example = "user.create")]
    action: String,
    /// To whom or what.
    target: String,
    /// `ok`, the error, or `timed out` where a crash came between.
    outcome: String,
}

/// Who did what.
#[utoipa::path(get, path = "/audit", tag = "System", security(("token" = [])), params(
    ("offset" = Option<u64>, Query), ("limit" = Option<u64>, Query),
    ("sort" = Option<String>, Query, description = "time, caller, action"), ("order" = Option<String>, Query), ("search" = Option<String>, Query),
), responses(
    (status = 200, description = "a page of acts, newest first", body = Page<AuditRow>),
    (status = 400, description = "an unknown parameter or value", body = ErrorBody),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 403, description = "not an admin", body = ErrorBody),
    (status = 429, description = "too many requests", body = ErrorBody),
    (status = 503, description = "the database is away", body = ErrorBody),
))]
pub async fn audit_list(_: Admin, request: HttpRequest, app: web::Data<App>) -> Result<web::Json<Page<AuditRow>>, Error> {
    let query = Query::of(&request, &["search"])?;
    let (paging, sort) = (query.paging()?, query.sort(&["time", "caller", "action"], "time", Order::Desc)?);
    let (rows, total) = audit::list(&app.store, query.text("search").map(str::to_owned), sort, paging).await?;
    Ok(web::Json(paging.page(rows.into_iter().map(AuditRow::from).collect(), total)))
}

impl From<store::entities::audit::Model> for AuditRow {
    fn from(row: store::entities::audit::Model) -> Self {
        // An act takes seconds; one that is open longer was cut off.
        let is_old = shared::clock::now().timestamp_millis().saturating_sub(row.time) > 60_000;
        let open = if is_old { "timed out" } else { "running" };
        Self {
            id: row.id,
            time: rfc3339(row.time),
            caller: row.caller,
            action: row.action,
            target: row.target,
            outcome: row.outcome.unwrap_or_else(|| open.to_owned()),
        }
    }
}

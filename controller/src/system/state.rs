//! `/system/health`, `/readiness`.
//!
//! Owns: the HTTP side. Never: decides how it is. A crash here costs one answer.

use actix_web::{HttpRequest, web};

use super::health::{self, Report};
use super::preflight;
use super::readiness::{self, Check};
use crate::app::App;
use crate::http::guard::Viewer;
use crate::http::query::Query;
use crate::http::reply::{Error, ErrorBody};

/// How the installation is: a score and its parts.
#[utoipa::path(get, path = "/system/health", tag = "System", security(("token" = [])), responses(
    (status = 200, description = "score and parts", body = Report),
    (status = 400, description = "an unknown parameter", body = ErrorBody),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 429, description = "too many requests", body = ErrorBody),
    (status = 503, description = "the database is away", body = ErrorBody),
))]
pub async fn health(_: Viewer, request: HttpRequest, app: web::Data<App>) -> Result<web::Json<Report>, Error> {
    Query::only(&request, &[])?;
    Ok(web::Json(health::gather(&app).await))
}

/// Whether the installation is ready for a migration; with `provider` and `vm_name`, whether that VM is.
#[utoipa::path(get, path = "/readiness", tag = "System", security(("token" = [])), params(
    ("provider" = Option<String>, Query, description = "connection or kind, with vm_name"),
    ("vm_name" = Option<String>, Query, description = "name, path or id, with provider"),
), responses(
    (status = 200, description = "the checks", body = Vec<Check>),
    (status = 400, description = "an unknown parameter, or one of the two without the other", body = ErrorBody),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 429, description = "too many requests", body = ErrorBody),
    (status = 503, description = "the database is away", body = ErrorBody),
))]
pub async fn readiness(_: Viewer, request: HttpRequest, app: web::Data<App>) -> Result<web::Json<Vec<Check>>, Error> {
    let query = Query::only(&request, &["provider", "vm_name"])?;
    let checks = match (query.text("provider"), query.text("vm_name")) {
        (None, None) => readiness::checks(&app).await?,
        (Some(provider), Some(vm_name)) => preflight::checks(&app, provider, vm_name).await?,
        _ => return Err(Error::bad_request("give `provider` and `vm_name` together for one VM, or neither for the installation")),
    };
    Ok(web::Json(checks))
}

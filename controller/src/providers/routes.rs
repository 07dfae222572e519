//! `/providers*`.

use actix_web::{HttpRequest, HttpResponse, web};
use futures_util::future::join_all;
use proto::v1::browse::Question;
use serde::Serialize;
use shared::error::Code;
use utoipa::ToSchema;

use super::account;
use super::capabilities::{self, Capabilities};
use super::service::{self, KINDS};
use crate::app::App;
use crate::http::guard::{Admin, Operator, Viewer};
use crate::http::query::{Order, Query};
use crate::http::reply::{Error, ErrorBody, Page};
use crate::http::rfc3339;
use crate::store::entities::connections;
use crate::system::audit;

/// A connection; it never shows its secret.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({
    "name": "vms", "provider": "local", "kind": "local", "agent": "agent-5f0c2a9be1d34c77", "path": "/srv/vms", "origin": "agent",
    "status": "connected", "last_seen": "2026-01-02T03:04:05.678Z", "created_at": "2026-01-02T03:04:05.678Z", "updated_at": "2026-01-02T03:04:05.678Z"
}))]
pub struct Connection {
    name: String,
    /// The kind.
    provider: String,
    /// The same.
    kind: String,
    /// Id of the agent that serves it.
    agent: String,
    path: String,
    /// `agent`: configured there; `rest`: connected here.
    origin: String,
    /// `connected`, `away` (its agent is) or `error`.
    status: String,
    /// `libvirt`: its URI.
    #[serde(skip_serializing_if = "Option::is_none")]
    uri: Option<String>,
    /// `vsphere`: HOST[:PORT].
    #[serde(skip_serializing_if = "Option::is_none")]
    host: Option<String>,
    /// `vsphere`: whose session it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    username: Option<String>,
    /// `vsphere`: whether any certificate will do.
    #[serde(skip_serializing_if = "Option::is_none")]
    insecure: Option<bool>,
    /// `vsphere`: SHA-256 of the one certificate that will do.
    #[serde(skip_serializing_if = "Option::is_none")]
    fingerprint: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    last_error: Option<String>,
    /// When its inventory came last.
    #[serde(skip_serializing_if = "Option::is_none")]
    last_seen: Option<String>,
    created_at: String,
    updated_at: String,
}

impl From<connections::Model> for Connection {
    fn from(row: connections::Model) -> Self {
        let account = account::settings(&row);
        Self {
            uri: (row.kind == "libvirt").then(|| row.path.clone()),
            host: account.as_ref().map(|_| row.path.clone()),
            username: account.as_ref().map(|account| account.username.clone()),
            insecure: account.as_ref().map(|account| account.insecure),
            fingerprint: account.map(|account| account.fingerprint).filter(|text| !text.is_empty()),
            name: row.name,
            provider: row.kind.clone(),
            kind: row.kind,
            agent: row.agent_id,
            path: row.path,
            origin: row.origin,
            status: row.status,
            last_error: row.last_error,
            last_seen: row.last_seen.map(rfc3339),
            created_at: rfc3339(row.created_at),
            updated_at: rfc3339(row.updated_at),
        }
    }
}

/// Connections.
#[utoipa::path(get, path = "/providers", tag = "Providers", security(("token" = [])), params(
    ("offset" = Option<u64>, Query), ("limit" = Option<u64>, Query),
    ("sort" = Option<String>, Query, description = "name, kind, status, created_at"), ("order" = Option<String>, Query),
    ("status" = Option<String>, Query, description = "connected, away, error"), ("provider" = Option<String>, Query, description = "kind or name"),
    ("search" = Option<String>, Query),
), responses(
    (status = 200, description = "a page of connections", body = Page<Connection>),
    (status = 400, description = "an unknown parameter or value", body = ErrorBody),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 429, description = "too many requests", body = ErrorBody),
    (status = 503, description = "the database is away", body = ErrorBody),
))]
pub async fn list(_: Viewer, request: HttpRequest, app: web::Data<App>) -> Result<web::Json<Page<Connection>>, Error> {
    let query = Query::of(&request, &["status", "provider", "search"])?;
    let (paging, sort) = (query.paging()?, query.sort(&["name", "kind", "status", "created_at"], "name", Order::Asc)?);
    let status = query.word("status", &["connected", "away", "error"])?;
    // Connections are few (each is somebody's hypervisor), so they are sorted here.
    let mut rows = service::all(&app.store).await?;
    if query.text("provider").is_some() {
        let known: Vec<&str> = KINDS.iter().copied().chain(rows.iter().map(|row| row.name.as_str())).collect();
        query.word("provider", &known)?;
    }
    let search = query.text("search").map(str::to_lowercase);
    rows.retain(|row| {
        status.is_none_or(|status| row.status == status)
            && query.text("provider").is_none_or(|provider| row.kind == provider || row.name == provider)
            && search.as_ref().is_none_or(|search| row.name.to_lowercase().contains(search))
    });
    rows.sort_by(|a, b| {
        let by_field = match sort.field {
            "kind" => a.kind.cmp(&b.kind),
            "status" => a.status.cmp(&b.status),
            "created_at" => a.created_at.cmp(&b.created_at),
            _ => a.name.cmp(&b.name),
        };
        let by_field = if sort.order == Order::Desc { by_field.reverse() } else { by_field };
        by_field.then_with(|| a.name.cmp(&b.name))
    });
    Ok(web::Json(paging.cut(rows.into_iter().map(Connection::from).collect())))
}

/// What can be done with each kind, now.
#[utoipa::path(get, path = "/providers/capabilities", tag = "Providers", security(("token" = [])), responses(
    (status = 200, description = "per kind", body = Capabilities),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 429, description = "too many requests", body = ErrorBody),
    (status = 503, description = "the database is away", body = ErrorBody),
))]
pub async fn capabilities(_: Viewer, app: web::Data<App>) -> Result<web::Json<Capabilities>, Error> {
    Ok(web::Json(capabilities::detect(&app).await?))
}

/// One connection.
#[utoipa::path(get, path = "/providers/{name}", tag = "Providers", security(("token" = [])), params(("name" = String, Path)), responses(
    (status = 200, description = "the connection", body = Connection),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 404, description = "no such connection", body = ErrorBody),
    (status = 429, description = "too many requests", body = ErrorBody),
    (status = 503, description = "the database is away", body = ErrorBody),
))]
pub async fn get(_: Viewer, name: web::Path<String>, app: web::Data<App>) -> Result<web::Json<Connection>, Error> {
    Ok(web::Json(service::by_name(&app.store, &name).await?.into()))
}

/// Removes a connection and its inventory; jobs that are under way go on.
#[utoipa::path(delete, path = "/providers/{name}", tag = "Providers", security(("token" = [])), params(("name" = String, Path)), responses(
    (status = 204, description = "gone"),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 403, description = "not an admin", body = ErrorBody),
    (status = 404, description = "no such connection", body = ErrorBody),
    (status = 409, description = "it is configured on its agent", body = ErrorBody),
    (status = 429, description = "too many requests", body = ErrorBody),
    (status = 503, description = "the database is away", body = ErrorBody),
))]
pub async fn remove(caller: Admin, name: web::Path<String>, app: web::Data<App>) -> Result<HttpResponse, Error> {
    let row = service::by_name(&app.store, &name).await?;
    let act = audit::begin(&app.store, &caller.name, "provider.remove", &name).await?;
    let gone = service::remove(&app.store, &row).await;
    act.finish(&gone).await;
    gone?;
    Ok(HttpResponse::NoContent().finish())
}

/// What a test found.
#[derive(Serialize, ToSchema)]
pub struct Tested {
    /// Always true; a failure is an error.
    #[schema(example = true)]
    ok: bool,
    /// What the agent saw.
    #[schema(value_type = Object, example = json!({"vms": 3}))]
    found: serde_json::Value,
}

/// Whether the agent can serve a connection now.
#[utoipa::path(post, path = "/providers/{name}/test", tag = "Providers", security(("token" = [])), params(("name" = String, Path)), responses(
    (status = 200, description = "it can", body = Tested),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 403, description = "not an operator", body = ErrorBody),
    (status = 404, description = "no such connection", body = ErrorBody),
    (status = 422, description = "it cannot", body = ErrorBody),
    (status = 429, description = "too many requests", body = ErrorBody),
    (status = 502, description = "the agent did not answer", body = ErrorBody),
    (status = 503, description = "the database or the agent is away", body = ErrorBody),
))]
pub async fn test(_: Operator, name: web::Path<String>, app: web::Data<App>) -> Result<web::Json<Tested>, Error> {
    let row = service::by_name(&app.store, &name).await?;
    let patience = service::patience(&row.kind);
    let found = app.fleet.ask_within(&row.agent_id, Question::Probe(service::told(&row)), patience).await?;
    Ok(web::Json(Tested { ok: true, found }))
}

/// A fresh inventory of one connection.
#[utoipa::path(post, path = "/providers/{name}/refresh", tag = "Providers", security(("token" = [])), params(("name" = String, Path)), responses(
    (status = 200, description = "the connection, with its new last_seen", body = Connection),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 403, description = "not an operator", body = ErrorBody),
    (status = 404, description = "no such connection", body = ErrorBody),
    (status = 422, description = "the inventory cannot be read", body = ErrorBody),
    (status = 429, description = "too many requests", body = ErrorBody),
    (status = 502, description = "the agent did not answer", body = ErrorBody),
    (status = 503, description = "the database or the agent is away", body = ErrorBody),
))]
pub async fn refresh(_: Operator, name: web::Path<String>, app: web::Data<App>) -> Result<web::Json<Connection>, Error> {
    let row = service::by_name(&app.store, &name).await?;
    app.fleet.ask_within(&row.agent_id, Question::Refresh(row.name.clone()), service::patience(&row.kind)).await?;
    // The inventory comes before the answer, with what kept the agent from reading it.
    let row = service::by_name(&app.store, &name).await?;
    match row.last_error {
        Some(error) if row.status == "error" => Err(Error::new(Code::Unprocessable, error)),
        _ => Ok(web::Json(row.into())),
    }
}

/// Asks for fresh inventories of all connections, or of those of one kind or name. What cannot be refreshed keeps its old `last_seen`;
/// only where nothing could be refreshed it is an error.
pub async fn refresh_all(app: &App, provider: Option<&str>) -> Result<(), Error> {
    let rows = service::all(&app.store).await?;
    let wanted = rows.iter().filter(|row| provider.is_none_or(|provider| row.kind == provider || row.name == provider));
    let asked = wanted.map(|row| app.fleet.ask_within(&row.agent_id, Question::Refresh(row.name.clone()), service::patience(&row.kind)));
    let answers = join_all(asked).await;
    if answers.iter().any(Result::is_ok) {
        return Ok(());
    }
    match answers.into_iter().next() {
        Some(Err(first)) => Err(first),
        _ => Ok(()),
    }
}

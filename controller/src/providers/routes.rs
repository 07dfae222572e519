//! `/providers*`.

use actix_web::{HttpRequest, HttpResponse, web};
use futures_util::future::join_all;
use proto::v1;
use proto::v1::browse::Question;
use serde::{Deserialize, Serialize};
use shared::error::Code;
use utoipa::ToSchema;

use super::capabilities::{self, Capabilities};
use super::service::{self, KINDS};
use crate::app::App;
use crate::http::body::Json;
use crate::http::guard::{Admin, Operator, Viewer};
use crate::http::idempotency::Idempotency;
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
        Self {
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

/// What is to be connected. `local` takes `path`.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"provider": "local", "name": "lab", "path": "/srv/vms"}))]
pub struct Connect {
    /// The kind: `local`; `libvirt` and `vsphere` are not built yet.
    provider: String,
    /// Absent: the kind, with a number where that is taken.
    #[serde(default)]
    name: Option<String>,
    /// `local`: absolute path of a folder on the agent's host.
    #[serde(default)]
    path: Option<String>,
    /// Id or name of the agent; absent: the only one that is connected.
    #[serde(default)]
    agent: Option<String>,
    // Fields of the kinds that are not built yet: read, so that the answer is "not built yet", and dropped.
    #[serde(default, rename = "host")]
    #[schema(ignore)]
    _host: serde::de::IgnoredAny,
    #[serde(default, rename = "username")]
    #[schema(ignore)]
    _username: serde::de::IgnoredAny,
    #[serde(default, rename = "password")]
    #[schema(ignore)]
    _password: serde::de::IgnoredAny,
    #[serde(default, rename = "insecure")]
    #[schema(ignore)]
    _insecure: serde::de::IgnoredAny,
    #[serde(default, rename = "fingerprint")]
    #[schema(ignore)]
    _fingerprint: serde::de::IgnoredAny,
    #[serde(default, rename = "uri")]
    #[schema(ignore)]
    _uri: serde::de::IgnoredAny,
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

/// Connects: asks the agent whether it can serve the connection, then keeps it.
#[utoipa::path(post, path = "/providers/connect", tag = "Providers", security(("token" = [])), request_body = Connect, responses(
    (status = 201, description = "the connection", body = Connection),
    (status = 400, description = "the body cannot be read, or a field is wrong", body = ErrorBody),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 403, description = "not an admin, or the folder is outside what the agent may read", body = ErrorBody),
    (status = 409, description = "the name exists", body = ErrorBody),
    (status = 413, description = "the body is too large", body = ErrorBody),
    (status = 415, description = "no JSON", body = ErrorBody),
    (status = 422, description = "a kind that is not built yet, or the folder cannot be read", body = ErrorBody),
    (status = 429, description = "too many requests", body = ErrorBody),
    (status = 502, description = "the agent did not answer", body = ErrorBody),
    (status = 503, description = "the database or the agent is away", body = ErrorBody),
))]
pub async fn connect(caller: Admin, request: HttpRequest, app: web::Data<App>, body: Json<Connect>) -> Result<HttpResponse, Error> {
    let key = Idempotency::of(&request, &caller, &body.digest)?;
    if let Some(key) = &key
        && let Some(first) = key.replay(&app.store).await?
    {
        return Ok(first);
    }
    let wanted = body.value;
    if wanted.provider != "local" {
        let shown: String = wanted.provider.chars().take(40).collect();
        return Err(Error::not_built(format!("provider `{shown}`")).detail(serde_json::json!({ "built": ["local"] })));
    }
    let path = wanted.path.filter(|path| is_path(path));
    let path =
        path.ok_or_else(|| Error::bad_request("provider `local` needs `path`, the absolute path of a folder on the agent's host"))?;
    let agent_id = choose_agent(&app, wanted.agent.as_deref()).await?;
    let name = match wanted.name {
        Some(name) if service::is_name(&name) => name,
        Some(_) => return Err(Error::bad_request("name must be 1 to 63 of a-z, 0-9, `-`, `_`, `.`, beginning with a letter or digit")),
        None => free_name(&app, &wanted.provider).await?,
    };
    let connection = v1::Connection { name: name.clone(), kind: wanted.provider, path };
    let act = audit::begin(&app.store, &caller.name, "provider.connect", &name).await?;
    let made = probe_and_add(&app, &agent_id, connection, key).await;
    act.finish(&made).await;
    let made = made?;
    let made = first_inventory(&app, made).await;
    let location = format!("/api/v1/providers/{}", made.name);
    Ok(HttpResponse::Created().insert_header(("Location", location)).json(Connection::from(made)))
}

/// Whether a text can be a folder of a `local` connection.
pub(super) fn is_path(path: &str) -> bool {
    path.starts_with('/') && path.len() <= 4096 && !path.contains('\0')
}

async fn probe_and_add(
    app: &App,
    agent_id: &str,
    connection: v1::Connection,
    key: Option<Idempotency>,
) -> Result<connections::Model, Error> {
    if service::all(&app.store).await?.iter().any(|row| row.name == connection.name) {
        return Err(Error::new(Code::Conflict, format!("a connection `{}` exists already", connection.name)));
    }
    app.fleet.ask(agent_id, Question::Probe(connection.clone())).await?;
    let remember = move |made: &connections::Model| {
        let answer = serde_json::to_string(&Connection::from(made.clone())).ok()?;
        key.map(|key| key.row(201, &format!("/api/v1/providers/{}", made.name), answer))
    };
    Ok(service::add(&app.store, agent_id, &connection, remember).await?)
}

/// The connection stands; its inventory comes when it comes, and a failure shows as its status.
///
/// An agent learns its connections from `Welcome`. One that has no inventory to send yet does not know of this one, so its session is
/// closed: it comes back within seconds, its copies go on meanwhile.
async fn first_inventory(app: &App, made: connections::Model) -> connections::Model {
    if let Err(e) = app.fleet.ask(&made.agent_id, Question::Refresh(made.name.clone())).await {
        tracing::warn!(connection = made.name, cause = %e, "first inventory did not come");
    }
    let row = service::by_name(&app.store, &made.name).await.unwrap_or(made);
    if row.last_seen.is_none() && row.last_error.is_none() {
        app.fleet.close(&row.agent_id, tonic::Status::aborted("a connection was added; come back for it"));
    }
    row
}

/// The agent that is meant: by id or name, or the only one that is connected.
pub(super) async fn choose_agent(app: &App, wanted: Option<&str>) -> Result<String, Error> {
    let agents = app.connected_agents().await?;
    let listed = agents.iter().map(|agent| format!("`{}` ({})", agent.name, agent.id)).collect::<Vec<_>>().join(", ");
    if agents.is_empty() {
        return Err(Error::new(Code::Unavailable, "no agent is connected; POST /agents/tokens gives a join token for one").retry_after(10));
    }
    match (wanted, agents.as_slice()) {
        (None, [only]) => Ok(only.id.clone()),
        (None, _) => Err(Error::bad_request(format!("several agents are connected; name one in `agent`: {listed}"))),
        (Some(wanted), _) => {
            let found = agents.iter().find(|agent| agent.id == wanted || agent.name == wanted);
            let unknown = || Error::bad_request(format!("agent `{wanted}` is not connected; connected: {listed}"));
            found.map(|agent| agent.id.clone()).ok_or_else(unknown)
        }
    }
}

async fn free_name(app: &App, kind: &str) -> Result<String, Error> {
    let rows = service::all(&app.store).await?;
    let is_free = |name: &String| !rows.iter().any(|row| row.name == *name);
    let mut names = std::iter::once(kind.to_owned()).chain((2..=rows.len() + 2).map(|n| format!("{kind}-{n}")));
    names.find(is_free).ok_or_else(|| Error::internal("no free name among more names than connections"))
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
    let connection = v1::Connection { name: row.name, kind: row.kind, path: row.path };
    let found = app.fleet.ask(&row.agent_id, Question::Probe(connection)).await?;
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
    app.fleet.ask(&row.agent_id, Question::Refresh(row.name.clone())).await?;
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
    let asked = wanted.map(|row| app.fleet.ask(&row.agent_id, Question::Refresh(row.name.clone())));
    let answers = join_all(asked).await;
    if answers.iter().any(Result::is_ok) {
        return Ok(());
    }
    match answers.into_iter().next() {
        Some(Err(first)) => Err(first),
        _ => Ok(()),
    }
}

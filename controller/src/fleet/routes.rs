//! `/agents`: who is in the fleet, and who may join it.
//!
//! Owns: the HTTP side. Never: shows a key, or a token after the answer that made it. A crash here costs one answer.

use std::collections::BTreeMap;
use std::time::Duration;

use actix_web::{HttpRequest, HttpResponse, web};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::enroll::{LONGEST, is_name};
use super::registry::merge_roots;
use super::store::{self, RootRow};
use crate::app::App;
use crate::http::body::Json;
use crate::http::guard::{Admin, Viewer};
use crate::http::query::{Order, Query};
use crate::http::reply::{Error, ErrorBody, Page};
use crate::jobs::store::Rates;
use crate::jobs::view::time;
use crate::store::entities::agents;
use crate::system::audit;

/// An agent.
#[derive(Serialize, ToSchema)]
#[schema(as = Agent, example = json!({
    "id": "agent-5f0c2a9be1d34c77", "name": "local", "status": "connected", "draining": false, "version": "0.1.0", "hostname": "kvm-1", "cpus": 16,
    "formats": ["ova", "ovf", "vmdk", "qcow2", "raw"], "signer": "0f1e2d3c4b5a69788796a5b4c3d2e1f0", "resident_bytes": 31457280u64,
    "roots": [{"name": "exports", "path": "/var/lib/hypersdk/exports", "free_bytes": 1099511627776u64, "total_bytes": 2199023255552u64, "writable": true}],
    "rates": {"qcow2": {"capacity": 734003200.0, "data": 524288000.0, "samples": 12}},
    "enrolled_at": "2026-01-02T03:04:05.678Z", "connected_at": "2026-01-02T03:04:05.678Z", "last_seen": "2026-01-02T03:04:05.678Z"
}))]
pub struct AgentView {
    id: String,
    name: String,
    /// `connected` or `away`.
    status: &'static str,
    /// It gets no new work.
    draining: bool,
    version: String,
    hostname: String,
    cpus: i64,
    /// Output formats that its engine writes.
    formats: Vec<String>,
    /// Fingerprint of the key that signs its manifests, as `hypersdk verify --trust` takes it.
    signer: String,
    /// Memory of its process; null while it is away.
    resident_bytes: Option<u64>,
    /// Folders of its host that jobs may name.
    roots: Vec<RootRow>,
    /// Measured bytes a second by output format.
    #[schema(value_type = Object)]
    rates: Rates,
    enrolled_at: String,
    /// Null while it is away.
    connected_at: Option<String>,
    /// To the minute while connected.
    last_seen: Option<String>,
}

async fn view(app: &App, row: agents::Model) -> AgentView {
    let live = app.fleet.snapshot(&row.id).await;
    let roots = store::roots(&row);
    AgentView {
        status: if live.is_some() { "connected" } else { "away" },
        signer: shared::manifest::fingerprint(&row.signing_key),
        resident_bytes: live.as_ref().map(|live| live.resident_bytes),
        roots: live.as_ref().map_or_else(|| roots.clone(), |live| merge_roots(roots.clone(), &live.roots)),
        connected_at: live.as_ref().map(|live| time(live.connected_at)),
        formats: serde_json::from_str(&row.formats).unwrap_or_default(),
        rates: serde_json::from_str(&row.rates).unwrap_or_else(|_| BTreeMap::new()),
        enrolled_at: time(row.enrolled_at),
        last_seen: row.last_seen.map(time),
        draining: row.draining,
        id: row.id,
        name: row.name,
        version: row.version,
        hostname: row.hostname,
        cpus: row.cpus,
    }
}

/// The fleet.
#[utoipa::path(get, path = "/agents", tag = "Agents", security(("token" = [])), params(
    ("offset" = Option<u64>, Query), ("limit" = Option<u64>, Query),
    ("sort" = Option<String>, Query, description = "name, enrolled_at, last_seen"), ("order" = Option<String>, Query, description = "asc, desc"),
    ("status" = Option<String>, Query, description = "connected, away"), ("search" = Option<String>, Query, description = "part of name or id"),
), responses(
    (status = 200, description = "one page", body = Page<AgentView>),
    (status = 400, description = "an unknown parameter or value; the known ones are listed", body = ErrorBody),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 429, description = "too many requests", body = ErrorBody),
    (status = 503, description = "the database is away", body = ErrorBody),
))]
pub async fn list(_: Viewer, request: HttpRequest, app: web::Data<App>) -> Result<web::Json<Page<AgentView>>, Error> {
    let query = Query::of(&request, &["status", "search"])?;
    let paging = query.paging()?;
    let sort = query.sort(&["name", "enrolled_at", "last_seen"], "name", Order::Asc)?;
    let status = query.word("status", &["connected", "away"])?;
    let search = query.text("search").map(crate::store::fold);
    let mut rows = app.fleet.agents().await?;
    rows.retain(|row| {
        let is_asked = status.is_none_or(|word| app.fleet.is_connected(&row.id) == (word == "connected"));
        is_asked && search.as_ref().is_none_or(|part| row.name.contains(part.as_str()) || row.id.contains(part.as_str()))
    });
    rows.sort_by(|a, b| {
        let by = match sort.field {
            "enrolled_at" => a.enrolled_at.cmp(&b.enrolled_at),
            "last_seen" => a.last_seen.cmp(&b.last_seen),
            _ => a.name.cmp(&b.name),
        };
        let by = if sort.order == Order::Desc { by.reverse() } else { by };
        by.then_with(|| a.id.cmp(&b.id))
    });
    let page = paging.cut(rows);
    let mut data = Vec::with_capacity(page.data.len());
    for row in page.data {
        data.push(view(&app, row).await);
    }
    Ok(web::Json(Page { data, pagination: page.pagination }))
}

/// One agent, by id or name.
#[utoipa::path(get, path = "/agents/{id}", tag = "Agents", security(("token" = [])), params(("id" = String, Path)), responses(
    (status = 200, description = "the agent", body = AgentView),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 404, description = "no such agent", body = ErrorBody),
    (status = 429, description = "too many requests", body = ErrorBody),
    (status = 503, description = "the database is away", body = ErrorBody),
))]
pub async fn get(_: Viewer, app: web::Data<App>, id: web::Path<String>) -> Result<web::Json<AgentView>, Error> {
    let row = app.fleet.resolve(&id).await?;
    Ok(web::Json(view(&app, row).await))
}

/// Removes an agent: its certificate is worth nothing from now on. Jobs that are pinned to it wait until they are cancelled.
#[utoipa::path(delete, path = "/agents/{id}", tag = "Agents", security(("token" = [])), params(("id" = String, Path)), responses(
    (status = 204, description = "removed"),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 403, description = "not an admin", body = ErrorBody),
    (status = 404, description = "no such agent", body = ErrorBody),
    (status = 429, description = "too many requests", body = ErrorBody),
    (status = 503, description = "the database is away", body = ErrorBody),
))]
pub async fn remove(caller: Admin, app: web::Data<App>, id: web::Path<String>) -> Result<HttpResponse, Error> {
    let row = app.fleet.resolve(&id).await?;
    let act = audit::begin(&app.store, &caller.name, "agent.remove", &row.name).await?;
    let done = store::revoke(&app.store, &row).await.map_err(Error::from);
    act.finish(&done).await;
    done?;
    app.fleet.close(&row.id, tonic::Status::permission_denied("this agent was removed from the fleet"));
    Ok(HttpResponse::NoContent().finish())
}

async fn set_draining(caller: Admin, app: &App, id: &str, draining: bool) -> Result<web::Json<AgentView>, Error> {
    let row = app.fleet.resolve(id).await?;
    let action = if draining { "agent.drain" } else { "agent.resume" };
    let act = audit::begin(&app.store, &caller.name, action, &row.name).await?;
    let done = async {
        store::set_draining(&app.store, &row.id, draining).await?;
        Ok::<_, Error>(app.queue.agent_draining(row.id.clone(), draining).await?)
    };
    let done = done.await;
    act.finish(&done).await;
    done?;
    Ok(web::Json(view(app, agents::Model { draining, ..row }).await))
}

/// The agent gets no new work; what runs there ends.
#[utoipa::path(post, path = "/agents/{id}/drain", tag = "Agents", security(("token" = [])), params(("id" = String, Path)), responses(
    (status = 200, description = "the agent", body = AgentView),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 403, description = "not an admin", body = ErrorBody),
    (status = 404, description = "no such agent", body = ErrorBody),
    (status = 429, description = "too many requests", body = ErrorBody),
    (status = 503, description = "the database is away", body = ErrorBody),
))]
pub async fn drain(caller: Admin, app: web::Data<App>, id: web::Path<String>) -> Result<web::Json<AgentView>, Error> {
    set_draining(caller, &app, &id, true).await
}

/// The agent gets work again.
#[utoipa::path(post, path = "/agents/{id}/resume", tag = "Agents", security(("token" = [])), params(("id" = String, Path)), responses(
    (status = 200, description = "the agent", body = AgentView),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 403, description = "not an admin", body = ErrorBody),
    (status = 404, description = "no such agent", body = ErrorBody),
    (status = 429, description = "too many requests", body = ErrorBody),
    (status = 503, description = "the database is away", body = ErrorBody),
))]
pub async fn resume(caller: Admin, app: web::Data<App>, id: web::Path<String>) -> Result<web::Json<AgentView>, Error> {
    set_draining(caller, &app, &id, false).await
}

/// For whom a token is and how long it lives.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"name": "kvm-1", "ttl_seconds": 600}))]
pub struct TokenWish {
    /// Binds the token to this agent name; an agent that is there already gets its new key by such a token.
    name: Option<String>,
    /// 1 to 3600; default 3600.
    ttl_seconds: Option<i64>,
}

/// A join token, shown this once.
#[derive(Serialize, ToSchema)]
#[schema(as = JoinToken, example = json!({"token": "eyJzZWNyZXQiOiI…", "expires_at": "2026-01-02T03:04:05.678Z"}))]
pub struct TokenView {
    /// For `hypersdk-agent --token`.
    token: String,
    /// RFC 3339.
    expires_at: String,
}

/// Makes a one-use join token. It carries the CA's certificate, so that the agent's first contact is pinned.
#[utoipa::path(post, path = "/agents/tokens", tag = "Agents", security(("token" = [])), request_body = TokenWish, responses(
    (status = 201, description = "the token, shown once", body = TokenView),
    (status = 400, description = "the body cannot be read, or a field is wrong", body = ErrorBody),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 403, description = "not an admin", body = ErrorBody),
    (status = 413, description = "the body is too large", body = ErrorBody),
    (status = 415, description = "no JSON", body = ErrorBody),
    (status = 429, description = "too many requests", body = ErrorBody),
    (status = 503, description = "the database is away", body = ErrorBody),
))]
pub async fn token_create(caller: Admin, app: web::Data<App>, body: Json<TokenWish>) -> Result<HttpResponse, Error> {
    let wish = body.value;
    if wish.name.as_deref().is_some_and(|name| !is_name(name)) {
        return Err(Error::bad_request("an agent's name is 1 to 63 of a-z, 0-9 and `-`"));
    }
    let ttl = match wish.ttl_seconds {
        None => LONGEST,
        Some(seconds) => match u64::try_from(seconds).map(Duration::from_secs) {
            Ok(ttl) if !ttl.is_zero() && ttl <= LONGEST => ttl,
            _ => return Err(Error::bad_request(format!("ttl_seconds must be 1 to {}, not {seconds}", LONGEST.as_secs()))),
        },
    };
    let act = audit::begin(&app.store, &caller.name, "agent.token", wish.name.as_deref().unwrap_or("any")).await?;
    let made = app.fleet.join_token(&caller.name, wish.name, ttl).await.map_err(Error::from);
    act.finish(&made).await;
    let made = made?;
    // Idempotency-Key is not taken here: its row would keep the token.
    Ok(HttpResponse::Created().json(TokenView { token: made.text.expose().to_owned(), expires_at: time(made.expires_at) }))
}

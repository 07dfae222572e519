//! `PATCH /providers/{name}`.
//!
//! Owns: what of a connection may change, and how its agents learn of it. Never: changes what an agent has configured itself.
//! A crash between the row and the agent costs nothing: the agent's next Hello brings it the row.

use actix_web::web;
use proto::v1;
use proto::v1::browse::Question;
use serde::Deserialize;
use shared::error::Code;
use utoipa::ToSchema;

use super::routes::{Connection, choose_agent, is_path};
use super::service;
use crate::app::App;
use crate::http::body::Json;
use crate::http::guard::Admin;
use crate::http::reply::{Error, ErrorBody};
use crate::store::entities::connections;
use crate::system::audit;

/// What is to change; what is absent stays.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = ChangeConnection, example = json!({"path": "/srv/vms-2"}))]
pub struct Change {
    /// `local`: absolute path of a folder on the agent's host.
    #[serde(default)]
    path: Option<String>,
    /// Id or name of the agent that serves it from now on.
    #[serde(default)]
    agent: Option<String>,
}

/// Changes a connection, after its agent has said that it can serve it so. Jobs that are under way or queued stay with what they were made for.
#[utoipa::path(patch, path = "/providers/{name}", tag = "Providers", security(("token" = [])), params(("name" = String, Path)),
    request_body = Change, responses(
    (status = 200, description = "the connection", body = Connection),
    (status = 400, description = "the body cannot be read, or nothing is to change", body = ErrorBody),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 403, description = "not an admin, or the folder is outside what the agent may read", body = ErrorBody),
    (status = 404, description = "no such connection", body = ErrorBody),
    (status = 409, description = "it is configured on its agent, or changed at the same moment", body = ErrorBody),
    (status = 413, description = "the body is too large", body = ErrorBody),
    (status = 415, description = "no JSON", body = ErrorBody),
    (status = 422, description = "the folder cannot be read", body = ErrorBody),
    (status = 429, description = "too many requests", body = ErrorBody),
    (status = 502, description = "the agent did not answer", body = ErrorBody),
    (status = 503, description = "the database or the agent is away", body = ErrorBody),
))]
pub async fn change(
    caller: Admin,
    name: web::Path<String>,
    app: web::Data<App>,
    body: Json<Change>,
) -> Result<web::Json<Connection>, Error> {
    let row = service::by_name(&app.store, &name).await?;
    let wanted = body.value;
    if wanted.path.is_none() && wanted.agent.is_none() {
        return Err(Error::bad_request("nothing is to change; give `path`, `agent` or both"));
    }
    if row.origin == "agent" {
        return Err(Error::new(Code::Conflict, format!("`{name}` is configured on its agent; change it there")));
    }
    if row.kind != "local" {
        return Err(Error::not_built(format!("changing a connection of kind `{}`", row.kind)));
    }
    let path = match wanted.path {
        Some(path) if is_path(&path) => path,
        Some(_) => return Err(Error::bad_request("`path` must be the absolute path of a folder on the agent's host")),
        None => row.path.clone(),
    };
    let agent_id = match &wanted.agent {
        Some(agent) => choose_agent(&app, Some(agent)).await?,
        None => row.agent_id.clone(),
    };
    let act = audit::begin(&app.store, &caller.name, "provider.change", &name).await?;
    let changed = probe_and_move(&app, &row, &agent_id, path).await;
    act.finish(&changed).await;
    changed?;
    if agent_id != row.agent_id {
        // Its old agent learns by its next Hello that it serves it no more; its copies go on meanwhile.
        app.fleet.close(&row.agent_id, tonic::Status::aborted("a connection was moved; come back without it"));
    }
    if let Err(e) = app.fleet.ask(&agent_id, Question::Refresh(row.name.clone())).await {
        tracing::warn!(connection = row.name, cause = %e, "the inventory after a change did not come");
    }
    let now = service::by_name(&app.store, &name).await?;
    if now.last_seen.is_none() && now.last_error.is_none() {
        app.fleet.close(&agent_id, tonic::Status::aborted("a connection was changed; come back for it"));
    }
    Ok(web::Json(now.into()))
}

async fn probe_and_move(app: &App, row: &connections::Model, agent_id: &str, path: String) -> Result<(), Error> {
    let connection = v1::Connection { name: row.name.clone(), kind: row.kind.clone(), path };
    app.fleet.ask(agent_id, Question::Probe(connection.clone())).await?;
    service::change(&app.store, row, agent_id, &connection.path).await
}

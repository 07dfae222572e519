//! `POST /vms/{provider}/{id}/power`.
//!
//! Owns: who may switch a VM, and that it stands in the audit. Never: switches one because a job wants to. A crash here costs one answer;
//! the agent's act is done or not, and the inventory says which.

use actix_web::web;
use proto::v1;
use proto::v1::browse::Question;
use serde::{Deserialize, Serialize};
use shared::options::Action;
use utoipa::ToSchema;

use super::service;
use crate::app::App;
use crate::http::body::Json;
use crate::http::guard::Operator;
use crate::http::reply::{Error, ErrorBody};
use crate::providers;
use crate::system::audit;

/// How to switch it.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"action": "start"}))]
pub struct Power {
    /// `start`, `shutdown` (asks the guest), `stop` (at once), `reset`.
    action: String,
}

/// What became of it.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({"id": "vm-57", "name": "web-server-01", "action": "start", "power_state": "poweredOn"}))]
pub struct Switched {
    id: String,
    name: String,
    action: &'static str,
    /// Right afterwards; a guest that was asked to shut down takes its time.
    power_state: String,
}

/// Starts, shuts down, stops or resets a VM.
#[utoipa::path(post, path = "/vms/{provider}/{id}/power", tag = "VMs", security(("token" = [])), params(
    ("provider" = String, Path, description = "connection or kind"), ("id" = String, Path, description = "id, path or name; `/` as %2F"),
), request_body = Power, responses(
    (status = 200, description = "it is switched", body = Switched),
    (status = 400, description = "the body cannot be read, an unknown action, or no or several connections of that kind", body = ErrorBody),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 403, description = "not an operator", body = ErrorBody),
    (status = 404, description = "no such VM", body = ErrorBody),
    (status = 409, description = "several bear the name, or its state is not for that", body = ErrorBody),
    (status = 413, description = "the body is too large", body = ErrorBody),
    (status = 415, description = "no JSON", body = ErrorBody),
    (status = 422, description = "the hypervisor refuses, or it is a disk image", body = ErrorBody),
    (status = 429, description = "too many requests", body = ErrorBody),
    (status = 502, description = "the agent or the hypervisor did not answer", body = ErrorBody),
    (status = 503, description = "the database or the agent is away", body = ErrorBody),
))]
pub async fn switch(
    caller: Operator,
    path: web::Path<(String, String)>,
    app: web::Data<App>,
    body: Json<Power>,
) -> Result<web::Json<Switched>, Error> {
    let action = Action::from_word(&body.value.action).ok_or_else(|| {
        let shown: String = body.value.action.chars().take(40).collect();
        Error::bad_request(format!("action `{shown}` is unknown; known: {}", Action::ALL.join(", ")))
    })?;
    let (provider, id) = path.into_inner();
    let connection = providers::service::resolve(&app.store, &provider).await?;
    let found = service::resolve(&app.store, &connection, &id).await?;
    let question =
        v1::Power { connection: Some(providers::service::told(&connection)), vm_id: found.vm.id.clone(), action: action.word().to_owned() };
    let subject = format!("{}:{}", connection.name, found.vm.id);
    let act = audit::begin(&app.store, &caller.name, &format!("vm.{action}"), &subject).await?;
    let patience = providers::service::patience(&connection.kind);
    let answered = app.fleet.ask_within(&connection.agent_id, Question::Power(question), patience).await;
    act.finish(&answered).await;
    let power_state = answered?.get("power_state").and_then(|state| state.as_str()).unwrap_or_default().to_owned();
    Ok(web::Json(Switched { id: found.vm.id, name: found.vm.name, action: action.word(), power_state }))
}

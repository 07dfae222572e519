//! `GET /vms/{provider}/{id}/console`.
//!
//! Owns: the order of the refusals, all of which come before the upgrade. Never: upgrades before the agent has the screen open.
//! A crash here costs one answer.

use actix_web::{HttpRequest, HttpResponse, web};
use actix_web_actors::ws;

use super::service;
use super::session::Session;
use crate::access::Role;
use crate::app::App;
use crate::http::query::Query;
use crate::http::reply::{Error, ErrorBody};
use crate::{live, providers, vms};

/// Largest frame of a viewer in bytes.
const FRAME: usize = 64 << 10;
/// What noVNC asks for, and what this is.
const PROTOCOLS: &[&str] = &["binary"];

/// The console of a VM that is on: RFB 3.8 (VNC) in binary frames, both ways.
#[utoipa::path(get, path = "/vms/{provider}/{id}/console", tag = "VMs", security(("token" = []), ()), params(
    ("provider" = String, Path, description = "connection or kind"), ("id" = String, Path, description = "id, path or name; `/` as %2F"),
    ("ticket" = Option<String>, Query, description = "from POST /ws/ticket, in place of the header"),
), responses(
    (status = 101, description = "bytes of RFB; subprotocol `binary` where it is asked for; closed with the reason when either side ends"),
    (status = 400, description = "no WebSocket handshake, or no or several connections of that kind", body = ErrorBody),
    (status = 401, description = "no valid token or ticket", body = ErrorBody),
    (status = 403, description = "not an operator, or a foreign Origin", body = ErrorBody),
    (status = 404, description = "no such VM", body = ErrorBody),
    (status = 409, description = "several bear the name, or it is off", body = ErrorBody),
    (status = 422, description = "it has no VNC that its agent reaches, or the kind has no console yet", body = ErrorBody),
    (status = 429, description = "too many requests", body = ErrorBody),
    (status = 502, description = "the agent or the hypervisor did not answer", body = ErrorBody),
    (status = 503, description = "the database or the agent is away, or too many consoles are open", body = ErrorBody),
))]
pub async fn open(
    request: HttpRequest,
    payload: web::Payload,
    path: web::Path<(String, String)>,
    app: web::Data<App>,
) -> Result<HttpResponse, Error> {
    let query = Query::only(&request, &["ticket"])?;
    live::routes::check_origin(&request, &app)?;
    let caller = live::routes::who(&request, &query, &app, Role::Operator).await?;
    let (provider, id) = path.into_inner();
    let connection = providers::service::resolve(&app.store, &provider).await?;
    let found = vms::service::resolve(&app.store, &connection, &id).await?;
    service::is_offered(&connection.kind)?;
    let refused = |e: &dyn std::fmt::Display| Error::bad_request(format!("this path takes a WebSocket handshake: {e}"));
    ws::handshake(&request).map_err(|e| refused(&e))?;
    let remote = service::open(&app, caller, found).await?;
    let session = ws::WsResponseBuilder::new(Session::new(remote), &request, payload);
    session.protocols(PROTOCOLS).frame_size(FRAME).start().map_err(|e| refused(&e))
}

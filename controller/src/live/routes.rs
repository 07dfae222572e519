//! `GET /ws` and `POST /ws/ticket`.
//!
//! Owns: who may open a session. Never: upgrades a request that it refuses. A crash here costs one connection.

use actix_web::http::header;
use actix_web::{HttpRequest, HttpResponse, web};
use actix_web_actors::ws;
use serde::Serialize;
use shared::error::Code;
use utoipa::ToSchema;

use super::session::Session;
use crate::access::{Caller, Role};
use crate::app::App;
use crate::http::guard::{self, Identity, Viewer};
use crate::http::query::Query;
use crate::http::reply::{Error, ErrorBody};

/// Largest frame of a client in bytes.
const FRAME: usize = 64 << 10;

/// A ticket for one WebSocket.
#[derive(Serialize, ToSchema)]
pub struct Ticket {
    /// For `?ticket=`.
    pub ticket: String,
    /// Until when it is good: 30 seconds.
    #[schema(example = "2026-01-02T03:04:05.678Z")]
    pub expires_at: String,
}

/// A ticket for browsers, which cannot send a header with a WebSocket: good once, for 30 seconds.
#[utoipa::path(post, path = "/ws/ticket", tag = "Live", security(("token" = [])), responses(
    (status = 201, description = "the ticket", body = Ticket),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 429, description = "too many requests", body = ErrorBody),
    (status = 503, description = "the database is away", body = ErrorBody),
))]
pub async fn ticket(caller: Viewer, app: web::Data<App>) -> Result<HttpResponse, Error> {
    let (ticket, expires_at) = app.access.ticket(&caller)?;
    Ok(HttpResponse::Created().json(Ticket { ticket, expires_at: shared::clock::rfc3339(expires_at) }))
}

/// The WebSocket.
#[utoipa::path(get, path = "/ws", tag = "Live", security(("token" = []), ()), params(
    ("ticket" = Option<String>, Query, description = "from POST /ws/ticket, in place of the header"),
), responses(
    (status = 101, description = "frames {type, time, seq, data}: hello, job.*, agent.*, system.metrics, alert, lagged"),
    (status = 400, description = "no WebSocket handshake", body = ErrorBody),
    (status = 401, description = "no valid token or ticket", body = ErrorBody),
    (status = 403, description = "a foreign Origin", body = ErrorBody),
    (status = 429, description = "too many requests", body = ErrorBody),
    (status = 503, description = "the database is away", body = ErrorBody),
))]
pub async fn open(request: HttpRequest, payload: web::Payload, app: web::Data<App>) -> Result<HttpResponse, Error> {
    let query = Query::only(&request, &["ticket"])?;
    check_origin(&request, &app)?;
    let caller = who(&request, &query, &app, Role::Viewer).await?;
    let refused = |e: actix_web::Error| Error::bad_request(format!("this path takes a WebSocket handshake: {e}"));
    ws::WsResponseBuilder::new(Session::new(app, caller), &request, payload).frame_size(FRAME).start().map_err(refused)
}

/// Who opens a WebSocket, by header or by ticket, where their role is `least` or more.
pub(crate) async fn who(request: &HttpRequest, query: &Query, app: &App, least: Role) -> Result<Caller, Error> {
    match query.text("ticket") {
        Some(ticket) => Identity::Known(app.access.redeem(ticket).await?).require(least),
        None => guard::identity(request).require(least),
    }
}

/// A browser says where its page comes from; only our own and the configured ones may.
pub(crate) fn check_origin(request: &HttpRequest, app: &App) -> Result<(), Error> {
    let Some(origin) = request.headers().get(header::ORIGIN) else { return Ok(()) };
    let origin = origin.to_str().unwrap_or_default();
    let authority = request.uri().authority().map(|authority| authority.as_str());
    let host = authority.or_else(|| request.headers().get(header::HOST)?.to_str().ok());
    let is_own = host.is_some_and(|host| origin.eq_ignore_ascii_case(&format!("https://{host}")));
    if is_own || app.config.allowed_origins.iter().any(|allowed| allowed.eq_ignore_ascii_case(origin)) {
        return Ok(());
    }
    Err(Error::new(Code::Forbidden, "a page of another origin may not open this WebSocket; see `allowed_origins` in the settings"))
}

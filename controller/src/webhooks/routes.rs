//! `/webhooks*`.
//!
//! Owns: the HTTP side. Never: shows a secret but in the answer that made it. A crash here costs one answer.

use actix_web::{HttpRequest, HttpResponse, web};
use serde::{Deserialize, Serialize};
use shared::error::Code;
use shared::secret::Secret;
use utoipa::ToSchema;

use super::service::{self, Wish};
use super::store;
use crate::app::App;
use crate::http::body::Json;
use crate::http::guard::Admin;
use crate::http::idempotency::Idempotency;
use crate::http::query::{Order, Query};
use crate::http::reply::{Error, ErrorBody, Page};
use crate::http::rfc3339;
use crate::store::entities::webhooks;
use crate::system::audit;

/// A webhook. Every call is signed: `X-HyperSDK-Signature: t=SECONDS,v1=HEX`, HEX = HMAC-SHA256(secret, `SECONDS.BODY`).
#[derive(Serialize, ToSchema)]
#[schema(as = Webhook, example = json!({
    "id": "hook-5f0c2a9be1d34c77", "url": "https://ops.example.org/hypersdk", "events": ["alert", "job.failed"], "created_by": "admin",
    "created_at": "2026-01-02T03:04:05.678Z", "pending": 0, "failed": 0,
    "last_call": {"time": "2026-01-02T03:04:05.678Z", "status": 200, "milliseconds": 38, "error": null}
}))]
pub struct WebhookView {
    id: String,
    url: String,
    /// `alert`, `job.completed`, `job.failed`, `job.cancelled`.
    events: Vec<String>,
    created_by: String,
    created_at: String,
    /// Only in the answer to POST, once; null where that answer is given again for the same Idempotency-Key.
    #[serde(skip_serializing_if = "Option::is_none")]
    secret: Option<String>,
    /// Deliveries that wait: each is tried 12 times over 34 minutes, and the ones behind it wait for it.
    pending: u64,
    /// Deliveries of the last seven days that were given up.
    failed: u64,
    /// The last call; null before the first.
    last_call: Option<LastCall>,
}

/// How the last call of a webhook ended.
#[derive(Serialize, ToSchema)]
pub struct LastCall {
    time: String,
    /// The receiver's HTTP status; null where it did not answer.
    status: Option<i32>,
    milliseconds: i32,
    /// Null after a 2xx.
    error: Option<String>,
}

impl WebhookView {
    fn new(row: webhooks::Model, pending: u64, failed: u64, secret: Option<&Secret>) -> Self {
        let (status, milliseconds, error) = (row.last_status, row.last_ms.unwrap_or(0), row.last_error);
        Self {
            id: row.id,
            url: row.url,
            events: serde_json::from_str(&row.events).unwrap_or_default(),
            created_by: row.created_by,
            created_at: rfc3339(row.created_at),
            secret: secret.map(|secret| secret.expose().to_owned()),
            pending,
            failed,
            last_call: row.last_at.map(|time| LastCall { time: rfc3339(time), status, milliseconds, error }),
        }
    }
}

/// The webhooks.
#[utoipa::path(get, path = "/webhooks", tag = "Webhooks", security(("token" = [])), params(
    ("offset" = Option<u64>, Query), ("limit" = Option<u64>, Query),
    ("sort" = Option<String>, Query, description = "url (default), created_at"), ("order" = Option<String>, Query),
), responses(
    (status = 200, description = "a page of webhooks", body = Page<WebhookView>),
    (status = 400, description = "an unknown parameter or value", body = ErrorBody),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 403, description = "not an admin", body = ErrorBody),
    (status = 429, description = "too many requests", body = ErrorBody),
    (status = 503, description = "the database is away", body = ErrorBody),
))]
pub async fn list(_: Admin, request: HttpRequest, app: web::Data<App>) -> Result<web::Json<Page<WebhookView>>, Error> {
    let query = Query::of(&request, &[])?;
    let (paging, sort) = (query.paging()?, query.sort(&["url", "created_at"], "url", Order::Asc)?);
    let (rows, total) = store::list(&app.store, sort, paging).await?;
    let rows = rows.into_iter().map(|(row, pending, failed)| WebhookView::new(row, pending, failed, None));
    Ok(web::Json(paging.page(rows.collect(), total)))
}

/// What is asked for.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = NewWebhook, example = json!({"url": "https://ops.example.org/hypersdk", "events": ["alert", "job.failed"]}))]
pub struct Create {
    /// Where it listens: https and a public address, or one of the networks in `webhooks_allowed`.
    url: String,
    /// `alert`, `job.completed`, `job.failed`, `job.cancelled`.
    events: Vec<String>,
    /// 16 to 256 printable ASCII characters; absent: one is made and shown in this answer only.
    #[serde(default)]
    secret: Option<String>,
}

/// Makes a webhook. Its secret is in this answer and nowhere else; an Idempotency-Key keeps the answer without it.
#[utoipa::path(post, path = "/webhooks", tag = "Webhooks", security(("token" = [])), request_body = Create, responses(
    (status = 201, description = "the webhook with its secret", body = WebhookView),
    (status = 400, description = "the body cannot be read, or a field is wrong", body = ErrorBody),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 403, description = "not an admin", body = ErrorBody),
    (status = 409, description = "the Idempotency-Key came with another body", body = ErrorBody),
    (status = 413, description = "the body is too large", body = ErrorBody),
    (status = 415, description = "no JSON", body = ErrorBody),
    (status = 422, description = "an address that may not be called, or too many webhooks", body = ErrorBody),
    (status = 429, description = "too many requests", body = ErrorBody),
    (status = 503, description = "the database is away", body = ErrorBody),
))]
pub async fn create(caller: Admin, request: HttpRequest, app: web::Data<App>, body: Json<Create>) -> Result<HttpResponse, Error> {
    Idempotency::once(&request, &caller, &body.digest, &app.store, async |key| {
        let wish = Wish { url: body.value.url, events: body.value.events, secret: body.value.secret.map(Secret::new) };
        service::check(&app, &wish).await?;
        let (row, secret) = service::make(&app, &caller.name, wish)?;
        let location = format!("/api/v1/webhooks/{}", row.id);
        // The row of the key would keep the secret: it keeps the rest.
        let kept = serde_json::to_string(&WebhookView::new(row.clone(), 0, 0, None)).map_err(Error::internal)?;
        let act = audit::begin(&app.store, &caller.name, "webhook.create", &row.id).await?;
        let made = service::add(&app, row.clone(), key, &location, kept).await;
        act.finish(&made).await;
        made?;
        Ok(HttpResponse::Created().insert_header(("Location", location)).json(WebhookView::new(row, 0, 0, Some(&secret))))
    })
    .await
}

/// Removes a webhook and what it was still to be told.
#[utoipa::path(delete, path = "/webhooks/{id}", tag = "Webhooks", security(("token" = [])), params(("id" = String, Path)), responses(
    (status = 204, description = "gone"),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 403, description = "not an admin", body = ErrorBody),
    (status = 404, description = "no such webhook", body = ErrorBody),
    (status = 429, description = "too many requests", body = ErrorBody),
    (status = 503, description = "the database is away", body = ErrorBody),
))]
pub async fn remove(caller: Admin, id: web::Path<String>, app: web::Data<App>) -> Result<HttpResponse, Error> {
    let row = service::by_id(&app, &id).await?;
    let act = audit::begin(&app.store, &caller.name, "webhook.remove", &row.id).await?;
    let gone = store::remove(&app.store, &row.id).await.map_err(Error::from);
    act.finish(&gone).await;
    gone?;
    Ok(HttpResponse::NoContent().finish())
}

/// What the receiver said.
#[derive(Serialize, ToSchema)]
#[schema(as = WebhookTest, example = json!({"delivered": true, "status": 200, "milliseconds": 38, "error": null}))]
pub struct Tested {
    /// Whether the answer was a 2xx.
    delivered: bool,
    /// The receiver's HTTP status.
    status: u16,
    /// How long it took.
    milliseconds: u64,
    /// What was wrong with the answer, where something was.
    error: Option<String>,
}

/// Calls a webhook now with an event of the type `test`, past the line, and answers what it said.
#[utoipa::path(post, path = "/webhooks/{id}/test", tag = "Webhooks", security(("token" = [])), params(("id" = String, Path)), responses(
    (status = 200, description = "what the receiver said", body = Tested),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 403, description = "not an admin", body = ErrorBody),
    (status = 404, description = "no such webhook", body = ErrorBody),
    (status = 429, description = "too many requests", body = ErrorBody),
    (status = 502, description = "the receiver did not answer, or may not be called", body = ErrorBody),
    (status = 503, description = "the database is away", body = ErrorBody),
))]
pub async fn test(caller: Admin, id: web::Path<String>, app: web::Data<App>) -> Result<web::Json<Tested>, Error> {
    let row = service::by_id(&app, &id).await?;
    let now = shared::clock::now().timestamp_millis();
    let body = store::body("test", now, &serde_json::json!({"webhook": row.id, "message": format!("a test by {}", caller.name)}));
    let called = service::call(&app, &row, "test", &format!("test-{}", shared::ids::random_hex::<8>()), &body).await;
    store::tested(&app.store, &row.id, &called).await?;
    match called.status {
        Some(status) => {
            Ok(web::Json(Tested { delivered: called.error.is_none(), status, milliseconds: called.milliseconds, error: called.error }))
        }
        None => {
            let cause = called.error.unwrap_or_default();
            Err(Error::new(Code::BadGateway, format!("the receiver did not answer: {cause}")))
        }
    }
}

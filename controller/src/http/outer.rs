//! The outermost layer around every request.
//!
//! Owns: the request id, the caller's identity (found out once), security headers, `X-RateLimit-Reset`, the HTTP figures, and the promise
//! that every error leaves in the one shape: a panic, an error of the framework, an error of ours.
//! Never: answers by itself what a handler could. A crash here costs one answer.

use std::panic::AssertUnwindSafe;
use std::time::Instant;

use actix_web::body::{BoxBody, MessageBody};
use actix_web::dev::{ServiceRequest, ServiceResponse};
use actix_web::error::InternalError;
use actix_web::http::header::{self, HeaderMap, HeaderName, HeaderValue};
use actix_web::middleware::Next;
use actix_web::{HttpMessage, HttpResponse, HttpResponseBuilder, ResponseError, web};
use futures_util::FutureExt;
use shared::error::Code;

use super::limits;
use super::reply::{Error, ErrorBody, REQUEST_ID};
use super::unread::{Body, bounds};
use crate::app::App;
use crate::http::guard::Identity;

const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The id of a request, for the log's span.
#[derive(Clone)]
pub struct RequestId(pub String);

/// The layer.
pub async fn outer<B: MessageBody + 'static>(request: ServiceRequest, next: Next<B>) -> Result<ServiceResponse<BoxBody>, actix_web::Error> {
    let id = sane_id(request.headers()).unwrap_or_else(shared::ids::random_hex::<8>);
    let app = request.app_data::<web::Data<App>>().cloned();
    REQUEST_ID.scope(id.clone(), answer(request, next, app, id)).await
}

async fn answer<B: MessageBody + 'static>(
    mut request: ServiceRequest,
    next: Next<B>,
    app: Option<web::Data<App>>,
    id: String,
) -> Result<ServiceResponse<BoxBody>, actix_web::Error> {
    let Some(app) = app else { return Err(Error::internal("the application's data is missing").into()) };
    let started = Instant::now();
    let method = known_method(request.method().as_str());
    let is_page = is_page(request.path());
    let authorization = request.headers().get(header::AUTHORIZATION).map(|value| value.to_str().unwrap_or_default());
    // The probe of the process must not wait for the database.
    let identity = if is_livez(request.path()) { Identity::Nobody } else { app.access.identify(authorization).await };
    let is_user = identity.caller().is_some();
    request.extensions_mut().insert::<Identity>(identity.clone());
    request.extensions_mut().insert(RequestId(id.clone()));

    let body = Body::of(&mut request);
    let outcome = AssertUnwindSafe(next.call(request)).catch_unwind().await;
    let mut result = match outcome {
        Ok(Ok(response)) => Ok(response.map_body(|_, body| body.boxed())),
        // An error of a layer has lost its request: its answer goes out as an error that carries the answer.
        Ok(Err(error)) => Err(error.error_response()),
        Err(panic) => Err(Error::internal(format!("panic: {}", panic_text(panic.as_ref()))).error_response()),
    };
    let (route, status) = match &result {
        Ok(response) => (route(response), response.status()),
        Err(response) => ("layer".to_owned(), response.status()),
    };
    let labels = [method, route.as_str(), status.as_str()];
    app.metrics.http_requests.with_label_values(&labels).inc();
    app.metrics.http_duration.with_label_values(&[route.as_str()]).observe(started.elapsed().as_secs_f64());
    if let Some(body) = body {
        body.drain(bounds(&identity, status.as_u16())).await;
    }
    result = match result {
        Ok(response) if needs_shape(response.status().as_u16(), response.headers()) => Ok(response.map_into_shape()),
        Err(response) if needs_shape(response.status().as_u16(), response.headers()) => Err(reshape(&response)),
        as_it_is => as_it_is,
    };
    let dress = |headers: &mut HeaderMap| dress(headers, &app, &id, is_user, is_page);
    match result {
        Ok(mut response) => {
            dress(response.headers_mut());
            Ok(response)
        }
        Err(mut response) => {
            dress(response.headers_mut());
            Err(InternalError::from_response("answered", response).into())
        }
    }
}

trait Shape {
    fn map_into_shape(self) -> Self;
}

impl Shape for ServiceResponse<BoxBody> {
    fn map_into_shape(self) -> Self {
        let shaped = reshape(self.response());
        self.into_response(shaped)
    }
}

/// Every error but ours (the framework's own: a path that cannot be decoded, a handshake, …).
fn needs_shape(status: u16, headers: &HeaderMap) -> bool {
    let is_json = headers.get(header::CONTENT_TYPE).is_some_and(|value| value.as_bytes().starts_with(b"application/json"));
    status >= 400 && !is_json
}

fn reshape<B>(original: &HttpResponse<B>) -> HttpResponse {
    let status = original.status();
    let code = Code::ALL.iter().copied().find(|code| code.status() == status.as_u16());
    let fallback = if status.is_client_error() { Code::BadRequest } else { Code::Internal };
    let mut response = HttpResponseBuilder::new(status);
    for (name, value) in original.headers() {
        if name != header::CONTENT_TYPE && name != header::CONTENT_LENGTH {
            response.append_header((name.clone(), value.clone()));
        }
    }
    response.json(ErrorBody {
        error: status.canonical_reason().unwrap_or("error").to_lowercase(),
        status: status.as_u16(),
        code: code.unwrap_or(fallback).word().to_owned(),
        request_id: super::reply::request_id(),
        detail: None,
    })
}

/// Headers that every answer bears.
fn dress(headers: &mut HeaderMap, app: &App, id: &str, is_user: bool, is_page: bool) {
    let mut set = |name: HeaderName, value: &'static str| headers.insert(name, HeaderValue::from_static(value));
    set(header::X_CONTENT_TYPE_OPTIONS, "nosniff");
    set(header::X_FRAME_OPTIONS, "DENY");
    set(header::REFERRER_POLICY, "no-referrer");
    set(header::STRICT_TRANSPORT_SECURITY, "max-age=31536000");
    if is_page {
        let policy = "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'";
        set(header::CONTENT_SECURITY_POLICY, policy);
    } else {
        set(header::CONTENT_SECURITY_POLICY, "default-src 'none'; frame-ancestors 'none'");
        set(header::CACHE_CONTROL, "no-store");
    }
    headers.remove("x-ratelimit-whitelisted");
    headers.remove("x-ratelimit-after");
    if let Ok(value) = HeaderValue::from_str(id) {
        headers.insert(X_REQUEST_ID, value);
    }
    let number = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()?.parse::<u32>().ok());
    if let (Some(limit), Some(remaining)) = (number("x-ratelimit-limit"), number("x-ratelimit-remaining")) {
        let seconds = limits::reset_seconds(&app.config.limits, is_user, limit.saturating_sub(remaining));
        let reset = u64::try_from(chrono::Utc::now().timestamp()).unwrap_or(0).saturating_add(seconds);
        headers.insert(HeaderName::from_static("x-ratelimit-reset"), HeaderValue::from(reset));
    }
}

/// The client's own id, where it is harmless: 1 to 64 of letters, digits, `.`, `_`, `-`.
fn sane_id(headers: &HeaderMap) -> Option<String> {
    let text = headers.get(X_REQUEST_ID)?.to_str().ok()?;
    let is_sane =
        (1..=64).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-'));
    is_sane.then(|| text.to_owned())
}

/// Only the probe itself: a user may be called `livez`.
fn is_livez(path: &str) -> bool {
    matches!(path, "/livez" | "/api/v1/livez")
}

fn is_page(path: &str) -> bool {
    path.starts_with("/docs")
}

/// The route's pattern, never the path: figures must not grow with what people ask for.
fn route<B>(response: &ServiceResponse<B>) -> String {
    let pattern = response.request().match_pattern().unwrap_or_else(|| "unmatched".to_owned());
    pattern.strip_prefix("/api/v1").map(str::to_owned).unwrap_or(pattern)
}

fn known_method(method: &str) -> &'static str {
    ["GET", "POST", "DELETE", "PATCH", "PUT", "HEAD", "OPTIONS"].into_iter().find(|known| *known == method).unwrap_or("other")
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned()).or_else(|| panic.downcast_ref::<String>().cloned());
    text.unwrap_or_else(|| "without a message".to_owned())
}

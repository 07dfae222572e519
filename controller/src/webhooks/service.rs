//! What a webhook may be, and how it is called.
//!
//! Owns: the checks at creation, the secret, the call itself. Never: calls an address that `egress` refuses, whatever it was when the webhook
//! was made. A crash here costs one call.

use std::error::Error as _;
use std::time::Instant;

use shared::error::Code;
use shared::secret::Secret;

use super::signature;
use super::store::{self, Called};
use crate::app::App;
use crate::egress::{Reach, Refused};
use crate::http::idempotency::Idempotency;
use crate::http::reply::Error;
use crate::store::entities::webhooks;

/// Events that a webhook may want.
pub const EVENTS: &[&str] = &["alert", "job.completed", "job.failed", "job.cancelled"];
/// Webhooks of an installation.
const MOST: usize = 100;
/// Length of a URL in bytes.
const MOST_URL: usize = 2048;

/// What is asked for, checked.
pub struct Wish {
    /// Where to.
    pub url: String,
    /// Which events.
    pub events: Vec<String>,
    /// Its secret, where the caller chose one.
    pub secret: Option<Secret>,
}

fn reach(app: &App) -> Reach {
    Reach::Public { allowed: app.config.webhooks_allowed.clone() }
}

fn refused(error: Refused) -> Error {
    match error {
        Refused::NoUrl(_) => Error::bad_request(format!("`url`: {error}")),
        _ => {
            Error::new(Code::Unprocessable, format!("`url`: {error}; `webhooks_allowed` in the settings names networks that may be called"))
        }
    }
}

/// Checks a wish.
pub async fn check(app: &App, wish: &Wish) -> Result<(), Error> {
    if wish.url.len() > MOST_URL || wish.url.chars().any(char::is_control) {
        return Err(Error::bad_request(format!("`url` must be at most {MOST_URL} bytes without control characters")));
    }
    let known = EVENTS.join(", ");
    if wish.events.is_empty() {
        return Err(Error::bad_request(format!("`events` is empty; known: {known}")));
    }
    if let Some(unknown) = wish.events.iter().find(|event| !EVENTS.contains(&event.as_str())) {
        let shown: String = unknown.chars().take(60).collect();
        return Err(Error::bad_request(format!("event `{shown}` is unknown; known: {known}")));
    }
    if let Some(secret) = &wish.secret {
        let length = secret.expose().len();
        if !(16..=256).contains(&length) || !secret.expose().bytes().all(|byte| byte.is_ascii_graphic() || byte == b' ') {
            return Err(Error::bad_request("`secret` must be 16 to 256 printable ASCII characters; without one, one is made"));
        }
    }
    let reach = reach(app);
    let url = reach.check(&wish.url).map_err(refused)?;
    // A name is looked at now, so that a private one is told at once; what counts is the address at the moment of a call.
    reach.check_name(&url).await.map_err(refused)?;
    if store::all(&app.store).await?.len() >= MOST {
        return Err(Error::new(Code::Unprocessable, format!("there are {MOST} webhooks already; remove one")));
    }
    Ok(())
}

/// A new webhook and its secret.
pub fn make(app: &App, caller: &str, wish: Wish) -> Result<(webhooks::Model, Secret), Error> {
    let id = format!("hook-{}", shared::ids::random_hex::<8>());
    let secret = wish.secret.unwrap_or_else(|| Secret::new(format!("whsec_{}", shared::ids::random_hex::<32>())));
    let mut events = wish.events;
    events.sort();
    events.dedup();
    let row = webhooks::Model {
        secret: app.sealer.seal(&sealed_name(&id), secret.expose().as_bytes()).map_err(Error::internal)?,
        events: serde_json::to_string(&events).map_err(Error::internal)?,
        url: wish.url,
        created_by: caller.to_owned(),
        created_at: shared::clock::now().timestamp_millis(),
        last_at: None,
        last_status: None,
        last_ms: None,
        last_error: None,
        id,
    };
    Ok((row, secret))
}

/// Adds it. A twin request that won is a conflict on the key's row.
pub async fn add(app: &App, row: webhooks::Model, key: Option<&Idempotency>, location: &str, answer: String) -> Result<(), Error> {
    Ok(store::insert(&app.store, row, store::answer(key, location, answer)).await?)
}

fn sealed_name(id: &str) -> String {
    format!("webhook.{id}")
}

/// A webhook by id; 404 where there is none.
pub async fn by_id(app: &App, id: &str) -> Result<webhooks::Model, Error> {
    let found = if id.contains('\0') { None } else { store::by_id(&app.store, id).await? };
    found.ok_or_else(|| {
        let shown: String = id.chars().take(60).collect();
        Error::not_found(format!("no webhook `{shown}`; GET /webhooks lists them"))
    })
}

/// Calls a webhook once. `delivery` tells the receiver which call this is when it comes again.
pub async fn call(app: &App, webhook: &webhooks::Model, kind: &str, delivery: &str, body: &str) -> Called {
    let began = Instant::now();
    let answered = send(app, webhook, kind, delivery, body).await;
    let milliseconds = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
    match answered {
        Ok(status) if (200..300).contains(&status) => Called { status: Some(status), milliseconds, error: None },
        Ok(status) if (300..400).contains(&status) => {
            let error = format!("it answered {status}; redirects are not followed, give the final URL");
            Called { status: Some(status), milliseconds, error: Some(error) }
        }
        Ok(status) => Called { status: Some(status), milliseconds, error: Some(format!("it answered {status}; a 2xx is wanted")) },
        Err(error) => Called { status: None, milliseconds, error: Some(error) },
    }
}

async fn send(app: &App, webhook: &webhooks::Model, kind: &str, delivery: &str, body: &str) -> Result<u16, String> {
    let reach = reach(app);
    let url = reach.check(&webhook.url).map_err(|e| e.to_string())?;
    let secret = app.sealer.open_sealed(&sealed_name(&webhook.id), &webhook.secret).map_err(|e| e.to_string())?;
    let secret = Secret::new(String::from_utf8(secret).map_err(|_| "its secret is no text".to_owned())?);
    let now = shared::clock::now().timestamp();
    let (kind, delivery, body) = (kind.to_owned(), delivery.to_owned(), body.to_owned());
    let signed = signature::header(&secret, now, &body);
    // On the runtime that has the timers and the resolver's threads; this actor's thread also runs the queue.
    let call = app.runtime.spawn(async move {
        let client = reach.client()?;
        let request = client
            .post(url)
            .header("Content-Type", "application/json")
            .header("X-HyperSDK-Event", kind)
            .header("X-HyperSDK-Delivery", delivery)
            .header("X-HyperSDK-Signature", signed)
            .body(body);
        // The body of the answer is not read: nobody needs it, and it could be endless.
        Ok(request.send().await?.status().as_u16())
    });
    match call.await {
        Ok(Ok(status)) => Ok(status),
        Ok(Err(e)) => Err(describe(e)),
        Err(_) => Err("the call was broken off".to_owned()),
    }
}

/// The cause at the bottom says what happened; the URL may hold a token and is left out.
fn describe(error: reqwest::Error) -> String {
    if error.is_timeout() {
        return "it did not answer in time".to_owned();
    }
    let error = error.without_url();
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = cause.to_string();
        source = cause.source();
    }
    text.chars().take(200).collect()
}

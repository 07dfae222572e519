//! The conversation with a controller's REST API.
//!
//! Owns: requests, the token's header, patience with rate limits, and the turning of every answer that is no success into one sentence.
//! Never: shows a server's raw JSON as an error, sends the token before the certificate was accepted, follows a redirect to another host.
//! A crash here costs one command; a job goes on without its client.

use std::error::Error as _;
use std::sync::Arc;
use std::time::Duration;

use reqwest::header::{
    AUTHORIZATION, CONNECTION, HeaderValue, RETRY_AFTER, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL,
    SEC_WEBSOCKET_VERSION, UPGRADE,
};
use reqwest::{Method, RequestBuilder, Response, StatusCode, Upgraded};
use serde_json::Value;
use shared::error::Code;
use shared::ids::random_hex;
use shared::secret::Secret;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::client::generate_key;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::Role;

use crate::failure::{Exit, Failure};
use crate::session::Session;
use crate::tls::{Check, Trust};

/// A server that does not answer the connection within this time is away.
const CONNECT: Duration = Duration::from_secs(10);
/// An answer that takes longer is none (`?refresh=true` asks providers, which may take a while).
const ANSWER: Duration = Duration::from_secs(60);
/// How often a request is sent again when the server said "later".
const ATTEMPTS: u32 = 4;
/// The longest "later" that is obeyed.
const PATIENCE: Duration = Duration::from_secs(30);
/// The API's largest page.
const PAGE: u32 = 200;
/// An answer that is larger than this is not read: no list page comes near it.
const ANSWER_LIMIT: usize = 64 << 20;

/// A WebSocket to a controller.
pub type Socket = WebSocketStream<Upgraded>;

/// A client of one controller.
pub struct Client {
    http: reqwest::Client,
    base: String,
    token: Option<Secret>,
    check: Option<Arc<Check>>,
    /// An answer that takes longer is none.
    longest: Duration,
}

/// A page's rows, all pages put together, and how many there are on the server.
pub struct Listing {
    /// The rows.
    pub rows: Vec<Value>,
    /// How many match on the server.
    pub total: u64,
}

impl Client {
    /// A client for a session; nothing is sent yet.
    pub fn new(session: Session) -> Result<Self, Failure> {
        let check = match &session.trust {
            Trust::System => None,
            Trust::Pinned(pin) => Some(Check::new(Some(pin.clone()))),
            Trust::Insecure => Some(Check::new(None)),
        };
        let mut builder = reqwest::Client::builder()
            .user_agent(concat!("hypersdk/", env!("CARGO_PKG_VERSION")))
            .redirect(reqwest::redirect::Policy::none())
            .https_only(true)
            .connect_timeout(CONNECT)
            .tcp_keepalive(Duration::from_secs(30));
        if let Some(check) = &check {
            builder = builder.tls_backend_preconfigured(check.client_config()?);
        }
        if is_loopback(&session.url) {
            builder = builder.no_proxy();
        }
        let http = builder.build().map_err(|e| Failure::failed(format!("the HTTP client cannot be set up: {}", cause(&e))))?;
        Ok(Self { http, base: session.url, token: session.token, check, longest: ANSWER })
    }

    /// The same for what takes longer.
    pub fn patient(self, longest: Duration) -> Self {
        Self { longest, ..self }
    }

    /// The certificate that the server showed, as a fingerprint.
    pub fn seen(&self) -> Option<String> {
        self.check.as_ref().and_then(|check| check.seen())
    }

    /// Uses this token from now on.
    pub fn set_token(&mut self, token: Secret) {
        self.token = Some(token);
    }

    /// GET.
    pub async fn get(&self, path: &str, query: &[(&str, String)]) -> Result<Value, Failure> {
        let response = self.send(|| self.request(Method::GET, path, query).map(|request| request.timeout(self.longest))).await?;
        self.body(response).await
    }

    /// POST, under one idempotency key for all its attempts.
    pub async fn post(&self, path: &str, body: Option<&Value>) -> Result<Value, Failure> {
        let key = random_hex::<16>();
        let request = || {
            let request = self.request(Method::POST, path, &[])?.timeout(self.longest).header("Idempotency-Key", &key);
            Ok(match body {
                Some(body) => request.json(body),
                None => request,
            })
        };
        let response = self.send(request).await?;
        self.body(response).await
    }

    /// DELETE.
    pub async fn delete(&self, path: &str) -> Result<Value, Failure> {
        let response = self.send(|| self.request(Method::DELETE, path, &[]).map(|request| request.timeout(self.longest))).await?;
        self.body(response).await
    }

    /// GET, with the answer's body left to be read as it comes; it may take for ever.
    pub async fn stream(&self, path: &str, query: &[(&str, String)]) -> Result<Response, Failure> {
        self.send(|| self.request(Method::GET, path, query)).await
    }

    /// A WebSocket; whoever takes it reads it, or it is closed soon.
    pub async fn socket(&self, path: &str) -> Result<Socket, Failure> {
        let key = generate_key();
        let request = || {
            let request = self.request(Method::GET, path, &[])?;
            let request = request.header(CONNECTION, "Upgrade").header(UPGRADE, "websocket").header(SEC_WEBSOCKET_VERSION, "13");
            Ok(request.header(SEC_WEBSOCKET_KEY, &key).header(SEC_WEBSOCKET_PROTOCOL, "binary"))
        };
        let sent = tokio::time::timeout(ANSWER, self.send(request)).await;
        let response = sent.map_err(|_| Failure::new(Exit::NotReachable, format!("{} did not answer in time", self.base)))??;
        let accepted =
            response.headers().get(SEC_WEBSOCKET_ACCEPT).is_some_and(|value| value == derive_accept_key(key.as_bytes()).as_str());
        if response.status() != StatusCode::SWITCHING_PROTOCOLS || !accepted {
            return Err(Failure::failed(format!("{} opened no WebSocket; is it a HyperSDK controller?", self.base)));
        }
        let upgraded = response.upgrade().await.map_err(|e| self.unreachable(&e))?;
        Ok(WebSocketStream::from_raw_socket(upgraded, Role::Client, None).await)
    }

    /// All pages of a list, up to `limit` rows.
    pub async fn list(&self, path: &str, query: &[(&str, String)], limit: u32) -> Result<Listing, Failure> {
        let mut rows: Vec<Value> = Vec::new();
        loop {
            let left = limit.saturating_sub(rows.len() as u32).min(PAGE);
            let mut query = query.to_vec();
            query.extend([("offset", rows.len().to_string()), ("limit", left.to_string())]);
            let mut page = self.get(path, &query).await?;
            let Some(Value::Array(data)) = page.get_mut("data").map(Value::take) else {
                return Err(Failure::failed(format!("{path}: the answer is not a page; is this server a HyperSDK controller?")));
            };
            let empty = data.is_empty();
            rows.extend(data);
            let pagination = page.get("pagination").cloned().unwrap_or_default();
            let more = pagination.get("has_more").and_then(Value::as_bool).unwrap_or(false);
            if !more || empty || rows.len() as u32 >= limit {
                let total = pagination.get("total").and_then(Value::as_u64).unwrap_or(rows.len() as u64);
                return Ok(Listing { rows, total });
            }
        }
    }

    fn request(&self, method: Method, path: &str, query: &[(&str, String)]) -> Result<RequestBuilder, Failure> {
        let prefix = if path == "/health" { "" } else { "/api/v1" };
        let url = reqwest::Url::parse(&format!("{}{prefix}{path}", self.base));
        let mut url = url.map_err(|e| Failure::usage(format!("{}{path}: {e}", self.base)))?;
        if !query.is_empty() {
            url.query_pairs_mut().extend_pairs(query.iter().map(|(name, value)| (*name, value.as_str())));
        }
        let mut request = self.http.request(method, url);
        if let Some(token) = &self.token {
            let header = HeaderValue::from_str(&format!("Bearer {}", token.expose()));
            let mut header = header.map_err(|_| Failure::usage("the token holds characters that no token has"))?;
            header.set_sensitive(true);
            request = request.header(AUTHORIZATION, header);
        }
        Ok(request)
    }

    /// Sends until the server says something else than "later".
    async fn send(&self, request: impl Fn() -> Result<RequestBuilder, Failure>) -> Result<Response, Failure> {
        let mut attempt = 1;
        loop {
            let response = request()?.send().await.map_err(|e| self.unreachable(&e))?;
            let later = matches!(response.status(), StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE);
            match retry_after(&response).filter(|wait| later && attempt < ATTEMPTS && *wait <= PATIENCE) {
                Some(wait) => tokio::time::sleep(wait.max(Duration::from_millis(200))).await,
                None if response.status().is_success() || response.status() == StatusCode::SWITCHING_PROTOCOLS => return Ok(response),
                None => return Err(self.refusal(response).await),
            }
            attempt += 1;
        }
    }

    async fn body(&self, mut response: Response) -> Result<Value, Failure> {
        let mut bytes = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(|e| self.unreachable(&e))? {
            if bytes.len() + chunk.len() > ANSWER_LIMIT {
                return Err(Failure::failed("the answer is larger than 64 MiB; ask for fewer rows"));
            }
            bytes.extend_from_slice(&chunk);
        }
        if bytes.is_empty() {
            return Ok(Value::Null);
        }
        let value = serde_json::from_slice(&bytes);
        value.map_err(|_| Failure::failed("the answer is not JSON; is this server a HyperSDK controller?"))
    }

    /// The server's own sentence.
    async fn refusal(&self, response: Response) -> Failure {
        let status = response.status();
        let answer = self.body(response).await.unwrap_or_default();
        let code = answer.get("code").and_then(Value::as_str).and_then(Code::from_word);
        let Some(sentence) = answer.get("error").and_then(Value::as_str) else {
            return Failure::failed(format!("{} answered {status} without a reason; is it a HyperSDK controller?", self.base));
        };
        let mut sentence = crate::output::clean(sentence);
        let exit = match code {
            Some(code) => Exit::of(code),
            None if matches!(status.as_u16(), 401 | 403) => Exit::NotAllowed,
            None => Exit::Failed,
        };
        if code == Some(Code::Unauthorized) {
            sentence.push_str("; run `hypersdk login` or set HYPERSDK_AUTH_TOKEN");
        }
        if code == Some(Code::Internal) {
            let id = crate::output::text(&answer, "request_id");
            sentence.push_str(&format!(" (request {id}, the controller's log has more)"));
        }
        Failure::new(exit, sentence)
    }

    fn unreachable(&self, error: &reqwest::Error) -> Failure {
        let pin = self.check.as_ref().and_then(|check| check.pin().map(str::to_owned));
        let shown = self.seen();
        if let (Some(pin), Some(shown)) = (pin, shown)
            && pin != shown
        {
            let base = &self.base;
            return Failure::new(
                Exit::NotReachable,
                format!(
                    "{base} shows another certificate than the trusted one, nothing was sent\n  trusted  {pin}\n  shown    {shown}\n\
                     If the controller was set up anew, run: hypersdk login {base} --fingerprint {shown}"
                ),
            );
        }
        let why = match error.is_timeout() {
            true if error.is_connect() => "no answer within 10 s".to_owned(),
            true => "no answer in time".to_owned(),
            false => cause(error),
        };
        let hint = if why.contains("certificate") { "; run `hypersdk login` to trust its own certificate" } else { "" };
        Failure::new(Exit::NotReachable, format!("cannot reach {}: {why}{hint}", self.base))
    }
}

/// The deepest cause of an error, which is the one that says something.
fn cause(error: &reqwest::Error) -> String {
    let mut deepest: &dyn std::error::Error = error;
    while let Some(next) = deepest.source() {
        deepest = next;
    }
    match error.source() {
        Some(_) => deepest.to_string(),
        None => error.to_string(),
    }
}

fn retry_after(response: &Response) -> Option<Duration> {
    let seconds = response.headers().get(RETRY_AFTER)?.to_str().ok()?.parse().ok()?;
    Some(Duration::from_secs(seconds))
}

/// A proxy that the environment names is not for this very host.
fn is_loopback(url: &str) -> bool {
    let host = reqwest::Url::parse(url).ok().and_then(|url| url.host_str().map(|host| host.trim_matches(['[', ']']).to_owned()));
    host.is_some_and(|host| host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_host_is_loopback() {
        assert!(is_loopback("https://127.0.0.1:5080") && is_loopback("https://[::1]:1") && is_loopback("https://localhost:1"));
        assert!(!is_loopback("https://localhost.example:1") && !is_loopback("https://10.0.0.1:1"));
    }
}

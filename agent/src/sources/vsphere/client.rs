//! A session with one vCenter or ESXi.
//!
//! ```text
//! nobody ─Login─► in ─NotAuthenticated─► nobody ─Login─► in …          one Login at a time; whoever waited for it uses it
//! ```
//! Owns: the session's cookie, how long a call may take, what a failure means to whoever asked. Never: keeps the password but in memory;
//! asks a second time where a call may have changed something. A crash here leaves a session that the server ends after its idle time.

use std::sync::Arc;
use std::time::Duration;

use reqwest::header::{COOKIE, RETRY_AFTER, SET_COOKIE};
use reqwest::{Response, StatusCode};
use shared::error::Code;
use shared::secret::Secret;
use tokio::sync::Mutex;

use super::budget::Budget;
use super::wire::{self, Fault, MoRef};
use crate::egress::{self, Refused, Trust};
use crate::sources;

/// Longest time for a call.
pub const CALL: Duration = Duration::from_secs(12);
/// Longest time for a page of a large inventory.
pub const PAGE: Duration = Duration::from_secs(60);
/// Most bytes of an answer.
const ANSWER: usize = 64 << 20;

/// Where the server is and who asks.
#[derive(Clone)]
pub struct Settings {
    /// HOST or HOST:PORT.
    pub host: String,
    /// Whose session it is.
    pub username: String,
    /// The password.
    pub password: Secret,
    /// Which certificate will do.
    pub trust: Trust,
}

/// What the server says of itself.
#[derive(Clone, Debug)]
pub struct Content {
    /// The folder above everything.
    pub root: MoRef,
    /// The property collector.
    pub collector: MoRef,
    /// The maker of views.
    pub views: MoRef,
    sessions: MoRef,
    /// Who knows what an account may do; some servers have none.
    pub authorization: Option<MoRef>,
    /// Whether it is a vCenter; else a host.
    pub is_vcenter: bool,
    /// `VMware vCenter Server 8.0.2 build-…`.
    pub full_name: String,
}

/// A session that stands, or did a moment ago.
pub struct Session {
    cookie: Secret,
    /// The server's name for it, by which it is asked what it may do.
    pub key: Secret,
    /// Whom one speaks with.
    pub content: Content,
}

/// Why a call brought nothing.
#[derive(Debug)]
pub enum Error {
    /// Nobody answers there.
    Unreachable(String),
    /// Its certificate is not trusted; SHA-256 in hex.
    Untrusted(String),
    /// It asks for patience.
    Busy(Duration),
    /// An HTTP status that is no answer.
    Status(u16),
    /// It said no.
    Fault(Fault),
    /// A task of its is not done after so many seconds; it goes on with it.
    Late(u64),
    /// What came is not what the protocol says.
    Odd(String),
}

impl Error {
    /// Whether the same may work a moment later.
    pub fn is_passing(&self) -> bool {
        match self {
            Self::Unreachable(_) | Self::Busy(_) | Self::Late(_) => true,
            Self::Status(status) => *status >= 500,
            Self::Untrusted(_) | Self::Fault(_) | Self::Odd(_) => false,
        }
    }

    /// Whether what was asked for may have begun all the same.
    pub fn is_lost(&self) -> bool {
        self.is_passing() && !matches!(self, Self::Busy(_))
    }

    /// What somebody else's work, the end of a session, an ailing host or something in between is the cause of.
    fn is_of_the_moment(&self) -> bool {
        match self {
            Self::Fault(Fault::NotAuthenticated) | Self::Odd(_) => true,
            Self::Fault(Fault::Other(kind, _)) => matches!(
                kind.as_str(),
                "TaskInProgress" | "ConcurrentAccess" | "task" | "SystemError" | "HostCommunication" | "HostNotReachable" | "FileLocked"
            ),
            _ => false,
        }
    }

    /// Whether the object is at something else, so that it has surely not begun with this.
    pub fn is_occupied(&self) -> bool {
        let is_it = |word: &str| matches!(word, "TaskInProgress" | "ConcurrentAccess");
        match self {
            Self::Fault(Fault::Other(kind, message)) if kind == "task" => is_it(message.split(' ').next().unwrap_or_default()),
            Self::Fault(Fault::Other(kind, _)) => is_it(kind),
            _ => false,
        }
    }

    /// For whoever asked. `host` is named, nothing else of the settings is.
    pub fn told(&self, host: &str) -> sources::Error {
        let (code, message) = match self {
            Self::Unreachable(cause) => (Code::BadGateway, format!("{host} cannot be reached: {cause}")),
            Self::Untrusted(found) => (
                Code::Unprocessable,
                format!(
                    "the certificate of {host} is not trusted; its SHA-256 fingerprint is {found}: give it as `fingerprint` if it is the right one"
                ),
            ),
            Self::Busy(_) => (Code::BadGateway, format!("{host} is busy (503)")),
            Self::Status(status) => (Code::BadGateway, format!("{host} answered HTTP {status}: it is no vCenter or ESXi, or not well")),
            Self::Fault(Fault::InvalidLogin) => (Code::Unprocessable, format!("{host} does not take this user and password")),
            Self::Fault(fault @ Fault::ManagedObjectNotFound) => (Code::NotFound, format!("{host}: {fault}")),
            Self::Fault(fault @ (Fault::NoPermission(_) | Fault::InvalidPowerState)) => (Code::Unprocessable, format!("{host}: {fault}")),
            Self::Fault(fault) => (Code::BadGateway, format!("{host}: {fault}")),
            Self::Late(seconds) => (Code::BadGateway, format!("{host}: a task is not done after {seconds} s; the host goes on with it")),
            Self::Odd(what) => (Code::BadGateway, format!("{host}: {what}")),
        };
        sources::Error { code, message, retryable: self.is_passing() || self.is_of_the_moment() }
    }
}

impl From<Fault> for Error {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

/// A client with its session.
pub struct Client {
    http: reqwest::Client,
    refused: Refused,
    settings: Settings,
    budget: Arc<Budget>,
    session: Mutex<Option<Arc<Session>>>,
}

impl Client {
    /// Dials nothing yet. `budget` is the host's, whoever else speaks with it.
    ///
    /// # Errors
    /// When the host's address may not be dialled or TLS cannot be set up.
    pub fn new(settings: Settings, budget: Arc<Budget>) -> Result<Self, sources::Error> {
        let host_only = settings.host.rsplit_once(':').map_or(settings.host.as_str(), |(host, _)| host);
        if !egress::permits(host_only) {
            let message = format!("{host_only} may not be dialled: it is a link-local, metadata or unspecified address");
            return Err(sources::Error::fatal(Code::Unprocessable, message));
        }
        let (http, refused) = egress::hypervisor(&settings.trust).map_err(|e| sources::Error::fatal(Code::Internal, e))?;
        Ok(Self { http, refused, settings, budget, session: Mutex::default() })
    }

    /// The turns of whoever copies from this host.
    pub fn budget(&self) -> &Arc<Budget> {
        &self.budget
    }

    /// HOST[:PORT].
    pub fn host(&self) -> &str {
        &self.settings.host
    }

    /// The standing session, or a new one.
    pub async fn session(&self) -> Result<Arc<Session>, Error> {
        let mut slot = self.session.lock().await;
        if let Some(session) = slot.as_ref() {
            return Ok(session.clone());
        }
        let session = Arc::new(self.log_in().await?);
        *slot = Some(session.clone());
        Ok(session)
    }

    /// This session is over; one that somebody has made since stays.
    pub async fn forget(&self, session: &Arc<Session>) {
        let mut slot = self.session.lock().await;
        if slot.as_ref().is_some_and(|standing| Arc::ptr_eq(standing, session)) {
            *slot = None;
        }
    }

    /// Does some work within a session; where that has ended, once more within a new one. For calls that read, or for a single one that
    /// changes something: what is not authenticated has changed nothing.
    pub async fn within<T>(&self, work: impl AsyncFn(&Session) -> Result<T, Error>) -> Result<T, Error> {
        let session = self.session().await?;
        match work(&session).await {
            Err(Error::Fault(Fault::NotAuthenticated)) => {
                self.forget(&session).await;
                let session = self.session().await?;
                work(&session).await
            }
            done => done,
        }
    }

    /// Ends the session, so that none is left behind.
    pub async fn log_out(&self) {
        let Some(session) = self.session.lock().await.take() else { return };
        let envelope = wire::envelope("Logout", &session.content.sessions, "");
        // A session that does not end now ends by its idle time.
        let _ = self.post(envelope, Some(&session.cookie), CALL).await;
    }

    async fn log_in(&self) -> Result<Session, Error> {
        let instance = MoRef::new("ServiceInstance", "ServiceInstance");
        let (_, answer) = self.post(wire::envelope("RetrieveServiceContent", &instance, ""), None, CALL).await?;
        let content = content(&answer)?;
        let body = format!(
            "<userName>{}</userName><password>{}</password>",
            wire::quote(&self.settings.username),
            wire::quote(self.settings.password.expose())
        );
        let (cookie, answer) = self.post(wire::envelope("Login", &content.sessions, &body), None, CALL).await?;
        let document = wire::parse(&answer).map_err(Error::Odd)?;
        let key = wire::child(wire::response(&document, "Login")?, "returnval").map(|session| wire::text(session, "key"));
        let key = Secret::new(key.unwrap_or_default());
        let cookie = cookie.ok_or_else(|| Error::Odd("a login without a session cookie".to_owned()))?;
        tracing::debug!(host = self.settings.host, server = content.full_name, "logged in");
        Ok(Session { cookie, key, content })
    }

    /// One call; answers the whole envelope, which holds no fault.
    pub async fn call(&self, session: &Session, method: &str, this: &MoRef, body: &str, longest: Duration) -> Result<String, Error> {
        let (_, answer) = self.post(wire::envelope(method, this, body), Some(&session.cookie), longest).await?;
        // What may hold a fault is parsed for it; a page of an inventory is parsed once, by whoever asked.
        if answer.contains("Fault") {
            let document = wire::parse(&answer).map_err(Error::Odd)?;
            if let Err(fault) = wire::response(&document, method) {
                tracing::debug!(host = self.settings.host, method, object = this.value, %fault, "a call was refused");
                return Err(fault.into());
            }
        }
        Ok(answer)
    }

    async fn post(&self, envelope: String, cookie: Option<&Secret>, longest: Duration) -> Result<(Option<Secret>, String), Error> {
        let mut request = self.http.post(format!("https://{}/sdk", self.settings.host)).timeout(longest);
        request = request.header("Content-Type", "text/xml; charset=utf-8").header("SOAPAction", "urn:vim25/6.0").body(envelope);
        if let Some(cookie) = cookie {
            request = request.header(COOKIE, cookie.expose());
        }
        let answer = request.send().await.map_err(|e| self.unreachable(&e))?;
        let status = answer.status();
        // A fault comes with 500.
        if status != StatusCode::OK && status != StatusCode::INTERNAL_SERVER_ERROR {
            return Err(refusal(&answer));
        }
        let set = answer.headers().get_all(SET_COOKIE).iter().filter_map(|value| value.to_str().ok());
        let cookie = set.rev().find(|value| value.starts_with("vmware_soap_session="));
        let cookie = cookie.map(|value| Secret::new(value.split(';').next().unwrap_or_default()));
        let text = self.text(answer, ANSWER).await?;
        if status != StatusCode::OK && !text.contains("Fault") {
            return Err(Error::Status(status.as_u16()));
        }
        Ok((cookie, text))
    }

    async fn text(&self, mut answer: Response, most: usize) -> Result<String, Error> {
        let mut bytes = Vec::new();
        while let Some(chunk) = answer.chunk().await.map_err(|e| self.unreachable(&e))? {
            if bytes.len() + chunk.len() > most {
                return Err(Error::Odd(format!("an answer of more than {most} bytes")));
            }
            bytes.extend_from_slice(&chunk);
        }
        String::from_utf8(bytes).map_err(|_| Error::Odd("an answer that is not UTF-8".to_owned()))
    }

    /// Asks for a file below `/folder`, all of it or `range` (first and last byte).
    pub async fn folder(&self, session: &Session, path: &str, range: Option<(u64, u64)>, longest: Duration) -> Result<Response, Error> {
        let mut request = self.http.get(format!("https://{}{path}", self.settings.host)).timeout(longest);
        request = request.header(COOKIE, session.cookie.expose());
        if let Some((first, last)) = range {
            request = request.header("Range", format!("bytes={first}-{last}"));
        }
        let answer = request.send().await.map_err(|e| self.unreachable(&e))?;
        match answer.status() {
            StatusCode::OK | StatusCode::PARTIAL_CONTENT => Ok(answer),
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Err(Error::Fault(Fault::NotAuthenticated)),
            _ => Err(refusal(&answer)),
        }
    }

    /// Asks for a lease's URL; `*` in place of its host is the host of this client. Another host goes by the `thumbprint` that this one,
    /// which is trusted, tells of it, and is shown no session.
    pub async fn nfc(&self, session: &Session, url: &str, thumbprint: &str) -> Result<Response, Error> {
        let url = url.replacen("://*/", &format!("://{}/", self.settings.host), 1);
        let parsed = reqwest::Url::parse(&url).map_err(|_| Error::Odd("a lease with a URL that cannot be read".to_owned()))?;
        let own = reqwest::Url::parse(&format!("https://{}/", self.settings.host)).ok();
        let host = parsed.host_str().unwrap_or_default();
        let is_own =
            own.is_some_and(|own| own.host_str() == parsed.host_str() && own.port_or_known_default() == parsed.port_or_known_default());
        let request = if is_own {
            self.http.get(parsed).header(COOKIE, session.cookie.expose())
        } else {
            if parsed.scheme() != "https" || !egress::permits(host) {
                return Err(Error::Odd(format!("a lease whose URL leads to {host}, which is not dialled")));
            }
            let told = Some(thumbprint.replace(':', "").to_ascii_lowercase()).filter(|text| !text.is_empty());
            let trust = Trust { insecure: self.settings.trust.insecure, fingerprint: None, thumbprint: told };
            egress::hypervisor(&trust).map_err(Error::Odd)?.0.get(parsed)
        };
        let answer = request.send().await.map_err(|e| self.unreachable(&e))?;
        match answer.status() {
            StatusCode::OK => Ok(answer),
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Err(Error::Fault(Fault::NotAuthenticated)),
            _ => Err(refusal(&answer)),
        }
    }

    /// What kept a request from its answer, in words without the URL.
    pub fn unreachable(&self, error: &reqwest::Error) -> Error {
        if let Some(fingerprint) = self.refused.take() {
            return Error::Untrusted(fingerprint);
        }
        if error.is_timeout() {
            return Error::Unreachable("it does not answer in time".to_owned());
        }
        let mut cause: &dyn std::error::Error = error;
        while let Some(deeper) = cause.source() {
            cause = deeper;
        }
        Error::Unreachable(cause.to_string())
    }
}

fn refusal(answer: &Response) -> Error {
    if answer.status() != StatusCode::SERVICE_UNAVAILABLE && answer.status() != StatusCode::TOO_MANY_REQUESTS {
        return Error::Status(answer.status().as_u16());
    }
    let wait = answer.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.trim().parse().ok());
    Error::Busy(Duration::from_secs(wait.unwrap_or(1u64).min(60)))
}

fn content(answer: &str) -> Result<Content, Error> {
    let document = wire::parse(answer).map_err(Error::Odd)?;
    let response = wire::response(&document, "RetrieveServiceContent")?;
    let value = wire::child(response, "returnval").ok_or_else(|| Error::Odd("no service content".to_owned()))?;
    let reference =
        |name: &str| wire::child(value, name).and_then(MoRef::of).ok_or_else(|| Error::Odd(format!("its service content names no {name}")));
    let about = wire::child(value, "about").ok_or_else(|| Error::Odd("its service content has no `about`".to_owned()))?;
    Ok(Content {
        root: reference("rootFolder")?,
        collector: reference("propertyCollector")?,
        views: reference("viewManager")?,
        sessions: reference("sessionManager")?,
        authorization: wire::child(value, "authorizationManager").and_then(MoRef::of),
        is_vcenter: wire::text(about, "apiType") == "VirtualCenter",
        full_name: wire::text(about, "fullName").chars().take(200).collect(),
    })
}

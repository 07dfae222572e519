//! A REST client as anybody would write one from the published page.
//!
//! Owns: requests, and failures that quote the whole answer. Never: repeats a request by itself. A crash here costs one test.

use std::sync::Once;
use std::time::{Duration, Instant};

use reqwest::Method;
use reqwest::header::HeaderMap;
use serde_json::{Value, json};

use super::{seconds, wait_for};

/// What a server answered.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The request, for messages.
    pub asked: String,
    /// HTTP status.
    pub status: u16,
    /// Headers.
    pub headers: HeaderMap,
    /// The body as text.
    pub text: String,
    /// The body as JSON; null where it is none.
    pub body: Value,
}

impl Answer {
    /// Insists on a status.
    #[track_caller]
    pub fn expect(self, status: u16) -> Self {
        assert_eq!(self.status, status, "{} answered {} {}", self.asked, self.status, self.text);
        self
    }

    /// Insists on the contract's error: status, the status in the body, code, request id in body and header; answers the sentence.
    #[track_caller]
    pub fn refused(&self, status: u16, code: &str) -> String {
        let show = || format!("{} answered {} {}", self.asked, self.status, self.text);
        assert_eq!(self.status, status, "{}", show());
        assert_eq!(self.body["status"], status, "{}", show());
        assert_eq!(self.body["code"], code, "{}", show());
        let sentence = self.body["error"].as_str().unwrap_or_default().to_owned();
        assert!(sentence.len() > 8, "no sentence: {}", show());
        let id = self.body["request_id"].as_str().unwrap_or_default();
        assert!(!id.is_empty() && self.header("x-request-id") == Some(id), "request id in body and header: {} {:?}", show(), self.headers);
        assert!(self.header("content-type").is_some_and(|kind| kind.starts_with("application/json")), "{}", show());
        sentence
    }

    /// A header as text.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }
}

/// A client with or without a token.
#[derive(Clone)]
pub struct Client {
    http: reqwest::Client,
    /// `https://HOST:PORT`.
    pub base: String,
    /// The bearer token, where it has one.
    pub token: Option<String>,
}

impl Client {
    /// Without a token. The certificate is self-signed; whether it is the printed one is tested where the CLI pins it.
    pub fn new(base: &str) -> Self {
        static PROVIDER: Once = Once::new();
        PROVIDER.call_once(|| drop(rustls::crypto::ring::default_provider().install_default()));
        let http = reqwest::Client::builder().tls_danger_accept_invalid_certs(true).timeout(seconds(60)).build().unwrap();
        Self { http, base: base.to_owned(), token: None }
    }

    /// The same with another token.
    pub fn with_token(&self, token: &str) -> Self {
        Self { token: Some(token.to_owned()), ..self.clone() }
    }

    /// The same without one.
    pub fn anonymous(&self) -> Self {
        Self { token: None, ..self.clone() }
    }

    /// Logs in; answers a client with the token.
    pub async fn login(&self, username: &str, password: &str) -> Self {
        let answer = self.anonymous().post("/auth/login", json!({"username": username, "password": password})).await.expect(200);
        self.with_token(answer.body["token"].as_str().expect("a login answers a token"))
    }

    /// A request to a path below `/api/v1`, or to a whole path that begins with `//`.
    pub fn request(&self, method: Method, path: &str) -> reqwest::RequestBuilder {
        let url = match path.strip_prefix("//") {
            Some(whole) => format!("{}/{whole}", self.base),
            None => format!("{}/api/v1{path}", self.base),
        };
        let request = self.http.request(method, url);
        match &self.token {
            Some(token) => request.bearer_auth(token),
            None => request,
        }
    }

    /// Sends a request; Err where there was no answer.
    pub async fn send(&self, request: reqwest::RequestBuilder) -> Result<Answer, String> {
        let request = request.build().map_err(|e| e.to_string())?;
        let asked = format!("{} {}", request.method(), request.url());
        let describe = |e: reqwest::Error| format!("{asked}: {e:?}");
        let response = self.http.execute(request).await.map_err(describe)?;
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        let text = response.text().await.map_err(describe)?;
        let body = serde_json::from_str(&text).unwrap_or(Value::Null);
        Ok(Answer { asked, status, headers, text, body })
    }

    /// GET; Err where there was no answer or not the status 200.
    pub async fn try_get(&self, path: &str) -> Result<Value, String> {
        let answer = self.send(self.request(Method::GET, path)).await?;
        if answer.status == 200 { Ok(answer.body) } else { Err(format!("{} answered {} {}", answer.asked, answer.status, answer.text)) }
    }

    /// GET.
    pub async fn get(&self, path: &str) -> Answer {
        self.send(self.request(Method::GET, path)).await.unwrap()
    }

    /// POST of JSON.
    pub async fn post(&self, path: &str, body: Value) -> Answer {
        self.send(self.request(Method::POST, path).json(&body)).await.unwrap()
    }

    /// DELETE.
    pub async fn delete(&self, path: &str) -> Answer {
        self.send(self.request(Method::DELETE, path)).await.unwrap()
    }

    /// Creates a job; answers its id.
    pub async fn create_job(&self, body: Value) -> String {
        let answer = self.post("/jobs", body).await.expect(201);
        answer.body["id"].as_str().expect("a job has an id").to_owned()
    }

    /// An export of a VM of the provider `local`.
    pub async fn export(&self, vm: &str, format: &str, options: Value) -> String {
        self.create_job(json!({"type": "export", "provider": "local", "vm_name": vm, "format": format, "options": options})).await
    }

    /// The job.
    pub async fn job(&self, id: &str) -> Value {
        self.get(&format!("/jobs/{id}")).await.expect(200).body
    }

    /// Waits until a job has ended; answers it.
    pub async fn ended(&self, id: &str, limit: Duration) -> Value {
        wait_for(&format!("{id} to end"), limit, async || {
            let job = self.try_get(&format!("/jobs/{id}")).await?;
            if matches!(job["status"].as_str(), Some("completed" | "failed" | "cancelled")) { Ok(job) } else { Err(brief(&job)) }
        })
        .await
    }

    /// Waits until a job is completed; a job that ended otherwise is shown with its log.
    pub async fn completed(&self, id: &str, limit: Duration) -> Value {
        let start = Instant::now();
        let job = self.ended(id, limit).await;
        if job["status"] != "completed" {
            panic!("{id} ended after {:?} as {job:#}\n{}", start.elapsed(), self.log(id).await);
        }
        assert_eq!(job["progress"], 100, "a published job is at 100: {job:#}");
        job
    }

    /// Waits until a job is in one of these stages.
    pub async fn in_stage(&self, id: &str, stages: &[&str], limit: Duration) -> Value {
        wait_for(&format!("{id} to be {stages:?}"), limit, async || {
            let job = self.try_get(&format!("/jobs/{id}")).await?;
            if stages.iter().any(|stage| job["stage"] == *stage) { Ok(job) } else { Err(brief(&job)) }
        })
        .await
    }

    /// A job's log as text.
    pub async fn log(&self, id: &str) -> String {
        self.get(&format!("/jobs/{id}/logs")).await.text
    }

    /// A job's log as its lines.
    pub async fn log_lines(&self, id: &str) -> Result<Vec<Value>, String> {
        let answer = self.send(self.request(Method::GET, &format!("/jobs/{id}/logs"))).await?;
        let lines = answer.text.lines().map(|line| serde_json::from_str(line).map_err(|e| format!("{line:?} is no JSON: {e}")));
        lines.collect()
    }
}

/// A job in one line.
pub fn brief(job: &Value) -> String {
    let field = |name: &str| job[name].to_string();
    ["id", "status", "stage", "progress", "attempt", "bytes_done", "error"].map(|name| format!("{name}={}", field(name))).join(" ")
}

/// The absolute path of the first file of a result with this ending.
#[track_caller]
pub fn file_of(job: &Value, ending: &str) -> std::path::PathBuf {
    let files = job["result"]["files"].as_array().unwrap_or_else(|| panic!("no files in {job:#}"));
    let paths = files.iter().filter_map(|file| file["path"].as_str());
    paths.filter(|path| path.ends_with(ending)).map(Into::into).next().unwrap_or_else(|| panic!("no {ending} in {job:#}"))
}

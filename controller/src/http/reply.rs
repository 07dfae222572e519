//! Answers: the one error shape of the contract, and pages.
//!
//! ```text
//! {"error": "…", "status": 404, "code": "not_found", "request_id": "…"}
//! ```
//! Owns: [`Error`] and its map to HTTP, [`Page`], the id of the request that is being answered.
//! Never: lets a path outside the roots, a secret or a stack into a message: what is our defect is logged and answered as "internal error".
//! A crash here costs one answer.

use std::fmt;

use actix_web::http::{StatusCode, header};
use actix_web::{HttpResponse, ResponseError};
use serde::{Deserialize, Serialize};
use shared::error::Code;
use utoipa::ToSchema;

use crate::store;

tokio::task_local! {
    /// Set around every request by [`super::finish`].
    pub(super) static REQUEST_ID: String;
}

/// Id of the request that this task answers; empty outside of one.
pub fn request_id() -> String {
    REQUEST_ID.try_with(Clone::clone).unwrap_or_default()
}

/// Body of every error answer.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[schema(as = Error, example = json!({"error": "no job `job-0000000000000000`", "status": 404, "code": "not_found", "request_id": "5f0c2a9be1d34c77"}))]
pub struct ErrorBody {
    /// What was wrong and what would have been right.
    pub error: String,
    /// The HTTP status again.
    pub status: u16,
    /// Stable word for the kind of error.
    pub code: String,
    /// Also in the header `X-Request-Id`.
    pub request_id: String,
    /// What a program needs to go on, where there is something.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub detail: Option<serde_json::Value>,
}

/// An error on its way to the caller.
#[derive(Clone)]
pub struct Error {
    code: Code,
    message: String,
    detail: Option<serde_json::Value>,
    headers: Vec<(&'static str, String)>,
}

impl Error {
    /// With its code and what the caller should know.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), detail: None, headers: Vec::new() }
    }

    /// Something that cannot be read: 400.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(Code::BadRequest, message)
    }

    /// No such thing: 404.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(Code::NotFound, message)
    }

    /// Part of the contract and not there yet: 422.
    pub fn not_built(what: impl fmt::Display) -> Self {
        Self::new(Code::NotBuilt, format!("{what} is not built yet"))
    }

    /// Our defect: logged here with its cause, answered without.
    pub fn internal(cause: impl fmt::Display) -> Self {
        tracing::error!(request_id = request_id(), cause = %cause, "request failed by our defect");
        Self::new(Code::Internal, "internal error; the log has the cause under this request_id")
    }

    /// Adds what a program needs to go on.
    pub fn detail(mut self, detail: serde_json::Value) -> Self {
        self.detail = Some(detail);
        self
    }

    /// Adds `Retry-After` in seconds.
    pub fn retry_after(self, seconds: u64) -> Self {
        self.header("Retry-After", seconds.max(1).to_string())
    }

    /// Adds a header.
    pub fn header(mut self, name: &'static str, value: String) -> Self {
        self.headers.push((name, value));
        self
    }

    /// As it stands in an answer.
    pub fn body(&self) -> ErrorBody {
        ErrorBody {
            error: self.message.clone(),
            status: self.code.status(),
            code: self.code.word().to_owned(),
            request_id: request_id(),
            detail: self.detail.clone(),
        }
    }

    /// Its code.
    pub fn code(&self) -> Code {
        self.code
    }

    /// What the caller is told.
    pub fn message(&self) -> &str {
        &self.message
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.message, self.code.word())
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

impl ResponseError for Error {
    fn status_code(&self) -> StatusCode {
        StatusCode::from_u16(self.code.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
    }

    fn error_response(&self) -> HttpResponse {
        let mut response = HttpResponse::build(self.status_code());
        for (name, value) in &self.headers {
            response.insert_header((*name, value.as_str()));
        }
        if self.status_code() == StatusCode::UNAUTHORIZED {
            response.insert_header((header::WWW_AUTHENTICATE, "Bearer"));
        }
        response.json(self.body())
    }
}

impl From<store::Error> for Error {
    fn from(error: store::Error) -> Self {
        match error {
            store::Error::Away(cause) => {
                tracing::warn!(request_id = request_id(), cause, "database is away");
                Self::new(Code::Unavailable, "the database is not reachable; try again").retry_after(2)
            }
            store::Error::Conflict(_) => Self::new(Code::Conflict, "it exists already"),
            store::Error::Other(cause) => Self::internal(cause),
        }
    }
}

/// What every list answers.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Page<T> {
    /// The rows of this page.
    pub data: Vec<T>,
    /// Where it stands in the whole list.
    pub pagination: Pagination,
}

/// Where a page stands in the whole list.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Pagination {
    /// Rows skipped.
    pub offset: u64,
    /// Most rows of a page, at most 200.
    pub limit: u64,
    /// Rows of the whole list.
    pub total: u64,
    /// Whether a next page has something.
    pub has_more: bool,
    /// For `?after=`, where the list takes it: the next page, whatever comes and goes meanwhile.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

impl<T> Page<T> {
    /// A page of `total` rows.
    pub fn new(data: Vec<T>, offset: u64, limit: u64, total: u64) -> Self {
        let has_more = offset.saturating_add(data.len() as u64) < total;
        Self { data, pagination: Pagination { offset, limit, total, has_more, next: None } }
    }
}

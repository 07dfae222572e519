//! `/upload/*`.
//!
//! Owns: the HTTP side. Never: decides anything (the service does). A crash here costs one answer.

use actix_web::http::header;
use actix_web::{HttpMessage, HttpRequest, HttpResponse, web};
use serde::{Deserialize, Serialize};
use shared::error::Code;
use utoipa::ToSchema;

use super::receive::Body;
use super::service::{self, CHUNK};
use crate::app::App;
use crate::http::body::Json;
use crate::http::guard::{Operator, Viewer};
use crate::http::idempotency::Idempotency;
use crate::http::query::Query;
use crate::http::reply::{Error, ErrorBody};
use crate::http::rfc3339;
use crate::store::entities::uploads;
use crate::system::audit;

/// What is to be sent.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = UploadInit, example = json!({"filename": "web-server-01.ova", "size": 25000000, "sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"}))]
pub struct Init {
    /// A bare name of 1 to 200 bytes.
    filename: String,
    /// Bytes, 1 or more.
    #[schema(minimum = 1)]
    size: i64,
    /// SHA-256 of the whole file, hex; compared at the end.
    #[serde(default)]
    sha256: Option<String>,
}

/// An upload that was begun.
#[derive(Serialize, ToSchema)]
#[schema(as = UploadBegun, example = json!({"upload_id": "upload-0123456789abcdef0123456789abcdef", "chunk_size": 10000000, "chunks": 3, "expires_at": "2026-01-02T03:04:05.678Z"}))]
pub struct Begun {
    upload_id: String,
    /// Bytes of every chunk but the last.
    chunk_size: u64,
    /// How many there are.
    chunks: u64,
    /// When it goes, where no chunk comes; each chunk moves it on.
    expires_at: String,
}

/// A chunk that is on the disk.
#[derive(Serialize, ToSchema)]
#[schema(as = UploadChunk, example = json!({"upload_id": "upload-0123456789abcdef0123456789abcdef", "index": 0, "size": 10000000, "sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"}))]
pub struct Chunk {
    upload_id: String,
    index: u64,
    size: u64,
    sha256: String,
}

/// Which upload is complete.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = UploadComplete, example = json!({"upload_id": "upload-0123456789abcdef0123456789abcdef"}))]
pub struct Complete {
    upload_id: String,
}

/// A whole file. `path` is a job's `source`, and a path for `/download`.
#[derive(Serialize, ToSchema)]
#[schema(as = Uploaded, example = json!({"upload_id": "upload-0123456789abcdef0123456789abcdef", "path": "uploads/upload-0123456789abcdef0123456789abcdef/web-server-01.ova", "absolute_path": "/var/lib/hypersdk/controller/uploads/upload-0123456789abcdef0123456789abcdef/web-server-01.ova", "size": 25000000, "sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"}))]
pub struct Uploaded {
    upload_id: String,
    path: String,
    /// The same on the controller's host.
    absolute_path: String,
    size: u64,
    sha256: String,
}

/// Where an upload stands.
#[derive(Serialize, ToSchema)]
#[schema(as = UploadStatus, example = json!({
    "upload_id": "upload-0123456789abcdef0123456789abcdef", "filename": "web-server-01.ova", "size": 25000000, "chunk_size": 10000000, "chunks": 3,
    "received_bytes": 15000000, "received": [0, 2], "missing": [1], "status": "open", "path": null, "sha256": null, "created_by": "admin",
    "created_at": "2026-01-02T03:04:05.678Z", "expires_at": "2026-01-03T03:04:05.678Z"
}))]
pub struct Status {
    upload_id: String,
    filename: String,
    size: u64,
    chunk_size: u64,
    chunks: u64,
    received_bytes: u64,
    /// Indexes of the chunks that are on the disk.
    received: Vec<i64>,
    /// Indexes of those that are not.
    missing: Vec<u64>,
    /// `open` or `complete`.
    status: String,
    /// Once it is complete.
    path: Option<String>,
    /// What was promised at the beginning; once it is complete, what it has.
    sha256: Option<String>,
    created_by: String,
    created_at: String,
    /// When it goes, where it stays open and no chunk comes.
    expires_at: String,
}

/// Begins an upload.
#[utoipa::path(post, path = "/upload/init", tag = "Upload & Download", security(("token" = [])), request_body = Init,
    params(("Idempotency-Key" = Option<String>, Header, description = "the same key and body give the first answer again")),
    responses(
        (status = 201, description = "send the chunks", body = Begun, headers(("Location" = String, description = "its status"))),
        (status = 400, description = "the body cannot be read, or the name, size or digest is wrong", body = ErrorBody),
        (status = 401, description = "no valid token", body = ErrorBody),
        (status = 403, description = "not an operator", body = ErrorBody),
        (status = 409, description = "the Idempotency-Key came with another body", body = ErrorBody),
        (status = 413, description = "the body is too large, or the upload is larger than what the quota leaves", body = ErrorBody),
        (status = 415, description = "no JSON", body = ErrorBody),
        (status = 422, description = "no room on the disk", body = ErrorBody),
    ))]
pub async fn init(caller: Operator, request: HttpRequest, app: web::Data<App>, body: Json<Init>) -> Result<HttpResponse, Error> {
    Idempotency::once(&request, &caller, &body.digest, &app.store, async |key| {
        let Init { filename, size, sha256 } = body.value;
        let row = app.uploads.draft(&caller.name, filename, size, sha256.as_deref())?;
        let answer = Begun {
            upload_id: row.id.clone(),
            chunk_size: CHUNK,
            chunks: service::count(row.size.unsigned_abs()),
            expires_at: rfc3339(row.expires_at),
        };
        let location = format!("/api/v1/upload/status/{}", row.id);
        let text = serde_json::to_string(&answer).map_err(Error::internal)?;
        let replay = key.map(|key| key.row(201, &location, text));
        let act = audit::begin(&app.store, &caller.name, "upload.init", &format!("{} {}", row.id, row.filename)).await?;
        let begun = app.uploads.begin(row, replay).await;
        act.finish(&begun).await;
        begun?;
        Ok(HttpResponse::Created().insert_header((header::LOCATION, location)).json(answer))
    })
    .await
}

/// Sends a chunk: in any order, several at a time, and again.
#[utoipa::path(post, path = "/upload/chunk", tag = "Upload & Download", security(("token" = [])),
    request_body(content = Vec<u8>, content_type = "application/octet-stream", description = "10,000,000 bytes; the last chunk has the rest"),
    params(
        ("upload_id" = String, Query), ("index" = u64, Query, description = "from 0"),
        ("X-Chunk-SHA256" = Option<String>, Header, description = "SHA-256 of the chunk, hex"),
    ),
    responses(
        (status = 200, description = "it is on the disk", body = Chunk),
        (status = 400, description = "a parameter is missing, unknown or out of range, or the chunk has another length", body = ErrorBody),
        (status = 401, description = "no valid token", body = ErrorBody),
        (status = 403, description = "not an operator", body = ErrorBody),
        (status = 404, description = "no such upload", body = ErrorBody),
        (status = 409, description = "the upload is complete, or all of it is there and it is to be completed", body = ErrorBody),
        (status = 413, description = "larger than any chunk may be", body = ErrorBody),
        (status = 415, description = "not application/octet-stream", body = ErrorBody),
        (status = 422, description = "not what X-Chunk-SHA256 says, or no room on the disk", body = ErrorBody),
    ))]
pub async fn chunk(caller: Operator, request: HttpRequest, app: web::Data<App>, payload: web::Payload) -> Result<web::Json<Chunk>, Error> {
    let _ = caller;
    take(&request, &app, &mut Body::new(payload)).await.map(web::Json)
}

async fn take(request: &HttpRequest, app: &App, body: &mut Body) -> Result<Chunk, Error> {
    let query = Query::only(request, &["upload_id", "index"])?;
    let upload_id = query.text("upload_id").ok_or_else(|| Error::bad_request("`upload_id` is missing; POST /upload/init gives one"))?;
    let index = query.number("index")?.ok_or_else(|| Error::bad_request("`index` is missing: the chunk's place, from 0"))?;
    if !request.content_type().eq_ignore_ascii_case("application/octet-stream") {
        let message = "send the chunk's bytes with `Content-Type: application/octet-stream`";
        return Err(Error::new(Code::UnsupportedMediaType, message));
    }
    let expected = match request.headers().get("X-Chunk-SHA256") {
        Some(value) => Some(service::check_digest("X-Chunk-SHA256", value.to_str().unwrap_or_default())?),
        None => None,
    };
    let declared = request.headers().get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    let taken = app.uploads.chunk(upload_id, index, declared, expected, body).await?;
    Ok(Chunk { upload_id: upload_id.to_owned(), index, size: taken.size, sha256: taken.sha256 })
}

/// Completes an upload. Reads all of it once for its digest, so it answers large ones late; asked again it answers the same.
#[utoipa::path(post, path = "/upload/complete", tag = "Upload & Download", security(("token" = [])), request_body = Complete, responses(
    (status = 200, description = "the file", body = Uploaded),
    (status = 400, description = "the body cannot be read", body = ErrorBody),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 403, description = "not an operator", body = ErrorBody),
    (status = 404, description = "no such upload", body = ErrorBody),
    (status = 409, description = "chunks are missing; `detail.missing` lists them", body = ErrorBody),
    (status = 413, description = "the body is too large", body = ErrorBody),
    (status = 415, description = "no JSON", body = ErrorBody),
    (status = 422, description = "the digest is another; the upload stays open", body = ErrorBody),
))]
pub async fn complete(caller: Operator, app: web::Data<App>, body: Json<Complete>) -> Result<web::Json<Uploaded>, Error> {
    let id = body.value.upload_id;
    let row = app.uploads.get(&id).await?;
    let act = audit::begin(&app.store, &caller.name, "upload.complete", &format!("{} {}", row.id, row.filename)).await?;
    let done = app.uploads.complete(&id).await;
    act.finish(&done).await;
    let row = done?;
    let (path, absolute_path) = app.uploads.paths(&row);
    let (size, sha256) = (row.size.unsigned_abs(), row.sha256.unwrap_or_default());
    Ok(web::Json(Uploaded { upload_id: row.id, path, absolute_path, size, sha256 }))
}

/// Where an upload stands.
#[utoipa::path(get, path = "/upload/status/{id}", tag = "Upload & Download", security(("token" = [])), params(("id" = String, Path)), responses(
    (status = 200, description = "its chunks", body = Status),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 404, description = "no such upload", body = ErrorBody),
))]
pub async fn status(_: Viewer, id: web::Path<String>, app: web::Data<App>) -> Result<web::Json<Status>, Error> {
    let (row, received) = app.uploads.status(&id).await?;
    Ok(web::Json(status_of(&app, row, received)))
}

fn status_of(app: &App, row: uploads::Model, received: Vec<i64>) -> Status {
    let size = row.size.unsigned_abs();
    let is_complete = row.status == super::store::COMPLETE;
    Status {
        path: is_complete.then(|| app.uploads.paths(&row).0),
        size,
        chunk_size: CHUNK,
        chunks: service::count(size),
        received_bytes: received.iter().map(|number| service::length(size, number.unsigned_abs())).sum(),
        missing: service::missing(size, &received),
        received,
        status: row.status,
        sha256: row.sha256.or(row.expected),
        created_by: row.created_by,
        created_at: rfc3339(row.created_at),
        expires_at: rfc3339(row.expires_at),
        upload_id: row.id,
        filename: row.filename,
    }
}

/// Removes an upload, whole or not, with its file.
#[utoipa::path(delete, path = "/upload/{id}", tag = "Upload & Download", security(("token" = [])), params(("id" = String, Path)), responses(
    (status = 204, description = "gone"),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 403, description = "not an operator", body = ErrorBody),
    (status = 404, description = "no such upload", body = ErrorBody),
    (status = 409, description = "a job that is not finished needs it", body = ErrorBody),
))]
pub async fn remove(caller: Operator, id: web::Path<String>, app: web::Data<App>) -> Result<HttpResponse, Error> {
    let row = app.uploads.get(&id).await?;
    let act = audit::begin(&app.store, &caller.name, "upload.delete", &format!("{} {}", row.id, row.filename)).await?;
    let gone = app.uploads.remove(&id).await;
    act.finish(&gone).await;
    gone?;
    Ok(HttpResponse::NoContent().finish())
}

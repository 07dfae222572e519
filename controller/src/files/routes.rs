//! `/browse/files`, `/download`, `/jobs/{id}/manifest`, `/exports/{id}`.
//!
//! Owns: the HTTP side. Never: decides anything (service and exports do). A crash here costs one answer.

use actix_web::http::{Method, StatusCode, header};
use actix_web::{HttpRequest, HttpResponse, web};
use serde::Serialize;
use shared::error::Code;
use shared::folder::{Ask, Entry, Kind, Sort};
use shared::ids::JobId;
use utoipa::ToSchema;

use super::body::Body;
use super::exports;
use super::range::{self, Wanted};
use super::service::{self, Listed, Place};
use crate::app::App;
use crate::http::guard::{Operator, Viewer};
use crate::http::query::{Order, Query};
use crate::http::reply::{Error, ErrorBody, Page};
use crate::http::rfc3339;
use crate::jobs;
use crate::jobs::record::Job;

/// A file, a folder or a root.
#[derive(Serialize, ToSchema)]
#[schema(as = FileEntry, example = json!({
    "name": "web.qcow2", "path": "exports/job-0123456789abcdef/web.qcow2", "type": "file", "size": 104857600,
    "modified_at": "2026-01-02T03:04:05.678Z", "format": "qcow2", "agent": "kvm-1"
}))]
pub struct Item {
    name: String,
    /// As `ROOT/…`: good wherever a path is asked for.
    path: String,
    /// `root`, `folder`, `file`, `link` (leads out of its root or nowhere) or `other`.
    #[serde(rename = "type")]
    kind: &'static str,
    /// Bytes of a file; 0 of all else.
    size: u64,
    /// Null of a root.
    modified_at: Option<String>,
    /// What a file's content says it is: raw, qcow2, vmdk, vhdx, vhd, vdi, ova, …; null of all else.
    format: Option<String>,
    /// Name of the agent on whose disk it lies; null: the controller's.
    agent: Option<String>,
    /// Of a root: where it lies on its host.
    #[serde(skip_serializing_if = "Option::is_none")]
    absolute_path: Option<String>,
    /// Of a root.
    #[serde(skip_serializing_if = "Option::is_none")]
    free_bytes: Option<u64>,
    /// Of a root: of its file system.
    #[serde(skip_serializing_if = "Option::is_none")]
    total_bytes: Option<u64>,
    /// Of a root.
    #[serde(skip_serializing_if = "Option::is_none")]
    writable: Option<bool>,
}

fn word(kind: Kind) -> &'static str {
    match kind {
        Kind::Root => "root",
        Kind::Folder => "folder",
        Kind::File => "file",
        Kind::Link => "link",
        Kind::Other => "other",
    }
}

fn item(entry: Entry, place: &Place) -> Item {
    Item {
        name: entry.name,
        path: entry.path,
        kind: word(entry.kind),
        size: entry.size,
        modified_at: Some(rfc3339(entry.modified_at)),
        format: entry.format,
        agent: place.agent().map(str::to_owned),
        absolute_path: None,
        free_bytes: None,
        total_bytes: None,
        writable: None,
    }
}

fn root_item(root: Listed) -> Item {
    Item {
        path: root.name.clone(),
        name: root.name,
        kind: word(Kind::Root),
        size: 0,
        modified_at: None,
        format: None,
        agent: root.place.agent().map(str::to_owned),
        absolute_path: Some(root.path),
        free_bytes: Some(root.free_bytes),
        total_bytes: Some(root.total_bytes),
        writable: Some(root.writable),
    }
}

/// What lies in a folder; without `path` the roots of the controller and of all agents.
#[utoipa::path(get, path = "/browse/files", tag = "Upload & Download", security(("token" = [])), params(
    ("path" = Option<String>, Query, description = "ROOT/…, or an absolute path in a root"),
    ("agent" = Option<String>, Query, description = "id or name, where several have such a root"),
    ("offset" = Option<u64>, Query), ("limit" = Option<u64>, Query),
    ("sort" = Option<String>, Query, description = "name, size, modified_at, type"), ("order" = Option<String>, Query),
    ("search" = Option<String>, Query, description = "part of the name"),
), responses(
    (status = 200, description = "one page; names that begin with a dot are left out", body = Page<Item>),
    (status = 400, description = "an unknown parameter or value, or several agents have such a root", body = ErrorBody),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 403, description = "outside the roots", body = ErrorBody),
    (status = 404, description = "no such folder or agent", body = ErrorBody),
    (status = 422, description = "no folder", body = ErrorBody),
    (status = 502, description = "the agent did not answer", body = ErrorBody),
))]
pub async fn browse(_: Viewer, request: HttpRequest, app: web::Data<App>) -> Result<web::Json<Page<Item>>, Error> {
    let query = Query::of(&request, &["path", "agent", "search"])?;
    let (paging, sort) = (query.paging()?, query.sort(Sort::WORDS, "name", Order::Asc)?);
    let descending = sort.order == Order::Desc;
    let search = query.text("search").unwrap_or_default().to_lowercase();
    let Some(path) = query.text("path") else {
        let wanted = match query.text("agent") {
            Some(agent) => Some(app.fleet.resolve(agent).await?.name),
            None => None,
        };
        let mut roots = service::roots(&app).await?;
        roots.retain(|root| root.name.to_lowercase().contains(&search) && (wanted.is_none() || root.place.agent() == wanted.as_deref()));
        roots.sort_by(|a, b| {
            let by_name = a.name.cmp(&b.name);
            let by_name = if descending && sort.field == "name" { by_name.reverse() } else { by_name };
            by_name.then_with(|| a.place.agent().cmp(&b.place.agent()))
        });
        return Ok(web::Json(paging.cut(roots.into_iter().map(root_item).collect())));
    };
    let place = service::locate(&app, path, query.text("agent")).await?;
    let ask = Ask { offset: paging.offset, limit: paging.limit, sort: Sort::from_word(sort.field), descending, search };
    let (entries, total) = service::list(&app, &place, path, ask).await?;
    Ok(web::Json(paging.page(entries.into_iter().map(|entry| item(entry, &place)).collect(), total)))
}

/// A file of the controller or of an agent, whole or a range of it.
#[utoipa::path(get, path = "/download", tag = "Upload & Download", security(("token" = [])), params(
    ("path" = String, Query, description = "ROOT/…, or an absolute path in a root, as `result.files[].path` shows it"),
    ("agent" = Option<String>, Query, description = "id or name, where several have such a root"),
    ("Range" = Option<String>, Header, description = "bytes=FIRST-LAST; several ranges get the whole file"),
    ("If-Range" = Option<String>, Header, description = "an ETag or Last-Modified: another file by now comes whole"),
    ("If-None-Match" = Option<String>, Header),
), responses(
    (status = 200, description = "the file", content_type = "application/octet-stream", body = Vec<u8>, headers(
        ("ETag" = String), ("Last-Modified" = String), ("Accept-Ranges" = String), ("Content-Disposition" = String),
    )),
    (status = 206, description = "the range", content_type = "application/octet-stream", body = Vec<u8>, headers(("Content-Range" = String))),
    (status = 304, description = "still the file of If-None-Match"),
    (status = 400, description = "a parameter is missing or unknown, or several agents have such a root", body = ErrorBody),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 403, description = "outside the roots", body = ErrorBody),
    (status = 404, description = "no such file or agent", body = ErrorBody),
    (status = 416, description = "the file has no such bytes", body = ErrorBody, headers(("Content-Range" = String))),
    (status = 422, description = "a folder, or no regular file", body = ErrorBody),
    (status = 502, description = "the agent did not answer", body = ErrorBody),
))]
pub async fn download(_: Viewer, request: HttpRequest, app: web::Data<App>) -> Result<HttpResponse, Error> {
    let query = Query::only(&request, &["path", "agent"])?;
    let path = query.text("path").ok_or_else(|| Error::bad_request("`path` is missing: ROOT/…; GET /browse/files lists the roots"))?;
    let place = service::locate(&app, path, query.text("agent")).await?;
    let entry = service::file(&app, &place, path).await?;
    let (tag, modified) = (format!("\"{}\"", entry.version), range::http_date(entry.modified_at));
    let given = |name: header::HeaderName| request.headers().get(name).and_then(|value| value.to_str().ok());
    if given(header::IF_NONE_MATCH).is_some_and(|list| range::names(list, &tag)) {
        return Ok(HttpResponse::NotModified().insert_header((header::ETAG, tag)).finish());
    }
    let asked = given(header::RANGE).filter(|_| given(header::IF_RANGE).is_none_or(|text| range::is_same(text, &tag, &modified)));
    let (status, offset, length) = match range::wanted(asked, entry.size) {
        Wanted::Whole => (StatusCode::OK, 0, entry.size),
        Wanted::Part { offset, length } => (StatusCode::PARTIAL_CONTENT, offset, length),
        Wanted::Nothing => {
            let message = format!("{} has {} bytes, and none of those that were asked for", entry.path, entry.size);
            return Err(Error::new(Code::RangeNotSatisfiable, message).header("Content-Range", format!("bytes */{}", entry.size)));
        }
    };
    let body = match *request.method() == Method::HEAD {
        true => Body::Head(length),
        false => service::open(&app, &place, path, &entry, offset, length).await?,
    };
    let mut response = HttpResponse::build(status);
    if status == StatusCode::PARTIAL_CONTENT {
        response.insert_header((header::CONTENT_RANGE, format!("bytes {offset}-{}/{}", offset + length - 1, entry.size)));
    }
    Ok(response
        .insert_header((header::ETAG, tag))
        .insert_header((header::LAST_MODIFIED, modified))
        .insert_header((header::ACCEPT_RANGES, "bytes"))
        .insert_header((header::CONTENT_DISPOSITION, range::disposition(&entry.name)))
        .insert_header((header::CONTENT_TYPE, "application/octet-stream"))
        .body(body))
}

async fn job_of(app: &App, id: &str) -> Result<Job, Error> {
    let missing = || Error::not_found(format!("no job `{}`; GET /jobs lists them", id.chars().take(60).collect::<String>()));
    let id: JobId = id.parse().map_err(|_| missing())?;
    jobs::store::load(&app.store, id.as_str()).await?.ok_or_else(missing)
}

/// The signed manifest of a job's output, from the agent that made it.
#[utoipa::path(get, path = "/jobs/{id}/manifest", tag = "Jobs", security(("token" = [])), params(
    ("id" = String, Path), ("file" = Option<String>, Query, description = "of which file, where there are several; default the first"),
), responses(
    (status = 200, description = "the manifest, as `hypersdk verify` reads it", content_type = "application/json", body = Object),
    (status = 400, description = "an unknown parameter", body = ErrorBody),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 404, description = "no such job, or it published nothing, or that is gone", body = ErrorBody),
    (status = 409, description = "the job is not finished", body = ErrorBody),
    (status = 502, description = "the agent did not answer", body = ErrorBody),
    (status = 503, description = "the agent or the database is away", body = ErrorBody),
))]
pub async fn manifest(_: Viewer, id: web::Path<String>, request: HttpRequest, app: web::Data<App>) -> Result<HttpResponse, Error> {
    let query = Query::only(&request, &["file"])?;
    let job = job_of(&app, &id).await?;
    let (length, body) = exports::manifest(&app, &job, query.text("file")).await?;
    let body = if *request.method() == Method::HEAD { Body::Head(length) } else { body };
    Ok(HttpResponse::Ok().content_type("application/json").body(body))
}

/// Removes a finished job's files from its agent's disk; of a migration that failed, what it has kept for a retry. The job stays; its result
/// says `removed_at`.
#[utoipa::path(delete, path = "/exports/{id}", tag = "Jobs", security(("token" = [])), params(("id" = String, Path, description = "the job's id")), responses(
    (status = 204, description = "gone"),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 403, description = "not an operator", body = ErrorBody),
    (status = 404, description = "no such job, or it published nothing, or that is gone already", body = ErrorBody),
    (status = 409, description = "the job is not finished, or its files are the disks of a VM that it has made", body = ErrorBody),
    (status = 422, description = "an import: what it made belongs to the catalogue", body = ErrorBody),
    (status = 502, description = "the agent did not answer, or the hypervisor that a VM was migrated to", body = ErrorBody),
    (status = 503, description = "the agent or the database is away", body = ErrorBody),
))]
pub async fn export_remove(caller: Operator, id: web::Path<String>, app: web::Data<App>) -> Result<HttpResponse, Error> {
    let job = job_of(&app, &id).await?;
    exports::remove(&app, &caller.name, &job).await?;
    Ok(HttpResponse::NoContent().finish())
}

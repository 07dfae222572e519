//! `GET /openapi.json` and `GET /docs`: the contract as the code has it, and Swagger UI from the binary (no CDN).

use std::sync::{Arc, LazyLock};

use actix_web::http::header;
use actix_web::{HttpResponse, web};
use utoipa::OpenApi;
use utoipa_swagger_ui::{Config, serve};

use super::openapi::Document;
use super::reply::Error;

static TEXT: LazyLock<Result<String, String>> = LazyLock::new(|| Document::openapi().to_json().map_err(|e| e.to_string()));
static UI: LazyLock<Arc<Config<'static>>> = LazyLock::new(|| Arc::new(Config::from("/openapi.json")));

/// The document, OpenAPI 3.1.
pub async fn openapi() -> Result<HttpResponse, Error> {
    match &*TEXT {
        Ok(text) => Ok(HttpResponse::Ok().content_type("application/json").body(text.as_str())),
        Err(cause) => Err(Error::internal(cause)),
    }
}

/// `/docs` leads to `/docs/`.
pub async fn redirect() -> HttpResponse {
    HttpResponse::Found().insert_header((header::LOCATION, "/docs/")).finish()
}

/// Swagger UI's files.
pub async fn page(file: web::Path<String>) -> Result<HttpResponse, Error> {
    let found = serve(&file, Arc::clone(&UI)).map_err(Error::internal)?;
    let found = found.ok_or_else(|| Error::not_found("no such file; the documentation is at /docs/"))?;
    let mut response = HttpResponse::Ok();
    if found.gzpipped {
        response.insert_header((header::CONTENT_ENCODING, "gzip"));
    }
    Ok(response.content_type(found.content_type).body(found.bytes.into_owned()))
}

//! `/auth/tokens`.
//!
//! Owns: the HTTP side. Never: shows a token but in the answer that made it. A crash here costs one answer.

use actix_web::{HttpRequest, HttpResponse, web};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{service, store};
use crate::access::Role;
use crate::app::App;
use crate::http::body::Json;
use crate::http::guard::Viewer;
use crate::http::query::{Order, Query};
use crate::http::reply::{Error, ErrorBody, Page};
use crate::http::rfc3339;
use crate::store::entities::api_tokens;
use crate::system::audit;

/// A token to be made.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = NewApiToken, example = json!({"name": "nightly backup", "role": "operator", "ttl": "90d"}))]
pub struct NewToken {
    /// 1 to 100 characters, unique among the owner's.
    name: String,
    /// RFC 3339; without it and `ttl` the token ends with its owner.
    #[serde(default)]
    expires_at: Option<String>,
    /// In place of `expires_at`: a number with `s`, `m`, `h` or `d`.
    #[serde(default)]
    #[schema(example = "90d")]
    ttl: Option<String>,
    /// The largest role that it gives; default and limit: the caller's.
    #[serde(default)]
    role: Option<Role>,
}

/// An API token, without its text.
#[derive(Serialize, ToSchema)]
#[schema(as = ApiToken)]
pub struct TokenView {
    /// `tok-` and hex digits.
    #[schema(example = "tok-5f0c2a9be1d34c77")]
    id: String,
    /// What its owner calls it.
    #[schema(example = "nightly backup")]
    name: String,
    /// Whose it is.
    #[schema(example = "admin")]
    user: String,
    /// The largest role that it gives; the owner's counts where that is smaller.
    #[schema(example = "operator")]
    role: String,
    /// When it was made.
    #[schema(example = "2026-01-02T03:04:05.678Z")]
    created_at: String,
    /// When it ends; null: with its owner.
    #[schema(example = "2026-04-02T03:04:05.678Z")]
    expires_at: Option<String>,
    /// When it was used last, to the minute; null: never.
    #[schema(example = "2026-01-03T03:04:05.678Z")]
    last_used_at: Option<String>,
}

impl From<api_tokens::Model> for TokenView {
    fn from(row: api_tokens::Model) -> Self {
        Self {
            id: row.id,
            name: row.name,
            user: row.user_name,
            role: row.role,
            created_at: rfc3339(row.created_at),
            expires_at: row.expires_at.map(rfc3339),
            last_used_at: row.last_used_at.map(rfc3339),
        }
    }
}

/// A new token with its text, shown this once.
#[derive(Serialize, ToSchema)]
#[schema(as = MadeApiToken)]
pub struct Made {
    /// For `Authorization: Bearer`; nobody can show it again.
    #[schema(example = "hsdk_…")]
    token: String,
    #[serde(flatten)]
    view: TokenView,
}

/// API tokens: one's own; for an admin everybody's, or one user's.
#[utoipa::path(get, path = "/auth/tokens", tag = "Access", security(("token" = [])), params(
    ("offset" = Option<u64>, Query), ("limit" = Option<u64>, Query),
    ("sort" = Option<String>, Query, description = "name, created_at, user"), ("order" = Option<String>, Query),
    ("search" = Option<String>, Query), ("user" = Option<String>, Query, description = "whose; another's for admins only"),
), responses(
    (status = 200, description = "a page of tokens, without their text", body = Page<TokenView>),
    (status = 400, description = "an unknown parameter or value", body = ErrorBody),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 403, description = "another's tokens are for admins", body = ErrorBody),
    (status = 429, description = "too many requests", body = ErrorBody),
    (status = 503, description = "the database is away", body = ErrorBody),
))]
pub async fn list(caller: Viewer, request: HttpRequest, app: web::Data<App>) -> Result<web::Json<Page<TokenView>>, Error> {
    let query = Query::of(&request, &["search", "user"])?;
    let (paging, sort) = (query.paging()?, query.sort(&["name", "created_at", "user"], "name", Order::Asc)?);
    let owner = service::owner_of_list(&caller, query.text("user"))?;
    let (rows, total) = store::list(&app.store, owner, query.text("search").map(str::to_owned), sort, paging).await?;
    Ok(web::Json(paging.page(rows.into_iter().map(TokenView::from).collect(), total)))
}

/// Makes a token for the caller, who logged in with a password: a token makes none. An `Idempotency-Key` is not taken: its row would keep the token; a name is taken only once.
#[utoipa::path(post, path = "/auth/tokens", tag = "Access", security(("token" = [])), request_body = NewToken, responses(
    (status = 201, description = "the token, shown once", body = Made),
    (status = 400, description = "the body cannot be read, or a field is wrong", body = ErrorBody),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 403, description = "a larger role than the caller's, or the caller came with an API token", body = ErrorBody),
    (status = 409, description = "the caller has a token of this name, or too many", body = ErrorBody),
    (status = 413, description = "the body is too large", body = ErrorBody),
    (status = 415, description = "no JSON", body = ErrorBody),
    (status = 429, description = "too many requests", body = ErrorBody),
    (status = 503, description = "the database is away", body = ErrorBody),
))]
pub async fn create(caller: Viewer, app: web::Data<App>, body: Json<NewToken>) -> Result<HttpResponse, Error> {
    let NewToken { name, expires_at, ttl, role } = body.value;
    let (row, token) = service::draft(&caller, service::Wish { name, expires_at, ttl, role })?;
    let act = audit::begin(&app.store, &caller.name, "token.create", &format!("{} {}", row.id, row.name)).await?;
    let made = service::keep(&app.store, row.clone()).await;
    act.finish(&made).await;
    made?;
    Ok(HttpResponse::Created().json(Made { token: token.expose().to_owned(), view: row.into() }))
}

/// Revokes a token: here at once, on other controllers within half a second. A token revokes only itself.
#[utoipa::path(delete, path = "/auth/tokens/{id}", tag = "Access", security(("token" = [])), params(("id" = String, Path)), responses(
    (status = 204, description = "the token is refused from now on"),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 403, description = "the caller came with another API token", body = ErrorBody),
    (status = 404, description = "no such token, or another's and the caller is no admin", body = ErrorBody),
    (status = 429, description = "too many requests", body = ErrorBody),
    (status = 503, description = "the database is away", body = ErrorBody),
))]
pub async fn revoke(caller: Viewer, id: web::Path<String>, app: web::Data<App>) -> Result<HttpResponse, Error> {
    let row = service::revocable(&app.store, &caller, &id).await?;
    let act = audit::begin(&app.store, &caller.name, "token.revoke", &format!("{} {} of {}", row.id, row.name, row.user_name)).await?;
    let gone = app.access.revoke_token(&row.id).await;
    act.finish(&gone).await;
    gone?;
    Ok(HttpResponse::NoContent().finish())
}

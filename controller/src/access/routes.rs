//! `/auth/*` and `/users`.

use actix_web::{HttpRequest, HttpResponse, web};
use serde::{Deserialize, Deserializer, Serialize};
use shared::secret::Secret;
use utoipa::ToSchema;

use super::service::LoggedIn;
use super::{Role, password, users};
use crate::app::App;
use crate::http::body::Json;
use crate::http::guard::{Admin, Viewer};
use crate::http::query::{Order, Query};
use crate::http::reply::{Error, ErrorBody, Page};
use crate::http::{idempotency::Idempotency, limits, rfc3339};
use crate::store;
use crate::system::audit;

fn secret<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Secret, D::Error> {
    String::deserialize(deserializer).map(Secret::new)
}

fn optional_secret<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Secret>, D::Error> {
    Ok(Option::<String>::deserialize(deserializer)?.map(Secret::new))
}

/// Who logs in.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"username": "admin", "password": "secret"}))]
pub struct Credentials {
    username: String,
    #[serde(deserialize_with = "secret")]
    #[schema(value_type = String)]
    password: Secret,
}

/// A token.
#[derive(Serialize, ToSchema)]
pub struct Token {
    /// For `Authorization: Bearer`.
    token: String,
    /// Always `Bearer`.
    #[schema(example = "Bearer")]
    token_type: &'static str,
    /// When it ends.
    #[schema(example = "2026-01-02T03:04:05.678Z")]
    expires_at: String,
    /// Whose it is.
    user: Me,
}

/// A user, short.
#[derive(Serialize, ToSchema)]
pub struct Me {
    /// User name.
    #[schema(example = "admin")]
    username: String,
    /// Role.
    role: Role,
}

impl From<LoggedIn> for Token {
    fn from(session: LoggedIn) -> Self {
        Self {
            token: session.token.expose().to_owned(),
            token_type: "Bearer",
            expires_at: shared::clock::rfc3339(session.expires_at),
            user: Me { username: session.caller.name, role: session.caller.role },
        }
    }
}

/// Logs in.
#[utoipa::path(post, path = "/auth/login", tag = "Access", request_body = Credentials, responses(
    (status = 200, description = "a token", body = Token),
    (status = 400, description = "the body cannot be read", body = ErrorBody),
    (status = 401, description = "wrong username or password", body = ErrorBody),
    (status = 413, description = "the body is too large", body = ErrorBody),
    (status = 415, description = "no JSON", body = ErrorBody),
    (status = 429, description = "too many requests or failed log-ins", body = ErrorBody),
    (status = 503, description = "the database is away", body = ErrorBody),
))]
pub async fn login(request: HttpRequest, app: web::Data<App>, body: Json<Credentials>) -> Result<web::Json<Token>, Error> {
    let address = limits::client_address(&request, &app.config.trusted_proxies);
    let session = app.access.login(&body.value.username, body.value.password, address).await?;
    Ok(web::Json(session.into()))
}

/// A new token for a good one, which ends. Not for API tokens.
#[utoipa::path(post, path = "/auth/refresh", tag = "Access", security(("token" = [])), responses(
    (status = 200, description = "a new token", body = Token),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 403, description = "an API token is not refreshed", body = ErrorBody),
    (status = 429, description = "too many requests", body = ErrorBody),
    (status = 503, description = "the database is away", body = ErrorBody),
))]
pub async fn refresh(caller: Viewer, app: web::Data<App>) -> Result<web::Json<Token>, Error> {
    Ok(web::Json(app.access.refresh(&caller).await?.into()))
}

/// Ends the token; an API token is revoked.
#[utoipa::path(post, path = "/auth/logout", tag = "Access", security(("token" = [])), responses(
    (status = 204, description = "the token is refused from now on"),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 429, description = "too many requests", body = ErrorBody),
    (status = 503, description = "the database is away", body = ErrorBody),
))]
pub async fn logout(caller: Viewer, app: web::Data<App>) -> Result<HttpResponse, Error> {
    app.access.logout(&caller).await?;
    Ok(HttpResponse::NoContent().finish())
}

/// Who am I.
#[utoipa::path(get, path = "/auth/me", tag = "Access", security(("token" = [])), responses(
    (status = 200, description = "the caller", body = Me),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 429, description = "too many requests", body = ErrorBody),
    (status = 503, description = "the database is away", body = ErrorBody),
))]
pub async fn me(caller: Viewer) -> web::Json<Me> {
    web::Json(Me { username: caller.name.clone(), role: caller.role })
}

/// A user.
#[derive(Serialize, ToSchema)]
pub struct User {
    /// User name.
    #[schema(example = "alice")]
    username: String,
    /// `viewer`, `operator` or `admin`.
    #[schema(example = "operator")]
    role: String,
    /// When it was made.
    #[schema(example = "2026-01-02T03:04:05.678Z")]
    created_at: String,
    /// When it was changed last.
    #[schema(example = "2026-01-02T03:04:05.678Z")]
    updated_at: String,
}

impl From<store::entities::users::Model> for User {
    fn from(row: store::entities::users::Model) -> Self {
        Self { username: row.name, role: row.role, created_at: rfc3339(row.created_at), updated_at: rfc3339(row.updated_at) }
    }
}

/// A user to be made.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"username": "alice", "password": "correct horse", "role": "operator"}))]
pub struct NewUser {
    username: String,
    /// 8 characters to 72 bytes.
    #[serde(deserialize_with = "secret")]
    #[schema(value_type = String)]
    password: Secret,
    role: Role,
}

/// What changes of a user.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"role": "viewer"}))]
pub struct UserChange {
    #[serde(default, deserialize_with = "optional_secret")]
    #[schema(value_type = Option<String>)]
    password: Option<Secret>,
    #[serde(default)]
    role: Option<Role>,
}

/// Users.
#[utoipa::path(get, path = "/users", tag = "Access", security(("token" = [])), params(
    ("offset" = Option<u64>, Query), ("limit" = Option<u64>, Query),
    ("sort" = Option<String>, Query, description = "username, role, created_at"), ("order" = Option<String>, Query),
    ("search" = Option<String>, Query), ("role" = Option<String>, Query),
), responses(
    (status = 200, description = "a page of users", body = Page<User>),
    (status = 400, description = "an unknown parameter or value", body = ErrorBody),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 403, description = "not an admin", body = ErrorBody),
    (status = 429, description = "too many requests", body = ErrorBody),
    (status = 503, description = "the database is away", body = ErrorBody),
))]
pub async fn user_list(_: Admin, request: HttpRequest, app: web::Data<App>) -> Result<web::Json<Page<User>>, Error> {
    let query = Query::of(&request, &["search", "role"])?;
    let (paging, sort) = (query.paging()?, query.sort(&["username", "role", "created_at"], "username", Order::Asc)?);
    let role = query.word("role", Role::ALL)?.map(str::to_owned);
    let (rows, total) = users::list(&app.store, query.text("search").map(str::to_owned), role, sort, paging).await?;
    Ok(web::Json(paging.page(rows.into_iter().map(User::from).collect(), total)))
}

/// Makes a user.
#[utoipa::path(post, path = "/users", tag = "Access", security(("token" = [])), request_body = NewUser, responses(
    (status = 201, description = "the user", body = User),
    (status = 400, description = "the body cannot be read, or name or password cannot be taken", body = ErrorBody),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 403, description = "not an admin", body = ErrorBody),
    (status = 409, description = "the name exists", body = ErrorBody),
    (status = 413, description = "the body is too large", body = ErrorBody),
    (status = 415, description = "no JSON", body = ErrorBody),
    (status = 429, description = "too many requests", body = ErrorBody),
    (status = 503, description = "the database is away", body = ErrorBody),
))]
pub async fn user_create(caller: Admin, request: HttpRequest, app: web::Data<App>, body: Json<NewUser>) -> Result<HttpResponse, Error> {
    let key = Idempotency::of(&request, &caller, &body.digest)?;
    if let Some(key) = &key
        && let Some(first) = key.replay(&app.store).await?
    {
        return Ok(first);
    }
    let user = body.value;
    if !users::is_name(&user.username) {
        return Err(Error::bad_request(format!("username must be {}", users::NAME_RULE)));
    }
    check_password(&user.password)?;
    let hash = app.access.passwords().hash(user.password).await?;
    let act = audit::begin(&app.store, &caller.name, "user.create", &user.username).await?;
    let made = users::insert(&app.store, &user.username, hash, user.role).await;
    act.finish(&made).await;
    let made = User::from(made?);
    let location = format!("/api/v1/users/{}", made.username);
    if let Some(key) = key {
        key.keep(&app.store, 201, &location, &made).await?;
    }
    Ok(HttpResponse::Created().insert_header(("Location", location)).json(made))
}

/// Changes a user's password or role; their sessions end. Their API tokens stay, with the smaller of both roles.
#[utoipa::path(patch, path = "/users/{name}", tag = "Access", security(("token" = [])), params(("name" = String, Path)), request_body = UserChange, responses(
    (status = 200, description = "the user", body = User),
    (status = 400, description = "the body cannot be read, or the password cannot be taken", body = ErrorBody),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 403, description = "not an admin", body = ErrorBody),
    (status = 404, description = "no such user", body = ErrorBody),
    (status = 409, description = "the last admin", body = ErrorBody),
    (status = 413, description = "the body is too large", body = ErrorBody),
    (status = 415, description = "no JSON", body = ErrorBody),
    (status = 429, description = "too many requests", body = ErrorBody),
    (status = 503, description = "the database is away", body = ErrorBody),
))]
pub async fn user_update(
    caller: Admin,
    name: web::Path<String>,
    app: web::Data<App>,
    body: Json<UserChange>,
) -> Result<web::Json<User>, Error> {
    let change = body.value;
    if change.password.is_none() && change.role.is_none() {
        return Err(Error::bad_request("name what changes: password or role"));
    }
    let hash = match change.password {
        Some(password) => {
            check_password(&password)?;
            Some(app.access.passwords().hash(password).await?)
        }
        None => None,
    };
    let act = audit::begin(&app.store, &caller.name, "user.update", &name).await?;
    let changed = users::update(&app.store, &name, hash, change.role).await;
    act.finish(&changed).await;
    let user = changed?;
    app.access.forget_user(&name);
    Ok(web::Json(user.into()))
}

/// Removes a user; their sessions and API tokens end.
#[utoipa::path(delete, path = "/users/{name}", tag = "Access", security(("token" = [])), params(("name" = String, Path)), responses(
    (status = 204, description = "gone"),
    (status = 401, description = "no valid token", body = ErrorBody),
    (status = 403, description = "not an admin", body = ErrorBody),
    (status = 404, description = "no such user", body = ErrorBody),
    (status = 409, description = "the last admin", body = ErrorBody),
    (status = 429, description = "too many requests", body = ErrorBody),
    (status = 503, description = "the database is away", body = ErrorBody),
))]
pub async fn user_delete(caller: Admin, name: web::Path<String>, app: web::Data<App>) -> Result<HttpResponse, Error> {
    let act = audit::begin(&app.store, &caller.name, "user.delete", &name).await?;
    let gone = users::delete(&app.store, &name).await;
    act.finish(&gone).await;
    gone?;
    app.access.forget_user(&name);
    Ok(HttpResponse::NoContent().finish())
}

fn check_password(password: &Secret) -> Result<(), Error> {
    let text = password.expose();
    let is_good = text.chars().count() >= password::MIN_CHARS && text.len() <= password::MAX_BYTES && !text.contains('\0');
    let rule = || format!("the password must have {} characters or more and {} bytes or fewer", password::MIN_CHARS, password::MAX_BYTES);
    if is_good { Ok(()) } else { Err(Error::bad_request(rule())) }
}

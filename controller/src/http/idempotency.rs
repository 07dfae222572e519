//! `Idempotency-Key`: the same key and body give the first answer again; the same key with another body is refused.
//!
//! Owns: the key's shape, the look-up, the row. Never: stores it itself: the room that creates something inserts [`Idempotency::row`]
//! in the same transaction, so a crash leaves both or neither. Keys are the caller's own: another user's key is another key.

use actix_web::{HttpRequest, HttpResponse};
use sea_orm::{ActiveValue::Set, EntityTrait};
use shared::error::Code;

use super::body;
use super::reply::Error;
use crate::access::Caller;
use crate::store::Store;
use crate::store::entities::idempotency;

/// A key that came with a request.
#[derive(Clone, Debug)]
pub struct Idempotency {
    id: String,
    digest: String,
}

impl Idempotency {
    /// The request's key, where it has one: 1 to 255 visible ASCII characters. `digest` is [`body::Json::digest`].
    pub fn of(request: &HttpRequest, caller: &Caller, digest: &str) -> Result<Option<Self>, Error> {
        let Some(value) = request.headers().get("Idempotency-Key") else { return Ok(None) };
        let key = value.to_str().ok().filter(|key| (1..=255).contains(&key.len()) && key.bytes().all(|byte| byte.is_ascii_graphic()));
        let key = key.ok_or_else(|| Error::bad_request("Idempotency-Key must be 1 to 255 visible ASCII characters"))?;
        // Both prefixes are the same operation.
        let path = request.path().strip_prefix("/api/v1").unwrap_or(request.path());
        let id = body::digest(format!("{}\n{} {path}\n{key}", caller.name, request.method()).as_bytes());
        // Only with the key, which is not stored: from its bare hash a password in a body could be guessed.
        Ok(Some(Self { id, digest: body::digest(format!("{key}\n{digest}").as_bytes()) }))
    }

    /// Answers a request that creates something: with the first answer where its key has one, else by `act`, which stores the answer with
    /// what it makes. A conflict there may mean that a twin request with the same key was quicker: its answer is the answer.
    pub async fn once(
        request: &HttpRequest,
        caller: &Caller,
        digest: &str,
        store: &Store,
        act: impl AsyncFnOnce(Option<&Self>) -> Result<HttpResponse, Error>,
    ) -> Result<HttpResponse, Error> {
        let Some(key) = Self::of(request, caller, digest)? else { return act(None).await };
        if let Some(first) = key.replay(store).await? {
            return Ok(first);
        }
        match act(Some(&key)).await {
            Err(error) if error.code() == Code::Conflict => key.replay(store).await?.ok_or(error),
            answered => answered,
        }
    }

    /// A key that the controller derives by itself, so that an act which a crash cut off is found again. No caller can send one like it:
    /// no user's name is empty.
    pub fn derived(scope: &str, name: &str) -> Self {
        Self { id: body::digest(format!("\n{scope}\n{name}").as_bytes()), digest: String::new() }
    }

    /// The key's hash: another key or caller, another hash.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The `Location` of the first answer, where there was one.
    pub async fn first_location(&self, store: &Store) -> Result<Option<String>, crate::store::Error> {
        let id = self.id.clone();
        let row = store.read(|db| async move { Ok(idempotency::Entity::find_by_id(id).one(&db).await?) }).await?;
        Ok(row.map(|row| row.location))
    }

    /// The first answer, where there was one.
    pub async fn replay(&self, store: &Store) -> Result<Option<HttpResponse>, Error> {
        let id = self.id.clone();
        let row = store.read(|db| async move { Ok(idempotency::Entity::find_by_id(id).one(&db).await?) }).await?;
        let Some(row) = row else { return Ok(None) };
        if row.digest != self.digest {
            return Err(Error::new(Code::IdempotencyMismatch, "this Idempotency-Key came with another body before; use a new key"));
        }
        let status = u16::try_from(row.status).ok().and_then(|status| actix_web::http::StatusCode::from_u16(status).ok());
        let mut response = HttpResponse::build(status.ok_or_else(|| Error::internal("stored status is none"))?);
        response.insert_header(("Idempotent-Replayed", "true")).content_type("application/json");
        if !row.location.is_empty() {
            response.insert_header(("Location", row.location));
        }
        Ok(Some(response.body(row.body)))
    }

    /// The row to insert with what is created. A unique violation on it means that a twin request won: [`Idempotency::replay`] again.
    pub fn row(&self, status: u16, location: &str, body: String) -> idempotency::ActiveModel {
        idempotency::ActiveModel {
            id: Set(self.id.clone()),
            digest: Set(self.digest.clone()),
            status: Set(i32::from(status)),
            location: Set(location.to_owned()),
            body: Set(body),
            created_at: Set(shared::clock::now().timestamp_millis()),
        }
    }

    /// Keeps an answer after the act, for acts that a second try refuses by itself (a name that exists): a crash between the two makes
    /// the retry a conflict, never a double.
    pub async fn keep(&self, store: &Store, status: u16, location: &str, answer: &impl serde::Serialize) -> Result<(), Error> {
        let row = self.row(status, location, serde_json::to_string(answer).map_err(Error::internal)?);
        let kept = store.run(|db| async move { Ok(idempotency::Entity::insert(row).exec_without_returning(&db).await.map(drop)?) }).await;
        match kept {
            Err(crate::store::Error::Conflict(_)) | Ok(()) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }
}

//! Joining the fleet: a one-use token and a certificate request for a client certificate.
//!
//! Owns: the token's text (it carries the CA's certificate, so that the first contact is pinned), who may join, renewal.
//! Never: stores or logs a token; uses one up for a request that is malformed. A crash between use and answer costs one token.

use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use proto::v1::{EnrollReply, EnrollRequest};
use serde::{Deserialize, Serialize};
use shared::secret::Secret;
use tonic::Status;

use super::ca::Authority;
use super::store::{self, Joined, Joiner};
use crate::store::entities::{agents, join_tokens};
use crate::store::{Error as StoreError, Store};

/// Longest life of a token.
pub const LONGEST: Duration = Duration::from_secs(3600);

/// A new token.
pub struct Token {
    /// What the operator gives to the agent; shown once.
    pub text: Secret,
    /// When it runs out, milliseconds since 1970.
    pub expires_at: i64,
}

/// The token's content.
#[derive(Serialize, Deserialize)]
pub struct Content {
    /// The secret part; [`EnrollRequest::token`].
    pub secret: String,
    /// Certificate of the CA that the gateway must show.
    pub ca_pem: String,
    /// Name that the agent shall take, where the token is for one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

impl Content {
    /// base64url of JSON.
    pub fn encode(&self) -> Secret {
        Secret::new(URL_SAFE_NO_PAD.encode(serde_json::to_vec(self).unwrap_or_default()))
    }
}

/// Whether this can be an agent's name: 1 to 63 of `a-z`, `0-9`, `-`.
pub fn is_name(name: &str) -> bool {
    (1..=63).contains(&name.len()) && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
}

/// Makes a token that lives `ttl`, at most an hour; `name` binds it to one agent name.
pub async fn join_token(
    store: &Store,
    authority: &Authority,
    created_by: &str,
    name: Option<String>,
    ttl: Duration,
) -> Result<Token, StoreError> {
    let secret = shared::ids::random_hex::<32>();
    let now = shared::clock::now().timestamp_millis();
    let ttl = i64::try_from(ttl.min(LONGEST).as_millis()).unwrap_or(0);
    let row = join_tokens::Model {
        hash: hash(&secret),
        name: name.clone(),
        created_by: created_by.to_owned(),
        created_at: now,
        expires_at: now + ttl,
        used_at: None,
    };
    let expires_at = row.expires_at;
    store::add_token(store, row).await?;
    Ok(Token { text: Content { secret, ca_pem: authority.pem().to_owned(), name }.encode(), expires_at })
}

/// Lets an agent join.
pub async fn enroll(store: &Store, authority: &Authority, request: EnrollRequest) -> Result<EnrollReply, Status> {
    if request.protocol != proto::PROTOCOL {
        return Err(Status::failed_precondition(wrong_protocol(request.protocol)));
    }
    if !is_name(&request.name) {
        return Err(Status::invalid_argument("an agent's name is 1 to 63 of a-z, 0-9 and `-`"));
    }
    let is_key = request.signing_key.len() == 64 && request.signing_key.bytes().all(|byte| byte.is_ascii_hexdigit());
    if !is_key {
        return Err(Status::invalid_argument("signing_key must be an Ed25519 public key, 64 hex digits"));
    }
    let key_sha256 = Authority::request_key(&request.csr_pem).map_err(|e| Status::invalid_argument(e.to_string()))?;
    let hash = hash(&request.token);
    let token = store::token(store, &hash).await.map_err(away)?;
    let Some(token) = token else { return Err(Status::permission_denied("this join token is not known")) };
    if token.used_at.is_some() {
        return Err(Status::permission_denied("this join token was already used"));
    }
    if token.expires_at <= shared::clock::now().timestamp_millis() {
        return Err(Status::permission_denied("this join token has expired"));
    }
    if let Some(name) = token.name.filter(|name| *name != request.name) {
        return Err(Status::permission_denied(format!("this join token is for the agent `{name}`")));
    }
    let joiner = Joiner { name: request.name.clone(), key_sha256, signing_key: request.signing_key.to_ascii_lowercase() };
    let id = match store::join(store, &hash, joiner).await.map_err(away)? {
        Joined::As(id) => id,
        Joined::TokenGone => return Err(Status::permission_denied("this join token was already used")),
        Joined::NameTaken => {
            let message = format!(
                "an agent `{}` is there already; choose another name, or make a token for this name to replace its key",
                request.name
            );
            return Err(Status::already_exists(message));
        }
    };
    tracing::info!(agent = id, name = request.name, "agent joined");
    certificate(authority, &request.csr_pem, id)
}

/// A new certificate for an agent whose key is known.
pub fn renew(authority: &Authority, agent: &agents::Model, csr_pem: &str) -> Result<EnrollReply, Status> {
    let key = Authority::request_key(csr_pem).map_err(|e| Status::invalid_argument(e.to_string()))?;
    if key != agent.key_sha256 {
        return Err(Status::permission_denied("a renewal is for the key that joined; a new key needs a join token"));
    }
    certificate(authority, csr_pem, agent.id.clone())
}

fn certificate(authority: &Authority, csr_pem: &str, agent_id: String) -> Result<EnrollReply, Status> {
    let certificate_pem = authority.certify_agent(csr_pem, &agent_id).map_err(|error| {
        tracing::error!(%error, agent = agent_id, "an agent could not be certified");
        Status::internal("the certificate could not be made; the controller's log has the cause")
    })?;
    Ok(EnrollReply { agent_id, certificate_pem, ca_pem: authority.pem().to_owned() })
}

/// What an agent of another version is told.
pub fn wrong_protocol(theirs: u32) -> String {
    format!("this controller speaks fleet protocol {}, the agent {theirs}; update the older of the two", proto::PROTOCOL)
}

/// What an agent with an old key is told.
pub fn rejoined() -> Status {
    Status::permission_denied("this agent has joined again with another key")
}

/// A store's error as an agent sees it.
pub fn away(error: StoreError) -> Status {
    match error {
        StoreError::Away(_) => Status::unavailable("the controller's database is away; try again"),
        StoreError::Conflict(_) => Status::already_exists("it is there already"),
        StoreError::Other(cause) => {
            tracing::error!(cause, "fleet request failed");
            Status::internal("internal error; the controller's log has the cause")
        }
    }
}

fn hash(secret: &str) -> String {
    hex::encode(ring::digest::digest(&ring::digest::SHA256, secret.as_bytes()))
}

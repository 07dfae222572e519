//! Access: who somebody is and what they may do.
//!
//! Owns: users, passwords, tokens, roles, the login's back-off, the signing key.
//! Never: keeps a password or a token in the clear, locks an account for good, tells an unknown user from a wrong password.
//! A crash here costs the back-off counters; sessions and users are in the store.

pub mod api_tokens;
pub mod backoff;
pub mod password;
pub mod routes;
pub mod service;
pub mod token;
pub mod users;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What somebody may do; each contains the ones before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Reads.
    Viewer,
    /// Runs jobs.
    Operator,
    /// Manages users, providers and agents.
    Admin,
}

impl Role {
    /// Every word.
    pub const ALL: &[&str] = &["viewer", "operator", "admin"];

    /// The word on the wire and in the store.
    pub fn word(self) -> &'static str {
        match self {
            Role::Viewer => "viewer",
            Role::Operator => "operator",
            Role::Admin => "admin",
        }
    }

    /// The role of a word.
    pub fn from_word(word: &str) -> Option<Self> {
        match word {
            "viewer" => Some(Role::Viewer),
            "operator" => Some(Role::Operator),
            "admin" => Some(Role::Admin),
            _ => None,
        }
    }
}

/// Who calls.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// User name.
    pub name: String,
    /// Role, as the store has it now.
    pub role: Role,
    /// Id of the token they came with.
    pub session: String,
}

//! A row of `agents`: an enrolled agent and what it last said of itself.
//!
//! Owns: the columns. Never: interprets them (`fleet::store` does). A crash here costs nothing.

use sea_orm::entity::prelude::*;

/// One agent. Times are milliseconds since 1970 UTC.
#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "agents")]
#[allow(missing_docs)] // the derive makes items of its own
pub struct Model {
    /// `agent-…`; the common name of its certificate.
    #[sea_orm(primary_key, auto_increment = false)]
    pub id: String,
    /// Name that people use; unique.
    pub name: String,
    /// SHA-256 of its key's SubjectPublicKeyInfo, hex; the certificate may change, the key is who it is.
    pub key_sha256: String,
    /// Ed25519 public key that signs its manifests, hex.
    pub signing_key: String,
    /// Software version it last said.
    pub version: String,
    /// Process it last said hello with.
    pub instance: String,
    /// Host name it last said.
    pub hostname: String,
    /// CPUs it last said.
    pub cpus: i64,
    /// Its roots as JSON, kept so that destinations can be checked while it is away.
    pub roots: String,
    /// Output formats its engine writes, a JSON list.
    pub formats: String,
    /// Measured rates by output format as JSON.
    pub rates: String,
    /// Nothing is taken from it any more.
    pub revoked: bool,
    /// It gets no new work.
    pub draining: bool,
    /// When it joined.
    pub enrolled_at: i64,
    /// When it was last heard, to the minute.
    pub last_seen: Option<i64>,
}

/// No relations are followed by the ORM.
#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}

//! A row of `join_tokens`: a one-use right to join the fleet.
//!
//! Owns: the columns. Never: holds the token itself. A crash here costs nothing.

use sea_orm::entity::prelude::*;

/// One token. Times are milliseconds since 1970 UTC.
#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "join_tokens")]
#[allow(missing_docs)] // the derive makes items of its own
pub struct Model {
    /// SHA-256 of the secret part, hex.
    #[sea_orm(primary_key, auto_increment = false)]
    pub hash: String,
    /// The agent name it is for, where it was given.
    pub name: Option<String>,
    /// Who made it.
    pub created_by: String,
    /// When.
    pub created_at: i64,
    /// Until when it can be used.
    pub expires_at: i64,
    /// When it was used.
    pub used_at: Option<i64>,
}

/// No relations are followed by the ORM.
#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}

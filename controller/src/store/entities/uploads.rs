//! A row of `uploads`: a file that somebody sends in chunks, or has sent.
//!
//! Owns: the columns. Never: interprets them (`uploads::store` does). A crash here costs nothing.

use sea_orm::entity::prelude::*;

/// One upload. Times are milliseconds since 1970 UTC.
#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "uploads")]
#[allow(missing_docs)] // the derive makes items of its own
pub struct Model {
    /// `upload-…`.
    #[sea_orm(primary_key, auto_increment = false)]
    pub id: String,
    /// Its bare name.
    pub filename: String,
    /// Bytes.
    pub size: i64,
    /// SHA-256 that whoever sends it promised, hex.
    pub expected: Option<String>,
    /// SHA-256 that it has, once it is complete.
    pub sha256: Option<String>,
    /// `open` or `complete`.
    pub status: String,
    /// Who sends it.
    pub created_by: String,
    /// When it was begun.
    pub created_at: i64,
    /// When it goes, where no further chunk comes.
    pub expires_at: i64,
    /// When it was completed.
    pub finished_at: Option<i64>,
}

/// No relations are followed by the ORM.
#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}

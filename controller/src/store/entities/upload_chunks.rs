//! A row of `upload_chunks`: a chunk of an upload that is on the disk.
//!
//! Owns: the columns. Never: stands for a chunk whose bytes were not synced before. A crash here costs nothing.

use sea_orm::entity::prelude::*;

/// One chunk.
#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "upload_chunks")]
#[allow(missing_docs)] // the derive makes items of its own
pub struct Model {
    /// The upload's id.
    #[sea_orm(primary_key, auto_increment = false)]
    pub upload: String,
    /// Its place, from 0.
    #[sea_orm(primary_key, auto_increment = false)]
    pub number: i64,
    /// SHA-256 of its bytes, hex.
    pub sha256: String,
}

/// No relations are followed by the ORM.
#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}

//! First answers to POSTs that carried an Idempotency-Key.

use sea_orm::entity::prelude::*;

/// One row.
#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "idempotency")]
#[allow(missing_docs)] // the derive makes items of its own
pub struct Model {
    /// Hash of caller, path and key.
    #[sea_orm(primary_key, auto_increment = false)]
    pub id: String,
    /// Hash of the body.
    pub digest: String,
    /// Status of the answer.
    pub status: i32,
    /// Its `Location`, or empty.
    pub location: String,
    /// Its body, JSON.
    pub body: String,
    /// When it was given.
    pub created_at: i64,
}

/// No relations: joins are written where they are needed.
#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}

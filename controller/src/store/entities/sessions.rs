//! Tokens that are good: one row each; logging out removes it.

use sea_orm::entity::prelude::*;

/// One row.
#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "sessions")]
#[allow(missing_docs)] // the derive makes items of its own
pub struct Model {
    /// The token's id.
    #[sea_orm(primary_key, auto_increment = false)]
    pub jti: String,
    /// Whose it is.
    pub user_name: String,
    /// When it was given.
    pub created_at: i64,
    /// When it ends.
    pub expires_at: i64,
}

/// No relations: joins are written where they are needed.
#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}

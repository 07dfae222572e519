//! Tokens for programs.

use sea_orm::entity::prelude::*;

/// One row. Times are milliseconds since 1970, UTC.
#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "api_tokens")]
#[allow(missing_docs)] // the derive makes items of its own
pub struct Model {
    /// `tok-…`.
    #[sea_orm(primary_key, auto_increment = false)]
    pub id: String,
    /// Whose it is.
    pub user_name: String,
    /// What its owner calls it; unique for each owner.
    pub name: String,
    /// The largest role that it gives; its owner's counts where that is smaller.
    pub role: String,
    /// SHA-256 of the token, hex.
    pub hash: String,
    /// When it was made.
    pub created_at: i64,
    /// When it ends; absent: with its owner.
    pub expires_at: Option<i64>,
    /// When it was used last, to the minute.
    pub last_used_at: Option<i64>,
}

/// No relations: joins are written where they are needed.
#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}

//! Whom we tell by HTTP.

use sea_orm::entity::prelude::*;

/// One row. Times are milliseconds since 1970 UTC.
#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "webhooks")]
#[allow(missing_docs)] // the derive makes items of its own
pub struct Model {
    /// `hook-…`.
    #[sea_orm(primary_key, auto_increment = false)]
    pub id: String,
    /// Where it listens.
    pub url: String,
    /// Events it wants, a JSON list.
    pub events: String,
    /// The signing secret, sealed under `webhook.ID`.
    pub secret: String,
    /// Who made it.
    pub created_by: String,
    /// When.
    pub created_at: i64,
    /// When it was called last.
    pub last_at: Option<i64>,
    /// What it answered then.
    pub last_status: Option<i32>,
    /// How long that took, in milliseconds.
    pub last_ms: Option<i32>,
    /// Why that call did not count.
    pub last_error: Option<String>,
}

/// No relations: joins are written where they are needed.
#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}

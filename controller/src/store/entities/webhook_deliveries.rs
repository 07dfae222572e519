//! What a webhook is to be told; a row stands from the event to long after its delivery.

use sea_orm::entity::prelude::*;

/// One row. Times are milliseconds since 1970 UTC.
#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "webhook_deliveries")]
#[allow(missing_docs)] // the derive makes items of its own
pub struct Model {
    /// Number; a webhook gets its rows in this order.
    #[sea_orm(primary_key)]
    pub id: i32,
    /// The webhook.
    pub webhook: String,
    /// What happened, once for each webhook: `alert.raised alert-…`.
    pub event_key: String,
    /// The event: `alert`, `job.completed`, …
    pub kind: String,
    /// The body as it is signed and sent.
    pub body: String,
    /// `pending`, `delivered` or `failed`.
    pub state: String,
    /// Calls made.
    pub attempt: i32,
    /// Not called before.
    pub next_at: i64,
    /// When the event was noted.
    pub created_at: i64,
    /// When it was delivered or given up.
    pub finished_at: Option<i64>,
    /// How the last call ended.
    pub outcome: Option<String>,
}

/// No relations: joins are written where they are needed.
#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}

//! What was wrong, and since when; what is over stays as history.

use sea_orm::entity::prelude::*;

/// One row. Times are milliseconds since 1970 UTC.
#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "alerts")]
#[allow(missing_docs)] // the derive makes items of its own
pub struct Model {
    /// `alert-…`.
    #[sea_orm(primary_key, auto_increment = false)]
    pub id: String,
    /// A word of `alerts::rules::Rule`.
    pub rule: String,
    /// What it is about: `agent kvm-1`, `connection lab`.
    pub resource: String,
    /// `info`, `warning` or `critical`.
    pub severity: String,
    /// What is wrong, as it was when it was raised.
    pub message: String,
    /// `active` or `resolved`.
    pub state: String,
    /// Rule and resource while it is active, unique; nothing once it is over.
    pub open_key: Option<String>,
    /// Rule, resource and message, folded, for searching.
    pub search: String,
    /// When it was raised.
    pub since: i64,
    /// When it was over.
    pub resolved_at: Option<i64>,
}

/// No relations: joins are written where they are needed.
#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}

//! Who did what; a row stands before the act and is completed after it.

use sea_orm::entity::prelude::*;

/// One row.
#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "audit")]
#[allow(missing_docs)] // the derive makes items of its own
pub struct Model {
    /// Number of the row.
    #[sea_orm(primary_key)]
    pub id: i32,
    /// When.
    pub time: i64,
    /// Who.
    pub caller: String,
    /// What: `user.create`, `provider.connect`, …
    pub action: String,
    /// To whom or what.
    pub target: String,
    /// `ok` or the error; empty while it runs or when a crash came between.
    pub outcome: Option<String>,
    /// When it ended.
    pub finished_at: Option<i64>,
}

/// No relations: joins are written where they are needed.
#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}

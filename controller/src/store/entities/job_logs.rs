//! A row of `job_logs`: one line of a job's log.
//!
//! Owns: the columns. Never: interprets them. A crash here costs nothing.

use sea_orm::entity::prelude::*;

/// One line; `seq` counts from 1 within a job.
#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "job_logs")]
#[allow(missing_docs)] // the derive makes items of its own
pub struct Model {
    /// The job.
    #[sea_orm(primary_key, auto_increment = false)]
    pub job: String,
    /// Position in the job's log.
    #[sea_orm(primary_key, auto_increment = false)]
    pub seq: i64,
    /// Milliseconds since 1970 UTC.
    pub time: i64,
    /// `info`, `warn` or `error`.
    pub level: String,
    /// The public stage it belongs to.
    pub stage: String,
    /// The text.
    pub message: String,
}

/// No relations are followed by the ORM.
#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}

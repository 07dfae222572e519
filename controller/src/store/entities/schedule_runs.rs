//! Runs of schedules: one row for each due time, unique by (schedule, due_at).

use sea_orm::entity::prelude::*;

/// One row.
#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "schedule_runs")]
#[allow(missing_docs)] // the derive makes items of its own
pub struct Model {
    /// `run-…`.
    #[sea_orm(primary_key, auto_increment = false)]
    pub id: String,
    /// Its schedule.
    pub schedule: String,
    /// When it was due; of a run by hand: when it was asked for.
    pub due_at: i64,
    /// `cron`, `catch_up` or `manual`.
    pub cause: String,
    /// `pending`, `claimed`, `started`, `skipped` or `failed`.
    pub status: String,
    /// The controller that makes its job.
    pub claimed_by: Option<String>,
    /// How many due times it stands for that nobody was there for.
    pub missed: i64,
    /// The job it made.
    pub job: Option<String>,
    /// Why it waits, was skipped or failed.
    pub reason: Option<String>,
    /// When the row was made.
    pub created_at: i64,
    /// When its job was made.
    pub started_at: Option<i64>,
}

/// No relations: joins are written where they are needed.
#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}

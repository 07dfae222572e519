//! Schedules: when a job is made again and again, and how.

use sea_orm::entity::prelude::*;

/// One row.
#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "schedules")]
#[allow(missing_docs)] // the derive makes items of its own
pub struct Model {
    /// `sched-…`.
    #[sea_orm(primary_key, auto_increment = false)]
    pub id: String,
    /// What people call it.
    pub name: String,
    /// Name and id, lower case, for searching.
    pub folded: String,
    /// The expression as it was given.
    pub cron: String,
    /// IANA name of its time zone.
    pub timezone: String,
    /// The body of `POST /jobs`, JSON.
    pub job: String,
    /// Name of the job's connection when the schedule was checked, or empty.
    pub provider: String,
    /// Kind of that connection, or empty.
    pub provider_kind: String,
    /// Whether its times count.
    pub enabled: bool,
    /// A word of `schedules::plan::Overlap`.
    pub overlap: String,
    /// A word of `schedules::plan::CatchUp`.
    pub catch_up: String,
    /// Its jobs wait for clean power.
    pub carbon_aware: bool,
    /// The first due time that has no row yet; none while it is switched off or nothing comes any more.
    pub next_run: Option<i64>,
    /// Due time of the newest run that is settled.
    pub last_run: Option<i64>,
    /// What came of it.
    pub last_status: Option<String>,
    /// Its job.
    pub last_job: Option<String>,
    /// Raised by each change of its times or by a person; compared before each.
    pub version: i64,
    /// Raised by each claim: the row that two controllers lock.
    pub turn: i64,
    /// Who made it; its jobs are theirs.
    pub created_by: String,
    /// When it was made.
    pub created_at: i64,
    /// When a person changed it last.
    pub updated_at: i64,
}

/// No relations: joins are written where they are needed.
#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}

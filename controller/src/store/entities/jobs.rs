//! A row of `jobs`: the durable state of a job, what it is asked to do, and what came of it.
//!
//! Owns: the columns. Never: interprets them (`jobs::store` does). A crash here costs nothing.

use sea_orm::entity::prelude::*;

/// One job. Times are milliseconds since 1970 UTC, byte counts are bytes of data extents.
#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "jobs")]
#[allow(missing_docs)] // the derive makes items of its own
pub struct Model {
    /// `job-…`.
    #[sea_orm(primary_key, auto_increment = false)]
    pub id: String,
    /// The job's type: a word of `shared::options::JobType`.
    pub kind: String,
    /// A word of `shared::job::Status`.
    pub status: String,
    /// A word of `shared::job::Hold`.
    pub hold: String,
    /// A word of `shared::job::Stage`.
    pub stage: String,
    /// Number of the current assignment.
    pub epoch: i64,
    /// Attempts begun.
    pub attempt: i64,
    /// Attempts in a row that brought nothing.
    pub strikes: i64,
    /// Id of the agent it is or was with.
    pub agent: Option<String>,
    /// Safe bytes at the last loss.
    pub mark: i64,
    /// Name of the connection.
    pub provider: String,
    /// Kind of the connection.
    pub provider_kind: String,
    /// Folder of the connection on its agent's host, where it has one.
    pub provider_path: String,
    /// Id of the agent that serves the connection: only it can run the job.
    pub owner: String,
    /// The provider's id of the VM.
    pub vm_id: String,
    /// The VM's name.
    pub vm_name: String,
    /// Name and id, lower case, for searching.
    pub vm_folded: String,
    /// Path of the source where the job names no VM; else empty.
    pub source: String,
    /// Capacity of all disks when the job was made.
    pub capacity: i64,
    /// A word of `shared::options::Format`.
    pub format: String,
    /// `shared::options::Options` as JSON.
    pub options: String,
    /// 0–100, higher first.
    pub priority: i64,
    /// Counter: data of all disks.
    pub data: i64,
    /// Counter: read in the last attempt.
    pub read: i64,
    /// Counter: safe on the output.
    pub durable: i64,
    /// Counter: read back and compared.
    pub verified: i64,
    /// Counter: what the last attempt found done.
    pub resumed: i64,
    /// Estimated seconds, from measured rates at the time it was made.
    pub estimate: Option<i64>,
    /// Why it failed.
    pub error: Option<String>,
    /// The stable word for why it failed.
    pub error_code: Option<String>,
    /// What came of it, as JSON from the agent.
    pub result: Option<String>,
    /// Who made it.
    pub created_by: String,
    /// The batch that it was made in.
    pub batch: Option<String>,
    /// Jobs of that batch that may run at once; absent: any number.
    pub batch_limit: Option<i64>,
    /// When it was made.
    pub created_at: i64,
    /// When its state last changed.
    pub updated_at: i64,
    /// When its first attempt began.
    pub started_at: Option<i64>,
    /// When it ended.
    pub finished_at: Option<i64>,
    /// Until when it waits for its time or for the grid.
    pub hold_until: Option<i64>,
    /// By when it should be done.
    pub deadline: Option<i64>,
    /// Whether that time has passed and was told.
    pub deadline_missed: bool,
    /// `jobs::footprint::Footprint` as JSON, of a carbon-aware job.
    pub carbon: Option<String>,
}

/// No relations are followed by the ORM.
#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}

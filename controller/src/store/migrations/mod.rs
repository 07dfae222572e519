//! The tables' history: each migration runs once, in this order, on SQLite and Postgres alike.
//!
//! Owns: the list. Never: changes a migration that was released. A crash in one costs nothing: on the next start it runs again
//! (every statement says `IF NOT EXISTS`).

pub mod m0001_access;
pub mod m0002_jobs;
pub mod m0003_inventory;
pub mod m0005_holds;
pub mod m0007_alerts;
pub mod m0008_schedules;
pub mod m0011_api_tokens;
pub mod m0012_job_lists;
pub mod m0020_uploads;
pub mod m0040_batches;
pub mod m0050_accounts;

use sea_orm_migration::prelude::*;

/// Every migration.
pub struct Migrator;

#[async_trait::async_trait]
impl MigratorTrait for Migrator {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        vec![
            Box::new(m0001_access::Migration),
            Box::new(m0002_jobs::Migration),
            Box::new(m0003_inventory::Migration),
            Box::new(m0005_holds::Migration),
            Box::new(m0008_schedules::Migration),
            Box::new(m0011_api_tokens::Migration),
            Box::new(m0012_job_lists::Migration),
            Box::new(m0040_batches::Migration),
            Box::new(m0020_uploads::Migration),
            Box::new(m0007_alerts::Migration),
            Box::new(m0050_accounts::Migration),
        ]
    }
}

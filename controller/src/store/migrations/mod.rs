//! The tables' history: each migration runs once, in this order, on SQLite and Postgres alike.
//!
//! Owns: the list. Never: changes a migration that was released. A crash in one costs nothing: on the next start it runs again
//! (every statement says `IF NOT EXISTS`).

pub mod m0001_access;
pub mod m0002_jobs;
pub mod m0003_inventory;
pub mod m0020_uploads;

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
            Box::new(m0020_uploads::Migration),
        ]
    }
}

//! Columns of `jobs` for `POST /jobs/batch`: which batch a job belongs to, and how many of it may run at once.

use sea_orm_migration::prelude::*;
use sea_orm_migration::schema::{big_integer_null, text_null};

/// Adds them.
#[derive(DeriveMigrationName)]
pub struct Migration;

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        // SQLite adds one column at a time and knows no IF NOT EXISTS here.
        for (name, column) in [("batch", text_null("batch")), ("batch_limit", big_integer_null("batch_limit"))] {
            if !manager.has_column("jobs", name).await? {
                manager.alter_table(Table::alter().table("jobs").add_column(column).take()).await?;
            }
        }
        Ok(())
    }
}

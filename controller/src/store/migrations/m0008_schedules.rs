//! Tables of the schedules: `schedules`, and `schedule_runs` with one row for each due time. Times are milliseconds since 1970, UTC.
//!
//! Owns: their columns and indexes; the unique key (schedule, due_at) is what makes one run of one due time.
//! Never: changes a row. A crash here leaves a half-made schema that the next start completes.

use sea_orm_migration::prelude::*;
use sea_orm_migration::schema::{big_integer, big_integer_null, boolean, string, string_null, text, text_null};

/// Makes them.
#[derive(DeriveMigrationName)]
pub struct Migration;

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let schedules = Table::create()
            .table("schedules")
            .if_not_exists()
            .col(string("id").primary_key())
            .col(text("name"))
            .col(text("folded"))
            .col(text("cron"))
            .col(text("timezone"))
            .col(text("job"))
            .col(text("provider"))
            .col(text("provider_kind"))
            .col(boolean("enabled"))
            .col(string("overlap"))
            .col(string("catch_up"))
            .col(boolean("carbon_aware"))
            .col(big_integer_null("next_run"))
            .col(big_integer_null("last_run"))
            .col(string_null("last_status"))
            .col(string_null("last_job"))
            .col(big_integer("version"))
            .col(big_integer("turn"))
            .col(text("created_by"))
            .col(big_integer("created_at"))
            .col(big_integer("updated_at"))
            .take();
        manager.create_table(schedules).await?;
        let runs = Table::create()
            .table("schedule_runs")
            .if_not_exists()
            .col(string("id").primary_key())
            .col(string("schedule"))
            .col(big_integer("due_at"))
            .col(string("cause"))
            .col(string("status"))
            .col(string_null("claimed_by"))
            .col(big_integer("missed"))
            .col(string_null("job"))
            .col(text_null("reason"))
            .col(big_integer("created_at"))
            .col(big_integer_null("started_at"))
            .foreign_key(ForeignKey::create().from("schedule_runs", "schedule").to("schedules", "id").on_delete(ForeignKeyAction::Cascade))
            .take();
        manager.create_table(runs).await?;
        let indexes = [
            Index::create().name("schedules_by_next").table("schedules").col("next_run").if_not_exists().take(),
            Index::create()
                .name("schedule_runs_by_due")
                .table("schedule_runs")
                .col("schedule")
                .col("due_at")
                .unique()
                .if_not_exists()
                .take(),
            Index::create().name("schedule_runs_by_status").table("schedule_runs").col("status").col("due_at").if_not_exists().take(),
        ];
        for index in indexes {
            manager.create_index(index).await?;
        }
        Ok(())
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for table in ["schedule_runs", "schedules"] {
            manager.drop_table(Table::drop().table(table).if_exists().take()).await?;
        }
        Ok(())
    }
}

//! Tables of the jobs and the fleet: `jobs`, `job_logs`, `agents`, `join_tokens`.
//!
//! Owns: their columns and indexes. Never: changes a row. A crash here leaves a half-made schema that the next start completes
//! (`IF NOT EXISTS` everywhere).
//!
//! Times are milliseconds since 1970 in UTC (`i64`), so that both databases sort and compare them alike. Words are those of
//! `shared::job`. `*_folded` columns are lower case, for searching.

use sea_orm_migration::prelude::*;

/// The migration.
#[derive(DeriveMigrationName)]
pub struct Migration;

fn text(name: &'static str) -> ColumnDef {
    ColumnDef::new(name).text().not_null().take()
}

fn text_null(name: &'static str) -> ColumnDef {
    ColumnDef::new(name).text().null().take()
}

fn big(name: &'static str) -> ColumnDef {
    ColumnDef::new(name).big_integer().not_null().take()
}

fn big_null(name: &'static str) -> ColumnDef {
    ColumnDef::new(name).big_integer().null().take()
}

fn flag(name: &'static str) -> ColumnDef {
    ColumnDef::new(name).boolean().not_null().default(false).take()
}

fn jobs() -> TableCreateStatement {
    Table::create()
        .table("jobs")
        .if_not_exists()
        .col(ColumnDef::new("id").text().not_null().primary_key())
        .col(text("kind"))
        .col(text("status"))
        .col(text("hold"))
        .col(text("stage"))
        .col(big("epoch"))
        .col(big("attempt"))
        .col(big("strikes"))
        .col(text_null("agent"))
        .col(big("mark"))
        .col(text("provider"))
        .col(text("provider_kind"))
        .col(text("provider_path"))
        .col(text("owner"))
        .col(text("vm_id"))
        .col(text("vm_name"))
        .col(text("vm_folded"))
        .col(text("source"))
        .col(big("capacity"))
        .col(text("format"))
        .col(text("options"))
        .col(big("priority"))
        .col(big("data"))
        .col(big("read"))
        .col(big("durable"))
        .col(big("verified"))
        .col(big("resumed"))
        .col(big_null("estimate"))
        .col(text_null("error"))
        .col(text_null("error_code"))
        .col(text_null("result"))
        .col(text("created_by"))
        .col(big("created_at"))
        .col(big("updated_at"))
        .col(big_null("started_at"))
        .col(big_null("finished_at"))
        .take()
}

fn job_logs() -> TableCreateStatement {
    Table::create()
        .table("job_logs")
        .if_not_exists()
        .col(text("job"))
        .col(big("seq"))
        .col(big("time"))
        .col(text("level"))
        .col(text("stage"))
        .col(text("message"))
        .primary_key(Index::create().col("job").col("seq"))
        .foreign_key(ForeignKey::create().from("job_logs", "job").to("jobs", "id").on_delete(ForeignKeyAction::Cascade))
        .take()
}

fn agents() -> TableCreateStatement {
    Table::create()
        .table("agents")
        .if_not_exists()
        .col(ColumnDef::new("id").text().not_null().primary_key())
        .col(ColumnDef::new("name").text().not_null().unique_key())
        .col(text("key_sha256"))
        .col(text("signing_key"))
        .col(text("version"))
        .col(text("instance"))
        .col(text("hostname"))
        .col(big("cpus"))
        .col(text("roots"))
        .col(text("formats"))
        .col(text("rates"))
        .col(flag("revoked"))
        .col(flag("draining"))
        .col(big("enrolled_at"))
        .col(big_null("last_seen"))
        .take()
}

fn join_tokens() -> TableCreateStatement {
    Table::create()
        .table("join_tokens")
        .if_not_exists()
        .col(ColumnDef::new("hash").text().not_null().primary_key())
        .col(text_null("name"))
        .col(text("created_by"))
        .col(big("created_at"))
        .col(big("expires_at"))
        .col(big_null("used_at"))
        .take()
}

fn indexes() -> [IndexCreateStatement; 3] {
    [
        Index::create().name("jobs_by_status").table("jobs").col("status").col("created_at").if_not_exists().take(),
        Index::create().name("jobs_by_created").table("jobs").col("created_at").col("id").if_not_exists().take(),
        Index::create().name("agents_by_key").table("agents").col("key_sha256").if_not_exists().take(),
    ]
}

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for table in [jobs(), job_logs(), agents(), join_tokens()] {
            manager.create_table(table).await?;
        }
        for index in indexes() {
            manager.create_index(index).await?;
        }
        Ok(())
    }
}

//! Tables of the alerts and webhooks: `alerts`, `webhooks`, `webhook_deliveries`; and the index by which finished jobs are found.
//!
//! Owns: their columns and indexes. Never: changes a row. A crash here leaves a half-made schema that the next start completes
//! (`IF NOT EXISTS` everywhere). Times are milliseconds since 1970, UTC.

use sea_orm_migration::prelude::*;
use sea_orm_migration::schema::{big_integer, big_integer_null, integer, integer_null, pk_auto, string, string_null, text, text_null};

/// Makes them.
#[derive(DeriveMigrationName)]
pub struct Migration;

fn alerts() -> TableCreateStatement {
    Table::create()
        .table("alerts")
        .if_not_exists()
        .col(string("id").primary_key())
        .col(string("rule"))
        .col(text("resource"))
        .col(string("severity"))
        .col(text("message"))
        .col(string("state"))
        .col(text_null("open_key"))
        .col(text("search"))
        .col(big_integer("since"))
        .col(big_integer_null("resolved_at"))
        .take()
}

fn webhooks() -> TableCreateStatement {
    Table::create()
        .table("webhooks")
        .if_not_exists()
        .col(string("id").primary_key())
        .col(text("url"))
        .col(text("events"))
        .col(text("secret"))
        .col(string("created_by"))
        .col(big_integer("created_at"))
        .col(big_integer_null("last_at"))
        .col(integer_null("last_status"))
        .col(integer_null("last_ms"))
        .col(text_null("last_error"))
        .take()
}

fn deliveries() -> TableCreateStatement {
    Table::create()
        .table("webhook_deliveries")
        .if_not_exists()
        .col(pk_auto("id"))
        .col(string("webhook"))
        .col(string("event_key"))
        .col(string("kind"))
        .col(text("body"))
        .col(string("state"))
        .col(integer("attempt"))
        .col(big_integer("next_at"))
        .col(big_integer("created_at"))
        .col(big_integer_null("finished_at"))
        .col(string_null("outcome"))
        .take()
}

fn indexes() -> [IndexCreateStatement; 6] {
    [
        // One open alert for a rule and a resource; resolved ones have no key.
        Index::create().name("alerts_open").table("alerts").col("open_key").unique().if_not_exists().take(),
        Index::create().name("alerts_by_state").table("alerts").col("state").col("since").if_not_exists().take(),
        Index::create().name("deliveries_once").table("webhook_deliveries").col("webhook").col("event_key").unique().if_not_exists().take(),
        Index::create()
            .name("deliveries_by_state")
            .table("webhook_deliveries")
            .col("state")
            .col("webhook")
            .col("id")
            .if_not_exists()
            .take(),
        Index::create().name("deliveries_by_end").table("webhook_deliveries").col("finished_at").if_not_exists().take(),
        Index::create().name("jobs_by_finished").table("jobs").col("finished_at").if_not_exists().take(),
    ]
}

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for table in [alerts(), webhooks(), deliveries()] {
            manager.create_table(table).await?;
        }
        for index in indexes() {
            manager.create_index(index).await?;
        }
        Ok(())
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager.drop_index(Index::drop().name("jobs_by_finished").table("jobs").if_exists().to_owned()).await?;
        for table in ["webhook_deliveries", "webhooks", "alerts"] {
            manager.drop_table(Table::drop().table(table).if_exists().take()).await?;
        }
        Ok(())
    }
}

//! Tables of the inventory: connections and the VMs seen through them. Times are milliseconds since 1970, UTC.

use sea_orm_migration::prelude::*;
use sea_orm_migration::schema::{big_integer, big_integer_null, string, text, text_null};

/// Makes them.
#[derive(DeriveMigrationName)]
pub struct Migration;

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let connections = Table::create()
            .table("connections")
            .if_not_exists()
            .col(string("name").primary_key())
            .col(string("kind"))
            .col(string("agent_id"))
            .col(text("path"))
            .col(string("origin"))
            .col(string("status"))
            .col(text_null("last_error"))
            .col(big_integer_null("last_seen"))
            .col(big_integer("created_at"))
            .col(big_integer("updated_at"))
            .take();
        manager.create_table(connections).await?;
        let by_agent = Index::create().name("connections_by_agent").table("connections").col("agent_id").if_not_exists().take();
        manager.create_index(by_agent).await?;
        let vms = Table::create()
            .table("vms")
            .if_not_exists()
            .col(string("connection"))
            .col(text("id"))
            .col(text("name"))
            .col(text("path"))
            .col(string("kind"))
            .col(string("os"))
            .col(string("status"))
            .col(big_integer("cpu"))
            .col(big_integer("memory_mb"))
            .col(text("search"))
            .col(text("detail"))
            .col(big_integer("last_seen"))
            .primary_key(Index::create().col("connection").col("id"))
            .take();
        manager.create_table(vms).await?;
        for (name, column) in [("vms_by_name", "name"), ("vms_by_kind", "kind")] {
            let index = Index::create().name(name).table("vms").col(column).col("id").if_not_exists().take();
            manager.create_index(index).await?;
        }
        Ok(())
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for table in ["vms", "connections"] {
            manager.drop_table(Table::drop().table(table).if_exists().take()).await?;
        }
        Ok(())
    }
}

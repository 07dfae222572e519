//! Columns of `connections` for hypervisors that want a log-in: what may be shown of the account, and the sealed password.

use sea_orm_migration::prelude::*;
use sea_orm_migration::schema::text_null;

/// Adds them.
#[derive(DeriveMigrationName)]
pub struct Migration;

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        // SQLite adds one column at a time and knows no IF NOT EXISTS here.
        for name in ["settings", "secret"] {
            if !manager.has_column("connections", name).await? {
                manager.alter_table(Table::alter().table("connections").add_column(text_null(name)).take()).await?;
            }
        }
        Ok(())
    }
}

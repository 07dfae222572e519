//! Columns of `jobs` for waiting: until when, by when, and what the grid costs. Times are milliseconds since 1970, UTC.

use sea_orm_migration::prelude::*;

/// Makes them.
#[derive(DeriveMigrationName)]
pub struct Migration;

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let columns = [
            ColumnDef::new("hold_until").big_integer().null().take(),
            ColumnDef::new("deadline").big_integer().null().take(),
            ColumnDef::new("deadline_missed").boolean().not_null().default(false).take(),
            ColumnDef::new("carbon").text().null().take(),
        ];
        for column in columns {
            let name = column.get_column_name();
            // SQLite knows no `ADD COLUMN IF NOT EXISTS`, and adds one column in a statement.
            if !manager.has_column("jobs", &name).await? {
                manager.alter_table(Table::alter().table("jobs").add_column(column).take()).await?;
            }
        }
        Ok(())
    }
}

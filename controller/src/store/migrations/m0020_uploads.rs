//! Tables of the uploads: what is being sent, and which chunks of it are on the disk. Times are milliseconds since 1970, UTC.

use sea_orm_migration::prelude::*;
use sea_orm_migration::schema::{big_integer, big_integer_null, string, text, text_null};

/// Makes them.
#[derive(DeriveMigrationName)]
pub struct Migration;

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let uploads = Table::create()
            .table("uploads")
            .if_not_exists()
            .col(string("id").primary_key())
            .col(text("filename"))
            .col(big_integer("size"))
            .col(text_null("expected"))
            .col(text_null("sha256"))
            .col(string("status"))
            .col(text("created_by"))
            .col(big_integer("created_at"))
            .col(big_integer("expires_at"))
            .col(big_integer_null("finished_at"))
            .take();
        manager.create_table(uploads).await?;
        let by_expiry = Index::create().name("uploads_by_expiry").table("uploads").col("status").col("expires_at").if_not_exists().take();
        manager.create_index(by_expiry).await?;
        let chunks = Table::create()
            .table("upload_chunks")
            .if_not_exists()
            .col(string("upload"))
            .col(big_integer("number"))
            .col(string("sha256"))
            .primary_key(Index::create().col("upload").col("number"))
            .take();
        manager.create_table(chunks).await
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for table in ["upload_chunks", "uploads"] {
            manager.drop_table(Table::drop().table(table).if_exists().take()).await?;
        }
        Ok(())
    }
}

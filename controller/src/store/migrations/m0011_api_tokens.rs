//! The table `api_tokens`: tokens for programs, by their SHA-256. Times are milliseconds since 1970, UTC.

use sea_orm_migration::prelude::*;
use sea_orm_migration::schema::{big_integer, big_integer_null, string, text};

/// Makes it.
#[derive(DeriveMigrationName)]
pub struct Migration;

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let tokens = Table::create()
            .table("api_tokens")
            .if_not_exists()
            .col(string("id").primary_key())
            .col(string("user_name"))
            .col(text("name"))
            .col(string("role"))
            .col(string("hash").unique_key())
            .col(big_integer("created_at"))
            .col(big_integer_null("expires_at"))
            .col(big_integer_null("last_used_at"))
            .take();
        manager.create_table(tokens).await?;
        let by_user =
            Index::create().name("api_tokens_by_user").table("api_tokens").col("user_name").col("name").unique().if_not_exists().take();
        manager.create_index(by_user).await
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager.drop_table(Table::drop().table("api_tokens").if_exists().take()).await
    }
}

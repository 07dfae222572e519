//! Tables of the access room: users, sessions, settings, idempotency keys, audit. Times are milliseconds since 1970, UTC.

use sea_orm_migration::prelude::*;
use sea_orm_migration::schema::{big_integer, big_integer_null, integer, pk_auto, string, text, text_null};

/// Makes them.
#[derive(DeriveMigrationName)]
pub struct Migration;

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let users = Table::create()
            .table("users")
            .if_not_exists()
            .col(string("name").primary_key())
            .col(text("password_hash"))
            .col(string("role"))
            .col(big_integer("created_at"))
            .col(big_integer("updated_at"))
            .take();
        manager.create_table(users).await?;
        let sessions = Table::create()
            .table("sessions")
            .if_not_exists()
            .col(string("jti").primary_key())
            .col(string("user_name"))
            .col(big_integer("created_at"))
            .col(big_integer("expires_at"))
            .take();
        manager.create_table(sessions).await?;
        let by_user = Index::create().name("sessions_by_user").table("sessions").col("user_name").if_not_exists().take();
        manager.create_index(by_user).await?;
        let settings = Table::create()
            .table("settings")
            .if_not_exists()
            .col(string("name").primary_key())
            .col(text("value"))
            .col(big_integer("updated_at"))
            .take();
        manager.create_table(settings).await?;
        let idempotency = Table::create()
            .table("idempotency")
            .if_not_exists()
            .col(string("id").primary_key())
            .col(string("digest"))
            .col(integer("status"))
            .col(text("location"))
            .col(text("body"))
            .col(big_integer("created_at"))
            .take();
        manager.create_table(idempotency).await?;
        let audit = Table::create()
            .table("audit")
            .if_not_exists()
            .col(pk_auto("id"))
            .col(big_integer("time"))
            .col(string("caller"))
            .col(string("action"))
            .col(text("target"))
            .col(text_null("outcome"))
            .col(big_integer_null("finished_at"))
            .take();
        manager.create_table(audit).await
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for table in ["audit", "idempotency", "settings", "sessions", "users"] {
            manager.drop_table(Table::drop().table(table).if_exists().take()).await?;
        }
        Ok(())
    }
}

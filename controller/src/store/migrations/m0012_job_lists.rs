//! What lists of 100,000 jobs stand on: indexes for the filters and sorts of `GET /jobs`, and an index of every three characters in a
//! row of names and ids for `search`.
//!
//! SQLite: the FTS5 table `jobs_search` with the trigram tokenizer, kept by triggers. It keeps ids and not row numbers, which a VACUUM
//! may change. Postgres: a GIN index by pg_trgm; where the extension may not be made, `search` reads all rows, and the log says so.

use sea_orm_migration::prelude::*;
use sea_orm_migration::sea_orm::DbBackend;

/// Makes them.
#[derive(DeriveMigrationName)]
pub struct Migration;

/// Name and columns. `NAME` stands for the beginning of name and id, which is what a sort by name goes by: the whole could be longer
/// than Postgres takes into an index.
const INDEXES: [(&str, &str); 10] = [
    ("jobs_list_status", "status, created_at, id"),
    ("jobs_list_status_updated", "status, updated_at, id"),
    ("jobs_list_kind", "provider_kind, created_at, id"),
    ("jobs_list_kind_status", "provider_kind, status, created_at, id"),
    ("jobs_list_provider", "provider, provider_kind, created_at, id"),
    ("jobs_list_provider_status", "provider, provider_kind, status, created_at, id"),
    ("jobs_list_updated", "updated_at, id"),
    ("jobs_list_priority", "priority, id"),
    ("jobs_list_name", "NAME, id"),
    ("jobs_list_type", "kind, created_at, id"),
];

const SEARCH_SQLITE: [&str; 5] = [
    "CREATE VIRTUAL TABLE IF NOT EXISTS jobs_search USING fts5(id UNINDEXED, text, tokenize = 'trigram')",
    "INSERT INTO jobs_search (id, text) SELECT id, vm_folded FROM jobs WHERE NOT EXISTS (SELECT 1 FROM jobs_search)",
    "CREATE TRIGGER IF NOT EXISTS jobs_search_insert AFTER INSERT ON jobs BEGIN
        INSERT INTO jobs_search (id, text) VALUES (new.id, new.vm_folded);
    END",
    "CREATE TRIGGER IF NOT EXISTS jobs_search_delete AFTER DELETE ON jobs BEGIN
        DELETE FROM jobs_search WHERE rowid IN (SELECT rowid FROM jobs_search WHERE jobs_search MATCH ('\"' || old.id || '\"') AND id = old.id);
    END",
    "CREATE TRIGGER IF NOT EXISTS jobs_search_update AFTER UPDATE OF vm_folded ON jobs WHEN old.vm_folded <> new.vm_folded BEGIN
        DELETE FROM jobs_search WHERE rowid IN (SELECT rowid FROM jobs_search WHERE jobs_search MATCH ('\"' || old.id || '\"') AND id = old.id);
        INSERT INTO jobs_search (id, text) VALUES (new.id, new.vm_folded);
    END",
];

/// A block of its own, so that a refusal does not take the migration along.
const SEARCH_POSTGRES: &str = "DO $$ BEGIN
    CREATE EXTENSION IF NOT EXISTS pg_trgm;
    CREATE INDEX IF NOT EXISTS jobs_search ON jobs USING gin (vm_folded gin_trgm_ops);
EXCEPTION WHEN OTHERS THEN
    RAISE WARNING 'search by pg_trgm is not available: %', SQLERRM;
END $$";

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let db = manager.get_connection();
        let is_postgres = db.get_database_backend() == DbBackend::Postgres;
        let name = if is_postgres { "(substr(vm_folded, 1, 200) COLLATE \"C\")" } else { "substr(vm_folded, 1, 200)" };
        for (index, columns) in INDEXES {
            let columns = columns.replace("NAME", name);
            db.execute_unprepared(&format!("CREATE INDEX IF NOT EXISTS {index} ON jobs ({columns})")).await?;
        }
        // What it did, `jobs_list_status` does as well.
        db.execute_unprepared("DROP INDEX IF EXISTS jobs_by_status").await?;
        if !is_postgres {
            for statement in SEARCH_SQLITE {
                db.execute_unprepared(statement).await?;
            }
            return Ok(());
        }
        db.execute_unprepared(SEARCH_POSTGRES).await?;
        let made = sea_orm_migration::sea_orm::Statement::from_string(
            DbBackend::Postgres,
            "SELECT to_regclass('jobs_search') IS NOT NULL AS made",
        );
        let is_made = match db.query_one_raw(made).await? {
            Some(row) => row.try_get::<bool>("", "made")?,
            None => false,
        };
        if !is_made {
            tracing::warn!(
                "this Postgres user may not make the extension pg_trgm: `search` in GET /jobs reads every row. As a superuser: \
                 CREATE EXTENSION pg_trgm; CREATE INDEX jobs_search ON jobs USING gin (vm_folded gin_trgm_ops)"
            );
        }
        Ok(())
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let db = manager.get_connection();
        if db.get_database_backend() == DbBackend::Sqlite {
            for trigger in ["jobs_search_insert", "jobs_search_delete", "jobs_search_update"] {
                db.execute_unprepared(&format!("DROP TRIGGER IF EXISTS {trigger}")).await?;
            }
            db.execute_unprepared("DROP TABLE IF EXISTS jobs_search").await?;
        } else {
            db.execute_unprepared("DROP INDEX IF EXISTS jobs_search").await?;
        }
        for (index, _) in INDEXES {
            db.execute_unprepared(&format!("DROP INDEX IF EXISTS {index}")).await?;
        }
        db.execute_unprepared("CREATE INDEX IF NOT EXISTS jobs_by_status ON jobs (status, created_at)").await.map(drop)
    }
}

//! A backup, of a stopped installation or of one that runs.
//!
//! Owns: what goes in. Never: writes to the database; all tables are read in one snapshot. A crash here leaves no backup.

use std::path::Path;

use base64::Engine;
use base64::prelude::BASE64_STANDARD as BASE64;
use futures_util::StreamExt;
use sea_orm::{AccessMode, DatabaseConnection, DbBackend, IsolationLevel, Statement, StreamTrait, TransactionTrait};
use shared::vault;

use super::archive::{FORMAT, Head, Line, Writer};
use super::{Error, FILES, data_dir, io, tables};
use crate::config::Config;
use crate::store::{self, Store};

/// What was written.
pub struct Made {
    /// Rows of all tables.
    pub rows: u64,
    /// Tables.
    pub tables: usize,
    /// Files of the data directory.
    pub files: usize,
}

/// Writes a backup to a file that must not exist.
pub async fn make(config: &Config, path: &Path, runtime: tokio::runtime::Handle) -> Result<Made, Error> {
    let data = data_dir(config)?;
    let store = Store::attach(config.database().expose(), runtime).await?;
    let mut writer = Writer::create(path)?;
    let head = Head {
        format: FORMAT,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        made_at: shared::clock::rfc3339(shared::clock::now()),
        migrations: store::migrations(),
    };
    writer.say(&Line::Backup(head))?;
    let mut files = 0;
    for name in FILES {
        let configured = config.sealing_key.as_ref().filter(|_| name == "sealing.key").map(|key| key.expose().as_bytes().to_vec());
        let bytes = match configured {
            Some(key) => Some(key),
            None => vault::read_optional(&data, name).map_err(io(name))?,
        };
        if let Some(bytes) = bytes {
            writer.say(&Line::File { name: name.to_owned(), base64: BASE64.encode(bytes) })?;
            files += 1;
        }
    }
    let work = move |db: DatabaseConnection| async move { Ok(dump(&db, writer).await) };
    let (rows, tables, writer) = store.read(work).await??;
    writer.finish()?;
    store.close().await?;
    Ok(Made { rows, tables, files })
}

async fn dump(db: &DatabaseConnection, mut writer: Writer) -> Result<(u64, usize, Writer), Error> {
    // SQLite's transaction sees one state from its first read on, whoever writes meanwhile.
    let snapshot = match db.get_database_backend() {
        DbBackend::Postgres => db.begin_with_config(Some(IsolationLevel::RepeatableRead), Some(AccessMode::ReadOnly)).await?,
        _ => db.begin().await?,
    };
    store::no_time_limit(&snapshot).await?;
    let backend = db.get_database_backend();
    let tables = tables::all(&snapshot).await?;
    let mut rows = 0;
    for table in &tables {
        let columns = table.columns.iter().map(|column| column.name.clone()).collect();
        writer.say(&Line::Table { name: table.name.clone(), columns })?;
        let mut all = snapshot.stream_raw(Statement::from_string(backend, table.rows(backend))).await?;
        while let Some(row) = all.next().await {
            writer.line(&row?.try_get_by_index::<String>(0)?)?;
            rows += 1;
        }
    }
    snapshot.rollback().await?;
    writer.say(&Line::End { rows })?;
    Ok((rows, tables.len(), writer))
}

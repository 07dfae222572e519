//! A restore: all of a backup or nothing.
//!
//! ```text
//! checked ─► files staged as NAME.restored, and restore.pending with a word ─► one transaction that also stores the word ─► files renamed
//! ```
//! Owns: that order. The word tells the next start what a crash left: it is in the database, so the files are put in place; or it is
//! not, so they go. Never: touches the database before the backup's sum was checked, or while a controller
//! runs on this directory or this database (`store::presence`).
//! A crash here costs nothing: [`complete`] finishes or forgets it.

use std::path::Path;

use base64::Engine;
use base64::prelude::BASE64_STANDARD as BASE64;
use sea_orm::sea_query::{Alias, Expr, OnConflict, Query};
use sea_orm::{
    ActiveValue::Set, ConnectionTrait, DatabaseConnection, DatabaseTransaction, DbBackend, EntityTrait, Statement, TransactionTrait,
};
use serde::{Deserialize, Serialize};
use shared::vault::{self, Dir};

use super::archive::{Item, Line, Reader};
use super::tables::{self, Table, quoted};
use super::{Error, FILES, io};
use crate::config::Config;
use crate::store::entities::settings;
use crate::store::{self, Store};

const PENDING: &str = "restore.pending";
/// The setting that holds the word.
const SETTING: &str = "restore";
/// Values of one statement; SQLite takes 32,766.
const VALUES: usize = 10_000;

/// A restore that has begun.
#[derive(Serialize, Deserialize)]
struct Pending {
    word: String,
    files: Vec<String>,
}

/// What was restored.
pub struct Restored {
    /// When the backup was made, RFC 3339.
    pub made_at: String,
    /// Rows of all tables.
    pub rows: u64,
    /// Files of the data directory.
    pub files: usize,
}

fn staged(name: &str) -> String {
    format!("{name}.restored")
}

/// Restores a backup into this installation, which must be stopped, and empty unless `force` is given.
pub async fn run(config: &Config, path: &Path, force: bool, runtime: tokio::runtime::Handle) -> Result<Restored, Error> {
    let mut reader = Reader::open(path)?;
    if reader.head.migrations != store::migrations() {
        let version = &reader.head.version;
        let message = format!("the backup was made by HyperSDK {version} with other tables; restore it with that version, then upgrade");
        return Err(Error::Refused(message));
    }
    let shown = config.data_dir.display().to_string();
    let data = vault::open_data_dir(&config.data_dir).map_err(io(shown.clone()))?;
    vault::make_private(&config.data_dir).map_err(io(shown.clone()))?;
    let _lock = vault::lock(&data, "controller.lock").map_err(io(shown.clone()))?.ok_or_else(|| Error::Running(shown.clone()))?;
    let url = config.database();
    let _alone = store::presence::alone(url.expose(), &runtime).await?.ok_or_else(|| Error::Running("this database".to_owned()))?;
    let store = Store::open(url.expose(), runtime).await?;
    complete(&data, &store).await?;
    let mut files = Vec::new();
    let first = loop {
        match reader.read()? {
            Some(Item::Line(Line::File { name, base64 })) if FILES.contains(&name.as_str()) => {
                let bytes = BASE64.decode(base64).map_err(|e| Error::Refused(format!("the backup's {name} cannot be read: {e}")))?;
                files.push((name, bytes));
            }
            Some(Item::Line(Line::File { name, .. })) => return Err(Error::Refused(format!("the backup holds a strange file: {name}"))),
            item => break item,
        }
    };
    check_key(config, &files)?;
    let is_there = |name: &&str| data.symlink_metadata(name).is_ok();
    if !force && (FILES.iter().any(is_there) || has_rows(&store).await?) {
        let message = format!("the installation in {shown} is not empty; --force replaces all of it by the backup");
        return Err(Error::Refused(message));
    }
    let pending = Pending { word: shared::ids::random_hex::<16>(), files: files.iter().map(|(name, _)| name.clone()).collect() };
    for (name, bytes) in &files {
        vault::write_whole(&data, &staged(name), bytes).map_err(io(name.clone()))?;
    }
    let text = serde_json::to_vec(&pending).map_err(|e| Error::Refused(e.to_string()))?;
    vault::write_whole(&data, PENDING, &text).map_err(io(PENDING))?;
    let (word, made_at) = (pending.word.clone(), reader.head.made_at.clone());
    let work = move |db: DatabaseConnection| async move { Ok(fill(&db, reader, first, &word).await) };
    let filled = store.run(work).await;
    // Whichever way it ended: the database knows.
    complete(&data, &store).await?;
    let rows = filled??;
    store.close().await?;
    Ok(Restored { made_at, rows, files: files.len() })
}

/// Finishes or forgets a restore that a crash cut off. Called before anything reads a key.
pub async fn complete(data: &Dir, store: &Store) -> Result<(), Error> {
    let Some(text) = vault::read_optional(data, PENDING).map_err(io(PENDING))? else { return Ok(()) };
    let wrong = |e: serde_json::Error| Error::Refused(format!("{PENDING} in the data directory cannot be read: {e}"));
    let pending: Pending = serde_json::from_slice(&text).map_err(wrong)?;
    let row = store.read(|db| async move { Ok(settings::Entity::find_by_id(SETTING).one(&db).await?) }).await?;
    let is_done = row.is_some_and(|row| row.value == pending.word);
    for name in pending.files.iter().filter(|name| FILES.contains(&name.as_str())) {
        let moved = if is_done { data.rename(staged(name), data, name) } else { data.remove_file(staged(name)) };
        match moved {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(Error::Io(name.clone(), e)),
            _ => {}
        }
    }
    vault::sync_dir(data).map_err(io(PENDING))?;
    data.remove_file(PENDING).map_err(io(PENDING))?;
    vault::sync_dir(data).map_err(io(PENDING))
}

/// A key in the settings would be used in place of the restored one, and could open nothing.
fn check_key(config: &Config, files: &[(String, Vec<u8>)]) -> Result<(), Error> {
    let kept = files.iter().find(|(name, _)| name == "sealing.key").map(|(_, bytes)| String::from_utf8_lossy(bytes).trim().to_owned());
    match (&config.sealing_key, kept) {
        (Some(key), Some(kept)) if key.expose().trim() != kept => {
            Err(Error::Refused("the settings name another sealing key than the backup's; take it out of the settings first".to_owned()))
        }
        (None, None) => Err(Error::Refused("the backup holds no sealing key".to_owned())),
        _ => Ok(()),
    }
}

async fn has_rows(store: &Store) -> Result<bool, Error> {
    let work = |db: DatabaseConnection| async move { Ok(first_row(&db).await) };
    store.read(work).await?
}

async fn first_row(db: &DatabaseConnection) -> Result<bool, Error> {
    for table in tables::all(db).await? {
        let one = Statement::from_string(db.get_database_backend(), format!("SELECT 1 AS one FROM {} LIMIT 1", quoted(&table.name)));
        if db.query_one_raw(one).await?.is_some() {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Everything in one transaction.
async fn fill(db: &DatabaseConnection, mut reader: Reader, first: Option<Item>, word: &str) -> Result<u64, Error> {
    let transaction = db.begin().await?;
    store::no_time_limit(&transaction).await?;
    let own = tables::all(&transaction).await?;
    for table in own.iter().rev() {
        transaction.execute_unprepared(&format!("DELETE FROM {}", quoted(&table.name))).await?;
    }
    let (mut item, mut into, mut rows, mut all) = (first, None::<Filling>, Vec::new(), 0u64);
    let is_whole = loop {
        match item {
            Some(Item::Row(row)) => {
                let filling = into.as_ref().ok_or_else(|| Error::Refused("the backup holds a row without a table".to_owned()))?;
                rows.push(filling.values(row)?);
                all += 1;
                if rows.len() * filling.columns.len() >= VALUES {
                    filling.insert(&transaction, std::mem::take(&mut rows)).await?;
                }
            }
            Some(Item::Line(line)) => {
                if let Some(filling) = into.take() {
                    filling.insert(&transaction, std::mem::take(&mut rows)).await?;
                }
                match line {
                    Line::Table { name, columns } => into = Some(Filling::of(&own, name, columns)?),
                    Line::End { rows } => break rows == all,
                    _ => return Err(Error::Refused("the backup's lines are out of order".to_owned())),
                }
            }
            None => break false,
        }
        item = reader.read()?;
    };
    if !is_whole {
        return Err(Error::Refused("the backup does not hold as many rows as it says".to_owned()));
    }
    if transaction.get_database_backend() == DbBackend::Postgres {
        count_on(&transaction, &own).await?;
    }
    let row = settings::ActiveModel {
        name: Set(SETTING.to_owned()),
        value: Set(word.to_owned()),
        updated_at: Set(shared::clock::now().timestamp_millis()),
    };
    let replace =
        OnConflict::column(settings::Column::Name).update_columns([settings::Column::Value, settings::Column::UpdatedAt]).to_owned();
    settings::Entity::insert(row).on_conflict(replace).exec_without_returning(&transaction).await?;
    transaction.commit().await?;
    Ok(all)
}

/// The table whose rows are read.
struct Filling {
    name: String,
    columns: Vec<tables::Column>,
}

impl Filling {
    fn of(own: &[Table], name: String, columns: Vec<String>) -> Result<Self, Error> {
        let table = own.iter().find(|table| table.name == name);
        let table = table.ok_or_else(|| Error::Refused(format!("the backup has a table `{name}` that this version has not")))?;
        let find = |column: String| {
            let found = table.columns.iter().find(|own| own.name == column).cloned();
            found.ok_or_else(|| Error::Refused(format!("the backup has a column `{name}.{column}` that this version has not")))
        };
        Ok(Self { columns: columns.into_iter().map(find).collect::<Result<_, _>>()?, name: name.clone() })
    }

    fn values(&self, row: Vec<serde_json::Value>) -> Result<Vec<Expr>, Error> {
        let wrong = || Error::Refused(format!("the backup holds a row of `{}` that does not fit its columns", self.name));
        if row.len() != self.columns.len() {
            return Err(wrong());
        }
        let values = row.into_iter().zip(&self.columns).map(|(value, column)| column.kind.value(value).map(Expr::value));
        values.collect::<Option<Vec<_>>>().ok_or_else(wrong)
    }

    async fn insert(&self, transaction: &DatabaseTransaction, rows: Vec<Vec<Expr>>) -> Result<(), Error> {
        if rows.is_empty() {
            return Ok(());
        }
        let mut insert = Query::insert();
        insert.into_table(Alias::new(&self.name)).columns(self.columns.iter().map(|column| Alias::new(&column.name)));
        for row in rows {
            insert.values(row).map_err(|e| Error::Refused(e.to_string()))?;
        }
        transaction.execute(&insert).await?;
        Ok(())
    }
}

/// Postgres gives out numbers from counters that know nothing of rows that came with theirs.
async fn count_on(transaction: &DatabaseTransaction, own: &[Table]) -> Result<(), Error> {
    for table in own {
        for column in table.columns.iter().filter(|column| column.kind == tables::Kind::Integer) {
            let (name, key) = (quoted(&table.name), quoted(&column.name));
            let sql = format!(
                "SELECT setval(counter, greatest((SELECT max({key}) FROM {name}), 1)) \
                 FROM (SELECT pg_get_serial_sequence($1, $2) AS counter) AS own WHERE counter IS NOT NULL"
            );
            let values = [name.into(), column.name.clone().into()];
            transaction.query_all_raw(Statement::from_sql_and_values(DbBackend::Postgres, sql, values)).await?;
        }
    }
    Ok(())
}

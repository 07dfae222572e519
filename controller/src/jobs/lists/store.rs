//! The queries of the list, so shaped that both databases answer them from an index.
//!
//! Owns: which condition and which order go to the database. Never: writes. A crash here costs one answer.

use sea_orm::sea_query::{Expr, ExprTrait, SimpleExpr};
use sea_orm::{
    ColumnTrait, Condition, ConnectionTrait, DatabaseConnection, DbBackend, EntityTrait, Order, PaginatorTrait, QueryFilter, QueryOrder,
    QuerySelect, Select, Statement,
};
use serde::{Deserialize, Serialize};

use crate::jobs::record::Job;
use crate::jobs::store::{Filter, SortBy, readable};
use crate::store::entities::jobs;
use crate::store::{Error, Store, fold, like};

/// Characters of name and id that a sort by name goes by; the index has as many.
const NAME: usize = 200;
/// A search that finds no more than so many jobs is answered from them; one that finds more, from the list's order.
const FEW: u64 = 500;
/// Shortest word that the index of three characters can find.
const TRIGRAM: usize = 3;

/// A row's sort key.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Key {
    /// Of a number or time.
    Number(i64),
    /// Of a word.
    Text(String),
}

/// Where a row stands in a sorted list.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Mark {
    /// Its sort key.
    pub key: Key,
    /// Its id, which breaks ties.
    pub id: String,
}

impl Mark {
    /// Where a job stands in a list sorted by this.
    pub fn of(job: &Job, by: SortBy) -> Self {
        let key = match by {
            SortBy::Created => Key::Number(job.created_at),
            SortBy::Updated => Key::Number(job.updated_at),
            SortBy::Priority => Key::Number(i64::from(job.priority)),
            SortBy::Status => Key::Text(job.state.status.word().to_owned()),
            SortBy::VmName => Key::Text(job.folded().chars().take(NAME).collect()),
        };
        Self { key, id: job.id.clone() }
    }
}

/// Where a page begins.
#[derive(Clone, Debug)]
pub enum From {
    /// After so many rows.
    Offset(u64),
    /// After so many rows that are not younger than this, milliseconds since 1970.
    OffsetUntil(u64, i64),
    /// Behind this row.
    Mark(Mark),
}

/// What the words of a filter mean in this database at this moment.
#[derive(Clone, Debug)]
pub struct Meaning {
    condition: Condition,
    /// The order of the list must not be walked: few rows match.
    few: bool,
    /// On SQLite, a search and nothing else, that matches many: the index of three characters counts them.
    counted_by: Option<String>,
}

/// What a provider's word stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Provider {
    /// A kind; every job of a connection of this name is of this kind.
    Kind,
    /// A connection, all of whose jobs are of one kind.
    Name,
    /// Both, and neither holds the other.
    Both,
}

/// Finds out what a provider's word stands for: three looks into indexes. The number is for [`super::memory::Memory::number`].
pub async fn provider(store: &Store, word: &str) -> Result<u64, Error> {
    let word = word.to_owned();
    let work = |db: DatabaseConnection| async move {
        let backend = db.get_database_backend();
        let sql = match backend {
            DbBackend::Postgres => {
                "SELECT (SELECT min(provider_kind) FROM jobs WHERE provider = $1) AS least, \
                 (SELECT max(provider_kind) FROM jobs WHERE provider = $1) AS most, \
                 EXISTS (SELECT 1 FROM jobs WHERE provider_kind = $1) AS kind"
            }
            _ => {
                "SELECT (SELECT min(provider_kind) FROM jobs WHERE provider = ?1) AS least, \
                 (SELECT max(provider_kind) FROM jobs WHERE provider = ?1) AS most, \
                 EXISTS (SELECT 1 FROM jobs WHERE provider_kind = ?1) AS kind"
            }
        };
        let row = db.query_one_raw(Statement::from_sql_and_values(backend, sql, [word.clone().into()])).await?;
        let Some(row) = row else { return Ok(Provider::Both) };
        let least: Option<String> = row.try_get("", "least").map_err(Error::from)?;
        let most: Option<String> = row.try_get("", "most").map_err(Error::from)?;
        let kind: bool = row.try_get("", "kind").map_err(Error::from)?;
        Ok(match (least, most) {
            (None, _) | (_, None) => Provider::Kind,
            (Some(least), Some(most)) if least == most && least == word => Provider::Kind,
            (Some(least), Some(most)) if least == most && !kind => Provider::Name,
            _ => Provider::Both,
        })
    };
    Ok(store.read(work).await? as u64)
}

impl Provider {
    /// From the number that [`provider`] gave.
    pub fn of(number: u64) -> Self {
        match number {
            0 => Provider::Kind,
            1 => Provider::Name,
            _ => Provider::Both,
        }
    }
}

/// The condition of a filter. `provider` is what its provider's word stands for.
pub async fn meaning(store: &Store, filter: Filter, provider: Provider) -> Result<Meaning, Error> {
    let search = filter.search.clone();
    let is_alone = filter.provider.is_none() && filter.status.is_empty() && filter.kind.is_none();
    let is_alone = is_alone && filter.created_after.is_none() && filter.created_before.is_none();
    let mut all = Condition::all();
    if !filter.status.is_empty() {
        let words: Vec<&str> = filter.status.iter().map(|status| status.word()).collect();
        all = match words.as_slice() {
            [word] => all.add(jobs::Column::Status.eq(*word)),
            _ => all.add(jobs::Column::Status.is_in(words)),
        };
    }
    if let Some(word) = filter.provider {
        let kind = jobs::Column::ProviderKind.eq(&word);
        let name = jobs::Column::Provider.eq(&word);
        all = match provider {
            Provider::Kind => all.add(kind),
            // That all are of one kind lets the index give them in order.
            Provider::Name => {
                let least = sea_orm::sea_query::Query::select()
                    .expr(Expr::col(jobs::Column::ProviderKind).min())
                    .from(jobs::Entity)
                    .and_where(Expr::col(jobs::Column::Provider).eq(&word))
                    .to_owned();
                all.add(name).add(Expr::col(jobs::Column::ProviderKind).eq(SimpleExpr::SubQuery(None, Box::new(least.into()))))
            }
            Provider::Both => all.add(Condition::any().add(name).add(kind)),
        };
    }
    if let Some(kind) = filter.kind {
        all = all.add(jobs::Column::Kind.eq(kind));
    }
    if let Some(after) = filter.created_after {
        all = all.add(jobs::Column::CreatedAt.gt(after));
    }
    if let Some(before) = filter.created_before {
        all = all.add(jobs::Column::CreatedAt.lt(before));
    }
    let Some(search) = search else { return Ok(Meaning { condition: all, few: false, counted_by: None }) };
    let pattern = Expr::col(jobs::Column::VmFolded).like(like(&search));
    // Postgres finds its index for a pattern by itself.
    if store.is_postgres() || fold(&search).chars().count() < TRIGRAM {
        return Ok(Meaning { condition: all.add(pattern), few: false, counted_by: None });
    }
    let phrase = phrase(&search);
    match few(store, phrase.clone()).await? {
        Some(ids) => Ok(Meaning { condition: all.add(jobs::Column::Id.is_in(ids)), few: true, counted_by: None }),
        None => Ok(Meaning { condition: all.add(pattern), few: false, counted_by: is_alone.then_some(phrase) }),
    }
}

/// A word as FTS5 takes it: one phrase, nothing in it is an operator.
fn phrase(word: &str) -> String {
    format!("\"{}\"", fold(word).replace('"', "\"\""))
}

/// The jobs that a phrase finds, where they are few.
async fn few(store: &Store, phrase: String) -> Result<Option<Vec<String>>, Error> {
    let sql = format!("SELECT id FROM jobs_search WHERE jobs_search MATCH ?1 LIMIT {}", FEW + 1);
    let work = |db: DatabaseConnection| async move {
        let rows = db.query_all_raw(Statement::from_sql_and_values(DbBackend::Sqlite, sql, [phrase.into()])).await?;
        if rows.len() as u64 > FEW {
            return Ok(None);
        }
        let ids = rows.into_iter().map(|row| row.try_get_by_index::<String>(0)).collect::<Result<Vec<_>, _>>();
        Ok(Some(ids.map_err(Error::from)?))
    };
    store.read(work).await
}

/// How many jobs a filter finds.
pub async fn total(store: &Store, meaning: &Meaning) -> Result<u64, Error> {
    if let Some(phrase) = meaning.counted_by.clone() {
        let work = |db: DatabaseConnection| async move {
            let sql = "SELECT count(*) FROM jobs_search WHERE jobs_search MATCH ?1";
            let row = db.query_one_raw(Statement::from_sql_and_values(DbBackend::Sqlite, sql, [phrase.into()])).await?;
            let count = row.map_or(Ok(0), |row| row.try_get_by_index::<i64>(0)).map_err(Error::from)?;
            Ok(u64::try_from(count).unwrap_or(0))
        };
        return store.read(work).await;
    }
    let find = jobs::Entity::find().filter(meaning.condition.clone());
    store.read(move |db| async move { Ok(find.count(&db).await?) }).await
}

/// Up to `limit` jobs of a filter, in order, and how many rows that were: one that cannot be read is left out.
pub async fn rows(store: &Store, meaning: &Meaning, sort: (SortBy, Order), from: From, limit: u64) -> Result<(Vec<Job>, u64), Error> {
    let select = page(store.is_postgres(), meaning, sort, from, limit);
    let work = move |db: DatabaseConnection| async move {
        let rows = select.all(&db).await?;
        let count = rows.len() as u64;
        Ok((rows.into_iter().filter_map(readable).collect(), count))
    };
    store.read(work).await
}

/// The sort key as the index has it.
fn key_of(is_postgres: bool, by: SortBy) -> &'static str {
    match by {
        SortBy::Created => "created_at",
        SortBy::Updated => "updated_at",
        SortBy::Status => "status",
        SortBy::Priority => "priority",
        SortBy::VmName if is_postgres => "(substr(vm_folded, 1, 200) COLLATE \"C\")",
        SortBy::VmName => "substr(vm_folded, 1, 200)",
    }
}

fn page(is_postgres: bool, meaning: &Meaning, sort: (SortBy, Order), from: From, limit: u64) -> Select<jobs::Entity> {
    let (by, order) = sort;
    let key = key_of(is_postgres, by);
    let mut select = jobs::Entity::find().filter(meaning.condition.clone());
    select = match from {
        From::Offset(0) => select,
        From::Offset(offset) => select.offset(offset),
        From::OffsetUntil(offset, until) => select.filter(jobs::Column::CreatedAt.lte(until)).offset(offset),
        From::Mark(mark) => {
            let value = match mark.key {
                Key::Number(number) => Expr::value(number),
                Key::Text(text) => Expr::value(text),
            };
            let (row, mark) = (Expr::tuple([Expr::cust(key), Expr::col(jobs::Column::Id)]), Expr::tuple([value, Expr::value(mark.id)]));
            select.filter(if order == Order::Asc { row.gt(mark) } else { row.lt(mark) })
        }
    };
    // A sum is no column: SQLite then sorts the few rows that match and does not walk all others in order.
    let first = if meaning.few { Expr::cust(format!("+{key}")) } else { Expr::cust(key) };
    select.order_by(first, order.clone()).order_by(jobs::Column::Id, order).limit(limit)
}

/// How the database would answer a page.
#[cfg(test)]
pub async fn explain(store: &Store, meaning: &Meaning, sort: (SortBy, Order), from: From, limit: u64) -> Result<String, Error> {
    use sea_orm::QueryTrait as _;
    let select = page(store.is_postgres(), meaning, sort, from, limit);
    let work = move |db: DatabaseConnection| async move {
        let backend = db.get_database_backend();
        let statement = select.build(backend);
        let explain = if backend == DbBackend::Postgres { "EXPLAIN" } else { "EXPLAIN QUERY PLAN" };
        let statement = Statement { sql: format!("{explain} {}", statement.sql), ..statement };
        let column = if backend == DbBackend::Postgres { 0 } else { 3 };
        let rows = db.query_all_raw(statement).await?;
        let lines = rows.into_iter().map(|row| row.try_get_by_index::<String>(column)).collect::<Result<Vec<_>, _>>();
        Ok(lines.map_err(Error::from)?.join("\n"))
    };
    store.read(work).await
}

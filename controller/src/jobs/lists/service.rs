//! One page of the list, for one caller.
//!
//! Owns: how `offset` and `after` become a place in the list, and what the page says of itself. Never: answers `has_more` by counting.
//! A crash here costs one answer.

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD as BASE64;
use serde::{Deserialize, Serialize};

use super::memory::{Memory, Start};
use super::store::{self, From, Key, Mark, Provider};
use crate::http::body::digest;
use crate::http::query::{Order, Paging};
use crate::http::reply::{Error, Pagination};
use crate::jobs::record::{Job, now_millis};
use crate::jobs::store::{Filter, SortBy};
use crate::store::Store;

/// What is asked for.
pub struct Asked {
    /// Which jobs.
    pub filter: Filter,
    /// By what they are sorted.
    pub by: SortBy,
    /// In which direction.
    pub order: Order,
    /// Which page, by counting.
    pub paging: Paging,
    /// Which page, by `pagination.next` of the one before.
    pub after: Option<String>,
    /// Who asks: the same caller is the same walk through the pages.
    pub caller: String,
    /// The query without its place: filters and sorting in one spelling.
    pub query: String,
}

/// What `pagination.next` holds.
#[derive(Serialize, Deserialize)]
struct Next {
    /// The row that it stands behind.
    mark: Mark,
    /// Rows before it.
    offset: u64,
    /// Of which query.
    query: String,
}

/// The page and what it says of itself.
pub async fn page(store: &Store, memory: &Memory, asked: Asked) -> Result<(Vec<Job>, Pagination), Error> {
    let Asked { filter, by, order, paging: Paging { offset, limit }, after, caller, query } = asked;
    let digest = digest(query.as_bytes());
    let walk = format!("{caller}\n{query}");
    let began = now_millis();
    let (from, offset) = match after {
        Some(text) => {
            let next = read(&text, &digest, by)?;
            (From::Mark(next.mark), next.offset)
        }
        None if offset == 0 => (From::Offset(0), 0),
        None => match memory.start(&walk, offset) {
            Some(Start::After(mark)) => (From::Mark(mark), offset),
            Some(Start::Until(until)) => (From::OffsetUntil(offset, until), offset),
            None => (From::Offset(offset), offset),
        },
    };
    let shared = store.is_postgres();
    let provider = match &filter.provider {
        Some(word) => Provider::of(memory.number(&format!("provider {word}"), shared, store::provider(store, word)).await?),
        None => Provider::Kind,
    };
    let meaning = store::meaning(store, filter.clone(), provider).await?;
    // One more than asked for says whether there is more.
    let (mut rows, count) = store::rows(store, &meaning, (by, order.into()), from, limit + 1).await?;
    let has_more = count > limit;
    rows.truncate(usize::try_from(limit).unwrap_or(usize::MAX));
    let total = memory.number(&total_key(&filter), shared, store::total(store, &meaning)).await?;
    let end = offset.saturating_add(rows.len() as u64);
    let mut next = None;
    if let Some(last) = rows.last().filter(|_| has_more) {
        let mark = Mark::of(last, by);
        let text = serde_json::to_vec(&Next { mark: mark.clone(), offset: end, query: digest }).map_err(Error::internal)?;
        next = Some(BASE64.encode(text));
        match offset {
            0 => memory.begin(walk, rows.first().map_or(began, |first| first.created_at.max(began)), end, mark),
            _ => memory.note(&walk, end, mark),
        }
    }
    // Rows that left the list before this page still count in its offset; a reader who stops at `total` must not stop too early.
    let total = if has_more { total.max(end.saturating_add(1)) } else { total };
    Ok((rows, Pagination { offset, limit, total, has_more, next }))
}

/// A total does not depend on how the list is sorted.
fn total_key(filter: &Filter) -> String {
    format!("total {filter:?}")
}

fn read(text: &str, digest: &str, by: SortBy) -> Result<Next, Error> {
    let wrong = || Error::bad_request("after must be `pagination.next` of the page before");
    let bytes = BASE64.decode(text).map_err(|_| wrong())?;
    let next: Next = serde_json::from_slice(&bytes).map_err(|_| wrong())?;
    if next.query != digest {
        return Err(Error::bad_request("after belongs to another query: keep filters, sort and order as they were"));
    }
    // Postgres refuses NUL in text.
    let is_clean = !next.mark.id.contains('\0') && !matches!(&next.mark.key, Key::Text(text) if text.contains('\0'));
    if is_clean && is_of(&next.mark, by) && next.offset <= i64::MAX as u64 { Ok(next) } else { Err(wrong()) }
}

/// Whether a mark's key is what this sort compares: a forged one would be the database's error.
fn is_of(mark: &Mark, by: SortBy) -> bool {
    let is_text = matches!(by, SortBy::Status | SortBy::VmName);
    matches!((&mark.key, is_text), (Key::Text(_), true) | (Key::Number(_), false))
}

//! What is remembered between two requests for a list: totals, and where pages ended.
//!
//! Owns: bounded maps. Never: answers a total that a job made or moved by this controller could have changed. Another controller's
//! change shows within [`SHARED`]. A crash here costs some counting.

use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::store::Mark;

/// How long a total is right where another controller may write, too.
const SHARED: Duration = Duration::from_secs(1);
/// Most totals that are kept.
const TOTALS: usize = 2_000;
/// A walk through the pages is forgotten when it rested this long.
const WALK: Duration = Duration::from_secs(600);
/// Most walks that are kept.
const WALKS: usize = 2_000;
/// Most marks of a walk; the oldest goes.
const MARKS: usize = 64;

/// A total and until which change it is right.
#[derive(Clone, Copy)]
struct Known {
    generation: u64,
    at: Instant,
    total: u64,
}

type Entry = Arc<tokio::sync::Mutex<Option<Known>>>;

/// Somebody's way through the pages of one query.
struct Walk {
    /// Rows that were made later do not count where rows are counted; milliseconds since 1970.
    until: i64,
    /// The last row before an offset.
    marks: BTreeMap<u64, Mark>,
    touched: Instant,
}

/// The memory of the lists. Cheap to clone.
#[derive(Clone, Default)]
pub struct Memory(Arc<Inner>);

#[derive(Default)]
struct Inner {
    generation: AtomicU64,
    totals: Mutex<HashMap<String, Entry>>,
    walks: Mutex<HashMap<String, Walk>>,
}

/// Where a page of a known walk begins.
#[derive(Clone, Debug, PartialEq)]
pub enum Start {
    /// Behind this row.
    After(Mark),
    /// By counting rows that are not younger than this.
    Until(i64),
}

impl Memory {
    /// A job was made or has moved: totals from before may be wrong.
    pub fn changed(&self) {
        self.0.generation.fetch_add(1, Ordering::SeqCst);
    }

    /// A number that holds until a job changes: the known one, else what `ask` answers. Callers with the same key wait for one answer.
    pub async fn number<E>(&self, key: &str, is_shared: bool, ask: impl Future<Output = Result<u64, E>>) -> Result<u64, E> {
        let arrived = self.0.generation.load(Ordering::SeqCst);
        let entry = {
            let mut totals = self.0.totals.lock().unwrap_or_else(PoisonError::into_inner);
            if totals.len() >= TOTALS && !totals.contains_key(key) {
                totals.clear();
            }
            match totals.get(key) {
                Some(entry) => Arc::clone(entry),
                None => Arc::clone(totals.entry(key.to_owned()).or_default()),
            }
        };
        let mut known = entry.lock().await;
        if let Some(known) = known.filter(|known| known.generation >= arrived && (!is_shared || known.at.elapsed() < SHARED)) {
            return Ok(known.total);
        }
        // Both from before the question: what changes meanwhile makes the answer old.
        let (generation, at) = (self.0.generation.load(Ordering::SeqCst), Instant::now());
        let total = ask.await?;
        *known = Some(Known { generation, at, total });
        Ok(total)
    }

    /// A walk begins: its first page ended at this offset with this row.
    pub fn begin(&self, walk: String, until: i64, end: u64, mark: Mark) {
        let now = Instant::now();
        let mut walks = self.0.walks.lock().unwrap_or_else(PoisonError::into_inner);
        if walks.len() >= WALKS && !walks.contains_key(&walk) {
            walks.retain(|_, walk| now.saturating_duration_since(walk.touched) < WALK);
            if walks.len() >= WALKS {
                let oldest = walks.iter().min_by_key(|(_, walk)| walk.touched).map(|(name, _)| name.clone());
                oldest.and_then(|name| walks.remove(&name));
            }
        }
        walks.insert(walk, Walk { until, marks: BTreeMap::from([(end, mark)]), touched: now });
    }

    /// Where a later page of a walk begins; nothing where there is no such walk.
    pub fn start(&self, walk: &str, offset: u64) -> Option<Start> {
        let mut walks = self.0.walks.lock().unwrap_or_else(PoisonError::into_inner);
        let walk = walks.get_mut(walk).filter(|walk| walk.touched.elapsed() < WALK)?;
        walk.touched = Instant::now();
        Some(walk.marks.get(&offset).map_or(Start::Until(walk.until), |mark| Start::After(mark.clone())))
    }

    /// A later page of a walk ended at this offset with this row.
    pub fn note(&self, walk: &str, end: u64, mark: Mark) {
        let mut walks = self.0.walks.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(walk) = walks.get_mut(walk) else { return };
        walk.marks.insert(end, mark);
        if walk.marks.len() > MARKS {
            walk.marks.pop_first();
        }
    }
}

//! The bandwidth limit.
//!
//! Owns: the schedule: each read gets a slot of (its bytes / limit) behind the slot before and goes ahead at its slot's end, so that the bytes
//! read never run ahead of limit × time and lag only while the source is the slower of the two.
//! Never: sleeps longer than 50 ms without asking whether to stop. A crash here costs nothing.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Lag that may be made up for: a source that was slow for longer does not get a burst afterwards.
const SLACK: Duration = Duration::from_millis(250);

/// Longest sleep between two looks at `stop`.
const NAP: Duration = Duration::from_millis(50);

/// A limit shared by all readers of a job.
#[derive(Debug)]
pub(super) struct Throttle {
    /// Bytes per second.
    limit: Option<u64>,
    /// End of the last slot given.
    last: Mutex<Instant>,
}

impl Throttle {
    /// A limit in bytes per second; `None` or 0 for none.
    pub(super) fn new(limit: Option<u64>) -> Self {
        Self { limit: limit.filter(|limit| *limit > 0), last: Mutex::new(Instant::now()) }
    }

    /// Whether there is a limit at all.
    pub(super) fn limits(&self) -> bool {
        self.limit.is_some()
    }

    /// Waits until `bytes` may be read; false when `stop` said so first.
    pub(super) fn take(&self, bytes: u64, stop: &dyn Fn() -> bool) -> bool {
        let Some(limit) = self.limit else { return !stop() };
        let cost = Duration::from_secs_f64(bytes as f64 / limit as f64);
        let until = {
            let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
            let earliest = Instant::now().checked_sub(SLACK).unwrap_or(*last);
            *last = (*last).max(earliest) + cost;
            *last
        };
        loop {
            if stop() {
                return false;
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return true;
            }
            std::thread::sleep(left.min(NAP));
        }
    }
}

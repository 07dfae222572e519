//! The bounded way from the workers to the writer.
//!
//! Owns: the slots (a fixed number, so memory is bounded), the order (blocks leave in the order in which they were planned), the halt.
//! Never: touches a file. A worker takes its slot before its block, so the block that the writer waits for always has one: no deadlock.
//! A crash here costs what was not checkpointed.

use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use shared::manifest::Digest;

use super::Error;
use crate::formats::Encoded;

/// A block as a worker leaves it.
pub(super) struct Done {
    pub(super) block: u64,
    /// Its data bytes.
    pub(super) data: u64,
    /// `None` for zeros.
    pub(super) digest: Option<Digest>,
    pub(super) encoded: Encoded,
}

/// What the writer finds.
pub(super) enum Next {
    /// The next block in order.
    Block(Done),
    /// Nothing until the given time.
    Late,
    /// All blocks were given out and came back.
    End,
    /// Somebody stopped, and the next block in order is not there.
    Halted,
}

#[derive(Default)]
struct State {
    free: Vec<Encoded>,
    ready: BTreeMap<u64, Done>,
    next: u64,
    end: Option<u64>,
    halted: bool,
    failure: Option<Error>,
}

/// The queue of one disk's copy.
pub(super) struct Queue {
    state: Mutex<State>,
    /// A slot is free, or the queue halted.
    room: Condvar,
    /// A block is ready, the end is known, or the queue halted.
    news: Condvar,
}

impl Queue {
    pub(super) fn new(slots: usize) -> Self {
        let state = State { free: (0..slots).map(|_| Encoded::default()).collect(), ..State::default() };
        Self { state: Mutex::new(state), room: Condvar::new(), news: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Each statement leaves the state whole; who panicked has halted the queue.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A free slot; waits for one. `None` when halted.
    pub(super) fn slot(&self) -> Option<Encoded> {
        let mut state = self.lock();
        loop {
            if state.halted {
                return None;
            }
            if let Some(slot) = state.free.pop() {
                return Some(slot);
            }
            state = self.room.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    pub(super) fn give_back(&self, slot: Encoded) {
        self.lock().free.push(slot);
        self.room.notify_one();
    }

    pub(super) fn deliver(&self, seq: u64, done: Done) {
        self.lock().ready.insert(seq, done);
        self.news.notify_one();
    }

    /// Says that only `count` blocks were planned.
    pub(super) fn end(&self, count: u64) {
        self.lock().end = Some(count);
        self.news.notify_one();
    }

    /// The next block in order; waits for it, at most until `until`.
    pub(super) fn next(&self, until: Option<Instant>) -> Next {
        let mut state = self.lock();
        loop {
            let seq = state.next;
            if let Some(done) = state.ready.remove(&seq) {
                state.next += 1;
                return Next::Block(done);
            }
            if state.end == Some(seq) {
                return Next::End;
            }
            if state.halted {
                return Next::Halted;
            }
            let wait = until.map(|until| until.saturating_duration_since(Instant::now()));
            state = match wait {
                Some(wait) if wait.is_zero() => return Next::Late,
                Some(wait) => self.news.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0,
                None => self.news.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }

    /// Stops everybody at their next step.
    pub(super) fn halt(&self) {
        self.lock().halted = true;
        self.room.notify_all();
        self.news.notify_all();
    }

    /// Stops everybody because of `error`; the first one is kept.
    pub(super) fn fail(&self, error: Error) {
        self.lock().failure.get_or_insert(error);
        self.halt();
    }

    pub(super) fn halted(&self) -> bool {
        self.lock().halted
    }

    /// What went wrong, once the threads have ended.
    pub(super) fn failure(&self) -> Option<Error> {
        self.lock().failure.take()
    }

    /// Whether what went wrong left the output sound: a source that failed, or nothing.
    pub(super) fn output_is_sound(&self) -> bool {
        self.lock().failure.as_ref().is_none_or(|error| matches!(error, Error::Source { .. }))
    }
}

/// Halts the queue when the thread that holds it panics, so that the others do not wait for it for ever.
pub(super) struct Alarm<'a>(pub(super) &'a Queue);

impl Drop for Alarm<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.halt();
        }
    }
}

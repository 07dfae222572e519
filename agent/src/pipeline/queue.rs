//! The bounded way from the workers to the writer, and back for blocks whose bytes the workers write themselves.
//!
//! ```text
//!            ┌──────────────── slot given back ◄───────────────┐
//!  worker: slot ─► read, hash, encode ─► deliver ─► writer: in order ─► lays it down ─┤
//!            ▲                                              └► only gives it its place ─► worker: writes it
//! ```
//! Owns: the slots (a fixed number, so memory is bounded), the order (blocks leave in the order in which they were planned), the halt,
//! and which placed blocks are not written yet.
//! Never: touches a file. A worker takes its slot before its block, so the block that the writer waits for always has one, and writing comes
//! before reading: no deadlock.
//! A crash here costs what was not checkpointed.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use shared::manifest::Digest;

use super::Error;
use crate::formats::{Encoded, Run};

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
    /// The next block in order, and its number.
    Block(u64, Done),
    /// Nothing until the given time.
    Late,
    /// All blocks were given out and came back.
    End,
    /// Somebody stopped, and the next block in order is not there.
    Halted,
}

/// A block that has its place and is to be written.
pub(super) struct Placed {
    /// Its number in the order of the writer.
    pub(super) seq: u64,
    pub(super) encoded: Encoded,
    pub(super) runs: Vec<Run>,
}

/// What a worker does next.
pub(super) enum Turn {
    /// Writes this block, then says so by [`Queue::written`].
    Write(Placed),
    /// Takes a new block into this slot.
    Slot(Encoded),
    /// Leaves.
    Leave,
}

#[derive(Default)]
struct State {
    free: Vec<Encoded>,
    ready: BTreeMap<u64, Done>,
    placed: VecDeque<Placed>,
    /// Numbers of placed blocks that are not written.
    unwritten: BTreeSet<u64>,
    next: u64,
    end: Option<u64>,
    halted: bool,
    /// The output is not sound: something failed that was not the source, or a thread panicked. What was placed may never be written.
    broken: bool,
    failure: Option<Error>,
}

/// The queue of one disk's copy.
pub(super) struct Queue {
    state: Mutex<State>,
    /// A slot is free, or the queue halted.
    room: Condvar,
    /// A block is ready, the end is known, or the queue halted.
    news: Condvar,
    /// A placed block was written, or something failed.
    dry: Condvar,
}

impl Queue {
    pub(super) fn new(slots: usize) -> Self {
        let state = State { free: (0..slots).map(|_| Encoded::default()).collect(), ..State::default() };
        Self { state: Mutex::new(state), room: Condvar::new(), news: Condvar::new(), dry: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Each statement leaves the state whole; who panicked has halted the queue.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a worker does next: a block to write, else a free slot; waits for either. After a halt, and behind the end of the plan
    /// (`exhausted`), only what is still to be written.
    pub(super) fn turn(&self, exhausted: bool) -> Turn {
        let mut state = self.lock();
        loop {
            if let Some(placed) = state.placed.pop_front() {
                return Turn::Write(placed);
            }
            if state.halted || (exhausted && state.end == Some(state.next)) {
                return Turn::Leave;
            }
            if !exhausted && let Some(slot) = state.free.pop() {
                return Turn::Slot(slot);
            }
            state = self.room.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Hands the bytes of a placed block to whoever comes first.
    pub(super) fn place(&self, placed: Placed) {
        let mut state = self.lock();
        state.unwritten.insert(placed.seq);
        state.placed.push_back(placed);
        drop(state);
        self.room.notify_one();
    }

    /// A placed block that nobody has taken.
    pub(super) fn take_placed(&self) -> Option<Placed> {
        self.lock().placed.pop_front()
    }

    /// A placed block is written.
    pub(super) fn written(&self, placed: Placed) {
        let mut state = self.lock();
        state.unwritten.remove(&placed.seq);
        state.free.push(placed.encoded);
        drop(state);
        self.room.notify_one();
        self.dry.notify_all();
    }

    /// Waits until all blocks before `seq` are written; false when one of them will never be.
    pub(super) fn wait_written(&self, seq: u64) -> bool {
        let mut state = self.lock();
        while state.unwritten.first().is_some_and(|first| *first < seq) {
            if state.broken {
                return false;
            }
            state = self.dry.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        true
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
        self.room.notify_all();
    }

    /// The next block in order; waits for it, at most until `until`.
    pub(super) fn next(&self, until: Option<Instant>) -> Next {
        let mut state = self.lock();
        loop {
            let seq = state.next;
            if let Some(done) = state.ready.remove(&seq) {
                state.next += 1;
                if state.end == Some(state.next) {
                    // Workers that only wait for something to write may look again.
                    self.room.notify_all();
                }
                return Next::Block(seq, done);
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
        self.dry.notify_all();
    }

    /// Stops everybody because of `error`; the first one is kept.
    pub(super) fn fail(&self, error: Error) {
        {
            let mut state = self.lock();
            // A source that fails leaves what is in order sound, but not when a write fails beside it.
            state.broken |= !matches!(error, Error::Source { .. });
            state.failure.get_or_insert(error);
        }
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
        !self.lock().broken
    }
}

/// Halts the queue when the thread that holds it panics, so that the others do not wait for it for ever.
pub(super) struct Alarm<'a>(pub(super) &'a Queue);

impl Drop for Alarm<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.lock().broken = true;
            self.0.halt();
        }
    }
}

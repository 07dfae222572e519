//! Reading back: the output, opened by its own reader, must give the blocks that were read from the source.
//!
//! Owns: the comparison of each block that has data at the source or in the output, and the journal's record of how far it came.
//! Never: reads the source again, repairs anything. The first difference ends the job, with the block named.
//! A crash here costs the blocks compared since the last record.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Instant;

use shared::manifest::{BLOCK, Blocks, Digest, block_digest};

use super::control::{Control, Crew};
use super::copy::workers;
use super::files::Hashing;
use super::plan::{Plan, Task, block_count, block_len};
use super::resume::Verified;
use super::{Error, Tuning};
use crate::formats::{Disk, FormatError, Result as FormatResult, Scratch, is_zero};
use crate::journal::{Journal, Record};

/// One disk to compare.
pub(super) struct Proof<'a> {
    pub(super) control: &'a Control<'a>,
    pub(super) tuning: &'a Tuning,
    /// Number of the disk in the job.
    pub(super) number: u32,
    pub(super) name: &'a str,
    pub(super) source: &'a dyn Disk,
    pub(super) output: &'a dyn Disk,
    pub(super) blocks: &'a Blocks,
    /// Whether blocks that should be zeros are read, too: what lies beneath might shine through.
    pub(super) reads_all: bool,
    /// Verified data bytes of the disks before this one.
    pub(super) verified_before: u64,
}

/// A block to look at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Look {
    pub(super) block: u64,
    /// Its data bytes at the source.
    pub(super) data: u64,
    /// `None` for zeros.
    pub(super) expected: Option<Digest>,
    /// Whether it has to be read: it should hold something, or it does.
    pub(super) read: bool,
}

/// The blocks with data at the source, in the output, or with a digest: each once, ascending.
struct Merge<'a> {
    source: (Plan<'a>, Option<Task>),
    output: (Plan<'a>, Option<Task>),
    digests: std::iter::Peekable<std::collections::btree_map::Range<'a, u64, Digest>>,
}

impl<'a> Merge<'a> {
    fn new(source: &'a dyn Disk, output: &'a dyn Disk, blocks: &'a Blocks, first: u64) -> FormatResult<Self> {
        let start = |disk: &'a dyn Disk| {
            let mut plan = Plan::new(disk, first);
            advance(&mut plan).map(|task| (plan, task))
        };
        Ok(Self { source: start(source)?, output: start(output)?, digests: blocks.0.range(first..).peekable() })
    }

    fn next(&mut self) -> FormatResult<Option<Look>> {
        let block = |task: &Option<Task>| task.as_ref().map(|task| task.block);
        let (source, output) = (block(&self.source.1), block(&self.output.1));
        let digest = self.digests.peek().map(|(block, _)| **block);
        let Some(at) = [source, output, digest].into_iter().flatten().min() else { return Ok(None) };
        let mut look = Look { block: at, data: 0, expected: None, read: output == Some(at) || digest == Some(at) };
        if output == Some(at) {
            self.output.1 = advance(&mut self.output.0)?;
        }
        if source == Some(at) {
            look.data = self.source.1.as_ref().map_or(0, |task| task.data);
            self.source.1 = advance(&mut self.source.0)?;
        }
        if digest == Some(at) {
            look.expected = self.digests.next().map(|(_, digest)| *digest);
        }
        Ok(Some(look))
    }
}

fn advance(plan: &mut Plan<'_>) -> FormatResult<Option<Task>> {
    let mut task = Task::default();
    Ok(plan.next(&mut task)?.then_some(task))
}

/// What an output that cannot even be opened or walked means: it is not what was written. A failing device is another matter.
pub(super) fn damaged(e: FormatError, disk: &str, block: u64) -> Error {
    match e {
        FormatError::Corrupt { .. } | FormatError::Refused { .. } => {
            Error::Mismatch { disk: disk.to_owned(), block, offset: block * BLOCK, reason: e.to_string() }
        }
        e => Error::Output(e),
    }
}

/// Whether a block of a disk reads as expected; `Some(reason)` when it does not.
pub(super) fn compare(disk: &dyn Disk, look: &Look, buf: &mut Vec<u8>, scratch: &mut Scratch) -> FormatResult<Option<String>> {
    buf.resize(block_len(look.block, disk.capacity()), 0);
    match disk.read_at(look.block * BLOCK, buf, scratch) {
        Ok(()) => {}
        // Not even readable as this format: the output's fault, told as such. A failing device is not.
        Err(e @ (FormatError::Corrupt { .. } | FormatError::Refused { .. })) => return Ok(Some(e.to_string())),
        Err(e) => return Err(e),
    }
    let same = match look.expected {
        Some(expected) => block_digest(buf) == expected,
        None => is_zero(buf),
    };
    Ok((!same).then(|| "its content is not what was read from the source".to_owned()))
}

/// The order in which looks were given out, and how far all of them are done.
struct Walk<'a> {
    merge: Merge<'a>,
    /// Given out and not yet done.
    open: BTreeSet<u64>,
    /// Done: data bytes and whether it was read.
    done: BTreeMap<u64, (u64, bool)>,
    reached: Verified,
}

impl Walk<'_> {
    fn finish(&mut self, look: &Look) {
        self.open.remove(&look.block);
        self.done.insert(look.block, (look.data, look.read));
        let first_open = self.open.first().copied().unwrap_or(u64::MAX);
        while let Some(entry) = self.done.first_entry().filter(|entry| *entry.key() < first_open) {
            let (block, (data, read)) = entry.remove_entry();
            self.reached.next_block = block + 1;
            self.reached.data += data;
            self.reached.blocks += u64::from(read);
        }
    }
}

impl Proof<'_> {
    /// Compares from `start` on. Answers how many blocks and data bytes are compared in all.
    pub(super) fn run(&self, start: Verified, hashing: &Hashing, journal: &mut Journal) -> Result<Verified, Error> {
        let capacity = self.source.capacity();
        if self.output.capacity() != capacity {
            let reason = format!("the output has {} bytes instead of {capacity}", self.output.capacity());
            let block = block_count(capacity.min(self.output.capacity()));
            return Err(Error::Mismatch { disk: self.name.to_owned(), block, offset: block * BLOCK, reason });
        }
        let merge =
            Merge::new(self.source, self.output, self.blocks, start.next_block).map_err(|e| damaged(e, self.name, start.next_block))?;
        let walk = Mutex::new(Walk { merge, open: BTreeSet::new(), done: BTreeMap::new(), reached: start });
        let (halted, failure) = (AtomicBool::new(false), Mutex::new(None));
        let workers = workers(self.tuning);
        let crew = Crew::new(workers);
        let mut recorder = Recorder::new(self.tuning, self.number, start);
        let mut journal_error = None;
        let sound = thread::scope(|scope| {
            let work = || {
                let _member = crew.member();
                if let Err(error) = self.work(&walk, &halted) {
                    halted.store(true, Ordering::Relaxed);
                    failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                }
            };
            let threads: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
            crew.wait(|| {
                self.control.poll();
                let reached = walk.lock().unwrap_or_else(PoisonError::into_inner).reached;
                let noted = recorder.note(reached, false, hashing, journal);
                if let Err(e) = noted {
                    journal_error.get_or_insert(e);
                }
                if self.control.stopped() || journal_error.is_some() {
                    halted.store(true, Ordering::Relaxed);
                }
            });
            threads.into_iter().map(|thread| thread.join()).all(|joined| joined.is_ok())
        });
        if let Some(error) = failure.into_inner().unwrap_or_else(PoisonError::into_inner).or(journal_error) {
            return Err(error);
        }
        let mut reached = walk.into_inner().unwrap_or_else(PoisonError::into_inner).reached;
        if self.control.stopped() {
            recorder.note(reached, true, hashing, journal)?;
            self.control.check()?;
        }
        if !sound {
            return Err(Error::Output(FormatError::Io(std::io::Error::other("a thread of the read-back panicked"))));
        }
        reached.next_block = block_count(capacity);
        recorder.note(reached, true, hashing, journal)?;
        Ok(reached)
    }

    fn work(&self, walk: &Mutex<Walk<'_>>, halted: &AtomicBool) -> Result<(), Error> {
        let mut scratch = Scratch::default();
        let mut buf = Vec::new();
        while !halted.load(Ordering::Relaxed) {
            let look = {
                let mut walk = walk.lock().unwrap_or_else(PoisonError::into_inner);
                let next = walk.reached.next_block;
                let Some(look) = walk.merge.next().map_err(|e| damaged(e, self.name, next))? else { return Ok(()) };
                walk.open.insert(look.block);
                look
            };
            if (look.read || self.reads_all)
                && let Some(reason) = compare(self.output, &look, &mut buf, &mut scratch).map_err(Error::Output)?
            {
                return Err(Error::Mismatch { disk: self.name.to_owned(), block: look.block, offset: look.block * BLOCK, reason });
            }
            let mut walk = walk.lock().unwrap_or_else(PoisonError::into_inner);
            walk.finish(&look);
            self.control.counters.verified.store(self.verified_before + walk.reached.data, Ordering::Relaxed);
        }
        Ok(())
    }
}

/// Notes progress in the journal now and then.
struct Recorder<'a> {
    tuning: &'a Tuning,
    number: u32,
    last: Verified,
    since: Instant,
}

impl<'a> Recorder<'a> {
    fn new(tuning: &'a Tuning, number: u32, last: Verified) -> Self {
        Self { tuning, number, last, since: Instant::now() }
    }

    fn note(&mut self, reached: Verified, now: bool, hashing: &Hashing, journal: &mut Journal) -> Result<(), Error> {
        let Verified { next_block, data, blocks } = reached;
        let due = data - self.last.data >= self.tuning.checkpoint_bytes || self.since.elapsed() >= self.tuning.checkpoint_every;
        if next_block == self.last.next_block || !(now || due) {
            return Ok(());
        }
        journal.append(&Record::Verified { disk: self.number, next_block, data, blocks }).map_err(Error::journal)?;
        for record in hashing.records() {
            journal.append(&record).map_err(Error::journal)?;
        }
        (self.last, self.since) = (reached, Instant::now());
        Ok(())
    }
}

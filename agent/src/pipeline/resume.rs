//! What an earlier attempt left, and how much of it holds.
//!
//! Owns: the walk through the journal, the re-hashing of what it says is there, the cut of part and journal back to what holds.
//! Never: trusts a length or a record alone: each piece of an unfinished disk is hashed again before the copy goes on behind it.
//! A crash here costs nothing: the part is cut first, then the journal, and either alone is what a crash can leave anyway.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use shared::manifest::{BLOCK, Blocks, Digest, block_digest};

use super::control::{Control, Crew};
use super::copy::workers;
use super::package::{Package, Place};
use super::part::PartDir;
use super::plan::block_len;
use super::seal::{hash_region, read_padded};
use super::target::{Evidence, Target};
use super::{Error, Job, output_error};
use crate::formats::UNIT;
use crate::formats::qcow2::{Placed, Tracer};
use crate::journal::{Checkpoint, Journal, Record};

/// A disk whose output is complete.
pub(super) struct Finished {
    pub(super) length: u64,
    pub(super) data: u64,
    pub(super) blocks: Blocks,
}

/// A disk that was begun.
pub(super) struct Partial {
    pub(super) front: u64,
    pub(super) next_block: u64,
    pub(super) data: u64,
    pub(super) position: u64,
    pub(super) blocks: Blocks,
    /// The journal's records that hold the writer's pieces.
    pub(super) records: std::ops::Range<usize>,
}

/// How far the reading back of a disk came.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Verified {
    pub(super) next_block: u64,
    pub(super) data: u64,
    pub(super) blocks: u64,
}

/// How far the hashing of a file came.
#[derive(Clone, Debug)]
pub(super) struct Hashed {
    pub(super) position: u64,
    pub(super) state: Vec<u8>,
    pub(super) done: bool,
}

/// What holds of an earlier attempt.
#[derive(Default)]
pub(super) struct Found {
    pub(super) finished: Vec<Finished>,
    pub(super) partial: Option<Partial>,
    /// Name and length of every file, once the package was complete.
    pub(super) all_written: Option<Vec<(String, u64)>>,
    /// By disk.
    pub(super) verified: BTreeMap<u32, Verified>,
    /// By file.
    pub(super) hashed: BTreeMap<String, Hashed>,
}

/// One checkpoint without its piece.
struct Step {
    next_block: u64,
    data: u64,
    from: u64,
    position: u64,
    hash: Digest,
    digests: Vec<(u64, Digest)>,
    /// For a plain qcow2: what lies in the region.
    placed: Vec<Placed>,
}

/// One disk as the journal tells it.
struct Told {
    base: u64,
    front: u64,
    steps: Vec<Step>,
    /// Length, data, hashes of front and tail.
    finished: Option<(u64, u64, Digest, Digest)>,
}

/// Finds what holds, and cuts part and journal back to it.
pub(super) fn survey(
    job: &Job,
    part: &PartDir,
    journal: &mut Journal,
    package: &Package<'_>,
    target: Target,
    control: &Control<'_>,
) -> Result<Found, Error> {
    let mut found = Found::default();
    let mut places = Vec::new();
    let mut at = 0;
    for (number, source) in job.disks.iter().enumerate() {
        let first = at;
        let base = package.base(number, &places);
        let name = job.disk_file(number);
        let file = match part.open_existing(&name) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                if first < journal.len() {
                    control.log(tracing::Level::WARN, &format!("{name} is gone, its disk starts again"));
                }
                journal.cut(first).map_err(Error::journal)?;
                return Ok(found);
            }
            Err(e) => return Err(output_error(e.into(), &name)),
        };
        let capacity = source.disk.capacity();
        let tracer = (target.evidence() == Evidence::Placed).then(|| Tracer::new(capacity)).transpose().map_err(Error::Output)?;
        let Some(told) = read_disk(journal, number as u32, tracer, &mut at)?.filter(|told| told.base == base) else {
            journal.cut(first).map_err(Error::journal)?;
            return Ok(found);
        };
        let piece = Piece { file: &file, base, capacity, evidence: target.evidence() };
        if let Some(finished) = piece.finished(&told, job, control).map_err(|e| in_file(e, &name))? {
            places.push(Place { base, length: finished.length, data: finished.data });
            found.finished.push(finished);
            continue;
        }
        let keep = piece.intact(&told.steps, job, control).map_err(|e| in_file(e, &name))?;
        if keep < told.steps.len() {
            control.log(tracing::Level::WARN, &format!("{} of {} checkpoints of {name} hold", keep, told.steps.len()));
        }
        let position = keep.checked_sub(1).map_or(0, |last| told.steps[last].position);
        let cut = || file.set_len(told.base + position).and_then(|()| file.sync_all());
        cut().map_err(|e| output_error(e.into(), &name))?;
        journal.cut(if keep == 0 { first } else { first + 1 + keep }).map_err(Error::journal)?;
        found.partial = partial(told, keep, first + 1);
        return Ok(found);
    }
    read_rest(journal, at, &mut found)?;
    Ok(found)
}

fn in_file(error: Failed, name: &str) -> Error {
    match error {
        Failed::Io(e) => output_error(e.into(), name),
        Failed::Stopped(error) => error,
    }
}

fn partial(told: Told, keep: usize, first: usize) -> Option<Partial> {
    let Told { front, mut steps, .. } = told;
    steps.truncate(keep);
    let last = steps.last()?;
    let (next_block, data, position) = (last.next_block, last.data, last.position);
    let blocks = Blocks(steps.into_iter().flat_map(|step| step.digests).collect());
    Some(Partial { front, next_block, data, position, blocks, records: first..first + keep })
}

/// Reads the records of disk `number` from record `at` on and moves `at` behind them; `None` when it was not begun.
fn read_disk(journal: &Journal, number: u32, mut tracer: Option<Tracer>, at: &mut usize) -> Result<Option<Told>, Error> {
    let read = |i: usize| if i < journal.len() { journal.read(i).map(Some).map_err(Error::journal) } else { Ok(None) };
    let Some(Record::DiskStarted { disk, base, front }) = read(*at)? else { return Ok(None) };
    if disk != number {
        return Ok(None);
    }
    *at += 1;
    let mut told = Told { base, front, steps: Vec::new(), finished: None };
    let mut last = (0, front);
    loop {
        match read(*at)? {
            Some(Record::Checkpoint(c)) if c.disk == number && c.from == last.1 && c.position >= c.from && c.next_block > last.0 => {
                last = (c.next_block, c.position);
                let Checkpoint { next_block, data, from, position, hash, digests, piece, .. } = c;
                let placed = match &mut tracer {
                    None => Vec::new(),
                    // A piece that leads elsewhere is no checkpoint of this disk, nor is what follows it.
                    Some(tracer) => match tracer.next(&piece) {
                        Ok((placed, reached)) if reached == position => placed,
                        _ => return Ok(Some(told)),
                    },
                };
                told.steps.push(Step { next_block, data, from, position, hash, digests, placed });
            }
            Some(Record::DiskFinished { disk, length, data, front, tail }) if disk == number && length >= last.1 => {
                told.finished = Some((length, data, front, tail));
            }
            _ => return Ok(Some(told)),
        }
        *at += 1;
        if told.finished.is_some() {
            return Ok(Some(told));
        }
    }
}

/// Reads the records behind the last disk.
fn read_rest(journal: &Journal, at: usize, found: &mut Found) -> Result<(), Error> {
    for i in at..journal.len() {
        match journal.read(i).map_err(Error::journal)? {
            Record::AllWritten { files } => found.all_written = Some(files),
            Record::Verified { disk, next_block, data, blocks } => {
                found.verified.insert(disk, Verified { next_block, data, blocks });
            }
            Record::Hashed { file, position, state, done } => {
                found.hashed.insert(file, Hashed { position, state, done });
            }
            _ => {}
        }
    }
    Ok(())
}

/// Why a check came to no answer.
enum Failed {
    Io(io::Error),
    Stopped(Error),
}

impl From<io::Error> for Failed {
    fn from(e: io::Error) -> Self {
        Self::Io(e)
    }
}

/// Where a disk lies.
struct Piece<'a> {
    file: &'a File,
    base: u64,
    capacity: u64,
    evidence: Evidence,
}

impl Piece<'_> {
    /// The disk when it is complete. With a read-back ahead its length will do: each block is going to be compared.
    fn finished(&self, told: &Told, job: &Job, control: &Control<'_>) -> Result<Option<Finished>, Failed> {
        let Some((length, data, front, tail)) = told.finished else { return Ok(None) };
        if self.file.metadata()?.len() < self.base + length {
            return Ok(None);
        }
        if !job.verify {
            let end = told.steps.last().map_or(told.front, |step| step.position);
            let holds = self.evidence == Evidence::Blocks
                || (hash_region(self.file, self.base, self.base + told.front)? == front
                    && hash_region(self.file, self.base + end, self.base + length)? == tail);
            if !holds || self.intact(&told.steps, job, control)? < told.steps.len() {
                return Ok(None);
            }
        }
        let blocks = Blocks(told.steps.iter().flat_map(|step| step.digests.iter().copied()).collect());
        Ok(Some(Finished { length, data, blocks }))
    }

    /// How many of the first steps hold, checked on all cores.
    fn intact(&self, steps: &[Step], job: &Job, control: &Control<'_>) -> Result<usize, Failed> {
        let len = self.file.metadata()?.len();
        let reach = steps.partition_point(|step| self.base.saturating_add(step.position) <= len);
        let (next, bad) = (AtomicUsize::new(0), AtomicUsize::new(reach));
        let workers = workers(&job.tuning).min(reach.max(1));
        let crew = Crew::new(workers);
        let results: io::Result<Vec<()>> = thread::scope(|scope| {
            let check = || {
                let _member = crew.member();
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    if i >= bad.load(Ordering::Relaxed) || control.stopped() {
                        return Ok(());
                    }
                    if !self.holds(&steps[i])? {
                        bad.fetch_min(i, Ordering::Relaxed);
                    }
                }
            };
            let threads: Vec<_> = (0..workers).map(|_| scope.spawn(check)).collect();
            crew.wait(|| control.poll());
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap_or_else(|_| Err(io::Error::other("a thread of the check panicked"))))
                .collect()
        });
        results?;
        control.check().map_err(Failed::Stopped)?;
        Ok(bad.into_inner())
    }

    /// Whether the bytes that a step stands for are there.
    fn holds(&self, step: &Step) -> io::Result<bool> {
        if self.evidence == Evidence::Region {
            return Ok(hash_region(self.file, self.base + step.from, self.base + step.position)? == step.hash);
        }
        for placed in &step.placed {
            if let Placed::Table { host, digest } = placed {
                let at = self.base + host;
                if hash_region(self.file, at, at + UNIT as u64)? != *digest {
                    return Ok(false);
                }
            }
        }
        let mut buf = Vec::new();
        for (block, digest) in &step.digests {
            buf.resize(block_len(*block, self.capacity), 0);
            match self.evidence {
                Evidence::Placed => self.gather(step, *block, &mut buf)?,
                _ => read_padded(self.file, &mut buf, self.base + block * BLOCK)?,
            }
            if block_digest(&buf) != *digest {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Reads a block from where its units were placed; what was not placed is zeros.
    fn gather(&self, step: &Step, block: u64, buf: &mut [u8]) -> io::Result<()> {
        let (unit, per_block) = (UNIT as u64, BLOCK / UNIT as u64);
        let (first, end) = (block * per_block, (block + 1) * per_block);
        buf.fill(0);
        for placed in &step.placed {
            let Placed::Units { index, count, host } = placed else { continue };
            let (from, to) = (first.max(*index), end.min(index + count));
            if from >= to {
                continue;
            }
            let start = ((from - first) * unit) as usize;
            // The disk's last unit is longer in the image than on the disk.
            let stop = (((to - first) * unit) as usize).min(buf.len());
            self.file.read_exact_at(&mut buf[start..stop], self.base + host + (from - index) * unit)?;
        }
        Ok(())
    }
}

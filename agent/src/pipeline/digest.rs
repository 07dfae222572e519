//! A disk without a manifest: every block that it holds is read once and hashed.
//!
//! Owns: the digests and the list of blocks that cannot be read. Never: compares with anything: without a manifest there is nothing that says
//! what should be there. A crash here costs nothing: it only reads.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Instant;

use shared::manifest::{BLOCK, Blocks, block_digest};

use super::check::BadBlock;
use super::control::Crew;
use super::copy::workers;
use super::files::{STEP, mostly_holes, sha256};
use super::plan::{self, Plan, Task, block_len};
use super::throttle::Throttle;
use super::{Error, Tuning};
use crate::formats::{Disk, FormatError, Scratch, is_zero};

/// Bad blocks that are listed.
const MAX_LISTED: usize = 1000;

/// Data bytes of a disk; `None` where counting took longer than until `deadline`.
pub fn data_bytes(disk: &dyn Disk, deadline: Instant) -> Result<Option<u64>, FormatError> {
    let late = || Instant::now() >= deadline;
    let sum = plan::data_bytes(disk, &late)?;
    Ok((!late()).then_some(sum))
}

/// SHA-256 of a file in hex; `None` where a sparse raw image has so many holes that nobody hashes them, and where `stop` said so.
/// `raw_data` is the data of a raw image, absent for other formats.
pub fn file_sha256(file: &File, raw_data: Option<u64>, bandwidth: Option<u64>, stop: &dyn Fn() -> bool) -> io::Result<Option<String>> {
    let size = file.metadata()?.len();
    if raw_data.is_some_and(|data| mostly_holes(size, data)) {
        return Ok(None);
    }
    let throttle = Throttle::new(bandwidth);
    sha256(file, &|| !throttle.take(STEP as u64, stop))
}

/// What reading a disk once gave.
#[derive(Debug, Default)]
pub struct Digests {
    /// Digests of the blocks that are not zero.
    pub blocks: Blocks,
    /// The first blocks that cannot be read, ascending.
    pub bad: Vec<BadBlock>,
    /// All of them.
    pub bad_blocks: u64,
    /// Blocks read.
    pub read_blocks: u64,
}

/// Reads and hashes what a disk holds, at most `bandwidth` bytes a second. `tick` is told the data bytes read so far; when it answers false,
/// this ends with [`Error::Cancelled`]. A device that fails is an error; a block that is damaged is listed.
pub fn digest_disk(name: &str, disk: &dyn Disk, bandwidth: Option<u64>, tick: &dyn Fn(u64) -> bool) -> Result<Digests, Error> {
    let (stopped, read, bad_blocks, read_blocks) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    let (walk, throttle) = (Mutex::new(Plan::new(disk, 0)), Throttle::new(bandwidth));
    let (found, failed) = (Mutex::new((Blocks::default(), BTreeMap::new())), Mutex::new(None));
    let fail = |e: FormatError| {
        failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(e);
        stopped.store(true, Ordering::Relaxed);
    };
    let work = || {
        let (mut task, mut buf, mut scratch) = (Task::default(), Vec::new(), Scratch::default());
        while !stopped.load(Ordering::Relaxed) {
            match walk.lock().unwrap_or_else(PoisonError::into_inner).next(&mut task) {
                Ok(true) => {}
                Ok(false) => return,
                Err(e) => return fail(e),
            }
            if !throttle.take(task.data, &|| stopped.load(Ordering::Relaxed)) {
                return;
            }
            buf.resize(block_len(task.block, disk.capacity()), 0);
            let looked = disk.read_at(task.offset(), &mut buf, &mut scratch);
            read.fetch_add(task.data, Ordering::Relaxed);
            read_blocks.fetch_add(1, Ordering::Relaxed);
            let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
            match looked {
                Ok(()) if is_zero(&buf) => {}
                Ok(()) => {
                    found.0.0.insert(task.block, block_digest(&buf));
                }
                Err(e @ (FormatError::Corrupt { .. } | FormatError::Refused { .. })) => {
                    bad_blocks.fetch_add(1, Ordering::Relaxed);
                    found.1.insert(task.block, e.to_string());
                    if found.1.len() > MAX_LISTED {
                        found.1.pop_last();
                    }
                }
                Err(e) => return fail(e),
            }
        }
    };
    let threads = workers(&Tuning::default());
    let crew = Crew::new(threads);
    let mut cancelled = false;
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let _member = crew.member();
                work();
            });
        }
        crew.wait(|| {
            if !tick(read.load(Ordering::Relaxed)) {
                cancelled = true;
                stopped.store(true, Ordering::Relaxed);
            }
        });
    });
    if let Some(source) = failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        return Err(Error::Source { disk: name.to_owned(), source });
    }
    if cancelled {
        return Err(Error::Cancelled);
    }
    let (blocks, bad) = found.into_inner().unwrap_or_else(PoisonError::into_inner);
    let bad = bad.into_iter().map(|(block, reason)| BadBlock { block, offset: block * BLOCK, reason }).collect();
    Ok(Digests { blocks, bad, bad_blocks: bad_blocks.into_inner(), read_blocks: read_blocks.into_inner() })
}

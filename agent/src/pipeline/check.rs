//! Proving an export again: the files beside a manifest against what it says, offline.
//!
//! Owns: the report of everything that is wrong, block by block; it goes on after damage.
//! Never: stops at the first bad block, trusts a name of the manifest that is not bare.
//! A crash here costs nothing: it only reads.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use shared::manifest::{BLOCK, Blocks, DiskEntry, FileEntry, Manifest, Over};

use super::control::Crew;
use super::copy::workers;
use super::files::{STEP, sha256};
use super::plan::{block_count, block_len};
use super::target::{open_layer, open_output};
use super::throttle::Throttle;
use super::verify::{Look, compare};
use super::{Error, Tuning};
use crate::formats::{Disk, FormatError, Scratch, Window, ova};

/// Bad blocks that are listed for one disk; more are counted.
const MAX_LISTED: usize = 10_000;

/// Blocks that are asked for their extents at once.
const STRIDE: u64 = 256;

/// A block that is not what the manifest says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadBlock {
    /// Its number.
    pub block: u64,
    /// Its first byte on the logical disk.
    pub offset: u64,
    /// What was found.
    pub reason: String,
}

/// What became of one disk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DiskReport {
    /// `disk-0`.
    pub name: String,
    /// Its file.
    pub file: String,
    /// Blocks read.
    pub blocks_checked: u64,
    /// The first bad blocks, ascending, at most 10,000.
    pub bad: Vec<BadBlock>,
    /// All bad blocks.
    pub bad_blocks: u64,
    /// Why no block could be read.
    pub unreadable: Option<String>,
}

/// What became of one file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileReport {
    /// Its name.
    pub path: String,
    /// What is wrong with it.
    pub problem: Option<String>,
    /// Whether its SHA-256 was compared; a sparse raw image has none.
    pub hashed: bool,
}

/// What became of an export.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// The disks, in the manifest's order.
    pub disks: Vec<DiskReport>,
    /// The files, in the manifest's order.
    pub files: Vec<FileReport>,
}

impl Report {
    /// Whether everything is as the manifest says.
    pub fn intact(&self) -> bool {
        self.disks.iter().all(|disk| disk.bad_blocks == 0 && disk.unreadable.is_none())
            && self.files.iter().all(|file| file.problem.is_none())
    }
}

/// Opens a file beside the manifest by its bare name, for reading.
pub type Opener<'a> = &'a (dyn Fn(&str) -> io::Result<File> + Sync);

/// Opens what a layer lies over.
pub type Below<'a> = &'a (dyn Fn(&Over) -> Result<Arc<dyn Disk>, FormatError> + Sync);

/// As [`verify_files_at`], of an export without layers.
#[cfg(test)]
pub fn verify_files(manifest: &Manifest, open: Opener<'_>, tick: &dyn Fn(u64) -> bool) -> Result<Report, Error> {
    let below = |over: &Over| {
        let text = format!("it lies over {} of {}, which is not looked for here", over.file, over.job);
        Err(FormatError::Unsupported(text))
    };
    verify_files_at(manifest, open, &below, None, tick)
}

/// Reads all disks and files that `manifest` names, layers over what `below` opens, at most `bandwidth` bytes a second (the files' SHA-256
/// included), and reports each bad block. `tick` is told the bytes of the disks' blocks read so far, about twenty times a second; when it
/// answers false the check ends with [`Error::Cancelled`], the only error there is.
pub fn verify_files_at(
    manifest: &Manifest,
    open: Opener<'_>,
    below: Below<'_>,
    bandwidth: Option<u64>,
    tick: &dyn Fn(u64) -> bool,
) -> Result<Report, Error> {
    let (stopped, read) = (AtomicBool::new(false), AtomicU64::new(0));
    let throttle = Throttle::new(bandwidth);
    let halt = || stopped.load(Ordering::Relaxed);
    let crew = Crew::new(2);
    let report = thread::scope(|scope| {
        let files = scope.spawn(|| {
            let _member = crew.member();
            manifest.files.iter().map(|file| check_file(file, open, &|| !throttle.take(STEP as u64, &halt))).collect()
        });
        let disks = scope.spawn(|| {
            let _member = crew.member();
            let pace = Pace { throttle: &throttle, stopped: &stopped, read: &read };
            manifest.disks.iter().map(|disk| check_disk(disk, manifest, (open, below), &pace)).collect()
        });
        crew.wait(|| {
            if !tick(read.load(Ordering::Relaxed)) {
                stopped.store(true, Ordering::Relaxed);
            }
        });
        (files.join(), disks.join())
    });
    match report {
        _ if stopped.into_inner() => Err(Error::Cancelled),
        (Ok(files), Ok(disks)) => Ok(Report { disks, files }),
        _ => Err(Error::Output(FormatError::Io(io::Error::other("a thread of the check panicked")))),
    }
}

fn open_bare(name: &str, open: Opener<'_>) -> io::Result<File> {
    // People may have renamed the files, so any name will do that stays in the folder.
    let bare = !name.is_empty() && name.len() <= 255 && name != "." && name != ".." && !name.contains(['/', '\\', '\0']);
    if !bare {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{name:?} is not a bare file name")));
    }
    open(name)
}

fn check_file(entry: &FileEntry, open: Opener<'_>, stop: &dyn Fn() -> bool) -> FileReport {
    let check = || -> io::Result<Option<String>> {
        let file = open_bare(&entry.path, open)?;
        let size = file.metadata()?.len();
        if size != entry.size {
            return Ok(Some(format!("it has {size} bytes instead of {}", entry.size)));
        }
        let Some(expected) = &entry.sha256 else { return Ok(None) };
        let differs = sha256(&file, stop)?.is_some_and(|found| !found.eq_ignore_ascii_case(expected));
        Ok(differs.then(|| "its SHA-256 is not the manifest's".to_owned()))
    };
    let problem = check().unwrap_or_else(|e| Some(e.to_string()));
    FileReport { path: entry.path.clone(), problem, hashed: entry.sha256.is_some() }
}

/// What all readers of a check share.
struct Pace<'a> {
    throttle: &'a Throttle,
    stopped: &'a AtomicBool,
    read: &'a AtomicU64,
}

impl Pace<'_> {
    /// Waits for its turn; false when the check is to end.
    fn take(&self, bytes: u64) -> bool {
        self.throttle.take(bytes, &|| self.stopped.load(Ordering::Relaxed))
    }
}

fn check_disk(entry: &DiskEntry, manifest: &Manifest, open: (Opener<'_>, Below<'_>), pace: &Pace<'_>) -> DiskReport {
    let report = DiskReport { name: entry.name.clone(), file: entry.file.clone(), ..DiskReport::default() };
    let opened = entry.blocks().map_err(|e| e.to_string()).and_then(|blocks| {
        let disk = open_disk(entry, manifest, open).map_err(|e| e.to_string())?;
        match disk.capacity() {
            capacity if capacity == entry.capacity => Ok((disk, blocks)),
            capacity => Err(format!("the disk has {capacity} bytes instead of {}", entry.capacity)),
        }
    });
    match opened {
        Ok((disk, blocks)) => check_blocks(disk.as_ref(), &blocks, report, pace),
        Err(reason) => DiskReport { unreadable: Some(reason), ..report },
    }
}

fn open_disk(entry: &DiskEntry, manifest: &Manifest, (open, below): (Opener<'_>, Below<'_>)) -> Result<Arc<dyn Disk>, FormatError> {
    let format = manifest.files.iter().find(|file| file.path == entry.file).map(|file| file.format.as_str());
    let format = format.ok_or_else(|| FormatError::Unsupported(format!("the manifest does not list the file {:?}", entry.file)))?;
    let window = Window::whole(open_bare(&entry.file, open)?)?;
    if let Some(over) = &entry.over {
        return open_layer(window, below(over)?, true);
    }
    let Some(member) = &entry.member else { return open_output(format, window) };
    let entries = ova::tar::entries(&window)?;
    let found = entries.iter().find(|found| found.name == *member);
    let found = found.ok_or_else(|| FormatError::Unsupported(format!("{} has no member {member:?}", entry.file)))?;
    open_output("vmdk", window.part(found.offset, found.size)?)
}

/// The blocks to look at: those of the manifest and those that hold data, stride by stride.
struct Walk<'a> {
    disk: &'a dyn Disk,
    blocks: &'a Blocks,
    next: u64,
    looks: std::collections::btree_map::IntoIter<u64, Look>,
}

impl Walk<'_> {
    fn next(&mut self) -> Option<Look> {
        loop {
            if let Some((_, look)) = self.looks.next() {
                return Some(look);
            }
            if self.next >= block_count(self.disk.capacity()) {
                return None;
            }
            let to = self.next + STRIDE;
            self.looks = self.stride(self.next, to).into_iter();
            self.next = to;
        }
    }

    fn stride(&self, from: u64, to: u64) -> BTreeMap<u64, Look> {
        let expected = self.blocks.0.range(from..to).map(|(block, digest)| (*block, Some(*digest)));
        let held = self.held(from, to).into_iter().map(|block| (block, None));
        let mut looks = BTreeMap::new();
        for (block, expected) in expected.chain(held) {
            looks.entry(block).or_insert(Look { block, data: 0, expected, read: true });
        }
        looks
    }

    /// Blocks that hold data; where a damaged table does not tell, it is asked block by block, and a block whose table cannot be read is
    /// looked at, so that its read says why.
    fn held(&self, from: u64, to: u64) -> BTreeSet<u64> {
        let blocks =
            |extents: Vec<crate::formats::Extent>| extents.into_iter().flat_map(|e| e.offset / BLOCK..(e.offset + e.len).div_ceil(BLOCK));
        if let Ok(extents) = self.disk.extents(from * BLOCK, to * BLOCK) {
            return blocks(extents).collect();
        }
        let holds = |block: &u64| self.disk.extents(block * BLOCK, (block + 1) * BLOCK).map_or(true, |extents| !extents.is_empty());
        (from..to.min(block_count(self.disk.capacity()))).filter(holds).collect()
    }
}

fn check_blocks(disk: &dyn Disk, blocks: &Blocks, mut report: DiskReport, pace: &Pace<'_>) -> DiskReport {
    let walk = Mutex::new(Walk { disk, blocks, next: 0, looks: BTreeMap::new().into_iter() });
    let found = Mutex::new(BTreeMap::new());
    let (checked, bad) = (AtomicU64::new(0), AtomicU64::new(0));
    let work = || {
        let (mut buf, mut scratch) = (Vec::new(), Scratch::default());
        while !pace.stopped.load(Ordering::Relaxed) {
            let Some(look) = walk.lock().unwrap_or_else(PoisonError::into_inner).next() else { return };
            if !pace.take(block_len(look.block, disk.capacity()) as u64) {
                return;
            }
            let reason = compare(disk, &look, &mut buf, &mut scratch).unwrap_or_else(|e| Some(e.to_string()));
            checked.fetch_add(1, Ordering::Relaxed);
            pace.read.fetch_add(block_len(look.block, disk.capacity()) as u64, Ordering::Relaxed);
            let Some(reason) = reason else { continue };
            bad.fetch_add(1, Ordering::Relaxed);
            let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
            found.insert(look.block, reason);
            if found.len() > MAX_LISTED {
                found.pop_last();
            }
        }
    };
    let threads = workers(&Tuning::default());
    thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(work))));
    let found = found.into_inner().unwrap_or_else(PoisonError::into_inner);
    report.bad = found.into_iter().map(|(block, reason)| BadBlock { block, offset: block * BLOCK, reason }).collect();
    (report.blocks_checked, report.bad_blocks) = (checked.into_inner(), bad.into_inner());
    report
}

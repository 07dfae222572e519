//! The disk engine: from open sources to a proven output in a folder.
//!
//! Owns: the order of a job's stages and what each may assume: survey an earlier attempt, copy disk after disk, put the package around them,
//! read everything back. `plan` says which blocks hold data, `copy` moves them through `queue`, `seal` makes checkpoints true, `resume` finds
//! what holds, `verify` and `files` prove, `check` proves again years later.
//! Never: opens a path (folder and journal are handed in opened), publishes (rename is the worker's, after Commit), retries (the queue's).
//! A crash here costs one checkpoint; the order of writes that makes it so is drawn in [`crate::journal`].

mod check;
mod control;
mod copy;
mod digest;
mod files;
mod package;
mod part;
mod plan;
mod queue;
mod resume;
mod seal;
mod stages;
mod target;
#[cfg(test)]
mod tests;
mod throttle;
mod verify;
mod work;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use shared::manifest::{Blocks, Digest, FileEntry, Receipt};
use shared::vm::Vm;

#[cfg(test)]
pub use check::verify_files;
pub use check::{BadBlock, Below, DiskReport, FileReport, Opener, Report, verify_files_at};
pub use digest::{Digests, data_bytes, digest_disk, file_sha256};
pub use part::PartDir;
pub use stages::run;

use crate::formats::{Compression, Disk, FormatError};
use crate::journal::{DiskIdentity, Identity};

/// What a job may be written as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// Raw images, sparse.
    Raw,
    /// qcow2 version 3.
    Qcow2,
    /// VHDX, dynamic.
    Vhdx,
    /// VHD, dynamic.
    Vhd,
    /// VDI, dynamic.
    Vdi,
    /// streamOptimized VMDKs.
    Vmdk,
    /// A description, its manifest and streamOptimized VMDKs.
    Ovf,
    /// The same in one archive.
    Ova,
}

impl Format {
    /// The name as the API spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Vhdx => "vhdx",
            Self::Vhd => "vhd",
            Self::Vdi => "vdi",
            Self::Vmdk => "vmdk",
            Self::Ovf => "ovf",
            Self::Ova => "ova",
        }
    }

    /// Format of each disk inside.
    pub fn disk_format(self) -> &'static str {
        match self {
            Self::Ovf | Self::Ova => "vmdk",
            other => other.name(),
        }
    }
}

/// A disk to copy.
#[derive(Clone)]
pub struct SourceDisk {
    /// `disk-0`; of a snapshot `disk-0-snapshot-1`.
    pub name: String,
    /// Which earlier state it is; those come behind the present ones.
    pub snapshot: Option<shared::vm::Snapshot>,
    /// What makes its content the same content in a later attempt: inode and change time, snapshot and change id, …
    pub identity: String,
    /// The open disk.
    pub disk: Arc<dyn Disk>,
    /// The earlier state that its copy is laid over; then `disk` is a [`crate::formats::over::Over`] of both.
    pub base: Option<Base>,
}

/// An earlier state of a disk, proven once: what a copy of the disk leaves unsaid. Only for qcow2 that is compressed.
#[derive(Clone)]
pub struct Base {
    /// It, whole.
    pub disk: Arc<dyn Disk>,
    /// Its digests. What it holds is held against them before anything is built on it.
    pub blocks: Arc<Blocks>,
    /// Where it is; none: the copy is to be complete in itself, and the base is only read.
    pub over: Option<shared::manifest::Over>,
}

impl Base {
    /// Its path from the folder of a copy: both folders lie side by side.
    fn backing(&self) -> Option<String> {
        self.over.as_ref().map(|over| format!("../{}/{}", over.job, over.file))
    }
}

/// How often to checkpoint, and how many threads.
#[derive(Clone, Copy, Debug)]
pub struct Tuning {
    /// Data bytes between two checkpoints.
    pub checkpoint_bytes: u64,
    /// Time between two checkpoints while there is something new.
    pub checkpoint_every: Duration,
    /// Threads that read and encode, 1 to 10; all cores when absent.
    pub workers: Option<usize>,
    /// Whether a later attempt is to go on from a checkpoint. If not, checkpoints only say how far the output is, and nothing but its end is
    /// synced.
    pub resumable: bool,
}

impl Default for Tuning {
    fn default() -> Self {
        Self { checkpoint_bytes: 64 << 20, checkpoint_every: Duration::from_secs(5), workers: None, resumable: true }
    }
}

/// A copy to be made. Everything but `pass_on`, `sha256`, `verify`, `bandwidth` and `tuning` must be the same in each attempt, else it starts anew.
#[derive(Clone)]
pub struct Job {
    /// The job's id; `convert` for a conversion without a server.
    pub id: String,
    /// The VM: names the files and is described in OVF and OVA, for which `vm.disks` must be the disks below.
    pub vm: Vm,
    /// Its disks.
    pub disks: Vec<SourceDisk>,
    /// What to write.
    pub format: Format,
    /// How to compress; absent: qcow2 plain, VMDK deflate at level 1.
    pub compression: Option<Compression>,
    /// Whether units that lie compressed at the source as they are wanted are passed on as they are: checked and hashed, not compressed again.
    pub pass_on: bool,
    /// Whether the SHA-256 of each output file goes into the manifest (of the members of an OVF or OVA it always goes into their `.mf`).
    pub sha256: bool,
    /// Whether to read back and compare.
    pub verify: bool,
    /// Limit of data bytes read per second.
    pub bandwidth: Option<u64>,
    /// Content id of VMDKs.
    pub cid: u32,
    /// Seconds since 1970 for the members of an OVA.
    pub created: u64,
    /// Checkpoints and threads.
    pub tuning: Tuning,
}

impl Job {
    /// What its journal is opened with.
    pub fn identity(&self) -> Identity {
        let disk =
            |disk: &SourceDisk| DiskIdentity { name: disk.name.clone(), capacity: disk.disk.capacity(), identity: disk.identity.clone() };
        Identity {
            job: self.id.clone(),
            vm: self.vm.name.clone(),
            format: self.format.name().to_owned(),
            compression: self.compression,
            disks: self.disks.iter().map(disk).collect(),
        }
    }

    /// Bare name of the file that holds disk `n`.
    pub fn disk_file(&self, n: usize) -> String {
        let (disk, present) = (&self.disks[n], self.disks.iter().filter(|disk| disk.snapshot.is_none()).count());
        match &disk.snapshot {
            None => part::disk_file(&self.vm.name, self.format, n, present),
            Some(_) => part::snapshot_file(&self.vm.name, self.format, &disk.name),
        }
    }
}

/// Bare names of the files that a job would make, its manifests aside.
pub fn output_names(vm: &str, format: Format, disks: &[SourceDisk]) -> Vec<String> {
    let present = disks.iter().filter(|disk| disk.snapshot.is_none()).count();
    let name = |(n, disk): (usize, &SourceDisk)| match &disk.snapshot {
        None => part::disk_file(vm, format, n, present),
        Some(_) => part::snapshot_file(vm, format, &disk.name),
    };
    let mut names: Vec<String> = disks.iter().enumerate().map(name).collect();
    match format {
        Format::Ova => names.truncate(1),
        Format::Ovf => {
            names.splice(0..0, ["ovf", "mf"].map(|extension| format!("{}.{extension}", crate::formats::ova::stem(vm)))).for_each(drop)
        }
        _ => {}
    }
    names
}

/// The stages that a caller sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Counting data, checking what an earlier attempt left.
    Preparing,
    /// Moving blocks.
    Copying,
    /// Reading the output back.
    Verifying,
}

/// Where a job is, in data bytes: the lengths of the sources' data extents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// The stage.
    pub stage: Stage,
    /// Of all disks; 0 until they are counted.
    pub data_bytes: u64,
    /// Read from the sources in this attempt.
    pub read: u64,
    /// Written, synced and journalled, in this attempt or before.
    pub durable: u64,
    /// Read back and compared, in this attempt or before.
    pub verified: u64,
    /// Durable when this attempt began.
    pub resumed: u64,
}

/// How the caller wants a job to end early.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// For good: nothing more is written.
    Cancel,
    /// Until later: what is in order is sealed first.
    Park,
}

/// The caller's ear and hand.
pub trait Watch: Sync {
    /// Told about five times a second.
    fn progress(&self, snapshot: &Snapshot);
    /// Told what an operator may want to know.
    fn log(&self, level: tracing::Level, stage: Stage, text: &str);
    /// Asked about every 25 ms; the bytes stop within a second.
    fn stop(&self) -> Option<Stop>;
}

/// One disk of a finished job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskOutcome {
    /// `disk-0`, or `disk-0-snapshot-1`.
    pub name: String,
    /// Which earlier state it is.
    pub snapshot: Option<shared::vm::Snapshot>,
    /// File in the folder.
    pub file: String,
    /// Member of that file when it is an OVA.
    pub member: Option<String>,
    /// Bytes.
    pub capacity: u64,
    /// Digests of the non-zero blocks.
    pub blocks: Blocks,
    /// Root over them.
    pub root: Digest,
    /// What the file lies over.
    pub over: Option<shared::manifest::Over>,
}

/// What a finished job has to show.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The disks in order.
    pub disks: Vec<DiskOutcome>,
    /// The files in the folder.
    pub files: Vec<FileEntry>,
    /// How it was proven.
    pub receipt: Receipt,
    /// Data bytes of all disks.
    pub data_bytes: u64,
    /// Data bytes read from the sources in this attempt.
    pub bytes_read: u64,
    /// Data bytes taken over from earlier attempts.
    pub resumed_from: u64,
}

/// Why a job ended without an outcome.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The disk or the quota is full.
    #[error("no space left while writing {0}")]
    NoSpace(String),
    /// The caller cancelled.
    #[error("cancelled")]
    Cancelled,
    /// The caller parked; another run goes on from here.
    #[error("parked")]
    Parked,
    /// The source could not be read.
    #[error("{disk} cannot be read: {source}")]
    Source {
        /// Name of the disk.
        disk: String,
        /// Why.
        source: FormatError,
    },
    /// The output could not be written, or the job asks for something that its format does not know.
    #[error("the output cannot be written: {0}")]
    Output(FormatError),
    /// What was read back is not what was read from the source.
    #[error("verification failed: {disk}, block {block} at byte {offset}: {reason}")]
    Mismatch {
        /// Name of the disk.
        disk: String,
        /// Number of the block.
        block: u64,
        /// Its first byte on the logical disk.
        offset: u64,
        /// What was found.
        reason: String,
    },
    /// The journal could not be read or written.
    #[error("the job's journal: {0}")]
    Journal(io::Error),
}

impl Error {
    fn journal(e: io::Error) -> Self {
        if is_full(&e) { Self::NoSpace("the journal".to_owned()) } else { Self::Journal(e) }
    }
}

impl From<Stop> for Error {
    fn from(stop: Stop) -> Self {
        match stop {
            Stop::Cancel => Self::Cancelled,
            Stop::Park => Self::Parked,
        }
    }
}

fn is_full(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// An error of the output, with a full disk told apart.
fn output_error(e: FormatError, file: &str) -> Error {
    match e {
        FormatError::Io(e) if is_full(&e) => Error::NoSpace(file.to_owned()),
        e => Error::Output(e),
    }
}

//! Where VMs come from.
//!
//! Owns: what every provider is to the worker: an inventory, and the disks of one VM opened for reading.
//! Never: converts or writes. A crash here costs nothing: a source is only read.

pub mod file;
pub mod local;

use std::sync::Arc;

use shared::error::Code;
use shared::vm::{Snapshot, Vm};

use crate::formats::Disk;

/// One disk of a VM, opened.
pub struct Opened {
    /// `disk-0`, …; of a snapshot `disk-0-snapshot-1`, …
    pub name: String,
    /// Which earlier state it is; none: the present one.
    pub snapshot: Option<Snapshot>,
    /// The disk.
    pub disk: Arc<dyn Disk>,
    /// What makes this content the same content at a resume: inode, size and change time of its files.
    pub identity: String,
}

/// Why a source did not give what was asked.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// The stable word.
    pub code: Code,
    /// The sentence.
    pub message: String,
    /// Whether the same might work a moment later.
    pub retryable: bool,
}

impl Error {
    /// A failure that trying again does not mend.
    pub fn fatal(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), retryable: false }
    }
}

/// A provider connection, opened on this agent.
pub trait Source: Send + Sync {
    /// All VMs. One that cannot be exported is listed with its `problem`.
    fn inventory(&self) -> Result<Vec<Vm>, Error>;

    /// The VM of this id with its disks, as far as an inventory looks: nothing is read through.
    fn look(&self, vm_id: &str) -> Result<(Vm, Vec<Opened>), Error>;

    /// The VM of this id with its disks.
    fn open(&self, vm_id: &str) -> Result<(Vm, Vec<Opened>), Error>;

    /// The snapshots of the VM's disks, disk by disk, the oldest first.
    fn open_snapshots(&self, vm_id: &str) -> Result<Vec<Opened>, Error>;
}

//! Where VMs come from.
//!
//! Owns: what every provider is to the worker: an inventory, and the disks of one VM opened for reading.
//! Never: converts or writes. A crash here costs nothing: a source is only read.

pub mod file;
pub mod libvirt;
pub mod local;
pub mod vsphere;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use proto::v1;
use serde::Serialize;
use shared::details::Details;
use shared::error::Code;
use shared::options::Action;
use shared::snapshots::{self, Wish};
use shared::vm::{Snapshot, Vm};

use crate::egress::Screen;
use crate::formats::{Disk, Extent, FormatError, Scratch};
use crate::touched::{Overlay, Touched};

/// The connection that a question is about.
pub fn named(connection: Option<&v1::Connection>) -> Result<&v1::Connection, Error> {
    connection.ok_or_else(|| Error::fatal(Code::BadRequest, "no connection is named"))
}

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

/// A disk of an earlier restore point.
#[derive(Clone, Debug)]
pub struct Since {
    /// The source's own key of the disk.
    pub key: String,
    /// Bytes that it had.
    pub capacity: u64,
    /// What the source called the state that it was in.
    pub change_id: Option<String>,
    /// Whether the VM had snapshots then, to one of which it may have been reverted since.
    pub had_snapshots: bool,
}

/// What a source knows of the areas of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Areas {
    /// Nothing, for this reason: all of it has to be read.
    Unknown(String),
    /// All that holds data.
    Allocated(Vec<Extent>),
    /// All that was written since the earlier restore point.
    Changed(Vec<Extent>),
}

/// A disk, frozen, of which the source may say what has changed.
pub struct Frozen {
    /// It.
    pub opened: Opened,
    /// The source's own key of the disk, which is the same at the next restore point.
    pub key: String,
    /// What the source calls this state; none where it does not track changes.
    pub change_id: Option<String>,
    /// What it knows.
    pub areas: Areas,
    /// Bytes that came from the source for it so far.
    pub moved: Moved,
}

/// Bytes that came from a source.
pub type Moved = Arc<std::sync::atomic::AtomicU64>;

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

/// Where a VM shows its screen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Display {
    /// The VM's name.
    pub name: String,
    /// The place.
    pub screen: Screen,
    /// Another one after each start: as long as it is the same, so is who listens at the place.
    pub life: u32,
}

/// A manifest beside a disk.
pub struct Beside {
    /// The signed document as it lies there.
    pub bytes: Vec<u8>,
    /// Name of the file that holds the disk.
    pub file: String,
    /// The member inside that file, where it is an archive.
    pub member: Option<String>,
    /// The file's length in bytes.
    pub size: u64,
}

/// What a copy of a VM is like: what really was, never what was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Consistency {
    /// The VM was off.
    Off,
    /// As after a power failure: what the guest had not written yet is not there.
    CrashConsistent,
    /// The guest had flushed and frozen its file systems.
    ApplicationConsistent,
}

/// Not 0 once the job is to stop: whoever waits for a server looks at it.
pub type Stopping = Arc<std::sync::atomic::AtomicU8>;

/// How long an act at a source may take, and whether somebody still waits for it.
pub struct Waiting {
    /// When whoever asked is told that it is not done.
    pub until: Instant,
    /// Set when nobody waits for it any more.
    pub given_up: Arc<AtomicBool>,
}

impl Waiting {
    /// Whether it must not begin any more.
    pub fn is_over(&self) -> bool {
        self.given_up.load(Ordering::Relaxed) || self.left().is_zero()
    }

    /// What is left of the time.
    pub fn left(&self) -> Duration {
        self.until.saturating_duration_since(Instant::now())
    }

    /// Refuses to begin what nobody waits for any more.
    ///
    /// # Errors
    /// When that is so.
    pub fn check(&self) -> Result<(), Error> {
        if self.is_over() {
            return Err(Error::fatal(Code::Unavailable, "nobody waits for it any more; it was not begun"));
        }
        Ok(())
    }
}

/// How a source tells what it is about to touch, and how it has chosen to read.
pub trait Touch {
    /// The job.
    fn job(&self) -> &str;

    /// Waits until no other job has the VM frozen, or is about to.
    fn take_vm(&self) -> std::io::Result<()>;

    /// A snapshot of this name is about to be made. Durable when it returns.
    fn snapshot(&self, name: &str) -> std::io::Result<()>;

    /// The snapshot, a backup job, is about to be asked for: as long as there is no answer, one that is not there may still come.
    fn asking(&self, is_open: bool) -> std::io::Result<()>;

    /// A lease of this id was given. Durable when it returns.
    fn lease(&self, id: &str) -> std::io::Result<()>;

    /// A checkpoint of this name is about to be made. Durable when it returns.
    fn checkpoint(&self, name: &str) -> std::io::Result<()>;

    /// These files are about to be laid over the VM's disks. Durable when it returns.
    fn overlays(&self, overlays: &[Overlay]) -> std::io::Result<()>;

    /// The tracking of changes is about to be switched on. Durable when it returns.
    fn tracking(&self) -> std::io::Result<()>;

    /// Whether the guest of a VM that runs is to flush and freeze its file systems for the moment that is read.
    fn quiesces(&self) -> bool;

    /// The guest is about to be asked to freeze its file systems, or has thawed them. Durable when it returns.
    fn quiescing(&self, is_open: bool) -> std::io::Result<()>;

    /// Whether the VM was halted with its file systems frozen.
    fn is_halted_calm(&self) -> std::io::Result<bool>;

    /// What is read is like this.
    fn reads(&self, consistency: Consistency);

    /// Whether the job is to stop.
    fn stopping(&self) -> Stopping;

    /// A line of the job's log.
    fn log(&self, text: String);
}

/// A provider connection, opened on this agent.
pub trait Source: Send + Sync {
    /// All VMs. One that cannot be exported is listed with its `problem`.
    fn inventory(&self) -> Result<Vec<Vm>, Error>;

    /// Those of these VMs that are still there, as an inventory shows them.
    fn some(&self, vm_ids: &BTreeSet<String>) -> Result<Vec<Vm>, Error> {
        Ok(self.inventory()?.into_iter().filter(|vm| vm_ids.contains(&vm.id)).collect())
    }

    /// The VM in detail; `privileges`: with what the account may do.
    fn describe(&self, vm_id: &str, privileges: bool) -> Result<Details, Error> {
        let _ = (vm_id, privileges);
        Err(Error::fatal(Code::NotBuilt, "this provider knows no more of a VM than its inventory shows"))
    }

    /// The VM of this id with its disks, as far as an inventory looks: nothing is read through.
    fn look(&self, vm_id: &str) -> Result<(Vm, Vec<Opened>), Error>;

    /// The VM of this id with its disks.
    fn open(&self, vm_id: &str) -> Result<(Vm, Vec<Opened>), Error>;

    /// The same for a job, which may touch the source for it: that is noted beforehand.
    fn open_for(&self, vm_id: &str, touch: &dyn Touch) -> Result<(Vm, Vec<Opened>), Error> {
        let _ = touch;
        self.open(vm_id)
    }

    /// The same frozen, for a restore point over an earlier one whose disks were `since`.
    fn open_frozen(&self, vm_id: &str, since: &[Since], touch: &dyn Touch) -> Result<(Vm, Vec<Frozen>), Error> {
        let _ = (vm_id, since, touch);
        Err(Error::fatal(Code::NotBuilt, "backups of this kind of provider are not built yet"))
    }

    /// Switches a VM. Answers its power state right afterwards; a guest that was asked to shut down takes its time.
    fn power(&self, vm_id: &str, action: Action) -> Result<String, Error> {
        let _ = vm_id;
        Err(Error::fatal(Code::Unprocessable, format!("{action} is for VMs of a hypervisor; these are disk images")))
    }

    /// The VM's snapshots, in any order.
    fn snapshots(&self, vm_id: &str) -> Result<Vec<snapshots::Snapshot>, Error> {
        let _ = vm_id;
        Err(without_snapshots())
    }

    /// Takes a snapshot; its name is nobody's yet. It is there when this returns.
    fn take_snapshot(&self, vm_id: &str, wish: &Wish, waiting: &Waiting) -> Result<(), Error> {
        let _ = (vm_id, wish, waiting);
        Err(without_snapshots())
    }

    /// Removes a snapshot. `going`: the ids of all that go: itself, or with it all that were taken over it; else these stay as they are.
    fn remove_snapshot(
        &self,
        vm_id: &str,
        snapshot: &snapshots::Snapshot,
        going: &BTreeSet<String>,
        waiting: &Waiting,
    ) -> Result<(), Error> {
        let _ = (vm_id, snapshot, going, waiting);
        Err(without_snapshots())
    }

    /// Where a VM that is on shows its screen.
    fn display(&self, vm_id: &str) -> Result<Display, Error> {
        let _ = vm_id;
        Err(Error::fatal(Code::NotBuilt, "consoles of this kind of provider are not built yet; those of `libvirt` are"))
    }

    /// Whether a VM that is shut down can be switched on again.
    fn comes_back(&self, vm_id: &str) -> Result<(), Error> {
        let _ = vm_id;
        Ok(())
    }

    /// Stops a VM for good, so that another one takes its place, with what it holds as it is: nothing is written to its disks any more. `undo`
    /// of a note that it is halted lets it go on.
    fn halt(&self, vm_id: &str, touch: &dyn Touch) -> Result<(), Error> {
        let _ = (vm_id, touch);
        Err(Error::fatal(Code::NotBuilt, "this kind of provider stops no VM for a warm migration"))
    }

    /// Whether a VM that was halted still is: nobody has let it go on.
    fn is_halted(&self, vm_id: &str) -> Result<bool, Error> {
        let _ = vm_id;
        Ok(false)
    }

    /// Switches a VM off that was halted, so that it does not come up again by itself.
    fn retire(&self, vm_id: &str) -> Result<(), Error> {
        let _ = vm_id;
        Ok(())
    }

    /// Whether disks that were read without being frozen are still what they were when they were opened.
    fn confirm(&self, vm_id: &str, identities: &[String]) -> Result<(), Error> {
        let _ = (vm_id, identities);
        Ok(())
    }

    /// Undoes what was touched; what is gone already is undone. Answers the snapshots that are not there and were not seen either: whoever was
    /// to make one may be at it yet, a call on its way or a task that waits.
    fn undo(&self, touched: &Touched) -> Result<Vec<String>, Error> {
        let _ = touched;
        Ok(Vec::new())
    }

    /// The same for whoever only compares: the digests of a package are not checked, which would read all of it.
    fn glance(&self, vm_id: &str) -> Result<(Vm, Vec<Opened>), Error> {
        self.open(vm_id)
    }

    /// The manifest that lies beside a disk of a VM; nothing where there is none or the disk was written since.
    fn manifest_beside(&self, vm: &Vm, disk: &shared::vm::Disk) -> std::io::Result<Option<Beside>> {
        let _ = (vm, disk);
        Ok(None)
    }

    /// The snapshots of the VM's disks, disk by disk, the oldest first.
    fn open_snapshots(&self, vm_id: &str) -> Result<Vec<Opened>, Error>;
}

fn without_snapshots() -> Error {
    Error::fatal(Code::Unprocessable, "snapshots are of VMs of a hypervisor; these are disk images")
}

/// A disk that is only looked at.
struct Unread {
    format: &'static str,
    capacity: u64,
}

impl Unread {
    fn new(format: &'static str, capacity: u64) -> Self {
        Self { format, capacity }
    }
}

impl Disk for Unread {
    fn format(&self) -> &'static str {
        self.format
    }

    fn capacity(&self) -> u64 {
        self.capacity
    }

    fn knows_holes(&self) -> bool {
        false
    }

    fn extents(&self, from: u64, to: u64) -> Result<Vec<Extent>, FormatError> {
        let end = to.min(self.capacity);
        Ok(if from < end { vec![Extent { offset: from, len: end - from }] } else { Vec::new() })
    }

    fn read_at(&self, _: u64, _: &mut [u8], _: &mut Scratch) -> Result<(), FormatError> {
        Err(FormatError::Unsupported("a disk that was only looked at is not read".to_owned()))
    }
}

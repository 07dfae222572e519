//! The provider `libvirt`: the domains of a QEMU/KVM host, through its client.
//!
//! ```text
//! virsh (processes) ◄─ domain (XML) ◄─ here ─► local (the files of a domain that is off), hot ─► nbd (the disks of one that runs)
//! ```
//! Owns: what a connection of this kind can do, and by which way a domain's disks are read:
//!
//! | the domain | way |
//! |---|---|
//! | off | its files, where they lie in a root of this host |
//! | on or paused | a pull-mode backup job over NBD: as they were when it began, while the guest goes on; its file systems frozen for that moment where that is asked |
//! | the same, where libvirt or QEMU has no such jobs | its files, while what the guest writes goes into overlays |
//!
//! Never: opens a file outside the roots, whatever a domain's XML names; guesses a disk's format; stops a guest.
//! A crash here leaves a backup job or overlays that the ledger names; what listens ends by itself.

mod begin;
mod display;
mod domain;
mod hot;
mod nbd;
mod overlay;
mod quiesce;
mod snapshots;
pub mod virsh;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

pub use shared::deploy::PROOF;
use shared::error::Code;
use shared::options::Action;
use shared::snapshots::{Snapshot, Wish};
use shared::vault::{Dir, Root, Vault};
use shared::vm::Vm;

use self::begin::Begun;
use self::domain::Domain;
use self::hot::Wanted;
pub use self::hot::{quoted, says_gone};
use self::virsh::{Sizes, Uri};
use super::local::Local;
use super::{Areas, Consistency, Display, Error, Frozen, Moved, Opened, Since, Source, Touch, Waiting};
use crate::exec;
use crate::formats::{Disk, Extent, FormatError, Scratch};
use crate::touched::Touched;

/// Bytes that are to be free, beside a twentieth of the disks, for what a guest writes over while it is read.
const SCRATCH: u64 = 256 << 20;
/// The power state of one that runs.
const ON: &str = "poweredOn";
/// For how long a guest that was asked to shut down may still be at it, milliseconds.
const SHUTTING_DOWN: i64 = 300_000;
/// For how long a job that nobody has answered may still begin, milliseconds: libvirt waits 30 s for a busy domain.
const UNANSWERED: i64 = 90_000;

/// Folders that a running domain's export needs.
pub struct Folders {
    /// Where QEMU may make sockets and scratch files.
    pub qemu: PathBuf,
    /// A folder of the agent's own, for descriptions that virsh reads.
    pub notes: Dir,
    /// Its path.
    pub notes_path: PathBuf,
}

/// A connection.
pub struct Libvirt {
    uri: Uri,
    vault: Vault,
    folders: Folders,
    /// How everything of this agent's connection is called there.
    ours: String,
}

impl Libvirt {
    /// Over a URI; disks are opened inside the roots of `vault` only.
    ///
    /// # Errors
    /// When the URI is none that is taken.
    pub fn new(uri: &str, vault: &Vault, folders: Folders, owner: &str) -> Result<Self, Error> {
        let uri = Uri::parse(uri).map_err(|message| Error::fatal(Code::BadRequest, message))?;
        Ok(Self { uri, vault: vault.clone(), folders, ours: format!("{}{owner}-", hot::OURS) })
    }

    /// Where it is.
    pub fn uri(&self) -> &Uri {
        &self.uri
    }

    /// These domains as an inventory shows them; those that are gone are not among them, nor what is nobody's VM.
    fn vms(&self, domains: &[String]) -> Result<Vec<Vm>, Error> {
        let described = self.uri.describe(domains, Sizes::Known).map_err(told)?;
        let mut vms = Vec::with_capacity(described.len());
        for (xml, facts) in &described {
            match domain::read(xml, facts) {
                Ok(domain) if domain.vm.name.starts_with(PROOF) => {}
                Ok(domain) => vms.push(domain.vm),
                Err(e) => tracing::warn!(error = e, "a domain is left out"),
            }
        }
        vms.sort_by(|a, b| a.path.cmp(&b.path).then_with(|| a.id.cmp(&b.id)));
        Ok(vms)
    }

    fn found(&self, id: &str) -> Result<Domain, Error> {
        if !virsh::is_uuid(id) {
            return Err(gone(id));
        }
        let described = self.uri.describe(&[id.to_owned()], Sizes::Fresh).map_err(told)?;
        let (xml, facts) = described.first().ok_or_else(|| gone(id))?;
        domain::read(xml, facts).map_err(|e| Error::fatal(Code::BadGateway, e))
    }

    fn exportable(&self, id: &str) -> Result<Domain, Error> {
        let found = self.found(id)?;
        let refused = |code, message: String| Err(Error::fatal(code, format!("{} cannot be exported: {message}", found.vm.name)));
        if !found.vm.problem.is_empty() {
            return refused(Code::Unprocessable, found.vm.problem.clone());
        }
        if !found.is_off && found.number.is_none() {
            let message = format!("{} is {:?}, which is neither on nor surely off", found.vm.name, found.vm.power_state);
            return Err(Error { code: Code::BadGateway, message, retryable: true });
        }
        if !self.uri.is_here {
            return refused(Code::NotBuilt, "disks of another host are not read yet; run an agent there".to_owned());
        }
        Ok(found)
    }

    /// A domain that is off, with its files.
    fn cold(&self, found: Domain) -> Result<(Vm, Vec<Opened>), Error> {
        let disks = self.disks(&found)?;
        let mut vm = found.vm;
        for (disk, opened) in vm.disks.iter_mut().zip(&disks) {
            disk.capacity = opened.disk.capacity();
        }
        Ok((vm, disks))
    }

    fn disks(&self, found: &Domain) -> Result<Vec<Opened>, Error> {
        let mut opened = Vec::with_capacity(found.vm.disks.len());
        for (disk, format) in found.vm.disks.iter().zip(&found.formats) {
            let outside = |_: shared::vault::Error| {
                let roots = self.vault.roots().map(|root| root.path.display().to_string()).collect::<Vec<_>>().join(", ");
                let message =
                    format!("{} of {} is {}, which lies outside the roots of this agent: {roots}", disk.name, found.vm.name, disk.source);
                Error::fatal(Code::OutsideRoots, message)
            };
            let place = self.vault.locate(&disk.source).map_err(outside)?;
            let folder = Local::new(place.root.dir().try_clone().map_err(|e| Error::fatal(Code::BadGateway, e.to_string()))?);
            let image = folder.open_declared(&place.below, format, Some(&place.root.path))?;
            opened.push(Opened { name: disk.name.clone(), ..image });
        }
        Ok(opened)
    }
}

/// Removes a domain that is being made, never its disks; one that is not there is removed.
pub fn remove_domain(uri: &Uri, domain: &str) -> Result<(), Error> {
    hot::remove(uri, domain).map_err(told)
}

fn gone(id: &str) -> Error {
    Error::fatal(Code::NotFound, format!("there is no domain {id:?} any more"))
}

fn ledger(e: std::io::Error) -> Error {
    Error { code: Code::Internal, message: format!("the ledger cannot be written: {e}"), retryable: true }
}

/// What a tool said, for whoever asked.
fn told(e: exec::Error) -> Error {
    match e {
        exec::Error::Missing { .. } => Error::fatal(Code::Unprocessable, e.to_string()),
        exec::Error::Failed(words) => Error { code: Code::BadGateway, message: format!("libvirt: {words}"), retryable: true },
        e => Error { code: Code::BadGateway, message: e.to_string(), retryable: true },
    }
}

impl Source for Libvirt {
    fn inventory(&self) -> Result<Vec<Vm>, Error> {
        self.vms(&self.uri.domains().map_err(told)?)
    }

    fn some(&self, vm_ids: &BTreeSet<String>) -> Result<Vec<Vm>, Error> {
        self.vms(&vm_ids.iter().cloned().collect::<Vec<_>>())
    }

    /// A domain that runs is not touched for a look: its disks are measured as libvirt tells.
    fn look(&self, vm_id: &str) -> Result<(Vm, Vec<Opened>), Error> {
        let found = self.exportable(vm_id)?;
        if found.is_off {
            return self.open(vm_id);
        }
        let unread = |disk: &shared::vm::Disk| Opened {
            name: disk.name.clone(),
            snapshot: None,
            disk: Arc::new(super::Unread::new("nbd", disk.capacity)),
            identity: String::new(),
        };
        let disks = found.vm.disks.iter().map(unread).collect();
        Ok((found.vm, disks))
    }

    fn open(&self, vm_id: &str) -> Result<(Vm, Vec<Opened>), Error> {
        let found = self.exportable(vm_id)?;
        if !found.is_off {
            let message = format!("{} is {}: only a job reads it", found.vm.name, found.vm.power_state);
            return Err(Error::fatal(Code::Unprocessable, message));
        }
        self.cold(found)
    }

    fn open_for(&self, vm_id: &str, touch: &dyn Touch) -> Result<(Vm, Vec<Opened>), Error> {
        touch.take_vm().map_err(ledger)?;
        let found = self.exportable(vm_id)?;
        if found.is_off {
            touch.reads(Consistency::Off);
            return self.cold(found);
        }
        let (name, wanted) = match self.begin(&found, Wanted::default(), touch)? {
            Begun::Job { name, wanted, .. } => (name, wanted),
            Begun::NoJobs { name, words } => {
                touch.log(format!(
                    "{} is {} and its host has no backup jobs ({words}): its files are read, and what it writes meanwhile goes into overlays",
                    found.vm.name, found.vm.power_state
                ));
                return self.over_overlays(found, &name, touch);
            }
        };
        touch.log(format!("{} is {}: it is read through the backup job {name}", found.vm.name, found.vm.power_state));
        let exports = self.exports(&found, &name, &wanted, touch)?;
        let opened = found.vm.disks.iter().zip(exports).map(|(disk, (export, _))| Opened {
            name: disk.name.clone(),
            snapshot: None,
            // Another job is another content.
            identity: format!("{name}:{}", disk.source),
            disk: Arc::new(export),
        });
        let opened = opened.collect();
        Ok((found.vm, opened))
    }

    fn open_frozen(&self, vm_id: &str, since: &[Since], touch: &dyn Touch) -> Result<(Vm, Vec<Frozen>), Error> {
        let found = self.exportable(vm_id)?;
        if found.is_off {
            touch.log(format!("{} is off: its files are read", found.vm.name));
            touch.reads(Consistency::Off);
            let targets = found.targets.clone();
            let (vm, opened) = self.cold(found)?;
            let frozen = opened.into_iter().zip(targets).map(|(opened, key)| {
                let moved = Moved::default();
                let disk = Arc::new(Counted { disk: opened.disk, moved: moved.clone() });
                let areas = Areas::Unknown("a domain that is off does not say what changed".to_owned());
                Frozen { opened: Opened { disk, ..opened }, key, change_id: None, areas, moved }
            });
            return Ok((vm, frozen.collect()));
        }
        let standing = hot::checkpoints(&self.uri, vm_id).map_err(told)?;
        // Those of points that are no more, or that lay over what a domain that was off could not forget.
        let is_needed =
            |name: &String| since.iter().any(|since| since.change_id.as_deref().is_some_and(|id| hot::checkpoint_of(id) == name));
        for stale in standing.iter().filter(|name| name.starts_with(&self.ours) && !is_needed(name)) {
            touch.checkpoint(stale).map_err(ledger)?;
        }
        let since_of = |((target, format), source): ((&String, &String), &str)| {
            let before = since.iter().find(|since| since.key == *target && hot::bears_bitmap(format) && !since.had_snapshots)?;
            // Of another image at the same place it is another book.
            let (checkpoint, of) = before.change_id.as_deref()?.split_once(' ')?;
            (of == source && standing.iter().any(|name| name == checkpoint)).then(|| checkpoint.to_owned())
        };
        // Over snapshots a checkpoint is of no use to the next point, which compares, and keeps QEMU from going back to one.
        let bearers = found.vm.snapshots == 0 && found.formats.iter().any(|format| hot::bears_bitmap(format));
        let checkpoint = bearers.then(|| format!("{}{}-{}", self.ours, touch.job(), shared::ids::random_hex::<4>()));
        let sources = found.vm.disks.iter().map(|disk| disk.source.as_str());
        let wanted = Wanted { since: found.targets.iter().zip(&found.formats).zip(sources).map(since_of).collect(), checkpoint };
        let (name, begun, reason) = match self.begin(&found, wanted, touch)? {
            Begun::Job { name, wanted, reason } => (name, wanted, reason),
            Begun::NoJobs { words, .. } => {
                let message = format!("{}: its host has no backup jobs ({words}): export it, or shut it down for a backup", found.vm.name);
                return Err(Error::fatal(Code::Unprocessable, message));
            }
        };
        touch.log(format!("{} is {}: it is read through the backup job {name}", found.vm.name, found.vm.power_state));
        let exports = self.exports(&found, &name, &begun, touch)?;
        let mut frozen = Vec::with_capacity(exports.len());
        for (n, (export, moved)) in exports.into_iter().enumerate() {
            let (disk, target, format) = (&found.vm.disks[n], &found.targets[n], &found.formats[n]);
            let before = since.iter().find(|since| since.key == *target);
            let areas = match (export.dirty(), before) {
                (Some(dirty), _) => Areas::Changed(dirty.to_vec()),
                (None, None) => Areas::Allocated(export.data().to_vec()),
                // What a revert brings back is in no bitmap.
                (None, Some(before)) if before.had_snapshots => {
                    Areas::Unknown("the domain had snapshots then, and may have been reverted to one since".to_owned())
                }
                (None, Some(_)) => {
                    Areas::Unknown(reason.clone().unwrap_or_else(|| "there is no checkpoint of the point before".to_owned()))
                }
            };
            let opened =
                Opened { name: disk.name.clone(), snapshot: None, identity: format!("{name}:{}", disk.source), disk: Arc::new(export) };
            let change_id = begun.checkpoint.as_ref().filter(|_| hot::bears_bitmap(format)).map(|name| format!("{name} {}", disk.source));
            frozen.push(Frozen { opened, key: target.clone(), change_id, areas, moved });
        }
        Ok((found.vm, frozen))
    }

    fn snapshots(&self, vm_id: &str) -> Result<Vec<Snapshot>, Error> {
        let found = self.found(vm_id)?;
        snapshots::list(&self.uri, &found.vm.id).map_err(told)
    }

    fn take_snapshot(&self, vm_id: &str, wish: &Wish, waiting: &Waiting) -> Result<(), Error> {
        let found = self.found(vm_id)?;
        if let Some(message) = snapshots::hindrance(&found, wish) {
            return Err(Error::fatal(Code::Unprocessable, message));
        }
        // QEMU goes back to no snapshot with the memory as long as a bitmap is in the image. Ours cost the next backup a comparing pass.
        let standing = hot::checkpoints(&self.uri, vm_id).map_err(told)?;
        if let Some(other) = standing.iter().find(|name| wish.memory && !name.starts_with(&self.ours)) {
            let message = format!(
                "{} has the checkpoint {other}, which is not of this connection's restore points: as long as it stands nobody can go back to a \
                 snapshot with the memory; remove it first (virsh checkpoint-delete)",
                found.vm.name
            );
            return Err(Error::fatal(Code::Conflict, message));
        }
        waiting.check()?;
        snapshots::take(&self.uri, &found, wish, (&self.folders.notes, &self.folders.notes_path), waiting)?;
        for ours in standing.iter().filter(|name| name.starts_with(&self.ours)) {
            // It is taken; what stays now goes with the next backup.
            if let Err(e) = hot::forget(&self.uri, vm_id, ours) {
                tracing::warn!(domain = vm_id, checkpoint = ours, error = %e, "a checkpoint stays beside a new snapshot");
            }
        }
        Ok(())
    }

    fn remove_snapshot(&self, vm_id: &str, snapshot: &Snapshot, going: &BTreeSet<String>, waiting: &Waiting) -> Result<(), Error> {
        let found = self.found(vm_id)?;
        waiting.check()?;
        snapshots::remove(&self.uri, &found, &snapshot.id, going, waiting)
    }

    fn power(&self, vm_id: &str, action: Action) -> Result<String, Error> {
        let found = self.found(vm_id)?;
        let command = match action {
            Action::Start => "start",
            Action::Shutdown => "shutdown",
            Action::Stop => "destroy",
            Action::Reset => "reset",
        };
        let is_off = found.is_off;
        if is_off != (action == Action::Start) {
            let message = format!("{} is {}: {action} is not for that", found.vm.name, found.vm.power_state);
            return Err(Error::fatal(Code::Conflict, message));
        }
        self.uri.ask(&[command, vm_id]).map_err(told)?;
        Ok(self.found(vm_id)?.vm.power_state)
    }

    fn display(&self, vm_id: &str) -> Result<Display, Error> {
        if !virsh::is_uuid(vm_id) {
            return Err(gone(vm_id));
        }
        if !self.uri.is_here {
            let message = "the console of another host's domain is not carried yet; run an agent there and connect qemu:///system";
            return Err(Error::fatal(Code::NotBuilt, message));
        }
        let xml = self.uri.ask(&["dumpxml", vm_id]).map_err(|e| match e {
            exec::Error::Failed(words) if says_gone(&words) => gone(vm_id),
            e => told(e),
        })?;
        display::of(xml.trim())
    }

    /// The guest stops between two instructions; what it had written is on its disks, and QEMU still knows what has changed.
    fn halt(&self, vm_id: &str, touch: &dyn Touch) -> Result<(), Error> {
        self.comes_back(vm_id)?;
        if touch.quiesces() {
            self.calm(&self.found(vm_id)?.vm, touch)?;
        }
        self.uri.ask(&["suspend", vm_id]).map(drop).map_err(told)
    }

    fn comes_back(&self, vm_id: &str) -> Result<(), Error> {
        if self.uri.ask(&["dominfo", vm_id]).map_err(told)?.lines().any(|line| line.starts_with("Persistent:") && line.ends_with("no")) {
            let message = "the domain is transient: switched off it would be gone; define it first".to_owned();
            return Err(Error::fatal(Code::Unprocessable, message));
        }
        Ok(())
    }

    fn is_halted(&self, vm_id: &str) -> Result<bool, Error> {
        let state = self.uri.ask(&["domstate", vm_id]).map_err(told)?;
        Ok(matches!(state.trim(), "paused" | "shut off"))
    }

    fn retire(&self, vm_id: &str) -> Result<(), Error> {
        if !self.is_halted(vm_id)? {
            return Err(Error::fatal(
                Code::Conflict,
                "somebody has let the old VM go on although the new one stands: switch one of them off",
            ));
        }
        if !self.found(vm_id)?.is_off {
            self.uri.ask(&["destroy", vm_id]).map_err(told)?;
        }
        // Its host must not start it again beside its successor.
        self.uri.ask(&["autostart", "--disable", vm_id]).map(drop).map_err(told)
    }

    /// A domain that was read from its files was off from the first byte to the last.
    fn confirm(&self, vm_id: &str, identities: &[String]) -> Result<(), Error> {
        if identities.iter().any(|identity| identity.contains(&self.ours)) {
            return Ok(());
        }
        let changed =
            |what: String| Error { code: Code::Conflict, message: format!("{what} while it was read; it is read again"), retryable: true };
        let found = self.found(vm_id)?;
        if !found.is_off {
            return Err(changed(format!("{} was started", found.vm.name)));
        }
        for (now, before) in self.disks(&found)?.iter().zip(identities) {
            // What a restore point adds to it stands behind.
            if !before.starts_with(&now.identity) {
                return Err(changed(format!("{} of {} was changed", now.name, found.vm.name)));
            }
        }
        Ok(())
    }

    fn undo(&self, touched: &Touched) -> Result<Vec<String>, Error> {
        let folder = match Root::open("libvirt", &self.folders.qemu, false) {
            Ok(folder) => Some(folder),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
            Err(e) => {
                return Err(Error { code: Code::BadGateway, message: format!("{}: {e}", self.folders.qemu.display()), retryable: true });
            }
        };
        if let Some(halted) = &touched.halted
            && hot::resume(&self.uri, &touched.vm).map_err(told)?
            && let Some(asked_at) = halted.asked_at
            && (0..SHUTTING_DOWN).contains(&shared::clock::now().timestamp_millis().saturating_sub(asked_at))
        {
            let message = "the guest may still be shutting down; it is switched on again then".to_owned();
            return Err(Error { code: Code::Unavailable, message, retryable: true });
        }
        // Before all else: nothing in it can write. What it says is heard in the end, so that the rest goes.
        let thawed = self.wake_left(touched);
        let mut was_there = false;
        for name in &touched.snapshots {
            was_there |= hot::end(&self.uri, &touched.vm, folder.as_ref().map(Root::dir), name).map_err(told)?;
        }
        // A job or an overlay that was asked for, and that nobody has answered: libvirt may still begin it.
        let waited = touched.asked_at.map(|at| shared::clock::now().timestamp_millis().saturating_sub(at));
        let may_come = waited.is_some_and(|waited| waited < UNANSWERED);
        let back = touched.overlays.iter().map(|overlay| overlay::put_back(&self.uri, &self.vault, &touched.vm, overlay, may_come));
        let back = back.collect::<Vec<_>>().into_iter().collect::<Result<Vec<_>, _>>()?;
        was_there |= back.contains(&overlay::Back::Done);
        // All of them, whatever becomes of one.
        let domains = touched.domains.iter().map(|domain| remove_domain(&self.uri, domain));
        let networks = touched.networks.iter().map(|network| hot::remove_network(&self.uri, network).map_err(told));
        let checkpoints = touched.checkpoints.iter().map(|id| hot::forget(&self.uri, &touched.vm, hot::checkpoint_of(id)).map_err(told));
        domains.chain(networks).chain(checkpoints).chain([thawed]).collect::<Vec<_>>().into_iter().collect::<Result<Vec<()>, Error>>()?;
        if may_come && !was_there && !touched.snapshots.is_empty() {
            let message = "whether a backup job that was asked for has begun is not known yet".to_owned();
            return Err(Error { code: Code::Unavailable, message, retryable: true });
        }
        Ok(Vec::new())
    }

    fn open_snapshots(&self, _: &str) -> Result<Vec<Opened>, Error> {
        Err(Error::fatal(Code::NotBuilt, "snapshots of a domain are not exported yet"))
    }
}

/// A disk whose reads are counted.
struct Counted {
    disk: Arc<dyn Disk>,
    moved: Moved,
}

impl Disk for Counted {
    fn format(&self) -> &'static str {
        self.disk.format()
    }

    fn subformat(&self) -> &str {
        self.disk.subformat()
    }

    fn capacity(&self) -> u64 {
        self.disk.capacity()
    }

    fn extents(&self, from: u64, to: u64) -> Result<Vec<Extent>, FormatError> {
        self.disk.extents(from, to)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8], scratch: &mut Scratch) -> Result<(), FormatError> {
        self.moved.fetch_add(buf.len() as u64, Ordering::Relaxed);
        self.disk.read_at(offset, buf, scratch)
    }
}

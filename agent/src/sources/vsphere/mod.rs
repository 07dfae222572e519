//! The provider `vsphere`: the VMs of a vCenter or an ESXi host.
//!
//! ```text
//! wire (SOAP) ◄─ client (session) ◄─ collect (properties) ◄─ inventory, snapshot      folder (ranges), lease and nfc (streams): the disks
//! ```
//! Owns: what a connection of this kind can do, and by which way a VM's disks are read:
//!
//! | the VM | way |
//! |---|---|
//! | off, without snapshots | ranges of its flat files; where the server gives none, a lease |
//! | off, with snapshots | a lease of the VM: the server reads over the deltas |
//! | on or suspended | a temporary snapshot, and a lease of it; quiesced by the guest's tools where that is asked |
//!
//! Never: makes anything at the source that is not noted before, keeps a password but in memory.
//! A crash here leaves a session that ends by its idle time, and what the ledger names.

pub mod budget;
mod changed;
mod client;
mod collect;
mod describe;
mod device;
mod folder;
mod inventory;
mod lease;
mod nfc;
mod power;
mod quiesce;
mod snapshot;
mod snapshots;
mod wire;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use shared::details::Details;
use shared::error::Code;
use shared::options::Action;
use shared::snapshots::{Snapshot, Wish};
use shared::vm::Vm;
use tokio::runtime::Handle;

use self::client::Error as CallError;
pub use self::client::{Client, Settings};
use self::folder::{DatastorePath, Flat, Remote};
use self::inventory::Found;
use self::lease::Lease;
use self::nfc::Streamed;
use self::snapshot::Removed;
use self::wire::MoRef;
use super::{Areas, Consistency, Error, Frozen, Moved, Opened, Since, Source, Stopping, Touch, Unread, Waiting};
use crate::formats::{Extent, vmdk};
use crate::touched::Touched;

/// The power state of a VM that nobody writes to.
const OFF: &str = "poweredOff";
/// That of one that runs.
const ON: &str = "poweredOn";

/// Largest descriptor of a disk, bytes.
const DESCRIPTOR: u64 = 1 << 20;
/// How long a guest may take to shut down before it is switched off.
const SHUTDOWN: Duration = Duration::from_secs(120);
/// How long the server may keep a question for changes open.
const WAIT: Duration = Duration::from_secs(30);

/// A connection; the session behind it is shared by whoever uses it.
pub struct Vsphere {
    client: Arc<Client>,
    runtime: Handle,
}

impl Vsphere {
    /// Over a client. Its methods are called from threads that may wait, never from tasks of the runtime.
    pub fn new(client: Arc<Client>, runtime: Handle) -> Self {
        Self { client, runtime }
    }

    fn told(&self, e: &CallError) -> Error {
        e.told(self.client.host())
    }

    fn found(&self, vm_id: &str) -> Result<Found, Error> {
        let found = self.runtime.block_on(self.client.within(async |session| inventory::one(&self.client, session, vm_id).await));
        found.map_err(|e| self.told(&e))?.ok_or_else(|| self.is_gone(vm_id))
    }

    fn is_gone(&self, vm_id: &str) -> Error {
        Error::fatal(Code::NotFound, format!("the VM {vm_id:?} is not at {} any more", self.client.host()))
    }

    fn disk(
        &self,
        found: &Found,
        disk: &shared::vm::Disk,
        areas: Option<&[Extent]>,
        moved: &Moved,
        stopping: &Stopping,
    ) -> Result<Opened, Error> {
        let odd = |what: String| Error::fatal(Code::BadImage, format!("{}: {what}", disk.source));
        let path = DatastorePath::parse(&disk.source).ok_or_else(|| odd("that is no file of a datastore".to_owned()))?;
        let open = |path: &DatastorePath| {
            let name = format!("[{}] {}", path.datastore, path.path);
            let opened = self.runtime.block_on(Remote::open(self.client.clone(), self.runtime.clone(), path.url(&found.datacenter), name));
            opened.map(Arc::new).map_err(|e| match e {
                CallError::Status(404) => Error::fatal(Code::NotFound, format!("[{}] {} is not there", path.datastore, path.path)),
                e => self.told(&e),
            })
        };
        let descriptor = open(&path)?;
        let passing = |message| Error { code: Code::BadGateway, message, retryable: true };
        let text = self.runtime.block_on(descriptor.read_whole(DESCRIPTOR)).map_err(passing)?;
        let lines = vmdk::flat_extents(&text).map_err(|e| odd(e.to_string()))?;
        let mut identity = format!("{}:{}", found.change_version, descriptor.identity());
        let mut extents = Vec::with_capacity(lines.len());
        for line in lines {
            let Some((name, base)) = line.file else {
                extents.push((line.len, None));
                continue;
            };
            let remote = open(&path.beside(&name))?;
            if base.checked_add(line.len).is_none_or(|end| end > remote.size()) {
                return Err(odd(format!("its extent {name} has {} bytes, {} from {base} are named", remote.size(), line.len)));
            }
            identity.push('+');
            identity.push_str(&remote.identity());
            extents.push((line.len, Some((remote, base))));
        }
        let flat = Flat::new(extents, areas, moved, stopping);
        let capacity = crate::formats::Disk::capacity(&flat);
        if capacity != disk.capacity {
            return Err(odd(format!("it describes {capacity} bytes, the VM's disk has {}", disk.capacity)));
        }
        Ok(Opened { name: disk.name.clone(), snapshot: None, disk: Arc::new(flat), identity })
    }

    /// A VM that nothing keeps from being exported.
    fn exportable(&self, vm_id: &str) -> Result<Found, Error> {
        let found = self.found(vm_id)?;
        if found.vm.problem.is_empty() {
            return Ok(found);
        }
        Err(Error::fatal(Code::Unprocessable, format!("{} cannot be exported: {}", found.vm.path, found.vm.problem)))
    }

    fn by_ranges(&self, found: &Found, stopping: &Stopping) -> Result<Vec<Opened>, Error> {
        found.vm.disks.iter().map(|disk| self.disk(found, disk, None, &Moved::default(), stopping)).collect()
    }

    /// Through a lease of the VM or of a snapshot. `moved` counts what comes, by disk.
    fn by_lease(&self, found: &Found, method: &str, of: &MoRef, moved: &[Moved], touch: &dyn Touch) -> Result<Vec<Opened>, Error> {
        let total = found.vm.disks.iter().fold(0u64, |sum, disk| sum.saturating_add(disk.capacity));
        let note = |id: &str| touch.lease(id);
        let lease = self.runtime.block_on(Lease::begin(&self.client, &self.runtime, method, of, total, &note, &touch.stopping()));
        let lease = lease.map_err(|e| self.told(&e))?;
        let disagree = |what: &str| {
            let (given, known) = (lease.disks.len(), found.vm.disks.len());
            Error::fatal(Code::BadGateway, format!("{}: the lease has {given} disks, the VM has {known}{what}", found.vm.path))
        };
        if lease.disks.len() != found.vm.disks.len() {
            return Err(disagree(""));
        }
        let keys: Vec<&str> = lease.disks.iter().map(|device| device.key.as_str()).collect();
        let unknown = || disagree(&format!(", and the server does not say which is which: it calls them {}", keys.join(", ")));
        let places = device::places(&found.seats, &keys).ok_or_else(unknown)?;
        let mut opened = Vec::with_capacity(found.vm.disks.len());
        for ((number, disk), place) in found.vm.disks.iter().enumerate().zip(places) {
            let moved = moved.get(number).cloned().unwrap_or_default();
            let streamed = Streamed::new(lease.clone(), place, disk.capacity, moved, touch.stopping()).ok_or_else(unknown)?;
            // A snapshot is another one each time; the VM itself is the same as long as it is not changed.
            let identity = format!("{method}:{}:{}:{}", of.value, found.change_version, disk.source);
            opened.push(Opened { name: disk.name.clone(), snapshot: None, disk: Arc::new(streamed), identity });
        }
        Ok(opened)
    }

    /// Sees to it that the server tracks the changes of the VM; whether it did so before. One that cannot is backed up by comparing.
    fn track(&self, found: &Found, touch: &dyn Touch) -> Result<bool, Error> {
        let vm = found.vm.id.as_str();
        if self.runtime.block_on(changed::is_tracking(&self.client, vm)).map_err(|e| self.told(&e))? {
            return Ok(true);
        }
        touch.tracking().map_err(|e| ledger(&e))?;
        match self.runtime.block_on(changed::track(&self.client, vm, true)) {
            Ok(()) => touch.log(format!("changed block tracking was off for {} and is switched on", found.vm.path)),
            Err(e @ CallError::Fault(wire::Fault::NotAuthenticated)) => return Err(self.told(&e)),
            Err(CallError::Fault(fault)) => {
                touch.log(format!("changed block tracking cannot be switched on for {}, so backups compare: {fault}", found.vm.path));
            }
            Err(e) => return Err(self.told(&e)),
        }
        Ok(false)
    }

    /// What the server says of a frozen disk.
    fn areas(
        &self,
        found: &Found,
        snapshot: &MoRef,
        disk: &shared::vm::Disk,
        frozen: &changed::FrozenDisk,
        (since, was_tracked): (&[Since], bool),
    ) -> Result<Areas, Error> {
        let before = since.iter().find(|since| since.key == frozen.key.to_string() && since.capacity == disk.capacity);
        let id = match before {
            // On what was switched on over snapshots, or grew, all that holds data is not surely told.
            None if !was_tracked && found.vm.snapshots > 0 => {
                return Ok(Areas::Unknown("changed block tracking was switched on while the VM has snapshots".to_owned()));
            }
            None if since.iter().any(|since| since.key == frozen.key.to_string()) => {
                return Ok(Areas::Unknown("the disk has another size than before".to_owned()));
            }
            None if frozen.change_id.is_none() => return Ok(Areas::Unknown("the server does not track its changes".to_owned())),
            None => "*",
            Some(before) if before.had_snapshots => {
                let reason = "the VM had snapshots then, and may have been reverted to one since".to_owned();
                return Ok(Areas::Unknown(reason));
            }
            // What was written meanwhile is in nobody's book.
            Some(_) if !was_tracked => return Ok(Areas::Unknown("changed block tracking was off since".to_owned())),
            Some(before) => match changed::obstacle(before.change_id.as_deref(), frozen.change_id.as_deref()) {
                Some(reason) => return Ok(Areas::Unknown(reason)),
                None => before.change_id.as_deref().unwrap_or_default(),
            },
        };
        let asked = changed::areas(&self.client, &found.vm.id, snapshot, frozen.key, disk.capacity, id);
        self.runtime.block_on(asked).map_err(|e| self.told(&e))
    }

    /// Waits until something of the inventory changes or nothing has for a while. The first wait ends at once.
    pub fn changed(&self, listener: &mut Listener) -> Result<News, Error> {
        let outcome = self.runtime.block_on(listener.next(&self.client));
        outcome.map_err(|e| self.told(&e))
    }
}

fn ledger(e: &std::io::Error) -> Error {
    Error { code: Code::Internal, message: format!("the ledger cannot be written: {e}"), retryable: true }
}

/// Properties whose change makes an inventory look at a VM again.
const WATCHED: &[&str] = &[
    "name",
    "parent",
    "parentVApp",
    "runtime.powerState",
    "runtime.connectionState",
    "config.changeVersion",
    "config.template",
    "guest.toolsRunningStatus",
    "snapshot",
];

/// What a wait has brought.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum News {
    /// Nothing.
    Nothing,
    /// These VMs have changed, come or gone.
    Vms(BTreeSet<String>),
    /// The listening has begun, or what paths are made of has changed: everything may be different.
    All,
}

/// Listens to changes within one session, and anew within the next.
#[derive(Default)]
pub struct Listener {
    standing: Option<(Arc<client::Session>, collect::Changes)>,
    /// Its first wait is over.
    has_begun: bool,
}

impl Listener {
    async fn next(&mut self, client: &Client) -> Result<News, CallError> {
        if self.standing.is_none() {
            self.has_begun = false;
            let session = client.session().await?;
            let places = inventory::PLACE;
            let wanted: [(&str, &[&str]); 4] =
                [("VirtualMachine", WATCHED), ("Folder", places), ("Datacenter", places), ("VirtualApp", inventory::VAPP)];
            match collect::Changes::begin(client, &session, &wanted).await {
                Ok(changes) => self.standing = Some((session, changes)),
                Err(e) => {
                    client.forget(&session).await;
                    return Err(e);
                }
            }
        }
        let Some((session, changes)) = &mut self.standing else { return Ok(News::Nothing) };
        match changes.next(client, session, WAIT).await {
            Ok(_) if !std::mem::replace(&mut self.has_begun, true) => Ok(News::All),
            Ok(changed) if changed.is_empty() => Ok(News::Nothing),
            Ok(changed) if changed.iter().any(|object| object.kind != "VirtualMachine") => Ok(News::All),
            Ok(changed) => Ok(News::Vms(changed.into_iter().map(|object| object.value).collect())),
            Err(e) => {
                let (session, _) = (session.clone(), self.standing.take());
                if matches!(e, CallError::Fault(wire::Fault::NotAuthenticated)) {
                    client.forget(&session).await;
                }
                Err(e)
            }
        }
    }

    /// Ends it at the server, too.
    pub async fn end(&mut self, client: &Client) {
        if let Some((session, changes)) = self.standing.take() {
            changes.end(client, &session).await;
        }
    }
}

impl Vsphere {
    /// Switches a VM on again that was stopped for a migration.
    fn go_on(&self, touched: &Touched) -> Result<(), Error> {
        let found = match self.found(&touched.vm) {
            Ok(found) => found,
            Err(e) if e.code == Code::NotFound => return Ok(()),
            Err(e) => return Err(e),
        };
        if found.vm.power_state == OFF {
            return self.runtime.block_on(power::switch(&self.client, &touched.vm, Action::Start)).map_err(|e| self.told(&e));
        }
        // A guest that was asked to shut down may still be at it.
        let waited = shared::clock::now().timestamp_millis().saturating_sub(touched.noted_ms);
        let longest = i64::try_from((SHUTDOWN * 2).as_millis()).unwrap_or(i64::MAX);
        if (0..longest).contains(&waited) && found.vm.tools_status == "running" {
            let message = format!("{} may still be shutting down; it is switched on again then", found.vm.path);
            return Err(Error { code: Code::Unavailable, message, retryable: true });
        }
        Ok(())
    }
}

impl Source for Vsphere {
    fn inventory(&self) -> Result<Vec<Vm>, Error> {
        let found = self.runtime.block_on(self.client.within(async |session| inventory::all(&self.client, session).await));
        Ok(found.map_err(|e| self.told(&e))?.into_iter().map(|found| found.vm).collect())
    }

    fn some(&self, vm_ids: &BTreeSet<String>) -> Result<Vec<Vm>, Error> {
        let found = self.runtime.block_on(self.client.within(async |session| inventory::some(&self.client, session, vm_ids).await));
        Ok(found.map_err(|e| self.told(&e))?.into_iter().map(|found| found.vm).collect())
    }

    fn describe(&self, vm_id: &str, privileges: bool) -> Result<Details, Error> {
        let ask = async |session: &client::Session| describe::describe(&self.client, session, vm_id, privileges).await;
        let found = self.runtime.block_on(self.client.within(ask)).map_err(|e| self.told(&e))?;
        found.ok_or_else(|| self.is_gone(vm_id))
    }

    /// The disks are named and measured; nothing is opened, so nothing is touched.
    fn look(&self, vm_id: &str) -> Result<(Vm, Vec<Opened>), Error> {
        let found = self.exportable(vm_id)?;
        let unread = |disk: &shared::vm::Disk| Opened {
            name: disk.name.clone(),
            snapshot: None,
            disk: Arc::new(Unread::new("vmdk", disk.capacity)),
            identity: found.change_version.clone(),
        };
        let disks = found.vm.disks.iter().map(unread).collect();
        Ok((found.vm, disks))
    }

    fn open(&self, vm_id: &str) -> Result<(Vm, Vec<Opened>), Error> {
        let found = self.exportable(vm_id)?;
        if found.vm.power_state != OFF || found.vm.snapshots > 0 {
            let message =
                format!("{} is {} and has {} snapshots: only a job reads it", found.vm.path, found.vm.power_state, found.vm.snapshots);
            return Err(Error::fatal(Code::Unprocessable, message));
        }
        let disks = self.by_ranges(&found, &Stopping::default())?;
        Ok((found.vm, disks))
    }

    fn open_for(&self, vm_id: &str, touch: &dyn Touch) -> Result<(Vm, Vec<Opened>), Error> {
        // One that is off, too: a snapshot that is made or removed meanwhile makes its disks other files.
        touch.take_vm().map_err(|e| ledger(&e))?;
        let found = self.exportable(vm_id)?;
        if found.vm.power_state == OFF {
            touch.reads(Consistency::Off);
        }
        let disks = match (found.vm.power_state.as_str(), found.vm.snapshots) {
            (OFF, 0) => match self.by_ranges(&found, &touch.stopping()) {
                Ok(disks) => {
                    touch.log(format!("{} is off: its disks are read by ranges from {}", found.vm.path, self.client.host()));
                    disks
                }
                Err(e) => {
                    touch.log(format!("{} is read by a lease, because ranges are not given: {}", found.vm.path, e.message));
                    self.by_lease(&found, "ExportVm", &MoRef::new("VirtualMachine", vm_id), &[], touch)?
                }
            },
            (OFF, count) => {
                touch.log(format!("{} is off and has {count} snapshots: it is read by a lease", found.vm.path));
                self.by_lease(&found, "ExportVm", &MoRef::new("VirtualMachine", vm_id), &[], touch)?
            }
            (state, _) => {
                let (name, made) = self.freeze(&found, touch)?;
                touch.log(format!("{} is {state}: it is read by a lease of the temporary snapshot {name}", found.vm.path));
                self.by_lease(&found, "ExportSnapshot", &made, &[], touch)?
            }
        };
        Ok((found.vm, disks))
    }

    fn open_frozen(&self, vm_id: &str, since: &[Since], touch: &dyn Touch) -> Result<(Vm, Vec<Frozen>), Error> {
        let found = self.exportable(vm_id)?;
        let was_tracked = self.track(&found, touch)?;
        let (name, made) = self.freeze(&found, touch)?;
        touch.log(format!("{} is frozen by the temporary snapshot {name}", found.vm.path));
        // What was there before the snapshot may have changed in between.
        let mut found = self.exportable(vm_id)?;
        // Ours is not one of the VM's.
        found.vm.snapshots = found.vm.snapshots.saturating_sub(1);
        let disks = self.runtime.block_on(changed::disks(&self.client, &made)).map_err(|e| self.told(&e))?;
        let mut parts = Vec::with_capacity(found.vm.disks.len());
        for (disk, seat) in found.vm.disks.iter().zip(&found.seats) {
            let gone = || Error {
                code: Code::Conflict,
                message: format!("{}: {} is not in its snapshot", found.vm.path, disk.name),
                retryable: true,
            };
            let frozen = disks.iter().find(|frozen| frozen.key == seat.key).cloned().ok_or_else(gone)?;
            let areas = self.areas(&found, &made, disk, &frozen, (since, was_tracked))?;
            parts.push((shared::vm::Disk { source: frozen.file.clone(), ..disk.clone() }, frozen, areas, Moved::default()));
        }
        let ranged = |(disk, _, areas, moved): &(shared::vm::Disk, changed::FrozenDisk, Areas, Moved)| {
            let listed = match areas {
                Areas::Changed(areas) | Areas::Allocated(areas) => Some(areas.as_slice()),
                Areas::Unknown(_) => None,
            };
            self.disk(&found, disk, listed, moved, &touch.stopping())
        };
        let opened = match parts.iter().map(ranged).collect::<Result<Vec<_>, _>>() {
            Ok(opened) => opened,
            Err(e) => {
                touch.log(format!("{} is read by a lease, whole, because ranges are not given: {}", found.vm.path, e.message));
                let moved: Vec<Moved> = parts.iter().map(|(.., moved)| moved.clone()).collect();
                // A stream cannot be read here and there: it is read through.
                for (_, _, areas, _) in &mut parts {
                    *areas = Areas::Unknown("a lease gives all of it, one after the other".to_owned());
                }
                self.by_lease(&found, "ExportSnapshot", &made, &moved, touch)?
            }
        };
        let whole = |(opened, (_, frozen, areas, moved)): (Opened, (shared::vm::Disk, changed::FrozenDisk, Areas, Moved))| Frozen {
            // Another snapshot is another content.
            opened: Opened { identity: format!("{}:{}", made.value, opened.identity), ..opened },
            key: frozen.key.to_string(),
            change_id: frozen.change_id,
            areas,
            moved,
        };
        let frozen = opened.into_iter().zip(parts).map(whole).collect();
        Ok((found.vm, frozen))
    }

    fn snapshots(&self, vm_id: &str) -> Result<Vec<Snapshot>, Error> {
        let all = self.runtime.block_on(snapshots::list(&self.client, vm_id)).map_err(|e| self.told(&e))?;
        all.ok_or_else(|| self.is_gone(vm_id))
    }

    fn take_snapshot(&self, vm_id: &str, wish: &Wish, waiting: &Waiting) -> Result<(), Error> {
        let Vm { path, power_state, tools_status, .. } = self.found(vm_id)?.vm;
        let refused = |message| Err(Error::fatal(Code::Unprocessable, message));
        if wish.memory && power_state != ON {
            return refused(format!("{path} is {power_state}: there is no memory to keep; ask without `memory`"));
        }
        if wish.quiesce && (power_state != ON || tools_status != "running") {
            let message = format!("{path} is {power_state} and its VMware Tools are {tools_status}: only running ones quiesce a guest");
            return refused(format!("{message}; ask without `quiesce`"));
        }
        self.runtime.block_on(snapshots::take(&self.client, vm_id, wish, waiting)).map_err(|e| snapshots::told(&self.client, &e))
    }

    fn remove_snapshot(&self, vm_id: &str, snapshot: &Snapshot, going: &BTreeSet<String>, waiting: &Waiting) -> Result<(), Error> {
        let removed = self.runtime.block_on(snapshots::remove(&self.client, vm_id, &snapshot.id, going.len() > 1, waiting));
        removed.map_err(|e| snapshots::told(&self.client, &e))
    }

    fn power(&self, vm_id: &str, action: Action) -> Result<String, Error> {
        let found = self.found(vm_id)?;
        let is_off = found.vm.power_state == OFF;
        let may = if action == Action::Start { found.vm.power_state != ON } else { !is_off };
        if !may {
            let message = format!("{} is {}: {action} is not for that", found.vm.path, found.vm.power_state);
            return Err(Error::fatal(Code::Conflict, message));
        }
        self.runtime.block_on(power::switch(&self.client, vm_id, action)).map_err(|e| self.told(&e))?;
        Ok(self.found(vm_id)?.vm.power_state)
    }

    fn is_halted(&self, vm_id: &str) -> Result<bool, Error> {
        Ok(self.found(vm_id)?.vm.power_state == OFF)
    }

    /// The guest is asked to shut down where its tools run; one that does not, or has none, is switched off.
    fn halt(&self, vm_id: &str, _: &dyn Touch) -> Result<(), Error> {
        let found = self.found(vm_id)?;
        if found.vm.power_state == OFF {
            return Ok(());
        }
        if found.vm.tools_status == "running" && self.runtime.block_on(power::switch(&self.client, vm_id, Action::Shutdown)).is_ok() {
            let end = std::time::Instant::now() + SHUTDOWN;
            while std::time::Instant::now() < end {
                if self.found(vm_id)?.vm.power_state == OFF {
                    return Ok(());
                }
                std::thread::sleep(Duration::from_millis(500));
            }
        }
        self.runtime.block_on(power::switch(&self.client, vm_id, Action::Stop)).map_err(|e| self.told(&e))
    }

    fn undo(&self, touched: &Touched) -> Result<Vec<String>, Error> {
        if touched.halted.is_some() {
            self.go_on(touched)?;
        }
        for lease in &touched.leases {
            self.runtime.block_on(lease::abort(&self.client, lease)).map_err(|e| self.told(&e))?;
        }
        let mut not_seen = Vec::new();
        for name in &touched.snapshots {
            let removed = self.runtime.block_on(snapshot::remove(&self.client, &touched.vm, name)).map_err(|e| self.told(&e))?;
            if removed == Removed::NotSeen {
                not_seen.push(name.clone());
            }
        }
        if touched.tracking {
            let off = async {
                match changed::is_tracking(&self.client, &touched.vm).await {
                    Ok(true) => changed::track(&self.client, &touched.vm, false).await,
                    // It never was on, or the VM is gone.
                    Ok(false) | Err(CallError::Fault(wire::Fault::ManagedObjectNotFound)) => Ok(()),
                    Err(e) => Err(e),
                }
            };
            self.runtime.block_on(off).map_err(|e| self.told(&e))?;
        }
        Ok(not_seen)
    }

    fn open_snapshots(&self, _: &str) -> Result<Vec<Opened>, Error> {
        Err(Error::fatal(Code::NotBuilt, "snapshots of a VM at vSphere are not exported yet"))
    }
}

//! The provider `vsphere`: the VMs of a vCenter or an ESXi host.
//!
//! ```text
//! wire (SOAP) ◄─ client (session) ◄─ collect (properties) ◄─ inventory          folder (ranges of a datastore's files)
//! ```
//! Owns: what a connection of this kind can do: list, and read the disks of a VM that is off.
//! Never: writes to the source, keeps a password but in memory. A crash here leaves a session that ends by its idle time.

mod client;
mod collect;
mod folder;
mod inventory;
mod wire;

use std::sync::Arc;
use std::time::Duration;

use shared::error::Code;
use shared::vm::Vm;
use tokio::runtime::Handle;

use self::client::Error as CallError;
pub use self::client::{Client, Settings};
use self::folder::{DatastorePath, Flat, Remote};
use self::inventory::Found;
use super::{Error, Opened, Source};
use crate::formats::vmdk;

/// Largest descriptor of a disk, bytes.
const DESCRIPTOR: u64 = 1 << 20;
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
        found
            .map_err(|e| self.told(&e))?
            .ok_or_else(|| Error::fatal(Code::NotFound, format!("the VM {vm_id:?} is not at {} any more", self.client.host())))
    }

    fn disk(&self, found: &Found, disk: &shared::vm::Disk) -> Result<Opened, Error> {
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
        let flat = Flat::new(extents);
        let capacity = crate::formats::Disk::capacity(&flat);
        if capacity != disk.capacity {
            return Err(odd(format!("it describes {capacity} bytes, the VM's disk has {}", disk.capacity)));
        }
        Ok(Opened { name: disk.name.clone(), snapshot: None, disk: Arc::new(flat), identity })
    }

    /// Waits until something of the inventory changes or nothing has for a while; whether something did. The first wait ends at once.
    pub fn changed(&self, listener: &mut Listener) -> Result<bool, Error> {
        let outcome = self.runtime.block_on(listener.next(&self.client));
        outcome.map_err(|e| self.told(&e))
    }
}

/// Properties whose change makes an inventory look again.
const WATCHED: &[&str] = &["name", "parent", "runtime.powerState", "config.changeVersion", "guest.toolsRunningStatus", "snapshot"];

/// Listens to changes within one session, and anew within the next.
#[derive(Default)]
pub struct Listener {
    standing: Option<(Arc<client::Session>, collect::Changes)>,
}

impl Listener {
    async fn next(&mut self, client: &Client) -> Result<bool, CallError> {
        if self.standing.is_none() {
            let session = client.session().await?;
            match collect::Changes::begin(client, &session, &[("VirtualMachine", WATCHED)]).await {
                Ok(changes) => self.standing = Some((session, changes)),
                Err(e) => {
                    client.forget(&session).await;
                    return Err(e);
                }
            }
        }
        let Some((session, changes)) = &mut self.standing else { return Ok(false) };
        match changes.next(client, session, WAIT).await {
            Ok(changed) => Ok(changed),
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

impl Source for Vsphere {
    fn inventory(&self) -> Result<Vec<Vm>, Error> {
        let found = self.runtime.block_on(self.client.within(async |session| inventory::all(&self.client, session).await));
        Ok(found.map_err(|e| self.told(&e))?.into_iter().map(|found| found.vm).collect())
    }

    fn look(&self, vm_id: &str) -> Result<(Vm, Vec<Opened>), Error> {
        self.open(vm_id)
    }

    fn open(&self, vm_id: &str) -> Result<(Vm, Vec<Opened>), Error> {
        let found = self.found(vm_id)?;
        if !found.vm.problem.is_empty() {
            return Err(Error::fatal(Code::Unprocessable, format!("{} cannot be exported: {}", found.vm.path, found.vm.problem)));
        }
        if found.vm.power_state != "poweredOff" {
            let message =
                format!("{} is {}: export of a VM that is not off is not built yet; power it off", found.vm.path, found.vm.power_state);
            return Err(Error::fatal(Code::NotBuilt, message));
        }
        if found.vm.snapshots > 0 {
            let message = format!(
                "{} has {} snapshots: reading over their deltas is not built yet; consolidate them",
                found.vm.path, found.vm.snapshots
            );
            return Err(Error::fatal(Code::NotBuilt, message));
        }
        let disks = found.vm.disks.iter().map(|disk| self.disk(&found, disk)).collect::<Result<Vec<_>, _>>()?;
        Ok((found.vm, disks))
    }

    fn open_snapshots(&self, _: &str) -> Result<Vec<Opened>, Error> {
        Err(Error::fatal(Code::NotBuilt, "snapshots of a VM at vSphere are not exported yet"))
    }
}

//! The provider `libvirt`: the domains of a QEMU/KVM host, through its client.
//!
//! ```text
//! virsh (processes) ◄─ domain (XML) ◄─ here ─► local (the files of a domain that is off)
//! ```
//! Owns: what a connection of this kind can do: list, listen, switch, and read the disks of a domain that is off, where their files lie in a
//! root of this host. Never: opens a file outside the roots, whatever a domain's XML names; guesses a disk's format.
//! A crash here costs nothing: it only reads, and what listens ends by itself.

mod domain;
pub mod virsh;

use shared::error::Code;
use shared::vault::Vault;
use shared::vm::Vm;

use self::domain::Domain;
use self::virsh::Uri;
use super::local::Local;
use super::{Error, Opened, Source};
use crate::exec;

/// A connection.
pub struct Libvirt {
    uri: Uri,
    vault: Vault,
}

impl Libvirt {
    /// Over a URI; disks are opened inside the roots of `vault` only.
    ///
    /// # Errors
    /// When the URI is none that is taken.
    pub fn new(uri: &str, vault: &Vault) -> Result<Self, Error> {
        let uri = Uri::parse(uri).map_err(|message| Error::fatal(Code::BadRequest, message))?;
        Ok(Self { uri, vault: vault.clone() })
    }

    /// Where it is.
    pub fn uri(&self) -> &Uri {
        &self.uri
    }

    fn found(&self, id: &str) -> Result<Domain, Error> {
        let gone = || Error::fatal(Code::NotFound, format!("there is no domain {id:?} any more"));
        if !virsh::is_uuid(id) {
            return Err(gone());
        }
        let described = self.uri.describe(&[id.to_owned()]).map_err(told)?;
        let (xml, facts) = described.first().ok_or_else(gone)?;
        domain::read(xml, facts).map_err(|e| Error::fatal(Code::BadGateway, e))
    }

    fn exportable(&self, id: &str) -> Result<Domain, Error> {
        let found = self.found(id)?;
        let refused = |code, message: String| Err(Error::fatal(code, format!("{} cannot be exported: {message}", found.vm.name)));
        if !found.vm.problem.is_empty() {
            return refused(Code::Unprocessable, found.vm.problem.clone());
        }
        if !self.uri.is_here {
            return refused(Code::NotBuilt, "disks of another host are not read yet; run an agent there".to_owned());
        }
        if found.vm.power_state != "poweredOff" {
            return refused(Code::NotBuilt, format!("it is {}, and running domains are not read yet; shut it down", found.vm.power_state));
        }
        Ok(found)
    }

    fn disks(&self, found: &Domain) -> Result<Vec<Opened>, Error> {
        let mut opened = Vec::with_capacity(found.vm.disks.len());
        for (disk, format) in found.vm.disks.iter().zip(&found.formats) {
            let outside = |e: shared::vault::Error| {
                let roots = self.vault.roots().map(|root| root.path.display().to_string()).collect::<Vec<_>>().join(", ");
                let message = format!(
                    "{} of {} lies in {}, which is outside the roots of this agent ({roots}): {e}",
                    disk.name, found.vm.name, disk.source
                );
                Error::fatal(Code::OutsideRoots, message)
            };
            let place = self.vault.locate(&disk.source).map_err(outside)?;
            let folder = Local::new(place.root.dir().try_clone().map_err(|e| Error::fatal(Code::BadGateway, e.to_string()))?);
            let image = folder.open_declared(&place.below, format)?;
            opened.push(Opened { name: disk.name.clone(), ..image });
        }
        Ok(opened)
    }
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
        let domains = self.uri.domains().map_err(told)?;
        let described = self.uri.describe(&domains).map_err(told)?;
        let mut vms = Vec::with_capacity(described.len());
        for (xml, facts) in &described {
            match domain::read(xml, facts) {
                Ok(domain) => vms.push(domain.vm),
                Err(e) => tracing::warn!(error = e, "a domain is left out"),
            }
        }
        vms.sort_by(|a, b| a.path.cmp(&b.path).then_with(|| a.id.cmp(&b.id)));
        Ok(vms)
    }

    fn look(&self, vm_id: &str) -> Result<(Vm, Vec<Opened>), Error> {
        self.open(vm_id)
    }

    fn open(&self, vm_id: &str) -> Result<(Vm, Vec<Opened>), Error> {
        let found = self.exportable(vm_id)?;
        let disks = self.disks(&found)?;
        let mut vm = found.vm;
        for (disk, opened) in vm.disks.iter_mut().zip(&disks) {
            disk.capacity = opened.disk.capacity();
        }
        Ok((vm, disks))
    }

    fn open_snapshots(&self, _: &str) -> Result<Vec<Opened>, Error> {
        Err(Error::fatal(Code::NotBuilt, "snapshots of a domain are not exported yet"))
    }
}

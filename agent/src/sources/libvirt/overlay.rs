//! A running domain, frozen where libvirt or QEMU has no backup jobs: what the guest writes goes into an overlay, and is put back afterwards.
//!
//! ```text
//! noted ─► snapshot-create (disks only, no metadata) ─► the files below are read … ─► blockcommit, pivot ─► the overlay's file goes
//!                                                                                └─ the domain is off: it waits, with what was written
//! ```
//! Owns: the overlays, each beside its disk: there QEMU may write, libvirt labels it, and what was written finds its way back by itself.
//! Never: removes a file that a domain's description still names; writes into an image by itself; starts a domain.
//! A crash here leaves overlays that the ledger names, and domains that run on over them.
//! Source: virsh(1) snapshot-create, blockcommit, blockjob; libvirt, formatsnapshot.

use std::path::Path;
use std::time::Duration;

use shared::error::Code;
use shared::vault::{self, Dir, Vault};
use shared::vm::Vm;

use super::domain::{self, Domain, Facts};
use super::virsh::Uri;
use super::{Libvirt, SCRATCH, hot, ledger, told};
use crate::exec;
use crate::sources::{Error, Opened, Touch};
use crate::touched::Overlay;

/// How long it may take to put back what a guest has written meanwhile.
const BACK: Duration = Duration::from_secs(900);

/// Whether these words say that there are no backup jobs at this host: its libvirt, QEMU or client is older than they are.
pub fn is_wanted(words: &str) -> bool {
    let words = words.to_ascii_lowercase();
    ["not supported", "unsupported", "unknown command"].iter().any(|word| words.contains(word))
}

/// The overlays of this name that a domain's disks would get.
pub fn of(found: &Domain, name: &str) -> Vec<Overlay> {
    let one = |(target, disk): (&String, &shared::vm::Disk)| {
        let folder = Path::new(&disk.source).parent().unwrap_or_else(|| Path::new("/"));
        Overlay { target: target.clone(), base: disk.source.clone(), path: folder.join(format!("{name}.{target}")).display().to_string() }
    };
    found.targets.iter().zip(&found.vm.disks).map(one).collect()
}

fn described(found: &Domain, overlays: &[Overlay]) -> String {
    let quoted = hot::quoted;
    let one = |overlay: &Overlay| {
        let (target, path) = (quoted(&overlay.target), quoted(&overlay.path));
        format!("<disk name='{target}' snapshot='external'><driver type='qcow2'/><source file='{path}'/></disk>")
    };
    let disks: String = overlays.iter().map(one).collect();
    let others: String = found.others.iter().map(|target| format!("<disk name='{}' snapshot='no'/>", quoted(target))).collect();
    format!("<domainsnapshot><memory snapshot='no'/><disks>{disks}{others}</disks></domainsnapshot>")
}

/// Lays the overlays over all disks, at one moment. `notes`: a folder and its path, for the description that virsh reads.
pub fn lay(uri: &Uri, found: &Domain, overlays: &[Overlay], notes: (&Dir, &Path), name: &str) -> Result<(), hot::Failed> {
    let (dir, path) = notes;
    let file = format!("{name}.snapshot.xml");
    vault::write_whole(dir, &file, described(found, overlays).as_bytes()).map_err(hot::Failed::Notes)?;
    let path = path.join(&file).display().to_string();
    let laid = uri.ask(&["snapshot-create", &found.vm.id, &path, "--disk-only", "--no-metadata", "--atomic"]);
    // What virsh has read is of no more use.
    let _ = dir.remove_file(&file);
    laid.map(drop).map_err(hot::Failed::Tool)
}

impl Libvirt {
    /// The disks of a running domain as they are now, while it goes on over overlays of this name.
    pub(super) fn over_overlays(&self, found: Domain, name: &str, touch: &dyn Touch) -> Result<(Vm, Vec<Opened>), Error> {
        // What cannot be read is not touched.
        for (disk, opened) in found.vm.disks.iter().zip(self.disks(&found)?) {
            let place = self.vault.locate(&disk.source).map_err(|e| Error::fatal(e.code(), e.to_string()))?;
            let failed = |e: std::io::Error| Error::fatal(Code::Internal, format!("{}: {e}", place.root.path.display()));
            let (wanted, (free, _)) = (SCRATCH + opened.disk.capacity() / 20, place.root.space().map_err(failed)?);
            if free < wanted {
                let (free, wanted) = (free >> 20, wanted >> 20);
                let message = format!(
                    "{free} MiB are free beside {}; what the guest writes meanwhile is kept there: {wanted} MiB are wanted",
                    disk.source
                );
                return Err(Error::fatal(Code::NoSpace, message));
            }
        }
        let overlays = of(&found, name);
        touch.overlays(&overlays).map_err(ledger)?;
        self.calmly(&found, touch, || {
            touch.asking(true).map_err(ledger)?;
            let laid = lay(&self.uri, &found, &overlays, (&self.folders.notes, &self.folders.notes_path), name);
            if matches!(laid, Ok(()) | Err(hot::Failed::Notes(_) | hot::Failed::Tool(exec::Error::Failed(_)))) {
                touch.asking(false).map_err(ledger)?;
            }
            laid.map_err(|failed| match failed {
                hot::Failed::Notes(e) => Error::fatal(Code::Internal, format!("the agent's own folder: {e}")),
                hot::Failed::Tool(e) => told(e),
            })
        })?;
        // Written to no more, and all that QEMU held of them is in them.
        let (vm, disks) = self.cold(found)?;
        let frozen = disks.into_iter().map(|opened| Opened { identity: format!("{name}:{}", opened.identity), ..opened });
        Ok((vm, frozen.collect()))
    }
}

/// What has become of an overlay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Back {
    /// What was written into it is in its disk again, and its file is gone.
    Done,
    /// It is not there and never was seen.
    NotSeen,
}

/// Puts back what was written into an overlay, and removes its file. An order to lay it that nobody has answered may still be carried out:
/// `may_come`. Goes on from wherever an earlier try was cut off.
pub fn put_back(uri: &Uri, vault: &Vault, domain: &str, overlay: &Overlay, may_come: bool) -> Result<Back, Error> {
    let later = |message: String| Error { code: Code::Unavailable, message, retryable: true };
    let Some((found, text)) = look(uri, domain)? else {
        // Whoever has undefined it has its files, too: what it wrote last may be in this one.
        tracing::warn!(domain, overlay = overlay.path, "a domain is gone whose disk was frozen; its overlay stays where it is");
        return Ok(Back::Done);
    };
    let name = &found.vm.name;
    let place = found.targets.iter().position(|target| *target == overlay.target);
    let is_on_top = place.and_then(|place| found.vm.disks.get(place)).is_some_and(|disk| disk.source == overlay.path);
    if is_on_top && found.is_off {
        let path = &overlay.path;
        return Err(later(format!(
            "{name} is off, and what it wrote last is in {path}: that is put back into its disk when it runs again"
        )));
    }
    if is_on_top {
        commit(uri, domain, &overlay.target)?;
        return put_back(uri, vault, domain, overlay, false);
    }
    if text.contains(&format!("'{}'", hot::quoted(&overlay.path))) {
        let path = &overlay.path;
        return Err(later(format!("{name}: somebody has laid something over {path}; it is put back when that is gone")));
    }
    if may_come {
        return Err(later(format!("whether {} was laid over a disk of {name} is not known yet", overlay.path)));
    }
    remove(vault, &overlay.path)
}

/// The domain as it is, with all that its descriptions say; nothing where it is gone, and an error where nobody knows.
fn look(uri: &Uri, domain: &str) -> Result<Option<(Domain, String)>, Error> {
    let ask = |arguments: &[&str]| match uri.ask(arguments) {
        Ok(said) => Ok(Some(said)),
        Err(exec::Error::Failed(words)) if hot::says_gone(&words) => Ok(None),
        Err(e) => Err(told(e)),
    };
    let Some(xml) = ask(&["dumpxml", domain])? else { return Ok(None) };
    let Some(state) = ask(&["domstate", domain])? else { return Ok(None) };
    // One that is not defined has no other description.
    let lasting = uri.ask(&["dumpxml", domain, "--inactive"]).map_err(told)?;
    let facts = Facts { state: state.trim().to_owned(), ..Facts::default() };
    let found = domain::read(xml.trim(), &facts).map_err(|e| Error::fatal(Code::BadGateway, e))?;
    Ok(Some((found, xml + &lasting)))
}

fn commit(uri: &Uri, domain: &str, target: &str) -> Result<(), Error> {
    let order = ["blockcommit", domain, target, "--shallow", "--active", "--pivot", "--wait"];
    match uri.ask_within(&order, BACK) {
        // Of a try that was cut off: it may be ready by now.
        Err(exec::Error::Failed(words)) if words.contains("active block job") => {
            uri.ask(&["blockjob", domain, target, "--pivot"]).map(drop)
        }
        other => other.map(drop),
    }
    .map_err(told)
}

fn remove(vault: &Vault, path: &str) -> Result<Back, Error> {
    let failed = |e: String| Error {
        code: Code::Internal,
        message: format!("{path} is not needed any more and cannot be removed: {e}"),
        retryable: true,
    };
    let place = vault.locate(path).map_err(|e| failed(e.to_string()))?;
    match place.root.dir().remove_file(&place.below) {
        Ok(()) => Ok(Back::Done),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Back::NotSeen),
        Err(e) => Err(failed(e.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use shared::vm::{Disk, Vm};

    use super::*;

    #[test]
    fn every_disk_gets_an_overlay_beside_it_and_nothing_else_does() {
        let disk = |source: &str| Disk { source: source.to_owned(), ..Disk::default() };
        let domain = Domain {
            vm: Vm { disks: vec![disk("/srv/a & b/x.qcow2"), disk("/mnt/y.raw")], ..Vm::default() },
            formats: vec!["qcow2".into(), "raw".into()],
            targets: vec!["vda".into(), "sdb".into()],
            others: vec!["sda".into()],
            read_only: Vec::new(),
            raw_variables: false,
            number: Some(1),
            is_off: false,
        };
        let overlays = of(&domain, "hypersdk-1");
        assert_eq!((overlays[0].path.as_str(), overlays[1].path.as_str()), ("/srv/a & b/hypersdk-1.vda", "/mnt/hypersdk-1.sdb"));
        assert_eq!(
            described(&domain, &overlays),
            "<domainsnapshot><memory snapshot='no'/><disks>\
             <disk name='vda' snapshot='external'><driver type='qcow2'/><source file='/srv/a &amp; b/hypersdk-1.vda'/></disk>\
             <disk name='sdb' snapshot='external'><driver type='qcow2'/><source file='/mnt/hypersdk-1.sdb'/></disk>\
             <disk name='sda' snapshot='no'/></disks></domainsnapshot>"
        );
        assert!(is_wanted("Operation not supported: incremental backup is not supported yet"));
        assert!(is_wanted("unknown command: 'backup-begin'") && !is_wanted("cannot acquire state change lock"));
    }
}

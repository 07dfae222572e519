//! A backup job of a running domain is begun, with what it can be begun with here, and its disks are opened.
//!
//! Owns: what is noted and looked at before, and what is given up where libvirt has no checkpoints or no such jobs. Never: begins what is not
//! noted. A crash here leaves a job that the ledger names.

use std::sync::atomic::Ordering;

use shared::error::Code;
use shared::vault::Root;

use super::domain::Domain;
use super::hot::{Failed, Place, Wanted};
use super::nbd::Exported;
use super::{Libvirt, SCRATCH, hot, ledger, overlay, told};
use crate::exec;
use crate::sources::{Error, Moved, Touch};

/// What became of the wish for a backup job.
pub(super) enum Begun {
    /// It runs under this name; what it was begun with, and why it was begun otherwise.
    Job { name: String, wanted: Wanted, reason: Option<String> },
    /// There are none at this host, in its own words.
    NoJobs { name: String, words: String },
}

impl Libvirt {
    /// The folder that QEMU writes into, opened.
    pub(super) fn qemu_folder(&self) -> Result<Root, Error> {
        let path = &self.folders.qemu;
        Root::open("libvirt", path, false).map_err(|e| {
            let message = format!("{}: {e}; a running domain is read through sockets there (setting libvirt_dir)", path.display());
            Error::fatal(Code::Unprocessable, message)
        })
    }

    /// Begins a backup job of a running domain. Where the checkpoints do not serve, once more without them: then nobody knows what changed.
    pub(super) fn begin(&self, found: &Domain, wanted: Wanted, touch: &dyn Touch) -> Result<Begun, Error> {
        let folder = self.qemu_folder()?;
        let name = format!("{}{}-{}", self.ours, touch.job(), shared::ids::random_hex::<4>());
        touch.snapshot(&name).map_err(ledger)?;
        if let Some(checkpoint) = &wanted.checkpoint {
            touch.checkpoint(checkpoint).map_err(ledger)?;
        }
        let capacity = found.vm.disks.iter().fold(0u64, |sum, disk| sum.saturating_add(disk.capacity));
        let (free, _) = folder.space().map_err(|e| Error::fatal(Code::Internal, format!("{}: {e}", folder.path.display())))?;
        if free < SCRATCH + capacity / 20 {
            let message = format!(
                "{} has {} MiB free; what the guest writes meanwhile is kept there, so that {} MiB are wanted (setting libvirt_dir)",
                folder.path.display(),
                free >> 20,
                (SCRATCH + capacity / 20) >> 20
            );
            return Err(Error::fatal(Code::NoSpace, message));
        }
        let place = Place { folder: &folder.path, notes: (&self.folders.notes, &self.folders.notes_path) };
        self.calmly(found, touch, || self.begin_at(found, wanted, &place, &name, touch))
    }

    /// The same from where the guest may be frozen on.
    fn begin_at(&self, found: &Domain, mut wanted: Wanted, place: &Place, name: &str, touch: &dyn Touch) -> Result<Begun, Error> {
        let mut reason = None;
        loop {
            touch.asking(true).map_err(ledger)?;
            let begun = hot::begin(&self.uri, found, &wanted, place, name);
            if matches!(begun, Ok(()) | Err(Failed::Notes(_) | Failed::Tool(exec::Error::Failed(_)))) {
                touch.asking(false).map_err(ledger)?;
            }
            match begun {
                Ok(()) => return Ok(Begun::Job { name: name.to_owned(), wanted, reason }),
                Err(Failed::Notes(e)) => return Err(Error::fatal(Code::Internal, format!("the agent's own folder: {e}"))),
                Err(Failed::Tool(exec::Error::Failed(words)))
                    if wanted.since.iter().any(Option::is_some) && hot::is_about_checkpoints(&words) =>
                {
                    reason = Some(format!("libvirt does not say what changed: {words}"));
                    wanted.since = Vec::new();
                }
                Err(Failed::Tool(exec::Error::Failed(words))) if wanted.checkpoint.is_some() && hot::is_about_checkpoints(&words) => {
                    reason = Some(format!("no checkpoint can be made: {words}"));
                    wanted.checkpoint = None;
                }
                Err(Failed::Tool(exec::Error::Failed(words))) if overlay::is_wanted(&words) => {
                    return Ok(Begun::NoJobs { name: name.to_owned(), words });
                }
                Err(Failed::Tool(e)) => return Err(told(e)),
            }
        }
    }

    /// The disks of a job that runs.
    pub(super) fn exports(&self, found: &Domain, name: &str, wanted: &Wanted, touch: &dyn Touch) -> Result<Vec<(Exported, Moved)>, Error> {
        let folder = self.qemu_folder()?;
        let socket = hot::socket(&folder.path, found, name);
        let stopping = touch.stopping();
        let stop = || stopping.load(Ordering::Acquire) != 0;
        let mut exports = Vec::with_capacity(found.targets.len());
        for (n, target) in found.targets.iter().enumerate() {
            let moved = Moved::default();
            let bitmap = wanted.since.get(n).is_some_and(Option::is_some).then(|| hot::bitmap(target));
            let opened = Exported::open(&socket, target, bitmap.as_deref(), moved.clone(), &stop);
            let failed =
                |e: std::io::Error| Error { code: Code::BadGateway, message: format!("{}: {target}: {e}", found.vm.name), retryable: true };
            exports.push((opened.map_err(failed)?, moved));
        }
        Ok(exports)
    }
}

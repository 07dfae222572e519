//! What lies in this host's roots, for people who look from afar; and the removal of what a job published.
//!
//! Owns: the answers to `list`, `stat` and `remove_export`. Never: opens a path but through the vault, removes what a job still writes.
//! A crash here costs one answer; a removal that it cut off is finished by the next, because the folder lost its name first.

use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::sync::PoisonError;

use proto::v1;
use serde_json::{Value, json};
use shared::error::Code;
use shared::folder::{self, Ask, Sort};
use shared::ids::JobId;
use shared::sniff;
use shared::vault::{self, Dir, Vault};

use crate::deploy::users;
use crate::sources::Error;
use crate::sources::libvirt::virsh::Uri;
use crate::{Agent, hypervisors, points, touched, worker};

/// Most entries of one answer.
const MOST: u32 = 1000;

/// A page of a folder.
pub fn list(vault: &Vault, wanted: &v1::List) -> Result<Value, Error> {
    let ask = Ask {
        offset: wanted.offset,
        limit: u64::from(wanted.limit.min(MOST)),
        sort: Sort::from_word(&wanted.sort),
        descending: wanted.descending,
        search: wanted.search.clone(),
    };
    let (entries, total) = folder::list(vault, &wanted.path, &ask, &sniff::format_of).map_err(refused)?;
    Ok(json!({"entries": entries, "total": total}))
}

/// One path.
pub fn stat(vault: &Vault, path: &str) -> Result<Value, Error> {
    let entry = folder::stat(vault, path, &sniff::format_of).map_err(refused)?;
    serde_json::to_value(entry).map_err(|e| Error::fatal(Code::Internal, e.to_string()))
}

/// Removes the folder that a job published, and what a migration has kept for a retry. A job that this agent still holds is not touched, nor
/// the disks of a VM that a migration has made.
pub fn remove_export(agent: &Agent, wanted: &v1::RemoveExport) -> Result<Value, Error> {
    let job: JobId = wanted.job.parse().map_err(|e: String| Error::fatal(Code::BadRequest, e))?;
    if agent.table.get(job.as_str()).is_some_and(|held| !held.is_over()) {
        return Err(Error::fatal(Code::Conflict, format!("{job} is running here; cancel it instead")));
    }
    let place = agent.vault.locate(&wanted.destination).map_err(refused)?;
    if !place.root.writable {
        return Err(Error::fatal(Code::OutsideRoots, format!("{} lies in a root that is only read", wanted.destination)));
    }
    has_no_vm(agent, &job, wanted)?;
    is_nobodys(agent, &job, &place.absolute().join(job.as_str()))?;
    let removed = match agent.vault.open_dir(&wanted.destination) {
        Ok(folder) => {
            let failed = |source| refused(vault::Error::Io { path: place.named(), source });
            if let Some(over) = points::over(&folder, job.as_str()).map_err(failed)?.first() {
                let message = format!("the restore point {over} lies over {job}, which therefore stays; remove the later one first");
                return Err(Error::fatal(Code::Conflict, message));
            }
            let removed = agent.needed.unless_pinned(job.as_str(), || remove(&folder, job.as_str()));
            let pinned = |by| Error::fatal(Code::Conflict, format!("{by} is building a restore point on {job}, which therefore stays"));
            removed.map_err(pinned)?.map_err(failed)?
        }
        Err(e) if e.code() == Code::NotFound => false,
        Err(e) => return Err(refused(e)),
    };
    let kept = !wanted.domain_at.is_empty() && discard(agent, job.as_str()).map_err(own)?;
    Ok(json!({"removed": removed || kept}))
}

/// Refuses while a migration's VM stands, or its source waits for that one; and where nobody can say.
fn has_no_vm(agent: &Agent, job: &JobId, wanted: &v1::RemoveExport) -> Result<(), Error> {
    if touched::halted(agent, job.as_str()).map_err(own)?.is_some() {
        let message = format!("the source of {job} is still stopped for it; retry it, or wait until the source goes on");
        return Err(Error::fatal(Code::Conflict, message));
    }
    for uri in domain_at(agent, job, wanted) {
        if let Some(name) = users::runs_from(job.as_str(), &uri)? {
            let message = format!("the files of {job} are the disks of the domain `{name}` at {uri}; remove that first");
            return Err(Error::fatal(Code::Conflict, message));
        }
    }
    Ok(())
}

/// Refuses where a domain of this host has a file of the folder as its disk or beneath it, whoever made it.
fn is_nobodys(agent: &Agent, job: &JobId, folder: &Path) -> Result<(), Error> {
    match users::user_of(agent, folder)? {
        Some((domain, connection)) => {
            let message =
                format!("files of {job} are disks of the domain `{domain}` at `{connection}`, or lie beneath them; remove that first");
            Err(Error::fatal(Code::Conflict, message))
        }
        None => Ok(()),
    }
}

/// Where a migration's VM may stand: where the controller says; without that, a receipt says that there is one at a libvirt of this host.
fn domain_at(agent: &Agent, job: &JobId, wanted: &v1::RemoveExport) -> BTreeSet<String> {
    if !wanted.domain_at.is_empty() {
        return BTreeSet::from([wanted.domain_at.clone()]);
    }
    let receipt = Path::new(job.as_str()).join(worker::RECEIPT);
    let is_migration = agent.vault.open_dir(&wanted.destination).is_ok_and(|folder| folder.try_exists(receipt).unwrap_or(false));
    if !is_migration {
        return BTreeSet::new();
    }
    let connections = agent.connections.lock().unwrap_or_else(PoisonError::into_inner);
    let known = connections.values().filter(|connection| connection.kind == hypervisors::LIBVIRT).map(|connection| connection.path.clone());
    let here = known.filter(|path| Uri::parse(path).is_ok_and(|uri| uri.is_here));
    here.chain(["qemu:///system".to_owned()]).collect()
}

/// Removes what an attempt has kept that failed. False where there is nothing.
fn discard(agent: &Agent, job: &str) -> io::Result<bool> {
    let is_there = agent.ledger.read(job)?.is_some();
    worker::discard(agent, job)?;
    Ok(is_there)
}

fn own(e: io::Error) -> Error {
    Error::fatal(Code::Internal, format!("what this agent keeps of the job: {e}"))
}

/// The folder loses its name first, so that half of an export never looks like one.
fn remove(folder: &Dir, job: &str) -> io::Result<bool> {
    let going = format!(".{job}.removing");
    let named = match vault::rename_without_replacing(folder, job, &going) {
        Ok(()) => true,
        Err(e) if e.kind() == io::ErrorKind::NotFound => false,
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
            // An earlier removal was cut off, and the job has published again since.
            folder.remove_dir_all(&going)?;
            vault::rename_without_replacing(folder, job, &going)?;
            true
        }
        Err(e) => return Err(e),
    };
    match folder.remove_dir_all(&going) {
        Ok(()) => {
            vault::sync_dir(folder)?;
            Ok(true)
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(named),
        Err(e) => Err(e),
    }
}

fn refused(error: vault::Error) -> Error {
    Error::fatal(error.code(), error.to_string())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::disallowed_methods)]
mod tests {
    use super::*;

    #[test]
    fn a_removal_that_was_cut_off_is_finished_by_the_next() {
        let base = vault::temporary_dir("browse").unwrap();
        let folder = vault::open_data_dir(&base).unwrap();
        let job = "job-0123456789abcdef";
        assert!(!remove(&folder, job).unwrap());
        for name in [job.to_owned(), format!(".{job}.removing")] {
            std::fs::create_dir_all(base.join(&name)).unwrap();
            std::fs::write(base.join(&name).join("disk.raw"), b"x").unwrap();
        }
        assert!(remove(&folder, job).unwrap() && std::fs::read_dir(&base).unwrap().count() == 0);
        std::fs::create_dir_all(base.join(format!(".{job}.removing"))).unwrap();
        assert!(remove(&folder, job).unwrap() && std::fs::read_dir(&base).unwrap().count() == 0);
        std::fs::remove_dir_all(base).unwrap();
    }
}

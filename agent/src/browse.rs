//! What lies in this host's roots, for people who look from afar; and the removal of what a job published.
//!
//! Owns: the answers to `list`, `stat` and `remove_export`. Never: opens a path but through the vault, removes what a job still writes.
//! A crash here costs one answer; a removal that it cut off is finished by the next, because the folder lost its name first.

use std::io;

use proto::v1;
use serde_json::{Value, json};
use shared::error::Code;
use shared::folder::{self, Ask, Sort};
use shared::ids::JobId;
use shared::sniff;
use shared::vault::{self, Dir, Vault};

use crate::sources::Error;
use crate::{Agent, points};

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

/// Removes the folder that a job published. A job that this agent still holds is not touched.
pub fn remove_export(agent: &Agent, wanted: &v1::RemoveExport) -> Result<Value, Error> {
    let job: JobId = wanted.job.parse().map_err(|e: String| Error::fatal(Code::BadRequest, e))?;
    if agent.table.get(job.as_str()).is_some_and(|held| !held.is_over()) {
        return Err(Error::fatal(Code::Conflict, format!("{job} is running here; cancel it instead")));
    }
    let place = agent.vault.locate(&wanted.destination).map_err(refused)?;
    if !place.root.writable {
        return Err(Error::fatal(Code::OutsideRoots, format!("{} lies in a root that is only read", wanted.destination)));
    }
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
    Ok(json!({"removed": removed}))
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

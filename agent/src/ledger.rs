//! The ledger: what we are about to touch outside our own data directory, written before it is touched.
//!
//! Owns: `jobs/JOBID.ledger`, a small JSON file for each job that has left anything: the part folder and where it lies. (Snapshots, leases and
//! domains join it with the providers that have them.)
//! Never: forgets an entry before the thing is gone.
//! A crash here costs nothing: at the next Hello the agent names what the ledger holds, and the controller says what is over and can go.

use std::io;

use serde::{Deserialize, Serialize};
use shared::vault::{self, Dir};

/// What one job has touched.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// The job.
    pub job: String,
    /// The epoch under which it was touched last.
    pub epoch: u64,
    /// The folder, as `ROOT/…`, in which `JOBID.part` or `JOBID` lies.
    pub destination: String,
    /// When the job began here, seconds since 1970: the time that stands in an OVA, the same in each attempt.
    pub created: u64,
}

/// The ledger of this agent.
pub struct Ledger {
    dir: Dir,
}

impl Ledger {
    /// Over the folder `jobs` of the data directory.
    pub fn new(dir: Dir) -> Self {
        Self { dir }
    }

    /// The folder in which the job's journal lies beside the entry.
    pub fn dir(&self) -> &Dir {
        &self.dir
    }

    /// Writes an entry; durable when it returns.
    pub fn write(&self, entry: &Entry) -> io::Result<()> {
        let json = serde_json::to_vec(entry).map_err(io::Error::other)?;
        vault::write_whole(&self.dir, &format!("{}.ledger", entry.job), &json)
    }

    /// The entry of a job.
    pub fn read(&self, job: &str) -> io::Result<Option<Entry>> {
        let bytes = vault::read_optional(&self.dir, &format!("{job}.ledger"))?;
        Ok(bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok()))
    }

    /// All entries.
    pub fn all(&self) -> io::Result<Vec<Entry>> {
        let mut entries = Vec::new();
        for file in self.dir.entries()? {
            let Ok(name) = file?.file_name().into_string() else { continue };
            if let Some(job) = name.strip_suffix(".ledger")
                && let Some(entry) = self.read(job)?
            {
                entries.push(entry);
            }
        }
        Ok(entries)
    }

    /// Removes all that is kept of a job here: journal, result, and the entry last.
    pub fn remove(&self, job: &str) -> io::Result<()> {
        for suffix in ["journal", "result", "ledger"] {
            match self.dir.remove_file(format!("{job}.{suffix}")) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => {}
            }
        }
        vault::sync_dir(&self.dir)
    }
}

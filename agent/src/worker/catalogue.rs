//! What an import does otherwise than a conversion: its folder gets the VM's name, in the root `images`.
//!
//! Owns: the name, the mark by which the folder is known again after a crash (a rename under a job's own name needs none), what the result
//! says about the VM. Never: replaces a VM that is there. A crash here costs nothing: the mark is in the folder before the rename.

use std::io::{self, Write};

use proto::v1;
use serde_json::json;
use shared::error::Code;
use shared::options::JobType;
use shared::vault::{self, Dir};
use shared::vm::is_catalogue_name;

use super::Failure;
use crate::held::Assignment;

/// Name of the file that says which job made the folder.
const MARK: &str = ".hypersdk-job";

/// An import.
pub(super) struct Import {
    /// The VM's name, and the folder's.
    pub(super) name: String,
    job: String,
}

impl Import {
    /// Of an assignment, where it is one.
    pub(super) fn of(kind: Option<JobType>, held: &Assignment, assign: &v1::Assign) -> Result<Option<Self>, Failure> {
        if kind != Some(JobType::Import) {
            return Ok(None);
        }
        let name = assign.vm_id.clone();
        if !is_catalogue_name(&name) {
            return Err(Failure::fatal(Code::BadRequest, format!("{name:?} cannot be the name of a folder")));
        }
        Ok(Some(Self { name, job: held.job.clone() }))
    }

    /// Puts the mark into the part folder; durable when it returns.
    pub(super) fn mark(&self, part: &Dir) -> io::Result<()> {
        let mut file = part.create(MARK)?;
        file.write_all(self.job.as_bytes())?;
        file.sync_all()?;
        vault::sync_dir(part)
    }

    /// The folder of this name is this job's; else the name is taken.
    pub(super) fn check_owner(&self, folder: &Dir) -> Result<(), Failure> {
        let mark = folder.open_dir(&self.name).and_then(|vm| vault::read_optional(&vm, MARK));
        if mark.is_ok_and(|mark| mark.as_deref() == Some(self.job.as_bytes())) {
            return Ok(());
        }
        let message = format!("the catalogue has a VM `{}` already; import under another name with `vm_name`", self.name);
        Err(Failure::fatal(Code::Conflict, message))
    }

    /// The result with the VM that came of it.
    pub(super) fn describe(&self, result: &str, connection: &str) -> String {
        let Ok(mut result) = serde_json::from_str::<serde_json::Value>(result) else { return result.to_owned() };
        result["vm"] = json!({"connection": connection, "id": self.name, "name": self.name});
        result.to_string()
    }
}

//! The internal snapshots of a local VM's qcow2 images, each as a disk of its own.
//!
//! Owns: which of them there are, and what they are called. Never: reads a VM's saved memory. A crash here costs nothing: it only reads.

use std::path::Path;

use shared::error::Code;
use shared::vm::Snapshot;

use super::super::{Error, Opened};
use super::{Declared, Depth, Local, OpenOptions, declared, refusal};
use crate::formats::{FormatError, qcow2};

/// Snapshots of one VM that are exported in one job; each holds its tables in memory while the job runs.
const MAX: usize = 64;

/// All of them, disk by disk in the order of the image's table, which is that of their making.
pub(super) fn open(local: &Local, vm_id: &str) -> Result<Vec<Opened>, Error> {
    let (vm, _) = local.open_at(vm_id, Depth::Structure, &OpenOptions::default())?;
    let mut opened = Vec::new();
    for disk in &vm.disks {
        let path = Path::new(&disk.source);
        if declared(&disk.source) != Some(Declared::Qcow2) {
            continue;
        }
        for (n, found) in list(local, path).map_err(|e| refusal(vm_id, e))?.into_iter().enumerate() {
            if opened.len() == MAX {
                return Err(Error::fatal(
                    Code::Unprocessable,
                    format!("{vm_id} has more than {MAX} snapshots; export it without `include_snapshots`, or delete some"),
                ));
            }
            let options = OpenOptions { snapshot: Some(found.id.clone()), ..OpenOptions::default() };
            let image = local.image(path, &options).map_err(|e| refusal(vm_id, e))?;
            let snapshot = Snapshot {
                id: found.id,
                name: found.name,
                created_at: shared::clock::rfc3339(chrono::DateTime::<chrono::Utc>::from(found.created_at)),
            };
            // Ids are text of the image's maker; a number says as much and is safe in a file name.
            let name = format!("{}-snapshot-{}", disk.name, n + 1);
            opened.push(Opened { name, snapshot: Some(snapshot), disk: image.disk, identity: image.identity });
        }
    }
    Ok(opened)
}

fn list(local: &Local, path: &Path) -> Result<Vec<qcow2::Snapshot>, FormatError> {
    let (window, _) = local.window(path)?;
    qcow2::Reader::open(window)?.snapshots()
}

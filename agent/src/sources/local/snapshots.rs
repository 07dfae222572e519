//! The internal snapshots of a local VM's qcow2 images, each as a disk of its own.
//!
//! Owns: which of them there are, and what they are called. Never: reads a VM's saved memory. A crash here costs nothing: it only reads.

use std::path::Path;
use std::sync::Arc;

use shared::error::Code;
use shared::vm::Snapshot;

use super::super::{Error, Opened};
use super::{Depth, Local, OpenOptions, mark_snapshot, refusal};
use crate::formats::{FormatError, qcow2};

/// Snapshots of one VM that are exported in one job.
const MAX: usize = 64;

/// Bytes of tables that they may hold in memory together while the job runs.
const ROOM: u64 = 32 << 20;

/// All of them, disk by disk in the order of the image's table, which is that of their making.
pub(super) fn open(local: &Local, vm_id: &str) -> Result<Vec<Opened>, Error> {
    let (vm, _) = local.open_at(vm_id, Depth::Structure, &OpenOptions::default())?;
    let (mut opened, mut room) = (Vec::new(), ROOM);
    // By what was read, not by the name: a member of a package may be called anything.
    for disk in vm.disks.iter().filter(|disk| disk.format == "qcow2") {
        let path = Path::new(&disk.source);
        let found = list(local, path).map_err(|e| refusal(vm_id, e))?;
        if opened.len() + found.len() > MAX {
            let text = format!("{vm_id} has more than {MAX} snapshots; export it without `include_snapshots`, or delete some");
            return Err(Error::fatal(Code::Unprocessable, text));
        }
        for (n, found) in found.into_iter().enumerate() {
            let (reader, identity) = reader(local, path, &found.id, &mut room).map_err(|e| refusal(vm_id, e))?;
            let snapshot = Snapshot {
                id: found.id,
                name: found.name,
                created_at: shared::clock::rfc3339(chrono::DateTime::<chrono::Utc>::from(found.created_at)),
            };
            // Ids are text of the image's maker; a number says as much and is safe in a file name.
            let name = format!("{}-snapshot-{}", disk.name, n + 1);
            opened.push(Opened { name, snapshot: Some(snapshot), disk: Arc::new(reader), identity });
        }
    }
    Ok(opened)
}

/// One of them, whose tables fit into the room that the others left.
fn reader(local: &Local, path: &Path, id: &str, room: &mut u64) -> Result<(qcow2::Reader, String), FormatError> {
    let (window, mut identity) = local.window(path)?;
    mark_snapshot(&mut identity, &OpenOptions { snapshot: Some(id.to_owned()), ..OpenOptions::default() });
    let reader = qcow2::Reader::open_layer(window, Some(id), *room)?;
    *room = room.checked_sub(reader.table_bytes()).ok_or_else(|| {
        let reason = format!("the tables of its snapshots take over {ROOM} bytes; export it without `include_snapshots`, or delete some");
        FormatError::Refused { format: "qcow2", reason }
    })?;
    Ok((reader, identity))
}

/// What there is. An image over a backing file is refused here: its snapshots are no disks of their own.
fn list(local: &Local, path: &Path) -> Result<Vec<qcow2::Snapshot>, FormatError> {
    let (window, _) = local.window(path)?;
    qcow2::Reader::open(window)?.snapshots()
}

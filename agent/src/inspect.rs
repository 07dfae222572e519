//! What a job that is not made yet would read and write.
//!
//! Owns: the answer to the controller's `Inspect`: the source opened as an inventory opens it, the names of the files that would be made, the
//! room at the destination; and what lies on the disks, where somebody asks. Never: makes a file or a folder, reads a disk through, looks into
//! a guest that could only be read by touching its source. A crash here costs one answer.

use std::sync::Arc;
use std::time::{Duration, Instant};

use proto::v1;
use serde_json::{Value, json};
use shared::error::Code;
use shared::guest::Guest;
use shared::manifest::{Manifest, Signed};
use shared::options::JobType;
use shared::vm::Vm;

use crate::formats::Disk;
use crate::sources::file::FileSource;
use crate::sources::local::Depth;
use crate::sources::{Error, Opened};
use crate::{Agent, config, guest, pipeline, points, proof, worker};

/// How long data is counted; the controller waits 10 s for the whole answer.
const COUNT: Duration = Duration::from_secs(6);
/// How long a look inside takes at most beside that.
const LOOK: Duration = Duration::from_secs(2);
/// Looks into guests that run at a time, each with up to 64 MiB of memory; and how long one waits for its turn.
pub const AT_ONCE: usize = 4;
const TURN: Duration = Duration::from_secs(3);

/// Answers `{"vm", "format", "size", "source", "disks": [{"name","capacity","data_bytes","format"}], "data_bytes", "files", "manifest",
/// "destination": {"root","path","free_bytes","total_bytes"}, "taken"}`; with `guest` also `guest` (`shared::guest::Guest`), or null and why not
/// in `guest_unknown`.
pub fn inspect(agent: &Agent, asked: &v1::Inspect) -> Result<Value, Error> {
    let kind = JobType::from_word(&asked.r#type);
    let point = if asked.source.is_empty() { None } else { points::find(&agent.vault, &asked.source)? };
    let file = if asked.source.is_empty() || point.is_some() { None } else { Some(FileSource::find(&agent.vault, &asked.source)?) };
    let manifest = match (&point, &file, kind) {
        (Some(found), _, Some(JobType::Verify)) => Some((points::manifests(&found.points, &found.point)?.0, points::FILE.to_owned())),
        (_, Some(file), Some(JobType::Verify)) => manifest(file)?,
        _ => None,
    };
    let mut answer = match &manifest {
        Some((manifest, name)) => of_manifest(manifest, name),
        None => of_disks(agent, asked, file.as_ref(), point.as_ref())?,
    };
    if let Some(found) = &point {
        answer["source"] = json!(found.named);
    }
    if let Some(file) = &file {
        answer["source"] = json!(file.named);
        answer["size"] = json!(file.size);
    }
    if kind == Some(JobType::Verify) {
        return Ok(answer);
    }
    let destination = match (kind, asked.destination.as_str()) {
        (Some(JobType::Import), _) => config::IMAGES,
        (_, "") => "exports",
        (_, named) => named,
    };
    answer["destination"] = agent.free_space(destination)?;
    if kind == Some(JobType::Import) {
        let root = agent.vault.locate(config::IMAGES).map_err(|e| Error::fatal(Code::OutsideRoots, e.to_string()))?;
        let name = if asked.name.is_empty() { answer["vm"].as_str().unwrap_or_default() } else { &asked.name };
        let taken = shared::vm::is_catalogue_name(name) && root.root.dir().try_exists(name).unwrap_or(false);
        answer["taken"] = json!(taken);
    }
    Ok(answer)
}

fn manifest(file: &FileSource) -> Result<Option<(Manifest, String)>, Error> {
    let failed = |e: String| Error::fatal(Code::VerificationFailed, format!("{}: {e}", file.named));
    let Some((bytes, name)) = proof::find_manifest(&file.folder, &file.name).map_err(|e| failed(e.to_string()))? else { return Ok(None) };
    let (manifest, _) = Signed::open(&bytes, None).map_err(|e| failed(e.to_string()))?;
    Ok(Some((manifest, name)))
}

fn of_manifest(manifest: &Manifest, name: &str) -> Value {
    let disks = manifest.disks.iter().map(|disk| {
        let listed = (disk.blocks.len() as u64).saturating_mul(shared::manifest::BLOCK).min(disk.capacity);
        json!({"name": disk.name, "capacity": disk.capacity, "data_bytes": listed})
    });
    let disks: Vec<_> = disks.collect();
    let data = disks.iter().filter_map(|disk| disk["data_bytes"].as_u64()).fold(0, u64::saturating_add);
    json!({"vm": manifest.vm, "disks": disks, "data_bytes": data, "manifest": name, "files": []})
}

fn of_disks(agent: &Agent, asked: &v1::Inspect, file: Option<&FileSource>, point: Option<&points::Found>) -> Result<Value, Error> {
    let (vm, opened): (Vm, Vec<Opened>) = match (point, file, &asked.connection) {
        (Some(found), ..) => points::open(&found.points, &found.point)?,
        (_, Some(file), _) => {
            let (vm, mut opened) = file.open(Depth::Structure)?;
            if asked.include_snapshots {
                opened.extend(file.open_snapshots()?);
            }
            (vm, opened)
        }
        (_, None, Some(connection)) => {
            let source = agent.source(connection)?;
            let (vm, mut opened) = source.look(&asked.vm_id)?;
            if asked.include_snapshots {
                opened.extend(source.open_snapshots(&asked.vm_id)?);
            }
            (vm, opened)
        }
        (_, None, None) => return Err(Error::fatal(Code::BadRequest, "neither a source nor a connection is named")),
    };
    let guest = asked.guest.then(|| match &asked.connection {
        Some(connection) if file.is_none() && point.is_none() => {
            let (_, opened) = agent.source(connection)?.glance(&asked.vm_id)?;
            guest_on(agent, &opened, |disks| guest::inspect::inspect_for(disks, LOOK))
        }
        _ => guest_on(agent, &opened, |disks| guest::inspect::inspect_for(disks, LOOK)),
    });
    let deadline = Instant::now() + COUNT;
    let mut disks = Vec::with_capacity(opened.len());
    let mut sum = asked.count.then_some(0u64);
    for disk in &opened {
        let refused = |e: crate::formats::FormatError| Error::fatal(Code::BadImage, format!("{}: {e}", disk.name));
        let data = if asked.count { pipeline::data_bytes(disk.disk.as_ref(), deadline).map_err(refused)? } else { None };
        sum = sum.zip(data).map(|(sum, data)| sum.saturating_add(data));
        disks.push(json!({
            "name": disk.name, "capacity": disk.disk.capacity(), "data_bytes": data, "format": disk.disk.format(), "snapshot": disk.snapshot,
        }));
    }
    let name = if asked.name.is_empty() { vm.name.clone() } else { asked.name.clone() };
    let disks_to_write: Vec<_> = opened.into_iter().map(worker::source_disk).collect();
    let files = match worker::output_format(&asked.format) {
        Ok(format) => pipeline::output_names(&name, format, &disks_to_write),
        Err(_) => Vec::new(),
    };
    let mut answer = json!({"vm": vm.name, "disks": disks, "data_bytes": sum, "manifest": null, "files": files});
    match guest {
        Some(Ok(guest)) => answer["guest"] = json!(guest),
        Some(Err(e)) => answer["guest_unknown"] = json!(e.message),
        None => {}
    }
    Ok(answer)
}

/// Looks into a VM whose disks can be read without touching anything at its source; else says why not.
pub fn look_inside(agent: &Agent, asked: &v1::LookInside) -> Result<Value, Error> {
    let connection = crate::sources::named(asked.connection.as_ref())?;
    let (_, opened) = agent.source(connection)?.glance(&asked.vm_id)?;
    let guest = guest_on(agent, &opened, guest::inspect::inspect)?;
    serde_json::to_value(guest).map_err(|e| Error::fatal(Code::Internal, e.to_string()))
}

fn guest_on(agent: &Agent, opened: &[Opened], look: fn(&[Arc<dyn Disk>]) -> Guest) -> Result<Guest, Error> {
    let busy = |_| Error { code: Code::Unavailable, message: "other guests are being looked into; ask again".to_owned(), retryable: true };
    let turn = agent.runtime.block_on(async { tokio::time::timeout(TURN, agent.looks.acquire()).await });
    let _turn = turn.map_err(busy)?.map_err(|_| Error::fatal(Code::Internal, "the agent is ending"))?;
    let disks: Vec<_> = opened.iter().filter(|opened| opened.snapshot.is_none()).map(|opened| opened.disk.clone()).collect();
    Ok(look(&disks))
}

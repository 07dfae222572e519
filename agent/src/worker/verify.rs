//! A `verify` job: an artifact is read again, against its signed manifest where one lies beside it.
//!
//! ```text
//! find file ─► manifest? ─yes► signature, every block, every file's size and SHA-256 ─► commit ─► Finished
//!                 └─no──► structure, every block readable, its digests ──────────────► commit ─► Finished
//! ```
//! Owns: what such a job says was checked, and the sentence that names the bad block. Never: writes anything, repairs anything.
//! A crash here costs the check: it begins anew.

use std::path::Path;

use proto::v1;
use serde_json::{Value, json};
use shared::error::Code;
use shared::manifest::{BLOCK, Manifest, Over, Signed, fingerprint};
use shared::options::Options;
use shared::progress::Progress;
use shared::vault::{self, Dir};

use super::{End, Failure, commit};
use crate::formats::FormatError;
use crate::held::{Assignment, Stop};
use crate::ledger::Entry;
use crate::pipeline::{self, BadBlock};
use crate::sources::file::FileSource;
use crate::sources::local::Depth;
use crate::{Agent, points, proof};

/// Things that are wrong and stand in the error; more are counted, and all that were listed stand in the log.
const NAMED: usize = 5;
/// Lines of damage in a job's log.
const LOGGED: usize = 1000;

pub(super) fn work(agent: &Agent, held: &Assignment, assign: &v1::Assign, options: &Options) -> Result<End, End> {
    agent.table.progress(held, "preparing", Progress::default());
    if crate::is_upload(&assign.source) {
        // So that what is fetched for it goes when the job is over, whatever becomes of this process.
        let created = u64::try_from(shared::clock::now().timestamp()).unwrap_or_default();
        let entry = Entry { job: held.job.clone(), epoch: held.epoch, destination: "exports".to_owned(), created };
        agent.ledger.write(&entry).map_err(|e| Failure::io("the ledger", &e))?;
    }
    let check = Check { agent, held, options };
    if let Some(found) = super::point_of(agent, assign)? {
        let result = check.point(&found)?;
        commit(agent, held, || Ok(()))?;
        return Ok(End::Completed(result.to_string()));
    }
    let source = super::find_source(agent, held, assign)?;
    let found = proof::find_manifest(&source.folder, &source.name).map_err(|e| match e.kind() {
        std::io::ErrorKind::InvalidData => Failure::fatal(Code::VerificationFailed, format!("the manifest: {e}")),
        _ => Failure::io("the manifest", &e),
    })?;
    let result = match found {
        Some((bytes, from)) => {
            let bad = |e: shared::manifest::Error| Failure::fatal(Code::VerificationFailed, format!("verification failed: {from}: {e}"));
            let (manifest, signed) = Signed::open(&bytes, None).map_err(bad)?;
            // A layer of a chain: the points beneath lie beside the folder that it is in.
            let points = source.parent().map_err(Failure::from)?;
            let place = Place { folder: &source.folder, path: &source.folder_path, points: points.as_ref() };
            check.against(&manifest, &signed.public_key, &from, &place)?
        }
        None => check.structure(&source)?,
    };
    commit(agent, held, || Ok(()))?;
    Ok(End::Completed(result.to_string()))
}

struct Check<'a> {
    agent: &'a Agent,
    held: &'a Assignment,
    options: &'a Options,
}

/// Where the files of a manifest lie.
struct Place<'a> {
    folder: &'a Dir,
    path: &'a Path,
    /// The folder that restore points lie in.
    points: Option<&'a Dir>,
}

impl Check<'_> {
    fn log(&self, level: &str, text: String) {
        self.agent.table.log(self.held, level, "verifying", text);
    }

    /// Tells how far it is; false when it is to stop. `done` bytes are read and compared, so both counters move as one.
    fn tick(&self, data: u64, done: u64) -> bool {
        let done = done.min(data);
        let progress = Progress { data, read: done, durable: done, verified: done, resumed: 0 };
        self.agent.table.progress(self.held, "verifying", progress);
        self.held.stop().is_none()
    }

    fn failure(&self, e: pipeline::Error, folder: &Dir) -> End {
        match e {
            pipeline::Error::Cancelled | pipeline::Error::Parked => End::Stopped(self.held.stop().unwrap_or(Stop::Park)),
            e => End::Failed(super::failure(self.agent, folder, &e)),
        }
    }

    /// Fails with the first things that are wrong; the log has more.
    fn damaged(&self, damage: &[String], all: u64) -> End {
        for sentence in damage.iter().take(LOGGED) {
            self.log("error", sentence.clone());
        }
        let mut message = format!("verification failed: {}", damage.iter().take(NAMED).cloned().collect::<Vec<_>>().join("; "));
        let more = all.saturating_sub(NAMED as u64);
        if more > 0 {
            message.push_str(&format!("; and {more} more, see the log"));
        }
        Failure::fatal(Code::VerificationFailed, message).into()
    }

    /// A restore point: every disk with all that lies beneath it.
    fn point(&self, found: &points::Found) -> Result<Value, End> {
        let (manifest, key) = points::manifests(&found.points, &found.point).map_err(|e| match e.code {
            Code::NotFound => Failure::from(e),
            _ => Failure::fatal(Code::VerificationFailed, format!("verification failed: {}", e.message)),
        })?;
        let folder = found.points.open_dir(&found.point.job).map_err(|e| Failure::io("the restore point", &e))?;
        let file = found.point.disks.first().map(|disk| proof::manifest_name(&disk.file)).unwrap_or_default();
        self.against(&manifest, &key, &file, &Place { folder: &folder, path: &found.path, points: Some(&found.points) })
    }

    fn against(&self, manifest: &Manifest, key: &str, from: &str, place: &Place<'_>) -> Result<Value, End> {
        let (signer, own) = (fingerprint(key), self.agent.signing.public_hex());
        let is_own = key.eq_ignore_ascii_case(&own);
        let whose = if is_own { "this agent" } else { "another key than this agent's" };
        self.log("info", format!("checking against {from}, signed by {signer} ({whose})"));
        let data = listed_bytes(manifest);
        self.tick(data, 0);
        let absolute = |name: &str| place.path.join(name).display().to_string();
        let opener = |name: &str| vault::open_regular(place.folder, Path::new(name));
        let below = |over: &Over| match place.points {
            Some(points) => points::below(points, over),
            None => Err(FormatError::Unsupported(format!("it lies over {} of {}, which is not beside its folder", over.file, over.job))),
        };
        let tick = |read: u64| self.tick(data, read);
        let report = pipeline::verify_files_at(manifest, &opener, &below, self.options.bandwidth_limit, &tick);
        let report = report.map_err(|e| self.failure(e, place.folder))?;
        if !report.intact() {
            let damage = proof::damage(&report);
            let unlisted: u64 = report.disks.iter().map(|disk| disk.bad_blocks.saturating_sub(disk.bad.len() as u64)).sum();
            return Err(self.damaged(&damage, (damage.len() as u64).saturating_add(unlisted)));
        }
        self.tick(data, data);
        let blocks: u64 = report.disks.iter().map(|disk| disk.blocks_checked).sum();
        let hashed = report.files.iter().filter(|file| file.hashed).count();
        self.log("info", format!("{blocks} blocks are as they were signed, {hashed} files have their SHA-256"));
        let files: Vec<_> = manifest
            .files
            .iter()
            .map(|file| json!({"path": absolute(&file.path), "size": file.size, "sha256": file.sha256, "format": file.format}))
            .collect();
        let disks: Vec<_> = manifest
            .disks
            .iter()
            .zip(&report.disks)
            .map(|(disk, report)| {
                json!({"name": disk.name, "file": disk.file, "capacity": disk.capacity, "root": disk.root, "blocks_checked": report.blocks_checked})
            })
            .collect();
        Ok(json!({
            "files": files,
            "disks": disks,
            "manifest": absolute(from),
            "manifests": [absolute(from)],
            "signer": signer,
            "verified": true,
            "boot_proof": null,
            "receipt": {"read_back": "as_stored", "blocks_verified": blocks, "bytes_verified": data},
            "checked": {
                "against": "manifest", "manifest_job": manifest.job, "signature": "good", "signer_is_this_agent": is_own,
                "blocks": blocks, "files": report.files.len(), "files_hashed": hashed,
            },
            "counters": {"data_bytes": data, "bytes_read": data, "bytes_resumed": 0},
        }))
    }

    /// Without a manifest: the format's own rules (checked when it is opened), every block readable, and the digests for the next time.
    fn structure(&self, source: &FileSource) -> Result<Value, End> {
        self.log(
            "warn",
            "there is no manifest beside it: its structure is checked and its digests are taken, there is nothing to compare with"
                .to_owned(),
        );
        let (_, opened) = source.open(Depth::Digests).map_err(Failure::from)?;
        let far = std::time::Instant::now() + std::time::Duration::from_secs(600);
        let mut parts = Vec::with_capacity(opened.len());
        for disk in &opened {
            let of = |e| self.failure(pipeline::Error::Source { disk: disk.name.clone(), source: e }, &source.folder);
            parts.push(pipeline::data_bytes(disk.disk.as_ref(), far).map_err(of)?.unwrap_or(disk.disk.capacity()));
        }
        let data = parts.iter().fold(0u64, |sum, part| sum.saturating_add(*part));
        let (mut done, mut disks, mut damage, mut all, mut blocks) = (0u64, Vec::new(), Vec::new(), 0u64, 0u64);
        for (disk, part) in opened.iter().zip(&parts) {
            let tick = |read: u64| self.tick(data, done.saturating_add(read));
            let found = pipeline::digest_disk(&disk.name, disk.disk.as_ref(), self.options.bandwidth_limit, &tick);
            let found = found.map_err(|e| self.failure(e, &source.folder))?;
            done = done.saturating_add(*part);
            let name = |bad: &BadBlock| format!("{}: block {} at byte {}: {}", disk.name, bad.block, bad.offset, bad.reason);
            damage.extend(found.bad.iter().map(name));
            (all, blocks) = (all + found.bad_blocks, blocks + found.read_blocks);
            let capacity = disk.disk.capacity();
            let root = hex::encode(found.blocks.root(capacity));
            disks.push(json!({
                "name": disk.name, "file": source.name, "capacity": capacity, "root": root, "blocks_checked": found.read_blocks,
            }));
        }
        if !damage.is_empty() {
            return Err(self.damaged(&damage, all));
        }
        let file = vault::open_regular(&source.folder, Path::new(&source.name)).map_err(|e| Failure::io("the source", &e))?;
        let is_raw = opened.first().is_some_and(|disk| disk.disk.format() == "raw");
        let stop = || self.held.stop().is_some();
        let sha256 = pipeline::file_sha256(&file, is_raw.then_some(data), self.options.bandwidth_limit, &stop)
            .map_err(|e| Failure::io("the source", &e))?;
        if let Some(stop) = self.held.stop() {
            return Err(End::Stopped(stop));
        }
        self.tick(data, data);
        let hashed = usize::from(sha256.is_some());
        let format = super::declared_word(&source.name);
        let path = source.folder_path.join(&source.name).display().to_string();
        Ok(json!({
            "files": [{"path": path, "size": source.size, "sha256": sha256, "format": format}],
            "disks": disks,
            "manifest": null,
            "manifests": [],
            "signer": null,
            "verified": false,
            "boot_proof": null,
            "receipt": {"read_back": "as_stored", "blocks_verified": 0, "bytes_verified": 0},
            "checked": {"against": "structure", "signature": null, "blocks": blocks, "files": 1, "files_hashed": hashed},
            "counters": {"data_bytes": data, "bytes_read": data, "bytes_resumed": 0},
        }))
    }
}

/// Bytes of the blocks that a manifest lists.
fn listed_bytes(manifest: &Manifest) -> u64 {
    let block = |capacity: u64, block: u64| BLOCK.min(capacity.saturating_sub(block.saturating_mul(BLOCK)));
    let disks = manifest.disks.iter().flat_map(|disk| disk.blocks.keys().map(move |n| block(disk.capacity, *n)));
    disks.fold(0, u64::saturating_add)
}

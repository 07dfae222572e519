//! What a finished output is proven with: the signed manifests beside its files, and the result that the API shows.
//!
//! Owns: `<file>.manifest.json` (one for each file that holds disks) and the result's JSON.
//! Never: reads a disk: the digests are the pipeline's.
//! A crash here costs nothing: manifests are written again before the commit is asked for.

use std::io::{self, Read, Write};
use std::path::Path;

use serde_json::json;
use shared::manifest::{DiskEntry, FileEntry, Manifest, Signed, SigningKey, VERSION, fingerprint};
use shared::vault::{self, Dir};

use crate::pipeline::{DiskOutcome, Outcome, Report};
use crate::sources::Consistency;

/// Largest manifest that is read: that of some 10 TiB of data.
const MANIFEST_LIMIT: u64 = 256 << 20;
/// Ending of a manifest's name.
pub const MANIFEST: &str = ".manifest.json";

/// The name of a file's manifest.
pub fn manifest_name(file: &str) -> String {
    format!("{file}{MANIFEST}")
}

/// The manifest of an artifact and its name: the artifact itself where it is one, the one named after the file, or the one in the folder that
/// names the file (a disk of an OVF); `None` where there is none.
pub fn find_manifest(folder: &Dir, name: &str) -> io::Result<Option<(Vec<u8>, String)>> {
    let read = |name: &str| -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        vault::open_regular(folder, Path::new(name))?.take(MANIFEST_LIMIT + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > MANIFEST_LIMIT {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("{name} is larger than {} MiB", MANIFEST_LIMIT >> 20)));
        }
        Ok(bytes)
    };
    if name.ends_with(MANIFEST) {
        return Ok(Some((read(name)?, name.to_owned())));
    }
    let beside = manifest_name(name);
    if folder.try_exists(&beside)? {
        return Ok(Some((read(&beside)?, beside)));
    }
    for entry in folder.entries()? {
        let Ok(candidate) = entry?.file_name().into_string() else { continue };
        if !candidate.ends_with(MANIFEST) {
            continue;
        }
        let bytes = read(&candidate)?;
        if Signed::open(&bytes, None).is_ok_and(|(manifest, _)| manifest.files.iter().any(|file| file.path == name)) {
            return Ok(Some((bytes, candidate)));
        }
    }
    Ok(None)
}

/// A sentence for each thing that is wrong.
pub fn damage(report: &Report) -> Vec<String> {
    let mut damage = Vec::new();
    for disk in &report.disks {
        if let Some(reason) = &disk.unreadable {
            damage.push(format!("{} in {}: {reason}", disk.name, disk.file));
        }
        for bad in &disk.bad {
            damage.push(format!("{} in {}: block {} at byte {}: {}", disk.name, disk.file, bad.block, bad.offset, bad.reason));
        }
        let unlisted = disk.bad_blocks.saturating_sub(disk.bad.len() as u64);
        if unlisted > 0 {
            damage.push(format!("{} in {}: {unlisted} more bad blocks", disk.name, disk.file));
        }
    }
    for file in &report.files {
        if let Some(problem) = &file.problem {
            damage.push(format!("{}: {problem}", file.path));
        }
    }
    damage
}

/// Writes the manifests into the part folder; durable when it returns. Answers their names. `source`: see [`Manifest::source`].
pub fn write_manifests(
    folder: &Dir,
    key: &SigningKey,
    (job, vm): (&str, &str),
    outcome: &Outcome,
    source: Option<String>,
) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for group in groups(outcome) {
        let manifest = Manifest {
            version: VERSION,
            job: job.to_owned(),
            vm: vm.to_owned(),
            created_at: shared::clock::rfc3339(shared::clock::now()),
            block_size: shared::manifest::BLOCK,
            disks: group
                .disks
                .iter()
                .map(|disk| {
                    let entry = DiskEntry::new(&disk.name, &disk.file, disk.member.clone(), disk.capacity, &disk.blocks);
                    DiskEntry { over: disk.over.clone(), ..entry }
                })
                .collect(),
            files: group.files,
            receipt: outcome.receipt.clone(),
            source: source.clone(),
        };
        let signed = key.sign(&manifest).map_err(io::Error::other)?;
        let name = manifest_name(&group.name);
        let mut file = folder.create(&name)?;
        file.write_all(&serde_json::to_vec(&signed).map_err(io::Error::other)?)?;
        file.sync_all()?;
        names.push(name);
    }
    vault::sync_dir(folder)?;
    Ok(names)
}

struct Group<'a> {
    name: String,
    disks: Vec<&'a DiskOutcome>,
    files: Vec<FileEntry>,
}

/// One group for each disk file; a package (OVA, OVF folder) is one group as a whole.
fn groups(outcome: &Outcome) -> Vec<Group<'_>> {
    let package = outcome.files.iter().find(|file| file.format == "ova" || file.path.ends_with(".ovf"));
    if let Some(package) = package {
        return vec![Group { name: package.path.clone(), disks: outcome.disks.iter().collect(), files: outcome.files.clone() }];
    }
    let of = |file: &FileEntry| outcome.disks.iter().filter(|disk| disk.file == file.path).collect::<Vec<_>>();
    outcome.files.iter().map(|file| Group { name: file.path.clone(), disks: of(file), files: vec![file.clone()] }).collect()
}

/// The result as the API shows it. `folder` is the published folder's absolute path on this host. `consistency`: what the source said that it
/// gave; none where a file was read.
pub fn result_json(
    folder: &std::path::Path,
    manifests: &[String],
    key: &SigningKey,
    outcome: &Outcome,
    consistency: Option<Consistency>,
) -> String {
    let absolute = |name: &str| folder.join(name).display().to_string();
    let files: Vec<_> = outcome
        .files
        .iter()
        .map(|file| json!({"path": absolute(&file.path), "size": file.size, "sha256": file.sha256, "format": file.format}))
        .collect();
    let disks: Vec<_> = outcome
        .disks
        .iter()
        .map(|disk| json!({"name": disk.name, "snapshot": disk.snapshot, "file": disk.file, "capacity": disk.capacity, "root": hex::encode(disk.root)}))
        .collect();
    let manifests: Vec<_> = manifests.iter().map(|name| absolute(name)).collect();
    json!({
        "files": files,
        "disks": disks,
        "manifest": manifests.first(),
        "manifests": manifests,
        "signer": fingerprint(&key.public_hex()),
        "verified": outcome.receipt.read_back != "not_verified",
        "consistency": consistency,
        "boot_proof": null,
        "receipt": outcome.receipt,
        "counters": {"data_bytes": outcome.data_bytes, "bytes_read": outcome.bytes_read, "bytes_resumed": outcome.resumed_from},
    })
    .to_string()
}

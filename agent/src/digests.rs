//! Root digests of a VM's disks: from the manifests beside them, else by reading.
//!
//! ```text
//! manifest beside the disk, signed by a key that counts, naming this file with this length, not older than it ─► its root: no data is read
//!     else ─► the disk's data extents are read once and hashed, block by block, until the time is over or nobody waits any more
//! ```
//! Owns: that choice, the reading. Never: writes, moves data off this host, reads for more than two askers at a time.
//! A crash here costs the answer.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use proto::v1;
use serde_json::{Value, json};
use shared::error::Code;
use shared::manifest::{self, BLOCK, Blocks, Signed};

use crate::Agent;
use crate::formats::{Disk, FormatError, Scratch, is_zero};
use crate::sources::{Beside, Error};

/// Askers at a time.
const READERS: usize = 2;
/// How much of a disk is asked for its extents at once.
const WINDOW: u64 = 4 << 30;

static READING: AtomicUsize = AtomicUsize::new(0);

/// One of the places of those who read.
struct Place;

impl Place {
    fn take() -> Result<Self, Error> {
        let free = |taken: usize| (taken < READERS).then_some(taken + 1);
        match READING.fetch_update(Ordering::AcqRel, Ordering::Acquire, free) {
            Ok(_) => Ok(Self),
            Err(_) => {
                let message = format!("{READERS} comparisons read disks at this agent already; try again when one is done");
                Err(Error { code: Code::Unavailable, message, retryable: true })
            }
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        READING.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Answers the question; `stop` is set when nobody waits any more.
pub(crate) fn answer(agent: &Agent, question: &v1::Digests, stop: &AtomicBool) -> Result<Value, Error> {
    let connection = question.connection.clone().ok_or_else(|| Error::fatal(Code::BadRequest, "a question without a connection"))?;
    let source = agent.source(&connection)?;
    let (vm, opened) = source.glance(&question.vm_id)?;
    let end = Instant::now() + Duration::from_secs(u64::from(question.seconds));
    let mut place = None;
    let mut disks = Vec::with_capacity(opened.len());
    for (described, open) in vm.disks.iter().zip(&opened) {
        let beside = source.manifest_beside(&vm, described).unwrap_or_else(|e| {
            tracing::warn!(vm = vm.id, disk = described.name, error = %e, "the manifest beside a disk could not be read");
            None
        });
        let capacity = open.disk.capacity();
        let known = beside.and_then(|beside| from_manifest(&beside, capacity, &question.trusted));
        let (root, how) = match known {
            Some(root) => (root, "manifest"),
            None => {
                if place.is_none() {
                    place = Some(Place::take()?);
                }
                (read(open.disk.as_ref(), stop, end, question.seconds)?, "read")
            }
        };
        disks.push(json!({"name": described.name, "capacity": capacity, "root": root, "how": how}));
    }
    Ok(json!({ "disks": disks }))
}

/// The root that a manifest names for this disk, where the manifest counts.
fn from_manifest(beside: &Beside, capacity: u64, trusted: &[String]) -> Option<String> {
    let (manifest, signed) = Signed::open(&beside.bytes, None).ok()?;
    let signer = manifest::fingerprint(&signed.public_key);
    if !trusted.iter().any(|known| known.eq_ignore_ascii_case(&signer)) {
        return None;
    }
    manifest.files.iter().find(|file| file.path == beside.file && file.size == beside.size)?;
    let its = |disk: &&manifest::DiskEntry| disk.file == beside.file && (beside.member.is_none() || disk.member == beside.member);
    let disk = manifest.disks.iter().find(its).filter(|disk| disk.capacity == capacity)?;
    // The root must follow from the blocks, whoever signed it.
    disk.blocks().ok().map(|_| disk.root.clone())
}

/// Reads a disk's data once.
fn read(disk: &dyn Disk, stop: &AtomicBool, end: Instant, seconds: u32) -> Result<String, Error> {
    let failed = |e: FormatError| Error::fatal(Code::BadImage, e.to_string());
    let capacity = disk.capacity();
    let (mut blocks, mut scratch) = (Blocks::default(), Scratch::default());
    let mut buffer = vec![0u8; usize::try_from(BLOCK).unwrap_or(0)];
    let mut next = 0;
    let mut from = 0;
    while from < capacity {
        let to = from.saturating_add(WINDOW).min(capacity);
        for extent in disk.extents(from, to).map_err(failed)? {
            let last = (extent.offset + extent.len - 1) / BLOCK;
            for block in (extent.offset / BLOCK).max(next)..=last {
                if stop.load(Ordering::Relaxed) {
                    return Err(Error::fatal(Code::Unavailable, "nobody waits for this answer any more"));
                }
                if Instant::now() > end {
                    let message = format!(
                        "the disks could not be read within {seconds} s; export them first: beside an export lies a manifest, and then nothing is read"
                    );
                    return Err(Error::fatal(Code::Unprocessable, message));
                }
                let offset = block * BLOCK;
                let length = usize::try_from(BLOCK.min(capacity - offset)).unwrap_or(0);
                let bytes = buffer.get_mut(..length).unwrap_or_default();
                disk.read_at(offset, bytes, &mut scratch).map_err(failed)?;
                if !is_zero(bytes) {
                    blocks.0.insert(block, manifest::block_digest(bytes));
                }
                next = block + 1;
            }
        }
        from = to;
    }
    Ok(hex::encode(blocks.root(capacity)))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::disallowed_methods)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::formats::{Window, raw};

    fn disk(capacity: u64, at: &[(u64, u8)]) -> raw::Reader {
        let folder = shared::vault::temporary_dir("digests").unwrap();
        let path = folder.join("disk.raw");
        let file = std::fs::File::create(&path).unwrap();
        file.set_len(capacity).unwrap();
        for (offset, byte) in at {
            file.write_all_at(&[*byte; 512], *offset).unwrap();
        }
        let disk = raw::Reader::open(Window::whole(std::fs::File::open(&path).unwrap()).unwrap()).unwrap();
        std::fs::remove_dir_all(folder).unwrap();
        disk
    }

    #[test]
    fn a_read_root_is_the_manifests_and_stops_when_asked() {
        // A hole of several windows between two pieces of data; the last block is short.
        let capacity = 3 * WINDOW + 512;
        let (stop, end) = (AtomicBool::new(false), Instant::now() + Duration::from_secs(60));
        let image = disk(capacity, &[(BLOCK - 512, 7), (capacity - 512, 9)]);
        let mut blocks = Blocks::default();
        let mut first = vec![0u8; BLOCK as usize];
        first[BLOCK as usize - 512..].fill(7);
        blocks.0.insert(0, manifest::block_digest(&first));
        blocks.0.insert(capacity / BLOCK, manifest::block_digest(&[9; 512]));
        assert_eq!(read(&image, &stop, end, 60).unwrap(), hex::encode(blocks.root(capacity)));
        assert_ne!(read(&disk(capacity, &[(0, 7)]), &stop, end, 60).unwrap(), hex::encode(blocks.root(capacity)));
        let late = read(&image, &stop, Instant::now() - Duration::from_secs(1), 1).unwrap_err();
        assert!(late.code == Code::Unprocessable && late.message.contains("manifest"), "{late}");
        stop.store(true, Ordering::Relaxed);
        assert_eq!(read(&image, &stop, end, 60).unwrap_err().code, Code::Unavailable);
    }

    #[test]
    fn two_read_at_a_time() {
        let (a, b) = (Place::take().unwrap(), Place::take().unwrap());
        assert!(Place::take().is_err_and(|e| e.retryable));
        drop(a);
        drop(Place::take().unwrap());
        drop(b);
    }
}

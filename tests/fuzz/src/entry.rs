//! Where fuzzed bytes go in: one function a parser, each opens, walks and reads as far as a real caller would.
//!
//! Owns: the entry functions, shared by the fuzz targets and by the replay of their corpus in the agent's tests. Never: judges an answer:
//! an error is as good as success, only a panic, a hang or an allocation over the fuzzer's limit is a finding.
//! A crash here is what it is for.

#[path = "sums.rs"]
mod sums;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use crate::formats::chain::{Chain, Layer, Link};
use crate::formats::{Disk, Extent, Scratch, Window, ova, qcow2, raw, sniff, vdi, vhd, vhdx, vmdk};

/// An entry function.
pub type Entry = fn(&[u8]);

/// The targets by the name of their corpus folder.
pub const TARGETS: &[(&str, Entry)] =
    &[("vmdk", vmdk), ("qcow2", qcow2), ("ova", ova), ("ovf", ovf), ("sniff", sniff), ("vhd", vhd), ("vdi", vdi), ("vhdx", vhdx)];

/// Most bytes of a disk that are read.
const READ: u64 = 1 << 20;
/// Most of a disk whose extents are asked for: what one grain table of the largest grains describes, twice.
const WALK: u64 = 1 << 30;

/// Room of a VMDK's descriptor before the bytes of the files that it names.
const BESIDE: usize = 512;

/// A window over these bytes in memory; `None` when the machine has no room for them.
fn window(bytes: &[u8]) -> Option<Window> {
    let file = File::from(rustix::fs::memfd_create("fuzz", rustix::fs::MemfdFlags::CLOEXEC).ok()?);
    file.write_all_at(bytes, 0).ok()?;
    Window::whole(file).ok()
}

/// Asks for the extents at the front and the end, and reads of them and of the disk's last bytes.
fn walk(disk: &dyn Disk) {
    let (mut scratch, mut left) = (Scratch::default(), READ);
    let capacity = disk.capacity();
    for from in [0, capacity.saturating_sub(WALK)] {
        let Ok(extents) = disk.extents(from, from.saturating_add(WALK)) else { continue };
        let mut end = from;
        for extent in extents {
            // The trait's contract: sorted, not overlapping, not empty, inside the capacity.
            assert!(
                extent.len > 0 && extent.offset >= end && extent.offset + extent.len <= capacity,
                "{extent:?} after {end} of {capacity}"
            );
            end = extent.offset + extent.len;
            let len = extent.len.min(left).min(256 << 10);
            let mut buf = vec![0u8; len as usize];
            // What cannot be read is skipped; the next extent may be sound.
            let _ = disk.read_at(extent.offset, &mut buf, &mut scratch);
            left -= len;
        }
    }
    let mut tail = vec![0u8; capacity.min(4096) as usize];
    let _ = disk.read_at(capacity - tail.len() as u64, &mut tail, &mut scratch);
    let _ = disk.read_at(capacity, &mut [0u8; 1], &mut scratch);
}

/// A layer by itself, and over a raw parent.
fn stack(top: Arc<dyn Layer>, parent: &Window) {
    let capacity = top.capacity();
    for from in [0, capacity.saturating_sub(WALK)] {
        let to = from.saturating_add(WALK);
        let (Ok(data), Ok(covered)) = (top.extents(from, to), top.covered(from, to)) else { continue };
        // The contract of a layer: it answers for all of its data.
        let inside = |extent: &Extent| {
            let behind = covered.partition_point(|run| run.offset <= extent.offset);
            behind > 0 && extent.offset + extent.len <= covered[behind - 1].offset + covered[behind - 1].len
        };
        assert!(data.iter().all(inside), "{data:?} is not all in {covered:?}");
    }
    let Ok(bottom) = raw::Reader::open(parent.clone()) else { return };
    let Ok(mut chain) = Chain::new(Link { name: "top".to_owned(), layer: top }) else { return };
    if chain.push(Link { name: "bottom".to_owned(), layer: Arc::new(bottom) }).is_ok() {
        walk(&*chain.into_disk());
    }
}

/// A VMDK, whole or as a delta; every file that it names is the bytes behind the first [`BESIDE`].
pub fn vmdk(bytes: &[u8]) {
    let Some(main) = window(bytes) else { return };
    let beside = |name: &str| {
        assert!(!name.contains(['/', '\\']) && !name.contains(".."), "asked for {name:?}");
        window(bytes.get(BESIDE..).unwrap_or(bytes)).ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))
    };
    if let Ok(image) = vmdk::open(main.clone(), &beside) {
        walk(&image);
    }
    if let Ok(image) = vmdk::open_layer(main.clone(), &beside) {
        stack(Arc::new(image), &main);
    }
}

/// A qcow2 image, as a source, as a damaged one, as a layer, and each of its snapshots.
pub fn qcow2(bytes: &[u8]) {
    let Some(main) = window(bytes) else { return };
    if let Ok(reader) = qcow2::Reader::open(main.clone()) {
        walk(&reader);
    }
    if let Ok(reader) = qcow2::Reader::open_damaged(main.clone()) {
        walk(&reader);
        for snapshot in reader.snapshots().unwrap_or_default().into_iter().take(4) {
            if let Ok(reader) = qcow2::Reader::open_snapshot(main.clone(), &snapshot.id) {
                walk(&reader);
            }
        }
    }
    if let Ok(reader) = qcow2::Reader::open_layer(main.clone(), None, 32 << 20) {
        stack(Arc::new(reader), &main);
    }
}

/// An OVA: its frame, its description, its manifest and its disks.
pub fn ova(bytes: &[u8]) {
    let Some(main) = window(bytes) else { return };
    let Ok(opened) = ova::open(&main) else { return };
    let _ = opened.check_manifest(&mut |_| Ok(()));
    assert_eq!(opened.disks.len(), opened.vm.disks.len());
    for disk in opened.disks {
        if let Ok(image) = vmdk::open_single(disk.window) {
            walk(&image);
        }
    }
}

/// An OVF description, and the same bytes as a manifest.
pub fn ovf(bytes: &[u8]) {
    let _ = ova::parse(bytes);
    let _ = ova::mf::parse(bytes);
}

/// What a file is.
pub fn sniff(bytes: &[u8]) {
    let Some(main) = window(bytes) else { return };
    if let Ok(kind) = sniff::sniff(&main) {
        assert!(!kind.describe().is_empty());
    }
}

/// A VHD, its checksums made right.
pub fn vhd(bytes: &[u8]) {
    let Some(main) = window(&sums::vhd(bytes)) else { return };
    let _ = vhd::looks_like(&main);
    if let Ok(reader) = vhd::Reader::open(main) {
        walk(&reader);
    }
}

/// A VDI.
pub fn vdi(bytes: &[u8]) {
    let Some(main) = window(bytes) else { return };
    let _ = vdi::looks_like(&main);
    if let Ok(reader) = vdi::Reader::open(main) {
        walk(&reader);
    }
}

/// A VHDX of these records (see [`sums::vhdx`]), whole or damaged.
pub fn vhdx(bytes: &[u8]) {
    let slots = sums::vhdx(bytes);
    let unfolded = || {
        let file = File::from(rustix::fs::memfd_create("fuzz", rustix::fs::MemfdFlags::CLOEXEC)?);
        for (slot, piece) in &slots {
            file.write_all_at(piece, slot << 16)?;
        }
        // One slot for each number that a record can name.
        file.set_len(256 << 16)?;
        Window::whole(file)
    };
    let Ok(main) = unfolded() else { return };
    let _ = vhdx::looks_like(&main);
    if let Ok(reader) = vhdx::Reader::open(main.clone()) {
        walk(&reader);
    }
    if let Ok(reader) = vhdx::Reader::open_damaged(main) {
        walk(&reader);
    }
}

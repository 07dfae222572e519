//! Tests of the VMDK code, with qemu-img as the oracle. They fail where qemu-img is missing: a skipped oracle proves nothing.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

mod delta;
mod esxi;
mod hostile;
mod read;
mod write;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::*;
use crate::formats::disk::{DiskWriter, Encoded, Encoder, Output, UNIT};

/// A directory that goes with the test.
struct Dir(PathBuf);

impl Dir {
    fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let path = std::env::temp_dir().join(format!("hypersdk-vmdk-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed)));
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn window(&self, name: &str) -> Window {
        Window::whole(File::open(self.path(name)).unwrap()).unwrap()
    }

    fn put(&self, name: &str, bytes: &[u8]) -> Window {
        std::fs::write(self.path(name), bytes).unwrap();
        self.window(name)
    }

    /// Opens a VMDK with its extents in this directory.
    fn open(&self, name: &str) -> Result<Image> {
        open(self.window(name), &|extent| Window::whole(File::open(self.path(extent))?))
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn qemu_img(args: &[&str]) -> std::process::Output {
    Command::new("qemu-img").args(args).output().expect("these tests need qemu-img")
}

fn qemu_ok(args: &[&str]) {
    let out = qemu_img(args);
    assert!(out.status.success(), "qemu-img {args:?}: {}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// xorshift64*: the tests' numbers, the same in every run.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// Bytes that compress a little, a lot or not at all.
    fn bytes(&mut self, len: usize) -> Vec<u8> {
        match self.below(3) {
            0 => (0..len).map(|_| self.next() as u8).collect(),
            1 => (0..len).map(|_| b'a' + (self.next() % 7) as u8).collect(),
            _ => vec![(self.next() % 255) as u8 + 1; len],
        }
    }
}

/// A raw image of `capacity` bytes with runs of data of all sizes, holes between them, something in the first and the last sector.
fn patterned(path: &Path, capacity: u64, runs: u64, seed: u64) {
    let file = OpenOptions::new().create_new(true).write(true).open(path).unwrap();
    file.set_len(capacity).unwrap();
    let mut numbers = Numbers(seed);
    for k in 0..runs {
        let room = capacity.min(700_000);
        let len = 1 + numbers.below(if k % 3 == 0 { room.min(3000) } else { room });
        let at = numbers.below(capacity - len + 1);
        file.write_all_at(&numbers.bytes(len as usize), at).unwrap();
    }
    file.write_all_at(b"first", 0).unwrap();
    file.write_all_at(b"last!", capacity - 5).unwrap();
}

/// The disk reads as the raw image does, whatever the cut; every byte outside of its extents is zero.
fn assert_equal(disk: &dyn Disk, raw: &Window) {
    assert_eq!(disk.capacity(), raw.len());
    let extents = disk.extents(0, disk.capacity()).unwrap();
    assert!(extents.windows(2).all(|pair| pair[0].offset + pair[0].len < pair[1].offset), "sorted and merged");
    assert!(extents.iter().all(|extent| extent.len > 0 && extent.offset + extent.len <= raw.len()));
    let mut scratch = Scratch::default();
    let (mut ours, mut theirs) = (vec![0xaau8; 4 << 20], vec![0u8; 4 << 20]);
    let mut numbers = Numbers(7);
    let data = raw.data_runs(0, raw.len()).unwrap();
    for run in extents.iter().chain(&data) {
        let mut at = run.offset.saturating_sub(numbers.below(5000));
        let end = (run.offset + run.len + numbers.below(5000)).min(raw.len());
        while at < end {
            let cut = if numbers.below(2) == 0 { ours.len() as u64 } else { 1 + numbers.below(200_000) };
            let len = cut.min(end - at) as usize;
            disk.read_at(at, &mut ours[..len], &mut scratch).unwrap();
            raw.read_exact_at(&mut theirs[..len], at).unwrap();
            assert!(ours[..len] == theirs[..len], "bytes differ in {at}+{len}");
            at += len as u64;
        }
    }
    let mut holes = data;
    for extent in &extents {
        holes = holes.iter().flat_map(|hole| minus(*hole, *extent)).collect();
    }
    for hole in holes {
        let mut bytes = vec![0u8; hole.len as usize];
        raw.read_exact_at(&mut bytes, hole.offset).unwrap();
        assert!(crate::formats::disk::is_zero(&bytes), "data at {hole:?} that no extent covers");
    }
    for _ in 0..20 {
        let from = numbers.below(raw.len());
        let to = from + 1 + numbers.below(raw.len() - from);
        let clipped: Vec<Extent> = extents
            .iter()
            .map(|extent| (extent.offset.max(from), (extent.offset + extent.len).min(to)))
            .filter(|(start, end)| start < end)
            .map(|(start, end)| Extent { offset: start, len: end - start })
            .collect();
        assert_eq!(disk.extents(from, to).unwrap(), clipped, "extents of [{from}, {to})");
    }
    assert!(disk.read_at(raw.len() - 1, &mut [0; 2], &mut scratch).is_err(), "past the capacity");
}

fn minus(a: Extent, b: Extent) -> Vec<Extent> {
    let before = (a.offset, (a.offset + a.len).min(b.offset));
    let after = (a.offset.max(b.offset + b.len), a.offset + a.len);
    let parts = if before.1 >= a.offset + a.len || after.0 <= a.offset { vec![(a.offset, a.offset + a.len)] } else { vec![before, after] };
    parts.into_iter().filter(|(from, to)| from < to).map(|(from, to)| Extent { offset: from, len: to - from }).collect()
}

/// Creates an output file.
fn output(path: &Path, base: u64) -> Output {
    let file = OpenOptions::new().create(true).truncate(false).read(true).write(true).open(path).unwrap();
    Output { file: Arc::new(file), base }
}

/// Encodes the raw image's data, one block of 4 MiB after the other, and hands each to `each`.
fn encode(raw: &Window, level: i32, mut each: impl FnMut(&Encoded)) {
    let mut state = StreamEncoder::new(level).unwrap().state().unwrap();
    let mut out = Encoded::default();
    let mut at = 0;
    let mut block = vec![0u8; 4 << 20];
    while at < raw.len() {
        let len = (4 << 20).min(raw.len() - at);
        if !raw.data_runs(at, at + len).unwrap().is_empty() {
            raw.read_exact_at(&mut block[..len as usize], at).unwrap();
            state.encode(at, &block[..len as usize], &mut out).unwrap();
            each(&out);
        }
        at += len;
    }
}

/// A streamOptimized VMDK of the raw image.
fn stream(raw: &Window, path: &Path, level: i32) -> u64 {
    let mut writer = StreamWriter::create(output(path, 0), raw.len(), 0x1234_5678).unwrap();
    encode(raw, level, |block| writer.write_block(block).unwrap());
    writer.finish().unwrap()
}

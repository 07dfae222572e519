//! The pipeline against real files, with qemu-img as the oracle.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

mod crash;
mod layers;
mod limits;
mod matrix;
mod proof;

use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use cap_std::fs::Dir;
use shared::manifest::{BLOCK, DiskEntry, Manifest, VERSION};
use shared::vm::{self, Vm};

use super::{Error, Format, Job, Outcome, PartDir, Snapshot, SourceDisk, Stage, Stop, Tuning, Watch, run};
use crate::formats::{Compression, Disk, Method, Scratch, Window, qcow2, raw};
use crate::journal::Journal;

/// A folder that goes when the test ends.
pub(super) struct Folder(PathBuf);

impl Folder {
    pub(super) fn new(name: &str) -> Self {
        Self::below(&std::env::temp_dir(), name)
    }

    /// In memory where the system has a place for that: for tests of what is written in which order, not of how it is synced.
    pub(super) fn fast(name: &str) -> Self {
        let memory = Path::new("/dev/shm");
        if memory.is_dir() { Self::below(memory, name) } else { Self::new(name) }
    }

    fn below(parent: &Path, name: &str) -> Self {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = parent.join(format!("hypersdk-pipeline-{name}-{}-{n}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(path.join("part")).unwrap();
        Self(path)
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    pub(super) fn part_path(&self, name: &str) -> PathBuf {
        self.0.join("part").join(name)
    }

    pub(super) fn part(&self) -> PartDir {
        PartDir::new(Dir::open_ambient_dir(self.0.join("part"), cap_std::ambient_authority()).unwrap())
    }

    pub(super) fn file(&self, name: &str) -> File {
        OpenOptions::new().read(true).write(true).create(true).truncate(false).open(self.path(name)).unwrap()
    }

    pub(super) fn journal(&self, job: &Job) -> Journal {
        Journal::open(self.file("journal"), &job.identity()).unwrap()
    }

    /// One attempt at a job.
    pub(super) fn run(&self, job: &Job, watch: &dyn Watch) -> Result<Outcome, Error> {
        run(job, &self.part(), &mut self.journal(job), watch)
    }

    /// Forgets an earlier job.
    pub(super) fn clear(&self) {
        let _ = std::fs::remove_file(self.path("journal"));
        std::fs::remove_dir_all(self.path("part")).unwrap();
        std::fs::create_dir_all(self.path("part")).unwrap();
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A caller that remembers, and stops the job at a number of bytes read.
#[derive(Default)]
pub(super) struct Listener {
    pub(super) snapshots: Mutex<Vec<Snapshot>>,
    pub(super) logs: Mutex<Vec<String>>,
    /// Questions after which to stop, and how.
    pub(super) stop: Option<(u64, Stop)>,
    asked: AtomicU64,
}

impl Watch for Listener {
    fn progress(&self, snapshot: &Snapshot) {
        self.snapshots.lock().unwrap().push(*snapshot);
    }
    fn log(&self, _: tracing::Level, _: Stage, text: &str) {
        self.logs.lock().unwrap().push(text.to_owned());
    }
    fn stop(&self) -> Option<Stop> {
        let asked = self.asked.fetch_add(1, Ordering::Relaxed);
        self.stop.and_then(|(after, stop)| (asked >= after).then_some(stop))
    }
}

pub(super) fn qemu_img(args: &[&str]) -> String {
    let output = Command::new("qemu-img").args(args).output().expect("these tests need qemu-img (Debian: qemu-utils)");
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "qemu-img {args:?}: {text}");
    text
}

pub(super) fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Numbers that look random and are the same each time.
pub(super) fn noise(seed: u64) -> impl FnMut() -> u64 {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    }
}

/// Bytes with random, repetitive and empty stretches, some of them a whole block long.
pub(super) fn sample(capacity: usize, seed: u64) -> Vec<u8> {
    let mut next = noise(seed);
    let mut data = vec![0u8; capacity];
    let mut at = 0;
    while at < capacity {
        let longest = if next().is_multiple_of(4) { 6 << 20 } else { 900 << 10 };
        let len = (next() as usize % longest + 1).min(capacity - at);
        let part = &mut data[at..at + len];
        match next() % 8 {
            0 => part.chunks_mut(8).for_each(|c| c.copy_from_slice(&next().to_le_bytes()[..c.len()])),
            1 => part.iter_mut().enumerate().for_each(|(i, b)| *b = (i / 7 % 50) as u8),
            2..5 => part[len / 2] = 1,
            _ => {}
        }
        at += len;
    }
    data
}

/// Writes a file whose runs of zeros are holes.
pub(super) fn write_sparse(path: &Path, data: &[u8]) {
    let file = File::create(path).unwrap();
    for (i, part) in data.chunks(4096).enumerate().filter(|(_, part)| part.iter().any(|b| *b != 0)) {
        std::os::unix::fs::FileExt::write_all_at(&file, part, i as u64 * 4096).unwrap();
    }
    file.set_len(data.len() as u64).unwrap();
}

pub(super) fn open_raw(path: &Path) -> Arc<dyn Disk> {
    Arc::new(raw::Reader::open(Window::whole(File::open(path).unwrap()).unwrap()).unwrap())
}

pub(super) fn open_qcow2(path: &Path) -> Arc<dyn Disk> {
    Arc::new(qcow2::Reader::open(Window::whole(File::open(path).unwrap()).unwrap()).unwrap())
}

pub(super) fn read_all(disk: &dyn Disk) -> Vec<u8> {
    let mut data = vec![0u8; disk.capacity() as usize];
    disk.read_at(0, &mut data, &mut Scratch::default()).unwrap();
    data
}

/// A job with checkpoints at each block.
pub(super) fn job(disks: &[Arc<dyn Disk>], format: Format, compression: Option<Compression>) -> Job {
    let source = |(n, disk): (usize, &Arc<dyn Disk>)| SourceDisk {
        name: format!("disk-{n}"),
        snapshot: None,
        identity: "1".into(),
        disk: disk.clone(),
        base: None,
    };
    let described = |n: usize| vm::Disk { name: format!("disk-{n}"), capacity: disks[n].capacity(), ..vm::Disk::default() };
    Job {
        id: "job-1".into(),
        vm: Vm { name: "web".into(), cpu: 2, memory_mb: 2048, disks: (0..disks.len()).map(described).collect(), ..Vm::default() },
        disks: disks.iter().enumerate().map(source).collect(),
        format,
        compression,
        pass_on: true,
        sha256: true,
        verify: true,
        bandwidth: None,
        cid: 0x1234_5678,
        created: 1_700_000_000,
        tuning: Tuning { checkpoint_bytes: BLOCK, checkpoint_every: Duration::from_secs(5), workers: Some(2), resumable: true },
    }
}

pub(super) fn targets() -> Vec<(Format, Option<Compression>)> {
    let level = |method, level| Some(Compression::new(method, level));
    vec![
        (Format::Raw, None),
        (Format::Qcow2, None),
        (Format::Qcow2, level(Method::Deflate, 1)),
        (Format::Qcow2, level(Method::Zstd, 1)),
        (Format::Vmdk, None),
        (Format::Ovf, None),
        (Format::Ova, level(Method::Deflate, 2)),
        (Format::Vhdx, None),
        (Format::Vhd, None),
        (Format::Vdi, None),
    ]
}

pub(super) fn manifest(outcome: &Outcome) -> Manifest {
    Manifest {
        version: VERSION,
        job: "job-1".into(),
        vm: "web".into(),
        created_at: "2026-01-01T00:00:00Z".into(),
        block_size: BLOCK,
        disks: outcome.disks.iter().map(|d| DiskEntry::new(&d.name, &d.file, d.member.clone(), d.capacity, &d.blocks)).collect(),
        files: outcome.files.clone(),
        receipt: outcome.receipt.clone(),
        source: None,
    }
}

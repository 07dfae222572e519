//! The VHDX engine against QEMU's: `round` reads what qemu-img makes and has it judge what we write, `dirty` replays logs made by hand,
//! `hostile` is the table of what is refused, and in which words.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

mod dirty;
mod hostile;
mod round;

use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use super::super::disk::{Disk, DiskWriter, Encoded, Encoder as _, FormatError, Output, Scratch, Window};
use super::super::raw;
use super::{Reader, Writer, crc};

/// What every image of these tests is named by.
const ID: [u8; 16] = *b"hypersdk-vhdx-id";

/// Bytes that the pipeline hands over at once.
const BLOCK: u64 = 4 << 20;

/// A folder that goes when the test ends.
struct Dir(PathBuf);

impl Dir {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("hypersdk-vhdx-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn create(&self, name: &str) -> File {
        OpenOptions::new().read(true).write(true).create(true).truncate(true).open(self.path(name)).unwrap()
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().expect("these tests need qemu-img and qemu-io (Debian: qemu-utils)");
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program} {args:?}: {text}");
    text
}

fn qemu_img(args: &[&str]) -> String {
    run("qemu-img", args)
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Numbers that look random and are the same each time.
fn noise(seed: u64) -> impl FnMut() -> u64 {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    }
}

/// A disk with random, repetitive, sparse and empty stretches of up to `longest` bytes.
fn sample(capacity: usize, longest: usize, seed: u64) -> Vec<u8> {
    let mut next = noise(seed);
    let mut data = vec![0u8; capacity];
    let mut at = 0;
    while at < capacity {
        let len = ((next() % longest as u64) as usize + 1).min(capacity - at);
        let part = &mut data[at..at + len];
        match next() % 6 {
            0 => part.chunks_mut(8).for_each(|c| c.copy_from_slice(&next().to_le_bytes()[..c.len()])),
            1 => part.iter_mut().enumerate().for_each(|(i, b)| *b = (i / 7 % 50) as u8),
            2 => part[len / 2] = 1,
            _ => {}
        }
        at += len;
    }
    data
}

fn read_all(disk: &dyn Disk) -> Vec<u8> {
    let mut scratch = Scratch::default();
    let mut data = vec![0u8; disk.capacity() as usize];
    for extent in disk.extents(0, u64::MAX).unwrap() {
        // In odd pieces, so that blocks are met from the middle, too.
        for at in (extent.offset..extent.offset + extent.len).step_by(700_003) {
            let end = (at + 700_003).min(extent.offset + extent.len);
            disk.read_at(at, &mut data[at as usize..end as usize], &mut scratch).unwrap();
        }
    }
    let mut whole = vec![7u8; data.len()];
    disk.read_at(0, &mut whole, &mut scratch).unwrap();
    assert!(whole == data, "what no extent covers is not zero");
    data
}

fn open(path: &Path) -> Result<Reader, FormatError> {
    Reader::open(Window::whole(File::open(path).unwrap()).unwrap())
}

fn encode(offset: u64, data: &[u8]) -> Encoded {
    let mut encoded = Encoded::default();
    raw::Encoder.state().unwrap().encode(offset, data, &mut encoded).unwrap();
    encoded
}

fn write(file: File, data: &[u8]) -> u64 {
    let mut writer = Writer::new(Output { file: Arc::new(file), base: 0 }, data.len() as u64, ID).unwrap();
    for (i, block) in data.chunks(BLOCK as usize).enumerate() {
        writer.write_block(&encode(i as u64 * BLOCK, block)).unwrap();
    }
    writer.finish().unwrap()
}

/// Puts the checksum of a structure of a file in memory right again.
fn reseal(image: &mut [u8], at: usize, len: usize) {
    if let Some(structure) = image.get_mut(at..at + len) {
        crc::seal(structure);
    }
}

/// The log's mark in images whose log is to be replayed.
const LOG_GUID: [u8; 16] = *b"log of the tests";

/// Where the parts of our images lie.
const HEADER_AT: [usize; 2] = [64 << 10, 128 << 10];
const LOG_AT: usize = 1 << 20;
const LOG_LEN: usize = 1 << 20;
const BAT_AT: usize = 3 << 20;

/// What one log descriptor writes, and where.
#[derive(Clone, Debug)]
enum Change {
    Zeros(u64, u64),
    Sector(u64, Vec<u8>),
}

/// A log entry as [MS-VHDX] 2.3.1 lays it out.
#[derive(Clone, Debug)]
struct LogEntry {
    sequence: u64,
    tail: u32,
    flushed: u64,
    last: u64,
    changes: Vec<Change>,
}

impl LogEntry {
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0u8; (64 + self.changes.len() * 32).next_multiple_of(4096)];
        for (i, change) in self.changes.iter().enumerate() {
            let at = 64 + i * 32;
            let mut put = |offset: usize, value: &[u8]| bytes[at + offset..at + offset + value.len()].copy_from_slice(value);
            put(24, &self.sequence.to_le_bytes());
            match change {
                Change::Zeros(from, len) => {
                    put(0, b"zero");
                    put(8, &len.to_le_bytes());
                    put(16, &from.to_le_bytes());
                }
                Change::Sector(from, data) => {
                    put(0, b"desc");
                    put(4, &data[4092..]);
                    put(8, &data[..8]);
                    put(16, &from.to_le_bytes());
                    let mut sector = data.clone();
                    sector[..4].copy_from_slice(b"data");
                    sector[4..8].copy_from_slice(&((self.sequence >> 32) as u32).to_le_bytes());
                    sector[4092..].copy_from_slice(&(self.sequence as u32).to_le_bytes());
                    bytes.extend_from_slice(&sector);
                }
            }
        }
        let len = bytes.len() as u32;
        let mut put = |offset: usize, value: &[u8]| bytes[offset..offset + value.len()].copy_from_slice(value);
        put(0, b"loge");
        put(8, &len.to_le_bytes());
        put(12, &self.tail.to_le_bytes());
        put(16, &self.sequence.to_le_bytes());
        put(24, &(self.changes.len() as u32).to_le_bytes());
        put(32, &LOG_GUID);
        put(48, &self.flushed.to_le_bytes());
        put(56, &self.last.to_le_bytes());
        crc::seal(&mut bytes);
        bytes
    }
}

/// Writes bytes into the log, on from its start when its end comes.
fn put_log(image: &mut [u8], at: usize, bytes: &[u8]) {
    for (i, sector) in bytes.chunks(4096).enumerate() {
        let to = LOG_AT + (at + i * 4096) % LOG_LEN;
        image[to..to + sector.len()].copy_from_slice(sector);
    }
}

/// Changes both headers and makes their checksums right.
fn patch_headers(image: &mut [u8], offset: usize, value: &[u8]) {
    for at in HEADER_AT {
        image[at + offset..at + offset + value.len()].copy_from_slice(value);
        reseal(image, at, 4096);
    }
}

/// A small image: block 0 and block 2 of three are there, at 4 and 8 MiB of the file.
fn small(dir: &Dir) -> (Vec<u8>, Vec<u8>) {
    let mut data = sample(12 << 20, 90 << 10, 77);
    data[4 << 20..8 << 20].fill(0);
    write(dir.create("small"), &data);
    (std::fs::read(dir.path("small")).unwrap(), data)
}

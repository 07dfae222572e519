//! The header of a VDI.
//!
//! Owns: its fields and what is accepted of them. Never: reads the block map.
//! A crash here costs nothing.
//!
//! Source: VirtualBox, `VDICore.h` (header 1.1); QEMU, `block/vdi.c` for the limits. All numbers are little endian.

use super::super::disk::{FormatError, Result, Window};
use super::{BLOCK, FORMAT, SECTOR, corrupt, refused};

/// Most blocks of an image: QEMU holds the map in 2 GiB less one sector.
const MAX_BLOCKS: u64 = ((1 << 31) - SECTOR) / 4;

/// Largest disk in bytes: QEMU's limit of 536870784 blocks of 1 MiB, 512 TiB less 128 MiB.
pub const MAX_CAPACITY: u64 = MAX_BLOCKS * BLOCK;

/// Bytes that are read of the header, and that we write.
pub(super) const HEADER: usize = 512;

/// Bytes before the part whose length the header names.
const PREFIX: u64 = 72;

/// Length of the header's second part, as QEMU and VirtualBox before 4.0 write it.
const HEADER_LEN: u32 = 0x180;

const SIGNATURE: u32 = 0xbeda_107f;
const SIGNATURE_AT: u64 = 64;
const VERSION: u32 = 0x0001_0001;

/// The text at the beginning is for people; no reader goes by it.
const TEXT: &[u8] = b"<<< HyperSDK Virtual Disk Image >>>\n";

/// Whether the window could be a VDI: its signature at byte 64.
pub fn looks_like(window: &Window) -> bool {
    let mut signature = [0u8; 4];
    window.read_exact_at(&mut signature, SIGNATURE_AT).is_ok() && u32::from_le_bytes(signature) == SIGNATURE
}

pub(super) fn le32(bytes: &[u8], at: usize) -> u32 {
    bytes[at..at + 4].iter().rev().fold(0, |value, b| value << 8 | u32::from(*b))
}

fn le64(bytes: &[u8], at: usize) -> u64 {
    u64::from(le32(bytes, at + 4)) << 32 | u64::from(le32(bytes, at))
}

/// A header as it was read, and held against the file's length.
#[derive(Debug)]
pub(super) struct Header {
    /// `dynamic` or `static`.
    pub subformat: &'static str,
    /// Size of the disk in bytes, a multiple of 512.
    pub capacity: u64,
    /// Where the block map lies.
    pub map_at: u64,
    /// Blocks that the disk needs; the map may have more.
    pub blocks: u64,
    /// Entries of the map: every place in the file counts less.
    pub entries: u64,
    /// Where block 0 of the file lies.
    pub data_at: u64,
}

impl Header {
    pub fn read(window: &Window) -> Result<Self> {
        let mut bytes = [0u8; HEADER];
        if !looks_like(window) {
            return Err(refused(format!("its signature (at byte {SIGNATURE_AT}) is not {SIGNATURE:08x}")));
        }
        if window.len() < HEADER as u64 {
            return Err(corrupt("header", 0, 0, format!("the file has {} bytes, a header has {HEADER}", window.len())));
        }
        window.read_exact_at(&mut bytes, 0)?;
        let unsupported = |reason: String| Err(FormatError::Unsupported(format!("{FORMAT}: {reason}")));
        let version = le32(&bytes, 68);
        if version != VERSION {
            return unsupported(format!("version {}.{}; 1.1 would be right", version >> 16, version & 0xffff));
        }
        let subformat = match le32(&bytes, 76) {
            1 => "dynamic",
            2 => "static",
            kind @ (3 | 4) => {
                return Err(refused(format!("type {kind} is a differencing image, which needs its parent; merge the two first")));
            }
            other => return Err(refused(format!("image type {other}; dynamic (1) and static (2) are read"))),
        };
        for (at, name) in [(424, "link"), (440, "parent")] {
            if bytes[at..at + 16].iter().any(|b| *b != 0) {
                return Err(refused(format!("its {name} UUID says that it needs a parent; merge the two first")));
            }
        }
        for (at, name, right) in [(360, "sectors", SECTOR), (376, "blocks", BLOCK), (380, "extra data before blocks", 0)] {
            let value = le32(&bytes, at);
            if u64::from(value) != right {
                return unsupported(format!("{name} of {value} bytes; {right} would be right"));
            }
        }
        Self::places(&bytes, window.len(), subformat)
    }

    fn places(bytes: &[u8; HEADER], file: u64, subformat: &'static str) -> Result<Self> {
        let bad = |reason: String| Err(corrupt("header", 0, 0, reason));
        let (size, entries) = (le64(bytes, 368), u64::from(le32(bytes, 384)));
        if size > MAX_CAPACITY || entries > MAX_BLOCKS {
            return bad(format!(
                "a disk of {size} bytes and {entries} blocks is over QEMU's limit of {MAX_BLOCKS} blocks of 1 MiB ({MAX_CAPACITY} bytes)"
            ));
        }
        // VirtualBox makes images of odd sizes from raw files; QEMU rounds them up to sectors, too.
        let capacity = size.next_multiple_of(SECTOR);
        let blocks = capacity.div_ceil(BLOCK);
        if blocks > entries {
            return bad(format!("a map of {entries} blocks for a disk of {size} bytes, {blocks} would be right"));
        }
        let (map_at, data_at) = (u64::from(le32(bytes, 340)), u64::from(le32(bytes, 344)));
        let header_end = PREFIX + u64::from(le32(bytes, 72));
        if !map_at.is_multiple_of(SECTOR) || map_at < header_end.max(SECTOR) {
            return bad(format!(
                "a block map at byte {map_at}; a multiple of {SECTOR} behind the header's end at {header_end} would be right"
            ));
        }
        let map_end = map_at + entries * 4;
        if map_end > file {
            return Err(corrupt("block map", 0, map_at, format!("it ends at byte {map_end}, past the file's end at {file}")));
        }
        if !data_at.is_multiple_of(SECTOR) || data_at < map_end {
            return bad(format!(
                "data from byte {data_at} on; a multiple of {SECTOR} behind the block map's end at {map_end} would be right"
            ));
        }
        Ok(Self { subformat, capacity, map_at, blocks, entries, data_at })
    }
}

/// The header of a dynamic image that we make, with `used` blocks of `blocks` allocated. `id` becomes the image's UUID.
pub(super) fn header(capacity: u64, map_at: u32, data_at: u32, blocks: u32, used: u32, id: [u8; 16]) -> [u8; HEADER] {
    let mut bytes = [0u8; HEADER];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(0, TEXT);
    for (at, value) in [
        (64, SIGNATURE),
        (68, VERSION),
        (72, HEADER_LEN),
        (76, 1),
        (340, map_at),
        (344, data_at),
        (360, SECTOR as u32),
        (376, BLOCK as u32),
        (384, blocks),
        (388, used),
    ] {
        put(at, &value.to_le_bytes());
    }
    put(368, &capacity.to_le_bytes());
    put(392, &uuid(id));
    // The second one changes with each modification of the image; ours has had its first.
    let mut modified = id;
    modified[15] ^= 0xff;
    put(408, &uuid(modified));
    bytes
}

/// A UUID in VirtualBox's byte order (the first three fields little endian), with version 8 of RFC 9562 ("custom").
fn uuid(mut id: [u8; 16]) -> [u8; 16] {
    id[6] = id[6] & 0x0f | 0x80;
    id[8] = id[8] & 0x3f | 0x80;
    id[..4].reverse();
    id[4..6].reverse();
    id[6..8].reverse();
    id
}

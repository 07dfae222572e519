//! VHDX: read dynamic and fixed images (a log that was not replayed is replayed in memory), write dynamic ones.
//!
//! Owns: the structures of the format. `header` finds the current header, `log` replays, `image` is the file as it is after the replay,
//! `region` and `metadata` say where things are and how large, `bat` maps blocks, `audit` proves that no two blocks share a place, `reader`
//! reads, `writer` lays the image out, `crc` is CRC-32C.
//! Never: follows a parent, opens a path, changes the file it reads, trusts a number of the image before it is held against the file's length.
//! A crash here costs what was written since the last checkpoint.
//!
//! Source: [MS-VHDX] Virtual Hard Disk v2 (VHDX) File Format; sections are named as there.

mod audit;
mod bat;
mod crc;
mod header;
mod image;
mod log;
mod metadata;
mod reader;
mod region;
#[cfg(test)]
mod tests;
mod writer;

pub use metadata::MAX_CAPACITY;
pub use reader::Reader;
pub use writer::Writer;

use super::disk::{FormatError, Window};

/// The format's name as the API spells it.
const FORMAT: &str = "vhdx";

/// Everything large lies at multiples of this: regions, the log, payload blocks.
const MIB: u64 = 1 << 20;

/// Length of the header section, of which nothing else may take a part (2.2).
const HEADER_SECTION: u64 = MIB;

/// First bytes of the file (2.2.1).
const FILE_SIGNATURE: &[u8; 8] = b"vhdxfile";

/// Where the two headers lie (2.2.2).
const HEADERS: [u64; 2] = [64 << 10, 128 << 10];

/// Where the two copies of the region table lie (2.2.3).
const REGION_TABLES: [u64; 2] = [192 << 10, 256 << 10];

/// Sectors of one chunk, whatever their size: the payload blocks that share one sector bitmap block (2.5).
const CHUNK_SECTORS: u64 = 1 << 23;

/// A GUID in the byte order of the file.
type Guid = [u8; 16];

/// Puts a GUID as the specification prints it into the byte order of the file.
const fn guid(printed: u128) -> Guid {
    let b = printed.to_be_bytes();
    [b[3], b[2], b[1], b[0], b[5], b[4], b[7], b[6], b[8], b[9], b[10], b[11], b[12], b[13], b[14], b[15]]
}

/// A GUID of the file as the specification prints it.
fn print(g: &Guid) -> String {
    let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02X}")).collect::<String>();
    let first = [g[3], g[2], g[1], g[0]];
    format!("{}-{}-{}-{}-{}", hex(&first), hex(&[g[5], g[4]]), hex(&[g[7], g[6]]), hex(&g[8..10]), hex(&g[10..]))
}

/// Whether the file starts as a VHDX file does. A file that cannot be read does not.
pub fn looks_like(window: &Window) -> bool {
    let mut first = [0u8; 8];
    window.read_exact_at(&mut first, 0).is_ok() && &first == FILE_SIGNATURE
}

fn refused(reason: impl Into<String>) -> FormatError {
    FormatError::Refused { format: FORMAT, reason: reason.into() }
}

fn corrupt(what: &'static str, index: u64, offset: u64, reason: impl Into<String>) -> FormatError {
    FormatError::Corrupt { format: FORMAT, what, index, offset, reason: reason.into() }
}

/// `N` bytes of a structure that is known to be long enough; what lies outside reads as zeros.
fn bytes_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes.get(at..).and_then(|rest| rest.first_chunk::<N>()).copied().unwrap_or([0; N])
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes_at(bytes, at))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes_at(bytes, at))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes_at(bytes, at))
}

//! VDI: VirtualBox's disk format, version 1.1, dynamic and static, with blocks of 1 MiB.
//!
//! Owns: the structures of the format. `header` parses and makes the header, `reader` reads, `writer` lays dynamic images out (its blocks
//! are counted by VHD's `blocks`: both formats grow in the same way).
//! Never: follows a parent, opens a path, trusts a number of the image before it is held against the file's length and QEMU's limits.
//! A crash here costs what was written since the last checkpoint.
//!
//! Source: there is no specification; VirtualBox's own header definitions and QEMU's `block/vdi.c` say what the fields mean.

mod header;
mod reader;
#[cfg(test)]
mod tests;
mod writer;

pub use header::{MAX_CAPACITY, looks_like};
pub use reader::Reader;
pub use writer::Writer;

use super::disk::FormatError;

/// The format's name as the API spells it.
const FORMAT: &str = "vdi";

/// Bytes in a sector.
const SECTOR: u64 = 512;

/// Bytes in a block: VirtualBox makes no other size, QEMU reads no other.
const BLOCK: u64 = 1 << 20;

/// Map entries from here on stand for no block: 0xffffffff was never written, 0xfffffffe was discarded. Both read as zeros.
const DISCARDED: u32 = u32::MAX - 1;

fn refused(reason: impl Into<String>) -> FormatError {
    FormatError::Refused { format: FORMAT, reason: reason.into() }
}

fn corrupt(what: &'static str, index: u64, offset: u64, reason: impl Into<String>) -> FormatError {
    FormatError::Corrupt { format: FORMAT, what, index, offset, reason: reason.into() }
}

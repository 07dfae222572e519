//! VHD: Microsoft's first virtual hard disk format, as Virtual PC, Hyper-V (generation 1), Azure and QEMU (`vpc`) write it.
//!
//! Owns: the structures of the format. `header` parses and makes footers and dynamic headers, `reader` reads fixed and dynamic images,
//! `writer` lays both out, `blocks` counts the blocks of an image that grows at its end (VDI's writer, too).
//! Never: follows a parent, opens a path, trusts a number of the image before it is held against the file's length.
//! A crash here costs what was written since the last checkpoint.
//!
//! Source: Microsoft, "Virtual Hard Disk Image Format Specification", version 1.0 (11 October 2006). Where the specification leaves the
//! size to the geometry, QEMU's rule holds: see [`Reader::open`].

pub(in crate::formats) mod blocks;
mod header;
mod reader;
#[cfg(test)]
mod tests;
mod writer;

pub use header::{Identity, MAX_CAPACITY, looks_like};
pub use reader::Reader;
pub use writer::{FixedWriter, Writer};

use super::disk::FormatError;

/// The format's name as the API spells it.
const FORMAT: &str = "vhd";

/// Bytes in a sector: places in the file and the disk's size count them.
const SECTOR: u64 = 512;

fn refused(reason: impl Into<String>) -> FormatError {
    FormatError::Refused { format: FORMAT, reason: reason.into() }
}

fn corrupt(what: &'static str, index: u64, offset: u64, reason: impl Into<String>) -> FormatError {
    FormatError::Corrupt { format: FORMAT, what, index, offset, reason: reason.into() }
}

//! qcow2: read versions 2 and 3 as QEMU writes them, write version 3, plain or compressed with deflate or zstd.
//!
//! Owns: the structures of the format. `header` parses and refuses, `audit` proves that no two clusters share a place, `reader` reads,
//! `snapshots` lists and picks internal snapshots, `encode` compresses, `refcounts` counts, `writer` lays a compressed image out in order and
//! `plain` a plain one in any, `front` is what both write at last, `piece` what their checkpoints remember.
//! Never: follows a backing file (an image with one is refused, or by [`Reader::open_layer`] given to `chain` as the layer that it is) or
//! a data file, opens a path, trusts a number of the image before it is held against the file's length
//! and QEMU's own limits.
//! A crash here costs what was written since the last checkpoint.
//!
//! Source: QEMU, `docs/interop/qcow2.txt`.

mod audit;
mod encode;
mod front;
mod header;
mod piece;
mod plain;
mod reader;
mod refcounts;
mod snapshots;
#[cfg(test)]
mod tests;
mod writer;

pub use encode::Encoder;
pub use front::MAX_CAPACITY;
pub use header::{Backing, Header};
pub use plain::{Placed, PlainWriter, Tracer};
pub use reader::Reader;
pub use snapshots::Snapshot;
pub use writer::Writer;

use super::disk::FormatError;

/// The format's name as the API spells it.
const FORMAT: &str = "qcow2";

/// Bit 63 of L1 and L2 entries: the cluster's reference count is exactly one.
const COPIED: u64 = 1 << 63;

/// Bit 62 of L2 entries: the cluster is compressed.
const COMPRESSED: u64 = 1 << 62;

/// Bits 9 to 55 of L1 and L2 entries: a host offset.
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;

/// Bits 9 to 63 of refcount table entries: a host offset.
const REFTABLE_OFFSET_MASK: u64 = !0x1ff;

/// Sector of the compressed cluster descriptor, in bytes.
const SECTOR: u64 = 512;

/// QEMU's limit of the L1 table, in bytes.
const MAX_L1_BYTES: u64 = 32 << 20;

/// QEMU's limit of the refcount table, in bytes.
const MAX_REFTABLE_BYTES: u64 = 8 << 20;

fn refused(reason: impl Into<String>) -> FormatError {
    FormatError::Refused { format: FORMAT, reason: reason.into() }
}

fn corrupt(what: &'static str, index: u64, offset: u64, reason: impl Into<String>) -> FormatError {
    FormatError::Corrupt { format: FORMAT, what, index, offset, reason: reason.into() }
}

//! The block allocation table: where each payload block lies.
//!
//! Owns: the interleaving with sector bitmap entries, the states, and a small cache of the table.
//! Never: holds more than 4 MiB of the table, answers for a block whose entry contradicts the file's length.
//! A crash here costs nothing.

use std::sync::{Arc, Mutex, PoisonError};

use super::super::disk::Result;
use super::image::Image;
use super::metadata::Metadata;
use super::region::Region;
use super::{CHUNK_SECTORS, HEADER_SECTION, MIB, corrupt, refused};

/// Entries in one slice of the cache: 64 KiB.
pub(super) const SLICE: u64 = 8192;

/// Slices in the cache.
const SLICES: usize = 64;

/// States of a payload block (2.5.1.1).
const NOT_PRESENT: u64 = 0;
const UNDEFINED: u64 = 1;
const ZERO: u64 = 2;
const UNMAPPED: u64 = 3;
/// Unmapped in the draft 0.95 of the format; QEMU reads it as zeros, too.
const UNMAPPED_DRAFT: u64 = 5;
pub(super) const FULLY_PRESENT: u64 = 6;
const PARTIALLY_PRESENT: u64 = 7;

/// How the table is laid out. Also the writer's.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    /// log2 of the payload block.
    pub(super) block_bits: u32,
    /// Payload entries before each sector bitmap entry, a power of two.
    pub(super) ratio: u64,
    /// Payload blocks of the disk.
    pub(super) blocks: u64,
    /// Entries of the table: no sector bitmap entry follows the last block, as nothing but a differencing disk needs one.
    pub(super) entries: u64,
}

impl Layout {
    /// `block` and `sector` are as [`Metadata`] has them.
    pub(super) fn new(capacity: u64, block: u64, sector: u64) -> Self {
        let ratio = CHUNK_SECTORS * sector / block;
        let blocks = capacity.div_ceil(block);
        Self { block_bits: block.ilog2(), ratio, blocks, entries: blocks + blocks.saturating_sub(1) / ratio }
    }

    /// The entry of a payload block.
    pub(super) fn entry(&self, block: u64) -> u64 {
        block + block / self.ratio
    }

    /// The payload block of an entry; for a sector bitmap's, the block behind it.
    pub(super) fn block(&self, entry: u64) -> u64 {
        entry - entry / (self.ratio + 1)
    }

    /// Whether an entry is a sector bitmap's. What it says does not matter without a parent, and QEMU leaves garbage there.
    pub(super) fn is_bitmap(&self, entry: u64) -> bool {
        entry % (self.ratio + 1) == self.ratio
    }
}

/// A part of the table, and the number of its first entry.
pub(super) type Slice = (u64, Arc<[u64]>);

/// The last slices read, replaced in turn.
#[derive(Debug, Default)]
struct Cache {
    slices: Vec<Slice>,
    next: usize,
}

/// The table of an open image. Shared between threads.
#[derive(Debug)]
pub(super) struct Bat {
    pub(super) layout: Layout,
    offset: u64,
    capacity: u64,
    cache: Mutex<Cache>,
}

impl Bat {
    pub(super) fn new(region: Region, metadata: &Metadata) -> Result<Self> {
        let layout = Layout::new(metadata.capacity, metadata.block, metadata.sector);
        if region.len / 8 < layout.entries {
            let reason = format!("its region of {} bytes is too short for the {} entries that the disk needs", region.len, layout.entries);
            return Err(corrupt("BAT", 0, region.offset, reason));
        }
        Ok(Self { layout, offset: region.offset, capacity: metadata.capacity, cache: Mutex::default() })
    }

    /// The entries from `first` on, a multiple of [`SLICE`]; `None` where the file has a hole, which stands for blocks that are not present.
    pub(super) fn slice(&self, image: &Image, first: u64) -> Result<Option<Slice>> {
        if let Some(slice) = self.lock().slices.iter().find(|slice| slice.0 == first) {
            return Ok(Some(slice.clone()));
        }
        let Some(read) = self.read(image, first)? else { return Ok(None) };
        let mut cache = self.lock();
        let next = cache.next;
        match cache.slices.get_mut(next) {
            Some(old) => *old = read.clone(),
            None => cache.slices.push(read.clone()),
        }
        cache.next = (next + 1) % SLICES;
        Ok(Some(read))
    }

    /// Like [`Bat::slice`], past the cache.
    pub(super) fn read(&self, image: &Image, first: u64) -> Result<Option<Slice>> {
        let count = SLICE.min(self.layout.entries.saturating_sub(first));
        let (at, len) = (self.offset + first * 8, count * 8);
        if image.in_hole(at, len) {
            return Ok(None);
        }
        let mut bytes = vec![0u8; len as usize];
        image.read_exact_at(&mut bytes, at)?;
        Ok(Some((first, bytes.as_chunks::<8>().0.iter().map(|entry| u64::from_le_bytes(*entry)).collect())))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Cache> {
        // The cache is right after every statement: a panic elsewhere does not spoil it.
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes of a block that belong to the disk.
    pub(super) fn used(&self, block: u64) -> u64 {
        (1u64 << self.layout.block_bits).min(self.capacity - (block << self.layout.block_bits))
    }

    /// Where the entry of `block` says that it lies; `None` when it reads as zeros.
    pub(super) fn place(&self, image: &Image, block: u64, entry: u64) -> Result<Option<u64>> {
        let host = entry & !(MIB - 1);
        match entry & 7 {
            NOT_PRESENT | UNDEFINED | ZERO | UNMAPPED | UNMAPPED_DRAFT => return Ok(None),
            FULLY_PRESENT => {}
            PARTIALLY_PRESENT => {
                return Err(refused(format!("block {block} is partly in a parent, and the image says that it has none")));
            }
            state => return Err(corrupt("payload block", block, host, format!("has the state {state}, which is reserved"))),
        }
        if host < HEADER_SECTION {
            return Err(corrupt("payload block", block, host, "lies on the header section"));
        }
        // QEMU once wrote images whose last block ends with the disk, and so do we accept them.
        match host.checked_add(self.used(block)) {
            Some(end) if end <= image.len() => Ok(Some(host)),
            _ => Err(corrupt("payload block", block, host, format!("runs past the file's end at {}", image.len()))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_and_blocks_find_each_other_across_the_bitmaps() {
        for (block, sector) in [(1u64 << 20, 512), (32 << 20, 512), (256 << 20, 512), (1 << 20, 4096), (256 << 20, 4096)] {
            let layout = Layout::new(64 << 40, block, sector);
            assert_eq!(layout.ratio * block, CHUNK_SECTORS * sector);
            let (mut blocks, mut entry) = (0, 0);
            while entry < layout.entries.min(300_000) {
                if layout.is_bitmap(entry) {
                    assert_eq!(layout.block(entry), blocks);
                } else {
                    assert_eq!((layout.block(entry), layout.entry(blocks)), (blocks, entry));
                    blocks += 1;
                }
                entry += 1;
            }
            assert_eq!(layout.entry(layout.blocks - 1) + 1, layout.entries);
        }
        assert_eq!(Layout::new(0, 1 << 20, 512).entries, 0);
    }
}

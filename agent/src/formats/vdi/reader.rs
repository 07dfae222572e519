//! A VDI image as a disk.
//!
//! Owns: which parts of the block map hold entries (found at open), a small cache of them (read when needed), the place of every block.
//! Never: holds more than 1 MiB of the map, reads past the file. Never goes by the header's count of allocated blocks, which VirtualBox
//! leaves behind when it crashes.
//! A crash here costs nothing.

use std::sync::{Arc, Mutex, PoisonError};

use super::super::disk::{Disk, Extent, Result, Scratch, Window};
use super::super::raw::check_range;
use super::header::Header;
use super::{BLOCK, DISCARDED, FORMAT, corrupt};

/// Entries in one slice of the map: 16 KiB.
const SLICE: u64 = 4096;

/// Slices in the cache.
const SLICES: usize = 64;

/// A slice of the map, and its number.
type Slice = (u64, Arc<[u32]>);

/// The last slices read, replaced in turn.
#[derive(Debug, Default)]
struct Cache {
    slices: Vec<Slice>,
    next: usize,
}

/// An open image. Shared between threads.
#[derive(Debug)]
pub struct Reader {
    window: Window,
    header: Header,
    /// Numbers of the slices that hold a block, ascending.
    present: Vec<u32>,
    cache: Mutex<Cache>,
}

impl Reader {
    /// Opens a dynamic or static image of version 1.1 and goes through its map once: every block must lie inside the file, and no two
    /// may share a place. Differencing images are refused. Costs the reading of the map, 4 MiB for a TiB.
    pub fn open(window: Window) -> Result<Self> {
        let header = Header::read(&window)?;
        let mut reader = Self { window, header, present: Vec::new(), cache: Mutex::default() };
        reader.audit()?;
        Ok(reader)
    }

    fn audit(&mut self) -> Result<()> {
        let places = self.window.len().saturating_sub(self.header.data_at).div_ceil(BLOCK).min(self.header.entries);
        // One bit a place; at most 64 MiB, beside a map of 2 GiB that is really there.
        let mut taken = vec![0u64; places.div_ceil(64) as usize];
        let mut entries = Vec::new();
        for slice in 0..self.header.blocks.div_ceil(SLICE) {
            self.read_slice(slice, &mut entries)?;
            let allocated = (slice * SLICE..).zip(&entries).filter(|(_, entry)| **entry < DISCARDED);
            let mut any = false;
            for (index, entry) in allocated {
                let host = self.host(index, *entry)?;
                let (word, bit) = (*entry as usize / 64, 1u64 << (entry % 64));
                if taken[word] & bit != 0 {
                    return Err(corrupt("block", index, host, format!("its place, number {entry}, is another block's, too")));
                }
                taken[word] |= bit;
                any = true;
            }
            if any {
                self.present.push(slice as u32);
            }
        }
        Ok(())
    }

    /// Reads slice `number` of the map into `entries`, which is cleared first.
    fn read_slice(&self, number: u64, entries: &mut Vec<u32>) -> Result<()> {
        let first = number * SLICE;
        let mut bytes = vec![0u8; (self.header.blocks - first).min(SLICE) as usize * 4];
        self.window.read_exact_at(&mut bytes, self.header.map_at + first * 4)?;
        entries.clear();
        entries.extend(bytes.as_chunks::<4>().0.iter().map(|entry| u32::from_le_bytes(*entry)));
        Ok(())
    }

    /// Where block `index` lies, held against the file's length. The disk's last block may be cut short to what the disk has of it.
    fn host(&self, index: u64, entry: u32) -> Result<u64> {
        let host = self.header.data_at + u64::from(entry) * BLOCK;
        if u64::from(entry) >= self.header.entries {
            let reason = format!("its place, number {entry}, is not below the {} blocks of the image", self.header.entries);
            return Err(corrupt("block", index, host, reason));
        }
        let end = host + BLOCK.min(self.header.capacity - index * BLOCK);
        if end > self.window.len() {
            return Err(corrupt("block", index, host, format!("it ends at byte {end}, past the file's end at {}", self.window.len())));
        }
        Ok(host)
    }

    /// Slice `number` of the map; `None` where it holds no block.
    fn slice(&self, number: u64) -> Result<Option<Slice>> {
        if self.present.binary_search(&(number as u32)).is_err() {
            return Ok(None);
        }
        if let Some(slice) = self.lock().slices.iter().find(|slice| slice.0 == number) {
            return Ok(Some(slice.clone()));
        }
        let mut entries = Vec::new();
        self.read_slice(number, &mut entries)?;
        let slice = (number, Arc::from(entries));
        let mut cache = self.lock();
        let next = cache.next;
        match cache.slices.get_mut(next) {
            Some(old) => *old = slice.clone(),
            None => cache.slices.push(slice.clone()),
        }
        cache.next = (next + 1) % SLICES;
        Ok(Some(slice))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Cache> {
        // The cache is right after every statement: a panic elsewhere does not spoil it.
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Appends the data of disk bytes `[at, at + len)`, which lie at `host`, less the holes of the file.
    fn push(&self, at: u64, host: u64, len: u64, out: &mut Vec<Extent>) -> Result<()> {
        for run in self.window.data_runs(host, host + len)? {
            let offset = run.offset - host + at;
            match out.last_mut() {
                Some(last) if last.offset + last.len == offset => last.len += run.len,
                _ => out.push(Extent { offset, len: run.len }),
            }
        }
        Ok(())
    }
}

impl Disk for Reader {
    fn format(&self) -> &'static str {
        FORMAT
    }

    fn subformat(&self) -> &str {
        self.header.subformat
    }

    fn capacity(&self) -> u64 {
        self.header.capacity
    }

    fn extents(&self, from: u64, to: u64) -> Result<Vec<Extent>> {
        let to = to.min(self.header.capacity);
        let mut out = Vec::new();
        // A run of blocks adjacent on the disk and in the file, not yet pushed.
        let (mut run_at, mut run_host, mut run_len) = (0, 0, 0);
        let first = self.present.partition_point(|slice| (u64::from(*slice) + 1) * SLICE * BLOCK <= from);
        for number in &self.present[first..] {
            let begin = u64::from(*number) * SLICE;
            if begin * BLOCK >= to {
                break;
            }
            let Some((_, entries)) = self.slice(u64::from(*number))? else { continue };
            for (index, entry) in (begin..).zip(entries.iter()) {
                let (at, end) = (from.max(index * BLOCK), to.min((index + 1) * BLOCK));
                if *entry >= DISCARDED || at >= end {
                    continue;
                }
                let host = self.host(index, *entry)? + (at - index * BLOCK);
                if run_at + run_len != at || run_host + run_len != host {
                    self.push(run_at, run_host, run_len, &mut out)?;
                    (run_at, run_host, run_len) = (at, host, 0);
                }
                run_len += end - at;
            }
        }
        self.push(run_at, run_host, run_len, &mut out)?;
        Ok(out)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8], _scratch: &mut Scratch) -> Result<()> {
        check_range(FORMAT, offset, buf.len(), self.header.capacity)?;
        let mut slice: Option<Slice> = None;
        let (mut at, mut rest) = (offset, buf);
        while !rest.is_empty() {
            let (index, within) = (at / BLOCK, at % BLOCK);
            let part = rest.len().min((BLOCK - within) as usize);
            let (head, tail) = rest.split_at_mut(part);
            if slice.as_ref().is_none_or(|slice| slice.0 != index / SLICE) {
                slice = self.slice(index / SLICE)?;
            }
            let entry = slice.as_ref().map_or(u32::MAX, |slice| slice.1[(index % SLICE) as usize]);
            if entry < DISCARDED {
                self.window.read_exact_at(head, self.host(index, entry)? + within)?;
            } else {
                head.fill(0);
            }
            (at, rest) = (at + part as u64, tail);
        }
        Ok(())
    }
}

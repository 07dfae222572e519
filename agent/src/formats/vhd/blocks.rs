//! The blocks of an image that allocates them at its end, in the order in which they are first written.
//!
//! Owns: which blocks of the disk exist and in which order they lie, and the checkpoint's piece that remembers it.
//! Never: knows where the first block lies or how far two are apart; that is the format's.
//! A crash here costs what was written since the last checkpoint.
//!
//! Blocks come in ascending order, so the n-th allocated block lies in slot n, and a table of the whole disk never needs to be held:
//! memory is 4 bytes an allocated block.
//!
//! A piece is a row of LEB128 varints, in pairs: so many blocks absent, so many allocated, counted from where the last piece ended.

use std::io;

use super::super::disk::{Encoded, FormatError, Output, Result, UNIT, Unit};
use super::super::raw;

/// Table entry of a block that does not exist, in VHD and VDI alike.
pub(in crate::formats) const ABSENT: u32 = u32::MAX;

/// Bytes of a table that are written at once.
const TABLE_PART: usize = 64 << 10;

/// Bytes that go into one block, side by side.
pub(in crate::formats) struct Laid<'a> {
    /// Number of the block among the allocated ones.
    pub slot: u32,
    /// Whether this is the block's first write.
    pub fresh: bool,
    /// First byte inside the block.
    pub within: u64,
    /// The bytes: whole units.
    pub bytes: &'a [u8],
    /// Where they start in the pipeline block's bytes.
    pub start: usize,
}

/// The blocks of one disk, as a writer allocates them.
#[derive(Debug)]
pub(in crate::formats) struct Blocks {
    format: &'static str,
    /// Units of 64 KiB in a block.
    per_block: u64,
    /// Units in the disk.
    units: u64,
    /// Numbers of the allocated blocks, ascending.
    allocated: Vec<u32>,
    /// How many of them the last checkpoint holds.
    told: usize,
    /// First unit that may come next.
    next_unit: u64,
}

impl Blocks {
    /// No blocks yet. `size` is that of a block in bytes, a multiple of [`UNIT`]; the disk has fewer than [`ABSENT`] of them.
    pub fn new(format: &'static str, size: u64, capacity: u64) -> Self {
        let unit = UNIT as u64;
        Self { format, per_block: size / unit, units: capacity.div_ceil(unit), allocated: Vec::new(), told: 0, next_unit: 0 }
    }

    /// Blocks that exist.
    pub fn used(&self) -> u64 {
        self.allocated.len() as u64
    }

    /// Blocks in the disk: entries of its table.
    pub fn total(&self) -> u64 {
        self.units.div_ceil(self.per_block)
    }

    /// Goes through the units of a pipeline block and tells `write` where they go. Fails where units are compressed, out of order or
    /// past the capacity.
    pub fn lay(&mut self, block: &Encoded, mut write: impl FnMut(Laid<'_>) -> Result<()>) -> Result<()> {
        let odd = |unit: &&Unit| unit.compressed || unit.len != UNIT || unit.start.saturating_add(UNIT) > block.bytes.len();
        if let Some(unit) = block.units.iter().find(odd) {
            return Err(self.misuse(format!("unit {} is not stored as it is", unit.index)));
        }
        for (index, start, bytes) in raw::runs(block) {
            let count = (bytes.len() / UNIT) as u64;
            let end = index.checked_add(count).filter(|end| index >= self.next_unit && *end <= self.units);
            let Some(end) = end else {
                let reason = format!("unit {index}+{count}; units come in order from {} on, inside the capacity", self.next_unit);
                return Err(self.misuse(reason));
            };
            let (mut at, mut rest) = (index, bytes);
            while at < end {
                let part = (end - at).min(self.per_block - at % self.per_block);
                let (head, tail) = rest.split_at(part as usize * UNIT);
                let (slot, fresh) = self.allocate(at / self.per_block)?;
                write(Laid {
                    slot,
                    fresh,
                    within: at % self.per_block * UNIT as u64,
                    bytes: head,
                    start: start + bytes.len() - rest.len(),
                })?;
                (at, rest) = (at + part, tail);
            }
            self.next_unit = end;
        }
        Ok(())
    }

    /// The slot of block `number`, which is either the last one or comes behind it.
    fn allocate(&mut self, number: u64) -> Result<(u32, bool)> {
        let number = u32::try_from(number).map_err(|_| self.misuse(format!("block {number}")))?;
        let fresh = self.allocated.last() != Some(&number);
        if fresh {
            self.allocated.push(number);
        }
        Ok((self.allocated.len() as u32 - 1, fresh))
    }

    /// The blocks allocated since the last piece.
    pub fn take_piece(&mut self) -> Vec<u8> {
        let mut piece = Vec::new();
        let mut expected = self.told.checked_sub(1).map_or(0, |last| self.allocated[last] + 1);
        for run in self.allocated[self.told..].chunk_by(|a, b| a + 1 == *b) {
            varint(u64::from(run[0] - expected), &mut piece);
            varint(run.len() as u64, &mut piece);
            expected = run[0] + run.len() as u32;
        }
        self.told = self.allocated.len();
        piece
    }

    /// Allocates the blocks of the next piece. What follows begins behind the last of them.
    pub fn replay(&mut self, mut piece: &[u8]) -> Result<()> {
        let mut next = self.allocated.last().map_or(0, |last| u64::from(*last) + 1);
        while !piece.is_empty() {
            let (absent, count) = (self.number(&mut piece)?, self.number(&mut piece)?);
            let end = next.checked_add(absent).and_then(|first| first.checked_add(count)).filter(|end| *end <= self.total());
            let end = end.ok_or_else(|| self.bad_piece("names blocks past the capacity"))?;
            self.allocated.extend((end - count..end).map(|number| number as u32));
            next = end;
        }
        self.told = self.allocated.len();
        self.next_unit = (next * self.per_block).min(self.units);
        Ok(())
    }

    /// Takes one varint off a piece.
    fn number(&self, piece: &mut &[u8]) -> Result<u64> {
        let mut number = 0u64;
        for shift in (0..35).step_by(7) {
            let (byte, rest) = piece.split_first().ok_or_else(|| self.bad_piece("ends inside a number"))?;
            *piece = rest;
            number |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(number);
            }
        }
        Err(self.bad_piece("holds a number of more than 35 bits"))
    }

    /// Writes the table of the whole disk at `at` of the output: what `entry` makes of a block's slot or, for one that does not exist,
    /// [`ABSENT`], in the format's byte order; up to `len` bytes (at least 4 an entry) filled up with 0xff.
    pub fn write_table(&self, output: &Output, mut at: u64, len: u64, entry: impl Fn(u32) -> [u8; 4]) -> io::Result<()> {
        let end = at + len;
        let mut blocks = self.allocated.iter().zip(0u32..).peekable();
        let mut first = 0u64;
        let mut bytes = vec![0xffu8; TABLE_PART];
        while at < end {
            let part = (end - at).min(TABLE_PART as u64) as usize;
            bytes.fill(0xff);
            while let Some((number, slot)) = blocks.next_if(|(number, _)| u64::from(**number) < first + TABLE_PART as u64 / 4) {
                let place = (u64::from(*number) - first) as usize * 4;
                bytes[place..place + 4].copy_from_slice(&entry(slot));
            }
            output.write_all_at(&bytes[..part], at)?;
            at += part as u64;
            first += TABLE_PART as u64 / 4;
        }
        Ok(())
    }

    /// The caller broke the contract of [`DiskWriter`](super::super::disk::DiskWriter).
    fn misuse(&self, what: String) -> FormatError {
        io::Error::new(io::ErrorKind::InvalidInput, format!("{} writer: {what}", self.format)).into()
    }

    fn bad_piece(&self, reason: &str) -> FormatError {
        let reason = format!("a checkpoint's piece {reason}");
        FormatError::Corrupt { format: self.format, what: "journal", index: 0, offset: 0, reason }
    }
}

/// Makes the file reach `position` of the output where a hole ends it: everything below a checkpoint's position can be read.
pub(in crate::formats) fn extend(output: &Output, position: u64) -> io::Result<()> {
    let end = output.base.checked_add(position).ok_or_else(|| io::Error::from(io::ErrorKind::FileTooLarge))?;
    if output.file.metadata()?.len() < end {
        output.file.set_len(end)?;
    }
    Ok(())
}

fn varint(mut number: u64, out: &mut Vec<u8>) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

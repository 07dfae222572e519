//! Writes VHD images front to back.
//!
//! Owns: the place of every byte. A dynamic image:
//! ```text
//! ┌─────────────┬────────────────┬────────┬ - - - - - - - - - - - - - - - - - - - - - - ┬────────┐
//! │ footer copy │ dynamic header │ table  │ bitmap │ 2 MiB block │ … bitmap │ 2 MiB block │ footer │
//! └─────────────┴────────────────┴────────┴ - - - - - - - - - - - - - - - - - - - - - - ┴────────┘
//!  written by finish, 512 + 1024 + 4 a block        in order of first write        written by finish
//! ```
//! Each block's data starts at a multiple of 4096, its bitmap (all ones) lies in the sector before. A fixed image is the disk and a footer.
//! Never: goes back, except to the front region. Never decides what is zero: units that do not come stay holes.
//! A crash here costs what was written since the last checkpoint.

use super::super::disk::{DiskWriter, Encoded, FormatError, Output, Result, Run};
use super::super::raw;
use super::blocks::{Blocks, Laid, extend};
use super::header::{DYNAMIC, FOOTER, Identity, Kind, MAX_CAPACITY, dynamic, footer};
use super::{FORMAT, SECTOR, corrupt};

/// Bytes in a block: the specification's default, the only size that Hyper-V makes.
const BLOCK: u64 = 2 << 20;

/// Bytes from one block to the next: its bitmap fills the last sector of a page.
const STRIDE: u64 = PAGE + BLOCK;

/// What data is aligned to, in bytes.
const PAGE: u64 = 4096;

/// Where the block allocation table lies.
const TABLE_AT: u64 = (FOOTER + DYNAMIC) as u64;

fn check_capacity(capacity: u64) -> Result<()> {
    if !capacity.is_multiple_of(SECTOR) {
        return Err(FormatError::Unsupported(format!("{FORMAT}: a disk of {capacity} bytes; a multiple of {SECTOR} would be right")));
    }
    if capacity > MAX_CAPACITY {
        return Err(FormatError::Unsupported(format!(
            "{FORMAT}: a disk of {capacity} bytes is over the format's limit of 2040 GiB ({MAX_CAPACITY} bytes); choose vhdx, qcow2 or raw"
        )));
    }
    Ok(())
}

/// Writer of one dynamic image.
#[derive(Debug)]
pub struct Writer {
    output: Output,
    capacity: u64,
    identity: Identity,
    blocks: Blocks,
    /// End of the front region and of the table in it, in bytes.
    front: u64,
    table_len: u64,
}

impl Writer {
    /// A writer of an empty disk of `capacity` bytes: whole sectors of 512, at most [`MAX_CAPACITY`]. The output must hold nothing from
    /// its base on.
    pub fn new(output: Output, capacity: u64, identity: Identity) -> Result<Self> {
        check_capacity(capacity)?;
        let blocks = Blocks::new(FORMAT, BLOCK, capacity);
        let table_len = (blocks.total() * 4).next_multiple_of(SECTOR);
        Ok(Self { output, capacity, identity, blocks, front: (TABLE_AT + table_len).next_multiple_of(PAGE), table_len })
    }

    /// A writer in the state in which one with the same `capacity` was when it stood at `position` and had given these `pieces`, all of
    /// them and in order. Fails when they do not lead to that position.
    pub fn resume(
        output: Output,
        capacity: u64,
        identity: Identity,
        pieces: impl IntoIterator<Item = Result<Vec<u8>>>,
        position: u64,
    ) -> Result<Self> {
        let mut writer = Self::new(output, capacity, identity)?;
        for piece in pieces {
            writer.blocks.replay(&piece?)?;
        }
        if writer.position() != position {
            let reason = format!("the blocks of its checkpoints end at {} instead", writer.position());
            return Err(corrupt("journal", 0, position, reason));
        }
        Ok(writer)
    }

    /// Goes through the units of `block`, marks new blocks' sectors as written, and tells `write` where the data goes.
    fn lay(&mut self, block: &Encoded, mut write: impl FnMut(u64, Laid<'_>) -> Result<()>) -> Result<()> {
        let (output, front) = (&self.output, self.front);
        self.blocks.lay(block, |laid| {
            let host = data_at(front, laid.slot);
            if laid.fresh {
                output.write_all_at(&[0xff; SECTOR as usize], host - SECTOR)?;
            }
            write(host + laid.within, laid)
        })
    }
}

/// Where the data of the block in `slot` begins, if the front region ends at `front`.
fn data_at(front: u64, slot: u32) -> u64 {
    front + u64::from(slot) * STRIDE + PAGE
}

impl DiskWriter for Writer {
    fn write_block(&mut self, block: &Encoded) -> Result<()> {
        let output = self.output.clone();
        self.lay(block, |offset, laid| Ok(output.write_all_at(laid.bytes, offset)?))
    }

    fn place_block(&mut self, block: &Encoded, runs: &mut Vec<Run>) -> Result<bool> {
        runs.clear();
        self.lay(block, |offset, laid| {
            runs.push(Run { start: laid.start, len: laid.bytes.len(), offset });
            Ok(())
        })?;
        Ok(true)
    }

    fn position(&self) -> u64 {
        self.front + self.blocks.used() * STRIDE
    }

    fn checkpoint(&mut self) -> Result<Vec<u8>> {
        extend(&self.output, self.position())?;
        Ok(self.blocks.take_piece())
    }

    fn finish(&mut self) -> Result<u64> {
        let end = self.position();
        let footer = footer(Kind::Dynamic, self.capacity, self.identity);
        let front = self.front;
        // Every place fits 32 bits: the largest disk and its bitmaps end below 2 TiB.
        self.blocks.write_table(&self.output, TABLE_AT, self.table_len, |slot| {
            (((data_at(front, slot) - SECTOR) / SECTOR) as u32).to_be_bytes()
        })?;
        self.output.write_all_at(&dynamic(TABLE_AT, self.blocks.total() as u32, BLOCK as u32), SECTOR)?;
        self.output.write_all_at(&footer, 0)?;
        self.output.write_all_at(&footer, end)?;
        Ok(end + FOOTER as u64)
    }
}

/// Writer of one fixed image: the disk as it is, and a footer.
#[derive(Debug)]
pub struct FixedWriter {
    output: Output,
    capacity: u64,
    identity: Identity,
    disk: raw::Writer,
}

impl FixedWriter {
    /// A writer of an empty disk of `capacity` bytes: whole sectors of 512, at least one, at most [`MAX_CAPACITY`]. The output must hold
    /// nothing from its base on.
    pub fn new(output: Output, capacity: u64, identity: Identity) -> Result<Self> {
        check_capacity(capacity)?;
        if capacity == 0 {
            let reason = "a fixed disk of 0 bytes is a footer alone, which programs take for a damaged dynamic disk; choose dynamic";
            return Err(FormatError::Unsupported(format!("{FORMAT}: {reason}")));
        }
        Ok(Self { disk: raw::Writer::new(output.clone(), capacity), output, capacity, identity })
    }

    /// A writer that goes on at `position`, a [`DiskWriter::position`] of an earlier one. Its `pieces` are all empty.
    pub fn resume(
        output: Output,
        capacity: u64,
        identity: Identity,
        pieces: impl IntoIterator<Item = Result<Vec<u8>>>,
        position: u64,
    ) -> Result<Self> {
        let fresh = Self::new(output, capacity, identity)?;
        for piece in pieces {
            if !piece?.is_empty() {
                return Err(corrupt("journal", 0, position, "a fixed disk's checkpoints have no pieces, this one has"));
            }
        }
        if position > capacity {
            return Err(corrupt("journal", 0, position, format!("lies past the disk's end at {capacity}")));
        }
        Ok(Self { disk: raw::Writer::resume(fresh.output.clone(), capacity, position), ..fresh })
    }
}

impl DiskWriter for FixedWriter {
    fn write_block(&mut self, block: &Encoded) -> Result<()> {
        self.disk.write_block(block)
    }

    fn place_block(&mut self, block: &Encoded, runs: &mut Vec<Run>) -> Result<bool> {
        self.disk.place_block(block, runs)
    }

    fn position(&self) -> u64 {
        self.disk.position()
    }

    fn checkpoint(&mut self) -> Result<Vec<u8>> {
        self.disk.checkpoint()
    }

    fn finish(&mut self) -> Result<u64> {
        let end = self.disk.finish()?;
        self.output.write_all_at(&footer(Kind::Fixed, self.capacity, self.identity), end)?;
        Ok(end + FOOTER as u64)
    }
}

//! Writes dynamic VDI images front to back.
//!
//! Owns: the place of every byte:
//! ```text
//! ┌────────┬───────────┬ - - - - - - - - - - - - - - - - - ┐
//! │ header │ block map │ 1 MiB block │ … │ 1 MiB block      │
//! └────────┴───────────┴ - - - - - - - - - - - - - - - - - ┘
//!  written by finish     from a whole MiB on, in order of first write
//! ```
//! Never: goes back, except to the front region. Never decides what is zero: units that do not come stay holes.
//! A crash here costs what was written since the last checkpoint.

use super::super::disk::{DiskWriter, Encoded, FormatError, Output, Result, Run};
use super::super::vhd::blocks::{Blocks, Laid, extend};
use super::header::{HEADER, MAX_CAPACITY, header};
use super::{BLOCK, FORMAT, SECTOR, corrupt};

/// Writer of one dynamic image.
#[derive(Debug)]
pub struct Writer {
    output: Output,
    capacity: u64,
    id: [u8; 16],
    blocks: Blocks,
    /// Where the first block lies, in bytes: below 2 GiB and 1 MiB.
    data_at: u64,
}

impl Writer {
    /// A writer of an empty disk of `capacity` bytes: whole sectors of 512, at most [`MAX_CAPACITY`]. `id` becomes the image's UUID (its
    /// version and variant bits are set to version 8 of RFC 9562, "custom"). The output must hold nothing from its base on.
    pub fn new(output: Output, capacity: u64, id: [u8; 16]) -> Result<Self> {
        if !capacity.is_multiple_of(SECTOR) {
            return Err(FormatError::Unsupported(format!("{FORMAT}: a disk of {capacity} bytes; a multiple of {SECTOR} would be right")));
        }
        if capacity > MAX_CAPACITY {
            return Err(FormatError::Unsupported(format!(
                "{FORMAT}: a disk of {capacity} bytes is over QEMU's limit of 512 TiB less 128 MiB ({MAX_CAPACITY} bytes); choose qcow2 or raw"
            )));
        }
        let blocks = Blocks::new(FORMAT, BLOCK, capacity);
        let data_at = (HEADER as u64 + blocks.total() * 4).next_multiple_of(BLOCK);
        Ok(Self { output, capacity, id, blocks, data_at })
    }

    /// A writer in the state in which one with the same `capacity` was when it stood at `position` and had given these `pieces`, all of
    /// them and in order. Fails when they do not lead to that position.
    pub fn resume(
        output: Output,
        capacity: u64,
        id: [u8; 16],
        pieces: impl IntoIterator<Item = Result<Vec<u8>>>,
        position: u64,
    ) -> Result<Self> {
        let mut writer = Self::new(output, capacity, id)?;
        for piece in pieces {
            writer.blocks.replay(&piece?)?;
        }
        if writer.position() != position {
            let reason = format!("the blocks of its checkpoints end at {} instead", writer.position());
            return Err(corrupt("journal", 0, position, reason));
        }
        Ok(writer)
    }
}

/// Where bytes of a block go, if the first one lies at `data_at`.
fn host(data_at: u64, laid: &Laid<'_>) -> u64 {
    data_at + u64::from(laid.slot) * BLOCK + laid.within
}

impl DiskWriter for Writer {
    fn write_block(&mut self, block: &Encoded) -> Result<()> {
        let (output, data_at) = (&self.output, self.data_at);
        self.blocks.lay(block, |laid| Ok(output.write_all_at(laid.bytes, host(data_at, &laid))?))
    }

    fn place_block(&mut self, block: &Encoded, runs: &mut Vec<Run>) -> Result<bool> {
        runs.clear();
        let data_at = self.data_at;
        self.blocks.lay(block, |laid| {
            runs.push(Run { start: laid.start, len: laid.bytes.len(), offset: host(data_at, &laid) });
            Ok(())
        })?;
        Ok(true)
    }

    fn position(&self) -> u64 {
        self.data_at + self.blocks.used() * BLOCK
    }

    fn checkpoint(&mut self) -> Result<Vec<u8>> {
        extend(&self.output, self.position())?;
        Ok(self.blocks.take_piece())
    }

    fn finish(&mut self) -> Result<u64> {
        let end = self.position();
        // QEMU and VirtualBox expect the last block whole.
        extend(&self.output, end)?;
        self.blocks.write_table(&self.output, HEADER as u64, self.blocks.total() * 4, u32::to_le_bytes)?;
        // All three fit 32 bits: the disk has at most 536870784 blocks.
        let (blocks, used) = (self.blocks.total() as u32, self.blocks.used() as u32);
        let bytes = header(self.capacity, HEADER as u32, self.data_at as u32, blocks, used, self.id);
        self.output.write_all_at(&bytes, 0)?;
        Ok(end)
    }
}

//! streamOptimized, written front to back.
//!
//! Owns: the order of the stream (header in the footer form, descriptor, grains, grain tables as their range completes, directory, footer)
//! and the encoding of checkpoints. Never: rewrites a byte, compresses, syncs.
//! A crash here costs what lies past the last checkpoint: a writer made by [`StreamWriter::resume`] goes on and gives the same bytes.
//!
//! A checkpoint's piece is a run of 13-byte records: kind (1 = grain of the open range, 2 = finished table), its number (u64 little
//! endian), its sector (u32 little endian).

use std::io;

use super::super::disk::{DiskWriter, Encoded, FormatError, Output, Result, UNIT};
use super::NAME;
use super::header::{GD_AT_END, GT_SECTORS, GTES, Header, SECTOR, le32, le64, marker};

/// Most bytes of a stream: grain tables count sectors in 32 bits.
pub const FILE_LIMIT: u64 = (u32::MAX as u64 + 1) * SECTOR;
/// Largest disk that VMware takes: 62 TiB.
pub const MAX_CAPACITY: u64 = 62 << 40;

const GRAIN_SECTORS: u64 = UNIT as u64 / SECTOR;
/// Sectors before the first grain: header, descriptor, and room up to the first grain's alignment, as VMware's own streams have it.
const OVERHEAD: u64 = 128;
const DESCRIPTOR_SECTORS: u64 = 20;
/// Buffered bytes before they go to the kernel.
const BUFFER: usize = 2 << 20;
const RECORD: usize = 13;
const GRAIN: u8 = 1;
const TABLE: u8 = 2;

/// Bytes that a stream takes at most when `units` units of 64 KiB hold data, none of which can be compressed. A caller with more data than
/// [`FILE_LIMIT`] can so be warned before the copy instead of at its end.
pub fn worst_case(units: u64, capacity: u64) -> u64 {
    let grain = (12 + UNIT as u64 + 80).next_multiple_of(SECTOR);
    let ranges = capacity.div_ceil(UNIT as u64 * u64::from(GTES));
    let tables = ranges.min(units).saturating_mul((GT_SECTORS + 1) * SECTOR);
    units
        .saturating_mul(grain)
        .saturating_add(tables)
        .saturating_add((ranges * 4).next_multiple_of(SECTOR))
        .saturating_add((OVERHEAD + 4) * SECTOR)
}

/// Writes one streamOptimized disk.
pub struct StreamWriter {
    output: Output,
    /// Capacity in bytes.
    capacity: u64,
    /// Bytes handed to the kernel.
    flushed: u64,
    /// Bytes behind them.
    buffer: Vec<u8>,
    directory: Vec<u32>,
    /// The range of 512 grains that is being filled, if any.
    range: Option<u64>,
    /// Its grains so far: number and sector.
    grains: Vec<(u64, u32)>,
    /// How many of them the last checkpoint holds.
    grains_told: usize,
    /// Tables written since the last checkpoint: range and sector.
    tables_untold: Vec<(u64, u32)>,
    /// One past the last grain written.
    next: u64,
    finished: bool,
}

impl StreamWriter {
    /// Starts a stream for a disk of `capacity` bytes (a multiple of 512, at most [`MAX_CAPACITY`]). `cid` becomes the content id.
    pub fn create(output: Output, capacity: u64, cid: u32) -> Result<Self> {
        let mut writer = Self::empty(output, capacity, 0)?;
        let sectors = capacity / SECTOR;
        writer.buffer.extend_from_slice(&Header::stream(sectors, GRAIN_SECTORS, DESCRIPTOR_SECTORS, OVERHEAD, GD_AT_END));
        writer.buffer.extend_from_slice(descriptor(sectors, cid).as_bytes());
        writer.buffer.resize((OVERHEAD * SECTOR) as usize, 0);
        Ok(writer)
    }

    /// The writer as it was right after the checkpoint at which it stood at `position`, from the pieces of all checkpoints so far.
    pub fn resume(output: Output, capacity: u64, pieces: &[Vec<u8>], position: u64) -> Result<Self> {
        let bad = |reason: String| FormatError::Corrupt { format: NAME, what: "checkpoint", index: 0, offset: position, reason };
        if position < OVERHEAD * SECTOR || !position.is_multiple_of(SECTOR) || position > FILE_LIMIT {
            return Err(bad(format!("{position} is no place between two grains")));
        }
        let mut writer = Self::empty(output, capacity, position)?;
        for piece in pieces {
            let records = piece.chunks_exact(RECORD);
            if !records.remainder().is_empty() {
                return Err(bad(format!("a piece of {} bytes is no multiple of {RECORD}", piece.len())));
            }
            for record in records {
                let (number, sector) = (le64(record, 1), le32(record, 9));
                if u64::from(sector) < OVERHEAD || u64::from(sector) * SECTOR >= position {
                    return Err(bad(format!("sector {sector} lies outside of what was written")));
                }
                let done = match record[0] {
                    GRAIN => writer.recall_grain(number, sector),
                    TABLE => writer.recall_table(number, sector),
                    _ => None,
                };
                done.ok_or_else(|| bad(format!("record {} of number {number} does not follow from those before it", record[0])))?;
            }
        }
        writer.grains_told = writer.grains.len();
        writer.tables_untold.clear();
        Ok(writer)
    }

    fn empty(output: Output, capacity: u64, position: u64) -> Result<Self> {
        if capacity == 0 || !capacity.is_multiple_of(SECTOR) {
            return Err(FormatError::Unsupported(format!("vmdk: a disk of {capacity} bytes; a multiple of {SECTOR} would be right")));
        }
        if capacity > MAX_CAPACITY {
            return Err(FormatError::Unsupported(format!(
                "vmdk: a disk of {capacity} bytes is over the format's 62 TiB ({MAX_CAPACITY} bytes)"
            )));
        }
        let ranges = capacity.div_ceil(UNIT as u64 * u64::from(GTES));
        Ok(Self {
            output,
            capacity,
            flushed: position,
            buffer: Vec::new(),
            directory: vec![0; ranges as usize],
            range: None,
            grains: Vec::with_capacity(GTES as usize),
            grains_told: 0,
            tables_untold: Vec::new(),
            next: 0,
            finished: false,
        })
    }

    fn recall_grain(&mut self, number: u64, sector: u32) -> Option<()> {
        let range = number / u64::from(GTES);
        let fits = number >= self.next && number < self.units() && self.range.is_none_or(|open| open == range);
        if !fits {
            return None;
        }
        self.range = Some(range);
        self.grains.push((number, sector));
        self.next = number + 1;
        Some(())
    }

    fn recall_table(&mut self, range: u64, sector: u32) -> Option<()> {
        let entry = usize::try_from(range).ok().and_then(|index| self.directory.get_mut(index))?;
        if *entry != 0 || self.range.is_some_and(|open| open != range) || (self.range.is_none() && range * u64::from(GTES) < self.next) {
            return None;
        }
        *entry = sector;
        self.range = None;
        self.grains.clear();
        self.next = (range + 1) * u64::from(GTES);
        Some(())
    }

    /// Number of grains in the disk.
    fn units(&self) -> u64 {
        self.capacity.div_ceil(UNIT as u64)
    }

    /// The sector that comes next, for a table entry.
    fn sector(&self) -> Result<u32> {
        u32::try_from(self.position() / SECTOR).map_err(|_| {
            FormatError::Unsupported(
                "vmdk: the compressed disk is over 2 TiB, the most that the format's 32-bit sector numbers reach; choose qcow2 or raw"
                    .to_owned(),
            )
        })
    }

    fn pad(&mut self) {
        self.buffer.resize(self.buffer.len().next_multiple_of(SECTOR as usize), 0);
    }

    fn flush(&mut self) -> Result<()> {
        self.output.write_all_at(&self.buffer, self.flushed)?;
        self.flushed += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }

    /// Writes the open range's table.
    fn close_range(&mut self) -> Result<()> {
        let Some(range) = self.range.take() else {
            return Ok(());
        };
        self.buffer.extend_from_slice(&marker::sector(GT_SECTORS, marker::GRAIN_TABLE));
        let sector = self.sector()?;
        let mut table = [0u8; GTES as usize * 4];
        for (number, at) in &self.grains {
            let entry = (number % u64::from(GTES)) as usize * 4;
            table[entry..entry + 4].copy_from_slice(&at.to_le_bytes());
        }
        self.buffer.extend_from_slice(&table);
        self.grains.clear();
        self.grains_told = 0;
        self.directory[range as usize] = sector;
        self.tables_untold.push((range, sector));
        Ok(())
    }

    fn write_grain(&mut self, number: u64, packed: &[u8]) -> Result<()> {
        let wrong = |reason: &str| FormatError::Io(io::Error::new(io::ErrorKind::InvalidInput, format!("vmdk grain {number}: {reason}")));
        if number < self.next || number >= self.units() {
            return Err(wrong("out of order or past the capacity"));
        }
        let size = u32::try_from(packed.len()).map_err(|_| wrong("too long"))?;
        let range = number / u64::from(GTES);
        if self.range.is_some_and(|open| open != range) {
            self.close_range()?;
        }
        let sector = self.sector()?;
        self.buffer.extend_from_slice(&(number * GRAIN_SECTORS).to_le_bytes());
        self.buffer.extend_from_slice(&size.to_le_bytes());
        self.buffer.extend_from_slice(packed);
        self.pad();
        self.range = Some(range);
        self.grains.push((number, sector));
        self.next = number + 1;
        if self.next.is_multiple_of(u64::from(GTES)) {
            self.close_range()?;
        }
        Ok(())
    }
}

impl DiskWriter for StreamWriter {
    fn write_block(&mut self, block: &Encoded) -> Result<()> {
        for unit in &block.units {
            let packed =
                block.bytes.get(unit.start..unit.start.saturating_add(unit.len)).filter(|packed| unit.compressed && !packed.is_empty());
            let Some(packed) = packed else {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    format!("vmdk grain {}: a stream takes deflated grains only", unit.index),
                )
                .into());
            };
            self.write_grain(unit.index, packed)?;
            if self.buffer.len() >= BUFFER {
                self.flush()?;
            }
        }
        Ok(())
    }

    fn position(&self) -> u64 {
        self.flushed + self.buffer.len() as u64
    }

    fn checkpoint(&mut self) -> Result<Vec<u8>> {
        self.flush()?;
        let untold = &self.grains[self.grains_told..];
        let mut piece = Vec::with_capacity((self.tables_untold.len() + untold.len()) * RECORD);
        let tables = self.tables_untold.iter().map(|entry| (TABLE, entry));
        for (kind, (number, sector)) in tables.chain(untold.iter().map(|entry| (GRAIN, entry))) {
            piece.push(kind);
            piece.extend_from_slice(&number.to_le_bytes());
            piece.extend_from_slice(&sector.to_le_bytes());
        }
        self.tables_untold.clear();
        self.grains_told = self.grains.len();
        Ok(piece)
    }

    fn finish(&mut self) -> Result<u64> {
        if self.finished {
            return Ok(self.position());
        }
        self.close_range()?;
        let sectors = (self.directory.len() as u64 * 4).div_ceil(SECTOR);
        self.buffer.extend_from_slice(&marker::sector(sectors, marker::GRAIN_DIRECTORY));
        let directory = self.position() / SECTOR;
        self.buffer.extend(self.directory.iter().flat_map(|entry| entry.to_le_bytes()));
        self.pad();
        self.buffer.extend_from_slice(&marker::sector(1, marker::FOOTER));
        self.buffer.extend_from_slice(&Header::stream(self.capacity / SECTOR, GRAIN_SECTORS, DESCRIPTOR_SECTORS, OVERHEAD, directory));
        self.buffer.extend_from_slice(&marker::sector(0, marker::EOS));
        self.flush()?;
        self.finished = true;
        Ok(self.position())
    }
}

/// The embedded descriptor. Its extent's name is of no meaning in a stream; readers take the file that they hold.
fn descriptor(sectors: u64, cid: u32) -> String {
    // What VMware's own tools choose: the small geometry up to 1 GiB, LBA-assist beyond.
    let (heads, track) = if sectors <= 2 << 20 { (64, 32) } else { (255, 63) };
    let cylinders = (sectors / (heads * track)).clamp(1, 65_535);
    // ffffffff would mean "no content" and fffffffe is reserved.
    let cid = if cid >= 0xffff_fffe { 1 } else { cid };
    format!(
        "# Disk DescriptorFile\nversion=1\nCID={cid:08x}\nparentCID=ffffffff\ncreateType=\"streamOptimized\"\n\n\
         # Extent description\nRDONLY {sectors} SPARSE \"stream.vmdk\"\n\n\
         # The Disk Data Base\n#DDB\n\n\
         ddb.adapterType = \"lsilogic\"\nddb.geometry.cylinders = \"{cylinders}\"\nddb.geometry.heads = \"{heads}\"\n\
         ddb.geometry.sectors = \"{track}\"\nddb.virtualHWVersion = \"4\"\n"
    )
}

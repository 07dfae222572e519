//! The writer of dynamic images: payload blocks of 4 MiB in the order of their first units, everything else in front of them.
//!
//! Owns: the layout of what we write, and the journal's pieces (which blocks there are; where they lie follows from the sequence).
//! Never: writes zeros where a hole will do, draws a random number. Memory: four bytes a block, 4 MiB for 4 TiB.
//! A crash here costs what was written since the last checkpoint.

use std::io;

use super::super::disk::{DiskWriter, Encoded, FormatError, Output, Result, Run, UNIT, is_zero};
use super::super::raw;
use super::bat::{FULLY_PRESENT, Layout, SLICE};
use super::metadata::{self, MAX_CAPACITY};
use super::{FILE_SIGNATURE, FORMAT, Guid, HEADER_SECTION, HEADERS, MIB, REGION_TABLES, corrupt, crc, header, refused, region};

/// Bytes of a payload block.
const BLOCK: u64 = 4 * MIB;

/// Units of a payload block.
const PER_BLOCK: u64 = BLOCK / UNIT as u64;

/// Sector sizes that a guest sees.
const LOGICAL_SECTOR: u64 = 512;
const PHYSICAL_SECTOR: u32 = 4096;

/// The log: empty, a hole.
const LOG: region::Region = region::Region { offset: HEADER_SECTION, len: MIB };

/// The metadata region.
const METADATA: region::Region = region::Region { offset: 2 * MIB, len: MIB };

/// Where the BAT region starts.
const BAT_OFFSET: u64 = 3 * MIB;

/// Writer of one image.
#[derive(Debug)]
pub struct Writer {
    output: Output,
    capacity: u64,
    id: Guid,
    layout: Layout,
    bat: region::Region,
    /// By payload block: where it lies, in MiB; 0 where there is none.
    places: Vec<u32>,
    /// End of the last block.
    at: u64,
    /// First unit that may come next.
    next_unit: u64,
    piece: Piece,
    /// Kept for its memory.
    runs: Vec<Run>,
}

impl Writer {
    /// A writer of an empty disk of `capacity` bytes: whole sectors of 512, at least one and at most [`MAX_CAPACITY`]. The output must hold
    /// nothing from its base on. `id` becomes the image's identity (file, data and virtual disk id): another one for each image.
    pub fn new(output: Output, capacity: u64, id: [u8; 16]) -> Result<Self> {
        if capacity > MAX_CAPACITY {
            return Err(refused(format!("a capacity of {capacity} bytes is over the format's limit of 64 TiB ({MAX_CAPACITY} bytes)")));
        }
        if capacity == 0 || !capacity.is_multiple_of(LOGICAL_SECTOR) {
            return Err(refused(format!("a capacity of {capacity} bytes; whole sectors of {LOGICAL_SECTOR}, at least one, are allowed")));
        }
        let layout = Layout::new(capacity, BLOCK, LOGICAL_SECTOR);
        let bat = region::Region { offset: BAT_OFFSET, len: (layout.entries * 8).next_multiple_of(MIB) };
        let places = vec![0; layout.blocks as usize];
        Ok(Self {
            output,
            capacity,
            id,
            layout,
            bat,
            places,
            at: bat.offset + bat.len,
            next_unit: 0,
            piece: Piece::default(),
            runs: Vec::new(),
        })
    }

    /// A writer in the state in which one with the same `capacity` and `id` was when it stood at `position` and had given these
    /// `pieces`, all of them and in order. Fails when they do not lead to that position.
    pub fn resume(
        output: Output,
        capacity: u64,
        id: [u8; 16],
        pieces: impl IntoIterator<Item = Result<Vec<u8>>>,
        position: u64,
    ) -> Result<Self> {
        let mut writer = Self::new(output, capacity, id)?;
        for piece in pieces {
            writer.replay(&piece?)?;
        }
        if writer.at != position {
            return Err(corrupt("journal", 0, position, format!("the blocks of its checkpoints end at {} instead", writer.at)));
        }
        writer.piece = Piece { next: writer.next_unit / PER_BLOCK, ..Piece::default() };
        Ok(writer)
    }

    /// Gives `block` the next place in the file.
    fn allocate(&mut self, block: u64) -> Result<()> {
        let place = usize::try_from(block).ok().and_then(|block| self.places.get_mut(block)).ok_or_else(bad_piece)?;
        *place = u32::try_from(self.at / MIB).map_err(|_| misuse(format!("block {block} would lie at byte {}", self.at)))?;
        self.at += BLOCK;
        Ok(())
    }

    /// Goes through the blocks of a piece.
    fn replay(&mut self, mut piece: &[u8]) -> Result<()> {
        let mut next = self.next_unit / PER_BLOCK;
        while !piece.is_empty() {
            let first = next.checked_add(read_varint(&mut piece)?).ok_or_else(bad_piece)?;
            let count = read_varint(&mut piece)?;
            next = first.checked_add(count).filter(|end| *end <= self.layout.blocks).ok_or_else(bad_piece)?;
            for block in first..next {
                self.allocate(block)?;
            }
        }
        self.next_unit = next * PER_BLOCK;
        Ok(())
    }

    /// Gives a block's units their places: adjacent ones of one payload block are one run.
    fn place(&mut self, block: &Encoded, out: &mut Vec<Run>) -> Result<()> {
        if let Some(unit) = block.units.iter().find(|unit| unit.compressed || unit.len != UNIT) {
            return Err(misuse(format!("unit {} is compressed; plain units of {UNIT} bytes are laid down", unit.index)));
        }
        out.clear();
        let mut laid = 0;
        for (index, start, bytes) in raw::runs(block) {
            self.place_run(index, start, bytes.len(), out)?;
            laid += bytes.len() / UNIT;
        }
        if laid != block.units.len() {
            return Err(misuse("a unit outside its block's bytes".to_owned()));
        }
        Ok(())
    }

    /// Gives adjacent units their places; their `len` bytes start at `start` of the block's.
    fn place_run(&mut self, mut index: u64, mut start: usize, mut len: usize, out: &mut Vec<Run>) -> Result<()> {
        let count = (len / UNIT) as u64;
        let end = index.checked_add(count).filter(|end| *end <= self.capacity.div_ceil(UNIT as u64));
        if index < self.next_unit || end.is_none() {
            let next = self.next_unit;
            return Err(misuse(format!("units {index}+{count}; units come in order from {next} on, inside the capacity")));
        }
        while len > 0 {
            let block = index / PER_BLOCK;
            if self.places[block as usize] == 0 {
                self.allocate(block)?;
                self.piece.add(block);
            }
            let within = index % PER_BLOCK;
            let now = len.min((PER_BLOCK - within) as usize * UNIT);
            out.push(Run { start, len: now, offset: u64::from(self.places[block as usize]) * MIB + within * UNIT as u64 });
            index += (now / UNIT) as u64;
            start += now;
            len -= now;
        }
        self.next_unit = index;
        Ok(())
    }

    /// Writes the entries that are not zero. The others are holes, unless an earlier process had come this far and left something there.
    fn write_bat(&self) -> Result<()> {
        let mut bytes = Vec::new();
        let mut there = Vec::new();
        for first in (0..self.layout.entries).step_by(SLICE as usize) {
            bytes.clear();
            for entry in first..(first + SLICE).min(self.layout.entries) {
                let place = if self.layout.is_bitmap(entry) { 0 } else { self.places[self.layout.block(entry) as usize] };
                let value = if place == 0 { 0 } else { (u64::from(place) * MIB) | FULLY_PRESENT };
                bytes.extend_from_slice(&value.to_le_bytes());
            }
            let at = self.bat.offset + first * 8;
            if is_zero(&bytes) {
                there.resize(bytes.len(), 0);
                self.output.read_exact_at(&mut there, at)?;
                if is_zero(&there) {
                    continue;
                }
            }
            self.output.write_all_at(&bytes, at)?;
        }
        Ok(())
    }

    fn write_metadata(&self) -> Result<()> {
        const IS_DISK: u8 = 2;
        const IS_REQUIRED: u8 = 4;
        // The file parameters are the block size in four bytes, and four bytes of flags, all clear: a dynamic image without a parent.
        let items: [(Guid, u8, &[u8]); 5] = [
            (metadata::FILE_PARAMETERS, IS_REQUIRED, &BLOCK.to_le_bytes()),
            (metadata::DISK_SIZE, IS_DISK | IS_REQUIRED, &self.capacity.to_le_bytes()),
            (metadata::DISK_ID, IS_DISK | IS_REQUIRED, &self.id),
            (metadata::LOGICAL_SECTOR, IS_DISK | IS_REQUIRED, &(LOGICAL_SECTOR as u32).to_le_bytes()),
            (metadata::PHYSICAL_SECTOR, IS_DISK | IS_REQUIRED, &PHYSICAL_SECTOR.to_le_bytes()),
        ];
        let mut bytes = vec![0u8; metadata::TABLE as usize];
        put(&mut bytes, 0, metadata::SIGNATURE);
        put(&mut bytes, 10, &(items.len() as u16).to_le_bytes());
        for (i, (id, flags, value)) in items.into_iter().enumerate() {
            let (entry, offset) = ((i + 1) * metadata::ENTRY, bytes.len() as u32);
            put(&mut bytes, entry, &id);
            put(&mut bytes, entry + 16, &offset.to_le_bytes());
            put(&mut bytes, entry + 20, &(value.len() as u32).to_le_bytes());
            put(&mut bytes, entry + 24, &[flags]);
            bytes.extend_from_slice(value);
        }
        Ok(self.output.write_all_at(&bytes, METADATA.offset)?)
    }

    fn write_region_tables(&self) -> Result<()> {
        let mut bytes = vec![0u8; region::TABLE];
        put(&mut bytes, 0, region::SIGNATURE);
        put(&mut bytes, 8, &2u32.to_le_bytes());
        for (i, (id, place)) in [(region::BAT, self.bat), (region::METADATA, METADATA)].into_iter().enumerate() {
            let entry = region::HEADER + i * region::ENTRY;
            put(&mut bytes, entry, &id);
            put(&mut bytes, entry + 16, &place.offset.to_le_bytes());
            put(&mut bytes, entry + 24, &(place.len as u32).to_le_bytes());
            put(&mut bytes, entry + 28, &[1]);
        }
        crc::seal(&mut bytes);
        for at in REGION_TABLES {
            self.output.write_all_at(&bytes, at)?;
        }
        Ok(())
    }

    /// Writes the two headers and then the identifier, without which nothing takes the file for an image.
    fn write_headers(&self) -> Result<()> {
        for (i, at) in HEADERS.into_iter().enumerate() {
            let mut bytes = vec![0u8; header::LEN];
            put(&mut bytes, 0, header::SIGNATURE);
            put(&mut bytes, 8, &(i as u64 + 1).to_le_bytes());
            put(&mut bytes, 16, &self.id);
            put(&mut bytes, 32, &self.id);
            // Bytes 48 to 65: no log to replay, of version 0.
            put(&mut bytes, 66, &1u16.to_le_bytes());
            put(&mut bytes, 68, &(LOG.len as u32).to_le_bytes());
            put(&mut bytes, 72, &LOG.offset.to_le_bytes());
            crc::seal(&mut bytes);
            self.output.write_all_at(&bytes, at)?;
        }
        let mut identifier = FILE_SIGNATURE.to_vec();
        identifier.extend("HyperSDK".encode_utf16().flat_map(u16::to_le_bytes));
        Ok(self.output.write_all_at(&identifier, 0)?)
    }
}

/// Copies `value` to byte `at`; the caller's structure is long enough.
fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

impl Writer {
    fn stretch(&self) -> io::Result<()> {
        let end = self.output.base.checked_add(self.at).ok_or_else(|| io::Error::from(io::ErrorKind::FileTooLarge))?;
        self.output.file.set_len(end)
    }
}

impl DiskWriter for Writer {
    fn write_block(&mut self, block: &Encoded) -> Result<()> {
        let mut runs = std::mem::take(&mut self.runs);
        self.place(block, &mut runs)?;
        for run in &runs {
            self.output.write_all_at(&block.bytes[run.start..run.start + run.len], run.offset)?;
        }
        self.runs = runs;
        Ok(())
    }

    fn place_block(&mut self, block: &Encoded, runs: &mut Vec<Run>) -> Result<bool> {
        self.place(block, runs)?;
        Ok(true)
    }

    fn position(&self) -> u64 {
        self.at
    }

    fn checkpoint(&mut self) -> Result<Vec<u8>> {
        // A block that a checkpoint names is complete.
        self.next_unit = self.next_unit.next_multiple_of(PER_BLOCK);
        // What is sealed ends at the position, also where the last block ends with a hole.
        self.stretch()?;
        Ok(self.piece.take())
    }

    fn finish(&mut self) -> Result<u64> {
        self.stretch()?;
        self.write_bat()?;
        self.write_metadata()?;
        self.write_region_tables()?;
        self.write_headers()?;
        Ok(self.at)
    }
}

/// The blocks allocated since the last checkpoint: pairs of LEB128 varints, so many blocks absent, then so many present.
#[derive(Debug, Default)]
struct Piece {
    bytes: Vec<u8>,
    /// Block behind the last one.
    next: u64,
    /// Blocks present that are not yet in `bytes`.
    run: u64,
}

impl Piece {
    fn add(&mut self, block: u64) {
        if block > self.next || (self.run == 0 && self.bytes.is_empty()) {
            self.end_run();
            varint(block.saturating_sub(self.next), &mut self.bytes);
        }
        self.run += 1;
        self.next = block + 1;
    }

    fn end_run(&mut self) {
        if self.run > 0 {
            varint(self.run, &mut self.bytes);
            self.run = 0;
        }
    }

    fn take(&mut self) -> Vec<u8> {
        self.end_run();
        std::mem::take(&mut self.bytes)
    }
}

fn varint(mut number: u64, out: &mut Vec<u8>) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

fn read_varint(bytes: &mut &[u8]) -> Result<u64> {
    let mut number = 0u64;
    for shift in (0..63).step_by(7) {
        let (byte, rest) = bytes.split_first().ok_or_else(bad_piece)?;
        *bytes = rest;
        number |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok(number);
        }
    }
    Err(bad_piece())
}

fn bad_piece() -> FormatError {
    corrupt("journal", 0, 0, "a checkpoint's piece is not a sequence of blocks of the disk")
}

/// The caller broke the contract of [`DiskWriter`].
fn misuse(what: String) -> FormatError {
    io::Error::new(io::ErrorKind::InvalidInput, format!("{FORMAT} writer: {what}")).into()
}

//! Writes a qcow2 image front to back: version 3, clusters of 64 KiB, reference counts of 16 bits.
//!
//! Owns: the place of every cluster and table. The file is a fixed front region, kept free until `finish`, and what is appended behind it:
//! ```text
//! ┌────────┬────────────────┬──────────┬ - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - ┐
//! │ header │ refcount table │ L1 table │ clusters … L2 table … clusters … refcount block … L2, refcount blocks │
//! └────────┴────────────────┴──────────┴ - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - ┘
//!  written by finish, reserved for the worst case      appended, final as soon as it is written
//! ```
//! An L2 table is appended when the writer leaves its range of 8192 clusters, a refcount block when the file has left its 2 GiB.
//! Memory: L1 and refcount table (8 bytes for 512 MiB of disk and for 2 GiB of file), one L2 table, three refcount blocks, 1 MiB of buffer.
//! Never: goes back, except to the front region. Every place follows from the sequence of units alone, so a checkpoint's piece is
//! that sequence, and `resume` replays it without writing.
//! A crash here costs what was written since the last checkpoint.

use std::io;

use super::super::disk::{DiskWriter, Encoded, FormatError, Method, Output, Result, Run, UNIT};
use super::super::raw;
use super::piece::{Piece, bad_piece, read_varint};
use super::refcounts::{PER_BLOCK, Refcounts};
use super::{COMPRESSED, COPIED, FORMAT, MAX_L1_BYTES, MAX_REFTABLE_BYTES, SECTOR, corrupt, header, refused};

const CLUSTER: u64 = UNIT as u64;
const CLUSTER_BITS: u32 = 16;

/// Entries in an L2 table.
const PER_L2: u64 = CLUSTER / 8;

/// Largest disk in bytes: QEMU takes an L1 table of 32 MiB at most, 2 PiB with clusters of 64 KiB. A few clusters less, because the
/// refcount table (8 MiB at most) must count the tables, too.
pub const MAX_CAPACITY: u64 = (MAX_L1_BYTES / 8) * PER_L2 * CLUSTER - (1 << 40);

/// Bytes that are collected before they are handed to the kernel.
const BUFFER: usize = 1 << 20;

/// Appends to the output through a buffer; a replay only moves the position.
#[derive(Debug)]
struct Appender {
    output: Output,
    /// Where the next byte goes, counted from the base.
    at: u64,
    buffer: Vec<u8>,
    replaying: bool,
}

impl Appender {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        if !self.replaying {
            if self.buffer.len() + bytes.len() > BUFFER {
                self.flush()?;
            }
            if bytes.len() >= BUFFER {
                self.output.write_all_at(bytes, self.at)?;
            } else {
                self.buffer.extend_from_slice(bytes);
            }
        }
        self.at += bytes.len() as u64;
        Ok(())
    }

    /// Moves on to the next cluster; the gap reads as zeros.
    fn align(&mut self) {
        let to = self.at.next_multiple_of(CLUSTER);
        if !self.buffer.is_empty() {
            self.buffer.resize(self.buffer.len() + (to - self.at) as usize, 0);
        }
        self.at = to;
    }

    /// Moves on over bytes that somebody else writes.
    fn skip(&mut self, len: usize) -> io::Result<()> {
        self.flush()?;
        self.at += len as u64;
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        if !self.buffer.is_empty() {
            self.output.write_all_at(&self.buffer, self.at - self.buffer.len() as u64)?;
            self.buffer.clear();
        }
        Ok(())
    }
}

/// Something that a plain image's writer laid down, as a replay tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Placed {
    /// Adjacent units.
    Units {
        /// Number of the first.
        index: u64,
        /// How many.
        count: u64,
        /// Where the first lies in the image, in bytes.
        host: u64,
    },
    /// A table of one cluster.
    Table {
        /// Where it lies in the image, in bytes.
        host: u64,
        /// BLAKE3 of its bytes.
        digest: [u8; 32],
    },
}

/// Tells from the pieces of a plain image's checkpoints where everything lies, so that an image can be held against the digests of its blocks.
#[derive(Debug)]
pub struct Tracer(Writer);

impl Tracer {
    /// A tracer from the beginning of a disk of `capacity` bytes. Nothing is read from or written to `output`.
    pub fn new(output: Output, capacity: u64) -> Result<Self> {
        let mut writer = Writer::new(output, capacity, None)?;
        writer.out.replaying = true;
        writer.trace = Some(Vec::new());
        Ok(Self(writer))
    }

    /// What the next piece stands for, and the position behind it. Pieces come in order, each once.
    pub fn next(&mut self, piece: &[u8]) -> Result<(Vec<Placed>, u64)> {
        self.0.replay(piece)?;
        Ok((self.0.trace.replace(Vec::new()).unwrap_or_default(), self.0.out.at))
    }
}

/// The bytes of units that get their places.
enum Body<'a> {
    /// Here they are.
    Bytes(&'a [u8]),
    /// The caller writes them; they start there in its block.
    Later(&'a mut Vec<Run>, usize),
    /// They were written before.
    Replayed,
}

/// Writer of one image.
#[derive(Debug)]
pub struct Writer {
    out: Appender,
    capacity: u64,
    method: Option<Method>,
    reftable: Vec<u64>,
    l1: Vec<u64>,
    /// The L2 table in work: its L1 entry and its entries.
    range: Option<u64>,
    l2: Box<[u64]>,
    refcounts: Refcounts,
    /// First unit that may come next.
    next_unit: u64,
    piece: Piece,
    table: Vec<u8>,
    /// What was laid down since the last look, for a [`Tracer`].
    trace: Option<Vec<Placed>>,
}

impl Writer {
    /// A writer of an empty disk of `capacity` bytes (whole sectors of 512, at most [`MAX_CAPACITY`]), whose compressed units come
    /// from `method`. The output must hold nothing from its base on.
    pub fn new(output: Output, capacity: u64, method: Option<Method>) -> Result<Self> {
        if !capacity.is_multiple_of(SECTOR) {
            return Err(refused(format!("a capacity of {capacity} bytes; whole sectors of {SECTOR} are allowed")));
        }
        if capacity > MAX_CAPACITY {
            let reason = format!(
                "a capacity of {capacity} bytes is over the format's limit of {MAX_CAPACITY} (L1 table of at most {MAX_L1_BYTES} bytes)"
            );
            return Err(refused(reason));
        }
        let units = capacity.div_ceil(CLUSTER);
        let l1_entries = units.div_ceil(PER_L2).max(1);
        let l1_clusters = (l1_entries * 8).div_ceil(CLUSTER);
        // Each unit takes at most one host cluster (a run of compressed ones never more than it has units), each range one L2 table.
        let body = units + l1_entries + l1_clusters + 1;
        let mut blocks = body.div_ceil(PER_BLOCK);
        let mut reftable_clusters = 1;
        while (body + blocks + reftable_clusters).div_ceil(PER_BLOCK) > blocks || blocks * 8 > reftable_clusters * CLUSTER {
            blocks = (body + blocks + reftable_clusters).div_ceil(PER_BLOCK);
            reftable_clusters = (blocks * 8).div_ceil(CLUSTER);
        }
        if reftable_clusters * CLUSTER > MAX_REFTABLE_BYTES {
            return Err(refused(format!("a capacity of {capacity} bytes needs a refcount table of more than {MAX_REFTABLE_BYTES} bytes")));
        }
        let front = 1 + reftable_clusters + l1_clusters;
        let mut refcounts = Refcounts::default();
        (0..front).for_each(|cluster| refcounts.add(cluster));
        Ok(Self {
            out: Appender { output, at: front * CLUSTER, buffer: Vec::new(), replaying: false },
            capacity,
            method,
            reftable: vec![0; (reftable_clusters * PER_L2) as usize],
            l1: vec![0; l1_entries as usize],
            range: None,
            l2: vec![0; PER_L2 as usize].into_boxed_slice(),
            refcounts,
            next_unit: 0,
            piece: Piece::default(),
            table: vec![0; UNIT],
            trace: None,
        })
    }

    /// A writer in the state in which one with the same `capacity` and `method` was when it stood at `position` and had given these
    /// `pieces`, all of them and in order. Fails when they do not lead to that position.
    pub fn resume(
        output: Output,
        capacity: u64,
        method: Option<Method>,
        pieces: impl IntoIterator<Item = Result<Vec<u8>>>,
        position: u64,
    ) -> Result<Self> {
        let mut writer = Self::new(output, capacity, method)?;
        writer.out.replaying = true;
        for piece in pieces {
            writer.replay(&piece?)?;
        }
        if writer.out.at != position {
            return Err(corrupt("journal", 0, position, format!("the units of its checkpoints end at {} instead", writer.out.at)));
        }
        writer.out.replaying = false;
        writer.piece = Piece::from(writer.next_unit);
        Ok(writer)
    }

    /// Gives `count` adjacent plain units their places.
    fn place_plain(&mut self, index: u64, count: u64, mut body: Body<'_>) -> Result<()> {
        self.check_order(index, count)?;
        let (mut at, mut done) = (index, 0);
        while at < index + count {
            self.enter(at / PER_L2)?;
            self.out.align();
            self.settle()?;
            // What fits before the next table: one write for all of it.
            let until_block = (self.block_end() - self.out.at).div_ceil(CLUSTER);
            let part = (index + count - at).min(PER_L2 - at % PER_L2).min(until_block);
            let host = self.out.at;
            let len = (part * CLUSTER) as usize;
            match &mut body {
                Body::Bytes(bytes) => self.out.append(&bytes[done..done + len])?,
                Body::Later(runs, start) => {
                    runs.push(Run { start: *start + done, len, offset: host });
                    self.out.skip(len)?;
                }
                Body::Replayed => self.out.at += len as u64,
            }
            if let Some(trace) = &mut self.trace {
                trace.push(Placed::Units { index: at, count: part, host });
            }
            for i in 0..part {
                self.l2[((at + i) % PER_L2) as usize] = COPIED | (host + i * CLUSTER);
                self.refcounts.add(host / CLUSTER + i);
            }
            at += part;
            done += len;
            self.settle()?;
        }
        Ok(())
    }

    /// Gives a compressed unit its place; `bytes` are its `len` bytes, or nothing in a replay.
    fn place_packed(&mut self, index: u64, len: usize, bytes: Option<&[u8]>) -> Result<()> {
        self.check_order(index, 1)?;
        if self.method.is_none() || len == 0 || len >= UNIT {
            return Err(misuse(format!("compressed unit {index} of {len} bytes")));
        }
        self.enter(index / PER_L2)?;
        let host = self.out.at;
        let last = host + len as u64 - 1;
        match bytes {
            Some(bytes) => self.out.append(bytes)?,
            None => self.out.at += len as u64,
        }
        self.l2[(index % PER_L2) as usize] = COMPRESSED | (last / SECTOR - host / SECTOR) << (62 - (CLUSTER_BITS - 8)) | host;
        (host / CLUSTER..=last / CLUSTER).for_each(|cluster| self.refcounts.add(cluster));
        self.settle()
    }

    fn check_order(&mut self, index: u64, count: u64) -> Result<()> {
        let end = index.checked_add(count).filter(|end| *end <= self.capacity.div_ceil(CLUSTER));
        let end = end.filter(|_| index >= self.next_unit);
        self.next_unit = end
            .ok_or_else(|| misuse(format!("unit {index}+{count}; units come in order from {} on, inside the capacity", self.next_unit)))?;
        Ok(())
    }

    /// Goes through the units of a piece, the first of which is counted from where the last piece ended.
    fn replay(&mut self, mut piece: &[u8]) -> Result<()> {
        let mut next = self.next_unit;
        while !piece.is_empty() {
            let number = read_varint(&mut piece)?;
            match (number & 3, number >> 2) {
                (0, count) => {
                    self.place_plain(next, count, Body::Replayed)?;
                    next += count;
                }
                (1, len) => {
                    self.place_packed(next, usize::try_from(len).unwrap_or(usize::MAX), None)?;
                    next += 1;
                }
                (2, absent) => next = next.checked_add(absent).ok_or_else(bad_piece)?,
                _ => return Err(bad_piece()),
            }
        }
        Ok(())
    }

    /// Where the host clusters of the next refcount block end.
    fn block_end(&self) -> u64 {
        (self.refcounts.next() + 1) * PER_BLOCK * CLUSTER
    }

    /// Makes `range` the L2 table in work, and appends the one before.
    fn enter(&mut self, range: u64) -> Result<()> {
        if self.range == Some(range) {
            return Ok(());
        }
        self.leave()?;
        self.range = Some(range);
        Ok(())
    }

    /// Appends the L2 table in work, if there is one.
    fn leave(&mut self) -> Result<()> {
        let Some(range) = self.range.take() else { return Ok(()) };
        self.out.align();
        let host = self.out.at;
        big_endian(&self.l2, &mut self.table);
        self.append_table()?;
        self.l1[range as usize] = COPIED | host;
        self.refcounts.add(host / CLUSTER);
        self.l2.fill(0);
        self.settle()
    }

    /// Appends the refcount blocks whose host clusters are all behind the position.
    fn settle(&mut self) -> Result<()> {
        while self.out.at >= self.block_end() {
            self.out.align();
            let host = self.out.at;
            self.refcounts.add(host / CLUSTER);
            self.append_refcount_block(host)?;
        }
        Ok(())
    }

    fn append_refcount_block(&mut self, host: u64) -> Result<()> {
        let slot = self.reftable.get_mut(self.refcounts.next() as usize);
        *slot.ok_or_else(|| corrupt("refcount table", self.refcounts.next(), host, "is full"))? = host;
        self.refcounts.take(&mut self.table);
        self.append_table()
    }

    fn append_table(&mut self) -> Result<()> {
        if let Some(trace) = &mut self.trace {
            trace.push(Placed::Table { host: self.out.at, digest: *blake3::hash(&self.table).as_bytes() });
        }
        Ok(self.out.append(&self.table)?)
    }

    /// Appends the remaining refcount blocks, which count themselves.
    fn settle_all(&mut self) -> Result<()> {
        self.out.align();
        let used = self.out.at / CLUSTER;
        let mut blocks = 0;
        while (used + blocks).div_ceil(PER_BLOCK) - self.refcounts.next() > blocks {
            blocks = (used + blocks).div_ceil(PER_BLOCK) - self.refcounts.next();
        }
        (used..used + blocks).for_each(|cluster| self.refcounts.add(cluster));
        for _ in 0..blocks {
            self.append_refcount_block(self.out.at)?;
        }
        Ok(())
    }

    fn write_front(&mut self) -> Result<()> {
        let output = self.out.output.clone();
        let mut at = CLUSTER;
        for entries in [&self.reftable, &self.l1] {
            for part in entries.chunks(PER_L2 as usize) {
                big_endian(part, &mut self.table);
                self.table[part.len() * 8..].fill(0);
                output.write_all_at(&self.table, at)?;
                at += CLUSTER;
            }
        }
        let mut bytes = vec![0u8; UNIT];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        let reftable_clusters = self.reftable.len() as u64 / PER_L2;
        put(0, &header::MAGIC.to_be_bytes());
        put(4, &3u32.to_be_bytes());
        put(20, &CLUSTER_BITS.to_be_bytes());
        put(24, &self.capacity.to_be_bytes());
        put(36, &(self.l1.len() as u32).to_be_bytes());
        put(40, &((1 + reftable_clusters) * CLUSTER).to_be_bytes());
        put(48, &CLUSTER.to_be_bytes());
        put(56, &(reftable_clusters as u32).to_be_bytes());
        put(96, &4u32.to_be_bytes());
        put(100, &(header::V3_LEN as u32).to_be_bytes());
        if self.method == Some(Method::Zstd) {
            put(72, &header::COMPRESSION.to_be_bytes());
            put(104, &[1]);
        }
        Ok(output.write_all_at(&bytes, 0)?)
    }
}

/// Table entries as they lie in the file.
fn big_endian(entries: &[u64], bytes: &mut [u8]) {
    for (to, entry) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(entries) {
        *to = entry.to_be_bytes();
    }
}

impl DiskWriter for Writer {
    fn write_block(&mut self, block: &Encoded) -> Result<()> {
        if self.method.is_none() {
            for (index, _, bytes) in raw::runs(block) {
                let count = (bytes.len() / UNIT) as u64;
                self.place_plain(index, count, Body::Bytes(bytes))?;
                self.piece.plain(index, count);
            }
            return Ok(());
        }
        for unit in &block.units {
            let bytes =
                block.bytes.get(unit.start..unit.start + unit.len).ok_or_else(|| misuse("a unit outside its block's bytes".to_owned()))?;
            if unit.compressed {
                self.place_packed(unit.index, unit.len, Some(bytes))?;
                self.piece.packed(unit.index, unit.len);
            } else {
                self.place_plain(unit.index, 1, Body::Bytes(bytes))?;
                self.piece.plain(unit.index, 1);
            }
        }
        Ok(())
    }

    fn place_block(&mut self, block: &Encoded, out: &mut Vec<Run>) -> Result<bool> {
        if self.method.is_some() {
            return Ok(false);
        }
        out.clear();
        for (index, start, bytes) in raw::runs(block) {
            let count = (bytes.len() / UNIT) as u64;
            self.place_plain(index, count, Body::Later(out, start))?;
            self.piece.plain(index, count);
        }
        Ok(true)
    }

    fn position(&self) -> u64 {
        self.out.at
    }

    fn checkpoint(&mut self) -> Result<Vec<u8>> {
        self.out.flush()?;
        Ok(self.piece.take())
    }

    fn finish(&mut self) -> Result<u64> {
        self.leave()?;
        self.settle_all()?;
        self.out.flush()?;
        self.write_front()?;
        Ok(self.out.at)
    }
}

/// The caller broke the contract of [`DiskWriter`].
fn misuse(what: String) -> FormatError {
    io::Error::new(io::ErrorKind::InvalidInput, format!("{FORMAT} writer: {what}")).into()
}

#[cfg(test)]
impl Writer {
    /// Moves the position on to `at`, as if the clusters up to there had been written and freed again.
    pub(super) fn jump(&mut self, at: u64) {
        self.out.at = at;
    }
}

//! Writes a compressed qcow2 image front to back: version 3, clusters of 64 KiB, reference counts of 16 bits.
//!
//! Owns: the place of every cluster and table. The file is a fixed front region, kept free until `finish`, and what is appended behind it:
//! ```text
//! ┌────────┬────────────────┬──────────┬ - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - ┐
//! │ header │ refcount table │ L1 table │ clusters … L2 table … clusters … refcount block … L2, refcount blocks │
//! └────────┴────────────────┴──────────┴ - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - ┘
//!  written by finish, reserved for the worst case      appended, final as soon as it is written
//! ```
//! An L2 table is appended when the writer leaves its range of 8192 clusters, a refcount block when the file has left its 2 GiB.
//! Memory: L1 and refcount table (8 bytes for 512 MiB of disk and for 2 GiB of file), one L2 table, three refcount blocks.
//! Never: goes back, except to the front region. Every place follows from the sequence of units alone, so a checkpoint's piece is
//! that sequence, and `resume` replays it without writing.
//! A crash here costs what was written since the last checkpoint.

use std::io;

use super::super::disk::{DiskWriter, Encoded, Method, Output, Result, Run, UNIT};
use super::front::{CLUSTER, CLUSTER_BITS, Front, PER_L2, big_endian, misuse};
use super::piece::{Piece, Step, bad_piece, steps};
use super::refcounts::{PER_BLOCK, Refcounts};
use super::{COMPRESSED, COPIED, SECTOR, corrupt};

/// Appends tables to the output and leaves room for units; a replay only moves the position.
#[derive(Debug)]
struct Appender {
    output: Output,
    /// Where the next byte goes, counted from the base.
    at: u64,
    replaying: bool,
}

impl Appender {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        if !self.replaying {
            self.output.write_all_at(bytes, self.at)?;
        }
        self.at += bytes.len() as u64;
        Ok(())
    }

    /// Moves on to the next cluster; the gap reads as zeros.
    fn align(&mut self) {
        self.at = self.at.next_multiple_of(CLUSTER);
    }
}

/// Writer of one image.
#[derive(Debug)]
pub struct Writer {
    out: Appender,
    front: Front,
    /// The L2 table in work: its L1 entry and its entries.
    range: Option<u64>,
    l2: Box<[u64]>,
    refcounts: Refcounts,
    /// First unit that may come next.
    next_unit: u64,
    piece: Piece,
    table: Vec<u8>,
}

impl Writer {
    /// A writer of an empty disk of `capacity` bytes (whole sectors of 512, at most [`super::MAX_CAPACITY`]), whose compressed units come
    /// from `method`. The output must hold nothing from its base on.
    pub fn new(output: Output, capacity: u64, method: Method) -> Result<Self> {
        let front = Front::new(capacity, Some(method))?;
        let mut refcounts = Refcounts::default();
        (0..front.clusters()).for_each(|cluster| refcounts.add(cluster));
        Ok(Self {
            out: Appender { output, at: front.clusters() * CLUSTER, replaying: false },
            front,
            range: None,
            l2: vec![0; PER_L2 as usize].into_boxed_slice(),
            refcounts,
            next_unit: 0,
            piece: Piece::default(),
            table: vec![0; UNIT],
        })
    }

    /// Makes the image a layer over the qcow2 of this name (a path from its own folder): what it leaves unsaid is that one's.
    pub fn over(mut self, backing: Option<&str>) -> Result<Self> {
        if let Some(name) = backing {
            self.front.set_backing(name, super::FORMAT)?;
        }
        Ok(self)
    }

    /// A writer in the state in which one with the same `capacity` and `method` was when it stood at `position` and had given these
    /// `pieces`, all of them and in order. Fails when they do not lead to that position.
    pub fn resume(
        output: Output,
        capacity: u64,
        method: Method,
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

    /// Gives a unit that compression would have made longer its place.
    fn place_plain(&mut self, index: u64) -> Result<u64> {
        self.check_order(index)?;
        self.enter(index / PER_L2)?;
        self.out.align();
        self.settle()?;
        let host = self.out.at;
        self.out.at += CLUSTER;
        self.l2[(index % PER_L2) as usize] = COPIED | host;
        self.refcounts.add(host / CLUSTER);
        self.settle()?;
        Ok(host)
    }

    /// Gives a compressed unit of `len` bytes its place.
    fn place_packed(&mut self, index: u64, len: usize) -> Result<u64> {
        self.check_order(index)?;
        if len == 0 || len >= UNIT {
            return Err(misuse(format!("compressed unit {index} of {len} bytes")));
        }
        self.enter(index / PER_L2)?;
        let host = self.out.at;
        let last = host + len as u64 - 1;
        self.out.at += len as u64;
        self.l2[(index % PER_L2) as usize] = COMPRESSED | (last / SECTOR - host / SECTOR) << (62 - (CLUSTER_BITS - 8)) | host;
        (host / CLUSTER..=last / CLUSTER).for_each(|cluster| self.refcounts.add(cluster));
        self.settle()?;
        Ok(host)
    }

    fn check_order(&mut self, index: u64) -> Result<()> {
        if index < self.next_unit || index >= self.front.units() {
            return Err(misuse(format!("unit {index}; units come in order from {} on, inside the capacity", self.next_unit)));
        }
        self.next_unit = index + 1;
        Ok(())
    }

    /// Goes through the units of a piece, the first of which is counted from where the last piece ended.
    fn replay(&mut self, piece: &[u8]) -> Result<()> {
        let mut next = self.next_unit;
        for step in steps(piece) {
            match step? {
                Step::Plain(count) => {
                    let end = next.checked_add(count).ok_or_else(bad_piece)?;
                    (next..end).try_for_each(|index| self.place_plain(index).map(drop))?;
                    next = end;
                }
                Step::Packed(len) => {
                    self.place_packed(next, usize::try_from(len).unwrap_or(usize::MAX))?;
                    next += 1;
                }
                Step::Absent(count) => next = next.checked_add(count).ok_or_else(bad_piece)?,
                Step::Cluster(_) | Step::Table(_) => return Err(bad_piece()),
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
        self.out.append(&self.table)?;
        self.front.set_l2(range, host);
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
        self.front.set_refcount_block(self.refcounts.next(), host)?;
        self.refcounts.take(&mut self.table);
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
}

impl DiskWriter for Writer {
    fn write_block(&mut self, block: &Encoded) -> Result<()> {
        let mut runs = Vec::new();
        self.place_block(block, &mut runs)?;
        for Run { start, len, offset } in runs {
            self.out.output.write_all_at(&block.bytes[start..start + len], offset)?;
        }
        Ok(())
    }

    fn place_block(&mut self, block: &Encoded, runs: &mut Vec<Run>) -> Result<bool> {
        runs.clear();
        for unit in &block.units {
            let (start, len) = (unit.start, unit.len);
            if start.checked_add(len).is_none_or(|end| end > block.bytes.len()) || !unit.compressed && len != UNIT {
                return Err(misuse(format!("unit {} outside its block's bytes", unit.index)));
            }
            let offset = if unit.compressed {
                self.piece.packed(unit.index, len);
                self.place_packed(unit.index, len)?
            } else {
                self.piece.plain(unit.index, 1);
                self.place_plain(unit.index)?
            };
            match runs.last_mut() {
                Some(run) if run.start + run.len == start && run.offset + run.len as u64 == offset => run.len += len,
                _ => runs.push(Run { start, len, offset }),
            }
        }
        Ok(true)
    }

    fn position(&self) -> u64 {
        self.out.at
    }

    fn checkpoint(&mut self) -> Result<Vec<u8>> {
        Ok(self.piece.take())
    }

    fn finish(&mut self) -> Result<u64> {
        self.leave()?;
        self.settle_all()?;
        self.front.write(&self.out.output, &mut self.table)?;
        Ok(self.out.at)
    }
}

#[cfg(test)]
impl Writer {
    /// Moves the position on to `at`, as if the clusters up to there had been written and freed again.
    pub(super) fn jump(&mut self, at: u64) {
        self.out.at = at;
    }
}

//! Writes a qcow2 image whose clusters are stored as they are: each where there was room when its bytes were at hand.
//!
//! Owns: the tables, in the disk's order, over clusters that lie in any order:
//! ```text
//! ┌────────┬────────────────┬──────────┬ - - - - - - - - - - - - - - - - - - - - - - - - ┬─────────────────┐
//! │ header │ refcount table │ L1 table │ clusters and L2 tables as they got their places │ refcount blocks │
//! └────────┴────────────────┴──────────┴ - - - - - - - - - - - - - - - - - - - - - - - - ┴─────────────────┘
//!  written by finish, reserved for the worst case                                          written by finish
//! ```
//! Who reads a unit takes a place from [`Places`] and writes it at once. Blocks then come here in order, and only their places are noted; an
//! L2 table gets its place when its range of 8192 clusters is left. Every cluster below the end has one reference, but for gaps: places of
//! blocks that an attempt wrote and never got in order. A resumed writer fills them first; what is left of them (at most what one attempt
//! had under way) stays free, with a reference count of 0.
//! Memory: L1 and refcount table, one L2 table, the gaps.
//! Never: moves a cluster, compresses. A checkpoint's piece tells the places, and `resume` replays it without reading the file.
//! A crash here costs what was noted since the last checkpoint.

use std::sync::Arc;

use super::super::disk::{DiskWriter, Encoded, Hot, Output, Place, Result, UNIT};
use super::super::places::{Occupied, Places, Span};
use super::super::raw;
use super::front::{CLUSTER, CLUSTER_BITS, Front, PER_L2, big_endian, misuse};
use super::piece::{Piece, Step, bad_piece, steps};
use super::refcounts::PER_BLOCK;
use super::{COPIED, corrupt};

/// Clusters of the largest file that L1 and L2 entries reach.
const MAX_CLUSTERS: u64 = 1 << (56 - CLUSTER_BITS);

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
pub struct Tracer(Tables);

impl Tracer {
    /// A tracer from the beginning of a disk of `capacity` bytes.
    pub fn new(capacity: u64) -> Result<Self> {
        Ok(Self(Tables::new(capacity)?))
    }

    /// What the next piece stands for, and the position behind it. Pieces come in order, each once.
    pub fn next(&mut self, piece: &[u8]) -> Result<(Vec<Placed>, u64)> {
        let mut placed = Vec::new();
        self.0.replay(piece, Some(&mut placed))?;
        Ok((placed, self.0.position()))
    }
}

/// What is known of where the disk's units lie.
#[derive(Debug)]
struct Tables {
    front: Front,
    /// The L2 table in work: its L1 entry and its entries.
    range: Option<u64>,
    l2: Box<[u64]>,
    /// First unit that may come next.
    next_unit: u64,
    occupied: Occupied,
    /// One cluster of memory, for a table on its way to the file.
    table: Vec<u8>,
}

impl Tables {
    fn new(capacity: u64) -> Result<Self> {
        let front = Front::new(capacity, None)?;
        Ok(Self {
            occupied: Occupied::new(front.clusters()),
            front,
            range: None,
            l2: vec![0; PER_L2 as usize].into_boxed_slice(),
            next_unit: 0,
            table: vec![0; UNIT],
        })
    }

    fn position(&self) -> u64 {
        self.occupied.end() * CLUSTER
    }

    fn occupy(&mut self, span: Span) -> bool {
        span.first < MAX_CLUSTERS && span.count <= MAX_CLUSTERS - span.first && self.occupied.add(span)
    }

    /// Notes the places of adjacent units of one range; false when they are occupied, out of order, or not of the range in work.
    fn note(&mut self, index: u64, span: Span) -> bool {
        let end = index.checked_add(span.count).filter(|end| *end <= self.front.units());
        let Some(end) = end.filter(|end| index >= self.next_unit && span.count > 0 && (end - 1) / PER_L2 == index / PER_L2) else {
            return false;
        };
        let range = index / PER_L2;
        if *self.range.get_or_insert(range) != range || !self.occupy(span) {
            return false;
        }
        self.next_unit = end;
        for i in 0..span.count {
            self.l2[((index + i) % PER_L2) as usize] = COPIED | (span.offset() + i * CLUSTER);
        }
        true
    }

    /// The L2 table in work lies in `cluster`; its bytes are in `table` then. False when there is none, or the cluster is occupied.
    fn close(&mut self, cluster: u64) -> bool {
        let span = Span { first: cluster, count: 1 };
        let Some(range) = self.range.filter(|_| self.occupy(span)) else { return false };
        self.range = None;
        big_endian(&self.l2, &mut self.table);
        self.front.set_l2(range, span.offset());
        self.l2.fill(0);
        true
    }

    /// Goes through a piece, the first unit of which is counted from where the last piece ended; tells what it finds.
    fn replay(&mut self, piece: &[u8], mut told: Option<&mut Vec<Placed>>) -> Result<()> {
        let (mut next, mut host) = (self.next_unit, None);
        for step in steps(piece) {
            match step? {
                Step::Absent(count) => next = next.checked_add(count).ok_or_else(bad_piece)?,
                Step::Cluster(cluster) => host = Some(cluster),
                Step::Plain(count) => {
                    let span = Span { first: host.ok_or_else(bad_piece)?, count };
                    if !self.note(next, span) {
                        return Err(bad_piece());
                    }
                    if let Some(told) = &mut told {
                        told.push(Placed::Units { index: next, count, host: span.offset() });
                    }
                    (next, host) = (self.next_unit, Some(span.first + count));
                }
                Step::Table(cluster) => {
                    if !self.close(cluster) {
                        return Err(bad_piece());
                    }
                    if let Some(told) = &mut told {
                        told.push(Placed::Table { host: cluster * CLUSTER, digest: *blake3::hash(&self.table).as_bytes() });
                    }
                }
                Step::Packed(_) => return Err(bad_piece()),
            }
        }
        self.next_unit = next;
        Ok(())
    }
}

/// Writer of one plain image.
#[derive(Debug)]
pub struct PlainWriter {
    output: Output,
    tables: Tables,
    places: Arc<Places>,
    piece: Piece,
}

impl PlainWriter {
    /// A writer of an empty disk of `capacity` bytes (whole sectors of 512, at most [`super::MAX_CAPACITY`]). The output must hold nothing
    /// from its base on.
    pub fn new(output: Output, capacity: u64) -> Result<Self> {
        Ok(Self::on(output, Tables::new(capacity)?))
    }

    /// A writer in the state in which one with the same `capacity` was when it stood at `position` and had given these `pieces`, all of them
    /// and in order; places that it had handed out and not told are free again. Fails when they do not lead to that position.
    pub fn resume(output: Output, capacity: u64, pieces: impl IntoIterator<Item = Result<Vec<u8>>>, position: u64) -> Result<Self> {
        let mut tables = Tables::new(capacity)?;
        for piece in pieces {
            tables.replay(&piece?, None)?;
        }
        if tables.position() != position {
            let text = format!("the units of its checkpoints end at {} instead", tables.position());
            return Err(corrupt("journal", 0, position, text));
        }
        Ok(Self::on(output, tables))
    }

    /// Makes the image a layer over the image of this name and format (`qcow2` or `raw`): what it leaves unsaid is that one's.
    pub fn over(mut self, name: &str, format: &'static str) -> Result<Self> {
        self.tables.front.set_backing(name, format)?;
        Ok(self)
    }

    fn on(output: Output, tables: Tables) -> Self {
        Self { output, places: Arc::new(Places::new(&tables.occupied)), piece: Piece::from(tables.next_unit), tables }
    }

    /// Notes where adjacent units lie.
    fn note(&mut self, place: Place) -> Result<()> {
        let Place { mut index, mut span } = place;
        while span.count > 0 {
            let range = index / PER_L2;
            if self.tables.range.is_some_and(|open| open != range) {
                self.close()?;
            }
            let part = Span { count: span.count.min(PER_L2 - index % PER_L2), ..span };
            if !self.tables.note(index, part) {
                let text = format!(
                    "unit {index}+{} in cluster {}; units come in order, inside the capacity, to free places",
                    part.count, part.first
                );
                return Err(misuse(text));
            }
            self.piece.placed(index, part.count, part.first);
            index += part.count;
            span = Span { first: span.first + part.count, count: span.count - part.count };
        }
        Ok(())
    }

    /// Gives the L2 table in work a place and writes it.
    fn close(&mut self) -> Result<()> {
        let place = self.places.take(1);
        if !self.tables.close(place.first) {
            return Err(misuse(format!("no table for cluster {}", place.first)));
        }
        self.piece.table(place.first);
        Ok(self.output.write_all_at(&self.tables.table, place.offset())?)
    }

    /// Writes the refcount blocks behind everything else; they count themselves. Answers where the image ends, in clusters.
    fn write_refcounts(&mut self) -> Result<u64> {
        let used = self.tables.occupied.end();
        let mut blocks = 0;
        while (used + blocks).div_ceil(PER_BLOCK) > blocks {
            blocks = (used + blocks).div_ceil(PER_BLOCK);
        }
        let end = used + blocks;
        for block in 0..blocks {
            let (from, to) = (block * PER_BLOCK, ((block + 1) * PER_BLOCK).min(end));
            let counts = self.tables.table.as_chunks_mut::<2>().0;
            counts.fill([0, 0]);
            counts[..(to - from) as usize].fill(1u16.to_be_bytes());
            for (a, b) in self.tables.occupied.gaps(from, to) {
                counts[(a - from) as usize..(b - from) as usize].fill([0, 0]);
            }
            let host = (used + block) * CLUSTER;
            self.output.write_all_at(&self.tables.table, host)?;
            self.tables.front.set_refcount_block(block, host)?;
        }
        Ok(end)
    }
}

impl DiskWriter for PlainWriter {
    fn write_block(&mut self, block: &Encoded) -> Result<()> {
        for (mut index, _, mut bytes) in raw::runs(block) {
            while !bytes.is_empty() {
                let span = self.places.take((bytes.len() / UNIT) as u64);
                let (now, later) = bytes.split_at(span.count as usize * UNIT);
                self.output.write_all_at(now, span.offset())?;
                self.note(Place { index, span })?;
                index += span.count;
                bytes = later;
            }
        }
        Ok(())
    }

    fn hot(&self) -> Option<Hot> {
        Some(Hot::Places(self.places.clone()))
    }

    fn took_block(&mut self, block: &Encoded) -> Result<()> {
        block.placed.iter().try_for_each(|place| self.note(*place))
    }

    fn position(&self) -> u64 {
        self.tables.position()
    }

    fn checkpoint(&mut self) -> Result<Vec<u8>> {
        Ok(self.piece.take())
    }

    fn finish(&mut self) -> Result<u64> {
        if self.tables.range.is_some() {
            self.close()?;
        }
        let end = self.write_refcounts()?;
        self.tables.front.write(&self.output, &mut self.tables.table)?;
        Ok(end * CLUSTER)
    }
}

#[cfg(test)]
impl PlainWriter {
    /// A writer whose next place is cluster `next`, as if those before had been handed out and never come.
    pub(super) fn starting_at(output: Output, capacity: u64, next: u64) -> Result<Self> {
        let mut writer = Self::new(output, capacity)?;
        let mut skipped = writer.tables.occupied.clone();
        assert!(skipped.add(Span { first: skipped.end(), count: next - skipped.end() }));
        writer.places = Arc::new(Places::new(&skipped));
        Ok(writer)
    }
}

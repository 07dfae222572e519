//! The journal piece of a qcow2 writer: the sequence of its units, and of a plain image where they lie.
//!
//! Owns: the encoding. Never: knows where a unit of a compressed image lies; that follows from the sequence.
//! A crash here costs nothing.

use super::super::disk::{FormatError, Result};
use super::corrupt;

/// What happened since the last checkpoint. Each number is a LEB128 varint whose two low bits say what the rest is:
/// 0: so many plain units, 1: one compressed unit of so many bytes, 2: so many units absent, 3: twice a cluster of the file, in which the next
/// plain unit lies, or, with the lowest bit set, the L2 table of the units before.
#[derive(Debug, Default)]
pub(super) struct Piece {
    bytes: Vec<u8>,
    /// Unit behind the last one.
    next: u64,
    /// Plain units not yet in `bytes`.
    run: u64,
    /// Cluster behind the last plain unit whose place was told.
    host: Option<u64>,
}

/// One number of a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Plain(u64),
    Packed(u64),
    Absent(u64),
    Cluster(u64),
    Table(u64),
}

/// The numbers of a piece; an error is the last of them.
pub(super) fn steps(mut piece: &[u8]) -> impl Iterator<Item = Result<Step>> {
    std::iter::from_fn(move || {
        if piece.is_empty() {
            return None;
        }
        let step = read_varint(&mut piece).map(|number| match (number & 3, number >> 2) {
            (0, count) => Step::Plain(count),
            (1, len) => Step::Packed(len),
            (2, count) => Step::Absent(count),
            (_, place) if place & 1 == 0 => Step::Cluster(place >> 1),
            (_, place) => Step::Table(place >> 1),
        });
        if step.is_err() {
            piece = &[];
        }
        Some(step)
    })
}

impl Piece {
    /// An empty piece whose first unit is counted from `next`.
    pub(super) fn from(next: u64) -> Self {
        Self { next, ..Self::default() }
    }

    pub(super) fn plain(&mut self, index: u64, count: u64) {
        self.skip_to(index);
        self.run += count;
        self.next = index + count;
    }

    /// Plain units that lie in the file from cluster `host` on.
    pub(super) fn placed(&mut self, index: u64, count: u64, host: u64) {
        if self.host != Some(host) {
            self.end_run();
            self.skip_to(index);
            varint(host << 3 | 3, &mut self.bytes);
        }
        self.plain(index, count);
        self.host = Some(host + count);
    }

    /// The L2 table of the units before lies in cluster `host`.
    pub(super) fn table(&mut self, host: u64) {
        self.end_run();
        varint(host << 3 | 7, &mut self.bytes);
    }

    pub(super) fn packed(&mut self, index: u64, len: usize) {
        self.skip_to(index);
        self.end_run();
        varint((len as u64) << 2 | 1, &mut self.bytes);
        self.next = index + 1;
    }

    fn skip_to(&mut self, index: u64) {
        if index > self.next {
            self.end_run();
            varint((index - self.next) << 2 | 2, &mut self.bytes);
            self.next = index;
        }
    }

    fn end_run(&mut self) {
        if self.run > 0 {
            varint(self.run << 2, &mut self.bytes);
            self.run = 0;
        }
    }

    pub(super) fn take(&mut self) -> Vec<u8> {
        self.end_run();
        self.host = None;
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

pub(super) fn bad_piece() -> FormatError {
    corrupt("journal", 0, 0, "a checkpoint's piece is not a sequence of units")
}

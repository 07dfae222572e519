//! The journal piece of a qcow2 writer: the sequence of its units.
//!
//! Owns: the encoding. Never: knows where a unit lies; that follows from the sequence.
//! A crash here costs nothing.

use super::super::disk::{FormatError, Result};
use super::corrupt;

/// The sequence of units since the last checkpoint. Each number is a LEB128 varint whose two low bits say what the rest counts:
/// 0: so many plain units, 1: one compressed unit of so many bytes, 2: so many units absent.
#[derive(Debug, Default)]
pub(super) struct Piece {
    bytes: Vec<u8>,
    /// Unit behind the last one.
    next: u64,
    /// Plain units not yet in `bytes`.
    run: u64,
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

pub(super) fn read_varint(bytes: &mut &[u8]) -> Result<u64> {
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

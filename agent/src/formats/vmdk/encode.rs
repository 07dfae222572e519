//! Grains of a streamOptimized VMDK, compressed.
//!
//! Owns: deflating the non-zero units of a block. Never: touches a file; runs on as many threads as the pipeline likes.
//! A crash here costs nothing: same input, same bytes.

use super::super::deflate::{Deflate, filled, over_bound};
use super::super::disk::{EncodeState, Encoded, Encoder, Result};

/// Encoder of streamOptimized grains: one unit, one grain, always deflated (the format has no other kind).
#[derive(Clone, Copy, Debug)]
pub struct StreamEncoder {
    level: i32,
}

impl StreamEncoder {
    /// An encoder at libdeflate's `level`, 0 to 12, or [`super::super::deflate::FAST`].
    pub fn new(level: i32) -> Result<Self> {
        Deflate::new(level)?;
        Ok(Self { level })
    }
}

impl Encoder for StreamEncoder {
    fn state(&self) -> Result<Box<dyn EncodeState>> {
        Ok(Box::new(State { deflate: Deflate::new(self.level)?, padded: Vec::new() }))
    }
}

struct State {
    deflate: Deflate,
    /// The disk's last unit, filled up; empty until one comes.
    padded: Vec<u8>,
}

impl EncodeState for State {
    fn append(&mut self, index: u64, unit: &[u8], out: &mut Encoded) -> Result<()> {
        let unit = filled(unit, &mut self.padded);
        let len = self.deflate.zlib(unit, out.room(self.deflate.bound()))?.ok_or_else(|| over_bound(unit.len()))?;
        out.take(index, len, true);
        Ok(())
    }
}

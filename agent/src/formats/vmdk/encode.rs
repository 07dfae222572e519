//! Grains of a streamOptimized VMDK, compressed.
//!
//! Owns: deflating the non-zero units of a block. Never: touches a file; runs on as many threads as the pipeline likes.
//! A crash here costs nothing: same input, same bytes.

use std::io;

use libdeflater::{CompressionLvl, Compressor};

use super::super::disk::{EncodeState, Encoded, Encoder, FormatError, Result, UNIT, Unit, is_zero};

/// Encoder of streamOptimized grains: one unit, one grain, always deflated (the format has no other kind).
#[derive(Clone, Copy, Debug)]
pub struct StreamEncoder {
    level: CompressionLvl,
}

impl StreamEncoder {
    /// An encoder at libdeflate's `level`, 0 to 12.
    pub fn new(level: i32) -> Result<Self> {
        let level =
            CompressionLvl::new(level).map_err(|_| FormatError::Unsupported(format!("vmdk: deflate level {level}; 0 to 12 are known")))?;
        Ok(Self { level })
    }
}

impl Encoder for StreamEncoder {
    fn state(&self) -> Result<Box<dyn EncodeState>> {
        let mut compressor = Compressor::new(self.level);
        let bound = compressor.zlib_compress_bound(UNIT);
        Ok(Box::new(State { compressor, bound, padded: Vec::new() }))
    }
}

struct State {
    compressor: Compressor,
    /// Most bytes that one unit can become.
    bound: usize,
    /// The disk's last unit, filled up; empty until one comes.
    padded: Vec<u8>,
}

impl EncodeState for State {
    fn encode(&mut self, offset: u64, data: &[u8], out: &mut Encoded) -> Result<()> {
        out.clear();
        if !offset.is_multiple_of(UNIT as u64) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("a block at byte {offset} does not start at a multiple of {UNIT}"),
            )
            .into());
        }
        let Self { compressor, bound, padded } = self;
        for (k, unit) in data.chunks(UNIT).enumerate() {
            if is_zero(unit) {
                continue;
            }
            let unit = if unit.len() == UNIT {
                unit
            } else {
                padded.clear();
                padded.extend_from_slice(unit);
                padded.resize(UNIT, 0);
                padded.as_slice()
            };
            let start = out.bytes.len();
            out.bytes.resize(start + *bound, 0);
            let len = compressor.zlib_compress(unit, &mut out.bytes[start..]).map_err(|e| io::Error::other(e.to_string()))?;
            out.bytes.truncate(start + len);
            out.units.push(Unit { index: offset / UNIT as u64 + k as u64, start, len, compressed: true });
        }
        Ok(())
    }
}

//! Encoding of clusters: pure, one state a thread.
//!
//! Owns: the choice of compressing a cluster or storing it as it is. Never: touches a file. A crash here costs nothing.

use std::io;

use super::super::disk::{Compression, EncodeState, Encoded, Encoder as Encode, FormatError, Method, Result, UNIT, Unit, is_zero};
use super::super::raw;

/// Encoder of the clusters of a qcow2 image.
#[derive(Clone, Copy, Debug)]
pub struct Encoder {
    compression: Option<Compression>,
}

impl Encoder {
    /// Without `compression` clusters are stored as they are. Refused when the level is not one of the method's.
    pub fn new(compression: Option<Compression>) -> Result<Self> {
        if let Some(compression) = compression {
            Packer::new(compression)?;
        }
        Ok(Self { compression })
    }
}

impl Encode for Encoder {
    fn state(&self) -> Result<Box<dyn EncodeState>> {
        let Some(compression) = self.compression else { return raw::Encoder.state() };
        Ok(Box::new(State { packer: Packer::new(compression)?, padded: Vec::new() }))
    }
}

/// One of the two compressors.
enum Packer {
    Deflate(libdeflater::Compressor),
    Zstd(zstd::bulk::Compressor<'static>),
}

impl Packer {
    fn new(compression: Compression) -> Result<Self> {
        let level = compression.level;
        match compression.method {
            Method::Deflate => libdeflater::CompressionLvl::new(level)
                .map(|level| Self::Deflate(libdeflater::Compressor::new(level)))
                .map_err(|_| FormatError::Unsupported(format!("deflate level {level}; 0 to 12 are allowed"))),
            Method::Zstd if !(1..=22).contains(&level) => Err(FormatError::Unsupported(format!("zstd level {level}; 1 to 22 are allowed"))),
            Method::Zstd => Ok(Self::Zstd(zstd::bulk::Compressor::new(level)?)),
        }
    }

    /// Length of the stream in `out`; `None` when it would not be shorter than `out`.
    fn pack(&mut self, data: &[u8], out: &mut [u8]) -> Result<Option<usize>> {
        match self {
            Self::Deflate(deflate) => match deflate.deflate_compress(data, out) {
                Ok(len) => Ok(Some(len)),
                Err(libdeflater::CompressionError::InsufficientSpace) => Ok(None),
            },
            Self::Zstd(zstd) => match zstd.compress_to_buffer(data, out) {
                Ok(len) => Ok(Some(len)),
                // The only error that one-shot compression of a cluster can meet; anything else shows when the cluster is read back.
                Err(e) if e.kind() == io::ErrorKind::Other => Ok(None),
                Err(e) => Err(e.into()),
            },
        }
    }
}

/// State of one thread.
struct State {
    packer: Packer,
    /// The disk's last cluster, filled up with zeros.
    padded: Vec<u8>,
}

impl EncodeState for State {
    fn encode(&mut self, offset: u64, data: &[u8], out: &mut Encoded) -> Result<()> {
        out.units.clear();
        // The buffer keeps its length, so that it is not filled with zeros for each block; units say which of its bytes count.
        let most = data.len().next_multiple_of(UNIT);
        if out.bytes.len() < most {
            out.bytes.resize(most, 0);
        }
        let first = offset / UNIT as u64;
        let mut at = 0;
        for (i, unit) in data.chunks(UNIT).enumerate() {
            if is_zero(unit) {
                continue;
            }
            let unit = if unit.len() == UNIT {
                unit
            } else {
                self.padded.clear();
                self.padded.extend_from_slice(unit);
                self.padded.resize(UNIT, 0);
                &self.padded
            };
            let index = first + i as u64;
            let room = &mut out.bytes[at..at + UNIT];
            let unit = match self.packer.pack(unit, &mut room[..UNIT - 1])? {
                Some(len) => Unit { index, start: at, len, compressed: true },
                None => {
                    room.copy_from_slice(unit);
                    Unit { index, start: at, len: UNIT, compressed: false }
                }
            };
            out.units.push(unit);
            at += unit.len;
        }
        Ok(())
    }
}

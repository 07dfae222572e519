//! Deflate with one choice of level, for every format that knows it.
//!
//! Owns: the compressors and what "fast" means: ISA-L's level 1 where the feature `isal` is built in, else libdeflate's.
//! Never: knows of a format. A crash here costs nothing: same input, same build, same bytes.

use std::io;

use libdeflater::{CompressionError, CompressionLvl, Compressor};

use super::disk::{FormatError, Result, UNIT};

/// The level that stands for "as fast as this build can".
pub const FAST: i32 = -1;

/// Compressor of one thread.
pub struct Deflate {
    coder: Coder,
    /// Most bytes that a unit becomes.
    bound: usize,
}

enum Coder {
    Libdeflate(Box<Compressor>),
    #[cfg(feature = "isal")]
    Isal,
}

/// How the stream is wrapped.
#[derive(Clone, Copy)]
enum Wrap {
    Zlib,
    Raw,
}

impl Deflate {
    /// A compressor at libdeflate's `level`, 0 to 12, or at [`FAST`].
    pub fn new(level: i32) -> Result<Self> {
        #[cfg(feature = "isal")]
        if level == FAST {
            // Stored blocks of 64 KiB less one with five bytes each, two of header, four of checksum; ISA-L asks for some more to work in.
            return Ok(Self { coder: Coder::Isal, bound: UNIT + 512 });
        }
        let level = if level == FAST { 1 } else { level };
        let level =
            CompressionLvl::new(level).map_err(|_| FormatError::Unsupported(format!("deflate level {level}; 0 to 12 are known")))?;
        let mut compressor = Box::new(Compressor::new(level));
        let bound = compressor.zlib_compress_bound(UNIT);
        Ok(Self { coder: Coder::Libdeflate(compressor), bound })
    }

    /// Most bytes that one unit of [`UNIT`] bytes becomes.
    pub fn bound(&self) -> usize {
        self.bound
    }

    /// Compresses into `out`, wrapped after RFC 1950; `None` when it does not fit.
    pub fn zlib(&mut self, data: &[u8], out: &mut [u8]) -> Result<Option<usize>> {
        self.pack(data, out, Wrap::Zlib)
    }

    /// Compresses into `out`, the bare stream of RFC 1951; `None` when it does not fit.
    pub fn raw(&mut self, data: &[u8], out: &mut [u8]) -> Result<Option<usize>> {
        self.pack(data, out, Wrap::Raw)
    }

    fn pack(&mut self, data: &[u8], out: &mut [u8], wrap: Wrap) -> Result<Option<usize>> {
        match &mut self.coder {
            Coder::Libdeflate(compressor) => {
                let packed = match wrap {
                    Wrap::Zlib => compressor.zlib_compress(data, out),
                    Wrap::Raw => compressor.deflate_compress(data, out),
                };
                match packed {
                    Ok(len) => Ok(Some(len)),
                    Err(CompressionError::InsufficientSpace) => Ok(None),
                }
            }
            #[cfg(feature = "isal")]
            Coder::Isal => {
                let codec = match wrap {
                    Wrap::Zlib => isal::Codec::Zlib,
                    Wrap::Raw => isal::Codec::Deflate,
                };
                match isal::compress_into(data, out, isal::CompressionLevel::One, codec) {
                    Ok(len) => Ok(Some(len)),
                    Err(isal::error::Error::CompressionError(isal::CompCode::StatelessOverflow)) => Ok(None),
                    Err(e) => Err(io::Error::other(format!("ISA-L: {e}")).into()),
                }
            }
        }
    }
}

/// `unit`, filled up with zeros to [`UNIT`] in `padded` when it is short.
pub fn filled<'a>(unit: &'a [u8], padded: &'a mut Vec<u8>) -> &'a [u8] {
    if unit.len() == UNIT {
        return unit;
    }
    padded.clear();
    padded.extend_from_slice(unit);
    padded.resize(UNIT, 0);
    padded
}

/// What cannot be: a unit that does not fit into [`Deflate::bound`].
pub fn over_bound(len: usize) -> FormatError {
    io::Error::other(format!("deflate made more of {len} bytes than its bound")).into()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn every_level_gives_back_what_it_was_given_and_incompressible_units_fit_the_bound() {
        let text: Vec<u8> = (0..UNIT as u32).map(|i| (i / 7 % 251) as u8).collect();
        let mut state = 1u64;
        let noise: Vec<u8> = std::iter::repeat_with(|| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 56) as u8
        })
        .take(UNIT)
        .collect();
        let mut plain = vec![0u8; UNIT];
        for level in -1..=12 {
            let mut deflate = Deflate::new(level).unwrap();
            let mut out = vec![0u8; deflate.bound()];
            for data in [&text, &noise] {
                let len = deflate.zlib(data, &mut out).unwrap().unwrap();
                let made = libdeflater::Decompressor::new().zlib_decompress(&out[..len], &mut plain).unwrap();
                assert!(made == UNIT && plain == *data, "level {level}");
                let len = deflate.raw(data, &mut out).unwrap().unwrap();
                libdeflater::Decompressor::new().deflate_decompress(&out[..len], &mut plain).unwrap();
                assert!(plain == *data, "level {level}");
            }
            assert!(deflate.raw(&noise, &mut out[..UNIT - 1]).unwrap().is_none(), "level {level}");
        }
        assert!(Deflate::new(13).is_err() && Deflate::new(-2).is_err());
    }
}

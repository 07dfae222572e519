//! Deflate with one choice of level, for every format that knows it.
//!
//! Owns: the compressors and what "fast" means: ISA-L's level 1 where the feature `isal` is built in, else libdeflate's.
//! Never: knows of a format. A crash here costs nothing: same input, same build, same bytes.

use std::io;

use flate2::{Compress, FlushCompress, Status};
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
    /// zlib with a window of 4 KiB; bare streams only.
    Narrow(Compress),
}

/// Base-2 logarithm of the window that qemu-img gives zlib for qcow2.
const NARROW: u8 = 12;

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

    /// A compressor of bare streams whose distances are at most 4 KiB, at zlib's `level`, 1 to 9, or at [`FAST`].
    pub fn narrow(level: i32) -> Result<Self> {
        let level = if level == FAST { 1 } else { level };
        let level = u32::try_from(level)
            .ok()
            .filter(|level| (1..=9).contains(level))
            .ok_or_else(|| FormatError::Unsupported(format!("deflate level {level} with a narrow window; 1 to 9 are known")))?;
        let compress = Compress::new_with_window_bits(flate2::Compression::new(level), false, NARROW);
        // Stored blocks with five bytes each, however small they become.
        Ok(Self { coder: Coder::Narrow(compress), bound: UNIT + UNIT / 16 + 64 })
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
            Coder::Narrow(_) if matches!(wrap, Wrap::Zlib) => Err(FormatError::Unsupported("a narrow window is for qcow2 only".to_owned())),
            Coder::Narrow(compress) => {
                compress.reset();
                let status = compress.compress(data, out, FlushCompress::Finish).map_err(io::Error::other)?;
                let len = usize::try_from(compress.total_out()).unwrap_or(usize::MAX);
                Ok((status == Status::StreamEnd).then_some(len))
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
#[allow(clippy::unwrap_used, clippy::disallowed_methods)]
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

    /// What zlib makes of a stream when it is given a window of 4 KiB and no more: 1 KiB at a time, so that what is further back is gone.
    fn inflate_in_4_kib(stream: &[u8]) -> Option<Vec<u8>> {
        use std::io::Write;
        const READER: &str = "import sys, zlib
inflate, rest, out = zlib.decompressobj(-12), sys.stdin.buffer.read(), sys.stdout.buffer
while not inflate.eof:
    piece = inflate.decompress(rest, 1024)
    rest = inflate.unconsumed_tail
    if not piece and not rest and not inflate.eof:
        sys.exit('the stream is cut')
    out.write(piece)";
        let mut python = std::process::Command::new("python3");
        let pipes = python.args(["-c", READER]).stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
        let mut child = pipes.stderr(std::process::Stdio::null()).spawn().expect("this test needs python3");
        child.stdin.take().unwrap().write_all(stream).unwrap();
        let said = child.wait_with_output().unwrap();
        said.status.success().then_some(said.stdout)
    }

    #[test]
    fn a_narrow_stream_needs_no_more_than_4_kib_and_a_wide_one_does() {
        // Noise that comes again after 16 KiB: only a wide window sees it.
        let mut state = 7u64;
        let mut noise = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 56) as u8
        };
        let piece: Vec<u8> = (0..16 << 10).map(|_| noise()).collect();
        let near: Vec<u8> = piece[..1000].to_vec();
        let data: Vec<u8> = piece.iter().chain(&near).chain(&near).copied().cycle().take(UNIT).collect();
        let mut out = vec![0u8; 2 * UNIT];
        let wide = Deflate::new(6).unwrap().raw(&data, &mut out).unwrap().unwrap();
        assert!(wide < UNIT / 2 && inflate_in_4_kib(&out[..wide]).is_none());
        for level in [FAST, 1, 6, 9] {
            let mut deflate = Deflate::narrow(level).unwrap();
            for _ in 0..2 {
                let len = deflate.raw(&data, &mut out).unwrap().unwrap();
                assert!(len > wide && len < UNIT, "level {level}: {len}");
                assert!(inflate_in_4_kib(&out[..len]).unwrap() == data, "level {level}");
            }
            let noise: Vec<u8> = (0..UNIT).map(|_| noise()).collect();
            assert!(deflate.raw(&noise, &mut out[..UNIT - 1]).unwrap().is_none());
            let bound = deflate.bound();
            assert!(deflate.raw(&noise, &mut out[..bound]).unwrap().is_some());
            assert!(deflate.zlib(&data, &mut out).is_err());
        }
        assert!(Deflate::narrow(0).is_err() && Deflate::narrow(10).is_err());
    }
}

//! Encoding of clusters: pure, one state a thread.
//!
//! Owns: the choice of compressing a cluster or storing it as it is. Never: touches a file. A crash here costs nothing.

use std::io;

use super::super::deflate::{Deflate, filled};
use super::super::disk::{Compression, EncodeState, Encoded, Encoder as Encode, FormatError, Method, Result, UNIT};
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
    Deflate(Deflate),
    Zstd(zstd::bulk::Compressor<'static>),
}

impl Packer {
    fn new(compression: Compression) -> Result<Self> {
        let level = compression.level;
        match compression.method {
            Method::Deflate if compression.narrow => Deflate::narrow(level).map(Self::Deflate),
            Method::Deflate => Deflate::new(level).map(Self::Deflate),
            Method::Zstd if !(1..=22).contains(&level) => Err(FormatError::Unsupported(format!("zstd level {level}; 1 to 22 are allowed"))),
            Method::Zstd => Ok(Self::Zstd(zstd::bulk::Compressor::new(level)?)),
        }
    }

    /// Length of the stream in `out`; `None` when it would not be shorter than `out`.
    fn pack(&mut self, data: &[u8], out: &mut [u8]) -> Result<Option<usize>> {
        match self {
            Self::Deflate(deflate) => deflate.raw(data, out),
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
    fn append(&mut self, index: u64, unit: &[u8], out: &mut Encoded) -> Result<()> {
        let unit = filled(unit, &mut self.padded);
        let room = out.room(UNIT);
        match self.packer.pack(unit, &mut room[..UNIT - 1])? {
            Some(len) => out.take(index, len, true),
            None => {
                room.copy_from_slice(unit);
                out.take(index, UNIT, false);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_narrow_encoder_packs_narrow() {
        // A thousand bytes that come again after 16 KiB.
        let unit: Vec<u8> = (0..UNIT as u32).map(|i| (i % (16 << 10)).wrapping_mul(2_654_435_761).to_be_bytes()[0]).collect();
        let mut out = vec![0u8; 2 * UNIT];
        let mut packed = |mut deflate: Deflate| {
            let len = deflate.raw(&unit, &mut out).unwrap().unwrap();
            out[..len].to_vec()
        };
        let (narrow, wide) = (packed(Deflate::narrow(6).unwrap()), packed(Deflate::new(6).unwrap()));
        assert_ne!(narrow, wide);
        for (expected, compression) in
            [(&narrow, Compression { narrow: true, ..Compression::new(Method::Deflate, 6) }), (&wide, Compression::new(Method::Deflate, 6))]
        {
            let mut encoded = Encoded::default();
            Encoder::new(Some(compression)).unwrap().state().unwrap().append(0, &unit, &mut encoded).unwrap();
            assert!(encoded.bytes[..encoded.units[0].len] == **expected, "{compression:?}");
        }
    }
}

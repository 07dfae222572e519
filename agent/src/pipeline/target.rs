//! What a disk is written as.
//!
//! Owns: the choice of encoder, writer and reader by format, in one place.
//! Never: guesses a format: it is always named by the job or the manifest.
//! A crash here costs nothing.

use std::sync::Arc;

use crate::formats::{Compression, Disk, DiskWriter, Encoder, FormatError, Method, Output, Result, Window, qcow2, raw, vmdk};

use super::Format;

/// Deflate level of a VMDK when none is asked for: twice as fast as 6 for 4 % more bytes.
const VMDK_LEVEL: i32 = 1;

/// How each disk of a job is written.
#[derive(Clone, Copy, Debug)]
pub(super) enum Target {
    Raw,
    Qcow2(Option<Compression>),
    /// streamOptimized: deflate level and content id.
    Stream(i32, u32),
}

impl Target {
    /// The target of a job; refused when the format does not know the compression.
    pub(super) fn new(format: Format, compression: Option<Compression>, cid: u32) -> Result<Self> {
        let target = match (format, compression) {
            (Format::Raw, None) => Self::Raw,
            (Format::Raw, Some(_)) => {
                return Err(FormatError::Unsupported("raw disks are not compressed; leave compression out or choose qcow2".to_owned()));
            }
            (Format::Qcow2, compression) => Self::Qcow2(compression),
            (_, Some(Compression { method: Method::Zstd, .. })) => {
                return Err(FormatError::Unsupported("VMDK knows only deflate; choose it, or qcow2 for zstd".to_owned()));
            }
            (_, compression) => Self::Stream(compression.map_or(VMDK_LEVEL, |c| c.level), cid),
        };
        target.encoder()?;
        Ok(target)
    }

    /// Whether units are stored as they are, so that [`raw::split`] encodes them.
    pub(super) fn plain(self) -> bool {
        matches!(self, Self::Raw | Self::Qcow2(None))
    }

    /// What shows at resume that a sealed region is there.
    pub(super) fn evidence(self) -> Evidence {
        match self {
            Self::Raw => Evidence::Blocks,
            Self::Qcow2(None) => Evidence::Placed,
            Self::Qcow2(Some(_)) | Self::Stream(..) => Evidence::Region,
        }
    }

    pub(super) fn is_raw(self) -> bool {
        matches!(self, Self::Raw)
    }

    /// Whether no byte below a checkpoint's position is written again, not even by `finish`.
    pub(super) fn is_stream(self) -> bool {
        matches!(self, Self::Raw | Self::Stream(..))
    }

    /// Bytes at the beginning of a fresh output that `finish` writes again.
    pub(super) fn front(self, fresh_position: u64) -> u64 {
        if matches!(self, Self::Qcow2(_)) { fresh_position } else { 0 }
    }

    pub(super) fn encoder(self) -> Result<Box<dyn Encoder>> {
        Ok(match self {
            Self::Raw => Box::new(raw::Encoder),
            Self::Qcow2(compression) => Box::new(qcow2::Encoder::new(compression)?),
            Self::Stream(level, _) => Box::new(vmdk::StreamEncoder::new(level)?),
        })
    }

    pub(super) fn create(self, output: Output, capacity: u64) -> Result<Box<dyn DiskWriter>> {
        Ok(match self {
            Self::Raw => Box::new(raw::Writer::new(output, capacity)),
            Self::Qcow2(compression) => Box::new(qcow2::Writer::new(output, capacity, compression.map(|c| c.method))?),
            Self::Stream(_, cid) => Box::new(vmdk::StreamWriter::create(output, capacity, cid)?),
        })
    }

    pub(super) fn resume(
        self,
        output: Output,
        capacity: u64,
        pieces: &mut dyn Iterator<Item = Result<Vec<u8>>>,
        position: u64,
    ) -> Result<Box<dyn DiskWriter>> {
        Ok(match self {
            Self::Raw => Box::new(raw::Writer::resume(output, capacity, position)),
            Self::Qcow2(compression) => Box::new(qcow2::Writer::resume(output, capacity, compression.map(|c| c.method), pieces, position)?),
            Self::Stream(..) => Box::new(vmdk::StreamWriter::resume(output, capacity, &pieces.collect::<Result<Vec<_>>>()?, position)?),
        })
    }
}

/// How a sealed region is held against the journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Evidence {
    /// Blocks lie at their own offsets: the digests made while reading will do.
    Blocks,
    /// Units lie as they are where a replay says: their blocks' digests and the replayed tables will do.
    Placed,
    /// The region was hashed when it was sealed.
    Region,
}

/// Opens an output that we wrote for reading back. Damage inside shows when the block in question is read.
pub(super) fn open_output(format: &str, window: Window) -> Result<Arc<dyn Disk>> {
    Ok(match format {
        "raw" => Arc::new(raw::Reader::open(window)?),
        "qcow2" => Arc::new(qcow2::Reader::open_damaged(window)?),
        "vmdk" => Arc::new(vmdk::open_single(window)?),
        other => return Err(FormatError::Unsupported(format!("disks of format {other:?} are not read back; raw, qcow2 and vmdk are"))),
    })
}

//! What a disk is written as.
//!
//! Owns: the choice of encoder, writer and reader by format, in one place.
//! Never: guesses a format: it is always named by the job or the manifest.
//! A crash here costs nothing.

use std::sync::Arc;

use crate::formats::{
    Compression, Disk, DiskWriter, Encoder, FormatError, Method, Output, Packing, Result, Window, chain, deflate, qcow2, raw, vdi, vhd,
    vhdx, vmdk,
};

use super::{Format, Job};

/// How each disk of a job is written.
#[derive(Clone, Copy, Debug)]
pub(super) enum Target {
    Raw,
    Qcow2(Option<Compression>),
    /// streamOptimized: deflate level and content id.
    Stream(i32, u32),
    /// VHDX, VHD, VDI: dynamic, plain, with a UUID and a time.
    Dynamic(Dynamic, [u8; 16], u64),
}

/// Formats that keep a table of blocks at their front.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Dynamic {
    Vhdx,
    Vhd,
    Vdi,
}

impl Target {
    /// The target of a job; refused when the format does not know the compression.
    pub(super) fn new(job: &Job) -> Result<Self> {
        let target = match (job.format, job.compression) {
            (Format::Raw, None) => Self::Raw,
            (Format::Vhdx, None) => Self::Dynamic(Dynamic::Vhdx, uuid(job), job.created),
            (Format::Vhd, None) => Self::Dynamic(Dynamic::Vhd, uuid(job), job.created),
            (Format::Vdi, None) => Self::Dynamic(Dynamic::Vdi, uuid(job), job.created),
            (Format::Raw | Format::Vhdx | Format::Vhd | Format::Vdi, Some(_)) => {
                let text = format!("{} disks are not compressed; leave compression out or choose qcow2", job.format.name());
                return Err(FormatError::Unsupported(text));
            }
            (Format::Qcow2, compression) => Self::Qcow2(compression),
            (_, Some(Compression { method: Method::Zstd, .. })) => {
                return Err(FormatError::Unsupported("VMDK knows only deflate; choose it, or qcow2 for zstd".to_owned()));
            }
            (_, compression) => Self::Stream(compression.map_or(deflate::FAST, |c| c.level), job.cid),
        };
        target.encoder()?;
        if job.disks.iter().any(|disk| disk.base.is_some()) && !matches!(target, Self::Qcow2(Some(_))) {
            return Err(FormatError::Unsupported("only a compressed qcow2 is laid over an earlier state".to_owned()));
        }
        Ok(target)
    }

    /// Whether units are stored as they are, so that [`raw::split`] encodes them.
    pub(super) fn plain(self) -> bool {
        matches!(self, Self::Raw | Self::Qcow2(None) | Self::Dynamic(..))
    }

    /// What a compressed unit of it is, where one can come from elsewhere.
    pub(super) fn packing(self) -> Option<Packing> {
        match self {
            Self::Stream(..) => Some(Packing::Zlib),
            // Nobody says how far back the streams of a source reach.
            Self::Qcow2(Some(Compression { method: Method::Deflate, narrow: false, .. })) => Some(Packing::Deflate),
            _ => None,
        }
    }

    /// What shows at resume that a sealed region is there.
    pub(super) fn evidence(self) -> Evidence {
        match self {
            Self::Raw => Evidence::Blocks,
            Self::Qcow2(None) => Evidence::Placed,
            Self::Qcow2(Some(_)) | Self::Stream(..) | Self::Dynamic(..) => Evidence::Region,
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
        if matches!(self, Self::Qcow2(_) | Self::Dynamic(..)) { fresh_position } else { 0 }
    }

    pub(super) fn encoder(self) -> Result<Box<dyn Encoder>> {
        Ok(match self {
            Self::Raw | Self::Dynamic(..) => Box::new(raw::Encoder),
            Self::Qcow2(compression) => Box::new(qcow2::Encoder::new(compression)?),
            Self::Stream(level, _) => Box::new(vmdk::StreamEncoder::new(level)?),
        })
    }

    /// A writer of disk `number` from its beginning, over the image that `backing` names.
    pub(super) fn create(self, output: Output, capacity: u64, number: usize, backing: Option<&str>) -> Result<Box<dyn DiskWriter>> {
        Ok(match self {
            Self::Raw => Box::new(raw::Writer::new(output, capacity)),
            Self::Qcow2(None) => Box::new(qcow2::PlainWriter::new(output, capacity)?),
            Self::Qcow2(Some(c)) => Box::new(qcow2::Writer::new(output, capacity, c.method)?.over(backing)?),
            Self::Stream(_, cid) => Box::new(vmdk::StreamWriter::create(output, capacity, cid)?),
            Self::Dynamic(Dynamic::Vhdx, id, _) => Box::new(vhdx::Writer::new(output, capacity, of_disk(id, number))?),
            Self::Dynamic(Dynamic::Vhd, id, created) => Box::new(vhd::Writer::new(output, capacity, identity(id, number, created))?),
            Self::Dynamic(Dynamic::Vdi, id, _) => Box::new(vdi::Writer::new(output, capacity, of_disk(id, number))?),
        })
    }

    /// A writer that goes on at a checkpoint.
    pub(super) fn resume(
        self,
        output: Output,
        capacity: u64,
        number: usize,
        backing: Option<&str>,
        pieces: &mut dyn Iterator<Item = Result<Vec<u8>>>,
        position: u64,
    ) -> Result<Box<dyn DiskWriter>> {
        Ok(match self {
            Self::Raw => Box::new(raw::Writer::resume(output, capacity, position)),
            Self::Qcow2(None) => Box::new(qcow2::PlainWriter::resume(output, capacity, pieces, position)?),
            Self::Qcow2(Some(c)) => Box::new(qcow2::Writer::resume(output, capacity, c.method, pieces, position)?.over(backing)?),
            Self::Stream(..) => Box::new(vmdk::StreamWriter::resume(output, capacity, &pieces.collect::<Result<Vec<_>>>()?, position)?),
            Self::Dynamic(Dynamic::Vhdx, id, _) => Box::new(vhdx::Writer::resume(output, capacity, of_disk(id, number), pieces, position)?),
            Self::Dynamic(Dynamic::Vhd, id, created) => {
                Box::new(vhd::Writer::resume(output, capacity, identity(id, number, created), pieces, position)?)
            }
            Self::Dynamic(Dynamic::Vdi, id, _) => Box::new(vdi::Writer::resume(output, capacity, of_disk(id, number), pieces, position)?),
        })
    }
}

/// The same in each attempt of a job: a UUID of version 8 (RFC 9562, section 5.8) from its id.
fn uuid(job: &Job) -> [u8; 16] {
    let mut id = [0u8; 16];
    id.copy_from_slice(&blake3::hash(format!("{} {:08x} {}", job.id, job.cid, job.created).as_bytes()).as_bytes()[..16]);
    id[6] = id[6] & 0x0f | 0x80;
    id[8] = id[8] & 0x3f | 0x80;
    id
}

/// Another one for each disk.
fn of_disk(mut id: [u8; 16], number: usize) -> [u8; 16] {
    id[15] ^= number as u8;
    id
}

fn identity(id: [u8; 16], number: usize, created: u64) -> vhd::Identity {
    vhd::Identity { id: of_disk(id, number), created }
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

/// Opens an output that we wrote as a layer over `below`; its extents are what the layer says and, where `is_whole`, what lies beneath.
pub(super) fn open_layer(window: Window, below: Arc<dyn Disk>, is_whole: bool) -> Result<Arc<dyn Disk>> {
    let top = qcow2::Reader::open_damaged_layer(window)?;
    if top.capacity() != below.capacity() {
        let reason = format!("it has {} bytes and lies over a disk of {}", top.capacity(), below.capacity());
        return Err(FormatError::Refused { format: "qcow2", reason });
    }
    Ok(Arc::new(chain::Laid::new(Arc::new(top), below, is_whole)))
}

/// Opens an output that we wrote for reading back. Damage inside shows when the block in question is read.
pub(super) fn open_output(format: &str, window: Window) -> Result<Arc<dyn Disk>> {
    Ok(match format {
        "raw" => Arc::new(raw::Reader::open(window)?),
        "qcow2" => Arc::new(qcow2::Reader::open_damaged(window)?),
        "vmdk" => Arc::new(vmdk::open_single(window)?),
        "vhdx" => Arc::new(vhdx::Reader::open_damaged(window)?),
        "vhd" => Arc::new(vhd::Reader::open(window)?),
        "vdi" => Arc::new(vdi::Reader::open(window)?),
        other => return Err(FormatError::Unsupported(format!("disks of format {other:?} are not read back"))),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_passed_on_into_a_narrow_window() {
        let wide = Compression::new(Method::Deflate, 1);
        assert_eq!(Target::Qcow2(Some(wide)).packing(), Some(Packing::Deflate));
        assert_eq!(Target::Qcow2(Some(Compression { narrow: true, ..wide })).packing(), None);
    }
}

//! What every disk format is to the rest of the agent: a [`Disk`] to read from, an [`Encoder`] and a [`DiskWriter`] to write with.
//!
//! Owns: the traits, the unit in which formats and pipeline talk, and the one error type of the formats.
//! Never: opens a path (that is the vault's), starts a thread (that is the pipeline's), or guesses a format (that is `sniff`'s).
//! A crash here costs nothing: nothing in this file has state.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::places::{Places, Span};

/// Bytes in one unit of output allocation: a qcow2 cluster and a streamOptimized grain are both 64 KiB as we write them.
pub const UNIT: usize = 64 << 10;

/// A run of the logical disk that holds data. What no extent covers reads as zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// First byte, counted from the start of the logical disk.
    pub offset: u64,
    /// Length in bytes, never 0.
    pub len: u64,
}

/// What went wrong with an image, in words that name the structure.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    /// The image asks for something that we never do for an image that a guest could have written (backing files, absolute extents, …).
    #[error("{format} image refused: {reason}")]
    Refused {
        /// The format's name as the API spells it.
        format: &'static str,
        /// What it asked for, and what would be accepted.
        reason: String,
    },
    /// A structure of the image contradicts itself or the file's length.
    #[error("{format} image is damaged: {what} {index} at byte {offset}: {reason}")]
    Corrupt {
        /// The format's name as the API spells it.
        format: &'static str,
        /// The structure: `grain`, `cluster`, `L2 table`, `grain table`, `header`, …
        what: &'static str,
        /// Which one.
        index: u64,
        /// Where it lies in the file, in bytes.
        offset: u64,
        /// What is wrong with it.
        reason: String,
    },
    /// A valid image of a kind that is not built yet.
    #[error("{0}")]
    Unsupported(String),
    /// The file beneath could not be read or written.
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// Result of the formats.
pub type Result<T, E = FormatError> = std::result::Result<T, E>;

/// Positional reads over a file or a window of one (a tar member). No seek position, so it is shared between threads.
#[derive(Clone, Debug)]
pub struct Window {
    file: Arc<File>,
    base: u64,
    len: u64,
}

impl Window {
    /// The whole file.
    pub fn whole(file: File) -> io::Result<Self> {
        let len = file.metadata()?.len();
        Ok(Self { file: Arc::new(file), base: 0, len })
    }

    /// A part of this window; refused when it does not lie inside.
    pub fn part(&self, offset: u64, len: u64) -> io::Result<Self> {
        let end = offset.checked_add(len).filter(|end| *end <= self.len);
        if end.is_none() {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, format!("bytes {offset}+{len} lie past the end at {}", self.len)));
        }
        Ok(Self { file: self.file.clone(), base: self.base + offset, len })
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// True when there is not a single byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Fills `buf` from `offset`, or fails: a short read is `UnexpectedEof`.
    pub fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let end = offset.checked_add(buf.len() as u64).filter(|end| *end <= self.len);
        if end.is_none() {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!("bytes {offset}+{} lie past the end at {}", buf.len(), self.len),
            ));
        }
        self.file.read_exact_at(buf, self.base + offset)
    }

    /// The data runs of `[from, to)` as the file system knows them (`SEEK_DATA`/`SEEK_HOLE`); where it does not know, one run.
    pub fn data_runs(&self, from: u64, to: u64) -> io::Result<Vec<Extent>> {
        let to = to.min(self.len);
        let mut runs = Vec::new();
        let mut at = from;
        while at < to {
            let start = match rustix::fs::seek(&*self.file, rustix::fs::SeekFrom::Data(self.base + at)) {
                Ok(pos) => pos.saturating_sub(self.base),
                Err(rustix::io::Errno::NXIO) => break,
                Err(rustix::io::Errno::INVAL) => {
                    runs.push(Extent { offset: at, len: to - at });
                    break;
                }
                Err(e) => return Err(e.into()),
            };
            if start >= to {
                break;
            }
            let end = rustix::fs::seek(&*self.file, rustix::fs::SeekFrom::Hole(self.base + start))?.saturating_sub(self.base).min(to);
            runs.push(Extent { offset: start, len: end - start });
            at = end;
        }
        Ok(runs)
    }
}

/// Per-thread working memory of a reader: decompressors and buffers that would otherwise be made anew for each grain.
#[derive(Default)]
pub struct Scratch {
    /// Compressed bytes as they lie in the file.
    pub packed: Vec<u8>,
    /// One grain or cluster, unpacked.
    pub plain: Vec<u8>,
    /// libdeflate's state, made at first use.
    pub inflate: Option<libdeflater::Decompressor>,
    /// zstd's state, made at first use.
    pub zstd: Option<zstd::bulk::Decompressor<'static>>,
}

/// A logical disk that can be read at any offset, from many threads at once.
pub trait Disk: Send + Sync {
    /// The format's name as the API spells it: `raw`, `vmdk`, `qcow2`.
    fn format(&self) -> &'static str;

    /// The subformat where the format has some: `streamOptimized`, `monolithicSparse`, `v3`, …; else empty.
    fn subformat(&self) -> &str {
        ""
    }

    /// Size of the logical disk in bytes.
    fn capacity(&self) -> u64;

    /// Whether `extents` tells holes from data. Where it does not, all is called data, and how much there is shows when it was read.
    fn knows_holes(&self) -> bool {
        true
    }

    /// The data extents of `[from, to)`: sorted, not overlapping, merged where they touch, clipped to the range and the capacity.
    /// Cost follows the number of table entries that exist, never the capacity: an unallocated L1 entry or grain-directory entry is skipped whole.
    fn extents(&self, from: u64, to: u64) -> Result<Vec<Extent>>;

    /// Fills `buf` with the logical bytes from `offset`; holes as zeros. Reading past the capacity is the caller's error and answers `UnexpectedEof`.
    fn read_at(&self, offset: u64, buf: &mut [u8], scratch: &mut Scratch) -> Result<()>;

    /// Unit `unit` as it is stored, when it is stored as one stream of the wanted kind: fills `plain` ([`UNIT`] bytes) as `read_at` would, with
    /// every check that `read_at` makes, and answers the stream, so that it can be passed on instead of being compressed again.
    /// `None`: it is stored otherwise; `plain` is unspecified then.
    fn packed<'s>(&self, unit: u64, want: Packing, plain: &mut [u8], scratch: &'s mut Scratch) -> Result<Option<&'s [u8]>> {
        let _ = (unit, want, plain, scratch);
        Ok(None)
    }

    /// Whether `packed` ever answers with a stream of this kind.
    fn packs(&self, want: Packing) -> bool {
        let _ = want;
        false
    }
}

/// How a compressed unit is wrapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    /// RFC 1950: two bytes of header, the deflate stream, Adler-32. Grains of VMDK.
    Zlib,
    /// RFC 1951: the deflate stream alone. Clusters of qcow2.
    Deflate,
}

/// How hard to compress, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Compression {
    /// The algorithm.
    pub method: Method,
    /// Its own level: deflate 0–12 (libdeflate), zstd 1–22.
    pub level: i32,
    /// Deflate with distances of at most 4 KiB (levels 1–9 of zlib), as qemu-img writes qcow2: for readers that give inflate no more.
    #[serde(default)]
    pub narrow: bool,
}

impl Compression {
    /// Compression with the method's whole window.
    pub fn new(method: Method, level: i32) -> Self {
        Self { method, level, narrow: false }
    }
}

/// The two algorithms that disk formats know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// RFC 1951 (qcow2: raw stream; VMDK: with RFC 1950 header and Adler-32).
    Deflate,
    /// RFC 8878.
    Zstd,
}

/// One non-zero unit of an [`Encoded`] block.
#[derive(Clone, Copy, Debug)]
pub struct Unit {
    /// Number of the 64 KiB unit, counted from the start of the logical disk.
    pub index: u64,
    /// Where its bytes start in [`Encoded::bytes`].
    pub start: usize,
    /// How many they are.
    pub len: usize,
    /// Whether those bytes are compressed; if not, `len` is [`UNIT`] (the disk's last unit padded with zeros).
    pub compressed: bool,
}

/// Where adjacent units of an [`Encoded`] block lie that were written before the block came in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Number of the first unit.
    pub index: u64,
    /// The clusters that they fill.
    pub span: Span,
}

/// How units may be written by whoever has them at hand, before their block comes in order.
#[derive(Clone, Debug)]
pub enum Hot {
    /// At their own offsets, as on the disk, no further than its end.
    Offsets,
    /// In places taken from here; each unit is filled up with zeros.
    Places(Arc<Places>),
}

/// A block as an encoder left it: the non-zero units, ready to be laid into the file.
#[derive(Default)]
pub struct Encoded {
    /// Where units lie that were written already, for [`DiskWriter::took_block`].
    pub placed: Vec<Place>,
    /// Ascending by index; all-zero units are absent.
    pub units: Vec<Unit>,
    /// Holds their bytes, one after the other, and may be longer: units say which of its bytes count.
    pub bytes: Vec<u8>,
}

impl Encoded {
    /// Empties it and keeps the memory.
    pub fn clear(&mut self) {
        self.units.clear();
        self.placed.clear();
    }

    /// `len` bytes behind the last unit, with unspecified content. Grows by whole blocks and never shrinks, so that the memory is not
    /// cleared again for each unit.
    pub fn room(&mut self, len: usize) -> &mut [u8] {
        let used = self.used();
        if self.bytes.len() < used + len {
            self.bytes.resize(used + len, 0);
        }
        &mut self.bytes[used..used + len]
    }

    /// Takes the first `len` bytes of the last [`Encoded::room`] as unit `index`.
    pub fn take(&mut self, index: u64, len: usize, compressed: bool) {
        let start = self.used();
        self.units.push(Unit { index, start, len, compressed });
    }

    fn used(&self) -> usize {
        self.units.last().map_or(0, |unit| unit.start + unit.len)
    }
}

/// Per-thread state of an encoder (compressors, buffers).
pub trait EncodeState: Send {
    /// Adds unit `index`, which is not all zeros, to `out`. The disk's last unit may be short: it is filled up with zeros.
    fn append(&mut self, index: u64, unit: &[u8], out: &mut Encoded) -> Result<()>;

    /// Encodes `data`, which starts at logical byte `offset` (a multiple of [`UNIT`]); all-zero units are left out. `out` is cleared first.
    fn encode(&mut self, offset: u64, data: &[u8], out: &mut Encoded) -> Result<()> {
        out.clear();
        if !offset.is_multiple_of(UNIT as u64) {
            let text = format!("a block at byte {offset} does not start at a multiple of {UNIT}");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text).into());
        }
        for (k, unit) in data.chunks(UNIT).enumerate().filter(|(_, unit)| !is_zero(unit)) {
            self.append(offset / UNIT as u64 + k as u64, unit, out)?;
        }
        Ok(())
    }
}

/// Makes one [`EncodeState`] a thread. Encoding is pure: same input, same bytes.
pub trait Encoder: Send + Sync {
    /// State for one thread.
    fn state(&self) -> Result<Box<dyn EncodeState>>;
}

/// Where a disk is written: a file, from a base offset on (0, or a member's place inside an OVA).
#[derive(Clone, Debug)]
pub struct Output {
    /// The part file, opened for reading and writing.
    pub file: Arc<File>,
    /// First byte of the disk inside the file.
    pub base: u64,
}

impl Output {
    /// Writes all of `bytes` at `offset`, counted from the base.
    pub fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(bytes, self.base + offset)
    }

    /// Fills `buf` from `offset`, counted from the base.
    pub fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buf, self.base + offset)
    }
}

/// Bytes of a block that a writer has given their place in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// First byte in [`Encoded::bytes`].
    pub start: usize,
    /// How many.
    pub len: usize,
    /// Where they go, counted from the output's base.
    pub offset: u64,
}

/// Lays encoded blocks into a file, in order.
///
/// Contract of a resume: everything below `position()` at a checkpoint is final, but for a fixed front region that `finish` writes again whole.
/// A writer made by its `resume` from the pieces of all checkpoints up to one behaves as the writer did right after that checkpoint.
pub trait DiskWriter: Send {
    /// Lays one block's units into the file. Blocks come in ascending order, each once; zero blocks need not come.
    fn write_block(&mut self, block: &Encoded) -> Result<()>;

    /// The same as [`DiskWriter::write_block`], but the units' bytes are left to the caller, who writes them where `runs` (cleared first) says,
    /// from any thread, before the output is synced for the next checkpoint. False, and nothing done, where units have no place of their own.
    fn place_block(&mut self, block: &Encoded, runs: &mut Vec<Run>) -> Result<bool> {
        let _ = (block, runs);
        Ok(false)
    }

    /// How the caller may write units before their block comes; then `took_block` is told of them instead of `write_block`.
    fn hot(&self) -> Option<Hot> {
        None
    }

    /// Takes note of units whose bytes the caller has written as [`DiskWriter::hot`] says. Others refuse.
    fn took_block(&mut self, block: &Encoded) -> Result<()> {
        let text = format!("{} units were written past a writer that places them itself", block.units.len());
        Err(io::Error::new(io::ErrorKind::InvalidInput, text).into())
    }

    /// Bytes of output so far, counted from the base (for raw: the end of the last block written).
    fn position(&self) -> u64;

    /// Hands buffered bytes to the kernel (the caller syncs) and returns the table entries added since the last checkpoint, in the writer's own encoding.
    fn checkpoint(&mut self) -> Result<Vec<u8>>;

    /// Writes what remains of tables, header and footer and returns the output's length in bytes. The caller syncs.
    fn finish(&mut self) -> Result<u64>;
}

/// True when every byte is zero. ORs 256 bytes at a time, which the compiler turns into vector instructions, and stops at the first that are not.
pub fn is_zero(bytes: &[u8]) -> bool {
    bytes.chunks(256).all(|chunk| chunk.iter().fold(0u8, |acc, b| acc | b) == 0)
}

//! The two headers of a VHD: the footer of every image and the dynamic disk header.
//!
//! Owns: their fields, their checksums, the disk's size. Never: reads the block allocation table.
//! A crash here costs nothing.
//!
//! Source: Virtual Hard Disk Image Format Specification 1.0, "Hard Disk Footer Format", "Dynamic Disk Header Format",
//! "Appendix: CHS Calculation". All numbers are big endian.

use super::super::disk::{FormatError, Result, Window};
use super::{FORMAT, SECTOR, corrupt, refused};

/// Largest disk in bytes: 2040 GiB, the limit of Hyper-V and QEMU.
pub const MAX_CAPACITY: u64 = 2040 << 30;

/// Bytes of a footer.
pub(super) const FOOTER: usize = 512;

/// Bytes of a dynamic disk header.
pub(super) const DYNAMIC: usize = 1024;

/// Bytes of the block allocation table that we hold in memory, at most: 512 KiB blocks for the largest disk.
const MAX_TABLE: u64 = 16 << 20;

/// Offset of the checksum in the footer and in the dynamic header.
const FOOTER_SUM: usize = 64;
const DYNAMIC_SUM: usize = 36;

/// First bytes of a footer.
const COOKIE: &[u8] = b"conectix";

/// First bytes of a dynamic disk header.
const SPARSE: &[u8] = b"cxsparse";

const VERSION: u32 = 0x0001_0000;

/// Seconds from 1970 to 2000, where the format's clock starts.
const EPOCH: u64 = 946_684_800;

/// Sectors of the largest geometry (65535 cylinders, 16 heads, 255 sectors): it stands for "larger than a geometry can say".
const MAX_GEOMETRY: u64 = 65_535 * 16 * 255;

/// Creators whose images have exactly the size that the footer names: Hyper-V, QEMU with `force_size`, Disk2vhd, XenServer's tapdisk and
/// XenConvert, as QEMU 7.2 has them, and Azure's exports, which later QEMUs took in.
const EXACT: [&[u8; 4]; 6] = [b"win ", b"qem2", b"d2v ", b"tap\0", b"CTXS", b"wa\0\0"];

/// What tells an image from others: goes into the footer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// 16 bytes that become the image's UUID (its version and variant bits are set to version 8 of RFC 9562, "custom").
    pub id: [u8; 16],
    /// When the image was made, in seconds since 1970; before 2000 and after 2136 the nearest that the format can say.
    pub created: u64,
}

/// What the two kinds of image are called in the footer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// The disk as it is, and a footer.
    Fixed,
    /// Blocks that exist when something was written to them.
    Dynamic,
}

/// Whether the window could be a VHD: a footer's first bytes at its beginning or where a footer at its end would begin.
pub fn looks_like(window: &Window) -> bool {
    has_cookie(window, 0) || footer_place(window.len()).is_some_and(|at| has_cookie(window, at))
}

fn has_cookie(window: &Window, at: u64) -> bool {
    let mut cookie = [0u8; COOKIE.len()];
    window.read_exact_at(&mut cookie, at).is_ok() && cookie == *COOKIE
}

/// Where the footer begins in a file of `len` bytes: in its last sector, which lacks its last byte in images before Virtual PC 2004.
fn footer_place(len: u64) -> Option<u64> {
    matches!(len % SECTOR, 0 | 511).then(|| len.div_ceil(SECTOR) * SECTOR)?.checked_sub(SECTOR)
}

/// One's complement of the sum of all bytes but the checksum's own, which lies at `place`.
fn checksum(bytes: &[u8], place: usize) -> u32 {
    let sum = |part: &[u8]| part.iter().map(|b| u32::from(*b)).sum::<u32>();
    !(sum(&bytes[..place]) + sum(&bytes[place + 4..]))
}

fn be16(bytes: &[u8], at: usize) -> u64 {
    u64::from(bytes[at]) << 8 | u64::from(bytes[at + 1])
}

pub(super) fn be32(bytes: &[u8], at: usize) -> u32 {
    bytes[at..at + 4].iter().fold(0, |value, b| value << 8 | u32::from(*b))
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from(be32(bytes, at)) << 32 | u64::from(be32(bytes, at + 4))
}

fn holds_sum(bytes: &[u8], place: usize) -> Result<(), String> {
    let (told, right) = (be32(bytes, place), checksum(bytes, place));
    if told == right { Ok(()) } else { Err(format!("its checksum is {told:08x}, {right:08x} would be right")) }
}

/// A footer as it was read, and found in order.
#[derive(Debug)]
pub(super) struct Footer {
    /// Where it lies: everything else must lie before.
    pub at: u64,
    pub kind: Kind,
    /// Size of the disk in bytes.
    pub capacity: u64,
    /// Where the dynamic header lies.
    data_offset: u64,
}

impl Footer {
    /// Reads the footer at the file's end and holds a dynamic image's first sector against it.
    pub fn read(window: &Window) -> Result<Self> {
        let at = footer_place(window.len()).filter(|at| has_cookie(window, *at));
        let Some(at) = at else {
            if has_cookie(window, 0) {
                let reason =
                    format!("the file of {} bytes does not end in one, though it begins with its copy; it was cut short", window.len());
                return Err(corrupt("footer", 0, window.len().saturating_sub(SECTOR), reason));
            }
            return Err(refused("there is no footer (conectix) in its last 512 bytes"));
        };
        let mut bytes = [0u8; FOOTER];
        let len = (window.len() - at).min(SECTOR) as usize;
        window.read_exact_at(&mut bytes[..len], at)?;
        let footer = Self::parse(&bytes, at)?;
        footer.hold_front(window, &bytes)?;
        Ok(footer)
    }

    fn parse(bytes: &[u8; FOOTER], at: u64) -> Result<Self> {
        let bad = |reason: String| corrupt("footer", 0, at, reason);
        holds_sum(bytes, FOOTER_SUM).map_err(bad)?;
        let version = be32(bytes, 12);
        if version >> 16 != 1 {
            let (major, minor) = (version >> 16, version & 0xffff);
            return Err(FormatError::Unsupported(format!("{FORMAT}: file format version {major}.{minor}; 1.0 would be right")));
        }
        let kind = match be32(bytes, 60) {
            2 => Kind::Fixed,
            3 => Kind::Dynamic,
            4 => return Err(refused("it is a differencing disk (type 4), which needs its parent; merge the two first")),
            other => return Err(refused(format!("disk type {other}; fixed (2) and dynamic (3) are read"))),
        };
        Ok(Self { at, kind, capacity: capacity(bytes).map_err(bad)?, data_offset: be64(bytes, 16) })
    }

    /// A dynamic image begins with its footer's copy; a fixed one does not begin with a valid footer, which some programs would take
    /// for the image's.
    fn hold_front(&self, window: &Window, bytes: &[u8; FOOTER]) -> Result<()> {
        let mut front = [0u8; FOOTER];
        window.read_exact_at(&mut front[..SECTOR.min(window.len()) as usize], 0)?;
        match self.kind {
            Kind::Dynamic if front[..FOOTER - 1] == bytes[..FOOTER - 1] => Ok(()),
            Kind::Dynamic if front.starts_with(COOKIE) => {
                let field = (0..FOOTER).find(|i| front[*i] != bytes[*i]).unwrap_or(0);
                Err(corrupt("footer copy", 0, 0, format!("it differs from the footer at byte {}, from byte {field} on", self.at)))
            }
            Kind::Dynamic => Err(corrupt("footer copy", 0, 0, "a dynamic image begins with conectix, this one does not")),
            Kind::Fixed if self.at > 0 && front.starts_with(COOKIE) && holds_sum(&front, FOOTER_SUM).is_ok() => {
                Err(corrupt("footer copy", 0, 0, "the footer says fixed, but the first sector is a footer, too"))
            }
            Kind::Fixed => Ok(()),
        }
    }
}

/// The size in bytes, by QEMU's rule: what the footer names for creators that mean it and where the geometry is the largest there is,
/// else what the geometry says.
fn capacity(bytes: &[u8; FOOTER]) -> Result<u64, String> {
    let named = be64(bytes, 48);
    let geometry = be16(bytes, 56) * u64::from(bytes[58]) * u64::from(bytes[59]);
    let exact = EXACT.iter().any(|creator| bytes[28..32] == creator[..]);
    if exact || geometry == MAX_GEOMETRY {
        if named > MAX_CAPACITY {
            return Err(format!("a disk of {named} bytes is over the format's limit of 2040 GiB ({MAX_CAPACITY} bytes)"));
        }
        return Ok(named / SECTOR * SECTOR);
    }
    if geometry == 0 && named > 0 {
        return Err(format!("its geometry is empty, though the disk has {named} bytes, and its creator goes by the geometry"));
    }
    // At most 65535 × 255 × 255 sectors, below the limit.
    Ok(geometry * SECTOR)
}

/// A dynamic disk header as it was read, and held against the file's length.
#[derive(Debug)]
pub(super) struct Dynamic {
    /// Where it lies.
    pub at: u64,
    /// Bytes in a block: a power of two, at least 512.
    pub block_size: u64,
    /// Bytes of the sector bitmap before each block.
    pub bitmap: u64,
    /// Where the block allocation table lies, and how many bytes it has.
    pub table_at: u64,
    pub table_len: u64,
    /// Blocks that the disk needs; the table may have more.
    pub blocks: u64,
}

impl Dynamic {
    pub fn read(window: &Window, footer: &Footer) -> Result<Self> {
        let at = footer.data_offset;
        let bad = |reason: String| corrupt("dynamic header", 0, at, reason);
        let inside = |from: u64, len: u64| {
            from >= SECTOR && from.is_multiple_of(SECTOR) && from.checked_add(len).is_some_and(|end| end <= footer.at)
        };
        if !inside(at, DYNAMIC as u64) {
            return Err(bad(format!("its {DYNAMIC} bytes are no whole sectors between byte {SECTOR} and the footer at {}", footer.at)));
        }
        let mut bytes = [0u8; DYNAMIC];
        window.read_exact_at(&mut bytes, at)?;
        if !bytes.starts_with(SPARSE) {
            return Err(bad("it does not start with cxsparse".to_owned()));
        }
        holds_sum(&bytes, DYNAMIC_SUM).map_err(bad)?;
        let (version, entries, block_size) = (be32(&bytes, 24), u64::from(be32(&bytes, 28)), u64::from(be32(&bytes, 32)));
        if version >> 16 != 1 {
            let (major, minor) = (version >> 16, version & 0xffff);
            return Err(FormatError::Unsupported(format!("{FORMAT}: dynamic header version {major}.{minor}; 1.0 would be right")));
        }
        if !block_size.is_power_of_two() || block_size < SECTOR {
            return Err(bad(format!("a block size of {block_size}; a power of two from {SECTOR} on would be right")));
        }
        let blocks = footer.capacity.div_ceil(block_size);
        if entries < blocks {
            return Err(bad(format!("a table of {entries} entries for a disk of {blocks} blocks")));
        }
        let (table_at, table_len) = (be64(&bytes, 16), entries * 4);
        if !inside(table_at, table_len) {
            let reason = format!("its {table_len} bytes are no whole sectors between byte {SECTOR} and the footer at {}", footer.at);
            return Err(corrupt("block allocation table", 0, table_at, reason));
        }
        if table_at < at + DYNAMIC as u64 && at < table_at + table_len {
            return Err(corrupt("block allocation table", 0, table_at, format!("it shares bytes with the dynamic header at {at}")));
        }
        if blocks * 4 > MAX_TABLE {
            return Err(FormatError::Unsupported(format!(
                "{FORMAT}: blocks of {block_size} bytes make a table of {} bytes for this disk; at most {MAX_TABLE} are read",
                blocks * 4
            )));
        }
        let bitmap = (block_size / SECTOR).div_ceil(8).next_multiple_of(SECTOR);
        Ok(Self { at, block_size, bitmap, table_at, table_len, blocks })
    }
}

/// The geometry of a disk of `sectors`, by the specification's appendix: cylinders, heads, sectors of a track.
fn geometry(sectors: u64) -> (u16, u8, u8) {
    let sectors = sectors.min(MAX_GEOMETRY);
    let (mut track, mut heads) = (17, (sectors / 17).div_ceil(1024).max(4));
    if sectors >= 65_535 * 16 * 63 {
        (track, heads) = (255, 16);
    } else {
        if heads > 16 || sectors / track >= heads * 1024 {
            (track, heads) = (31, 16);
        }
        if sectors / track >= heads * 1024 {
            (track, heads) = (63, 16);
        }
    }
    ((sectors / track / heads) as u16, heads as u8, track as u8)
}

/// The footer of an image that we make. The creator is Hyper-V's ("win ", 10.0): of the names that every reader knows, the one that
/// means the size as it stands.
pub(super) fn footer(kind: Kind, capacity: u64, identity: Identity) -> [u8; FOOTER] {
    let mut bytes = [0u8; FOOTER];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    let (cylinders, heads, track) = geometry(capacity / SECTOR);
    let created = u32::try_from(identity.created.saturating_sub(EPOCH)).unwrap_or(u32::MAX);
    put(0, COOKIE);
    put(8, &2u32.to_be_bytes());
    put(12, &VERSION.to_be_bytes());
    put(16, &if kind == Kind::Dynamic { SECTOR } else { u64::MAX }.to_be_bytes());
    put(24, &created.to_be_bytes());
    put(28, b"win ");
    put(32, &0x000a_0000u32.to_be_bytes());
    put(36, b"Wi2k");
    put(40, &capacity.to_be_bytes());
    put(48, &capacity.to_be_bytes());
    put(56, &cylinders.to_be_bytes());
    put(58, &[heads, track]);
    put(60, &if kind == Kind::Dynamic { 3u32 } else { 2 }.to_be_bytes());
    put(68, &identity.id);
    bytes[74] = bytes[74] & 0x0f | 0x80;
    bytes[76] = bytes[76] & 0x3f | 0x80;
    let sum = checksum(&bytes, FOOTER_SUM).to_be_bytes();
    bytes[FOOTER_SUM..FOOTER_SUM + 4].copy_from_slice(&sum);
    bytes
}

/// The dynamic header of an image that we make: a table of `entries` at `table_at`.
pub(super) fn dynamic(table_at: u64, entries: u32, block_size: u32) -> [u8; DYNAMIC] {
    let mut bytes = [0u8; DYNAMIC];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(0, SPARSE);
    // The specification says 32 bits of ones here; every program writes and expects 64.
    put(8, &u64::MAX.to_be_bytes());
    put(16, &table_at.to_be_bytes());
    put(24, &VERSION.to_be_bytes());
    put(28, &entries.to_be_bytes());
    put(32, &block_size.to_be_bytes());
    let sum = checksum(&bytes, DYNAMIC_SUM).to_be_bytes();
    bytes[DYNAMIC_SUM..DYNAMIC_SUM + 4].copy_from_slice(&sum);
    bytes
}

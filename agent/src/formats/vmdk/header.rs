//! The headers of sparse extents and the markers of a stream, as bytes.
//!
//! Owns: the layout of a hosted extent's 512-byte header (Virtual Disk Format 5.0, "Hosted Sparse Extent Header"), of an ESXi delta's
//! ("ESX Server Sparse Extents") and of the marker sectors.
//! Never: reads a table or follows an offset. A crash here costs nothing: pure functions over bytes.

use super::super::disk::{FormatError, Result};
use super::NAME;

/// Bytes in a sector, the unit of every offset in a VMDK.
pub const SECTOR: u64 = 512;
/// `KDMV`, the first four bytes of a hosted sparse extent.
pub const MAGIC: [u8; 4] = *b"KDMV";
/// `COWD`, the first four bytes of a vmfsSparse extent, the delta that ESXi writes on VMFS 5 and before.
pub const COWD: [u8; 4] = *b"COWD";
/// `gdOffset` of a stream whose grain directory stands in the footer.
pub const GD_AT_END: u64 = u64::MAX;
/// Entries in one grain table of a hosted extent; the specification knows no other number.
pub const GTES: u32 = 512;
/// Entries in one grain table of a vmfsSparse extent.
const COWD_GTES: u32 = 4096;
/// Sectors that a vmfsSparse extent's header takes: no grain lies below.
const COWD_SECTORS: u32 = 4;
/// Sectors that [`GTES`] entries take.
pub const GT_SECTORS: u64 = GTES as u64 * 4 / SECTOR;

const FLAG_NEWLINE: u32 = 1;
const FLAG_REDUNDANT: u32 = 1 << 1;
const FLAG_ZEROED: u32 = 1 << 2;
const FLAG_COMPRESSED: u32 = 1 << 16;
const FLAG_MARKERS: u32 = 1 << 17;
/// Line ends as the header carries them, so that a transfer in text mode shows.
const LINE_ENDS: [u8; 4] = *b"\n \r\n";

/// Marker types (Virtual Disk Format 5.0, "Markers").
pub mod marker {
    /// End of stream.
    pub const EOS: u32 = 0;
    /// A grain table follows.
    pub const GRAIN_TABLE: u32 = 1;
    /// The grain directory follows.
    pub const GRAIN_DIRECTORY: u32 = 2;
    /// The footer follows.
    pub const FOOTER: u32 = 3;

    /// A metadata marker's sector: how many sectors follow, and of what.
    pub fn sector(sectors: u64, kind: u32) -> [u8; 512] {
        let mut out = [0u8; 512];
        out[..8].copy_from_slice(&sectors.to_le_bytes());
        out[12..16].copy_from_slice(&kind.to_le_bytes());
        out
    }

    /// True when the sector is a metadata marker of this kind.
    pub fn is(sector: &[u8; 512], kind: u32) -> bool {
        super::le32(sector, 8) == 0 && super::le32(sector, 12) == kind
    }
}

/// Little-endian u32 at `at`; the caller's slice is long enough.
pub fn le32(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0u8; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

/// Little-endian u64 at `at`; the caller's slice is long enough.
pub fn le64(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0u8; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

/// A checked header. Offsets and sizes are in sectors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Capacity of this extent.
    pub capacity: u64,
    /// Size of a grain: a power of two, 8 to 2048.
    pub grain: u64,
    /// Where the embedded descriptor starts; 0 for none.
    pub descriptor: u64,
    /// Room that the embedded descriptor has.
    pub descriptor_size: u64,
    /// The redundant grain directory, where the flags say that there is one.
    pub redundant: Option<u64>,
    /// The grain directory, or [`GD_AT_END`].
    pub directory: u64,
    /// Entry 1 in a grain table means a grain of zeros.
    pub zeroed: bool,
    /// Grains are deflated and carry a marker.
    pub compressed: bool,
    /// Entries in one grain table: [`GTES`], or 4096 in a vmfsSparse extent.
    pub gtes: u32,
    /// The first sector that a grain may lie on.
    pub first: u32,
}

impl Header {
    /// Reads a header that lies at byte `at` of its file; `what` is `header` or `footer`.
    pub fn parse(sector: &[u8; 512], what: &'static str, at: u64) -> Result<Self> {
        let bad = |reason: String| FormatError::Corrupt { format: NAME, what, index: 0, offset: at, reason };
        if sector[..4] != MAGIC {
            return Err(bad("does not start with KDMV".to_owned()));
        }
        let version = le32(sector, 4);
        if !(1..=3).contains(&version) {
            return Err(FormatError::Unsupported(format!("vmdk: {what} version {version} is not built yet; 1 to 3 are")));
        }
        let flags = le32(sector, 8);
        if flags & FLAG_NEWLINE != 0 && sector[73..77] != LINE_ENDS {
            return Err(bad("its line ends were translated: the file was transferred in text mode".to_owned()));
        }
        let capacity = le64(sector, 12);
        if capacity.checked_mul(SECTOR).is_none_or(|bytes| bytes > i64::MAX as u64) {
            return Err(bad(format!("a capacity of {capacity} sectors overflows")));
        }
        let grain = le64(sector, 20);
        if !grain.is_power_of_two() || !(8..=2048).contains(&grain) {
            return Err(bad(format!("a grain of {grain} sectors is not a power of two from 8 to 2048")));
        }
        let gtes = le32(sector, 44);
        if gtes != GTES {
            return Err(bad(format!("{gtes} entries in a grain table, {GTES} would be right")));
        }
        let compressed = flags & FLAG_COMPRESSED != 0;
        let algorithm = u16::from_le_bytes([sector[77], sector[78]]);
        if compressed != (flags & FLAG_MARKERS != 0) {
            return Err(FormatError::Unsupported(format!(
                "vmdk: flags {flags:#x} (compression without markers, or the reverse) are not built yet"
            )));
        }
        if compressed && algorithm != 1 {
            return Err(FormatError::Unsupported(format!("vmdk: compression algorithm {algorithm} is not built yet; 1 (deflate) is")));
        }
        let redundant = Some(le64(sector, 48)).filter(|gd| flags & FLAG_REDUNDANT != 0 && *gd != 0 && *gd != GD_AT_END);
        Ok(Self {
            capacity,
            grain,
            descriptor: le64(sector, 28),
            descriptor_size: le64(sector, 36),
            redundant,
            directory: le64(sector, 56),
            zeroed: flags & FLAG_ZEROED != 0,
            compressed,
            gtes: GTES,
            first: 1,
        })
    }

    /// Reads the header of a vmfsSparse extent: all fields are 32 bits wide, grains are mostly one sector, nothing is compressed.
    pub fn parse_cowd(sector: &[u8; 512]) -> Result<Self> {
        let bad = |reason: String| FormatError::Corrupt { format: NAME, what: "header", index: 0, offset: 0, reason };
        if sector[..4] != COWD {
            return Err(bad("does not start with COWD".to_owned()));
        }
        let version = le32(sector, 4);
        if version != 1 {
            return Err(FormatError::Unsupported(format!("vmdk: vmfsSparse version {version} is not built yet; 1 is")));
        }
        let capacity = u64::from(le32(sector, 12));
        let grain = u64::from(le32(sector, 16));
        if !grain.is_power_of_two() || grain > 2048 {
            return Err(bad(format!("a grain of {grain} sectors is not a power of two from 1 to 2048")));
        }
        let needed = capacity.div_ceil(grain * u64::from(COWD_GTES));
        let entries = u64::from(le32(sector, 24));
        if entries < needed {
            return Err(bad(format!("a grain directory of {entries} entries; {capacity} sectors need {needed}")));
        }
        Ok(Self {
            capacity,
            grain,
            descriptor: 0,
            descriptor_size: 0,
            redundant: None,
            directory: u64::from(le32(sector, 20)),
            zeroed: false,
            compressed: false,
            gtes: COWD_GTES,
            first: COWD_SECTORS,
        })
    }

    /// A streamOptimized header as we write it: version 3, deflate, markers, `directory` either [`GD_AT_END`] or (in the footer) its sector.
    pub fn stream(capacity: u64, grain: u64, descriptor_size: u64, overhead: u64, directory: u64) -> [u8; 512] {
        let mut out = [0u8; 512];
        out[..4].copy_from_slice(&MAGIC);
        out[4..8].copy_from_slice(&3u32.to_le_bytes());
        out[8..12].copy_from_slice(&(FLAG_NEWLINE | FLAG_COMPRESSED | FLAG_MARKERS).to_le_bytes());
        out[12..20].copy_from_slice(&capacity.to_le_bytes());
        out[20..28].copy_from_slice(&grain.to_le_bytes());
        out[28..36].copy_from_slice(&1u64.to_le_bytes());
        out[36..44].copy_from_slice(&descriptor_size.to_le_bytes());
        out[44..48].copy_from_slice(&GTES.to_le_bytes());
        out[56..64].copy_from_slice(&directory.to_le_bytes());
        out[64..72].copy_from_slice(&overhead.to_le_bytes());
        out[73..77].copy_from_slice(&LINE_ENDS);
        out[77..79].copy_from_slice(&1u16.to_le_bytes());
        out
    }
}

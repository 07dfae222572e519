//! The qcow2 header: parsed, and held against what QEMU allows and what we do.
//!
//! Owns: every refusal that can be made without reading a table, and the name of a backing file.
//! Never: reads past the first cluster, nor more than 112 bytes where no backing file may be followed. A crash here costs nothing.

use super::super::disk::{FormatError, Result, Window};
use super::{MAX_L1_BYTES, MAX_REFTABLE_BYTES, corrupt, refused};

/// `QFI\xfb`.
pub(super) const MAGIC: u32 = 0x5146_49fb;

/// Bytes of a version 2 header.
const V2_LEN: usize = 72;

/// Bytes of the header that we know: version 3 with the compression type.
pub(super) const V3_LEN: usize = 112;

/// Incompatible feature bits (version 3, byte 72).
const DIRTY: u64 = 1 << 0;
const CORRUPT: u64 = 1 << 1;
const DATA_FILE: u64 = 1 << 2;
pub(super) const COMPRESSION: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;

/// Header extension: the backing file's format.
pub(super) const BACKING_FORMAT: u32 = 0xe279_2aca;

/// QEMU's limit of a backing file's name, in bytes.
pub(super) const MAX_BACKING_NAME: u64 = 1023;

/// Header extensions that are looked at; QEMU writes four kinds, each once.
const MAX_EXTENSIONS: usize = 64;

/// QEMU's limit on internal snapshots.
const MAX_SNAPSHOTS: u32 = 65_536;

/// What an image says of the file beneath it, as it stands there: a name from anywhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backing {
    /// The file's name.
    pub name: String,
    /// Its declared format, `None` where it is left to be guessed.
    pub format: Option<String>,
}

/// A header that passed. Lengths and offsets in bytes.
#[derive(Clone, Debug)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Size of the logical disk, rounded up to whole sectors of 512 bytes.
    pub capacity: u64,
    /// log2 of the cluster size, 9 to 21.
    pub cluster_bits: u32,
    /// Whether compressed clusters are zstd frames; else raw deflate streams.
    pub zstd: bool,
    /// Whether the image was not closed properly: its reference counts may be stale, which does not matter to a reader.
    pub dirty: bool,
    /// Number of internal snapshots.
    pub snapshots: u32,
    /// The file beneath; only [`super::Reader::open_layer`] lets an image with one in.
    pub backing: Option<Backing>,
    pub(super) snapshots_offset: u64,
    /// Length of the snapshot table: what its entries take at least, or, once it was read, what they do take.
    pub(super) snapshots_bytes: u64,
    /// Place and length of the L1 table of the disk's present state, where the header was switched to a snapshot's.
    pub(super) active_l1: Option<(u64, u64)>,
    pub(super) l1_entries: u64,
    pub(super) l1_offset: u64,
    pub(super) reftable_offset: u64,
    pub(super) reftable_bytes: u64,
}

impl Header {
    /// Reads and checks the header of an image that is complete in itself. [`FormatError::Refused`] for what we never follow, [`FormatError::Unsupported`] for valid kinds
    /// that are not built, [`FormatError::Corrupt`] for what contradicts the file's length.
    pub fn read(window: &Window) -> Result<Self> {
        Self::parse(window, false)
    }

    /// As [`Header::read`], but an image that lies over another one is let in: [`Header::backing`] says over which. For who only looks.
    pub fn read_layer(window: &Window) -> Result<Self> {
        Self::parse(window, true)
    }

    /// As [`Header::read`], but with `follow` a backing file is noted and not refused.
    pub(super) fn parse(window: &Window, follow: bool) -> Result<Self> {
        if window.len() < V2_LEN as u64 {
            return Err(corrupt("header", 0, 0, format!("the file has {} bytes, a header has at least {V2_LEN}", window.len())));
        }
        let mut bytes = [0u8; V3_LEN];
        let have = bytes.len().min(usize::try_from(window.len()).unwrap_or(usize::MAX));
        window.read_exact_at(&mut bytes[..have], 0)?;
        if u32_at(&bytes, 0) != MAGIC {
            return Err(corrupt("header", 0, 0, "does not start with the magic bytes 51 46 49 fb"));
        }
        let version = u32_at(&bytes, 4);
        if version != 2 && version != 3 {
            return Err(FormatError::Unsupported(format!("qcow2 version {version} is not built; versions 2 and 3 are")));
        }
        let cluster_bits = u32_at(&bytes, 20);
        if !(9..=21).contains(&cluster_bits) {
            return Err(refused(format!("cluster_bits {cluster_bits}; 9 to 21 are allowed")));
        }
        refuse_references(&bytes, follow)?;
        let v3 = if version == 3 { V3::read(&bytes, have, cluster_bits)? } else { V3::default() };
        let snapshots = check_snapshots(&bytes, cluster_bits, window.len())?;

        let size = u64_at(&bytes, 24);
        let capacity = size
            .checked_next_multiple_of(512)
            .filter(|c| *c <= i64::MAX as u64)
            .ok_or_else(|| refused(format!("a size of {size} bytes")))?;
        let backing = if follow { read_backing(window, &bytes, v3.header_len, cluster_bits)? } else { None };
        let header = Self {
            version,
            capacity,
            cluster_bits,
            zstd: v3.zstd,
            dirty: v3.dirty,
            snapshots,
            backing,
            snapshots_offset: u64_at(&bytes, 64),
            snapshots_bytes: u64::from(snapshots) * super::snapshots::MIN_ENTRY,
            active_l1: None,
            l1_entries: u64::from(u32_at(&bytes, 36)),
            l1_offset: u64_at(&bytes, 40),
            reftable_offset: u64_at(&bytes, 48),
            reftable_bytes: u64::from(u32_at(&bytes, 56)) << cluster_bits,
        };
        header.check_tables(window.len())?;
        Ok(header)
    }

    /// Bytes in a cluster.
    pub(super) fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Entries in an L2 table.
    pub(super) fn l2_entries(&self) -> u64 {
        1 << (self.cluster_bits - 3)
    }

    /// L1 entries that the capacity needs.
    pub(super) fn l1_needed(&self) -> u64 {
        self.capacity.div_ceil(1 << (2 * self.cluster_bits - 3))
    }

    fn check_tables(&self, file_len: u64) -> Result<()> {
        self.check_l1(file_len)?;
        if self.reftable_bytes > MAX_REFTABLE_BYTES {
            return Err(refused(format!("a refcount table of {} bytes; at most {MAX_REFTABLE_BYTES} are allowed", self.reftable_bytes)));
        }
        if self.reftable_bytes == 0 {
            return Err(corrupt("refcount table", 0, self.reftable_offset, "the image has none"));
        }
        check_table("refcount table", self.reftable_offset, self.reftable_bytes, self.cluster(), file_len)
    }

    /// Holds the L1 table against the capacity, the limit and the file's length.
    pub(super) fn check_l1(&self, file_len: u64) -> Result<()> {
        let l1_bytes = self.l1_entries * 8;
        if l1_bytes > MAX_L1_BYTES {
            return Err(refused(format!("an L1 table of {l1_bytes} bytes; at most {MAX_L1_BYTES} are allowed")));
        }
        if self.l1_entries < self.l1_needed() {
            let reason = format!("{} entries for a disk of {} bytes, which needs {}", self.l1_entries, self.capacity, self.l1_needed());
            return Err(corrupt("L1 table", 0, self.l1_offset, reason));
        }
        check_table("L1 table", self.l1_offset, l1_bytes, self.cluster(), file_len)
    }
}

/// A table that is not empty starts at a cluster, behind the header, and ends inside the file.
pub(super) fn check_table(what: &'static str, offset: u64, bytes: u64, cluster: u64, file_len: u64) -> Result<()> {
    if bytes == 0 {
        return Ok(());
    }
    if offset == 0 || !offset.is_multiple_of(cluster) {
        return Err(corrupt(what, 0, offset, format!("does not start at a cluster of {cluster} bytes behind the header")));
    }
    match offset.checked_add(bytes) {
        Some(end) if end <= file_len => Ok(()),
        _ => Err(corrupt(what, 0, offset, format!("its {bytes} bytes run past the file's end at {file_len}"))),
    }
}

fn refuse_references(bytes: &[u8; V3_LEN], follow: bool) -> Result<()> {
    if !follow && (u64_at(bytes, 8) != 0 || u32_at(bytes, 16) != 0) {
        return Err(refused(
            "it names a backing file; flatten it first (qemu-img convert), or allow its chain to be followed: \
             else an image must be complete in itself",
        ));
    }
    match u32_at(bytes, 32) {
        0 => Ok(()),
        1 => Err(refused("it is encrypted (AES); decrypt it first")),
        2 => Err(refused("it is encrypted (LUKS); decrypt it first")),
        method => Err(refused(format!("encryption method {method} is unknown; only unencrypted images are read"))),
    }
}

/// Reads name and declared format of the backing file; both lie in the first cluster, the name behind the header extensions.
fn read_backing(window: &Window, bytes: &[u8; V3_LEN], header_len: u64, cluster_bits: u32) -> Result<Option<Backing>> {
    let (offset, len) = (u64_at(bytes, 8), u64::from(u32_at(bytes, 16)));
    if offset == 0 && len == 0 {
        return Ok(None);
    }
    let bad = |reason: String| corrupt("backing file name", 0, offset, reason);
    if len == 0 || len > MAX_BACKING_NAME {
        return Err(bad(format!("{len} bytes long; 1 to {MAX_BACKING_NAME} are allowed")));
    }
    let room = window.len().min(1 << cluster_bits);
    if offset < header_len || offset.checked_add(len).is_none_or(|end| end > room) {
        return Err(bad(format!("its {len} bytes do not lie behind the header and inside the first cluster")));
    }
    let mut name = vec![0u8; len as usize];
    window.read_exact_at(&mut name, offset)?;
    let name = String::from_utf8(name).map_err(|_| bad("it is not UTF-8".to_owned()))?;
    Ok(Some(Backing { name, format: backing_format(window, header_len, offset)? }))
}

/// Looks through the header extensions, which end with type 0 or where the backing file's name starts.
fn backing_format(window: &Window, header_len: u64, end: u64) -> Result<Option<String>> {
    let mut at = header_len;
    for index in 0..MAX_EXTENSIONS as u64 {
        if end - at < 8 {
            return Ok(None);
        }
        let mut head = [0u8; 8];
        window.read_exact_at(&mut head, at)?;
        let [a, b, c, d, e, f, g, h] = head;
        let (kind, len) = (u32::from_be_bytes([a, b, c, d]), u64::from(u32::from_be_bytes([e, f, g, h])));
        at += 8;
        if kind == 0 {
            return Ok(None);
        }
        if len > end - at {
            return Err(corrupt("header extension", index, at - 8, format!("its {len} bytes run into the backing file's name")));
        }
        if kind == BACKING_FORMAT {
            if len > 16 {
                return Err(corrupt("header extension", index, at - 8, format!("a format's name of {len} bytes; at most 16 are allowed")));
            }
            let mut format = vec![0u8; len as usize];
            window.read_exact_at(&mut format, at)?;
            return Ok(Some(String::from_utf8_lossy(&format).into_owned()));
        }
        at += len.next_multiple_of(8).min(end - at);
    }
    Err(corrupt("header extension", MAX_EXTENSIONS as u64, at, format!("over {MAX_EXTENSIONS} extensions")))
}

/// A snapshot table that cannot be one shows a damaged header, whether it is read or not.
fn check_snapshots(bytes: &[u8; V3_LEN], cluster_bits: u32, file_len: u64) -> Result<u32> {
    let count = u32_at(bytes, 60);
    if count > MAX_SNAPSHOTS {
        return Err(refused(format!("{count} internal snapshots; at most {MAX_SNAPSHOTS} are allowed")));
    }
    check_table("snapshot table", u64_at(bytes, 64), u64::from(count) * super::snapshots::MIN_ENTRY, 1 << cluster_bits, file_len)?;
    Ok(count)
}

/// What only version 3 has; the default is what version 2 means.
struct V3 {
    header_len: u64,
    zstd: bool,
    dirty: bool,
}

impl Default for V3 {
    fn default() -> Self {
        Self { header_len: V2_LEN as u64, zstd: false, dirty: false }
    }
}

impl V3 {
    fn read(bytes: &[u8; V3_LEN], have: usize, cluster_bits: u32) -> Result<Self> {
        let header_len = u32_at(bytes, 100);
        if have < 104 || header_len < 104 || u64::from(header_len) > 1 << cluster_bits {
            return Err(corrupt("header", 0, 100, format!("a header length of {header_len} bytes; 104 up to one cluster are allowed")));
        }
        let incompatible = u64_at(bytes, 72);
        if incompatible & DATA_FILE != 0 {
            return Err(refused("its data lies in an external data file; convert it to a self-contained image first"));
        }
        if incompatible & CORRUPT != 0 {
            return Err(corrupt("header", 0, 72, "QEMU has marked the image as corrupt; repair it first (qemu-img check -r)"));
        }
        if incompatible & EXTENDED_L2 != 0 {
            return Err(FormatError::Unsupported(
                "qcow2 with extended L2 entries (subclusters) is not built; convert it with -o extended_l2=off".to_owned(),
            ));
        }
        let unknown = incompatible & !(DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2);
        if unknown != 0 {
            return Err(refused(format!("unknown incompatible features (bits {unknown:#x})")));
        }
        let refcount_order = u32_at(bytes, 96);
        if refcount_order > 6 {
            return Err(refused(format!("refcount_order {refcount_order}; 0 to 6 are allowed")));
        }
        let method = if header_len > 104 { bytes[104] } else { 0 };
        let made = |zstd| Ok(Self { header_len: u64::from(header_len), zstd, dirty: incompatible & DIRTY != 0 });
        match (method, incompatible & COMPRESSION != 0) {
            (0, false) => made(false),
            (1, true) => made(true),
            (0 | 1, _) => Err(corrupt("header", 0, 104, format!("compression type {method} contradicts incompatible feature bit 3"))),
            _ => Err(refused(format!("compression type {method}; 0 (zlib) and 1 (zstd) are allowed"))),
        }
    }
}

/// Big-endian u32 at a fixed place of a header.
pub(super) fn u32_at(bytes: &[u8; V3_LEN], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// Big-endian u64 at a fixed place of a header.
pub(super) fn u64_at(bytes: &[u8; V3_LEN], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) << 32 | u64::from(u32_at(bytes, at + 4))
}

//! The qcow2 header: parsed, and held against what QEMU allows and what we do.
//!
//! Owns: every refusal that can be made without reading a table.
//! Never: reads more than 112 bytes. A crash here costs nothing.

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

/// QEMU's limit on internal snapshots.
const MAX_SNAPSHOTS: u32 = 65_536;

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
    /// Internal snapshots, which are not read.
    pub snapshots: u32,
    pub(super) l1_entries: u64,
    pub(super) l1_offset: u64,
    pub(super) reftable_offset: u64,
    pub(super) reftable_bytes: u64,
}

impl Header {
    /// Reads and checks the header. [`FormatError::Refused`] for what we never follow, [`FormatError::Unsupported`] for valid kinds
    /// that are not built, [`FormatError::Corrupt`] for what contradicts the file's length.
    pub fn read(window: &Window) -> Result<Self> {
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
        refuse_references(&bytes)?;
        let v3 = if version == 3 { V3::read(&bytes, have, cluster_bits)? } else { V3::default() };
        let snapshots = check_snapshots(&bytes, cluster_bits, window.len())?;

        let size = u64_at(&bytes, 24);
        let capacity = size
            .checked_next_multiple_of(512)
            .filter(|c| *c <= i64::MAX as u64)
            .ok_or_else(|| refused(format!("a size of {size} bytes")))?;
        let header = Self {
            version,
            capacity,
            cluster_bits,
            zstd: v3.zstd,
            dirty: v3.dirty,
            snapshots,
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
        let l1_bytes = self.l1_entries * 8;
        if l1_bytes > MAX_L1_BYTES {
            return Err(refused(format!("an L1 table of {l1_bytes} bytes; at most {MAX_L1_BYTES} are allowed")));
        }
        if self.l1_entries < self.l1_needed() {
            let reason = format!("{} entries for a disk of {} bytes, which needs {}", self.l1_entries, self.capacity, self.l1_needed());
            return Err(corrupt("L1 table", 0, self.l1_offset, reason));
        }
        check_table("L1 table", self.l1_offset, l1_bytes, self.cluster(), file_len)?;
        if self.reftable_bytes > MAX_REFTABLE_BYTES {
            return Err(refused(format!("a refcount table of {} bytes; at most {MAX_REFTABLE_BYTES} are allowed", self.reftable_bytes)));
        }
        if self.reftable_bytes == 0 {
            return Err(corrupt("refcount table", 0, self.reftable_offset, "the image has none"));
        }
        check_table("refcount table", self.reftable_offset, self.reftable_bytes, self.cluster(), file_len)
    }
}

/// A table that is not empty starts at a cluster, behind the header, and ends inside the file.
fn check_table(what: &'static str, offset: u64, bytes: u64, cluster: u64, file_len: u64) -> Result<()> {
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

fn refuse_references(bytes: &[u8; V3_LEN]) -> Result<()> {
    if u64_at(bytes, 8) != 0 || u32_at(bytes, 16) != 0 {
        return Err(refused("it names a backing file; flatten it first (qemu-img convert), an image must be complete in itself"));
    }
    match u32_at(bytes, 32) {
        0 => Ok(()),
        1 => Err(refused("it is encrypted (AES); decrypt it first")),
        2 => Err(refused("it is encrypted (LUKS); decrypt it first")),
        method => Err(refused(format!("encryption method {method} is unknown; only unencrypted images are read"))),
    }
}

/// Internal snapshots are not read; a table that cannot be one still shows a damaged header.
fn check_snapshots(bytes: &[u8; V3_LEN], cluster_bits: u32, file_len: u64) -> Result<u32> {
    let count = u32_at(bytes, 60);
    if count > MAX_SNAPSHOTS {
        return Err(refused(format!("{count} internal snapshots; at most {MAX_SNAPSHOTS} are allowed")));
    }
    // 40 bytes is the shortest entry of the snapshot table.
    check_table("snapshot table", u64_at(bytes, 64), u64::from(count) * 40, 1 << cluster_bits, file_len)?;
    Ok(count)
}

/// What only version 3 has.
#[derive(Default)]
struct V3 {
    zstd: bool,
    dirty: bool,
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
        match (method, incompatible & COMPRESSION != 0) {
            (0, false) => Ok(Self { zstd: false, dirty: incompatible & DIRTY != 0 }),
            (1, true) => Ok(Self { zstd: true, dirty: incompatible & DIRTY != 0 }),
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

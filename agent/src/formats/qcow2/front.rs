//! The front region of an image that we write: header, refcount table, L1 table.
//!
//! Owns: how large it is in the worst case, and its bytes. What lies behind it is the writers': `writer` for compressed images, `plain`.
//! Never: written before the image is complete. A crash here costs an image that has no header yet.

use std::io;

use super::super::disk::{FormatError, Method, Output, Result, UNIT};
use super::refcounts::PER_BLOCK;
use super::{COPIED, FORMAT, MAX_L1_BYTES, MAX_REFTABLE_BYTES, SECTOR, corrupt, header, refused};

/// Bytes of a cluster as we write them.
pub(super) const CLUSTER: u64 = UNIT as u64;
pub(super) const CLUSTER_BITS: u32 = 16;

/// Entries in an L2 table.
pub(super) const PER_L2: u64 = CLUSTER / 8;

/// Largest disk in bytes: QEMU takes an L1 table of 32 MiB at most, 2 PiB with clusters of 64 KiB. A few clusters less, because the
/// refcount table (8 MiB at most) must count the tables, too.
pub const MAX_CAPACITY: u64 = (MAX_L1_BYTES / 8) * PER_L2 * CLUSTER - (1 << 40);

/// The tables of the front region as far as they are known.
#[derive(Debug)]
pub(super) struct Front {
    capacity: u64,
    method: Option<Method>,
    /// Name and format of the image beneath, which says what this one leaves unsaid.
    backing: Option<(String, &'static str)>,
    reftable: Vec<u64>,
    l1: Vec<u64>,
}

impl Front {
    /// Of an empty disk of `capacity` bytes (whole sectors of 512, at most [`MAX_CAPACITY`]).
    pub(super) fn new(capacity: u64, method: Option<Method>) -> Result<Self> {
        if !capacity.is_multiple_of(SECTOR) {
            return Err(refused(format!("a capacity of {capacity} bytes; whole sectors of {SECTOR} are allowed")));
        }
        if capacity > MAX_CAPACITY {
            let reason = format!(
                "a capacity of {capacity} bytes is over the format's limit of {MAX_CAPACITY} (L1 table of at most {MAX_L1_BYTES} bytes)"
            );
            return Err(refused(reason));
        }
        let units = capacity.div_ceil(CLUSTER);
        let l1_entries = units.div_ceil(PER_L2).max(1);
        let l1_clusters = (l1_entries * 8).div_ceil(CLUSTER);
        // Each unit takes at most one host cluster (a run of compressed ones never more than it has units), each range one L2 table.
        let body = units + l1_entries + l1_clusters + 1;
        let mut blocks = body.div_ceil(PER_BLOCK);
        let mut reftable_clusters = 1;
        while (body + blocks + reftable_clusters).div_ceil(PER_BLOCK) > blocks || blocks * 8 > reftable_clusters * CLUSTER {
            blocks = (body + blocks + reftable_clusters).div_ceil(PER_BLOCK);
            reftable_clusters = (blocks * 8).div_ceil(CLUSTER);
        }
        if reftable_clusters * CLUSTER > MAX_REFTABLE_BYTES {
            return Err(refused(format!("a capacity of {capacity} bytes needs a refcount table of more than {MAX_REFTABLE_BYTES} bytes")));
        }
        Ok(Self {
            capacity,
            method,
            backing: None,
            reftable: vec![0; (reftable_clusters * PER_L2) as usize],
            l1: vec![0; l1_entries as usize],
        })
    }

    /// Names the image beneath, by a path, absolute or from this image's folder, and its format: `qcow2` or `raw`. Refused where the header
    /// has no room for it.
    pub(super) fn set_backing(&mut self, name: &str, format: &'static str) -> Result<()> {
        if name.is_empty() || name.len() as u64 > header::MAX_BACKING_NAME {
            let most = header::MAX_BACKING_NAME;
            return Err(refused(format!("a backing file's name of {} bytes; 1 to {most} are allowed", name.len())));
        }
        self.backing = Some((name.to_owned(), format));
        Ok(())
    }

    fn reftable_clusters(&self) -> u64 {
        self.reftable.len() as u64 / PER_L2
    }

    /// Clusters of the region.
    pub(super) fn clusters(&self) -> u64 {
        1 + self.reftable_clusters() + (self.l1.len() as u64 * 8).div_ceil(CLUSTER)
    }

    /// Units of the disk.
    pub(super) fn units(&self) -> u64 {
        self.capacity.div_ceil(CLUSTER)
    }

    /// The L2 table of `range` lies at byte `host`.
    pub(super) fn set_l2(&mut self, range: u64, host: u64) {
        self.l1[range as usize] = COPIED | host;
    }

    /// Refcount block `number` lies at byte `host`.
    pub(super) fn set_refcount_block(&mut self, number: u64, host: u64) -> Result<()> {
        let slot = self.reftable.get_mut(number as usize);
        *slot.ok_or_else(|| corrupt("refcount table", number, host, "is full"))? = host;
        Ok(())
    }

    /// Writes the region. `table` is one cluster of memory.
    pub(super) fn write(&self, output: &Output, table: &mut [u8]) -> Result<()> {
        let mut at = CLUSTER;
        for entries in [&self.reftable, &self.l1] {
            for part in entries.chunks(PER_L2 as usize) {
                big_endian(part, table);
                table[part.len() * 8..].fill(0);
                output.write_all_at(table, at)?;
                at += CLUSTER;
            }
        }
        let mut bytes = vec![0u8; UNIT];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &header::MAGIC.to_be_bytes());
        put(4, &3u32.to_be_bytes());
        put(20, &CLUSTER_BITS.to_be_bytes());
        put(24, &self.capacity.to_be_bytes());
        put(36, &(self.l1.len() as u32).to_be_bytes());
        put(40, &((1 + self.reftable_clusters()) * CLUSTER).to_be_bytes());
        put(48, &CLUSTER.to_be_bytes());
        put(56, &(self.reftable_clusters() as u32).to_be_bytes());
        put(96, &4u32.to_be_bytes());
        put(100, &(header::V3_LEN as u32).to_be_bytes());
        if self.method == Some(Method::Zstd) {
            put(72, &header::COMPRESSION.to_be_bytes());
            put(104, &[1]);
        }
        if let Some((name, format)) = &self.backing {
            // Behind the header: the extension that declares the format, the end of extensions, the name.
            let extension = header::V3_LEN;
            put(extension, &header::BACKING_FORMAT.to_be_bytes());
            put(extension + 4, &(format.len() as u32).to_be_bytes());
            put(extension + 8, format.as_bytes());
            let at = extension + 8 + format.len().next_multiple_of(8) + 8;
            put(at, name.as_bytes());
            put(8, &(at as u64).to_be_bytes());
            put(16, &(name.len() as u32).to_be_bytes());
        }
        Ok(output.write_all_at(&bytes, 0)?)
    }
}

/// Table entries as they lie in the file.
pub(super) fn big_endian(entries: &[u64], bytes: &mut [u8]) {
    for (to, entry) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(entries) {
        *to = entry.to_be_bytes();
    }
}

/// The caller broke the contract of [`super::super::disk::DiskWriter`].
pub(super) fn misuse(what: String) -> FormatError {
    io::Error::new(io::ErrorKind::InvalidInput, format!("{FORMAT} writer: {what}")).into()
}

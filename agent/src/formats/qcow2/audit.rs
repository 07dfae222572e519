//! The audit: one walk over all tables at open, which proves that no cluster of the host file serves two purposes.
//!
//! Owns: the memory-bounded map of host clusters. Refuses data on data, data on metadata, metadata on metadata, compressed streams on
//! either, and compressed streams on one another.
//! Never: reads data clusters or checks reference counts (a reader does not need them), and never reads an L2 table that lies in a hole of the
//! host file: it is all zeros, so a sparse file of petabytes costs what its real bytes cost.
//! A crash here costs nothing.

use super::super::disk::{FormatError, Result};
use super::reader::{Mapping, Reader};
use super::{REFTABLE_OFFSET_MASK, corrupt};

/// Clusters in one page of a [`Map`]: 4 KiB of bits.
const PAGE: u64 = 32_768;

/// Pages that all maps of one audit may have together: 16 MiB, or 8 TiB of host file with clusters of 64 KiB.
const MAX_PAGES: usize = 4_096;

/// Highest host cluster that a [`Map`] can name.
const MAX_CLUSTERS: u64 = PAGE << 16;

/// Compressed clusters that are held to find overlaps among them: 8 MiB. Every full batch is checked and dropped.
const BATCH: usize = 512 << 10;

/// A sparse set of host clusters.
#[derive(Default)]
struct Map(Vec<Option<Box<[u64; 512]>>>);

impl Map {
    fn has(&self, cluster: u64) -> bool {
        let page = self.0.get((cluster / PAGE) as usize).and_then(Option::as_ref);
        page.is_some_and(|page| page[(cluster % PAGE / 64) as usize] >> (cluster % 64) & 1 == 1)
    }

    /// Adds a cluster below [`MAX_CLUSTERS`]; true when it was not there. `pages` counts down.
    fn add(&mut self, cluster: u64, pages: &mut usize) -> Result<bool> {
        let at = (cluster / PAGE) as usize;
        if self.0.len() <= at {
            self.0.resize_with(at + 1, || None);
        }
        let page = match &mut self.0[at] {
            Some(page) => page,
            empty => {
                *pages = pages.checked_sub(1).ok_or_else(too_large)?;
                empty.insert(Box::new([0; 512]))
            }
        };
        let word = &mut page[(cluster % PAGE / 64) as usize];
        let fresh = *word >> (cluster % 64) & 1 == 0;
        *word |= 1 << (cluster % 64);
        Ok(fresh)
    }
}

fn too_large() -> FormatError {
    FormatError::Unsupported(
        "a qcow2 file of this size with so many clusters is not built: its clusters do not fit the memory kept for the audit (16 MiB)"
            .to_owned(),
    )
}

/// What the walk has seen so far.
struct Audit {
    cluster_bits: u32,
    /// Clusters with one purpose.
    exclusive: Map,
    /// Clusters that hold compressed streams.
    shared: Map,
    pages: usize,
    shared_clusters: u64,
    /// Lower bound of the bytes that all compressed streams claim.
    packed_bytes: u64,
    /// (host offset, lower bound of the length) of compressed streams.
    batch: Vec<(u64, u32)>,
}

impl Audit {
    fn claim(&mut self, what: &'static str, index: u64, host: u64) -> Result<()> {
        let cluster = host >> self.cluster_bits;
        if cluster >= MAX_CLUSTERS {
            return Err(too_large());
        }
        if !self.exclusive.add(cluster, &mut self.pages)? || self.shared.has(cluster) {
            return Err(corrupt(what, index, host, "lies on a host cluster that is already in use"));
        }
        Ok(())
    }

    fn claim_table(&mut self, what: &'static str, host: u64, bytes: u64) -> Result<()> {
        for i in 0..bytes.div_ceil(1 << self.cluster_bits) {
            self.claim(what, i, host + (i << self.cluster_bits))?;
        }
        Ok(())
    }

    /// A compressed stream may share host clusters with others of its kind, but with nothing else.
    fn claim_packed(&mut self, index: u64, host: u64, len: u64) -> Result<()> {
        let (first, last) = (host >> self.cluster_bits, (host + len - 1) >> self.cluster_bits);
        if last >= MAX_CLUSTERS {
            return Err(too_large());
        }
        for cluster in first..=last {
            if self.exclusive.has(cluster) {
                return Err(corrupt("compressed cluster", index, host, "lies on a host cluster that is already in use"));
            }
            self.shared_clusters += u64::from(self.shared.add(cluster, &mut self.pages)?);
        }
        // The descriptor counts sectors: the last one may belong to the next stream but for its first byte.
        let sure = len.saturating_sub(511).max(1);
        self.packed_bytes += sure;
        self.batch.push((host, u32::try_from(sure).unwrap_or(u32::MAX)));
        if self.batch.len() >= BATCH {
            self.settle()?;
        }
        Ok(())
    }

    fn settle(&mut self) -> Result<()> {
        self.batch.sort_unstable();
        for pair in self.batch.windows(2) {
            if pair[0].0 + u64::from(pair[0].1) > pair[1].0 {
                return Err(corrupt("compressed cluster", 0, pair[1].0, "overlaps another compressed cluster"));
            }
        }
        self.batch.clear();
        if self.packed_bytes > self.shared_clusters << self.cluster_bits {
            return Err(corrupt(
                "compressed cluster",
                0,
                0,
                "compressed clusters claim more bytes than the host clusters they lie on have",
            ));
        }
        Ok(())
    }
}

/// Walks all tables of the state that `reader` shows. What other snapshots refer to is theirs to share and is not walked.
/// L1 entries whose L2 table holds nothing are set to 0 in memory, so that nobody reads it again.
pub(super) fn run(reader: &mut Reader) -> Result<()> {
    let header = reader.header().clone();
    let mut audit = Audit {
        cluster_bits: header.cluster_bits,
        exclusive: Map::default(),
        shared: Map::default(),
        pages: MAX_PAGES,
        shared_clusters: 0,
        packed_bytes: 0,
        batch: Vec::new(),
    };
    audit.claim("header", 0, 0)?;
    audit.claim_table("L1 table", header.l1_offset, header.l1_entries * 8)?;
    if let Some((offset, bytes)) = header.active_l1 {
        audit.claim_table("L1 table of the present state", offset, bytes)?;
    }
    audit.claim_table("snapshot table", header.snapshots_offset, header.snapshots_bytes)?;
    audit.claim_table("refcount table", header.reftable_offset, header.reftable_bytes)?;
    audit_refcount_blocks(reader, &mut audit)?;
    let mut table = Vec::new();
    for i in 0..reader.l1_len() {
        let Some(host) = reader.l2_offset(i)? else { continue };
        audit.claim("L2 table", i, host)?;
        if reader.in_hole(host, header.cluster()) {
            continue;
        }
        reader.read_entries(host, header.l2_entries(), &mut table)?;
        let first = i * header.l2_entries();
        let mut used = false;
        for (k, entry) in table.iter().enumerate() {
            // The commonest cases first: a terabyte has sixteen million entries.
            if *entry == 0 {
                continue;
            }
            used = true;
            let index = first + k as u64;
            match reader.mapping(index, *entry)? {
                Mapping::Zero if *entry & super::OFFSET_MASK != 0 => {
                    // A zero cluster that keeps its place: nothing reads it, but nothing else may lie there.
                    audit.claim("zero cluster", index, *entry & super::OFFSET_MASK)?;
                }
                Mapping::Hole | Mapping::Zero => {}
                Mapping::Plain(host) => audit.claim("cluster", index, host)?,
                Mapping::Packed { host, len } => audit.claim_packed(index, host, len)?,
            }
        }
        if !used {
            reader.forget_l2(i);
        }
    }
    audit.settle()
}

fn audit_refcount_blocks(reader: &Reader, audit: &mut Audit) -> Result<()> {
    let header = reader.header();
    let mut entries = Vec::new();
    let mut at = 0;
    while at < header.reftable_bytes {
        let part = (header.reftable_bytes - at).min(64 << 10);
        let host = header.reftable_offset + at;
        if !reader.in_hole(host, part) {
            reader.read_entries(host, part / 8, &mut entries)?;
            for (k, entry) in entries.iter().enumerate().filter(|(_, entry)| **entry != 0) {
                let index = at / 8 + k as u64;
                let block = entry & REFTABLE_OFFSET_MASK;
                if !block.is_multiple_of(header.cluster()) || block >= reader.file_len() {
                    return Err(corrupt("refcount block", index, block, "does not start at a cluster inside the file"));
                }
                audit.claim("refcount block", index, block)?;
            }
        }
        at += part;
    }
    Ok(())
}

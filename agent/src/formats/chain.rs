//! Delta chains: a child laid over its parent, and that over its own, down to the disk at the bottom.
//!
//! Owns: which layer answers for which byte. The first layer from the top that says anything of a byte, be it zeros, rules.
//! Never: looks for a parent (the source does that, by consent only and inside its root), opens a path, checks identities.
//! A crash here costs nothing: it only reads.
//!
//! A layer answers up to its own capacity; behind that the chain reads as zeros, whatever the layers beneath have there (as QEMU does).

use std::io;
use std::sync::Arc;

use super::disk::{Disk, Extent, FormatError, Result, Scratch};
use super::raw::{self, check_range};
use super::{qcow2, vmdk};

/// Most parents beneath the top of a chain. ESXi allows 32 snapshots.
pub const MAX_PARENTS: usize = 32;

/// Most bytes of tables that all layers together may hold in memory: a little more than the largest single image.
pub const MAX_TABLE_BYTES: u64 = 38 << 20;

/// An image that may say nothing of some of its bytes, which are then its parent's.
pub trait Layer: Disk {
    /// The runs of `[from, to)` that this image answers for, with data or with zeros: sorted, not overlapping, clipped to the range and
    /// the capacity. They hold all of its [`Disk::extents`]. Cost follows the table entries that exist, as there.
    fn covered(&self, from: u64, to: u64) -> Result<Vec<Extent>>;

    /// Bytes of tables that it holds in memory all the time.
    fn table_bytes(&self) -> u64;
}

impl Layer for vmdk::Image {
    fn covered(&self, from: u64, to: u64) -> Result<Vec<Extent>> {
        self.covered(from, to)
    }

    fn table_bytes(&self) -> u64 {
        self.table_bytes()
    }
}

impl Layer for qcow2::Reader {
    fn covered(&self, from: u64, to: u64) -> Result<Vec<Extent>> {
        self.covered(from, to)
    }

    fn table_bytes(&self) -> u64 {
        self.table_bytes()
    }
}

/// A raw disk answers for all of itself: it is the bottom of a chain.
impl Layer for raw::Reader {
    fn covered(&self, from: u64, to: u64) -> Result<Vec<Extent>> {
        let to = to.min(self.capacity());
        Ok(if from < to { vec![Extent { offset: from, len: to - from }] } else { Vec::new() })
    }

    fn table_bytes(&self) -> u64 {
        0
    }
}

/// One image of a chain and the name by which messages call it.
pub struct Link {
    /// Its file, as the source calls it.
    pub name: String,
    /// The image.
    pub layer: Arc<dyn Layer>,
}

/// A chain as one disk: the top's format and capacity.
pub struct Chain {
    /// From the top to the bottom, at least one.
    links: Vec<Link>,
}

impl std::fmt::Debug for Chain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.links.iter().map(|link| &link.name)).finish()
    }
}

impl Chain {
    /// A chain of the image at the top alone.
    pub fn new(top: Link) -> Result<Self> {
        let mut chain = Self { links: Vec::new() };
        chain.push(top)?;
        Ok(chain)
    }

    /// Lays the chain so far over one more parent. Refused beyond [`MAX_PARENTS`] or [`MAX_TABLE_BYTES`].
    pub fn push(&mut self, parent: Link) -> Result<()> {
        let refused = |reason: String| Err(FormatError::Refused { format: parent.layer.format(), reason });
        if self.links.len() > MAX_PARENTS {
            return refused(format!("its chain has over {MAX_PARENTS} parents; consolidate the snapshots first"));
        }
        if parent.layer.table_bytes() > self.room() {
            return refused(format!(
                "the tables of its chain take over {MAX_TABLE_BYTES} bytes of memory; consolidate the snapshots first"
            ));
        }
        self.links.push(parent);
        Ok(())
    }

    /// Bytes of tables that one more parent may hold.
    pub fn room(&self) -> u64 {
        let held: u64 = self.links.iter().map(|link| link.layer.table_bytes()).sum();
        MAX_TABLE_BYTES.saturating_sub(held)
    }

    /// Number of images.
    pub fn len(&self) -> usize {
        self.links.len()
    }

    /// Never: a chain has its top.
    pub fn is_empty(&self) -> bool {
        self.links.is_empty()
    }

    /// The whole as one disk; an image that has no parent is itself, with all its short cuts.
    pub fn into_disk(self) -> Arc<dyn Disk> {
        match &self.links[..] {
            [only] => only.layer.clone(),
            _ => Arc::new(self),
        }
    }

    /// Adds the data of `[from, to)` as layer `level` and those beneath have it, in no order.
    fn gather(&self, level: usize, from: u64, to: u64, out: &mut Vec<Extent>) -> Result<()> {
        let Some(link) = self.links.get(level) else { return Ok(()) };
        let to = to.min(link.layer.capacity());
        if from >= to {
            return Ok(());
        }
        let covered = link.layer.covered(from, to).map_err(|e| link.named(level, e))?;
        if !covered.is_empty() {
            out.extend(link.layer.extents(from, to).map_err(|e| link.named(level, e))?);
        }
        let mut at = from;
        for run in &covered {
            self.gather(level + 1, at, run.offset, out)?;
            at = run.offset + run.len;
        }
        self.gather(level + 1, at, to, out)
    }

    /// Fills `buf` with what layer `level` and those beneath say from `offset` on.
    fn read_level(&self, level: usize, offset: u64, buf: &mut [u8], scratch: &mut Scratch) -> Result<()> {
        let capacity = self.links.get(level).map_or(0, |link| link.layer.capacity());
        let inside = usize::try_from(capacity.saturating_sub(offset)).unwrap_or(usize::MAX).min(buf.len());
        let (mut rest, behind) = buf.split_at_mut(inside);
        behind.fill(0);
        let Some(link) = self.links.get(level).filter(|_| !rest.is_empty()) else { return Ok(()) };
        let mut at = offset;
        for run in link.layer.covered(offset, offset + inside as u64).map_err(|e| link.named(level, e))? {
            let (gap, tail) = rest.split_at_mut((run.offset - at) as usize);
            let (own, tail) = tail.split_at_mut(run.len as usize);
            self.read_level(level + 1, at, gap, scratch)?;
            link.layer.read_at(run.offset, own, scratch).map_err(|e| link.named(level, e))?;
            at = run.offset + run.len;
            rest = tail;
        }
        self.read_level(level + 1, at, rest, scratch)
    }
}

impl Link {
    /// Adds the parent's name to an error: the top is what the caller asked for and knows.
    fn named(&self, level: usize, error: FormatError) -> FormatError {
        if level == 0 { error } else { in_parent(&self.name, error) }
    }
}

/// The same error with ` (in the parent NAME)` behind it.
pub fn in_parent(name: &str, error: FormatError) -> FormatError {
    let suffix = format!(" (in the parent {name:?})");
    match error {
        FormatError::Refused { format, reason } => FormatError::Refused { format, reason: reason + &suffix },
        FormatError::Corrupt { format, what, index, offset, reason } => {
            FormatError::Corrupt { format, what, index, offset, reason: reason + &suffix }
        }
        FormatError::Unsupported(reason) => FormatError::Unsupported(reason + &suffix),
        FormatError::Io(e) => FormatError::Io(io::Error::new(e.kind(), format!("{e}{suffix}"))),
    }
}

impl Disk for Chain {
    fn format(&self) -> &'static str {
        self.links[0].layer.format()
    }

    fn subformat(&self) -> &str {
        self.links[0].layer.subformat()
    }

    fn capacity(&self) -> u64 {
        self.links[0].layer.capacity()
    }

    fn extents(&self, from: u64, to: u64) -> Result<Vec<Extent>> {
        let mut found = Vec::new();
        self.gather(0, from, to, &mut found)?;
        found.sort_unstable_by_key(|extent| extent.offset);
        let mut out: Vec<Extent> = Vec::with_capacity(found.len());
        for extent in found {
            match out.last_mut() {
                Some(last) if last.offset + last.len == extent.offset => last.len += extent.len,
                _ => out.push(extent),
            }
        }
        Ok(out)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8], scratch: &mut Scratch) -> Result<()> {
        check_range(self.format(), offset, buf.len(), self.capacity())?;
        self.read_level(0, offset, buf, scratch)
    }
}

/// A layer over a disk that was opened before. Its bytes are those of the whole.
pub struct Laid {
    top: Arc<dyn Layer>,
    below: Arc<dyn Disk>,
    is_whole: bool,
}

impl Laid {
    /// Lays `top` over a disk of its own capacity. Its extents are what the layer answers for and, where `is_whole`, what lies beneath.
    pub fn new(top: Arc<dyn Layer>, below: Arc<dyn Disk>, is_whole: bool) -> Self {
        Self { top, below, is_whole }
    }
}

impl Disk for Laid {
    fn format(&self) -> &'static str {
        self.top.format()
    }

    fn capacity(&self) -> u64 {
        self.top.capacity()
    }

    fn extents(&self, from: u64, to: u64) -> Result<Vec<Extent>> {
        let mut extents = self.top.covered(from, to)?;
        if self.is_whole {
            extents.extend(self.below.extents(from, to)?);
            extents = super::over::tidy(extents, self.capacity());
        }
        Ok(extents)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8], scratch: &mut Scratch) -> Result<()> {
        check_range(self.format(), offset, buf.len(), self.capacity())?;
        let (mut at, mut rest) = (offset, buf);
        for run in self.top.covered(offset, offset + rest.len() as u64)? {
            let (gap, tail) = rest.split_at_mut((run.offset - at) as usize);
            let (own, tail) = tail.split_at_mut(run.len as usize);
            self.below.read_at(at, gap, scratch)?;
            self.top.read_at(run.offset, own, scratch)?;
            (at, rest) = (run.offset + run.len, tail);
        }
        self.below.read_at(at, rest, scratch)
    }
}

#[cfg(test)]
mod tests;

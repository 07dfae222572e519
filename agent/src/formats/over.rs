//! A disk over an earlier state of itself: what changed is read anew, the rest is as it was.
//!
//! ```text
//!   areas that changed   ▓▓      ▓         ─► the disk as it is now
//!   blocks to look at  [▓▓  ]  [▓   ]      ─► read whole: what changed from the disk, the rest from the earlier state
//! ```
//! Owns: which blocks may differ from the earlier state, and that a block's bytes come from where they are true.
//! Never: decides what changed (the source does), checks the earlier state (the copy holds it against its digests).
//! A crash here costs nothing: it only reads.

use std::collections::BTreeSet;
use std::sync::Arc;

use shared::manifest::{BLOCK, Blocks};

use super::disk::{Disk, Extent, Result, Scratch};
use super::raw::check_range;

/// Sorts areas, joins those that touch and cuts what lies behind `capacity`; empty ones go.
pub fn tidy(mut areas: Vec<Extent>, capacity: u64) -> Vec<Extent> {
    areas.sort_unstable_by_key(|area| area.offset);
    let mut out: Vec<Extent> = Vec::with_capacity(areas.len());
    for area in areas {
        let (from, to) = (area.offset.min(capacity), area.offset.saturating_add(area.len).min(capacity));
        match out.last_mut() {
            _ if from >= to => {}
            Some(last) if last.offset + last.len >= from => last.len = last.len.max(to - last.offset),
            _ => out.push(Extent { offset: from, len: to - from }),
        }
    }
    out
}

/// The parts of tidy `areas` inside `[from, to)`.
pub fn clipped(areas: &[Extent], from: u64, to: u64) -> Vec<Extent> {
    let first = areas.partition_point(|area| area.offset + area.len <= from);
    let inside = areas[first..].iter().take_while(|area| area.offset < to);
    inside
        .map(|area| {
            let (start, end) = (area.offset.max(from), (area.offset + area.len).min(to));
            Extent { offset: start, len: end - start }
        })
        .collect()
}

/// A disk of which only these areas hold data: the rest is zeros and is not read.
pub struct Allocated {
    disk: Arc<dyn Disk>,
    areas: Vec<Extent>,
}

impl Allocated {
    /// `areas` in any order.
    pub fn new(disk: Arc<dyn Disk>, areas: Vec<Extent>) -> Self {
        let areas = tidy(areas, disk.capacity());
        Self { disk, areas }
    }
}

impl Disk for Allocated {
    fn format(&self) -> &'static str {
        self.disk.format()
    }

    fn subformat(&self) -> &str {
        self.disk.subformat()
    }

    fn capacity(&self) -> u64 {
        self.disk.capacity()
    }

    fn extents(&self, from: u64, to: u64) -> Result<Vec<Extent>> {
        Ok(clipped(&self.areas, from, to))
    }

    fn read_at(&self, offset: u64, buf: &mut [u8], scratch: &mut Scratch) -> Result<()> {
        check_range(self.format(), offset, buf.len(), self.capacity())?;
        fill(&self.areas, offset, buf, |at, part, is_area| {
            if is_area {
                return self.disk.read_at(at, part, scratch);
            }
            part.fill(0);
            Ok(())
        })
    }
}

/// Gives `of` each part of `buf` with its offset, and whether it lies in an area.
fn fill(areas: &[Extent], offset: u64, buf: &mut [u8], mut of: impl FnMut(u64, &mut [u8], bool) -> Result<()>) -> Result<()> {
    let (mut at, mut rest) = (offset, buf);
    for area in clipped(areas, offset, offset + rest.len() as u64) {
        // Both lie inside `buf`, whose length is a usize.
        let (gap, tail) = rest.split_at_mut((area.offset - at) as usize);
        let (own, tail) = tail.split_at_mut(area.len as usize);
        if !gap.is_empty() {
            of(at, gap, false)?;
        }
        of(area.offset, own, true)?;
        (at, rest) = (area.offset + area.len, tail);
    }
    if rest.is_empty() { Ok(()) } else { of(at, rest, false) }
}

/// The disk as it is now, over an earlier state. Its extents are whole blocks: all that may differ.
pub struct Over {
    now: Arc<dyn Disk>,
    before: Arc<dyn Disk>,
    /// The non-zero blocks of the earlier state.
    held: Arc<Blocks>,
    /// None: nobody knows what changed, so all of it is read.
    changed: Option<Vec<Extent>>,
    /// Whether blocks that have not changed are looked at as well: for a copy that is to be complete in itself.
    whole: bool,
}

impl Over {
    /// Both disks have one capacity. `changed` in any order.
    pub fn new(now: Arc<dyn Disk>, before: Arc<dyn Disk>, held: Arc<Blocks>, changed: Option<Vec<Extent>>, whole: bool) -> Self {
        let changed = changed.map(|areas| tidy(areas, now.capacity()));
        Self { now, before, held, changed, whole }
    }
}

impl Disk for Over {
    fn format(&self) -> &'static str {
        self.now.format()
    }

    fn subformat(&self) -> &str {
        self.now.subformat()
    }

    fn capacity(&self) -> u64 {
        self.now.capacity()
    }

    fn knows_holes(&self) -> bool {
        self.changed.is_some() || self.now.knows_holes()
    }

    fn extents(&self, from: u64, to: u64) -> Result<Vec<Extent>> {
        let to = to.min(self.capacity());
        if from >= to {
            return Ok(Vec::new());
        }
        let touched = match &self.changed {
            Some(areas) => clipped(areas, from, to),
            None => self.now.extents(from, to)?,
        };
        let mut blocks: BTreeSet<u64> =
            touched.iter().flat_map(|extent| extent.offset / BLOCK..(extent.offset + extent.len).div_ceil(BLOCK)).collect();
        // What held something and holds nothing now has changed, too.
        if self.changed.is_none() || self.whole {
            blocks.extend(self.held.0.range(from / BLOCK..to.div_ceil(BLOCK)).map(|(block, _)| *block));
        }
        let block = |block: u64| {
            let (start, end) = ((block * BLOCK).max(from), ((block + 1) * BLOCK).min(to));
            Extent { offset: start, len: end.saturating_sub(start) }
        };
        Ok(tidy(blocks.into_iter().map(block).collect(), to))
    }

    fn read_at(&self, offset: u64, buf: &mut [u8], scratch: &mut Scratch) -> Result<()> {
        check_range(self.format(), offset, buf.len(), self.capacity())?;
        let Some(areas) = &self.changed else { return self.now.read_at(offset, buf, scratch) };
        fill(areas, offset, buf, |at, part, is_area| {
            let disk = if is_area { &self.now } else { &self.before };
            disk.read_at(at, part, scratch)
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// Every byte the same, all of it data.
    struct Full(u8, u64);

    impl Disk for Full {
        fn format(&self) -> &'static str {
            "full"
        }
        fn capacity(&self) -> u64 {
            self.1
        }
        fn extents(&self, from: u64, to: u64) -> Result<Vec<Extent>> {
            Ok(tidy(vec![Extent { offset: from, len: to.min(self.1).saturating_sub(from) }], self.1))
        }
        fn read_at(&self, _: u64, buf: &mut [u8], _: &mut Scratch) -> Result<()> {
            buf.fill(self.0);
            Ok(())
        }
    }

    fn area(offset: u64, len: u64) -> Extent {
        Extent { offset, len }
    }

    #[test]
    fn areas_are_sorted_joined_and_cut() {
        let tidied = tidy(vec![area(50, 10), area(0, 10), area(5, 10), area(15, 5), area(90, 50), area(200, 1), area(70, 0)], 100);
        assert_eq!(tidied, [area(0, 20), area(50, 10), area(90, 10)]);
        assert_eq!(clipped(&tidied, 10, 55), [area(10, 10), area(50, 5)]);
        assert_eq!(tidy(vec![area(u64::MAX - 1, u64::MAX)], 100), []);
    }

    #[test]
    fn a_block_is_looked_at_where_it_may_differ_and_reads_from_where_it_is_true() {
        let capacity = 5 * BLOCK + 512;
        let (now, before): (Arc<dyn Disk>, Arc<dyn Disk>) = (Arc::new(Full(2, capacity)), Arc::new(Full(1, capacity)));
        let held = Arc::new(Blocks([(0, [0; 32]), (3, [0; 32])].into()));
        let of = |changed, whole| Over::new(now.clone(), before.clone(), held.clone(), changed, whole);
        let changed = vec![area(BLOCK + 512, 512), area(5 * BLOCK, 512)];
        let over = of(Some(changed.clone()), false);
        assert_eq!(over.extents(0, u64::MAX).unwrap(), [area(BLOCK, BLOCK), area(5 * BLOCK, 512)]);
        let whole = of(Some(changed), true).extents(0, u64::MAX).unwrap();
        assert_eq!(whole, [area(0, 2 * BLOCK), area(3 * BLOCK, BLOCK), area(5 * BLOCK, 512)]);
        let empty = Over::new(Arc::new(Allocated::new(now.clone(), vec![area(2 * BLOCK, 1)])), before.clone(), held.clone(), None, false);
        assert_eq!(empty.extents(0, u64::MAX).unwrap(), [area(0, BLOCK), area(2 * BLOCK, 2 * BLOCK)], "what held data counts");
        let mut buf = [0u8; 1536];
        over.read_at(BLOCK, &mut buf, &mut Scratch::default()).unwrap();
        assert!(buf[..512].iter().all(|b| *b == 1) && buf[512..1024].iter().all(|b| *b == 2) && buf[1024..].iter().all(|b| *b == 1));
        assert!(over.read_at(capacity - 1, &mut buf, &mut Scratch::default()).is_err());
    }
}

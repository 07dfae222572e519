//! Which blocks of a disk hold data, asked of its reader bit by bit.
//!
//! Owns: the walk over [`Disk::extents`] in windows of 1 GiB, so that a disk of any size takes the memory of one window's extents.
//! Never: reads data. A crash here costs nothing.

use shared::manifest::BLOCK;

use crate::formats::{Disk, Extent, Result};

/// Bytes of disk that one call of [`Disk::extents`] is asked for: a whole number of blocks.
const WINDOW: u64 = 1 << 30;

/// One block that holds data.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Task {
    /// Number of the block.
    pub(super) block: u64,
    /// Its data extents, in bytes of the disk.
    pub(super) extents: Vec<Extent>,
    /// Sum of their lengths.
    pub(super) data: u64,
}

impl Task {
    /// First byte of the block.
    pub(super) fn offset(&self) -> u64 {
        self.block * BLOCK
    }
}

/// Bytes of block `block` on a disk of `capacity` bytes.
pub(super) fn block_len(block: u64, capacity: u64) -> usize {
    BLOCK.min(capacity.saturating_sub(block * BLOCK)) as usize
}

/// Number of blocks of a disk.
pub(super) fn block_count(capacity: u64) -> u64 {
    capacity.div_ceil(BLOCK)
}

/// The walk. Blocks come in ascending order; those without data do not come.
pub(super) struct Plan<'a> {
    disk: &'a dyn Disk,
    /// Where the next window begins.
    next: u64,
    extents: std::vec::IntoIter<Extent>,
    /// What is left of the extent in work.
    rest: Option<Extent>,
}

impl<'a> Plan<'a> {
    /// A walk from block `first` on.
    pub(super) fn new(disk: &'a dyn Disk, first: u64) -> Self {
        Self { disk, next: first.saturating_mul(BLOCK), extents: Vec::new().into_iter(), rest: None }
    }

    /// The next block with data into `task`; false at the end of the disk.
    pub(super) fn next(&mut self, task: &mut Task) -> Result<bool> {
        task.extents.clear();
        task.data = 0;
        while let Some(extent) = self.peek()? {
            let block = extent.offset / BLOCK;
            if task.data > 0 && block != task.block {
                break;
            }
            task.block = block;
            let end = ((block + 1) * BLOCK).min(extent.offset + extent.len);
            let part = Extent { offset: extent.offset, len: end - extent.offset };
            task.data += part.len;
            task.extents.push(part);
            self.rest = Some(Extent { offset: end, len: extent.len - part.len }).filter(|rest| rest.len > 0);
        }
        Ok(task.data > 0)
    }

    fn peek(&mut self) -> Result<Option<Extent>> {
        while self.rest.is_none() {
            self.rest = self.extents.next();
            if self.rest.is_some() || self.next >= self.disk.capacity() {
                break;
            }
            let to = (self.next / WINDOW + 1) * WINDOW;
            self.extents = self.disk.extents(self.next, to)?.into_iter();
            self.next = to;
        }
        Ok(self.rest)
    }
}

/// Data bytes of the blocks from `first` on: the sum of the extents' lengths. `stop` is asked between windows and ends the count early.
pub(super) fn data_bytes(disk: &dyn Disk, stop: &dyn Fn() -> bool) -> Result<u64> {
    let (mut sum, mut at) = (0u64, 0);
    while at < disk.capacity() && !stop() {
        sum += disk.extents(at, at + WINDOW)?.iter().map(|extent| extent.len).sum::<u64>();
        at += WINDOW;
    }
    Ok(sum)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::formats::Scratch;

    struct Listed(Vec<Extent>, u64);

    impl Disk for Listed {
        fn format(&self) -> &'static str {
            "listed"
        }
        fn capacity(&self) -> u64 {
            self.1
        }
        fn extents(&self, from: u64, to: u64) -> Result<Vec<Extent>> {
            let clip = |e: &Extent| {
                let (a, b) = (e.offset.max(from), (e.offset + e.len).min(to).min(self.1));
                (a < b).then(|| Extent { offset: a, len: b - a })
            };
            Ok(self.0.iter().filter_map(clip).collect())
        }
        fn read_at(&self, _: u64, _: &mut [u8], _: &mut Scratch) -> Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_plan_gives_each_block_with_data_once_with_its_own_part_of_the_extents() {
        let disk = Listed(
            vec![Extent { offset: 512, len: 512 }, Extent { offset: BLOCK - 512, len: 2 * BLOCK }, Extent { offset: 5 << 30, len: 100 }],
            6 << 30,
        );
        let mut plan = Plan::new(&disk, 0);
        let (mut task, mut found) = (Task::default(), Vec::new());
        while plan.next(&mut task).unwrap() {
            found.push((task.block, task.data, task.extents.len()));
        }
        assert_eq!(found, [(0, 1024, 2), (1, BLOCK, 1), (2, BLOCK - 512, 1), ((5 << 30) / BLOCK, 100, 1)]);
        assert_eq!(data_bytes(&disk, &|| false).unwrap(), 612 + 2 * BLOCK);
        let mut plan = Plan::new(&disk, 2);
        assert!(plan.next(&mut task).unwrap() && task.block == 2 && task.data == BLOCK - 512);
    }
}

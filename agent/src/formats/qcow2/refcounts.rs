//! Reference counts of an image that is only ever appended to.
//!
//! Owns: the counts of the host clusters whose refcount block is not written yet: two or three blocks, whatever the image's size.
//! Never: writes; the writer asks for a finished block and lays it down.
//! A crash here costs nothing: the counts follow from the sequence of clusters, and the writer's replay makes them again.

use std::collections::VecDeque;

/// Counts in one refcount block: a cluster of 64 KiB with 16 bits each.
pub(super) const PER_BLOCK: u64 = 32_768;

/// Counts not yet written.
#[derive(Debug, Default)]
pub(super) struct Refcounts {
    /// Blocks already taken: the first of `pending` is this one.
    taken: u64,
    pending: VecDeque<Box<[u16]>>,
    /// Memory of the last block taken, for the next.
    spare: Option<Box<[u16]>>,
}

impl Refcounts {
    /// Counts one more reference to host cluster `cluster`, whose block must not have been taken.
    pub(super) fn add(&mut self, cluster: u64) {
        let block = (cluster / PER_BLOCK).saturating_sub(self.taken) as usize;
        while self.pending.len() <= block {
            let fresh = self.spare.take().unwrap_or_else(|| vec![0; PER_BLOCK as usize].into_boxed_slice());
            self.pending.push_back(fresh);
        }
        let count = &mut self.pending[block][(cluster % PER_BLOCK) as usize];
        *count = count.saturating_add(1);
    }

    /// Number of the first block that was not taken.
    pub(super) fn next(&self) -> u64 {
        self.taken
    }

    /// The next block in file order, big endian, into `bytes` (one cluster).
    pub(super) fn take(&mut self, bytes: &mut [u8]) {
        self.taken += 1;
        let Some(mut block) = self.pending.pop_front() else { return bytes.fill(0) };
        for (to, count) in bytes.as_chunks_mut::<2>().0.iter_mut().zip(&block) {
            *to = count.to_be_bytes();
        }
        block.fill(0);
        self.spare = Some(block);
    }
}

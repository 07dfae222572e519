//! Bytes of a guest's disks, read with a bound on time, memory and amount.
//!
//! Owns: a cache of blocks over all disks of a VM, and volumes: runs of those disks one after the other, as a partition or a logical volume is.
//! Never: answers a byte from outside a volume, reads on after its time. A crash here costs nothing.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use crate::formats::{Disk, Scratch};

/// Bytes of a cached block: what formats read at a time as well.
const BLOCK: u64 = 64 << 10;
/// Cached blocks: 8 MiB.
const KEPT: usize = 128;

/// How far a look may go.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// When it is over.
    pub until: Instant,
    /// Most bytes that are read of the disks.
    pub bytes: u64,
}

/// The disks of a VM.
pub struct Blocks {
    disks: Vec<Arc<dyn Disk>>,
    bounds: Bounds,
    state: RefCell<State>,
}

#[derive(Default)]
struct State {
    cache: HashMap<(usize, u64), Vec<u8>>,
    /// The oldest first.
    order: VecDeque<(usize, u64)>,
    scratch: Scratch,
    read: u64,
}

impl Blocks {
    /// Over these disks.
    pub fn new(disks: &[Arc<dyn Disk>], bounds: Bounds) -> Rc<Self> {
        Rc::new(Self { disks: disks.to_vec(), bounds, state: RefCell::default() })
    }

    /// Bytes that were read of the disks so far.
    pub fn read(&self) -> u64 {
        self.state.borrow().read
    }

    /// Fails once the time is over, for whoever works without reading.
    pub fn in_time(&self) -> io::Result<()> {
        if Instant::now() < self.bounds.until {
            return Ok(());
        }
        Err(io::Error::new(io::ErrorKind::TimedOut, "the time for a look inside is over"))
    }

    fn copy(&self, disk: usize, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.in_time()?;
        let mut state = self.state.borrow_mut();
        let (mut at, mut filled) = (offset, 0);
        while filled < buf.len() {
            let (number, within) = (at / BLOCK, (at % BLOCK) as usize);
            self.fetch(&mut state, disk, number)?;
            let block = state.cache.get(&(disk, number)).map(Vec::as_slice).unwrap_or_default();
            let part = block.get(within..).filter(|part| !part.is_empty()).ok_or(io::ErrorKind::UnexpectedEof)?;
            let count = part.len().min(buf.len() - filled);
            buf[filled..filled + count].copy_from_slice(&part[..count]);
            filled += count;
            at += count as u64;
        }
        Ok(())
    }

    /// Sees to it that a block is in the cache.
    fn fetch(&self, state: &mut State, disk: usize, number: u64) -> io::Result<()> {
        if state.cache.contains_key(&(disk, number)) {
            return Ok(());
        }
        self.in_time()?;
        let source = self.disks.get(disk).ok_or(io::ErrorKind::NotFound)?;
        let start = number.saturating_mul(BLOCK);
        let length = source.capacity().saturating_sub(start).min(BLOCK);
        if state.read.saturating_add(length) > self.bounds.bytes {
            return Err(io::Error::other(format!("a look inside reads {} MiB at most", self.bounds.bytes >> 20)));
        }
        // The oldest one's memory serves again.
        let mut block = if state.order.len() >= KEPT {
            state.order.pop_front().and_then(|oldest| state.cache.remove(&oldest)).unwrap_or_default()
        } else {
            Vec::new()
        };
        block.resize(length as usize, 0);
        source.read_at(start, &mut block, &mut state.scratch).map_err(io::Error::other)?;
        state.read += length;
        state.cache.insert((disk, number), block);
        state.order.push_back((disk, number));
        Ok(())
    }
}

/// A run of a disk.
#[derive(Clone, Copy, Debug)]
struct Piece {
    /// First byte in the volume.
    start: u64,
    len: u64,
    disk: usize,
    /// First byte on the disk.
    offset: u64,
}

/// Runs of disks, one after the other.
#[derive(Clone)]
pub struct Volume {
    blocks: Rc<Blocks>,
    pieces: Rc<[Piece]>,
    len: u64,
}

impl Volume {
    /// A whole disk; nothing where there is none of that number.
    pub fn disk(blocks: &Rc<Blocks>, disk: usize) -> Option<Self> {
        let len = blocks.disks.get(disk)?.capacity();
        Some(Self { blocks: blocks.clone(), pieces: Rc::new([Piece { start: 0, len, disk, offset: 0 }]), len })
    }

    /// A part of it; nothing where it does not lie inside.
    pub fn part(&self, offset: u64, len: u64) -> Option<Self> {
        let end = offset.checked_add(len).filter(|end| *end <= self.len)?;
        let mut pieces = Vec::new();
        for piece in self.pieces.iter() {
            let (from, to) = (piece.start.max(offset), (piece.start + piece.len).min(end));
            if from < to {
                pieces.push(Piece { start: from - offset, len: to - from, disk: piece.disk, offset: piece.offset + (from - piece.start) });
            }
        }
        Some(Self { blocks: self.blocks.clone(), pieces: pieces.into(), len })
    }

    /// Parts of volumes, one behind the other; nothing where there are none.
    pub fn chain(parts: &[Self]) -> Option<Self> {
        let mut pieces = Vec::new();
        let mut len = 0u64;
        for part in parts {
            for piece in part.pieces.iter() {
                pieces.push(Piece { start: len.checked_add(piece.start)?, ..*piece });
            }
            len = len.checked_add(part.len)?;
        }
        Some(Self { blocks: parts.first()?.blocks.clone(), pieces: pieces.into(), len })
    }

    /// Bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Fills `buf` from `offset`, or fails.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(buf.len() as u64).filter(|end| *end <= self.len);
        let end = end.ok_or_else(|| io::Error::new(io::ErrorKind::UnexpectedEof, format!("byte {offset} lies past the end")))?;
        let first = self.pieces.partition_point(|piece| piece.start + piece.len <= offset);
        for piece in &self.pieces[first..] {
            let (from, to) = (piece.start.max(offset), (piece.start + piece.len).min(end));
            if from >= to {
                break;
            }
            let part = &mut buf[(from - offset) as usize..(to - offset) as usize];
            self.blocks.copy(piece.disk, piece.offset + (from - piece.start), part)?;
        }
        Ok(())
    }

    /// `len` bytes from `offset`.
    pub fn bytes(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        // Nothing is allocated for what is not there.
        if offset.checked_add(len as u64).is_none_or(|end| end > self.len) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut bytes = vec![0; len];
        self.read_at(offset, &mut bytes)?;
        Ok(bytes)
    }
}

/// Little-endian numbers at an offset; nothing past the end.
pub mod number {
    /// 16 bits.
    pub fn le16(bytes: &[u8], at: usize) -> Option<u16> {
        Some(u16::from_le_bytes(bytes.get(at..at.checked_add(2)?)?.try_into().ok()?))
    }

    /// 32 bits.
    pub fn le32(bytes: &[u8], at: usize) -> Option<u32> {
        Some(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
    }

    /// 64 bits.
    pub fn le64(bytes: &[u8], at: usize) -> Option<u64> {
        Some(u64::from_le_bytes(bytes.get(at..at.checked_add(8)?)?.try_into().ok()?))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub mod tests {
    use std::time::Duration;

    use super::*;
    use crate::formats::{Extent, Result};

    /// A disk in memory.
    pub struct Memory(pub Vec<u8>);

    impl Disk for Memory {
        fn format(&self) -> &'static str {
            "raw"
        }

        fn capacity(&self) -> u64 {
            self.0.len() as u64
        }

        fn extents(&self, from: u64, to: u64) -> Result<Vec<Extent>> {
            Ok(vec![Extent { offset: from, len: to - from }])
        }

        fn read_at(&self, offset: u64, buf: &mut [u8], _: &mut Scratch) -> Result<()> {
            buf.copy_from_slice(&self.0[offset as usize..offset as usize + buf.len()]);
            Ok(())
        }
    }

    /// Bounds that a test does not meet.
    pub fn wide() -> Bounds {
        Bounds { until: Instant::now() + Duration::from_secs(20), bytes: 1 << 40 }
    }

    /// A volume over bytes.
    pub fn volume(bytes: Vec<u8>) -> Volume {
        let disk: Arc<dyn Disk> = Arc::new(Memory(bytes));
        Volume::disk(&Blocks::new(&[disk], wide()), 0).unwrap()
    }

    #[test]
    fn volumes_are_runs_of_disks_and_no_more() {
        let bytes = |seed: usize| (0..300_000).map(|n| ((n * 7 + n / 256 + seed) % 251) as u8).collect::<Vec<u8>>();
        let disks: Vec<Arc<dyn Disk>> = vec![Arc::new(Memory(bytes(0))), Arc::new(Memory(bytes(5)))];
        let blocks = Blocks::new(&disks, wide());
        let (a, b) = (Volume::disk(&blocks, 0).unwrap(), Volume::disk(&blocks, 1).unwrap());
        let chain = Volume::chain(&[b.part(1000, 70_000).unwrap(), a.part(0, 10).unwrap(), a.part(200_000, 100_000).unwrap()]).unwrap();
        let whole = [&bytes(5)[1000..71_000], &bytes(0)[..10], &bytes(0)[200_000..]].concat();
        assert_eq!(chain.bytes(0, whole.len()).unwrap(), whole);
        assert_eq!(chain.part(69_990, 100).unwrap().bytes(5, 50).unwrap(), whole[69_995..70_045]);
        assert!(
            chain.bytes(whole.len() as u64 - 1, 2).is_err() && chain.part(1, chain.len()).is_none() && chain.bytes(u64::MAX, 1).is_err()
        );
        assert!(Volume::disk(&blocks, 2).is_none() && Volume::chain(&[]).is_none());
    }

    #[test]
    fn a_look_ends_by_its_bounds() {
        let disk: Arc<dyn Disk> = Arc::new(Memory(vec![1; 1 << 20]));
        let bounded = Blocks::new(std::slice::from_ref(&disk), Bounds { bytes: 200 << 10, ..wide() });
        let volume = Volume::disk(&bounded, 0).unwrap();
        assert!(volume.bytes(0, 190 << 10).is_ok() && volume.bytes(0, 100).is_ok() && volume.bytes(512 << 10, 1).is_err());
        let late = Blocks::new(&[disk], Bounds { until: Instant::now(), ..wide() });
        assert_eq!(Volume::disk(&late, 0).unwrap().bytes(0, 1).unwrap_err().kind(), io::ErrorKind::TimedOut);
    }
}

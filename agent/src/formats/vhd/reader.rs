//! A VHD image as a disk.
//!
//! Owns: the block allocation table (read at open, at most 16 MiB), the place of every block.
//! Never: reads the sector bitmaps: outside of differencing disks, a sector that is not marked was never written, and QEMU reads it
//! from the block, too. Never answers for an image whose blocks share bytes with each other or with a header.
//! A crash here costs nothing.

use super::super::disk::{Disk, Extent, Result, Scratch, Window};
use super::super::raw::check_range;
use super::blocks::ABSENT;
use super::header::{DYNAMIC, Dynamic, Footer, Kind};
use super::{FORMAT, SECTOR, corrupt};

/// An open image. Shared between threads.
#[derive(Debug)]
pub struct Reader {
    window: Window,
    capacity: u64,
    blocks: Option<Blocks>,
}

/// The blocks of a dynamic image.
#[derive(Debug)]
struct Blocks {
    /// Bytes in a block, and of the bitmap before it.
    size: u64,
    bitmap: u64,
    /// First sector of each block's bitmap.
    table: Vec<u32>,
    /// Where the host file has data, ascending; `None` where it has so many runs that looking them up is not worth it.
    runs: Option<Vec<Extent>>,
}

/// Data runs of the host file that are remembered; a file with more is taken as full of data.
const MAX_HOST_RUNS: usize = 256 << 10;

impl Reader {
    /// Opens a fixed or dynamic image. Checksums, the footer's copy, and the place of every header, table and block are held against
    /// the file's length and against each other; differencing disks are refused.
    ///
    /// The capacity follows QEMU: the footer's size for creators that mean it (`win `, `qem2`, `d2v `, `tap`, `CTXS`, `wa`) and where
    /// the geometry is 65535 × 16 × 255, else cylinders × heads × sectors.
    pub fn open(window: Window) -> Result<Self> {
        let footer = Footer::read(&window)?;
        let capacity = footer.capacity;
        if footer.kind == Kind::Fixed {
            if capacity > footer.at {
                let reason = format!("it names a disk of {capacity} bytes, but only {} lie before it", footer.at);
                return Err(corrupt("footer", 0, footer.at, reason));
            }
            return Ok(Self { window, capacity, blocks: None });
        }
        let header = Dynamic::read(&window, &footer)?;
        let blocks = Blocks::read(&window, &header)?;
        blocks.audit(capacity, &footer, &header)?;
        Ok(Self { window, capacity, blocks: Some(blocks) })
    }
}

impl Blocks {
    fn read(window: &Window, header: &Dynamic) -> Result<Self> {
        let mut table = Vec::with_capacity(header.blocks as usize);
        let mut bytes = vec![0u8; (header.blocks * 4).min(64 << 10) as usize];
        let (mut at, end) = (header.table_at, header.table_at + header.blocks * 4);
        while at < end {
            let part = (end - at).min(bytes.len() as u64) as usize;
            window.read_exact_at(&mut bytes[..part], at)?;
            table.extend(bytes[..part].as_chunks::<4>().0.iter().map(|entry| u32::from_be_bytes(*entry)));
            at += part as u64;
        }
        Ok(Self { size: header.block_size, bitmap: header.bitmap, table, runs: host_runs(window)? })
    }

    /// Proves that every block lies before the footer and shares no byte with a header, the table or another block.
    fn audit(&self, capacity: u64, footer: &Footer, header: &Dynamic) -> Result<()> {
        let meta = [
            ("the footer's copy", 0, SECTOR),
            ("the dynamic header", header.at, DYNAMIC as u64),
            ("the block allocation table", header.table_at, header.table_len),
        ];
        let place = |number: u32| {
            let (index, from) = (u64::from(number), u64::from(self.table[number as usize]) * SECTOR);
            // The disk's last block may be cut short to what the disk has of it.
            (index, from, from + self.bitmap + self.size.min(capacity - index * self.size))
        };
        let mut order: Vec<u32> = Vec::new();
        for (number, _) in (0u32..).zip(&self.table).filter(|(_, entry)| **entry != ABSENT) {
            let (index, from, to) = place(number);
            if to > footer.at {
                return Err(corrupt("block", index, from, format!("it ends at byte {to}, past the footer at {}", footer.at)));
            }
            if let Some((what, at, _)) = meta.iter().find(|(_, at, len)| from < at + len && *at < to) {
                return Err(corrupt("block", index, from, format!("it shares bytes with {what} at byte {at}")));
            }
            order.push(number);
        }
        order.sort_unstable_by_key(|number| (self.table[*number as usize], *number));
        for pair in order.windows(2) {
            let ((other, _, end), (index, from, _)) = (place(pair[0]), place(pair[1]));
            if from < end {
                return Err(corrupt("block", index, from, format!("it shares bytes with block {other}, which ends at byte {end}")));
            }
        }
        Ok(())
    }

    /// Where the data of block `index` lies; `None` where there is none.
    fn host(&self, index: u64) -> Option<u64> {
        let entry = self.table.get(usize::try_from(index).ok()?)?;
        (*entry != ABSENT).then(|| u64::from(*entry) * SECTOR + self.bitmap)
    }
}

/// Adds an extent, merged with the last where they touch.
fn push(out: &mut Vec<Extent>, offset: u64, len: u64) {
    match out.last_mut() {
        Some(last) if last.offset + last.len == offset => last.len += len,
        _ => out.push(Extent { offset, len }),
    }
}

/// The data runs of the host file, asked for once: two calls a block would be eight million for the most blocks that a table has.
fn host_runs(window: &Window) -> Result<Option<Vec<Extent>>> {
    const STEP: u64 = 1 << 30;
    let mut runs: Vec<Extent> = Vec::new();
    let mut at = 0;
    while at < window.len() {
        let to = at.saturating_add(STEP).min(window.len());
        for run in window.data_runs(at, to)? {
            push(&mut runs, run.offset, run.len);
        }
        if runs.len() > MAX_HOST_RUNS {
            return Ok(None);
        }
        at = to;
    }
    Ok(Some(runs))
}

impl Disk for Reader {
    fn format(&self) -> &'static str {
        FORMAT
    }

    fn subformat(&self) -> &str {
        if self.blocks.is_some() { "dynamic" } else { "fixed" }
    }

    fn capacity(&self) -> u64 {
        self.capacity
    }

    fn extents(&self, from: u64, to: u64) -> Result<Vec<Extent>> {
        let to = to.min(self.capacity);
        if from >= to {
            return Ok(Vec::new());
        }
        let Some(blocks) = &self.blocks else { return Ok(self.window.data_runs(from, to)?) };
        let mut out: Vec<Extent> = Vec::new();
        for index in from / blocks.size..to.div_ceil(blocks.size) {
            let Some(host) = blocks.host(index) else { continue };
            let start = index * blocks.size;
            let (first, end) = (from.max(start), to.min(start + blocks.size));
            let (low, high) = (host + (first - start), host + (end - start));
            let Some(runs) = &blocks.runs else {
                push(&mut out, first, end - first);
                continue;
            };
            let next = runs.partition_point(|run| run.offset + run.len <= low);
            for run in runs[next..].iter().take_while(|run| run.offset < high) {
                let (from, to) = (run.offset.max(low), (run.offset + run.len).min(high));
                push(&mut out, from - host + start, to - from);
            }
        }
        Ok(out)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8], _scratch: &mut Scratch) -> Result<()> {
        check_range(FORMAT, offset, buf.len(), self.capacity)?;
        let Some(blocks) = &self.blocks else { return Ok(self.window.read_exact_at(buf, offset)?) };
        let (mut at, mut rest) = (offset, buf);
        while !rest.is_empty() {
            let (index, within) = (at / blocks.size, at % blocks.size);
            let part = usize::try_from(blocks.size - within).unwrap_or(usize::MAX).min(rest.len());
            let (head, tail) = rest.split_at_mut(part);
            match blocks.host(index) {
                Some(host) => self.window.read_exact_at(head, host + within)?,
                None => head.fill(0),
            }
            (at, rest) = (at + part as u64, tail);
        }
        Ok(())
    }
}

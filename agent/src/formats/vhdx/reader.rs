//! A VHDX image as a disk.
//!
//! Owns: the mapping of disk bytes to file bytes. Never: reads past the file, or a block whose entry contradicts the file's length.
//! A crash here costs nothing.

use super::super::disk::{Disk, Extent, FormatError, Result, Scratch, Window};
use super::super::raw::check_range;
use super::bat::{Bat, SLICE, Slice};
use super::header::Header;
use super::image::Image;
use super::metadata::Metadata;
use super::region::Regions;
use super::{FORMAT, audit, log};

/// An open image. Shared between threads.
#[derive(Debug)]
pub struct Reader {
    image: Image,
    metadata: Metadata,
    bat: Bat,
}

impl Reader {
    /// Opens an image, replays its log in memory if it has to be, and walks its BAT once: every block must lie inside the file and no
    /// two may share a place (see [`FormatError`] for the kinds of refusal). Costs the reading of the BAT, 8 MiB for a full TiB in blocks of 1 MiB.
    pub fn open(window: Window) -> Result<Self> {
        let (reader, regions) = Self::load(window)?;
        audit::run(&reader.image, &regions, &reader.bat)?;
        Ok(reader)
    }

    /// Opens an image whose damage is to be named block by block (`verify`): headers, log, regions and metadata must be right,
    /// a bad BAT entry fails the reads that need it. Not for images of others that are to be converted.
    pub fn open_damaged(window: Window) -> Result<Self> {
        let (reader, regions) = Self::load(window)?;
        if let Err(FormatError::Io(e)) = audit::run(&reader.image, &regions, &reader.bat) {
            return Err(e.into());
        }
        Ok(reader)
    }

    fn load(window: Window) -> Result<(Self, Regions)> {
        let header = Header::read(&window)?;
        let overlay = log::replay(&window, &header)?;
        let image = Image::new(window, overlay)?;
        let regions = Regions::read(&image, &header)?;
        let metadata = Metadata::read(&image, regions.metadata)?;
        let bat = Bat::new(regions.bat, &metadata)?;
        Ok((Self { image, metadata, bat }, regions))
    }

    /// Bytes of a payload block.
    pub fn block_size(&self) -> u64 {
        self.metadata.block
    }

    /// Where `block` lies; `slice` keeps the last slice, so that a run of blocks asks the cache once.
    fn lookup(&self, block: u64, slice: &mut Option<Slice>) -> Result<Option<u64>> {
        let entry = self.bat.layout.entry(block);
        let first = entry - entry % SLICE;
        if slice.as_ref().is_none_or(|slice| slice.0 != first) {
            *slice = self.bat.slice(&self.image, first)?;
        }
        let Some((_, entries)) = slice else { return Ok(None) };
        let entry = entries.get((entry - first) as usize).copied().unwrap_or(0);
        self.bat.place(&self.image, block, entry)
    }
}

impl Disk for Reader {
    fn format(&self) -> &'static str {
        FORMAT
    }

    fn subformat(&self) -> &str {
        if self.metadata.fixed { "fixed" } else { "dynamic" }
    }

    fn capacity(&self) -> u64 {
        self.metadata.capacity
    }

    fn extents(&self, from: u64, to: u64) -> Result<Vec<Extent>> {
        let to = to.min(self.metadata.capacity);
        let layout = &self.bat.layout;
        let bits = layout.block_bits;
        let mut out: Vec<Extent> = Vec::new();
        let mut push = |offset: u64, len: u64| match out.last_mut() {
            Some(last) if last.offset + last.len == offset => last.len += len,
            _ => out.push(Extent { offset, len }),
        };
        let mut at = from;
        while at < to {
            let first = layout.entry(at >> bits) / SLICE * SLICE;
            let end = (layout.block(first + SLICE) << bits).min(to);
            let Some((_, entries)) = self.bat.slice(&self.image, first)? else {
                at = end;
                continue;
            };
            while at < end {
                let block = at >> bits;
                let next = ((block + 1) << bits).min(end);
                let entry = entries.get((layout.entry(block) - first) as usize).copied().unwrap_or(0);
                // A bad entry is data here, so that the read of it fails and names it.
                match self.bat.place(&self.image, block, entry) {
                    Ok(None) => {}
                    Ok(Some(host)) => {
                        let start = host + (at - (block << bits));
                        self.image.data_parts(start, next - at, |from, to| push(at + (from - start), to - from));
                    }
                    Err(_) => push(at, next - at),
                }
                at = next;
            }
        }
        Ok(out)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8], _scratch: &mut Scratch) -> Result<()> {
        check_range(FORMAT, offset, buf.len(), self.metadata.capacity)?;
        let bits = self.bat.layout.block_bits;
        let end = offset + buf.len() as u64;
        let mut slice = None;
        let mut at = offset;
        while at < end {
            let block = at >> bits;
            let next = ((block + 1) << bits).min(end);
            let part = &mut buf[(at - offset) as usize..(next - offset) as usize];
            match self.lookup(block, &mut slice)? {
                None => part.fill(0),
                Some(host) => self.image.read_exact_at(part, host + (at - (block << bits)))?,
            }
            at = next;
        }
        Ok(())
    }
}

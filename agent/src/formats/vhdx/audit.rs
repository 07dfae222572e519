//! The audit: one walk over the BAT at open, which proves that no byte of the file serves two purposes.
//!
//! Owns: the memory-bounded map of the file's MiB.
//! Never: reads a block, or a part of the BAT that lies in a hole of the file. A crash here costs nothing.

use super::super::disk::{FormatError, Result};
use super::bat::{Bat, SLICE};
use super::image::Image;
use super::region::Regions;
use super::{MIB, corrupt};

/// MiB in one page of the map: 4 KiB of bits, 32 GiB of file.
const PAGE: u64 = 32_768;

/// Pages that the map may have: 16 MiB, or 128 TiB of file.
const MAX_PAGES: usize = 4_096;

/// Pages that can be named: 2 PiB of file.
const MAX_PAGE: u64 = 65_536;

/// A sparse set of MiB.
#[derive(Default)]
struct Map {
    pages: Vec<Option<Box<[u64; 512]>>>,
    used: usize,
}

impl Map {
    /// Adds `[offset, offset + len)`, which starts at a whole MiB; false when a part of it was there.
    fn claim(&mut self, offset: u64, len: u64) -> Result<bool> {
        let (mut at, end) = (offset / MIB, offset / MIB + len.div_ceil(MIB));
        let mut fresh = true;
        while at < end {
            let page = self.page(at / PAGE)?;
            let stop = end.min((at / PAGE + 1) * PAGE);
            for mib in at..stop {
                let word = &mut page[(mib % PAGE / 64) as usize];
                fresh &= *word >> (mib % 64) & 1 == 0;
                *word |= 1 << (mib % 64);
            }
            at = stop;
        }
        Ok(fresh)
    }

    fn page(&mut self, number: u64) -> Result<&mut [u64; 512]> {
        let at = if number < MAX_PAGE { number as usize } else { return Err(too_large()) };
        if self.pages.len() <= at {
            self.pages.resize_with(at + 1, || None);
        }
        match &mut self.pages[at] {
            Some(page) => Ok(page),
            empty => {
                self.used += 1;
                if self.used > MAX_PAGES {
                    return Err(too_large());
                }
                Ok(empty.insert(Box::new([0; 512])))
            }
        }
    }
}

fn too_large() -> FormatError {
    FormatError::Unsupported(
        "a VHDX file of this size with blocks so far apart is not built: they do not fit the memory kept for the audit (16 MiB)".to_owned(),
    )
}

/// Walks the BAT: every block must lie inside the file, and on nothing else.
pub(super) fn run(image: &Image, regions: &Regions, bat: &Bat) -> Result<()> {
    let mut map = Map::default();
    for region in &regions.taken {
        map.claim(region.offset, region.len)?;
    }
    for first in (0..bat.layout.entries).step_by(SLICE as usize) {
        let Some((_, entries)) = bat.read(image, first)? else { continue };
        for (i, entry) in entries.iter().enumerate() {
            let number = first + i as u64;
            // The commonest case first: most of a large disk is not there.
            if *entry == 0 || bat.layout.is_bitmap(number) {
                continue;
            }
            let block = bat.layout.block(number);
            let Some(host) = bat.place(image, block, *entry)? else { continue };
            if !map.claim(host, bat.used(block))? {
                return Err(corrupt("payload block", block, host, "lies on a region, the log or another block"));
            }
        }
    }
    Ok(())
}

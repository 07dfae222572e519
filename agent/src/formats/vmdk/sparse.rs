//! A sparse extent as a readable run of bytes: monolithicSparse, twoGbMaxExtentSparse, streamOptimized, vmfsSparse.
//!
//! Owns: the grain directory (loaded and checked at open), lookup of grains, inflating them.
//! Never: knows of other extents of the disk. A crash here costs nothing: it only reads.
//!
//! Grain tables are read when needed, just the entries asked for, so an extent's memory is its directory: 4 bytes per 512 grains.

use super::super::disk::{Extent, FormatError, Result, Scratch, Window};
use super::NAME;
use super::header::{COWD, GD_AT_END, GT_SECTORS, GTES, Header, SECTOR, le32, le64, marker};

/// Most directory entries of one disk: 64 TiB in the usual grains of 64 KiB, 8 MiB of memory.
pub const MAX_DIRECTORY: u64 = 2 << 20;

/// Tables from which on it is asked which of them lie in holes of the file: so many are read one by one in no time.
const MANY_TABLES: usize = 4096;

/// Data runs of the file that are looked at for that; a file with more is taken as full of data.
const MAX_RUNS: usize = 256 << 10;

/// Bytes of a grain's marker before its data: LBA (u64) and size (u32).
const MARKER: usize = 12;

/// One sparse extent. Grain tables are looked at in pieces of [`GTES`] entries, whatever their length; such a piece is a range.
#[derive(Debug)]
pub struct Sparse {
    window: Window,
    /// File name for messages, empty for the only file.
    label: String,
    header: Header,
    /// Bytes in a grain.
    grain: usize,
    /// Logical bytes that are readable: the descriptor's word where it is stricter than the header's.
    bytes: u64,
    directory: Vec<u32>,
}

/// What a grain table says of a grain.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Nothing is written there: zeros, or what a parent says.
    Hole,
    /// Zeros, whatever a parent says.
    Zero,
    /// The grain starts at this sector of the file.
    Sector(u32),
}

impl Sparse {
    /// The header of a window that starts with `KDMV` or `COWD`; where it says so, the footer's instead.
    pub fn header(window: &Window) -> Result<Header> {
        let mut sector = [0u8; 512];
        if window.len() < SECTOR {
            return Err(FormatError::Corrupt {
                format: NAME,
                what: "header",
                index: 0,
                offset: 0,
                reason: format!("the file ends at byte {}", window.len()),
            });
        }
        window.read_exact_at(&mut sector, 0)?;
        if sector[..4] == COWD {
            return Header::parse_cowd(&sector);
        }
        let header = Header::parse(&sector, "header", 0)?;
        if header.directory == GD_AT_END { Self::footer(window, &header) } else { Ok(header) }
    }

    /// The footer of a stream: footer marker, footer, end-of-stream marker are the last three sectors.
    fn footer(window: &Window, header: &Header) -> Result<Header> {
        let at = window.len().saturating_sub(2 * SECTOR);
        let bad = |reason: &str| FormatError::Corrupt { format: NAME, what: "footer", index: 0, offset: at, reason: reason.to_owned() };
        if !window.len().is_multiple_of(SECTOR) || window.len() < 4 * SECTOR {
            return Err(bad("the stream is cut off: no footer at its end"));
        }
        let mut tail = [[0u8; 512]; 3];
        for (k, sector) in tail.iter_mut().enumerate() {
            window.read_exact_at(sector, at - SECTOR + k as u64 * SECTOR)?;
        }
        if !marker::is(&tail[0], marker::FOOTER) || !marker::is(&tail[2], marker::EOS) {
            return Err(bad("the stream is cut off: no footer marker or no end-of-stream marker at its end"));
        }
        let footer = Header::parse(&tail[1], "footer", at)?;
        if footer.directory == GD_AT_END {
            return Err(bad("it does not say where the grain directory lies"));
        }
        if (footer.capacity, footer.grain, footer.compressed) != (header.capacity, header.grain, header.compressed) {
            return Err(bad("capacity, grain size or flags differ from the header's"));
        }
        Ok(Header { descriptor: header.descriptor, descriptor_size: header.descriptor_size, ..footer })
    }

    /// Opens an extent of `sectors` logical sectors (the descriptor's word). `budget` is the number of directory entries that the disk may still load.
    pub fn open(window: Window, label: &str, header: Header, sectors: u64, budget: &mut u64) -> Result<Self> {
        // VirtualBox rounds the header's capacity up to a grain and leaves the true one in the descriptor.
        if sectors > header.capacity || header.capacity - sectors >= header.grain {
            let reason = format!("the descriptor says {sectors} sectors, the header {}{}", header.capacity, named(label));
            return Err(FormatError::Corrupt { format: NAME, what: "header", index: 0, offset: 0, reason });
        }
        let grain = usize::try_from(header.grain * SECTOR).map_err(|_| FormatError::Unsupported("vmdk: grain size".to_owned()))?;
        let entries = header.capacity.div_ceil(header.grain * u64::from(header.gtes));
        if entries > *budget {
            let reason = format!(
                "a grain directory of {entries} entries; the disk may have {MAX_DIRECTORY} (64 TiB in grains of 64 KiB){}",
                named(label)
            );
            return Err(FormatError::Refused { format: NAME, reason });
        }
        *budget -= entries;
        let directory = match (load(&window, label, header.directory, entries, header.gtes), header.redundant) {
            (Err(FormatError::Corrupt { .. }), Some(redundant)) => load(&window, label, redundant, entries, header.gtes)?,
            (loaded, _) => loaded?,
        };
        Ok(Self { window, label: label.to_owned(), grain, bytes: sectors * SECTOR, directory, header })
    }

    fn corrupt(&self, what: &'static str, index: u64, offset: u64, reason: impl Into<String>) -> FormatError {
        FormatError::Corrupt { format: NAME, what, index, offset, reason: format!("{}{}", reason.into(), named(&self.label)) }
    }

    /// Bytes of the grain directory in memory.
    pub fn directory_bytes(&self) -> u64 {
        self.directory.len() as u64 * 4
    }

    /// Whether grains are deflated.
    pub fn is_compressed(&self) -> bool {
        self.header.compressed
    }

    /// Bytes of the disk that one range describes.
    fn span(&self) -> u64 {
        self.grain as u64 * u64::from(GTES)
    }

    fn place(&self, entry: u32) -> Place {
        match entry {
            0 => Place::Hole,
            1 if self.header.zeroed => Place::Zero,
            sector => Place::Sector(sector),
        }
    }

    /// Where the entries of a range lie, in bytes; `None` where there is no table.
    fn table(&self, range: u64) -> Option<u64> {
        let per_table = u64::from(self.header.gtes / GTES);
        let sector = self.directory[(range / per_table) as usize];
        (sector != 0).then(|| (u64::from(sector) + range % per_table * GT_SECTORS) * SECTOR)
    }

    /// Reads entries `[first, first + count)` of the range whose entries start at byte `table` into the front of `entries`.
    fn entries(&self, table: u64, first: usize, count: usize, entries: &mut [u8; GTES as usize * 4]) -> Result<()> {
        self.window.read_exact_at(&mut entries[..count * 4], table + first as u64 * 4)?;
        Ok(())
    }

    /// Adds the runs of `[from, to)` whose place is `wanted`, shifted by `base`, to `out`, merging with its last.
    pub fn runs(&self, from: u64, to: u64, base: u64, wanted: fn(Place) -> bool, out: &mut Vec<Extent>) -> Result<()> {
        let to = to.min(self.bytes);
        let (grain, span) = (self.grain as u64, self.span());
        let mut table = [0u8; GTES as usize * 4];
        let mut at = from;
        while at < to {
            let range = at / span;
            let end = to.min((range + 1).saturating_mul(span));
            let Some(place) = self.table(range) else {
                at = end;
                continue;
            };
            let first = (at % span / grain) as usize;
            let count = ((end - range * span).div_ceil(grain)) as usize - first;
            self.entries(place, first, count, &mut table)?;
            for k in 0..count {
                let start = at.max(range * span + (first + k) as u64 * grain);
                let stop = end.min(range * span + (first + k + 1) as u64 * grain);
                if wanted(self.place(le32(&table, k * 4))) {
                    super::push(out, Extent { offset: base + start, len: stop - start });
                }
            }
            at = end;
        }
        Ok(())
    }

    /// Fills `buf` from `offset`; the caller has checked that it lies inside.
    pub fn read_at(&self, mut offset: u64, mut buf: &mut [u8], scratch: &mut Scratch) -> Result<()> {
        let span = self.span();
        while !buf.is_empty() {
            let range = offset / span;
            let here = usize::try_from((range + 1) * span - offset).unwrap_or(usize::MAX).min(buf.len());
            let (head, rest) = buf.split_at_mut(here);
            match self.table(range) {
                None => head.fill(0),
                Some(table) => self.read_range(table, offset, head, scratch)?,
            }
            offset += here as u64;
            buf = rest;
        }
        Ok(())
    }

    /// Fills `buf`, all of which the range with its entries at byte `place` describes.
    fn read_range(&self, place: u64, offset: u64, buf: &mut [u8], scratch: &mut Scratch) -> Result<()> {
        let grain = self.grain as u64;
        let first = (offset % self.span() / grain) as usize;
        let needed = (offset % grain + buf.len() as u64).div_ceil(grain) as usize;
        // One entry more: where the next grain starts tells how much of this one there is to read.
        let count = (needed + 1).min(GTES as usize - first);
        let mut table = [0u8; GTES as usize * 4];
        self.entries(place, first, count, &mut table)?;
        let (mut k, mut done) = (0, 0);
        while k < needed {
            let number = offset / grain + k as u64;
            let within = if k == 0 { (offset % grain) as usize } else { 0 };
            let len = (self.grain - within).min(buf.len() - done);
            let dst = done..done + len;
            match self.place(le32(&table, k * 4)) {
                Place::Hole | Place::Zero => buf[dst].fill(0),
                Place::Sector(at) if at < self.header.first => {
                    let reason = format!("it lies inside the header of {} sectors", self.header.first);
                    return Err(self.corrupt("grain", number, u64::from(at) * SECTOR, reason));
                }
                Place::Sector(at) if self.header.compressed => {
                    let next = (k + 1 < count).then(|| le32(&table, (k + 1) * 4));
                    self.unpack(number, at, next, within, &mut buf[dst], scratch)?;
                }
                Place::Sector(at) => {
                    let run = self.run(&table, k, needed, at);
                    let len = (run * self.grain - within).min(buf.len() - done);
                    let start = u64::from(at) * SECTOR;
                    if start + (within + len) as u64 > self.window.len() {
                        return Err(self.corrupt(
                            "grain",
                            number,
                            start,
                            format!("{} bytes from there lie past the file's end at {}", within + len, self.window.len()),
                        ));
                    }
                    self.window.read_exact_at(&mut buf[done..done + len], start + within as u64)?;
                    done += len;
                    k += run;
                    continue;
                }
            }
            done += len;
            k += 1;
        }
        Ok(())
    }

    /// How many grains from entry `k` on lie one behind the other in the file.
    fn run(&self, table: &[u8], k: usize, needed: usize, at: u32) -> usize {
        let follows = |n: &usize| u64::from(le32(table, n * 4)) == u64::from(at) + (n - k) as u64 * self.header.grain;
        1 + (k + 1..needed).take_while(follows).count()
    }

    /// Grain `number` as it is stored, inflated into `plain`, which is a grain long (see [`super::super::disk::Disk::packed`]).
    /// `None` for holes and for grains that are not compressed.
    pub fn packed<'s>(&self, number: u64, plain: &mut [u8], scratch: &'s mut Scratch) -> Result<Option<&'s [u8]>> {
        let range = number / u64::from(GTES);
        if !self.header.compressed || plain.len() != self.grain {
            return Ok(None);
        }
        let Some(place) = self.table(range) else { return Ok(None) };
        let first = (number % u64::from(GTES)) as usize;
        let count = 2.min(GTES as usize - first);
        let mut table = [0u8; GTES as usize * 4];
        self.entries(place, first, count, &mut table)?;
        let Place::Sector(at) = self.place(le32(&table, 0)) else { return Ok(None) };
        let end = self.fetch(number, at, (count > 1).then(|| le32(&table, 4)), scratch)?;
        self.inflate(number, at, end, plain, scratch)?;
        let stream = &scratch.packed[MARKER..end];
        // The inflater stops at the stream's own end. What lies behind it is nobody's data and is not passed on, so the stream must end
        // with its checksum.
        let whole = stream.last_chunk::<4>().is_some_and(|told| u32::from_be_bytes(*told) == libdeflater::adler32(plain));
        Ok(whole.then_some(stream))
    }

    /// Inflates the grain at sector `at` and copies `[within, within + dst.len())` of it; straight into `dst` when that is all of it.
    fn unpack(&self, number: u64, at: u32, next: Option<u32>, within: usize, dst: &mut [u8], scratch: &mut Scratch) -> Result<()> {
        let end = self.fetch(number, at, next, scratch)?;
        if dst.len() == self.grain {
            return self.inflate(number, at, end, dst, scratch);
        }
        let mut plain = std::mem::take(&mut scratch.plain);
        if plain.len() < self.grain {
            plain.resize(self.grain, 0);
        }
        let inflated = self.inflate(number, at, end, &mut plain[..self.grain], scratch);
        dst.copy_from_slice(&plain[within..within + dst.len()]);
        scratch.plain = plain;
        inflated
    }

    /// Reads the grain at sector `at` into `scratch.packed`, checks its marker, and answers where its stream ends there; it begins behind
    /// the marker. `next` is where the next grain may start.
    fn fetch(&self, number: u64, at: u32, next: Option<u32>, scratch: &mut Scratch) -> Result<usize> {
        let start = u64::from(at) * SECTOR;
        let bad = |reason: String| self.corrupt("grain", number, start, reason);
        let Some(left) = self.window.len().checked_sub(start).filter(|left| *left > MARKER as u64) else {
            return Err(bad(format!("it lies past the file's end at {}", self.window.len())));
        };
        // What deflate makes of incompressible bytes at worst, whoever wrote it, with room to spare.
        let most = MARKER + self.grain + self.grain / 8 + 64;
        let hint = next.and_then(|next| next.checked_sub(at)).map_or(most as u64, |sectors| u64::from(sectors) * SECTOR);
        let first = if hint == 0 { most as u64 } else { hint }.min(most as u64).min(left) as usize;
        if scratch.packed.len() < most {
            scratch.packed.resize(most, 0);
        }
        self.window.read_exact_at(&mut scratch.packed[..first], start)?;
        let (lba, size) = (le64(&scratch.packed, 0), le32(&scratch.packed, 8) as usize);
        if lba != number * self.header.grain {
            return Err(bad(format!("its marker says sector {lba} of the disk, {} would be right", number * self.header.grain)));
        }
        let end = MARKER.saturating_add(size);
        if size == 0 || end > most || end as u64 > left {
            return Err(bad(format!(
                "its marker says {size} compressed bytes; {} lie there, {} is the most for a grain",
                left - MARKER as u64,
                most - MARKER
            )));
        }
        if end > first {
            self.window.read_exact_at(&mut scratch.packed[first..end], start + first as u64)?;
        }
        Ok(end)
    }

    /// Inflates what [`Sparse::fetch`] has read into `plain`, which is a grain long. The disk's last grain may be shorter, cut at the capacity.
    fn inflate(&self, number: u64, at: u32, end: usize, plain: &mut [u8], scratch: &mut Scratch) -> Result<()> {
        let bad = |reason: String| self.corrupt("grain", number, u64::from(at) * SECTOR, reason);
        let Scratch { packed, inflate, .. } = scratch;
        let inflate = inflate.get_or_insert_with(libdeflater::Decompressor::new);
        let len = inflate.zlib_decompress(&packed[MARKER..end], plain).map_err(|e| {
            bad(match e {
                libdeflater::DecompressionError::BadData => "its deflate stream or its Adler-32 is wrong".to_owned(),
                libdeflater::DecompressionError::InsufficientSpace => format!("it unpacks to more than {} bytes", self.grain),
            })
        })?;
        let logical = (self.header.capacity * SECTOR).saturating_sub(number * self.grain as u64).min(self.grain as u64) as usize;
        if len != self.grain && len != logical {
            return Err(bad(format!("it unpacks to {len} bytes, {} would be right", self.grain)));
        }
        plain[len..].fill(0);
        Ok(())
    }
}

/// ` (in NAME)` for messages about one extent of several.
fn named(label: &str) -> String {
    if label.is_empty() { String::new() } else { format!(" (in {label:?})") }
}

/// Loads a grain directory and checks that every table of `gtes` entries lies inside the file and that no two overlap.
fn load(window: &Window, label: &str, sector: u64, entries: u64, gtes: u32) -> Result<Vec<u32>> {
    let table_sectors = u64::from(gtes / GTES) * GT_SECTORS;
    let offset = sector.saturating_mul(SECTOR);
    let bad =
        |what, index, offset, reason: String| FormatError::Corrupt { format: NAME, what, index, offset, reason: reason + &named(label) };
    if sector == 0 || offset.checked_add(entries * 4).is_none_or(|end| end > window.len()) {
        return Err(bad(
            "grain directory",
            0,
            offset,
            format!("its {entries} entries do not lie inside the file of {} bytes", window.len()),
        ));
    }
    let mut directory = Vec::with_capacity(entries as usize);
    let mut chunk = vec![0u8; (entries as usize * 4).min(256 << 10)];
    let mut at = offset;
    while (directory.len() as u64) < entries {
        let len = chunk.len().min((entries as usize - directory.len()) * 4);
        window.read_exact_at(&mut chunk[..len], at)?;
        directory.extend(chunk[..len].chunks_exact(4).map(|entry| le32(entry, 0)));
        at += len as u64;
    }
    let mut tables: Vec<u32> = directory.iter().copied().filter(|table| *table != 0).collect();
    tables.sort_unstable();
    let past = tables.last().copied().filter(|last| (u64::from(*last) + table_sectors) * SECTOR > window.len());
    let overlap = tables.windows(2).find(|pair| u64::from(pair[1]) - u64::from(pair[0]) < table_sectors).map(|pair| pair[1]);
    let (wrong, reason) = match (past, overlap) {
        (Some(table), _) => (table, format!("it lies past the file's end at {}", window.len())),
        (_, Some(table)) => (table, "it overlaps another one".to_owned()),
        _ => {
            drop_hollow(window, &mut directory, &tables, table_sectors)?;
            return Ok(directory);
        }
    };
    let index = directory.iter().position(|table| *table == wrong).unwrap_or(0);
    Err(bad("grain table", index as u64, u64::from(wrong) * SECTOR, reason))
}

/// Forgets tables that lie wholly in a hole of the file: they are all zeros, so a sparse file costs what its real bytes cost.
/// `tables` are those of the directory, ascending; all of them lie inside the file.
fn drop_hollow(window: &Window, directory: &mut [u32], tables: &[u32], table_sectors: u64) -> Result<()> {
    let (Some(first), Some(last), true) = (tables.first(), tables.last(), tables.len() > MANY_TABLES) else { return Ok(()) };
    let end = (u64::from(*last) + table_sectors) * SECTOR;
    let mut runs: Vec<Extent> = Vec::new();
    let mut at = u64::from(*first) * SECTOR;
    while at < end {
        let to = at.saturating_add(1 << 30).min(end);
        runs.extend(window.data_runs(at, to)?);
        if runs.len() > MAX_RUNS {
            return Ok(());
        }
        at = to;
    }
    for entry in directory.iter_mut().filter(|entry| **entry != 0) {
        let start = u64::from(*entry) * SECTOR;
        let next = runs.partition_point(|run| run.offset + run.len <= start);
        if runs.get(next).is_none_or(|run| run.offset >= start + table_sectors * SECTOR) {
            *entry = 0;
        }
    }
    Ok(())
}

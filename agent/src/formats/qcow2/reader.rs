//! A qcow2 image as a disk.
//!
//! Owns: the L1 table (read at open), a small cache of L2 tables (read when needed), the mapping of clusters.
//! Never: holds more than 4 MiB of L2 tables, reads past the file, answers for a cluster whose entry contradicts the file's length.
//! A crash here costs nothing.

use std::sync::{Arc, Mutex, PoisonError};

use super::super::disk::{Disk, Extent, FormatError, Result, Scratch, Window};
use super::super::raw::check_range;
use super::snapshots::{self, Snapshot};
use super::{COMPRESSED, FORMAT, OFFSET_MASK, SECTOR, audit, corrupt, header::Header, refused};

/// L2 entries in one slice of the cache, at most: 64 KiB.
const SLICE: u64 = 8_192;

/// Slices in the cache.
const SLICES: usize = 64;

/// Slices in the cache of an image with a backing file: a chain has one cache a layer.
const LAYER_SLICES: usize = 8;

/// Data runs of the host file that are remembered; a file with more is taken as full of data.
const MAX_HOST_RUNS: usize = 256 << 10;

/// Where one cluster lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mapping {
    /// Nowhere: it reads as the backing file does, as zeros without one.
    Hole,
    /// As zeros, whatever a backing file has there.
    Zero,
    /// As it is, at this host offset.
    Plain(u64),
    /// Compressed: the stream starts at `host` and ends within `len` bytes.
    Packed { host: u64, len: u64 },
}

/// A slice of an L2 table, and the number of its first cluster.
type Slice = (u64, Arc<[u64]>);

/// The last slices read, replaced in turn.
#[derive(Debug, Default)]
struct Cache {
    slices: Vec<Slice>,
    next: usize,
}

/// An open image. Shared between threads.
#[derive(Debug)]
pub struct Reader {
    window: Window,
    header: Header,
    l1: Vec<u64>,
    /// Where the host file has data, ascending; `None` when that is not worth knowing.
    host_runs: Option<Vec<Extent>>,
    cache: Mutex<Cache>,
}

impl Reader {
    /// Opens an image and walks its tables once: every reference must lie inside the file and no two may share a place
    /// (see [`FormatError`] for the kinds of refusal). Costs the reading of all L2 tables, 128 MiB for a full TiB.
    pub fn open(window: Window) -> Result<Self> {
        let header = Header::read(&window)?;
        Self::audited(window, header)
    }

    /// Opens the disk as it was at an internal snapshot, named by its id or else by its name, with the same proofs. The capacity is the
    /// one that the disk had then.
    pub fn open_snapshot(window: Window, id_or_name: &str) -> Result<Self> {
        let header = Header::read(&window)?;
        let header = snapshots::switch(&window, header, id_or_name)?;
        Self::audited(window, header)
    }

    /// Opens an image that may have a backing file ([`Header::backing`]), at a snapshot or at its present state. Where it has one, what
    /// it does not say itself reads as zeros: such an image is a layer for `chain::Chain` and no disk of its own. Refused before anything
    /// is loaded where its L1 table takes over `room` bytes.
    pub fn open_layer(window: Window, snapshot: Option<&str>, room: u64) -> Result<Self> {
        let mut header = Header::parse(&window, true)?;
        if let Some(id_or_name) = snapshot {
            header = snapshots::switch(&window, header, id_or_name)?;
        }
        if header.l1_needed() * 8 > room {
            return Err(refused(format!(
                "its L1 table takes over the {room} bytes that are left for it and what belongs to it; consolidate the snapshots first"
            )));
        }
        Self::audited(window, header)
    }

    fn audited(window: Window, header: Header) -> Result<Self> {
        let mut reader = Self::load(window, header)?;
        audit::run(&mut reader)?;
        Ok(reader)
    }

    /// Opens an image whose damage is to be named block by block (`verify`): only the header and the L1 table's place must be right,
    /// a bad reference fails the reads that need it. Not for images of others that are to be converted.
    pub fn open_damaged(window: Window) -> Result<Self> {
        Self::tolerant(window, false)
    }

    /// The same of an image that may have a backing file; see [`Reader::open_layer`].
    pub fn open_damaged_layer(window: Window) -> Result<Self> {
        Self::tolerant(window, true)
    }

    fn tolerant(window: Window, follow: bool) -> Result<Self> {
        let header = Header::parse(&window, follow)?;
        let mut reader = Self::load(window, header)?;
        if let Err(FormatError::Io(e)) = audit::run(&mut reader) {
            return Err(e.into());
        }
        Ok(reader)
    }

    fn load(window: Window, header: Header) -> Result<Self> {
        let mut reader = Self { window, header, l1: Vec::new(), host_runs: None, cache: Mutex::default() };
        let mut l1 = Vec::new();
        reader.read_entries(reader.header.l1_offset, reader.header.l1_needed(), &mut l1)?;
        reader.l1 = l1;
        reader.host_runs = host_runs(&reader.window)?;
        Ok(reader)
    }

    /// The header as it was read.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The internal snapshots in the order of their table. Refused where the table contradicts itself, the file's length or QEMU's limits.
    pub fn snapshots(&self) -> Result<Vec<Snapshot>> {
        Ok(snapshots::read(&self.window, &self.header)?.into_iter().map(|entry| entry.snapshot).collect())
    }

    /// Bytes of tables that it holds in memory all the time, without the cache.
    pub fn table_bytes(&self) -> u64 {
        let runs = self.host_runs.as_ref().map_or(0, Vec::len);
        self.l1.len() as u64 * 8 + (runs * size_of::<Extent>()) as u64
    }

    pub(super) fn file_len(&self) -> u64 {
        self.window.len()
    }

    pub(super) fn l1_len(&self) -> u64 {
        self.l1.len() as u64
    }

    /// Takes note that the L2 table of L1 entry `i` holds nothing.
    pub(super) fn forget_l2(&mut self, i: u64) {
        if let Some(entry) = self.l1.get_mut(i as usize) {
            *entry = 0;
        }
    }

    /// Reads `count` table entries at `host` into `entries`, which is cleared first.
    pub(super) fn read_entries(&self, host: u64, count: u64, entries: &mut Vec<u64>) -> Result<()> {
        entries.clear();
        let mut bytes = vec![0u8; (count * 8).min(64 << 10) as usize];
        let mut at = 0;
        while at < count * 8 {
            let part = (count * 8 - at).min(bytes.len() as u64) as usize;
            self.window.read_exact_at(&mut bytes[..part], host + at)?;
            entries.extend(bytes[..part].as_chunks::<8>().0.iter().map(|entry| u64::from_be_bytes(*entry)));
            at += part as u64;
        }
        Ok(())
    }

    /// Whether `[host, host + len)` lies wholly in a hole of the host file.
    pub(super) fn in_hole(&self, host: u64, len: u64) -> bool {
        let Some(runs) = &self.host_runs else { return false };
        let next = runs.partition_point(|run| run.offset + run.len <= host);
        runs.get(next).is_none_or(|run| run.offset >= host.saturating_add(len))
    }

    /// Host offset of the L2 table of L1 entry `i`; `None` where there is none.
    pub(super) fn l2_offset(&self, i: u64) -> Result<Option<u64>> {
        let host = self.l1.get(i as usize).copied().unwrap_or(0) & OFFSET_MASK;
        if host == 0 {
            return Ok(None);
        }
        if !host.is_multiple_of(self.header.cluster()) {
            return Err(corrupt("L2 table", i, host, "does not start at a cluster"));
        }
        if host + self.header.cluster() > self.window.len() {
            return Err(corrupt("L2 table", i, host, format!("runs past the file's end at {}", self.window.len())));
        }
        Ok(Some(host))
    }

    /// What the L2 entry of cluster `index` says, held against the file's length.
    pub(super) fn mapping(&self, index: u64, entry: u64) -> Result<Mapping> {
        if entry & COMPRESSED != 0 {
            return self.packed(index, entry);
        }
        let host = entry & OFFSET_MASK;
        let zero = entry & 1 != 0;
        if zero && self.header.version < 3 {
            return Err(corrupt("cluster", index, host, "has the zero flag, which version 2 does not know"));
        }
        if host == 0 {
            return Ok(if zero { Mapping::Zero } else { Mapping::Hole });
        }
        if !host.is_multiple_of(self.header.cluster()) {
            return Err(corrupt("cluster", index, host, "does not start at a cluster of the host file"));
        }
        // QEMU lets the last cluster be cut short by the file's end, and so do we.
        if host >= self.window.len() {
            return Err(corrupt("cluster", index, host, format!("lies past the file's end at {}", self.window.len())));
        }
        Ok(if zero { Mapping::Zero } else { Mapping::Plain(host) })
    }

    fn packed(&self, index: u64, entry: u64) -> Result<Mapping> {
        let offset_bits = 62 - (self.header.cluster_bits - 8);
        let host = entry & ((1 << offset_bits) - 1);
        let more = (entry & (COMPRESSED - 1)) >> offset_bits;
        let len = (more + 1) * SECTOR - host % SECTOR;
        // The last sector may be cut short by the file's end.
        let end = host + len;
        if host == 0 || host >= self.window.len() || end - self.window.len().min(end) >= SECTOR {
            return Err(corrupt(
                "compressed cluster",
                index,
                host,
                format!("its {len} bytes run past the file's end at {}", self.window.len()),
            ));
        }
        // A stream is shorter than its cluster, else it would have been stored plain; the descriptor rounds it up to whole sectors.
        if len > self.header.cluster() + SECTOR {
            return Err(corrupt("compressed cluster", index, host, format!("{len} bytes for a cluster of {}", self.header.cluster())));
        }
        Ok(Mapping::Packed { host, len: len.min(self.window.len() - host) })
    }

    /// The slice of L2 entries that holds cluster `index`; `None` where the whole table is absent.
    fn slice(&self, index: u64) -> Result<Option<Slice>> {
        let entries = self.header.l2_entries();
        let Some(table) = self.l2_offset(index / entries)? else { return Ok(None) };
        let size = entries.min(SLICE);
        let first = index - index % size;
        if let Some(slice) = self.lock().slices.iter().find(|slice| slice.0 == first) {
            return Ok(Some(slice.clone()));
        }
        if self.in_hole(table, self.header.cluster()) {
            return Ok(None);
        }
        let mut read = Vec::new();
        self.read_entries(table + first % entries * 8, size, &mut read)?;
        let slice = (first, Arc::from(read));
        let mut cache = self.lock();
        let next = cache.next;
        match cache.slices.get_mut(next) {
            Some(old) => *old = slice.clone(),
            None => cache.slices.push(slice.clone()),
        }
        cache.next = (next + 1) % if self.header.backing.is_some() { LAYER_SLICES } else { SLICES };
        Ok(Some(slice))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Cache> {
        // The cache is right after every statement: a panic elsewhere does not spoil it.
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads the part of one compressed cluster from byte `within` on into `out`.
    fn read_packed(&self, index: u64, host: u64, len: u64, within: u64, out: &mut [u8], scratch: &mut Scratch) -> Result<()> {
        let cluster = self.header.cluster() as usize;
        let Scratch { packed, plain, inflate, zstd } = scratch;
        packed.resize(len as usize, 0);
        self.window.read_exact_at(packed, host)?;
        if out.len() == cluster {
            return self.unpack(index, host, packed, out, inflate, zstd);
        }
        plain.resize(cluster, 0);
        self.unpack(index, host, packed, plain, inflate, zstd)?;
        let within = within as usize;
        out.copy_from_slice(&plain[within..within + out.len()]);
        Ok(())
    }

    /// Unpacks one cluster; the stream may be followed by the rest of its last sector.
    fn unpack(
        &self,
        index: u64,
        host: u64,
        packed: &[u8],
        out: &mut [u8],
        inflate: &mut Option<libdeflater::Decompressor>,
        zstd: &mut Option<zstd::bulk::Decompressor<'static>>,
    ) -> Result<()> {
        let bad = |reason: String| corrupt("compressed cluster", index, host, reason);
        if !self.header.zstd {
            let inflate = inflate.get_or_insert_with(libdeflater::Decompressor::new);
            let made = inflate.deflate_decompress(packed, out).map_err(|e| bad(format!("does not inflate to one cluster: {e}")))?;
            return if made == out.len() { Ok(()) } else { Err(bad(format!("inflates to {made} bytes instead of {}", out.len()))) };
        }
        let zstd = match zstd {
            Some(zstd) => zstd,
            empty => empty.insert(zstd::bulk::Decompressor::new()?),
        };
        let (mut from, mut made) = (0, 0);
        while made < out.len() {
            let frame = zstd::zstd_safe::find_frame_compressed_size(&packed[from..])
                .map_err(|code| bad(format!("not a zstd frame: {}", zstd::zstd_safe::get_error_name(code))))?;
            let part = zstd.decompress_to_buffer(&packed[from..from + frame], &mut out[made..]);
            made += part.map_err(|e| bad(format!("does not decompress to one cluster: {e}")))?;
            from += frame;
        }
        Ok(())
    }

    /// Adds the parts of a run of plain clusters that are data in the host file, too (an image with preallocated metadata is mostly not).
    fn push_plain(&self, guest: u64, host: u64, len: u64, out: &mut Vec<Extent>) {
        let Some(runs) = &self.host_runs else { return push(out, guest, len) };
        let first = runs.partition_point(|run| run.offset + run.len <= host);
        for run in runs[first..].iter().take_while(|run| run.offset < host + len) {
            let from = run.offset.max(host);
            let to = (run.offset + run.len).min(host + len);
            push(out, guest + (from - host), to - from);
        }
    }
}

/// Adds an extent, merged with the last where they touch.
fn push(out: &mut Vec<Extent>, offset: u64, len: u64) {
    match out.last_mut() {
        Some(last) if last.offset + last.len == offset => last.len += len,
        _ => out.push(Extent { offset, len }),
    }
}

/// The data runs of the host file; `None` when it has no holes or so many runs that looking them up is not worth it.
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
    let whole = runs.len() == 1 && runs[0].offset == 0 && runs[0].len == window.len();
    Ok(if whole { None } else { Some(runs) })
}

impl Disk for Reader {
    fn format(&self) -> &'static str {
        FORMAT
    }

    fn subformat(&self) -> &str {
        if self.header.version == 2 { "v2" } else { "v3" }
    }

    fn capacity(&self) -> u64 {
        self.header.capacity
    }

    fn extents(&self, from: u64, to: u64) -> Result<Vec<Extent>> {
        let to = to.min(self.header.capacity);
        let mut out = Vec::new();
        let bits = self.header.cluster_bits;
        let table = self.header.l2_entries() << bits;
        let mut at = from;
        // A run of plain clusters adjacent in guest and host, not yet pushed.
        let (mut run_guest, mut run_host, mut run_len) = (0, 0, 0);
        while at < to {
            let Some((first, entries)) = self.slice(at >> bits)? else {
                at = (at / table + 1).saturating_mul(table);
                continue;
            };
            let end = ((first + entries.len() as u64) << bits).min(to);
            while at < end {
                let index = at >> bits;
                let next = ((index + 1) << bits).min(end);
                let entry = entries[(index - first) as usize];
                if entry == 0 {
                    at = next;
                    continue;
                }
                // A bad entry is data here, so that the read of it fails and names it.
                match self.mapping(index, entry) {
                    Ok(Mapping::Hole | Mapping::Zero) => {}
                    Ok(Mapping::Plain(host)) => {
                        let host = host + (at - (index << bits));
                        if run_len > 0 && run_guest + run_len == at && run_host + run_len == host {
                            run_len += next - at;
                        } else {
                            self.push_plain(run_guest, run_host, run_len, &mut out);
                            (run_guest, run_host, run_len) = (at, host, next - at);
                        }
                    }
                    Ok(Mapping::Packed { .. }) | Err(_) => {
                        self.push_plain(run_guest, run_host, run_len, &mut out);
                        run_len = 0;
                        push(&mut out, at, next - at);
                    }
                }
                at = next;
            }
        }
        self.push_plain(run_guest, run_host, run_len, &mut out);
        out.retain(|extent| extent.len > 0);
        Ok(out)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8], scratch: &mut Scratch) -> Result<()> {
        check_range(FORMAT, offset, buf.len(), self.header.capacity)?;
        let bits = self.header.cluster_bits;
        let mut slice: Option<Slice> = None;
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let index = at >> bits;
            let mapping = self.lookup(index, &mut slice)?;
            let mut end = ((index + 1) << bits).min(offset + buf.len() as u64);
            match mapping {
                Mapping::Hole | Mapping::Zero => buf[done..(end - offset) as usize].fill(0),
                Mapping::Packed { host, len } => {
                    let out = &mut buf[done..(end - offset) as usize];
                    self.read_packed(index, host, len, at - (index << bits), out, scratch)?;
                }
                Mapping::Plain(host) => {
                    let mut next = index + 1;
                    while end < offset + buf.len() as u64
                        && self.lookup(next, &mut slice).ok() == Some(Mapping::Plain(host + ((next - index) << bits)))
                    {
                        next += 1;
                        end = (next << bits).min(offset + buf.len() as u64);
                    }
                    self.read_plain(host + (at - (index << bits)), &mut buf[done..(end - offset) as usize])?;
                }
            }
            done = (end - offset) as usize;
        }
        Ok(())
    }
}

impl Reader {
    /// The runs of `[from, to)` that this image itself answers for, with data or with zeros (see `chain::Layer`).
    pub fn covered(&self, from: u64, to: u64) -> Result<Vec<Extent>> {
        let to = to.min(self.header.capacity);
        let bits = self.header.cluster_bits;
        let table = self.header.l2_entries() << bits;
        let mut out = Vec::new();
        let mut at = from;
        while at < to {
            let Some((first, entries)) = self.slice(at >> bits)? else {
                at = (at / table + 1).saturating_mul(table);
                continue;
            };
            let end = ((first + entries.len() as u64) << bits).min(to);
            while at < end {
                let index = at >> bits;
                let next = ((index + 1) << bits).min(end);
                // A bad entry is this image's, so that the read of it fails and names it.
                if self.mapping(index, entries[(index - first) as usize]).ok() != Some(Mapping::Hole) {
                    push(&mut out, at, next - at);
                }
                at = next;
            }
        }
        Ok(out)
    }

    /// Where cluster `index` lies; `slice` keeps the last slice, so that a run of clusters asks the cache once.
    fn lookup(&self, index: u64, slice: &mut Option<Slice>) -> Result<Mapping> {
        let inside = |slice: &Slice| index >= slice.0 && index - slice.0 < slice.1.len() as u64;
        if !slice.as_ref().is_some_and(inside) {
            *slice = self.slice(index)?;
        }
        let Some((first, entries)) = slice else { return Ok(Mapping::Hole) };
        self.mapping(index, entries[(index - *first) as usize])
    }

    /// Reads host bytes; what lies past the file's end (of a last cluster cut short) is zeros.
    fn read_plain(&self, host: u64, out: &mut [u8]) -> Result<()> {
        let stored = usize::try_from(self.window.len().saturating_sub(host)).unwrap_or(usize::MAX).min(out.len());
        let (head, tail) = out.split_at_mut(stored);
        tail.fill(0);
        Ok(self.window.read_exact_at(head, host)?)
    }
}

#[cfg(test)]
impl Reader {
    /// Where cluster `index` lies.
    pub(super) fn at(&self, index: u64) -> Result<Mapping> {
        self.lookup(index, &mut None)
    }
}

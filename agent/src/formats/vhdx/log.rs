//! The log: finds the active sequence of entries and tells what its replay would write.
//!
//! Owns: the validity of entries and sequences as 2.3 defines them, and the bounds on the work that a log may ask for.
//! Never: writes the file; keeps data (the overlay points into the log). A crash here costs nothing.

use super::super::disk::{FormatError, Result, Window};
use super::crc::Crc;
use super::header::Header;
use super::image::{Content, MAX_PIECES, Overlay, SECTOR};
use super::{HEADER_SECTION, MIB, REGION_TABLES, bytes_at, corrupt, u32_at, u64_at};

/// Longest log that is replayed.
const MAX_LEN: u64 = 64 << 20;

/// How often the log's bytes may be summed, all in all: entries that overlap are not valid together, but each has to be looked at.
const MAX_PASSES: u64 = 8;

/// How often the log's sectors may be gone through, all in all, while sequences are followed.
const MAX_STEPS: u64 = 64;

/// Bytes of an entry's header, and of a descriptor.
const HEADER: u64 = 64;
const DESCRIPTOR: u64 = 32;

/// What a user can do with a log that is too much for us.
const REPAIR: &str = "`qemu-img check -r all FILE` or mounting the disk once in Hyper-V replays it";

/// A valid entry: its header, and where it starts in the log.
#[derive(Clone, Copy, Debug)]
struct Entry {
    at: u64,
    len: u64,
    /// Start of the first entry that was not yet applied when this one was written.
    tail: u64,
    sequence: u64,
    descriptors: u64,
    /// Length that the file had at least when the entry was written.
    flushed: u64,
    /// Length that all of the file's structures fit into.
    last: u64,
}

impl Entry {
    /// Sectors that the header and the descriptors take.
    fn descriptor_sectors(&self) -> u64 {
        (HEADER + self.descriptors * DESCRIPTOR).div_ceil(SECTOR)
    }
}

/// The log of a file, with the entries looked at so far.
struct Log<'a> {
    window: &'a Window,
    guid: [u8; 16],
    offset: u64,
    len: u64,
    /// By sector: what [`Log::look`] found there, if it looked.
    known: Vec<Option<Option<Entry>>>,
    /// Bytes that may yet be summed.
    budget: u64,
    /// Entries that may yet be gone through while sequences are followed.
    steps: u64,
}

/// What the log, if there is one to be replayed, writes over the file.
pub(super) fn replay(window: &Window, header: &Header) -> Result<Overlay> {
    let Some(guid) = header.log_guid else { return Ok(Overlay::default()) };
    if header.log_len > MAX_LEN {
        let len = header.log_len;
        return Err(FormatError::Unsupported(format!(
            "a VHDX log of {len} bytes that is to be replayed is not built, one of up to {MAX_LEN} is; {REPAIR}"
        )));
    }
    let mut log = Log {
        window,
        guid,
        offset: header.log_offset,
        len: header.log_len,
        known: vec![None; (header.log_len / SECTOR) as usize],
        budget: header.log_len * MAX_PASSES,
        steps: header.log_len / SECTOR * MAX_STEPS,
    };
    let active = log.active()?;
    let mut overlay = Overlay::default();
    for entry in &active {
        log.apply(entry, &mut overlay)?;
    }
    Ok(overlay)
}

impl Log<'_> {
    fn corrupt(&self, what: &'static str, index: u64, at: u64, reason: impl Into<String>) -> FormatError {
        corrupt(what, index, self.offset + at % self.len, reason)
    }

    /// The entries to replay, in order: of the valid sequence that ends with the highest sequence number, those from its tail on (2.3.2).
    fn active(&mut self) -> Result<Vec<Entry>> {
        let (mut active, mut newest) = (Vec::new(), 0);
        let mut starts = Vec::new();
        // Sectors from which a sequence would be the rest of one that has no tail, and so have none either.
        let mut hopeless = vec![false; self.known.len()];
        let mut start = 0;
        while start < self.len {
            if hopeless[(start / SECTOR) as usize] {
                start += SECTOR;
                continue;
            }
            let Some(last) = self.sequence(start, &mut starts)? else {
                start += SECTOR;
                continue;
            };
            let Some(tail) = starts.iter().position(|at| *at == last.tail) else {
                starts.iter().for_each(|at| hopeless[(at / SECTOR) as usize] = true);
                start += SECTOR;
                continue;
            };
            if last.sequence > newest {
                newest = last.sequence;
                active.clear();
                active.extend_from_slice(&starts[tail..]);
            }
            // A sequence that goes on past the log's end was the last one.
            let head = (last.at + last.len) % self.len;
            if head <= start {
                break;
            }
            start = head;
        }
        if active.is_empty() {
            let reason = "the header says that it is to be replayed, but no valid sequence of entries is in it; \
                          `qemu-img convert` ignores such a log, at the price of what it held";
            return Err(self.corrupt("log", 0, 0, reason));
        }
        let entries = active.into_iter().map(|at| self.entry(at));
        Ok(entries.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect())
    }

    /// Follows the entries from byte `start` on as long as each continues the one before: where they start, and the last of them.
    fn sequence(&mut self, start: u64, starts: &mut Vec<u64>) -> Result<Option<Entry>> {
        starts.clear();
        let mut last: Option<Entry> = None;
        let (mut head, mut covered) = (start, 0);
        while let Some(entry) = self.entry(head)? {
            covered += entry.len;
            let follows = last.is_none_or(|last| last.sequence.checked_add(1) == Some(entry.sequence));
            if !follows {
                break;
            }
            if covered > self.len {
                return Err(self.corrupt("log entry", entry.sequence, head, "it and the sequence that it ends are longer than the log"));
            }
            self.steps = self
                .steps
                .checked_sub(1)
                .ok_or_else(|| self.corrupt("log entry", entry.sequence, head, format!("too many sequences share it; {REPAIR}")))?;
            starts.push(head);
            head += entry.len;
            if head >= self.len {
                head -= self.len;
            }
            last = Some(entry);
        }
        Ok(last)
    }

    /// The valid entry that starts at byte `at` of the log.
    fn entry(&mut self, at: u64) -> Result<Option<Entry>> {
        let slot = (at / SECTOR) as usize;
        if let Some(Some(known)) = self.known.get(slot) {
            return Ok(*known);
        }
        let found = self.look(at)?;
        if let Some(slot) = self.known.get_mut(slot) {
            *slot = Some(found);
        }
        Ok(found)
    }

    /// Looks for an entry: header first, then the checksum (2.3.1). A good checksum over bad descriptors is damage, not an old entry.
    fn look(&mut self, at: u64) -> Result<Option<Entry>> {
        let mut sector = [0u8; SECTOR as usize];
        self.read(at, &mut sector)?;
        let entry = Entry {
            at,
            len: u64::from(u32_at(&sector, 8)),
            tail: u64::from(u32_at(&sector, 12)),
            sequence: u64_at(&sector, 16),
            descriptors: u64::from(u32_at(&sector, 24)),
            flushed: u64_at(&sector, 48),
            last: u64_at(&sector, 56),
        };
        let fits = entry.len > 0 && entry.len.is_multiple_of(SECTOR) && entry.len <= self.len;
        if !sector.starts_with(b"loge") || bytes_at::<16>(&sector, 32) != self.guid || entry.sequence == 0 || !fits {
            return Ok(None);
        }
        if entry.descriptor_sectors() * SECTOR > entry.len {
            return Ok(None);
        }
        self.budget = self.budget.checked_sub(entry.len).ok_or_else(|| {
            self.corrupt("log entry", entry.sequence, at, format!("more than {MAX_PASSES} entries claim the same bytes; {REPAIR}"))
        })?;
        let stored = u32_at(&sector, 4);
        sector[4..8].fill(0);
        let mut crc = Crc::new().add(&sector);
        for i in 1..entry.len / SECTOR {
            self.read(at + i * SECTOR, &mut sector)?;
            crc = crc.add(&sector);
        }
        if crc.value() != stored {
            return Ok(None);
        }
        self.descriptors(&entry, |_, _, _| Ok(()))?;
        Ok(Some(entry))
    }

    /// Reads the sector at byte `at` of the log, counted on past its end.
    fn read(&self, at: u64, sector: &mut [u8; SECTOR as usize]) -> Result<()> {
        Ok(self.window.read_exact_at(sector, self.offset + at % self.len)?)
    }

    /// Hands out what each descriptor of a valid entry writes, and where: (from, to, content).
    fn descriptors(&self, entry: &Entry, mut each: impl FnMut(u64, u64, Content) -> Result<()>) -> Result<()> {
        let mut sector = [0u8; SECTOR as usize];
        let mut data = entry.at + entry.descriptor_sectors() * SECTOR;
        for i in 0..entry.descriptors {
            let place = HEADER + i * DESCRIPTOR;
            if i == 0 || place.is_multiple_of(SECTOR) {
                self.read(entry.at + place - place % SECTOR, &mut sector)?;
            }
            let descriptor: [u8; DESCRIPTOR as usize] = bytes_at(&sector, (place % SECTOR) as usize);
            let bad = |reason: String| self.corrupt("log descriptor", i, entry.at + place, reason);
            if u64_at(&descriptor, 24) != entry.sequence {
                return Err(bad(format!("has sequence number {}, its entry {}", u64_at(&descriptor, 24), entry.sequence)));
            }
            let zeros = match &descriptor[..4] {
                b"zero" => true,
                b"desc" => false,
                other => return Err(bad(format!("starts with {other:02x?}, neither \"desc\" nor \"zero\""))),
            };
            let from = u64_at(&descriptor, 16);
            let len = if zeros { u64_at(&descriptor, 8) } else { SECTOR };
            let to = from.checked_add(len).filter(|to| *to <= i64::MAX as u64);
            let to = to.ok_or_else(|| bad(format!("writes {len} bytes at {from}, past 8 EiB")))?;
            if !from.is_multiple_of(SECTOR) || !len.is_multiple_of(SECTOR) {
                return Err(bad(format!("writes {len} bytes at {from}, which are not whole sectors of {SECTOR}")));
            }
            // A replay that changed what it is found by would not mean the same the second time.
            let (log, log_end) = (self.offset, self.offset + self.len);
            if len > 0 && (from < REGION_TABLES[0] || from < log_end && to > log) {
                return Err(bad(format!("writes {len} bytes at {from}, over the headers or the log itself")));
            }
            if zeros {
                each(from, to, Content::Zeros)?;
                continue;
            }
            let stored = self.data_sector(entry, i, data)?;
            each(from, to, Content::Sector { stored, leading: bytes_at(&descriptor, 8), trailing: bytes_at(&descriptor, 4) })?;
            data += SECTOR;
        }
        Ok(())
    }

    /// Checks the data sector at byte `at` of the log and tells where it lies in the file.
    fn data_sector(&self, entry: &Entry, index: u64, at: u64) -> Result<u64> {
        if at + SECTOR > entry.at + entry.len {
            let reason = format!("lies past the end of its entry of {} bytes", entry.len);
            return Err(self.corrupt("log data sector", index, at, reason));
        }
        let mut sector = [0u8; SECTOR as usize];
        self.read(at, &mut sector)?;
        let sequence = u64::from(u32_at(&sector, 4)) << 32 | u64::from(u32_at(&sector, SECTOR as usize - 4));
        if !sector.starts_with(b"data") || sequence != entry.sequence {
            let reason = format!("is not marked \"data\" with its entry's sequence number {}", entry.sequence);
            return Err(self.corrupt("log data sector", index, at, reason));
        }
        Ok(self.offset + at % self.len)
    }

    /// Lays what an entry writes over the file.
    fn apply(&self, entry: &Entry, overlay: &mut Overlay) -> Result<()> {
        let have = self.window.len().max(overlay.end);
        if entry.flushed > have {
            let reason = format!("was written when the file had {} bytes, it has {have} now: the file was cut", entry.flushed);
            return Err(self.corrupt("log entry", entry.sequence, entry.at, reason));
        }
        if entry.last > i64::MAX as u64 || entry.last < HEADER_SECTION {
            let reason = format!("says that the file ends at {}", entry.last);
            return Err(self.corrupt("log entry", entry.sequence, entry.at, reason));
        }
        // It is a multiple of 1 MiB; QEMU rounds up one that is not, and so do we.
        overlay.end = overlay.end.max(entry.last.next_multiple_of(MIB));
        self.descriptors(entry, |from, to, content| {
            overlay.write(from, to, content);
            if overlay.len() > MAX_PIECES {
                return Err(FormatError::Unsupported(format!(
                    "a VHDX log that writes to more than {MAX_PIECES} places and is to be replayed is not built; {REPAIR}"
                )));
            }
            Ok(())
        })
    }
}

//! Internal snapshots: earlier states of the disk inside the same file, each with an L1 table of its own.
//!
//! Owns: the snapshot table, held against the file's length and QEMU's limits, and the switch of a header to one of its entries.
//! Never: walks a snapshot's tables (`audit` does, for the one that is opened), reads a VM's saved memory.
//! A crash here costs nothing: it only reads.

use std::time::{Duration, SystemTime};

use super::super::disk::{Result, Window};
use super::header::{Header, check_table};
use super::{corrupt, refused};

/// Bytes of the shortest entry: its fixed part.
pub(super) const MIN_ENTRY: u64 = 40;

/// Most bytes of the table; 65,536 entries as QEMU writes them take 6 MiB.
const MAX_TABLE_BYTES: u64 = 8 << 20;

/// QEMU's limit on the extra data of an entry, in bytes.
const MAX_EXTRA: u64 = 1024;

/// Longest id and longest name that QEMU writes, in bytes.
const MAX_ID: u64 = 127;
/// See [`MAX_ID`].
const MAX_NAME: u64 = 255;

/// One internal snapshot, as its table describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Unique in the image: `1`, `2`, …
    pub id: String,
    /// The name that its maker gave; may be empty, and several may have the same.
    pub name: String,
    /// When it was taken, by the clock of the host that took it.
    pub created_at: SystemTime,
    /// Bytes of the VM's saved memory that go with it; 0 for a snapshot of the disk alone.
    pub vm_state_bytes: u64,
    /// Size of the disk at that time in bytes, rounded up to whole sectors of 512.
    pub capacity: u64,
}

/// A snapshot and where its L1 table lies.
pub(super) struct Entry {
    pub snapshot: Snapshot,
    l1_offset: u64,
    l1_entries: u64,
    /// First byte behind this entry.
    end: u64,
}

/// Reads the whole table.
pub(super) fn read(window: &Window, header: &Header) -> Result<Vec<Entry>> {
    let mut entries = Vec::new();
    let mut at = header.snapshots_offset;
    for index in 0..u64::from(header.snapshots) {
        let entry = entry(window, header, index, at)?;
        at = entry.end;
        if at - header.snapshots_offset > MAX_TABLE_BYTES {
            return Err(refused(format!("a snapshot table of over {MAX_TABLE_BYTES} bytes")));
        }
        entries.push(entry);
    }
    Ok(entries)
}

/// Reads the entry that starts at `at`, which the table's bounds keep far from overflowing.
fn entry(window: &Window, header: &Header, index: u64, at: u64) -> Result<Entry> {
    let bad = |reason: String| corrupt("snapshot", index, at, reason);
    let past = |bytes: u64| bad(format!("its {bytes} bytes run past the file's end at {}", window.len()));
    let inside = |bytes: u64| at.checked_add(bytes).is_some_and(|end| end <= window.len());
    if !inside(MIN_ENTRY) {
        return Err(past(MIN_ENTRY));
    }
    let mut fixed = [0u8; MIN_ENTRY as usize];
    window.read_exact_at(&mut fixed, at)?;
    let (id_len, name_len) = (u64::from(u16_at(&fixed, 12)), u64::from(u16_at(&fixed, 14)));
    let extra_len = u64::from(u32_at(&fixed, 36));
    for (what, len, most) in [("extra data", extra_len, MAX_EXTRA), ("an id", id_len, MAX_ID), ("a name", name_len, MAX_NAME)] {
        if len > most {
            return Err(bad(format!("{what} of {len} bytes; at most {most} are allowed")));
        }
    }
    let len = MIN_ENTRY + extra_len + id_len + name_len;
    if !inside(len) {
        return Err(past(len));
    }
    let mut rest = vec![0u8; (len - MIN_ENTRY) as usize];
    window.read_exact_at(&mut rest, at + MIN_ENTRY)?;
    let (extra, names) = rest.split_at(extra_len as usize);
    let (id, name) = names.split_at(id_len as usize);
    // The 64-bit size came later than the 32-bit one, the disk's size later still.
    let vm_state_bytes = if extra.len() >= 8 { u64_at(extra, 0) } else { u64::from(u32_at(&fixed, 32)) };
    let capacity = match extra.len() >= 16 {
        true => {
            let size = u64_at(extra, 8);
            let whole = size.checked_next_multiple_of(512).filter(|capacity| *capacity <= i64::MAX as u64);
            whole.ok_or_else(|| bad(format!("a disk of {size} bytes")))?
        }
        false => header.capacity,
    };
    let created_at = Duration::new(u64::from(u32_at(&fixed, 16)), u32_at(&fixed, 20));
    let snapshot = Snapshot {
        id: String::from_utf8_lossy(id).into_owned(),
        name: String::from_utf8_lossy(name).into_owned(),
        created_at: SystemTime::UNIX_EPOCH + created_at,
        vm_state_bytes,
        capacity,
    };
    let (l1_offset, l1_entries) = (u64_at(&fixed, 0), u64::from(u32_at(&fixed, 8)));
    Ok(Entry { snapshot, l1_offset, l1_entries, end: (at + len).next_multiple_of(8) })
}

/// The header of the disk as it was at a snapshot: an id goes before a name, as in QEMU.
pub(super) fn switch(window: &Window, mut header: Header, id_or_name: &str) -> Result<Header> {
    let entries = read(window, &header)?;
    let mut found: Vec<&Entry> = entries.iter().filter(|entry| entry.snapshot.id == id_or_name).collect();
    if found.is_empty() {
        found = entries.iter().filter(|entry| entry.snapshot.name == id_or_name).collect();
    }
    let entry = match found[..] {
        [entry] => entry,
        [] => return Err(refused(format!("it has no snapshot {}; it has {}", shown(id_or_name), listed(&entries)))),
        _ => return Err(refused(format!("it has {} snapshots {}; give the id of one", found.len(), shown(id_or_name)))),
    };
    let table_end = entries.last().map_or(header.snapshots_offset, |entry| entry.end);
    header.snapshots_bytes = table_end - header.snapshots_offset;
    header.active_l1 = Some((header.l1_offset, header.l1_entries * 8));
    header.capacity = entry.snapshot.capacity;
    header.l1_offset = entry.l1_offset;
    header.l1_entries = entry.l1_entries;
    let file_len = window.len();
    check_table("snapshot's L1 table", header.l1_offset, header.l1_entries.saturating_mul(8), header.cluster(), file_len)?;
    header.check_l1(file_len)?;
    Ok(header)
}

/// The snapshots that could have been meant, the first ten of them.
fn listed(entries: &[Entry]) -> String {
    if entries.is_empty() {
        return "none".to_owned();
    }
    let mut names: Vec<String> =
        entries.iter().take(10).map(|entry| format!("{} (id {})", shown(&entry.snapshot.name), shown(&entry.snapshot.id))).collect();
    if entries.len() > names.len() {
        names.push(format!("{} more", entries.len() - names.len()));
    }
    names.join(", ")
}

/// At most 80 characters of foreign text, escaped: it goes into messages and logs.
fn shown(text: &str) -> String {
    let short: String = text.chars().take(80).collect();
    format!("{short:?}")
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) << 16 | u32::from(u16_at(bytes, at + 2))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) << 32 | u64::from(u32_at(bytes, at + 4))
}

#[cfg(test)]
mod tests;

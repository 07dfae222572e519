//! Partition tables: MBR with its logical partitions, and GPT.
//!
//! Owns: which runs of a disk are partitions. Written here and not taken from a crate: the table of a guest may be anything, and what is read
//! of it is bounded (so many entries, so many links of a chain). Never: trusts a number that leads out of the disk.
//! A crash here costs nothing.
//!
//! | first sector | read as |
//! |---|---|
//! | no 0x55AA, or a file system's own boot sector | no table |
//! | an entry of type 0xEE, and a GPT that is whole (the first, else the one at the end) | GPT |
//! | else | MBR; logical partitions by the chain of extended ones |

use shared::guest::Partition;

use super::volume::{Volume, number};

/// Most entries of a GPT that are looked at; 128 are usual.
const MAX_ENTRIES: u32 = 1024;
/// Most partitions of a disk that are told.
pub const MAX_TOLD: usize = 256;
/// Longest chain of logical partitions.
const MAX_CHAIN: u32 = 128;
/// Bytes of a sector, of which addresses in an MBR are multiples.
const SECTOR: u64 = 512;

/// The partitions of a disk, with what is odd about them. A disk without a table has one: the whole of it.
pub fn read(disk: u32, volume: &Volume) -> (Vec<Partition>, Vec<String>) {
    let mut notes = Vec::new();
    let Ok(first) = volume.bytes(0, SECTOR as usize) else {
        return (Vec::new(), vec![format!("disk {disk}: its first sector cannot be read")]);
    };
    let entries = mbr_entries(&first);
    let is_protective = entries.iter().any(|entry| entry.kind == 0xee);
    let mut partitions = match is_protective.then(|| gpt(disk, volume, &mut notes)).flatten() {
        Some(partitions) => partitions,
        None if is_protective => {
            notes.push(format!("disk {disk}: its GPT is damaged, both of them"));
            Vec::new()
        }
        None if is_table(&first, &entries, volume) => mbr(disk, volume, &first, &entries, &mut notes),
        None => vec![Partition { disk, scheme: "none".to_owned(), size: volume.len(), ..Partition::default() }],
    };
    if partitions.len() > MAX_TOLD {
        notes.push(format!("disk {disk}: {} partitions, of which the first {MAX_TOLD} are looked at", partitions.len()));
        partitions.truncate(MAX_TOLD);
    }
    (partitions, notes)
}

#[derive(Clone, Copy, Debug, Default)]
struct Entry {
    flag: u8,
    kind: u8,
    /// First sector.
    start: u64,
    /// Sectors.
    len: u64,
}

fn mbr_entries(sector: &[u8]) -> [Entry; 4] {
    let entry = |n: usize| {
        let at = 446 + n * 16;
        let start = u64::from(number::le32(sector, at + 8).unwrap_or_default());
        let len = u64::from(number::le32(sector, at + 12).unwrap_or_default());
        Entry { flag: sector[at], kind: sector[at + 4], start, len }
    };
    if sector.get(510..512) == Some(&[0x55, 0xaa]) { [entry(0), entry(1), entry(2), entry(3)] } else { [Entry::default(); 4] }
}

fn is_extended(kind: u8) -> bool {
    matches!(kind, 0x05 | 0x0f | 0x85)
}

/// Whether the entries are a table, and not a boot sector's code at that place.
fn is_table(first: &[u8], entries: &[Entry; 4], volume: &Volume) -> bool {
    let sectors = volume.len() / SECTOR;
    let used: Vec<&Entry> = entries.iter().filter(|entry| entry.kind != 0).collect();
    let is_sane = |entry: &&Entry| entry.flag & 0x7f == 0 && entry.len > 0 && entry.start > 0 && entry.start < sectors;
    let is_boot_sector = first.get(3..11) == Some(b"NTFS    ") || first.get(82..87) == Some(b"FAT32") || first.get(54..57) == Some(b"FAT");
    !used.is_empty() && used.iter().all(is_sane) && !is_boot_sector
}

fn mbr(disk: u32, volume: &Volume, first: &[u8], entries: &[Entry; 4], notes: &mut Vec<String>) -> Vec<Partition> {
    let signature = number::le32(first, 440).unwrap_or_default();
    let told = |number: u32, entry: &Entry, start: u64| Partition {
        disk,
        number,
        scheme: "mbr".to_owned(),
        start: start.saturating_mul(SECTOR),
        size: entry.len.saturating_mul(SECTOR),
        kind: format!("{:02x}", entry.kind),
        bootable: entry.flag == 0x80,
        partuuid: format!("{signature:08x}-{number:02x}"),
        ..Partition::default()
    };
    let mut partitions = Vec::new();
    for (number, entry) in (1..).zip(entries).filter(|(_, entry)| entry.kind != 0 && entry.len > 0) {
        if !is_extended(entry.kind) {
            partitions.push(told(number, entry, entry.start));
        }
    }
    if let Some(extended) = entries.iter().find(|entry| is_extended(entry.kind) && entry.len > 0) {
        let (mut at, mut number) = (extended.start, 5);
        for link in 0.. {
            if link == MAX_CHAIN {
                notes.push(format!("disk {disk}: the chain of its logical partitions has more than {MAX_CHAIN} links"));
                break;
            }
            let Ok(sector) = volume.bytes(at.saturating_mul(SECTOR), SECTOR as usize) else {
                notes.push(format!("disk {disk}: the chain of its logical partitions leads out of it"));
                break;
            };
            let [own, next, ..] = mbr_entries(&sector);
            if own.kind != 0 && own.len > 0 {
                partitions.push(told(number, &own, at.saturating_add(own.start)));
                number += 1;
            }
            if !is_extended(next.kind) || next.start == 0 {
                break;
            }
            at = extended.start.saturating_add(next.start);
        }
    }
    partitions
}

fn gpt(disk: u32, volume: &Volume, notes: &mut Vec<String>) -> Option<Vec<Partition>> {
    // Disks with sectors of 4096 bytes have it there.
    for sector in [SECTOR, 4096] {
        let last = (volume.len() / sector).checked_sub(1)?;
        let found = header(volume, 1, sector).map(|header| (header, false));
        let found = found.or_else(|| header(volume, last, sector).map(|header| (header, true)));
        if let Some((header, is_backup)) = found {
            if is_backup {
                notes.push(format!("disk {disk}: its first GPT is damaged; the one at its end was read"));
            }
            return Some(table(disk, volume, &header, sector, notes));
        }
    }
    None
}

struct Header {
    /// Sector of the first entry.
    entries: u64,
    count: u32,
    /// Bytes of an entry.
    size: u32,
}

fn header(volume: &Volume, at: u64, sector: u64) -> Option<Header> {
    let mut bytes = volume.bytes(at.checked_mul(sector)?, SECTOR as usize).ok()?;
    if bytes.get(..8)? != b"EFI PART" {
        return None;
    }
    let (length, sum) = (number::le32(&bytes, 12)? as usize, number::le32(&bytes, 16)?);
    if !(92..=SECTOR as usize).contains(&length) {
        return None;
    }
    bytes[16..20].fill(0);
    let is_whole = crc32fast::hash(bytes.get(..length)?) == sum;
    let header = Header { entries: number::le64(&bytes, 72)?, count: number::le32(&bytes, 80)?, size: number::le32(&bytes, 84)? };
    (is_whole && (128..=4096).contains(&header.size)).then_some(header)
}

fn table(disk: u32, volume: &Volume, header: &Header, sector: u64, notes: &mut Vec<String>) -> Vec<Partition> {
    if header.count > MAX_ENTRIES {
        notes.push(format!("disk {disk}: its GPT has room for {} partitions; {MAX_ENTRIES} are looked at", header.count));
    }
    let mut partitions = Vec::new();
    for n in 0..header.count.min(MAX_ENTRIES) {
        let at = header.entries.saturating_mul(sector).saturating_add(u64::from(n) * u64::from(header.size));
        let Ok(bytes) = volume.bytes(at, 128) else {
            notes.push(format!("disk {disk}: the entries of its GPT lead out of it"));
            break;
        };
        let lba = |at| number::le64(&bytes, at).unwrap_or_default();
        let (first, last, flags) = (lba(32), lba(40), lba(48));
        if bytes[..16].iter().all(|byte| *byte == 0) || last < first {
            continue;
        }
        let name: Vec<u16> = (0..36).filter_map(|n| number::le16(&bytes, 56 + n * 2)).take_while(|unit| *unit != 0).collect();
        partitions.push(Partition {
            disk,
            number: n + 1,
            scheme: "gpt".to_owned(),
            start: first.saturating_mul(sector),
            size: (last - first).saturating_add(1).saturating_mul(sector),
            kind: guid(&bytes[..16]),
            name: super::clean(&String::from_utf16_lossy(&name)),
            bootable: flags & 4 != 0,
            partuuid: guid(&bytes[16..32]),
            ..Partition::default()
        });
    }
    partitions
}

/// A GUID as people write it: its first three parts are little-endian.
fn guid(bytes: &[u8]) -> String {
    let order = [3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15];
    let mut text = String::with_capacity(36);
    for (n, from) in order.into_iter().enumerate() {
        if matches!(n, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&format!("{:02x}", bytes.get(from).copied().unwrap_or_default()));
    }
    text
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::disallowed_methods)]
mod tests {
    use super::super::volume::tests::volume;
    use super::*;
    use crate::guest::inspect::tests::{Folder, run};

    fn partitioned(label: &str, script: &str) -> Vec<u8> {
        let folder = Folder::new();
        let image = folder.path().join("disk.raw");
        std::fs::File::create(&image).unwrap().set_len(64 << 20).unwrap();
        run("sfdisk", &["-q", image.to_str().unwrap()], &format!("label: {label}\n{script}"));
        std::fs::read(image).unwrap()
    }

    #[test]
    fn tables_of_sfdisk_are_read() {
        let script = "label-id: 0x7e57d15c\nstart=2048,size=8192,type=83,bootable\nstart=10240,type=5\n";
        let logical = "start=12288,size=2048,type=82\nstart=16384,size=4096,type=8e\n";
        let (found, notes) = read(3, &volume(partitioned("dos", &format!("{script}{logical}"))));
        let told: Vec<_> = found.iter().map(|p| (p.number, p.start >> 9, p.size >> 9, p.kind.as_str(), p.bootable)).collect();
        assert_eq!(told, [(1, 2048, 8192, "83", true), (5, 12288, 2048, "82", false), (6, 16384, 4096, "8e", false)]);
        assert!(notes.is_empty() && found[2].partuuid == "7e57d15c-06" && found[0].disk == 3, "{notes:?} {found:?}");

        let script = "start=2048,size=8192,type=C12A7328-F81F-11D2-BA4B-00A0C93EC93B,name=\"EFI ß\"\n\
            start=10240,size=4096,uuid=0FC63DAF-8483-4772-8E79-3D69D8477DE4,attrs=LegacyBIOSBootable\n";
        let bytes = partitioned("gpt", script);
        let (found, notes) = read(0, &volume(bytes.clone()));
        let told: Vec<_> = found.iter().map(|p| (p.number, p.start >> 9, p.size >> 9, p.name.as_str(), p.bootable)).collect();
        assert_eq!(told, [(1, 2048, 8192, "EFI ß", false), (2, 10240, 4096, "", true)]);
        assert_eq!(found[0].kind, "c12a7328-f81f-11d2-ba4b-00a0c93ec93b");
        assert_eq!(found[1].partuuid, "0fc63daf-8483-4772-8e79-3d69d8477de4");
        assert!(notes.is_empty(), "{notes:?}");
        // The first one is damaged.
        let mut backup = bytes.clone();
        backup[512 + 40] ^= 1;
        let (from_backup, notes) = read(0, &volume(backup.clone()));
        assert!(from_backup == found && notes.len() == 1, "{notes:?}");
        let end = backup.len();
        backup[end - 512 + 40] ^= 1;
        let (none, notes) = read(0, &volume(backup));
        assert!(none.is_empty() && notes[0].contains("damaged"), "{notes:?}");
    }

    #[test]
    fn tables_that_lie_end() {
        // A chain of logical partitions that leads back to its beginning.
        let mut ring = vec![0u8; 1 << 20];
        let entry = |sector: &mut [u8], n: usize, kind: u8, start: u32, len: u32| {
            let at = 446 + n * 16;
            sector[at + 4] = kind;
            sector[at + 8..at + 12].copy_from_slice(&start.to_le_bytes());
            sector[at + 12..at + 16].copy_from_slice(&len.to_le_bytes());
            sector[510..512].copy_from_slice(&[0x55, 0xaa]);
        };
        entry(&mut ring[..512], 0, 5, 100, 1000);
        entry(&mut ring[51_200..51_712], 0, 0x83, 1, 10);
        entry(&mut ring[51_200..51_712], 1, 5, 8, 10);
        entry(&mut ring[55_296..55_808], 0, 0x83, 1, 10);
        entry(&mut ring[55_296..55_808], 1, 5, 8, 10);
        let (found, notes) = read(0, &volume(ring.clone()));
        assert!(found.len() == MAX_CHAIN as usize && notes[0].contains("links"), "{} {notes:?}", found.len());
        entry(&mut ring[51_200..51_712], 1, 5, u32::MAX, 10);
        let (found, notes) = read(0, &volume(ring));
        assert!(found.len() == 1 && notes[0].contains("out of it"), "{notes:?}");

        // A GPT of 10,000 entries, and one that says that it has 4 billion of them.
        let mut many = vec![0u8; 4 << 20];
        entry(&mut many[..512], 0, 0xee, 1, 1000);
        for n in 0..10_000usize {
            let at = 1024 + n * 128;
            many[at] = 1;
            many[at + 40] = 9;
        }
        for count in [10_000u32, u32::MAX] {
            let head = &mut many[512..1024];
            head.fill(0);
            head[..8].copy_from_slice(b"EFI PART");
            head[12..16].copy_from_slice(&92u32.to_le_bytes());
            head[72] = 2;
            head[80..84].copy_from_slice(&count.to_le_bytes());
            head[84] = 128;
            let sum = crc32fast::hash(&head[..92]);
            head[16..20].copy_from_slice(&sum.to_le_bytes());
            let (found, notes) = read(0, &volume(many.clone()));
            assert!(found.len() == MAX_TOLD && notes.len() == 2, "{} {notes:?}", found.len());
        }
        // Nothing, or less than a sector.
        for bytes in [vec![], vec![0x55; 100], vec![0u8; 512]] {
            let (found, _) = read(0, &volume(bytes));
            assert!(found.len() <= 1 && found.iter().all(|p| p.scheme == "none"), "{found:?}");
        }
    }
}

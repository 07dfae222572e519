//! NTFS: the names in its folders, and files that are not compressed.
//!
//! Owns: reading records, attributes, runs and indexes, as far as a look for Windows needs it. Written here because little is needed and all of
//! it must be bounded. Never: writes, follows a reparse point. A crash here costs nothing.

use std::collections::BTreeSet;
use std::io::{self, Read};

use super::tree::{Entry, File, MAX_ENTRIES, Tree};
use super::volume::{Volume, number};

/// Records of the volume itself, and of the root folder.
const MFT: u64 = 0;
const VOLUME: u64 = 3;
const ROOT: u64 = 5;
/// Attributes.
const LIST: u32 = 0x20;
const VOLUME_NAME: u32 = 0x60;
const DATA: u32 = 0x80;
const INDEX_ROOT: u32 = 0x90;
const INDEX: u32 = 0xa0;
const BITMAP: u32 = 0xb0;
/// Most runs of an attribute, records of a file, and bytes of a folder's index.
const MAX_RUNS: usize = 10_000;
const MAX_RECORDS: usize = 64;
const MAX_INDEX: u64 = 32 << 20;
/// Most bytes of an attribute that is read whole.
const MAX_WHOLE: u64 = 4 << 20;

fn damaged(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the NTFS is damaged: {what}"))
}

/// The label of what begins as an NTFS.
pub fn label(volume: &Volume) -> Option<String> {
    let ntfs = Ntfs::open(volume).ok()?;
    let attribute = ntfs.attributes(VOLUME).ok()?.into_iter().find(|attribute| attribute.kind == VOLUME_NAME)?;
    let bytes = ntfs.whole(&attribute, 512).ok()?;
    let units: Vec<u16> = (0..bytes.len() / 2).filter_map(|n| number::le16(&bytes, n * 2)).collect();
    Some(String::from_utf16_lossy(&units))
}

/// A run of clusters.
#[derive(Clone, Copy)]
struct Run {
    /// Bytes.
    len: u64,
    /// Where it lies; nothing for a hole.
    at: Option<u64>,
}

#[derive(Clone)]
enum Value {
    Resident(Vec<u8>),
    Runs { runs: Vec<Run>, size: u64 },
}

#[derive(Clone)]
struct Attribute {
    kind: u32,
    name: String,
    /// Whether it is compressed or encrypted, so that its runs are not its bytes.
    is_packed: bool,
    /// Number of its first cluster, where it lies in several parts.
    first: u64,
    value: Value,
}

/// A file system.
#[derive(Clone)]
pub struct Ntfs {
    volume: Volume,
    cluster: u64,
    record: u64,
    index: u64,
    /// Where the records lie.
    table: Vec<Run>,
}

/// What a folder says of a name.
struct Found {
    name: String,
    record: u64,
    is_dir: bool,
    /// Whether it is the other name, of eight and three.
    is_short: bool,
}

impl Ntfs {
    /// Opens it.
    pub fn open(volume: &Volume) -> io::Result<Self> {
        let block = volume.bytes(0, 512)?;
        let sector = u64::from(number::le16(&block, 11).unwrap_or_default());
        let per_cluster = match block[13] {
            count @ 1..=128 => u64::from(count),
            power @ 0xf4..=0xff => 1 << (256 - u32::from(power)),
            _ => return Err(damaged("clusters of an impossible size")),
        };
        let cluster = sector * per_cluster;
        if !(256..=4096).contains(&sector) || !sector.is_power_of_two() || cluster > 2 << 20 {
            return Err(damaged("sectors of an impossible size"));
        }
        let size = |byte: u8| match i8::from_le_bytes([byte]) {
            count @ 1.. => u64::from(count.unsigned_abs()) * cluster,
            power @ -20..=-8 => 1u64 << power.unsigned_abs(),
            _ => 0,
        };
        let (record, index) = (size(block[64]), size(block[68]));
        if !(512..=65536).contains(&record) || !(512..=1 << 20).contains(&index) {
            return Err(damaged("records of an impossible size"));
        }
        let first = number::le64(&block, 48).and_then(|first| first.checked_mul(cluster)).ok_or_else(|| damaged("no table"))?;
        let mut ntfs = Self { volume: volume.clone(), cluster, record, index, table: vec![Run { len: record * 16, at: Some(first) }] };
        let table = ntfs.own_attributes(MFT)?.into_iter().find(|attribute| attribute.kind == DATA);
        match table.map(|table| table.value) {
            Some(Value::Runs { runs, .. }) => ntfs.table = runs,
            _ => return Err(damaged("no table")),
        }
        Ok(ntfs)
    }

    /// Fills `buf` from a place in runs.
    fn read_runs(&self, runs: &[Run], mut offset: u64, mut buf: &mut [u8]) -> io::Result<()> {
        for run in runs {
            if buf.is_empty() {
                return Ok(());
            }
            if offset >= run.len {
                offset -= run.len;
                continue;
            }
            let count = (run.len - offset).min(buf.len() as u64) as usize;
            let (part, rest) = buf.split_at_mut(count);
            match run.at {
                Some(at) => self.volume.read_at(at.checked_add(offset).ok_or_else(|| damaged("a run leads out of it"))?, part)?,
                None => part.fill(0),
            }
            (buf, offset) = (rest, 0);
        }
        if buf.is_empty() { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }

    /// Puts the last two bytes of each sector back, which a torn write would show.
    fn mend(block: &mut [u8], mark: &[u8; 4]) -> io::Result<()> {
        let (at, count) = (number::le16(block, 4).map(usize::from), number::le16(block, 6).map(usize::from));
        let (Some(at), Some(count)) = (at, count) else { return Err(damaged("a block is too short")) };
        if !block.starts_with(mark) || count == 0 {
            return Err(damaged("a block bears no mark"));
        }
        let stored = block.get(at..at + count * 2).ok_or_else(|| damaged("a block's sequence leads out of it"))?.to_vec();
        for n in 1..count {
            let end = n * 512;
            let place = block.get_mut(end - 2..end).ok_or_else(|| damaged("a block is shorter than its sequence"))?;
            if place != &stored[..2] {
                return Err(damaged("a block was torn while it was written"));
            }
            place.copy_from_slice(&stored[n * 2..n * 2 + 2]);
        }
        Ok(())
    }

    /// The attributes in a record itself.
    fn own_attributes(&self, number_of: u64) -> io::Result<Vec<Attribute>> {
        let mut block = vec![0; self.record as usize];
        self.read_runs(&self.table, number_of.checked_mul(self.record).ok_or_else(|| damaged("a record leads out of it"))?, &mut block)?;
        Self::mend(&mut block, b"FILE")?;
        let mut attributes = Vec::new();
        let mut at = usize::from(number::le16(&block, 20).unwrap_or_default());
        while let (Some(kind), Some(length)) = (number::le32(&block, at), number::le32(&block, at.saturating_add(4))) {
            let length = length as usize;
            if kind == u32::MAX || length < 24 {
                break;
            }
            let bytes = block.get(at..at.saturating_add(length)).ok_or_else(|| damaged("an attribute leads out of its record"))?;
            attributes.push(self.attribute(kind, bytes)?);
            at += length;
        }
        Ok(attributes)
    }

    fn attribute(&self, kind: u32, bytes: &[u8]) -> io::Result<Attribute> {
        let short = || damaged("an attribute is too short");
        let field16 = |at| number::le16(bytes, at).map(usize::from).ok_or_else(short);
        let (length, at) = (usize::from(bytes[9]), field16(10)?);
        let name = bytes.get(at..at + length * 2).ok_or_else(short)?;
        let units: Vec<u16> = (0..length).filter_map(|n| number::le16(name, n * 2)).collect();
        let is_packed = field16(12)? & 0x40ff != 0;
        let (first, value) = if bytes[8] == 0 {
            let (size, at) = (number::le32(bytes, 16).ok_or_else(short)? as usize, field16(20)?);
            (0, Value::Resident(bytes.get(at..at.saturating_add(size)).ok_or_else(short)?.to_vec()))
        } else {
            let size = number::le64(bytes, 48).ok_or_else(short)?;
            let runs = self.runs(bytes.get(field16(32)?..).ok_or_else(short)?)?;
            (number::le64(bytes, 16).ok_or_else(short)?, Value::Runs { runs, size })
        };
        Ok(Attribute { kind, name: String::from_utf16_lossy(&units), is_packed, first, value })
    }

    fn runs(&self, mut bytes: &[u8]) -> io::Result<Vec<Run>> {
        let odd = || damaged("its runs lead out of it");
        let mut runs = Vec::new();
        let mut cluster = 0i64;
        while let Some(head) = bytes.first().copied().filter(|head| *head != 0) {
            let (for_len, for_at) = (usize::from(head & 15), usize::from(head >> 4));
            if for_len == 0 || for_len > 8 || for_at > 8 || runs.len() >= MAX_RUNS {
                return Err(odd());
            }
            let field = |from: usize, count: usize, is_signed: bool| {
                let bytes = bytes.get(from..from + count)?;
                let fill = if is_signed && bytes.last().is_some_and(|last| last & 0x80 != 0) { 0xff } else { 0 };
                let mut whole = [fill; 8];
                whole[..count].copy_from_slice(bytes);
                Some(i64::from_le_bytes(whole))
            };
            let len = field(1, for_len, false).and_then(|len| u64::try_from(len).ok()).ok_or_else(odd)?;
            let len = len.checked_mul(self.cluster).filter(|len| *len > 0).ok_or_else(odd)?;
            let at = if for_at == 0 {
                None
            } else {
                cluster = field(1 + for_len, for_at, true).and_then(|step| cluster.checked_add(step)).ok_or_else(odd)?;
                Some(u64::try_from(cluster).ok().and_then(|cluster| cluster.checked_mul(self.cluster)).ok_or_else(odd)?)
            };
            runs.push(Run { len, at });
            bytes = bytes.get(1 + for_len + for_at..).ok_or_else(odd)?;
        }
        Ok(runs)
    }

    /// The attributes of a file, those in its other records too, each whole.
    fn attributes(&self, number_of: u64) -> io::Result<Vec<Attribute>> {
        let own = self.own_attributes(number_of)?;
        let Some(list) = own.iter().find(|attribute| attribute.kind == LIST) else { return Ok(own) };
        let list = self.whole(list, MAX_WHOLE)?;
        let mut records = BTreeSet::new();
        let mut at = 0;
        while let (Some(length), Some(record)) = (number::le16(&list, at + 4), number::le64(&list, at + 16)) {
            if length < 26 {
                break;
            }
            records.insert(record & 0xffff_ffff_ffff);
            at += usize::from(length);
        }
        records.remove(&number_of);
        if records.len() > MAX_RECORDS {
            return Err(damaged("a file of too many records"));
        }
        let mut parts: Vec<Attribute> = own.into_iter().filter(|attribute| attribute.kind != LIST).collect();
        for record in records {
            parts.extend(self.own_attributes(record)?.into_iter().filter(|attribute| attribute.kind != LIST));
        }
        parts.sort_by_key(|part| (part.kind, part.name.clone(), part.first));
        let mut whole: Vec<Attribute> = Vec::new();
        for part in parts {
            match (whole.last_mut(), part.value) {
                (Some(Attribute { kind, name, value: Value::Runs { runs, .. }, .. }), Value::Runs { runs: more, .. })
                    if *kind == part.kind && *name == part.name && part.first > 0 =>
                {
                    runs.extend(more);
                }
                (_, value) => whole.push(Attribute { value, ..part }),
            }
        }
        Ok(whole)
    }

    /// All bytes of an attribute.
    fn whole(&self, attribute: &Attribute, most: u64) -> io::Result<Vec<u8>> {
        match &attribute.value {
            Value::Resident(bytes) => Ok(bytes.clone()),
            Value::Runs { size, .. } if *size > most => Err(damaged("an attribute is too long")),
            Value::Runs { runs, size } => {
                let mut bytes = vec![0; *size as usize];
                self.read_runs(runs, 0, &mut bytes)?;
                Ok(bytes)
            }
        }
    }

    fn names(&self, folder: u64) -> io::Result<Vec<Found>> {
        let attributes = self.attributes(folder)?;
        let of = |kind: u32| attributes.iter().find(|attribute| attribute.kind == kind && attribute.name == "$I30");
        let root = self.whole(of(INDEX_ROOT).ok_or(io::ErrorKind::NotADirectory)?, MAX_WHOLE)?;
        let mut found = Vec::new();
        entries(root.get(16..).unwrap_or_default(), &mut found);
        let Some(Attribute { value: Value::Runs { runs, size }, .. }) = of(INDEX) else { return Ok(found) };
        if *size > MAX_INDEX {
            return Err(damaged("a folder's index is too long"));
        }
        let used = of(BITMAP).map(|bitmap| self.whole(bitmap, MAX_WHOLE)).transpose()?.unwrap_or_default();
        let mut block = vec![0; self.index as usize];
        for n in 0..size / self.index {
            let is_used = used.get((n / 8) as usize).is_some_and(|byte| byte >> (n % 8) & 1 == 1);
            if is_used {
                self.read_runs(runs, n * self.index, &mut block)?;
                Self::mend(&mut block, b"INDX")?;
                entries(&block[24..], &mut found);
            }
            if found.len() > MAX_ENTRIES {
                break;
            }
        }
        Ok(found)
    }

    fn find(&self, path: &str) -> io::Result<u64> {
        let mut at = ROOT;
        for part in path.split('/').filter(|part| !part.is_empty()) {
            let is_it = |found: &Found| found.name.to_lowercase() == part.to_lowercase();
            at = self.names(at)?.into_iter().find(is_it).ok_or(io::ErrorKind::NotFound)?.record;
        }
        Ok(at)
    }
}

/// The names behind a header of an index.
fn entries(index: &[u8], found: &mut Vec<Found>) {
    let mut at = number::le32(index, 0).unwrap_or_default() as usize;
    let end = (number::le32(index, 4).unwrap_or_default() as usize).min(index.len());
    while at < end {
        let (Some(record), Some(length), Some(flags)) =
            (number::le64(index, at), number::le16(index, at + 8), number::le16(index, at + 12))
        else {
            return;
        };
        // The last one has no name.
        if flags & 2 != 0 || length < 16 {
            return;
        }
        let name = index.get(at + 16..at + usize::from(length)).unwrap_or_default();
        if let (Some(attributes), Some(count), Some(space)) = (number::le32(name, 56), name.get(64), name.get(65)) {
            let units: Vec<u16> = (0..usize::from(*count)).filter_map(|n| number::le16(name, 66 + n * 2)).collect();
            let is_dir = attributes & 0x1000_0000 != 0;
            found.push(Found { name: String::from_utf16_lossy(&units), record: record & 0xffff_ffff_ffff, is_dir, is_short: *space == 2 });
        }
        at += usize::from(length);
    }
}

struct Content {
    ntfs: Ntfs,
    value: Value,
    at: u64,
    size: u64,
}

impl Read for Content {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let count = (buf.len() as u64).min(self.size - self.at).min(1 << 20) as usize;
        match &self.value {
            Value::Resident(bytes) => buf[..count].copy_from_slice(&bytes[self.at as usize..self.at as usize + count]),
            Value::Runs { runs, .. } => self.ntfs.read_runs(runs, self.at, &mut buf[..count])?,
        }
        self.at += count as u64;
        Ok(count)
    }
}

impl Tree for Ntfs {
    fn open(&self, path: &str) -> io::Result<File> {
        let data = self.attributes(self.find(path)?)?.into_iter().find(|attribute| attribute.kind == DATA && attribute.name.is_empty());
        let data = data.ok_or(io::ErrorKind::IsADirectory)?;
        let size = match &data.value {
            Value::Resident(bytes) => bytes.len() as u64,
            Value::Runs { .. } if data.is_packed => return Err(io::Error::other("it is compressed or encrypted, which is not read")),
            Value::Runs { size, .. } => *size,
        };
        Ok(File { size, reader: Box::new(Content { ntfs: self.clone(), value: data.value, at: 0, size }) })
    }

    fn list(&self, path: &str) -> io::Result<Vec<Entry>> {
        let names = self.names(self.find(path)?)?.into_iter().filter(|found| !found.is_short && found.name != ".");
        Ok(names.map(|found| Entry { name: found.name, is_dir: found.is_dir }).collect())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::disallowed_methods)]
mod tests {
    use super::super::volume::tests::volume;
    use super::*;
    use crate::guest::inspect::tests::{Folder, run};

    #[test]
    fn what_mkntfs_made_is_read_and_nothing_else_panics() {
        let folder = Folder::new();
        let image = folder.path().join("ntfs.img");
        std::fs::File::create(&image).unwrap().set_len(16 << 20).unwrap();
        let path = image.to_str().unwrap();
        run("mkntfs", &["-q", "-F", "-f", "-L", "System ß", path], "");
        // A file that is resident, and one in runs.
        let file = folder.path().join("file");
        let bytes: Vec<u8> = (0..300_000u32).map(|n| (n * 7 + n / 251) as u8).collect();
        for (name, content) in [("small.txt", b"hello".as_slice()), ("bootmgr", &bytes)] {
            std::fs::write(&file, content).unwrap();
            run("ntfscp", &["-q", "-f", path, file.to_str().unwrap(), name], "");
        }
        let good = std::fs::read(&image).unwrap();
        assert_eq!(label(&volume(good.clone())).as_deref(), Some("System ß"));
        let ntfs = Ntfs::open(&volume(good.clone())).unwrap();
        let names: Vec<String> = ntfs.list("/").unwrap().into_iter().map(|entry| entry.name).collect();
        assert!(["$MFT", "small.txt", "bootmgr"].iter().all(|name| names.iter().any(|known| known == name)), "{names:?}");
        let read = |path: &str| {
            let mut bytes = Vec::new();
            ntfs.open(path).and_then(|mut file| file.reader.read_to_end(&mut bytes)).map(|_| bytes)
        };
        assert_eq!(read("/SMALL.TXT").unwrap(), b"hello");
        assert!(read("/bootmgr").unwrap() == bytes && read("/nothing").is_err() && read("/small.txt/x").is_err());
        // Each byte of the boot sector and of the first records, turned over or another.
        let table = number::le64(&good, 48).unwrap() as usize * 4096;
        let places = (0..90).chain((0..6 * 1024).map(|at| table + at));
        for (n, at) in places.enumerate() {
            let mut bad = good[..good.len() / 2].to_vec();
            bad[at] ^= if n % 2 == 0 { 0xff } else { 1 << (n % 8) };
            if let Ok(ntfs) = Ntfs::open(&volume(bad)) {
                let _ = ntfs.list("/");
                let _ = ntfs.open("/bootmgr").map(|file| file.reader.take(1 << 20).read_to_end(&mut Vec::new()));
            }
        }
    }
}

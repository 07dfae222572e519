//! FAT12, FAT16 and FAT32: where EFI's boot loaders lie, and syslinux's kernels.
//!
//! Owns: reading names and files of a FAT. Written here because little is needed and all of it must be bounded: every chain of clusters ends
//! with what its file or folder may have. Never: writes. A crash here costs nothing.

use std::io::{self, Read};

use super::tree::{Entry, File, Tree};
use super::volume::{Volume, number};

/// Most bytes of a folder.
const MAX_FOLDER: u64 = 2 << 20;
/// Deepest path.
const MAX_DEPTH: usize = 32;

#[derive(Clone, Copy, PartialEq)]
enum Width {
    Bits12,
    Bits16,
    Bits32,
}

/// A file system.
#[derive(Clone)]
pub struct Fat {
    volume: Volume,
    width: Width,
    /// Where the first table lies.
    table: u64,
    /// Where the root folder of the older widths lies, and its bytes.
    root: (u64, u64),
    /// Where cluster 2 lies.
    data: u64,
    /// Bytes of a cluster.
    cluster: u64,
    /// One more than the last cluster.
    clusters: u32,
    /// First cluster of the root folder of FAT32.
    root_cluster: u32,
}

fn damaged(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the FAT is damaged: {what}"))
}

/// What a folder says of a name.
#[derive(Clone, Debug)]
struct Found {
    name: String,
    /// Its other name of eight and three.
    short: String,
    is_dir: bool,
    first: u32,
    size: u64,
}

impl Fat {
    /// Opens it.
    pub fn open(volume: &Volume) -> io::Result<Self> {
        let block = volume.bytes(0, 512)?;
        let le16 = |at| u64::from(number::le16(&block, at).unwrap_or_default());
        let le32 = |at| u64::from(number::le32(&block, at).unwrap_or_default());
        let (sector, per_cluster) = (le16(11), u64::from(block[13]));
        if !(512..=4096).contains(&sector) || !sector.is_power_of_two() || !per_cluster.is_power_of_two() {
            return Err(damaged("sectors or clusters of an impossible size"));
        }
        let (reserved, tables, entries) = (le16(14), u64::from(block[16]), le16(17));
        let sectors = if le16(19) != 0 { le16(19) } else { le32(32) };
        let per_table = if le16(22) != 0 { le16(22) } else { le32(36) };
        let root = (reserved + tables * per_table) * sector;
        let root_len = (entries * 32).next_multiple_of(sector);
        let data = root + root_len;
        let total = sectors * sector;
        if reserved == 0 || tables == 0 || per_table == 0 || data >= total || total > volume.len() {
            return Err(damaged("its parts do not fit into it"));
        }
        let cluster = per_cluster * sector;
        let count = (total - data) / cluster;
        let width = match count {
            ..4085 => Width::Bits12,
            4085..65525 => Width::Bits16,
            _ => Width::Bits32,
        };
        let clusters = u32::try_from(count + 2).map_err(|_| damaged("too many clusters"))?;
        let root_cluster = if width == Width::Bits32 { number::le32(&block, 44).unwrap_or_default() } else { 0 };
        Ok(Self { volume: volume.clone(), width, table: reserved * sector, root: (root, root_len), data, cluster, clusters, root_cluster })
    }

    /// The cluster behind one; nothing at the end of its chain.
    fn next(&self, cluster: u32) -> io::Result<Option<u32>> {
        let n = u64::from(cluster);
        let next = match self.width {
            Width::Bits12 => {
                let pair = self.volume.bytes(self.table + n + n / 2, 2)?;
                let pair = u32::from(pair[0]) | u32::from(pair[1]) << 8;
                if n.is_multiple_of(2) { pair & 0xfff } else { pair >> 4 }
            }
            Width::Bits16 => {
                let pair = self.volume.bytes(self.table + n * 2, 2)?;
                u32::from(pair[0]) | u32::from(pair[1]) << 8
            }
            Width::Bits32 => number::le32(&self.volume.bytes(self.table + n * 4, 4)?, 0).unwrap_or_default() & 0x0fff_ffff,
        };
        let end = match self.width {
            Width::Bits12 => 0xff8,
            Width::Bits16 => 0xfff8,
            Width::Bits32 => 0x0fff_fff8,
        };
        match next {
            next if next >= end => Ok(None),
            next if (2..self.clusters).contains(&next) => Ok(Some(next)),
            _ => Err(damaged("a chain leads out of it")),
        }
    }

    fn place(&self, cluster: u32) -> io::Result<u64> {
        if !(2..self.clusters).contains(&cluster) {
            return Err(damaged("a chain begins outside of it"));
        }
        Ok(self.data + u64::from(cluster - 2) * self.cluster)
    }

    /// All bytes of a folder; `first` 0: the root.
    fn folder(&self, first: u32) -> io::Result<Vec<u8>> {
        let first = match (first, self.width) {
            (0, Width::Bits32) => self.root_cluster,
            (0, _) => return self.volume.bytes(self.root.0, self.root.1.min(MAX_FOLDER) as usize),
            (first, _) => first,
        };
        let mut bytes = Vec::new();
        let mut at = Some(first);
        while let Some(cluster) = at {
            if bytes.len() as u64 + self.cluster > MAX_FOLDER {
                return Err(damaged("a folder without an end"));
            }
            bytes.extend(self.volume.bytes(self.place(cluster)?, self.cluster as usize)?);
            at = self.next(cluster)?;
        }
        Ok(bytes)
    }

    fn names(&self, first: u32) -> io::Result<Vec<Found>> {
        let bytes = self.folder(first)?;
        let mut found = Vec::new();
        // Parts of a long name, the last one first, and the sum that they belong to.
        let mut long: Vec<u16> = Vec::new();
        let mut sum = None;
        for entry in bytes.chunks_exact(32) {
            match (entry[0], entry[11]) {
                (0, _) => break,
                (0xe5, _) => (long, sum) = (Vec::new(), None),
                (order, 0x0f) => {
                    if order & 0x40 != 0 || sum != Some(entry[13]) {
                        (long, sum) = (Vec::new(), Some(entry[13]));
                    }
                    let units = [1, 3, 5, 7, 9, 14, 16, 18, 20, 22, 24, 28, 30].map(|at| number::le16(entry, at).unwrap_or_default());
                    if long.len() < 260 {
                        long.splice(0..0, units);
                    }
                }
                // The volume's label.
                (_, kind) if kind & 0x08 != 0 => (long, sum) = (Vec::new(), None),
                (_, kind) => {
                    let short = short_name(entry);
                    let is_named = sum == Some(checksum(&entry[..11])) && !long.is_empty();
                    let units: Vec<u16> = long.iter().copied().take_while(|unit| *unit != 0 && *unit != 0xffff).collect();
                    let name = if is_named { String::from_utf16_lossy(&units) } else { short.clone() };
                    let high = if self.width == Width::Bits32 { number::le16(entry, 20).unwrap_or_default() } else { 0 };
                    let first = u32::from(high) << 16 | u32::from(number::le16(entry, 26).unwrap_or_default());
                    let size = u64::from(number::le32(entry, 28).unwrap_or_default());
                    if !matches!(short.as_str(), "." | "..") {
                        found.push(Found { name, short, is_dir: kind & 0x10 != 0, first, size });
                    }
                    (long, sum) = (Vec::new(), None);
                }
            }
        }
        Ok(found)
    }

    /// What lies at a path; nothing for the root.
    fn find(&self, path: &str) -> io::Result<Option<Found>> {
        let mut at: Option<Found> = None;
        for (depth, part) in path.split('/').filter(|part| !part.is_empty()).enumerate() {
            let first = match &at {
                _ if depth >= MAX_DEPTH => return Err(damaged("a path without an end")),
                None => 0,
                // What says of itself that it is the root would be a ring.
                Some(folder) if folder.is_dir && folder.first != 0 => folder.first,
                Some(_) => return Err(io::ErrorKind::NotFound.into()),
            };
            let is_it = |found: &Found| found.name.eq_ignore_ascii_case(part) || found.short.eq_ignore_ascii_case(part);
            at = Some(self.names(first)?.into_iter().find(is_it).ok_or(io::ErrorKind::NotFound)?);
        }
        Ok(at)
    }
}

/// `NAME.EXT`, each part in lower case where its entry says so.
fn short_name(entry: &[u8]) -> String {
    let part = |bytes: &[u8], lower: bool| {
        let text = String::from_utf8_lossy(bytes).trim_end().to_owned();
        if lower { text.to_ascii_lowercase() } else { text }
    };
    let (name, ending) = (part(&entry[..8], entry[12] & 0x08 != 0), part(&entry[8..11], entry[12] & 0x10 != 0));
    if ending.is_empty() { name } else { format!("{name}.{ending}") }
}

fn checksum(short: &[u8]) -> u8 {
    short.iter().fold(0u8, |sum, byte| sum.rotate_right(1).wrapping_add(*byte))
}

/// A file's bytes, cluster by cluster: as many as its size asks for, whatever its chain does.
struct Content {
    fat: Fat,
    cluster: Option<u32>,
    /// Bytes of this cluster that were given.
    given: u64,
    left: u64,
}

impl Read for Content {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.left == 0 || buf.is_empty() {
            return Ok(0);
        }
        if self.given == self.fat.cluster {
            let last = self.cluster.ok_or_else(|| damaged("a file is shorter than its size"))?;
            self.cluster = self.fat.next(last)?;
            self.given = 0;
        }
        let cluster = self.cluster.ok_or_else(|| damaged("a file is shorter than its size"))?;
        let count = (self.fat.cluster - self.given).min(self.left).min(buf.len() as u64);
        self.fat.volume.read_at(self.fat.place(cluster)? + self.given, &mut buf[..count as usize])?;
        self.given += count;
        self.left -= count;
        Ok(count as usize)
    }
}

impl Tree for Fat {
    fn open(&self, path: &str) -> io::Result<File> {
        let found = self.find(path)?.filter(|found| !found.is_dir).ok_or(io::ErrorKind::NotFound)?;
        let content = Content { fat: self.clone(), cluster: Some(found.first), given: 0, left: found.size };
        Ok(File { size: found.size, reader: Box::new(content) })
    }

    fn list(&self, path: &str) -> io::Result<Vec<Entry>> {
        let first = match self.find(path)? {
            None => 0,
            Some(folder) if folder.is_dir && folder.first != 0 => folder.first,
            Some(_) => return Err(io::ErrorKind::NotFound.into()),
        };
        Ok(self.names(first)?.into_iter().map(|found| Entry { name: found.name, is_dir: found.is_dir }).collect())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::disallowed_methods)]
mod tests {
    use super::super::volume::tests::volume;
    use super::*;
    use crate::guest::inspect::tests::{Folder, run};

    /// 64 MiB with a file of several clusters, in a folder with a long name.
    fn image(more: &[&str]) -> (Vec<u8>, Vec<u8>) {
        let folder = Folder::new();
        let (image, file) = (folder.path().join("fat.img"), folder.path().join("file"));
        let bytes: Vec<u8> = (0..100_000u32).map(|n| (n * 7 + n / 251) as u8).collect();
        std::fs::write(&file, &bytes).unwrap();
        std::fs::File::create(&image).unwrap().set_len(64 << 20).unwrap();
        let path = image.to_str().unwrap();
        run("mformat", &[&["-i", path], more, &["-T", "131072", "-h", "64", "-s", "32", "::"]].concat(), "");
        run("mmd", &["-i", path, "::/EFI", "::/EFI/a folder with a long name"], "");
        run("mcopy", &["-i", path, file.to_str().unwrap(), "::/EFI/a folder with a long name/kernel image-6.1.efi"], "");
        (std::fs::read(image).unwrap(), bytes)
    }

    #[test]
    fn files_are_found_and_read_at_each_width() {
        // Clusters of 16 KiB, of 1 KiB, and FAT32.
        for (more, width) in [(&["-c", "32"][..], Width::Bits12), (&["-c", "2"], Width::Bits16), (&["-F", "-c", "1"], Width::Bits32)] {
            let (bytes, content) = image(more);
            let fat = Fat::open(&volume(bytes)).unwrap();
            assert!(fat.width == width);
            assert_eq!(fat.list("/").unwrap(), [Entry { name: "EFI".to_owned(), is_dir: true }]);
            let entries = fat.list("/efi/A FOLDER with a long name").unwrap();
            assert_eq!(entries, [Entry { name: "kernel image-6.1.efi".to_owned(), is_dir: false }]);
            let mut file = fat.open("/EFI/a folder with a long name/kernel image-6.1.efi").unwrap();
            let mut read = Vec::new();
            file.reader.read_to_end(&mut read).unwrap();
            assert!(file.size == 100_000 && read == content);
            for nothing in ["/EFI", "/nothing", "/EFI/nothing/x"] {
                assert!(fat.open(nothing).is_err(), "{nothing}");
            }
        }
    }

    #[test]
    fn a_fat_that_lies_ends() {
        let (good, _) = image(&["-F", "-c", "1"]);
        let fat = Fat::open(&volume(good.clone())).unwrap();
        // Every cluster is followed by itself or by the second: rings wherever one looks.
        let mut rings = good.clone();
        for n in 2..fat.clusters as usize {
            let at = fat.table as usize + n * 4;
            rings[at..at + 4].copy_from_slice(&2u32.to_le_bytes());
        }
        let ring = Fat::open(&volume(rings)).unwrap();
        assert!(ring.list("/").is_err() && ring.open("/EFI/x").is_err());
        // A file of 4 GiB in a chain of 100 KB.
        let path = "/EFI/a folder with a long name/kernel image-6.1.efi";
        let found = fat.find(path).unwrap().unwrap();
        let mut content = Content { fat: fat.clone(), cluster: Some(found.first), given: 0, left: u64::from(u32::MAX) };
        assert!(content.read_to_end(&mut Vec::new()).is_err());
        // Bytes of the boot sector, each turned over.
        for at in 0..90 {
            let mut bad = good.clone();
            bad[at] ^= 0xff;
            if let Ok(fat) = Fat::open(&volume(bad)) {
                let _ = fat.list("/");
                let _ = fat.open(path).map(|mut file| file.reader.read_to_end(&mut Vec::new()));
            }
        }
    }
}

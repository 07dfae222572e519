//! ext2, ext3 and ext4, by the crate ext4-view.
//!
//! Owns: what is checked before the crate may allocate by a superblock's word, and the way round a journal that it cannot read.
//! Never: writes. A crash here costs nothing.

use std::io::{self, Read};

use ext4_view::{Ext4, Ext4Error, Ext4Read};

use super::tree::{Entry, File, MAX_ENTRIES, Tree};
use super::volume::{Volume, number};

/// Block groups of the largest file system that is read: 16 TiB of 128 MiB each.
const MAX_GROUPS: u64 = 1 << 17;
/// Offset of the superblock, its length, and the flag in it that says that its journal is to be replayed.
const SUPERBLOCK: u64 = 1024;
const FEATURES: usize = 0x60;
const RECOVERY: u32 = 4;

/// A file system.
pub struct Ext(Ext4);

impl Ext {
    /// Opens it; with a note where it was opened otherwise than whole.
    pub fn open(volume: &Volume) -> io::Result<(Self, Option<String>)> {
        let superblock = volume.bytes(SUPERBLOCK, 1024)?;
        check(&superblock, volume.len())?;
        let load = |masked| Ext4::load(Box::new(Reader { volume: volume.clone(), masked }));
        let needs_recovery = number::le32(&superblock, FEATURES).is_some_and(|features| features & RECOVERY != 0);
        match load(false) {
            Ok(fs) => Ok((Self(fs), None)),
            // A journal without checksums, of older systems: the crate reads none, so what it holds is not seen.
            Err(Ext4Error::Incompatible(reason)) if needs_recovery => match load(true) {
                Ok(fs) => Ok((Self(fs), Some(format!("its journal was not replayed ({reason:?})")))),
                Err(_) => Err(io::Error::other(format!("{reason:?}"))),
            },
            Err(e) => Err(told(e)),
        }
    }
}

/// What the crate would believe.
fn check(superblock: &[u8], len: u64) -> io::Result<()> {
    let odd = |what: &str| Err(io::Error::new(io::ErrorKind::InvalidData, format!("its superblock is damaged: {what}")));
    let field = |at| number::le32(superblock, at).unwrap_or_default();
    let log = field(0x18);
    if log > 6 {
        return odd("blocks of more than 64 KiB");
    }
    let block = 1024u64 << log;
    let is_64 = field(FEATURES) & 0x80 != 0;
    let blocks = u64::from(field(0x4)) | if is_64 { u64::from(field(0x150)) << 32 } else { 0 };
    // It is read as 64 bit whatever the flag says.
    if !is_64 && field(0x150) != 0 {
        return odd("more blocks than it can count");
    }
    if blocks.checked_mul(block).is_none_or(|bytes| bytes > len) {
        return odd("it is larger than what it lies in");
    }
    let per_group = u64::from(field(0x20));
    if per_group == 0 || per_group > block * 8 {
        return odd("block groups of an impossible size");
    }
    if blocks / per_group > MAX_GROUPS {
        return odd("more block groups than are looked at");
    }
    Ok(())
}

fn told(error: Ext4Error) -> io::Error {
    match error {
        Ext4Error::NotFound => io::ErrorKind::NotFound.into(),
        // The volume's own words: its time, its bounds.
        Ext4Error::Io(e) => match e.downcast::<io::Error>() {
            Ok(e) => *e,
            Err(e) => io::Error::other(e),
        },
        e => io::Error::other(e.to_string()),
    }
}

struct Reader {
    volume: Volume,
    /// Whether the superblock is shown without its wish for a replay.
    masked: bool,
}

impl Ext4Read for Reader {
    fn read(&mut self, start_byte: u64, dst: &mut [u8]) -> Result<(), Box<dyn std::error::Error + Send + Sync + 'static>> {
        self.volume.read_at(start_byte, dst)?;
        if self.masked && start_byte == SUPERBLOCK && dst.len() == 1024 {
            let features = number::le32(dst, FEATURES).unwrap_or_default() & !RECOVERY;
            dst[FEATURES..FEATURES + 4].copy_from_slice(&features.to_le_bytes());
        }
        Ok(())
    }
}

struct Content(ext4_view::File);

impl Read for Content {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        // It is given a block at a time.
        self.0.read_bytes(buf).map_err(told)
    }
}

impl Tree for Ext {
    fn open(&self, path: &str) -> io::Result<File> {
        let file = self.0.open(path).map_err(told)?;
        Ok(File { size: file.metadata().len(), reader: Box::new(Content(file)) })
    }

    fn list(&self, path: &str) -> io::Result<Vec<Entry>> {
        let mut entries = Vec::new();
        for entry in self.0.read_dir(path).map_err(told)?.take(MAX_ENTRIES) {
            let entry = entry.map_err(told)?;
            let name = entry.file_name();
            let Ok(name) = name.as_str() else { continue };
            if !matches!(name, "." | "..") {
                let is_dir = entry.file_type().is_ok_and(|kind| kind.is_dir());
                entries.push(Entry { name: name.to_owned(), is_dir });
            }
        }
        Ok(entries)
    }
}

//! The folders of an XFS: in their inode, in one block, or in many.
//!
//! Owns: the names in them. Never: uses their indexes: a folder is read through, which ends with its bound. A crash here costs nothing.

use std::io;

use super::super::tree::MAX_ENTRIES;
use super::{FOLDER, Inode, Xfs, be, damaged};

/// Where a folder's names end and its indexes begin, in its own bytes.
const INDEXES: u64 = 32 << 30;
/// Most bytes of a folder's names.
const MAX_NAMES: u64 = 32 << 20;

/// A name in a folder.
pub(super) struct Name {
    pub(super) name: String,
    pub(super) inode: u64,
    /// Nothing where the folder does not say.
    pub(super) is_dir: Option<bool>,
}

impl Xfs {
    /// Whether an inode is a folder.
    pub(super) fn is_folder(&self, number: u64) -> bool {
        self.inode(number).is_ok_and(|inode| inode.kind() == FOLDER)
    }

    /// The names in a folder.
    pub(super) fn names(&self, folder: &Inode) -> io::Result<Vec<Name>> {
        if folder.kind() != FOLDER {
            return Err(io::ErrorKind::NotADirectory.into());
        }
        let mut names = Vec::new();
        if folder.format == 1 {
            self.in_inode(&folder.fork, &mut names)?;
            return Ok(names);
        }
        let extents = self.extents(folder)?;
        let mut block = vec![0; self.folder_block as usize];
        let mut read = 0;
        let runs = extents.iter().take_while(|extent| extent.start < INDEXES);
        for start in runs.flat_map(|extent| (extent.start..extent.start + extent.len).step_by(self.folder_block as usize)) {
            if !start.is_multiple_of(self.folder_block) {
                continue;
            }
            read += self.folder_block;
            if read > MAX_NAMES || names.len() > MAX_ENTRIES {
                break;
            }
            self.read(&extents, start, &mut block)?;
            self.in_block(&block, &mut names)?;
        }
        Ok(names)
    }

    fn push(&self, name: &[u8], inode: u64, kind: Option<u8>, names: &mut Vec<Name>) {
        if let Ok(name) = std::str::from_utf8(name)
            && !matches!(name, "." | ".." | "")
        {
            let is_dir = kind.filter(|kind| *kind != 0).map(|kind| kind == 2);
            names.push(Name { name: name.to_owned(), inode, is_dir });
        }
    }

    fn in_inode(&self, fork: &[u8], names: &mut Vec<Name>) -> io::Result<()> {
        let odd = || damaged("a folder in its inode");
        let (count, large) = (*fork.first().ok_or_else(odd)?, *fork.get(1).ok_or_else(odd)? > 0);
        let width = if large { 8 } else { 4 };
        let mut at = 2 + width;
        for _ in 0..count {
            let length = usize::from(*fork.get(at).ok_or_else(odd)?);
            let name = fork.get(at + 3..at + 3 + length).ok_or_else(odd)?;
            at += 3 + length;
            let kind = if self.has_kinds { fork.get(at).copied() } else { None };
            at += usize::from(self.has_kinds);
            let inode = if large { be::u64(fork, at) } else { be::u32(fork, at).map(u64::from) };
            self.push(name, inode.ok_or_else(odd)?, kind, names);
            at += width;
        }
        Ok(())
    }

    fn in_block(&self, block: &[u8], names: &mut Vec<Name>) -> io::Result<()> {
        let odd = || damaged("a folder's block");
        let (is_alone, header) = match block.get(..4) {
            Some(b"XDB3") => (true, 64),
            Some(b"XDD3") => (false, 64),
            Some(b"XD2B") => (true, 16),
            Some(b"XD2D") => (false, 16),
            _ => return Err(odd()),
        };
        // One that is alone has its index behind its names.
        let end = if is_alone {
            let count = be::u32(block, block.len() - 8).ok_or_else(odd)? as usize;
            count.checked_mul(8).and_then(|index| (block.len() - 8).checked_sub(index)).ok_or_else(odd)?
        } else {
            block.len()
        };
        let mut at = header;
        while at + 8 < end {
            if be::u16(block, at) == Some(0xffff) {
                let length = usize::from(be::u16(block, at + 2).unwrap_or_default());
                if length < 8 {
                    return Err(odd());
                }
                at += length;
                continue;
            }
            let inode = be::u64(block, at).ok_or_else(odd)?;
            let length = usize::from(*block.get(at + 8).ok_or_else(odd)?);
            let name = block.get(at + 9..at + 9 + length).ok_or_else(odd)?;
            let kind = if self.has_kinds { block.get(at + 9 + length).copied() } else { None };
            self.push(name, inode, kind, names);
            at += (8 + 1 + length + usize::from(self.has_kinds) + 2).next_multiple_of(8);
        }
        Ok(())
    }
}

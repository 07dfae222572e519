//! XFS, versions 4 and 5: what Red Hat's systems have for their roots and for /boot.
//!
//! Owns: reading inodes, extents (in the inode and in trees), folders in all their forms, and links. Written here because no crate reads it, and
//! all of it must be bounded. Never: writes, replays the log: after a power failure what was written last may not be seen.
//! A crash here costs nothing.
//!
//! ```text
//! inode number ─► group, block, place ─► inode ─► fork: names or a link in it │ extents │ root of a tree ─► … ─► extents
//! ```

mod folder;

use std::io::{self, Read};

use super::tree::{Entry, File, Tree};
use super::volume::Volume;

/// Most extents of a file, blocks of its tree, and levels of it.
const MAX_EXTENTS: usize = 100_000;
const MAX_NODES: usize = 20_000;
const MAX_LEVEL: u16 = 9;
/// Most bytes of a link, and links on a path.
const MAX_LINK: u64 = 1024;
const MAX_LINKS: u32 = 40;
/// Kinds of files in a mode.
const FOLDER: u16 = 0x4000;
const REGULAR: u16 = 0x8000;
const LINK: u16 = 0xa000;

fn damaged(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the XFS is damaged: {what}"))
}

/// Big-endian numbers at an offset; nothing past the end.
mod be {
    /// 16 bits.
    pub fn u16(bytes: &[u8], at: usize) -> Option<u16> {
        Some(u16::from_be_bytes(bytes.get(at..at.checked_add(2)?)?.try_into().ok()?))
    }

    /// 32 bits.
    pub fn u32(bytes: &[u8], at: usize) -> Option<u32> {
        Some(u32::from_be_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
    }

    /// 64 bits.
    pub fn u64(bytes: &[u8], at: usize) -> Option<u64> {
        Some(u64::from_be_bytes(bytes.get(at..at.checked_add(8)?)?.try_into().ok()?))
    }
}

/// A file system.
#[derive(Clone)]
pub struct Xfs {
    volume: Volume,
    /// Bytes of a block, and of a folder's block.
    block: u64,
    folder_block: u64,
    inode: u64,
    /// Bits of an inode's number that are its place in its block, and its block in its group.
    place_bits: u32,
    group_bits: u32,
    group_blocks: u64,
    groups: u64,
    root: u64,
    /// Whether blocks bear checksums, and so longer headers.
    is_5: bool,
    /// Whether folders tell the kind of a name.
    has_kinds: bool,
}

/// A run of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Extent {
    /// First byte in the file.
    start: u64,
    len: u64,
    /// Where it lies; nothing where it was never written.
    at: Option<u64>,
}

struct Inode {
    mode: u16,
    size: u64,
    format: u8,
    extents: u64,
    fork: Vec<u8>,
}

impl Inode {
    fn kind(&self) -> u16 {
        self.mode & 0xf000
    }
}

impl Xfs {
    /// Opens it.
    pub fn open(volume: &Volume) -> io::Result<Self> {
        let head = volume.bytes(0, 512)?;
        let short = || damaged("its superblock");
        let u32 = |at| be::u32(&head, at).map(u64::from).ok_or_else(short);
        let u64 = |at| be::u64(&head, at).ok_or_else(short);
        let (block, block_bits, inode_bits) = (u32(4)?, u32::from(head[120]), u32::from(head[122]));
        let (place_bits, group_bits, folder_bits) = (u32::from(head[123]), u32::from(head[124]), u32::from(head[192]));
        let version = be::u16(&head, 100).unwrap_or_default() & 15;
        let fits = (9..=16).contains(&block_bits) && block == 1 << block_bits && (8..=11).contains(&inode_bits);
        let fits = fits && place_bits + inode_bits == block_bits && (1..32).contains(&group_bits) && block_bits + folder_bits <= 16;
        let (group_blocks, groups) = (u32(84)?, u32(88)?);
        let fits = fits && group_blocks > 0 && group_blocks <= 1 << group_bits && groups > 0;
        if !fits || u64(8)?.checked_mul(block).is_none_or(|bytes| bytes > volume.len()) {
            return Err(short());
        }
        if !matches!(version, 4 | 5) {
            return Err(io::Error::other(format!("XFS of version {version} is not read")));
        }
        let is_5 = version == 5;
        let has_kinds = if is_5 { u32(216)? & 1 != 0 } else { u32(200)? & 0x200 != 0 };
        Ok(Self {
            volume: volume.clone(),
            block,
            folder_block: block << folder_bits,
            inode: 1 << inode_bits,
            place_bits,
            group_bits,
            group_blocks,
            groups,
            root: u64(56)?,
            is_5,
            has_kinds,
        })
    }

    /// Where a block lies that is numbered by group.
    fn place(&self, number: u64) -> io::Result<u64> {
        let (group, within) = (number >> self.group_bits, number & ((1 << self.group_bits) - 1));
        if group >= self.groups || within >= self.group_blocks {
            return Err(damaged("a block that is none"));
        }
        Ok((group * self.group_blocks + within) * self.block)
    }

    fn inode(&self, number: u64) -> io::Result<Inode> {
        let at = self.place(number >> self.place_bits)? + (number & ((1 << self.place_bits) - 1)) * self.inode;
        let bytes = self.volume.bytes(at, self.inode as usize)?;
        let short = || damaged("an inode that is none");
        if be::u16(&bytes, 0) != Some(0x494e) {
            return Err(short());
        }
        let base = if bytes[4] >= 3 { 176 } else { 100 };
        let fork_len = if bytes[82] == 0 { bytes.len().saturating_sub(base) } else { usize::from(bytes[82]) * 8 };
        let fork = bytes.get(base..base.saturating_add(fork_len)).ok_or_else(short)?.to_vec();
        // Of large counts another field tells.
        let is_large = bytes[4] >= 3 && be::u64(&bytes, 120).is_some_and(|flags| flags & 0x10 != 0);
        let extents = if is_large { be::u64(&bytes, 24) } else { be::u32(&bytes, 76).map(u64::from) };
        Ok(Inode {
            mode: be::u16(&bytes, 2).ok_or_else(short)?,
            size: be::u64(&bytes, 56).ok_or_else(short)?,
            format: bytes[5],
            extents: extents.ok_or_else(short)?,
            fork,
        })
    }

    /// The extents of a file, in order.
    fn extents(&self, inode: &Inode) -> io::Result<Vec<Extent>> {
        let mut extents = Vec::new();
        match inode.format {
            2 => self.records(&inode.fork, inode.extents, &mut extents)?,
            3 => {
                let (level, count) = (be::u16(&inode.fork, 0).unwrap_or_default(), be::u16(&inode.fork, 2).unwrap_or_default());
                let pointers = self.pointers(&inode.fork, 4, count)?;
                self.walk(level, pointers, &mut extents)?;
            }
            _ => return Err(damaged("a file without extents")),
        }
        let is_ordered = extents.windows(2).all(|pair| pair[0].start + pair[0].len <= pair[1].start);
        if is_ordered { Ok(extents) } else { Err(damaged("extents that overlap")) }
    }

    /// Down a tree, level by level: every level is lower than the one above, so it ends.
    fn walk(&self, level: u16, mut pointers: Vec<u64>, extents: &mut Vec<Extent>) -> io::Result<()> {
        let header = if self.is_5 { 72 } else { 24 };
        let magic: &[u8] = if self.is_5 { b"BMA3" } else { b"BMAP" };
        if level == 0 || level > MAX_LEVEL {
            return Err(damaged("a tree of no height"));
        }
        for level in (0..level).rev() {
            let mut below = Vec::new();
            for pointer in pointers {
                let bytes = self.volume.bytes(self.place(pointer)?, self.block as usize)?;
                if !bytes.starts_with(magic) || be::u16(&bytes, 4) != Some(level) {
                    return Err(damaged("a tree's node that is none"));
                }
                let count = be::u16(&bytes, 6).unwrap_or_default();
                match level {
                    0 => self.records(&bytes[header..], u64::from(count), extents)?,
                    _ => below.extend(self.pointers(&bytes, header, count)?),
                }
                if below.len() > MAX_NODES {
                    return Err(damaged("a tree of too many nodes"));
                }
            }
            pointers = below;
        }
        Ok(())
    }

    /// Pointers of a node: behind as many keys as there is room for.
    fn pointers(&self, bytes: &[u8], header: usize, count: u16) -> io::Result<Vec<u64>> {
        let most = bytes.len().saturating_sub(header) / 16;
        if usize::from(count) > most {
            return Err(damaged("a node with more than it has room for"));
        }
        (0..usize::from(count)).map(|n| be::u64(bytes, header + most * 8 + n * 8).ok_or_else(|| damaged("a node"))).collect()
    }

    fn records(&self, bytes: &[u8], count: u64, extents: &mut Vec<Extent>) -> io::Result<()> {
        let odd = || damaged("an extent that is none");
        if count > (bytes.len() / 16) as u64 || extents.len() as u64 + count > MAX_EXTENTS as u64 {
            return Err(damaged("more extents than there is room for"));
        }
        for n in 0..count as usize {
            let (high, low) = be::u64(bytes, n * 16).zip(be::u64(bytes, n * 16 + 8)).ok_or_else(odd)?;
            let (start, blocks) = ((high & !(1 << 63)) >> 9, low & ((1 << 21) - 1));
            let first = (high & 0x1ff) << 43 | low >> 21;
            let len = blocks * self.block;
            let at = self.place(first)?;
            // Within its group, so that it lies on the disk.
            let last = first.checked_add(blocks.saturating_sub(1)).ok_or_else(odd)?;
            if blocks == 0 || last >> self.group_bits != first >> self.group_bits {
                return Err(odd());
            }
            let start = start.checked_mul(self.block).filter(|start| start.checked_add(len).is_some()).ok_or_else(odd)?;
            extents.push(Extent { start, len, at: (high >> 63 == 0).then_some(at) });
        }
        Ok(())
    }

    /// Fills `buf` from a place in a file.
    fn read(&self, extents: &[Extent], offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(buf.len() as u64).ok_or_else(|| damaged("a file without an end"))?;
        buf.fill(0);
        let first = extents.partition_point(|extent| extent.start + extent.len <= offset);
        for extent in extents[first..].iter().take_while(|extent| extent.start < end) {
            let (from, to) = (extent.start.max(offset), (extent.start + extent.len).min(end));
            if let Some(at) = extent.at {
                self.volume.read_at(at + (from - extent.start), &mut buf[(from - offset) as usize..(to - offset) as usize])?;
            }
        }
        Ok(())
    }

    fn link(&self, inode: &Inode) -> io::Result<String> {
        if inode.size > MAX_LINK {
            return Err(damaged("a link of impossible length"));
        }
        let size = inode.size as usize;
        let bytes = match inode.format {
            1 => inode.fork.get(..size).ok_or_else(|| damaged("a link"))?.to_vec(),
            _ => {
                // One block is enough for the longest, behind its header.
                let mut bytes = vec![0; self.block.min(4096) as usize];
                self.read(&self.extents(inode)?, 0, &mut bytes)?;
                let from = if self.is_5 { 56 } else { 0 };
                bytes.get(from..from + size).ok_or_else(|| damaged("a link"))?.to_vec()
            }
        };
        String::from_utf8(bytes).map_err(|_| io::Error::other("a link that is no UTF-8"))
    }

    /// The inode at a path, links followed.
    fn find(&self, path: &str) -> io::Result<Inode> {
        let mut left: Vec<String> = path.split('/').rev().filter(|part| !part.is_empty()).map(str::to_owned).collect();
        let mut stack = vec![self.root];
        let mut links = 0;
        while let Some(part) = left.pop() {
            match part.as_str() {
                "." => continue,
                ".." => {
                    if stack.len() > 1 {
                        stack.pop();
                    }
                    continue;
                }
                _ => {}
            }
            let above = self.inode(stack.last().copied().unwrap_or(self.root))?;
            let name = self.names(&above)?.into_iter().find(|name| name.name == part).ok_or(io::ErrorKind::NotFound)?;
            let found = self.inode(name.inode)?;
            if found.kind() == LINK {
                links += 1;
                let target = self.link(&found)?;
                if links > MAX_LINKS || left.len() > 256 {
                    return Err(io::Error::other("too many links on the way"));
                }
                if target.starts_with('/') {
                    stack.truncate(1);
                }
                left.extend(target.split('/').rev().filter(|part| !part.is_empty()).map(str::to_owned));
            } else {
                stack.push(name.inode);
            }
        }
        self.inode(stack.last().copied().unwrap_or(self.root))
    }
}

struct Content {
    xfs: Xfs,
    extents: Vec<Extent>,
    at: u64,
    size: u64,
}

impl Read for Content {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let count = (buf.len() as u64).min(self.size - self.at).min(1 << 20) as usize;
        self.xfs.read(&self.extents, self.at, &mut buf[..count])?;
        self.at += count as u64;
        Ok(count)
    }
}

impl Tree for Xfs {
    fn open(&self, path: &str) -> io::Result<File> {
        let inode = self.find(path)?;
        if inode.kind() != REGULAR {
            return Err(io::Error::other("it is no regular file"));
        }
        let extents = if inode.size == 0 { Vec::new() } else { self.extents(&inode)? };
        Ok(File { size: inode.size, reader: Box::new(Content { xfs: self.clone(), extents, at: 0, size: inode.size }) })
    }

    fn list(&self, path: &str) -> io::Result<Vec<Entry>> {
        let inode = self.find(path)?;
        let names = self.names(&inode)?.into_iter();
        Ok(names.map(|name| Entry { is_dir: name.is_dir.unwrap_or_else(|| self.is_folder(name.inode)), name: name.name }).collect())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::disallowed_methods)]
mod tests;

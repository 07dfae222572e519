//! What lies in a partition or a volume, by the marks that every kind leaves at its own place.
//!
//! Owns: kind, label and UUID as `blkid` tells them. Never: reads a file of it. A crash here costs nothing.

use shared::guest::Content;

use super::clean;
use super::volume::{Volume, number};

/// Bytes at an offset; nothing past the end.
fn at(volume: &Volume, offset: u64, len: usize) -> Option<Vec<u8>> {
    volume.bytes(offset, len).ok()
}

/// What lies in it; an empty kind where nothing is known.
pub fn probe(volume: &Volume) -> Content {
    let found = luks(volume)
        .or_else(|| lvm(volume))
        .or_else(|| raid(volume))
        .or_else(|| ext(volume))
        .or_else(|| xfs(volume))
        .or_else(|| btrfs(volume))
        .or_else(|| swap(volume))
        .or_else(|| dos(volume));
    found.unwrap_or_default()
}

fn content(kind: &str, label: &[u8], uuid: String) -> Content {
    Content { file_system: kind.to_owned(), label: text(label), uuid, unknown: String::new() }
}

/// A text that ends at its first NUL or with its field.
fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    clean(String::from_utf8_lossy(&bytes[..end]).trim_end())
}

/// A UUID in the order of its bytes.
fn uuid(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(36);
    for (n, byte) in bytes.iter().enumerate() {
        if matches!(n, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

fn ext(volume: &Volume) -> Option<Content> {
    let block = at(volume, 1024, 1024)?;
    if number::le16(&block, 0x38)? != 0xef53 {
        return None;
    }
    let (compatible, incompatible, read_only) = (number::le32(&block, 0x5c)?, number::le32(&block, 0x60)?, number::le32(&block, 0x64)?);
    // Extents, 64 bit, flexible groups and what came with them; huge files, checksums and what came with them.
    let is_ext4 = incompatible & !0x1f != 0 || read_only & !0x7 != 0;
    let kind = if is_ext4 {
        "ext4"
    } else if compatible & 4 != 0 {
        "ext3"
    } else {
        "ext2"
    };
    Some(content(kind, &block[0x78..0x88], uuid(&block[0x68..0x78])))
}

fn xfs(volume: &Volume) -> Option<Content> {
    let block = at(volume, 0, 512)?;
    (block.starts_with(b"XFSB")).then(|| content("xfs", &block[108..120], uuid(&block[32..48])))
}

fn btrfs(volume: &Volume) -> Option<Content> {
    let block = at(volume, 0x1_0000, 1024)?;
    (block.get(0x40..0x48)? == b"_BHRfS_M").then(|| content("btrfs", &block[0x12b..0x22b], uuid(&block[0x20..0x30])))
}

fn swap(volume: &Volume) -> Option<Content> {
    // The mark stands at the end of a page, whatever that is there.
    for page in [4096u64, 8192, 16384, 65536] {
        let block = at(volume, page - 10, 10)?;
        if block == b"SWAPSPACE2" || block == b"SWAP-SPACE" {
            let head = at(volume, 1024, 64)?;
            return Some(content("swap", &head[28..44], uuid(&head[12..28])));
        }
    }
    None
}

fn luks(volume: &Volume) -> Option<Content> {
    let block = at(volume, 0, 512)?;
    let version = block.get(6..8)?;
    (block.starts_with(b"LUKS\xba\xbe")).then(|| {
        let label = if version == [0, 2] { &block[24..72] } else { &[] };
        content("luks", label, text(&block[168..208]))
    })
}

fn lvm(volume: &Volume) -> Option<Content> {
    let label = super::lvm::label(volume)?;
    Some(content("lvm2", &[], label))
}

fn raid(volume: &Volume) -> Option<Content> {
    for offset in [0u64, 4096] {
        let Some(block) = at(volume, offset, 64) else { continue };
        if number::le32(&block, 0) == Some(0xa92b_4efc) {
            return Some(content("raid", &block[32..64], uuid(&block[16..32])));
        }
    }
    None
}

/// Whatever begins with a DOS boot sector.
fn dos(volume: &Volume) -> Option<Content> {
    let block = at(volume, 0, 512)?;
    let serial =
        |at: usize| number::le32(&block, at).map(|serial| format!("{:04X}-{:04X}", serial >> 16, serial & 0xffff)).unwrap_or_default();
    match block.get(3..11)? {
        b"NTFS    " => {
            let serial = number::le64(&block, 0x48)?;
            let label = super::ntfs::label(volume).unwrap_or_default();
            return Some(content("ntfs", label.as_bytes(), format!("{serial:016X}")));
        }
        b"-FVE-FS-" => return Some(content("bitlocker", &[], String::new())),
        b"EXFAT   " => return Some(content("exfat", &[], serial(0x64))),
        _ => {}
    }
    if block.get(510..512)? != [0x55, 0xaa] {
        return None;
    }
    let no_name = |label: &[u8]| if label == b"NO NAME    " { Vec::new() } else { label.to_vec() };
    match () {
        () if block.get(82..87)? == b"FAT32" => Some(content("vfat", &no_name(&block[71..82]), serial(67))),
        () if block.get(54..57)? == b"FAT" => Some(content("vfat", &no_name(&block[43..54]), serial(39))),
        () => None,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::disallowed_methods)]
mod tests {
    use super::super::volume::tests::volume;
    use super::*;
    use crate::guest::inspect::tests::{Folder, run};

    const UUID: &str = "0fc63daf-8483-4772-8e79-3d69d8477de4";

    #[test]
    fn kinds_are_told_as_their_makers_made_them() {
        let folder = Folder::new();
        let image = folder.path().join("fs.img");
        let path = image.to_str().unwrap();
        let make = |tool: &str, options: &[&str]| {
            std::fs::File::create(&image).unwrap().set_len(64 << 20).unwrap();
            run(tool, &[options, &[path]].concat(), "");
            let found = probe(&volume(std::fs::read(&image).unwrap()));
            (found.file_system, found.label, found.uuid)
        };
        for kind in ["ext2", "ext3", "ext4"] {
            let told = make("mke2fs", &["-q", "-t", kind, "-L", "my root", "-U", UUID]);
            assert_eq!(told, (kind.to_owned(), "my root".to_owned(), UUID.to_owned()));
        }
        let swap = make("mkswap", &["-q", "-L", "page", "-U", UUID]);
        assert_eq!(swap, ("swap".to_owned(), "page".to_owned(), UUID.to_owned()));
        for size in ["12", "16", "32"] {
            let more: &[&str] = if size == "32" { &["-F"] } else { &[] };
            let told =
                make("mformat", &[more, &["-N", "1234abcd", "-v", "ESP", "-T", "131072", "-h", "64", "-s", "32", "::", "-i"]].concat());
            assert_eq!(told, ("vfat".to_owned(), "ESP".to_owned(), "1234-ABCD".to_owned()), "{size}");
        }
        assert_eq!(probe(&volume(vec![0; 70_000])), Content::default());
        assert_eq!(probe(&volume(vec![])), Content::default());
    }
}

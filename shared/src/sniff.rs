//! What a file is, from its bytes alone.
//!
//! Owns: the magic numbers. Never: looks at a file's name, and never decides: a declared format that contradicts the content is the
//! caller's to refuse. A crash here costs nothing: it only reads the first sectors and the last.
//!
//! Raw is what is left when nothing else matches. What a guest could write into its own first sectors is therefore never taken for raw
//! by accident, and never taken for an image format without the caller asking.

use std::fs::File;
use std::os::unix::fs::FileExt as _;

/// What the content says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Nothing known: a raw disk.
    Raw,
    /// `QFI\xfb`, versions 1 to 3.
    Qcow2,
    /// `KDMV`: a hosted sparse extent, with or without its descriptor.
    Vmdk,
    /// The text of a VMDK descriptor.
    VmdkDescriptor,
    /// `vhdxfile`.
    Vhdx,
    /// `conectix` at the front (dynamic) or in the last sector (fixed).
    Vhd,
    /// VirtualBox's signature behind its text.
    Vdi,
    /// A ustar archive.
    Ova,
    /// Something that we know and do not read; its name.
    Other(&'static str),
}

/// What we would accept, for messages.
pub const ACCEPTED: &str = "raw, qcow2, VMDK (streamOptimized, monolithicSparse, monolithicFlat, twoGbMaxExtentSparse, twoGbMaxExtentFlat, vmfs, vmfsSparse), \
     VHDX, VHD, VDI and OVA";

impl Kind {
    /// The format's name as the API spells it (`raw`, `qcow2`, `vmdk`, `vhdx`, `vhd`, `vdi`, `ova`); of others their own.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Raw => "raw",
            Kind::Qcow2 => "qcow2",
            Kind::Vmdk | Kind::VmdkDescriptor => "vmdk",
            Kind::Vhdx => "vhdx",
            Kind::Vhd => "vhd",
            Kind::Vdi => "vdi",
            Kind::Ova => "ova",
            Kind::Other(name) => name,
        }
    }

    /// A sentence for people: what it is, and for what we do not read, what would be accepted.
    pub fn describe(self) -> String {
        match self {
            Kind::Raw => "a raw disk (no other format's signature)".to_owned(),
            Kind::Qcow2 => "a qcow2 image".to_owned(),
            Kind::Vmdk => "a VMDK sparse extent".to_owned(),
            Kind::VmdkDescriptor => "a VMDK descriptor (its extents lie in files beside it)".to_owned(),
            Kind::Vhdx => "a VHDX image".to_owned(),
            Kind::Vhd => "a VHD image".to_owned(),
            Kind::Vdi => "a VDI image".to_owned(),
            Kind::Ova => "an OVA (tar) archive".to_owned(),
            Kind::Other(name) => format!("{name}, which is not built yet; accepted are {ACCEPTED}"),
        }
    }
}

/// Signatures at fixed offsets inside the first 1024 bytes.
const FRONT: [(usize, &[u8], Kind); 24] = [
    (0, b"QFI\xfb", Kind::Qcow2),
    (0, b"KDMV", Kind::Vmdk),
    (257, b"ustar", Kind::Ova),
    (0, b"vhdxfile", Kind::Vhdx),
    (0, b"conectix", Kind::Vhd),
    (0x40, b"\x7f\x10\xda\xbe", Kind::Vdi),
    (0, b"QED\0", Kind::Other("QED")),
    (0, b"LUKS\xba\xbe", Kind::Other("LUKS")),
    (0, b"\x1f\x8b\x08", Kind::Other("gzip")),
    (0, b"\xfd7zXZ\0", Kind::Other("xz")),
    (0, b"\x28\xb5\x2f\xfd", Kind::Other("zstd")),
    (0, b"\x04\x22\x4d\x18", Kind::Other("lz4")),
    (0, b"BZh", Kind::Other("bzip2")),
    (0, b"PK\x03\x04", Kind::Other("zip")),
    (0, b"7z\xbc\xaf\x27\x1c", Kind::Other("7z")),
    (0, b"COWD", Kind::Other("one extent of a vmfsSparse VMDK (its descriptor lies beside it)")),
    (0, b"\xbe\xba\xfe\xca\0\0\0\0", Kind::Other("seSparse VMDK, a snapshot's delta")),
    (0, b"WithoutFreeSpace", Kind::Other("Parallels")),
    (0, b"WithouFreSpacExt", Kind::Other("Parallels")),
    (0, b"OOOM\0", Kind::Other("user-mode Linux COW")),
    (0, b"Bochs Virtual HD Image\0", Kind::Other("Bochs")),
    (0, b"#!/bin/sh\n#V2.0 Format\n", Kind::Other("cloop")),
    (0, b"<?xml", Kind::Other("an XML text (give an OVF together with its folder)")),
    (0, b"\xef\xbb\xbf<?xml", Kind::Other("an XML text (give an OVF together with its folder)")),
];

/// Where ISO 9660's first volume descriptor says `CD001`.
const ISO: u64 = 32_769;

/// Says what a file holds.
pub fn file(file: &File) -> std::io::Result<Kind> {
    sniff(file.metadata()?.len(), &|bytes, at| file.read_exact_at(bytes, at))
}

/// What the content of a file says it is, as the API spells it; nothing where it cannot be read.
pub fn format_of(opened: File) -> Option<String> {
    file(&opened).ok().map(|kind| kind.name().to_owned())
}

/// Fills the buffer from a place.
pub type ReadAt<'a, E> = &'a dyn Fn(&mut [u8], u64) -> Result<(), E>;

/// Says what `length` bytes hold that `read` reads. Reads at most 4 KiB at the front, 5 bytes at 32 KiB and the last sector.
pub fn sniff<E>(length: u64, read: ReadAt<'_, E>) -> Result<Kind, E> {
    if length == 0 {
        return Ok(Kind::Other("an empty file"));
    }
    let mut front = [0u8; 4096];
    let len = length.min(front.len() as u64) as usize;
    read(&mut front[..len], 0)?;
    let front = &front[..len];
    let hit = FRONT.iter().find(|(at, magic, _)| front.get(*at..at + magic.len()) == Some(*magic));
    if let Some((_, _, kind)) = hit {
        return Ok(*kind);
    }
    if is_descriptor(front) {
        return Ok(Kind::VmdkDescriptor);
    }
    let mut iso = [0u8; 5];
    if length >= ISO + 5 {
        read(&mut iso, ISO)?;
    }
    if &iso == b"CD001" {
        return Ok(Kind::Other("ISO 9660"));
    }
    // A fixed VHD is a raw disk with a footer; a DMG has its header there.
    let mut last = [0u8; 8];
    for (back, magic, kind) in [(512u64, &b"conectix"[..], Kind::Vhd), (511, b"conectix", Kind::Vhd), (512, b"koly", Kind::Other("DMG"))] {
        if length >= back {
            read(&mut last, length - back)?;
            if last.starts_with(magic) {
                return Ok(kind);
            }
        }
    }
    Ok(Kind::Raw)
}

/// A descriptor begins with its comment; tools also accept one where, past comments and blanks, the first line is `version=N`.
fn is_descriptor(front: &[u8]) -> bool {
    let heading = b"# disk descriptorfile";
    if front.get(..heading.len()).is_some_and(|head| head.eq_ignore_ascii_case(heading)) {
        return true;
    }
    let mut lines = front.split(|b| *b == b'\n').map(<[u8]>::trim_ascii);
    let first = lines.find(|line| !line.is_empty() && !line.starts_with(b"#"));
    first.is_some_and(|line| {
        let mut halves = line.splitn(2, |b| *b == b'=');
        let key = halves.next().unwrap_or_default().trim_ascii();
        let value = halves.next().unwrap_or_default().trim_ascii();
        key.eq_ignore_ascii_case(b"version") && !value.is_empty() && value.iter().all(u8::is_ascii_digit)
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::disallowed_methods)]
mod tests {
    use super::*;

    fn kind(len: usize, marks: &[(usize, &[u8])]) -> Kind {
        static NUMBER: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let mut bytes = vec![0u8; len];
        for (at, mark) in marks {
            bytes[*at..at + mark.len()].copy_from_slice(mark);
        }
        let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("hypersdk-sniff-{}-{number}", std::process::id()));
        std::fs::write(&path, &bytes).unwrap();
        let opened = std::fs::File::open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        super::file(&opened).unwrap()
    }

    #[test]
    fn each_signature_is_known_and_raw_is_what_is_left() {
        assert_eq!(kind(1 << 16, &[]), Kind::Raw);
        assert_eq!(kind(3, &[]), Kind::Raw);
        assert_eq!(kind(1 << 16, &[(510, b"\x55\xaa")]), Kind::Raw);
        for (at, magic, expected) in FRONT {
            assert_eq!(kind(1 << 16, &[(at, magic)]), expected);
            assert_eq!(kind(at + magic.len(), &[(at, magic)]), expected, "at the very end");
        }
        assert_eq!(kind(1 << 16, &[(ISO as usize, b"CD001")]), Kind::Other("ISO 9660"));
        assert_eq!(kind(4096, &[(4096 - 512, b"conectix")]), Kind::Vhd);
        assert_eq!(kind(4096, &[(4096 - 512, b"koly")]), Kind::Other("DMG"));
        assert_eq!(kind(0, &[]), Kind::Other("an empty file"));
    }

    #[test]
    fn a_descriptor_is_known_as_other_tools_would_know_it() {
        assert_eq!(kind(600, &[(0, b"# Disk DescriptorFile\nversion=1\n")]), Kind::VmdkDescriptor);
        assert_eq!(kind(600, &[(0, b"# comment\r\n\r\n  version = 3\r\n")]), Kind::VmdkDescriptor);
        assert_eq!(kind(600, &[(0, b"# comment\nversions=3\n")]), Kind::Raw);
        let said = Kind::Other("QED").describe();
        assert!(said.contains("QED") && said.contains("qcow2"), "{said}");
    }
}

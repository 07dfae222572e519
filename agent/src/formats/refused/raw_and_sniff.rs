//! What a file is not taken for: formats that are known by their first bytes and not read are named, never handed out as raw.
//!
//! Raw itself has nothing to refuse: any bytes are a disk. VHD, VHDX and VDI have readers of their own and stand not here.
//! A crash here costs nothing: tests only.

use super::{Case, Expected, Good, Image, Input, Unbuilt, case};

fn sniffed(name: &'static str, at: u64, magic: &[u8], expected: Expected) -> Case {
    case(name, Input::Sniff(Image::default().put(at, magic).cut(1 << 16)), expected)
}

pub(super) fn cases() -> Vec<Case> {
    let last = (1 << 16) - 512;
    vec![
        sniffed("good, raw", 510, b"\x55\xaa", Good(None)),
        sniffed("good, qcow2", 0, b"QFI\xfb", Good(None)),
        sniffed("good, VMDK", 0, b"KDMV", Good(None)),
        sniffed("good, descriptor", 0, b"# Disk DescriptorFile\n", Good(None)),
        sniffed("good, OVA", 257, b"ustar", Good(None)),
        case("nothing", Input::Sniff(Image::default()), Unbuilt("an empty file, which")),
        sniffed("QED", 0, b"QED\0", Unbuilt("QED, which")),
        sniffed("LUKS", 0, b"LUKS\xba\xbe", Unbuilt("LUKS, which")),
        sniffed("gzip", 0, b"\x1f\x8b\x08", Unbuilt("gzip, which")),
        sniffed("xz", 0, b"\xfd7zXZ\0", Unbuilt("xz, which")),
        sniffed("zstd", 0, b"\x28\xb5\x2f\xfd", Unbuilt("zstd, which")),
        sniffed("lz4", 0, b"\x04\x22\x4d\x18", Unbuilt("lz4, which")),
        sniffed("bzip2", 0, b"BZh", Unbuilt("bzip2, which")),
        sniffed("zip", 0, b"PK\x03\x04", Unbuilt("zip, which")),
        sniffed("7z", 0, b"7z\xbc\xaf\x27\x1c", Unbuilt("7z, which")),
        sniffed("a snapshot's delta, seSparse", 0, b"\xbe\xba\xfe\xca\0\0\0\0", Unbuilt("seSparse")),
        sniffed("Parallels", 0, b"WithoutFreeSpace", Unbuilt("Parallels, which")),
        sniffed("user-mode Linux COW", 0, b"OOOM\0", Unbuilt("user-mode Linux COW, which")),
        sniffed("Bochs", 0, b"Bochs Virtual HD Image\0", Unbuilt("Bochs, which")),
        sniffed("cloop", 0, b"#!/bin/sh\n#V2.0 Format\n", Unbuilt("cloop, which")),
        sniffed("XML", 0, b"<?xml version", Unbuilt("an XML text")),
        sniffed("ISO 9660", 32_769, b"CD001", Unbuilt("ISO 9660, which")),
        sniffed("DMG", last, b"koly", Unbuilt("DMG, which")),
    ]
}

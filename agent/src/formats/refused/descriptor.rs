//! VMDK descriptors: what their text may not name.
//!
//! A crash here costs nothing: tests only.

use super::vmdk::text;
use super::{Case, Damaged, Expected, Good, Image, Input, Refused, Unbuilt, case};

const FLAT: &str = "RW 16 FLAT \"a-flat.vmdk\" 0";

fn open(text: impl AsRef<[u8]>) -> Input {
    Input::Vmdk(Image::of(text), vec![("a-flat.vmdk", Image::of([7; 8192]))])
}

/// A flat disk with this line before its extent.
fn line(name: &'static str, line: &str, expected: Expected) -> Case {
    case(name, open(text(&format!("createType=\"monolithicFlat\"\n{line}\n{FLAT}"))), expected)
}

/// A disk of this kind and these extents.
fn extents(name: &'static str, kind: &str, lines: &str, expected: Expected) -> Case {
    case(name, open(text(&format!("createType=\"{kind}\"\n{lines}"))), expected)
}

/// A flat disk whose extent has this name.
fn named(name: &'static str, file: &str, expected: &'static str) -> Case {
    extents(name, "monolithicFlat", &format!("RW 16 FLAT \"{file}\" 0"), Refused(expected))
}

pub(super) fn cases() -> Vec<Case> {
    let mut out = vec![
        line("good", "", Good(Some(vec![7; 8192]))),
        line("good, in windows-1252", "encoding=\"windows-1252\"\nddb.comment = \"x\"", Good(None)),
        extents("good, zeros", "twoGbMaxExtentFlat", "RW 4096 ZERO", Good(Some(vec![0; 2 << 20]))),
    ];
    out.extend(names());
    out.extend(parents_and_kinds());
    out.extend(lines());
    out
}

fn names() -> Vec<Case> {
    vec![
        named("absolute", "/etc/passwd", "names \"/etc/passwd\""),
        named("of the folder above", "../a-flat.vmdk", "names \"../a-flat.vmdk\""),
        named("the folder above", "..", "names \"..\""),
        named("the folder", ".", "names \".\";"),
        named("in a folder below", "a/b.vmdk", "names \"a/b.vmdk\""),
        named("above, in Windows' spelling", "..\\a.vmdk", "names \"..\\\\a.vmdk\""),
        named("absolute, in Windows' spelling", "C:\\a.vmdk", "names \"C:\\\\a.vmdk\""),
        named("no name", "", "names \"\""),
        named("a protocol", "nbd:localhost:10809", "names \"nbd:localhost:10809\""),
        named("JSON for qemu", "json:{}", "names \"json:{}\""),
        named("a control character", "a\u{1}b", "names \"a\\u{1}b\""),
        named("two dots inside", "a..b", "names \"a..b\""),
        named("a device", "/dev/sda", "names \"/dev/sda\""),
        extents("absolute, sparse", "twoGbMaxExtentSparse", "RW 16 SPARSE \"/etc/shadow\"", Refused("names \"/etc/shadow\"")),
        extents("absolute, on a datastore", "vmfs", "RW 16 VMFS \"/vmfs/volumes/x\"", Refused("names \"/vmfs/volumes/x\"")),
        named("longer than a name may be", &"n".repeat(256), "names \"nnnnnnnn"),
        extents(
            "one file twice",
            "twoGbMaxExtentFlat",
            "RW 8 FLAT \"a-flat.vmdk\" 0\nRW 8 FLAT \"a-flat.vmdk\" 8",
            Refused("two extents name the file \"a-flat.vmdk\""),
        ),
    ]
}

fn parents_and_kinds() -> Vec<Case> {
    vec![
        line("parent by name", "parentFileNameHint=\"base.vmdk\"", Refused("it has a parent (\"base.vmdk\")")),
        line("parent by name, in capitals", "PARENTFILENAMEHINT = /etc/passwd", Refused("it has a parent (\"/etc/passwd\")")),
        case(
            "parent by number",
            open(text(&format!("createType=\"monolithicFlat\"\n{FLAT}")).replace("ffffffff", "87654321")),
            Refused("87654321"),
        ),
        line("encrypted, by keys", "encryptionKeys=\"x\"", Refused("it is encrypted; decrypt")),
        line("encrypted, by filter", "ddb.iofilters=\"vmwarevmcrypt\"", Refused("it is encrypted (ddb.iofilters)")),
        line("version 5", "version=5", Damaged("version stands there twice")),
        case("only version 5", open(text(FLAT).replace("version=1", "version=5")), Unbuilt("descriptor version \"5\"")),
        case("version of words", open(text(FLAT).replace("version=1", "version=new")), Unbuilt("descriptor version \"new\"")),
        line("createType twice", "createType=\"vmfs\"", Damaged("createtype stands there twice")),
        line("parentCID twice", "parentCID=ffffffff", Damaged("parentcid stands there twice")),
        extents("a device", "fullDevice", FLAT, Unbuilt("createType \"fullDevice\"")),
        extents("a partitioned device", "partitionedDevice", FLAT, Unbuilt("createType \"partitionedDevice\"")),
        extents("a raw device map", "vmfsRawDeviceMap", FLAT, Unbuilt("createType \"vmfsRawDeviceMap\"")),
        extents("custom", "custom", FLAT, Unbuilt("createType \"custom\"")),
        extents("no kind's name", "", FLAT, Unbuilt("createType \"\"")),
        case("no kind", open(text(FLAT)), Damaged("no createType")),
    ]
}

fn lines() -> Vec<Case> {
    let huge = "18446744073709551615";
    vec![
        extents("raw device extents", "vmfs", "RW 16 VMFSRDM \"a\"", Unbuilt("extents of type \"VMFSRDM\"")),
        extents("extents of no type", "vmfs", "RW 16", Unbuilt("extents of type \"\"")),
        extents("no extent", "monolithicFlat", "", Damaged("no extent")),
        extents("two extents in one file's kind", "monolithicFlat", &format!("{FLAT}\nRW 1 ZERO"), Damaged("monolithicFlat has 2 extents")),
        extents("sparse in a flat kind", "monolithicFlat", "RW 16 SPARSE \"a\"", Damaged("does not belong into monolithicFlat")),
        extents("flat in a sparse kind", "twoGbMaxExtentSparse", FLAT, Damaged("does not belong into twoGbMaxExtentSparse")),
        extents("zeros in an embedded kind", "monolithicSparse", "RW 16 ZERO", Damaged("does not belong into monolithicSparse")),
        extents(
            "sparse without its file",
            "monolithicSparse",
            "RW 16 SPARSE \"a\"",
            Refused("createType monolithicSparse keeps its descriptor"),
        ),
        extents(
            "stream without its file",
            "streamOptimized",
            "RW 16 SPARSE \"a\"",
            Refused("createType streamOptimized keeps its descriptor"),
        ),
        extents("0 sectors", "monolithicFlat", "RW 0 FLAT \"a\" 0", Damaged("an extent of 0 sectors")),
        extents("negative sectors", "monolithicFlat", "RW -1 FLAT \"a\" 0", Damaged("an extent's size is not a number")),
        extents(
            "2^64 - 1 sectors",
            "monolithicFlat",
            &format!("RW {huge} FLAT \"a\" 0"),
            Damaged("a capacity of 18446744073709551615 sectors"),
        ),
        extents("2^54 sectors", "monolithicFlat", "RW 18014398509481984 FLAT \"a\" 0", Damaged("a capacity of 18014398509481984 sectors")),
        extents(
            "sectors that overflow together",
            "twoGbMaxExtentFlat",
            &format!("RW {huge} ZERO\nRW 8 ZERO"),
            Damaged("the extents' sizes overflow"),
        ),
        extents(
            "offset that overflows",
            "monolithicFlat",
            &format!("RW 8 FLAT \"a\" {huge}"),
            Damaged("an offset of 18446744073709551615 sectors"),
        ),
        extents("offset of words", "monolithicFlat", "RW 8 FLAT \"a\" zero", Damaged("an extent's offset is not a number")),
        extents("no access", "monolithicFlat", "NOACCESS 16 FLAT \"a\" 0", Refused("marked NOACCESS")),
        extents("name without quotes", "monolithicFlat", "RW 16 FLAT a-flat.vmdk 0", Damaged("not in quotes")),
        extents(
            "name with one quote",
            "monolithicFlat",
            "\nRW 16 FLAT \"a-flat.vmdk 0",
            Damaged("line 7 at byte 0: an extent's file name is not in quotes"),
        ),
        line("a line of words", "hello", Damaged("neither KEY=VALUE nor an extent: \"hello\"")),
        extents("2049 extents", "twoGbMaxExtentFlat", &"RW 8 ZERO\n".repeat(2049), Refused("over 2048 extents")),
        case("over 1 MiB", open(" ".repeat((1 << 20) + 1)), Refused("at most 1048576 bytes")),
        case("not UTF-8", open([text(FLAT).as_bytes(), b"# \xff\xfe\n"].concat()), Damaged("says UTF-8 and is not")),
        line("in GBK", "encoding=\"GBK\"\n# \u{e9}", Unbuilt("a descriptor in \"GBK\"")),
    ]
}

//! Hosted sparse VMDKs, and disks of several files: a minimal valid one, and what must not be made of it.
//!
//! Owns: the builder of a monolithicSparse file. A crash here costs nothing: tests only.

use super::{Case, Damaged, Good, Image, Input, Io, Refused, Unbuilt, case};

/// Bytes in a sector.
pub(super) const SECTOR: u64 = 512;
/// Sectors in a grain of ours, the smallest there is.
pub(super) const GRAIN: u64 = 8;
/// Sectors of our disks: four grains.
pub(super) const CAPACITY: u64 = 4 * GRAIN;

pub(super) fn text(lines: &str) -> String {
    format!("# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\n{lines}\n")
}

/// A header: flags, capacity in sectors, descriptor of two sectors at 1, directory at `directory`.
pub(super) fn header(flags: u32, capacity: u64, directory: u64) -> Vec<u8> {
    let mut out = vec![0u8; 512];
    let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"KDMV");
    put(4, &1u32.to_le_bytes());
    put(8, &flags.to_le_bytes());
    put(12, &capacity.to_le_bytes());
    put(20, &GRAIN.to_le_bytes());
    put(28, &1u64.to_le_bytes());
    put(36, &2u64.to_le_bytes());
    put(44, &512u32.to_le_bytes());
    put(56, &directory.to_le_bytes());
    put(73, b"\n \r\n");
    out
}

fn entries(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// Bytes of grain `number`.
pub(super) fn grain(number: u8) -> Vec<u8> {
    (0..4096u32).map(|k| (k / 64) as u8 ^ (number * 16 + 1)).collect()
}

/// Header at 0, descriptor at 1, directory at 3, table at 4, grains 0, 1 and 3 from 8 on; grain 2 is a hole.
pub(super) fn sparse(capacity: u64, descriptor: &str) -> Image {
    Image::of(header(1, capacity, 3))
        .put(SECTOR, descriptor)
        .put(3 * SECTOR, entries(&[4]))
        .put(4 * SECTOR, entries(&[8, 16, 0, 24]))
        .put(8 * SECTOR, [grain(0), grain(1), grain(3)].concat())
}

fn good() -> Image {
    sparse(CAPACITY, &text("createType=\"monolithicSparse\"\nRW 32 SPARSE \"a.vmdk\""))
}

pub(super) fn bytes() -> Vec<u8> {
    [grain(0), grain(1), vec![0; 4096], grain(3)].concat()
}

fn le32(value: u32) -> [u8; 4] {
    value.to_le_bytes()
}

fn le64(value: u64) -> [u8; 8] {
    value.to_le_bytes()
}

/// The good one with these bytes at this place.
fn with(at: u64, bytes: impl AsRef<[u8]>) -> Input {
    Input::Vmdk(good().put(at, bytes), Vec::new())
}

/// The good one with another capacity in header and descriptor.
fn sized(sectors: u64) -> Image {
    sparse(sectors, &text(&format!("createType=\"monolithicSparse\"\nRW {sectors} SPARSE \"a.vmdk\"")))
}

fn alone(image: Image) -> Input {
    Input::Vmdk(image, Vec::new())
}

/// A split disk's descriptor over two sparse files.
fn split(second: Image) -> Input {
    let main = text("createType=\"twoGbMaxExtentSparse\"\nRW 32 SPARSE \"a-s001.vmdk\"\nRW 32 SPARSE \"a-s002.vmdk\"");
    Input::Vmdk(Image::of(main), vec![("a-s001.vmdk", part()), ("a-s002.vmdk", second)])
}

/// A file of a split disk: no descriptor inside.
fn part() -> Image {
    good().put(28, le64(0)).put(36, le64(0))
}

/// A flat disk of 8 KiB from `offset` sectors on.
fn flat(offset: &str, file: Image) -> Input {
    let main = text(&format!("createType=\"monolithicFlat\"\nRW 16 FLAT \"a-flat.vmdk\" {offset}"));
    Input::Vmdk(Image::of(main), vec![("a-flat.vmdk", file)])
}

pub(super) fn cases() -> Vec<Case> {
    let table = 4 * SECTOR;
    let mut out = originals();
    out.extend(headers());
    out.extend([
        // The directory.
        case("directory at the header", with(56, le64(0)), Damaged("grain directory 0 at byte 0: its 1 entries")),
        case("directory behind the end", with(56, le64(32)), Damaged("grain directory 0 at byte 16384")),
        case("directory past any file", with(56, le64(u64::MAX / 2)), Damaged("grain directory 0 at byte 18446744073709551615")),
        case("directory in a footer that is not there", with(56, le64(u64::MAX)), Damaged("no footer marker")),
        case("directory over the end", alone(sized(8 * 512 * 5000)), Damaged("its 5000 entries do not lie inside")),
        case("directory over the limit", alone(sized(8 * 512 * ((2 << 20) + 1))), Refused("a grain directory of 2097153 entries")),
        case("directory of a disk of 8 EiB", alone(sized((1 << 54) - 8)), Refused("a grain directory of 4398046511104 entries")),
        case("both directories away", alone(good().put(8, le32(3)).put(48, le64(5000)).put(56, le64(6000))), Damaged("at byte 2560000")),
        // The tables.
        case("table behind the end", with(3 * SECTOR, le32(1 << 20)), Damaged("grain table 0 at byte 536870912: it lies past")),
        case("table past any file", with(3 * SECTOR, le32(u32::MAX)), Damaged("grain table 0 at byte 2199023255040")),
        case(
            "tables that overlap",
            alone(sized(4104).put(3 * SECTOR, entries(&[4, 6]))),
            Damaged("grain table 1 at byte 3072: it overlaps"),
        ),
        case("one table twice", alone(sized(4104).put(3 * SECTOR, entries(&[4, 4]))), Damaged("grain table 0 at byte 2048: it overlaps")),
        case("table cut off", alone(good().cut(7 * SECTOR)), Damaged("it lies past the file's end at 3584")),
        // The grains.
        case("grain behind the end", with(table, le32(1 << 20)), Damaged("grain 0 at byte 536870912: 4096 bytes")),
        case("grain past any file", with(table + 4, le32(u32::MAX)), Damaged("grain 1 at byte 2199023255040")),
        case("hole that becomes a grain at the end", with(table + 8, le32(32)), Damaged("grain 2 at byte 16384")),
        case("grain over the end", with(table + 12, le32(25)), Damaged("grain 3 at byte 12800: 4096 bytes from there lie past")),
        case("grain cut off", alone(good().cut(31 * SECTOR)), Damaged("grain 3 at byte 12288: 4096 bytes")),
        case("first grains cut off", alone(good().cut(23 * SECTOR)), Damaged("past the file's end at 11776")),
        // Several files.
        case("part without a magic", split(Image::of(vec![1; 4096])), Damaged("the extent \"a-s002.vmdk\" does not start with KDMV")),
        case("part of another size", split(part().put(12, le64(64))), Damaged("the header 64 (in \"a-s002.vmdk\")")),
        case("part whose directory is away", split(part().put(56, le64(99))), Damaged("file of 16384 bytes (in \"a-s002.vmdk\")")),
        case(
            "part whose table is away",
            split(part().put(3 * SECTOR, le32(99))),
            Damaged("at byte 50688: it lies past the file's end at 16384 (in"),
        ),
        case("part whose grain is away", split(part().put(table, le32(77))), Damaged("grain 0 at byte 39424")),
        case("part of a strange grain", split(part().put(20, le64(12))), Damaged("a grain of 12 sectors")),
        case("part that is missing", Input::Vmdk(split_text(), vec![("a-s001.vmdk", part())]), Io("a-s002.vmdk is not there")),
        case("part given alone", alone(part()), Refused("one extent of a split disk")),
        case("flat file too short", flat("0", Image::of([7; 8191])), Damaged("\"a-flat.vmdk\" has 8191 bytes, 8192 would be right")),
        case("flat file too short for its offset", flat("1", Image::of([7; 8192])), Damaged("8192 bytes, 8704 would be right")),
        case("flat file far too short", flat("18014398509481983", Image::of([7; 512])), Damaged("has 512 bytes, 9223372036854783488")),
        case("flat file missing", Input::Vmdk(flat_text(), Vec::new()), Io("a-flat.vmdk is not there")),
    ]);
    out
}

fn split_text() -> Image {
    Image::of(text("createType=\"twoGbMaxExtentSparse\"\nRW 32 SPARSE \"a-s001.vmdk\"\nRW 32 SPARSE \"a-s002.vmdk\""))
}

fn flat_text() -> Image {
    Image::of(text("createType=\"monolithicFlat\"\nRW 16 FLAT \"a-flat.vmdk\" 0"))
}

fn originals() -> Vec<Case> {
    let redundant = good().put(8, le32(3)).put(48, le64(3)).put(56, le64(6000));
    vec![
        case("good", alone(good()), Good(Some(bytes()))),
        case("good, its redundant directory used", alone(redundant), Good(Some(bytes()))),
        case("good, split", split(part()), Good(Some([bytes(), bytes()].concat()))),
        case("good, flat", flat("1", Image::of([[1; 512].as_slice(), &[7; 8192]].concat())), Good(Some(vec![7; 8192]))),
        case("good, zeroed grain", alone(good().put(8, le32(5)).put(table_entry(2), le32(1))), Good(Some(bytes()))),
    ]
}

fn table_entry(number: u64) -> u64 {
    4 * SECTOR + number * 4
}

fn headers() -> Vec<Case> {
    vec![
        case("only a magic", alone(good().cut(4)), Damaged("the file ends at byte 4")),
        case("header cut off", alone(good().cut(511)), Damaged("the file ends at byte 511")),
        case("version 0", with(4, le32(0)), Unbuilt("header version 0")),
        case("version 4", with(4, le32(4)), Unbuilt("header version 4")),
        case("version of another byte order", with(4, 1u32.to_be_bytes()), Unbuilt("header version 16777216")),
        case("transferred as text", with(73, b"\r\n \r"), Damaged("transferred in text mode")),
        case("capacity of all ones", with(12, le64(u64::MAX)), Damaged("a capacity of 18446744073709551615 sectors")),
        case("capacity of 2^63 bytes", with(12, le64(1 << 54)), Damaged("a capacity of 18014398509481984 sectors")),
        case("no grain", with(20, le64(0)), Damaged("a grain of 0 sectors")),
        case("grain of 2 KiB", with(20, le64(4)), Damaged("a grain of 4 sectors")),
        case("grain that is no power of two", with(20, le64(9)), Damaged("a grain of 9 sectors")),
        case("grain of 2 MiB", with(20, le64(4096)), Damaged("a grain of 4096 sectors")),
        case("grain of 2^63 sectors", with(20, le64(1 << 63)), Damaged("a grain of 9223372036854775808 sectors")),
        case("grain of all ones", with(20, le64(u64::MAX)), Damaged("a grain of 18446744073709551615 sectors")),
        case("no table entries", with(44, le32(0)), Damaged("0 entries in a grain table")),
        case("one table entry too many", with(44, le32(513)), Damaged("513 entries in a grain table")),
        case("table entries of all ones", with(44, le32(u32::MAX)), Damaged("4294967295 entries in a grain table")),
        case("compression without markers", with(8, le32(0x1_0001)), Unbuilt("flags 0x10001")),
        case("markers without compression", with(8, le32(0x2_0001)), Unbuilt("flags 0x20001")),
        case("descriptor's room over 1 MiB", with(36, le64(2049)), Refused("its descriptor is over 1048576 bytes")),
        case("descriptor behind the end", with(28, le64(1 << 30)), Damaged("descriptor 0 at byte 549755813888: 1024 bytes")),
        case("descriptor over the end", with(36, le64(100)), Damaged("descriptor 0 at byte 512: 51200 bytes")),
        case("descriptor cut off", alone(good().cut(1024)), Damaged("past the file's end at 1024")),
        case(
            "descriptor of a flat disk inside",
            embedded("createType=\"monolithicFlat\"\nRW 32 FLAT \"a\" 0"),
            Refused("monolithicFlat, its header"),
        ),
        case(
            "descriptor of a stream inside",
            embedded("createType=\"streamOptimized\"\nRW 32 SPARSE \"a\""),
            Refused("streamOptimized, its header"),
        ),
        case(
            "descriptor larger than the header",
            embedded("createType=\"monolithicSparse\"\nRW 33 SPARSE \"a\""),
            Damaged("says 33 sectors, the header 32"),
        ),
        case(
            "descriptor a grain smaller",
            embedded("createType=\"monolithicSparse\"\nRW 24 SPARSE \"a\""),
            Damaged("says 24 sectors, the header 32"),
        ),
        case("descriptor without an extent inside", embedded("createType=\"monolithicSparse\""), Damaged("no extent")),
        case("neither header nor descriptor", alone(Image::of([7; 8]).cut((1 << 20) + 1)), Refused("it starts neither with KDMV")),
    ]
}

fn embedded(lines: &str) -> Input {
    alone(sparse(CAPACITY, &text(lines)))
}

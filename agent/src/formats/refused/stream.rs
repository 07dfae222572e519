//! streamOptimized VMDKs: markers, footer, compressed grains.
//!
//! Owns: the builder of a stream. A crash here costs nothing: tests only.

use libdeflater::{CompressionLvl, Compressor};

use super::vmdk::{CAPACITY, SECTOR, bytes, grain, header, text};
use super::{Case, Damaged, Good, Image, Input, Refused, Unbuilt, case};

/// Newline check, compressed, markers.
const FLAGS: u32 = 0x3_0001;
const GRAINS: [u64; 3] = [3 * SECTOR, 4 * SECTOR, 5 * SECTOR];
const TABLE: u64 = 7 * SECTOR;
const DIRECTORY: u64 = 12 * SECTOR;
const FOOTER_MARKER: u64 = 13 * SECTOR;
const FOOTER: u64 = 14 * SECTOR;
const LEN: u64 = 16 * SECTOR;

fn zlib(plain: &[u8]) -> Vec<u8> {
    let mut compressor = Compressor::new(CompressionLvl::new(9).unwrap());
    let mut out = vec![0; compressor.zlib_compress_bound(plain.len())];
    let len = compressor.zlib_compress(plain, &mut out).unwrap();
    out.truncate(len);
    out
}

/// A grain's marker and its data.
fn packed(sector: u64, data: &[u8]) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &(data.len() as u32).to_le_bytes(), data].concat()
}

fn marker(sectors: u64, kind: u32) -> Vec<u8> {
    [&sectors.to_le_bytes()[..], &0u32.to_le_bytes(), &kind.to_le_bytes()].concat()
}

fn header_of(directory: u64, capacity: u64) -> Vec<u8> {
    let mut out = header(FLAGS, capacity, directory);
    out[4] = 3;
    out[77] = 1;
    out
}

/// Header 0, descriptor 1, grains 0, 1 and 3 at 3, 4, 5, table behind its marker at 7, directory at 12, footer at 14, end at 15.
fn good() -> Image {
    let directory = DIRECTORY / SECTOR;
    Image::of(header_of(u64::MAX, CAPACITY))
        .put(SECTOR, text("createType=\"streamOptimized\"\nRW 32 SPARSE \"a.vmdk\""))
        .put(GRAINS[0], packed(0, &zlib(&grain(0))))
        .put(GRAINS[1], packed(8, &zlib(&grain(1))))
        .put(GRAINS[2], packed(24, &zlib(&grain(3))))
        .put(TABLE - SECTOR, marker(4, 1))
        .put(TABLE, [3u32, 4, 0, 5].map(u32::to_le_bytes).concat())
        .put(DIRECTORY - SECTOR, marker(1, 2))
        .put(DIRECTORY, 7u32.to_le_bytes())
        .put(FOOTER_MARKER, marker(1, 3))
        .put(FOOTER, header_of(directory, CAPACITY))
        .put(LEN - SECTOR, marker(0, 0))
        .cut(LEN)
}

fn with(at: u64, bytes: impl AsRef<[u8]>) -> Input {
    Input::Vmdk(good().put(at, bytes), Vec::new())
}

fn cut(len: u64) -> Input {
    Input::Vmdk(good().cut(len), Vec::new())
}

/// The good one, but for grain `k`: these bytes compressed in its place.
fn regrained(k: usize, plain: &[u8]) -> Input {
    with(GRAINS[k], packed([0, 8, 24][k], &zlib(plain)))
}

pub(super) fn cases() -> Vec<Case> {
    let le32 = u32::to_le_bytes;
    let le64 = u64::to_le_bytes;
    let direct = good().put(0, header_of(DIRECTORY / SECTOR, CAPACITY)).cut(FOOTER_MARKER);
    vec![
        case("good", Input::Vmdk(good(), Vec::new()), Good(Some(bytes()))),
        case("good, directory in the header, no footer", Input::Vmdk(direct, Vec::new()), Good(Some(bytes()))),
        // The frame.
        case("cut by a byte", cut(LEN - 1), Damaged("footer 0 at byte 7167: the stream is cut off: no footer at its end")),
        case("cut to three sectors", cut(3 * SECTOR), Damaged("footer 0 at byte 512: the stream is cut off: no footer at its end")),
        case("cut by a sector", cut(LEN - SECTOR), Damaged("footer 0 at byte 6656: the stream is cut off: no footer marker")),
        case("cut behind the grains", cut(6 * SECTOR), Damaged("footer 0 at byte 2048: the stream is cut off: no footer marker")),
        case("a sector of zeros more", cut(LEN + SECTOR), Damaged("footer 0 at byte 7680: the stream is cut off: no footer marker")),
        case(
            "no footer marker",
            with(FOOTER_MARKER + 12, le32(2)),
            Damaged("footer 0 at byte 7168: the stream is cut off: no footer marker"),
        ),
        case("footer without a magic", with(FOOTER, b"VMDK"), Damaged("footer 0 at byte 7168: does not start with KDMV")),
        case("footer of version 9", with(FOOTER + 4, le32(9)), Unbuilt("footer version 9")),
        case("footer that points on", with(FOOTER + 56, le64(u64::MAX)), Damaged("does not say where the grain directory lies")),
        case("footer of another capacity", with(FOOTER + 12, le64(40)), Damaged("differ from the header's")),
        case("footer of a strange grain", with(FOOTER + 20, le64(7)), Damaged("a grain of 7 sectors")),
        case("footer of a strange table", with(FOOTER + 44, le32(1)), Damaged("1 entries in a grain table")),
        case(
            "footer's capacity overflows",
            with(FOOTER + 12, le64(u64::MAX)),
            Damaged("footer 0 at byte 7168: a capacity of 18446744073709551615"),
        ),
        case("footer's algorithm", with(FOOTER + 77, [7]), Unbuilt("compression algorithm 7")),
        case("header's algorithm", with(77, [2]), Unbuilt("compression algorithm 2")),
        case("header without an algorithm", with(77, [0]), Unbuilt("compression algorithm 0")),
        case("footer without markers", with(FOOTER + 8, le32(0x1_0000)), Unbuilt("flags 0x10000")),
        case("footer transferred as text", with(FOOTER + 73, b"\n\r\n\n"), Damaged("footer 0 at byte 7168: its line ends")),
        case("footer's directory is away", with(FOOTER + 56, le64(16)), Damaged("grain directory 0 at byte 8192")),
        case("footer's directory is nowhere", with(FOOTER + 56, le64(0)), Damaged("grain directory 0 at byte 0")),
        case(
            "plain descriptor inside",
            with(SECTOR, text("createType=\"monolithicSparse\"\nRW 32 SPARSE \"a\"\n\0")),
            Refused("monolithicSparse, its header"),
        ),
        case("table is away", with(DIRECTORY, le32(13)), Damaged("grain table 0 at byte 6656: it lies past")),
        // The grains.
        case("grain behind the end", with(TABLE, le32(16)), Damaged("grain 0 at byte 8192: it lies past")),
        case("grain past any file", with(TABLE + 12, le32(u32::MAX)), Damaged("grain 3 at byte 2199023255040: it lies past")),
        case(
            "grain in a hole's place",
            with(TABLE + 8, le32(3)),
            Damaged("grain 2 at byte 1536: its marker says sector 0 of the disk, 16"),
        ),
        case("grain of another place", with(TABLE + 12, le32(4)), Damaged("its marker says sector 8 of the disk, 24")),
        case("grain at the end mark", with(TABLE + 12, le32(15)), Damaged("its marker says sector 0 of the disk, 24")),
        case("marker past the capacity", with(GRAINS[0], le64(32)), Damaged("its marker says sector 32 of the disk")),
        case("marker of all ones", with(GRAINS[1], le64(u64::MAX)), Damaged("its marker says sector 18446744073709551615 of the disk, 8")),
        case("no compressed bytes", with(GRAINS[0] + 8, le32(0)), Damaged("its marker says 0 compressed bytes")),
        case(
            "compressed bytes over the end",
            with(GRAINS[2] + 8, le32(5700)),
            Damaged("its marker says 5700 compressed bytes; 5620 lie there"),
        ),
        case(
            "compressed bytes over any grain",
            with(GRAINS[0] + 8, le32(4673)),
            Damaged("its marker says 4673 compressed bytes; 6644 lie there, 4672"),
        ),
        case("compressed bytes of all ones", with(GRAINS[1] + 8, le32(u32::MAX)), Damaged("its marker says 4294967295 compressed bytes")),
        case("stream of noise", with(GRAINS[0] + 12, [0xff; 64]), Damaged("grain 0 at byte 1536: its deflate stream")),
        case("stream cut short by its marker", with(GRAINS[1] + 8, le32(20)), Damaged("grain 1 at byte 2048: its deflate stream")),
        case(
            "checksum of another grain",
            Input::Vmdk(wrong_sum(), Vec::new()),
            Damaged("grain 3 at byte 2560: its deflate stream or its Adler-32"),
        ),
        case("a byte too many", regrained(0, &[5; 4097]), Damaged("grain 0 at byte 1536: it unpacks to more than 4096")),
        case("a byte too few", regrained(1, &[5; 4095]), Damaged("it unpacks to 4095 bytes")),
        case("nothing at all", regrained(0, &[]), Damaged("it unpacks to 0 bytes")),
        case("a bomb", regrained(2, &[0; 256 << 10]), Damaged("grain 3 at byte 2560: it unpacks to more than 4096")),
    ]
}

fn wrong_sum() -> Image {
    let data = zlib(&grain(3));
    let at = GRAINS[2] + 12 + data.len() as u64 - 1;
    good().put(at, [data[data.len() - 1] ^ 1])
}

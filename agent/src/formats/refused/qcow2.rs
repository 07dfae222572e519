//! qcow2 images: a minimal valid one of version 3, and what must not be made of it.
//!
//! Owns: its builder. A crash here costs nothing: tests only.

use libdeflater::{CompressionLvl, Compressor};

use super::{Case, Damaged, Good, Image, Input, Refused, Unbuilt, case};

/// Bytes in a cluster of ours.
pub(super) const CLUSTER: u64 = 4096;
const REFTABLE: u64 = CLUSTER;
const REFBLOCK: u64 = 2 * CLUSTER;
const L1: u64 = 3 * CLUSTER;
const L2: u64 = 4 * CLUSTER;
const DATA: u64 = 5 * CLUSTER;
const PACKED: u64 = 7 * CLUSTER;
const LEN: u64 = 8 * CLUSTER;
/// Clusters of the disk.
const CLUSTERS: u64 = 16;
/// Entry of a cluster with one owner.
const COPIED: u64 = 1 << 63;

fn be32(value: u32) -> [u8; 4] {
    value.to_be_bytes()
}

fn be64(value: u64) -> [u8; 8] {
    value.to_be_bytes()
}

fn cluster(number: u8) -> Vec<u8> {
    (0..4096u32).map(|k| (k / 64) as u8 ^ (number * 16 + 1)).collect()
}

pub(super) fn deflate(plain: &[u8]) -> Vec<u8> {
    let mut compressor = Compressor::new(CompressionLvl::new(9).unwrap());
    let mut out = vec![0; compressor.deflate_compress_bound(plain.len())];
    let len = compressor.deflate_compress(plain, &mut out).unwrap();
    out.truncate(len);
    out
}

/// L2 entry of a compressed cluster at `host` over `more` sectors after the first; 58 bits of offset at our cluster size.
fn packed(host: u64, more: u64) -> [u8; 8] {
    be64(1 << 62 | more << 58 | host)
}

/// The header of a version 3 image.
pub(super) fn header(cluster_bits: u32, size: u64, l1: (u32, u64), reftable: (u32, u64)) -> Image {
    Image::of(b"QFI\xfb")
        .put(4, be32(3))
        .put(20, be32(cluster_bits))
        .put(24, be64(size))
        .put(36, be32(l1.0))
        .put(40, be64(l1.1))
        .put(48, be64(reftable.1))
        .put(56, be32(reftable.0))
        .put(96, be32(4))
        .put(100, be32(112))
        .put(104, [0; 8])
}

/// Two plain clusters, a compressed one, a zero one, holes.
fn good() -> Image {
    header(12, CLUSTERS * CLUSTER, (1, L1), (1, REFTABLE))
        .put(REFTABLE, be64(REFBLOCK))
        .put(REFBLOCK, [be32(0x0001_0001); 4].concat())
        .put(L1, be64(L2 | COPIED))
        .put(L2, [be64(DATA | COPIED), be64((DATA + CLUSTER) | COPIED), packed(PACKED, 0), be64(1)].concat())
        .put(DATA, [cluster(0), cluster(1)].concat())
        .put(PACKED, deflate(&cluster(2)))
        .cut(LEN)
}

fn bytes() -> Vec<u8> {
    let mut out = [cluster(0), cluster(1), cluster(2)].concat();
    out.resize((CLUSTERS * CLUSTER) as usize, 0);
    out
}

/// The good one as version 2, which has neither feature bits nor zero clusters.
fn v2() -> Image {
    good().put(4, be32(2)).put(72, [0; 40]).put(L2 + 24, be64(0))
}

/// The good one with zstd, its compressed cluster as these bytes.
fn zstd(data: &[u8]) -> Image {
    good().put(72, be64(8)).put(104, [1]).put(PACKED, vec![0; 512]).put(PACKED, data)
}

fn frame(plain: &[u8]) -> Vec<u8> {
    zstd::bulk::compress(plain, 3).unwrap()
}

fn with(at: u64, bytes: impl AsRef<[u8]>) -> Input {
    Input::Qcow2(good().put(at, bytes))
}

fn image(image: Image) -> Input {
    Input::Qcow2(image)
}

pub(super) fn cases() -> Vec<Case> {
    let mut out = vec![
        case("good", image(good()), Good(Some(bytes()))),
        case("good, version 2", image(v2()), Good(Some(bytes()))),
        case("good, zstd", image(zstd(&frame(&cluster(2)))), Good(Some(bytes()))),
        case(
            "good, zstd in two frames",
            image(zstd(&[frame(&cluster(2)[..100]), frame(&cluster(2)[100..])].concat())),
            Good(Some(bytes())),
        ),
        case("good, last cluster cut short", image(good().put(L2 + 16, be64(0)).cut(7 * CLUSTER - 96)), Good(None)),
        case("good, header of 104 bytes", with(100, be32(104)), Good(Some(bytes()))),
        case("good, dirty", with(72, be64(1)), Good(Some(bytes()))),
    ];
    out.extend(headers());
    out.extend(features());
    out.extend(tables());
    out.extend(clusters());
    out.extend(streams());
    out
}

fn headers() -> Vec<Case> {
    let long = |len: u64| image(good().cut(len));
    vec![
        case("nothing", long(0), Damaged("the file has 0 bytes")),
        case("only a magic", long(4), Damaged("the file has 4 bytes")),
        case("header cut off", long(71), Damaged("the file has 71 bytes")),
        case("version 3 of 72 bytes", long(72), Damaged("a header length of 0 bytes")),
        case("no magic", with(0, b"QFI\0"), Damaged("does not start with the magic bytes")),
        case("version 0", with(4, be32(0)), Unbuilt("qcow2 version 0")),
        case("version 1", with(4, be32(1)), Unbuilt("qcow2 version 1")),
        case("version 4", with(4, be32(4)), Unbuilt("qcow2 version 4")),
        case("version of another byte order", with(4, 3u32.to_le_bytes()), Unbuilt("qcow2 version 50331648")),
        case(
            "backing file",
            image(good().put(8, be64(0x200)).put(16, be32(11)).put(0x200, b"/etc/shadow")),
            Refused("it names a backing file"),
        ),
        case("clusters of 256 bytes", with(20, be32(8)), Refused("cluster_bits 8;")),
        case("clusters of 4 MiB", with(20, be32(22)), Refused("cluster_bits 22;")),
        case("clusters of 2^64 bytes", with(20, be32(64)), Refused("cluster_bits 64;")),
        case("clusters of all ones", with(20, be32(u32::MAX)), Refused("cluster_bits 4294967295;")),
        case("size of 2^63", with(24, be64(1 << 63)), Refused("a size of 9223372036854775808 bytes")),
        case("size of all ones", with(24, be64(u64::MAX)), Refused("a size of 18446744073709551615 bytes")),
        case("size over what the L1 table maps", with(24, be64((2 << 20) + 1)), Damaged("for a disk of 2097664 bytes, which needs 2")),
        case("size far over it", with(24, be64(1 << 60)), Damaged("which needs 549755813888")),
        case("encrypted with AES", with(32, be32(1)), Refused("encrypted (AES)")),
        case("encrypted with LUKS", with(32, be32(2)), Refused("encrypted (LUKS)")),
        case("encrypted somehow", with(32, be32(3)), Refused("encryption method 3 is unknown")),
        case("65,537 snapshots", with(60, be32(65_537)), Refused("65537 internal snapshots")),
        case("snapshots of all ones", with(60, be32(u32::MAX)), Refused("4294967295 internal snapshots")),
        case("snapshot table on the header", with(60, be32(1)), Damaged("snapshot table 0 at byte 0")),
        case(
            "snapshot table unaligned",
            image(good().put(60, be32(1)).put(64, be64(CLUSTER + 8))),
            Damaged("snapshot table 0 at byte 4104"),
        ),
        case("snapshot table behind the end", image(good().put(60, be32(1)).put(64, be64(LEN))), Damaged("snapshot table 0 at byte 32768")),
        case("snapshot table over the end", image(good().put(60, be32(9999)).put(64, be64(CLUSTER))), Damaged("its 399960 bytes run past")),
        case(
            "snapshot table past 2^64",
            image(good().put(60, be32(2)).put(64, be64(!0xfff))),
            Damaged("snapshot table 0 at byte 18446744073709547520"),
        ),
    ]
}

fn features() -> Vec<Case> {
    vec![
        case("marked corrupt", with(72, be64(2)), Damaged("QEMU has marked the image as corrupt")),
        case("data file", with(72, be64(4)), Refused("external data file")),
        case("extended L2", with(72, be64(16)), Unbuilt("extended L2 entries")),
        case("unknown feature 5", with(72, be64(1 << 5)), Refused("unknown incompatible features (bits 0x20)")),
        case("unknown feature 63", with(72, be64(1 << 63)), Refused("unknown incompatible features (bits 0x8000000000000000)")),
        case("unknown feature beside a known one", with(72, be64(1 << 40 | 1)), Refused("(bits 0x10000000000)")),
        case("refcounts of 128 bits", with(96, be32(7)), Refused("refcount_order 7;")),
        case("refcounts of all ones", with(96, be32(u32::MAX)), Refused("refcount_order 4294967295;")),
        case("header of 72 bytes", with(100, be32(72)), Damaged("a header length of 72 bytes")),
        case("header of 103 bytes", with(100, be32(103)), Damaged("a header length of 103 bytes")),
        case("header over a cluster", with(100, be32(4097)), Damaged("a header length of 4097 bytes")),
        case("header of all ones", with(100, be32(u32::MAX)), Damaged("a header length of 4294967295 bytes")),
        case("zstd without its bit", with(104, [1]), Damaged("compression type 1 contradicts")),
        case("the bit without zstd", with(72, be64(8)), Damaged("compression type 0 contradicts")),
        case("unknown compression", with(104, [2]), Refused("compression type 2;")),
        case("unknown compression with its bit", image(good().put(72, be64(8)).put(104, [0xff])), Refused("compression type 255;")),
    ]
}

fn tables() -> Vec<Case> {
    vec![
        case("L1 over the limit", with(36, be32((4 << 20) + 1)), Refused("an L1 table of 33554440 bytes")),
        case("L1 of all ones", with(36, be32(u32::MAX)), Refused("an L1 table of 34359738360 bytes")),
        case("L1 over the end", with(36, be32(4 << 20)), Damaged("its 33554432 bytes run past")),
        case("no L1 entry", with(36, be32(0)), Damaged("0 entries for a disk of 65536 bytes")),
        case("L1 on the header", with(40, be64(0)), Damaged("L1 table 0 at byte 0")),
        case("L1 unaligned", with(40, be64(L1 + 8)), Damaged("L1 table 0 at byte 12296")),
        case("L1 behind the end", with(40, be64(LEN)), Damaged("L1 table 0 at byte 32768")),
        case("L1 past 2^64", with(40, be64(!0xfff)), Damaged("L1 table 0 at byte 18446744073709547520")),
        case("L1 on the refcount table", with(40, be64(REFTABLE)), Damaged("refcount table 0 at byte 4096: lies on")),
        case("no refcount table", with(56, be32(0)), Damaged("the image has none")),
        case("refcount table over the limit", with(56, be32(2049)), Refused("a refcount table of 8392704 bytes")),
        case("refcount table of all ones", with(56, be32(u32::MAX)), Refused("a refcount table of 17592186040320 bytes")),
        case("refcount table over the end", with(56, be32(2048)), Damaged("its 8388608 bytes run past")),
        case("refcount table unaligned", with(48, be64(REFTABLE + 512)), Damaged("refcount table 0 at byte 4608")),
        case("refcount table on the header", with(48, be64(0)), Damaged("refcount table 0 at byte 0")),
        case("refcount table past 2^64", with(48, be64(!0xfff)), Damaged("refcount table 0 at byte 18446744073709547520")),
        case("refcount block away", with(REFTABLE, be64(1 << 42)), Damaged("refcount block 0 at byte 4398046511104")),
        case("refcount block unaligned", with(REFTABLE + 8, be64(REFBLOCK + 512)), Damaged("refcount block 1 at byte 8704")),
        case("refcount block is the L1 table", with(REFTABLE, be64(L1)), Damaged("refcount block 0 at byte 12288: lies on")),
        case(
            "refcount block is the refcount table",
            with(REFTABLE + 16, be64(REFTABLE)),
            Damaged("refcount block 2 at byte 4096: lies on"),
        ),
        case("one refcount block twice", with(REFTABLE + 24, be64(REFBLOCK)), Damaged("refcount block 3 at byte 8192: lies on")),
        case("L2 table behind the end", with(L1, be64(LEN)), Damaged("L2 table 0 at byte 32768: runs past")),
        case("L2 table far away", with(L1, be64(1 << 55)), Damaged("L2 table 0 at byte 36028797018963968")),
        case("L2 table unaligned", with(L1, be64(L2 + 512)), Damaged("L2 table 0 at byte 16896: does not start")),
        case(
            "L2 table over the end",
            image(good().put(L1, be64(PACKED)).cut(LEN - 1)),
            Damaged("L2 table 0 at byte 28672: runs past the file's end at 32767"),
        ),
        case("L2 table is the L1 table", with(L1, be64(L1)), Damaged("L2 table 0 at byte 12288: lies on")),
        case("L2 table is the refcount table", with(L1, be64(REFTABLE)), Damaged("L2 table 0 at byte 4096: lies on")),
        case("L2 table is a refcount block", with(L1, be64(REFBLOCK)), Damaged("L2 table 0 at byte 8192: lies on")),
        case(
            "one L2 table twice",
            image(good().put(24, be64(4 << 20)).put(36, be32(2)).put(L1 + 8, be64(L2))),
            Damaged("L2 table 1 at byte 16384: lies on"),
        ),
    ]
}

fn clusters() -> Vec<Case> {
    let at = |k: u64| L2 + k * 8;
    vec![
        case("cluster behind the end", with(at(4), be64(LEN)), Damaged("cluster 4 at byte 32768: lies past")),
        case("cluster far away", with(at(0), be64(0x00ff_ffff_ffff_f000)), Damaged("cluster 0 at byte 72057594037923840")),
        case("cluster unaligned", with(at(5), be64(DATA + 512)), Damaged("cluster 5 at byte 20992: does not start")),
        case("two entries, one cluster", with(at(6), be64(DATA)), Damaged("cluster 6 at byte 20480: lies on")),
        case("cluster is its own L2 table", with(at(7), be64(L2)), Damaged("cluster 7 at byte 16384: lies on")),
        case("cluster is the L1 table", with(at(8), be64(L1)), Damaged("cluster 8 at byte 12288: lies on")),
        case("cluster is a refcount block", with(at(9), be64(REFBLOCK)), Damaged("cluster 9 at byte 8192: lies on")),
        case("zero cluster keeps the L1 table", with(at(3), be64(L1 | 1)), Damaged("zero cluster 3 at byte 12288: lies on")),
        case("zero cluster keeps another's place", with(at(3), be64(DATA | 1)), Damaged("zero cluster 3 at byte 20480: lies on")),
        case("zero cluster away", with(at(3), be64(1 << 40 | 1)), Damaged("cluster 3 at byte 1099511627776: lies past")),
        case("zero flag in version 2", image(v2().put(at(3), be64(1))), Damaged("has the zero flag, which version 2 does not know")),
        case("an entry past the capacity", with(at(511), be64(LEN)), Damaged("cluster 511 at byte 32768: lies past")),
        case(
            "compressed behind the end",
            with(at(2), packed(LEN, 0)),
            Damaged("compressed cluster 2 at byte 32768: its 512 bytes run past"),
        ),
        case("compressed at 0", with(at(2), packed(0, 0)), Damaged("compressed cluster 2 at byte 0")),
        case("compressed far away", with(at(2), packed((1 << 58) - 1, 15)), Damaged("compressed cluster 2 at byte 288230376151711743")),
        case(
            "compressed over the end",
            with(at(2), packed(PACKED + 3584, 1)),
            Damaged("compressed cluster 2 at byte 32256: its 1024 bytes run past"),
        ),
        case("compressed longer than a cluster", with(at(2), packed(DATA, 9)), Damaged("5120 bytes for a cluster of 4096")),
        case("compressed on the L2 table", with(at(2), packed(L2 + 8, 0)), Damaged("compressed cluster 2 at byte 16392: lies on")),
        case("compressed on a plain cluster", with(at(10), packed(DATA + 7, 0)), Damaged("compressed cluster 10 at byte 20487: lies on")),
        case("plain on a compressed one", with(at(11), be64(PACKED)), Damaged("cluster 11 at byte 28672: lies on")),
        case(
            "compressed runs into a plain one",
            with(at(12), packed(L1 - 512, 1)),
            Damaged("compressed cluster 12 at byte 11776: lies on"),
        ),
        case(
            "one stream twice",
            image(good().put(at(2), packed(PACKED, 2)).put(at(13), packed(PACKED, 2))),
            Damaged("at byte 28672: overlaps another"),
        ),
        case(
            "streams that overlap",
            image(good().put(at(2), packed(PACKED, 3)).put(at(13), packed(PACKED + 700, 2))),
            Damaged("at byte 29372: overlaps"),
        ),
    ]
}

fn streams() -> Vec<Case> {
    let mut damaged = frame(&cluster(2));
    // Magic, descriptor, size in two bytes; then the first block's header, which gets the type that zstd keeps reserved.
    damaged[7] |= 6;
    let stream = |data: &[u8]| image(good().put(PACKED, vec![0xff; 512]).put(PACKED, data));
    vec![
        case("stream of noise", stream(&[0xff; 512]), Damaged("does not inflate to one cluster")),
        case("stream of a byte too few", stream(&deflate(&[5; 4095])), Damaged("inflates to 4095 bytes")),
        case("stream of nothing", stream(&deflate(&[])), Damaged("inflates to 0 bytes")),
        case("stream of a byte too many", stream(&deflate(&[5; 4097])), Damaged("does not inflate to one cluster")),
        case("zstd of a damaged frame", image(zstd(&damaged)), Damaged("not a zstd frame: Data corruption")),
        case("zstd of a byte too many", image(zstd(&frame(&[5; 4097]))), Damaged("does not decompress to one cluster")),
        case("zstd of a byte too few", image(zstd(&frame(&[5; 4095]))), Damaged("not a zstd frame")),
    ]
}

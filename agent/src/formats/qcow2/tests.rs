//! The qcow2 engine against QEMU's: images of qemu-img are read, ours are checked and compared by it, hostile ones are refused.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::super::disk::{Compression, Disk, DiskWriter, Encoded, Encoder as _, FormatError, Method, Output, Scratch, UNIT, Window};
use super::super::raw;
use super::{Encoder, Header, Placed, PlainWriter, Reader, Tracer, Writer};
use crate::formats::places::Span;
use crate::formats::{Hot, Place};

/// A folder that goes when the test ends.
struct Dir(PathBuf);

impl Dir {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("hypersdk-qcow2-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn create(&self, name: &str) -> File {
        OpenOptions::new().read(true).write(true).create(true).truncate(true).open(self.path(name)).unwrap()
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn qemu_img(args: &[&str]) -> String {
    let output = Command::new("qemu-img").args(args).output().expect("these tests need qemu-img (Debian: qemu-utils)");
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "qemu-img {args:?}: {text}");
    text
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Numbers that look random and are the same each time.
fn noise(seed: u64) -> impl FnMut() -> u64 {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    }
}

/// A disk with random, repetitive, sparse and empty stretches.
fn sample(capacity: usize, seed: u64) -> Vec<u8> {
    let mut next = noise(seed);
    let mut data = vec![0u8; capacity];
    let mut at = 0;
    while at < capacity {
        let len = ((next() % (700 << 10)) as usize + 1).min(capacity - at);
        let part = &mut data[at..at + len];
        match next() % 5 {
            0 => part.chunks_mut(8).for_each(|c| c.copy_from_slice(&next().to_le_bytes()[..c.len()])),
            1 => part.iter_mut().enumerate().for_each(|(i, b)| *b = (i / 7 % 50) as u8),
            2 => part[len / 2] = 1,
            _ => {}
        }
        at += len;
    }
    data
}

fn read_all(disk: &dyn Disk) -> Vec<u8> {
    let mut scratch = Scratch::default();
    let mut data = vec![0u8; disk.capacity() as usize];
    for extent in disk.extents(0, u64::MAX).unwrap() {
        // In odd pieces, so that clusters are met from the middle, too.
        for at in (extent.offset..extent.offset + extent.len).step_by(100_003) {
            let end = (at + 100_003).min(extent.offset + extent.len);
            disk.read_at(at, &mut data[at as usize..end as usize], &mut scratch).unwrap();
        }
    }
    let mut whole = vec![7u8; data.len()];
    disk.read_at(0, &mut whole, &mut scratch).unwrap();
    assert!(whole == data, "what no extent covers is not zero");
    data
}

fn open(path: &Path) -> Result<Reader, FormatError> {
    Reader::open(Window::whole(File::open(path).unwrap()).unwrap())
}

fn begun(output: Output, capacity: u64, method: Option<Method>) -> Result<Box<dyn DiskWriter>, FormatError> {
    Ok(match method {
        None => Box::new(PlainWriter::new(output, capacity)?),
        Some(method) => Box::new(Writer::new(output, capacity, method)?),
    })
}

fn resumed(
    output: Output,
    capacity: u64,
    method: Option<Method>,
    pieces: &[Vec<u8>],
    position: u64,
) -> Result<Box<dyn DiskWriter>, FormatError> {
    let pieces = pieces.iter().cloned().map(Ok);
    Ok(match method {
        None => Box::new(PlainWriter::resume(output, capacity, pieces, position)?),
        Some(method) => Box::new(Writer::resume(output, capacity, method, pieces, position)?),
    })
}

fn write(file: File, data: &[u8], compression: Option<Compression>) {
    let method = compression.map(|c| c.method);
    let mut state = Encoder::new(compression).unwrap().state().unwrap();
    let mut writer = begun(Output { file: Arc::new(file), base: 0 }, data.len() as u64, method).unwrap();
    let mut encoded = Encoded::default();
    for (i, block) in data.chunks(4 << 20).enumerate() {
        state.encode(i as u64 * (4 << 20), block, &mut encoded).unwrap();
        writer.write_block(&encoded).unwrap();
    }
    writer.finish().unwrap();
}

fn compressions() -> [Option<Compression>; 4] {
    let level = |method, level| Some(Compression::new(method, level));
    [None, level(Method::Deflate, 1), level(Method::Deflate, 6), level(Method::Zstd, 3)]
}

#[test]
fn every_kind_of_image_that_qemu_makes_reads_as_the_disk_it_was_made_from() {
    let dir = Dir::new("read");
    let raw = dir.path("disk.raw");
    let data = sample(9 * (1 << 20) + 512 * 3, 1);
    std::fs::write(&raw, &data).unwrap();
    let variants = [
        "compat=0.10",
        "compat=1.1",
        "compat=v3,cluster_size=512",
        "cluster_size=4k",
        "cluster_size=2M",
        "compat=0.10,cluster_size=1k",
        "refcount_bits=1",
        "refcount_bits=64",
        "lazy_refcounts=on",
        "preallocation=metadata",
        "preallocation=full",
        "compat=0.10 -c",
        "compression_type=zlib -c",
        "compression_type=zstd -c",
        "cluster_size=512 -c",
        "cluster_size=2M,compression_type=zstd -c",
        "cluster_size=4k,compression_type=zstd -c",
    ];
    for variant in variants {
        let image = dir.path("disk.qcow2");
        let (options, flag) = variant.split_once(' ').unwrap_or((variant, "-S4k"));
        qemu_img(&["convert", "-f", "raw", "-O", "qcow2", flag, "-o", options, text(&raw), text(&image)]);
        let reader = open(&image).unwrap_or_else(|e| panic!("{variant}: {e}"));
        assert_eq!(reader.capacity(), data.len() as u64);
        assert!(read_all(&reader) == data, "{variant} reads differently");
    }
}

#[test]
fn zero_clusters_snapshots_and_a_dirty_image_are_read_and_preallocated_metadata_is_not_data() {
    let dir = Dir::new("zero");
    let image = dir.path("z.qcow2");
    qemu_img(&["create", "-f", "qcow2", "-o", "preallocation=metadata", text(&image), "64M"]);
    assert!(open(&image).unwrap().extents(0, u64::MAX).unwrap().is_empty());
    let io = Command::new("qemu-io")
        .args(["-f", "qcow2", "-c", "write -P 5 1M 1M", "-c", "write -z 1280k 64k", "-c", "write -z -u 1472k 64k", text(&image)])
        .output();
    assert!(io.expect("these tests need qemu-io (Debian: qemu-utils)").status.success());
    qemu_img(&["snapshot", "-c", "before", text(&image)]);
    Command::new("qemu-io").args(["-f", "qcow2", "-c", "write -P 6 1M 64k", text(&image)]).output().unwrap();
    let reader = open(&image).unwrap();
    assert_eq!(reader.header().snapshots, 1);
    let data = read_all(&reader);
    assert_eq!(
        (data[1 << 20], data[1280 << 10], data[(1280 << 10) - 1], data[1472 << 10], data[(2 << 20) - 1], data[2 << 20]),
        (6, 0, 5, 0, 5, 0)
    );
    let file = OpenOptions::new().read(true).write(true).open(&image).unwrap();
    file.write_all_at(&1u64.to_be_bytes(), 72).unwrap();
    assert!(open(&image).unwrap().header().dirty);
}

#[test]
fn what_we_write_qemu_finds_in_order_and_equal_and_so_do_we() {
    let dir = Dir::new("write");
    for (i, capacity) in [0, 512, UNIT - 512, UNIT, 17 << 20, (9 << 20) + 512 * 5].into_iter().enumerate() {
        let (raw, image) = (dir.path("a.raw"), dir.path("a.qcow2"));
        let data = sample(capacity, 40 + i as u64);
        std::fs::write(&raw, &data).unwrap();
        for compression in compressions() {
            write(dir.create("a.qcow2"), &data, compression);
            let check = qemu_img(&["check", "-f", "qcow2", text(&image)]);
            assert!(check.contains("No errors were found"), "{compression:?}: {check}");
            qemu_img(&["compare", "-f", "raw", "-F", "qcow2", text(&raw), text(&image)]);
            assert!(read_all(&open(&image).unwrap()) == data);
        }
    }
}

#[test]
fn a_refcount_block_is_laid_down_where_its_two_gigabytes_end() {
    let dir = Dir::new("refcounts");
    for compression in compressions() {
        for before in [0, 1, 2, 3, 7] {
            let image = dir.path("r.qcow2");
            let data = sample(8 << 20, 9);
            let mut state = Encoder::new(compression).unwrap().state().unwrap();
            // A disk large enough for a refcount table that reaches past 2 GiB.
            let (output, next) = (Output { file: Arc::new(dir.create("r.qcow2")), base: 0 }, (2 << 30) - before * UNIT as u64);
            let mut writer: Box<dyn DiskWriter> = match compression {
                None => Box::new(PlainWriter::starting_at(output, 8 << 30, next / UNIT as u64).unwrap()),
                Some(compression) => {
                    let mut writer = Writer::new(output, 8 << 30, compression.method).unwrap();
                    writer.jump(next);
                    Box::new(writer)
                }
            };
            let mut encoded = Encoded::default();
            for (i, block) in data.chunks(4 << 20).enumerate() {
                state.encode(i as u64 * (4 << 20), block, &mut encoded).unwrap();
                writer.write_block(&encoded).unwrap();
            }
            writer.finish().unwrap();
            let check = qemu_img(&["check", "-f", "qcow2", text(&image)]);
            assert!(check.contains("No errors were found"), "{compression:?} {before}: {check}");
            let mut back = vec![0u8; data.len()];
            open(&image).unwrap().read_at(0, &mut back, &mut Scratch::default()).unwrap();
            assert!(back == data);
        }
    }
}

#[test]
fn a_resumed_writer_goes_on_exactly_where_the_first_one_stood() {
    let dir = Dir::new("resume");
    let data = sample(24 << 20, 3);
    for compression in compressions() {
        let method = compression.map(|c| c.method);
        write(dir.create("whole"), &data, compression);
        let whole = std::fs::read(dir.path("whole")).unwrap();
        for stop in 0..6 {
            let mut state = Encoder::new(compression).unwrap().state().unwrap();
            let output = Output { file: Arc::new(dir.create("part")), base: 0 };
            let mut writer = begun(output.clone(), data.len() as u64, method).unwrap();
            let (mut pieces, mut encoded, mut position) = (Vec::new(), Encoded::default(), 0);
            for (i, block) in data.chunks(4 << 20).enumerate() {
                if i == stop {
                    position = writer.position();
                    output.file.set_len(position).unwrap();
                    writer = resumed(output.clone(), data.len() as u64, method, &pieces, position).unwrap();
                }
                state.encode(i as u64 * (4 << 20), block, &mut encoded).unwrap();
                writer.write_block(&encoded).unwrap();
                pieces.push(writer.checkpoint().unwrap());
            }
            let end = writer.finish().unwrap();
            assert!(end == whole.len() as u64 && std::fs::read(dir.path("part")).unwrap() == whole, "{compression:?} after block {stop}");
            assert!(resumed(output, data.len() as u64, method, &pieces[..1], position + 1).is_err());
        }
    }
}

/// Writes a block in places of its own, `at` most so many units side by side, and leaves what the writer is told.
fn place(writer: &PlainWriter, output: &Output, offset: u64, block: &[u8], at_most: u64) -> Encoded {
    let Some(Hot::Places(places)) = writer.hot() else { panic!("a plain image has places") };
    let (mut encoded, mut data) = (Encoded::default(), block.to_vec());
    raw::split(offset, &mut data, &mut encoded);
    let mut placed = Vec::new();
    for (mut index, _, mut bytes) in raw::runs(&encoded) {
        while !bytes.is_empty() {
            let span = places.take(at_most.min((bytes.len() / UNIT) as u64));
            let (now, later) = bytes.split_at(span.count as usize * UNIT);
            output.write_all_at(now, span.offset()).unwrap();
            placed.push(Place { index, span });
            index += span.count;
            bytes = later;
        }
    }
    encoded.placed = placed;
    encoded
}

/// Blocks that get their places in any order, some of which are written and lost with an attempt.
#[test]
fn a_plain_image_whose_blocks_lie_in_any_order_is_sound_and_fills_the_gaps_of_lost_ones() {
    let dir = Dir::new("places");
    let (block, mut next) = (1 << 20, noise(11));
    let capacity = (600 << 20) + 512;
    // Data on both sides of the border between two L2 tables at 512 MiB, and at the end.
    let mut data = vec![0u8; capacity];
    data[505 << 20..519 << 20].copy_from_slice(&sample(14 << 20, 12));
    data[599 << 20..].copy_from_slice(&sample((1 << 20) + 512, 14));
    std::fs::write(dir.path("a.raw"), &data).unwrap();
    let blocks: Vec<(u64, &[u8])> = data.chunks(block).enumerate().map(|(i, bytes)| ((i * block) as u64, bytes)).collect();
    let blocks: Vec<_> = blocks.into_iter().filter(|(_, bytes)| bytes.iter().any(|byte| *byte != 0)).collect();
    for losses in [0, 1, 3] {
        let output = Output { file: Arc::new(dir.create("a.qcow2")), base: 0 };
        let mut writer = PlainWriter::new(output.clone(), capacity as u64).unwrap();
        let (mut pieces, mut position, mut done, mut lost) = (Vec::new(), writer.position(), 0, 0);
        while done < blocks.len() {
            // Four blocks are under way and get their places in an order of their own.
            let mut under_way: Vec<usize> = (done..(done + 4).min(blocks.len())).collect();
            under_way.sort_by_key(|_| next());
            let mut made: Vec<(usize, Encoded)> =
                under_way.iter().map(|i| (*i, place(&writer, &output, blocks[*i].0, blocks[*i].1, next() % 5 + 1))).collect();
            made.sort_by_key(|(i, _)| *i);
            let crash = lost < losses && done > 0;
            let kept = if crash { (next() % 3) as usize } else { made.len() };
            for (_, encoded) in made.iter().take(kept) {
                writer.took_block(encoded).unwrap();
            }
            done += kept.min(made.len());
            pieces.push(writer.checkpoint().unwrap());
            position = writer.position();
            if crash {
                lost += 1;
                output.file.set_len(position).unwrap();
                writer = PlainWriter::resume(output.clone(), capacity as u64, pieces.iter().cloned().map(Ok), position).unwrap();
            }
        }
        assert_eq!(lost, losses);
        // What the tracer tells is where the bytes are.
        let (mut tracer, mut units) = (Tracer::new(capacity as u64).unwrap(), 0);
        for (i, piece) in pieces.iter().enumerate() {
            let (placed, reached) = tracer.next(piece).unwrap();
            assert!(i + 1 < pieces.len() || reached == position);
            for one in placed {
                let mut cluster = vec![0u8; UNIT];
                match one {
                    Placed::Units { index, count, host } => {
                        for i in 0..count {
                            output.read_exact_at(&mut cluster, host + i * UNIT as u64).unwrap();
                            let from = (index + i) as usize * UNIT;
                            let there = &data[from..(from + UNIT).min(capacity)];
                            assert!(cluster[..there.len()] == *there && cluster[there.len()..].iter().all(|byte| *byte == 0));
                        }
                        units += count;
                    }
                    Placed::Table { host, digest } => {
                        output.read_exact_at(&mut cluster, host).unwrap();
                        assert_eq!(*blake3::hash(&cluster).as_bytes(), digest);
                    }
                }
            }
        }
        let end = writer.finish().unwrap();
        let wanted = data.chunks(UNIT).filter(|unit| unit.iter().any(|byte| *byte != 0)).count() as u64;
        assert_eq!(units, wanted);
        // Header, refcount table, L1 table, two L2 tables, one refcount block. A gap may be left when it came late.
        let least = (wanted + 6) * UNIT as u64;
        assert!(end == least || losses > 0 && end <= least + (4 << 20), "{losses}: {end} instead of {least}");
        let check = qemu_img(&["check", "-f", "qcow2", text(&dir.path("a.qcow2"))]);
        assert!(check.contains("No errors were found"), "{losses}: {check}");
        qemu_img(&["compare", "-f", "raw", "-F", "qcow2", text(&dir.path("a.raw")), text(&dir.path("a.qcow2"))]);
        open(&dir.path("a.qcow2")).unwrap();
    }
}

#[test]
fn a_plain_writer_refuses_what_would_share_a_place_or_break_the_order() {
    let dir = Dir::new("misuse");
    let output = Output { file: Arc::new(dir.create("a.qcow2")), base: 0 };
    let told = |index, first, count| Encoded { placed: vec![Place { index, span: Span { first, count } }], ..Encoded::default() };
    let mut writer = PlainWriter::new(output.clone(), 10 << 20).unwrap();
    writer.took_block(&told(3, 10, 2)).unwrap();
    for (index, first, count) in
        [(4, 20, 1), (5, 11, 1), (5, 9, 2), (5, 0, 1), (160, 20, 1), (159, 20, 2), (5, 1 << 40, 1), (5, u64::MAX, 1)]
    {
        assert!(writer.took_block(&told(index, first, count)).is_err(), "unit {index} in {first}+{count}");
    }
    let piece = writer.checkpoint().unwrap();
    let again = |pieces: Vec<Vec<u8>>| PlainWriter::resume(output.clone(), 10 << 20, pieces.into_iter().map(Ok), 12 * UNIT as u64);
    again(vec![piece.clone()]).unwrap();
    // Twice the same, units without a cluster, a compressed unit, a table of nothing, a number without end, a cluster out of reach.
    let whole = |more: &[u8]| [&piece[..], more].concat();
    for bad in [whole(&piece), vec![4], whole(&[5]), vec![7], vec![0x80], vec![0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f, 4]] {
        assert!(again(vec![bad.clone()]).is_err(), "{bad:?}");
    }
}

#[test]
fn an_empty_disk_of_four_tebibytes_and_a_disk_over_the_limit() {
    let dir = Dir::new("large");
    let started = Instant::now();
    let mut writer = begun(Output { file: Arc::new(dir.create("e.qcow2")), base: 0 }, 4 << 40, None).unwrap();
    writer.finish().unwrap();
    let reader = open(&dir.path("e.qcow2")).unwrap();
    assert!(reader.extents(0, u64::MAX).unwrap().is_empty());
    assert!(started.elapsed() < Duration::from_secs(1));
    assert!(qemu_img(&["check", "-f", "qcow2", text(&dir.path("e.qcow2"))]).contains("No errors"));
    let writer = Writer::new(Output { file: Arc::new(dir.create("m.qcow2")), base: 0 }, super::MAX_CAPACITY, Method::Zstd);
    writer.unwrap().finish().unwrap();
    assert!(qemu_img(&["info", "-f", "qcow2", text(&dir.path("m.qcow2"))]).contains("2 PiB"));
    let error = PlainWriter::new(Output { file: Arc::new(dir.create("x.qcow2")), base: 0 }, super::MAX_CAPACITY + 512).unwrap_err();
    assert!(error.to_string().contains("limit"), "{error}");
}

/// Changes some bytes of a good image: (name, what to write where, expected words of the refusal).
type Alteration = (&'static str, Vec<(u64, Vec<u8>)>, &'static str);

fn alterations(l1: u64, l2: u64, reftable: u64) -> Vec<Alteration> {
    let be = |value: u64| value.to_be_bytes().to_vec();
    let be32 = |value: u32| value.to_be_bytes().to_vec();
    let packed = |host: u64, more: u64| be(1 << 62 | more << 54 | host);
    vec![
        ("magic", vec![(0, be32(0))], "magic"),
        ("version 1", vec![(4, be32(1))], "version 1"),
        ("backing file", vec![(8, be(0x200)), (16, be32(11)), (0x200, b"/etc/shadow".to_vec())], "backing file"),
        ("data file", vec![(72, be(4))], "data file"),
        ("corrupt bit", vec![(72, be(2))], "corrupt"),
        ("extended L2", vec![(72, be(16))], "extended L2"),
        ("unknown bit", vec![(72, be(1 << 40))], "unknown incompatible"),
        ("encrypted", vec![(32, be32(2))], "LUKS"),
        ("cluster_bits 8", vec![(20, be32(8))], "cluster_bits 8"),
        ("cluster_bits 22", vec![(20, be32(22))], "cluster_bits 22"),
        ("cluster_bits huge", vec![(20, be32(u32::MAX))], "cluster_bits"),
        ("size 2^63", vec![(24, be(1 << 63))], "size"),
        ("size u64::MAX", vec![(24, be(u64::MAX))], "size"),
        ("size over L1", vec![(24, be(1 << 50))], "L1 table"),
        ("L1 over the limit", vec![(36, be32(u32::MAX))], "L1 table of"),
        ("L1 past the end", vec![(36, be32(4 << 20))], "past the file's end"),
        ("L1 unaligned", vec![(40, be(l1 + 512))], "does not start at a cluster"),
        ("L1 far away", vec![(40, be(!0xffff))], "past the file's end"),
        ("L1 on the header", vec![(40, be(0))], "does not start"),
        ("refcount table past the end", vec![(48, be(1 << 40))], "past the file's end"),
        ("refcount table over the limit", vec![(56, be32(u32::MAX))], "refcount table of"),
        ("no refcount table", vec![(56, be32(0))], "has none"),
        ("refcount order", vec![(96, be32(7))], "refcount_order 7"),
        ("header length", vec![(100, be32(u32::MAX))], "header length"),
        ("compression type without its bit", vec![(100, be32(112)), (104, vec![1])], "compression type 1"),
        ("snapshots", vec![(60, be32(1 << 20))], "internal snapshots"),
        ("snapshot table away", vec![(60, be32(1)), (64, be(1 << 41))], "snapshot table"),
        ("refcount block away", vec![(reftable, be(1 << 42))], "refcount block"),
        ("refcount block is the L1 table", vec![(reftable, be(l1))], "already in use"),
        ("L2 table past the end", vec![(l1, be(1 << 40))], "L2 table"),
        ("L2 table unaligned", vec![(l1, be(l2 + 512))], "L2 table"),
        ("L2 table is the L1 table", vec![(l1, be(l1))], "already in use"),
        ("cluster past the end", vec![(l2, be(1 << 40))], "past the file's end"),
        ("cluster unaligned", vec![(l2, be(l2 + 512))], "does not start"),
        ("cluster is an L2 table", vec![(l2, be(l2))], "already in use"),
        ("cluster is the header, by a zero cluster's place", vec![(l2, be(l1 | 1))], "already in use"),
        ("two entries, one cluster", vec![(l2 + 16, be(l2 + (1 << 16))), (l2 + 24, be(l2 + (1 << 16)))], "already in use"),
        ("compressed past the end", vec![(l2, packed(1 << 40, 1))], "past the file's end"),
        ("compressed runs on", vec![(l2, packed(l2 + (1 << 16), 255)), (l2 + 8, be(0)), (l2 + 16, be(0)), (l2 + 24, be(0))], "bytes"),
        ("compressed on the L2 table", vec![(l2, packed(l2 + 8, 1))], "already in use"),
        (
            "compressed on compressed",
            vec![(l2, packed(l2 + (1 << 16), 3)), (l2 + 8, packed(l2 + (1 << 16), 3)), (l2 + 16, be(0)), (l2 + 24, be(0))],
            "overlaps",
        ),
    ]
}

#[test]
fn hostile_images_are_refused_in_words_and_at_once() {
    let dir = Dir::new("hostile");
    let image = dir.path("h.qcow2");
    qemu_img(&["create", "-f", "qcow2", text(&image), "1G"]);
    let io = Command::new("qemu-io").args(["-f", "qcow2", "-c", "write -P 5 0 256k", text(&image)]).output();
    assert!(io.expect("these tests need qemu-io (Debian: qemu-utils)").status.success());
    let good = std::fs::read(&image).unwrap();
    let number = |at: usize| u64::from_be_bytes(good[at..at + 8].try_into().unwrap());
    let l1 = number(40);
    let l2 = number(l1 as usize) & super::OFFSET_MASK;
    assert!(open(&image).is_ok());
    for (name, changes, words) in alterations(l1, l2, number(48)) {
        let file = dir.create("h.qcow2");
        file.write_all_at(&good, 0).unwrap();
        for (at, bytes) in changes {
            file.write_all_at(&bytes, at).unwrap();
        }
        let started = Instant::now();
        let error = open(&image).err().unwrap_or_else(|| panic!("{name} was opened")).to_string();
        assert!(error.contains(words), "{name}: {error}");
        assert!(started.elapsed() < Duration::from_millis(500), "{name} took {:?}", started.elapsed());
    }
    for len in [0, 4, 71, 72, 100, 65_536, l2 as usize, l2 as usize + 70_000] {
        std::fs::write(&image, &good[..len]).unwrap();
        let error = open(&image).err().unwrap_or_else(|| panic!("cut to {len} was opened"));
        assert!(matches!(error, FormatError::Corrupt { .. }), "{len}: {error}");
    }
}

#[test]
fn a_sparse_file_that_claims_petabytes_costs_what_its_real_bytes_cost() {
    let dir = Dir::new("sparse");
    let file = dir.create("s.qcow2");
    let mut header = [0u8; 112];
    let mut put = |at: usize, value: &[u8]| header[at..at + value.len()].copy_from_slice(value);
    put(0, &super::header::MAGIC.to_be_bytes());
    put(4, &3u32.to_be_bytes());
    put(20, &16u32.to_be_bytes());
    put(24, &(2u64 << 50).to_be_bytes());
    put(36, &(4u32 << 20).to_be_bytes());
    put(40, &(16u64 << 20).to_be_bytes());
    put(48, &65_536u64.to_be_bytes());
    put(56, &1u32.to_be_bytes());
    put(96, &4u32.to_be_bytes());
    put(100, &112u32.to_be_bytes());
    file.write_all_at(&header, 0).unwrap();
    // 4 Mi L2 tables, one after the other, all in one hole of 256 GiB.
    let tables: Vec<u8> = (0..4u64 << 20).flat_map(|i| ((64 << 20) + i * 65_536).to_be_bytes()).collect();
    file.write_all_at(&tables, 16 << 20).unwrap();
    file.set_len((64 << 20) + (4u64 << 20) * 65_536).unwrap();
    let started = Instant::now();
    let reader = open(&dir.path("s.qcow2")).unwrap();
    assert!(reader.extents(0, u64::MAX).unwrap().is_empty());
    assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
}

#[test]
fn damage_is_named_by_cluster_and_place_and_spares_the_rest() {
    let dir = Dir::new("damage");
    let image = dir.path("d.qcow2");
    let mut next = noise(4);
    let data: Vec<u8> = (0..4 << 20).map(|_| (next() & 15) as u8).collect();
    for compression in [compressions()[2], compressions()[3]] {
        let file = dir.create("d.qcow2");
        write(file.try_clone().unwrap(), &data, compression);
        let reader = open(&image).unwrap();
        let super::reader::Mapping::Packed { host, len } = reader.at(10).unwrap() else { panic!("cluster 10 is not compressed") };
        file.write_all_at(&vec![0xff; len as usize - 512], host).unwrap();
        let mut buf = vec![0u8; UNIT];
        let error = reader.read_at(10 * UNIT as u64, &mut buf, &mut Scratch::default()).unwrap_err().to_string();
        assert!(error.contains("compressed cluster 10") && error.contains(&format!("byte {host}")), "{error}");
        reader.read_at(0, &mut vec![0u8; 9 * UNIT], &mut Scratch::default()).unwrap();
    }
    // An L2 entry that leads out of the file: refused as an input, only its cluster lost where damage is to be listed.
    write(dir.create("d.qcow2"), &data, None);
    let file = OpenOptions::new().read(true).write(true).open(&image).unwrap();
    let l2 = open(&image).unwrap().l2_offset(0).unwrap().unwrap();
    file.write_all_at(&(1u64 << 50).to_be_bytes(), l2 + 8 * 3).unwrap();
    assert!(open(&image).is_err());
    let reader = Reader::open_damaged(Window::whole(File::open(&image).unwrap()).unwrap()).unwrap();
    let mut buf = vec![0u8; UNIT];
    assert!(reader.read_at(3 * UNIT as u64, &mut buf, &mut Scratch::default()).is_err());
    reader.read_at(4 * UNIT as u64, &mut buf, &mut Scratch::default()).unwrap();
    assert!(buf[..] == data[4 * UNIT..5 * UNIT]);
    assert_eq!(reader.extents(0, u64::MAX).unwrap().iter().map(|e| e.len).sum::<u64>(), data.len() as u64);
}

#[test]
fn raw_files_and_short_headers_are_not_taken_for_images() {
    let dir = Dir::new("header");
    std::fs::write(dir.path("a"), vec![0u8; 4096]).unwrap();
    let window = Window::whole(File::open(dir.path("a")).unwrap()).unwrap();
    assert!(Header::read(&window).is_err());
    assert_eq!(raw::Reader::open(window).unwrap().capacity(), 4096);
}

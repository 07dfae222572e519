//! The VDI engine against QEMU's: images of qemu-img are read, ours are checked and compared by it, hostile ones are refused.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::super::disk::{Disk, DiskWriter, Encoded, Encoder as _, FormatError, Output, Run, Scratch, UNIT, Unit, Window};
use super::super::raw;
use super::{MAX_CAPACITY, Reader, Writer, looks_like};

const ID: [u8; 16] = *b"0123456789abcdef";

/// Bytes of disk in one pipeline block.
const BLOCK: usize = 4 << 20;

/// A folder that goes when the test ends.
struct Dir(PathBuf);

impl Dir {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("hypersdk-vdi-{name}-{}", std::process::id()));
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

    fn output(&self, name: &str) -> Output {
        Output { file: Arc::new(self.create(name)), base: 0 }
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().expect("these tests need qemu-img and qemu-io (Debian: qemu-utils)");
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program} {args:?}: {text}");
    text
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The size that QEMU sees.
fn qemu_size(path: &Path) -> u64 {
    let info = run("qemu-img", &["info", "--output=json", "-f", "vdi", text(path)]);
    let size = info.lines().find_map(|line| line.trim().strip_prefix("\"virtual-size\": ")).unwrap();
    size.trim_end_matches(',').parse().unwrap()
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
        let len = ((next() % (3 << 20)) as usize + 1).min(capacity - at);
        let part = &mut data[at..at + len];
        match next() % 5 {
            0 => part.chunks_mut(8).for_each(|c| c.copy_from_slice(&next().to_le_bytes()[..c.len()])),
            1 => part[len / 2] = 1,
            _ => {}
        }
        at += len;
    }
    data
}

fn open(path: &Path) -> Result<Reader, FormatError> {
    Reader::open(Window::whole(File::open(path).unwrap()).unwrap())
}

fn read_all(disk: &dyn Disk) -> Vec<u8> {
    let mut scratch = Scratch::default();
    let mut data = vec![0u8; disk.capacity() as usize];
    for extent in disk.extents(0, u64::MAX).unwrap() {
        // In odd pieces, so that blocks are met from the middle, too.
        for at in (extent.offset..extent.offset + extent.len).step_by(1_000_003) {
            let end = (at + 1_000_003).min(extent.offset + extent.len);
            disk.read_at(at, &mut data[at as usize..end as usize], &mut scratch).unwrap();
        }
    }
    let mut whole = vec![7u8; data.len()];
    disk.read_at(0, &mut whole, &mut scratch).unwrap();
    assert!(whole == data, "what no extent covers is not zero");
    // A part of the extents is the part of all extents.
    let (from, to) = (disk.capacity() / 3, disk.capacity() / 3 * 2);
    let clip = |e: &super::super::disk::Extent| (e.offset.max(from), (e.offset + e.len).min(to));
    let all: Vec<_> = disk.extents(0, u64::MAX).unwrap().iter().map(clip).filter(|(a, b)| a < b).collect();
    let part: Vec<_> = disk.extents(from, to).unwrap().iter().map(|e| (e.offset, e.offset + e.len)).collect();
    assert_eq!(part, all);
    data
}

/// Hands the disk's blocks over as the pipeline does.
fn encode(data: &[u8], number: usize, out: &mut Encoded) {
    let from = number * BLOCK;
    let block = &data[from..(from + BLOCK).min(data.len())];
    raw::Encoder.state().unwrap().encode(from as u64, block, out).unwrap();
}

/// Writes a block by the writer or, in turn, to where it says.
fn write_block(writer: &mut Writer, output: &Output, block: &Encoded, number: usize) {
    let mut runs = vec![Run { start: 1, len: 1, offset: 1 }];
    if number.is_multiple_of(2) {
        return writer.write_block(block).unwrap();
    }
    assert!(writer.place_block(block, &mut runs).unwrap());
    for run in runs {
        output.write_all_at(&block.bytes[run.start..run.start + run.len], run.offset).unwrap();
    }
}

fn write(output: Output, data: &[u8]) {
    let mut writer = Writer::new(output.clone(), data.len() as u64, ID).unwrap();
    let mut encoded = Encoded::default();
    for number in 0..data.len().div_ceil(BLOCK) {
        encode(data, number, &mut encoded);
        write_block(&mut writer, &output, &encoded, number);
    }
    let end = writer.finish().unwrap();
    assert_eq!(end, output.file.metadata().unwrap().len());
}

fn check(image: &Path) {
    let said = run("qemu-img", &["check", "-f", "vdi", text(image)]);
    assert!(said.contains("No errors were found"), "{said}");
}

#[test]
fn what_we_write_qemu_finds_in_order_and_the_same_disk_and_so_do_we() {
    let dir = Dir::new("write");
    let (raw, image) = (dir.path("a.raw"), dir.path("a.vdi"));
    let mut next = noise(21);
    for seed in 0..60 {
        let capacity = match seed {
            0..8 => [0, 512, UNIT - 512, UNIT, 1 << 20, (1 << 20) + 512, BLOCK, BLOCK - 512][seed as usize],
            _ => (next() % (40 << 11)) as usize * 512,
        };
        let data = sample(capacity, 40 + seed);
        std::fs::write(&raw, &data).unwrap();
        write(dir.output("a.vdi"), &data);
        check(&image);
        assert_eq!(qemu_size(&image), capacity as u64, "seed {seed}");
        run("qemu-img", &["compare", "-f", "raw", "-F", "vdi", text(&raw), text(&image)]);
        let reader = open(&image).unwrap();
        assert_eq!((reader.capacity(), reader.subformat()), (capacity as u64, "dynamic"));
        assert!(read_all(&reader) == data, "seed {seed}");
        assert!(looks_like(&Window::whole(File::open(&image).unwrap()).unwrap()));
    }
    run("qemu-img", &["convert", "-f", "vdi", "-O", "raw", text(&image), text(&dir.path("back.raw"))]);
    let data = std::fs::read(&raw).unwrap();
    assert!(data == std::fs::read(dir.path("back.raw")).unwrap());
    // Behind other bytes of the same file.
    let output = Output { base: 4096, ..dir.output("b") };
    let mut writer = Writer::new(output.clone(), data.len() as u64, ID).unwrap();
    let mut encoded = Encoded::default();
    for number in 0..data.len().div_ceil(BLOCK) {
        encode(&data, number, &mut encoded);
        write_block(&mut writer, &output, &encoded, number);
        writer.checkpoint().unwrap();
    }
    let end = writer.finish().unwrap();
    let window = Window::whole(File::open(dir.path("b")).unwrap()).unwrap();
    assert_eq!(window.len(), 4096 + end);
    assert!(read_all(&Reader::open(window.part(4096, end).unwrap()).unwrap()) == data);
}

#[test]
fn every_image_that_qemu_makes_reads_as_qemu_reads_it() {
    let dir = Dir::new("read");
    let (raw, image, back) = (dir.path("a.raw"), dir.path("a.vdi"), dir.path("back.raw"));
    let mut next = noise(22);
    let variants = [("static=off", "dynamic"), ("static=on", "static")];
    for seed in 0..15 {
        std::fs::write(&raw, sample((1 + next() % (40 << 11)) as usize * 512, 400 + seed)).unwrap();
        for (variant, subformat) in variants {
            run("qemu-img", &["convert", "-f", "raw", "-O", "vdi", "-o", variant, text(&raw), text(&image)]);
            if seed % 3 == 0 {
                let at = next() % 8 * 65_536;
                let size = qemu_size(&image);
                let commands = [format!("write -P 5 {} 512", at.min(size - 512)), format!("write -P 6 {} 512", size - 512)];
                run("qemu-io", &["-f", "vdi", "-c", &commands[0], "-c", &commands[1], text(&image)]);
            }
            run("qemu-img", &["convert", "-f", "vdi", "-O", "raw", text(&image), text(&back)]);
            let reader = open(&image).unwrap_or_else(|e| panic!("{variant}: {e}"));
            let theirs = std::fs::read(&back).unwrap();
            assert_eq!((reader.capacity(), reader.subformat()), (theirs.len() as u64, subformat));
            assert!(read_all(&reader) == theirs, "{variant}, seed {seed}");
        }
    }
    for size in ["0", "1", "511k", "130G", "5T"] {
        run("qemu-img", &["create", "-f", "vdi", text(&image), size]);
        let reader = open(&image).unwrap_or_else(|e| panic!("{size}: {e}"));
        assert_eq!(reader.capacity(), qemu_size(&image), "{size}");
        assert!(reader.extents(0, u64::MAX).unwrap().is_empty());
    }
}

#[test]
fn discarded_blocks_odd_sizes_shuffled_blocks_and_a_short_last_one_are_read_as_qemu_reads_them() {
    let dir = Dir::new("odd");
    let (image, back) = (dir.path("a.vdi"), dir.path("back.raw"));
    let mut next = noise(23);
    let data: Vec<u8> = (0..(9 << 20) + 1024).map(|_| next() as u8 | 1).collect();
    write(dir.output("a.vdi"), &data);
    let mut good = Image(std::fs::read(&image).unwrap());
    // The map backwards, block 4 discarded, an odd number of bytes.
    for (index, place) in (0..10).zip((0..9).rev().chain([9])) {
        good.entry(index, place);
    }
    good.entry(4, u32::MAX - 1);
    good.put(368, &(data.len() as u64 - 100).to_le_bytes());
    good.0.truncate((1 << 20) + data.len());
    std::fs::write(&image, &good.0).unwrap();
    run("qemu-img", &["convert", "-f", "vdi", "-O", "raw", text(&image), text(&back)]);
    let reader = open(&image).unwrap();
    let theirs = std::fs::read(&back).unwrap();
    assert!(read_all(&reader) == theirs);
    assert_eq!(reader.capacity(), data.len() as u64);
    let extents: Vec<_> = reader.extents(0, u64::MAX).unwrap().iter().map(|e| (e.offset, e.len)).collect();
    assert_eq!(extents, [(0, 4 << 20), (5 << 20, (4 << 20) + 1024)]);
    assert!(theirs[..1 << 20] == data[8 << 20..9 << 20] && theirs[4 << 20..5 << 20].iter().all(|b| *b == 0));
}

#[test]
fn a_resumed_writer_goes_on_exactly_where_the_first_one_stood() {
    let dir = Dir::new("resume");
    let mut next = noise(24);
    for seed in 0..3 {
        let data = sample((40 << 20) + (next() % 9000) as usize * 512, 900 + seed);
        let capacity = data.len() as u64;
        write(dir.output("whole"), &data);
        let whole = std::fs::read(dir.path("whole")).unwrap();
        let blocks = data.len().div_ceil(BLOCK);
        for stop in 0..blocks {
            let output = dir.output("part");
            let mut writer = Writer::new(output.clone(), capacity, ID).unwrap();
            let (mut pieces, mut encoded) = (Vec::new(), Encoded::default());
            for number in 0..blocks {
                if number == stop {
                    // What came behind the checkpoint is lost but for some bytes, which the survey cuts off.
                    let position = writer.position();
                    encode(&vec![9u8; data.len()], number, &mut encoded);
                    writer.write_block(&encoded).unwrap();
                    output.file.set_len(position).unwrap();
                    writer = Writer::resume(output.clone(), capacity, ID, pieces.drain(..).map(Ok), position).unwrap();
                    assert_eq!(writer.position(), position);
                }
                encode(&data, number, &mut encoded);
                // The other way round than `write`.
                write_block(&mut writer, &output, &encoded, number + 1);
                pieces.push(writer.checkpoint().unwrap());
                assert_eq!(output.file.metadata().unwrap().len(), writer.position());
            }
            let end = writer.finish().unwrap();
            assert!(end == whole.len() as u64 && std::fs::read(dir.path("part")).unwrap() == whole, "after block {stop}");
        }
    }
    let resume =
        |pieces: Vec<Vec<u8>>, position| Writer::resume(dir.output("x"), 4 << 20, ID, pieces.into_iter().map(Ok), position).unwrap_err();
    for (pieces, words) in [
        (vec![vec![0, 1]], "end at 2097152 instead"),
        (vec![vec![3, 2]], "past the capacity"),
        (vec![vec![0]], "ends inside a number"),
        (vec![vec![0, 4], vec![0, 1]], "past the capacity"),
    ] {
        let said = resume(pieces, 1 << 20).to_string();
        assert!(said.contains(words), "{said}");
    }
}

#[test]
fn a_large_empty_disk_is_written_at_once_and_a_larger_one_is_refused_with_the_limit() {
    let dir = Dir::new("large");
    let path = dir.path("a.vdi");
    let started = Instant::now();
    assert_eq!(Writer::new(dir.output("a.vdi"), 4 << 40, ID).unwrap().finish().unwrap(), 17 << 20);
    assert!(open(&path).unwrap().extents(0, u64::MAX).unwrap().is_empty());
    assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
    check(&path);
    assert_eq!(qemu_size(&path), 4 << 40);
    let mut image = Writer::new(dir.output("a.vdi"), 5 << 40, ID).unwrap();
    let unit =
        |index| Encoded { units: vec![Unit { index, start: 0, len: UNIT, compressed: false }], bytes: vec![6; UNIT], ..Encoded::default() };
    let last = (5 << 40) / UNIT as u64 - 1;
    image.write_block(&unit(70_000)).unwrap();
    image.write_block(&unit(last)).unwrap();
    assert!(image.write_block(&unit(last)).unwrap_err().to_string().contains("in order"));
    image.finish().unwrap();
    let extents = open(&path).unwrap().extents(0, u64::MAX).unwrap();
    let expected = [70_000, last].map(|index| (index * UNIT as u64, UNIT as u64));
    assert_eq!(extents.iter().map(|e| (e.offset, e.len)).collect::<Vec<_>>(), expected);
    check(&path);
    for (capacity, words) in [(MAX_CAPACITY + 512, "512 TiB less 128 MiB"), (!511, "limit"), (513, "multiple of 512")] {
        let said = Writer::new(dir.output("b.vdi"), capacity, ID).err().unwrap().to_string();
        assert!(said.contains(words), "{said}");
    }
    let mut packed = unit(0);
    packed.units[0].compressed = true;
    assert!(Writer::new(dir.output("b.vdi"), 1 << 20, ID).unwrap().write_block(&packed).is_err());
    assert!(Writer::new(dir.output("b.vdi"), 1 << 20, ID).unwrap().write_block(&unit(16)).is_err());
}

/// An image in memory, to be damaged.
struct Image(Vec<u8>);

impl Image {
    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn put32(&mut self, at: usize, value: u32) {
        self.put(at, &value.to_le_bytes());
    }

    fn entry(&mut self, index: usize, place: u32) {
        self.put32(512 + index * 4, place);
    }
}

/// A name, what it does to a good image, words of the refusal.
type Alteration = (&'static str, fn(&mut Image), &'static str);

const ALTERATIONS: [Alteration; 38] = [
    ("empty file", |i| i.0.clear(), "its signature (at byte 64)"),
    ("60 bytes", |i| i.0.truncate(60), "its signature (at byte 64)"),
    ("no signature", |i| i.put32(64, 0), "is not beda107f"),
    ("100 bytes", |i| i.0.truncate(100), "the file has 100 bytes, a header has 512"),
    ("version 1.0", |i| i.put32(68, 0x0001_0000), "version 1.0; 1.1 would"),
    ("version 0.1", |i| i.put32(68, 1), "version 0.1; 1.1 would"),
    ("version 2.1", |i| i.put32(68, 0x0002_0001), "version 2.1; 1.1 would"),
    ("undo image", |i| i.put32(76, 3), "type 3 is a differencing image"),
    ("differencing image", |i| i.put32(76, 4), "type 4 is a differencing image"),
    ("type 0", |i| i.put32(76, 0), "image type 0;"),
    ("type huge", |i| i.put32(76, u32::MAX), "image type 4294967295"),
    ("link", |i| i.put32(424, 1), "its link UUID"),
    ("parent", |i| i.put(455, &[1]), "its parent UUID"),
    ("sectors of 4096", |i| i.put32(360, 4096), "sectors of 4096 bytes; 512"),
    ("blocks of 0", |i| i.put32(376, 0), "blocks of 0 bytes; 1048576"),
    ("blocks of 2 MiB", |i| i.put32(376, 2 << 20), "blocks of 2097152 bytes"),
    ("extra data", |i| i.put32(380, 512), "extra data before blocks of 512 bytes"),
    ("size over the limit", |i| i.put(368, &(MAX_CAPACITY + 1).to_le_bytes()), "a disk of 562949819203585 bytes and 5 blocks is over"),
    ("size u64::MAX", |i| i.put(368, &[255; 8]), "a disk of 18446744073709551615 bytes"),
    ("blocks over the limit", |i| i.put32(384, 536_870_785), "536870785 blocks is over QEMU's limit of 536870784"),
    ("blocks 2^32", |i| i.put32(384, u32::MAX), "4294967295 blocks is over"),
    ("size over the map", |i| i.put(368, &(1u64 << 40).to_le_bytes()), "a map of 5 blocks for a disk of 1099511627776 bytes, 1048576"),
    ("no blocks", |i| i.put32(384, 0), "a map of 0 blocks"),
    ("map on the header", |i| i.put32(340, 0), "a block map at byte 0;"),
    ("map unaligned", |i| i.put32(340, 516), "a block map at byte 516;"),
    ("header runs on the map", |i| i.put32(72, 441), "behind the header's end at 513"),
    ("header of 4 GiB", |i| i.put32(72, u32::MAX), "behind the header's end at 4294967367"),
    ("map past the end", |i| i.put32(340, u32::MAX - 511), "block map 0 at byte 4294966784: it ends at byte 4294966804"),
    ("map runs past the end", |i| i.put32(384, 9 << 20), "block map 0 at byte 512: it ends at byte 37749248"),
    ("data on the map", |i| i.put32(344, 512), "data from byte 512 on;"),
    ("data unaligned", |i| i.put32(344, (1 << 20) + 8), "data from byte 1048584 on;"),
    ("data past the end", |i| i.put32(344, u32::MAX - 511), "block 0 at byte 4294966784: it ends at byte 4296015360, past the file's end"),
    ("place past the end", |i| i.entry(1, 4), "block 1 at byte 5242880: it ends at byte 6291456"),
    ("place past the image", |i| i.entry(1, 5), "place, number 5, is not below the 5 blocks"),
    ("place huge", |i| i.entry(4, u32::MAX - 2), "block 4 at byte 4503599625273344: its place, number 4294967293"),
    ("two entries, one block", |i| i.entry(2, 1), "block 2 at byte 2097152: its place, number 1, is another block's, too"),
    ("a map of zeros", |i| i.put(512, &[0; 20]), "block 1 at byte 1048576: its place, number 0,"),
    ("cut short", |i| i.0.truncate((3 << 20) + 511), "block 4 at byte 3145728: it ends at byte 3146240, past the file's end at 3146239"),
];

#[test]
fn hostile_images_are_refused_in_words_and_at_once() {
    let dir = Dir::new("hostile");
    let path = dir.path("h.vdi");
    // 4 MiB and a sector: blocks 0, 1 and the short block 4 exist.
    let mut data = vec![0u8; (4 << 20) + 512];
    for at in [0, 1 << 20, 4 << 20] {
        data[at] = 1;
    }
    write(dir.output("h.vdi"), &data);
    let good = std::fs::read(&path).unwrap();
    assert!(read_all(&open(&path).unwrap()) == data);
    for (name, alter, words) in ALTERATIONS {
        let mut image = Image(good.clone());
        alter(&mut image);
        std::fs::write(&path, &image.0).unwrap();
        let started = Instant::now();
        let error = open(&path).err().unwrap_or_else(|| panic!("{name} was opened")).to_string();
        assert!(error.contains(words), "{name}: {error}");
        assert!(started.elapsed() < Duration::from_millis(500), "{name} took {:?}", started.elapsed());
    }
}

#[test]
fn a_sparse_file_that_claims_the_largest_map_is_refused_at_its_second_entry() {
    let dir = Dir::new("map");
    let file = dir.create("m.vdi");
    let blocks = (MAX_CAPACITY >> 20) as u32;
    file.write_all_at(&super::header::header(MAX_CAPACITY, 512, 2 << 30, blocks, 0, ID), 0).unwrap();
    file.set_len(1 << 42).unwrap();
    let started = Instant::now();
    let said = open(&dir.path("m.vdi")).unwrap_err().to_string();
    assert!(said.contains("block 1 at byte 2147483648"), "{said}");
    assert!(started.elapsed() < Duration::from_millis(500), "{:?}", started.elapsed());
}

#[test]
fn random_damage_is_an_error_or_a_readable_disk_but_never_a_panic() {
    let dir = Dir::new("fuzz");
    let path = dir.path("f.vdi");
    write(dir.output("f.vdi"), &sample((5 << 20) + 512, 7));
    let good = std::fs::read(&path).unwrap();
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    let mut next = noise(25);
    let mut opened = 0;
    for _ in 0..3000 {
        let mut front = good[..1024].to_vec();
        for _ in 0..1 + next() % 3 {
            let at = [68 + next() % 16, 340 + next() % 116, 512 + next() % 24][(next() % 3) as usize] as usize;
            front[at] = [0, 1, 255, next() as u8][(next() % 4) as usize];
        }
        file.write_all_at(&front, 0).unwrap();
        let Ok(reader) = open(&path) else { continue };
        opened += 1;
        for extent in reader.extents(0, u64::MAX).unwrap() {
            let mut buf = vec![0u8; extent.len.min(70_000) as usize];
            reader.read_at(extent.offset, &mut buf, &mut Scratch::default()).unwrap();
        }
    }
    assert!(opened > 300, "{opened} opened");
}

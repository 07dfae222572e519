//! The VHD engine against QEMU's (`vpc`): images of qemu-img are read, ours are compared by it, hostile ones are refused.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::super::disk::{Disk, DiskWriter, Encoded, Encoder as _, FormatError, Output, Run, Scratch, UNIT, Unit, Window};
use super::super::raw;
use super::header::{DYNAMIC, FOOTER};
use super::{FixedWriter, Identity, MAX_CAPACITY, Reader, Writer, looks_like};

const IDENTITY: Identity = Identity { id: *b"0123456789abcdef", created: 1_800_000_000 };

/// Bytes of disk in one pipeline block.
const BLOCK: usize = 4 << 20;

/// A folder that goes when the test ends.
struct Dir(PathBuf);

impl Dir {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("hypersdk-vhd-{name}-{}", std::process::id()));
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
    let info = run("qemu-img", &["info", "--output=json", "-f", "vpc", text(path)]);
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

fn writer(output: Output, capacity: u64, fixed: bool) -> Result<Box<dyn DiskWriter>, FormatError> {
    Ok(if fixed { Box::new(FixedWriter::new(output, capacity, IDENTITY)?) } else { Box::new(Writer::new(output, capacity, IDENTITY)?) })
}

/// Hands the disk's blocks over as the pipeline does.
fn encode(data: &[u8], number: usize, out: &mut Encoded) {
    let from = number * BLOCK;
    let block = &data[from..(from + BLOCK).min(data.len())];
    raw::Encoder.state().unwrap().encode(from as u64, block, out).unwrap();
}

/// Writes a block by the writer or, in turn, to where it says.
fn write_block(writer: &mut dyn DiskWriter, output: &Output, block: &Encoded, number: usize) {
    let mut runs = vec![Run { start: 1, len: 1, offset: 1 }];
    if number.is_multiple_of(2) {
        return writer.write_block(block).unwrap();
    }
    assert!(writer.place_block(block, &mut runs).unwrap());
    for run in runs {
        output.write_all_at(&block.bytes[run.start..run.start + run.len], run.offset).unwrap();
    }
}

fn write(output: Output, data: &[u8], fixed: bool) {
    let mut writer = writer(output.clone(), data.len() as u64, fixed).unwrap();
    let mut encoded = Encoded::default();
    for number in 0..data.len().div_ceil(BLOCK) {
        encode(data, number, &mut encoded);
        write_block(writer.as_mut(), &output, &encoded, number);
    }
    let end = writer.finish().unwrap();
    assert_eq!(end, output.file.metadata().unwrap().len());
}

#[test]
fn what_we_write_qemu_reads_as_the_same_disk_of_the_same_size_and_so_do_we() {
    let dir = Dir::new("write");
    let (raw, image) = (dir.path("a.raw"), dir.path("a.vhd"));
    let mut next = noise(11);
    for seed in 0..60 {
        let capacity = match seed {
            0..8 => [0, 512, UNIT - 512, UNIT, 2 << 20, (2 << 20) + 512, BLOCK, BLOCK - 512][seed as usize],
            _ => (next() % (40 << 11)) as usize * 512,
        };
        let data = sample(capacity, 40 + seed);
        std::fs::write(&raw, &data).unwrap();
        for fixed in [false, true].into_iter().filter(|fixed| !fixed || capacity > 0) {
            write(dir.output("a.vhd"), &data, fixed);
            assert_eq!(qemu_size(&image), capacity as u64, "seed {seed}");
            run("qemu-img", &["compare", "-f", "raw", "-F", "vpc", text(&raw), text(&image)]);
            let reader = open(&image).unwrap();
            assert_eq!((reader.capacity(), reader.subformat()), (capacity as u64, if fixed { "fixed" } else { "dynamic" }));
            assert!(read_all(&reader) == data, "seed {seed}");
            assert!(looks_like(&Window::whole(File::open(&image).unwrap()).unwrap()));
        }
    }
    run("qemu-img", &["convert", "-f", "vpc", "-O", "raw", text(&image), text(&dir.path("back.raw"))]);
    assert!(std::fs::read(&raw).unwrap() == std::fs::read(dir.path("back.raw")).unwrap());
}

#[test]
fn every_image_that_qemu_makes_reads_as_qemu_reads_it() {
    let dir = Dir::new("read");
    let (raw, image, back) = (dir.path("a.raw"), dir.path("a.vhd"), dir.path("back.raw"));
    let mut next = noise(12);
    let variants = ["subformat=dynamic", "subformat=fixed", "subformat=dynamic,force_size=on", "subformat=fixed,force_size=on"];
    for seed in 0..15 {
        std::fs::write(&raw, sample((1 + next() % (40 << 11)) as usize * 512, 400 + seed)).unwrap();
        for variant in variants {
            run("qemu-img", &["convert", "-f", "raw", "-O", "vpc", "-o", variant, text(&raw), text(&image)]);
            if seed % 3 == 0 {
                let at = next() % 8 * 65_536;
                let commands = [format!("write -P 5 {at} 512"), format!("write -z {} 512", at / 2)];
                run("qemu-io", &["-f", "vpc", "-c", &commands[0], "-c", &commands[1], text(&image)]);
            }
            run("qemu-img", &["convert", "-f", "vpc", "-O", "raw", text(&image), text(&back)]);
            let reader = open(&image).unwrap_or_else(|e| panic!("{variant}: {e}"));
            let theirs = std::fs::read(&back).unwrap();
            assert_eq!(reader.capacity(), theirs.len() as u64, "{variant}");
            assert!(read_all(&reader) == theirs, "{variant}, seed {seed}");
        }
    }
    for variant in ["subformat=dynamic", "subformat=dynamic,force_size=on"] {
        for size in ["0", "1", "511k", "128G", "130G", "1T", "2040G"] {
            run("qemu-img", &["create", "-f", "vpc", "-o", variant, text(&image), size]);
            let reader = open(&image).unwrap_or_else(|e| panic!("{variant} {size}: {e}"));
            assert_eq!(reader.capacity(), qemu_size(&image), "{variant} {size}");
            assert!(reader.extents(0, u64::MAX).unwrap().is_empty());
        }
    }
}

#[test]
fn the_size_follows_the_creator_and_the_geometry_as_it_does_in_qemu() {
    let dir = Dir::new("size");
    let path = dir.path("a.vhd");
    write(dir.output("a.vhd"), &vec![3u8; 10_000_384], true);
    let good = Image(std::fs::read(&path).unwrap());
    let creators = [b"vpc ", b"vs  ", b"vbox", b"qemu", b"qem2", b"win ", b"d2v ", b"tap\0", b"CTXS", b"tapx", b"\0\0\0\0"];
    for creator in creators {
        for geometry in [[0, 100, 4, 17], [255, 255, 16, 255], [0, 10, 16, 63]] {
            let mut image = Image(good.0.clone());
            image.footer(28, creator);
            image.footer(56, &geometry);
            std::fs::write(&path, &image.0).unwrap();
            assert_eq!(open(&path).unwrap().capacity(), qemu_size(&path), "{creator:?} {geometry:?}");
        }
    }
    // A footer without its last byte, as Virtual PC made it before 2004.
    std::fs::write(&path, &good.0[..good.0.len() - 1]).unwrap();
    assert_eq!((open(&path).unwrap().capacity(), qemu_size(&path)), (10_000_384, 10_000_384));
    assert!(looks_like(&Window::whole(File::open(&path).unwrap()).unwrap()));
}

#[test]
fn a_resumed_writer_goes_on_exactly_where_the_first_one_stood() {
    let dir = Dir::new("resume");
    let mut next = noise(13);
    for seed in 0..3 {
        let data = sample((40 << 20) + (next() % 9000) as usize * 512, 900 + seed);
        let capacity = data.len() as u64;
        for fixed in [false, true] {
            write(dir.output("whole"), &data, fixed);
            let whole = std::fs::read(dir.path("whole")).unwrap();
            let blocks = data.len().div_ceil(BLOCK);
            for stop in 0..blocks {
                let output = dir.output("part");
                let mut writer = writer(output.clone(), capacity, fixed).unwrap();
                let (mut pieces, mut encoded) = (Vec::new(), Encoded::default());
                for number in 0..blocks {
                    if number == stop {
                        // What came behind the checkpoint is lost but for some bytes, which the survey cuts off.
                        let position = writer.position();
                        encode(&vec![9u8; data.len()], number, &mut encoded);
                        writer.write_block(&encoded).unwrap();
                        output.file.set_len(position).unwrap();
                        let told = pieces.drain(..).map(Ok);
                        writer = if fixed {
                            Box::new(FixedWriter::resume(output.clone(), capacity, IDENTITY, told, position).unwrap())
                        } else {
                            Box::new(Writer::resume(output.clone(), capacity, IDENTITY, told, position).unwrap())
                        };
                        assert_eq!(writer.position(), position);
                    }
                    encode(&data, number, &mut encoded);
                    // The other way round than `write`.
                    write_block(writer.as_mut(), &output, &encoded, number + 1);
                    pieces.push(writer.checkpoint().unwrap());
                    assert!(fixed || output.file.metadata().unwrap().len() == writer.position());
                }
                let end = writer.finish().unwrap();
                assert!(end == whole.len() as u64 && std::fs::read(dir.path("part")).unwrap() == whole, "{fixed} after block {stop}");
                assert!(pieces.iter().all(|piece| piece.len() <= 6), "{pieces:?}");
            }
        }
    }
    let resume = |pieces: Vec<Vec<u8>>, position| {
        Writer::resume(dir.output("x"), 8 << 20, IDENTITY, pieces.into_iter().map(Ok), position).unwrap_err().to_string()
    };
    for (pieces, words) in [
        (vec![vec![0, 1]], "end at 2105344 instead"),
        (vec![vec![3, 2]], "past the capacity"),
        (vec![vec![0]], "ends inside a number"),
        (vec![vec![0x80; 9]], "more than 35 bits"),
        (vec![vec![0, 4], vec![0, 1]], "past the capacity"),
    ] {
        let said = resume(pieces, 4096);
        assert!(said.contains(words), "{said}");
    }
    assert!(FixedWriter::resume(dir.output("x"), 512, IDENTITY, [Ok(vec![1])], 0).is_err());
    assert!(FixedWriter::resume(dir.output("x"), 512, IDENTITY, [], 1024).is_err());
}

#[test]
fn the_largest_disk_is_written_at_once_and_a_larger_one_is_refused_with_the_limit() {
    let dir = Dir::new("large");
    let started = Instant::now();
    let mut image = Writer::new(dir.output("a.vhd"), MAX_CAPACITY, IDENTITY).unwrap();
    // The disk's last block, too.
    let last = MAX_CAPACITY / UNIT as u64 - 1;
    let unit =
        |index| Encoded { units: vec![Unit { index, start: 0, len: UNIT, compressed: false }], bytes: vec![6; UNIT], ..Encoded::default() };
    image.write_block(&unit(last)).unwrap();
    assert!(image.write_block(&unit(last)).unwrap_err().to_string().contains("in order"));
    image.finish().unwrap();
    let reader = open(&dir.path("a.vhd")).unwrap();
    let extents = reader.extents(0, u64::MAX).unwrap();
    assert_eq!(extents.iter().map(|e| (e.offset, e.len)).collect::<Vec<_>>(), [(last * UNIT as u64, UNIT as u64)]);
    assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
    assert_eq!(qemu_size(&dir.path("a.vhd")), MAX_CAPACITY);
    run("qemu-io", &["-f", "vpc", "-r", "-c", &format!("read -P 6 {} 64k", MAX_CAPACITY - UNIT as u64), text(&dir.path("a.vhd"))]);
    for fixed in [false, true] {
        for (capacity, words) in [(MAX_CAPACITY + 512, "2040 GiB"), (4 << 40, "2040 GiB"), (513, "multiple of 512")] {
            let said = writer(dir.output("b.vhd"), capacity, fixed).err().unwrap().to_string();
            assert!(said.contains(words), "{said}");
        }
    }
    assert!(writer(dir.output("b.vhd"), 0, true).err().unwrap().to_string().contains("choose dynamic"));
    let mut packed = unit(0);
    packed.units[0].compressed = true;
    assert!(Writer::new(dir.output("b.vhd"), 1 << 20, IDENTITY).unwrap().write_block(&packed).is_err());
    assert!(Writer::new(dir.output("b.vhd"), 1 << 20, IDENTITY).unwrap().write_block(&unit(16)).is_err());
}

/// An image in memory, to be damaged.
struct Image(Vec<u8>);

impl Image {
    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn sum(&mut self, at: usize, len: usize, place: usize) {
        self.put(at + place, &[0; 4]);
        let sum = !self.0[at..at + len].iter().map(|b| u32::from(*b)).sum::<u32>();
        self.put(at + place, &sum.to_be_bytes());
    }

    /// Changes the footer and, in a dynamic image, its copy; the checksums stay right.
    fn footer(&mut self, at: usize, bytes: &[u8]) {
        let end = self.0.len() - FOOTER;
        for place in if self.0.starts_with(b"conectix") { vec![0, end] } else { vec![end] } {
            self.put(place + at, bytes);
            self.sum(place, FOOTER, 64);
        }
    }

    /// Changes the dynamic header; its checksum stays right.
    fn header(&mut self, at: usize, bytes: &[u8]) {
        self.put(512 + at, bytes);
        self.sum(512, DYNAMIC, 36);
    }

    fn entry(&mut self, index: usize, sector: u32) {
        self.put(1536 + index * 4, &sector.to_be_bytes());
    }

    fn sector(&self, index: usize) -> u32 {
        super::header::be32(&self.0, 1536 + index * 4)
    }
}

/// A name, what it does to a good image, words of the refusal.
type Alteration = (&'static str, fn(&mut Image), &'static str);

const ALTERATIONS: [Alteration; 45] = [
    ("empty file", |i| i.0.clear(), "no footer"),
    ("100 bytes", |i| i.0.truncate(100), "of 100 bytes does not end in one"),
    ("cut at a sector", |i| i.0.truncate(1 << 20), "it was cut short"),
    ("cut inside a sector", |i| i.0.truncate(70_000), "of 70000 bytes does not end"),
    ("a byte too long", |i| i.0.push(0), "does not end in one"),
    ("neither footer", |i| [0, i.0.len() - FOOTER].map(|at| i.put(at, b"CONECTIX")).into_iter().collect(), "no footer (conectix)"),
    ("footer gone", |i| i.put(i.0.len() - FOOTER, b"CONECTIX"), "begins with its copy"),
    ("footer checksum", |i| i.put(i.0.len() - FOOTER + 64, &[1]), "its checksum is 01"),
    ("footer version 2", |i| i.footer(12, &[0, 2, 0, 1]), "file format version 2.1"),
    ("differencing", |i| i.footer(60, &4u32.to_be_bytes()), "differencing disk (type 4)"),
    ("type 0", |i| i.footer(60, &0u32.to_be_bytes()), "disk type 0"),
    ("type 6", |i| i.footer(60, &6u32.to_be_bytes()), "disk type 6"),
    ("type huge", |i| i.footer(60, &u32::MAX.to_be_bytes()), "disk type 4294967295"),
    ("copy differs", |i| i.put(70, &[99]), "from byte 70 on"),
    ("copy gone", |i| i.put(0, &[0; 512]), "a dynamic image begins with conectix"),
    ("fixed with a footer in front", |i| i.footer(60, &2u32.to_be_bytes()), "the footer says fixed"),
    ("size over the limit", |i| i.footer(48, &(2041u64 << 30).to_be_bytes()), "2191507062784 bytes is over the format's limit of 2040 GiB"),
    ("size u64::MAX", |i| i.footer(48, &[255; 8]), "18446744073709551615 bytes is over"),
    ("no geometry", |i| i.footer(28, b"vpc "), "its geometry is empty"),
    ("size over the table", |i| i.footer(48, &(1u64 << 40).to_be_bytes()), "a table of 4 entries for a disk of 524288 blocks"),
    ("header at u64::MAX", |i| i.footer(16, &[255; 8]), "dynamic header 0 at byte 18446744073709551615"),
    ("header on the copy", |i| i.footer(16, &[0; 8]), "dynamic header 0 at byte 0: its 1024 bytes"),
    ("header unaligned", |i| i.footer(16, &513u64.to_be_bytes()), "at byte 513: its 1024 bytes are no whole sectors"),
    ("header runs on the footer", |i| i.footer(16, &(i.0.len() as u64 - 1024).to_be_bytes()), "and the footer at"),
    ("header elsewhere", |i| i.footer(16, &4096u64.to_be_bytes()), "does not start with cxsparse"),
    ("header checksum", |i| i.put(512 + 700, &[1]), "dynamic header 0 at byte 512: its checksum is"),
    ("header version", |i| i.header(24, &[0, 3]), "dynamic header version 3.0"),
    ("block size 0", |i| i.header(32, &[0; 4]), "a block size of 0"),
    ("block size 256", |i| i.header(32, &256u32.to_be_bytes()), "a block size of 256"),
    ("block size 3 MiB", |i| i.header(32, &(3u32 << 20).to_be_bytes()), "a block size of 3145728"),
    ("block size 512", |i| i.header(32, &512u32.to_be_bytes()), "4 entries for a disk of 14337 blocks"),
    ("block size 2 GiB", |i| i.header(32, &(1u32 << 31).to_be_bytes()), "past the footer"),
    ("table of 2^32 entries", |i| i.header(28, &[255; 4]), "its 17179869180 bytes"),
    ("table of 0 entries", |i| i.header(28, &[0; 4]), "a table of 0 entries"),
    ("table at u64::MAX", |i| i.header(16, &[255; 8]), "block allocation table 0 at byte 18446744073709551615"),
    ("table on the copy", |i| i.header(16, &[0; 8]), "block allocation table 0 at byte 0"),
    ("table unaligned", |i| i.header(16, &1540u64.to_be_bytes()), "block allocation table 0 at byte 1540"),
    ("table on the header", |i| i.header(16, &1024u64.to_be_bytes()), "it shares bytes with the dynamic header at 512"),
    ("block on the copy", |i| i.entry(0, 0), "block 0 at byte 0: it shares bytes with the footer's copy"),
    ("block on the header", |i| i.entry(0, 2), "it shares bytes with the dynamic header at byte 512"),
    ("block on the table", |i| i.entry(3, 3), "block 3 at byte 1536: it shares bytes with the block allocation table"),
    ("block past the end", |i| i.entry(1, u32::MAX - 1), "block 1 at byte 2199023254528: it ends at byte"),
    ("block on the footer", |i| i.entry(1, i.sector(1) + (4 << 11)), "past the footer at"),
    ("two entries, one block", |i| i.entry(2, i.sector(1)), "block 2 at byte 2108928: it shares bytes with block 1"),
    ("blocks overlap", |i| i.entry(2, i.sector(1) + 9), "it shares bytes with block 1, which ends at"),
];

#[test]
fn hostile_images_are_refused_in_words_and_at_once() {
    let dir = Dir::new("hostile");
    let path = dir.path("h.vhd");
    // 7 MiB and a sector: blocks 0, 1 and the short block 3 exist.
    let mut data = vec![0u8; (7 << 20) + 512];
    for at in [0, 2 << 20, 7 << 20] {
        data[at] = 1;
    }
    write(dir.output("h.vhd"), &data, false);
    let mut good = Image(std::fs::read(&path).unwrap());
    good.footer(56, &[0; 4]);
    std::fs::write(&path, &good.0).unwrap();
    assert!(read_all(&open(&path).unwrap()) == data);
    for (name, alter, words) in ALTERATIONS {
        let mut image = Image(good.0.clone());
        alter(&mut image);
        std::fs::write(&path, &image.0).unwrap();
        let started = Instant::now();
        let error = open(&path).err().unwrap_or_else(|| panic!("{name} was opened")).to_string();
        assert!(error.contains(words), "{name}: {error}");
        assert!(started.elapsed() < Duration::from_millis(500), "{name} took {:?}", started.elapsed());
    }
    write(dir.output("f.vhd"), &data, true);
    let mut fixed = Image(std::fs::read(dir.path("f.vhd")).unwrap());
    fixed.footer(48, &(data.len() as u64 + 512).to_be_bytes());
    std::fs::write(&path, &fixed.0).unwrap();
    assert!(open(&path).unwrap_err().to_string().contains("but only 7340544 lie before it"));
}

#[test]
fn a_sparse_file_that_claims_a_table_of_gigabytes_is_refused_before_it_is_read() {
    let dir = Dir::new("table");
    write(dir.output("t.vhd"), &vec![1u8; 2 << 20], false);
    let mut image = Image(std::fs::read(dir.path("t.vhd")).unwrap());
    image.footer(48, &MAX_CAPACITY.to_be_bytes());
    image.header(32, &4096u32.to_be_bytes());
    image.header(28, &(1u32 << 30).to_be_bytes());
    let file = dir.create("t.vhd");
    file.write_all_at(&image.0[..2048], 0).unwrap();
    file.write_all_at(&image.0[image.0.len() - FOOTER..], 8 << 30).unwrap();
    let started = Instant::now();
    let said = open(&dir.path("t.vhd")).unwrap_err().to_string();
    assert!(said.contains("at most 16777216 are read"), "{said}");
    // Small blocks that fit the limit, all in one hole: the second entry of zero is one too many.
    image.header(32, &(512u32 << 10).to_be_bytes());
    file.write_all_at(&image.0[..2048], 0).unwrap();
    let said = open(&dir.path("t.vhd")).unwrap_err().to_string();
    assert!(said.contains("shares bytes with"), "{said}");
    assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
}

#[test]
fn random_damage_is_an_error_or_a_readable_disk_but_never_a_panic() {
    let dir = Dir::new("fuzz");
    let path = dir.path("f.vhd");
    write(dir.output("f.vhd"), &sample((5 << 20) + 512, 7), false);
    let good = std::fs::read(&path).unwrap();
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    let mut next = noise(25);
    let mut opened = 0;
    for _ in 0..3000 {
        let mut image = Image(good.clone());
        for _ in 0..1 + next() % 3 {
            let value = [0, 1, 255, next() as u8][(next() % 4) as usize];
            match next() % 3 {
                0 => image.footer(8 + next() as usize % 60, &[value]),
                1 => image.header(16 + next() as usize % 20, &[value]),
                _ => image.put(1536 + next() as usize % 12, &[value]),
            }
        }
        file.write_all_at(&image.0[..4096], 0).unwrap();
        file.write_all_at(&image.0[good.len() - FOOTER..], (good.len() - FOOTER) as u64).unwrap();
        let Ok(reader) = open(&path) else { continue };
        opened += 1;
        for extent in reader.extents(0, u64::MAX).unwrap() {
            let mut buf = vec![0u8; extent.len.min(70_000) as usize];
            reader.read_at(extent.offset, &mut buf, &mut Scratch::default()).unwrap();
        }
    }
    assert!(opened > 300, "{opened} opened");
}

//! Round trips: ours to QEMU, QEMU's to us, and a writer that is stopped.

use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::{Duration, Instant};

use super::super::MAX_CAPACITY;
use super::*;

#[test]
fn what_we_write_qemu_finds_in_order_and_equal_and_so_do_we() {
    let dir = Dir::new("write");
    let mut next = noise(7);
    let edges = [512, 65_536 - 512, 65_536, (4 << 20) - 512, 4 << 20, (4 << 20) + 512, 17 << 20];
    let random = (0..60).map(|i| (next() % ((1 << (10 + i % 16)) / 512 + 1) + 1) * 512);
    for (i, capacity) in edges.into_iter().chain(random).enumerate() {
        let (raw, image) = (dir.path("a.raw"), dir.path("a.vhdx"));
        let data = sample(capacity as usize, if i % 2 == 0 { 700 << 10 } else { 6 << 20 }, i as u64);
        std::fs::write(&raw, &data).unwrap();
        let end = write(dir.create("a.vhdx"), &data);
        assert_eq!(end, std::fs::metadata(&image).unwrap().len());
        let check = qemu_img(&["check", "-f", "vhdx", text(&image)]);
        assert!(check.contains("No errors were found"), "{capacity}: {check}");
        qemu_img(&["compare", "-f", "raw", "-F", "vhdx", text(&raw), text(&image)]);
        let reader = open(&image).unwrap();
        assert_eq!((reader.capacity(), reader.subformat(), reader.block_size()), (capacity, "dynamic", BLOCK));
        assert!(read_all(&reader) == data, "{capacity} reads differently");
    }
}

/// Blocks on both sides of where sector bitmap entries stand: every 4 GiB of disk.
const FAR: [u64; 8] = [0, 1, 1023, 1024, 1025, 2047, 2048, 2500];

#[test]
fn large_disks_keep_their_blocks_across_the_sector_bitmap_entries() {
    let dir = Dir::new("large");
    let capacity = 2501 * BLOCK - 512;
    let (raw, image, theirs) = (dir.path("l.raw"), dir.path("l.vhdx"), dir.path("t.vhdx"));
    let file = dir.create("l.raw");
    file.set_len(capacity).unwrap();
    let mut writer = Writer::new(Output { file: Arc::new(dir.create("l.vhdx")), base: 0 }, capacity, ID).unwrap();
    let blocks: Vec<(u64, Vec<u8>)> =
        FAR.into_iter().map(|block| (block * BLOCK, sample(BLOCK.min(capacity - block * BLOCK) as usize, 900 << 10, block + 1))).collect();
    for (offset, data) in &blocks {
        file.write_all_at(data, *offset).unwrap();
        writer.write_block(&encode(*offset, data)).unwrap();
    }
    writer.finish().unwrap();
    assert!(qemu_img(&["check", "-f", "vhdx", text(&image)]).contains("No errors were found"));
    qemu_img(&["compare", "-f", "raw", "-F", "vhdx", text(&raw), text(&image)]);
    let options = ["block_size=1M", "block_size=256M", "block_size=8M,block_state_zero=off"];
    for variant in ["ours"].into_iter().chain(options) {
        if variant != "ours" {
            let _ = std::fs::remove_file(&theirs);
            qemu_img(&["convert", "-f", "raw", "-O", "vhdx", "-S", "4k", "-o", variant, text(&raw), text(&theirs)]);
        }
        let reader = open(if variant == "ours" { &image } else { &theirs }).unwrap_or_else(|e| panic!("{variant}: {e}"));
        assert_eq!(reader.capacity(), capacity);
        let mut covered = 0;
        for extent in reader.extents(0, u64::MAX).unwrap() {
            covered += extent.len;
            let mut buf = vec![7; extent.len as usize];
            reader.read_at(extent.offset, &mut buf, &mut Scratch::default()).unwrap();
            let mut expected = vec![9; buf.len()];
            file.read_exact_at(&mut expected, extent.offset).unwrap();
            assert!(buf == expected, "{variant}: {extent:?}");
        }
        let held: u64 = blocks.iter().map(|(_, data)| data.chunks(512).filter(|c| !raw_zero(c)).count() as u64 * 512).sum();
        assert!(covered >= held, "{variant}: {covered} of {held}");
        for (offset, data) in &blocks {
            let mut buf = vec![7; data.len()];
            reader.read_at(*offset, &mut buf, &mut Scratch::default()).unwrap();
            assert!(buf == *data, "{variant}: block at {offset}");
        }
    }
}

fn raw_zero(bytes: &[u8]) -> bool {
    super::super::super::disk::is_zero(bytes)
}

#[test]
fn every_kind_of_image_that_qemu_makes_reads_as_qemu_reads_it() {
    let dir = Dir::new("read");
    let (raw, image, back) = (dir.path("d.raw"), dir.path("d.vhdx"), dir.path("b.raw"));
    let mut variants = Vec::new();
    for block in ["1M", "2M", "8M", "32M", "256M"] {
        for more in ["subformat=dynamic", "subformat=fixed", "log_size=4M", "log_size=65M", "block_state_zero=off"] {
            // QEMU writes the zeros of a fixed image out.
            if block.len() < 3 || !more.contains("fixed") {
                variants.push(format!("block_size={block},{more}"));
            }
        }
    }
    for (i, variant) in variants.iter().enumerate() {
        let capacity = [(9 << 20) + 512 * 3, 33 << 20, (1 << 20) - 512, 21 << 20][i % 4];
        let data = sample(capacity, 2 << 20, 300 + i as u64);
        std::fs::write(&raw, &data).unwrap();
        let _ = std::fs::remove_file(&image);
        qemu_img(&["convert", "-f", "raw", "-O", "vhdx", "-S", "4k", "-o", variant, text(&raw), text(&image)]);
        qemu_img(&["convert", "-f", "vhdx", "-O", "raw", text(&image), text(&back)]);
        let reader = open(&image).unwrap_or_else(|e| panic!("{variant}: {e}"));
        assert_eq!(reader.subformat(), if variant.contains("fixed") { "fixed" } else { "dynamic" });
        let ours = read_all(&reader);
        assert!(ours == std::fs::read(&back).unwrap(), "{variant} reads differently from qemu");
        assert!(ours == data, "{variant} reads differently");
    }
}

#[test]
fn an_image_that_qemu_wrote_to_bit_by_bit_reads_as_qemu_reads_it() {
    let dir = Dir::new("io");
    let (image, back) = (dir.path("i.vhdx"), dir.path("i.raw"));
    let mut next = noise(99);
    for seed in 0..12 {
        let _ = std::fs::remove_file(&image);
        let options = ["block_size=1M", "block_size=2M", "block_size=1M,subformat=fixed"][seed % 3];
        qemu_img(&["create", "-f", "vhdx", "-o", options, text(&image), "40M"]);
        let mut args = ["-t", "unsafe", "-f", "vhdx"].map(str::to_owned).to_vec();
        for _ in 0..20 {
            let len = (next() % 600 + 1) * 512;
            let at = next() % ((40 << 20) - len) / 512 * 512;
            let what = ["write -P 7", "write -P 201", "write -z", "discard"][(next() % 4) as usize];
            args.extend(["-c".to_owned(), format!("{what} {at} {len}")]);
        }
        args.push(text(&image).to_owned());
        // A refused `write -z` or `discard` is no matter: what counts is what QEMU reads afterwards.
        let _ = Command::new("qemu-io").args(&args).output().unwrap();
        qemu_img(&["convert", "-f", "vhdx", "-O", "raw", text(&image), text(&back)]);
        assert!(read_all(&open(&image).unwrap()) == std::fs::read(&back).unwrap(), "seed {seed}");
    }
}

#[test]
fn an_image_whose_last_block_ends_with_the_disk_is_read() {
    let dir = Dir::new("tail");
    let image = dir.path("t.vhdx");
    let data = sample((4 << 20) + (1 << 20) + 512, 300 << 10, 5);
    let mut whole = data.clone();
    whole[data.len() - 1] = 1;
    let end = write(dir.create("t.vhdx"), &whole);
    let cut = end - BLOCK + (1 << 20) + 512;
    OpenOptions::new().write(true).open(&image).unwrap().set_len(cut).unwrap();
    assert!(read_all(&open(&image).unwrap()) == whole);
    OpenOptions::new().write(true).open(&image).unwrap().set_len(cut - 1).unwrap();
    let error = open(&image).unwrap_err().to_string();
    assert!(error.contains("payload block 1") && error.contains("past the file's end"), "{error}");
    let damaged = Reader::open_damaged(Window::whole(File::open(&image).unwrap()).unwrap()).unwrap();
    let mut first = vec![0; BLOCK as usize];
    damaged.read_at(0, &mut first, &mut Scratch::default()).unwrap();
    assert!(first == whole[..BLOCK as usize]);
    let error = damaged.read_at(BLOCK, &mut first[..512], &mut Scratch::default()).unwrap_err().to_string();
    assert!(error.contains("payload block 1"), "{error}");
    assert_eq!(damaged.extents(BLOCK, u64::MAX).unwrap().len(), 1);
}

#[test]
fn a_resumed_writer_goes_on_exactly_where_the_first_one_stood() {
    let dir = Dir::new("resume");
    let mut data = sample(38 << 20, 3 << 20, 3);
    data[8 << 20..16 << 20].fill(0);
    let capacity = data.len() as u64;
    let blocks = data.len().div_ceil(BLOCK as usize);
    write(dir.create("whole"), &data);
    let whole = std::fs::read(dir.path("whole")).unwrap();
    for stop in 0..=blocks {
        let output = Output { file: Arc::new(dir.create("part")), base: 0 };
        let mut writer = Writer::new(output.clone(), capacity, ID).unwrap();
        let mut pieces = Vec::new();
        for (i, block) in data.chunks(BLOCK as usize).enumerate() {
            if i == stop {
                writer = resumed(&output, capacity, &pieces, writer.position());
            }
            writer.write_block(&encode(i as u64 * BLOCK, block)).unwrap();
            // Checkpoints of one block, of several, and of none.
            if i % 3 != 1 || i + 1 == stop {
                pieces.push(writer.checkpoint().unwrap());
            }
        }
        if stop == blocks {
            // The first process had even finished: what it left in front of the blocks is written again.
            pieces.push(writer.checkpoint().unwrap());
            let position = writer.position();
            writer.finish().unwrap();
            writer = resumed(&output, capacity, &pieces, position);
        }
        let end = writer.finish().unwrap();
        assert!(end == whole.len() as u64 && std::fs::read(dir.path("part")).unwrap() == whole, "after block {stop}");
    }
    let output = Output { file: Arc::new(dir.create("part")), base: 0 };
    let resume = |piece: &[u8], position| Writer::resume(output.clone(), capacity, ID, [Ok(piece.to_vec())], position);
    let first = Writer::new(output.clone(), capacity, ID).unwrap().position();
    assert!(resume(&[], first).is_ok() && resume(&[0, 2], first + 2 * BLOCK).is_ok());
    for (piece, words) in [(&[0, 2][..], "end at"), (&[0], "sequence"), (&[9, 2], "sequence"), (&[0x80; 12], "sequence")] {
        let error = resume(piece, first).unwrap_err().to_string();
        assert!(error.contains(words), "{piece:?}: {error}");
    }
}

fn resumed(output: &Output, capacity: u64, pieces: &[Vec<u8>], position: u64) -> Writer {
    output.file.set_len(position).unwrap();
    Writer::resume(output.clone(), capacity, ID, pieces.iter().cloned().map(Ok), position).unwrap()
}

#[test]
fn blocks_that_are_placed_and_written_later_give_the_same_image() {
    let dir = Dir::new("place");
    let data = sample(22 << 20, 500 << 10, 31);
    let end = write(dir.create("whole"), &data);
    let output = Output { file: Arc::new(dir.create("placed")), base: 0 };
    let mut writer = Writer::new(output.clone(), data.len() as u64, ID).unwrap();
    let mut later = Vec::new();
    for (i, block) in data.chunks(BLOCK as usize).enumerate() {
        let (block, mut runs) = (encode(i as u64 * BLOCK, block), Vec::new());
        assert!(writer.place_block(&block, &mut runs).unwrap());
        later.push((block, runs));
    }
    for (block, runs) in later.iter().rev() {
        for run in runs {
            output.write_all_at(&block.bytes[run.start..run.start + run.len], run.offset).unwrap();
        }
    }
    assert_eq!(writer.finish().unwrap(), end);
    assert!(std::fs::read(dir.path("placed")).unwrap() == std::fs::read(dir.path("whole")).unwrap());
}

#[test]
fn a_finish_that_comes_second_wipes_the_blocks_of_the_first() {
    let dir = Dir::new("again");
    let data = sample(12 << 20, 100 << 10, 11);
    let output = Output { file: Arc::new(dir.create("a.vhdx")), base: 0 };
    let mut writer = Writer::new(output.clone(), 12 << 20, ID).unwrap();
    let start = writer.position();
    writer.write_block(&encode(0, &data[..4 << 20])).unwrap();
    writer.finish().unwrap();
    output.file.set_len(start).unwrap();
    let mut writer = Writer::resume(output, 12 << 20, ID, [], start).unwrap();
    writer.finish().unwrap();
    assert!(open(&dir.path("a.vhdx")).unwrap().extents(0, u64::MAX).unwrap().is_empty());
}

#[test]
fn a_disk_inside_a_larger_file_lies_from_its_base_on() {
    let dir = Dir::new("base");
    let data = sample(6 << 20, 300 << 10, 21);
    let file = dir.create("b");
    let base = 12_800;
    let mut writer = Writer::new(Output { file: Arc::new(file), base }, data.len() as u64, ID).unwrap();
    writer.write_block(&encode(0, &data[..4 << 20])).unwrap();
    writer.write_block(&encode(4 << 20, &data[4 << 20..])).unwrap();
    let len = writer.finish().unwrap();
    let window = Window::whole(File::open(dir.path("b")).unwrap()).unwrap().part(base, len).unwrap();
    assert!(super::super::looks_like(&window));
    assert!(read_all(&Reader::open(window).unwrap()) == data);
}

#[test]
fn an_empty_disk_of_four_tebibytes_and_disks_at_the_limits() {
    let dir = Dir::new("limits");
    let started = Instant::now();
    let file = dir.create("e.vhdx");
    let mut writer = Writer::new(Output { file: Arc::new(file.try_clone().unwrap()), base: 0 }, 4 << 40, ID).unwrap();
    writer.finish().unwrap();
    assert!(open(&dir.path("e.vhdx")).unwrap().extents(0, u64::MAX).unwrap().is_empty());
    let taken = started.elapsed();
    assert!(taken < Duration::from_secs(1), "{taken:?}");
    assert!(file.metadata().unwrap().blocks() * 512 < 1 << 20, "the empty BAT is not a hole");
    assert!(qemu_img(&["check", "-f", "vhdx", text(&dir.path("e.vhdx"))]).contains("No errors"));
    // The largest, with a block at its very end.
    let mut writer = Writer::new(Output { file: Arc::new(dir.create("m.vhdx")), base: 0 }, MAX_CAPACITY, ID).unwrap();
    let last = sample(BLOCK as usize, 100 << 10, 4);
    writer.write_block(&encode(MAX_CAPACITY - BLOCK, &last)).unwrap();
    writer.finish().unwrap();
    assert!(qemu_img(&["info", "-f", "vhdx", text(&dir.path("m.vhdx"))]).contains("64 TiB"));
    let reader = open(&dir.path("m.vhdx")).unwrap();
    assert!(reader.extents(0, u64::MAX).unwrap().iter().all(|extent| extent.offset >= MAX_CAPACITY - BLOCK));
    let mut back = vec![0; last.len()];
    reader.read_at(MAX_CAPACITY - BLOCK, &mut back, &mut Scratch::default()).unwrap();
    assert!(back == last);
    println!("an empty disk of 4 TiB: {taken:?}");
    for (capacity, words) in [(MAX_CAPACITY + 512, "64 TiB"), (0, "at least one"), (513, "whole sectors"), (u64::MAX, "64 TiB")] {
        let error = Writer::new(Output { file: Arc::new(dir.create("x")), base: 0 }, capacity, ID).unwrap_err().to_string();
        assert!(error.contains(words), "{capacity}: {error}");
    }
}

#[test]
fn a_writer_refuses_what_breaks_its_contract() {
    let dir = Dir::new("misuse");
    let mut writer = Writer::new(Output { file: Arc::new(dir.create("m")), base: 0 }, 8 << 20, ID).unwrap();
    let ones = vec![1; BLOCK as usize];
    let past = encode(8 << 20, &ones[..65_536]);
    assert!(writer.write_block(&past).unwrap_err().to_string().contains("inside the capacity"));
    let mut packed = encode(0, &ones[..65_536]);
    packed.units[0].compressed = true;
    assert!(writer.write_block(&packed).unwrap_err().to_string().contains("compressed"));
    let mut short = encode(0, &ones[..65_536]);
    short.bytes.truncate(100);
    assert!(writer.write_block(&short).unwrap_err().to_string().contains("outside"));
    writer.write_block(&encode(BLOCK, &ones)).unwrap();
    assert!(writer.write_block(&encode(0, &ones)).unwrap_err().to_string().contains("in order"));
}

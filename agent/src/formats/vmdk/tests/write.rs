//! What we write, qemu-img reads, and a resumed writer gives the same bytes.

use std::time::{Duration, Instant};

use super::*;

fn check(capacity: u64, runs: u64, seed: u64, level: i32) {
    let dir = Dir::new();
    patterned(&dir.path("a.raw"), capacity, runs, seed);
    let raw = dir.window("a.raw");
    let len = stream(&raw, &dir.path("a.vmdk"), level);
    assert_eq!(len, dir.window("a.vmdk").len());
    assert!(len <= worst_case(capacity.div_ceil(UNIT as u64), capacity));
    qemu_ok(&["compare", "-f", "raw", "-F", "vmdk", text(&dir.path("a.raw")), text(&dir.path("a.vmdk"))]);
    let disk = open_single(dir.window("a.vmdk")).unwrap();
    assert_eq!((disk.subformat(), disk.kind()), ("streamOptimized", Kind::StreamOptimized));
    assert_equal(&disk, &raw);
}

#[test]
fn qemu_img_reads_the_stream_as_we_do() {
    check((70 << 20) + 7 * 512, 24, 11, 6);
    check(512, 1, 12, 1);
    check(32 << 20, 3, 13, 0);
    check((3 << 30) + 512, 50, 14, 1);
    for seed in 1..=20 {
        let mut numbers = Numbers(seed * 104_729);
        check(512 * (100 + numbers.below(200_000)), 1 + numbers.below(20), seed, numbers.below(13) as i32);
    }
}

#[test]
fn a_writer_resumed_at_any_checkpoint_gives_the_same_bytes() {
    let dir = Dir::new();
    let capacity = (150 << 20) + 512;
    patterned(&dir.path("a.raw"), capacity, 120, 99);
    let raw = dir.window("a.raw");
    stream(&raw, &dir.path("whole.vmdk"), 1);
    let whole = std::fs::read(dir.path("whole.vmdk")).unwrap();
    let mut blocks = Vec::new();
    encode(&raw, 1, |block| blocks.push((block.units.clone(), block.bytes.clone())));
    let mut hits = 0;
    for stop in 0..=blocks.len() {
        let path = dir.path("part.vmdk");
        let base = 512;
        let mut writer = StreamWriter::create(output(&path, base), capacity, 0x1234_5678).unwrap();
        let mut pieces = Vec::new();
        for (k, (units, bytes)) in blocks[..stop].iter().enumerate() {
            writer.write_block(&Encoded { units: units.clone(), bytes: bytes.clone(), ..Encoded::default() }).unwrap();
            if (k + stop) % 3 != 0 || k + 1 == stop {
                pieces.push(writer.checkpoint().unwrap());
            }
        }
        if stop == 0 {
            pieces.push(writer.checkpoint().unwrap());
        }
        let position = writer.position();
        // What a crash leaves: bytes past the checkpoint that mean nothing.
        for (units, bytes) in blocks[stop..].iter().take(2) {
            writer.write_block(&Encoded { units: units.clone(), bytes: bytes.clone(), ..Encoded::default() }).unwrap();
        }
        writer.checkpoint().unwrap();
        drop(writer);
        output(&path, 0).file.set_len(base + position).unwrap();
        let mut writer = StreamWriter::resume(output(&path, base), capacity, &pieces, position).unwrap();
        for (units, bytes) in &blocks[stop..] {
            writer.write_block(&Encoded { units: units.clone(), bytes: bytes.clone(), ..Encoded::default() }).unwrap();
        }
        let len = writer.finish().unwrap();
        assert_eq!(len, whole.len() as u64);
        assert!(std::fs::read(&path).unwrap()[base as usize..] == whole, "resumed at {stop}");
        std::fs::remove_file(&path).unwrap();
        hits += 1;
    }
    assert!(hits > 20, "{hits}");
}

#[test]
fn an_empty_disk_of_4_tib_costs_next_to_nothing() {
    let dir = Dir::new();
    let begun = Instant::now();
    let mut writer = StreamWriter::create(output(&dir.path("a.vmdk"), 0), 4 << 40, 1).unwrap();
    let len = writer.finish().unwrap();
    let disk = open_single(dir.window("a.vmdk")).unwrap();
    assert_eq!((disk.capacity(), disk.extents(0, 4 << 40).unwrap().len()), (4 << 40, 0));
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    assert!(len < 1 << 20, "{len}");
}

#[test]
fn limits_are_named_and_wrong_order_is_refused() {
    let dir = Dir::new();
    let create = |capacity| StreamWriter::create(output(&dir.path("a.vmdk"), 0), capacity, 1);
    assert!(create((62 << 40) + 512).err().unwrap().to_string().contains("62 TiB"));
    assert!(create(1000).err().unwrap().to_string().contains("512"));
    let raw = dir.put("a.raw", &[7; 1 << 20]);
    let mut writer = create(1 << 20).unwrap();
    encode(&raw, 1, |block| writer.write_block(block).unwrap());
    encode(&raw, 1, |block| assert!(writer.write_block(block).is_err()));
    // 2 TiB of output, without writing them: a checkpoint that claims to be there.
    let near = FILE_LIMIT;
    let mut writer = StreamWriter::resume(output(&dir.path("b.vmdk"), 0), 1 << 20, &[], near).unwrap();
    encode(&raw, 1, |block| {
        let refused = writer.write_block(block).unwrap_err().to_string();
        assert!(refused.contains("2 TiB"), "{refused}");
    });
    assert!(StreamWriter::resume(output(&dir.path("b.vmdk"), 0), 1 << 20, &[vec![1; 13]], 1 << 20).is_err());
    assert!(StreamWriter::resume(output(&dir.path("b.vmdk"), 0), 1 << 20, &[vec![1; 12]], 1 << 20).is_err());
    assert!(StreamWriter::resume(output(&dir.path("b.vmdk"), 0), 1 << 20, &[], 1000).is_err());
}

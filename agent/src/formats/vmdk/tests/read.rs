//! What qemu-img writes is read back.

use super::*;

const SUBFORMATS: [&str; 5] = ["monolithicSparse", "streamOptimized", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"];

fn check(capacity: u64, runs: u64, seed: u64, options: &str) {
    let dir = Dir::new();
    patterned(&dir.path("a.raw"), capacity, runs, seed);
    for subformat in SUBFORMATS {
        let name = format!("{subformat}.vmdk");
        let zeroed = if subformat.contains("Sparse") { options } else { "" };
        qemu_ok(&[
            "convert",
            "-f",
            "raw",
            "-O",
            "vmdk",
            "-o",
            &format!("subformat={subformat}{zeroed}"),
            text(&dir.path("a.raw")),
            text(&dir.path(&name)),
        ]);
        let disk = dir.open(&name).unwrap();
        assert_eq!((disk.format(), disk.subformat()), ("vmdk", subformat));
        assert_equal(&disk, &dir.window("a.raw"));
    }
}

#[test]
fn every_subformat_with_an_odd_capacity() {
    check((70 << 20) + 7 * 512, 24, 11, "");
    check((33 << 20) + 512, 9, 12, ",zeroed_grain=on");
    check(512, 1, 13, "");
}

#[test]
fn a_disk_of_several_extents() {
    check((5 << 30) + 3 * 512, 40, 14, "");
}

#[test]
fn twenty_images_made_by_chance() {
    for seed in 1..=20 {
        let mut numbers = Numbers(seed * 7919);
        check(512 * (100 + numbers.below(60_000)), 1 + numbers.below(12), seed, "");
    }
}

#[test]
fn a_grain_of_zeros_is_a_hole() {
    let dir = Dir::new();
    dir.put("a.raw", &[0; 64 << 10]);
    qemu_ok(&["create", "-f", "vmdk", "-o", "zeroed_grain=on,subformat=monolithicSparse", text(&dir.path("z.vmdk")), "1M"]);
    let io = Command::new("qemu-io")
        .args(["-f", "vmdk", "-c", "write 0 128k", "-c", "write -z 64k 64k", text(&dir.path("z.vmdk"))])
        .output()
        .expect("these tests need qemu-io");
    assert!(io.status.success(), "{}", String::from_utf8_lossy(&io.stderr));
    let disk = dir.open("z.vmdk").unwrap();
    assert_eq!(disk.extents(0, 1 << 20).unwrap(), vec![Extent { offset: 0, len: 64 << 10 }]);
    let mut buf = [1u8; 100];
    disk.read_at((64 << 10) + 5, &mut buf, &mut Scratch::default()).unwrap();
    assert_eq!(buf, [0; 100]);
}

#[test]
fn the_redundant_directory_stands_in_for_a_damaged_one() {
    let dir = Dir::new();
    patterned(&dir.path("a.raw"), 50 << 20, 9, 21);
    qemu_ok(&["convert", "-f", "raw", "-O", "vmdk", text(&dir.path("a.raw")), text(&dir.path("a.vmdk"))]);
    let mut bytes = std::fs::read(dir.path("a.vmdk")).unwrap();
    let directory = u64::from_le_bytes(bytes[56..64].try_into().unwrap()) as usize * 512;
    bytes[directory..directory + 4].copy_from_slice(&u32::MAX.to_le_bytes());
    dir.put("b.vmdk", &bytes);
    assert_equal(&dir.open("b.vmdk").unwrap(), &dir.window("a.raw"));
    let flags = u32::from_le_bytes(bytes[8..12].try_into().unwrap()) & !2;
    bytes[8..12].copy_from_slice(&flags.to_le_bytes());
    dir.put("c.vmdk", &bytes);
    let refused = dir.open("c.vmdk").unwrap_err();
    assert!(matches!(refused, FormatError::Corrupt { what: "grain table", index: 0, .. }), "{refused}");
}

#[test]
fn an_esxi_descriptor_with_foreign_letters_and_zero_extents() {
    let dir = Dir::new();
    patterned(&dir.path("caf\u{e9}-flat.vmdk"), 3 << 20, 4, 31);
    let mut text = b"# Disk DescriptorFile\r\nversion=4\r\nencoding=\"windows-1252\"\r\nCID=1\r\nparentCID=ffffffff\r\ncreateType=\"vmfs\"\r\nchangeTrackPath=\"/etc/passwd\"\r\nRW 6144 VMFS \"caf".to_vec();
    text.extend_from_slice(b"\xe9-flat.vmdk\"\r\nRW 2048 ZERO\r\n");
    dir.put("a.vmdk", &text);
    let disk = dir.open("a.vmdk").unwrap();
    assert_eq!((disk.subformat(), disk.capacity()), ("vmfs", 4 << 20));
    let raw = OpenOptions::new().write(true).open(dir.path("caf\u{e9}-flat.vmdk")).unwrap();
    let before = dir.window("caf\u{e9}-flat.vmdk");
    raw.set_len(4 << 20).unwrap();
    assert_equal(&disk, &dir.window("caf\u{e9}-flat.vmdk"));
    drop(before);
}

#[test]
fn a_stream_with_something_behind_its_checksum_is_read_but_not_passed_on() {
    let dir = Dir::new();
    patterned(&dir.path("a.raw"), 4 << 20, 40, 15);
    stream(&dir.window("a.raw"), &dir.path("a.vmdk"), 6);
    let passes = |name: &str| {
        let disk = dir.open(name).unwrap();
        let mut plain = vec![0u8; UNIT];
        let units = 0..(4 << 20) / UNIT as u64;
        units.filter(|unit| disk.packed(*unit, Packing::Zlib, &mut plain, &mut Scratch::default()).unwrap().is_some()).collect::<Vec<_>>()
    };
    let all = passes("a.vmdk");
    assert!(all.len() > 10);
    // The first grain: behind header and descriptor, with four bytes to spare before its sector ends.
    let mut bytes = std::fs::read(dir.path("a.vmdk")).unwrap();
    let size = |bytes: &[u8], at: usize| u32::from_le_bytes(bytes[at + 8..at + 12].try_into().unwrap());
    let is_grain = |at: usize| bytes[at + 12] == 0x78 && size(&bytes, at) > 0 && (12 + size(&bytes, at) as usize) % 512 < 509;
    let at = (0..bytes.len() - 512).step_by(512).skip(64).find(|at| is_grain(*at)).unwrap();
    let (unit, more) = (bytes[at..at + 8].to_owned(), size(&bytes, at) + 4);
    bytes[at + 8..at + 12].copy_from_slice(&more.to_le_bytes());
    dir.put("b.vmdk", &bytes);
    assert_equal(&dir.open("b.vmdk").unwrap(), &dir.window("a.raw"));
    let unit = u64::from_le_bytes(unit.try_into().unwrap()) * 512 / UNIT as u64;
    assert_eq!(passes("b.vmdk"), all.into_iter().filter(|one| *one != unit).collect::<Vec<_>>());
}

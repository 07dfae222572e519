//! Images that want something: refused by name, without a panic, in no time and no memory.

use std::time::{Duration, Instant};

use super::*;

fn descriptor(lines: &str) -> String {
    format!("# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\n{lines}\n")
}

/// The message of a text descriptor's refusal; its extents must never be opened.
fn refusal(text: &str) -> String {
    let dir = Dir::new();
    let window = dir.put("a.vmdk", text.as_bytes());
    open(window, &|name| panic!("opened {name}")).unwrap_err().to_string()
}

#[test]
fn a_descriptor_cannot_name_what_does_not_lie_beside_it() {
    for name in ["/etc/passwd", "../a.vmdk", "..", ".", "a/b.vmdk", "..\\a.vmdk", "C:\\a.vmdk", "", "json:{}", "a\u{1}b"] {
        let said = refusal(&descriptor(&format!("createType=\"monolithicFlat\"\nRW 8 FLAT \"{name}\" 0")));
        assert!(said.contains("bare file name"), "{name}: {said}");
        let said = refusal(&descriptor(&format!("createType=\"twoGbMaxExtentSparse\"\nRW 8 SPARSE \"{name}\"")));
        assert!(said.contains("bare file name"), "{name}: {said}");
    }
}

#[test]
fn parents_unknown_kinds_and_contradictions_are_refused_by_name() {
    let flat = "RW 8 FLAT \"a-flat.vmdk\" 0";
    for (text, expected) in [
        ("createType=\"monolithicFlat\"\nparentFileNameHint=\"base.vmdk\"\n".to_owned() + flat, "parent"),
        ("createType=\"fullDevice\"\n".to_owned() + flat, "fullDevice"),
        ("createType=\"vmfsSparse\"\nRW 8 SPARSE \"a\"".to_owned(), "does not belong into vmfsSparse"),
        ("createType=\"twoGbMaxExtentSparse\"\nRW 8 VMFSSPARSE \"a\"".to_owned(), "does not belong into twoGbMaxExtentSparse"),
        ("createType=\"seSparse\"\nRW 8 ZERO".to_owned(), "seSparse, a snapshot's delta on VMFS 6"),
        ("createType=\"vmfsSparse\"\nRW 8 SESPARSE \"a\"".to_owned(), "consolidate the snapshots, or clone the disk"),
        ("createType=\"vmfsRawDeviceMap\"\nRW 8 VMFSRDM \"a\"".to_owned(), "VMFSRDM"),
        ("createType=\"custom\"\n".to_owned() + flat, "custom"),
        ("createType=\"monolithicFlat\"\nRW 8 SPARSE \"a\"".to_owned(), "does not belong"),
        ("createType=\"monolithicSparse\"\nRW 8 SPARSE \"a\"".to_owned(), "give that file instead"),
        ("createType=\"monolithicFlat\"\nRW 8 FLAT \"a\" 0\nRW 8 FLAT \"b\" 0".to_owned(), "2 extents"),
        ("createType=\"twoGbMaxExtentFlat\"\nRW 8 FLAT \"a\" 0\nRW 8 FLAT \"a\" 0".to_owned(), "two extents name"),
        ("createType=\"monolithicFlat\"\nRW 0 FLAT \"a\" 0".to_owned(), "0 sectors"),
        ("createType=\"monolithicFlat\"\nRW 18446744073709551615 FLAT \"a\" 0".to_owned(), "overflow"),
        ("createType=\"monolithicFlat\"\nRW 8 FLAT \"a\" 18446744073709551615".to_owned(), "overflow"),
        ("createType=\"twoGbMaxExtentFlat\"\nRW 18446744073709551615 ZERO\nRW 8 ZERO".to_owned(), "overflow"),
        ("createType=\"monolithicFlat\"\nNOACCESS 8 FLAT \"a\" 0".to_owned(), "NOACCESS"),
        ("createType=\"monolithicFlat\"\nRW 8 FLAT a 0".to_owned(), "quotes"),
        ("createType=\"monolithicFlat\"\nhello".to_owned(), "KEY=VALUE"),
        ("createType=\"monolithicFlat\"".to_owned(), "no extent"),
        (flat.to_owned(), "no createType"),
        ("createType=\"vmfs\"\ncreateType=\"monolithicFlat\"\n".to_owned() + flat, "twice"),
        ("createType=\"monolithicFlat\"\nddb.iofilters=\"vmwarevmcrypt\"\n".to_owned() + flat, "encrypted"),
        ("createType=\"monolithicFlat\"\n".to_owned() + &"RW 8 ZERO\n".repeat(2049), "2048"),
    ] {
        let said = refusal(&descriptor(&text));
        assert!(said.contains(expected), "{text}: {said}");
    }
    let parent = descriptor(&("createType=\"monolithicFlat\"\n".to_owned() + flat)).replace("ffffffff", "12345678");
    assert!(refusal(&parent).contains("parentCID"));
    assert!(refusal(&" ".repeat((1 << 20) + 1)).contains("1048576"));
    assert!(refusal("").contains("createType"));
}

#[test]
fn a_short_flat_extent_is_named() {
    let dir = Dir::new();
    dir.put("a-flat.vmdk", &[1; 4095]);
    dir.put("a.vmdk", descriptor("createType=\"monolithicFlat\"\nRW 8 FLAT \"a-flat.vmdk\" 0").as_bytes());
    let said = dir.open("a.vmdk").unwrap_err().to_string();
    assert!(said.contains("a-flat.vmdk") && said.contains("4096"), "{said}");
}

/// A sparse file that qemu-img made, with these bytes changed.
fn changed(subformat: &str, change: impl FnOnce(&mut Vec<u8>)) -> (Dir, Result<Image>) {
    let dir = Dir::new();
    patterned(&dir.path("a.raw"), 8 << 20, 6, 5);
    qemu_ok(&[
        "convert",
        "-f",
        "raw",
        "-O",
        "vmdk",
        "-o",
        &format!("subformat={subformat}"),
        text(&dir.path("a.raw")),
        text(&dir.path("a.vmdk")),
    ]);
    let mut bytes = std::fs::read(dir.path("a.vmdk")).unwrap();
    change(&mut bytes);
    let image = open_single(dir.put("b.vmdk", &bytes));
    (dir, image)
}

fn set64(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

#[test]
fn header_fields_out_of_bounds_are_refused() {
    for (at, value, expected) in [
        (12, u64::MAX, "overflows"),
        (12, u64::MAX / 1024, "the descriptor says"),
        (12, 1, "the descriptor says"),
        (20, 0, "power of two"),
        (20, 7, "power of two"),
        (20, 4, "power of two"),
        (20, 4096, "power of two"),
        (20, u64::MAX, "power of two"),
        (28, u64::MAX, "descriptor"),
        (28, 0, "split disk"),
        (36, 2049, "1048576"),
        (28, 1 << 30, "past the file's end"),
        (36, u64::MAX, "1048576"),
    ] {
        let (_dir, image) = changed("monolithicSparse", |bytes| set64(bytes, at, value));
        let said = image.unwrap_err().to_string();
        assert!(said.contains(expected), "{at} {value}: {said}");
    }
    for (at, value, expected) in [
        (4, 4u32, "version 4"),
        (4, 0, "version 0"),
        (44, 0, "grain table"),
        (44, u32::MAX, "grain table"),
        (73, 0x0a0a_0a0d, "text mode"),
        (8, 0x1_0003, "flags"),
    ] {
        let (_dir, image) = changed("monolithicSparse", |bytes| bytes[at..at + 4].copy_from_slice(&value.to_le_bytes()));
        let said = image.unwrap_err().to_string();
        assert!(said.contains(expected), "{at} {value}: {said}");
    }
    for value in [0, 1 << 40, u64::MAX - 1, 1 << 62] {
        let (_dir, image) = changed("monolithicSparse", |bytes| {
            set64(bytes, 48, value);
            set64(bytes, 56, value);
        });
        assert!(matches!(image, Err(FormatError::Corrupt { what: "grain directory", .. })), "{image:?}");
    }
    let (_dir, image) = changed("streamOptimized", |bytes| bytes[77] = 2);
    assert!(image.unwrap_err().to_string().contains("algorithm 2"));
}

/// Where the first grain that exists lies: number and byte.
fn first_grain(bytes: &[u8]) -> (u64, usize) {
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
    let directory = u64::from_le_bytes(bytes[56..64].try_into().unwrap()) as usize * 512;
    let table = word(directory) * 512;
    let number = (0..512).find(|k| word(table + k * 4) > 1).unwrap();
    (number as u64, word(table + number * 4) * 512)
}

#[test]
fn a_damaged_grain_is_named_with_its_place() {
    type Change = fn(&mut Vec<u8>, usize);
    let changes: [(Change, &str); 6] = [
        (|bytes, at| bytes[at + 16] ^= 1, "Adler-32"),
        (|bytes, at| bytes[at] ^= 8, "marker says sector"),
        (|bytes, at| bytes[at + 11] = 0xff, "compressed bytes"),
        (|bytes, at| bytes[at + 8..at + 12].fill(0), "compressed bytes"),
        (|bytes, at| bytes.truncate(at + 20), "compressed bytes"),
        (|bytes, at| bytes.truncate(at), "past the file's end"),
    ];
    for (change, expected) in changes {
        let mut place = (0, 0);
        let (_dir, image) = changed("streamOptimized", |bytes| {
            place = first_grain(bytes);
            change(bytes, place.1);
        });
        let mut buf = vec![0u8; 64 << 10];
        let failed = image.unwrap().read_at(place.0 * (64 << 10), &mut buf, &mut Scratch::default()).unwrap_err();
        let said = failed.to_string();
        assert!(said.contains(expected) && said.contains(&format!("grain {} at byte {}", place.0, place.1)), "{said}");
    }
}

#[test]
fn a_grain_that_unpacks_to_another_size_is_refused() {
    for (plain, fits) in [(65_535usize, false), (65_536, true), (65_537, false), (1 << 20, false), (1, false)] {
        let mut place = (0, 0);
        let (_dir, image) = changed("streamOptimized", |bytes| {
            place = first_grain(bytes);
            let mut packed = vec![0u8; 1 << 16];
            let len =
                libdeflater::Compressor::new(libdeflater::CompressionLvl::best()).zlib_compress(&vec![3; plain], &mut packed).unwrap();
            bytes[place.1 + 8..place.1 + 12].copy_from_slice(&(len as u32).to_le_bytes());
            bytes[place.1 + 12..place.1 + 12 + len].copy_from_slice(&packed[..len]);
        });
        let image = image.unwrap();
        for cut in [64 << 10, 1000] {
            let mut buf = vec![0u8; cut];
            let read = image.read_at(place.0 * (64 << 10), &mut buf, &mut Scratch::default());
            assert_eq!(read.is_ok(), fits, "{plain} bytes, {cut} asked: {read:?}");
        }
    }
}

#[test]
fn tables_and_grains_past_the_end_are_refused() {
    let (_dir, image) = changed("monolithicSparse", |bytes| {
        let (_, at) = first_grain(bytes);
        bytes.truncate(at + 100);
    });
    let mut buf = vec![0u8; 8 << 20];
    let failed = image.unwrap().read_at(0, &mut buf, &mut Scratch::default()).unwrap_err();
    assert!(matches!(failed, FormatError::Corrupt { what: "grain", .. }), "{failed}");
    let (_dir, image) = changed("monolithicSparse", |bytes| bytes.truncate(700));
    assert!(image.is_err());
    let (_dir, image) = changed("monolithicSparse", |bytes| bytes.truncate(300));
    assert!(matches!(image, Err(FormatError::Corrupt { what: "header", .. })), "{image:?}");
}

#[test]
fn a_stream_cut_at_any_place_is_refused_at_once() {
    let dir = Dir::new();
    patterned(&dir.path("a.raw"), 40 << 20, 6, 5);
    let len = stream(&dir.window("a.raw"), &dir.path("a.vmdk"), 1);
    let whole = std::fs::read(dir.path("a.vmdk")).unwrap();
    let mut numbers = Numbers(3);
    for cut in [len - 1, len - 512, len - 1024, len - 1536, len - 2048, 512, 513, 1024, 65_536]
        .into_iter()
        .chain((0..40).map(|_| 512 + numbers.below(len - 512)))
    {
        let failed = open_single(dir.put("b.vmdk", &whole[..cut as usize])).unwrap_err();
        assert!(matches!(failed, FormatError::Corrupt { what: "footer", .. }), "{cut}: {failed}");
    }
    let mut other = whole.clone();
    set64(&mut other, len as usize - 1024 + 12, 5);
    assert!(open_single(dir.put("b.vmdk", &other)).unwrap_err().to_string().contains("footer"));
    let mut again = whole;
    set64(&mut again, len as usize - 1024 + 56, u64::MAX);
    assert!(open_single(dir.put("b.vmdk", &again)).unwrap_err().to_string().contains("grain directory"));
}

/// A sparse file of the given geometry: header, descriptor, a directory at sector 64 that is a hole of the file.
fn hollow(dir: &Dir, sectors: u64, grain: u64, len: u64) -> Window {
    let mut header = header::Header::stream(sectors, grain, 20, 64, 64);
    header[8..12].copy_from_slice(&1u32.to_le_bytes());
    let file = OpenOptions::new().create(true).truncate(true).write(true).open(dir.path("h.vmdk")).unwrap();
    file.write_all_at(&header, 0).unwrap();
    file.write_all_at(descriptor(&format!("createType=\"monolithicSparse\"\nRW {sectors} SPARSE \"h.vmdk\"")).as_bytes(), 512).unwrap();
    file.set_len(len).unwrap();
    dir.window("h.vmdk")
}

#[test]
fn a_huge_directory_costs_neither_time_nor_memory() {
    let dir = Dir::new();
    let begun = Instant::now();
    let refused = open_single(hollow(&dir, (1 << 62) / 512, 8, 1 << 40)).unwrap_err().to_string();
    assert!(refused.contains("grain directory"), "{refused}");
    // The most that is let in: 8 MiB of entries, all of them different tables inside a sparse file of 4 GiB and more.
    let sectors = MAX_DIRECTORY * 512 * 8;
    let window = hollow(&dir, sectors, 8, 16 << 30);
    let entries: Vec<u8> = (0..MAX_DIRECTORY as u32).flat_map(|k| (20_000 + k * 4).to_le_bytes()).collect();
    OpenOptions::new().write(true).open(dir.path("h.vmdk")).unwrap().write_all_at(&entries, 64 * 512).unwrap();
    let disk = open_single(window.clone()).unwrap();
    assert_eq!(disk.extents(0, u64::MAX).unwrap(), vec![]);
    // One table of all that holds something, in the middle: it is not forgotten.
    let grain = 8u64 << 30;
    let file = OpenOptions::new().write(true).open(dir.path("h.vmdk")).unwrap();
    file.write_all_at(&((grain / 512) as u32).to_le_bytes(), (20_000 + 777_777 * 4) * 512 + 5 * 4).unwrap();
    file.write_all_at(&[9; 4096], grain).unwrap();
    let at = (777_777 * 512 + 5) * 4096;
    assert_eq!(open_single(window.clone()).unwrap().extents(0, u64::MAX).unwrap(), vec![Extent { offset: at, len: 4096 }]);
    let doubled: Vec<u8> = (0..MAX_DIRECTORY as u32).flat_map(|_| 20_000u32.to_le_bytes()).collect();
    OpenOptions::new().write(true).open(dir.path("h.vmdk")).unwrap().write_all_at(&doubled, 64 * 512).unwrap();
    let refused = open_single(window).unwrap_err().to_string();
    assert!(refused.contains("overlaps"), "{refused}");
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
}

#[test]
fn any_changed_byte_gives_an_answer_and_not_a_panic() {
    let dir = Dir::new();
    patterned(&dir.path("a.raw"), 3 << 20, 5, 5);
    let mut numbers = Numbers(17);
    stream(&dir.window("a.raw"), &dir.path("s.vmdk"), 1);
    qemu_ok(&["convert", "-f", "raw", "-O", "vmdk", text(&dir.path("a.raw")), text(&dir.path("m.vmdk"))]);
    let mut scratch = Scratch::default();
    let mut buf = vec![0u8; 3 << 20];
    for name in ["s.vmdk", "m.vmdk"] {
        let whole = std::fs::read(dir.path(name)).unwrap();
        for _ in 0..600 {
            let mut bytes = whole.clone();
            for _ in 0..1 + numbers.below(4) {
                let at = match numbers.below(3) {
                    0 => numbers.below(2048.min(bytes.len() as u64)),
                    1 => bytes.len() as u64 - 1 - numbers.below(4096.min(bytes.len() as u64)),
                    _ => numbers.below(bytes.len() as u64),
                };
                bytes[at as usize] = numbers.next() as u8;
            }
            let Ok(disk) = open_single(dir.put("f.vmdk", &bytes)) else {
                continue;
            };
            let _ = disk.extents(0, disk.capacity().min(1 << 30));
            let len = disk.capacity().min(buf.len() as u64) as usize;
            let _ = disk.read_at(0, &mut buf[..len], &mut scratch);
        }
    }
}

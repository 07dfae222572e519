//! Images as ESXi, Workstation and ovftool write them and qemu-img does not: built by hand after "Virtual Disk Format 5.0".

use super::*;

const GRAIN: usize = 64 << 10;

/// How a sparse file is laid out.
#[derive(Clone)]
struct Layout {
    version: u32,
    /// Directory named by the footer (header: -1) or by the header itself.
    footer: bool,
    /// Directory and tables before the grains, as a tool that knows the sizes beforehand lays them.
    tables_first: bool,
    /// Grains and tables from the last to the first.
    backwards: bool,
    /// All-zero grains: entry 1 (with its flag), else 0.
    zeroed: bool,
    /// The last grain is deflated at its logical length and not filled up.
    short_tail: bool,
    /// Empty sectors behind each table and its marker.
    gap: usize,
    /// Sectors by which the header's capacity is rounded up to whole grains (VirtualBox).
    rounded: bool,
    /// What stands in the descriptor's room.
    descriptor: Vec<u8>,
}

fn text_of(kind: &str, sectors: usize) -> String {
    format!(
        "# Disk DescriptorFile\nversion=1\nCID=7e3f9a01\nparentCID=ffffffff\ncreateType=\"{kind}\"\n\n# Extent description\nRW {sectors} SPARSE \"generated-stream.vmdk\"\n\n# The Disk Data Base\n#DDB\n\nddb.adapterType = \"lsilogic\"\nddb.virtualHWVersion = \"13\"\n"
    )
}

fn stream_layout(sectors: usize) -> Layout {
    Layout {
        version: 3,
        footer: true,
        tables_first: false,
        backwards: false,
        zeroed: false,
        short_tail: false,
        gap: 0,
        rounded: false,
        descriptor: text_of("streamOptimized", sectors).into_bytes(),
    }
}

/// The file as it grows; everything starts at a sector.
#[derive(Default)]
struct Bytes(Vec<u8>);

impl Bytes {
    /// Appends and pads; answers the sector where it starts.
    fn put(&mut self, bytes: &[u8]) -> u32 {
        let at = self.0.len() / 512;
        self.0.extend_from_slice(bytes);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        at as u32
    }

    fn set(&mut self, sector: u32, bytes: &[u8]) {
        let at = sector as usize * 512;
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }
}

fn words(entries: &[u32]) -> Vec<u8> {
    entries.iter().flat_map(|entry| entry.to_le_bytes()).collect()
}

fn zlib(plain: &[u8]) -> Vec<u8> {
    let mut packed = vec![0u8; plain.len() + plain.len() / 8 + 64];
    let len = libdeflater::Compressor::new(libdeflater::CompressionLvl::default()).zlib_compress(plain, &mut packed).unwrap();
    packed.truncate(len);
    packed
}

fn sparse_header(layout: &Layout, sectors: u64, compressed: bool, redundant: u64, directory: u64) -> Vec<u8> {
    let mut out = vec![0u8; 512];
    let flags = 1 | u32::from(redundant != 0) << 1 | u32::from(layout.zeroed) << 2 | if compressed { 3 << 16 } else { 0 };
    out[..4].copy_from_slice(b"KDMV");
    out[4..8].copy_from_slice(&layout.version.to_le_bytes());
    out[8..12].copy_from_slice(&flags.to_le_bytes());
    for (at, value) in [(12, sectors), (20, GRAIN as u64 / 512), (28, 1), (36, 20), (48, redundant), (56, directory), (64, 128)] {
        out[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }
    out[44..48].copy_from_slice(&512u32.to_le_bytes());
    out[73..77].copy_from_slice(b"\n \r\n");
    out[77] = u8::from(compressed);
    out
}

/// A streamOptimized file of the raw bytes.
fn stream_of(raw: &[u8], layout: &Layout) -> Vec<u8> {
    let logical = raw.len() / 512;
    let sectors = if layout.rounded { raw.len().next_multiple_of(GRAIN) / 512 } else { logical } as u64;
    let grains = raw.len().div_ceil(GRAIN);
    let tables = grains.div_ceil(512);
    let mut file = Bytes::default();
    let mut entries = vec![0u32; tables * 512];
    file.put(&sparse_header(layout, sectors, true, 0, u64::MAX));
    file.put(&layout.descriptor);
    file.0.resize(128 * 512, 0);
    let reserved = layout.tables_first.then(|| {
        let directory = file.put(&vec![0; tables * 4]);
        let first: Vec<u32> = (0..tables).map(|_| file.put(&[0; 2048])).collect();
        (directory, first)
    });
    let order: Vec<usize> = if layout.backwards { (0..grains).rev().collect() } else { (0..grains).collect() };
    for k in order {
        let plain = &raw[k * GRAIN..raw.len().min((k + 1) * GRAIN)];
        if crate::formats::disk::is_zero(plain) {
            entries[k] = u32::from(layout.zeroed);
            continue;
        }
        let mut plain = plain.to_vec();
        if !layout.short_tail || layout.rounded {
            plain.resize(GRAIN, 0);
        }
        let packed = zlib(&plain);
        let mut marker = (k as u64 * 128).to_le_bytes().to_vec();
        marker.extend_from_slice(&(packed.len() as u32).to_le_bytes());
        marker.extend_from_slice(&packed);
        entries[k] = file.put(&marker);
    }
    let present = |table: usize| entries[table * 512..(table + 1) * 512].iter().any(|entry| *entry != 0);
    let mut directory = vec![0u32; tables];
    let order: Vec<usize> = if layout.backwards { (0..tables).rev().collect() } else { (0..tables).collect() };
    for table in order.into_iter().filter(|table| present(*table)) {
        let bytes = words(&entries[table * 512..(table + 1) * 512]);
        directory[table] = match &reserved {
            Some((_, places)) => {
                file.set(places[table], &bytes);
                places[table]
            }
            None => {
                file.put(&header::marker::sector(4, header::marker::GRAIN_TABLE));
                file.put(&vec![0; layout.gap * 512]);
                file.put(&bytes)
            }
        };
    }
    let place = match reserved {
        Some((place, _)) => {
            file.set(place, &words(&directory));
            place
        }
        None => {
            let len = (tables * 4).div_ceil(512) as u64;
            file.put(&header::marker::sector(len, header::marker::GRAIN_DIRECTORY));
            file.put(&words(&directory))
        }
    };
    let ending = sparse_header(layout, sectors, true, 0, u64::from(place));
    if layout.footer {
        file.put(&header::marker::sector(1, header::marker::FOOTER));
        file.put(&ending);
    } else {
        file.set(0, &ending);
    }
    file.put(&header::marker::sector(0, header::marker::EOS));
    file.0
}

/// Bytes of a disk of so many sectors: most grains empty, the last sector not.
fn content(sectors: usize, seed: u64) -> Vec<u8> {
    let mut numbers = Numbers(seed);
    let mut raw = vec![0u8; sectors * 512];
    for grain in raw.chunks_mut(GRAIN) {
        if numbers.below(3) == 0 {
            let len = 1 + numbers.below(grain.len() as u64) as usize;
            grain[..len].copy_from_slice(&numbers.bytes(len));
        }
    }
    let end = raw.len();
    raw[end - 5..].copy_from_slice(b"last!");
    raw
}

/// Ours equals the raw bytes, and where `oracle` says so qemu-img reads the same.
fn check(dir: &Dir, image: &[u8], raw: &[u8], oracle: bool, what: &str) -> Image {
    dir.put("a.raw", raw);
    let disk = open_single(dir.put("a.vmdk", image)).unwrap_or_else(|e| panic!("{what}: {e}"));
    assert_equal(&disk, &dir.window("a.raw"));
    if oracle {
        qemu_ok(&["compare", "-f", "raw", "-F", "vmdk", text(&dir.path("a.raw")), text(&dir.path("a.vmdk"))]);
    }
    disk
}

#[test]
fn streams_in_every_order_that_the_specification_allows() {
    let dir = Dir::new();
    // 580 grains make two tables; the last grain is cut at an odd sector.
    let sectors = 580 * 128 + 77;
    let raw = content(sectors, 41);
    let plain = stream_layout(sectors);
    let layouts: [(&str, Layout); 12] = [
        ("version 3, footer", plain.clone()),
        ("version 1, footer", Layout { version: 1, ..plain.clone() }),
        ("version 2, zeroed grains", Layout { version: 2, zeroed: true, ..plain.clone() }),
        ("no footer", Layout { footer: false, ..plain.clone() }),
        ("no footer, version 1", Layout { footer: false, version: 1, ..plain.clone() }),
        ("tables before the grains", Layout { footer: false, tables_first: true, ..plain.clone() }),
        ("tables before the grains, and a footer", Layout { tables_first: true, ..plain.clone() }),
        ("backwards", Layout { backwards: true, ..plain.clone() }),
        ("backwards behind their tables", Layout { backwards: true, tables_first: true, footer: false, ..plain.clone() }),
        ("a last grain of its own length", Layout { short_tail: true, ..plain.clone() }),
        ("a capacity rounded up", Layout { rounded: true, ..plain.clone() }),
        ("gaps between marker and table", Layout { gap: 7, zeroed: true, version: 2, ..plain.clone() }),
    ];
    for (what, layout) in layouts {
        let image = stream_of(&raw, &layout);
        let disk = check(&dir, &image, &raw, !layout.rounded, what);
        assert_eq!(disk.kind(), Kind::StreamOptimized);
        let covered = disk.covered(0, u64::MAX).unwrap();
        match layout.zeroed {
            true => assert_eq!(covered, [Extent { offset: 0, len: raw.len() as u64 }], "{what}: zeroed grains hide a parent"),
            false => assert_eq!(covered, disk.extents(0, u64::MAX).unwrap(), "{what}"),
        }
    }
}

#[test]
fn a_stream_of_every_small_size_and_an_empty_one() {
    let dir = Dir::new();
    for sectors in [1, 2, 127, 128, 129, 255, 512 * 128, 512 * 128 + 1] {
        let raw = content(sectors, sectors as u64 + 9);
        for short_tail in [false, true] {
            let layout = Layout { short_tail, ..stream_layout(sectors) };
            check(&dir, &stream_of(&raw, &layout), &raw, true, &format!("{sectors} sectors"));
        }
        let empty = vec![0u8; sectors * 512];
        let disk = check(&dir, &stream_of(&empty, &stream_layout(sectors)), &empty, true, "empty");
        assert!(disk.extents(0, u64::MAX).unwrap().is_empty());
    }
}

#[test]
fn descriptors_as_different_tools_write_them() {
    let dir = Dir::new();
    let sectors = 300;
    let raw = content(sectors, 3);
    let usual = text_of("streamOptimized", sectors);
    let padded = |text: &str, tail: &[u8]| {
        let mut bytes = text.as_bytes().to_vec();
        bytes.push(0);
        bytes.extend_from_slice(tail);
        bytes
    };
    let ddb = usual.find("# The Disk").unwrap();
    let variants: [(&str, Vec<u8>); 14] = [
        ("CRLF", usual.replace('\n', "\r\n").into_bytes()),
        ("no ddb", usual.as_bytes()[..ddb].to_vec()),
        ("UTF-8 said", usual.replace("version=1", "version=1\nencoding=\"UTF-8\"").into_bytes()),
        ("windows-1252 said", usual.replace("version=1", "version=1\nencoding=\"windows-1252\"").into_bytes()),
        ("GBK said, ASCII meant", usual.replace("version=1", "version=1\nencoding=\"GBK\"").into_bytes()),
        ("createType in capitals", usual.replace("streamOptimized", "STREAMOPTIMIZED").into_bytes()),
        ("key in capitals", usual.replace("createType", "CREATETYPE").into_bytes()),
        ("blanks around the sign", usual.replace("createType=", "createType = ").into_bytes()),
        ("no quotes", usual.replace("\"streamOptimized\"", "streamOptimized").into_bytes()),
        ("blank lines", usual.replace('\n', "\n\n  \n\t\n").into_bytes()),
        ("no newline at the end", usual.trim_end().as_bytes().to_vec()),
        ("NULs behind", padded(&usual, &[0; 3000])),
        ("garbage behind a NUL", padded(&usual, &[0xfe; 3000])),
        (
            "read-only extent and hint of no parent",
            usual.replace("RW", "RDONLY").replace("parentCID", "parentFileNameHint=\"\"\nparentCID").into_bytes(),
        ),
    ];
    for (what, descriptor) in variants {
        let layout = Layout { descriptor, ..stream_layout(sectors) };
        // qemu-img takes any hint for a parent.
        check(&dir, &stream_of(&raw, &layout), &raw, !what.contains("hint"), what);
    }
}

/// A monolithicSparse file: header, descriptor, redundant tables, tables, grains; the order of the grains turned round on demand.
fn monolithic(raw: &[u8], redundant: bool, backwards: bool) -> (Vec<u8>, [u32; 2]) {
    let sectors = raw.len() / 512;
    let layout = Layout { version: 1, descriptor: text_of("monolithicSparse", sectors).into_bytes(), ..stream_layout(sectors) };
    let grains = raw.len().div_ceil(GRAIN);
    let tables = grains.div_ceil(512);
    let mut file = Bytes::default();
    file.put(&sparse_header(&layout, sectors as u64, false, 0, 0));
    file.put(&layout.descriptor);
    file.0.resize(21 * 512, 0);
    let reserve = |file: &mut Bytes| {
        let directory = file.put(&vec![0; tables * 4]);
        let places: Vec<u32> = (0..tables).map(|_| file.put(&[0; 2048])).collect();
        file.set(directory, &words(&places));
        (directory, places)
    };
    let copies = [redundant.then(|| reserve(&mut file)), Some(reserve(&mut file))];
    file.0.resize(file.0.len().next_multiple_of(GRAIN), 0);
    let mut entries = vec![0u32; tables * 512];
    let order: Vec<usize> = if backwards { (0..grains).rev().collect() } else { (0..grains).collect() };
    for k in order {
        let plain = &raw[k * GRAIN..raw.len().min((k + 1) * GRAIN)];
        if !crate::formats::disk::is_zero(plain) {
            entries[k] = file.put(plain);
            file.0.resize(file.0.len().next_multiple_of(GRAIN), 0);
        }
    }
    for (_, places) in copies.iter().flatten() {
        for (place, table) in places.iter().zip(entries.chunks(512)) {
            file.set(*place, &words(table));
        }
    }
    let [spare, main] = copies.map(|copy| copy.map_or(0, |(directory, _)| directory));
    file.set(0, &sparse_header(&layout, sectors as u64, false, u64::from(spare), u64::from(main)));
    (file.0, [spare, main])
}

#[test]
fn a_monolithic_file_with_and_without_redundant_tables() {
    let dir = Dir::new();
    let raw = content(700 * 128 + 3, 8);
    for (redundant, backwards) in [(true, false), (true, true), (false, false), (false, true)] {
        let (image, [spare, main]) = monolithic(&raw, redundant, backwards);
        check(&dir, &image, &raw, true, "whole");
        let spoilt = |directory: u32| {
            let mut bad = image.clone();
            bad[directory as usize * 512..][..4].fill(0xff);
            bad
        };
        if redundant {
            check(&dir, &spoilt(spare), &raw, false, "the spare directory is of no matter");
            check(&dir, &spoilt(main), &raw, false, "the spare directory stands in");
        } else {
            let refused = open_single(dir.put("b.vmdk", &spoilt(main))).unwrap_err();
            assert!(matches!(refused, FormatError::Corrupt { what: "grain table", .. }), "{refused}");
        }
    }
}

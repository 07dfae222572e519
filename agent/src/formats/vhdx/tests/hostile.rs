//! What is refused: each case alters a good image (checksums made right where the point lies behind them) and names words of the refusal.

use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use super::super::{metadata, region};
use super::*;

/// What is done to a good image.
type Alter = fn(&mut Vec<u8>);

/// Name, alteration, words of the refusal.
type Case = (&'static str, Alter, &'static str);

const TABLE_AT: [usize; 2] = [192 << 10, 256 << 10];
const METADATA_AT: usize = 2 << 20;
const ITEMS_AT: usize = METADATA_AT + (64 << 10);

fn put(image: &mut [u8], at: usize, value: &[u8]) {
    image[at..at + value.len()].copy_from_slice(value);
}

/// Changes both region tables and makes their checksums right.
fn tables(image: &mut [u8], offset: usize, value: &[u8]) {
    for at in TABLE_AT {
        put(image, at + offset, value);
        reseal(image, at, 64 << 10);
    }
}

/// Changes a field of region `i` (0 the BAT, 1 the metadata, 2 one more, which makes three).
fn region(image: &mut [u8], i: usize, offset: usize, value: &[u8]) {
    if i == 2 {
        tables(image, 8, &[3]);
    }
    tables(image, 16 + i * 32 + offset, value);
}

/// Changes a field of metadata entry `i`: 0 file parameters, 1 size, 2 id, 3 logical, 4 physical sector, 5 one more, which makes six.
fn item(image: &mut [u8], i: usize, offset: usize, value: &[u8]) {
    if i == 5 {
        put(image, METADATA_AT + 10, &[6]);
    }
    put(image, METADATA_AT + (i + 1) * 32 + offset, value);
}

fn bat(image: &mut [u8], block: usize, entry: u64) {
    put(image, BAT_AT + block * 8, &entry.to_le_bytes());
}

/// An entry with one change, in a log that is to be replayed; its bytes are altered and its checksum made right.
fn log(image: &mut [u8], change: Change, alter: fn(&mut Vec<u8>)) {
    let mut bytes = LogEntry { sequence: 5, tail: 0, flushed: 4 << 20, last: 12 << 20, changes: vec![change] }.bytes();
    alter(&mut bytes);
    crc::seal(&mut bytes);
    patch_headers(image, 48, &LOG_GUID);
    put_log(image, 0, &bytes);
}

fn sector() -> Change {
    Change::Sector(4 << 20, vec![1; 4096])
}

/// Moves the log to the end of the image and makes it `len` bytes long.
fn long_log(image: &mut Vec<u8>, len: usize) -> usize {
    let at = image.len();
    image.resize(at + len, 0);
    patch_headers(image, 48, &LOG_GUID);
    patch_headers(image, 68, &(len as u32).to_le_bytes());
    patch_headers(image, 72, &(at as u64).to_le_bytes());
    at
}

const STRUCTURE: &[Case] = &[
    ("empty", |i| i.clear(), "header section"),
    ("cut in the header section", |i| i.truncate((1 << 20) - 1), "the file has 1048575 bytes"),
    ("identifier", |i| i[0] = b'V', "\"vhdxfile\""),
    ("header signatures", |i| HEADER_AT.iter().for_each(|at| i[*at] = 0), "header 0 at byte 65536: it does not start with \"head\""),
    ("header checksums", |i| HEADER_AT.iter().for_each(|at| i[*at + 100] ^= 1), "header 0 at byte 65536: it has the checksum"),
    (
        "equal sequence numbers",
        |i| (patch_headers(i, 8, &[9]), put(i, HEADER_AT[1] + 16, &[1]), reseal(i, HEADER_AT[1], 4096)).0,
        "both headers are valid with sequence number 9",
    ),
    ("version 2", |i| patch_headers(i, 66, &[2]), "VHDX version 2"),
    ("log version 1", |i| (patch_headers(i, 48, &LOG_GUID), patch_headers(i, 64, &[1])).0, "log of version 1"),
    ("log length", |i| patch_headers(i, 68, &[1]), "not made of whole MiB"),
    ("log offset", |i| patch_headers(i, 72, &[0, 16]), "at 1052672 is not made of whole MiB"),
    ("log on the headers", |i| patch_headers(i, 72, &[0; 8]), "lies on the header section"),
    ("log past the end", |i| patch_headers(i, 72, &(1u64 << 40).to_le_bytes()), "its log of 1048576 bytes at 1099511627776"),
    ("log far past the end", |i| patch_headers(i, 72, &(!0u64 << 20).to_le_bytes()), "its log of 1048576 bytes at 18446744073708503040"),
    ("log without length", |i| (patch_headers(i, 48, &LOG_GUID), patch_headers(i, 68, &[0; 4])).0, "length is 0"),
    ("table signatures", |i| TABLE_AT.iter().for_each(|at| i[*at] = 0), "\"regi\""),
    ("table checksums", |i| TABLE_AT.iter().for_each(|at| i[*at + 9999] = 1), "region table 0 at byte 196608: it has the checksum"),
    ("tables that differ", |i| (i[TABLE_AT[1] + 60_000] = 1, reseal(i, TABLE_AT[1], 64 << 10)).0, "both valid, but differ"),
    ("too many regions", |i| tables(i, 8, &2048u32.to_le_bytes()), "has 2048 entries"),
    (
        "a region twice",
        |i| (region(i, 2, 0, &region::BAT), region(i, 2, 16, &(4u64 << 20).to_le_bytes())).0,
        "names region 2DC27766-F623-4200-9D64-115E9BFD4A08 twice",
    ),
    ("a region that must be known", |i| (region(i, 2, 0, &ID), region(i, 2, 28, &[1])).0, "region 65707968-7372"),
    ("no BAT", |i| (region(i, 0, 0, &ID), region(i, 0, 28, &[0])).0, "names no BAT region"),
    ("no metadata", |i| (region(i, 1, 0, &ID), region(i, 1, 28, &[0])).0, "names no metadata region"),
    ("region unaligned", |i| region(i, 0, 16, &[0, 16]), "not whole MiB at a whole MiB"),
    ("region past the end", |i| region(i, 0, 24, &(1u32 << 30).to_le_bytes()), "has 1073741824 bytes and runs past"),
    ("region over 2^64", |i| region(i, 1, 16, &(!0u64 << 20).to_le_bytes()), "at byte 18446744073708503040"),
    ("BAT on the metadata", |i| region(i, 0, 16, &(2u64 << 20).to_le_bytes()), "at byte 2097152: its 1048576 bytes lie on"),
    ("metadata on the log", |i| region(i, 1, 16, &(1u64 << 20).to_le_bytes()), "at byte 1048576: its 1048576 bytes lie on"),
    ("BAT on the headers", |i| region(i, 0, 16, &[0; 8]), "at byte 0: its 1048576 bytes lie on"),
    ("BAT too short", |i| put(i, ITEMS_AT + 8, &(64u64 << 40).to_le_bytes()), "too short for the 16793599 entries"),
    ("no room for metadata", |i| region(i, 1, 24, &[0; 4]), "its region has 0 bytes"),
    ("metadata signature", |i| i[METADATA_AT] = 0, "\"metadata\""),
    ("too many items", |i| put(i, METADATA_AT + 10, &2048u16.to_le_bytes()), "metadata table 0 at byte 2097152: has 2048 entries"),
    ("an item that must be known", |i| (item(i, 5, 0, &ID), item(i, 5, 24, &[4])).0, "metadata item 65707968-7372"),
    ("a user's item that must be known", |i| (item(i, 5, 0, &metadata::DISK_SIZE), item(i, 5, 24, &[5])).0, "metadata item 2FA54224-CD1B"),
    ("item on the table", |i| item(i, 1, 16, &[0; 4]), "metadata item 1 at byte 2097152"),
    ("item past the region", |i| item(i, 2, 16, &((1u32 << 20) - 8).to_le_bytes()), "metadata item 2 at byte 3145720"),
    ("item too long", |i| item(i, 3, 20, &[0xff; 4]), "has 4294967295 bytes"),
    (
        "item twice",
        |i| (item(i, 5, 0, &metadata::DISK_ID), item(i, 5, 16, &(2u32 << 16).to_le_bytes()), item(i, 5, 20, &[16])).0,
        "C746 is there twice",
    ),
    ("items on each other", |i| item(i, 2, 16, &(65_536u32 + 4).to_le_bytes()), "lies on another item"),
    ("no size", |i| (item(i, 1, 0, &ID), item(i, 1, 24, &[0])).0, "no virtual disk size"),
    ("no file parameters", |i| (item(i, 0, 0, &ID), item(i, 0, 24, &[0])).0, "no file parameters"),
    ("no id", |i| (item(i, 2, 0, &ID), item(i, 2, 24, &[0])).0, "no virtual disk id"),
    ("item of another length", |i| item(i, 1, 20, &[4]), "the virtual disk size has 4 bytes instead of 8"),
    ("block size 0", |i| put(i, ITEMS_AT, &[0; 4]), "block size of 0 bytes"),
    ("block size 3 MiB", |i| put(i, ITEMS_AT, &(3u32 << 20).to_le_bytes()), "block size of 3145728"),
    ("block size 512 MiB", |i| put(i, ITEMS_AT, &(512u32 << 20).to_le_bytes()), "block size of 536870912"),
    ("parent", |i| put(i, ITEMS_AT + 4, &[2]), "differencing disk"),
    ("parent locator", |i| item(i, 5, 0, &metadata::PARENT_LOCATOR), "differencing disk"),
    ("logical sectors of 520", |i| put(i, ITEMS_AT + 32, &520u32.to_le_bytes()), "logical sector size of 520"),
    ("physical sectors of 0", |i| put(i, ITEMS_AT + 36, &[0; 4]), "physical sector size of 0"),
    ("half a sector", |i| put(i, ITEMS_AT + 8, &[1, 1]), "whole sectors of 512"),
    ("too large", |i| put(i, ITEMS_AT + 8, &((64u64 << 40) + 512).to_le_bytes()), "64 TiB"),
    ("size 2^64", |i| put(i, ITEMS_AT + 8, &(!511u64).to_le_bytes()), "a disk of 18446744073709551104"),
    ("partly in a parent", |i| bat(i, 1, (4 << 20) | 7), "block 1 is partly in a parent"),
    ("reserved state", |i| bat(i, 1, 4), "payload block 1 at byte 0: has the state 4"),
    ("block past the end", |i| bat(i, 0, (1 << 40) | 6), "payload block 0 at byte 1099511627776: runs past"),
    ("block partly past the end", |i| bat(i, 2, (9 << 20) | 6), "payload block 2 at byte 9437184: runs past"),
    ("block at 2^64", |i| bat(i, 0, !0 << 20 | 6), "at byte 18446744073708503040: runs past"),
    ("block on the headers", |i| bat(i, 0, 6), "payload block 0 at byte 0: lies on the header section"),
    ("block on the log", |i| bat(i, 0, (1 << 20) | 6), "payload block 0 at byte 1048576: lies on a region"),
    ("block on the BAT", |i| bat(i, 1, (3 << 20) | 6), "payload block 1 at byte 3145728: lies on a region"),
    ("two blocks, one place", |i| bat(i, 1, (4 << 20) | 6), "payload block 1 at byte 4194304: lies on"),
    ("two blocks, partly one place", |i| bat(i, 1, (7 << 20) | 6), "payload block 1 at byte 7340032: lies on"),
];

const LOGS: &[Case] = &[
    ("no entry", |i| patch_headers(i, 48, &LOG_GUID), "no valid sequence of entries"),
    ("torn entry", |i| (log(i, sector(), |_| ()), i[LOG_AT + 5000] ^= 1).0, "no valid sequence of entries"),
    ("entry of another log", |i| log(i, sector(), |e| e[32] = 0), "no valid sequence of entries"),
    ("sequence number 0", |i| log(i, sector(), |e| e[16] = 0), "no valid sequence of entries"),
    ("tail elsewhere", |i| log(i, sector(), |e| e[13] = 16), "no valid sequence of entries"),
    ("entry length 0", |i| log(i, sector(), |e| e[8..12].fill(0)), "no valid sequence of entries"),
    (
        "entry longer than the log",
        |i| log(i, sector(), |e| e[8..12].copy_from_slice(&(2u32 << 20).to_le_bytes())),
        "no valid sequence of entries",
    ),
    ("more descriptors than room", |i| log(i, sector(), |e| e[24..28].fill(0xff)), "no valid sequence of entries"),
    ("descriptor signature", |i| log(i, sector(), |e| e[64] = b'D'), "neither \"desc\" nor \"zero\""),
    (
        "descriptor of another entry",
        |i| log(i, sector(), |e| e[88] = 9),
        "log descriptor 0 at byte 1048640: has sequence number 9, its entry 5",
    ),
    ("half a sector", |i| log(i, sector(), |e| e[81] = 2), "not whole sectors of 4096"),
    ("zeros of half a sector", |i| log(i, Change::Zeros(4 << 20, 512), |_| ()), "writes 512 bytes at 4194304"),
    ("zeros up to 2^64", |i| log(i, Change::Zeros(4 << 20, !0 << 12), |_| ()), "past 8 EiB"),
    ("over the header", |i| log(i, Change::Zeros(64 << 10, 4096), |_| ()), "bytes at 65536, over the headers or the log itself"),
    ("over the log", |i| log(i, Change::Zeros(0x10_0000 - 4096, 8192), |_| ()), "bytes at 1044480, over the headers or the log itself"),
    ("data sector mark", |i| log(i, sector(), |e| e[4096] = 0), "is not marked \"data\""),
    ("data sector of another entry", |i| log(i, sector(), |e| e[8191] = 7), "log data sector 0 at byte 1052672"),
    ("data sector missing", |i| log(i, sector(), |e| (e.truncate(4096), e[9] = 0x10).1), "past the end of its entry of 4096"),
    ("file cut", |i| log(i, sector(), |e| e[48..56].copy_from_slice(&(1u64 << 40).to_le_bytes())), "the file was cut"),
    ("file of 2^64", |i| log(i, sector(), |e| e[56..64].fill(0xff)), "says that the file ends at 18446744073709551615"),
    ("file of 0", |i| log(i, sector(), |e| e[56..64].fill(0)), "says that the file ends at 0"),
    (
        "region tables wiped",
        |i| log(i, Change::Zeros(192 << 10, 256 << 10), |_| ()),
        "region table 0 at byte 196608: it does not start with",
    ),
    ("BAT wrong after the replay", |i| log(i, Change::Sector(BAT_AT as u64, vec![0xfe; 4096]), |_| ()), "payload block 0"),
    ("log of 65 MiB", |i| (long_log(i, 65 << 20), ()).1, "68157440 bytes that is to be replayed is not built"),
    (
        "entries on entries",
        |i| {
            log(i, sector(), |e| e[8..12].copy_from_slice(&(1u32 << 20).to_le_bytes()));
            let head = i[LOG_AT..LOG_AT + 64].to_vec();
            (0..256).for_each(|n| put(i, LOG_AT + n * 4096, &head));
        },
        "claim the same bytes",
    ),
    (
        "a long log without a tail",
        |i| {
            let at = long_log(i, 64 << 20);
            for n in 0..16_384u64 {
                let entry = LogEntry { sequence: n + 1, tail: 1, flushed: 0, last: 1 << 20, changes: Vec::new() };
                put(i, at + n as usize * 4096, &entry.bytes());
            }
        },
        "no valid sequence of entries",
    ),
    (
        "too many places",
        |i| {
            let at = long_log(i, 5 << 20);
            let changes = (0..140_000).map(|n| Change::Zeros((32 << 20) + n * 8192, 4096)).collect();
            let entry = LogEntry { sequence: 1, tail: 0, flushed: 0, last: 64 << 20, changes };
            put(i, at, &entry.bytes());
        },
        "more than 131072 places",
    ),
];

#[test]
fn hostile_images_are_refused_in_words_and_at_once() {
    let dir = Dir::new("hostile");
    let (good, data) = small(&dir);
    assert!(read_all(&open(&dir.path("small")).unwrap()) == data);
    let mut slowest = (Duration::ZERO, "");
    for (name, alter, words) in STRUCTURE.iter().chain(LOGS) {
        let mut image = good.clone();
        alter(&mut image);
        assert!(image != good, "{name} alters nothing");
        std::fs::write(dir.path("h.vhdx"), &image).unwrap();
        let started = Instant::now();
        let error = open(&dir.path("h.vhdx")).map(|_| ()).expect_err(name).to_string();
        assert!(error.contains(words), "{name}: {error}");
        slowest = slowest.max((started.elapsed(), *name));
    }
    println!("hostile: {} cases, slowest {slowest:?}", STRUCTURE.len() + LOGS.len());
    assert!(slowest.0 < Duration::from_secs(1), "{slowest:?}");
}

/// What looks wrong, but is not: each alteration leaves an image that reads as before.
const HARMLESS: &[(&str, Alter)] = &[
    ("first header lost", |i| i[HEADER_AT[0]] = 0),
    ("second header lost", |i| i[HEADER_AT[1] + 9] ^= 1),
    ("identical headers", |i| patch_headers(i, 8, &[7])),
    ("first region table lost", |i| i[TABLE_AT[0]] = 0),
    ("second region table lost", |i| i[TABLE_AT[1] + 50] ^= 1),
    ("an unknown region that need not be known", |i| region(i, 2, 0, &ID)),
    ("an unknown item that need not be known", |i| item(i, 5, 0, &ID)),
    ("garbage in a sector bitmap entry", |i| put(i, BAT_AT + 1024 * 8, &[0xff; 8])),
    ("logical sectors of 4096", |i| put(i, ITEMS_AT + 32, &4096u32.to_le_bytes())),
    ("physical sectors of 512", |i| put(i, ITEMS_AT + 36, &512u32.to_le_bytes())),
    ("a block of zeros", |i| bat(i, 1, 2)),
    ("an undefined block", |i| bat(i, 1, 1)),
    ("an unmapped block that keeps its place", |i| bat(i, 1, (8 << 20) | 3)),
    ("an unmapped block of the draft", |i| bat(i, 1, 5)),
    ("a log version without a log", |i| patch_headers(i, 64, &[1])),
    ("no log at all", |i| (patch_headers(i, 68, &[0; 4]), patch_headers(i, 72, &[0; 8])).0),
];

#[test]
fn what_only_looks_wrong_is_read() {
    let dir = Dir::new("harmless");
    let (good, data) = small(&dir);
    for (name, alter) in HARMLESS {
        let mut image = good.clone();
        alter(&mut image);
        assert!(image != good, "{name} alters nothing");
        std::fs::write(dir.path("h.vhdx"), &image).unwrap();
        let reader = open(&dir.path("h.vhdx")).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(read_all(&reader) == data, "{name}");
    }
}

#[test]
fn random_damage_behind_good_checksums_never_panics_and_never_takes_long() {
    let dir = Dir::new("damage");
    let (clean, _) = small(&dir);
    let mut dirty = clean.clone();
    let changes = vec![sector(), Change::Zeros(5 << 20, 1 << 20), Change::Sector(BAT_AT as u64, clean[BAT_AT..][..4096].to_vec())];
    let entry = LogEntry { sequence: 5, tail: 0, flushed: 4 << 20, last: 12 << 20, changes }.bytes();
    patch_headers(&mut dirty, 48, &LOG_GUID);
    put_log(&mut dirty, 0, &entry);
    let front = 4 << 20;
    let file = dir.create("d.vhdx");
    file.write_all_at(&clean, 0).unwrap();
    let mut next = noise(4711);
    let (mut read, mut refused) = (0, 0);
    for round in 0..3000 {
        let mut image = if round % 2 == 0 { clean[..front].to_vec() } else { dirty[..front].to_vec() };
        for _ in 0..next() % 3 + 1 {
            let (at, len) =
                [(HEADER_AT[1], 80), (TABLE_AT[0], 80), (METADATA_AT, 192), (ITEMS_AT, 40), (BAT_AT, 24), (LOG_AT, entry.len().min(160))]
                    [(next() % 6) as usize];
            let width = [1, 2, 4, 8][(next() % 4) as usize];
            let value = [0, u64::MAX, next(), 1 << (next() % 64), next() % 64, !(4095 << (next() % 52))][(next() % 6) as usize];
            put(&mut image, at + (next() % len as u64) as usize, &value.to_le_bytes()[..width]);
        }
        for at in HEADER_AT {
            reseal(&mut image, at, 4096);
        }
        let table = image[TABLE_AT[0]..][..64 << 10].to_vec();
        put(&mut image, TABLE_AT[1], &table);
        for at in TABLE_AT {
            reseal(&mut image, at, 64 << 10);
        }
        reseal(&mut image, LOG_AT, entry.len());
        file.write_all_at(&image, 0).unwrap();
        let started = Instant::now();
        let Ok(reader) = open(&dir.path("d.vhdx")) else {
            refused += 1;
            continue;
        };
        let mut buf = vec![0; 1 << 20];
        for extent in reader.extents(0, 1 << 40).unwrap().iter().take(8) {
            let len = extent.len.min(buf.len() as u64) as usize;
            reader.read_at(extent.offset, &mut buf[..len], &mut Scratch::default()).unwrap();
        }
        let _ = reader.read_at(reader.capacity().saturating_sub(512), &mut buf[..512], &mut Scratch::default());
        assert!(started.elapsed() < Duration::from_secs(2), "round {round}: {:?}", started.elapsed());
        read += 1;
    }
    println!("damage: {refused} refused, {read} read");
    assert!(refused > 1000 && read > 100, "{refused} refused, {read} read");
}

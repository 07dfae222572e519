//! Snapshots of qemu-img's making read as `qemu-img convert -l` reads them; tables and backing names that want something are refused.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

use std::fs::File;
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use super::super::super::chain::{Chain, Link};
use super::super::super::disk::{Disk, Scratch};
use super::super::super::raw;
use super::super::{OFFSET_MASK, Reader};
use super::*;

/// Room for the L1 tables of all these images.
const ROOM: u64 = 1 << 20;

/// A folder that goes when the test ends.
struct Dir(PathBuf);

impl Dir {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("hypersdk-snapshots-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn run(&self, program: &str, args: &[&str]) -> String {
        let out = Command::new(program).args(args).current_dir(&self.0).output().expect("these tests need qemu-utils");
        assert!(out.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8_lossy(&out.stdout).into_owned()
    }

    fn put(&self, name: &str, bytes: &[u8]) -> Window {
        std::fs::write(self.0.join(name), bytes).unwrap();
        self.window(name)
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.0.join(name)).unwrap()
    }

    fn window(&self, name: &str) -> Window {
        Window::whole(File::open(self.0.join(name)).unwrap()).unwrap()
    }

    /// The disk at a snapshot, as qemu-img has it.
    fn at(&self, which: &str) -> Vec<u8> {
        self.run("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", "-l", which, "a.qcow2", "s.raw"]);
        self.bytes("s.raw")
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn whole(disk: &dyn Disk) -> Vec<u8> {
    let mut scratch = Scratch::default();
    let mut data = vec![0u8; disk.capacity() as usize];
    for extent in disk.extents(0, u64::MAX).unwrap() {
        disk.read_at(extent.offset, &mut data[extent.offset as usize..][..extent.len as usize], &mut scratch).unwrap();
    }
    let mut again = vec![1u8; data.len()];
    disk.read_at(0, &mut again, &mut scratch).unwrap();
    assert!(data == again, "what no extent covers is not zero");
    data
}

/// An image `a.qcow2` of 8 MiB with the snapshots `one`, `two words` and `three`, and something else after them.
fn with_three(dir: &Dir, options: &str) {
    dir.run("qemu-img", &["create", "-f", "qcow2", "-o", options, "a.qcow2", "8M"]);
    let steps = [
        ("one", vec!["write -P 1 0 300k", "write -P 2 4M 1M"]),
        ("two words", vec!["write -P 3 100k 64k", "write -z 4200k 256k", "write -P 4 7M 512"]),
        ("three", vec!["discard 0 128k", "write -z -u 4M 64k", "write -P 5 5000k 700k"]),
    ];
    let io = |commands: &[&str]| {
        let mut args = vec!["-f", "qcow2"];
        args.extend(commands.iter().flat_map(|command| ["-c", *command]));
        args.push("a.qcow2");
        dir.run("qemu-io", &args);
    };
    // Version 2 has no zero clusters: qemu writes zeros or drops the cluster.
    for (name, commands) in &steps {
        io(commands);
        dir.run("qemu-img", &["snapshot", "-c", name, "a.qcow2"]);
    }
    io(&["write -P 6 0 8M"]);
}

#[test]
fn each_snapshot_reads_as_qemu_reads_it() {
    let dir = Dir::new("read");
    for options in ["cluster_size=64k", "cluster_size=512", "cluster_size=2M", "compat=0.10"] {
        with_three(&dir, options);
        let reader = Reader::open(dir.window("a.qcow2")).unwrap();
        assert!(whole(&reader).iter().all(|b| *b == 6), "{options}: the present state");
        let found = reader.snapshots().unwrap();
        assert_eq!(
            found.iter().map(|s| (s.id.as_str(), s.name.as_str())).collect::<Vec<_>>(),
            [("1", "one"), ("2", "two words"), ("3", "three")]
        );
        let info = dir.run("qemu-img", &["info", "--output=json", "a.qcow2"]);
        for snapshot in &found {
            assert_eq!((snapshot.capacity, snapshot.vm_state_bytes), (8 << 20, 0));
            let since = snapshot.created_at.duration_since(SystemTime::UNIX_EPOCH).unwrap();
            assert!(info.contains(&format!("\"date-sec\": {}", since.as_secs())), "{info}");
            assert!(info.contains(&format!("\"date-nsec\": {}", since.subsec_nanos())), "{info}");
            let expected = dir.at(&format!("snapshot.name={}", snapshot.name));
            assert!(expected == dir.at(&format!("snapshot.id={}", snapshot.id)));
            for which in [&snapshot.id, &snapshot.name] {
                let disk = Reader::open_snapshot(dir.window("a.qcow2"), which).unwrap_or_else(|e| panic!("{options} {which}: {e}"));
                assert!(whole(&disk) == expected, "{options}: snapshot {which} reads differently");
            }
        }
    }
}

#[test]
fn a_snapshot_keeps_the_size_that_the_disk_had() {
    let dir = Dir::new("size");
    dir.run("qemu-img", &["create", "-f", "qcow2", "a.qcow2", "3M"]);
    dir.run("qemu-io", &["-f", "qcow2", "-c", "write -P 1 0 3M", "a.qcow2"]);
    dir.run("qemu-img", &["snapshot", "-c", "small", "a.qcow2"]);
    dir.run("qemu-img", &["resize", "-f", "qcow2", "a.qcow2", "2G"]);
    dir.run("qemu-img", &["snapshot", "-c", "large", "a.qcow2"]);
    let small = Reader::open_snapshot(dir.window("a.qcow2"), "small").unwrap();
    assert!(whole(&small) == vec![1u8; 3 << 20]);
    let large = Reader::open_snapshot(dir.window("a.qcow2"), "large").unwrap();
    assert_eq!((large.capacity(), large.extents(0, u64::MAX).unwrap().len()), (2 << 30, 1));
}

#[test]
fn a_snapshot_of_an_image_with_a_backing_file() {
    let dir = Dir::new("backing");
    dir.put("base.raw", &(0..8u32 << 20).map(|i| (i >> 16) as u8 + 1).collect::<Vec<u8>>());
    dir.run("qemu-img", &["create", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "a.qcow2"]);
    dir.run("qemu-io", &["-f", "qcow2", "-c", "write -P 200 1M 100k", "-c", "write -z 3M 300k", "a.qcow2"]);
    dir.run("qemu-img", &["snapshot", "-c", "s", "a.qcow2"]);
    dir.run("qemu-io", &["-f", "qcow2", "-c", "write -P 201 0 8M", "a.qcow2"]);
    let refused = Reader::open_snapshot(dir.window("a.qcow2"), "s").unwrap_err().to_string();
    assert!(refused.contains("backing file"), "{refused}");
    let layer = Reader::open_layer(dir.window("a.qcow2"), Some("s"), ROOM).unwrap();
    let backing = layer.header().backing.clone().unwrap();
    assert_eq!((backing.name.as_str(), backing.format.as_deref()), ("base.raw", Some("raw")));
    let mut chain = Chain::new(Link { name: "a.qcow2".to_owned(), layer: std::sync::Arc::new(layer) }).unwrap();
    let base = raw::Reader::open(dir.window("base.raw")).unwrap();
    chain.push(Link { name: "base.raw".to_owned(), layer: std::sync::Arc::new(base) }).unwrap();
    assert!(whole(&chain) == dir.at("snapshot.name=s"));
}

#[test]
fn the_saved_memory_of_a_vm_is_counted_and_old_entries_without_extra_data_are_read() {
    let dir = Dir::new("state");
    with_three(&dir, "cluster_size=64k");
    let mut bytes = dir.bytes("a.qcow2");
    let table = u64_at(&bytes, 64) as usize;
    bytes[table + 32..table + 36].copy_from_slice(&77u32.to_be_bytes());
    bytes[table + 40..table + 48].copy_from_slice(&(5u64 << 32).to_be_bytes());
    let list = |bytes: &[u8]| Reader::open(dir.put("b.qcow2", bytes)).unwrap().snapshots().unwrap();
    assert_eq!(list(&bytes)[0].vm_state_bytes, 5 << 32);
    // An entry of the first kind: 40 bytes, id and name.
    let end = u64_at(&bytes, 64) as usize + 40;
    bytes[table + 36..table + 40].fill(0);
    bytes[end..end + 8].copy_from_slice(b"1one\0\0\0\0");
    bytes[60..64].copy_from_slice(&1u32.to_be_bytes());
    let only = &list(&bytes)[0];
    assert_eq!((only.id.as_str(), only.name.as_str(), only.vm_state_bytes, only.capacity), ("1", "one", 77, 8 << 20));
    let disk = Reader::open_snapshot(dir.window("b.qcow2"), "one").unwrap();
    assert!(whole(&disk) == dir.at("snapshot.name=one"));
}

/// What to write where, and the words of the refusal.
type Case = (&'static str, Vec<(u64, Vec<u8>)>, &'static str);

#[test]
fn hostile_snapshot_tables_are_refused_in_words_and_at_once() {
    let dir = Dir::new("hostile");
    with_three(&dir, "cluster_size=64k");
    let good = dir.bytes("a.qcow2");
    let number = |at: u64| u64_at(&good, at as usize);
    let (table, active, reftable) = (number(64), number(40), number(48));
    let l1 = number(table);
    let l2 = number(l1) & OFFSET_MASK;
    let cluster = number(l2) & OFFSET_MASK;
    let second = table + (40 + u64::from(u32_at(&good, table as usize + 36)) + 4u64).next_multiple_of(8);
    assert_eq!(&good[second as usize + 64..][..3], b"2tw", "the second entry is where the first one ends");
    let be = |value: u64| value.to_be_bytes().to_vec();
    let be32 = |value: u32| value.to_be_bytes().to_vec();
    let be16 = |value: u16| value.to_be_bytes().to_vec();
    let end = good.len() as u64;
    let cases: Vec<Case> = vec![
        ("too many", vec![(60, be32(65_537))], "65537 internal snapshots"),
        ("table unaligned", vec![(64, be(table + 8))], "snapshot table 0"),
        ("table away", vec![(64, be(1 << 50))], "snapshot table 0"),
        ("table on the header", vec![(64, be(0))], "snapshot table 0"),
        ("more than there are", vec![(60, be32(4))], "no snapshot"),
        ("extra data", vec![(table + 36, be32(1025))], "extra data of 1025 bytes"),
        ("extra data past all", vec![(table + 36, be32(u32::MAX))], "extra data of 4294967295 bytes"),
        ("id", vec![(table + 12, be16(128))], "an id of 128 bytes"),
        ("name", vec![(second + 14, be16(256))], "a name of 256 bytes"),
        ("table at the end", vec![(64, be(end)), (end + 36, be32(1024)), (end + 116, be32(0))], "1064 bytes run past the file's end"),
        ("disk of 2^64", vec![(table + 48, be(u64::MAX))], "a disk of 18446744073709551615 bytes"),
        ("disk of 2^63", vec![(table + 48, be(1 << 63))], "a disk of 9223372036854775808 bytes"),
        ("disk over its L1", vec![(table + 48, be(1 << 40))], "1 entries for a disk of 1099511627776 bytes"),
        ("L1 unaligned", vec![(table, be(l1 + 512))], "snapshot's L1 table"),
        ("L1 nowhere", vec![(table, be(0))], "snapshot's L1 table"),
        ("L1 past the end", vec![(table, be(1 << 50))], "past the file's end"),
        ("L1 past all", vec![(table, be(!0xffff))], "past the file's end"),
        ("L1 of 2^32 entries", vec![(table + 8, be32(u32::MAX))], "34359738360 bytes run past"),
        ("no L1", vec![(table + 8, be32(0))], "0 entries for a disk"),
        ("L1 is the active one", vec![(table, be(active))], "L1 table of the present state 0"),
        ("L1 is the snapshot table", vec![(table, be(table))], "snapshot table 0"),
        ("L1 is the refcount table", vec![(table, be(reftable))], "refcount table 0"),
        ("L2 unaligned", vec![(l1, be(l2 + 512))], "L2 table 0 at byte"),
        ("L2 past the end", vec![(l1, be(1 << 50))], "L2 table 0 at byte 1125899906842624"),
        ("L2 is the active L1", vec![(l1, be(active))], "L2 table 0"),
        ("L2 is its own L1", vec![(l1, be(l1))], "L2 table 0"),
        ("cluster past the end", vec![(l2, be(1 << 50))], "cluster 0 at byte 1125899906842624"),
        ("cluster is the snapshot table", vec![(l2, be(table))], "already in use"),
        ("cluster is the active L1", vec![(l2, be(active))], "already in use"),
        ("one cluster twice", vec![(l2 + 8, be(cluster))], "cluster 1 at byte"),
        ("compressed past the end", vec![(l2, be(1 << 62 | 1 << 50))], "compressed cluster 0"),
        ("two of a name", vec![(second + 64 + 1, b"one".to_vec()), (second + 14, be16(3))], "it has 2 snapshots \"one\""),
        ("two of an id", vec![(second + 64, b"1".to_vec())], "it has 2 snapshots \"1\""),
    ];
    assert!(cases.len() >= 30);
    for (name, changes, words) in cases {
        let mut bytes = good.clone();
        for (at, new) in changes {
            let to = at as usize + new.len();
            bytes.resize(bytes.len().max(to), 0);
            bytes[at as usize..to].copy_from_slice(&new);
        }
        let window = dir.put("h.qcow2", &bytes);
        let started = Instant::now();
        let which = match name {
            "two of an id" => "1",
            "more than there are" => "none such",
            _ => "one",
        };
        let said = match Reader::open_snapshot(window, which) {
            Ok(_) => panic!("{name} was opened"),
            Err(e) => e.to_string(),
        };
        assert!(said.contains(words), "{name}: {said}");
        assert!(started.elapsed().as_millis() < 500, "{name} took {:?}", started.elapsed());
    }
    let said = Reader::open_snapshot(dir.put("h.qcow2", &good), "four").unwrap_err().to_string();
    assert!(said.contains("no snapshot \"four\"; it has \"one\" (id \"1\"), \"two words\" (id \"2\"), \"three\" (id \"3\")"), "{said}");
    dir.run("qemu-img", &["create", "-f", "qcow2", "n.qcow2", "1M"]);
    let said = Reader::open_snapshot(dir.window("n.qcow2"), "").unwrap_err().to_string();
    assert!(said.contains("it has none"), "{said}");
    assert!(Reader::open(dir.window("n.qcow2")).unwrap().snapshots().unwrap().is_empty());
}

#[test]
fn a_table_of_many_snapshots_is_bounded() {
    let dir = Dir::new("many");
    dir.run("qemu-img", &["create", "-f", "qcow2", "a.qcow2", "1M"]);
    let mut bytes = dir.bytes("a.qcow2");
    let at = bytes.len().next_multiple_of(65_536);
    bytes.resize(at, 0);
    bytes[60..64].copy_from_slice(&65_536u32.to_be_bytes());
    bytes[64..72].copy_from_slice(&(at as u64).to_be_bytes());
    for (name_len, fits) in [(20u16, true), (255, false)] {
        let mut table = Vec::new();
        for k in 0..65_536u32 {
            let mut entry = [0u8; 40];
            entry[12..14].copy_from_slice(&5u16.to_be_bytes());
            entry[14..16].copy_from_slice(&name_len.to_be_bytes());
            table.extend_from_slice(&entry);
            table.extend_from_slice(format!("{k:5}").as_bytes());
            table.extend(std::iter::repeat_n(0xffu8, usize::from(name_len)));
            table.resize(table.len().next_multiple_of(8), 0);
        }
        let reader = Reader::open(dir.put("b.qcow2", &[&bytes[..], &table].concat())).unwrap();
        let started = Instant::now();
        match reader.snapshots() {
            Ok(found) => assert!(fits && found.len() == 65_536 && found[7].name.chars().all(|c| c == '\u{fffd}')),
            Err(e) => assert!(!fits && e.to_string().contains("snapshot table of over 8388608 bytes"), "{e}"),
        }
        assert!(started.elapsed().as_millis() < 1000, "{:?}", started.elapsed());
    }
}

#[test]
fn backing_names_that_want_something_are_refused() {
    let dir = Dir::new("names");
    dir.put("base.raw", &[7; 1 << 20]);
    dir.run("qemu-img", &["create", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "a.qcow2"]);
    let good = dir.bytes("a.qcow2");
    assert!(Reader::open_layer(dir.window("a.qcow2"), None, ROOM).is_ok());
    let said = Reader::open_layer(dir.window("a.qcow2"), None, 7).unwrap_err().to_string();
    assert!(said.contains("its L1 table takes over the 7 bytes that are left"), "{said}");
    let (offset, header) = (u64_at(&good, 8), u64::from(u32_at(&good, 100)));
    let be = |value: u64| value.to_be_bytes().to_vec();
    let be32 = |value: u32| value.to_be_bytes().to_vec();
    let padding: Vec<u8> = (0..65).flat_map(|k| [be32(1000 + k), be32(0)].concat()).collect();
    let cases: Vec<Case> = vec![
        ("empty", vec![(16, be32(0))], "0 bytes long; 1 to 1023"),
        ("long", vec![(16, be32(1024))], "1024 bytes long"),
        ("very long", vec![(16, be32(u32::MAX))], "4294967295 bytes long"),
        ("nowhere", vec![(8, be(0))], "at byte 0: its 8 bytes do not lie behind the header"),
        ("in the header", vec![(8, be(header - 1))], "do not lie behind the header"),
        ("behind the first cluster", vec![(8, be(65_530))], "inside the first cluster"),
        ("past all", vec![(8, be(u64::MAX - 3))], "inside the first cluster"),
        ("not UTF-8", vec![(offset, vec![0xff])], "is not UTF-8"),
        ("extension runs on", vec![(header + 4, be32(60_000))], "run into the backing file's name"),
        ("extension of 4 GiB", vec![(header + 4, be32(u32::MAX))], "its 4294967295 bytes run into"),
        ("long format", vec![(header, be32(0xe279_2aca)), (header + 4, be32(17))], "a format's name of 17 bytes"),
        ("many extensions", vec![(header, padding), (8, be(4096)), (4096, b"base.raw".to_vec())], "over 64 extensions"),
    ];
    for (name, changes, words) in cases {
        let mut bytes = good.clone();
        for (at, new) in changes {
            bytes[at as usize..at as usize + new.len()].copy_from_slice(&new);
        }
        let said =
            Reader::open_layer(dir.put("h.qcow2", &bytes), None, ROOM).err().unwrap_or_else(|| panic!("{name} was opened")).to_string();
        assert!(said.contains(words), "{name}: {said}");
        assert!(Reader::open(dir.window("h.qcow2")).unwrap_err().to_string().contains("backing file"), "{name}: refused on its own");
    }
}

#[test]
fn any_changed_byte_gives_an_answer_and_not_a_panic() {
    let dir = Dir::new("noise");
    with_three(&dir, "cluster_size=4k");
    let good = dir.bytes("a.qcow2");
    let (table, active) = (u64_at(&good, 64) as usize, u64_at(&good, 40) as usize);
    let mut state = 88_172_645_463_325_252u64;
    let mut next = |end: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % end as u64) as usize
    };
    let (mut opened, mut buf) = (0, vec![0u8; 8 << 20]);
    for _ in 0..150 {
        let mut bytes = good.clone();
        for _ in 0..1 + next(4) {
            let at = [next(112), table + next(300), active + next(64), u64_at(&good, table) as usize + next(64)][next(4)];
            bytes[at] = next(256) as u8;
        }
        let window = dir.put("n.qcow2", &bytes);
        let _ = Reader::open_layer(window.clone(), None, ROOM).map(|reader| reader.snapshots());
        let Ok(reader) = Reader::open_snapshot(window, "one") else { continue };
        opened += 1;
        let len = reader.capacity().min(buf.len() as u64) as usize;
        let _ = reader.extents(0, 1 << 30);
        let _ = reader.covered(0, 1 << 30);
        let _ = reader.read_at(0, &mut buf[..len], &mut Scratch::default());
    }
    assert!(opened > 10, "only {opened} of 150 were opened");
}

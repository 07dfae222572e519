//! What mkfs.xfs made, and what somebody has changed in it.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::super::tests::{Folder, run};
use super::super::volume::Blocks;
use super::super::volume::tests::{volume, wide};
use super::*;
use crate::formats::{Disk, Extent as Run, Result, Scratch};

/// Bytes of which some are others, so that nothing large is copied.
struct Changed {
    good: Arc<Vec<u8>>,
    changes: BTreeMap<usize, u8>,
}

impl Disk for Changed {
    fn format(&self) -> &'static str {
        "raw"
    }

    fn capacity(&self) -> u64 {
        self.good.len() as u64
    }

    fn extents(&self, from: u64, to: u64) -> Result<Vec<Run>> {
        Ok(vec![Run { offset: from, len: to - from }])
    }

    fn read_at(&self, offset: u64, buf: &mut [u8], _: &mut Scratch) -> Result<()> {
        let from = offset as usize;
        buf.copy_from_slice(&self.good[from..from + buf.len()]);
        for (at, byte) in self.changes.range(from..from + buf.len()) {
            buf[at - from] = *byte;
        }
        Ok(())
    }
}

/// A file of some blocks.
fn content() -> Vec<u8> {
    (0..200_000u32).map(|n| (n * 7 + n / 251) as u8).collect()
}

/// 320 MiB with folders of each form: `short`, `block`, `leaf`, and `node` of 3,000 names; a file and links to it.
fn image(options: &[&str]) -> Vec<u8> {
    let folder = Folder::new();
    let path = |name: &str| folder.path().join(name).display().to_string();
    std::fs::write(path("content"), content()).unwrap();
    std::fs::write(path("empty"), b"").unwrap();
    let mut proto = "/x\n0 0\nd--755 0 0\n".to_owned();
    for (name, count) in [("short", 3), ("block", 40), ("leaf", 300), ("node", 3000)] {
        proto += &format!("{name} d--755 0 0\n");
        for n in 0..count {
            proto += &format!("a-file-with-a-name-{n} ---644 0 0 {}\n", path("empty"));
        }
        proto += "$\n";
    }
    proto += &format!("boot d--755 0 0\nkernel ---644 0 0 {}\nto l--777 0 0 /lib/kernel\n$\n", path("content"));
    proto += &format!("lib l--777 0 0 ./{}boot\nring l--777 0 0 ring\n$\n", "boot/../".repeat(40));
    std::fs::write(path("proto"), proto).unwrap();
    let image = path("image");
    std::fs::File::create(&image).unwrap().set_len(320 << 20).unwrap();
    run("mkfs.xfs", &[&["-q", "-f", "-p", &path("proto")], options, &[&image]].concat(), "");
    std::fs::read(&image).unwrap()
}

fn read(xfs: &Xfs, path: &str) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    xfs.open(path)?.reader.take(8 << 20).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[test]
fn folders_of_each_form_and_files_are_read() {
    for options in [&["-m", "crc=1"][..], &["-m", "crc=0", "-n", "ftype=0"], &["-b", "size=1024", "-n", "size=8192"]] {
        let xfs = Xfs::open(&volume(image(options))).unwrap();
        let mut root = xfs.list("/").unwrap();
        root.sort_by(|a, b| a.name.cmp(&b.name));
        let told: Vec<_> = root.iter().map(|entry| (entry.name.as_str(), entry.is_dir)).collect();
        let wanted = [("block", true), ("boot", true), ("leaf", true), ("lib", false), ("node", true), ("ring", false), ("short", true)];
        assert_eq!(told, wanted, "{options:?}");
        for (name, count) in [("short", 3), ("block", 40), ("leaf", 300), ("node", 3000)] {
            let names = xfs.list(&format!("/{name}")).unwrap();
            assert_eq!((names.len(), names[count - 1].is_dir), (count, false), "{name} {options:?}");
            assert!(read(&xfs, &format!("/{name}/a-file-with-a-name-{}", count - 1)).unwrap().is_empty());
        }
        for path in ["/boot/kernel", "/lib/kernel", "/lib/to", "/boot/../lib/to"] {
            assert!(read(&xfs, path).unwrap() == content(), "{path} {options:?}");
        }
        for path in ["/ring", "/boot", "/nothing", "/boot/kernel/x"] {
            assert!(read(&xfs, path).is_err(), "{path}");
        }
    }
}

/// The extents of a file in a tree of two levels, as a fragmented file has them.
#[test]
fn extents_in_a_tree_are_read_and_rings_end() {
    let mut bytes = image(&["-m", "crc=1"]);
    let xfs = Xfs::open(&volume(bytes.clone())).unwrap();
    let boot = xfs.names(&xfs.inode(xfs.root).unwrap()).unwrap().into_iter().find(|name| name.name == "boot").unwrap();
    let kernel = xfs.names(&xfs.inode(boot.inode).unwrap()).unwrap().into_iter().find(|name| name.name == "kernel").unwrap();
    let inode = xfs.inode(kernel.inode).unwrap();
    let count = usize::try_from(inode.extents).unwrap();
    let records = inode.fork[..count * 16].to_vec();
    // Two blocks near the end of the last group, which nobody uses.
    let last = (xfs.groups - 1) << xfs.group_bits;
    let numbers = [last + xfs.group_blocks - 9, last + xfs.group_blocks - 8];
    let places = numbers.map(|number| usize::try_from(xfs.place(number).unwrap()).unwrap());
    let mut node = |place: usize, level: u16, numrecs: u16| {
        bytes[place..place + 4096].fill(0);
        bytes[place..place + 4].copy_from_slice(b"BMA3");
        bytes[place + 4..place + 6].copy_from_slice(&level.to_be_bytes());
        bytes[place + 6..place + 8].copy_from_slice(&numrecs.to_be_bytes());
    };
    node(places[0], 1, 1);
    node(places[1], 0, u16::try_from(count).unwrap());
    let pointer = places[0] + 72 + (4096 - 72) / 16 * 8;
    bytes[pointer..pointer + 8].copy_from_slice(&numbers[1].to_be_bytes());
    bytes[places[1] + 72..places[1] + 72 + records.len()].copy_from_slice(&records);
    let at = xfs.place(kernel.inode >> xfs.place_bits).unwrap() + (kernel.inode & ((1 << xfs.place_bits) - 1)) * xfs.inode;
    let at = usize::try_from(at).unwrap();
    bytes[at + 5] = 3;
    let fork = at + 176;
    let room = (inode.fork.len() - 4) / 16;
    bytes[fork..fork + inode.fork.len()].fill(0);
    bytes[fork..fork + 4].copy_from_slice(&[0, 2, 0, 1]);
    bytes[fork + 4 + room * 8..fork + 12 + room * 8].copy_from_slice(&numbers[0].to_be_bytes());
    let tree = Xfs::open(&volume(bytes.clone())).unwrap();
    assert!(read(&tree, "/boot/kernel").unwrap() == content());
    // A node that points to itself: its level is not the one below.
    bytes[pointer..pointer + 8].copy_from_slice(&numbers[0].to_be_bytes());
    let ring = Xfs::open(&volume(bytes)).unwrap();
    assert!(read(&ring, "/boot/kernel").is_err());
}

#[test]
fn an_xfs_that_lies_ends() {
    let good = Arc::new(image(&["-m", "crc=1"]));
    let used: Vec<usize> = (0..160 << 10).filter(|at| good[*at] != 0).collect();
    let (mut state, mut read_all) = (0x9e37_79b9_7f4a_7c15u64, 0);
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        usize::try_from(state >> 1).unwrap()
    };
    for round in 0..300 {
        let changes = (0..1 << (round % 12)).map(|_| (used[random() % used.len()], random() as u8)).collect();
        let disk: Arc<dyn Disk> = Arc::new(Changed { good: good.clone(), changes });
        if let Ok(xfs) = Xfs::open(&Volume::disk(&Blocks::new(&[disk], wide()), 0).unwrap()) {
            for folder in ["/", "/short", "/block", "/leaf", "/node", "/lib"] {
                let _ = xfs.list(folder);
            }
            read_all += usize::from(read(&xfs, "/lib/to").is_ok_and(|bytes| bytes == content()));
        }
    }
    println!("300 damaged file systems: the file was read from {read_all} all the same");
    assert!((1..300).contains(&read_all), "{read_all}");
}

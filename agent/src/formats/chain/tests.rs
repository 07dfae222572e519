//! Chains of qemu-img's making read as qemu-img reads them; what a layer hides stays hidden.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;

use super::*;
use crate::formats::Window;

/// A directory that goes with the test.
struct Dir(PathBuf);

impl Dir {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("hypersdk-chain-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn window(&self, name: &str) -> Window {
        Window::whole(File::open(self.path(name)).unwrap()).unwrap()
    }

    fn run(&self, program: &str, args: &[&str]) {
        let out = Command::new(program).args(args).current_dir(&self.0).output().expect("these tests need qemu-utils");
        assert!(out.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&out.stderr));
    }

    fn raw(&self, name: &str, data: &[u8]) -> Link {
        std::fs::write(self.path(name), data).unwrap();
        link(name, raw::Reader::open(self.window(name)).unwrap())
    }

    fn qcow2(&self, name: &str) -> Link {
        link(name, qcow2::Reader::open_layer(self.window(name), None, MAX_TABLE_BYTES).unwrap())
    }

    fn vmdk(&self, name: &str) -> Link {
        let image = vmdk::open_layer(self.window(name), &|extent| Window::whole(File::open(self.path(extent))?));
        link(name, image.unwrap())
    }

    /// What qemu-img makes of the image with everything beneath it.
    fn flattened(&self, format: &str, name: &str) -> Vec<u8> {
        self.run("qemu-img", &["convert", "-f", format, "-O", "raw", name, "flat.raw"]);
        std::fs::read(self.path("flat.raw")).unwrap()
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn link(name: &str, layer: impl Layer + 'static) -> Link {
    Link { name: name.to_owned(), layer: Arc::new(layer) }
}

fn chain(links: impl IntoIterator<Item = Link>) -> Chain {
    let mut links = links.into_iter();
    let mut chain = Chain::new(links.next().unwrap()).unwrap();
    links.for_each(|link| chain.push(link).unwrap());
    chain
}

/// xorshift64*: the same numbers in every run.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) % end
    }
}

/// The disk is these bytes, in whatever pieces it is read; outside of its extents they are zero.
fn assert_is(disk: &dyn Disk, expected: &[u8], what: &str) {
    assert_eq!(disk.capacity(), expected.len() as u64, "{what}");
    let mut scratch = Scratch::default();
    let mut whole = vec![0xaa; expected.len()];
    disk.read_at(0, &mut whole, &mut scratch).unwrap();
    assert!(whole == expected, "{what}: differs at {:?}", whole.iter().zip(expected).position(|(a, b)| a != b));
    let extents = disk.extents(0, u64::MAX).unwrap();
    assert!(extents.windows(2).all(|pair| pair[0].offset + pair[0].len < pair[1].offset), "{what}: sorted and merged");
    let mut rest = expected.to_vec();
    for extent in &extents {
        rest[extent.offset as usize..(extent.offset + extent.len) as usize].fill(0);
    }
    assert!(super::super::disk::is_zero(&rest), "{what}: data that no extent covers");
    let mut numbers = Numbers(99);
    for _ in 0..300 {
        let from = numbers.below(expected.len() as u64) as usize;
        let len = (1 + numbers.below(300_000) as usize).min(expected.len() - from);
        let mut part = vec![0xaa; len];
        disk.read_at(from as u64, &mut part, &mut scratch).unwrap();
        assert!(part == expected[from..from + len], "{what}: {from}+{len}");
        let clipped = disk.extents(from as u64, (from + len) as u64).unwrap();
        let cut = |e: &Extent| (e.offset.max(from as u64), (e.offset + e.len).min((from + len) as u64));
        let wanted: Vec<_> = extents.iter().map(cut).filter(|(a, b)| a < b).collect();
        assert_eq!(clipped.iter().map(|e| (e.offset, e.offset + e.len)).collect::<Vec<_>>(), wanted, "{what}: extents of {from}+{len}");
    }
    assert!(disk.read_at(expected.len() as u64, &mut [0], &mut scratch).is_err(), "{what}: past the end");
}

const MIB: usize = 1 << 20;

fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut numbers = Numbers(seed);
    let mut data = vec![0u8; len];
    let mut at = 0;
    while at < len {
        let end = (at + 1 + numbers.below(300_000) as usize).min(len);
        if numbers.below(2) == 0 {
            data[at..end].fill(1 + numbers.below(255) as u8);
        }
        at = end;
    }
    data
}

/// Random writes, zero writes and discards by qemu-io.
fn scribble(dir: &Dir, format: &str, name: &str, capacity: usize, zeros: bool, seed: u64) {
    let mut numbers = Numbers(seed);
    let commands: Vec<String> = (0..14)
        .map(|_| {
            let at = numbers.below(capacity as u64 / 512 - 1) * 512;
            let len = (512 + numbers.below(400) * 512).min(capacity as u64 - at);
            match numbers.below(4) {
                0 if zeros => format!("write -z {at} {len}"),
                1 if zeros => format!("write -z -u {at} {len}"),
                _ => format!("write -P {} {at} {len}", 1 + numbers.below(255)),
            }
        })
        .collect();
    let mut args = vec!["-f", format];
    args.extend(commands.iter().flat_map(|command| ["-c", command.as_str()]));
    args.push(name);
    dir.run("qemu-io", &args);
}

#[test]
fn qcow2_over_qcow2_over_raw_with_zero_clusters() {
    let dir = Dir::new("qcow2");
    for (round, options) in
        ["cluster_size=64k", "cluster_size=512", "cluster_size=2M", "cluster_size=4k,compat=0.10", "cluster_size=64k,compression_type=zstd"]
            .into_iter()
            .enumerate()
    {
        let base = pattern(5 * MIB + 512, 7 + round as u64);
        let bottom = dir.raw("base.raw", &base);
        dir.run("qemu-img", &["create", "-f", "qcow2", "-o", options, "-b", "base.raw", "-F", "raw", "mid.qcow2"]);
        scribble(&dir, "qcow2", "mid.qcow2", base.len(), true, 31 + round as u64);
        dir.run("qemu-img", &["create", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2", "top.qcow2"]);
        scribble(&dir, "qcow2", "top.qcow2", base.len(), true, 51 + round as u64);
        let expected = dir.flattened("qcow2", "top.qcow2");
        let disk = chain([dir.qcow2("top.qcow2"), dir.qcow2("mid.qcow2"), bottom]);
        assert_is(&disk, &expected, options);
        assert_eq!((disk.format(), disk.subformat(), disk.len()), ("qcow2", "v3", 3));
        for name in ["top.qcow2", "mid.qcow2"] {
            std::fs::remove_file(dir.path(name)).unwrap();
        }
    }
}

#[test]
fn a_parent_of_another_size() {
    let dir = Dir::new("sizes");
    let base = pattern(3 * MIB + 1000, 5);
    for (top, mid) in [(6 * MIB, 5 * MIB), (4 * MIB, MIB + 512), (2 * MIB, 6 * MIB), (MIB, 2 * MIB)] {
        let bottom = dir.raw("base.raw", &base);
        dir.run("qemu-img", &["create", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "mid.qcow2", &mid.to_string()]);
        dir.run("qemu-io", &["-f", "qcow2", "-c", "write -P 9 300k 70k", "mid.qcow2"]);
        dir.run("qemu-img", &["create", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2", "top.qcow2", &top.to_string()]);
        dir.run("qemu-io", &["-f", "qcow2", "-c", "write -P 8 340k 70k", "top.qcow2"]);
        let expected = dir.flattened("qcow2", "top.qcow2");
        assert_is(&chain([dir.qcow2("top.qcow2"), dir.qcow2("mid.qcow2"), bottom]), &expected, &format!("{top} over {mid}"));
    }
}

#[test]
fn vmdk_over_vmdk_with_grains_of_zeros() {
    let dir = Dir::new("vmdk");
    for (round, (base, child)) in [
        ("monolithicSparse", "monolithicSparse"),
        ("monolithicFlat", "monolithicSparse,zeroed_grain=on"),
        ("twoGbMaxExtentSparse", "twoGbMaxExtentSparse"),
        ("streamOptimized", "monolithicSparse,zeroed_grain=on"),
    ]
    .into_iter()
    .enumerate()
    {
        let data = pattern(6 * MIB + 5 * 512, 70 + round as u64);
        std::fs::write(dir.path("a.raw"), &data).unwrap();
        dir.run("qemu-img", &["convert", "-f", "raw", "-O", "vmdk", "-o", &format!("subformat={base}"), "a.raw", "base.vmdk"]);
        let child = format!("subformat={child}");
        for (name, parent) in [("mid.vmdk", "base.vmdk"), ("top.vmdk", "mid.vmdk")] {
            dir.run("qemu-img", &["create", "-f", "vmdk", "-o", &child, "-b", parent, "-F", "vmdk", name]);
            scribble(&dir, "vmdk", name, data.len(), child.contains("zeroed"), 80 + round as u64);
        }
        let expected = dir.flattened("vmdk", "top.vmdk");
        let disk = chain([dir.vmdk("top.vmdk"), dir.vmdk("mid.vmdk"), dir.vmdk("base.vmdk")]);
        assert_is(&disk, &expected, base);
    }
}

#[test]
fn a_preallocated_child_hides_its_parent_with_its_holes() {
    let dir = Dir::new("hides");
    let data = pattern(2 * MIB, 3);
    let bottom = dir.raw("base.raw", &data);
    dir.run("qemu-img", &["create", "-f", "qcow2", "-o", "preallocation=metadata", "top.qcow2", "2M"]);
    dir.run("qemu-img", &["rebase", "-u", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "top.qcow2"]);
    let expected = dir.flattened("qcow2", "top.qcow2");
    let disk = chain([dir.qcow2("top.qcow2"), bottom]);
    assert_is(&disk, &expected, "preallocated");
    assert!(disk.extents(0, u64::MAX).unwrap().is_empty());
}

#[test]
fn an_image_without_a_parent_is_itself() {
    let dir = Dir::new("alone");
    dir.run("qemu-img", &["create", "-f", "qcow2", "a.qcow2", "4M"]);
    let alone = dir.qcow2("a.qcow2");
    let same = alone.layer.clone();
    assert!(std::ptr::addr_eq(Arc::as_ptr(&chain([alone]).into_disk()), Arc::as_ptr(&same)));
}

/// A layer that is only numbers.
struct Claims(u64);

impl Disk for Claims {
    fn format(&self) -> &'static str {
        "raw"
    }
    fn capacity(&self) -> u64 {
        512
    }
    fn extents(&self, _: u64, _: u64) -> Result<Vec<Extent>> {
        Ok(Vec::new())
    }
    fn read_at(&self, _: u64, _: &mut [u8], _: &mut Scratch) -> Result<()> {
        Err(FormatError::Corrupt { format: "raw", what: "block", index: 3, offset: 9, reason: "it is spoilt".to_owned() })
    }
}

impl Layer for Claims {
    fn covered(&self, from: u64, to: u64) -> Result<Vec<Extent>> {
        Ok(if self.0 == 1 { vec![Extent { offset: from, len: to - from }] } else { Vec::new() })
    }
    fn table_bytes(&self) -> u64 {
        self.0
    }
}

#[test]
fn depth_and_memory_are_bounded_and_an_error_names_its_layer() {
    let claims = |n| Link { name: format!("image {n}"), layer: Arc::new(Claims(n)) as Arc<dyn Layer> };
    let mut deep = chain([claims(0)]);
    for _ in 0..MAX_PARENTS {
        deep.push(claims(0)).unwrap();
    }
    let said = deep.push(claims(0)).unwrap_err().to_string();
    assert!(said.contains("over 32 parents"), "{said}");
    let mut buf = [1u8; 512];
    deep.read_at(0, &mut buf, &mut Scratch::default()).unwrap();
    assert_eq!(buf, [0; 512]);
    let mut wide = chain([claims(30 << 20)]);
    let said = wide.push(claims(9 << 20)).unwrap_err().to_string();
    assert!(said.contains("bytes of memory"), "{said}");
    assert!(Chain::new(claims(u64::MAX)).unwrap_err().to_string().contains("bytes of memory"));
    let read = chain([claims(0), claims(1)]).read_at(0, &mut buf, &mut Scratch::default());
    let said = read.unwrap_err().to_string();
    assert!(said.contains("it is spoilt (in the parent \"image 1\")"), "{said}");
    let read = chain([claims(1)]).read_at(0, &mut buf, &mut Scratch::default());
    assert!(read.unwrap_err().to_string().ends_with("it is spoilt"));
}

#[test]
fn a_damaged_parent_is_named_and_spares_the_rest() {
    let dir = Dir::new("damage");
    let data = pattern(4 * MIB, 8);
    std::fs::write(dir.path("a.raw"), &data).unwrap();
    dir.run("qemu-img", &["convert", "-c", "-f", "raw", "-O", "qcow2", "a.raw", "base.qcow2"]);
    dir.run("qemu-img", &["create", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2"]);
    let bottom = dir.qcow2("base.qcow2");
    let len = std::fs::metadata(dir.path("base.qcow2")).unwrap().len();
    let file = File::options().write(true).open(dir.path("base.qcow2")).unwrap();
    file.write_all_at(&vec![0xff; (len - (5 << 16)) as usize], 5 << 16).unwrap();
    let disk = chain([dir.qcow2("top.qcow2"), bottom]);
    let mut whole = vec![0u8; data.len()];
    let said = disk.read_at(0, &mut whole, &mut Scratch::default()).unwrap_err().to_string();
    assert!(said.contains("compressed cluster") && said.contains("(in the parent \"base.qcow2\")"), "{said}");
}

#[test]
fn an_empty_chain_of_large_disks_costs_nothing() {
    let dir = Dir::new("large");
    dir.run("qemu-img", &["create", "-f", "qcow2", "0.qcow2", "8T"]);
    for n in 1..=20 {
        let (parent, name) = (format!("{}.qcow2", n - 1), format!("{n}.qcow2"));
        dir.run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &parent, "-F", "qcow2", &name, "8T"]);
    }
    let started = std::time::Instant::now();
    let disk = chain((0..=20).rev().map(|n| dir.qcow2(&format!("{n}.qcow2"))));
    assert!(disk.extents(0, u64::MAX).unwrap().is_empty());
    let mut buf = vec![1u8; 4 * MIB];
    disk.read_at(5 << 40, &mut buf, &mut Scratch::default()).unwrap();
    assert!(super::super::disk::is_zero(&buf) && started.elapsed().as_millis() < 1000, "{:?}", started.elapsed());
}

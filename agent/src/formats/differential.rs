//! Our readers against QEMU's: thousands of small images with maps that no tool would write on purpose, each read to the same bytes.
//!
//! A `#[cfg(test)]` module, so it may open files and start processes.
//!
//! Owns: the seeded generator. Most images are made by `qemu-img convert` from random disks, with every subformat, version and option
//! that it has; the others are laid out by `own` with random cluster and grain maps, and QEMU only judges them.
//! Never: trusts our writers; they have tests of their own. A crash here costs nothing: tests only.
//!
//! A process costs more than a small image, so QEMU judges a batch at once: `qemu-img convert` joins its inputs into one raw file.
//! `HYPERSDK_TEST_LONG=1` makes ten times as many; `HYPERSDK_TEST_SEED` repeats a run.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

use super::disk::{Disk, FormatError, Scratch, Window};
use super::{qcow2, vdi, vhd, vhdx, vmdk};

mod own;

/// Images in a batch.
const BATCH: usize = 20;
/// Largest disk in sectors: 8 MiB.
const SECTORS: u64 = 16 << 10;

/// Numbers that look random and are the same for the same seed (xorshift).
struct Random(u64);

impl Random {
    fn of(seed: u64) -> Self {
        Self(seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Below `limit`, which is not 0.
    fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 11) % limit
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len() as u64) as usize]
    }

    /// A size in sectors, small ones as likely as large ones.
    fn sectors(&mut self, most: u64) -> u64 {
        let bits = self.below(u64::from(most.ilog2()) + 1);
        (1 + self.below(2 << bits)).min(most)
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for k in (1..items.len()).rev() {
            items.swap(k, self.below(k as u64 + 1) as usize);
        }
    }

    /// Bytes of one cluster or stretch: noise, text or nearly nothing.
    fn fill(&mut self, out: &mut [u8]) {
        let byte = self.next() as u8;
        match self.below(4) {
            0 => out.chunks_mut(8).for_each(|chunk| chunk.copy_from_slice(&self.next().to_le_bytes()[..chunk.len()])),
            1 => out.iter_mut().enumerate().for_each(|(k, b)| *b = byte ^ (k / 7 % 50) as u8),
            2 => out.fill(byte),
            _ => {
                out.fill(0);
                let at = self.below(out.len() as u64) as usize;
                out[at] = byte | 1;
            }
        }
    }
}

/// Where a batch's images come from, and QEMU's name of their format.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Family {
    Qemu(&'static str),
    Own(&'static str),
}
use Family::{Own, Qemu};

/// In turn; what has most variants comes most often.
const FAMILIES: [Family; 8] =
    [Qemu("qcow2"), Own("qcow2"), Qemu("vmdk"), Own("vmdk"), Qemu("vpc"), Own("qcow2"), Qemu("vhdx"), Qemu("vdi")];

fn qemu_img(args: &[&str], folder: &Path) {
    let output = Command::new("qemu-img").args(args).current_dir(folder).output().expect("these tests need qemu-img (Debian: qemu-utils)");
    assert!(output.status.success(), "qemu-img {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A random disk: stretches of data between holes.
fn random_disk(random: &mut Random) -> Vec<u8> {
    let mut data = vec![0u8; (random.sectors(SECTORS) * 512) as usize];
    let longest = 1 + random.below(data.len() as u64);
    let mut at = 0;
    while at < data.len() {
        let len = (1 + random.below(longest) as usize).min(data.len() - at);
        if !random.one_in(3) {
            random.fill(&mut data[at..at + len]);
        }
        at += len;
    }
    data
}

/// Lets qemu-img make an image of a random disk; answers with the arguments for the message.
fn by_qemu(format: &str, name: &str, folder: &Path, random: &mut Random) -> (String, Vec<u8>) {
    let data = random_disk(random);
    std::fs::write(folder.join("in.raw"), &data).unwrap();
    let (options, flag) = match format {
        "qcow2" => qcow2_options(random),
        "vmdk" => vmdk_options(random),
        "vpc" => {
            let (kind, exact) = (*random.pick(&["dynamic", "fixed"]), *random.pick(&["on", "off"]));
            (format!("subformat={kind},force_size={exact}"), "-S4k")
        }
        "vdi" => (format!("static={}", random.pick(&["on", "off"])), *random.pick(&["-S4k", "-S0"])),
        _ => {
            let (kind, block, log) = (*random.pick(&["dynamic", "fixed"]), 1 << random.below(6), 1 + random.below(2));
            (format!("subformat={kind},block_size={block}M,log_size={log}M"), "-S4k")
        }
    };
    qemu_img(&["convert", "-f", "raw", "-O", format, flag, "-o", &options, "in.raw", name], folder);
    (format!("{format} {flag} {options}, {} sectors", data.len() / 512), data)
}

fn qcow2_options(random: &mut Random) -> (String, &'static str) {
    let size = 512u64 << random.below(13);
    let packed = random.one_in(2);
    let mut options = format!("cluster_size={size}");
    if random.one_in(3) {
        options += ",compat=0.10";
    } else {
        options += ",compat=1.1";
        if random.one_in(3) {
            options += ",lazy_refcounts=on";
        }
        options += &format!(",refcount_bits={}", 1 << random.below(7));
        if packed && random.one_in(2) {
            options += ",compression_type=zstd";
        }
    }
    if !packed && random.one_in(4) {
        options += *random.pick(&[",preallocation=metadata", ",preallocation=falloc", ",preallocation=full"]);
    }
    (options, if packed { "-c" } else { *random.pick(&["-S4k", "-S0", "-S512", "-W"]) })
}

fn vmdk_options(random: &mut Random) -> (String, &'static str) {
    let kinds = ["monolithicSparse", "streamOptimized", "twoGbMaxExtentSparse", "monolithicFlat", "twoGbMaxExtentFlat"];
    let kind = *random.pick(&kinds);
    let mut options = format!("subformat={kind},adapter_type={}", random.pick(&["ide", "lsilogic"]));
    if !kind.ends_with("Flat") && random.one_in(2) {
        options += ",zeroed_grain=on";
    }
    if random.one_in(4) {
        options += ",compat6=on";
    }
    (options, *random.pick(&["-S4k", "-S0", "-S64k"]))
}

/// Reads by our reader: extents in pieces of odd length, then anywhere.
fn read(format: &str, path: &Path, random: &mut Random) -> Result<Vec<u8>, String> {
    let window = |path: &Path| Window::whole(File::open(path)?);
    let main = window(path).map_err(|e| e.to_string())?;
    let folder = path.parent().unwrap();
    let opened: Result<Box<dyn Disk>, FormatError> = match format {
        "qcow2" => qcow2::Reader::open(main).map(|disk| Box::new(disk) as _),
        "vmdk" => vmdk::open(main, &|name| window(&folder.join(name))).map(|disk| Box::new(disk) as _),
        "vpc" => vhd::Reader::open(main).map(|disk| Box::new(disk) as _),
        "vdi" => vdi::Reader::open(main).map(|disk| Box::new(disk) as _),
        _ => vhdx::Reader::open(main).map(|disk| Box::new(disk) as _),
    };
    let disk = opened.map_err(|e| e.to_string())?;
    let mut scratch = Scratch::default();
    let mut out = vec![0u8; disk.capacity() as usize];
    let step = 1 + random.below(300_000) as usize;
    for extent in disk.extents(0, u64::MAX).map_err(|e| e.to_string())? {
        let (from, to) = (extent.offset as usize, (extent.offset + extent.len) as usize);
        for at in (from..to).step_by(step) {
            disk.read_at(at as u64, &mut out[at..to.min(at + step)], &mut scratch).map_err(|e| e.to_string())?;
        }
    }
    // What no extent covers must read as zeros, and a piece must read the same wherever it starts.
    let probes = if out.is_empty() { 0 } else { 4 };
    for _ in 0..probes {
        let from = random.below(out.len() as u64) as usize;
        let to = from + 1 + random.below((out.len() - from) as u64) as usize;
        let mut piece = vec![7u8; to - from];
        disk.read_at(from as u64, &mut piece, &mut scratch).map_err(|e| e.to_string())?;
        if piece != out[from..to] {
            return Err(format!("bytes {from}..{to} read differently from what the extents gave"));
        }
        let part = disk.extents(from as u64, to as u64).map_err(|e| e.to_string())?;
        let mut masked = piece.clone();
        for extent in part {
            masked[extent.offset as usize - from..(extent.offset + extent.len) as usize - from].fill(0);
        }
        if masked.iter().any(|b| *b != 0) {
            return Err(format!("extents of {from}..{to} leave out data"));
        }
    }
    Ok(out)
}

/// Whether this is the disk that was given, and zeros where a format has rounded it up.
fn padded(data: &[u8], source: &[u8]) -> bool {
    data.strip_prefix(source).is_some_and(|rest| rest.iter().all(|b| *b == 0))
}

/// Makes, judges and reads one batch; what went wrong, if anything.
fn batch(family: Family, seed: u64, root: &Path, data_bytes: &AtomicU64) -> Vec<String> {
    let folder: PathBuf = root.join(format!("{seed}"));
    std::fs::create_dir(&folder).unwrap();
    let mut random = Random::of(seed);
    let (Qemu(format) | Own(format)) = family;
    let names: Vec<String> = (0..BATCH).map(|k| format!("i{k}.{format}")).collect();
    let mut made = Vec::new();
    for name in &names {
        made.push(match family {
            Qemu(format) => {
                let (said, data) = by_qemu(format, name, &folder, &mut random);
                (said, Some(data))
            }
            Own(format) => {
                let (said, bytes) = if format == "qcow2" { own::qcow2(&mut random) } else { own::vmdk(&mut random) };
                std::fs::write(folder.join(name), bytes).unwrap();
                (said, None)
            }
        });
    }
    let mut args = vec!["convert", "-f", format, "-O", "raw"];
    args.extend(names.iter().map(String::as_str));
    args.push("out.raw");
    qemu_img(&args, &folder);
    let judged = std::fs::read(folder.join("out.raw")).unwrap();
    let (mut wrong, mut at) = (Vec::new(), 0);
    for (name, (said, source)) in names.iter().zip(made) {
        match read(format, &folder.join(name), &mut random) {
            Err(e) => {
                wrong.push(format!("seed {seed} {name} ({said}): {e}"));
                // The place of the following ones is lost with it.
                break;
            }
            Ok(data) => {
                let there = judged.get(at..at + data.len());
                if there != Some(&data[..]) || source.is_some_and(|source| !padded(&data, &source)) {
                    let first = there.and_then(|there| there.iter().zip(&data).position(|(a, b)| a != b));
                    wrong.push(format!("seed {seed} {name} ({said}): differs from qemu-img's bytes, first at {first:?} of {}", data.len()));
                }
                at += data.len();
                data_bytes.fetch_add(data.iter().filter(|b| **b != 0).count() as u64, Ordering::Relaxed);
            }
        }
    }
    if wrong.is_empty() && at != judged.len() {
        wrong.push(format!("seed {seed}: qemu-img read {} bytes, we read {at}", judged.len()));
    }
    if wrong.is_empty() {
        std::fs::remove_dir_all(&folder).unwrap();
    }
    wrong
}

/// Whether the environment asks for the long run, and the seed.
fn asked() -> (bool, u64) {
    let long = std::env::var("HYPERSDK_TEST_LONG").is_ok_and(|value| value == "1");
    (long, std::env::var("HYPERSDK_TEST_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(20_261_124))
}

/// Changes some bits of an image, near its front and where something stands more often than elsewhere.
fn damage(bytes: &mut [u8], random: &mut Random) {
    for _ in 0..=random.below(3) {
        let front = if random.one_in(2) { bytes.len().min(4096) } else { bytes.len() };
        let mut at = random.below(front as u64) as usize;
        for _ in 0..200 {
            if bytes[at] != 0 {
                break;
            }
            at = random.below(front as u64) as usize;
        }
        match random.below(3) {
            0 => bytes[at] ^= 1 << random.below(8),
            1 => bytes[at] = random.next() as u8,
            _ => bytes[at] = bytes[at].wrapping_add(1),
        }
    }
}

/// What of a damaged image we still accept, QEMU must read as the same bytes; it may refuse what we accept only by an error of its own.
#[test]
fn damaged_images_are_refused_or_read_as_qemu_reads_them() {
    let (long, seed) = asked();
    let count = if long { 4000 } else { 200 };
    let root = std::env::temp_dir().join(format!("hypersdk-damaged-{}", std::process::id()));
    std::fs::create_dir_all(&root).unwrap();
    let (mut refused, mut equal, mut only_ours) = (0, 0, 0);
    for k in 0..count {
        let mut random = Random::of(seed + k);
        let format = if k % 2 == 0 { "qcow2" } else { "vmdk" };
        let (said, mut bytes) = if format == "qcow2" { own::qcow2(&mut random) } else { own::vmdk(&mut random) };
        if format == "vmdk" {
            // Without its redundant directory: that stands in for a damaged one here, and not in QEMU.
            bytes[8] &= !2;
            bytes[48..56].fill(0);
        }
        damage(&mut bytes, &mut random);
        let image = root.join("image");
        std::fs::write(&image, &bytes).unwrap();
        // A changed size may be a large one; nothing but a comparison is lost with it.
        let length = |disk: &dyn Disk| disk.capacity() <= 64 << 20;
        let small = match format {
            "qcow2" => qcow2::Reader::open(Window::whole(File::open(&image).unwrap()).unwrap()).is_ok_and(|disk| length(&disk)),
            _ => vmdk::open_single(Window::whole(File::open(&image).unwrap()).unwrap()).is_ok_and(|disk| length(&disk)),
        };
        let Some(data) = small.then(|| read(format, &image, &mut random).ok()).flatten() else {
            refused += 1;
            continue;
        };
        let output = Command::new("qemu-img").args(["convert", "-f", format, "-O", "raw", "image", "out.raw"]).current_dir(&root).output();
        if !output.expect("these tests need qemu-img (Debian: qemu-utils)").status.success() {
            only_ours += 1;
            continue;
        }
        let judged = std::fs::read(root.join("out.raw")).unwrap();
        // Where two sizes contradict each other, we round a qcow2 up to a sector and take a VMDK descriptor's word inside the last grain;
        // QEMU 7.2 rounds down and takes the header's.
        let common = judged.len().min(data.len());
        let (judged, data) = (&judged[..common], &data[..common]);
        let first = judged.iter().zip(data).position(|(a, b)| a != b);
        let kept = image.display();
        assert!(judged == data, "seed {} ({said}): differs from qemu-img's bytes, first at {first:?}; it stays in {kept}", seed + k);
        equal += 1;
    }
    println!("damaged: {count} images (seed {seed}), {refused} refused, {equal} equal to qemu-img, {only_ours} that only we read");
    assert!(equal > count / 10 && refused > count / 10, "the damage is too small or too large");
    std::fs::remove_dir_all(&root).unwrap();
}

#[test]
fn generated_images_read_as_qemu_reads_them() {
    let (long, seed) = asked();
    let batches = if long { 120 } else { 12 };
    let root = std::env::temp_dir().join(format!("hypersdk-differential-{}", std::process::id()));
    std::fs::create_dir_all(&root).unwrap();
    let (next, data_bytes, started) = (AtomicUsize::new(0), AtomicU64::new(0), Instant::now());
    let wrong = std::sync::Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(2, usize::from).min(8) {
            scope.spawn(|| {
                loop {
                    let k = next.fetch_add(1, Ordering::Relaxed);
                    if k >= batches {
                        return;
                    }
                    let found = batch(FAMILIES[k % FAMILIES.len()], seed + k as u64, &root, &data_bytes);
                    wrong.lock().unwrap().extend(found);
                }
            });
        }
    });
    let wrong = wrong.into_inner().unwrap();
    let images = batches * BATCH;
    let (mib, seconds) = (data_bytes.into_inner() >> 20, started.elapsed().as_secs_f64());
    println!("differential: {images} images (seed {seed}), {mib} MiB that are not zero, {} wrong, {seconds:.1} s", wrong.len());
    assert!(mib > images as u64 / 100, "the generator makes empty disks");
    assert!(wrong.is_empty(), "{} of {images} differ; their files stay in {}:\n{}", wrong.len(), root.display(), wrong.join("\n"));
    std::fs::remove_dir_all(&root).unwrap();
}

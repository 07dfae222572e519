//! What we write, tar, sha256sum, qemu-img and we ourselves read; finishing twice gives the same bytes.

use std::sync::Arc;

use super::*;
use crate::formats::disk::{Disk as _, DiskWriter, Encoded, Encoder, Output, Scratch};
use crate::formats::vmdk::{StreamEncoder, StreamWriter, open_single};

fn sample(disks: usize) -> Vm {
    Vm {
        name: "web <1> & \"co\"'s \u{e4}\u{1}".into(),
        os: "linux".into(),
        os_version: "Debian GNU/Linux 12 (64-bit) & more".into(),
        cpu: 4,
        memory_mb: 6144,
        firmware: "uefi".into(),
        disks: (0..disks).map(|k| Disk { name: format!("disk-{k}"), capacity: (k as u64 + 3) << 20, ..Disk::default() }).collect(),
        nics: vec![
            Nic { name: "nic-0".into(), model: "vmxnet3".into(), network: "VM Network".into(), mac: "00:50:56:aa:bb:01".into() },
            Nic { name: "nic-1".into(), model: "e1000".into(), network: "back & <end>".into(), mac: String::new() },
        ],
        ..Vm::default()
    }
}

/// Data of disk `k`: its first MiB and its last sector.
fn content(vm: &Vm, k: usize) -> Vec<u8> {
    let mut bytes = vec![0u8; vm.disks[k].capacity as usize];
    for (n, b) in bytes[..1 << 20].iter_mut().enumerate() {
        *b = (n * (k + 7) / 13) as u8;
    }
    let end = bytes.len();
    bytes[end - 512..].fill(k as u8 + 1);
    bytes
}

/// Streams all disks into the archive.
fn fill(file: &Arc<File>, vm: &Vm, layout: &Layout) -> Vec<Finished> {
    let mut out: Vec<Finished> = Vec::new();
    let mut block = Encoded::default();
    for k in 0..vm.disks.len() {
        let base = layout.disk_base(k, out.last().map_or(0, |last| last.base + last.size));
        let capacity = vm.disks[k].capacity;
        let mut writer = StreamWriter::create(Output { file: file.clone(), base }, capacity, k as u32).unwrap();
        let mut state = StreamEncoder::new(1).unwrap().state().unwrap();
        state.encode(0, &content(vm, k), &mut block).unwrap();
        writer.write_block(&block).unwrap();
        out.push(Finished {
            name: layout.disk_name(k),
            capacity,
            base,
            size: writer.finish().unwrap(),
            populated: (1 << 20) + 512,
            sha256: None,
        });
    }
    out
}

fn create(dir: &Dir, name: &str) -> Arc<File> {
    Arc::new(OpenOptions::new().create(true).truncate(true).read(true).write(true).open(dir.path(name)).unwrap())
}

#[test]
fn an_archive_written_in_one_pass_is_what_others_read() {
    let dir = Dir::new();
    let vm = sample(3);
    let layout = Layout::new(&vm, 1_700_000_000).unwrap();
    let file = create(&dir, "a.ova");
    let disks = fill(&file, &vm, &layout);
    let mut hashed = 0;
    let finish = layout.finish(&file, &vm, &disks, &mut |n| {
        hashed += n;
        Ok(())
    });
    let finish = finish.unwrap();
    let whole = std::fs::read(dir.path("a.ova")).unwrap();
    assert_eq!(finish.len, whole.len() as u64);
    assert_eq!(hashed, disks.iter().map(|disk| disk.size).sum::<u64>() + layout.slot());

    let names: Vec<String> = dir.run("tar", &["-tf", "a.ova"]).lines().map(str::to_owned).collect();
    let stem = stem(&vm.name);
    assert_eq!(names, [format!("{stem}.ovf"), layout.disk_name(0), layout.disk_name(1), layout.disk_name(2), format!("{stem}.mf")]);
    assert_eq!(names, finish.members.iter().map(|member| member.name.clone()).collect::<Vec<_>>());
    dir.run("tar", &["-xf", "a.ova"]);
    for member in &finish.members {
        let sum = dir.run("sha256sum", &[&member.name]);
        assert!(sum.starts_with(&member.sha256), "{sum} {member:?}");
        assert_eq!(dir.window(&member.name).len(), member.size);
    }
    let manifest = std::fs::read_to_string(dir.path(&names[4])).unwrap();
    assert!(manifest.starts_with(&format!("SHA256({stem}.ovf)= ")), "{manifest}");
    for k in 0..3 {
        dir.put("raw", &content(&vm, k));
        dir.run("qemu-img", &["compare", "-f", "raw", "-F", "vmdk", "raw", &names[k + 1]]);
    }

    for ova in [open(&dir.window("a.ova")).unwrap(), dir.folder(&names[0]).unwrap()] {
        assert_eq!(ova.check_manifest(&mut quiet).unwrap(), Checked::Good(4));
        check_vm(&ova.vm, &vm);
        for (k, member) in ova.disks.iter().enumerate() {
            let disk = open_single(member.window.clone()).unwrap();
            assert_eq!((disk.capacity(), member.entry.capacity), (vm.disks[k].capacity, vm.disks[k].capacity));
            let mut bytes = vec![0; disk.capacity() as usize];
            disk.read_at(0, &mut bytes, &mut Scratch::default()).unwrap();
            assert!(bytes == content(&vm, k));
        }
    }

    // A crash inside of finish: any part of what it writes may be missing, or longer than it will be.
    for damage in [0..512, 512..4000, 512..512 + layout.slot(), disks[1].base - 512..disks[1].base, finish.len - 4096..finish.len] {
        file.write_all_at(&vec![0x5a; (damage.end - damage.start) as usize], damage.start).unwrap();
        if damage.end == finish.len {
            file.write_all_at(&[1; 5000], finish.len).unwrap();
            file.write_all_at(&whole[disks[2].base as usize..(disks[2].base + disks[2].size) as usize], disks[2].base).unwrap();
        }
        assert_eq!(layout.finish(&file, &vm, &disks, &mut quiet).unwrap(), finish);
        assert!(std::fs::read(dir.path("a.ova")).unwrap() == whole);
    }
}

fn check_vm(read: &Vm, vm: &Vm) {
    assert_eq!(read.name, vm.name.replace('\u{1}', "\u{fffd}"));
    assert_eq!((read.cpu, read.memory_mb, read.firmware.as_str(), read.os.as_str()), (4, 6144, "uefi", "linux"));
    assert_eq!(read.os_version, vm.os_version);
    assert_eq!(read.nics, vm.nics);
    assert_eq!(read.disks.len(), vm.disks.len());
    assert!(read.disks.iter().zip(&vm.disks).all(|(a, b)| a.capacity == b.capacity && a.name == b.name && a.format == "vmdk"));
}

#[test]
fn the_slot_holds_any_numbers_and_as_many_disks_as_an_archive_may_have() {
    let vm = sample(62);
    let layout = Layout::new(&vm, 0).unwrap();
    let files: Vec<DiskFile> =
        (0..62).map(|k| DiskFile { name: layout.disk_name(k), size: u64::MAX, capacity: 1 << 40, populated: u64::MAX }).collect();
    let text = generate(&vm, &files);
    assert!((text.len() as u64) < layout.slot());
    let ovf = parse(text.as_bytes()).unwrap();
    assert_eq!(ovf.disks.iter().map(|disk| &disk.file).collect::<Vec<_>>(), files.iter().map(|file| &file.name).collect::<Vec<_>>());
    assert!(Layout::new(&sample(63), 0).unwrap_err().to_string().contains("62"));
    assert_eq!(layout, Layout::new(&vm, 0).unwrap(), "the same after a crash");
}

#[test]
fn wrong_disks_are_refused() {
    let dir = Dir::new();
    let vm = sample(1);
    let layout = Layout::new(&vm, 0).unwrap();
    let file = create(&dir, "a.ova");
    let good = Finished { name: "a.vmdk".into(), capacity: 512, base: layout.disk_base(0, 0), size: 10, populated: 0, sha256: None };
    file.set_len(good.base + good.size).unwrap();
    assert!(layout.finish(&file, &vm, &[], &mut quiet).is_err());
    assert!(layout.finish(&file, &vm, &[Finished { base: 0, ..good.clone() }], &mut quiet).is_err());
    assert!(layout.finish(&file, &vm, &[Finished { name: "../a".into(), ..good.clone() }], &mut quiet).is_err());
    assert!(layout.finish(&file, &vm, &[Finished { name: "a".repeat(101), ..good.clone() }], &mut quiet).is_err());
    assert!(layout.finish(&file, &vm, &[Finished { size: u64::MAX, ..good.clone() }], &mut quiet).is_err());
    layout.finish(&file, &vm, std::slice::from_ref(&good), &mut quiet).unwrap();
    // Who watches may stop it.
    let stopped = layout.finish(&file, &vm, &[good], &mut |_| Err(refused("stop"))).unwrap_err();
    assert!(stopped.to_string().contains("stop"));
}

#[test]
fn sizes_from_8_gib_on_are_base_256_and_read_back() {
    let dir = Dir::new();
    for size in [(8u64 << 30) - 1, 8 << 30, (9 << 40) + 5] {
        let file = create(&dir, "big.tar");
        file.write_all_at(&tar::header("a.vmdk", size, 1).unwrap(), 0).unwrap();
        file.set_len(512 + size.next_multiple_of(512) + 1024).unwrap();
        assert_eq!(tar::entries(&dir.window("big.tar")).unwrap(), [tar::Entry { name: "a.vmdk".into(), offset: 512, size }]);
        let listed = dir.run("tar", &["-tvf", "big.tar"]);
        assert!(listed.contains(&size.to_string()), "{listed}");
    }
}

#[test]
fn loose_disks_get_a_description_and_a_manifest() {
    let dir = Dir::new();
    let vm = sample(1);
    dir.put("a.vmdk", b"not really a disk");
    let window = dir.window("a.vmdk");
    let sum = sha256(&window, &mut quiet).unwrap();
    let disk = DiskFile { name: "a.vmdk".into(), size: window.len(), capacity: 512, populated: 0 };
    let (text, manifest) = folder("web.ovf", &vm, &[(disk, sum)]);
    dir.put("web.ovf", text.as_bytes());
    dir.put("web.mf", manifest.as_bytes());
    let ova = dir.folder("web.ovf").unwrap();
    assert_eq!(ova.check_manifest(&mut quiet).unwrap(), Checked::Good(2));
    dir.put("a.vmdk", b"not really A disk");
    let differs = dir.folder("web.ovf").unwrap().check_manifest(&mut quiet).unwrap_err().to_string();
    assert!(differs.contains("a.vmdk"), "{differs}");
}

#[test]
fn a_name_becomes_a_stem_that_any_file_system_takes() {
    for (name, expected) in
        [("web-01", "web-01"), ("../../etc", "_.._etc"), ("", "vm"), ("...", "vm"), ("a b/c\u{e4}", "a_b_c_"), ("-rf", "rf")]
    {
        assert_eq!(stem(name), expected);
    }
    assert_eq!(stem(&"x".repeat(300)).len(), 60);
}

//! Guests made by other people's tools, whole and damaged.

#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use shared::guest::{Answer, Guest, Place as Driver, Status};

use super::volume::tests::{Memory, wide};
use super::{Bounds, inspect, lvm, within};
use crate::formats::Disk;

/// A folder that goes with the test.
pub struct Folder(PathBuf);

impl Folder {
    pub fn new() -> Self {
        Self(shared::vault::temporary_dir("inspect").unwrap())
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    fn file(&self, path: &str, bytes: &[u8]) {
        let path = self.0.join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// What a tool makes of bytes.
pub fn filter(tool: &str, arguments: &[&str], input: &[u8]) -> Vec<u8> {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let mut command = Command::new(tool);
    command.args(arguments).env("PATH", path).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap_or_else(|e| panic!("{tool}: {e}"));
    let (mut stdin, input) = (child.stdin.take().unwrap(), input.to_vec());
    let writer = std::thread::spawn(move || {
        let _ = stdin.write_all(&input);
    });
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    assert!(output.status.success(), "{tool} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// The same for one that makes a file.
pub fn run(tool: &str, arguments: &[&str], input: &str) {
    filter(tool, arguments, input.as_bytes());
}

const UUID: &str = "0fc63daf-8483-4772-8e79-3d69d8477de4";
const VERSION: &str = "6.1.0-1-amd64";

/// The root of a guest as an installation on VMware leaves it: its initrd knows VMware's disks alone.
fn root() -> Folder {
    let folder = Folder::new();
    folder.file("etc/os-release", b"PRETTY_NAME=\"Test Linux 12\"\nID=test\nVERSION_ID=\"12\"\n");
    folder.file("etc/hostname", b"web01\n");
    let fstab = format!("UUID={UUID} / ext4 defaults 0 1\n/dev/sda2 none swap sw 0 0\n");
    folder.file("etc/fstab", fstab.as_bytes());
    folder.file("etc/network/interfaces", b"auto lo\niface lo inet loopback\nauto ens192\niface ens192 inet dhcp\n");
    folder.file("bin/sh", b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x03\0\x3e\0");
    folder.file("usr/bin/vmtoolsd", b"x");
    folder.file("usr/sbin/grub-mkconfig", b"x");
    folder.file("boot/grub/grub.cfg", b"menuentry 'x' {\n  linux /boot/vmlinuz root=/dev/sda1 ro\n}\n");
    folder.file(&format!("boot/vmlinuz-{VERSION}"), b"kernel");
    folder.file("boot/vmlinuz-5.10.0-9-amd64", b"kernel");
    let cpio = super::initrd::tests::cpio;
    let early = cpio(&["kernel/x86/microcode/AuthenticAMD.bin"], 3000);
    let main = cpio(&["init", "usr/lib/modules/6.1/kernel/drivers/scsi/vmw_pvscsi.ko"], 50_000);
    folder.file(&format!("boot/initrd.img-{VERSION}"), &[early, filter("gzip", &["-c"], &main)].concat());
    let older = cpio(&["lib/modules/virtio_blk.ko", "lib/modules/virtio_scsi.ko.xz"], 4);
    folder.file("boot/initrd.img-5.10.0-9-amd64", &filter("xz", &["--check=crc32", "-c"], &older));
    for version in [VERSION, "5.10.0-9-amd64"] {
        folder.file(&format!("lib/modules/{version}/modules.builtin"), b"kernel/drivers/virtio/virtio_pci.ko\nkernel/fs/ext4/ext4.ko\n");
        let dep = b"kernel/drivers/block/virtio_blk.ko: kernel/x.ko\nkernel/drivers/net/virtio_net.ko:\n";
        folder.file(&format!("lib/modules/{version}/modules.dep"), dep);
    }
    folder
}

/// An ext4 of this many MiB with that root.
fn filled(root: &Folder, mib: usize, features: &str) -> Vec<u8> {
    let folder = Folder::new();
    let image = folder.path().join("fs.img");
    std::fs::File::create(&image).unwrap().set_len((mib as u64) << 20).unwrap();
    let (from, to) = (root.path().to_str().unwrap(), image.to_str().unwrap());
    run("mke2fs", &["-q", "-t", "ext4", "-O", features, "-U", UUID, "-L", "root", "-d", from, to], "");
    std::fs::read(image).unwrap()
}

/// A disk with an MBR, that file system at 1 MiB, and swap behind it.
fn disk(fs: &[u8]) -> Vec<u8> {
    let folder = Folder::new();
    let image = folder.path().join("disk.raw");
    let sectors = fs.len() / 512;
    std::fs::File::create(&image).unwrap().set_len(fs.len() as u64 + (3 << 20)).unwrap();
    let script = format!("label: dos\nstart=2048,size={sectors},type=83,bootable\nstart={},size=2048,type=82\n", 2048 + sectors);
    run("sfdisk", &["-q", image.to_str().unwrap()], &script);
    let mut bytes = std::fs::read(image).unwrap();
    bytes[0x180..0x185].copy_from_slice(b"GRUB ");
    bytes[1 << 20..(1 << 20) + fs.len()].copy_from_slice(fs);
    bytes
}

fn look(bytes: Vec<u8>) -> Guest {
    inspect(&[Arc::new(Memory(bytes)) as Arc<dyn Disk>])
}

#[test]
fn a_guest_of_vmware_is_told_with_what_it_lacks() {
    let guest = look(disk(&filled(&root(), 16, "^has_journal")));
    println!("{} ms, {} bytes: {guest:#?}", guest.took_ms, guest.read_bytes);
    let system = &guest.system;
    let told = [&system.family, &system.id, &system.version, &system.pretty_name, &system.hostname, &system.architecture, &system.root];
    assert_eq!(told.map(String::as_str), ["linux", "test", "12", "Test Linux 12", "web01", "x86_64", "disk 0, partition 1"]);
    let kernels: Vec<_> =
        guest.kernels.iter().map(|k| (k.version.as_str(), k.virtio_pci, k.virtio_blk, k.virtio_scsi, k.virtio_net, k.virtio)).collect();
    let wanted = [
        (VERSION, Driver::BuiltIn, Driver::Module, Driver::Absent, Driver::Module, Answer::No),
        ("5.10.0-9-amd64", Driver::BuiltIn, Driver::Initrd, Driver::Initrd, Driver::Module, Answer::Yes),
    ];
    assert_eq!(kernels, wanted);
    assert_eq!(guest.kernels[0].initrd.as_ref().unwrap().compression, ["none", "gzip"]);
    assert_eq!((guest.virtio, guest.boot.firmware.as_str(), guest.boot.root_argument.as_str()), (Answer::No, "bios", "/dev/sda1"));
    let mounts: Vec<_> = guest.mounts.iter().map(|mount| (mount.at.as_str(), mount.by.as_str(), mount.changes)).collect();
    assert_eq!(mounts, [("/", "uuid", false), ("none", "device", true)]);
    assert_eq!((guest.interfaces[0].name.as_str(), guest.interfaces[0].changes, guest.interfaces.len()), ("ens192", true, 1));
    assert_eq!(
        (guest.software.vmware_tools, guest.software.grub_mkconfig, guest.software.guest_agent),
        (Answer::Yes, Answer::Yes, Answer::No)
    );
    let first = &guest.partitions[0];
    assert_eq!(
        (first.start, first.content.file_system.as_str(), first.content.uuid.as_str(), first.bootable),
        (1 << 20, "ext4", UUID, true)
    );
    let bad: Vec<_> =
        guest.findings("uefi").into_iter().filter(|finding| finding.status != Status::Pass).map(|finding| finding.check).collect();
    assert_eq!(bad, ["guest_virtio", "guest_device_names", "guest_interfaces", "guest_firmware", "guest_tools"]);
    assert!(guest.notes.is_empty(), "{:?}", guest.notes);
}

/// The root in a volume of two segments; its fstab, kernels and settings are found there.
#[test]
fn a_root_in_a_logical_volume_is_found() {
    let fs = filled(&root(), 3, "^has_journal");
    let mut bytes = lvm::tests::physical(lvm::tests::ID, &lvm::tests::described(lvm::tests::ID));
    bytes[5 << 20..7 << 20].copy_from_slice(&fs[..2 << 20]);
    bytes[2 << 20..3 << 20].copy_from_slice(&fs[2 << 20..]);
    let guest = look(bytes);
    assert_eq!((guest.system.root.as_str(), guest.system.id.as_str(), guest.kernels.len()), ("vg/root", "test", 2));
    assert_eq!((guest.partitions[0].content.file_system.as_str(), guest.partitions[0].number), ("lvm2", 0));
    let volumes: Vec<_> = guest.volume_groups[0].volumes.iter().map(|v| (v.name.as_str(), v.content.file_system.as_str())).collect();
    assert_eq!(volumes, [("data", ""), ("root", "ext4"), ("thin", "")]);
    assert!(guest.volume_groups[0].volumes[2].content.unknown.contains("thin"));
}

/// /boot on a FAT of another disk is found by its UUID; where it is not there, nobody says that there is no kernel.
#[test]
fn what_is_mounted_into_a_root_belongs_to_it() {
    let root = root();
    let boot = Folder::new();
    let image = boot.path().join("boot.img");
    std::fs::File::create(&image).unwrap().set_len(8 << 20).unwrap();
    run("mformat", &["-i", image.to_str().unwrap(), "-N", "1234abcd", "-T", "16384", "-h", "16", "-s", "32", "::"], "");
    for name in [format!("vmlinuz-{VERSION}"), format!("initrd.img-{VERSION}")] {
        let from = root.path().join("boot").join(&name);
        run("mcopy", &["-i", image.to_str().unwrap(), from.to_str().unwrap(), "::/"], "");
    }
    std::fs::remove_dir_all(root.path().join("boot")).unwrap();
    root.file("etc/fstab", format!("UUID={UUID} / ext4\nUUID=1234-ABCD /boot vfat\nUUID=ffff /usr ext4\n").as_bytes());
    let disks: [Arc<dyn Disk>; 2] =
        [Arc::new(Memory(disk(&filled(&root, 16, "^has_journal")))), Arc::new(Memory(std::fs::read(&image).unwrap()))];
    let whole = inspect(&disks);
    assert_eq!((whole.kernels[0].path.clone(), whole.virtio), (format!("/boot/vmlinuz-{VERSION}"), Answer::No), "{whole:#?}");
    assert!(whole.notes.iter().any(|note| note.contains("/usr (UUID=ffff)")), "{:?}", whole.notes);
    assert_eq!((whole.software.vmware_tools, whole.software.guest_agent), (Answer::Yes, Answer::Unknown));
    let alone = inspect(&disks[..1]);
    assert!(alone.virtio == Answer::Unknown && alone.notes.iter().any(|note| note.contains("/boot (UUID=1234-ABCD)")), "{:?}", alone.notes);
}

/// A file system of each kind that is only told, and an encrypted one: unknown, with the reason.
#[test]
fn what_is_not_read_is_unknown_with_a_reason() {
    let mut luks = vec![0u8; 4 << 20];
    luks[..8].copy_from_slice(b"LUKS\xba\xbe\0\x02");
    luks[168..204].copy_from_slice(UUID.as_bytes());
    let guest = look(luks);
    assert_eq!((guest.virtio, guest.partitions[0].content.uuid.as_str()), (Answer::Unknown, UUID));
    assert!(guest.partitions[0].content.unknown.contains("encrypted") && guest.notes.iter().any(|note| note.contains("encrypted")));
    assert!(guest.findings("").iter().any(|finding| finding.check == "guest_encryption"));
    for bytes in [vec![], vec![0; 512], vec![0xff; 1 << 20]] {
        let guest = look(bytes);
        assert!(guest.virtio == Answer::Unknown && guest.system.family == "unknown" && !guest.notes.is_empty(), "{guest:?}");
    }
    assert_eq!(inspect(&[]).virtio, Answer::Unknown);
    // The time is over before it begins.
    let disk: Arc<dyn Disk> = Arc::new(Memory(disk(&filled(&root(), 16, "^has_journal"))));
    let late = within(std::slice::from_ref(&disk), Bounds { until: Instant::now(), ..wide() });
    assert!(late.virtio == Answer::Unknown && late.notes.iter().any(|note| note.contains("time")), "{:?}", late.notes);
    let little = within(&[disk], Bounds { bytes: 128 << 10, ..wide() });
    assert!(little.virtio == Answer::Unknown && little.read_bytes <= 128 << 10, "{little:?}");
}

/// Whatever stands on the disk: an answer, in time. Nothing shields the file system: it has no checksums.
#[test]
fn a_damaged_guest_is_told_in_time() {
    let root = root();
    std::os::unix::fs::symlink("os-release", root.path().join("etc/ring")).unwrap();
    let good = disk(&filled(&root, 16, "^metadata_csum,^has_journal,^64bit"));
    assert_eq!(look(good.clone()).kernels.len(), 2);
    let used: Vec<usize> = (0..good.len()).filter(|at| good[*at] != 0).collect();
    let rounds: u32 = std::env::var("HYPERSDK_TEST_DAMAGED").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(400);
    let (mut state, mut worst, mut told, mut panicked) = (0x9e37_79b9_7f4a_7c15u64, Duration::ZERO, 0, 0);
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for round in 0..rounds {
        let mut bad = good.clone();
        for _ in 0..1 << (round % 13) {
            let place = used[random() as usize % used.len()];
            // Half of them where the file system describes itself.
            let at = if random() % 2 == 0 { place } else { (1 << 20) + random() as usize % (1 << 20) };
            bad[at] = random() as u8;
        }
        if round % 50 == 49 {
            bad.truncate(random() as usize % good.len());
        }
        let began = Instant::now();
        let guest = look(bad);
        worst = worst.max(began.elapsed());
        told += u32::from(guest.system.id == "test");
        panicked += u32::from(guest.notes.iter().any(|note| note.contains("withstand")));
    }
    println!("{rounds} damaged guests: {told} were told all the same, {panicked} made a reader panic, the worst took {worst:?}");
    assert!(worst < Duration::from_secs(6) && told > rounds / 10 && told < rounds && panicked == 0, "{worst:?} {told} {panicked}");
    // Noise that bears every mark at once.
    let mut noise: Vec<u8> = (0..8 << 20).map(|_| random() as u8).collect();
    noise[1024..2048].copy_from_slice(&good[(1 << 20) + 1024..(1 << 20) + 2048]);
    look(noise.clone());
    noise[510..512].copy_from_slice(&[0x55, 0xaa]);
    noise[82..87].copy_from_slice(b"FAT32");
    look(noise.clone());
    noise[3..11].copy_from_slice(b"NTFS    ");
    look(noise);
}

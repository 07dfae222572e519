//! A Linux guest: its release, its kernels and what they can drive, its fstab, its software.
//!
//! Owns: which files say so. Never: takes a guest's word for more than a bounded number of bytes. A crash here costs nothing.

use std::collections::BTreeSet;

use shared::guest::{Answer, Initrd, Kernel, Mount, Place, Software, System};

use super::clean;
use super::initrd::{self, Look};
use super::tree::Rooted;
use super::volume::{Blocks, number};

/// Longest text that is read of a guest's settings.
pub const MAX_TEXT: u64 = 256 << 10;
/// Longest list of modules or packages.
const MAX_LIST: u64 = 16 << 20;
/// Most kernels that are looked at.
const MAX_KERNELS: usize = 16;
/// Most lines of fstab that are told.
const MAX_MOUNTS: usize = 200;
/// The drivers that matter.
const DRIVERS: [&str; 4] = ["virtio_pci", "virtio_blk", "virtio_scsi", "virtio_net"];

/// What os-release, hostname and a program say.
pub fn system(tree: &Rooted<'_>) -> Option<System> {
    let release = ["/etc/os-release", "/usr/lib/os-release"].iter().find_map(|path| tree.text(path, MAX_TEXT))?;
    let value = |key: &str| setting(&release, key).unwrap_or_default();
    let hostname = tree.text("/etc/hostname", 1024).unwrap_or_default();
    Some(System {
        family: "linux".to_owned(),
        id: value("ID"),
        version: value("VERSION_ID"),
        pretty_name: value("PRETTY_NAME"),
        hostname: clean(hostname.lines().map(str::trim).find(|line| !line.is_empty() && !line.starts_with('#')).unwrap_or_default()),
        architecture: architecture(tree).unwrap_or_default(),
        root: String::new(),
    })
}

/// A value of a file of `KEY=value` lines, as a shell would take it.
pub fn setting(text: &str, key: &str) -> Option<String> {
    let value = text.lines().rev().find_map(|line| line.trim().strip_prefix(key)?.strip_prefix('='))?.trim();
    let quoted = |mark: char| value.strip_prefix(mark).and_then(|rest| rest.split(mark).next());
    Some(clean(quoted('"').or_else(|| quoted('\'')).unwrap_or(value)))
}

/// By the first program that is there.
fn architecture(tree: &Rooted<'_>) -> Option<String> {
    let programs = ["/bin/sh", "/usr/bin/sh", "/bin/bash", "/usr/bin/bash", "/sbin/init", "/usr/lib/systemd/systemd"];
    let head = programs.iter().find_map(|path| tree.read(path, 20).filter(|head| head.starts_with(b"\x7fELF")))?;
    let machine = if head.get(5) == Some(&2) { u16::from_be_bytes([*head.get(18)?, *head.get(19)?]) } else { number::le16(&head, 18)? };
    let word = match machine {
        3 => "i686",
        20 => "ppc",
        21 => "ppc64",
        22 => "s390x",
        40 => "arm",
        62 => "x86_64",
        183 => "aarch64",
        243 => "riscv64",
        _ => return None,
    };
    Some(word.to_owned())
}

/// The kernels of a tree, the newest first, those for rescue last. `folders`: where they may lie.
pub fn kernels(tree: &Rooted<'_>, folders: &[&str], blocks: &Blocks, notes: &mut Vec<String>) -> Vec<Kernel> {
    let mut kernels: Vec<Kernel> = Vec::new();
    let mut left = initrd::MAX_UNPACKED;
    for folder in folders {
        let entries = tree.list(folder);
        let names: BTreeSet<&str> = entries.iter().filter(|entry| !entry.is_dir).map(|entry| entry.name.as_str()).collect();
        let mut found: Vec<Kernel> = names.iter().filter_map(|name| kernel(tree, folder, name, &names)).collect();
        found.retain(|kernel| kernels.iter().all(|known| known.version != kernel.version || known.path == kernel.path));
        kernels.append(&mut found);
    }
    kernels.sort_by(|a, b| a.rescue.cmp(&b.rescue).then_with(|| newer(&b.version, &a.version)));
    kernels.dedup_by(|a, b| a.version == b.version && a.rescue == b.rescue);
    if kernels.len() > MAX_KERNELS {
        notes.push(format!("{} kernels, of which the newest {MAX_KERNELS} are looked at", kernels.len()));
        kernels.truncate(MAX_KERNELS);
    }
    for kernel in &mut kernels {
        drivers(tree, kernel, blocks, &mut left);
    }
    kernels
}

/// The kernel that a file is, with its initrd.
fn kernel(tree: &Rooted<'_>, folder: &str, name: &str, names: &BTreeSet<&str>) -> Option<Kernel> {
    let lower = name.to_ascii_lowercase();
    let stem = ["vmlinuz", "vmlinux", "linux", "bzimage", "kernel"].into_iter().find(|stem| lower.starts_with(stem))?;
    let suffix = name[stem.len()..].strip_prefix('-');
    // `vmlinuz` beside `vmlinuz-6.1` is a link to it.
    if suffix.is_none() && (lower != stem || names.iter().any(|other| other.to_ascii_lowercase().starts_with(&format!("{stem}-")))) {
        return None;
    }
    let path = join(folder, name);
    let suffix = suffix.unwrap_or_default();
    if suffix.ends_with(".old") || suffix.ends_with(".hmac") || suffix.ends_with(".sig") {
        return None;
    }
    let from_name = suffix.starts_with(|c: char| c.is_ascii_digit()) && !suffix.starts_with("0-rescue");
    let version = match from_name {
        true => suffix.to_owned(),
        false => told_version(tree, &path)?,
    };
    let candidates: Vec<String> = match suffix {
        "" => ["initrd", "initrd.img", "initramfs", "initrd.gz", "initramfs.img", "initrd.lz", "initrd.xz", "core.gz"]
            .map(str::to_owned)
            .to_vec(),
        _ => ["initrd.img-V", "initramfs-V.img", "initrd-V", "initramfs-V", "initrd-V.img", "initrd.img-V.img"]
            .map(|pattern| pattern.replace('V', suffix))
            .to_vec(),
    };
    let found = candidates.iter().find_map(|wanted| names.iter().find(|name| name.eq_ignore_ascii_case(wanted)));
    let initrd = found.map(|name| Initrd { path: join(folder, name), ..Initrd::default() });
    Some(Kernel { version: clean(&version), path, rescue: suffix.contains("rescue"), initrd, ..Kernel::default() })
}

fn join(folder: &str, name: &str) -> String {
    format!("{}/{name}", folder.trim_end_matches('/'))
}

/// The version that an x86 kernel tells of itself.
fn told_version(tree: &Rooted<'_>, path: &str) -> Option<String> {
    let head = tree.read(path, 0x10000)?;
    if head.get(0x202..0x206)? != b"HdrS" {
        return None;
    }
    let at = usize::from(number::le16(&head, 0x20e)?) + 0x200;
    let text = head.get(at..)?.iter().take(128).take_while(|byte| **byte > b' ').copied().collect();
    String::from_utf8(text).ok().filter(|version| version.starts_with(|c: char| c.is_ascii_digit()))
}

/// Numbers in versions are numbers: 6.10 is newer than 6.9.
fn newer(a: &str, b: &str) -> std::cmp::Ordering {
    fn parts(version: &str) -> Vec<(u64, &str)> {
        let words = version.split(|c: char| !c.is_ascii_alphanumeric());
        words
            .map(|word| word.split_at(word.find(|c: char| !c.is_ascii_digit()).unwrap_or(word.len())))
            .map(|(n, rest)| (n.parse().unwrap_or(0), rest))
            .collect()
    }
    parts(a).cmp(&parts(b))
}

/// Finds out where a kernel has the drivers.
fn drivers(tree: &Rooted<'_>, kernel: &mut Kernel, blocks: &Blocks, left: &mut u64) {
    let folders = ["/lib/modules", "/usr/lib/modules"].map(|folder| format!("{folder}/{}", kernel.version));
    let list = |name: &str| folders.iter().find_map(|folder| tree.text(&format!("{folder}/{name}"), MAX_LIST));
    let modules = |text: &str, ends: char| -> BTreeSet<String> {
        text.lines()
            .filter_map(|line| initrd::module(line.split(ends).next()?.trim()))
            .filter(|name| DRIVERS.contains(&name.as_str()))
            .collect()
    };
    let built_in = list("modules.builtin").map(|text| modules(&text, '\n'));
    let loadable = list("modules.dep").map(|text| modules(&text, ':'));
    let mut packed = BTreeSet::new();
    let mut is_seen = kernel.initrd.is_none();
    if let Some(initrd) = &mut kernel.initrd {
        match tree.open(&initrd.path) {
            Ok(file) => {
                initrd.size = file.size;
                let found = Look { wanted: &DRIVERS, blocks, left }.through(file.reader);
                initrd.compression = found.compression;
                is_seen = found.unknown.is_none();
                initrd.unknown = found.unknown.unwrap_or_default();
                packed = found.modules;
            }
            Err(e) => initrd.unknown = e.to_string(),
        }
    }
    let place = |name: &str| match () {
        () if built_in.as_ref().is_some_and(|built_in| built_in.contains(name)) => Place::BuiltIn,
        () if packed.contains(name) => Place::Initrd,
        () if !is_seen => Place::Unknown,
        () if loadable.as_ref().is_some_and(|loadable| loadable.contains(name)) => Place::Module,
        // What is built in stands in a list that was not found.
        () if built_in.is_none() => Place::Unknown,
        () => Place::Absent,
    };
    kernel.virtio_pci = place("virtio_pci");
    kernel.virtio_blk = place("virtio_blk");
    kernel.virtio_scsi = place("virtio_scsi");
    kernel.virtio_net = place("virtio_net");
    kernel.virtio = both(early(kernel.virtio_pci), early(kernel.virtio_blk));
}

fn early(place: Place) -> Answer {
    match place {
        Place::Unknown => Answer::Unknown,
        place if place.is_early() => Answer::Yes,
        _ => Answer::No,
    }
}

fn both(a: Answer, b: Answer) -> Answer {
    match (a, b) {
        (Answer::Yes, Answer::Yes) => Answer::Yes,
        (Answer::No, _) | (_, Answer::No) => Answer::No,
        _ => Answer::Unknown,
    }
}

/// The lines of an fstab.
pub fn fstab(text: &str) -> Vec<Mount> {
    let mut mounts = Vec::new();
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')).take(MAX_MOUNTS) {
        let mut fields = line.split_whitespace();
        let (Some(device), Some(at)) = (fields.next(), fields.next()) else { continue };
        let device = clean(device.trim_matches('"'));
        let (by, changes) = named_by(&device);
        mounts.push(Mount {
            at: clean(&at.replace("\\040", " ")),
            file_system: clean(fields.next().unwrap_or_default()),
            by: by.to_owned(),
            changes,
            device,
        });
    }
    mounts
}

/// How a device is named, and whether that name is another one on other hardware.
fn named_by(device: &str) -> (&'static str, bool) {
    let tag = device.split_once('=').map(|(tag, _)| tag.to_ascii_uppercase());
    match tag.as_deref() {
        Some("UUID") => return ("uuid", false),
        Some("LABEL") => return ("label", false),
        Some("PARTUUID") => return ("partuuid", false),
        Some("PARTLABEL") => return ("partlabel", false),
        _ => {}
    }
    let below = |folder: &str| device.starts_with(folder);
    match () {
        () if below("/dev/disk/by-uuid/") => ("uuid", false),
        () if below("/dev/disk/by-label/") => ("label", false),
        () if below("/dev/disk/by-partuuid/") => ("partuuid", false),
        () if below("/dev/disk/by-partlabel/") => ("partlabel", false),
        () if below("/dev/disk/by-id/dm-") || below("/dev/disk/by-id/lvm-") => ("lvm", false),
        () if below("/dev/disk/by-id/") || below("/dev/disk/by-path/") => ("path", true),
        () if below("/dev/mapper/") => ("lvm", false),
        () if is_hardware(device) => ("device", true),
        // /dev/GROUP/VOLUME.
        () if below("/dev/") && device.matches('/').count() == 3 => ("lvm", false),
        () => ("other", false),
    }
}

fn is_hardware(device: &str) -> bool {
    let starts = ["/dev/sd", "/dev/hd", "/dev/vd", "/dev/xvd", "/dev/nvme"];
    starts.iter().any(|start| device.strip_prefix(start).is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_alphanumeric())))
}

/// What is installed, by the files that are there and dpkg's own list.
pub fn software(tree: &Rooted<'_>) -> Software {
    let any = |paths: &[&str]| paths.iter().any(|path| tree.has(path));
    let answer = |is_there: bool| if is_there { Answer::Yes } else { Answer::No };
    let tools = ["/usr/bin/vmtoolsd", "/usr/sbin/vmtoolsd", "/usr/bin/vmware-toolbox-cmd", "/usr/sbin/vmware-guestd"];
    let program = tools.into_iter().find(|path| tree.has(path));
    let package = tree.read("/var/lib/dpkg/status", MAX_LIST).and_then(|list| installed(&list, "open-vm-tools"));
    Software {
        vmware_tools: answer(program.is_some() || package.is_some()),
        vmware_tools_version: package.map(|version| format!("open-vm-tools {version}")).or(program.map(str::to_owned)).unwrap_or_default(),
        guest_agent: answer(any(&["/usr/sbin/qemu-ga", "/usr/bin/qemu-ga"])),
        cloud_init: answer(any(&["/usr/bin/cloud-init", "/bin/cloud-init"])),
        grub_mkconfig: answer(any(&[
            "/usr/sbin/grub-mkconfig",
            "/usr/sbin/grub2-mkconfig",
            "/sbin/grub2-mkconfig",
            "/usr/bin/grub-mkconfig",
        ])),
    }
}

/// The version of an installed package in dpkg's list.
fn installed(list: &[u8], package: &str) -> Option<String> {
    let text = String::from_utf8_lossy(list);
    let paragraph = text.split("\n\n").find(|paragraph| paragraph.lines().next() == Some(&format!("Package: {package}")))?;
    let field = |name: &str| paragraph.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    field("Status:").filter(|status| status.ends_with(" installed")).map(|_| clean(field("Version:").unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_taken_as_a_shell_would() {
        let text = "NAME=\"Debian GNU/Linux\"\nID=debian\n# X=1\nVERSION_ID='12' # twelve\nID_LIKE=\nTAB = 1\nID=debian2";
        let value = |key| setting(text, key);
        assert_eq!(value("NAME").as_deref(), Some("Debian GNU/Linux"));
        assert_eq!((value("ID").as_deref(), value("VERSION_ID").as_deref()), (Some("debian2"), Some("12")));
        assert_eq!((value("ID_LIKE").as_deref(), value("X"), value("TAB")), (Some(""), None, None));
    }

    #[test]
    fn devices_of_an_fstab_are_told_by_how_they_are_named() {
        let text = "# /etc/fstab\nUUID=1234 / ext4 errors=remount-ro 0 1\n/dev/sda5 none swap sw 0 0\n/dev/mapper/vg-home /home xfs\n\
            /dev/vg/var /var ext4\nLABEL=x /a\\040b ext4\n/dev/disk/by-path/pci-0000:03:00.0 /m ext4\ntmpfs /tmp tmpfs\nbroken\nPARTUUID=\"7\" /p vfat\n\
            nas:/x /nas nfs\n/dev/nvme0n1p1 /n ext4\n/dev/cdrom /cd auto\n";
        let told: Vec<_> = fstab(text).into_iter().map(|m| (m.at, m.by, m.changes)).collect();
        let wanted = [
            ("/", "uuid", false),
            ("none", "device", true),
            ("/home", "lvm", false),
            ("/var", "lvm", false),
            ("/a b", "label", false),
            ("/m", "path", true),
            ("/tmp", "other", false),
            ("/p", "partuuid", false),
            ("/nas", "other", false),
            ("/n", "device", true),
            ("/cd", "other", false),
        ];
        assert_eq!(told, wanted.map(|(at, by, changes)| (at.to_owned(), by.to_owned(), changes)));
    }

    #[test]
    fn versions_are_ordered_as_people_do() {
        let mut versions = ["6.9.0-1", "6.10.0-1", "6.1.0-56-amd64", "5.14.0-427.el9", "6.1.0-9-amd64", "6.1.0"];
        versions.sort_by(|a, b| newer(b, a));
        assert_eq!(versions, ["6.10.0-1", "6.9.0-1", "6.1.0-56-amd64", "6.1.0-9-amd64", "6.1.0", "5.14.0-427.el9"]);
    }

    #[test]
    fn an_installed_package_is_one_that_was_not_removed() {
        let list = b"Package: open-vm-tools-desktop\nStatus: install ok installed\nVersion: 1\n\nPackage: open-vm-tools\n\
            Status: install ok installed\nVersion: 2:12.2.0-1\n\nPackage: gone\nStatus: deinstall ok config-files\nVersion: 3\n";
        assert_eq!(installed(list, "open-vm-tools").as_deref(), Some("2:12.2.0-1"));
        assert_eq!((installed(list, "gone"), installed(list, "vm-tools")), (None, None));
    }
}

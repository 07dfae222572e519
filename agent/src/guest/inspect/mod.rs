//! A look into a guest by its disks alone: read-only, in this process, in milliseconds.
//!
//! ```text
//! disks ─► volume (a bounded cache) ─► partitions, lvm ─► content (what lies in each) ─► ext, xfs, fat, ntfs (files)
//!                                                                                          └─► linux, initrd, network, windows, loader
//! ```
//! Owns: which file system is the guest's root, what is mounted into it, and the bounds of a look: time, bytes, memory.
//! Never: writes, starts a process, takes a guest's word without a bound, lets a reader's defect out: what panics is a note.
//! A crash here costs one answer.

mod content;
mod ext;
mod fat;
mod initrd;
mod linux;
mod loader;
mod lvm;
mod network;
mod ntfs;
mod partitions;
#[cfg(test)]
mod tests;
mod tree;
mod volume;
mod windows;
mod xfs;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use shared::guest::{Answer, Content, Guest, Kernel, LogicalVolume, Mount, System, VolumeGroup};

use self::ext::Ext;
use self::fat::Fat;
use self::ntfs::Ntfs;
use self::tree::{Rooted, Tree};
use self::volume::{Blocks, Bounds, Volume};
use self::xfs::Xfs;
use crate::formats::Disk;

/// How long a look may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// Most bytes of the disks that are read for one.
const MOST: u64 = 1 << 30;
/// Most disks of a VM that are looked at.
const MAX_DISKS: usize = 16;
/// Parts of a Linux that may lie apart, and that a look needs.
const PARTS: [&str; 3] = ["/boot", "/usr", "/var"];
/// Longest word of a guest that is told, characters.
const LONGEST: usize = 200;

/// Looks into a guest, for 5 s at most.
pub fn inspect(disks: &[Arc<dyn Disk>]) -> Guest {
    inspect_for(disks, PATIENCE)
}

/// The same for another time.
pub fn inspect_for(disks: &[Arc<dyn Disk>], patience: Duration) -> Guest {
    within(disks, Bounds { until: Instant::now() + patience, bytes: MOST })
}

fn within(disks: &[Arc<dyn Disk>], bounds: Bounds) -> Guest {
    let began = Instant::now();
    let mut guest = Guest { system: System { family: "unknown".to_owned(), ..System::default() }, ..Guest::default() };
    guest.boot.firmware = "unknown".to_owned();
    if disks.len() > MAX_DISKS {
        guest.notes.push(format!("{} disks, of which the first {MAX_DISKS} are looked at", disks.len()));
    }
    let disks = &disks[..disks.len().min(MAX_DISKS)];
    let blocks = Blocks::new(disks, bounds);
    let mut holders = Vec::new();
    for number in 0..disks.len() {
        guarded(&mut guest, &format!("disk {number}"), |guest| one_disk(guest, &blocks, number, &mut holders));
    }
    guarded(&mut guest, "LVM", |guest| volume_groups(guest, &mut holders));
    let mut places = Vec::new();
    for holder in &holders {
        if let Some(Some(tree)) = guarded(&mut guest, &holder.place.name(), |guest| files(guest, holder)) {
            places.push((holder, tree));
        }
    }
    guarded(&mut guest, "boot loaders", |guest| {
        for (holder, tree) in places.iter().filter(|(holder, _)| holder.content.file_system == "vfat") {
            guest.boot.loaders.extend(loader::in_efi(tree.as_ref(), &holder.place.name()));
        }
    });
    guest.boot.firmware = loader::firmware(&guest.boot.loaders).to_owned();
    guarded(&mut guest, "the operating system", |guest| operating_system(guest, &places, &blocks));
    if blocks.in_time().is_err() {
        guest.notes.push("the time for a look inside was over before its end".to_owned());
    }
    guest.read_bytes = blocks.read();
    guest.took_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
    guest
}

/// Does a part of the work. Readers are given what a guest has written: one that panics over it costs this part, and a note says so.
fn guarded<T>(guest: &mut Guest, what: &str, work: impl FnOnce(&mut Guest) -> T) -> Option<T> {
    match catch_unwind(AssertUnwindSafe(|| work(guest))) {
        Ok(done) => Some(done),
        Err(_) => {
            tracing::warn!(what, "a reader panicked over what a guest's disk holds");
            guest.notes.push(format!("{what}: it is damaged in a way that its reader does not withstand"));
            None
        }
    }
}

/// A word of a guest: without control characters, and of a bounded length.
fn clean(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(LONGEST).collect()
}

/// Where something lies.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    /// The n-th of the guest's partitions.
    Partition { index: usize, disk: u32, number: u32 },
    /// A logical volume: numbers of its group and of it, and their names.
    Logical { index: (usize, usize), group: String, name: String },
}

impl Place {
    fn name(&self) -> String {
        match self {
            Self::Partition { disk, number: 0, .. } => format!("disk {disk}"),
            Self::Partition { disk, number, .. } => format!("disk {disk}, partition {number}"),
            Self::Logical { group, name, .. } => format!("{group}/{name}"),
        }
    }
}

/// A partition or a logical volume that can be read.
struct Holder {
    place: Place,
    volume: Volume,
    content: Content,
    partuuid: String,
}

fn one_disk(guest: &mut Guest, blocks: &std::rc::Rc<Blocks>, number: usize, holders: &mut Vec<Holder>) {
    let Some(whole) = Volume::disk(blocks, number) else { return };
    let disk = u32::try_from(number).unwrap_or(u32::MAX);
    guest.boot.loaders.extend(loader::in_sector(&whole, &format!("disk {disk}")));
    let (partitions, notes) = partitions::read(disk, &whole);
    guest.notes.extend(notes);
    for mut partition in partitions {
        let place = Place::Partition { index: guest.partitions.len(), disk, number: partition.number };
        match whole.part(partition.start, partition.size) {
            // A container of others.
            Some(_) if partition.size == 0 => {}
            Some(volume) => {
                partition.content = content::probe(&volume);
                if partition.number > 0 {
                    guest.boot.loaders.extend(loader::in_sector(&volume, &place.name()));
                }
                holders.push(Holder { place, volume, content: partition.content.clone(), partuuid: partition.partuuid.clone() });
            }
            None => partition.content.unknown = "it leads out of its disk".to_owned(),
        }
        guest.partitions.push(partition);
    }
}

fn volume_groups(guest: &mut Guest, holders: &mut Vec<Holder>) {
    let physical: Vec<Volume> =
        holders.iter().filter(|holder| holder.content.file_system == "lvm2").map(|holder| holder.volume.clone()).collect();
    if physical.is_empty() {
        return;
    }
    let (groups, notes) = lvm::groups(&physical);
    guest.notes.extend(notes);
    for (group_index, group) in groups.into_iter().enumerate() {
        let mut told = VolumeGroup { name: group.name.clone(), volumes: Vec::new() };
        for (index, logical) in group.volumes.into_iter().enumerate() {
            let content = match logical.volume {
                Ok(volume) => {
                    let content = content::probe(&volume);
                    let place = Place::Logical { index: (group_index, index), group: group.name.clone(), name: logical.name.clone() };
                    holders.push(Holder { place, volume, content: content.clone(), partuuid: String::new() });
                    content
                }
                Err(unknown) => Content { unknown, ..Content::default() },
            };
            told.volumes.push(LogicalVolume { name: logical.name, size: logical.size, content });
        }
        guest.volume_groups.push(told);
    }
}

/// The files of what lies somewhere; nothing where it has none, or they are not read, which is told.
fn files(guest: &mut Guest, holder: &Holder) -> Option<Box<dyn Tree>> {
    let opened: std::io::Result<Box<dyn Tree>> = match holder.content.file_system.as_str() {
        "ext2" | "ext3" | "ext4" => Ext::open(&holder.volume).map(|(fs, note)| {
            guest.notes.extend(note.map(|note| format!("{}: {note}", holder.place.name())));
            Box::new(fs) as Box<dyn Tree>
        }),
        "vfat" => Fat::open(&holder.volume).map(|fs| Box::new(fs) as Box<dyn Tree>),
        "ntfs" => Ntfs::open(&holder.volume).map(|fs| Box::new(fs) as Box<dyn Tree>),
        "luks" | "bitlocker" => Err(std::io::Error::other("it is encrypted")),
        "xfs" => Xfs::open(&holder.volume).map(|fs| Box::new(fs) as Box<dyn Tree>),
        kind @ ("btrfs" | "exfat" | "raid") => Err(std::io::Error::other(format!("the files of {kind} are not read here"))),
        _ => return None,
    };
    let unknown = match opened {
        Ok(tree) => return Some(tree),
        Err(e) => clean(&e.to_string()),
    };
    let content = match &holder.place {
        Place::Partition { index, .. } => guest.partitions.get_mut(*index).map(|partition| &mut partition.content),
        Place::Logical { index: (group, volume), .. } => {
            guest.volume_groups.get_mut(*group).and_then(|group| group.volumes.get_mut(*volume)).map(|volume| &mut volume.content)
        }
    };
    if let Some(content) = content {
        content.unknown = unknown;
    }
    None
}

type Found<'h> = (&'h Holder, Box<dyn Tree>);

fn operating_system(guest: &mut Guest, places: &[Found<'_>], blocks: &Blocks) {
    let linux = places.iter().find_map(|(holder, tree)| Some((holder, tree, linux::system(&Rooted::new(tree.as_ref()))?)));
    if let Some((holder, tree, system)) = linux {
        guest.system = System { root: holder.place.name(), ..system };
        let mut rooted = Rooted::new(tree.as_ref());
        guest.mounts = linux::fstab(&rooted.text("/etc/fstab", linux::MAX_TEXT).unwrap_or_default());
        let mut missing = Vec::new();
        for mount in &guest.mounts {
            let found = places.iter().find(|(other, _)| is_named(mount, other) && other.place != holder.place);
            match found {
                Some((_, tree)) if mount.at.starts_with('/') => rooted.mount(&mount.at, tree.as_ref()),
                None if PARTS.contains(&mount.at.as_str()) => missing.push(format!("{} ({}) was not read", mount.at, mount.device)),
                _ => {}
            }
        }
        let is_whole = missing.is_empty();
        guest.notes.extend(missing);
        loader::arguments(&rooted, &mut guest.boot);
        guest.interfaces = network::interfaces(&rooted, guest.boot.kernel_names);
        // What is not there may lie where nobody looked.
        guest.software = if is_whole { linux::software(&rooted) } else { linux::software(&rooted).only_yes() };
        guest.kernels = linux::kernels(&rooted, &["/boot", "/"], blocks, &mut guest.notes);
        guest.virtio = guest.default_kernel().map_or(Answer::Unknown, |kernel| kernel.virtio);
        return;
    }
    let windows = places.iter().find_map(|(holder, tree)| Some((holder, tree, windows::system(tree.as_ref())?)));
    if let Some((holder, tree, system)) = windows {
        guest.system = System { root: holder.place.name(), ..system };
        let rooted = Rooted::new(tree.as_ref());
        guest.virtio = windows::virtio(&rooted);
        guest.software = windows::software(&rooted);
        return;
    }
    // No root that is read; kernels may lie where they are booted from all the same.
    let mut kernels: Vec<Kernel> = Vec::new();
    for (_, tree) in places {
        let rooted = Rooted::new(tree.as_ref());
        if kernels.is_empty() {
            kernels = linux::kernels(&rooted, &["/", "/boot"], blocks, &mut guest.notes);
            loader::arguments(&rooted, &mut guest.boot);
        }
    }
    guest.virtio = Answer::Unknown;
    guest.kernels = kernels;
    guest.virtio = guest.default_kernel().map_or(Answer::Unknown, |kernel| kernel.virtio);
    let partitions = guest.partitions.iter().map(|partition| (partition.place(), &partition.content));
    let volumes =
        guest.volume_groups.iter().flat_map(|group| group.volumes.iter().map(|v| (format!("{}/{}", group.name, v.name), &v.content)));
    let unread = partitions.chain(volumes).filter(|(_, content)| !content.unknown.is_empty());
    let unread: Vec<String> = unread.take(8).map(|(name, content)| format!("{name}: {}", content.unknown)).collect();
    guest.notes.extend(unread);
    guest.notes.push("no file system that is read here holds an operating system".to_owned());
}

/// Whether a line of fstab means this one.
fn is_named(mount: &Mount, holder: &Holder) -> bool {
    let value = mount.device.split_once('=').map_or("", |(_, value)| value).trim_matches('"');
    let below = |folder: &str| mount.device.strip_prefix(folder).unwrap_or_default();
    let same = |a: &str, b: &str| !a.is_empty() && a.eq_ignore_ascii_case(b);
    match mount.by.as_str() {
        "uuid" => same(value, &holder.content.uuid) || same(below("/dev/disk/by-uuid/"), &holder.content.uuid),
        "label" => same(value, &holder.content.label) || same(below("/dev/disk/by-label/"), &holder.content.label),
        "partuuid" => same(value, &holder.partuuid) || same(below("/dev/disk/by-partuuid/"), &holder.partuuid),
        "lvm" => match &holder.place {
            // The mapper doubles the hyphens of names.
            Place::Logical { group, name, .. } => {
                let mapped = format!("{}-{}", group.replace('-', "--"), name.replace('-', "--"));
                mount.device == format!("/dev/{group}/{name}") || mount.device == format!("/dev/mapper/{mapped}")
            }
            Place::Partition { .. } => false,
        },
        "device" => match holder.place {
            // Disks in order are sda, sdb, …, as they most often are.
            Place::Partition { disk, number, .. } if disk < 26 => {
                let letter = char::from(b'a' + u8::try_from(disk).unwrap_or(0));
                ["sd", "hd", "vd", "xvd"].iter().any(|start| mount.device == format!("/dev/{start}{letter}{number}"))
            }
            _ => false,
        },
        _ => false,
    }
}

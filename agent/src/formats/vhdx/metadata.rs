//! The metadata region: what the disk is.
//!
//! Owns: the table of items and the five that every image has.
//! Never: reads user items or a parent's locator. A crash here costs nothing.

use super::super::disk::Result;
use super::image::Image;
use super::region::Region;
use super::{Guid, MIB, bytes_at, corrupt, guid, print, refused, u16_at, u32_at};

/// Length of the table, behind which the items lie (2.6.1).
pub(super) const TABLE: u64 = 64 << 10;

/// First bytes of the table.
pub(super) const SIGNATURE: &[u8; 8] = b"metadata";

/// Entries that fit the table.
const MAX_ENTRIES: u16 = 2047;

/// Longest item.
const MAX_ITEM: u64 = MIB;

/// Bytes of an entry, and of the table's header.
pub(super) const ENTRY: usize = 32;

/// The known items (2.6.2).
pub(super) const FILE_PARAMETERS: Guid = guid(0xcaa1_6737_fa36_4d43_b3b6_33f0_aa44_e76b);
pub(super) const DISK_SIZE: Guid = guid(0x2fa5_4224_cd1b_4876_b211_5dbe_d83b_f4b8);
pub(super) const DISK_ID: Guid = guid(0xbeca_12ab_b2e6_4523_93ef_c309_e000_c746);
pub(super) const LOGICAL_SECTOR: Guid = guid(0x8141_bf1d_a96f_4709_ba47_f233_a8fa_ab5f);
pub(super) const PHYSICAL_SECTOR: Guid = guid(0xcda3_48c7_445d_4471_9cc9_e988_5251_c556);
pub(super) const PARENT_LOCATOR: Guid = guid(0xa8d3_5f2d_b30b_454d_abf7_d3d8_4834_ab0c);

/// Flags of an entry.
const IS_USER: u32 = 1;
const IS_REQUIRED: u32 = 4;

/// Flags of the file parameters.
const LEAVE_ALLOCATED: u32 = 1;
const HAS_PARENT: u32 = 2;

/// Largest disk, in bytes: 64 TiB (2.6.2.2).
pub const MAX_CAPACITY: u64 = 64 << 40;

/// What the disk is. Lengths in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Metadata {
    /// Length of a payload block, a power of two from 1 MiB to 256 MiB.
    pub(super) block: u64,
    /// Whether blocks stay allocated for good: a fixed image.
    pub(super) fixed: bool,
    pub(super) capacity: u64,
    /// 512 or 4096.
    pub(super) sector: u64,
}

/// An item's place, counted from the region's start.
#[derive(Clone, Copy)]
struct Item {
    index: u64,
    offset: u64,
    len: u64,
}

impl Metadata {
    pub(super) fn read(image: &Image, region: Region) -> Result<Self> {
        let items = Items::read(image, region)?;
        let parameters = items.get::<8>(FILE_PARAMETERS, "file parameters")?;
        let (block, flags) = (u64::from(u32_at(&parameters, 0)), u32_at(&parameters, 4));
        if flags & HAS_PARENT != 0 || items.place(PARENT_LOCATOR).is_some() {
            return Err(refused("a differencing disk, which needs its parent; merge it with its parent first (Merge-VHD in Hyper-V)"));
        }
        let bad = |id: Guid, reason: String| {
            let item = items.place(id).map_or((0, 0), |item| (item.index, item.offset));
            corrupt("metadata item", item.0, region.offset + item.1, reason)
        };
        if !block.is_power_of_two() || !(MIB..=256 * MIB).contains(&block) {
            return Err(bad(FILE_PARAMETERS, format!("a block size of {block} bytes; a power of two from 1 MiB to 256 MiB is allowed")));
        }
        let sector = u64::from(u32::from_le_bytes(items.get::<4>(LOGICAL_SECTOR, "logical sector size")?));
        if sector != 512 && sector != 4096 {
            return Err(bad(LOGICAL_SECTOR, format!("a logical sector size of {sector} bytes; 512 and 4096 are allowed")));
        }
        let physical = u32::from_le_bytes(items.get::<4>(PHYSICAL_SECTOR, "physical sector size")?);
        if physical != 512 && physical != 4096 {
            return Err(bad(PHYSICAL_SECTOR, format!("a physical sector size of {physical} bytes; 512 and 4096 are allowed")));
        }
        let capacity = u64::from_le_bytes(items.get::<8>(DISK_SIZE, "virtual disk size")?);
        if !capacity.is_multiple_of(sector) {
            return Err(bad(DISK_SIZE, format!("a disk of {capacity} bytes is not made of whole sectors of {sector}")));
        }
        if capacity > MAX_CAPACITY {
            return Err(bad(DISK_SIZE, format!("a disk of {capacity} bytes is over the format's limit of 64 TiB ({MAX_CAPACITY} bytes)")));
        }
        items.get::<16>(DISK_ID, "virtual disk id")?;
        Ok(Self { block, fixed: flags & LEAVE_ALLOCATED != 0, capacity, sector })
    }
}

/// The system items of the region.
struct Items<'a> {
    image: &'a Image,
    region: Region,
    found: Vec<(Guid, Item)>,
}

impl<'a> Items<'a> {
    fn read(image: &'a Image, region: Region) -> Result<Self> {
        let bad = |reason: String| corrupt("metadata table", 0, region.offset, reason);
        if region.len < TABLE {
            return Err(bad(format!("its region has {} bytes, the table {TABLE}", region.len)));
        }
        let mut bytes = vec![0u8; TABLE as usize];
        image.read_exact_at(&mut bytes, region.offset)?;
        if !bytes.starts_with(SIGNATURE) {
            return Err(bad("does not start with \"metadata\"".to_owned()));
        }
        let count = u16_at(&bytes, 10);
        if count > MAX_ENTRIES {
            return Err(bad(format!("has {count} entries, at most {MAX_ENTRIES} fit")));
        }
        let mut found: Vec<(Guid, Item)> = Vec::new();
        let mut places: Vec<(u64, u64)> = Vec::new();
        for (i, entry) in bytes.chunks_exact(ENTRY).skip(1).take(usize::from(count)).enumerate() {
            let id: Guid = bytes_at(entry, 0);
            let item = Item { index: i as u64, offset: u64::from(u32_at(entry, 16)), len: u64::from(u32_at(entry, 20)) };
            let flags = u32_at(entry, 24);
            let known = [FILE_PARAMETERS, DISK_SIZE, DISK_ID, LOGICAL_SECTOR, PHYSICAL_SECTOR, PARENT_LOCATOR].contains(&id);
            if (!known || flags & IS_USER != 0) && flags & IS_REQUIRED != 0 {
                return Err(refused(format!("its metadata item {} is required and not known", print(&id))));
            }
            let wrong =
                |reason: String| corrupt("metadata item", item.index, region.offset + item.offset, format!("{} {reason}", print(&id)));
            if item.len > MAX_ITEM || item.len > 0 && (item.offset < TABLE || item.offset + item.len > region.len) {
                return Err(wrong(format!("has {} bytes, which lie on the table or past the region's end at {}", item.len, region.len)));
            }
            if item.len > 0 {
                places.push((item.offset, item.len));
            }
            if flags & IS_USER != 0 || !known {
                continue;
            }
            if found.iter().any(|(other, _)| *other == id) {
                return Err(wrong("is there twice".to_owned()));
            }
            found.push((id, item));
        }
        places.sort_unstable();
        if let Some(pair) = places.windows(2).find(|pair| pair[0].0 + pair[0].1 > pair[1].0) {
            return Err(corrupt("metadata item", 0, region.offset + pair[1].0, "lies on another item"));
        }
        Ok(Self { image, region, found })
    }

    fn place(&self, id: Guid) -> Option<Item> {
        self.found.iter().find(|(other, _)| *other == id).map(|(_, item)| *item)
    }

    /// The bytes of an item that has just `N` of them.
    fn get<const N: usize>(&self, id: Guid, name: &str) -> Result<[u8; N]> {
        let Some(item) = self.place(id) else {
            return Err(corrupt("metadata table", 0, self.region.offset, format!("has no {name}")));
        };
        if item.len != N as u64 {
            let reason = format!("the {name} has {} bytes instead of {N}", item.len);
            return Err(corrupt("metadata item", item.index, self.region.offset + item.offset, reason));
        }
        let mut bytes = [0u8; N];
        self.image.read_exact_at(&mut bytes, self.region.offset + item.offset)?;
        Ok(bytes)
    }
}

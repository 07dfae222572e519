//! The region table: where the BAT and the metadata lie.
//!
//! Owns: the choice between the table's two copies, and that no region lies on another, on the header section or on the log.
//! Never: reads what is in a region. A crash here costs nothing.

use super::super::disk::Result;
use super::header::Header;
use super::image::Image;
use super::{Guid, HEADER_SECTION, MIB, REGION_TABLES, bytes_at, corrupt, crc, guid, print, refused, u32_at, u64_at};

/// Length of a table as far as its checksum goes (2.2.3).
pub(super) const TABLE: usize = 64 << 10;

/// First bytes of a table.
pub(super) const SIGNATURE: &[u8; 4] = b"regi";

/// Entries that fit a table.
const MAX_ENTRIES: u32 = 2047;

/// Bytes of the table's header, and of an entry.
pub(super) const HEADER: usize = 16;
pub(super) const ENTRY: usize = 32;

/// The two regions that there always are (2.2.3.2).
pub(super) const BAT: Guid = guid(0x2dc2_7766_f623_4200_9d64_115e_9bfd_4a08);
pub(super) const METADATA: Guid = guid(0x8b7c_a206_4790_4b9a_b8fe_575f_050f_886e);

/// A part of the file, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Region {
    pub(super) offset: u64,
    pub(super) len: u64,
}

/// All that the region table names.
#[derive(Debug)]
pub(super) struct Regions {
    pub(super) bat: Region,
    pub(super) metadata: Region,
    /// All parts of the file that no payload block may take, ascending: header section, log, every region.
    pub(super) taken: Vec<Region>,
}

impl Regions {
    pub(super) fn read(image: &Image, header: &Header) -> Result<Self> {
        let (table, bytes) = valid_table(image)?;
        let bad = |reason: String| corrupt("region table", table, REGION_TABLES[table as usize], reason);
        let count = u32_at(&bytes, 8);
        if count > MAX_ENTRIES {
            return Err(bad(format!("has {count} entries, at most {MAX_ENTRIES} fit")));
        }
        let (mut bat, mut metadata) = (None, None);
        let log = Region { offset: header.log_offset, len: header.log_len };
        let mut taken = vec![Region { offset: 0, len: HEADER_SECTION }, log];
        for (i, entry) in bytes[HEADER..].chunks_exact(ENTRY).take(count as usize).enumerate() {
            let id: Guid = bytes_at(entry, 0);
            let region = Region { offset: u64_at(entry, 16), len: u64::from(u32_at(entry, 24)) };
            check_place(i as u64, &id, region, image.len())?;
            let known = match id {
                BAT => Some(&mut bat),
                METADATA => Some(&mut metadata),
                _ => None,
            };
            match known {
                Some(Some(_)) => return Err(bad(format!("names region {} twice", print(&id)))),
                Some(slot) => *slot = Some(region),
                None if u32_at(entry, 28) & 1 == 1 => {
                    let reason = format!("its region {} is required and not known; BAT and metadata are", print(&id));
                    return Err(refused(reason));
                }
                None => {}
            }
            taken.push(region);
        }
        taken.retain(|region| region.len > 0);
        taken.sort_unstable();
        for (i, pair) in taken.windows(2).enumerate() {
            if pair[0].offset + pair[0].len > pair[1].offset {
                let reason = format!("its {} bytes lie on the header section, the log or another region", pair[1].len);
                return Err(corrupt("region", i as u64, pair[1].offset, reason));
            }
        }
        let missing = |name: &str| bad(format!("names no {name} region"));
        Ok(Self { bat: bat.ok_or_else(|| missing("BAT"))?, metadata: metadata.ok_or_else(|| missing("metadata"))?, taken })
    }
}

fn check_place(index: u64, id: &Guid, region: Region, file_len: u64) -> Result<()> {
    let bad = |reason: String| Err(corrupt("region", index, region.offset, format!("{} {reason}", print(id))));
    if !region.offset.is_multiple_of(MIB) || !region.len.is_multiple_of(MIB) {
        return bad(format!("has {} bytes, which are not whole MiB at a whole MiB", region.len));
    }
    match region.offset.checked_add(region.len) {
        Some(end) if end <= file_len => Ok(()),
        _ => bad(format!("has {} bytes and runs past the file's end at {file_len}", region.len)),
    }
}

/// Number and bytes of the first valid copy of the table. Two valid copies must agree.
fn valid_table(image: &Image) -> Result<(u64, Vec<u8>)> {
    match (read(image, REGION_TABLES[0])?, read(image, REGION_TABLES[1])?) {
        (Ok(first), Ok(second)) if first != second => {
            Err(corrupt("region table", 1, REGION_TABLES[1], "it and the first copy are both valid, but differ"))
        }
        (Ok(first), _) => Ok((0, first)),
        (Err(_), Ok(second)) => Ok((1, second)),
        (Err(a), Err(b)) => {
            let reason = format!("it {a}, and its copy at {} {b}", REGION_TABLES[1]);
            Err(corrupt("region table", 0, REGION_TABLES[0], reason))
        }
    }
}

/// The table at `offset`, or why it is not valid.
fn read(image: &Image, offset: u64) -> Result<std::result::Result<Vec<u8>, String>> {
    let mut bytes = vec![0u8; TABLE];
    image.read_exact_at(&mut bytes, offset)?;
    if !bytes.starts_with(SIGNATURE) {
        return Ok(Err("does not start with \"regi\"".to_owned()));
    }
    let (stored, computed) = (u32_at(&bytes, 4), crc::of_structure(&bytes));
    if stored != computed {
        return Ok(Err(format!("has the checksum {stored:08x}, its bytes give {computed:08x}")));
    }
    Ok(Ok(bytes))
}

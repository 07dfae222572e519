//! LVM2: volume groups, and their linear volumes as volumes to read.
//!
//! Owns: labels, the newest text of a group's metadata, and which runs of which disks a volume is. Never: guesses a volume whose layout is
//! another one than linear, or a part of which is not there: it is told with the reason. A crash here costs nothing.
//!
//! ```text
//! label (sector 0..3) ─► metadata areas ─► text: vg { physical_volumes { pv0 … } logical_volumes { root { segment1 { stripes = [pv0, 0] } } } }
//! ```

mod text;

use std::collections::BTreeMap;

use self::text::{Section, Value};
use super::volume::{Volume, number};

/// Longest metadata text.
const MAX_TEXT: u64 = 4 << 20;
/// Most logical volumes of a group, and segments of a volume.
const MAX_VOLUMES: usize = 256;
const MAX_SEGMENTS: u64 = 10_000;
const SECTOR: u64 = 512;

/// A logical volume.
pub struct Logical {
    /// Its name.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// Its bytes, or why they cannot be read.
    pub volume: Result<Volume, String>,
}

/// A volume group.
pub struct Group {
    /// Its name.
    pub name: String,
    /// Its volumes, by name; those that only serve others are left out.
    pub volumes: Vec<Logical>,
}

/// Where the label lies and the header behind it.
fn header(volume: &Volume) -> Option<Vec<u8>> {
    for sector in 0..4 {
        let bytes = volume.bytes(sector * SECTOR, SECTOR as usize).ok()?;
        if bytes.starts_with(b"LABELONE") && bytes.get(24..32) == Some(b"LVM2 001") {
            let at = number::le32(&bytes, 20)? as usize;
            return (at < SECTOR as usize).then(|| bytes[at..].to_vec());
        }
    }
    None
}

/// The UUID of a physical volume as LVM tells it; nothing where it is none.
pub fn label(volume: &Volume) -> Option<String> {
    let header = header(volume)?;
    let raw = header.get(..32).filter(|raw| raw.iter().all(u8::is_ascii_alphanumeric))?;
    let mut text = String::with_capacity(38);
    for (n, byte) in raw.iter().enumerate() {
        if matches!(n, 6 | 10 | 14 | 18 | 22 | 26) {
            text.push('-');
        }
        text.push(char::from(*byte));
    }
    Some(text)
}

/// The newest text of a physical volume's metadata areas, with its number.
fn metadata(volume: &Volume) -> Result<Option<(u64, Section)>, String> {
    let header = header(volume).ok_or("it bears no label")?;
    // Behind id and size: data areas, none, metadata areas, none.
    let pairs = header.get(40..).unwrap_or_default().chunks_exact(16);
    let pairs = pairs.map(|pair| (number::le64(pair, 0).unwrap_or_default(), number::le64(pair, 8).unwrap_or_default()));
    let areas = pairs.skip_while(|pair| *pair != (0, 0)).skip(1).take_while(|pair| *pair != (0, 0)).take(4);
    let mut newest: Option<(u64, Section)> = None;
    let mut failed = None;
    for (offset, size) in areas {
        match area(volume, offset, size) {
            Ok(Some(found)) if newest.as_ref().is_none_or(|newest| found.0 > newest.0) => newest = Some(found),
            Ok(_) => {}
            Err(e) => failed = Some(e),
        }
    }
    match (newest, failed) {
        (Some(newest), _) => Ok(Some(newest)),
        (None, Some(e)) => Err(e),
        (None, None) => Ok(None),
    }
}

fn area(volume: &Volume, offset: u64, size: u64) -> Result<Option<(u64, Section)>, String> {
    let unread = |e: std::io::Error| format!("its metadata cannot be read: {e}");
    let head = volume.bytes(offset, SECTOR as usize).map_err(unread)?;
    if head.get(4..20) != Some(b" LVM2 x[5A%r0N*>") {
        return Err("its metadata area is damaged".to_owned());
    }
    let field = |at| number::le64(&head, at).unwrap_or_default();
    let (start, length) = (field(40), field(48));
    if start == 0 || length == 0 {
        return Ok(None);
    }
    if length > MAX_TEXT || start >= size || length > size || offset.checked_add(size).is_none_or(|end| end > volume.len()) {
        return Err("its metadata leads out of their area".to_owned());
    }
    // It goes on behind the header once it meets the end.
    let first = length.min(size - start);
    let mut bytes = volume.bytes(offset + start, first as usize).map_err(unread)?;
    if first < length {
        bytes.extend(volume.bytes(offset + SECTOR, (length - first) as usize).map_err(unread)?);
    }
    let root = text::parse(&String::from_utf8_lossy(&bytes)).map_err(|e| format!("its metadata cannot be read: {e}"))?;
    let number = root.sections().find_map(|(_, group)| group.number("seqno")).ok_or("its metadata names no group")?;
    Ok(Some((number, root)))
}

/// The groups of these physical volumes, and what is odd about them.
pub fn groups(physical: &[Volume]) -> (Vec<Group>, Vec<String>) {
    let mut notes = Vec::new();
    let mut newest: BTreeMap<String, (u64, Section)> = BTreeMap::new();
    let mut by_id: BTreeMap<String, &Volume> = BTreeMap::new();
    for volume in physical {
        let Some(id) = label(volume) else { continue };
        match metadata(volume) {
            Ok(Some((number, root))) => {
                for (name, group) in root.into_sections() {
                    if group.number("seqno").is_some() && newest.get(&name).is_none_or(|(standing, _)| *standing < number) {
                        newest.insert(name, (number, group));
                    }
                }
            }
            Ok(None) => {}
            Err(e) => notes.push(format!("LVM {id}: {e}")),
        }
        by_id.insert(id, volume);
    }
    let groups = newest.iter().map(|(name, (_, section))| group(name, section, &by_id, &mut notes)).collect();
    (groups, notes)
}

fn group(name: &str, section: &Section, by_id: &BTreeMap<String, &Volume>, notes: &mut Vec<String>) -> Group {
    let mut places: BTreeMap<&str, (Option<&Volume>, u64)> = BTreeMap::new();
    for (place, described) in section.section("physical_volumes").into_iter().flat_map(Section::sections) {
        let volume = described.text("id").and_then(|id| by_id.get(id).copied());
        places.insert(place, (volume, described.number("pe_start").unwrap_or_default()));
    }
    let missing = places.values().filter(|(volume, _)| volume.is_none()).count();
    if missing > 0 {
        notes.push(format!("volume group {name}: {missing} of {} physical volumes are not among the disks", places.len()));
    }
    let extent = section.number("extent_size").unwrap_or_default();
    let mut volumes = Vec::new();
    for (volume, described) in section.section("logical_volumes").into_iter().flat_map(Section::sections).take(MAX_VOLUMES) {
        let is_visible = described.words("status").any(|word| word == "VISIBLE");
        if is_visible {
            let (size, volume_of) = logical(described, extent, &places);
            volumes.push(Logical { name: super::clean(volume), size, volume: volume_of });
        }
    }
    Group { name: super::clean(name), volumes }
}

fn logical(section: &Section, extent: u64, places: &BTreeMap<&str, (Option<&Volume>, u64)>) -> (u64, Result<Volume, String>) {
    let count = section.number("segment_count").unwrap_or_default();
    if count == 0 || count > MAX_SEGMENTS {
        return (0, Err(format!("it has {count} segments")));
    }
    let (mut size, mut parts, mut failed) = (0u64, Vec::new(), None);
    for n in 1..=count {
        let Some(segment) = section.section(&format!("segment{n}")) else {
            return (size, Err(format!("its segment {n} is not described")));
        };
        let extents = segment.number("extent_count").unwrap_or_default();
        let len = extents.saturating_mul(extent).saturating_mul(SECTOR);
        if segment.number("start_extent").unwrap_or_default().saturating_mul(extent).saturating_mul(SECTOR) != size {
            failed = Some("its segments do not follow one another".to_owned());
        }
        size = size.saturating_add(len);
        let kind = segment.text("type").unwrap_or_default();
        if kind != "striped" || segment.number("stripe_count") != Some(1) {
            let kind = if kind == "striped" { "stripes over several disks" } else { kind };
            failed = Some(format!("its layout is {}, which is not read", super::clean(kind)));
            continue;
        }
        let stripe = match segment.get("stripes") {
            Some(Value::List(list)) => match list.as_slice() {
                [Value::Text(place), Value::Number(first), ..] => Some((place.as_str(), *first)),
                _ => None,
            },
            _ => None,
        };
        let part = stripe.and_then(|(place, first)| {
            let (volume, start) = places.get(place)?;
            let from = first.checked_mul(extent)?.checked_add(*start)?.checked_mul(SECTOR)?;
            (*volume)?.part(from, len)
        });
        match part {
            Some(part) => parts.push(part),
            None => failed = Some("a part of it lies on what is not among the disks".to_owned()),
        }
    }
    match (failed, Volume::chain(&parts)) {
        (None, Some(volume)) => (size, Ok(volume)),
        (Some(reason), _) => (size, Err(reason)),
        (None, None) => (size, Err("it has no segments".to_owned())),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub mod tests {
    use super::super::volume::tests::volume;
    use super::*;

    /// A physical volume of 8 MiB with this metadata text, which wraps around the end of its area. Extents of 1 MiB, the first at 1 MiB.
    pub fn physical(id: &str, text: &str) -> Vec<u8> {
        let mut bytes = vec![0u8; 8 << 20];
        let label = &mut bytes[512..1024];
        label[..8].copy_from_slice(b"LABELONE");
        label[8] = 1;
        label[20] = 32;
        label[24..32].copy_from_slice(b"LVM2 001");
        label[32..64].copy_from_slice(id.replace('-', "").as_bytes());
        let put = |label: &mut [u8], at: usize, value: u64| label[at..at + 8].copy_from_slice(&value.to_le_bytes());
        put(label, 64, 8 << 20);
        put(label, 72, 1 << 20); // the data area, to its end
        put(label, 104, 4096); // the metadata area
        put(label, 112, 64 << 10);
        let area = &mut bytes[4096..4096 + (64 << 10)];
        area[4..20].copy_from_slice(b" LVM2 x[5A%r0N*>");
        let start = (64 << 10) - 100;
        put(area, 40, start as u64);
        put(area, 48, text.len() as u64);
        area[start..].copy_from_slice(&text.as_bytes()[..100]);
        area[512..512 + text.len() - 100].copy_from_slice(&text.as_bytes()[100..]);
        bytes
    }

    pub const ID: &str = "a1b2c3-0000-1111-2222-3333-4444-z9y8x7";

    /// A group `vg` with a volume `root` of two segments in wrong order, `data` over several disks and `thin` in a pool.
    pub fn described(id: &str) -> String {
        format!(
            "vg {{\nid = \"x\"\nseqno = 7\nstatus = [\"RESIZEABLE\", \"READ\"]\nextent_size = 2048 # 1 Megabytes\n\
             physical_volumes {{\npv0 {{\nid = \"{id}\"\npe_start = 2048\npe_count = 7\n}}\n}}\n\
             logical_volumes {{\nroot {{\nstatus = [\"READ\", \"VISIBLE\"]\nsegment_count = 2\n\
             segment1 {{\nstart_extent = 0\nextent_count = 2\ntype = \"striped\"\nstripe_count = 1\nstripes = [\n\"pv0\", 4\n]\n}}\n\
             segment2 {{\nstart_extent = 2\nextent_count = 1\ntype = \"striped\"\nstripe_count = 1\nstripes = [\"pv0\", 1]\n}}\n}}\n\
             data {{\nstatus = [\"VISIBLE\"]\nsegment_count = 1\nsegment1 {{\nstart_extent = 0\nextent_count = 1\ntype = \"striped\"\n\
             stripe_count = 2\nstripes = [\"pv0\", 1, \"pv1\", 1]\n}}\n}}\n\
             hidden {{\nstatus = [\"READ\"]\nsegment_count = 1\n}}\n\
             thin {{\nstatus = [\"VISIBLE\"]\nsegment_count = 1\nsegment1 {{\nstart_extent = 0\nextent_count = 1\ntype = \"thin\"\n}}\n}}\n}}\n}}\n\
             contents = \"Text Format Volume Group\"\nversion = 1\n"
        )
    }

    #[test]
    fn linear_volumes_are_read_and_others_told() {
        let mut bytes = physical(ID, &described(ID));
        bytes[5 << 20] = 1;
        bytes[(6 << 20) + 5] = 2;
        bytes[2 << 20] = 3;
        let (groups, notes) = groups(&[volume(bytes)]);
        assert!(notes.is_empty(), "{notes:?}");
        let [group] = groups.as_slice() else { panic!("{}", groups.len()) };
        let told: Vec<_> = group.volumes.iter().map(|v| (v.name.as_str(), v.size >> 20, v.volume.is_ok())).collect();
        assert_eq!((group.name.as_str(), told), ("vg", vec![("data", 1, false), ("root", 3, true), ("thin", 1, false)]));
        let root = group.volumes[1].volume.as_ref().unwrap();
        let byte = |at| root.bytes(at, 1).unwrap()[0];
        assert_eq!((byte(0), byte((1 << 20) + 5), byte(2 << 20)), (1, 2, 3));
    }

    #[test]
    fn metadata_that_lie_are_refused() {
        for (from, to) in [
            ("stripes = [\n\"pv0\", 4", "stripes = [\n\"pv0\", 6"),
            ("\"pv0\", 4", "\"pv0\", 99999999999999999999"),
            ("start_extent = 2", "start_extent = 9"),
            ("segment_count = 2", "segment_count = 5"),
            ("segment_count = 2", "segment_count = 4000000000"),
            ("extent_size = 2048", "extent_size = 9223372036854775807"),
        ] {
            let text = described(ID).replace(from, to);
            let (groups, _) = groups(&[volume(physical(ID, &text))]);
            assert!(groups.iter().flat_map(|group| &group.volumes).filter(|v| v.name == "root").all(|v| v.volume.is_err()), "{to}");
        }
        let (alone, notes) = groups(&[volume(physical(ID, &described("b1b2c3-0000-1111-2222-3333-4444-z9y8x7")))]);
        assert!(alone[0].volumes.iter().all(|v| v.volume.is_err()) && notes[0].contains("1 of 1"), "{notes:?}");
        let mut torn = physical(ID, &described(ID));
        torn[4096 + 48..4096 + 56].fill(0xff);
        let (none, notes) = groups(&[volume(torn)]);
        assert!(none.is_empty() && notes[0].contains("leads out"), "{notes:?}");
    }
}

//! The descriptor: the text that says which extents make up a disk.
//!
//! Owns: its grammar (Virtual Disk Format 5.0, "The Descriptor File"), the list of kinds that we read, and every refusal that keeps a
//! descriptor from naming something else than a file beside it. Never: opens an extent.
//! A crash here costs nothing: pure functions over at most 1 MiB of text.

use super::super::disk::{FormatError, Result};
use super::NAME;
use super::header::SECTOR;

/// Longest descriptor, in bytes.
pub const MAX_BYTES: u64 = 1 << 20;
/// Most extents in one disk. A disk of 4 TiB in 2 GiB pieces has 2048.
pub const MAX_EXTENTS: usize = 2048;

/// The `createType`s that we read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// One sparse file with its descriptor inside.
    MonolithicSparse,
    /// One compressed file with its descriptor inside: what an OVA and an NFC lease carry.
    StreamOptimized,
    /// A descriptor beside one flat file.
    MonolithicFlat,
    /// A descriptor beside sparse files of 2 GB.
    TwoGbMaxExtentSparse,
    /// A descriptor beside flat files of 2 GB.
    TwoGbMaxExtentFlat,
    /// What lies on an ESXi datastore: a descriptor beside one flat file.
    Vmfs,
}

impl Kind {
    const ALL: [(&'static str, Kind); 6] = [
        ("monolithicSparse", Kind::MonolithicSparse),
        ("streamOptimized", Kind::StreamOptimized),
        ("monolithicFlat", Kind::MonolithicFlat),
        ("twoGbMaxExtentSparse", Kind::TwoGbMaxExtentSparse),
        ("twoGbMaxExtentFlat", Kind::TwoGbMaxExtentFlat),
        ("vmfs", Kind::Vmfs),
    ];

    /// The name as the descriptor spells it.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(_, kind)| *kind == self).map_or("", |(name, _)| name)
    }

    /// True when the descriptor lies inside the one extent.
    pub fn embedded(self) -> bool {
        matches!(self, Kind::MonolithicSparse | Kind::StreamOptimized)
    }
}

/// How an extent's bytes lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Body {
    /// A hosted sparse file of this bare name.
    Sparse(String),
    /// A flat file of this bare name, from this byte on.
    Flat(String, u64),
    /// No file: zeros.
    Zero,
}

/// One line of the extent description.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// Length in sectors, never 0.
    pub sectors: u64,
    /// What stands behind it.
    pub body: Body,
}

/// A checked descriptor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Its `createType`.
    pub kind: Kind,
    /// Its extents in order, at least one.
    pub extents: Vec<Line>,
    /// Sum of the extents in sectors.
    pub sectors: u64,
}

fn refused(reason: impl Into<String>) -> FormatError {
    FormatError::Refused { format: NAME, reason: reason.into() }
}

fn corrupt(line: usize, reason: impl Into<String>) -> FormatError {
    FormatError::Corrupt { format: NAME, what: "descriptor line", index: line as u64, offset: 0, reason: reason.into() }
}

/// Reads a descriptor. Bytes after the first NUL are padding. A parent, a foreign path or an unknown `createType` is refused by name.
pub fn parse(bytes: &[u8]) -> Result<Descriptor> {
    if bytes.len() as u64 > MAX_BYTES {
        return Err(refused(format!("its descriptor is over {MAX_BYTES} bytes")));
    }
    let bytes = bytes.split(|b| *b == 0).next().unwrap_or_default();
    let text = decode(bytes)?;
    let mut keys: Vec<(String, String)> = Vec::new();
    let mut extents: Vec<Line> = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(extent) = extent_line(number + 1, line)? {
            if extents.len() == MAX_EXTENTS {
                return Err(refused(format!("its descriptor has over {MAX_EXTENTS} extents")));
            }
            extents.push(extent);
            continue;
        }
        let Some((key, value)) = line.split_once('=') else {
            return Err(corrupt(number + 1, format!("neither KEY=VALUE nor an extent: {}", shown(line))));
        };
        header_key(number + 1, key.trim(), unquoted(value), &mut keys)?;
    }
    finish(&keys, extents)
}

/// Keeps the keys that matter and refuses those that would lead somewhere else.
fn header_key(number: usize, key: &str, value: &str, keys: &mut Vec<(String, String)>) -> Result<()> {
    let key = key.to_ascii_lowercase();
    match key.as_str() {
        "parentfilenamehint" => return Err(refused(format!("it has a parent ({}); consolidate the snapshots first", shown(value)))),
        "parentcid" if !value.eq_ignore_ascii_case("ffffffff") => {
            return Err(refused(format!("it has a parent (parentCID {}); consolidate the snapshots first", shown(value))));
        }
        "encryptionkeys" | "encryption.keysafe" | "keysafe" => return Err(refused("it is encrypted; decrypt the VM first")),
        "ddb.iofilters" if value.to_ascii_lowercase().contains("crypt") => {
            return Err(refused("it is encrypted (ddb.iofilters); decrypt the VM first"));
        }
        "createtype" | "version" | "parentcid" => {
            if keys.iter().any(|(known, _)| *known == key) {
                return Err(corrupt(number, format!("{key} stands there twice")));
            }
            keys.push((key, value.to_owned()));
        }
        _ => {}
    }
    Ok(())
}

/// Checks that kind and extents belong together.
fn finish(keys: &[(String, String)], extents: Vec<Line>) -> Result<Descriptor> {
    let get = |wanted: &str| keys.iter().find(|(key, _)| key == wanted).map(|(_, value)| value.as_str());
    if let Some(version) = get("version")
        && !matches!(version, "1" | "2" | "3" | "4")
    {
        return Err(FormatError::Unsupported(format!("vmdk: descriptor version {} is not built yet; 1 to 4 are", shown(version))));
    }
    let Some(named) = get("createtype") else {
        return Err(corrupt(0, "no createType"));
    };
    let known = Kind::ALL.iter().find(|(name, _)| name.eq_ignore_ascii_case(named));
    let Some((name, kind)) = known.copied() else {
        let names: Vec<&str> = Kind::ALL.iter().map(|(name, _)| *name).collect();
        return Err(FormatError::Unsupported(format!(
            "vmdk: createType {} is not built yet; built are {}",
            shown(named),
            names.join(", ")
        )));
    };
    if extents.is_empty() {
        return Err(corrupt(0, "no extent"));
    }
    let single = !matches!(kind, Kind::TwoGbMaxExtentFlat | Kind::TwoGbMaxExtentSparse | Kind::Vmfs);
    if single && extents.len() != 1 {
        return Err(corrupt(0, format!("{name} has {} extents, 1 would be right", extents.len())));
    }
    let flat = matches!(kind, Kind::MonolithicFlat | Kind::TwoGbMaxExtentFlat | Kind::Vmfs);
    let mut sectors = 0u64;
    let mut names: Vec<&str> = Vec::new();
    for line in &extents {
        let file = match &line.body {
            Body::Flat(file, _) if flat => Some(file),
            Body::Sparse(file) if !flat => Some(file),
            Body::Zero if !kind.embedded() => None,
            other => return Err(corrupt(0, format!("an extent {other:?} does not belong into {name}"))),
        };
        names.extend(file.map(String::as_str));
        sectors = sectors.checked_add(line.sectors).ok_or_else(|| corrupt(0, "the extents' sizes overflow"))?;
    }
    if sectors.checked_mul(SECTOR).is_none_or(|bytes| bytes > i64::MAX as u64) {
        return Err(corrupt(0, format!("a capacity of {sectors} sectors overflows")));
    }
    names.sort_unstable();
    if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(refused(format!("two extents name the file {}", shown(pair[0]))));
    }
    Ok(Descriptor { kind, extents, sectors })
}

/// `ACCESS SECTORS TYPE ["NAME" [OFFSET …]]`, or `None` when the line is none.
fn extent_line(number: usize, line: &str) -> Result<Option<Line>> {
    let mut rest = line;
    let access = word(&mut rest);
    if !["RW", "RDONLY", "NOACCESS"].contains(&access) {
        return Ok(None);
    }
    if access == "NOACCESS" {
        return Err(refused("an extent is marked NOACCESS; RW and RDONLY can be read"));
    }
    let sectors: u64 = word(&mut rest).parse().map_err(|_| corrupt(number, "an extent's size is not a number of sectors"))?;
    if sectors == 0 {
        return Err(corrupt(number, "an extent of 0 sectors"));
    }
    let kind = word(&mut rest);
    if kind == "ZERO" {
        return Ok(Some(Line { sectors, body: Body::Zero }));
    }
    if !["FLAT", "VMFS", "SPARSE"].contains(&kind) {
        return Err(FormatError::Unsupported(format!(
            "vmdk: extents of type {} are not built yet; FLAT, VMFS, SPARSE and ZERO are",
            shown(kind)
        )));
    }
    let quoted = rest.strip_prefix('"').and_then(|tail| tail.split_once('"'));
    let Some((name, tail)) = quoted else {
        return Err(corrupt(number, "an extent's file name is not in quotes"));
    };
    bare(name)?;
    rest = tail.trim_start();
    if kind == "SPARSE" {
        return Ok(Some(Line { sectors, body: Body::Sparse(name.to_owned()) }));
    }
    let start: u64 = match word(&mut rest) {
        "" => 0,
        digits => digits.parse().map_err(|_| corrupt(number, "an extent's offset is not a number of sectors"))?,
    };
    let bytes = start.checked_mul(SECTOR).ok_or_else(|| corrupt(number, format!("an offset of {start} sectors overflows")))?;
    Ok(Some(Line { sectors, body: Body::Flat(name.to_owned(), bytes) }))
}

/// A file beside the descriptor and nothing else.
fn bare(name: &str) -> Result<()> {
    let foreign = name.is_empty() || name == "." || name == ".." || name.len() > 255;
    if foreign || name.contains(['/', '\\', ':']) || name.contains("..") || name.chars().any(char::is_control) {
        return Err(refused(format!("an extent names {}; only a bare file name beside the descriptor is accepted", shown(name))));
    }
    Ok(())
}

/// The next word of a line; `rest` goes on after the blanks behind it.
fn word<'a>(rest: &mut &'a str) -> &'a str {
    let end = rest.find(char::is_whitespace).unwrap_or(rest.len());
    let (head, tail) = rest.split_at(end);
    *rest = tail.trim_start();
    head
}

fn unquoted(value: &str) -> &str {
    let value = value.trim();
    value.strip_prefix('"').and_then(|inner| inner.strip_suffix('"')).unwrap_or(value)
}

/// At most 80 characters of foreign text, escaped: it goes into messages and logs.
fn shown(text: &str) -> String {
    let short: String = text.chars().take(80).collect();
    format!("{short:?}")
}

/// Text of the bytes in the descriptor's own encoding: UTF-8 and windows-1252, and plain ASCII in any other.
fn decode(bytes: &[u8]) -> Result<String> {
    let named = bytes.split(|b| *b == b'\n').find_map(|line| {
        let line = std::str::from_utf8(line).ok()?;
        let (key, value) = line.split_once('=')?;
        key.trim().eq_ignore_ascii_case("encoding").then(|| unquoted(value).to_owned())
    });
    if bytes.is_ascii() {
        return Ok(bytes.iter().map(|b| char::from(*b)).collect());
    }
    let encoding = named.unwrap_or_else(|| "UTF-8".to_owned());
    match encoding.to_ascii_lowercase().as_str() {
        "utf-8" | "utf8" => String::from_utf8(bytes.to_vec()).map_err(|_| corrupt(0, "says UTF-8 and is not")),
        "windows-1252" | "cp1252" | "iso-8859-1" => Ok(bytes.iter().map(|b| windows_1252(*b)).collect()),
        _ => Err(FormatError::Unsupported(format!(
            "vmdk: a descriptor in {} with other than ASCII characters is not built yet; UTF-8 and windows-1252 are",
            shown(&encoding)
        ))),
    }
}

fn windows_1252(byte: u8) -> char {
    const HIGH: [char; 32] = [
        '€', '\u{81}', '‚', 'ƒ', '„', '…', '†', '‡', 'ˆ', '‰', 'Š', '‹', 'Œ', '\u{8d}', 'Ž', '\u{8f}', '\u{90}', '‘', '’', '“', '”', '•',
        '–', '—', '˜', '™', 'š', '›', 'œ', '\u{9d}', 'ž', 'Ÿ',
    ];
    match byte {
        0x80..=0x9f => HIGH[usize::from(byte - 0x80)],
        _ => char::from(byte),
    }
}

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
    /// A snapshot's delta on an ESXi datastore before VMFS 6: a descriptor beside one `COWD` file.
    VmfsSparse,
}

impl Kind {
    const ALL: [(&'static str, Kind); 7] = [
        ("monolithicSparse", Kind::MonolithicSparse),
        ("streamOptimized", Kind::StreamOptimized),
        ("monolithicFlat", Kind::MonolithicFlat),
        ("twoGbMaxExtentSparse", Kind::TwoGbMaxExtentSparse),
        ("twoGbMaxExtentFlat", Kind::TwoGbMaxExtentFlat),
        ("vmfs", Kind::Vmfs),
        ("vmfsSparse", Kind::VmfsSparse),
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
    /// A vmfsSparse file of this bare name.
    Cowd(String),
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

impl Body {
    /// The file's name; `None` for zeros.
    pub fn file(&self) -> Option<&str> {
        match self {
            Body::Sparse(name) | Body::Cowd(name) | Body::Flat(name, _) => Some(name),
            Body::Zero => None,
        }
    }
}

/// What a delta says of the disk beneath it, as it stands there: nothing of it is checked before somebody may follow it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parent {
    cid: String,
    hint: String,
}

impl Parent {
    /// Its content identifier and its file name, both of which must be there. The name is the image's word: a path from anywhere.
    pub fn named(&self) -> Result<(u32, &str)> {
        if self.hint.is_empty() {
            return Err(refused(format!("its parent (parentCID {}) has no name (parentFileNameHint)", shown(&self.cid))));
        }
        let cid = Some(self.cid.as_str()).filter(|cid| !cid.is_empty() && !cid.eq_ignore_ascii_case(NO_PARENT));
        let Some(cid) = cid else {
            return Err(refused(format!("it names the parent {} and has no parentCID to prove it by", shown(&self.hint))));
        };
        let number = hexadecimal(cid).ok_or_else(|| corrupt(0, format!("the parentCID {} is not a hexadecimal number", shown(cid))))?;
        Ok((number, &self.hint))
    }
}

/// `parentCID` of a disk that has none.
const NO_PARENT: &str = "ffffffff";

/// A number of at most eight hexadecimal digits.
fn hexadecimal(text: &str) -> Option<u32> {
    text.bytes().all(|b| b.is_ascii_hexdigit()).then(|| u32::from_str_radix(text, 16).ok()).flatten()
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
    /// Its content identifier, which a child's `parentCID` must equal; `None` where it has none or no number.
    pub cid: Option<u32>,
    /// The disk beneath, where it says that there is one.
    pub parent: Option<Parent>,
}

impl Descriptor {
    /// Refuses a delta: what is to be read on its own must be complete in itself.
    pub fn complete(&self) -> Result<()> {
        let Some(parent) = &self.parent else { return Ok(()) };
        let named = if parent.hint.is_empty() { format!("parentCID {}", shown(&parent.cid)) } else { shown(&parent.hint) };
        Err(refused(format!("it has a parent ({named}); consolidate the snapshots first, or allow its chain to be followed")))
    }
}

fn refused(reason: impl Into<String>) -> FormatError {
    FormatError::Refused { format: NAME, reason: reason.into() }
}

fn corrupt(line: usize, reason: impl Into<String>) -> FormatError {
    FormatError::Corrupt { format: NAME, what: "descriptor line", index: line as u64, offset: 0, reason: reason.into() }
}

/// Reads a descriptor. Bytes after the first NUL are padding. A foreign path or an unknown `createType` is refused by name.
/// A parent is noted: [`Descriptor::complete`] refuses it.
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
        "encryptionkeys" | "encryption.keysafe" | "keysafe" => return Err(refused("it is encrypted; decrypt the VM first")),
        "ddb.iofilters" if value.to_ascii_lowercase().contains("crypt") => {
            return Err(refused("it is encrypted (ddb.iofilters); decrypt the VM first"));
        }
        "createtype" | "version" | "cid" | "parentcid" | "parentfilenamehint" => {
            if keys.iter().any(|(known, _)| *known == key) {
                return Err(corrupt(number, format!("{key} stands there twice")));
            }
            keys.push((key, value.to_owned()));
        }
        _ => {}
    }
    Ok(())
}

/// Why the delta of VMFS 6 is not read; its layout is not published.
const SE_SPARSE: &str =
    "vmdk: seSparse, a snapshot's delta on VMFS 6, is not built yet; consolidate the snapshots, or clone the disk with vmkfstools -i";

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
    if named.eq_ignore_ascii_case("seSparse") {
        return Err(FormatError::Unsupported(SE_SPARSE.to_owned()));
    }
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
    let single = !matches!(kind, Kind::TwoGbMaxExtentFlat | Kind::TwoGbMaxExtentSparse | Kind::Vmfs | Kind::VmfsSparse);
    if single && extents.len() != 1 {
        return Err(corrupt(0, format!("{name} has {} extents, 1 would be right", extents.len())));
    }
    let flat = matches!(kind, Kind::MonolithicFlat | Kind::TwoGbMaxExtentFlat | Kind::Vmfs);
    let mut sectors = 0u64;
    let mut names: Vec<&str> = Vec::new();
    for line in &extents {
        let belongs = match &line.body {
            Body::Flat(..) => flat,
            Body::Sparse(_) => !flat && kind != Kind::VmfsSparse,
            Body::Cowd(_) => kind == Kind::VmfsSparse,
            Body::Zero => !kind.embedded(),
        };
        if !belongs {
            return Err(corrupt(0, format!("an extent {:?} does not belong into {name}", line.body)));
        }
        names.extend(line.body.file());
        sectors = sectors.checked_add(line.sectors).ok_or_else(|| corrupt(0, "the extents' sizes overflow"))?;
    }
    if sectors.checked_mul(SECTOR).is_none_or(|bytes| bytes > i64::MAX as u64) {
        return Err(corrupt(0, format!("a capacity of {sectors} sectors overflows")));
    }
    names.sort_unstable();
    if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(refused(format!("two extents name the file {}", shown(pair[0]))));
    }
    let hint = get("parentfilenamehint").unwrap_or_default().to_owned();
    let parent_cid = get("parentcid").unwrap_or_default().to_owned();
    let alone = hint.is_empty() && (parent_cid.is_empty() || parent_cid.eq_ignore_ascii_case(NO_PARENT));
    let parent = (!alone).then_some(Parent { cid: parent_cid, hint });
    Ok(Descriptor { kind, sectors, cid: get("cid").and_then(hexadecimal), parent, extents })
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
    if kind == "SESPARSE" {
        return Err(FormatError::Unsupported(SE_SPARSE.to_owned()));
    }
    if !["FLAT", "VMFS", "SPARSE", "VMFSSPARSE"].contains(&kind) {
        return Err(FormatError::Unsupported(format!(
            "vmdk: extents of type {} are not built yet; FLAT, VMFS, SPARSE, VMFSSPARSE and ZERO are",
            shown(kind)
        )));
    }
    let quoted = rest.strip_prefix('"').and_then(|tail| tail.split_once('"'));
    let Some((name, tail)) = quoted else {
        return Err(corrupt(number, "an extent's file name is not in quotes"));
    };
    bare(name)?;
    rest = tail.trim_start();
    match kind {
        "SPARSE" => return Ok(Some(Line { sectors, body: Body::Sparse(name.to_owned()) })),
        "VMFSSPARSE" => return Ok(Some(Line { sectors, body: Body::Cowd(name.to_owned()) })),
        _ => {}
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

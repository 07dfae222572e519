//! The archive's frame: 512-byte ustar headers (POSIX.1-1988, with GNU's base-256 numbers).
//!
//! Owns: listing the members of a tar in place and making a header. Never: reads a member's content, never unpacks.
//! A crash here costs nothing: it only reads.
//!
//! Only regular files of bare names are let in. Names that PAX or GNU records would replace are refused: two readers must never see
//! two different archives.

use super::super::disk::{Result, Window};
use super::{MAX_ENTRIES, bare, corrupt, refused, shown};

/// Bytes in a block; every member starts on one.
pub const BLOCK: u64 = 512;
/// Longest name that a header holds.
pub const MAX_NAME: usize = 100;
/// Most bytes of a PAX record that is looked through.
const MAX_PAX: u64 = 64 << 10;

/// One regular file of the archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Bare file name.
    pub name: String,
    /// First byte of its content in the archive.
    pub offset: u64,
    /// Length of its content in bytes.
    pub size: u64,
}

/// Lists the members. Refused: links, directories, devices, other than bare names, names twice, over [`MAX_ENTRIES`]; an archive without its end is damaged.
pub fn entries(window: &Window) -> Result<Vec<Entry>> {
    let mut out: Vec<Entry> = Vec::new();
    let mut at = 0u64;
    for number in 0.. {
        if number == 2 * MAX_ENTRIES as u64 {
            return Err(refused(format!("over {MAX_ENTRIES} members")));
        }
        let mut header = [0u8; BLOCK as usize];
        if at.saturating_add(BLOCK) > window.len() {
            return Err(corrupt(
                "tar header",
                number,
                at,
                format!("the archive is cut off: it ends at {} without an end mark", window.len()),
            ));
        }
        window.read_exact_at(&mut header, at)?;
        if header.iter().all(|b| *b == 0) {
            return Ok(out);
        }
        let bad = |reason: String| corrupt("tar header", number, at, reason);
        check(&header).map_err(bad)?;
        let size = size(&header[124..136]).ok_or_else(|| bad("its size is not a number that fits".to_owned()))?;
        let offset = at + BLOCK;
        let end = offset.checked_add(size).filter(|end| *end <= window.len());
        if end.is_none() {
            return Err(bad(format!("its content of {size} bytes goes past the archive's end at {}: cut off", window.len())));
        }
        match header[156] {
            b'0' | 0 => {
                let name = name(&header)?;
                if out.len() == MAX_ENTRIES {
                    return Err(refused(format!("over {MAX_ENTRIES} members")));
                }
                if out.iter().any(|known| known.name == name) {
                    return Err(refused(format!("two members are named {}", shown(&name))));
                }
                out.push(Entry { name, offset, size });
            }
            b'x' => pax(window, number, offset, size)?,
            other => return Err(refused(format!("member {number} is {}; only regular files are accepted", kind(other)))),
        }
        // Cannot overflow: the content ends inside the window and no file is longer than i64::MAX.
        at = offset + size.next_multiple_of(BLOCK);
    }
    Ok(out)
}

fn kind(flag: u8) -> &'static str {
    match flag {
        b'1' => "a hard link",
        b'2' => "a symbolic link",
        b'3' | b'4' => "a device",
        b'5' => "a directory",
        b'6' => "a fifo",
        b'7' => "a contiguous file",
        b'g' => "a global PAX record",
        b'K' => "a GNU long link",
        b'L' => "a GNU long name",
        b'S' => "a GNU sparse file",
        _ => "of an unknown kind",
    }
}

/// The magic and the checksum.
fn check(header: &[u8; 512]) -> Result<(), String> {
    if &header[257..262] != b"ustar" {
        return Err("no ustar mark".to_owned());
    }
    if !matches!(header[262], 0 | b' ') {
        return Err("its ustar mark is neither POSIX nor GNU".to_owned());
    }
    let sum: u64 = header.iter().enumerate().map(|(k, b)| if (148..156).contains(&k) { u64::from(b' ') } else { u64::from(*b) }).sum();
    match octal(&header[148..156]) {
        Some(said) if said == sum => Ok(()),
        said => Err(format!("its checksum is {sum}, the header says {}", said.map_or("nothing".to_owned(), |said| said.to_string()))),
    }
}

/// The member's name; a prefix would make it a path.
fn name(header: &[u8; 512]) -> Result<String> {
    let until = |bytes: &[u8]| bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    let raw = &header[..until(&header[..MAX_NAME])];
    // Only POSIX headers have a prefix; GNU's have times there.
    let prefixed = header[262] == 0 && header[345] != 0;
    let name = std::str::from_utf8(raw).map_err(|_| refused("a member's name is not UTF-8"))?;
    let name = name.strip_prefix("./").unwrap_or(name);
    if prefixed {
        return Err(refused(format!("a member lies in a folder ({}); only a bare file name is accepted", shown(name))));
    }
    bare(name, "a member")?;
    Ok(name.to_owned())
}

/// A PAX record may carry times and owners; whatever would change a member is refused.
fn pax(window: &Window, number: u64, offset: u64, size: u64) -> Result<()> {
    if size > MAX_PAX {
        return Err(refused(format!("a PAX record of {size} bytes")));
    }
    let mut bytes = vec![0u8; size as usize];
    window.read_exact_at(&mut bytes, offset)?;
    let mut rest = bytes.as_slice();
    while !rest.is_empty() {
        let bad = || corrupt("PAX record", number, offset, "not LENGTH KEY=VALUE");
        let blank = rest.iter().position(|b| *b == b' ').filter(|blank| *blank <= 6).ok_or_else(bad)?;
        let len: usize = std::str::from_utf8(&rest[..blank]).ok().and_then(|digits| digits.parse().ok()).ok_or_else(bad)?;
        let record = rest.get(blank + 1..len).ok_or_else(bad)?;
        let key = record.split(|b| *b == b'=').next().unwrap_or_default();
        let key = String::from_utf8_lossy(key);
        // Of star's and libarchive's own keys those that describe the file's owner and times; others change its size or kind.
        let harmless = ["mtime", "atime", "ctime", "uid", "gid", "uname", "gname", "comment", "LIBARCHIVE.creationtime"];
        let owners = ["SCHILY.dev", "SCHILY.ino", "SCHILY.nlink", "SCHILY.fflags", "SCHILY.acl.", "SCHILY.xattr.", "LIBARCHIVE.xattr."];
        if !harmless.contains(&key.as_ref()) && !owners.iter().any(|prefix| key.starts_with(prefix)) {
            return Err(refused(format!(
                "a PAX record sets {}; plain ustar headers are accepted, sizes from 8 GiB in base-256",
                shown(&key)
            )));
        }
        rest = &rest[len..];
    }
    Ok(())
}

/// An octal number padded with blanks and NULs; `None` for anything else, and for none at all.
fn octal(field: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(field).ok()?.trim_matches([' ', '\0']);
    if text.is_empty() || text.len() > 20 || !text.bytes().all(|b| (b'0'..=b'7').contains(&b)) {
        return None;
    }
    u64::from_str_radix(text, 8).ok()
}

/// A size: octal, or base-256 (first bit set, the rest big endian).
fn size(field: &[u8]) -> Option<u64> {
    if field[0] != 0x80 {
        return octal(field);
    }
    let (high, low) = field[1..].split_at(3);
    let mut word = [0u8; 8];
    word.copy_from_slice(low);
    Some(u64::from_be_bytes(word)).filter(|size| high == [0; 3] && *size <= i64::MAX as u64)
}

/// A header for a regular file, mode 0644, owner 0. `name` is at most [`MAX_NAME`] bytes; sizes from 8 GiB on are base-256.
pub fn header(name: &str, size: u64, mtime: u64) -> Result<[u8; 512]> {
    bare(name, "the archive to be written")?;
    if name.len() > MAX_NAME {
        return Err(refused(format!("{} is {} bytes long, a tar header holds {MAX_NAME}", shown(name), name.len())));
    }
    let mut out = [0u8; BLOCK as usize];
    out[..name.len()].copy_from_slice(name.as_bytes());
    out[100..108].copy_from_slice(b"0000644\0");
    out[108..116].copy_from_slice(b"0000000\0");
    out[116..124].copy_from_slice(b"0000000\0");
    if size < 1 << 33 {
        out[124..136].copy_from_slice(format!("{size:011o}\0").as_bytes());
    } else {
        out[124] = 0x80;
        out[128..136].copy_from_slice(&size.to_be_bytes());
    }
    out[136..148].copy_from_slice(format!("{:011o}\0", mtime.min((1 << 33) - 1)).as_bytes());
    out[148..156].fill(b' ');
    out[156] = b'0';
    out[257..265].copy_from_slice(b"ustar\x0000");
    let sum: u32 = out.iter().map(|b| u32::from(*b)).sum();
    out[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    Ok(out)
}

//! The file identifier and the two headers: which one is current, and where the log is.
//!
//! Owns: every refusal that can be made before the log is known.
//! Never: reads anything that a replay could change. A crash here costs nothing.

use super::super::disk::{FormatError, Result, Window};
use super::{FILE_SIGNATURE, Guid, HEADER_SECTION, HEADERS, MIB, bytes_at, corrupt, crc, u16_at, u32_at, u64_at};

/// Length of a header as far as its checksum goes (2.2.2).
pub(super) const LEN: usize = 4096;

/// First bytes of a header.
pub(super) const SIGNATURE: &[u8; 4] = b"head";

/// What the current header says. Lengths and offsets in bytes.
#[derive(Clone, Debug)]
pub(super) struct Header {
    /// Whether entries of the log have to be replayed, and their mark if so.
    pub(super) log_guid: Option<Guid>,
    pub(super) log_offset: u64,
    pub(super) log_len: u64,
}

impl Header {
    /// Finds the current header and checks it against the file's length.
    pub(super) fn read(window: &Window) -> Result<Self> {
        if window.len() < HEADER_SECTION {
            return Err(corrupt("header section", 0, 0, format!("the file has {} bytes, the section {HEADER_SECTION}", window.len())));
        }
        let mut first = [0u8; 8];
        window.read_exact_at(&mut first, 0)?;
        if &first != FILE_SIGNATURE {
            return Err(corrupt("file identifier", 0, 0, "does not start with \"vhdxfile\""));
        }
        let (offset, bytes) = current(window)?;
        let header = corrupt_at(offset);
        let version = u16_at(&bytes, 66);
        if version != 1 {
            return Err(FormatError::Unsupported(format!("VHDX version {version} is not built; version 1 is")));
        }
        let log_guid = Some(bytes_at(&bytes, 48)).filter(|guid| *guid != [0; 16]);
        let log_version = u16_at(&bytes, 64);
        if log_version != 0 && log_guid.is_some() {
            return Err(FormatError::Unsupported(format!("a VHDX log of version {log_version} is not built; version 0 is")));
        }
        let (log_len, log_offset) = (u64::from(u32_at(&bytes, 68)), u64_at(&bytes, 72));
        if !log_len.is_multiple_of(MIB) || !log_offset.is_multiple_of(MIB) {
            return Err(header(format!("its log of {log_len} bytes at {log_offset} is not made of whole MiB")));
        }
        if log_len == 0 && log_guid.is_some() {
            return Err(header("it has a log that is to be replayed and whose length is 0".to_owned()));
        }
        if log_len > 0 && log_offset < HEADER_SECTION {
            return Err(header(format!("its log at {log_offset} lies on the header section")));
        }
        let end = log_offset.checked_add(log_len).filter(|end| *end <= window.len());
        if log_len > 0 && end.is_none() {
            return Err(header(format!("its log of {log_len} bytes at {log_offset} runs past the file's end at {}", window.len())));
        }
        Ok(Self { log_guid, log_offset, log_len })
    }
}

fn corrupt_at(offset: u64) -> impl Fn(String) -> FormatError {
    move |reason| corrupt("header", u64::from(offset != HEADERS[0]), offset, reason)
}

/// Offset and bytes of the current header: the valid one with the higher sequence number.
fn current(window: &Window) -> Result<(u64, Vec<u8>)> {
    let [first, second] = [read(window, HEADERS[0])?, read(window, HEADERS[1])?];
    match (first, second) {
        (Ok(first), Err(_)) => Ok((HEADERS[0], first)),
        (Err(_), Ok(second)) => Ok((HEADERS[1], second)),
        (Err(a), Err(b)) => Err(corrupt_at(HEADERS[0])(format!("it {a}, and the other one at {} {b}", HEADERS[1]))),
        (Ok(first), Ok(second)) => match (u64_at(&first, 8), u64_at(&second, 8)) {
            (a, b) if a > b => Ok((HEADERS[0], first)),
            (a, b) if a < b => Ok((HEADERS[1], second)),
            // Disk2VHD writes one header twice.
            _ if first == second => Ok((HEADERS[0], first)),
            (a, _) => Err(corrupt_at(HEADERS[0])(format!("both headers are valid with sequence number {a}, but differ"))),
        },
    }
}

/// The header at `offset`, or why it is not valid.
fn read(window: &Window, offset: u64) -> Result<std::result::Result<Vec<u8>, String>> {
    let mut bytes = vec![0u8; LEN];
    window.read_exact_at(&mut bytes, offset)?;
    if !bytes.starts_with(SIGNATURE) {
        return Ok(Err("does not start with \"head\"".to_owned()));
    }
    let (stored, computed) = (u32_at(&bytes, 4), crc::of_structure(&bytes));
    if stored != computed {
        return Ok(Err(format!("has the checksum {stored:08x}, its bytes give {computed:08x}")));
    }
    Ok(Ok(bytes))
}

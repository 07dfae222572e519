//! OVA and OVF: a VM's description and its disks, in one tar file or in a folder (DMTF DSP0243).
//!
//! Owns: the archive's frame ([`tar`]), the description ([`parse()`], [`generate`]), the manifest of digests ([`mf`]), reading an OVA in place
//! and writing one in a single pass. Never: unpacks a member, opens a path, looks inside a disk.
//! A crash here costs nothing on the reading side; [`Layout::finish`] may simply run again.

mod generate;
mod guard;
pub mod mf;
mod parse;
mod reader;
pub mod tar;
#[cfg(test)]
mod tests;
mod writer;

use super::disk::{FormatError, Result};
pub use generate::{DiskFile, generate};
pub use parse::{DiskRef, Ovf, parse};
pub use reader::{Checked, Member, Ova, Progress, open, open_folder, sha256};
pub use writer::{Finish, Finished, Layout, Written, folder, stem};

/// The format's name as the API spells it.
const NAME: &str = "ova";
/// Longest OVF description, in bytes.
pub const MAX_OVF: u64 = 1 << 20;
/// Most members of an archive, files of a description and lines of a manifest.
pub const MAX_ENTRIES: usize = 64;

fn refused(reason: impl Into<String>) -> FormatError {
    FormatError::Refused { format: NAME, reason: reason.into() }
}

fn corrupt(what: &'static str, index: u64, offset: u64, reason: impl Into<String>) -> FormatError {
    FormatError::Corrupt { format: NAME, what, index, offset, reason: reason.into() }
}

/// A file name without any way out of its folder; `whose` says in the message who names it.
fn bare(name: &str, whose: &str) -> Result<()> {
    let foreign = name.is_empty() || name == "." || name == ".." || name.len() > 255;
    if foreign || name.contains(['/', '\\']) || name.chars().any(char::is_control) {
        return Err(refused(format!("{whose} names {}; only a bare file name is accepted", shown(name))));
    }
    Ok(())
}

/// At most 80 characters of foreign text, escaped: it goes into messages and logs.
fn shown(text: &str) -> String {
    let short: String = text.chars().take(80).collect();
    format!("{short:?}")
}

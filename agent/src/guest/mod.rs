//! A guest: what lies on its disks, and, when it has moved, that it is adapted to its new hardware and shown to boot.
//!
//! ```text
//! adapt (virt-v2v-in-place, interface names) ─► overlays over verified disks          boot: the result started apart, watched, thrown away
//!                                                                                        console: what it says    isolated: its network    picture
//! ```
//! Owns: what is done with a guest's inside. Never: writes to a disk that was verified; everything goes into overlays beside it.
//! A crash here costs the overlays, which lie in the job's part folder, and a domain and a network that the ledger names.

pub mod adapt;
pub mod boot;
mod console;
pub mod inspect;
mod isolated;
mod picture;
#[cfg(test)]
mod tests;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use shared::deploy::Wish;
use shared::error::Code;
use shared::vault::{self, Dir};

use crate::formats::{DiskWriter as _, Output, qcow2};
use crate::sources::Error;

/// One disk of a guest on this host, whole or an overlay.
#[derive(Clone, Debug)]
pub struct GuestDisk {
    /// Absolute.
    pub path: PathBuf,
    /// `qcow2` or `raw`.
    pub format: &'static str,
    /// Bytes of the disk that the guest sees.
    pub capacity: u64,
}

/// A guest on this host.
pub struct Subject<'a> {
    /// Its CPUs, memory, firmware, buses and card. Of the network only the card's model and address count.
    pub wish: &'a Wish,
    /// Its disks in order.
    pub disks: &'a [GuestDisk],
    /// Where overlays and what is kept of a proof go: the job's part folder.
    pub folder: &'a Dir,
    /// That folder, absolute.
    pub path: &'a Path,
}

fn failed(what: &str) -> impl Fn(io::Error) -> Error {
    let what = what.to_owned();
    move |e| match e.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Error::fatal(Code::NoSpace, format!("no space left: {what}")),
        _ => Error { code: Code::Internal, message: format!("{what}: {e}"), retryable: true },
    }
}

/// Makes an empty overlay `name` in `folder` over an image of `capacity` bytes, which it calls `base`: absolute, or a path from its own folder.
fn overlay(folder: &Dir, name: &str, base: &str, format: &'static str, capacity: u64) -> Result<(), Error> {
    let file = vault::create_private(folder, name).map_err(failed(name))?;
    let wrong = |e: crate::formats::FormatError| Error::fatal(Code::Unprocessable, format!("no overlay over {base}: {e}"));
    // What a raw file has behind its last whole sector is a sector to a guest.
    let capacity = capacity.next_multiple_of(512);
    let output = Output { file: Arc::new(file), base: 0 };
    let mut writer = qcow2::PlainWriter::new(output, capacity).and_then(|writer| writer.over(base, format)).map_err(wrong)?;
    writer.finish().map_err(wrong)?;
    Ok(())
}

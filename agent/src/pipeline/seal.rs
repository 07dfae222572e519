//! Sealing: what makes a checkpoint true.
//!
//! Owns: the hash of an appended region and the sync before the journal's record.
//! Never: writes to the output. A crash here costs the checkpoint being sealed.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use shared::manifest::Digest;

use super::{Error, output_error};
use crate::journal::Checkpoint;

/// Bytes read at a time.
const STEP: usize = 1 << 20;

/// Hashes the checkpoint's region, if asked to, and syncs the file. The caller appends the record afterwards, never before.
pub(super) fn seal(file: &File, base: u64, hashed: bool, name: &str, checkpoint: &mut Checkpoint) -> Result<(), Error> {
    let fail = |e: io::Error| output_error(e.into(), name);
    if hashed {
        checkpoint.hash = hash_region(file, base + checkpoint.from, base + checkpoint.position).map_err(fail)?;
    }
    file.sync_data().map_err(fail)
}

/// BLAKE3 of the file's bytes `[from, to)`; a file that ends before is an error.
pub(super) fn hash_region(file: &File, from: u64, to: u64) -> io::Result<Digest> {
    let mut hasher = blake3::Hasher::new();
    let mut buf = vec![0u8; STEP.min(to.saturating_sub(from) as usize)];
    let mut at = from;
    while at < to {
        let part = (to - at).min(buf.len() as u64) as usize;
        file.read_exact_at(&mut buf[..part], at)?;
        hasher.update(&buf[..part]);
        at += part as u64;
    }
    Ok(*hasher.finalize().as_bytes())
}

/// Fills `buf` from `offset`; what lies past the file's end is zeros.
pub(super) fn read_padded(file: &File, buf: &mut [u8], offset: u64) -> io::Result<()> {
    let mut done = 0;
    while done < buf.len() {
        match file.read_at(&mut buf[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    buf[done..].fill(0);
    Ok(())
}

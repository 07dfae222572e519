//! The bytes of an upload: a part file of its full size while chunks come, a file of its own name when they are all there.
//!
//! ```text
//! uploads/.parts/ID  ── chunks by pwrite, fdatasync ── digest, fsync ──rename──► uploads/ID/NAME
//! ```
//! Owns: these two places. Never: opens anything else. A crash here costs nothing: the rename shows whether an upload was completed.
//! Everything blocks; it is called on threads for that.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use ring::digest::{Context, SHA256};
use shared::vault::{self, Dir};

/// The folder of what is not whole. Names that begin with a dot are not shown by a listing.
pub const PARTS: &str = ".parts";
/// Bytes read at a time.
const STEP: usize = 1 << 20;

/// Opens the part of an upload, making it with its full size where it is not there. The space is taken at once where the file system can.
pub fn open(root: &Dir, id: &str, size: u64) -> io::Result<File> {
    root.create_dir_all(PARTS)?;
    let mut options = vault::file_options();
    options.read(true).write(true).create(true);
    let file = root.open_with(Path::new(PARTS).join(id), &options)?.into_std();
    if file.metadata()?.len() != size {
        match rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, size) {
            Ok(()) => {}
            Err(rustix::io::Errno::OPNOTSUPP) => file.set_len(size)?,
            Err(e) => return Err(e.into()),
        }
        file.sync_all()?;
        vault::sync_dir(&root.open_dir(PARTS)?)?;
    }
    Ok(file)
}

/// Writes a piece at its place.
pub fn write(file: &File, bytes: &[u8], at: u64) -> io::Result<()> {
    file.write_all_at(bytes, at)
}

/// The whole file, hashed; it lies in one of the two places.
pub fn digest(root: &Dir, id: &str, name: &str) -> io::Result<String> {
    let part = Path::new(PARTS).join(id);
    let file = match vault::open_regular(root, &part) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => vault::open_regular(root, &Path::new(id).join(name))?,
        other => other?,
    };
    let mut context = Context::new(&SHA256);
    let mut at = 0;
    loop {
        let bytes = vault::read_chunk(&file, at, STEP)?;
        if bytes.is_empty() {
            file.sync_all()?;
            return Ok(hex::encode(context.finish()));
        }
        context.update(&bytes);
        at += bytes.len() as u64;
    }
}

/// Gives a whole upload its name, durably; it may have it already.
pub fn publish(root: &Dir, id: &str, name: &str) -> io::Result<()> {
    root.create_dir_all(id)?;
    let folder = root.open_dir(id)?;
    let parts = root.open_dir(PARTS)?;
    match parts.rename(id, &folder, name) {
        Err(e) if e.kind() == io::ErrorKind::NotFound && folder.try_exists(name)? => {}
        other => other?,
    }
    for dir in [&folder, &parts, root] {
        vault::sync_dir(dir)?;
    }
    Ok(())
}

/// Removes what there is of an upload, in both places.
pub fn remove(root: &Dir, id: &str) -> io::Result<()> {
    let gone = |result: io::Result<()>| match result {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    };
    gone(root.remove_file(Path::new(PARTS).join(id)))?;
    gone(root.remove_dir_all(id))
}

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

/// Makes the part of an upload with its full size. The space is taken at once where the file system can.
pub fn create(root: &Dir, id: &str, size: u64) -> io::Result<File> {
    root.create_dir_all(PARTS)?;
    let mut options = vault::file_options();
    options.read(true).write(true).create(true);
    let file = root.open_with(Path::new(PARTS).join(id), &options)?.into_std();
    match rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, size) {
        Ok(()) => {}
        Err(rustix::io::Errno::OPNOTSUPP) => file.set_len(size)?,
        Err(e) => return Err(e.into()),
    }
    file.sync_all()?;
    vault::sync_dir(&root.open_dir(PARTS)?)?;
    Ok(file)
}

/// Opens the part of an upload; none where it is not there in its full size.
pub fn open(root: &Dir, id: &str, size: u64) -> io::Result<Option<File>> {
    let mut options = vault::file_options();
    options.read(true).write(true);
    let Some(file) = there(root.open_with(Path::new(PARTS).join(id), &options))? else { return Ok(None) };
    let file = file.into_std();
    Ok((file.metadata()?.len() == size).then_some(file))
}

/// Whether an upload has its own name already.
pub fn is_published(root: &Dir, id: &str, name: &str) -> io::Result<bool> {
    root.try_exists(Path::new(id).join(name))
}

fn there<T>(opened: io::Result<T>) -> io::Result<Option<T>> {
    match opened {
        Ok(opened) => Ok(Some(opened)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

/// Writes a piece at its place.
pub fn write(file: &File, bytes: &[u8], at: u64) -> io::Result<()> {
    file.write_all_at(bytes, at)
}

/// The whole file, hashed; none where it lies in neither of the two places.
pub fn digest(root: &Dir, id: &str, name: &str) -> io::Result<Option<String>> {
    let part = there(vault::open_regular(root, &Path::new(PARTS).join(id)))?;
    let file = match part {
        Some(file) => file,
        None => match there(vault::open_regular(root, &Path::new(id).join(name)))? {
            Some(file) => file,
            None => return Ok(None),
        },
    };
    let mut context = Context::new(&SHA256);
    let mut at = 0;
    loop {
        let bytes = vault::read_chunk(&file, at, STEP)?;
        if bytes.is_empty() {
            file.sync_all()?;
            return Ok(Some(hex::encode(context.finish())));
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
    there(root.remove_file(Path::new(PARTS).join(id)))?;
    there(root.remove_dir_all(id)).map(drop)
}

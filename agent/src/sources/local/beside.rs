//! The manifest beside a disk of a folder.
//!
//! Owns: where it lies, and whether the disk was written after it. Never: believes it (whoever asked checks the signature).
//! A crash here costs nothing.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use shared::vault;
use shared::vm::{Disk as VmDisk, Vm};

use super::{Beside, Local};

/// Largest manifest that is read: 75 bytes for each 4 MiB make 256 MiB for 14 TiB of data.
const MOST: u64 = 256 << 20;

/// Finds it: `web.qcow2.manifest.json`, for an OVA `web.ova.manifest.json`, for an OVF folder `NAME.ovf.manifest.json` in it.
pub(super) fn manifest(local: &Local, vm: &Vm, disk: &VmDisk) -> io::Result<Option<Beside>> {
    let in_package = disk.source.strip_prefix(&format!("{}:", vm.id));
    let is_folder = local.dir.metadata(&vm.id)?.is_dir();
    let (data, manifest, member) = match in_package {
        Some(file) if is_folder => {
            let names = local.entries(Path::new(&vm.id))?.into_iter().map(|(name, _)| name);
            let Some(name) = names.into_iter().find(|name| name.ends_with(".ovf.manifest.json")) else { return Ok(None) };
            (Path::new(&vm.id).join(file), Path::new(&vm.id).join(name), None)
        }
        Some(member) => (PathBuf::from(&vm.id), PathBuf::from(format!("{}.manifest.json", vm.id)), Some(member.to_owned())),
        None => (PathBuf::from(&disk.source), PathBuf::from(format!("{}.manifest.json", disk.source)), None),
    };
    let file = match vault::open_regular(&local.dir, &manifest) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e),
    };
    let disk = vault::open_regular(&local.dir, &data)?;
    if written(&disk)? > written(&file)? {
        return Ok(None);
    }
    let mut bytes = Vec::new();
    file.take(MOST + 1).read_to_end(&mut bytes)?;
    let name = data.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
    let is_whole = bytes.len() as u64 <= MOST;
    Ok(is_whole.then_some(Beside { bytes, file: name, member, size: disk.metadata()?.len() }))
}

/// When a file's content changed last.
fn written(file: &File) -> io::Result<(i64, i64)> {
    let m = file.metadata()?;
    Ok((m.mtime(), m.mtime_nsec()))
}

//! The folder in which a job's output grows, `JOBID.part/`.
//!
//! Owns: the files' names and how they are opened: by bare name below an opened directory, never through a link.
//! Never: leaves the directory, renames it (publishing is the worker's).
//! A crash here costs nothing.

use std::fs::File;
use std::io;

use cap_std::fs::{Dir, OpenOptions, OpenOptionsExt};

use super::Format;
use crate::formats::ova;

/// An opened output folder.
#[derive(Debug)]
pub struct PartDir(Dir);

impl PartDir {
    /// Takes over an opened directory that nobody else writes to.
    pub fn new(dir: Dir) -> Self {
        Self(dir)
    }

    /// Opens `name` for reading and writing; made when it is not there.
    pub fn open_or_create(&self, name: &str) -> io::Result<File> {
        self.open_with(name, OpenOptions::new().read(true).write(true).create(true))
    }

    /// Opens `name` for reading and writing.
    pub fn open_existing(&self, name: &str) -> io::Result<File> {
        self.open_with(name, OpenOptions::new().read(true).write(true))
    }

    /// Opens `name` for reading.
    pub fn open(&self, name: &str) -> io::Result<File> {
        self.open_with(name, OpenOptions::new().read(true))
    }

    /// Removes every file in it: what another job left, whose journal was not adopted, must not be published with this one's output.
    pub fn clear(&self) -> io::Result<()> {
        for entry in self.0.entries()? {
            let entry = entry?;
            if !entry.file_type()?.is_dir() {
                entry.remove_file()?;
            }
        }
        self.sync()
    }

    /// Makes new and changed names durable.
    pub fn sync(&self) -> io::Result<()> {
        // The directory's own descriptor may be one that only names it (O_PATH) and cannot be synced.
        self.0.open(".")?.sync_all()
    }

    fn open_with(&self, name: &str, options: &mut OpenOptions) -> io::Result<File> {
        if !is_bare(name) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{name:?} is not a bare file name of A-Z a-z 0-9 . _ -")));
        }
        // No link is followed, and a pipe in place of the file does not hold us up.
        let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
        let file = self.0.open_with(name, options.custom_flags(flags.bits().cast_signed()))?.into_std();
        if !file.metadata()?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{name} is not a regular file")));
        }
        Ok(file)
    }
}

/// Whether `name` names a file in the directory itself and cannot be taken for anything else.
fn is_bare(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 255
        && !name.starts_with('.')
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
}

/// The file that holds disk `n` of `count` in this format.
pub(super) fn disk_file(vm: &str, format: Format, n: usize, count: usize) -> String {
    let (stem, extension) = (ova::stem(vm), format.disk_format());
    match format {
        Format::Ova => format!("{stem}.ova"),
        _ if count == 1 => format!("{stem}.{extension}"),
        _ => format!("{stem}-disk-{n}.{extension}"),
    }
}

/// The file that holds a disk as it was at a snapshot.
pub(super) fn snapshot_file(vm: &str, format: Format, disk: &str) -> String {
    format!("{}-{disk}.{}", ova::stem(vm), format.disk_format())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::disallowed_methods)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_in_the_folder_and_links_are_not_followed() {
        for hostile in ["../../etc/passwd", "Büro 1", "", "-rf", "..", "a\0b"] {
            assert!(is_bare(&disk_file(hostile, Format::Raw, 0, 1)), "{hostile}");
        }
        assert!(!is_bare("a/b") && !is_bare("..") && !is_bare("") && is_bare("a-b.qcow2"));
        assert_eq!(disk_file("web", Format::Qcow2, 1, 2), "web-disk-1.qcow2");
        assert_eq!(disk_file("web", Format::Raw, 0, 1), "web.raw");

        let path = std::env::temp_dir().join(format!("hypersdk-part-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", path.join("link")).unwrap();
        let part = PartDir::new(Dir::open_ambient_dir(&path, cap_std::ambient_authority()).unwrap());
        assert!(part.open("link").is_err() && part.open_or_create("link").is_err() && part.open("../passwd").is_err());
        part.open_or_create("real.raw").unwrap();
        part.sync().unwrap();
        assert!(part.open_existing("real.raw").is_ok() && part.open_existing("other.raw").is_err());
        part.clear().unwrap();
        assert_eq!(std::fs::read_dir(&path).unwrap().count(), 0);
        std::fs::remove_dir_all(&path).unwrap();
    }
}

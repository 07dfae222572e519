//! The one opener of paths.
//!
//! Owns: every call that turns a path into a file. Roots are opened once as directories; below them a name is resolved step by step by
//! the kernel relative to that directory (cap-std), so `..`, absolute names and symlinks that lead out are refused without a race.
//! Never: follows a name that a guest, an archive or a REST client chose out of its root.
//! A crash here costs nothing: it holds directory handles only.
//!
//! Two doors beside the roots, both for paths that the person at the keyboard or the operator's configuration chose with their own
//! rights: [`read_config`] and friends for settings and keys, [`open_user_file`] for the CLI's `convert` and `verify`.
#![allow(clippy::disallowed_methods)]

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use cap_std::ambient_authority;
pub use cap_std::fs::Dir;

use crate::error::Code;

/// Largest settings or key file that is read.
const CONFIG_LIMIT: u64 = 1 << 20;

/// Why a path was not opened.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It does not lie in a root.
    #[error("{path} lies outside the configured roots; use one of: {roots}")]
    Outside {
        /// As it was given.
        path: String,
        /// The roots' names, as `NAME/…`.
        roots: String,
    },
    /// It lies in one and could not be opened.
    #[error("{path}: {source}")]
    Io {
        /// As it was given.
        path: String,
        /// Why.
        source: io::Error,
    },
}

impl Error {
    /// The stable word for it.
    pub fn code(&self) -> Code {
        match self {
            Error::Outside { .. } => Code::OutsideRoots,
            Error::Io { source, .. } => match source.kind() {
                io::ErrorKind::NotFound => Code::NotFound,
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Code::NoSpace,
                _ => Code::Unprocessable,
            },
        }
    }
}

/// A configured folder with a name.
#[derive(Clone)]
pub struct Root {
    /// Its name in paths: `exports`, `vms`, …
    pub name: String,
    /// Where it lies on this host.
    pub path: PathBuf,
    /// Whether jobs may write into it.
    pub writable: bool,
    dir: Arc<Dir>,
}

impl Root {
    /// Opens a folder as a root; a writable one is made when it is not there.
    pub fn open(name: &str, path: &Path, writable: bool) -> io::Result<Self> {
        if writable {
            std::fs::create_dir_all(path)?;
        }
        let path = std::fs::canonicalize(path)?;
        let dir = Arc::new(Dir::open_ambient_dir(&path, ambient_authority())?);
        Ok(Self { name: name.to_owned(), path, writable, dir })
    }

    /// The folder itself.
    pub fn dir(&self) -> &Dir {
        &self.dir
    }

    /// Free and total bytes of its file system, as an unprivileged writer sees them.
    pub fn space(&self) -> io::Result<(u64, u64)> {
        space(&self.dir)
    }
}

/// Free and total bytes of the file system that a folder lies on.
pub fn space(dir: &Dir) -> io::Result<(u64, u64)> {
    let stat = rustix::fs::fstatvfs(dir)?;
    Ok((stat.f_bavail.saturating_mul(stat.f_frsize), stat.f_blocks.saturating_mul(stat.f_frsize)))
}

/// A place inside a root: the root and the bare path below it.
pub struct Place<'a> {
    /// In which root.
    pub root: &'a Root,
    /// Below it; without `..`, never absolute; empty for the root itself.
    pub below: PathBuf,
}

impl Place<'_> {
    /// As it shows on this host.
    pub fn absolute(&self) -> PathBuf {
        self.root.path.join(&self.below)
    }

    /// As `ROOT/…`.
    pub fn named(&self) -> String {
        if self.below.as_os_str().is_empty() { self.root.name.clone() } else { format!("{}/{}", self.root.name, self.below.display()) }
    }
}

/// The configured roots.
#[derive(Clone, Default)]
pub struct Vault {
    roots: BTreeMap<String, Root>,
}

impl Vault {
    /// Adds a root; one of the same name is replaced.
    pub fn add(&mut self, root: Root) {
        self.roots.insert(root.name.clone(), root);
    }

    /// The roots by name.
    pub fn roots(&self) -> impl Iterator<Item = &Root> {
        self.roots.values()
    }

    /// A root by name.
    pub fn root(&self, name: &str) -> Option<&Root> {
        self.roots.get(name)
    }

    /// Finds the root of a path that somebody gave: `ROOT/…`, or an absolute path below a root. Nothing is opened.
    pub fn locate(&self, path: &str) -> Result<Place<'_>, Error> {
        let named = self.roots.values().map(|root| (root.name.clone(), root.path.clone()));
        let Some((name, below)) = locate(named, path) else { return Err(self.outside(path)) };
        match self.roots.get(&name) {
            Some(root) => Ok(Place { root, below }),
            None => Err(self.outside(path)),
        }
    }

    fn outside(&self, path: &str) -> Error {
        let roots = self.roots.keys().map(|name| format!("{name}/")).collect::<Vec<_>>().join(", ");
        Error::Outside { path: path.to_owned(), roots }
    }

    /// Opens a file below a root for reading. Symlinks that lead out of the root are refused by the kernel walk.
    pub fn open_file(&self, path: &str) -> Result<File, Error> {
        let place = self.locate(path)?;
        self.explain(path, open_regular(place.root.dir(), &place.below))
    }

    /// Opens a root, or a folder below one.
    pub fn open_dir(&self, path: &str) -> Result<Dir, Error> {
        let place = self.locate(path)?;
        let opened = match place.below.as_os_str().is_empty() {
            true => place.root.dir().try_clone(),
            false => place.root.dir().open_dir(&place.below),
        };
        self.explain(path, opened)
    }

    /// Opens a folder below a writable root, making it when it is not there.
    pub fn open_output_dir(&self, path: &str) -> Result<Dir, Error> {
        let place = self.locate(path)?;
        if !place.root.writable {
            let source = io::Error::new(io::ErrorKind::PermissionDenied, "this root is only read");
            return Err(Error::Io { path: path.to_owned(), source });
        }
        if place.below.as_os_str().is_empty() {
            return self.explain(path, place.root.dir().try_clone());
        }
        let made = place.root.dir().create_dir_all(&place.below).and_then(|()| place.root.dir().open_dir(&place.below));
        self.explain(path, made)
    }

    /// cap-std answers an escape with a permission error of its own; to the caller that is "outside".
    pub(crate) fn explain<T>(&self, path: &str, result: io::Result<T>) -> Result<T, Error> {
        result.map_err(|source| match source.raw_os_error() {
            None if source.kind() == io::ErrorKind::PermissionDenied => self.outside(path),
            _ => Error::Io { path: path.to_owned(), source },
        })
    }
}

/// Where the packages put these roots. Clients are written with these paths, so they stay good where the settings put a root elsewhere.
const INSTALLED: &[(&str, &str)] = &[("exports", "/var/lib/hypersdk/exports"), ("images", "/var/lib/libvirt/images")];

/// The same decision without opened roots, for the controller, which knows an agent's roots by name and path only.
pub fn locate(roots: impl IntoIterator<Item = (String, PathBuf)>, path: &str) -> Option<(String, PathBuf)> {
    let given = Path::new(path);
    if path.contains('\0') || given.components().any(|part| part == Component::ParentDir) {
        return None;
    }
    let clean = |below: &Path| below.components().filter(|part| matches!(part, Component::Normal(_))).collect::<PathBuf>();
    let mut by_default = None;
    for (name, root) in roots {
        let below = if given.is_absolute() { given.strip_prefix(&root).ok() } else { given.strip_prefix(&name).ok() };
        if let Some(below) = below {
            return Some((name, clean(below)));
        }
        let installed = INSTALLED.iter().find(|(root, _)| *root == name);
        if let Some(below) = installed.and_then(|(_, folder)| given.strip_prefix(folder).ok()) {
            by_default = Some((name, clean(below)));
        }
    }
    by_default
}

/// Options for opening below a [`Dir`].
pub fn file_options() -> cap_std::fs::OpenOptions {
    cap_std::fs::OpenOptions::new()
}

/// Opens a regular file below a folder for reading; a fifo or device is refused before it can block or act.
pub fn open_regular(dir: &Dir, below: &Path) -> io::Result<File> {
    use cap_std::fs::OpenOptionsExt as _;
    let mut options = cap_std::fs::OpenOptions::new();
    options.read(true).custom_flags(rustix::fs::OFlags::NONBLOCK.bits() as i32);
    let file = dir.open_with(below, &options)?.into_std();
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    Ok(file)
}

/// Up to `length` bytes of a file from `offset`; fewer only at its end. The buffer is not written before the kernel writes it.
pub fn read_chunk(file: &File, offset: u64, length: usize) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(length);
    while bytes.len() < length {
        let at = offset.saturating_add(bytes.len() as u64);
        match rustix::io::pread(file, rustix::buffer::spare_capacity(&mut bytes), at) {
            Ok(0) => break,
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    bytes.truncate(length);
    Ok(bytes)
}

/// Makes or opens a folder of this process's own (data directory) for its owner alone.
pub fn open_data_dir(path: &Path) -> io::Result<Dir> {
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path)?;
    Dir::open_ambient_dir(path, ambient_authority())
}

/// Takes an exclusive lock on `name` in a folder for as long as the file lives; `None` when another process holds it.
pub fn lock(dir: &Dir, name: &str) -> io::Result<Option<File>> {
    let mut options = cap_std::fs::OpenOptions::new();
    options.write(true).create(true);
    let file = dir.open_with(name, &options)?.into_std();
    match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// A file of a data directory, where it is there.
pub fn read_optional(dir: &Dir, name: &str) -> io::Result<Option<Vec<u8>>> {
    match dir.open(name) {
        Ok(file) => {
            let mut bytes = Vec::new();
            file.take(CONFIG_LIMIT).read_to_end(&mut bytes)?;
            Ok(Some(bytes))
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

/// Writes a file of a data directory whole or not at all: temporary name, fsync, rename, fsync of the folder; mode 0600.
pub fn write_whole(dir: &Dir, name: &str, bytes: &[u8]) -> io::Result<()> {
    use cap_std::fs::OpenOptionsExt as _;
    let temporary = format!("{name}.new");
    let mut options = cap_std::fs::OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    let mut file = dir.open_with(&temporary, &options)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    dir.rename(&temporary, dir, name)?;
    sync_dir(dir)
}

/// Makes a new file for its owner alone; one that exists is an error.
pub fn create_private(dir: &Dir, name: &str) -> io::Result<File> {
    use cap_std::fs::OpenOptionsExt as _;
    let mut options = cap_std::fs::OpenOptions::new();
    options.write(true).create_new(true).mode(0o600);
    Ok(dir.open_with(name, &options)?.into_std())
}

/// Makes a named pipe for its owner alone.
pub fn make_pipe(dir: &Dir, name: &str) -> io::Result<()> {
    Ok(rustix::fs::mknodat(dir, name, rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR, 0)?)
}

/// Opens a named pipe for reading. It does not wait for whoever writes, nor does a read.
pub fn open_pipe(dir: &Dir, name: &str) -> io::Result<File> {
    use cap_std::fs::{FileTypeExt as _, OpenOptionsExt as _};
    let flags = rustix::fs::OFlags::NONBLOCK | rustix::fs::OFlags::NOFOLLOW;
    let mut options = cap_std::fs::OpenOptions::new();
    options.read(true).custom_flags(flags.bits() as i32);
    let file = dir.open_with(name, &options)?;
    if !file.metadata()?.file_type().is_fifo() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a pipe"));
    }
    Ok(file.into_std())
}

/// Makes renames and removals in a folder durable.
pub fn sync_dir(dir: &Dir) -> io::Result<()> {
    // The handle itself may be a mere path (O_PATH), which cannot be synced.
    let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC;
    let opened = rustix::fs::openat(dir, ".", flags, rustix::fs::Mode::empty())?;
    Ok(rustix::fs::fsync(opened)?)
}

/// Renames inside a folder, refusing to replace anything (renameat2, RENAME_NOREPLACE).
pub fn rename_without_replacing(dir: &Dir, from: &str, to: &str) -> io::Result<()> {
    Ok(rustix::fs::renameat_with(dir, from, dir, to, rustix::fs::RenameFlags::NOREPLACE)?)
}

/// A settings or key file that the operator named, up to 1 MiB.
pub fn read_config(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(CONFIG_LIMIT + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > CONFIG_LIMIT {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "larger than 1 MiB"));
    }
    Ok(bytes)
}

/// Writes a file that the operator or the CLI's user named, for its owner alone, whole or not at all.
pub fn write_private(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    };
    std::fs::create_dir_all(&parent)?;
    let name =
        path.file_name().and_then(|name| name.to_str()).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "no file name"))?;
    write_whole(&Dir::open_ambient_dir(parent, ambient_authority())?, name, bytes)
}

/// An image that the CLI's user named, read with the user's own rights.
pub fn open_user_file(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new().read(true).custom_flags(rustix::fs::OFlags::NONBLOCK.bits() as i32).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    Ok(file)
}

/// The folder of a path that the CLI's user named (made when it is not there) and the last part of the path.
pub fn open_user_dir_of(path: &Path, make: bool) -> io::Result<(Dir, String)> {
    let name = path.file_name().and_then(|name| name.to_str());
    let name = name.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "the path has no file name in UTF-8"))?.to_owned();
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    };
    if make {
        std::fs::create_dir_all(&parent)?;
    }
    Ok((Dir::open_ambient_dir(parent, ambient_authority())?, name))
}

/// The path behind links, for a path that the CLI's user named: their own links are theirs to follow.
pub fn real_user_path(path: &Path) -> io::Result<PathBuf> {
    std::fs::canonicalize(path)
}

/// A new private folder for a throw-away installation (`hypersdk demo`), below the system's temporary folder.
pub fn temporary_dir(prefix: &str) -> io::Result<PathBuf> {
    let path = std::env::temp_dir().join(format!("{prefix}-{}", crate::ids::random_hex::<6>()));
    std::fs::DirBuilder::new().mode(0o700).create(&path)?;
    Ok(path)
}

/// Makes a folder that is not for the owner alone so; a data directory made by an installer may be too open.
pub fn make_private(path: &Path) -> io::Result<()> {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o700))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_name_leads_nowhere_but_below_its_root() {
        let base = temporary_dir("vault").unwrap();
        std::fs::create_dir(base.join("in")).unwrap();
        std::fs::write(base.join("secret"), b"secret").unwrap();
        std::fs::write(base.join("in/disk.raw"), b"disk").unwrap();
        std::os::unix::fs::symlink("../secret", base.join("in/link")).unwrap();
        std::os::unix::fs::symlink("disk.raw", base.join("in/good-link")).unwrap();
        let mut vault = Vault::default();
        vault.add(Root::open("vms", &base.join("in"), false).unwrap());
        let absolute = base.join("in/disk.raw").display().to_string();
        for good in ["vms/disk.raw", "vms/./disk.raw", "vms/good-link", absolute.as_str()] {
            assert!(vault.open_file(good).is_ok(), "{good}");
        }
        let escape = base.join("secret").display().to_string();
        for bad in ["vms/../secret", "vms/link", "/etc/passwd", "secret", "other/disk.raw", "vmsx/disk.raw", escape.as_str(), "vms/a\0b"] {
            assert!(matches!(vault.open_file(bad), Err(Error::Outside { .. })), "{bad}");
        }
        assert!(matches!(vault.open_file("vms/none"), Err(Error::Io { .. })));
        assert!(vault.open_output_dir("vms/new").is_err(), "a root that is only read was written");
        std::fs::remove_dir_all(base).unwrap();
    }

    #[test]
    fn the_packages_paths_lead_to_the_roots_wherever_these_lie() {
        let roots = || [("exports".to_owned(), PathBuf::from("/srv/out")), ("vms".to_owned(), PathBuf::from("/srv/vms"))];
        let found = |path: &str| locate(roots(), path).map(|(name, below)| format!("{name}:{}", below.display()));
        assert_eq!(found("/var/lib/hypersdk/exports/night/").as_deref(), Some("exports:night"));
        assert_eq!(found("/srv/out/night").as_deref(), Some("exports:night"));
        assert_eq!(found("/var/lib/hypersdk/exports/../x"), None);
        assert_eq!(found("/var/lib/hypersdk"), None);
        assert_eq!(found("/var/lib/libvirt/images/a"), None, "no such root here");
        // A root that really lies there wins.
        let both = [("exports".to_owned(), PathBuf::from("/srv/out")), ("vms".to_owned(), PathBuf::from("/var/lib/hypersdk/exports"))];
        assert_eq!(locate(both, "/var/lib/hypersdk/exports/a").map(|(name, _)| name).as_deref(), Some("vms"));
    }

    #[test]
    fn a_rename_never_replaces_and_a_lock_has_one_holder() {
        let base = temporary_dir("vault").unwrap();
        let dir = open_data_dir(&base).unwrap();
        dir.create_dir("a.part").unwrap();
        dir.create_dir("a").unwrap();
        assert!(rename_without_replacing(&dir, "a.part", "a").is_err());
        rename_without_replacing(&dir, "a.part", "b").unwrap();
        let held = lock(&dir, "lock").unwrap();
        assert!(held.is_some() && lock(&dir, "lock").unwrap().is_none());
        std::fs::remove_dir_all(base).unwrap();
    }
}

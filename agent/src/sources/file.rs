//! One file in a root as a source: what `convert`, `import` and `verify` read.
//!
//! Owns: which path may be one, and what it opens to. The format is the one that the name declares; what the content says is only used to
//! refuse. Never: leaves the root, opens a folder, a pipe or a device, follows a name out of the file's own folder.
//! A crash here costs nothing: it only reads.

use std::io;
use std::path::Path;

use shared::error::Code;
use shared::vault::{self, Dir, Vault};
use shared::vm::Vm;

use super::local::{Depth, Local};
use super::{Error, Opened, Source as _};

/// A file that is there, in its folder.
pub struct FileSource {
    /// As `ROOT/…`.
    pub named: String,
    /// Its folder, opened.
    pub folder: Dir,
    /// Its folder's absolute path on this host; of an upload as it is known.
    pub folder_path: std::path::PathBuf,
    /// Its bare name.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// The folder above its own.
    above: Option<Dir>,
}

impl FileSource {
    /// Finds a file by `ROOT/…` or an absolute path below a root.
    pub fn find(vault: &Vault, path: &str) -> Result<Self, Error> {
        let place = vault.locate(path).map_err(|e| Error::fatal(Code::OutsideRoots, e.to_string()))?;
        let named = place.named();
        let folder_error = || Error::fatal(Code::Unprocessable, format!("{named} is a folder; name a file in it, of a package the .ovf"));
        let (Some(name), parent) = (place.below.file_name(), place.below.parent().unwrap_or(Path::new(""))) else {
            return Err(folder_error());
        };
        let name = name.to_str().ok_or_else(|| Error::fatal(Code::BadRequest, format!("the name of {named} is not UTF-8")))?.to_owned();
        let root = place.root.dir();
        let opened = if parent.as_os_str().is_empty() { root.try_clone() } else { root.open_dir(parent) };
        let folder = opened.map_err(|e| explain(&named, &e))?;
        if folder.metadata(&name).map_err(|e| explain(&named, &e))?.is_dir() {
            return Err(folder_error());
        }
        let file = vault::open_regular(&folder, Path::new(&name)).map_err(|e| explain(&named, &e))?;
        let size = file.metadata().map_err(|e| explain(&named, &e))?.len();
        let folder_path = place.root.path.join(parent);
        let above = match parent.parent().filter(|_| !parent.as_os_str().is_empty()) {
            Some(above) if above.as_os_str().is_empty() => Some(root.try_clone()),
            Some(above) => Some(root.open_dir(above)),
            None => None,
        };
        let above = above.transpose().map_err(|e| explain(&named, &e))?;
        Ok(Self { named, folder, folder_path, name, size, above })
    }

    /// The folder above the file's own, where that lies in the root as well.
    pub fn parent(&self) -> Result<Option<Dir>, Error> {
        let Some(above) = &self.above else { return Ok(None) };
        above.try_clone().map(Some).map_err(|e| explain(&self.named, &e))
    }

    /// A file that lies in a folder of the agent's own and is known by another path: an upload that was fetched.
    pub fn fetched(folder: Dir, name: String, size: u64, named: &str) -> Self {
        let folder_path = Path::new(named).parent().unwrap_or(Path::new("")).to_owned();
        Self { named: named.to_owned(), folder, folder_path, name, size, above: None }
    }

    fn local(&self) -> Result<Local, Error> {
        Ok(Local::new(self.folder.try_clone().map_err(|e| explain(&self.named, &e))?))
    }

    /// Opens it; `depth` says how much of a package is checked.
    pub fn open(&self, depth: Depth) -> Result<(Vm, Vec<Opened>), Error> {
        self.local()?.open_file(&self.name, depth)
    }

    /// The snapshots inside it; none where it is a package.
    pub fn open_snapshots(&self) -> Result<Vec<Opened>, Error> {
        if self.name.to_ascii_lowercase().ends_with(".ovf") {
            return Ok(Vec::new());
        }
        self.local()?.open_snapshots(&self.name)
    }
}

fn explain(named: &str, e: &io::Error) -> Error {
    match (e.kind(), e.raw_os_error()) {
        // An escape: the vault's answer has no number of the system's.
        (io::ErrorKind::PermissionDenied, None) => Error::fatal(Code::OutsideRoots, format!("{named} leads out of its root")),
        (io::ErrorKind::NotFound | io::ErrorKind::NotADirectory, _) => Error::fatal(Code::NotFound, format!("there is no file {named}")),
        (io::ErrorKind::InvalidInput, _) => Error::fatal(Code::Unprocessable, format!("{named} is not a regular file")),
        (io::ErrorKind::PermissionDenied, _) => Error::fatal(Code::Unprocessable, format!("{named} may not be read by the agent")),
        _ => Error { code: Code::BadGateway, message: format!("{named}: {e}"), retryable: true },
    }
}

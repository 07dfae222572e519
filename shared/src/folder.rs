//! What lies in a root: one page of a folder, or one path, as both sides of the fleet tell it.
//!
//! Owns: the shape of an entry, its version (what an `ETag` is made of), the order of a listing.
//! Never: opens anything but through the vault; follows a link out of a root: such a link shows as `link` and leads nowhere.
//! A crash here costs one answer.

use std::cmp::Ordering;
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use cap_std::fs::{Dir, MetadataExt as _};
use serde::{Deserialize, Serialize};

use crate::vault::{self, Error, Vault};

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A configured root.
    Root,
    /// A folder.
    Folder,
    /// A regular file.
    File,
    /// A link that leads out of its root or nowhere.
    Link,
    /// A device, a fifo or a socket.
    Other,
}

/// One entry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The last part of its path.
    pub name: String,
    /// As `ROOT/…`.
    pub path: String,
    /// What it is; of a link inside the root, what it leads to.
    #[serde(rename = "type")]
    pub kind: Kind,
    /// Bytes of a file, else 0.
    pub size: u64,
    /// Time of its last change, milliseconds since 1970 UTC.
    pub modified_at: i64,
    /// What a file's content is, where somebody looked.
    pub format: Option<String>,
    /// Changes with the content of a file; empty of all else.
    #[serde(default)]
    pub version: String,
}

/// By what a listing is sorted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sort {
    /// Name.
    #[default]
    Name,
    /// Size.
    Size,
    /// Time of the last change.
    Modified,
    /// Folders, then files, then the rest.
    Kind,
}

impl Sort {
    /// The fields as the API spells them.
    pub const WORDS: &[&'static str] = &["name", "size", "modified_at", "type"];

    /// The field of a word; the name for what is no word.
    pub fn from_word(word: &str) -> Self {
        match word {
            "size" => Sort::Size,
            "modified_at" => Sort::Modified,
            "type" => Sort::Kind,
            _ => Sort::Name,
        }
    }

    /// Which of two entries comes first; equal ones are told apart by name.
    pub fn compare(self, descending: bool, a: &Entry, b: &Entry) -> Ordering {
        let by_field = match self {
            Sort::Name => a.name.cmp(&b.name),
            Sort::Size => a.size.cmp(&b.size),
            Sort::Modified => a.modified_at.cmp(&b.modified_at),
            Sort::Kind => a.kind.cmp(&b.kind),
        };
        let by_field = if descending { by_field.reverse() } else { by_field };
        by_field.then_with(|| a.name.cmp(&b.name))
    }
}

/// Which part of a listing.
#[derive(Clone, Debug, Default)]
pub struct Ask {
    /// Entries to skip.
    pub offset: u64,
    /// Most entries to answer.
    pub limit: u64,
    /// The order.
    pub sort: Sort,
    /// The other way round.
    pub descending: bool,
    /// Part of the name, without regard to case; empty for all.
    pub search: String,
}

/// Says what a file's content is.
pub type Sniff<'a> = &'a dyn Fn(File) -> Option<String>;

/// One page of a folder, and how many entries there are. Names that begin with a dot are not shown; content is looked at only on the page.
pub fn list(vault: &Vault, path: &str, ask: &Ask, sniff: Sniff<'_>) -> Result<(Vec<Entry>, u64), Error> {
    let place = vault.locate(path)?;
    let (dir, parent) = (vault.open_dir(path)?, place.named());
    let broken = |source: io::Error| Error::Io { path: path.to_owned(), source };
    let wanted = ask.search.to_lowercase();
    let mut names = Vec::new();
    for entry in dir.entries().map_err(broken)? {
        // A name that is no text cannot be asked for either.
        let Ok(name) = entry.map_err(broken)?.file_name().into_string() else { continue };
        if !name.starts_with('.') && (wanted.is_empty() || name.to_lowercase().contains(&wanted)) {
            names.push(name);
        }
    }
    let total = names.len() as u64;
    let (skip, take) = (usize::try_from(ask.offset).unwrap_or(usize::MAX), usize::try_from(ask.limit).unwrap_or(usize::MAX));
    let look = |name: String| entry(&dir, Path::new(&name), name.clone(), format!("{parent}/{name}")).ok();
    let mut page: Vec<Entry> = match ask.sort {
        // Nothing but the page need be looked at.
        Sort::Name => {
            names.sort_unstable();
            if ask.descending {
                names.reverse();
            }
            names.into_iter().skip(skip).take(take).filter_map(look).collect()
        }
        sort => {
            let mut all: Vec<Entry> = names.into_iter().filter_map(look).collect();
            all.sort_unstable_by(|a, b| sort.compare(ask.descending, a, b));
            all.into_iter().skip(skip).take(take).collect()
        }
    };
    for entry in page.iter_mut().filter(|entry| entry.kind == Kind::File) {
        entry.format = vault::open_regular(&dir, Path::new(&entry.name)).ok().and_then(sniff);
    }
    Ok((page, total))
}

/// One path.
pub fn stat(vault: &Vault, path: &str, sniff: Sniff<'_>) -> Result<Entry, Error> {
    let place = vault.locate(path)?;
    let named = place.named();
    let name = named.rsplit('/').next().unwrap_or_default().to_owned();
    if place.below.as_os_str().is_empty() {
        let modified = place.root.dir().dir_metadata().map_err(|source| Error::Io { path: path.to_owned(), source })?;
        return Ok(Entry { kind: Kind::Root, ..described(&modified, name, named) });
    }
    let found = place.root.dir().metadata(&place.below).map(|metadata| described(&metadata, name, named));
    let mut entry = vault.explain(path, found)?;
    if entry.kind == Kind::File {
        entry.format = vault.open_file(path).ok().and_then(sniff);
    }
    Ok(entry)
}

/// What changes with a file's content: its size, the time of its last change and which file it is.
pub fn version(file: &std::fs::Metadata) -> String {
    version_of(file.len(), file.mtime(), file.mtime_nsec(), file.ino())
}

fn version_of(size: u64, seconds: i64, nanoseconds: i64, inode: u64) -> String {
    format!("{size:x}-{seconds:x}.{nanoseconds:x}-{inode:x}")
}

fn entry(dir: &Dir, below: &Path, name: String, path: String) -> io::Result<Entry> {
    let itself = dir.symlink_metadata(below)?;
    if !itself.is_symlink() {
        return Ok(described(&itself, name, path));
    }
    match dir.metadata(below) {
        Ok(target) => Ok(described(&target, name, path)),
        Err(_) => Ok(Entry { kind: Kind::Link, size: 0, version: String::new(), ..described(&itself, name, path) }),
    }
}

fn described(metadata: &cap_std::fs::Metadata, name: String, path: String) -> Entry {
    let kind = match () {
        () if metadata.is_file() => Kind::File,
        () if metadata.is_dir() => Kind::Folder,
        () => Kind::Other,
    };
    let (size, version) = match kind {
        Kind::File => (metadata.len(), version_of(metadata.len(), metadata.mtime(), metadata.mtime_nsec(), metadata.ino())),
        _ => (0, String::new()),
    };
    let modified_at = metadata.mtime().saturating_mul(1000).saturating_add(metadata.mtime_nsec() / 1_000_000);
    Entry { name, path, kind, size, modified_at, format: None, version }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::disallowed_methods)]
mod tests {
    use super::*;
    use crate::vault::Root;

    #[test]
    fn a_listing_is_sorted_paged_and_shows_no_way_out() {
        let base = vault::temporary_dir("folder").unwrap();
        std::fs::create_dir_all(base.join("in/sub")).unwrap();
        for (name, size) in [("b.raw", 3), ("a.raw", 5), (".hidden", 1)] {
            std::fs::write(base.join("in").join(name), vec![0; size]).unwrap();
        }
        std::fs::write(base.join("secret"), b"secret").unwrap();
        std::os::unix::fs::symlink("../secret", base.join("in/out")).unwrap();
        std::os::unix::fs::symlink("a.raw", base.join("in/same")).unwrap();
        let mut vault = Vault::default();
        vault.add(Root::open("vms", &base.join("in"), false).unwrap());
        let names = |ask: Ask| {
            let (page, total) = list(&vault, "vms", &ask, &|_| Some("raw".to_owned())).unwrap();
            (page.into_iter().map(|entry| entry.name).collect::<Vec<_>>(), total)
        };
        let all = Ask { limit: 50, ..Ask::default() };
        assert_eq!(names(all.clone()), (["a.raw", "b.raw", "out", "same", "sub"].map(str::to_owned).to_vec(), 5));
        assert_eq!(names(Ask { offset: 1, limit: 2, descending: true, ..all.clone() }).0, ["same", "out"]);
        assert_eq!(names(Ask { sort: Sort::Size, descending: true, limit: 2, ..all.clone() }).0, ["a.raw", "same"]);
        assert_eq!(names(Ask { search: "RAW".to_owned(), ..all.clone() }).1, 2);
        let (page, _) = list(&vault, "vms", &all, &|_| Some("raw".to_owned())).unwrap();
        let kinds: Vec<Kind> = page.iter().map(|entry| entry.kind).collect();
        assert_eq!(kinds, [Kind::File, Kind::File, Kind::Link, Kind::File, Kind::Folder]);
        assert_eq!((page[2].size, page[0].format.as_deref(), page[0].path.as_str()), (0, Some("raw"), "vms/a.raw"));
        let one = stat(&vault, "vms/a.raw", &|_| None).unwrap();
        assert_eq!((one.kind, one.size), (Kind::File, 5));
        assert_eq!(one.version, version(&vault.open_file("vms/a.raw").unwrap().metadata().unwrap()));
        assert_eq!(stat(&vault, "vms", &|_| None).unwrap().kind, Kind::Root);
        for bad in ["vms/out", "vms/../secret", "/etc/passwd"] {
            assert!(matches!(stat(&vault, bad, &|_| None), Err(Error::Outside { .. })), "{bad}");
        }
        assert!(matches!(list(&vault, "vms/a.raw", &all, &|_| None), Err(Error::Io { .. })));
        std::fs::remove_dir_all(base).unwrap();
    }
}

//! The files of a guest, whatever file system they lie in.
//!
//! Owns: what every file system is to those who look at files, and the guest's own tree: its root with what is mounted into it.
//! Never: reads more of a file than was asked for. A crash here costs nothing.

use std::io::{self, Read};

/// Most entries of a folder that are looked at.
pub const MAX_ENTRIES: usize = 20_000;

/// A name in a folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Without its folder.
    pub name: String,
    /// Whether it is a folder itself.
    pub is_dir: bool,
}

/// A file, opened.
pub struct File {
    /// Bytes, as its file system tells.
    pub size: u64,
    /// From its beginning on.
    pub reader: Box<dyn Read>,
}

/// A file system. Paths are absolute, parts separated by `/`.
pub trait Tree {
    /// A file.
    fn open(&self, path: &str) -> io::Result<File>;

    /// The names in a folder, without `.` and `..`, at most [`MAX_ENTRIES`].
    fn list(&self, path: &str) -> io::Result<Vec<Entry>>;
}

/// A guest's tree.
pub struct Rooted<'t> {
    /// Mount points with what lies there; the root is `/`.
    mounts: Vec<(String, &'t dyn Tree)>,
}

impl<'t> Rooted<'t> {
    /// With this file system as its root.
    pub fn new(root: &'t dyn Tree) -> Self {
        Self { mounts: vec![("/".to_owned(), root)] }
    }

    /// With another one mounted into it.
    pub fn mount(&mut self, at: &str, tree: &'t dyn Tree) {
        self.mounts.push((at.trim_end_matches('/').to_owned(), tree));
    }

    /// The file system of a path, and the path in it.
    fn at<'p>(&self, path: &'p str) -> (&'t dyn Tree, &'p str) {
        let mut found = (self.mounts[0].1, path, 0);
        for (point, tree) in &self.mounts[1..] {
            if let Some(rest) = path.strip_prefix(point.as_str())
                && (rest.is_empty() || rest.starts_with('/'))
                && point.len() > found.2
            {
                found = (*tree, if rest.is_empty() { "/" } else { rest }, point.len());
            }
        }
        (found.0, found.1)
    }

    /// A file.
    pub fn open(&self, path: &str) -> io::Result<File> {
        let (tree, path) = self.at(path);
        tree.open(path)
    }

    /// The first `most` bytes of a file; nothing where it cannot be read.
    pub fn read(&self, path: &str, most: u64) -> Option<Vec<u8>> {
        let mut bytes = Vec::new();
        self.open(path).ok()?.reader.take(most).read_to_end(&mut bytes).ok()?;
        Some(bytes)
    }

    /// The same as text; what is no UTF-8 is replaced.
    pub fn text(&self, path: &str, most: u64) -> Option<String> {
        Some(String::from_utf8_lossy(&self.read(path, most)?).into_owned())
    }

    /// Whether a file is there.
    pub fn has(&self, path: &str) -> bool {
        self.open(path).is_ok()
    }

    /// The names in a folder, in order; none where it cannot be read.
    pub fn list(&self, path: &str) -> Vec<Entry> {
        let (tree, path) = self.at(path);
        let mut entries = tree.list(path).unwrap_or_default();
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        entries
    }
}

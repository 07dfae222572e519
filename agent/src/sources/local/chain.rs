//! Delta chains in a folder: from a child to its parents, by consent only.
//!
//! Owns: which parent's name is followed (a relative path that stays beside or below the child; of a hypervisor's own disk any that stays in
//! the root), how it is opened (no links), and the proofs that it is the right one: the VMDK content identifier, the declared format of a
//! backing file, no cycle.
//! Never: guesses a format or a name, leaves the root. A crash here costs nothing.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use shared::vault;

use super::{Image, Local, OpenOptions, inode, mark_snapshot};
use crate::formats::chain::{Chain, Layer, Link, MAX_TABLE_BYTES, in_parent};
use crate::formats::{FormatError, Window, qcow2, raw, vmdk};

/// What the next file of a chain is said to be by the one above it.
pub(super) struct Step {
    pub path: PathBuf,
    pub format: Layered,
    /// The content identifier that a VMDK must have.
    pub cid: Option<u32>,
}

/// One file of a chain, opened.
struct Node {
    layer: Arc<dyn Layer>,
    next: Option<Step>,
    /// Internal snapshots.
    snapshots: u32,
}

/// Formats that stand in a chain.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Layered {
    Raw,
    Qcow2,
    Vmdk,
}

impl Layered {
    fn name(self) -> &'static str {
        match self {
            Layered::Raw => "raw",
            Layered::Qcow2 => "qcow2",
            Layered::Vmdk => "vmdk",
        }
    }
}

impl Local {
    /// Opens an image with all its parents. Only a parent that lies beside or below its child is followed, and only without links.
    pub(super) fn chain(&self, top: Step, options: &OpenOptions) -> Result<Image, FormatError> {
        let mut seen = BTreeSet::new();
        let file = vault::open_regular(&self.dir, &top.path)?;
        seen.insert(inode(&file)?);
        let mut identity = super::identity(&file)?;
        let Node { layer, mut next, snapshots } =
            self.layer(&top, file, options, options.snapshot.as_deref(), MAX_TABLE_BYTES, &mut identity)?;
        mark_snapshot(&mut identity, options);
        let mut chain = Chain::new(Link { name: top.path.display().to_string(), layer })?;
        let mut parents = Vec::new();
        while let Some(step) = next {
            let name = step.path.display().to_string();
            let format = step.format.name();
            let refused = |reason: String| FormatError::Refused { format, reason };
            let file = self.parent(&step)?;
            if !seen.insert(inode(&file)?) {
                return Err(refused(format!("its chain of parents comes back to {name:?}; a chain must end at a complete disk")));
            }
            identity.push('+');
            identity.push_str(&super::identity(&file)?);
            let opened = self.layer(&step, file, options, None, chain.room(), &mut identity);
            let Node { layer, next: parent, .. } = opened.map_err(|e| in_parent(&name, e))?;
            chain.push(Link { name, layer })?;
            parents.push(step.path);
            next = parent;
        }
        Ok(Image { disk: chain.into_disk(), identity, snapshots, parents })
    }

    /// Opens one file of a chain; its L1 table may take `room` bytes.
    fn layer(
        &self,
        step: &Step,
        file: File,
        options: &OpenOptions,
        snapshot: Option<&str>,
        room: u64,
        identity: &mut String,
    ) -> Result<Node, FormatError> {
        let window = Window::whole(file)?;
        match step.format {
            Layered::Raw => Ok(Node { layer: Arc::new(raw::Reader::open(window)?), next: None, snapshots: 0 }),
            Layered::Qcow2 => {
                let reader = qcow2::Reader::open_layer(window, snapshot, room)?;
                let snapshots = reader.header().snapshots;
                let next = reader.header().backing.as_ref().map(|backing| backing_step(&step.path, backing, options)).transpose()?;
                Ok(Node { layer: Arc::new(reader), next, snapshots })
            }
            Layered::Vmdk => {
                let disk = self.vmdk(&step.path, window, vmdk::open_layer, identity)?;
                if let Some(wanted) = step.cid.filter(|wanted| disk.cid() != Some(*wanted)) {
                    let has = disk.cid().map_or("none".to_owned(), |cid| format!("{cid:08x}"));
                    let reason =
                        format!("its child was made over the content {wanted:08x} (parentCID) and its CID is {has}: it was changed since");
                    return Err(FormatError::Refused { format: "vmdk", reason });
                }
                let next = match disk.parent().map(vmdk::Parent::named).transpose()? {
                    Some((cid, hint)) => Some(Step { path: beside(&step.path, hint, "vmdk")?, format: Layered::Vmdk, cid: Some(cid) }),
                    None => None,
                };
                Ok(Node { layer: Arc::new(disk), next, snapshots: 0 })
            }
        }
    }

    /// Opens a parent's file step by step: no part of its path may be a link, not even one that was put there a moment ago.
    fn parent(&self, step: &Step) -> Result<File, FormatError> {
        use cap_std::fs::MetadataExt as _;
        let refused =
            |what: String| FormatError::Refused { format: step.format.name(), reason: format!("its parent {:?} {what}", step.path) };
        let linked = || refused("is reached through a symbolic link; only real files and folders are followed".to_owned());
        let gone = |e: io::Error| match e.kind() {
            io::ErrorKind::NotFound => refused("is not there; put it back, or give a disk that is complete in itself".to_owned()),
            io::ErrorKind::InvalidInput | io::ErrorKind::NotADirectory => refused(format!("cannot be read: {e}")),
            _ => FormatError::Io(e),
        };
        let mut folder = self.dir.try_clone()?;
        let mut parts = step.path.components().peekable();
        while let Some(part) = parts.next() {
            let part = Path::new(part.as_os_str());
            let seen = folder.symlink_metadata(part).map_err(gone)?;
            if seen.is_symlink() {
                return Err(linked());
            }
            if parts.peek().is_none() {
                let file = vault::open_regular(&folder, part).map_err(gone)?;
                let same = inode(&file)? == (seen.dev(), seen.ino());
                return if same { Ok(file) } else { Err(linked()) };
            }
            folder = folder.open_dir(part).map_err(gone)?;
            let opened = folder.dir_metadata()?;
            if (opened.dev(), opened.ino()) != (seen.dev(), seen.ino()) {
                return Err(linked());
            }
        }
        Err(refused("has no name".to_owned()))
    }
}

/// Where a parent lies below the root: beside its child or below that folder.
fn beside(child: &Path, named: &str, format: &'static str) -> Result<PathBuf, FormatError> {
    let relative = Path::new(named);
    let plain = relative.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
    let named_file = relative.file_name().is_some() && !named.ends_with('/');
    if !plain || !named_file || named.len() > 1023 || named.contains(['\\', ':']) || named.chars().any(char::is_control) {
        let short: String = named.chars().take(80).collect();
        let reason = format!(
            "it names the parent {short:?}; only a file beside it or in a folder below is followed, by a relative path without `..`, \
             `:` and `\\`"
        );
        return Err(FormatError::Refused { format, reason });
    }
    let names = relative.components().filter(|part| matches!(part, Component::Normal(_)));
    Ok(child.parent().unwrap_or(Path::new("")).join(names.collect::<PathBuf>()))
}

/// Where a parent lies below the root whose path is `root`, wherever that is: by a path from its child's folder, or an absolute one.
fn within(root: &Path, child: &Path, named: &str) -> Result<PathBuf, FormatError> {
    let plain = named.strip_prefix("file:").unwrap_or(named);
    let refused = || {
        let short: String = named.chars().take(80).collect();
        let reason = format!("it names the parent {short:?}; only files in the same root of this agent are followed");
        FormatError::Refused { format: "qcow2", reason }
    };
    if plain.len() > 1023 || plain.contains(':') || plain.ends_with('/') || plain.chars().any(char::is_control) {
        return Err(refused());
    }
    let (mut path, rest) = match Path::new(plain).strip_prefix(root) {
        Ok(rest) => (PathBuf::new(), rest),
        Err(_) if plain.starts_with('/') => return Err(refused()),
        Err(_) => (child.parent().unwrap_or(Path::new("")).to_owned(), Path::new(plain)),
    };
    for part in rest.components() {
        match part {
            Component::Normal(name) => path.push(name),
            Component::CurDir => {}
            Component::ParentDir if path.pop() => {}
            _ => return Err(refused()),
        }
    }
    // What ends in `..`, or is nothing, is a folder.
    if matches!(rest.components().next_back(), Some(Component::Normal(_))) { Ok(path) } else { Err(refused()) }
}

/// The next step from a qcow2: its backing file in the format that it declares, which is never guessed.
fn backing_step(child: &Path, backing: &qcow2::Backing, options: &OpenOptions) -> Result<Step, FormatError> {
    let refused = |reason: String| FormatError::Refused { format: "qcow2", reason };
    let shown = |text: &str| format!("{:?}", text.chars().take(80).collect::<String>());
    let format = match backing.format.as_deref() {
        Some("raw") => Layered::Raw,
        Some("qcow2") => Layered::Qcow2,
        Some("vmdk") => Layered::Vmdk,
        Some(other) => {
            let reason = format!("its backing file is said to be {}; raw, qcow2 and vmdk are followed", shown(other));
            return Err(refused(reason));
        }
        None => {
            let reason = format!(
                "it does not declare the format of its backing file {name}, and a guess could be the guest's; declare it: \
                 qemu-img rebase -u -F FORMAT -b {name} CHILD",
                name = shown(&backing.name)
            );
            return Err(refused(reason));
        }
    };
    let path = match &options.within {
        Some(root) => within(root, child, &backing.name)?,
        None => beside(child, &backing.name, "qcow2")?,
    };
    Ok(Step { path, format, cid: None })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_hypervisors_disk_has_its_parents_anywhere_in_the_root_and_nowhere_else() {
        let at = |named: &str| within(Path::new("/srv/r"), Path::new("job/pass-2/a.qcow2"), named).ok();
        for (named, path) in [
            ("../pass-1/a.qcow2", "job/pass-1/a.qcow2"),
            ("b.qcow2", "job/pass-2/b.qcow2"),
            ("./c/b.qcow2", "job/pass-2/c/b.qcow2"),
            ("/srv/r/base.qcow2", "base.qcow2"),
            ("file:/srv/r/x/../base.qcow2", "base.qcow2"),
            ("../../base.qcow2", "base.qcow2"),
        ] {
            assert_eq!(at(named), Some(PathBuf::from(path)), "{named}");
        }
        for named in ["../../../out", "/etc/passwd", "/srv/rest/x", "/srv/r/../x", "json:{}", "nbd://h/x", "", "..", "a/", "/srv/r", "a\nb"]
        {
            assert_eq!(at(named), None, "{named}");
        }
    }
}

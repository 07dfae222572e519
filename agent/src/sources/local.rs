//! The provider `local`: a folder of disk images, OVAs and folders, each of them a VM.
//!
//! Owns: which file is a VM, and in which format it may be read. The format is the one that the name declares; what the content says is only
//! used to refuse (a guest that writes a qcow2 header into its raw disk must not be read as qcow2, design: hostile input).
//! Never: follows a name out of the folder (the vault's directory handles), follows a delta to its parent unless [`OpenOptions`] say so,
//! writes.
//! A crash here costs nothing.
//!
//! | entry | VM |
//! |---|---|
//! | `web.raw`, `web.img`, `web.qcow2`, `web.vmdk` | `web`, one disk; VMDK extents go with their descriptor |
//! | `web.ova` | the name in its OVF |
//! | `web/` with a `.ovf`, or with an OVA alone | the name in it |
//! | `web/` with images | `web`, its images sorted by name |

mod beside;
mod chain;
mod snapshots;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use shared::error::Code;
use shared::vault::{self, Dir};
use shared::vm::{Disk as VmDisk, Vm};

use self::chain::{Layered, Step};
use super::{Beside, Error, Opened, Source};
use crate::formats::sniff::{self, Kind};
use crate::formats::{Disk, FormatError, Window, ova, qcow2, raw, vdi, vhd, vhdx, vmdk};

/// Entries of one folder that are looked at.
const MAX_ENTRIES: usize = 10_000;
/// Disks of one VM.
const MAX_DISKS: usize = 64;
/// What a VM without a description is said to have; an OVF that is written for it says the same.
const DEFAULT_CPU: u32 = 2;
/// See [`DEFAULT_CPU`].
const DEFAULT_MEMORY_MB: u64 = 2048;

/// A folder inside a root.
pub struct Local {
    dir: Dir,
}

/// What is opened beyond the strict rules, because whoever owns the disks asked for it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OpenOptions {
    /// Lay a VMDK delta over its parent and a qcow2 over its backing file, as long as these lie beside or below it in the same folder.
    pub follow_chain: bool,
    /// The path of the root that the folder is, where a qcow2's parents may lie anywhere in it: of disks that a hypervisor runs, whose headers
    /// no guest has written.
    pub within: Option<PathBuf>,
    /// Id or name of the internal snapshot to read instead of the present state; every disk of the VM must be a qcow2 that has it.
    pub snapshot: Option<String>,
}

/// One image file, opened.
struct Image {
    disk: Arc<dyn Disk>,
    identity: String,
    /// Internal snapshots.
    snapshots: u32,
    /// The files beneath it, which are no disks of their own.
    parents: Vec<PathBuf>,
}

/// How much of a package is checked when it is opened.
#[derive(Clone, Copy, PartialEq)]
pub enum Depth {
    /// What an inventory needs.
    Structure,
    /// The digests of its manifest as well, which reads all of it once: before it is copied.
    Digests,
}

/// What a file's name declares.
#[derive(Clone, Copy, PartialEq)]
enum Declared {
    Raw,
    Img,
    Qcow2,
    Vmdk,
    Vhdx,
    Vhd,
    Vdi,
    Ova,
    Ovf,
}

fn declared(name: &str) -> Option<Declared> {
    let (stem, extension) = name.rsplit_once('.')?;
    if stem.is_empty() || name.starts_with('.') {
        return None;
    }
    match extension.to_ascii_lowercase().as_str() {
        "raw" | "dd" => Some(Declared::Raw),
        "img" => Some(Declared::Img),
        "qcow2" | "qcow" => Some(Declared::Qcow2),
        "vmdk" => Some(Declared::Vmdk),
        "vhdx" => Some(Declared::Vhdx),
        "vhd" | "vpc" => Some(Declared::Vhd),
        "vdi" => Some(Declared::Vdi),
        "ova" => Some(Declared::Ova),
        "ovf" => Some(Declared::Ovf),
        _ => None,
    }
}

/// The folder in which a job's output grows is nobody's VM yet.
fn is_unfinished(name: &str) -> bool {
    name.strip_suffix(".part").is_some_and(|job| job.parse::<shared::ids::JobId>().is_ok())
}

fn stem(name: &str) -> &str {
    name.rsplit_once('.').map_or(name, |(stem, _)| stem)
}

impl Local {
    /// Takes an opened folder over.
    pub fn new(dir: Dir) -> Self {
        Self { dir }
    }

    /// The VM of this id with its disks, opened by other than the strict rules: see [`OpenOptions`].
    /// What cannot be followed is refused ([`Code::BadImage`]) with what would be right.
    pub fn open_with(&self, vm_id: &str, options: OpenOptions) -> Result<(Vm, Vec<Opened>), Error> {
        self.open_at(vm_id, Depth::Digests, &options)
    }

    /// A file of this folder by its bare name: an image, an OVA, or an OVF whose members lie beside it.
    pub fn open_file(&self, name: &str, depth: Depth) -> Result<(Vm, Vec<Opened>), Error> {
        let opened = match declared(name) {
            Some(Declared::Ovf) => self.ovf(Path::new(""), name, depth).map(Some),
            _ => self.vm(name, false, depth, &OpenOptions::default()),
        };
        let nothing = || {
            let known = ".raw, .dd, .img, .qcow2, .vmdk, .vhdx, .vhd, .vdi, .ova or .ovf";
            Error::fatal(Code::BadImage, format!("{name} is no disk image: its name must end in {known}, after its format"))
        };
        opened.map_err(|e| refusal(name, e))?.ok_or_else(nothing)
    }

    fn open_at(&self, vm_id: &str, depth: Depth, options: &OpenOptions) -> Result<(Vm, Vec<Opened>), Error> {
        let gone = |e: io::Error| Error::fatal(Code::NotFound, format!("the VM {vm_id:?} is not in the folder any more: {e}"));
        let is_dir = self.dir.metadata(vm_id).map_err(gone)?.is_dir();
        match self.vm(vm_id, is_dir, depth, options).map_err(|e| refusal(vm_id, e))? {
            Some(opened) => Ok(opened),
            None => Err(Error::fatal(Code::NotFound, format!("{vm_id:?} holds no disk image"))),
        }
    }

    fn entries(&self, below: &Path) -> io::Result<Vec<(String, bool)>> {
        let folder = if below.as_os_str().is_empty() { self.dir.try_clone()? } else { self.dir.open_dir(below)? };
        let mut entries = Vec::new();
        for entry in folder.entries()?.take(MAX_ENTRIES) {
            let entry = entry?;
            let Ok(name) = entry.file_name().into_string() else { continue };
            // The metadata behind a link counts; a link that leads out of the folder is not an entry.
            let Ok(metadata) = folder.metadata(&name) else { continue };
            entries.push((name, metadata.is_dir()));
        }
        entries.sort();
        Ok(entries)
    }

    fn window(&self, below: &Path) -> Result<(Window, String), FormatError> {
        let file = vault::open_regular(&self.dir, below)?;
        let identity = identity(&file)?;
        Ok((Window::whole(file)?, identity))
    }

    /// Opens a disk in the format that somebody declares whose word counts more than the name's: libvirt's words, `vpc` among them. A qcow2 is
    /// laid over its backing files, as far as these lie beside or below it, or, where that is given, in the root of this path.
    pub fn open_declared(&self, below: &Path, format: &str, within: Option<&Path>) -> Result<Opened, Error> {
        let kind = match format {
            "raw" => Declared::Raw,
            "qcow2" => Declared::Qcow2,
            "vmdk" => Declared::Vmdk,
            "vhdx" => Declared::Vhdx,
            "vpc" => Declared::Vhd,
            "vdi" => Declared::Vdi,
            other => return Err(Error::fatal(Code::NotBuilt, format!("disks of format {other:?} are not read yet"))),
        };
        let options = OpenOptions { follow_chain: kind == Declared::Qcow2, within: within.map(Path::to_owned), snapshot: None };
        let image = self.image_as(below, Some(kind), &options).map_err(|e| refusal(&below.display().to_string(), e))?;
        Ok(Opened { name: "disk-0".to_owned(), snapshot: None, disk: image.disk, identity: image.identity })
    }

    /// Opens one image file in the format that its name declares.
    fn image(&self, below: &Path, options: &OpenOptions) -> Result<Image, FormatError> {
        let name = below.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        self.image_as(below, declared(name), options)
    }

    fn image_as(&self, below: &Path, kind: Option<Declared>, options: &OpenOptions) -> Result<Image, FormatError> {
        let name = below.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if let (Some(snapshot), false) = (&options.snapshot, kind == Some(Declared::Qcow2)) {
            return Err(no_snapshot(name, snapshot));
        }
        let layered = match kind {
            Some(Declared::Qcow2) => Some(Layered::Qcow2),
            Some(Declared::Vmdk) => Some(Layered::Vmdk),
            _ => None,
        };
        if let (Some(format), true) = (layered, options.follow_chain) {
            return self.chain(Step { path: below.to_owned(), format, cid: None }, options);
        }
        let (window, mut identity) = self.window(below)?;
        let found = sniff::sniff(&window)?;
        let mut snapshots = 0;
        let disk: Arc<dyn Disk> = match kind {
            Some(Declared::Raw) => Arc::new(raw::Reader::open(window)?),
            // `.img` says nothing of the format, so only bytes that look like nothing else are taken as raw.
            Some(Declared::Img) if found == Kind::Raw => Arc::new(raw::Reader::open(window)?),
            Some(Declared::Img) => {
                let reason = format!(
                    "it is named .img and looks like {}; name it after its format, or .raw if the guest wrote that",
                    found.describe()
                );
                return Err(FormatError::Refused { format: "raw", reason });
            }
            Some(Declared::Qcow2) => {
                let reader = match &options.snapshot {
                    Some(snapshot) => qcow2::Reader::open_snapshot(window, snapshot)?,
                    None => qcow2::Reader::open(window)?,
                };
                mark_snapshot(&mut identity, options);
                snapshots = reader.header().snapshots;
                Arc::new(reader)
            }
            Some(Declared::Vmdk) => Arc::new(self.vmdk(below, window, vmdk::open, &mut identity)?),
            Some(Declared::Vhdx) => Arc::new(vhdx::Reader::open(window)?),
            Some(Declared::Vhd) => Arc::new(vhd::Reader::open(window)?),
            Some(Declared::Vdi) => Arc::new(vdi::Reader::open(window)?),
            _ => {
                let text = format!("{name} is no disk image; named .raw, .img, .qcow2, .vmdk, .vhdx, .vhd or .vdi it would be");
                return Err(FormatError::Unsupported(text));
            }
        };
        Ok(Image { disk, identity, snapshots, parents: Vec::new() })
    }

    /// Opens a VMDK whose extents lie beside it; they become part of the identity.
    fn vmdk(
        &self,
        below: &Path,
        window: Window,
        open: fn(Window, vmdk::Opener<'_>) -> Result<vmdk::Image, FormatError>,
        identity: &mut String,
    ) -> Result<vmdk::Image, FormatError> {
        let folder = below.parent().unwrap_or(Path::new(""));
        let identities = std::sync::Mutex::new(Vec::new());
        let disk = open(window, &|extent| {
            let (window, identity) = self.window(&folder.join(extent)).map_err(beneath)?;
            identities.lock().unwrap_or_else(|e| e.into_inner()).push(identity);
            Ok(window)
        })?;
        for extent in identities.into_inner().unwrap_or_default() {
            identity.push('+');
            identity.push_str(&extent);
        }
        Ok(disk)
    }

    /// Names that a VMDK descriptor among `names` uses as extents: they are part of that disk, not VMs of their own.
    fn extents(&self, folder: &Path, names: &[String]) -> BTreeSet<String> {
        let mut extents = BTreeSet::new();
        for name in names.iter().filter(|name| declared(name) == Some(Declared::Vmdk)) {
            let Ok((window, _)) = self.window(&folder.join(name)) else { continue };
            extents.extend(vmdk::extent_names(&window).unwrap_or_default());
        }
        extents
    }

    /// The VM at an entry, with its disks; `None` where the entry is no VM. `depth` says how much of a package is checked.
    fn vm(&self, id: &str, is_dir: bool, depth: Depth, options: &OpenOptions) -> Result<Option<(Vm, Vec<Opened>)>, FormatError> {
        let path = Path::new(id);
        if is_dir {
            return self.folder(path, depth, options);
        }
        match (declared(id), &options.snapshot) {
            (None | Some(Declared::Ovf), _) => Ok(None),
            (Some(Declared::Ova), Some(snapshot)) => Err(no_snapshot(id, snapshot)),
            (Some(Declared::Ova), None) => self.ova(path, depth).map(Some),
            (Some(_), _) => self.images(stem(id), path, &[PathBuf::from(id)], options).map(Some),
        }
    }

    fn folder(&self, path: &Path, depth: Depth, options: &OpenOptions) -> Result<Option<(Vm, Vec<Opened>)>, FormatError> {
        let names: Vec<String> = self.entries(path)?.into_iter().filter(|(_, is_dir)| !is_dir).map(|(name, _)| name).collect();
        if let Some(ovf) = names.iter().find(|name| declared(name) == Some(Declared::Ovf)) {
            if let Some(snapshot) = &options.snapshot {
                return Err(no_snapshot(ovf, snapshot));
            }
            return self.ovf(path, ovf, depth).map(Some);
        }
        let extents = self.extents(path, &names);
        let is_disk =
            |name: &&String| declared(name).is_some_and(|kind| !matches!(kind, Declared::Ova | Declared::Ovf)) && !extents.contains(*name);
        let disks: Vec<PathBuf> = names.iter().filter(is_disk).map(|name| path.join(name)).collect();
        if disks.is_empty() {
            // What an import of an OVA made: a folder with that one archive.
            let mut archives = names.iter().filter(|name| declared(name) == Some(Declared::Ova));
            return match (archives.next(), archives.next(), &options.snapshot) {
                (Some(ova), None, None) => self.ova(&path.join(ova), depth).map(Some),
                (Some(ova), None, Some(snapshot)) => Err(no_snapshot(ova, snapshot)),
                _ => Ok(None),
            };
        }
        if disks.len() > MAX_DISKS {
            return Err(FormatError::Unsupported(format!("{} disks in one folder; a VM has at most {MAX_DISKS}", disks.len())));
        }
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
        self.images(&name, path, &disks, options).map(Some)
    }

    fn images(&self, name: &str, path: &Path, files: &[PathBuf], options: &OpenOptions) -> Result<(Vm, Vec<Opened>), FormatError> {
        let images = files.iter().map(|file| Ok((file, self.image(file, options)?))).collect::<Result<Vec<_>, FormatError>>()?;
        let tops = tops(images)?;
        let mut vm = plain_vm(name, path);
        let mut opened = Vec::new();
        for (n, (file, image)) in tops.into_iter().enumerate() {
            vm.snapshots = vm.snapshots.max(image.snapshots);
            vm.disks.push(describe(n, &file.display().to_string(), image.disk.as_ref()));
            opened.push(Opened { name: format!("disk-{n}"), snapshot: None, disk: image.disk, identity: image.identity });
        }
        Ok((vm, opened))
    }

    fn ova(&self, path: &Path, depth: Depth) -> Result<(Vm, Vec<Opened>), FormatError> {
        let (window, identity) = self.window(path)?;
        let archive = ova::open(&window)?;
        self.described(archive, path, &identity, depth)
    }

    fn ovf(&self, folder: &Path, name: &str, depth: Depth) -> Result<(Vm, Vec<Opened>), FormatError> {
        let identities = std::sync::Mutex::new(Vec::new());
        let opener = |file: &str| {
            let (window, identity) = self.window(&folder.join(file)).map_err(beneath)?;
            identities.lock().unwrap_or_else(|e| e.into_inner()).push(identity);
            Ok(window)
        };
        let (text, own) = self.window(&folder.join(name))?;
        let package = ova::open_folder(name, &text, &opener)?;
        let identity = format!("{own}+{}", identities.into_inner().unwrap_or_default().join("+"));
        self.described(package, folder, &identity, depth)
    }

    fn described(&self, package: ova::Ova, path: &Path, identity: &str, depth: Depth) -> Result<(Vm, Vec<Opened>), FormatError> {
        if depth == Depth::Digests {
            package.check_manifest(&mut |_| Ok(()))?;
        }
        let mut vm = package.vm;
        vm.id = path.display().to_string();
        vm.path = format!("/{}", path.display());
        vm.power_state = "poweredOff".to_owned();
        vm.tools_status = "unknown".to_owned();
        vm.disks.clear();
        let mut opened = Vec::new();
        for (n, member) in package.disks.into_iter().enumerate() {
            let disk: Arc<dyn Disk> = Arc::new(vmdk::open_single(member.window)?);
            if disk.capacity() != member.entry.capacity {
                let reason = format!(
                    "its OVF says that {} has {} bytes and the disk says {}",
                    member.entry.file,
                    member.entry.capacity,
                    disk.capacity()
                );
                return Err(FormatError::Refused { format: "ova", reason });
            }
            let described = describe(n, &format!("{}:{}", path.display(), member.entry.file), disk.as_ref());
            vm.disks.push(VmDisk { bus: member.entry.bus, ..described });
            let identity = format!("{identity}#{}", member.entry.file);
            opened.push(Opened { name: format!("disk-{n}"), snapshot: None, disk, identity });
        }
        Ok((vm, opened))
    }
}

/// Leaves out what is only a parent of another image. Two images over one parent are two states of one disk, and nobody said which is
/// meant.
fn tops(images: Vec<(&PathBuf, Image)>) -> Result<Vec<(&PathBuf, Image)>, FormatError> {
    let beneath: BTreeSet<PathBuf> = images.iter().flat_map(|(_, image)| image.parents.iter().cloned()).collect();
    let tops: Vec<(&PathBuf, Image)> = images.into_iter().filter(|(file, _)| !beneath.contains(*file)).collect();
    let mut owners: BTreeMap<&PathBuf, &PathBuf> = BTreeMap::new();
    for (file, image) in &tops {
        for parent in &image.parents {
            let Some(other) = owners.insert(parent, file) else { continue };
            let reason = format!(
                "{} and {} both lie over {}; give the one that is the VM's disk by its own name",
                other.display(),
                file.display(),
                parent.display()
            );
            return Err(FormatError::Refused { format: image.disk.format(), reason });
        }
    }
    Ok(tops)
}

/// The file system's own error stays what it is: a package without its `.mf` is a package, one without a disk is not.
fn beneath(error: FormatError) -> io::Error {
    match error {
        FormatError::Io(e) => e,
        e => io::Error::other(e),
    }
}

/// What a reader said, as the worker is told it.
fn refusal(vm_id: &str, error: FormatError) -> Error {
    match error {
        FormatError::Io(e) => {
            Error { code: Code::BadGateway, message: format!("{vm_id}: {e}"), retryable: e.kind() != io::ErrorKind::UnexpectedEof }
        }
        e => Error::fatal(Code::BadImage, e.to_string()),
    }
}

fn inode(file: &File) -> io::Result<(u64, u64)> {
    let metadata = file.metadata()?;
    Ok((metadata.dev(), metadata.ino()))
}

/// What makes this content the same content at a resume.
fn identity(file: &File) -> io::Result<String> {
    let m = file.metadata()?;
    Ok(format!("{}:{}:{}:{}.{}", m.dev(), m.ino(), m.len(), m.mtime(), m.mtime_nsec()))
}

/// Two snapshots of one file are two contents.
fn mark_snapshot(identity: &mut String, options: &OpenOptions) {
    if let Some(snapshot) = &options.snapshot {
        identity.push('@');
        identity.push_str(snapshot);
    }
}

fn no_snapshot(name: &str, snapshot: &str) -> FormatError {
    FormatError::Unsupported(format!("{name} has no snapshot {snapshot:?}: internal snapshots are read from qcow2 images only"))
}

fn plain_vm(name: &str, path: &Path) -> Vm {
    Vm {
        id: path.display().to_string(),
        name: name.to_owned(),
        path: format!("/{}", path.display()),
        os: "unknown".to_owned(),
        cpu: DEFAULT_CPU,
        memory_mb: DEFAULT_MEMORY_MB,
        firmware: "bios".to_owned(),
        power_state: "poweredOff".to_owned(),
        tools_status: "unknown".to_owned(),
        ..Vm::default()
    }
}

fn describe(n: usize, source: &str, disk: &dyn Disk) -> VmDisk {
    // A fully written raw or flat image is thick; what has holes or allocates on demand is thin.
    let thin = !matches!((disk.format(), disk.subformat()), ("vmdk", "monolithicFlat" | "twoGbMaxExtentFlat" | "vmfs"));
    VmDisk {
        name: format!("disk-{n}"),
        source: source.to_owned(),
        capacity: disk.capacity(),
        format: disk.format().to_owned(),
        thin_provisioned: thin,
        bus: String::new(),
    }
}

impl Source for Local {
    fn look(&self, vm_id: &str) -> Result<(Vm, Vec<Opened>), Error> {
        self.open_at(vm_id, Depth::Structure, &OpenOptions::default())
    }

    fn inventory(&self) -> Result<Vec<Vm>, Error> {
        let root = Path::new("");
        let entries = self.entries(root).map_err(|e| Error {
            code: Code::BadGateway,
            message: format!("the folder cannot be read: {e}"),
            retryable: true,
        })?;
        let names: Vec<String> = entries.iter().filter(|(_, is_dir)| !is_dir).map(|(name, _)| name.clone()).collect();
        let extents = self.extents(root, &names);
        let mut vms = Vec::new();
        for (name, is_dir) in entries.iter().filter(|(name, _)| !name.starts_with('.') && !extents.contains(name) && !is_unfinished(name)) {
            match self.vm(name, *is_dir, Depth::Structure, &OpenOptions::default()) {
                Ok(Some((vm, _))) => vms.push(vm),
                Ok(None) => {}
                // What cannot be read stays visible, with the reason: a VM that vanishes from a list is a support call.
                Err(e) => vms.push(Vm { problem: e.to_string(), ..plain_vm(if *is_dir { name } else { stem(name) }, Path::new(name)) }),
            }
        }
        Ok(vms)
    }

    fn open(&self, vm_id: &str) -> Result<(Vm, Vec<Opened>), Error> {
        self.open_with(vm_id, OpenOptions::default())
    }

    fn glance(&self, vm_id: &str) -> Result<(Vm, Vec<Opened>), Error> {
        self.open_at(vm_id, Depth::Structure, &OpenOptions::default())
    }

    fn manifest_beside(&self, vm: &Vm, disk: &VmDisk) -> io::Result<Option<Beside>> {
        beside::manifest(self, vm, disk)
    }

    fn open_snapshots(&self, vm_id: &str) -> Result<Vec<Opened>, Error> {
        snapshots::open(self, vm_id)
    }
}

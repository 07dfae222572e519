//! The provider `local`: a folder of disk images, OVAs and folders, each of them a VM.
//!
//! Owns: which file is a VM, and in which format it may be read. The format is the one that the name declares; what the content says is only
//! used to refuse (a guest that writes a qcow2 header into its raw disk must not be read as qcow2, design: hostile input).
//! Never: follows a name out of the folder (the vault's directory handles), writes.
//! A crash here costs nothing.
//!
//! | entry | VM |
//! |---|---|
//! | `web.raw`, `web.img`, `web.qcow2`, `web.vmdk` | `web`, one disk; VMDK extents go with their descriptor |
//! | `web.ova` | the name in its OVF |
//! | `web/` with a `.ovf` | the name in it |
//! | `web/` with images | `web`, its images sorted by name |

use std::collections::BTreeSet;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use shared::error::Code;
use shared::vault::{self, Dir};
use shared::vm::{Disk as VmDisk, Vm};

use super::{Error, Opened, Source};
use crate::formats::sniff::{self, Kind};
use crate::formats::{Disk, FormatError, Window, ova, qcow2, raw, vmdk};

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

/// How much of a package is checked when it is opened.
#[derive(Clone, Copy, PartialEq)]
enum Depth {
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
        "ova" => Some(Declared::Ova),
        "ovf" => Some(Declared::Ovf),
        _ => None,
    }
}

fn stem(name: &str) -> &str {
    name.rsplit_once('.').map_or(name, |(stem, _)| stem)
}

impl Local {
    /// Takes an opened folder over.
    pub fn new(dir: Dir) -> Self {
        Self { dir }
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
        let m = file.metadata()?;
        let identity = format!("{}:{}:{}:{}.{}", m.dev(), m.ino(), m.len(), m.mtime(), m.mtime_nsec());
        Ok((Window::whole(file)?, identity))
    }

    /// Opens one image file in the format that its name declares.
    fn image(&self, below: &Path) -> Result<(Arc<dyn Disk>, String), FormatError> {
        let name = below.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let (window, mut identity) = self.window(below)?;
        let found = sniff::sniff(&window)?;
        let disk: Arc<dyn Disk> = match declared(name) {
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
            Some(Declared::Qcow2) => Arc::new(qcow2::Reader::open(window)?),
            Some(Declared::Vmdk) => {
                let folder = below.parent().unwrap_or(Path::new("")).to_owned();
                let identities = std::sync::Mutex::new(Vec::new());
                let disk = vmdk::open(window, &|extent| {
                    let (window, identity) = self.window(&folder.join(extent)).map_err(io::Error::other)?;
                    identities.lock().unwrap_or_else(|e| e.into_inner()).push(identity);
                    Ok(window)
                })?;
                for extent in identities.into_inner().unwrap_or_default() {
                    identity.push('+');
                    identity.push_str(&extent);
                }
                Arc::new(disk)
            }
            _ => return Err(FormatError::Unsupported(format!("{name} is no disk image; named .raw, .img, .qcow2 or .vmdk it would be"))),
        };
        Ok((disk, identity))
    }

    /// Names that a VMDK descriptor among `names` uses as extents: they are part of that disk, not VMs of their own.
    fn extents(&self, folder: &Path, names: &[String]) -> BTreeSet<String> {
        let mut extents = BTreeSet::new();
        for name in names.iter().filter(|name| declared(name) == Some(Declared::Vmdk)) {
            let Ok((window, _)) = self.window(&folder.join(name)) else { continue };
            if !matches!(sniff::sniff(&window), Ok(Kind::VmdkDescriptor)) {
                continue;
            }
            // The reader asks for each extent by name; an answer is not needed to learn the names.
            let asked = std::sync::Mutex::new(Vec::new());
            let _ = vmdk::open(window, &|extent| {
                asked.lock().unwrap_or_else(|e| e.into_inner()).push(extent.to_owned());
                self.window(&folder.join(extent)).map(|(window, _)| window).map_err(io::Error::other)
            });
            extents.extend(asked.into_inner().unwrap_or_default());
        }
        extents
    }

    /// The VM at an entry, with its disks; `None` where the entry is no VM. `depth` says how much of a package is checked.
    fn vm(&self, id: &str, is_dir: bool, depth: Depth) -> Result<Option<(Vm, Vec<Opened>)>, FormatError> {
        let path = Path::new(id);
        if is_dir {
            return self.folder(path, depth);
        }
        match declared(id) {
            None | Some(Declared::Ovf) => Ok(None),
            Some(Declared::Ova) => self.ova(path, depth).map(Some),
            Some(_) => self.images(stem(id), path, &[PathBuf::from(id)]).map(Some),
        }
    }

    fn folder(&self, path: &Path, depth: Depth) -> Result<Option<(Vm, Vec<Opened>)>, FormatError> {
        let names: Vec<String> = self.entries(path)?.into_iter().filter(|(_, is_dir)| !is_dir).map(|(name, _)| name).collect();
        if let Some(ovf) = names.iter().find(|name| declared(name) == Some(Declared::Ovf)) {
            return self.ovf(path, ovf, depth).map(Some);
        }
        let extents = self.extents(path, &names);
        let is_disk =
            |name: &&String| declared(name).is_some_and(|kind| !matches!(kind, Declared::Ova | Declared::Ovf)) && !extents.contains(*name);
        let disks: Vec<PathBuf> = names.iter().filter(is_disk).map(|name| path.join(name)).collect();
        if disks.is_empty() {
            return Ok(None);
        }
        if disks.len() > MAX_DISKS {
            return Err(FormatError::Unsupported(format!("{} disks in one folder; a VM has at most {MAX_DISKS}", disks.len())));
        }
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
        self.images(&name, path, &disks).map(Some)
    }

    fn images(&self, name: &str, path: &Path, files: &[PathBuf]) -> Result<(Vm, Vec<Opened>), FormatError> {
        let mut vm = plain_vm(name, path);
        let mut opened = Vec::new();
        for (n, file) in files.iter().enumerate() {
            let (disk, identity) = self.image(file)?;
            vm.disks.push(describe(n, &file.display().to_string(), disk.as_ref()));
            opened.push(Opened { name: format!("disk-{n}"), disk, identity });
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
            let (window, identity) = self.window(&folder.join(file)).map_err(io::Error::other)?;
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
            vm.disks.push(describe(n, &format!("{}:{}", path.display(), member.entry.file), disk.as_ref()));
            opened.push(Opened { name: format!("disk-{n}"), disk, identity: format!("{identity}#{}", member.entry.file) });
        }
        Ok((vm, opened))
    }
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
    }
}

impl Source for Local {
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
        for (name, is_dir) in entries.iter().filter(|(name, _)| !name.starts_with('.') && !extents.contains(name)) {
            match self.vm(name, *is_dir, Depth::Structure) {
                Ok(Some((vm, _))) => vms.push(vm),
                Ok(None) => {}
                // What cannot be read stays visible, with the reason: a VM that vanishes from a list is a support call.
                Err(e) => vms.push(Vm { problem: e.to_string(), ..plain_vm(if *is_dir { name } else { stem(name) }, Path::new(name)) }),
            }
        }
        Ok(vms)
    }

    fn open(&self, vm_id: &str) -> Result<(Vm, Vec<Opened>), Error> {
        let gone = |e: io::Error| Error::fatal(Code::NotFound, format!("the VM {vm_id:?} is not in the folder any more: {e}"));
        let is_dir = self.dir.metadata(vm_id).map_err(gone)?.is_dir();
        match self.vm(vm_id, is_dir, Depth::Digests) {
            Ok(Some(opened)) => Ok(opened),
            Ok(None) => Err(Error::fatal(Code::NotFound, format!("{vm_id:?} holds no disk image"))),
            Err(FormatError::Io(e)) => {
                Err(Error { code: Code::BadGateway, message: format!("{vm_id}: {e}"), retryable: e.kind() != io::ErrorKind::UnexpectedEof })
            }
            Err(e) => Err(Error::fatal(Code::BadImage, e.to_string())),
        }
    }
}

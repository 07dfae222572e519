//! Restore points: what backups left, each in its job's folder, one over the other.
//!
//! ```text
//! exports/job-1/  web.qcow2 (all)       web.qcow2.manifest.json   restore-point.json
//! exports/job-2/  web.qcow2 (changes) ─► ../job-1/web.qcow2       …  over job-1, root of that disk
//! exports/job-3/  web.qcow2 (changes) ─► ../job-2/web.qcow2       …  over job-2
//! ```
//! Owns: the document `restore-point.json`, which point is a VM's newest, and how a point is opened: layer after layer as the signed
//! manifests say, never as an image's own header says.
//! Never: leaves the folder that the points lie in, follows a name that is no job's, deletes one. A crash here costs nothing: it only reads.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use shared::error::Code;
use shared::ids::JobId;
use shared::manifest::{Blocks, DiskEntry, Manifest, Over, Signed};
use shared::vault::{self, Dir, Vault};
use shared::vm::Vm;

use crate::formats::chain::{Chain, Link, MAX_PARENTS};
use crate::formats::{Disk, FormatError, Window, qcow2};
use crate::proof;
use crate::sources::{Error, Opened};

/// The document's name.
pub const FILE: &str = "restore-point.json";
/// Its version.
pub const VERSION: u32 = 1;
/// Layers over a complete point; the next one is complete in itself again.
pub const MOST_LAYERS: u32 = MAX_PARENTS as u32 - 2;
/// Largest document.
const LIMIT: u64 = 4 << 20;

/// How a point came to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Read whole, complete in itself.
    Full,
    /// What the source said has changed, over the point before.
    Incremental,
    /// Read whole, because the source could not say what has changed; only what differs, over the point before.
    Compared,
    /// Complete in itself, made of what has changed and of the point before.
    Synthetic,
}

/// One disk of a point.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PointDisk {
    /// `disk-0`.
    pub name: String,
    /// The source's own key, which is the same at the next point.
    pub key: String,
    /// The file in the point's folder.
    pub file: String,
    /// Bytes.
    pub capacity: u64,
    /// From when the source can say what has changed; none where it cannot.
    pub change_id: Option<String>,
}

/// What `restore-point.json` says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// [`VERSION`].
    pub version: u32,
    /// The job that made it, which is its folder's name.
    pub job: String,
    /// RFC 3339 in UTC: when the source was frozen.
    pub created_at: String,
    /// How it came to be.
    pub kind: Kind,
    /// Name of the connection.
    pub connection: String,
    /// The VM as it was.
    pub vm: Vm,
    /// The job of the point before, where this one lies over it.
    pub parent: Option<String>,
    /// Layers between this and the complete point beneath.
    pub layers: u32,
    /// Its disks in the VM's order.
    pub disks: Vec<PointDisk>,
}

impl Point {
    /// BLAKE3 over what the next point goes by, hex: it stands in the signed manifests.
    pub fn source_digest(&self) -> Option<String> {
        let told: Vec<_> = self.disks.iter().map(|disk| (&disk.name, &disk.key, &disk.file, disk.capacity, &disk.change_id)).collect();
        let whole = (&self.job, &self.created_at, &self.connection, &self.vm.id, self.vm.snapshots, &self.parent, self.layers, told);
        serde_json::to_vec(&whole).ok().map(|bytes| blake3::hash(&bytes).to_hex().to_string())
    }
}

/// A disk of a point, opened with all that lies beneath it.
pub struct Standing {
    /// The whole disk.
    pub disk: Arc<dyn Disk>,
    /// Its digests.
    pub blocks: Blocks,
    /// Root over them, hex.
    pub root: String,
}

/// The document in a point's folder; none where the folder is something else.
pub fn read(folder: &Dir) -> io::Result<Option<Point>> {
    let mut bytes = Vec::new();
    match vault::open_regular(folder, Path::new(FILE)) {
        Ok(file) => file.take(LIMIT).read_to_end(&mut bytes)?,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e),
    };
    let point: Point = serde_json::from_slice(&bytes).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, format!("{FILE}: {e}")))?;
    if point.version == VERSION {
        Ok(Some(point))
    } else {
        Err(io::Error::new(io::ErrorKind::InvalidData, format!("{FILE}: version {}", point.version)))
    }
}

/// All points in a folder; what cannot be read is none.
fn all(points: &Dir) -> io::Result<Vec<Point>> {
    let mut found = Vec::new();
    for entry in points.entries()? {
        let Ok(name) = entry?.file_name().into_string() else { continue };
        if name.parse::<JobId>().is_err() {
            continue;
        }
        match points.open_dir(&name).and_then(|folder| read(&folder)) {
            Ok(Some(point)) if point.job == name => found.push(point),
            Ok(_) => {}
            Err(e) => tracing::warn!(job = name, error = %e, "a restore point cannot be read"),
        }
    }
    Ok(found)
}

/// The newest point of a VM.
pub fn newest(points: &Dir, connection: &str, vm: &str) -> io::Result<Option<Point>> {
    let of_it = all(points)?.into_iter().filter(|point| point.connection == connection && point.vm.id == vm);
    Ok(of_it.max_by(|a, b| a.created_at.cmp(&b.created_at).then_with(|| a.layers.cmp(&b.layers))))
}

/// The jobs of points that lie directly over this one.
pub fn over(points: &Dir, job: &str) -> io::Result<Vec<String>> {
    Ok(all(points)?.into_iter().filter(|point| point.parent.as_deref() == Some(job)).map(|point| point.job).collect())
}

/// Points that a running job builds on.
#[derive(Default)]
pub struct Needed {
    /// Jobs that need a point, by point.
    by_point: Mutex<BTreeMap<String, BTreeSet<String>>>,
}

impl Needed {
    /// `job` builds on `point`.
    pub fn pin(&self, point: &str, job: &str) {
        let mut by_point = self.by_point.lock().unwrap_or_else(PoisonError::into_inner);
        by_point.entry(point.to_owned()).or_default().insert(job.to_owned());
    }

    /// `job` needs nothing any more.
    pub fn release(&self, job: &str) {
        let mut by_point = self.by_point.lock().unwrap_or_else(PoisonError::into_inner);
        by_point.retain(|_, jobs| {
            jobs.remove(job);
            !jobs.is_empty()
        });
    }

    /// Does `act` to a point, unless a job needs it: then its id. Nobody begins to need it meanwhile.
    pub fn unless_pinned<T>(&self, point: &str, act: impl FnOnce() -> T) -> Result<T, String> {
        let by_point = self.by_point.lock().unwrap_or_else(PoisonError::into_inner);
        match by_point.get(point).and_then(BTreeSet::first) {
            Some(job) => Err(job.clone()),
            None => Ok(act()),
        }
    }
}

/// Name of the folder of a warm migration's pass, which lies beside those of the others.
pub fn pass_name(number: u32) -> String {
    format!("{PASS}{number}")
}

/// How these names begin.
const PASS: &str = "pass-";

/// Whether a point may lie in a folder of this name: a job's, or a pass's.
fn is_folder(name: &str) -> bool {
    let is_pass = |rest: &str| (1..=4).contains(&rest.len()) && rest.bytes().all(|byte| byte.is_ascii_digit());
    name.parse::<JobId>().is_ok() || name.strip_prefix(PASS).is_some_and(is_pass)
}

/// A signed manifest of a point, and what it says of one file.
struct Told {
    folder: Dir,
    manifest: Manifest,
    signer: String,
    entry: DiskEntry,
}

/// The signed manifest of a file of a point; `signer`: whose it must be.
fn manifest(points: &Dir, job: &str, file: &str, signer: Option<&str>) -> Result<Told, Error> {
    let bad = |what: String| Error::fatal(Code::BadImage, format!("the restore point {job}: {what}"));
    if !is_folder(job) {
        return Err(bad("that is no job's name".to_owned()));
    }
    let folder = points.open_dir(job).map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => Error::fatal(Code::NotFound, format!("the restore point {job} is not there")),
        _ => bad(e.to_string()),
    })?;
    let found = proof::find_manifest(&folder, file).map_err(|e| bad(e.to_string()))?;
    let (bytes, name) = found.ok_or_else(|| bad(format!("{file} has no manifest")))?;
    let (manifest, signed) = Signed::open(&bytes, signer).map_err(|e| bad(format!("{name}: {e}")))?;
    let entry = manifest.disks.iter().find(|disk| disk.file == file && disk.member.is_none()).cloned();
    let entry = entry.ok_or_else(|| bad(format!("{name} does not name a disk in {file}")))?;
    // The document is not signed, the manifest is: what the one says of a disk must be the other's word.
    if let Some(point) = read(&folder).map_err(|e| bad(e.to_string()))? {
        let described = point.disks.iter().find(|disk| disk.file == file);
        if described.is_none_or(|disk| disk.name != entry.name || disk.capacity != entry.capacity)
            || point.source_digest() != manifest.source
        {
            return Err(bad(format!("{FILE} is not the one that {name} was signed with")));
        }
    }
    Ok(Told { folder, manifest, signer: signed.public_key, entry })
}

/// Opens a disk of a point and all that lies beneath it. `root` is the digest that it must have, `signer` whose manifests count.
pub fn open_disk(points: &Dir, job: &str, file: &str, root: Option<&str>, signer: Option<&str>) -> Result<Standing, Error> {
    let (mut chain, mut blocks, mut top) = (None::<Chain>, Blocks::default(), String::new());
    let (mut job, mut file, mut root) = (job.to_owned(), file.to_owned(), root.map(str::to_owned));
    loop {
        let refused = |e: FormatError| Error::fatal(Code::BadImage, format!("the restore point {job}: {file}: {e}"));
        let Told { folder, entry, .. } = manifest(points, &job, &file, signer)?;
        if root.as_ref().is_some_and(|root| *root != entry.root) {
            return Err(Error::fatal(Code::BadImage, format!("the restore point {job} is another one than what was laid over it knew")));
        }
        let opened = vault::open_regular(&folder, Path::new(&file)).and_then(Window::whole).map_err(|e| refused(e.into()))?;
        let room = chain.as_ref().map_or(crate::formats::chain::MAX_TABLE_BYTES, Chain::room);
        let layer = qcow2::Reader::open_layer(opened, None, room).map_err(refused)?;
        if layer.capacity() != entry.capacity {
            let found = layer.capacity();
            return Err(Error::fatal(
                Code::BadImage,
                format!("the restore point {job}: {file} has {found} bytes instead of {}", entry.capacity),
            ));
        }
        let link = Link { name: format!("{job}/{file}"), layer: Arc::new(layer) };
        match &mut chain {
            Some(chain) => chain.push(link).map_err(refused)?,
            None => {
                blocks = entry.blocks().map_err(|e| Error::fatal(Code::BadImage, format!("the restore point {job}: {e}")))?;
                top.clone_from(&entry.root);
                chain = Some(Chain::new(link).map_err(refused)?);
            }
        }
        let Some(Over { job: next, file: below, root: known }) = entry.over else { break };
        (job, file, root) = (next, below, Some(known));
    }
    let chain = chain.ok_or_else(|| Error::fatal(Code::Internal, "a chain has its top"))?;
    Ok(Standing { disk: chain.into_disk(), blocks, root: top })
}

/// What lies under a layer, for a check.
pub fn below(points: &Dir, over: &Over) -> Result<Arc<dyn Disk>, FormatError> {
    let opened = open_disk(points, &over.job, &over.file, Some(&over.root), None);
    opened.map(|standing| standing.disk).map_err(|e| FormatError::Unsupported(e.message))
}

/// Opens a point as the VM that it was.
pub fn open(points: &Dir, point: &Point) -> Result<(Vm, Vec<Opened>), Error> {
    let mut opened = Vec::with_capacity(point.disks.len());
    for disk in &point.disks {
        let standing = open_disk(points, &point.job, &disk.file, None, None)?;
        opened.push(Opened { name: disk.name.clone(), snapshot: None, disk: standing.disk, identity: standing.root });
    }
    let mut vm = point.vm.clone();
    vm.problem.clear();
    // What it is here is files that nobody runs.
    vm.power_state = "poweredOff".to_owned();
    Ok((vm, opened))
}

/// The manifests of a point as one, each signed as it should be, and the key of who signed the first.
pub fn manifests(points: &Dir, point: &Point) -> Result<(Manifest, String), Error> {
    let mut whole: Option<(Manifest, String)> = None;
    for disk in &point.disks {
        let Told { manifest, signer, .. } = manifest(points, &point.job, &disk.file, None)?;
        match &mut whole {
            Some((whole, _)) => {
                whole.disks.extend(manifest.disks);
                whole.files.extend(manifest.files);
            }
            None => whole = Some((manifest, signer)),
        }
    }
    whole.ok_or_else(|| Error::fatal(Code::BadImage, format!("the restore point {} has no disk", point.job)))
}

/// A point that somebody named by its folder.
pub struct Found {
    /// As `ROOT/…/JOBID`.
    pub named: String,
    /// The folder that it and those beneath it lie in.
    pub points: Dir,
    /// Its own folder's absolute path on this host.
    pub path: std::path::PathBuf,
    /// It.
    pub point: Point,
}

/// Finds a point by `ROOT/…/JOBID` or an absolute path below a root; none where that is something else.
pub fn find(vault: &Vault, path: &str) -> Result<Option<Found>, Error> {
    let place = vault.locate(path).map_err(|e| Error::fatal(Code::OutsideRoots, e.to_string()))?;
    let named = place.named();
    let (Some(name), parent) = (place.below.file_name().and_then(|name| name.to_str()), place.below.parent().unwrap_or(Path::new("")))
    else {
        return Ok(None);
    };
    if name.parse::<JobId>().is_err() {
        return Ok(None);
    }
    let root = place.root.dir();
    let opened = if parent.as_os_str().is_empty() { root.try_clone() } else { root.open_dir(parent) };
    let point = opened.and_then(|points| {
        let found = read(&points.open_dir(name)?)?;
        Ok(found.filter(|point| point.job == name).map(|point| (points, point)))
    });
    match point {
        Ok(Some((points, point))) => Ok(Some(Found { named, points, path: place.absolute(), point })),
        Ok(None) => Ok(None),
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory | io::ErrorKind::PermissionDenied) => Ok(None),
        Err(e) => Err(Error::fatal(Code::BadImage, format!("{named}: {e}"))),
    }
}

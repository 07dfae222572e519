//! A `backup` job: a restore point over the newest one of the same VM.
//!
//! ```text
//! newest point in the destination ─► what was it? ─► source, frozen: what changed since? ─► per disk:
//!     the source knows               its areas are read, over the point before           incremental
//!     it does not, or not any more   all is read, what differs is kept                   compared
//!     no point, another size, `full` all is read                                         full
//!     too many layers                the areas are read, the rest is taken from before   synthetic
//! ```
//! Owns: that choice, and what the point says of itself. Never: takes the source's word for less than it said: an identifier that was lost,
//! reset or went back makes a comparing pass. A crash here costs the attempt: the next one freezes the VM anew.

use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use proto::v1;
use serde_json::{Value, json};
use shared::error::Code;
use shared::manifest;
use shared::options::Options;
use shared::vault::{self, Dir};
use shared::vm::Vm;

use super::{End, Failure, source_of};
use crate::formats::Disk;
use crate::formats::over::{Allocated, Over};
use crate::held::Assignment;
use crate::pipeline::{Base, Outcome, SourceDisk};
use crate::points::{self, Kind, Point, PointDisk};
use crate::sources::{Areas, Consistency, Frozen, Moved, Since, Source};
use crate::{Agent, touched};

/// A restore point in the making.
pub(super) struct Backup {
    point: Point,
    /// What the source calls the states of this point: the next one begins there.
    pub(super) needed: BTreeSet<String>,
    /// What it called those of the point before, which nobody needs once this one is published.
    pub(super) obsolete: BTreeSet<String>,
    /// Files and root digests of the point before.
    roots: Option<Vec<(String, String)>>,
    /// By disk: how many bytes came from the source.
    moved: Vec<Moved>,
    /// What the source said that it gives.
    pub(super) consistency: Option<Consistency>,
    /// Bytes that the source said have changed; none where it did not say so of every disk.
    changed: Option<u64>,
}

/// What the disks of a job of this kind are: its VM, what to read, and the point that comes of it.
pub(super) type Opened = (Vm, Vec<SourceDisk>, Option<Backup>);

/// Freezes the VM and lays its disks over the newest point, where there is one that holds.
pub(super) fn open(agent: &Agent, held: &Assignment, assign: &v1::Assign, folder: &Dir, options: &Options) -> Result<Opened, End> {
    let log = |level: &str, text: String| agent.table.log(held, level, "preparing", text);
    let connection = assign.connection.clone().unwrap_or_default();
    let pen = touched::Pen::new(agent, held, &connection, &assign.vm_id, options).map_err(|e| Failure::io("the ledger", &e))?;
    // Before anything is looked at: what another job at this VM is about to publish or to undo decides all of it.
    pen.wait_for_vm().map_err(|e| Failure::io("waiting for the VM", &e))?;
    let before = if options.full == Some(true) { None } else { newest(agent, folder, &connection.name, &assign.vm_id, &log)? };
    if let Some(before) = &before {
        // Nobody removes what this one is going to lie over.
        agent.needed.pin(&before.point.job, &held.job);
    }
    let source = source_of(agent, assign)?;
    let (vm, disks, backup) = freeze(source.as_ref(), &connection.name, &assign.vm_id, &pen, before, &held.job, &log)?;
    Ok((vm, disks, Some(backup)))
}

/// Freezes the VM and lays its disks over an earlier point, for a new one in the folder `name` beside it.
pub(super) fn freeze(
    source: &dyn Source,
    connection: &str,
    vm_id: &str,
    pen: &touched::Pen<'_>,
    before: Option<Before>,
    name: &str,
    log: &dyn Fn(&str, String),
) -> Result<(Vm, Vec<SourceDisk>, Backup), Failure> {
    let had_snapshots = before.as_ref().is_some_and(|before| before.point.vm.snapshots > 0);
    let since: Vec<Since> = before.iter().flat_map(|before| before.disks.iter().map(|(disk, _)| since(disk, had_snapshots))).collect();
    let earlier: BTreeSet<String> = since.iter().filter_map(|since| since.change_id.clone()).collect();
    let (vm, frozen) = source.open_frozen(vm_id, &since, pen).map_err(Failure::from)?;
    let created_at = shared::clock::rfc3339(shared::clock::now());

    let layers = before.as_ref().map_or(0, |before| before.point.layers + 1);
    let whole = layers > points::MOST_LAYERS;
    let mut kinds = Vec::with_capacity(frozen.len());
    let (mut disks, mut described, mut moved, mut changed) = (Vec::new(), Vec::new(), Vec::new(), Some(0u64));
    for frozen in frozen {
        let under = before.as_ref().and_then(|before| before.disk(&frozen));
        // All of it is read anyway: then it is complete in itself.
        let under = under.filter(|_| !whole || matches!(frozen.areas, Areas::Changed(_)));
        described.push((frozen.opened.name.clone(), frozen.key.clone(), frozen.change_id.clone(), frozen.opened.disk.capacity()));
        moved.push(frozen.moved.clone());
        let (kind, sentence) = choice(under.is_some(), whole, &frozen.areas);
        log("info", format!("{}: {sentence}", frozen.opened.name));
        changed = match (&frozen.areas, kind) {
            (Areas::Changed(areas), Kind::Incremental | Kind::Synthetic) => {
                changed.map(|sum| sum + areas.iter().map(|a| a.len).sum::<u64>())
            }
            _ => None,
        };
        kinds.push(kind);
        let job = before.as_ref().map(|before| before.point.job.as_str()).unwrap_or_default();
        disks.push(lay(frozen, under, kind, job));
    }
    let kind = kinds.into_iter().reduce(worst).unwrap_or(Kind::Full);
    let is_layer = disks.iter().any(|disk| disk.base.as_ref().is_some_and(|base| base.over.is_some()));
    let file = |(name, key, change_id, capacity)| PointDisk { name, key, file: String::new(), capacity, change_id };
    let roots =
        before.as_ref().map(|before| before.disks.iter().map(|(disk, standing)| (disk.file.clone(), standing.root.clone())).collect());
    let point = Point {
        version: points::VERSION,
        job: name.to_owned(),
        created_at,
        kind,
        connection: connection.to_owned(),
        vm: vm.clone(),
        parent: before.map(|before| before.point.job).filter(|_| is_layer),
        layers: if is_layer { layers } else { 0 },
        disks: described.into_iter().map(file).collect(),
    };
    let needed: BTreeSet<String> = point.disks.iter().filter_map(|disk| disk.change_id.clone()).collect();
    let obsolete = earlier.difference(&needed).cloned().collect();
    Ok((vm, disks, Backup { point, needed, obsolete, roots, moved, consistency: pen.consistency(), changed }))
}

fn since(disk: &PointDisk, had_snapshots: bool) -> Since {
    Since { key: disk.key.clone(), capacity: disk.capacity, change_id: disk.change_id.clone(), had_snapshots }
}

/// An earlier point with its disks open.
pub(super) struct Before {
    point: Point,
    disks: Vec<(PointDisk, points::Standing)>,
}

impl Before {
    /// The point in the folder `name` of `points`, as `key` has signed it; none where there is none.
    pub(super) fn open(points: &Dir, name: &str, key: &str) -> Result<Option<Self>, Failure> {
        let read = points.open_dir(name).and_then(|folder| points::read(&folder));
        let Some(point) =
            read.or_else(|e| if e.kind() == io::ErrorKind::NotFound { Ok(None) } else { Err(e) }).map_err(|e| Failure::io(name, &e))?
        else {
            return Ok(None);
        };
        let mut disks = Vec::with_capacity(point.disks.len());
        for disk in &point.disks {
            disks.push((disk.clone(), points::open_disk(points, &point.job, &disk.file, None, Some(key))?));
        }
        Ok(Some(Self { point, disks }))
    }

    /// The VM as it was.
    pub(super) fn vm(&self) -> &Vm {
        &self.point.vm
    }

    /// Its disks: path from the folder that the points lie in, format, bytes.
    pub(super) fn files(&self) -> Vec<(String, String, u64)> {
        let file = |disk: &PointDisk| (format!("{}/{}", self.point.job, disk.file), "qcow2".to_owned(), disk.capacity);
        self.point.disks.iter().map(file).collect()
    }

    /// The disk as it was, where it is the same disk and has the same size.
    fn disk(&self, now: &Frozen) -> Option<&(PointDisk, points::Standing)> {
        self.disks.iter().find(|(disk, _)| disk.key == now.key && disk.capacity == now.opened.disk.capacity())
    }
}

/// The newest point of the VM; none, too, where it does not hold: then the next one begins anew.
fn newest(agent: &Agent, folder: &Dir, connection: &str, vm: &str, log: &dyn Fn(&str, String)) -> Result<Option<Before>, Failure> {
    let point = points::newest(folder, connection, vm).map_err(|e| Failure::io("the restore points", &e))?;
    let Some(point) = point else { return Ok(None) };
    let key = agent.signing.public_hex();
    let mut disks = Vec::with_capacity(point.disks.len());
    for disk in &point.disks {
        match points::open_disk(folder, &point.job, &disk.file, None, Some(&key)) {
            Ok(standing) => disks.push((disk.clone(), standing)),
            Err(e) => {
                log("warn", format!("{}: a full pass begins anew, because nothing is built on what does not hold", e.message));
                return Ok(None);
            }
        }
    }
    Ok(Some(Before { point, disks }))
}

fn mib(areas: &[crate::formats::Extent]) -> String {
    let bytes: u64 = areas.iter().map(|area| area.len).sum();
    format!("{:.1} MiB in {} areas", bytes as f64 / f64::from(1 << 20), areas.len())
}

/// How a disk's part of the point comes to be, in a word and in a sentence.
fn choice(has_before: bool, whole: bool, areas: &Areas) -> (Kind, String) {
    match (has_before, areas) {
        (true, Areas::Changed(areas)) if whole => {
            (Kind::Synthetic, format!("{} changed; with what was before it becomes complete in itself", mib(areas)))
        }
        (true, Areas::Changed(areas)) => (Kind::Incremental, format!("{} changed since the point before", mib(areas))),
        (true, Areas::Unknown(reason)) => (Kind::Compared, format!("all of it is read and compared with the point before: {reason}")),
        (true, Areas::Allocated(_)) => {
            (Kind::Compared, "all of it is read and compared with the point before: the source knows only what holds data".to_owned())
        }
        (false, Areas::Allocated(areas)) => (Kind::Full, format!("a full pass over what holds data: {}", mib(areas))),
        (false, Areas::Unknown(reason)) => (Kind::Full, format!("a full pass over all of it: {reason}")),
        (false, Areas::Changed(_)) => (Kind::Full, "a full pass over all of it".to_owned()),
    }
}

/// The word for a point of several disks.
fn worst(a: Kind, b: Kind) -> Kind {
    let weight = |kind| match kind {
        Kind::Incremental => 0,
        Kind::Synthetic => 1,
        Kind::Compared => 2,
        Kind::Full => 3,
    };
    if weight(a) < weight(b) { b } else { a }
}

fn lay(frozen: Frozen, under: Option<&(PointDisk, points::Standing)>, kind: Kind, job: &str) -> SourceDisk {
    let Frozen { opened, areas, change_id, .. } = frozen;
    let crate::sources::Opened { name, snapshot, disk, identity } = opened;
    let Some((point, standing)) = under else {
        let disk: Arc<dyn Disk> = match areas {
            Areas::Allocated(areas) => Arc::new(Allocated::new(disk, areas)),
            _ => disk,
        };
        return SourceDisk { name, snapshot, identity, disk, base: None };
    };
    let changed = match areas {
        Areas::Changed(areas) => Some(areas),
        // What holds no data now may have held some: all is compared, and what was never allocated reads as zeros.
        Areas::Allocated(_) | Areas::Unknown(_) => None,
    };
    let blocks = Arc::new(standing.blocks.clone());
    let is_whole = kind == Kind::Synthetic;
    let over = (!is_whole).then(|| manifest::Over { job: job.to_owned(), file: point.file.clone(), root: standing.root.clone() });
    let identity = format!("{identity}>{}>{}", standing.root, change_id.unwrap_or_default());
    let disk = Arc::new(Over::new(disk, standing.disk.clone(), blocks.clone(), changed, is_whole));
    SourceDisk { name, snapshot, identity, disk, base: Some(Base { disk: standing.disk.clone(), blocks, over }) }
}

impl Backup {
    /// Writes the document into the part folder; durable when it returns. Answers its digest for the manifests.
    pub(super) fn write(&self, part: &Dir, outcome: &Outcome) -> io::Result<Option<String>> {
        let mut point = self.point.clone();
        for (disk, made) in point.disks.iter_mut().zip(&outcome.disks) {
            disk.file.clone_from(&made.file);
        }
        let digest = point.source_digest();
        let json = serde_json::to_vec_pretty(&point).map_err(io::Error::other)?;
        vault::write_whole(part, points::FILE, &json)?;
        vault::sync_dir(part)?;
        Ok(digest)
    }

    /// How it came to be, how many bytes had changed as the source said, and how many came from it.
    pub(super) fn facts(&self) -> (Kind, Option<u64>, u64) {
        (self.point.kind, self.changed, self.moved.iter().map(|moved| moved.load(Ordering::Relaxed)).sum())
    }

    /// Whether what this point lies over is still what it was.
    pub(super) fn check_parent(&self, folder: &Dir) -> Result<(), Failure> {
        let (Some(parent), Some(roots)) = (&self.point.parent, &self.roots) else { return Ok(()) };
        for (file, root) in roots {
            if let Err(e) = points::open_disk(folder, parent, file, Some(root), None) {
                let message = format!("what this restore point lies over is not there any more: {}", e.message);
                return Err(Failure::new(Code::Conflict, message, true));
            }
        }
        Ok(())
    }

    /// The result with what the point is.
    pub(super) fn describe(&self, result: &str, published: &Path) -> String {
        let mut result: Value = serde_json::from_str(result).unwrap_or_default();
        let moved: u64 = self.moved.iter().map(|moved| moved.load(Ordering::Relaxed)).sum();
        let Point { created_at, kind, parent, layers, vm, .. } = &self.point;
        result["restore_point"] = json!({
            "vm_id": vm.id, "vm_path": vm.path,
            "created_at": created_at, "kind": kind, "parent": parent, "layers": layers, "path": published.display().to_string(),
            "bytes_changed": self.changed, "bytes_moved": moved,
        });
        result.to_string()
    }
}

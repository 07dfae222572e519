//! Volumes: disks that are copied into a libvirt pool, so that a VM's disks lie where its hypervisor keeps them.
//!
//! ```text
//! noted ─► copied and read back, in a hidden folder of the pool ─► noted by inode and birth ─► named ─► (the VM is made) ─► forgotten
//!   └────────── anything fails, or a crash: what is noted goes ───────────┴─ unless the VM stands
//! ```
//! A copy is whole: what lay over other files lies over none any more.
//! Owns: that order, what a pool must be. Never: replaces a volume, removes one whose VM stands or that is not the file that was noted (device, inode, birth); reaches a
//! pool that does not lie in a writable root of the agent. A crash here leaves files that the ledger names.
//! Source: libvirt, Storage pool and volume XML format (formatstorage).

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::UNIX_EPOCH;

use cap_std::fs::{Metadata, MetadataExt as _};
use proto::v1;
use serde::{Deserialize, Serialize};
use shared::error::Code;
use shared::vault::{self, Dir};
use shared::vm::Vm;

use super::{refused, told};
use crate::Agent;
use crate::formats::Disk;
use crate::journal::Journal;
use crate::pipeline::{self, PartDir, Snapshot, SourceDisk, Stage, Stop, Tuning, Watch};
use crate::sources::Error;
use crate::sources::libvirt::virsh::Uri;
use crate::touched::{self, Hold, Touched};

/// The journal of a copy, in its folder. Nothing goes on from it.
const JOURNAL: &str = "journal";
/// Disks whose names are looked for before anything is copied; others are found when they are about to be.
const MOST_DISKS: usize = 16;

/// Volumes of a VM that is not made yet.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volumes {
    /// The pool's name.
    pub pool: String,
    /// Its folder, as `ROOT/…`.
    pub folder: String,
    /// The hidden folder in it.
    pub part: String,
    /// Files that have or will have their names in the pool.
    pub files: Vec<File>,
}

/// A file by what tells it from another of its name, now and later.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct File {
    /// Its name in the pool.
    pub name: String,
    /// Device and inode, which the next file may get.
    pub inode: (u64, u64),
    /// Nanoseconds since 1970 at its birth, where the file system knows.
    pub born: Option<u64>,
}

impl File {
    fn of(name: &str, metadata: &Metadata) -> Self {
        let born = metadata.created().ok().and_then(|time| time.into_std().duration_since(UNIX_EPOCH).ok());
        let born = born.and_then(|since| u64::try_from(since.as_nanos()).ok());
        Self { name: name.to_owned(), inode: (metadata.dev(), metadata.ino()), born }
    }
}

/// Volumes that are there, as long as this is held; then they stay where their VM stands, and go where it does not.
pub struct Filled<'a> {
    /// Absolute path and format, in the disks' order.
    pub disks: Vec<(PathBuf, &'static str)>,
    _hold: Hold<'a>,
}

/// The name of the note about the volumes of a VM.
pub fn note(uuid: &str) -> String {
    format!("volumes-{uuid}")
}

/// What is to be copied.
pub struct Filling<'a> {
    /// The VM's name, which its volumes bear.
    pub vm: &'a str,
    /// The VM's UUID.
    pub uuid: &'a str,
    /// The disks in order.
    pub disks: Vec<Arc<dyn Disk>>,
    /// `qcow2` or `raw`.
    pub format: pipeline::Format,
}

/// The caller's ear and hand.
pub struct Ear<'a> {
    /// Hears how far it is.
    pub tell: &'a (dyn Fn(String) + Sync),
    /// Says that it is to stop.
    pub stop: &'a (dyn Fn() -> bool + Sync),
}

/// A pool that volumes can be copied into.
struct Pool {
    /// As `ROOT/…`.
    named: String,
    path: PathBuf,
    dir: Dir,
}

/// Whether the pool can take volumes of a VM of this name.
pub fn check(agent: &Agent, uri: &Uri, pool: &str, vm: &str) -> Result<(), Error> {
    let found = find(agent, uri, pool)?;
    let stem = crate::formats::ova::stem(vm);
    let tails = std::iter::once(String::new()).chain((0..=MOST_DISKS).map(|n| format!("-disk-{n}")));
    for name in tails.flat_map(|tail| ["qcow2", "raw"].map(|format| format!("{stem}{tail}.{format}"))) {
        if found.dir.try_exists(&name).map_err(lost)? {
            return Err(Error::fatal(Code::Conflict, format!("the pool `{pool}` has a volume {name} already")));
        }
    }
    Ok(())
}

fn lost(e: std::io::Error) -> Error {
    Error { code: Code::Internal, message: format!("the pool's folder: {e}"), retryable: true }
}

fn find(agent: &Agent, uri: &Uri, name: &str) -> Result<Pool, Error> {
    let listed = uri.ask(&["pool-list", "--all", "--name"]).map_err(told)?;
    let known: Vec<&str> = listed.lines().map(str::trim).filter(|name| !name.is_empty()).collect();
    if !known.contains(&name) {
        let all = known.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
        let all = if all.is_empty() { "there is none; virsh pool-define-as makes one".to_owned() } else { format!("there are: {all}") };
        return Err(refused(format!("there is no pool `{name}`; {all}")));
    }
    if !uri.ask(&["pool-list", "--name"]).map_err(told)?.lines().any(|active| active.trim() == name) {
        return Err(refused(format!("the pool `{name}` is not active: virsh pool-start {name}")));
    }
    let xml = uri.ask(&["pool-dumpxml", name]).map_err(told)?;
    let (kind, path) = described(&xml).ok_or_else(|| refused(format!("libvirt's description of the pool `{name}` cannot be read")))?;
    if !matches!(kind.as_str(), "dir" | "fs" | "netfs") {
        return Err(Error::fatal(
            Code::NotBuilt,
            format!("the pool `{name}` is of type {kind}; pools of type dir, fs and netfs are filled"),
        ));
    }
    let roots = || {
        let writable = agent.vault.roots().filter(|root| root.writable).map(|root| format!("{} ({})", root.name, root.path.display()));
        writable.collect::<Vec<_>>().join(", ")
    };
    // A pool may be called by a link to its folder.
    let real = vault::real_user_path(&path).unwrap_or(path);
    let place = real.to_str().and_then(|path| agent.vault.locate(path).ok()).filter(|place| place.root.writable);
    let place = place.ok_or_else(|| {
        refused(format!(
            "the pool `{name}` lies at {}, which is in none of the roots that this agent may write: {}",
            real.display(),
            roots()
        ))
    })?;
    let dir = agent.vault.open_output_dir(&place.named()).map_err(|e| refused(format!("the pool `{name}`: {e}")))?;
    Ok(Pool { named: place.named(), path: place.absolute(), dir })
}

/// A pool's type and folder.
fn described(xml: &str) -> Option<(String, PathBuf)> {
    let document = roxmltree::Document::parse(xml).ok()?;
    let kind = document.root_element().attribute("type")?.to_owned();
    let target = document.root_element().children().find(|node| node.has_tag_name("target"))?;
    let path = target.children().find(|node| node.has_tag_name("path"))?.text()?.trim().to_owned();
    Some((kind, path.into()))
}

/// Copies disks into a pool.
pub fn fill<'a>(
    agent: &'a Agent,
    uri: &Uri,
    connection: &v1::Connection,
    pool: &str,
    filling: &Filling<'_>,
    ear: &Ear<'_>,
) -> Result<Filled<'a>, Error> {
    let found = find(agent, uri, pool)?;
    let source = |(n, disk): (usize, &Arc<dyn Disk>)| SourceDisk {
        name: format!("disk-{n}"),
        snapshot: None,
        identity: String::new(),
        disk: disk.clone(),
        base: None,
    };
    let disks: Vec<SourceDisk> = filling.disks.iter().enumerate().map(source).collect();
    let names = pipeline::output_names(filling.vm, filling.format, &disks);
    let volumes =
        Volumes { pool: pool.to_owned(), folder: found.named.clone(), part: format!(".hypersdk-{}.part", filling.uuid), files: Vec::new() };
    let noted = |volumes: &Volumes| Touched {
        connection: (connection.name.clone(), connection.kind.clone(), connection.path.clone()),
        vm: filling.uuid.to_owned(),
        volumes: Some(volumes.clone()),
        noted_ms: shared::clock::now().timestamp_millis(),
        ..Touched::default()
    };
    // What an earlier attempt has left goes with that, before its names are in the way.
    let hold = touched::hold(agent, &note(filling.uuid), &noted(&volumes))?;
    for name in &names {
        if found.dir.try_exists(name).map_err(lost)? {
            return Err(Error::fatal(Code::Conflict, format!("the pool `{pool}` has a volume {name} already")));
        }
    }
    let formats = copy(&found, &volumes.part, filling, disks, ear)?;
    let part = found.dir.open_dir(&volumes.part).map_err(lost)?;
    let files = names.iter().map(|name| Ok(File::of(name, &part.metadata(name)?))).collect::<std::io::Result<Vec<_>>>().map_err(lost)?;
    hold.note(&noted(&Volumes { files, ..volumes.clone() }))?;
    for name in &names {
        vault::rename_without_replacing(&found.dir, &format!("{}/{name}", volumes.part), name).map_err(|e| match e.kind() {
            std::io::ErrorKind::AlreadyExists => {
                Error::fatal(Code::Conflict, format!("the pool `{pool}` has got a volume {name} meanwhile"))
            }
            _ => lost(e),
        })?;
    }
    vault::sync_dir(&found.dir).map_err(lost)?;
    // The domain goes by the files; what libvirt shows of the pool may be told later.
    if let Err(e) = uri.ask(&["pool-refresh", pool]) {
        tracing::warn!(pool, error = %e, "the pool has new volumes and could not be refreshed");
    }
    let disks = names.iter().map(|name| (found.path.join(name), formats)).collect();
    Ok(Filled { disks, _hold: hold })
}

/// Copies into the hidden folder, reads back. Answers the format.
fn copy(pool: &Pool, part: &str, filling: &Filling<'_>, disks: Vec<SourceDisk>, ear: &Ear<'_>) -> Result<&'static str, Error> {
    pool.dir.create_dir(part).map_err(lost)?;
    let folder = pool.dir.open_dir(part).map_err(lost)?;
    let job = pipeline::Job {
        id: part.to_owned(),
        vm: Vm { name: filling.vm.to_owned(), ..Vm::default() },
        disks,
        format: filling.format,
        compression: None,
        pass_on: true,
        sha256: false,
        verify: true,
        bandwidth: None,
        cid: 0,
        created: 0,
        tuning: Tuning { resumable: false, ..Tuning::default() },
    };
    let mut options = vault::file_options();
    options.read(true).write(true).create(true);
    let journal = folder.open_with(JOURNAL, &options).map_err(lost)?.into_std();
    let mut journal = Journal::open(journal, &job.identity()).map_err(lost)?;
    let watch = Listener { dir: &pool.dir, ear, lack: OnceLock::new(), tenths: std::sync::atomic::AtomicU64::new(0) };
    let done = pipeline::run(&job, &PartDir::new(folder.try_clone().map_err(lost)?), &mut journal, &watch);
    drop(journal);
    if let Some(lack) = watch.lack.get().and_then(Clone::clone) {
        return Err(Error::fatal(Code::NoSpace, lack));
    }
    done.map_err(|e| {
        let message = format!("the copy into the pool: {e}");
        match e {
            pipeline::Error::NoSpace(_) => Error::fatal(Code::NoSpace, message),
            pipeline::Error::Mismatch { .. } => Error::fatal(Code::VerificationFailed, message),
            pipeline::Error::Cancelled | pipeline::Error::Parked => Error { code: Code::Unavailable, message, retryable: true },
            _ => Error::fatal(Code::Internal, message),
        }
    })?;
    folder.remove_file(JOURNAL).map_err(lost)?;
    Ok(filling.format.name())
}

/// The pipeline's ear and hand.
struct Listener<'a> {
    dir: &'a Dir,
    ear: &'a Ear<'a>,
    lack: OnceLock<Option<String>>,
    tenths: std::sync::atomic::AtomicU64,
}

impl Watch for Listener<'_> {
    fn progress(&self, snapshot: &Snapshot) {
        use std::sync::atomic::Ordering;
        if snapshot.data_bytes == 0 || snapshot.stage == Stage::Preparing {
            return;
        }
        self.lack.get_or_init(|| {
            let (free, _) = vault::space(self.dir).ok()?;
            let left = snapshot.data_bytes.saturating_sub(snapshot.durable);
            let sentence = || format!("no space in the pool: {} MiB are needed and {} MiB are free", left.div_ceil(1 << 20), free >> 20);
            (left > free).then(sentence)
        });
        let tenths = (snapshot.durable.saturating_add(snapshot.verified)).saturating_mul(5) / snapshot.data_bytes;
        if tenths > self.tenths.fetch_max(tenths, Ordering::Relaxed) && (1..10).contains(&tenths) {
            (self.ear.tell)(format!("{}0 % of the copy into the pool are done", tenths));
        }
    }

    fn log(&self, _: tracing::Level, _: Stage, _: &str) {}

    fn stop(&self) -> Option<Stop> {
        let lacks = self.lack.get().is_some_and(Option::is_some);
        (lacks || (self.ear.stop)()).then_some(Stop::Cancel)
    }
}

/// Removes what is noted, but for the volumes of a VM that stands.
pub fn clear(agent: &Agent, noted: &Touched, volumes: &Volumes) -> Result<(), Error> {
    let (name, kind, path) = noted.connection.clone();
    let connection = v1::Connection { name, kind, path, account: None };
    let stands = super::stands(&connection, &noted.vm)?;
    if stands && touched::is_noted(agent, &format!("deploy-{}", noted.vm)) {
        let message = "its VM is half made".to_owned();
        return Err(Error { code: Code::Unavailable, message, retryable: true });
    }
    let uri = super::here(&connection)?;
    // The folder of a pool that is not mounted is another one, and empty.
    let lists = |arguments: &[&str]| {
        let said = uri.ask(arguments).map_err(|e| Error { retryable: true, ..told(e) })?;
        Ok::<_, Error>(said.lines().any(|line| line.trim() == volumes.pool))
    };
    if lists(&["pool-list", "--all", "--name"])? && !lists(&["pool-list", "--name"])? {
        return Err(Error { code: Code::Unavailable, message: format!("the pool `{}` is not active", volumes.pool), retryable: true });
    }
    let dir = match agent.vault.open_dir(&volumes.folder) {
        Ok(dir) => dir,
        Err(e) if e.code() == Code::NotFound => return Ok(()),
        Err(e) => return Err(Error { code: Code::Unavailable, message: e.to_string(), retryable: true }),
    };
    let gone = |e: std::io::Error| if e.kind() == std::io::ErrorKind::NotFound { Ok(()) } else { Err(lost(e)) };
    if !stands {
        for file in &volumes.files {
            match dir.symlink_metadata(&file.name) {
                Ok(found) if File::of(&file.name, &found) == *file => dir.remove_file(&file.name).or_else(gone)?,
                // Somebody else's, or not named yet.
                Ok(_) => {}
                Err(e) => gone(e)?,
            }
        }
    }
    dir.remove_dir_all(&volumes.part).or_else(gone)?;
    vault::sync_dir(&dir).map_err(lost)?;
    // What libvirt shows of the pool is what it saw last.
    let _ = uri.ask(&["pool-refresh", &volumes.pool]);
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_is_what_libvirt_says() {
        let xml = "<pool type='dir'>\n  <name>p</name>\n  <source>\n  </source>\n  <target>\n    <path>/a b/c</path>\n  </target>\n</pool>";
        assert_eq!(described(xml).unwrap(), ("dir".to_owned(), PathBuf::from("/a b/c")));
        assert_eq!(described("<pool type='dir'><target/></pool>"), None);
        assert_eq!(described("no xml"), None);
    }
}

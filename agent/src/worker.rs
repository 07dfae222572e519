//! One assignment from its first byte to its publication, on a thread of its own.
//!
//! ```text
//! Assign ─► open source ─► ledger ─► space ─► pipeline (copy, verify) ─► manifests, result ─► commit? ─granted─► journal ─► rename ─► fsync ─► journal ─► Finished
//! ```
//! Owns: the order above, the part folder `JOBID.part`, the meaning of each failure for the caller.
//! Never: talks to the controller (the held table does), publishes without a grant, deletes what was published.
//! A crash here costs one checkpoint: before the grant the journal resumes the copy; after it the kept result and the folder's name say
//! whether the rename happened, and only this agent is given the job again.

mod backup;
mod catalogue;
mod migrate;
mod off;
mod verify;
mod warm;
mod watcher;
mod wishes;

use std::io;
use std::sync::Arc;

use proto::v1;
use shared::error::Code;
use shared::options::{JobType, Options};
use shared::progress::Progress;
use shared::vault::{self, Dir};

use crate::formats::FormatError;
use crate::held::{Assignment, Grant, Stop};
use crate::journal::{Journal, Record};
use crate::ledger::{Entry, Ledger};
use crate::pipeline::{self, PartDir, SourceDisk};
use crate::sources::file::FileSource;
use crate::sources::local::Depth;
use crate::sources::{self, Consistency, Opened, Source};
use crate::{Agent, points, proof, pull, touched};

use self::migrate::Migration;
pub use self::migrate::RECEIPT;
use self::watcher::Watcher;
pub use self::wishes::{compression, declared_word, output_format};

/// Data bytes between two checkpoints. A crash costs what is open, what waits or is being sealed and what is in the pipeline's slots: all
/// together stay below the 64 MiB that are promised, however slow the disk syncs.
const CHECKPOINT: u64 = 8 << 20;

/// How an assignment ended without a result.
pub struct Failure {
    /// The stable word.
    pub code: Code,
    /// The sentence.
    pub message: String,
    /// Whether the same might work a moment later.
    retryable: bool,
    /// What there is to show all the same, JSON; else empty.
    result: String,
}

impl Failure {
    fn new(code: Code, message: impl Into<String>, retryable: bool) -> Self {
        Self { code, message: message.into(), retryable, result: String::new() }
    }

    fn fatal(code: Code, message: impl Into<String>) -> Self {
        Self::new(code, message, false)
    }

    fn io(what: &str, e: &io::Error) -> Self {
        match e.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::fatal(Code::NoSpace, format!("no space left: {what}")),
            _ => Self::new(Code::Internal, format!("{what}: {e}"), true),
        }
    }
}

impl From<sources::Error> for Failure {
    fn from(e: sources::Error) -> Self {
        Self::new(e.code, e.message, e.retryable)
    }
}

enum End {
    Completed(String),
    Stopped(Stop),
    Failed(Failure),
}

impl From<Failure> for End {
    fn from(failure: Failure) -> Self {
        End::Failed(failure)
    }
}

/// Runs an assignment to its end and reports it. `replaced` is an earlier assignment of the same job, whose thread must be gone first.
pub fn run(agent: &Agent, held: &Assignment, replaced: Option<Arc<Assignment>>, assign: &v1::Assign) {
    if let Some(earlier) = replaced {
        earlier.ask_to_stop(Stop::Park);
        earlier.wait_gone();
    }
    // An attempt that a crash ended may have left something at the source; this one makes its own.
    touched::undo(agent, &held.job);
    let end = match (work(agent, held, assign).unwrap_or_else(|end| end), held.stop()) {
        // Whoever was told to stop need not say what it was in the middle of.
        (End::Failed(_), Some(stop)) => End::Stopped(stop),
        (end, _) => end,
    };
    if matches!(&end, End::Stopped(Stop::Discard)) || matches!(&end, End::Failed(failure) if !failure.retryable) {
        touched::let_go(agent, &held.job);
    }
    give_back(agent, &held.job);
    use v1::finished::Outcome;
    let outcome = match end {
        End::Completed(result) => Outcome::Completed(result),
        End::Stopped(Stop::Park) => Outcome::Parked(true),
        End::Stopped(Stop::Discard) => {
            discard_logged(agent, &held.job);
            Outcome::Cancelled(true)
        }
        End::Failed(failure) => {
            agent.table.log(held, "error", "failed", failure.message.clone());
            // What failed for good is of no use to a retry, and its space may be what the next job lacks.
            if !failure.retryable && !Migration::is_kept(agent, assign) {
                discard_logged(agent, &held.job);
            }
            let Failure { code, message, retryable, result } = failure;
            Outcome::Failed(v1::Failure { code: code.word().to_owned(), message, retryable, result_json: result })
        }
    };
    agent.table.end(held, outcome);
}

/// What an attempt had to itself is others' again, however it ended.
fn give_back(agent: &Agent, job: &str) {
    touched::undo(agent, job);
    agent.freezing.give_back(job);
    agent.needed.release(job);
}

fn discard_logged(agent: &Agent, job: &str) {
    if let Err(e) = discard(agent, job) {
        tracing::error!(job, error = %e, "a part folder could not be removed; the ledger keeps it");
    }
}

/// Removes what an unpublished job left: part folder, journal, ledger entry. What was published stays.
pub fn discard(agent: &Agent, job: &str) -> io::Result<()> {
    touched::let_go(agent, job);
    pull::forget(agent, job)?;
    let Some(entry) = agent.ledger.read(job)? else { return Ok(()) };
    match agent.vault.open_output_dir(&entry.destination) {
        Ok(folder) => {
            remove_part(&folder, job)?;
            vault::sync_dir(&folder)?;
        }
        Err(e) => return Err(io::Error::other(e.to_string())),
    }
    agent.ledger.remove(job)
}

fn remove_part(folder: &Dir, job: &str) -> io::Result<()> {
    match folder.remove_dir_all(part_name(job)) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

fn part_name(job: &str) -> String {
    format!("{job}.part")
}

fn work(agent: &Agent, held: &Assignment, assign: &v1::Assign) -> Result<End, End> {
    let options: Options = serde_json::from_str(&assign.options_json)
        .map_err(|e| Failure::fatal(Code::BadRequest, format!("the assignment's options cannot be read: {e}")))?;
    let kind = JobType::from_word(&assign.r#type);
    if kind == Some(JobType::Verify) {
        return verify::work(agent, held, assign, &options);
    }
    let import = catalogue::Import::of(kind, held, assign)?;
    let migration = Migration::of(agent, held, kind, assign, &options)?;
    let format = output_format(&assign.format)?;
    let destination = match &import {
        Some(_) => crate::config::IMAGES.to_owned(),
        None => options.destination.clone().unwrap_or_else(|| "exports".to_owned()),
    };
    // Whose folder it is, as long as it grows, its name says; an import is published under the name that its VM will bear.
    let name = import.as_ref().map_or(held.job.as_str(), |import| import.name.as_str());
    let place = agent.vault.locate(&destination).map_err(|e| Failure::fatal(Code::OutsideRoots, e.to_string()))?;
    let (destination, published) = (place.named(), place.absolute().join(name));
    let folder = agent.vault.open_output_dir(&destination).map_err(|e| match e {
        vault::Error::Outside { .. } => Failure::fatal(Code::OutsideRoots, e.to_string()),
        vault::Error::Io { .. } => Failure::fatal(Code::Unprocessable, format!("the destination cannot be written: {e}")),
    })?;

    if let Some(result) = published_before(&agent.ledger, &folder, &held.job, import.as_ref())? {
        // What the earlier attempt did is what this one found, so that the last figures of the job are true ones.
        agent.table.progress(held, "publishing", counters_of(&result));
        agent.table.log(held, "info", "publishing", "the output was published before the connection or the process was lost".to_owned());
        let Some(migration) = &migration else {
            return commit(agent, held, || Ok(())).map(|()| End::Completed(result));
        };
        return migration.arrive_again(&folder, &published, &result);
    }

    agent.table.progress(held, "preparing", held.progress());
    let created = match agent.ledger.read(&held.job).map_err(|e| Failure::io("the ledger", &e))? {
        Some(entry) if entry.destination == destination => entry.created,
        Some(_) => return Err(Failure::fatal(Code::Conflict, "the job began with another destination").into()),
        None => u64::try_from(shared::clock::now().timestamp()).unwrap_or_default(),
    };
    let entry = Entry { job: held.job.clone(), epoch: held.epoch, destination, created };
    agent.ledger.write(&entry).map_err(|e| Failure::io("the ledger", &e))?;

    if let Some(migration) = &migration {
        // A VM that ran on has changed since: its copy is gone over once more.
        if let Some(result) = migration.sealed(&folder)?.filter(|_| !migration.is_warm())
            && !migration.is_outdated(&result)?
        {
            agent.table.progress(held, "verifying", counters_of(&result));
            agent.table.log(
                held,
                "info",
                "preparing",
                "the disks were copied and verified by an earlier attempt: it goes on from there".to_owned(),
            );
            return migration.arrive(&folder, &place.absolute(), &result, || publish(agent, held, &folder, None, name));
        }
        migration.check()?;
        if migration.is_warm() {
            // Nothing was published: whatever an earlier attempt was about to, the VM goes on.
            touched::let_go(agent, &held.job);
            touched::undo(agent, &held.job);
            return warm::run(migration, assign, &options, &folder, &place.absolute(), created);
        }
    }
    let is_off = options.power_off == Some(true) && shut_down(agent, held, assign, &options, migration.as_ref())?;
    let (mut vm, disks, backup, roots, consistency) = match kind {
        Some(JobType::Backup) => {
            let (vm, disks, backup) = backup::open(agent, held, assign, &folder, &options)?;
            let consistency = backup.as_ref().and_then(|backup| backup.consistency);
            (vm, disks, backup, Vec::new(), consistency)
        }
        _ => {
            let (vm, disks, roots, consistency) = open_source(agent, held, assign, &options)?;
            (vm, disks.into_iter().map(source_disk).collect(), None, roots, consistency)
        }
    };
    if let Some(import) = &import {
        vm.name.clone_from(&import.name);
    }
    let job = copy_job(held, &options, vm, disks, format, created);
    let outcome = copy(agent, held, &folder, &job)?;

    check_roots(&roots, &outcome)?;
    if assign.source.is_empty() {
        let identities: Vec<String> = job.disks.iter().map(|disk| disk.identity.clone()).collect();
        source_of(agent, assign)?.confirm(&assign.vm_id, &identities).map_err(Failure::from)?;
    }

    let part = folder.open_dir(part_name(&held.job)).map_err(|e| Failure::io("the part folder", &e))?;
    let source = match &backup {
        Some(backup) => backup.write(&part, &outcome).map_err(|e| Failure::io("the restore point", &e))?,
        None => None,
    };
    let manifests = proof::write_manifests(&part, &agent.signing, (&held.job, &job.vm.name), &outcome, source)
        .map_err(|e| Failure::io("the manifest", &e))?;
    let mut result = proof::result_json(&published, &manifests, &agent.signing, &outcome, consistency);
    if let Some(import) = &import {
        import.mark(&part).map_err(|e| Failure::io("the part folder", &e))?;
        result = import.describe(&result, &agent.config.images_connection);
    }
    if let Some(backup) = &backup {
        result = backup.describe(&result, &published);
    }
    if let Some(migration) = &migration {
        result = migration.seal(&result, &job.vm, &migrate::disks_of(&outcome), is_off)?;
    }
    vault::write_whole(agent.ledger.dir(), &result_name(&held.job), result.as_bytes()).map_err(|e| Failure::io("the result", &e))?;
    if let Some(migration) = &migration {
        if is_off {
            // The VM stays off until the new one stands, and nobody else's.
            touched::thaw(agent, &held.job, &std::collections::BTreeSet::new()).map_err(Failure::from)?;
        } else {
            give_back(agent, &held.job);
        }
        return migration.arrive(&folder, &place.absolute(), &result, || publish(agent, held, &folder, Some(&job), name));
    }

    commit(agent, held, || {
        let Some(backup) = &backup else { return publish(agent, held, &folder, Some(&job), name) };
        backup.check_parent(&folder)?;
        // Behind the grant nobody cancels it: a crash here is followed by the publication.
        let ledger = |e| Failure::io("the ledger", &e);
        let noted = touched::keep_tracking(agent, &held.job, &backup.needed, &backup.obsolete).map_err(ledger)?;
        let published = publish(agent, held, &folder, Some(&job), name);
        if let (Some(noted), Err(_)) = (&noted, &published) {
            touched::restore_note(agent, &held.job, noted).map_err(ledger)?;
        }
        published
    })?;
    if import.is_some() {
        agent.catalogue.notify_one();
    }
    agent.table.log(held, "info", "publishing", format!("published as {}", published.display()));
    Ok(End::Completed(result))
}

/// The copy that an assignment asks for.
fn copy_job(
    held: &Assignment,
    options: &Options,
    vm: shared::vm::Vm,
    disks: Vec<SourceDisk>,
    format: pipeline::Format,
    created: u64,
) -> pipeline::Job {
    pipeline::Job {
        id: held.job.clone(),
        vm,
        disks,
        format,
        compression: compression(format, options),
        // Who asks for a level wants that level.
        pass_on: options.level.is_none(),
        sha256: true,
        verify: options.verifies(),
        bandwidth: options.bandwidth_limit,
        cid: crc32fast::hash(held.job.as_bytes()),
        created,
        tuning: pipeline::Tuning { checkpoint_bytes: CHECKPOINT, ..pipeline::Tuning::default() },
    }
}

fn copy(agent: &Agent, held: &Assignment, folder: &Dir, job: &pipeline::Job) -> Result<pipeline::Outcome, End> {
    copy_into(agent, held, folder, &part_name(&held.job), job, None)
}

/// Copies into the folder `name`. `shown`: see [`Watcher::shown`].
fn copy_into(
    agent: &Agent,
    held: &Assignment,
    folder: &Dir,
    name: &str,
    job: &pipeline::Job,
    shown: Option<Progress>,
) -> Result<pipeline::Outcome, End> {
    folder.create_dir_all(name).map_err(|e| Failure::io("the part folder", &e))?;
    vault::sync_dir(folder).map_err(|e| Failure::io("the destination", &e))?;
    let part = PartDir::new(folder.open_dir(name).map_err(|e| Failure::io("the part folder", &e))?);
    let mut journal = open_journal(agent, held, job)?;
    // Without a journal that goes on, whatever lies there belongs to nothing and must not be published.
    if !journal.adopted() {
        part.clear().map_err(|e| Failure::io("the part folder", &e))?;
    }
    let watch = Watcher { agent, held, folder, job, shown, checked: std::sync::OnceLock::new() };
    let outcome = pipeline::run(job, &part, &mut journal, &watch);
    if let Some(message) = watch.checked.get().and_then(|lack| lack.clone()) {
        return Err(Failure::fatal(Code::NoSpace, message).into());
    }
    outcome.map_err(|e| match e {
        pipeline::Error::Cancelled | pipeline::Error::Parked => End::Stopped(held.stop().unwrap_or(Stop::Park)),
        other => End::Failed(failure(agent, folder, &other)),
    })
}

fn failure(agent: &Agent, folder: &Dir, error: &pipeline::Error) -> Failure {
    let message = error.to_string();
    match error {
        pipeline::Error::NoSpace(_) => {
            let free = vault::space(folder).map(|(free, _)| format!(" ({} MiB free there)", free >> 20)).unwrap_or_default();
            let roots: Vec<_> = agent.vault.roots().filter(|root| root.writable).map(|root| root.name.clone()).collect();
            Failure::fatal(Code::NoSpace, format!("no space left on {}: {message}{free}", roots.join(", ")))
        }
        pipeline::Error::Mismatch { .. } => Failure::fatal(Code::VerificationFailed, message),
        pipeline::Error::Source { source: FormatError::Io(e), .. } if e.kind() != io::ErrorKind::UnexpectedEof => {
            Failure::new(Code::BadGateway, message, true)
        }
        pipeline::Error::Source { .. } => Failure::fatal(Code::BadImage, message),
        pipeline::Error::Output(FormatError::Io(_)) | pipeline::Error::Journal(_) => Failure::new(Code::Internal, message, true),
        pipeline::Error::Output(_) => Failure::fatal(Code::Unprocessable, message),
        pipeline::Error::Cancelled | pipeline::Error::Parked => Failure::new(Code::Conflict, message, true),
    }
}

fn open_journal(agent: &Agent, held: &Assignment, job: &pipeline::Job) -> Result<Journal, Failure> {
    let mut options = shared::vault::file_options();
    options.read(true).write(true).create(true);
    let file = agent.ledger.dir().open_with(format!("{}.journal", held.job), &options).map_err(|e| Failure::io("the journal", &e))?;
    let journal = Journal::open(file.into_std(), &job.identity()).map_err(|e| Failure::io("the journal", &e))?;
    Ok(journal)
}

/// Asks for the grant and then publishes. A refusal means that the job is somebody else's or over: stop and keep quiet.
fn commit(agent: &Agent, held: &Assignment, publish: impl FnOnce() -> Result<(), Failure>) -> Result<(), End> {
    match agent.table.request_commit(held) {
        Grant::Yes => Ok(publish()?),
        Grant::No(reason) => {
            agent.table.log(held, "warn", "publishing", format!("the commit was refused: {reason}"));
            Err(End::Stopped(Stop::Park))
        }
        Grant::Stopped(stop) => Err(End::Stopped(stop)),
    }
}

/// Gives the part folder its name. Without a `job` what lies there was copied and sealed by an earlier attempt, and its journal is closed.
fn publish(agent: &Agent, held: &Assignment, folder: &Dir, job: Option<&pipeline::Job>, name: &str) -> Result<(), Failure> {
    agent.table.progress(held, "publishing", held.progress());
    let lost = |e: io::Error| Failure::io("publishing", &e);
    let mut journal = job.map(|job| open_journal(agent, held, job)).transpose()?;
    let mut note = |record: Record| journal.as_mut().map_or(Ok(()), |journal| journal.append(&record)).map_err(lost);
    note(Record::Granted { epoch: held.epoch })?;
    vault::rename_without_replacing(folder, &part_name(&held.job), name).map_err(|e| match e.kind() {
        io::ErrorKind::AlreadyExists => Failure::fatal(Code::Conflict, format!("{name} exists at the destination")),
        _ => lost(e),
    })?;
    vault::sync_dir(folder).map_err(lost)?;
    note(Record::Published)
}

fn result_name(job: &str) -> String {
    format!("{job}.result")
}

/// The kept result of a job whose folder has its final name: nobody else gives it that name, and an import's says whose it is.
fn published_before(ledger: &Ledger, folder: &Dir, job: &str, import: Option<&catalogue::Import>) -> Result<Option<String>, Failure> {
    let name = import.map_or(job, |import| import.name.as_str());
    if !folder.try_exists(name).map_err(|e| Failure::io("the destination", &e))? {
        return Ok(None);
    }
    if let Some(import) = import {
        import.check_owner(folder)?;
    }
    let result = vault::read_optional(ledger.dir(), &result_name(job)).map_err(|e| Failure::io("the result", &e))?;
    match result.and_then(|bytes| String::from_utf8(bytes).ok()) {
        Some(result) => Ok(Some(result)),
        None => Err(Failure::fatal(Code::Conflict, format!("{job} exists at the destination and was not made by this agent"))),
    }
}

/// What a kept result says was done, as an attempt shows it that found all of it.
fn counters_of(result: &str) -> Progress {
    let result: serde_json::Value = serde_json::from_str(result).unwrap_or_default();
    let number = |pointer: &str| result.pointer(pointer).and_then(serde_json::Value::as_u64).unwrap_or_default();
    let data = number("/counters/data_bytes");
    Progress { data, read: 0, durable: data, verified: number("/receipt/bytes_verified").min(data), resumed: data }
}

/// An opened disk, for the pipeline.
pub fn source_disk(opened: Opened) -> SourceDisk {
    let Opened { name, snapshot, disk, identity } = opened;
    SourceDisk { name, snapshot, identity, disk, base: None }
}

/// A VM, its disks, the root digests that these must have, where somebody has signed them, and what the source said that it gives.
type OpenedSource = (shared::vm::Vm, Vec<Opened>, Vec<String>, Option<Consistency>);

/// Shuts the VM of a job down that was asked to. Answers whether it is off for this job, and noted so.
fn shut_down(
    agent: &Agent,
    held: &Assignment,
    assign: &v1::Assign,
    options: &Options,
    migration: Option<&Migration<'_>>,
) -> Result<bool, End> {
    let connection = assign.connection.clone().unwrap_or_default();
    if !assign.source.is_empty() || connection.kind == "local" {
        return Ok(false);
    }
    let source = source_of(agent, assign)?;
    let pen = touched::Pen::new(agent, held, &connection, &assign.vm_id, options).map_err(|e| Failure::io("the ledger", &e))?;
    let halted = migration.map(|migration| migration.halted(false)).unwrap_or_default();
    let says = |text| agent.table.log(held, "info", "preparing", text);
    let subject = off::Subject { source: &source, vm_id: &assign.vm_id, pen: &pen };
    subject.shut_down(&halted, &says, &|| held.stop().map(End::Stopped))
}

/// What was read is what a restore point was signed as: what is read wrong and written so is no restore.
fn check_roots(roots: &[String], outcome: &pipeline::Outcome) -> Result<(), Failure> {
    for (disk, root) in outcome.disks.iter().zip(roots) {
        if hex::encode(disk.root) != *root {
            let message =
                format!("verification failed: {} is not what the restore point's manifest says; a verify job names the block", disk.name);
            return Err(Failure::fatal(Code::VerificationFailed, message));
        }
    }
    Ok(())
}

/// The disks to copy: those of a VM, or those in a file.
fn open_source(agent: &Agent, held: &Assignment, assign: &v1::Assign, options: &Options) -> Result<OpenedSource, End> {
    let with_snapshots = options.include_snapshots == Some(true);
    if assign.source.is_empty() {
        let source = source_of(agent, assign)?;
        let connection = assign.connection.clone().unwrap_or_default();
        let pen = touched::Pen::new(agent, held, &connection, &assign.vm_id, options).map_err(|e| Failure::io("the ledger", &e))?;
        let (vm, mut disks) = source.open_for(&assign.vm_id, &pen).map_err(Failure::from)?;
        if with_snapshots {
            disks.extend(source.open_snapshots(&assign.vm_id).map_err(Failure::from)?);
        }
        // What says nothing of itself does not run.
        let consistency = pen.consistency().unwrap_or(Consistency::Off);
        return Ok((vm, disks, Vec::new(), Some(consistency)));
    }
    if let Some(found) = point_of(agent, assign)? {
        let line = format!("{} is a restore point of {}: it is read with what lies beneath it", found.named, found.point.created_at);
        agent.table.log(held, "info", "preparing", line);
        let (vm, disks) = points::open(&found.points, &found.point).map_err(Failure::from)?;
        // Their identity is their root digest.
        let roots = disks.iter().map(|disk| disk.identity.clone()).collect();
        return Ok((vm, disks, roots, None));
    }
    let source = find_source(agent, held, assign)?;
    let (vm, mut disks) = source.open(Depth::Digests).map_err(Failure::from)?;
    if with_snapshots {
        disks.extend(source.open_snapshots().map_err(Failure::from)?);
    }
    Ok((vm, disks, Vec::new(), None))
}

/// The restore point that a job reads, where its source is one.
fn point_of(agent: &Agent, assign: &v1::Assign) -> Result<Option<points::Found>, Failure> {
    if crate::is_upload(&assign.source) { Ok(None) } else { Ok(points::find(&agent.vault, &assign.source)?) }
}

/// The file that a job reads: in a root of this host, or an upload, which is fetched from the controller first.
fn find_source(agent: &Agent, held: &Assignment, assign: &v1::Assign) -> Result<FileSource, End> {
    if !crate::is_upload(&assign.source) {
        return Ok(FileSource::find(&agent.vault, &assign.source).map_err(Failure::from)?);
    }
    agent.table.log(held, "info", "preparing", format!("{} is fetched from the controller", assign.source));
    match pull::pull(agent, &held.job, held.epoch, &assign.source, &|| held.stop().is_none()) {
        Ok(pulled) => {
            let line = format!("{} is here: {} bytes, SHA-256 {}", assign.source, pulled.size, pulled.sha256);
            agent.table.log(held, "info", "preparing", line);
            Ok(FileSource::fetched(pulled.dir, pulled.name, pulled.size, &assign.source))
        }
        Err(pull::Ended::Stopped) => Err(End::Stopped(held.stop().unwrap_or(Stop::Park))),
        // What came is kept, and is no attempt in vain.
        Err(pull::Ended::Away(message)) => {
            agent.table.log(held, "warn", "preparing", message);
            Err(End::Stopped(Stop::Park))
        }
        Err(pull::Ended::Failed(e)) => Err(held.stop().map_or_else(|| End::Failed(e.into()), End::Stopped)),
    }
}

fn source_of(agent: &Agent, assign: &v1::Assign) -> Result<Arc<dyn Source>, Failure> {
    let Some(connection) = &assign.connection else { return Err(Failure::fatal(Code::Internal, "the assignment names no connection")) };
    Ok(agent.source(connection)?)
}

/// Starts the assignment on a thread of its own.
pub fn start(agent: &Arc<Agent>, held: Arc<Assignment>, replaced: Option<Arc<Assignment>>, assign: v1::Assign) {
    let spawned = {
        let (agent, held) = (agent.clone(), held.clone());
        std::thread::Builder::new().name(format!("job {}", &held.job[..held.job.len().min(11)])).spawn(move || {
            // A panic is our defect and this job's failure, never the agent's end.
            let run = std::panic::AssertUnwindSafe(|| run(&agent, &held, replaced, &assign));
            if std::panic::catch_unwind(run).is_err() {
                give_back(&agent, &held.job);
                let message = "the agent's worker panicked; its log has the place".to_owned();
                let failure = v1::Failure { code: Code::Internal.word().to_owned(), message, retryable: true, result_json: String::new() };
                agent.table.end(&held, v1::finished::Outcome::Failed(failure));
            }
        })
    };
    if let Err(e) = spawned {
        let message = format!("no thread for the job: {e}");
        let failure = v1::Failure { code: Code::Unavailable.word().to_owned(), message, retryable: true, result_json: String::new() };
        agent.table.end(&held, v1::finished::Outcome::Failed(failure));
    }
}

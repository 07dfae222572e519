//! What a job touches at its source: snapshots and leases, written down before they are made, gone when the job's attempt has ended.
//!
//! ```text
//! note (durable) ─► make ─► … ─► attempt ends ─► undo ─gone─► forget          crash anywhere: the reaper undoes what is noted
//!                                                  └─never seen─► stays noted for a while: the call that makes it may be on its way
//! ```
//! Owns: `jobs/JOBID.touched`, the reaper, and that one job at a time freezes a VM. Never: forgets a thing before it is gone at the source, undoes what a running attempt needs.
//! A crash here costs nothing: what is noted stays noted.

mod calm;
mod freezing;
mod halted;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use proto::v1;
use serde::{Deserialize, Serialize};
use shared::options::Options;
use shared::vault;

use crate::Agent;
use crate::deploy::volumes::{self, Volumes};
use crate::sources::Consistency;

pub use self::calm::wake;
pub use self::freezing::{Freezing, frozen_name};
pub use self::halted::{Halted, halted, let_go, note_halted};

/// How long after its note a thing may still come into being: as long as a task at the source may take.
const LATE: Duration = Duration::from_secs(900);
/// How long an attempt's end tries to undo by itself, before it leaves the rest to the reaper.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long the end of a pass may take.
const THAW: Duration = Duration::from_secs(120);
/// Between two of these tries.
const PAUSE: Duration = Duration::from_millis(500);

/// A file that lies over a disk for a while.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Overlay {
    /// The disk's device, as its hypervisor calls it.
    pub target: String,
    /// The disk's file.
    pub base: String,
    /// The file over it.
    pub path: String,
}

/// What one attempt has touched of one VM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Touched {
    /// The connection's name, kind and path.
    pub connection: (String, String, String),
    /// The VM's id at the source.
    pub vm: String,
    /// Names of snapshots that were or will be made.
    pub snapshots: Vec<String>,
    /// Ids of leases.
    pub leases: Vec<String>,
    /// When a backup job was asked for that nobody has answered yet, milliseconds since 1970.
    pub asked_at: Option<i64>,
    /// UUIDs of domains that are being made.
    pub domains: Vec<String>,
    /// UUIDs of networks that are there for a while.
    pub networks: Vec<String>,
    /// Names of checkpoints that no restore point needs.
    pub checkpoints: Vec<String>,
    /// The tracking of changes was or will be switched on, and no restore point needs it yet.
    pub tracking: bool,
    /// The VM was or will be stopped for the job.
    pub halted: Option<Halted>,
    /// Files that what a VM writes goes into, until it is put back.
    pub overlays: Vec<Overlay>,
    /// When the guest was asked to freeze its file systems, which it has not thawed yet as far as is known, milliseconds since 1970.
    pub quiesced_at: Option<i64>,
    /// Disks of a VM that is being made, in a pool; then nothing else is noted with them.
    pub volumes: Option<Volumes>,
    /// When something was noted last, milliseconds since 1970.
    pub noted_ms: i64,
}

impl Touched {
    /// Whether something that was noted and never seen may still come.
    fn may_come(&self, now_ms: i64) -> bool {
        // A clock that was set back must not keep it for ever.
        let age = now_ms.saturating_sub(self.noted_ms);
        (0..i64::try_from(LATE.as_millis()).unwrap_or(i64::MAX)).contains(&age)
    }
}

/// Does something about a domain that is noted before and forgotten afterwards, where that leaves nothing behind; what it leaves the reaper
/// removes. `note` is the note's name.
pub fn while_noted<T>(
    agent: &Agent,
    note: &str,
    connection: &v1::Connection,
    domain: &str,
    act: impl FnOnce() -> Result<T, crate::sources::Error>,
) -> Result<Result<T, crate::sources::Error>, crate::sources::Error> {
    // As long as this turn lasts the reaper keeps away.
    let _turn = agent.undoing.wait(note);
    let connection = (connection.name.clone(), connection.kind.clone(), connection.path.clone());
    write(agent, note, &Touched { connection, vm: domain.to_owned(), domains: vec![domain.to_owned()], ..Touched::default() })
        .map_err(unwritable)?;
    let done = act();
    match &done {
        Ok(_) => agent.ledger.dir().remove_file(file(note)).and_then(|()| vault::sync_dir(agent.ledger.dir())).map_err(unwritable)?,
        Err(_) => {
            undo_noted(agent, note);
        }
    }
    Ok(done)
}

/// Does something with a domain and a network that are noted before and gone afterwards, whatever became of it; what cannot be undone now stays
/// noted, and the reaper comes back to it. `note` is the note's name: what an earlier act has noted under it is undone first.
pub fn for_a_while<T>(
    agent: &Agent,
    note: &str,
    connection: &v1::Connection,
    domain: &str,
    network: Option<&str>,
    act: impl FnOnce() -> T,
) -> Result<T, crate::sources::Error> {
    let touched = Touched {
        connection: (connection.name.clone(), connection.kind.clone(), connection.path.clone()),
        vm: domain.to_owned(),
        domains: vec![domain.to_owned()],
        networks: network.map(str::to_owned).into_iter().collect(),
        ..Touched::default()
    };
    let _hold = hold(agent, note, &touched)?;
    Ok(act())
}

/// A note that is undone when this goes.
pub struct Hold<'a> {
    agent: &'a Agent,
    note: String,
    // As long as this turn lasts the reaper keeps away.
    _turn: Turn<'a>,
}

/// Notes something until the answer is dropped, when it is undone. What an earlier act has noted under this name is undone first.
pub fn hold<'a>(agent: &'a Agent, note: &str, touched: &Touched) -> Result<Hold<'a>, crate::sources::Error> {
    let turn = agent.undoing.wait(note);
    undo_patiently(agent, note);
    if is_noted(agent, note) {
        let message = format!("what an earlier attempt has left at {} is not gone yet", touched.connection.0);
        return Err(crate::sources::Error { code: shared::error::Code::Unavailable, message, retryable: true });
    }
    let hold = Hold { agent, note: note.to_owned(), _turn: turn };
    hold.note(touched)?;
    Ok(hold)
}

impl Hold<'_> {
    /// Notes this in place of what was noted.
    pub fn note(&self, touched: &Touched) -> Result<(), crate::sources::Error> {
        write(self.agent, &self.note, touched).map_err(unwritable)
    }
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        undo_patiently(self.agent, &self.note);
    }
}

/// Whether something is noted under this name, or may be.
pub fn is_noted(agent: &Agent, note: &str) -> bool {
    !matches!(noted(agent, note), Ok(None))
}

/// The pen of one attempt.
pub struct Pen<'a> {
    agent: &'a Agent,
    held: &'a crate::held::Assignment,
    connection: (String, String, String),
    vm: String,
    writing: Mutex<()>,
    /// Whether the guest is to be quiesced.
    quiesces: bool,
    /// What the source said that it reads.
    read: Mutex<Option<Consistency>>,
}

impl<'a> Pen<'a> {
    /// For an attempt at a VM of a connection. What an earlier one has left and could not be undone yet stays noted.
    ///
    /// # Errors
    /// When what is noted cannot be read.
    pub fn new(
        agent: &'a Agent,
        held: &'a crate::held::Assignment,
        connection: &v1::Connection,
        vm: &str,
        options: &Options,
    ) -> io::Result<Self> {
        let quiesces = options.quiesce == Some(true);
        let connection = (connection.name.clone(), connection.kind.clone(), connection.path.clone());
        // Not to be found out when something was made already.
        noted(agent, &held.job)?;
        Ok(Self { agent, held, connection, vm: vm.to_owned(), writing: Mutex::default(), quiesces, read: Mutex::default() })
    }

    /// What the source said that it reads; none as long as it said nothing.
    pub fn consistency(&self) -> Option<Consistency> {
        *self.read.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the VM was stopped for the job, as it is noted.
    pub fn is_halting(&self) -> io::Result<bool> {
        Ok(noted(self.agent, &self.held.job)?.is_some_and(|noted| noted.halted.is_some()))
    }

    /// The VM is about to be stopped for the job, or is stopped. Durable when it returns.
    pub fn halting(&self, halted: Halted) -> io::Result<()> {
        self.note(|touched| touched.halted = Some(halted))
    }

    /// Waits until no other job has the VM frozen, or is about to: a removal of a snapshot must not meet the making of the next, nor a
    /// restore point begin over one that another is about to be laid over.
    pub fn wait_for_vm(&self) -> io::Result<()> {
        self.agent.freezing.take(&frozen_name(&self.connection.0, &self.vm), self.held)
    }

    /// Adds to what is noted: an earlier attempt's things that could not be undone are among it.
    fn note(&self, change: impl FnOnce(&mut Touched)) -> io::Result<()> {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut touched = noted(self.agent, &self.held.job)?.unwrap_or_default();
        touched.connection.clone_from(&self.connection);
        touched.vm.clone_from(&self.vm);
        touched.noted_ms = shared::clock::now().timestamp_millis();
        change(&mut touched);
        write(self.agent, &self.held.job, &touched)
    }
}

impl crate::sources::Touch for Pen<'_> {
    fn job(&self) -> &str {
        &self.held.job
    }

    fn take_vm(&self) -> io::Result<()> {
        self.wait_for_vm()
    }

    fn asking(&self, is_open: bool) -> io::Result<()> {
        let now = is_open.then(|| shared::clock::now().timestamp_millis());
        self.note(|touched| touched.asked_at = now)
    }

    fn snapshot(&self, name: &str) -> io::Result<()> {
        self.wait_for_vm()?;
        self.note(|touched| touched.snapshots.push(name.to_owned()))
    }

    fn lease(&self, id: &str) -> io::Result<()> {
        self.note(|touched| touched.leases.push(id.to_owned()))
    }

    fn checkpoint(&self, name: &str) -> io::Result<()> {
        self.note(|touched| touched.checkpoints.push(name.to_owned()))
    }

    fn overlays(&self, overlays: &[Overlay]) -> io::Result<()> {
        self.note(|touched| touched.overlays.extend_from_slice(overlays))
    }

    fn tracking(&self) -> io::Result<()> {
        self.note(|touched| touched.tracking = true)
    }

    fn quiesces(&self) -> bool {
        self.quiesces
    }

    fn quiescing(&self, is_open: bool) -> io::Result<()> {
        let now = is_open.then(|| shared::clock::now().timestamp_millis());
        self.note(|touched| touched.quiesced_at = now)
    }

    fn is_halted_calm(&self) -> io::Result<bool> {
        Ok(noted(self.agent, &self.held.job)?.is_some_and(|noted| noted.halted.is_some() && noted.quiesced_at.is_some()))
    }

    fn reads(&self, consistency: Consistency) {
        *self.read.lock().unwrap_or_else(PoisonError::into_inner) = Some(consistency);
    }

    fn stopping(&self) -> crate::sources::Stopping {
        self.held.stopping()
    }

    fn log(&self, text: String) {
        self.agent.table.log(self.held, "info", "preparing", text);
    }
}

fn unwritable(e: io::Error) -> crate::sources::Error {
    crate::sources::Error::fatal(shared::error::Code::Internal, format!("the ledger cannot be written: {e}"))
}

fn file(job: &str) -> String {
    format!("{job}.touched")
}

fn write(agent: &Agent, job: &str, touched: &Touched) -> io::Result<()> {
    let json = serde_json::to_vec(touched).map_err(io::Error::other)?;
    vault::write_whole(agent.ledger.dir(), &file(job), &json)
}

fn noted(agent: &Agent, job: &str) -> io::Result<Option<Touched>> {
    let bytes = vault::read_optional(agent.ledger.dir(), &file(job))?;
    bytes.map(|bytes| serde_json::from_slice(&bytes).map_err(io::Error::other)).transpose()
}

/// Jobs whose notes somebody works on. The reaper and a job's own worker must not: the one would forget what the other has just noted.
#[derive(Default)]
pub struct Undoing {
    jobs: Mutex<BTreeSet<String>>,
    done: Condvar,
    /// What was said of a job's notes last: a host that is away for a night is one line.
    said: Mutex<BTreeMap<String, String>>,
}

impl Undoing {
    fn jobs(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until nobody else works on the job's notes.
    fn wait(&self, job: &str) -> Turn<'_> {
        let mut jobs = self.jobs();
        while !jobs.insert(job.to_owned()) {
            jobs = self.done.wait(jobs).unwrap_or_else(PoisonError::into_inner);
        }
        Turn { undoing: self, job: job.to_owned() }
    }

    /// Whether this is news of the job's notes; nothing: they are gone.
    fn is_news(&self, job: &str, what: Option<&str>) -> bool {
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        match what {
            Some(what) => said.insert(job.to_owned(), what.to_owned()).is_none_or(|before| before != what),
            None => said.remove(job).is_some(),
        }
    }

    /// None where somebody works on the job's notes, or where `is_wanted` says, before anybody else can begin, that they are not to be touched.
    fn take(&self, job: &str, is_wanted: impl FnOnce() -> bool) -> Option<Turn<'_>> {
        let mut jobs = self.jobs();
        (is_wanted() && jobs.insert(job.to_owned())).then(|| Turn { undoing: self, job: job.to_owned() })
    }
}

struct Turn<'a> {
    undoing: &'a Undoing,
    job: String,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.undoing.jobs().remove(&self.job);
        self.undoing.done.notify_all();
    }
}

/// A restore point is about to be published and relies on what was switched on and on the checkpoints that are `needed`: these stay. Those of
/// the point before are `obsolete` now. Answers what was noted before, for [`restore_note`].
pub fn keep_tracking(agent: &Agent, job: &str, needed: &BTreeSet<String>, obsolete: &BTreeSet<String>) -> io::Result<Option<Touched>> {
    let _turn = agent.undoing.wait(job);
    let Some(noted) = noted(agent, job)? else { return Ok(None) };
    // A checkpoint's name is the first word of what a restore point calls its state.
    let name = |id: &String| id.split(' ').next().map(str::to_owned).unwrap_or_default();
    let needed: BTreeSet<String> = needed.iter().map(name).collect();
    let checkpoints = noted.checkpoints.iter().chain(obsolete).filter(|id| !needed.contains(&name(id))).cloned().collect();
    write(agent, job, &Touched { tracking: false, checkpoints, ..noted.clone() })?;
    Ok(Some(noted))
}

/// The publication failed: what was noted before is noted again.
pub fn restore_note(agent: &Agent, job: &str, noted: &Touched) -> io::Result<()> {
    let _turn = agent.undoing.wait(job);
    write(agent, job, noted)
}

/// A pass is over: what froze the VM goes, and the checkpoints that are `obsolete`; what the next pass begins from stays, noted.
pub fn thaw(agent: &Agent, job: &str, obsolete: &BTreeSet<String>) -> Result<(), crate::sources::Error> {
    let _turn = agent.undoing.wait(job);
    let Some(noted) = noted(agent, job).map_err(unwritable)? else { return Ok(()) };
    let name = |id: &str| id.split(' ').next().map(str::to_owned).unwrap_or_default();
    let old: BTreeSet<String> = obsolete.iter().map(|id| name(id)).collect();
    let (gone, stay): (Vec<String>, Vec<String>) = noted.checkpoints.iter().cloned().partition(|id| old.contains(&name(id)));
    let (connection, kind, path) = noted.connection.clone();
    let source = agent.source(&v1::Connection { name: connection, kind, path, account: None })?;
    let frozen = Touched {
        connection: noted.connection.clone(),
        vm: noted.vm.clone(),
        snapshots: noted.snapshots.clone(),
        leases: noted.leases.clone(),
        asked_at: noted.asked_at,
        overlays: noted.overlays.clone(),
        checkpoints: gone,
        noted_ms: noted.noted_ms,
        ..Touched::default()
    };
    let end = Instant::now() + THAW;
    while let Err(e) = source.undo(&frozen) {
        if !e.retryable || Instant::now() > end {
            return Err(e);
        }
        std::thread::sleep(PAUSE);
    }
    let rest = Touched { snapshots: Vec::new(), leases: Vec::new(), overlays: Vec::new(), asked_at: None, checkpoints: stay, ..noted };
    write(agent, job, &rest).map_err(unwritable)
}

/// The job whose notes say that something lies over a VM's disks which is to be put back.
pub fn has_overlays(agent: &Agent, connection: &str, vm: &str) -> io::Result<Option<String>> {
    for entry in agent.ledger.dir().entries()? {
        let Ok(file) = entry?.file_name().into_string() else { continue };
        let Some(job) = file.strip_suffix(".touched") else { continue };
        if let Ok(Some(noted)) = noted(agent, job)
            && noted.connection.0 == connection
            && noted.vm == vm
            && !noted.overlays.is_empty()
        {
            return Ok(Some(job.to_owned()));
        }
    }
    Ok(None)
}

/// The job whose notes name one of these snapshots of a VM, and which: that job removes it, or the reaper does. An error where notes cannot be
/// read that may name one of them.
pub fn maker(agent: &Agent, connection: &str, vm: &str, names: &BTreeSet<&str>) -> io::Result<Option<(String, String)>> {
    if !names.iter().any(|name| name.starts_with(shared::snapshots::OURS)) {
        return Ok(None);
    }
    for entry in agent.ledger.dir().entries()? {
        let Ok(file) = entry?.file_name().into_string() else { continue };
        let Some(job) = file.strip_suffix(".touched") else { continue };
        // One that vanishes meanwhile names nothing.
        let unread = |e: io::Error| io::Error::new(e.kind(), format!("the notes of {job}: {e}"));
        let Some(noted) = noted(agent, job).map_err(unread)? else { continue };
        let is_of = noted.connection.0 == connection && noted.vm == vm;
        if let Some(name) = noted.snapshots.iter().find(|name| is_of && names.contains(name.as_str())) {
            return Ok(Some((job.to_owned(), name.clone())));
        }
    }
    Ok(None)
}

/// Undoes what an ended attempt has touched, once more where the source is not well for a moment. What cannot be undone now stays noted, and
/// the reaper comes back to it.
pub fn undo(agent: &Agent, job: &str) {
    let _turn = agent.undoing.wait(job);
    undo_patiently(agent, job);
}

fn undo_patiently(agent: &Agent, job: &str) {
    let end = Instant::now() + PATIENCE;
    while !undo_noted(agent, job) && Instant::now() < end {
        std::thread::sleep(PAUSE);
    }
}

/// False where the same may work a moment later.
fn undo_noted(agent: &Agent, job: &str) -> bool {
    let noted = match noted(agent, job) {
        Ok(Some(noted)) => noted,
        Ok(None) => return true,
        Err(e) => {
            if agent.undoing.is_news(job, Some(&e.to_string())) {
                tracing::error!(job, error = %e, "what a job has touched cannot be read; its file stays");
            }
            return true;
        }
    };
    let (name, kind, path) = noted.connection.clone();
    if noted.halted.is_some() && agent.freezing.is_anothers(&frozen_name(&name, &noted.vm), job) {
        // Whoever has it now has stopped it as well, or reads it as it lies there.
        return true;
    }
    let mut waits = None;
    let undone = match noted.halted.as_ref().map(Halted::stays).transpose() {
        Err(e) => Err(e),
        _ if kind.is_empty() => Ok(Vec::new()),
        _ if let Some(volumes) = &noted.volumes => volumes::clear(agent, &noted, volumes).map(|()| Vec::new()),
        Ok(stays) => {
            waits = noted.halted.clone().filter(|_| stays == Some(true));
            // A guest that stays stopped cannot thaw anything, and need not.
            let (halted, quiesced_at) = if waits.is_none() { (noted.halted.clone(), noted.quiesced_at) } else { (None, None) };
            let to_undo = Touched { halted, quiesced_at, ..noted.clone() };
            agent.source(&v1::Connection { name, kind, path, account: None }).and_then(|source| source.undo(&to_undo))
        }
    };
    match undone {
        Ok(_) if waits.is_some() => {
            // The attempt that makes the new VM forgets it.
            let (connection, vm, noted_ms) = (noted.connection.clone(), noted.vm.clone(), noted.noted_ms);
            let rest = Touched { connection, vm, noted_ms, halted: waits, quiesced_at: noted.quiesced_at, ..Touched::default() };
            if rest != noted
                && let Err(e) = write(agent, job, &rest)
            {
                tracing::error!(job, error = %e, "what is left of a job's notes cannot be written");
            }
            true
        }
        Ok(not_seen) if !not_seen.is_empty() && noted.may_come(shared::clock::now().timestamp_millis()) => {
            tracing::debug!(job, vm = noted.vm, ?not_seen, "what a job was about to make is not there; it is looked for again");
            // The rest is undone, and must not be undone again under whoever comes next.
            let (connection, vm, noted_ms) = (noted.connection.clone(), noted.vm.clone(), noted.noted_ms);
            let rest = Touched { connection, vm, noted_ms, snapshots: not_seen, ..Touched::default() };
            if rest != noted
                && let Err(e) = write(agent, job, &rest)
            {
                tracing::error!(job, error = %e, "what is left of a job's notes cannot be written");
            }
            true
        }
        Ok(_) => {
            let removed = agent.ledger.dir().remove_file(file(job)).and_then(|()| vault::sync_dir(agent.ledger.dir()));
            if let Err(e) = removed {
                tracing::error!(job, error = %e, "what a job has touched cannot be forgotten");
            }
            if agent.undoing.is_news(job, None) {
                tracing::info!(job, vm = noted.vm, "what a job had left at its source is gone");
            }
            true
        }
        Err(e) => {
            if agent.undoing.is_news(job, Some(&e.message)) {
                let connection = &noted.connection.0;
                tracing::warn!(job, connection, vm = noted.vm, error = %e, "what a job has left at its source is not gone yet; it is tried again");
            }
            !e.retryable
        }
    }
}

/// Undoes what attempts have left that do not run any more.
pub fn reap(agent: &Arc<Agent>) {
    let Ok(entries) = agent.ledger.dir().entries() else { return };
    for entry in entries.flatten() {
        let Ok(name) = entry.file_name().into_string() else { continue };
        let Some(job) = name.strip_suffix(".touched") else { continue };
        // Whoever is in the table now has a worker that waits for this turn before it notes anything.
        if let Some(_turn) = agent.undoing.take(job, || agent.table.get(job).is_none_or(|held| held.is_over())) {
            undo_noted(agent, job);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_never_seen_is_waited_for_as_long_as_it_may_come() {
        let noted = Touched { noted_ms: 1_000_000, ..Touched::default() };
        for (now, may_come) in [(1_000_000, true), (1_899_999, true), (1_900_000, false), (999_999, false), (i64::MAX, false)] {
            assert_eq!(noted.may_come(now), may_come, "{now}");
        }
        // As an older agent wrote it: nobody knows when.
        assert!(!Touched::default().may_come(1_900_000_000_000));
    }
}

//! A warm migration: the VM runs on while it is copied, and is stopped only for what it has changed last.
//!
//! ```text
//! pass 0 (all of it) ─► rehearsal (boot proof) ─► pass 1 ─► pass 2 ─► … ─► halt ─► last pass ─► rename ─► new VM ─► old VM off
//!                                                 └─ until the downtime to expect fits, or somebody says so    │
//!                                                          anything fails from here to the new VM: the old one goes on
//! ```
//! Owns: when to cut over, what the passes are called (`pass-N`, one layer over the other), the downtime. Never: stops the VM before a copy
//! has proven that it boots; lets both run: what is noted says whether the old one may go on.
//! A crash here costs the pass that it interrupts: the next attempt lets the VM go on and compares it with the passes that stand.

use std::path::Path;
use std::time::{Duration, Instant};

use proto::v1;
use serde_json::{Value, json};
use shared::error::Code;
use shared::migrate::Cutover;
use shared::options::Options;
use shared::vault::{self, Dir};
use shared::vm::Vm;

use super::backup::{self, Before};
use super::migrate::Migration;
use super::watcher::SYNCING;
use super::{End, Failure, copy_into, copy_job, part_name, source_of};
use crate::pipeline::{Format, Outcome};
use crate::sources::Source;
use crate::{points, proof, touched};

/// Passes after which it does not converge.
const MOST: u32 = 30;
/// Between two passes that wait for somebody.
const PAUSE: Duration = Duration::from_secs(30);
/// Between two looks whether somebody has said so.
const LOOK: Duration = Duration::from_millis(200);
/// What stopping the VM and making the new one take beside the last pass.
const OVERHEAD: Duration = Duration::from_secs(2);

/// Passes so far.
struct Warm<'a> {
    migration: &'a Migration<'a>,
    options: &'a Options,
    connection: v1::Connection,
    vm_id: &'a str,
    source: &'a dyn Source,
    pen: touched::Pen<'a>,
    /// The job's part folder.
    part: Dir,
    created: u64,
    next: u32,
    told: Vec<Value>,
}

/// What a pass has left.
struct Done {
    vm: Vm,
    outcome: Outcome,
    manifests: Vec<String>,
    name: String,
    took: Duration,
}

/// Runs it to its end.
pub(super) fn run(
    migration: &Migration<'_>,
    assign: &v1::Assign,
    options: &Options,
    folder: &Dir,
    place: &Path,
    created: u64,
) -> Result<End, End> {
    let (agent, held) = (migration.agent, migration.held);
    let wish = options.warm.clone().unwrap_or_default();
    let name = part_name(&held.job);
    let io = |what: &str| {
        let what = what.to_owned();
        move |e: std::io::Error| Failure::io(&what, &e)
    };
    folder.create_dir_all(&name).map_err(io("the part folder"))?;
    vault::sync_dir(folder).map_err(io("the destination"))?;
    let connection = assign.connection.clone().unwrap_or_default();
    let source = source_of(agent, assign)?;
    let pen = touched::Pen::new(agent, held, &connection, &assign.vm_id).map_err(io("the ledger"))?;
    pen.wait_for_vm().map_err(io("waiting for the VM"))?;
    let part = folder.open_dir(&name).map_err(io("the part folder"))?;
    let mut warm = Warm {
        migration,
        options,
        connection,
        vm_id: &assign.vm_id,
        source: source.as_ref(),
        pen,
        part,
        created,
        next: 0,
        told: Vec::new(),
    };

    let mut before = warm.standing()?;
    let mut last = None;
    if before.is_none() {
        let done = warm.pass(None, false)?;
        before = warm.after(&done)?;
        last = Some(done);
    }
    let path = place.join(&name);
    if let Some(done) = &last {
        migration.rehearse(&warm.part, &path, &done.vm, &disks_of(done))?;
    }
    loop {
        let done = warm.pass(before.take(), false)?;
        before = warm.after(&done)?;
        let expected = done.took + OVERHEAD;
        let fits = expected <= Duration::from_secs(wish.max_downtime_seconds);
        let text =
            format!("{}: {:.1} s; {:.1} s of downtime are to be expected", done.name, done.took.as_secs_f64(), expected.as_secs_f64());
        warm.log("info", text);
        if held.is_to_cut_over() || (wish.cutover == Cutover::Auto && fits) {
            break;
        }
        if warm.next >= MOST {
            let message = format!(
                "{MOST} passes, and {:.0} s of downtime would still be needed where {} s are allowed; the VM was not stopped",
                expected.as_secs_f64(),
                wish.max_downtime_seconds
            );
            return Err(Failure::fatal(Code::Unprocessable, message).into());
        }
        if wish.cutover == Cutover::Manual {
            warm.wait_for_somebody()?;
        }
    }
    warm.cut_over(folder, place, &path, before)
}

impl Warm<'_> {
    fn log(&self, level: &str, text: String) {
        self.migration.agent.table.log(self.migration.held, level, SYNCING, text);
    }

    /// The newest pass of an earlier attempt that holds; what lies above it goes.
    fn standing(&mut self) -> Result<Option<Before>, Failure> {
        let key = self.migration.agent.signing.public_hex();
        let there = |number: &u32| self.part.try_exists(points::pass_name(*number)).unwrap_or(false);
        let count = (0..=MOST).take_while(there).count() as u32;
        let mut found = None;
        for number in (0..count).rev() {
            let name = points::pass_name(number);
            match Before::open(&self.part, &name, &key) {
                Ok(Some(before)) => {
                    self.log("info", format!("{name} of an earlier attempt stands: the VM is compared with it"));
                    (self.next, found) = (number + 1, Some(before));
                    break;
                }
                Ok(None) | Err(_) => self.part.remove_dir_all(&name).map_err(|e| Failure::io("the part folder", &e))?,
            }
        }
        Ok(found)
    }

    /// Copies what has changed since, or all of it. `is_last`: none follows.
    fn pass(&mut self, before: Option<Before>, is_last: bool) -> Result<Done, End> {
        let (agent, held) = (self.migration.agent, self.migration.held);
        let began = Instant::now();
        let is_first = before.is_none();
        let name = points::pass_name(self.next);
        let log = |level: &str, text: String| agent.table.log(held, level, if is_first { "preparing" } else { SYNCING }, text);
        let (vm, disks, backup) = backup::freeze(self.source, &self.connection.name, self.vm_id, &self.pen, before, &name, &log)?;
        let options = if is_first { self.options.clone() } else { Options { compress: Some(true), level: None, ..self.options.clone() } };
        let job = copy_job(held, &options, vm, disks, Format::Qcow2, self.created);
        let outcome = copy_into(agent, held, &self.part, &name, &job, (!is_first).then(|| held.progress()))?;
        let folder = self.part.open_dir(&name).map_err(|e| Failure::io("the part folder", &e))?;
        let digest = backup.write(&folder, &outcome).map_err(|e| Failure::io("the pass", &e))?;
        let manifests = proof::write_manifests(&folder, &agent.signing, (&held.job, &job.vm.name), &outcome, digest)
            .map_err(|e| Failure::io("the manifest", &e))?;
        // No pass begins from the last one, and a domain that is off keeps its checkpoints.
        let obsolete = if is_last { &backup.obsolete | &backup.needed } else { backup.obsolete.clone() };
        touched::thaw(agent, &held.job, &obsolete).map_err(Failure::from)?;
        let (kind, changed, moved) = backup.facts();
        let took = began.elapsed();
        self.told.push(json!({
            "pass": name, "kind": kind, "bytes_changed": changed, "bytes_moved": moved, "seconds": (took.as_secs_f64() * 1000.0).round() / 1000.0,
        }));
        self.next += 1;
        Ok(Done { vm: job.vm, outcome, manifests, name, took })
    }

    /// A pass as the next one is laid over it.
    fn after(&self, done: &Done) -> Result<Option<Before>, Failure> {
        Before::open(&self.part, &done.name, &self.migration.agent.signing.public_hex())
    }

    fn wait_for_somebody(&self) -> Result<(), End> {
        let (held, began) = (self.migration.held, Instant::now());
        while began.elapsed() < PAUSE && !held.is_to_cut_over() {
            if let Some(stop) = held.stop() {
                return Err(End::Stopped(stop));
            }
            std::thread::sleep(LOOK);
        }
        Ok(())
    }

    /// The VM stops, its last changes follow, the new one is made.
    fn cut_over(&mut self, folder: &Dir, place: &Path, path: &Path, before: Option<Before>) -> Result<End, End> {
        let (agent, held, migration) = (self.migration.agent, self.migration.held, self.migration);
        if let Some(stop) = held.stop() {
            return Err(End::Stopped(stop));
        }
        let note = |committed| {
            touched::note_halted(agent, &held.job, Some(migration.halted(committed))).map_err(|e| Failure::io("the ledger", &e))
        };
        note(false)?;
        self.log("info", "the VM is stopped for the last pass".to_owned());
        let down = Instant::now();
        self.source.halt(self.vm_id).map_err(Failure::from)?;
        let done = self.pass(before, true)?;

        let published = place.join(&held.job);
        let result = proof::result_json(&published.join(&done.name), &done.manifests, &agent.signing, &done.outcome);
        let result = migration.seal(&result, &done.vm, &disks_of(&done))?;
        let mut result = migration.make_ready(&self.part, path, &result, false)?;
        let passes = Value::Array(std::mem::take(&mut self.told));
        super::commit(agent, held, || {
            note(true)?;
            let landed = super::publish(agent, held, folder, None, &held.job)
                .and_then(|()| migration.land(folder, &published, &result, Some((&passes, down))));
            match landed {
                Ok(landed) => result = landed,
                Err(e) => {
                    // Where the new VM does not stand the old one goes on.
                    note(false)?;
                    return Err(e);
                }
            }
            self.source.retire(self.vm_id).map_err(Failure::from)?;
            touched::note_halted(agent, &held.job, None).map_err(|e| Failure::io("the ledger", &e))
        })?;
        self.log("info", format!("published as {}", published.display()));
        Ok(End::Completed(result))
    }
}

/// The disks of a pass as a VM runs from them: path from the job's folder, format, bytes.
fn disks_of(done: &Done) -> Vec<(String, String, u64)> {
    done.outcome.disks.iter().map(|disk| (format!("{}/{}", done.name, disk.file), "qcow2".to_owned(), disk.capacity)).collect()
}

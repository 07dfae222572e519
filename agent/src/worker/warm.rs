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
use super::migrate::{Migration, Rehearsal};
use super::watcher::SYNCING;
use super::{End, Failure, copy_into, copy_job, part_name, source_of};
use crate::pipeline::{Format, Outcome};
use crate::sources::Source;
use crate::{points, proof, touched};

/// What was rehearsed, in the part folder until the last pass.
const REHEARSAL: &str = "rehearsal.json";
/// What a guest is taken to need to shut down.
const SHUTDOWN: Duration = Duration::from_secs(15);
/// Passes after which it does not converge.
const MOST: u32 = 30;
/// Between two passes that wait for somebody: at first, and later on.
const PAUSE: Duration = Duration::from_secs(30);
const LONG_PAUSE: Duration = Duration::from_secs(600);
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
    /// Passes behind the first one, of this attempt.
    passed: u32,
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
    let pen = touched::Pen::new(agent, held, &connection, &assign.vm_id, options).map_err(io("the ledger"))?;
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
        passed: 0,
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
    let rehearsal = warm.rehearsal(&path, before.as_ref(), last.as_ref())?;
    let besides = OVERHEAD + Duration::from_secs_f64(rehearsal.adapting) + warm.shutdown();
    loop {
        let done = warm.pass(before.take(), false)?;
        before = warm.after(&done)?;
        let expected = done.took + besides;
        let fits = expected <= Duration::from_secs(wish.max_downtime_seconds);
        let text =
            format!("{}: {:.1} s; {:.1} s of downtime are to be expected", done.name, done.took.as_secs_f64(), expected.as_secs_f64());
        warm.log("info", text);
        if held.is_to_cut_over() || wish.now || (wish.cutover == Cutover::Auto && fits) {
            break;
        }
        warm.passed += 1;
        if warm.passed >= MOST && wish.cutover == Cutover::Auto {
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
    warm.cut_over(folder, place, &path, before, &rehearsal)
}

/// Whether a part folder holds a pass that a later attempt goes on from.
pub(super) fn has_pass(part: &Dir) -> bool {
    numbers(part).is_ok_and(|numbers| !numbers.is_empty())
}

/// Numbers of the passes whose folders are there, ascending.
fn numbers(part: &Dir) -> std::io::Result<Vec<u32>> {
    let mut numbers = Vec::new();
    for entry in part.entries()? {
        let Ok(name) = entry?.file_name().into_string() else { continue };
        let is_whole =
            |number: &u32| points::pass_name(*number) == name && part.try_exists(format!("{name}/{}", points::FILE)).unwrap_or(false);
        numbers.extend(name.rsplit('-').next().and_then(|number| number.parse().ok()).filter(is_whole));
    }
    numbers.sort_unstable();
    Ok(numbers)
}

impl Warm<'_> {
    fn log(&self, level: &str, text: String) {
        self.migration.agent.table.log(self.migration.held, level, SYNCING, text);
    }

    /// The newest pass of an earlier attempt that holds; what lies above it goes.
    fn standing(&mut self) -> Result<Option<Before>, Failure> {
        let failed = |e: std::io::Error| Failure::io("the part folder", &e);
        let key = self.migration.agent.signing.public_hex();
        let numbers = numbers(&self.part).map_err(failed)?;
        self.next = numbers.last().map_or(0, |last| last + 1);
        for number in numbers.into_iter().rev() {
            let name = points::pass_name(number);
            match Before::open(&self.part, &name, &key) {
                Ok(Some(before)) => {
                    self.log("info", format!("{name} of an earlier attempt stands: the VM is compared with it"));
                    return Ok(Some(before));
                }
                Err(e) if !matches!(e.code, Code::BadImage | Code::NotFound) => return Err(Failure { retryable: true, ..e }),
                Ok(None) | Err(_) => {
                    self.part.remove_dir_all(&name).map_err(failed)?;
                    self.next = number;
                }
            }
        }
        Ok(None)
    }

    /// What a copy has shown that stands: of an earlier attempt, else now.
    fn rehearsal(&self, path: &Path, before: Option<&Before>, last: Option<&Done>) -> Result<Rehearsal, End> {
        let failed = |e: std::io::Error| Failure::io("the rehearsal", &e);
        let kept = vault::read_optional(&self.part, REHEARSAL).map_err(failed)?;
        if let Some(rehearsal) = kept.and_then(|bytes| serde_json::from_slice(&bytes).ok()) {
            return Ok(rehearsal);
        }
        let rehearsal = match (last, before) {
            (Some(done), _) => self.migration.rehearse(&self.part, path, &done.vm, &disks_of(done))?,
            (None, Some(before)) => self.migration.rehearse(&self.part, path, before.vm(), &before.files())?,
            (None, None) => return Err(Failure::fatal(Code::Internal, "there is no pass to rehearse").into()),
        };
        let bytes = serde_json::to_vec(&rehearsal).map_err(|e| failed(e.into()))?;
        vault::write_whole(&self.part, REHEARSAL, &bytes).map_err(failed)?;
        Ok(rehearsal)
    }

    /// What a guest may need to shut down.
    fn shutdown(&self) -> Duration {
        if self.connection.kind == crate::hypervisors::VSPHERE { SHUTDOWN } else { Duration::ZERO }
    }

    /// Copies what has changed since, or all of it. `is_last`: none follows.
    fn pass(&mut self, before: Option<Before>, is_last: bool) -> Result<Done, End> {
        let (agent, held) = (self.migration.agent, self.migration.held);
        let began = Instant::now();
        let is_first = before.is_none();
        let name = points::pass_name(self.next);
        if self.part.try_exists(&name).unwrap_or(false) {
            self.part.remove_dir_all(&name).map_err(|e| Failure::io("the part folder", &e))?;
        }
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
        if matches!(kind, points::Kind::Synthetic | points::Kind::Full) && !is_first {
            // It is complete in itself: nothing lies over what was before.
            for number in
                numbers(&self.part).map_err(|e| Failure::io("the part folder", &e))?.into_iter().filter(|number| *number < self.next)
            {
                self.part.remove_dir_all(points::pass_name(number)).map_err(|e| Failure::io("the part folder", &e))?;
            }
        }
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
        let pause = if self.passed < 10 { PAUSE } else { LONG_PAUSE };
        while began.elapsed() < pause && !held.is_to_cut_over() {
            if let Some(stop) = held.stop() {
                return Err(End::Stopped(stop));
            }
            std::thread::sleep(LOOK);
        }
        Ok(())
    }

    /// The VM stops, its last changes follow, the new one is made.
    fn cut_over(&mut self, folder: &Dir, place: &Path, path: &Path, before: Option<Before>, rehearsal: &Rehearsal) -> Result<End, End> {
        let (agent, held, migration) = (self.migration.agent, self.migration.held, self.migration);
        if let Some(stop) = held.stop() {
            return Err(End::Stopped(stop));
        }
        let ledger = |e: std::io::Error| Failure::io("the ledger", &e);
        touched::note_halted(agent, &held.job, Some(migration.halted(false))).map_err(ledger)?;
        self.log("info", "the VM is stopped for the last pass".to_owned());
        let halted_ms = shared::clock::now().timestamp_millis();
        self.source.halt(self.vm_id, &self.pen).map_err(Failure::from)?;
        let done = self.pass(before, true)?;

        let published = place.join(&held.job);
        self.clear()?;
        let result =
            proof::result_json(&published.join(&done.name), &done.manifests, &agent.signing, &done.outcome, self.pen.consistency());
        let passes = Value::Array(std::mem::take(&mut self.told));
        let result = migration.seal_last(&result, &done.vm, &disks_of(&done), rehearsal, (passes, halted_ms))?;
        let mut result = migration.make_ready(&self.part, path, &result, false)?;
        migration.is_as_rehearsed(&result, rehearsal)?;
        migration.check_again(&result)?;
        super::commit(agent, held, || {
            if !self.source.is_halted(self.vm_id)? {
                return Err(Failure::fatal(Code::Conflict, "somebody has let the VM go on while it was stopped for the last pass"));
            }
            touched::note_halted(agent, &held.job, Some(migration.halted(true))).map_err(ledger)?;
            super::publish(agent, held, folder, None, &held.job)?;
            result = migration.take_over(folder, &published, &result, None)?;
            Ok(())
        })?;
        self.log("info", format!("published as {}", published.display()));
        Ok(End::Completed(result))
    }

    /// What the rehearsal has left and nobody runs from goes: the last pass is adapted anew.
    fn clear(&self) -> Result<(), Failure> {
        let failed = |e: std::io::Error| Failure::io("the part folder", &e);
        for entry in self.part.entries().map_err(failed)? {
            let Ok(name) = entry.map_err(failed)?.file_name().into_string() else { continue };
            if name == REHEARSAL || name.ends_with(".adapted.qcow2") {
                self.part.remove_file(&name).map_err(failed)?;
            }
        }
        Ok(())
    }
}

/// The disks of a pass as a VM runs from them: path from the job's folder, format, bytes.
fn disks_of(done: &Done) -> Vec<(String, String, u64)> {
    done.outcome.disks.iter().map(|disk| (format!("{}/{}", done.name, disk.file), "qcow2".to_owned(), disk.capacity)).collect()
}

//! What a migration does beyond an export: the guest is made ready, shown to boot, given its name, and becomes a VM.
//!
//! ```text
//! verified copy ─► sealed ─► adapting ─► deploying (boot proof) ─► commit? ─granted─► rename ─► domain ─► receipt ─► Finished
//!                    ▲          └──────────────┴─ failed: what is sealed stays, a retry begins here
//!                    └─ a retry whose copy is sealed begins here
//! ```
//! Owns: that order, the kept result `jobs/JOBID.result` in which each step that is done stands, the receipt. Never: changes a verified disk
//! (overlays lie over it), switches the source, gives two machines that run one address.
//! `addresses`: whose addresses the new VM has; `ready`: adaptation and boot proof.
//! A crash here costs the step that it interrupts: what was sealed is sealed, a domain that is half made is noted and undone.

mod addresses;
mod ready;

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use proto::v1;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use shared::deploy::Wish;
use shared::error::Code;
use shared::migrate::{Adapt, BootProof, Target, Warm};
use shared::options::{JobType, Options};
use shared::vault::{self, Dir};
use shared::vm::Vm;

use self::addresses::has_address;
use super::{End, Failure, result_name};
use crate::Agent;
use crate::deploy::volumes::{self, Ear, Filled, Filling};
use crate::deploy::{self, Standing};
use crate::guest::{GuestDisk, boot};
use crate::held::Assignment;
use crate::pipeline::{Format, Outcome};
use crate::sources::local::Local;
use crate::touched::{self, Halted};

/// Name of the receipt in the published folder.
pub const RECEIPT: &str = "migration-receipt.json";
/// How often the VM of a warm migration is tried to be made, while the old one waits, and between two tries.
const TRIES: u32 = 3;
const PAUSE: Duration = Duration::from_secs(3);
/// Version of the receipt.
const VERSION: u32 = 1;

/// What came of the adaptation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Readiness {
    /// virt-v2v-in-place did it.
    Adapted,
    /// The guest is ready as it is.
    NotNeeded,
    /// It could not be done: converted, not adapted.
    NotAdapted,
    /// Nobody wanted it.
    Off,
}

/// How far a sealed migration has come: stands in the kept result as `migration`.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Progress {
    /// The VM as it was read.
    vm: Vm,
    /// The addresses of the new VM's cards: decided once, since the guest may be told of them.
    #[serde(alias = "mac", deserialize_with = "one_or_several")]
    macs: Vec<String>,
    /// When the source was read, RFC 3339.
    sealed_at: String,
    /// What came of the adaptation, and why; none as long as it was not tried.
    adapted: Option<(Readiness, String)>,
    /// The disks that the VM will have: bare name, format, bytes.
    disks: Vec<(String, String, u64)>,
    /// How the boot proof went, once it has passed; of a warm one that of the rehearsal.
    proof: Option<boot::Proof>,
    /// The source was shut down for it, and stays off where it ends well.
    #[serde(default)]
    stopped: bool,
    /// Of a warm one: the passes, and since when the source is stopped, milliseconds since 1970.
    #[serde(default)]
    warm: Option<(Value, i64)>,
}

/// An earlier build kept the one address of a VM of one card.
fn one_or_several<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Kept {
        One(String),
        Several(Vec<String>),
    }
    Ok(match Kept::deserialize(deserializer)? {
        Kept::One(mac) => vec![mac],
        Kept::Several(macs) => macs,
    })
}

/// What a copy of a VM that runs on has shown before the VM was stopped for it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Rehearsal {
    /// What came of the adaptation, and why.
    adapted: Option<(Readiness, String)>,
    /// Seconds that it took: the last pass has it once more.
    pub(super) adapting: f64,
    /// How it came up.
    proof: Option<boot::Proof>,
}

/// A migration.
pub(super) struct Migration<'a> {
    pub(super) agent: &'a Agent,
    pub(super) held: &'a Assignment,
    source: v1::Connection,
    vm_id: String,
    target: Target,
    connection: v1::Connection,
    adapt: Adapt,
    proof: BootProof,
    warm: Option<Warm>,
    /// The source is shut down before it is read.
    power_off: bool,
    /// The domain's, the same in each attempt.
    uuid: String,
}

impl<'a> Migration<'a> {
    /// Of an assignment, where it is one.
    pub(super) fn of(
        agent: &'a Agent,
        held: &'a Assignment,
        kind: Option<JobType>,
        assign: &v1::Assign,
        options: &Options,
    ) -> Result<Option<Self>, Failure> {
        if kind != Some(JobType::Migrate) {
            return Ok(None);
        }
        let missing = |what: &str| Failure::fatal(Code::BadRequest, format!("the migration names no {what}"));
        let target = options.target.clone().ok_or_else(|| missing("target"))?;
        let source = assign.connection.clone().ok_or_else(|| missing("source"))?;
        let connection =
            v1::Connection { name: target.connection.clone(), kind: target.kind.clone(), path: target.path.clone(), account: None };
        let uuid = deploy::uuid_of(&held.job);
        let (adapt, proof) = (options.adapt.unwrap_or_default(), options.boot_proof.clone().unwrap_or_default());
        let (warm, power_off) = (options.warm.clone(), options.power_off == Some(true));
        Ok(Some(Self { power_off, agent, held, source, vm_id: assign.vm_id.clone(), target, connection, adapt, proof, warm, uuid }))
    }

    /// Whether an attempt that has failed for good left something that a retry goes on from.
    pub(super) fn is_kept(agent: &Agent, assign: &v1::Assign) -> bool {
        let is_migration = JobType::from_word(&assign.r#type) == Some(JobType::Migrate);
        let is_sealed = || agent.ledger.dir().try_exists(result_name(&assign.job)).unwrap_or(false);
        let has_pass = || {
            let entry = agent.ledger.read(&assign.job).ok()??;
            let folder = agent.vault.open_output_dir(&entry.destination).ok()?;
            super::warm::has_pass(&folder.open_dir(super::part_name(&assign.job)).ok()?).then_some(())
        };
        is_migration && (is_sealed() || has_pass().is_some())
    }

    /// Whether the VM runs on while it is copied.
    pub(super) fn is_warm(&self) -> bool {
        self.warm.is_some()
    }

    /// What is noted of a source that is stopped for this migration.
    pub(super) fn halted(&self, committed: bool) -> Halted {
        let v1::Connection { name, kind, path, .. } = self.connection.clone();
        Halted { target: (name, kind, path), uuid: self.uuid.clone(), committed, asked_at: None }
    }

    fn log(&self, level: &str, stage: &str, text: impl Into<String>) {
        self.agent.table.log(self.held, level, stage, text.into());
    }

    /// Before a byte is copied: the hypervisor would take the VM.
    pub(super) fn check(&self) -> Result<(), Failure> {
        self.clear();
        if deploy::stands(&self.connection, &self.uuid)? {
            return Ok(());
        }
        // The source of a warm one is off by then, and one that is shut down.
        let addresses = self.addresses(None, self.is_warm() || self.power_off)?;
        Ok(deploy::check(self.agent, &self.connection, &self.target.wish.with_addresses(&addresses))?)
    }

    /// The result of a verified copy with what the steps behind it go by. `disks`: path from the job's folder, format, bytes.
    pub(super) fn seal(&self, result: &str, vm: &Vm, disks: &[(String, String, u64)], stopped: bool) -> Result<String, Failure> {
        let mut result: Value = serde_json::from_str(result).map_err(unreadable)?;
        let progress = Progress { stopped, ..self.begin(vm, disks, false)? };
        result["migration"] = serde_json::to_value(progress).map_err(unreadable)?;
        Ok(result.to_string())
    }

    /// Whether the source was stopped for this copy.
    fn has_stopped(&self, result: &str) -> Result<bool, Failure> {
        let result: Value = serde_json::from_str(result).map_err(unreadable)?;
        let progress: Progress = serde_json::from_value(result["migration"].clone()).map_err(unreadable)?;
        Ok(progress.stopped || progress.warm.is_some())
    }

    /// Whether the source went on after this copy, which was to be its last state: then it is forgotten, and made anew.
    pub(super) fn is_outdated(&self, result: &str) -> Result<bool, Failure> {
        let is_outdated = self.has_stopped(result)?;
        if is_outdated {
            self.log("info", "preparing", "the VM went on after an earlier attempt had copied it: it is copied anew");
            let removed = self.agent.ledger.dir().remove_file(result_name(&self.held.job));
            removed.map_err(|e| Failure::io("the result", &e))?;
        }
        Ok(is_outdated)
    }

    /// The same of the last pass of a warm one.
    pub(super) fn seal_last(
        &self,
        result: &str,
        vm: &Vm,
        disks: &[(String, String, u64)],
        rehearsal: &Rehearsal,
        warm: (Value, i64),
    ) -> Result<String, Failure> {
        let mut result: Value = serde_json::from_str(result).map_err(unreadable)?;
        let progress = Progress { proof: rehearsal.proof.clone(), warm: Some(warm), ..self.begin(vm, disks, false)? };
        result["migration"] = serde_json::to_value(progress).map_err(unreadable)?;
        Ok(result.to_string())
    }

    /// Whether what was rehearsed is what came of the last pass: else the VM is not given up for it.
    pub(super) fn is_as_rehearsed(&self, result: &str, rehearsal: &Rehearsal) -> Result<(), Failure> {
        let result: Value = serde_json::from_str(result).map_err(unreadable)?;
        let progress: Progress = serde_json::from_value(result["migration"].clone()).map_err(unreadable)?;
        let is_other = |status: &Option<(Readiness, String)>| status.as_ref().is_some_and(|(status, _)| *status == Readiness::NotAdapted);
        match &progress.adapted {
            Some((_, why)) if is_other(&progress.adapted) && !is_other(&rehearsal.adapted) => {
                Err(Failure::fatal(Code::VerificationFailed, format!("the rehearsal was adapted, the last pass could not be: {why}")))
            }
            _ => Ok(()),
        }
    }

    /// Before anything is published: the hypervisor would still take the VM.
    pub(super) fn check_again(&self, result: &str) -> Result<(), Failure> {
        self.clear();
        if deploy::stands(&self.connection, &self.uuid)? {
            return Ok(());
        }
        let result: Value = serde_json::from_str(result).map_err(unreadable)?;
        let progress: Progress = serde_json::from_value(result["migration"].clone()).map_err(unreadable)?;
        Ok(deploy::check(self.agent, &self.connection, &self.wish(&progress))?)
    }

    /// What a crash has left half made stands in nobody's way: a domain that was not started yet, then its volumes.
    fn clear(&self) {
        deploy::clear(self.agent, &self.uuid);
        if self.target.wish.pool.is_some() {
            touched::undo(self.agent, &volumes::note(&self.uuid));
        }
    }

    /// The VM with the addresses that were decided on.
    fn wish(&self, progress: &Progress) -> Wish {
        self.target.wish.with_addresses(&progress.macs.iter().cloned().map(Some).collect::<Vec<_>>())
    }

    fn begin(&self, vm: &Vm, disks: &[(String, String, u64)], will_stop: bool) -> Result<Progress, Failure> {
        let addresses = self.addresses(Some(vm), will_stop)?;
        let macs = addresses.into_iter().map(|mac| mac.unwrap_or_else(deploy::new_mac)).collect();
        let sealed_at = shared::clock::rfc3339(shared::clock::now());
        Ok(Progress { vm: vm.clone(), macs, sealed_at, adapted: None, disks: disks.to_vec(), proof: None, stopped: false, warm: None })
    }

    /// The kept result, where the part folder holds what it names: an earlier attempt has copied and verified it.
    pub(super) fn sealed(&self, folder: &Dir) -> Result<Option<String>, Failure> {
        let kept =
            vault::read_optional(self.agent.ledger.dir(), &result_name(&self.held.job)).map_err(|e| Failure::io("the result", &e))?;
        let Some(result) = kept.and_then(|bytes| String::from_utf8(bytes).ok()) else { return Ok(None) };
        let Ok(part) = folder.open_dir(super::part_name(&self.held.job)) else { return Ok(None) };
        let told: Value = serde_json::from_str(&result).unwrap_or_default();
        let is_there = |file: &Value| {
            let name = file["path"].as_str().and_then(|path| Path::new(path).file_name()?.to_str())?;
            Some(part.metadata(name).ok()?.len() == file["size"].as_u64()?)
        };
        let files = told["files"].as_array();
        let all = files.is_some_and(|files| !files.is_empty() && files.iter().all(|file| is_there(file) == Some(true)));
        let is_whole = all && serde_json::from_value::<Progress>(told["migration"].clone()).is_ok();
        Ok(is_whole.then_some(result))
    }

    fn keep(&self, result: &Value) -> Result<(), Failure> {
        vault::write_whole(self.agent.ledger.dir(), &result_name(&self.held.job), result.to_string().as_bytes())
            .map_err(|e| Failure::io("the result", &e))
    }

    /// Copies the disks into the pool that they go to, unless the VM stands; they stay there when it does in the end. `path`: the folder that
    /// `part` is.
    fn fill(&self, part: &Dir, result: &str) -> Result<Option<Filled<'a>>, End> {
        let Some(pool) = &self.target.wish.pool else { return Ok(None) };
        if deploy::stands(&self.connection, &self.uuid).map_err(Failure::from)? {
            return Ok(None);
        }
        let result: Value = serde_json::from_str(result).map_err(unreadable)?;
        let progress: Progress = serde_json::from_value(result["migration"].clone()).map_err(unreadable)?;
        let folder = Local::new(part.try_clone().map_err(|e| Failure::io("the part folder", &e))?);
        let open = |(name, format, _): &(String, String, u64)| Ok(folder.open_declared(Path::new(name), format, None)?.disk);
        let disks = progress.disks.iter().map(open).collect::<Result<Vec<_>, Failure>>()?;
        let format = if progress.disks.iter().all(|(_, format, _)| format == "raw") { Format::Raw } else { Format::Qcow2 };
        self.log("info", "deploying", format!("the disks are copied into the pool `{pool}`"));
        let tell = |line: String| self.log("info", "deploying", line);
        let stop = || self.held.stop().is_some();
        let filling = Filling { vm: &self.target.wish.name, uuid: &self.uuid, disks, format };
        let filled =
            deploy::fill(self.agent, &self.connection, pool, &filling, &Ear { tell: &tell, stop: &stop }).map_err(Failure::from)?;
        self.log("info", "deploying", format!("copied into the pool `{pool}` and read back"));
        Ok(Some(filled))
    }

    /// From a sealed copy on: the guest is made ready and boots, the folder gets its name by `publish`, the VM is made.
    pub(super) fn arrive(
        &self,
        folder: &Dir,
        place: &Path,
        result: &str,
        publish: impl FnOnce() -> Result<(), Failure>,
    ) -> Result<End, End> {
        let name = super::part_name(&self.held.job);
        let part = folder.open_dir(&name).map_err(|e| Failure::io("the part folder", &e))?;
        let mut result = self.make_ready(&part, &place.join(&name), result, true)?;
        self.check_again(&result)?;
        let filled = self.fill(&part, &result)?;
        let published = place.join(&self.held.job);
        super::commit(self.agent, self.held, || {
            if self.has_stopped(&result)? {
                if !self.agent.source(&self.source)?.is_halted(&self.vm_id)? {
                    return Err(Failure::fatal(
                        Code::Conflict,
                        "somebody has switched the VM on after it was shut down for this migration",
                    ));
                }
                touched::note_halted(self.agent, &self.held.job, Some(self.halted(true))).map_err(|e| Failure::io("the ledger", &e))?;
            }
            publish()?;
            result = self.take_over(folder, &published, &result, filled.as_ref())?;
            Ok(())
        })?;
        self.log("info", "publishing", format!("published as {}", published.display()));
        Ok(End::Completed(result))
    }

    /// An attempt that finds the folder published: what is left is the VM.
    pub(super) fn arrive_again(&self, folder: &Dir, published: &Path, result: &str) -> Result<End, End> {
        self.clear();
        if self.has_stopped(result)? {
            let noted = touched::halted(self.agent, &self.held.job).map_err(|e| Failure::io("the ledger", &e))?;
            let stands = deploy::stands(&self.connection, &self.uuid).map_err(Failure::from)?;
            let source = self.agent.source(&self.source).map_err(Failure::from)?;
            let waits = noted.is_some_and(|noted| noted.committed) && source.is_halted(&self.vm_id).map_err(Failure::from)?;
            if !stands && !waits {
                let message = "the source went on after this copy was published, which is its state of that time; migrate it again";
                return Err(Failure::fatal(Code::Conflict, message).into());
            }
        }
        let mut ended = result.to_owned();
        let part = folder.open_dir(&self.held.job).map_err(|e| Failure::io("the job's folder", &e))?;
        let filled = self.fill(&part, result)?;
        super::commit(self.agent, self.held, || {
            ended = self.take_over(folder, published, &ended, filled.as_ref())?;
            Ok(())
        })?;
        Ok(End::Completed(ended))
    }

    /// The VM is made, and a source that was stopped for it is off for good. Where it cannot be made the source goes on.
    pub(super) fn take_over(&self, folder: &Dir, published: &Path, result: &str, filled: Option<&Filled>) -> Result<String, Failure> {
        let ledger = |e: io::Error| Failure::io("the ledger", &e);
        let mut tries = 0;
        let has_stopped = self.has_stopped(result)?;
        let landed = loop {
            match self.land(folder, published, result, filled) {
                Err(e) if e.retryable && has_stopped && tries < TRIES => {
                    tries += 1;
                    self.log("warn", "publishing", format!("{}; it is tried again", e.message));
                    std::thread::sleep(PAUSE);
                }
                landed => break landed,
            }
        };
        if has_stopped {
            match &landed {
                Ok(_) => {
                    self.agent.source(&self.source).and_then(|source| source.retire(&self.vm_id))?;
                    self.log("info", "publishing", "the old VM is off");
                    touched::note_halted(self.agent, &self.held.job, None).map_err(ledger)?;
                }
                Err(_) => touched::let_go(self.agent, &self.held.job),
            }
        }
        landed
    }

    /// Behind the rename: the domain, and the receipt. May be called again after a crash or a failure. `place`: the job's folder, absolute.
    fn land(&self, folder: &Dir, place: &Path, result: &str, filled: Option<&Filled>) -> Result<String, Failure> {
        let began = self.agent.ledger.read(&self.held.job).map_err(|e| Failure::io("the ledger", &e))?.map_or(0, |entry| entry.created);
        let published = folder.open_dir(&self.held.job).map_err(|e| Failure::io("the destination", &e))?;
        let mut result: Value = serde_json::from_str(result).map_err(unreadable)?;
        let progress: Progress = serde_json::from_value(result["migration"].clone()).map_err(unreadable)?;
        let stands = deploy::stands(&self.connection, &self.uuid)?;
        let kept: Vec<&String> = progress.macs.iter().filter(|mac| has_address(&progress.vm, mac)).collect();
        if !kept.is_empty() && !stands {
            self.stays_off(&progress.vm, &kept)?;
        }
        let wish = self.wish(&progress);
        let own = || disks_in(place, &progress).into_iter().map(|disk| (disk.path, disk.format)).collect();
        let disks: Vec<(PathBuf, &'static str)> = filled.map_or_else(own, |filled| filled.disks.clone());
        let standing = Standing { uuid: &self.uuid, disks: &disks };
        let made = deploy::place(self.agent, &self.connection, &wish, &standing)?;
        self.log("info", "publishing", format!("`{}` stands at {} as {}", wish.name, self.target.connection, self.uuid));

        let passes = progress.warm.as_ref().map(|(passes, halted_ms)| {
            let downtime = shared::clock::now().timestamp_millis().saturating_sub(*halted_ms) as f64 / 1000.0;
            self.log("info", "publishing", format!("from the stop of the old VM to the start of the new one it took {downtime:.1} s"));
            json!({"passes": passes, "downtime_seconds": downtime})
        });
        let proof = progress.proof.as_ref().map(|proof| shown(proof, place));
        let receipt = json!({
            "version": VERSION,
            "job": self.held.job,
            "source": {
                "connection": self.source.name, "kind": self.source.kind, "id": self.vm_id, "name": progress.vm.name, "path": progress.vm.path,
                "power_state": progress.vm.power_state, "consistency": result["consistency"],
            },
            "target": {"connection": self.target.connection, "kind": self.target.kind, "domain": made},
            "disks": result["disks"],
            "files": result["files"],
            "verified": result["verified"],
            "read_back": result["receipt"],
            "adapted": adapted_json(&progress),
            "boot_proof": progress.proof.as_ref().map(|proof| json!({
                "passed": proof.passed, "sign": proof.sign, "seconds": proof.seconds, "address": proof.address, "pinged": proof.pinged,
            })),
            "bytes": result["counters"],
            "warm": passes,
            "carbon": self.held.footprint(),
            "began_at": chrono::DateTime::from_timestamp(i64::try_from(began).unwrap_or_default(), 0).map(shared::clock::rfc3339),
            "copied_at": progress.sealed_at,
            "ended_at": shared::clock::rfc3339(shared::clock::now()),
        });
        let lost = |e: io::Error| Failure::io("the receipt", &e);
        let signed = self.agent.signing.sign_text(receipt.to_string());
        let bytes = serde_json::to_vec(&signed).map_err(unreadable)?;
        vault::write_whole(&published, RECEIPT, &bytes).map_err(lost)?;

        if let Some(result) = result.as_object_mut() {
            result.remove("migration");
        }
        result["boot_proof"] = json!(proof);
        result["adapted"] = adapted_json(&progress);
        result["domain"] = made;
        result["warm"] = json!(passes);
        result["migration_receipt"] = json!(place.join(RECEIPT).display().to_string());
        Ok(result.to_string())
    }
}

fn unreadable(e: serde_json::Error) -> Failure {
    Failure::fatal(Code::Internal, format!("the kept result cannot be read: {e}"))
}

/// The proof as the API shows it; the picture by its path.
fn shown(proof: &boot::Proof, folder: &Path) -> Value {
    let mut shown = serde_json::to_value(proof).unwrap_or_default();
    shown["screenshot"] = json!(proof.screenshot.as_ref().map(|name| folder.join(name).display().to_string()));
    shown
}

/// The disks of a copy: bare name, format, bytes.
pub(super) fn disks_of(outcome: &Outcome) -> Vec<(String, String, u64)> {
    let format = |name: &str| outcome.files.iter().find(|file| file.path == name).map_or("qcow2", |file| file.format.as_str()).to_owned();
    outcome.disks.iter().map(|disk| (disk.file.clone(), format(&disk.file), disk.capacity)).collect()
}

fn disks_in(folder: &Path, progress: &Progress) -> Vec<GuestDisk> {
    let disk = |(name, format, capacity): &(String, String, u64)| GuestDisk {
        path: folder.join(name),
        format: if format == "raw" { "raw" } else { "qcow2" },
        capacity: *capacity,
    };
    progress.disks.iter().map(disk).collect()
}

fn adapted_json(progress: &Progress) -> Value {
    match &progress.adapted {
        Some((status, reason)) => json!({"status": status, "reason": reason}),
        None => Value::Null,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_an_earlier_build_has_kept_is_gone_on_from() {
        let kept =
            json!({"vm": {}, "mac": "52:54:00:00:00:01", "sealed_at": "2026-11-26T00:00:00Z", "adapted": null, "disks": [], "proof": null});
        let progress: Progress = serde_json::from_value(kept).unwrap();
        assert_eq!(progress.macs, ["52:54:00:00:00:01"]);
        let again: Progress = serde_json::from_value(serde_json::to_value(&progress).unwrap()).unwrap();
        assert_eq!(again.macs, progress.macs);
    }
}

//! A verified copy is made ready: adapted, and shown to boot.
//!
//! Owns: when virt-v2v is asked, and what is said of it; that a guest that does not boot is not handed over. Never: writes to a verified disk.
//! A crash here costs the overlays, which the next attempt makes anew.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use shared::error::Code;
use shared::guest::Guest;
use shared::migrate::Adapt;
use shared::vault::Dir;
use shared::vm::Vm;

use super::{Migration, Progress, Readiness, Rehearsal, adapted_json, disks_in, shown, unreadable};
use crate::guest::{GuestDisk, Subject, adapt, boot, inspect};
use crate::sources::local::Local;
use crate::worker::{End, Failure};

impl Migration<'_> {
    /// Makes the guest ready and, where `proves`, has it prove that it boots. Answers the result so far.
    pub(in crate::worker) fn make_ready(&self, part: &Dir, path: &Path, result: &str, proves: bool) -> Result<String, End> {
        let mut result: Value = serde_json::from_str(result).map_err(unreadable)?;
        let mut progress: Progress = serde_json::from_value(result["migration"].clone()).map_err(unreadable)?;
        if progress.adapted.is_none() {
            self.agent.table.progress(self.held, "adapting", self.held.progress());
            self.adapt(part, path, &mut progress)?;
            result["migration"] = serde_json::to_value(&progress).map_err(unreadable)?;
            self.keep(&result)?;
        }
        self.agent.table.progress(self.held, "deploying", self.held.progress());
        if proves && self.proof.enabled && progress.proof.is_none() {
            progress.proof = Some(self.prove(part, path, &progress, result["verified"].as_bool())?);
            result["migration"] = serde_json::to_value(&progress).map_err(unreadable)?;
            self.keep(&result)?;
        }
        Ok(result.to_string())
    }

    /// Has a copy of a VM that runs on show that it would come up, before the VM is stopped for it.
    pub(in crate::worker) fn rehearse(&self, part: &Dir, path: &Path, vm: &Vm, disks: &[(String, String, u64)]) -> Result<Rehearsal, End> {
        if !self.proof.enabled {
            return Ok(Rehearsal { adapted: None, adapting: 0.0, proof: None });
        }
        let mut progress = self.begin(vm, disks, true)?;
        let began = Instant::now();
        self.adapt(part, path, &mut progress)?;
        let adapting = began.elapsed().as_secs_f64();
        let proof = self.prove(part, path, &progress, Some(true))?;
        Ok(Rehearsal { adapted: progress.adapted, adapting, proof: Some(proof) })
    }

    fn prove(&self, part: &Dir, path: &Path, progress: &Progress, verified: Option<bool>) -> Result<boot::Proof, End> {
        let wish = self.wish(progress);
        let disks = disks_in(path, progress);
        let subject = Subject { wish: &wish, disks: &disks, folder: part, path };
        let timeout = Duration::from_secs(self.proof.timeout_seconds);
        let asked = boot::Asked { sign: self.proof.sign.as_deref(), timeout, network: self.proof.network };
        let proof = boot::prove(self.agent, self.held, &self.connection, &subject, &asked).map_err(Failure::from)?;
        if proof.passed {
            return Ok(proof);
        }
        let cause = proof.cause.as_deref().unwrap_or("no sign of life");
        self.log("error", "deploying", format!("the end of its console:\n{}", proof.console_tail));
        let hint = match &progress.adapted {
            Some((Readiness::NotAdapted, why)) => format!("; it was converted, not adapted: {why}"),
            Some((Readiness::Off, _)) => "; `adapt` was `never`".to_owned(),
            _ => String::new(),
        };
        let then = if progress.stopped {
            "its VM is switched on again, and a retry copies it anew"
        } else {
            "the verified disks are kept for a retry"
        };
        let message = format!("the boot proof failed after {:.0} s: {cause}{hint}; {then}", proof.seconds);
        let told = json!({
            "boot_proof": shown(&proof, path), "verified": verified, "files": [], "adapted": adapted_json(progress),
        });
        Err(End::Failed(Failure { result: told.to_string(), ..Failure::fatal(Code::VerificationFailed, message) }))
    }

    /// Tries the adaptation. Its disks are overlays over the verified ones.
    fn adapt(&self, part: &Dir, path: &Path, progress: &mut Progress) -> Result<(), End> {
        let outcome = match self.adapt {
            Adapt::Never => (Readiness::Off, "nobody wanted it".to_owned()),
            Adapt::Auto if self.is_at_home(&progress.vm) => {
                (Readiness::NotNeeded, "it ran on QEMU, from disks on the bus that it has now".to_owned())
            }
            Adapt::Auto => match look(part, progress).as_ref().and_then(adapt::is_ready) {
                Some(why) => (Readiness::NotNeeded, why),
                None => self.convert(part, path, progress)?,
            },
            Adapt::Always => self.convert(part, path, progress)?,
        };
        let (level, line) = match &outcome {
            (Readiness::Adapted, how) => ("info", format!("adapted: {how}")),
            (Readiness::NotNeeded, why) => ("info", format!("not adapted, as it needs none: {why}")),
            (Readiness::NotAdapted, why) => ("warn", format!("converted, not adapted: {why}")),
            (Readiness::Off, _) => ("info", "not adapted: `adapt` is `never`".to_owned()),
        };
        self.log(level, "adapting", line);
        progress.adapted = Some(outcome);
        Ok(())
    }

    /// Whether the VM finds the hardware that it had.
    fn is_at_home(&self, vm: &Vm) -> bool {
        let bus = self.target.wish.disk_bus.as_deref().unwrap_or("virtio");
        self.source.kind == self.target.kind && !vm.disks.is_empty() && vm.disks.iter().all(|disk| disk.bus == bus)
    }

    /// Has the adaptation done; the disks are the overlays then.
    fn convert(&self, part: &Dir, path: &Path, progress: &mut Progress) -> Result<(Readiness, String), End> {
        let wish = self.wish(progress);
        let disks = disks_in(path, progress);
        let subject = Subject { wish: &wish, disks: &disks, folder: part, path };
        let bus = progress.vm.disks.first().map(|disk| disk.bus.clone()).unwrap_or_default();
        let mut log = |line: &str| self.log("info", "adapting", line);
        let done = match adapt::adapt(self.agent, self.held, &subject, &bus, &mut log).map_err(Failure::from)? {
            adapt::Outcome::Adapted(done) => done,
            adapt::Outcome::NotRecognised(words) => {
                return Ok((Readiness::NotAdapted, format!("virt-v2v does not know this guest: {words}")));
            }
            adapt::Outcome::Missing(what) => return Ok((Readiness::NotAdapted, what)),
            adapt::Outcome::Failed(words) => return Ok((Readiness::NotAdapted, format!("virt-v2v failed: {words}"))),
        };
        for warning in &done.warnings {
            self.log("warn", "adapting", warning);
        }
        let named = |disk: &GuestDisk| Some((disk.path.file_name()?.to_str()?.to_owned(), disk.format.to_owned(), disk.capacity));
        progress.disks = done.disks.iter().filter_map(named).collect();
        let names = match done.pinned.as_slice() {
            [] => String::new(),
            pinned => format!("; interfaces keep their names: {}", pinned.join(", ")),
        };
        let virtio = match done.virtio {
            Some(false) => "; it has no virtio drivers: give it `disk_bus: sata` and `nic_model: e1000`",
            _ => "",
        };
        Ok((Readiness::Adapted, format!("by virt-v2v-in-place{names}{virtio}")))
    }
}

/// A look into the guest on these disks; nothing where they cannot be opened.
fn look(part: &Dir, progress: &Progress) -> Option<Guest> {
    let folder = Local::new(part.try_clone().ok()?);
    let open = |(name, format, _): &(String, String, u64)| Some(folder.open_declared(Path::new(name), format, None).ok()?.disk);
    Some(inspect::inspect(&progress.disks.iter().map(open).collect::<Option<Vec<_>>>()?))
}

//! Who has a VM: one job at a time freezes it, and nobody takes or removes a snapshot of it meanwhile.
//!
//! Owns: the turns. Never: knows what is done with one. A crash here costs nothing: a new process has frozen nothing.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

/// How often a job that waits for a VM looks whether it is to stop.
const LOOK: Duration = Duration::from_millis(300);

/// What a connection's VM is called among those that are frozen.
pub fn frozen_name(connection: &str, vm: &str) -> String {
    format!("{connection} {vm}")
}

/// VMs that a job has frozen, or is about to.
#[derive(Default)]
pub struct Freezing {
    /// Jobs by VM.
    vms: Mutex<BTreeMap<String, String>>,
    done: Condvar,
}

impl Freezing {
    /// Waits until nobody else has the VM, or the job is to stop.
    pub(super) fn take(&self, vm: &str, held: &crate::held::Assignment) -> io::Result<()> {
        let mut vms = self.vms.lock().unwrap_or_else(PoisonError::into_inner);
        while vms.get(vm).is_some_and(|job| *job != held.job) {
            if held.stop().is_some() {
                return Err(io::ErrorKind::Interrupted.into());
            }
            vms = self.done.wait_timeout(vms, LOOK).unwrap_or_else(PoisonError::into_inner).0;
        }
        vms.insert(vm.to_owned(), held.job.clone());
        Ok(())
    }

    /// Takes the VM for something else than a job, until the turn is dropped; where a job has it, that job's id. Jobs wait meanwhile.
    pub fn try_take(&self, vm: &str) -> Result<Taken<'_>, String> {
        let mut vms = self.vms.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(job) = vms.get(vm) {
            return Err(job.clone());
        }
        let holder = format!("act-{}", shared::ids::random_hex::<8>());
        vms.insert(vm.to_owned(), holder.clone());
        Ok(Taken { freezing: self, holder })
    }

    /// Whether somebody else than this job has the VM.
    pub(super) fn is_anothers(&self, vm: &str, job: &str) -> bool {
        self.vms.lock().unwrap_or_else(PoisonError::into_inner).get(vm).is_some_and(|holder| holder != job)
    }

    /// The job has nothing frozen any more.
    pub fn give_back(&self, job: &str) {
        self.vms.lock().unwrap_or_else(PoisonError::into_inner).retain(|_, holder| holder != job);
        self.done.notify_all();
    }
}

/// A VM that something else than a job has.
pub struct Taken<'a> {
    freezing: &'a Freezing,
    holder: String,
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        self.freezing.give_back(&self.holder);
    }
}

//! A VM that runs, frozen by a temporary snapshot; where that is asked, its guest's tools calm its file systems for it.
//!
//! Owns: that nothing is called calm that was not: tools have to run before and after, and the server has to say that it quiesced. Never: makes
//! a snapshot that is not noted. A crash here leaves a snapshot that the ledger names.
//! Source: vSphere Web Services API, CreateSnapshot_Task (`quiesce` is ignored where no tools run), VirtualMachineSnapshotTree.

use std::sync::atomic::Ordering;

use shared::error::Code;

use super::client::Error as CallError;
use super::inventory::Found;
use super::wire::{self, MoRef};
use super::{OFF, ON, Vsphere, ledger, snapshot};
use crate::sources::{Consistency, Error, Touch};

impl Vsphere {
    /// A temporary snapshot of the VM's disks: its name, and it.
    pub(super) fn freeze(&self, found: &Found, touch: &dyn Touch) -> Result<(String, MoRef), Error> {
        if let Some(disk) = found.independent.first() {
            let state = &found.vm.power_state;
            let message =
                format!("{} is {state} and {disk} is independent: no snapshot holds it; power the VM off and export it", found.vm.path);
            return Err(Error::fatal(Code::Unprocessable, message));
        }
        let quiesces = touch.quiesces() && found.vm.power_state != OFF;
        if quiesces {
            self.can_quiesce(found)?;
        }
        let name = format!("hypersdk-{}-{}", touch.job(), shared::ids::random_hex::<4>());
        touch.snapshot(&name).map_err(|e| ledger(&e))?;
        let stopping = touch.stopping();
        let is_stopping = || stopping.load(Ordering::Acquire) != 0;
        let patience = snapshot::Patience::of_a_job(&is_stopping);
        let made = self.runtime.block_on(snapshot::create(&self.client, &found.vm.id, &snapshot::temporary(&name, quiesces), &patience));
        let made = match made {
            Ok(made) => made,
            Err(CallError::Fault(fault @ wire::Fault::Other(..))) if quiesces => return Err(not_calm(found, &fault.to_string())),
            Err(e) => return Err(self.told(&e)),
        };
        if quiesces {
            // Without tools a server takes the snapshot all the same, as it is.
            let is_calm = self.runtime.block_on(snapshot::is_quiesced(&self.client, &found.vm.id, &name)).map_err(|e| self.told(&e))?;
            if !is_calm {
                return Err(not_calm(found, "the server took its snapshot without"));
            }
            self.can_quiesce(&self.found(&found.vm.id)?)?;
        }
        touch.reads(match (found.vm.power_state.as_str(), quiesces) {
            (OFF, _) => Consistency::Off,
            (_, true) => Consistency::ApplicationConsistent,
            (_, false) => Consistency::CrashConsistent,
        });
        Ok((name, made))
    }

    /// Whether the guest's tools are there to calm it.
    fn can_quiesce(&self, found: &Found) -> Result<(), Error> {
        match (found.vm.power_state.as_str(), found.vm.tools_status.as_str()) {
            (ON, "running") => Ok(()),
            (ON, _) => Err(not_calm(found, "VMware Tools do not run in it")),
            (state, _) => Err(not_calm(found, &format!("it is {state}"))),
        }
    }
}

/// That a guest was not calmed, and what would be right.
fn not_calm(found: &Found, why: &str) -> Error {
    let path = &found.vm.path;
    let message =
        format!("{path} cannot be quiesced: {why}; mend that in the guest, or leave `quiesce` out: that gives a crash-consistent copy");
    Error::fatal(Code::Unprocessable, message)
}

//! Which addresses the new VM's cards have.
//!
//! Owns: that no two machines that run bear one address: the source's are kept only while it is off, and elsewhere. Never: reads a guest.
//! A crash here costs nothing.

use std::collections::BTreeSet;

use shared::error::Code;
use shared::vm::Vm;

use super::Migration;
use crate::worker::Failure;

impl Migration<'_> {
    /// The cards' addresses: none, a new one. `vm`: the source as it was read; absent: before that. `will_stop`: what runs now will not by then.
    pub(super) fn addresses(&self, vm: Option<&Vm>, will_stop: bool) -> Result<Vec<Option<String>>, Failure> {
        let count = 1 + self.target.wish.nics.len();
        let wanted = self.target.mac.as_deref();
        let is_same = self.source.name == self.target.connection;
        let given = wanted.filter(|word| *word != "keep").map(str::to_ascii_lowercase);
        if given.as_deref() == Some("new") {
            return Ok(vec![None; count]);
        }
        let now = self.agent.source(&self.source).and_then(|source| source.some(&BTreeSet::from([self.vm_id.clone()])));
        let now = match now {
            Ok(found) => found.into_iter().next(),
            Err(e) => {
                let message = format!("whether the source is off, so that its address can be kept, cannot be seen: {}", e.message);
                return Err(Failure { message, ..Failure::from(e) });
            }
        };
        // One of the source's own is kept, whoever calls it by its digits.
        let is_own = |address: &String| [vm, now.as_ref()].into_iter().flatten().any(|vm| has_address(vm, address));
        let is_on = !will_stop && now.as_ref().is_some_and(|now| now.power_state == "poweredOn");
        let keeps = !is_on && !is_same;
        if wanted.is_some() && !keeps && given.as_ref().is_none_or(is_own) {
            let message = "the source runs: its address cannot be kept as long as it does; switch it off and retry, or say `mac: new`";
            return Err(Failure::fatal(Code::Conflict, message));
        }
        let nics = vm.or(now.as_ref()).map(|vm| vm.nics.as_slice()).unwrap_or_default();
        let old = |n: usize| nics.get(n).map(|nic| nic.mac.clone()).filter(|mac| keeps && !mac.is_empty());
        let mut addresses: Vec<Option<String>> = (0..count).map(old).collect();
        if let Some(given) = given {
            // No two cards bear it.
            addresses.iter_mut().filter(|mac| mac.as_ref().is_some_and(|mac| mac.eq_ignore_ascii_case(&given))).for_each(|mac| *mac = None);
            addresses[0] = Some(given);
        }
        Ok(addresses)
    }

    /// Whether addresses of the source may be another VM's now.
    pub(super) fn stays_off(&self, vm: &Vm, kept: &[&String]) -> Result<(), Failure> {
        let now = self.addresses(Some(vm), false)?;
        if kept.iter().all(|mac| now.iter().flatten().any(|now| now.eq_ignore_ascii_case(mac))) {
            return Ok(());
        }
        let message = "the source runs: its address cannot be kept as long as it does; switch it off and retry";
        Err(Failure::fatal(Code::Conflict, message))
    }
}

/// Whether one of a VM's cards has this address.
pub(super) fn has_address(vm: &Vm, address: &str) -> bool {
    vm.nics.iter().any(|nic| nic.mac.eq_ignore_ascii_case(address))
}

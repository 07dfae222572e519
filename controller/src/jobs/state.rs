//! What a job may ask of a VM's state: that it is shut down first (`power_off`), that its guest calms its file systems (`quiesce`).
//!
//! Owns: which of that fits the VM as the inventory shows it, and what is said of it. Never: switches anything: the agent looks again.
//! A crash here costs one answer.

use shared::error::Code;
use shared::options::{JobType, Options};
use shared::vm::Vm;

use super::service::clip;
use crate::http::reply::Error;

/// Checks the two options, and notes what will be other than one might think. `provider`: the connection's kind.
pub(super) fn check(kind: JobType, provider: &str, vm: &Vm, options: &Options, notes: &mut Vec<String>) -> Result<(), Error> {
    let (power_off, quiesce) = (options.power_off == Some(true), options.quiesce == Some(true));
    let name = clip(&vm.name);
    let refused = |code, message: String| Err(Error::new(code, message));
    let idle = |option: &str, why: &str| format!("{option} does nothing here: {why}");
    if power_off && options.warm.is_some() {
        let message = "a warm migration stops the VM by itself, for the last pass: leave `power_off` out, or `warm`";
        return refused(Code::Unprocessable, message.to_owned());
    }
    let why = match (provider, vm.power_state.as_str()) {
        ("local", _) => Some("a VM of a local connection is a folder of images and does not run".to_owned()),
        (_, "poweredOff") => Some(format!("{name} is off")),
        _ => None,
    };
    if let Some(why) = why {
        let given = [("power_off", power_off), ("quiesce", quiesce)];
        notes.extend(given.into_iter().filter(|(_, given)| *given).map(|(option, _)| idle(option, &why)));
        return Ok(());
    }
    let is_on = vm.power_state == "poweredOn";
    if !is_on && (power_off || quiesce) {
        let option = if power_off { "power_off" } else { "quiesce" };
        let message = format!("`{name}` is {}: its guest cannot be asked; resume it, or leave `{option}` out", vm.power_state);
        return refused(Code::Conflict, message);
    }
    let (tools, has_tools) = (tools(provider), vm.tools_status == "running");
    if power_off {
        if provider == "vsphere" && !has_tools {
            let message =
                format!("`{name}` cannot be asked to shut down, as {tools} not run in it: shut it down yourself, or leave `power_off` out");
            return refused(Code::Unprocessable, message);
        }
        notes.push(match kind {
            JobType::Migrate => {
                format!("{name} is running: it is shut down first, and switched on again unless the new VM stands in the end")
            }
            _ => format!("{name} is running: it is shut down first, and switched on again when the job has ended"),
        });
        if quiesce {
            notes.push(idle("quiesce", "the VM is shut down first"));
        }
    } else if quiesce && !has_tools {
        let message = format!(
            "`{name}` cannot be quiesced, as {tools} not run in it: install and start that, or leave `quiesce` out for a crash-consistent copy"
        );
        return refused(Code::Unprocessable, message);
    }
    Ok(())
}

/// What in the guest does it.
pub(crate) fn tools(provider: &str) -> &'static str {
    if provider == "vsphere" { "VMware Tools do" } else { "a guest agent (qemu-guest-agent, on a channel of its domain) does" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fits_the_state_is_taken_and_the_rest_is_said() {
        let vm = |power: &str, tools: &str| Vm { power_state: power.into(), tools_status: tools.into(), ..Vm::default() };
        let asked = |power_off, quiesce| Options { power_off: Some(power_off), quiesce: Some(quiesce), ..Options::default() };
        let ask = |kind, provider, vm: &Vm, options: &Options| {
            let mut notes = Vec::new();
            check(kind, provider, vm, options, &mut notes).map(|()| notes).map_err(|e| e.code())
        };
        let count = |provider, vm: &Vm, options: &Options| ask(JobType::Export, provider, vm, options).map(|notes| notes.len());
        let (on, off, suspended) = (vm("poweredOn", "running"), vm("poweredOff", "unknown"), vm("suspended", "running"));
        let mute = vm("poweredOn", "notRunning");
        assert_eq!(count("local", &off, &asked(true, true)), Ok(2));
        assert_eq!(count("libvirt", &off, &asked(false, true)), Ok(1));
        for provider in ["libvirt", "vsphere"] {
            assert_eq!(count(provider, &on, &asked(false, true)), Ok(0));
            assert_eq!(count(provider, &on, &asked(true, true)), Ok(2));
            assert_eq!(count(provider, &mute, &asked(false, true)), Err(Code::Unprocessable));
            assert_eq!(count(provider, &suspended, &asked(false, true)), Err(Code::Conflict));
            assert_eq!(count(provider, &suspended, &asked(true, false)), Err(Code::Conflict));
            assert_eq!(count(provider, &suspended, &asked(false, false)), Ok(0));
        }
        // A guest without an agent hears its power button.
        assert_eq!(count("libvirt", &mute, &asked(true, false)), Ok(1));
        assert_eq!(count("vsphere", &mute, &asked(true, false)), Err(Code::Unprocessable));
        let warm = Options { warm: Some(Default::default()), ..asked(true, false) };
        assert_eq!(ask(JobType::Migrate, "libvirt", &on, &warm), Err(Code::Unprocessable));
    }
}

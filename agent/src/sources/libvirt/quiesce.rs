//! A guest whose file systems are flushed and frozen by its agent, for as long as it takes to begin a backup job or to lay overlays.
//!
//! ```text
//! noted ─► domfsfreeze ─► backup-begin ─► domfsthaw ─► forgotten            crash anywhere: the reaper thaws what is noted
//!              └─ no: thawed all the same, the job fails: what was to be calm is never taken as it is
//! ```
//! Owns: that a guest that was frozen is thawed, and that nothing is called calm that was not frozen when it was taken. Never: freezes what is
//! not noted. A crash here leaves a frozen guest that the ledger names.
//! Source: virsh(1) domfsfreeze, domfsthaw; QEMU guest agent protocol.

use std::sync::PoisonError;
use std::time::{Duration, Instant};

use shared::error::Code;
use shared::vm::Vm;

use super::domain::Domain;
use super::hot::says_gone;
use super::virsh::{OPENING, Uri};
use super::{Libvirt, ON, ledger, told};
use crate::exec;
use crate::sources::{Consistency, Error, Touch};
use crate::touched::Touched;

/// How long a thaw is tried before it is left to the reaper, and between two tries.
const PATIENCE: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(250);
/// For how long an order to freeze may be on its way whose sender has died, milliseconds: libvirt waits 30 s for a busy agent.
const UNDERWAY: i64 = 40_000;
/// What would be right where a guest cannot be quiesced.
const INSTEAD: &str = "mend its guest agent (qemu-guest-agent), or leave `quiesce` out: that gives a crash-consistent copy";

/// How many file systems virsh says that it froze or thawed.
fn counted(said: &str) -> Option<u32> {
    said.split_whitespace().find_map(|word| word.parse().ok())
}

fn ask(uri: &Uri, command: &str, domain: &str) -> Result<u32, exec::Error> {
    let said = uri.ask_aloud(&[command, domain])?;
    counted(&said).ok_or_else(|| exec::Error::Failed(format!("{command} said {said:?}, which is no number of file systems")))
}

/// Whether these words say that no guest was asked: there is no way to one.
fn nobody_was_asked(words: &str) -> bool {
    let words = words.to_ascii_lowercase();
    ["agent is not configured", "agent is not connected", "agent is not available"].iter().any(|no| words.contains(no))
}

impl Libvirt {
    /// Takes the state of a domain that is on, by `act`; where that is asked, with its file systems frozen. Says what it was like.
    pub(super) fn calmly<T>(&self, found: &Domain, touch: &dyn Touch, act: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
        // A guest that is halted for the last pass was frozen before.
        let is_calm = touch.is_halted_calm().map_err(ledger)?;
        let freezes = touch.quiesces() && !is_calm;
        let vm = &found.vm;
        if freezes && vm.power_state != ON {
            let message = format!("{} is {}: its guest cannot be quiesced; resume it, or leave `quiesce` out", vm.name, vm.power_state);
            return Err(Error::fatal(Code::Unprocessable, message));
        }
        // First: a frozen guest waits for nobody's look at sizes.
        let nobody_asks = OPENING.write().unwrap_or_else(PoisonError::into_inner);
        let frozen = if freezes { Some(self.calm(vm, touch)?) } else { None };
        let done = act();
        drop(nobody_asks);
        let thawed = frozen.map(|frozen| self.wake(vm, touch).and_then(|thawed| was_calm(vm, frozen, thawed)));
        let done = done?;
        thawed.transpose()?;
        let is_calm = is_calm || frozen.is_some();
        touch.reads(if is_calm { Consistency::ApplicationConsistent } else { Consistency::CrashConsistent });
        if let Some(count) = frozen {
            touch.log(format!("{}: {count} file systems were frozen by its agent while its state was taken", vm.name));
        }
        Ok(done)
    }

    /// Has the guest flush and freeze its file systems; noted before. Where it does not, nothing stays frozen.
    pub(super) fn calm(&self, vm: &Vm, touch: &dyn Touch) -> Result<u32, Error> {
        touch.quiescing(true).map_err(ledger)?;
        let words = match ask(&self.uri, "domfsfreeze", &vm.id) {
            Ok(count @ 1..) => return Ok(count),
            Ok(0) => "its agent froze no file system".to_owned(),
            Err(e) => e.to_string(),
        };
        if nobody_was_asked(&words) || says_gone(&words) {
            touch.quiescing(false).map_err(ledger)?;
        } else if let Err(e) = self.wake(vm, touch) {
            touch.log(format!("{}; it is tried again", e.message));
        }
        Err(Error::fatal(Code::Unprocessable, format!("{} cannot be quiesced: {words}; {INSTEAD}", vm.name)))
    }

    /// Has the guest thaw its file systems; what does not succeed stays noted. Answers how many were frozen.
    fn wake(&self, vm: &Vm, touch: &dyn Touch) -> Result<u32, Error> {
        let end = Instant::now() + PATIENCE;
        loop {
            match ask(&self.uri, "domfsthaw", &vm.id) {
                Ok(count) => {
                    touch.quiescing(false).map_err(ledger)?;
                    return Ok(count);
                }
                Err(exec::Error::Failed(words)) if says_gone(&words) => {
                    touch.quiescing(false).map_err(ledger)?;
                    return Ok(0);
                }
                Err(e) if Instant::now() > end => {
                    let message = format!("{} cannot be thawed: {e}", vm.name);
                    return Err(Error { code: Code::BadGateway, message, retryable: true });
                }
                Err(_) => std::thread::sleep(PAUSE),
            }
        }
    }

    /// Thaws what an attempt has left frozen.
    pub(super) fn wake_left(&self, touched: &Touched) -> Result<(), Error> {
        let Some(at) = touched.quiesced_at else { return Ok(()) };
        let waited = shared::clock::now().timestamp_millis().saturating_sub(at);
        match ask(&self.uri, "domfsthaw", &touched.vm) {
            // It was not frozen, and may yet be.
            Ok(0) if (0..UNDERWAY).contains(&waited) => {
                let message = "whether a guest that was asked to freeze its file systems has done so is not known yet".to_owned();
                Err(Error { code: Code::Unavailable, message, retryable: true })
            }
            Ok(count) => {
                tracing::info!(vm = touched.vm, count, "a guest that was left frozen is thawed");
                Ok(())
            }
            Err(exec::Error::Failed(words)) if says_gone(&words) || words.contains("agent is not configured") => Ok(()),
            Err(e) => Err(told(e)),
        }
    }
}

/// A guest that had thawed by itself before its state was taken was not calm then.
fn was_calm(vm: &Vm, frozen: u32, thawed: u32) -> Result<(), Error> {
    if thawed >= frozen {
        return Ok(());
    }
    let message = format!(
        "{} froze {frozen} file systems and had {thawed} of them frozen when its state was taken: it had thawed by itself; {INSTEAD}",
        vm.name
    );
    Err(Error::fatal(Code::Unprocessable, message))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_frozen_is_counted_and_less_of_it_is_not_calm() {
        assert_eq!((counted("Froze 2 filesystem(s)\n"), counted("Thawed 0 filesystem(s)"), counted("")), (Some(2), Some(0), None));
        let vm = Vm::default();
        assert!(was_calm(&vm, 2, 2).is_ok() && was_calm(&vm, 2, 1).is_err() && was_calm(&vm, 1, 0).is_err());
        assert!(nobody_was_asked("error: argument unsupported: QEMU guest agent is not configured"));
        assert!(!nobody_was_asked("error: Guest agent is not responding: guest agent didn't respond"));
    }
}

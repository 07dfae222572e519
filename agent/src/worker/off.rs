//! A VM that is shut down before it is read, because somebody asked for that (`power_off`).
//!
//! ```text
//! noted ─► guest asked ─► off ─► read … ─► job ended ─► on again          a migration that ended well: it stays off
//!              └─ not off in time: the job fails, and nobody pulls the plug
//! ```
//! Owns: that a guest is asked, again and again, and that it is noted before. Never: switches a VM off that does not shut down by itself;
//! switches one on (`undo` of what is noted does). A crash here costs nothing: by the note the VM is switched on again.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use shared::error::Code;
use shared::options::Action;

use super::{End, Failure};
use crate::sources::{self, Source};
use crate::touched::{Halted, Pen};

/// How long a guest may take to shut down.
const SHUTDOWN: Duration = Duration::from_secs(120);
/// One that is just starting does not hear the first time.
const AGAIN: Duration = Duration::from_secs(15);
/// Between two looks whether it is off.
const LOOK: Duration = Duration::from_millis(500);

/// What its provider says to a question that a thread of its own waits for.
type Answer = Receiver<Result<(), sources::Error>>;

/// A VM, and who shuts it down.
pub(super) struct Subject<'a> {
    pub(super) source: &'a Arc<dyn Source>,
    pub(super) vm_id: &'a str,
    pub(super) pen: &'a Pen<'a>,
}

impl Subject<'_> {
    fn now(&self) -> Result<shared::vm::Vm, Failure> {
        let found = self.source.some(&BTreeSet::from([self.vm_id.to_owned()]))?;
        found.into_iter().next().ok_or_else(|| Failure::fatal(Code::NotFound, "the VM is not at its provider any more"))
    }

    /// Asks the guest, which may take its time to answer: nobody waits for that.
    fn ask(&self) -> Answer {
        let (source, vm_id, (tell, answer)) = (self.source.clone(), self.vm_id.to_owned(), channel());
        std::thread::spawn(move || tell.send(source.power(&vm_id, Action::Shutdown).map(drop)));
        answer
    }

    /// Shuts the VM down where it runs. Answers whether it is off for this job: then `halted` is noted of it. `says`: a line of the log;
    /// `stop`: none as long as the job goes on.
    pub(super) fn shut_down(&self, halted: &Halted, says: &dyn Fn(String), stop: &dyn Fn() -> Option<End>) -> Result<bool, End> {
        let ledger = |e: std::io::Error| Failure::io("the ledger", &e);
        // Nobody reads it meanwhile, which would end with it.
        self.pen.wait_for_vm().map_err(|e| Failure::io("waiting for the VM", &e))?;
        let vm = self.now()?;
        match vm.power_state.as_str() {
            "poweredOff" => {
                // Off for an earlier attempt, which could not be switched on again.
                let is_ours = self.pen.is_halting().map_err(ledger)?;
                says(format!("{} is off{}", vm.name, if is_ours { " since an earlier attempt" } else { " already: it stays off" }));
                return Ok(is_ours);
            }
            "poweredOn" => {}
            state => {
                let message =
                    format!("{} is {state}: its guest cannot be asked to shut down; resume it, or leave `power_off` out", vm.name);
                return Err(Failure::fatal(Code::Conflict, message).into());
            }
        }
        self.source.comes_back(self.vm_id).map_err(Failure::from)?;
        let asked_at = Some(shared::clock::now().timestamp_millis());
        self.pen.halting(Halted { asked_at, ..halted.clone() }).map_err(ledger)?;
        let what_then = if halted.uuid.is_empty() {
            "it is switched on again when the job has ended"
        } else {
            "it is switched on again unless the new VM stands"
        };
        says(format!("the guest of {} is asked to shut down; {what_then}", vm.name));
        let (began, mut times) = (Instant::now(), 0u32);
        let mut asked: Option<(Instant, Option<Answer>)> = None;
        while self.now()?.power_state != "poweredOff" {
            if let Some(end) = stop() {
                return Err(end);
            }
            if began.elapsed() > SHUTDOWN {
                let message = format!(
                    "{} did not shut down within {} s of being asked, and is not switched off hard: shut it down yourself and leave `power_off` \
                     out, or see to it that its guest reacts (ACPI, guest agent or VMware Tools)",
                    vm.name,
                    SHUTDOWN.as_secs()
                );
                return Err(Failure::fatal(Code::Unprocessable, message).into());
            }
            if asked.as_ref().is_none_or(|(at, answer)| answer.is_none() && at.elapsed() > AGAIN) {
                times += 1;
                asked = Some((Instant::now(), Some(self.ask())));
            }
            let answer = asked.as_mut().and_then(|(_, waits)| {
                let answer = waits.as_ref()?.recv_timeout(LOOK);
                if !matches!(answer, Err(RecvTimeoutError::Timeout)) {
                    *waits = None;
                }
                answer.ok()
            });
            match answer {
                // It went off meanwhile.
                None | Some(Ok(()) | Err(sources::Error { code: Code::Conflict, .. })) => {}
                Some(Err(e)) if e.retryable || times > 1 => says(format!("{}; it is asked again", e.message)),
                Some(Err(e)) => {
                    let message =
                        format!("{} cannot be asked to shut down: {}; shut it down yourself, or leave `power_off` out", vm.name, e.message);
                    return Err(Failure { message, ..Failure::from(e) }.into());
                }
            }
            std::thread::sleep(LOOK);
        }
        self.pen.halting(Halted { asked_at: None, ..halted.clone() }).map_err(ledger)?;
        says(format!("{} is off after {:.1} s", vm.name, began.elapsed().as_secs_f64()));
        Ok(true)
    }
}

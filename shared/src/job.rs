//! The job machine: which state follows which, and what is to be done about it.
//!
//! ```text
//!  queued{hold: none | not_before | carbon | paused | agent} ─assign→ running{preparing ▸ copying ▸ verifying ▸ syncing ▸ adapting ▸ deploying ▸ publishing} ─ok→ completed
//!    ▲      ▲            │ lease lost or parked: checkpoint kept, next assign raises the epoch; strikes spent → failed ─retry→ queued
//!    │      └─ pause ────┤
//!    └─ hold: carbon ────┘     any live state before publishing ─cancel→ cancelling ─stopped│lease lost→ cancelled
//!
//!  hold none | agent ─hold→ not_before | carbon ─release, resume→ none        paused stands above them: neither hold nor release moves it
//! ```
//!
//! Owns: [`step`], pure and total: no clock, no I/O, no randomness. Effects are data; the queue carries them out after the store has committed.
//! Never: trusts a message: one that carries another epoch or comes from another agent is refused and its sender told to stop.
//! A crash here costs nothing: the state is what the store says, and every event may come twice.

use serde::{Deserialize, Serialize};

/// Attempts in a row that brought nothing new onto the disk before a job fails for good.
pub const STRIKES: u32 = 5;

macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $word:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum $name { $($(#[$vdoc])* $variant,)* }
        impl $name {
            /// Every word.
            pub const ALL: &[&str] = &[$($word,)*];
            /// The word in the store and on the wire.
            pub fn word(self) -> &'static str { match self { $($name::$variant => $word,)* } }
            /// The variant of a word.
            pub fn from_word(word: &str) -> Option<Self> { match word { $($word => Some($name::$variant),)* _ => None } }
        }
    };
}

words! {
    /// Where a job stands.
    Status {
        /// Waits for its turn, for an agent or for a person.
        Queued = "queued",
        /// An agent works on it.
        Running = "running",
        /// The agent was told to stop; to the API still `running`, with stage `cancelling`.
        Cancelling = "cancelling",
        /// Published and proven.
        Completed = "completed",
        /// Ended with an error.
        Failed = "failed",
        /// Ended by a person.
        Cancelled = "cancelled",
    }
}

impl Status {
    /// Nothing follows any more, but for a retry.
    pub fn is_final(self) -> bool {
        matches!(self, Status::Completed | Status::Failed | Status::Cancelled)
    }

    /// As the API shows it: the five words of the contract.
    pub fn public(self) -> &'static str {
        match self {
            Status::Cancelling => "running",
            other => other.word(),
        }
    }
}

words! {
    /// Why a queued job is not given out.
    Hold {
        /// Nothing holds it.
        None = "none",
        /// Its time has not come.
        NotBefore = "not_before",
        /// It waits for a cleaner grid.
        Carbon = "carbon",
        /// A person paused it.
        Paused = "paused",
        /// It hangs on an agent that is away: its source or its half-written output lies there.
        Agent = "agent",
    }
}

words! {
    /// What a running job does.
    Stage {
        /// Opening the source, checking space.
        Preparing = "preparing",
        /// Bytes move.
        Copying = "copying",
        /// The output is read back.
        Verifying = "verifying",
        /// What a VM that runs has changed since follows, pass by pass, until it is stopped for the last one.
        Syncing = "syncing",
        /// The guest is made ready for its new hardware.
        Adapting = "adapting",
        /// The guest proves that it boots, before it is given its place.
        Deploying = "deploying",
        /// Commit is granted: the agent renames.
        Publishing = "publishing",
    }
}

/// The durable state of a job.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct State {
    /// Where it stands.
    pub status: Status,
    /// Why it waits, while queued.
    pub hold: Hold,
    /// What it does, while running.
    pub stage: Stage,
    /// Number of the assignment; every message about it carries this.
    pub epoch: u64,
    /// Attempts begun.
    pub attempt: u32,
    /// Attempts in a row that brought nothing new onto the disk.
    pub strikes: u32,
    /// The agent it is with, or was with last; its half-written output lies there.
    pub agent: Option<String>,
    /// Durable plus verified bytes at the last loss, to tell whether an attempt brought something.
    pub mark: u64,
}

impl State {
    /// A new job.
    pub fn queued() -> Self {
        Self { status: Status::Queued, hold: Hold::None, stage: Stage::Preparing, epoch: 0, attempt: 0, strikes: 0, agent: None, mark: 0 }
    }

    /// Commit was granted and neither published nor failed: only that agent may finish it, and nobody may cancel it.
    pub fn is_publishing(&self) -> bool {
        self.status == Status::Running && self.is_granted()
    }

    /// As `is_publishing`, also while the agent that got the grant is away.
    pub fn is_granted(&self) -> bool {
        self.stage == Stage::Publishing && !self.status.is_final()
    }

    /// The stage as the API shows it.
    pub fn public_stage(&self) -> &'static str {
        match (self.status, self.hold) {
            (Status::Queued, Hold::None) => "queued",
            (Status::Queued, Hold::NotBefore) => "not_before",
            (Status::Queued, Hold::Carbon) => "carbon",
            (Status::Queued, Hold::Paused) => "paused",
            (Status::Queued, Hold::Agent) => "waiting",
            (Status::Running, _) => self.stage.word(),
            (Status::Cancelling, _) => "cancelling",
            (other, _) => other.word(),
        }
    }
}

/// How an agent ended an assignment.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// Published.
    Completed,
    /// Cannot be done; `retryable` when the same might work a moment later.
    Failed {
        /// Whether to try again by ourselves.
        retryable: bool,
    },
    /// Stopped because it was told to, nothing left behind.
    Cancelled,
    /// Stopped with its checkpoint kept (drain, lost contact).
    Parked,
}

/// What happened. `bytes` is durable plus verified as last known.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// The queue gives it to an agent.
    Assign {
        /// To whom.
        agent: String,
    },
    /// The agent entered a stage.
    Staged {
        /// Its assignment.
        epoch: u64,
        /// Who says so.
        agent: String,
        /// Which.
        stage: Stage,
    },
    /// The agent asks whether it may publish.
    CommitRequested {
        /// Its assignment.
        epoch: u64,
        /// Who asks.
        agent: String,
    },
    /// The agent ended the assignment.
    Finished {
        /// Its assignment.
        epoch: u64,
        /// Who says so.
        agent: String,
        /// How.
        outcome: Outcome,
        /// Bytes safe by then.
        bytes: u64,
    },
    /// The agent was silent too long, or came back as a new process without the job.
    LeaseLost {
        /// The assignment that was lost.
        epoch: u64,
        /// Bytes safe by then.
        bytes: u64,
    },
    /// The agent it waits for is back (`true`) or away (`false`).
    AgentHere(bool),
    /// A person cancels.
    Cancel,
    /// A person wants another try.
    Retry,
    /// A person pauses.
    Pause,
    /// A person lets it go on; a job that waits for its time or for the grid goes on at once.
    Resume,
    /// Its time has not come (`NotBefore`), or the grid is dirty (`Carbon`, which parks a job that runs).
    Hold(Hold),
    /// Its time has come, or the grid is clean.
    Release,
}

/// What the queue must do after the new state is committed.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Effect {
    /// Send the assignment with the state's epoch to the state's agent.
    SendAssign,
    /// Tell that agent to stop and clean up.
    SendCancel,
    /// Tell that agent to stop and keep its checkpoint.
    SendPark,
    /// Tell it that it may publish.
    GrantCommit,
    /// Tell the sender that its report is in: it may forget the job.
    Acknowledge,
    /// Look for work to give out.
    Dispatch,
    /// Tell the watchers: the job's public state changed.
    Announce,
}

/// Why an event does not fit.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The message belongs to an assignment that is over: its sender must stop.
    #[error("assignment {got} is over; the current one is {current}")]
    Fenced {
        /// The message's epoch.
        got: u64,
        /// The job's.
        current: u64,
    },
    /// The state does not allow it.
    #[error("a job that is {stage} cannot be {verb}")]
    Illegal {
        /// The job's public stage.
        stage: &'static str,
        /// What was asked.
        verb: &'static str,
    },
}

/// The next state and what to do about it. The same event twice is answered the same way or refused; it never moves a job back.
pub fn step(state: &State, event: &Event) -> Result<(State, Vec<Effect>), Refusal> {
    let mut next = state.clone();
    let illegal = |verb| Err(Refusal::Illegal { stage: state.public_stage(), verb });
    let effects = match event {
        Event::Assign { agent } => {
            if state.status != Status::Queued || state.hold != Hold::None {
                return illegal("assigned");
            }
            if state.is_granted() && state.agent.as_ref() != Some(agent) {
                return illegal("given to another agent");
            }
            next.status = Status::Running;
            // What was granted stays granted: its agent may have renamed already.
            next.stage = if state.is_granted() { Stage::Publishing } else { Stage::Preparing };
            next.epoch += 1;
            next.attempt += 1;
            next.agent = Some(agent.clone());
            vec![Effect::SendAssign, Effect::Announce]
        }
        Event::Staged { epoch, agent, stage } => {
            fence(state, *epoch, agent)?;
            if state.status != Status::Running || *stage <= state.stage || *stage == Stage::Publishing {
                return Ok((next, vec![]));
            }
            next.stage = *stage;
            vec![Effect::Announce]
        }
        Event::CommitRequested { epoch, agent } => {
            fence(state, *epoch, agent)?;
            if state.status != Status::Running {
                return illegal("published");
            }
            if state.is_publishing() {
                return Ok((next, vec![Effect::GrantCommit]));
            }
            next.stage = Stage::Publishing;
            vec![Effect::GrantCommit, Effect::Announce]
        }
        Event::Finished { epoch, agent, outcome, bytes } => {
            // A report that comes again after the job ended is acknowledged again, so that its sender can forget it.
            if state.status.is_final() && state.epoch == *epoch && state.agent.as_ref() == Some(agent) {
                return Ok((next, vec![Effect::Acknowledge]));
            }
            fence(state, *epoch, agent)?;
            finished(&mut next, outcome, *bytes)?;
            vec![Effect::Acknowledge, Effect::Announce, Effect::Dispatch]
        }
        Event::LeaseLost { epoch, bytes } => {
            if state.epoch != *epoch || !matches!(state.status, Status::Running | Status::Cancelling) {
                return Err(Refusal::Fenced { got: *epoch, current: state.epoch });
            }
            lost(&mut next, *bytes, true);
            vec![Effect::Announce, Effect::Dispatch]
        }
        Event::AgentHere(here) => {
            if state.status != Status::Queued || !matches!(state.hold, Hold::None | Hold::Agent) {
                return Ok((next, vec![]));
            }
            next.hold = if *here { Hold::None } else { Hold::Agent };
            if next.hold == state.hold {
                return Ok((next, vec![]));
            }
            if *here { vec![Effect::Announce, Effect::Dispatch] } else { vec![Effect::Announce] }
        }
        Event::Cancel => match state.status {
            Status::Queued if !state.is_granted() => {
                next.status = Status::Cancelled;
                next.hold = Hold::None;
                vec![Effect::SendCancel, Effect::Announce]
            }
            Status::Running if !state.is_publishing() => {
                next.status = Status::Cancelling;
                vec![Effect::SendCancel, Effect::Announce]
            }
            Status::Cancelling => vec![],
            _ => return illegal("cancelled"),
        },
        Event::Retry => {
            if !matches!(state.status, Status::Failed | Status::Cancelled) {
                return illegal("retried");
            }
            next.status = Status::Queued;
            next.hold = Hold::None;
            next.stage = Stage::Preparing;
            next.strikes = 0;
            vec![Effect::Announce, Effect::Dispatch]
        }
        Event::Pause => match state.status {
            Status::Queued if state.hold == Hold::Paused => vec![],
            Status::Queued if !state.is_granted() => {
                next.hold = Hold::Paused;
                vec![Effect::Announce]
            }
            Status::Running if !state.is_publishing() => {
                // The epoch stays until the next assignment; the fence is the status: what the agent still sends is refused.
                next.status = Status::Queued;
                next.hold = Hold::Paused;
                vec![Effect::SendPark, Effect::Announce]
            }
            _ => return illegal("paused"),
        },
        Event::Resume => {
            if state.status != Status::Queued || matches!(state.hold, Hold::None | Hold::Agent) {
                return illegal("resumed");
            }
            next.hold = Hold::None;
            vec![Effect::Announce, Effect::Dispatch]
        }
        Event::Hold(hold) => match (state.status, hold) {
            (Status::Queued, Hold::NotBefore | Hold::Carbon) if !state.is_granted() => {
                if state.hold == Hold::Paused || state.hold == *hold {
                    return Ok((next, vec![]));
                }
                next.hold = *hold;
                vec![Effect::Announce]
            }
            (Status::Running, Hold::Carbon) if !state.is_publishing() => {
                next.status = Status::Queued;
                next.hold = Hold::Carbon;
                vec![Effect::SendPark, Effect::Announce]
            }
            _ => return illegal("held"),
        },
        Event::Release => {
            if state.status != Status::Queued || !matches!(state.hold, Hold::NotBefore | Hold::Carbon) {
                return Ok((next, vec![]));
            }
            next.hold = Hold::None;
            vec![Effect::Announce, Effect::Dispatch]
        }
    };
    Ok((next, effects))
}

/// Refuses what does not come from the current assignment.
fn fence(state: &State, epoch: u64, agent: &str) -> Result<(), Refusal> {
    let live = matches!(state.status, Status::Running | Status::Cancelling);
    if !live || state.epoch != epoch || state.agent.as_deref() != Some(agent) {
        return Err(Refusal::Fenced { got: epoch, current: state.epoch });
    }
    Ok(())
}

fn finished(next: &mut State, outcome: &Outcome, bytes: u64) -> Result<(), Refusal> {
    match outcome {
        // The rename is done only after the grant, so a publication without one is an agent's defect.
        Outcome::Completed if next.is_publishing() => next.status = Status::Completed,
        Outcome::Completed => return Err(Refusal::Illegal { stage: next.public_stage(), verb: "completed before its commit was granted" }),
        Outcome::Cancelled if next.status == Status::Cancelling => next.status = Status::Cancelled,
        Outcome::Cancelled => lost(next, bytes, true),
        Outcome::Failed { .. } if next.status == Status::Cancelling => next.status = Status::Cancelled,
        Outcome::Failed { retryable: true } => lost(next, bytes, true),
        Outcome::Failed { retryable: false } => next.status = Status::Failed,
        Outcome::Parked => lost(next, bytes, false),
    }
    Ok(())
}

/// The assignment is over without an end: back into the queue with the checkpoint kept, or failed when nothing came of it too often.
fn lost(next: &mut State, bytes: u64, counts: bool) {
    if next.status == Status::Cancelling {
        next.status = Status::Cancelled;
        return;
    }
    // What was granted stays with that agent: it alone knows whether the rename happened, so strikes do not fail it.
    let publishing = next.is_publishing();
    let brought_something = bytes > next.mark;
    next.mark = next.mark.max(bytes);
    next.strikes = if brought_something || publishing { 0 } else { next.strikes + u32::from(counts) };
    next.status = if next.strikes >= STRIKES { Status::Failed } else { Status::Queued };
    next.hold = Hold::None;
}

/// What must hold of every state; checked by the queue in debug builds, by the model test and by the survival tests.
pub fn invariant(state: &State) -> Result<(), String> {
    if matches!(state.status, Status::Running | Status::Cancelling) && (state.agent.is_none() || state.epoch == 0) {
        return Err(format!("{state:?} is live without an agent or an epoch"));
    }
    if u64::from(state.attempt) != state.epoch {
        return Err(format!("{state:?}: an attempt is an epoch"));
    }
    if state.status != Status::Queued && state.hold != Hold::None {
        return Err(format!("{state:?} holds though it is not queued"));
    }
    if state.status == Status::Cancelling && state.stage == Stage::Publishing {
        return Err(format!("{state:?}: what is granted cannot be cancelled"));
    }
    Ok(())
}

#[cfg(test)]
mod tests;

//! Consoles: the bytes of a VM's screen and keys between an agent and whoever looks, through this controller.
//!
//! ```text
//! open ─► id, waiting ─► OpenConsole (Session) ─► the agent's Console ─► take: asked for by this id, of this agent? ─► Remote
//!
//!   agent ─► [2 pieces] ─► viewer           the first end decides: viewer left ▸ VM closed ▸ agent away ▸ not read ▸ not allowed ▸ drain
//!   agent ◄─ [2 pieces ◄ 16] ◄─ viewer
//! ```
//! Owns: the ids that are waited for (each good once, for one agent), how many consoles a VM and an agent have open, why one has ended.
//! Never: looks at what is shown or typed, holds more than the queues above: a viewer that is slow slows its own console down, nothing else.
//! A crash here costs the viewers; no VM notices.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use actix_web::web::Bytes;
use proto::v1::console_piece::Kind;
use proto::v1::controller_message::Kind as ToAgent;
use proto::v1::{Connection, ConsolePiece, Failure, OpenConsole};
use shared::error::Code;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::registry::Handle;
use crate::http::reply::Error;
use crate::jobs::core::Outbox;

/// Consoles of one VM; QEMU itself takes 32 viewers.
pub const OF_A_VM: usize = 8;
/// Consoles that one agent has open at a time.
pub const OF_AN_AGENT: usize = 64;
/// Pieces between an agent's stream and the viewer.
const AHEAD: usize = 2;
/// Frames of a viewer that wait for the agent.
const TYPED: usize = 16;
/// Most bytes of a piece.
const PIECE: usize = 256 << 10;
/// How long an agent has to open the screen: it asks libvirt twice and dials.
const BEGIN: Duration = Duration::from_secs(20);
/// How long an agent that calls has for its first piece.
const FIRST: Duration = Duration::from_secs(10);
/// How long either side has to take the next piece before it counts as gone.
const PATIENCE: Duration = Duration::from_secs(60);

/// Who ended a console.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The viewer left.
    Viewer,
    /// The VM closed its screen.
    Vm,
    /// The agent, or the way to it.
    Agent,
    /// This controller, as the viewer may not go on or does not read.
    Refused,
    /// This controller goes away.
    Controller,
}

/// How a console has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// Who did it.
    pub side: Side,
    /// Why, for the viewer and for the audit.
    pub why: String,
}

impl Ended {
    /// An end.
    pub fn new(side: Side, why: impl Into<String>) -> Self {
        Self { side, why: why.into() }
    }
}

/// What is known of an open console: how much went through, and whether it has ended.
pub struct Line {
    ended: watch::Sender<Option<Ended>>,
    shown: AtomicU64,
    typed: AtomicU64,
    _seat: Seat,
}

impl Line {
    fn new(seat: Seat) -> Arc<Self> {
        Arc::new(Self { ended: watch::Sender::new(None), shown: AtomicU64::new(0), typed: AtomicU64::new(0), _seat: seat })
    }

    /// Ends it; the first reason stands.
    pub fn end(&self, ended: Ended) {
        self.ended.send_if_modified(|now| {
            let is_first = now.is_none();
            if is_first {
                *now = Some(ended);
            }
            is_first
        });
    }

    /// Waits for its end.
    pub async fn ended(&self) -> Ended {
        let mut watched = self.ended.subscribe();
        // The sender lives as long as this.
        let ended = watched.wait_for(Option::is_some).await.ok().and_then(|ended| ended.clone());
        ended.unwrap_or_else(|| Ended::new(Side::Viewer, "it was left"))
    }

    /// Why it has ended, where it has.
    pub fn reason(&self) -> Option<Ended> {
        self.ended.borrow().clone()
    }

    /// Bytes that came from the VM, and that went to it.
    pub fn moved(&self) -> (u64, u64) {
        (self.shown.load(Ordering::Relaxed), self.typed.load(Ordering::Relaxed))
    }
}

/// An open console. Dropping it ends it.
pub struct Remote {
    /// What the VM shows.
    pub shown: mpsc::Receiver<Bytes>,
    /// What is typed.
    pub typed: mpsc::Sender<Bytes>,
    /// What is known of it.
    pub line: Arc<Line>,
}

struct Waiting {
    agent: String,
    line: Arc<Line>,
    taken: oneshot::Sender<Result<Remote, Failure>>,
}

/// Agent, and VM as `CONNECTION:ID`.
type Key = (String, String);

/// How many consoles are open, by VM.
#[derive(Default)]
struct Seats(Mutex<HashMap<Key, usize>>);

impl Seats {
    fn locked(&self) -> MutexGuard<'_, HashMap<Key, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A console's seat, or the words for who is full.
    fn take(self: &Arc<Self>, agent: &str, vm: &str) -> Result<Seat, String> {
        let mut open = self.locked();
        let of_agent: usize = open.iter().filter(|((of, _), _)| of == agent).map(|(_, count)| *count).sum();
        if of_agent >= OF_AN_AGENT {
            return Err(format!("the agent has {OF_AN_AGENT} consoles open already"));
        }
        let key = (agent.to_owned(), vm.to_owned());
        let count = open.entry(key.clone()).or_default();
        if *count >= OF_A_VM {
            return Err(format!("{OF_A_VM} consoles of this VM are open already"));
        }
        *count += 1;
        Ok(Seat { seats: self.clone(), key })
    }
}

/// One of the places; it is free again when this goes.
struct Seat {
    seats: Arc<Seats>,
    key: Key,
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut open = self.seats.locked();
        if let Some(count) = open.get_mut(&self.key) {
            *count -= 1;
            if *count == 0 {
                open.remove(&self.key);
            }
        }
    }
}

/// The consoles of this controller.
pub(super) struct Table {
    waiting: Mutex<HashMap<u64, Waiting>>,
    seats: Arc<Seats>,
    closing: watch::Sender<bool>,
}

impl Default for Table {
    fn default() -> Self {
        Self { waiting: Mutex::default(), seats: Arc::default(), closing: watch::Sender::new(false) }
    }
}

impl Table {
    fn waiting(&self) -> MutexGuard<'_, HashMap<u64, Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends all of them, for the drain.
    pub(super) fn close(&self) {
        self.closing.send_replace(true);
    }

    /// The console of this id, when it is this agent's to answer. From now on nobody else's.
    fn claim(&self, id: u64, agent: &str) -> Result<Waiting, Status> {
        let mut waiting = self.waiting();
        match waiting.get(&id) {
            None => Err(Status::not_found("nobody waits for this console: its id was used, or its time ran out")),
            Some(wanted) if wanted.agent != agent => Err(Status::permission_denied("this console was asked of another agent")),
            Some(_) => waiting.remove(&id).ok_or_else(|| Status::not_found("nobody waits for this console")),
        }
    }
}

/// Forgets an id when its asker leaves.
struct Forget<'a>(&'a Table, u64);

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        self.0.waiting().remove(&self.1);
    }
}

/// Has an agent open the screen of a VM.
///
/// # Errors
/// 503 where the agent is away or too many are open, 502 where it does not begin in 20 s, else the agent's own code and words.
pub async fn open(registry: &Handle, agent: &str, connection: Connection, vm_id: &str) -> Result<Remote, Error> {
    let name = registry.name(agent);
    let table = registry.consoles();
    let full = |why: String| Error::new(Code::Unavailable, format!("{why}; close one")).retry_after(5);
    let seat = table.seats.take(agent, &format!("{}:{vm_id}", connection.name)).map_err(full)?;
    let (taken, begun) = oneshot::channel();
    let id = rand::random::<u64>();
    table.waiting().insert(id, Waiting { agent: agent.to_owned(), line: Line::new(seat), taken });
    let _forget = Forget(table, id);
    let message = OpenConsole { id, connection: Some(connection), vm_id: vm_id.to_owned() };
    if !registry.send(agent, ToAgent::OpenConsole(message)) {
        return Err(Error::new(Code::Unavailable, format!("agent `{name}` is not connected")).retry_after(5));
    }
    match tokio::time::timeout(BEGIN, begun).await {
        Ok(Ok(Ok(remote))) => Ok(remote),
        Ok(Ok(Err(failure))) => Err(Error::new(Code::from_word(&failure.code).unwrap_or(Code::BadGateway), failure.message)),
        Ok(Err(_)) => Err(Error::new(Code::BadGateway, format!("agent `{name}` broke the console off before it began"))),
        Err(_) => Err(Error::new(Code::BadGateway, format!("agent `{name}` did not open the console in {} s", BEGIN.as_secs()))),
    }
}

/// What goes to an agent.
pub(super) type ToScreen = ReceiverStream<Result<ConsolePiece, Status>>;

/// An agent's Console call: joins it with whoever waits for it.
pub(super) async fn take(table: &Table, agent: (&str, &str), mut pieces: Streaming<ConsolePiece>) -> Result<ToScreen, Status> {
    let (id, name) = agent;
    let first = tokio::time::timeout(FIRST, pieces.message()).await.map_err(|_| Status::deadline_exceeded("no first piece"))??;
    let first = first.ok_or_else(|| Status::invalid_argument("the first piece says which console it is of"))?;
    let Waiting { line, taken, .. } = table.claim(first.id, id)?;
    let left = || Status::cancelled("whoever asked has left");
    let (out, to_agent) = mpsc::channel(AHEAD);
    match first.kind {
        Some(Kind::Opened(_)) => {
            let (show, shown) = mpsc::channel(AHEAD);
            let (typed, keys) = mpsc::channel(TYPED);
            taken.send(Ok(Remote { shown, typed, line: line.clone() })).map_err(|_| left())?;
            let mut closing = table.closing.subscribe();
            let away = Ended::new(Side::Agent, format!("the agent `{name}` went away"));
            tokio::spawn(async move {
                let ended = tokio::select! {
                    ended = show_all(&mut pieces, &show, &line, &away) => ended,
                    ended = type_all(keys, &out, &line, &away) => ended,
                    ended = line.ended() => ended,
                    _ = closing.wait_for(|closing| *closing) => Ended::new(Side::Controller, "the controller goes away"),
                };
                // Before the queues close: who finds them closed asks why.
                line.end(ended);
            });
        }
        Some(Kind::Failed(failure)) => taken.send(Err(failure)).map_err(|_| left())?,
        _ => return Err(Status::invalid_argument("the first piece of a console is `opened` or `failed`")),
    }
    Ok(ReceiverStream::new(to_agent))
}

async fn show_all(pieces: &mut Streaming<ConsolePiece>, show: &mpsc::Sender<Bytes>, line: &Line, away: &Ended) -> Ended {
    let left = || Ended::new(Side::Viewer, "the viewer has left");
    loop {
        let piece = tokio::select! {
            piece = pieces.message() => piece,
            () = show.closed() => return left(),
        };
        match piece {
            Ok(Some(ConsolePiece { kind: Some(Kind::Data(bytes)), .. })) if bytes.len() <= PIECE => {
                line.shown.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                match show.send_timeout(bytes, PATIENCE).await {
                    Ok(()) => {}
                    Err(mpsc::error::SendTimeoutError::Closed(_)) => return left(),
                    Err(mpsc::error::SendTimeoutError::Timeout(_)) => {
                        return Ended::new(Side::Refused, format!("the viewer took nothing for {} s", PATIENCE.as_secs()));
                    }
                }
            }
            Ok(Some(ConsolePiece { kind: Some(Kind::Failed(failure)), .. })) => return Ended::new(Side::Agent, failure.message),
            Ok(Some(ConsolePiece { kind: Some(Kind::Data(_)), .. })) => return Ended::new(Side::Agent, "the agent sent too large a piece"),
            Ok(Some(_)) => {}
            Ok(None) => return Ended::new(Side::Vm, "the VM closed its screen: it is off, or its VNC has ended"),
            Err(_) => return away.clone(),
        }
    }
}

async fn type_all(mut keys: mpsc::Receiver<Bytes>, out: &mpsc::Sender<Result<ConsolePiece, Status>>, line: &Line, away: &Ended) -> Ended {
    while let Some(bytes) = keys.recv().await {
        let length = bytes.len() as u64;
        match out.send_timeout(Ok(ConsolePiece { id: 0, kind: Some(Kind::Data(bytes)) }), PATIENCE).await {
            Ok(()) => {}
            Err(mpsc::error::SendTimeoutError::Closed(_)) => return away.clone(),
            // As long as nothing is taken nothing is read of the viewer either, and nobody would see it leave.
            Err(mpsc::error::SendTimeoutError::Timeout(_)) => {
                return Ended::new(Side::Vm, format!("the VM took nothing for {} s", PATIENCE.as_secs()));
            }
        }
        line.typed.fetch_add(length, Ordering::Relaxed);
    }
    Ended::new(Side::Viewer, "the viewer has left")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn seats_are_counted_by_vm_and_by_agent_and_come_back() {
        let seats = Arc::new(Seats::default());
        let mut held: Vec<Seat> = (0..OF_A_VM).map(|_| seats.take("agent-1", "kvm:a").unwrap()).collect();
        assert!(seats.take("agent-1", "kvm:a").err().unwrap().contains("this VM"));
        assert!(seats.take("agent-2", "kvm:a").is_ok() && seats.take("agent-1", "kvm:b").is_ok());
        held.pop();
        held.push(seats.take("agent-1", "kvm:a").unwrap());
        for n in 0..OF_AN_AGENT - OF_A_VM {
            held.push(seats.take("agent-1", &format!("kvm:{n}")).unwrap());
        }
        assert!(seats.take("agent-1", "kvm:c").err().unwrap().contains("the agent"));
        held.clear();
        assert!(seats.locked().is_empty());
    }

    #[tokio::test]
    async fn an_id_is_good_once_and_for_one_agent() {
        let table = Table::default();
        let line = Line::new(table.seats.take("agent-1", "kvm:a").unwrap());
        let (taken, _begun) = oneshot::channel();
        table.waiting().insert(7, Waiting { agent: "agent-1".to_owned(), line, taken });
        assert_eq!(table.claim(8, "agent-1").err().unwrap().code(), tonic::Code::NotFound);
        assert_eq!(table.claim(7, "agent-2").err().unwrap().code(), tonic::Code::PermissionDenied);
        assert!(table.claim(7, "agent-1").is_ok());
        assert_eq!(table.claim(7, "agent-1").err().unwrap().code(), tonic::Code::NotFound);
    }

    #[tokio::test]
    async fn the_first_end_stands() {
        let line = Line::new(Arc::new(Seats::default()).take("agent-1", "kvm:a").unwrap());
        line.end(Ended::new(Side::Vm, "first"));
        line.end(Ended::new(Side::Viewer, "second"));
        assert_eq!(line.ended().await, Ended::new(Side::Vm, "first"));
        assert_eq!(line.reason().unwrap().why, "first");
    }
}

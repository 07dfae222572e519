//! Bytes between agents and whoever asks for them, through this controller, without a byte of them on its disk.
//!
//! ```text
//! fetch ─► id, waiting ─► Fetch (Session) ─► the agent's Transfer ─► take: is it asked for by this id, of this agent? ─► [2 pieces] ─► Remote
//! ```
//! Owns: the ids that are waited for (each good once, for one agent, for ten seconds), how many transfers an agent has at a time.
//! Never: holds more than two pieces of a transfer: a reader that is slow slows the agent's disk down, nothing else.
//! A crash here costs the transfers; whoever downloads asks for the rest.

use std::collections::HashMap;
use std::fs::File;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use actix_web::web::Bytes;
use proto::v1::controller_message::Kind as ToAgent;
use proto::v1::piece::Kind;
use proto::v1::{Failure, Fetch, Opened, Piece, TransferReply};
use shared::error::Code;
use shared::vault;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tonic::{Status, Streaming};

use super::registry::Handle;
use crate::http::reply::Error;
use crate::jobs::core::Outbox;

/// Transfers that one agent serves at a time.
const AT_ONCE: usize = 24;
/// Pieces between the agent's stream and the reader.
const AHEAD: usize = 2;
/// Bytes of a piece that goes to an agent.
const CHUNK: usize = 256 << 10;
/// How long an agent has to begin.
const BEGIN: Duration = Duration::from_secs(10);
/// How long it has for the next piece.
const STALL: Duration = Duration::from_secs(60);
/// How long a reader has for the next piece before it counts as gone.
const READER: Duration = Duration::from_secs(300);

/// A piece of a file at an agent, as it comes.
pub struct Remote {
    /// The bytes that were asked for, all of them or an error at the end. Dropping it stops the agent.
    pub bytes: mpsc::Receiver<Result<Bytes, Error>>,
    _turn: OwnedSemaphorePermit,
}

/// What is waited for.
struct Waiting {
    agent: String,
    length: u64,
    taken: oneshot::Sender<Begun>,
}

type Begun = Result<mpsc::Receiver<Result<Bytes, Error>>, Failure>;

/// The transfers of this controller.
#[derive(Default)]
pub(super) struct Table {
    waiting: Mutex<HashMap<u64, Waiting>>,
    turns: Mutex<HashMap<String, Arc<Semaphore>>>,
}

impl Table {
    fn waiting(&self) -> std::sync::MutexGuard<'_, HashMap<u64, Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A transfer's turn at an agent; none where it has its hands full.
    fn turn(&self, agent: &str) -> Option<OwnedSemaphorePermit> {
        let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
        turns.entry(agent.to_owned()).or_insert_with(|| Arc::new(Semaphore::new(AT_ONCE))).clone().try_acquire_owned().ok()
    }

    /// The transfer of this id, when it is this agent's to answer. From now on nobody else's.
    fn claim(&self, id: u64, agent: &str) -> Result<Waiting, Status> {
        let mut waiting = self.waiting();
        match waiting.get(&id) {
            None => Err(Status::not_found("nobody waits for this transfer: its id was used, or its time ran out")),
            Some(wanted) if wanted.agent != agent => Err(Status::permission_denied("this transfer was asked of another agent")),
            Some(_) => waiting.remove(&id).ok_or_else(|| Status::not_found("nobody waits for this transfer")),
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

/// Asks an agent for `length` bytes of a file from `offset`. `version`, where it is not empty, is what the file must still be.
///
/// # Errors
/// 503 where the agent is away or busy, 502 where it does not begin in 10 s, else the agent's own code and words.
pub async fn fetch(registry: &Handle, agent: &str, path: &str, offset: u64, length: u64, version: &str) -> Result<Remote, Error> {
    let name = registry.name(agent);
    let table = registry.transfers();
    let busy = || Error::new(Code::Unavailable, format!("agent `{name}` serves {AT_ONCE} transfers already")).retry_after(2);
    let turn = table.turn(agent).ok_or_else(busy)?;
    let (taken, begun) = oneshot::channel();
    let id = rand::random::<u64>();
    table.waiting().insert(id, Waiting { agent: agent.to_owned(), length, taken });
    let _forget = Forget(table, id);
    let message = Fetch { id, path: path.to_owned(), offset, length, version: version.to_owned() };
    if !registry.send(agent, ToAgent::Fetch(message)) {
        return Err(Error::new(Code::Unavailable, format!("agent `{name}` is not connected")).retry_after(5));
    }
    match tokio::time::timeout(BEGIN, begun).await {
        Ok(Ok(Ok(bytes))) => Ok(Remote { bytes, _turn: turn }),
        Ok(Ok(Err(failure))) => Err(told(failure)),
        Ok(Err(_)) => Err(Error::new(Code::BadGateway, format!("agent `{name}` broke the transfer off before it began"))),
        Err(_) => Err(Error::new(Code::BadGateway, format!("agent `{name}` did not begin to send in {} s", BEGIN.as_secs()))),
    }
}

fn told(failure: Failure) -> Error {
    Error::new(Code::from_word(&failure.code).unwrap_or(Code::BadGateway), failure.message)
}

/// An agent's Transfer call: hands its pieces to whoever waits for them, as fast as they are taken.
pub(super) async fn take(table: &Table, agent: &str, mut pieces: Streaming<Piece>) -> Result<TransferReply, Status> {
    let first = tokio::time::timeout(BEGIN, pieces.message()).await.map_err(|_| Status::deadline_exceeded("no first piece"))??;
    let first = first.ok_or_else(|| Status::invalid_argument("the first piece says which transfer it is of"))?;
    let waiting = table.claim(first.id, agent)?;
    let left = || Status::cancelled("whoever asked has left");
    match first.kind {
        Some(Kind::Opened(_)) => {
            let (out, bytes) = mpsc::channel(AHEAD);
            waiting.taken.send(Ok(bytes)).map_err(|_| left())?;
            pump(&mut pieces, &out, waiting.length).await
        }
        Some(Kind::Failed(failure)) => {
            waiting.taken.send(Err(failure)).map_err(|_| left())?;
            Ok(TransferReply { taken: 0 })
        }
        _ => Err(Status::invalid_argument("the first piece of a transfer is `opened` or `failed`")),
    }
}

async fn pump(pieces: &mut Streaming<Piece>, out: &mpsc::Sender<Result<Bytes, Error>>, length: u64) -> Result<TransferReply, Status> {
    let broken = |why: &str| Error::new(Code::BadGateway, format!("the agent's transfer broke off: {why}"));
    let mut taken = 0u64;
    let why = loop {
        let piece = tokio::select! {
            piece = tokio::time::timeout(STALL, pieces.message()) => piece,
            () = out.closed() => return Err(Status::cancelled("whoever asked has left")),
        };
        match piece {
            Ok(Ok(Some(Piece { kind: Some(Kind::Data(bytes)), .. }))) => {
                taken = taken.saturating_add(bytes.len() as u64);
                if taken > length {
                    break broken("it sent more than was asked for");
                }
                if out.send_timeout(Ok(bytes), READER).await.is_err() {
                    return Err(Status::cancelled("whoever asked has left or does not read"));
                }
            }
            Ok(Ok(Some(Piece { kind: Some(Kind::Failed(failure)), .. }))) => break told(failure),
            Ok(Ok(Some(_))) => {}
            Ok(Ok(None)) if taken == length => return Ok(TransferReply { taken }),
            Ok(Ok(None)) => break broken("it ended early"),
            Ok(Err(status)) => break broken(status.message()),
            Err(_) => break broken("nothing came for a minute"),
        }
    };
    let status = Status::aborted(why.message().to_owned());
    // Where nobody reads any more nobody need be told.
    let _ = out.send_timeout(Err(why), STALL).await;
    Err(status)
}

/// An upload, opened for the agent whose assignment names it.
pub struct Shelved {
    /// It.
    pub file: File,
    /// Its bytes.
    pub size: u64,
    /// Changes with its content.
    pub version: String,
    /// SHA-256 in hex.
    pub sha256: String,
}

/// Where the uploads lie. Opening one says no to whoever has no assignment that names it.
pub trait Shelf: Send + Sync {
    /// Opens the upload at `path` for an agent that works on (`job`, `epoch`).
    fn open<'a>(
        &'a self,
        agent: &'a str,
        job: &'a str,
        epoch: u64,
        path: &'a str,
    ) -> Pin<Box<dyn Future<Output = Result<Shelved, Error>> + Send + 'a>>;
}

/// The pieces of an upload from `offset`, where the agent's `version` is still the file's, else from its beginning. For the tokio runtime.
pub(super) fn give(shelved: Shelved, offset: u64, version: &str) -> mpsc::Receiver<Result<Piece, Status>> {
    let (out, pieces) = mpsc::channel(AHEAD);
    let from = if version == shelved.version && offset <= shelved.size { offset } else { 0 };
    tokio::task::spawn_blocking(move || {
        let Shelved { file, size, version, sha256 } = shelved;
        let opened = Opened { size, version, offset: from, sha256 };
        let piece = |kind| Piece { id: 0, kind: Some(kind) };
        if out.blocking_send(Ok(piece(Kind::Opened(opened)))).is_err() {
            return;
        }
        let mut at = from;
        while at < size {
            let sent = match vault::read_chunk(&file, at, usize::try_from(size - at).map_or(CHUNK, |left| left.min(CHUNK))) {
                Ok(bytes) if bytes.is_empty() => out.blocking_send(Err(Status::data_loss("the upload is shorter than it was"))),
                Ok(bytes) => {
                    at += bytes.len() as u64;
                    out.blocking_send(Ok(piece(Kind::Data(bytes.into()))))
                }
                Err(e) => out.blocking_send(Err(Status::unavailable(format!("the upload cannot be read: {e}")))),
            };
            if sent.is_err() {
                return;
            }
        }
    });
    pieces
}

/// A refusal as a call's status.
pub(super) fn status(error: &Error) -> Status {
    let message = error.message().to_owned();
    match error.code() {
        Code::NotFound => Status::not_found(message),
        Code::OutsideRoots | Code::Forbidden => Status::permission_denied(message),
        Code::Conflict => Status::failed_precondition(message),
        Code::BadRequest => Status::invalid_argument(message),
        _ => Status::unavailable(message),
    }
}

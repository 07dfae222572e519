//! Bytes from this host to its controller, never over the Session: each transfer dials a connection of its own.
//!
//! ```text
//! Fetch ─► open (vault) ─► read 256 KiB ─► [2 read ahead] ─► Transfer ─► controller ─► whoever downloads
//! ```
//! Owns: how far a reader runs ahead, how many transfers run at a time. Never: reads a path but through the vault.
//! A crash here costs what was read ahead; whoever downloads asks for the rest.

use std::fs::File;
use std::sync::Arc;

use proto::v1::fleet_client::FleetClient;
use proto::v1::piece::Kind;
use proto::v1::{self, Piece};
use shared::error::Code;
use shared::{folder, vault};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use crate::Agent;

/// Transfers that an agent serves at a time; the controller asks for no more.
pub const AT_ONCE: usize = 24;
/// Bytes of a piece.
const CHUNK: usize = 256 << 10;
/// Pieces that are read before they are wanted.
const AHEAD: usize = 2;

/// Answers a Fetch, in the background.
pub fn serve(agent: &Arc<Agent>, fetch: v1::Fetch) {
    let agent = agent.clone();
    tokio::spawn(async move {
        let (id, path) = (fetch.id, fetch.path.clone());
        if let Err(reason) = send(agent, fetch).await {
            tracing::debug!(id, path, reason, "a transfer ended early");
        }
    });
}

async fn send(agent: Arc<Agent>, fetch: v1::Fetch) -> Result<(), String> {
    let turn = agent.transfers.clone().try_acquire_owned();
    let channel = agent.dial().await.map_err(|e| e.to_string())?;
    let (pieces, stream) = mpsc::channel(AHEAD);
    tokio::task::spawn_blocking(move || {
        let first = match turn {
            Ok(_) => open(&agent, &fetch),
            Err(_) => Err(failure(Code::Unavailable, "the agent is busy with other transfers")),
        };
        match first {
            // A receiver that is gone has said why in the call's status.
            Err(failed) => drop(pieces.blocking_send(Piece { id: fetch.id, kind: Some(Kind::Failed(failed)) })),
            Ok((file, opened)) => {
                let first = Piece { id: fetch.id, kind: Some(Kind::Opened(opened)) };
                if pieces.blocking_send(first).is_ok() {
                    read(&file, &fetch, &pieces);
                }
            }
        }
        drop(turn);
    });
    FleetClient::new(channel).transfer(ReceiverStream::new(stream)).await.map(drop).map_err(|status| status.message().to_owned())
}

fn failure(code: Code, message: impl Into<String>) -> v1::Failure {
    v1::Failure { code: code.word().to_owned(), message: message.into(), retryable: code == Code::Unavailable, ..Default::default() }
}

fn open(agent: &Agent, fetch: &v1::Fetch) -> Result<(File, v1::Opened), v1::Failure> {
    let file = agent.vault.open_file(&fetch.path).map_err(|e| failure(e.code(), e.to_string()))?;
    let metadata = file.metadata().map_err(|e| failure(Code::Internal, format!("{}: {e}", fetch.path)))?;
    let (size, version) = (metadata.len(), folder::version(&metadata));
    if !fetch.version.is_empty() && fetch.version != version {
        return Err(failure(Code::Conflict, format!("{} changed a moment ago; ask again", fetch.path)));
    }
    if fetch.offset.checked_add(fetch.length).is_none_or(|end| end > size) {
        return Err(failure(Code::BadRequest, format!("{} has {size} bytes only", fetch.path)));
    }
    Ok((file, v1::Opened { size, version, offset: fetch.offset, sha256: String::new() }))
}

/// Reads until all of it is sent or nobody takes it any more.
fn read(file: &File, fetch: &v1::Fetch, pieces: &mpsc::Sender<Piece>) {
    let (mut at, end) = (fetch.offset, fetch.offset.saturating_add(fetch.length));
    while at < end {
        let length = usize::try_from(end - at).map_or(CHUNK, |left| left.min(CHUNK));
        let kind = match vault::read_chunk(file, at, length) {
            Ok(bytes) if bytes.len() == length => {
                at += bytes.len() as u64;
                Kind::Data(bytes.into())
            }
            Ok(_) => Kind::Failed(failure(Code::Conflict, format!("{} became shorter while it was read", fetch.path))),
            Err(e) => Kind::Failed(failure(Code::BadGateway, format!("{} cannot be read at {at}: {e}", fetch.path))),
        };
        let is_last = matches!(kind, Kind::Failed(_));
        if pieces.blocking_send(Piece { id: 0, kind: Some(kind) }).is_err() || is_last {
            return;
        }
    }
}

//! The console of a VM: the bytes of its VNC, from this host to its controller and back, over a connection of its own.
//!
//! ```text
//! OpenConsole ─► where (virsh) ─► dial ─► still there? ─► Console: opened ═ RFB both ways ═ until either end goes
//! ```
//! Owns: how many consoles are open here, how far a reader runs ahead. Never: looks at what is shown or typed, logs it, dials another host.
//! A crash here costs the viewers; the VM does not notice.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use proto::v1::console_piece::Kind;
use proto::v1::fleet_client::FleetClient;
use proto::v1::{self, ConsolePiece};
use shared::error::Code;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, ReadHalf, WriteHalf};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use crate::egress::{self, Duplex};
use crate::sources::{Display, Error, named};
use crate::{Agent, egress::Screen};

/// Consoles that an agent has open at a time; the controller asks for no more.
pub const AT_ONCE: usize = 64;
/// Most bytes of a piece.
const CHUNK: usize = 64 << 10;
/// Pieces that are read before they are wanted.
const AHEAD: usize = 2;
/// How long the last bytes may take to their controller.
const LAST: Duration = Duration::from_secs(5);

/// Answers an OpenConsole, in the background.
pub fn serve(agent: &Arc<Agent>, wanted: v1::OpenConsole) {
    let agent = agent.clone();
    tokio::spawn(async move {
        let (id, vm) = (wanted.id, wanted.vm_id.clone());
        match carry(&agent, wanted).await {
            Ok(why) => tracing::debug!(id, vm, why, "a console has ended"),
            Err(reason) => tracing::debug!(id, vm, reason, "a console did not begin"),
        }
    });
}

async fn carry(agent: &Arc<Agent>, wanted: v1::OpenConsole) -> Result<&'static str, String> {
    let turn = agent.consoles.clone().try_acquire_owned();
    let found = async {
        if turn.is_err() {
            return Err(Error { code: Code::Unavailable, message: format!("the agent has {AT_ONCE} consoles open"), retryable: true });
        }
        open(agent, &wanted).await
    };
    let (channel, found) = tokio::join!(agent.dial(), found);
    let mut client = FleetClient::new(channel.map_err(|e| e.to_string())?);
    let (pieces, stream) = mpsc::channel(AHEAD);
    let piece = |kind| ConsolePiece { id: wanted.id, kind: Some(kind) };
    let (first, screen) = match found {
        Ok(screen) => (piece(Kind::Opened(true)), Ok(screen)),
        Err(e) => {
            let failure =
                v1::Failure { code: e.code.word().to_owned(), message: e.message.clone(), retryable: e.retryable, ..Default::default() };
            (piece(Kind::Failed(failure)), Err(e.message))
        }
    };
    // There is room: nothing was sent before.
    let _ = pieces.try_send(first);
    let pieces = screen.is_ok().then_some(pieces);
    let answered = client.console(ReceiverStream::new(stream)).await.map_err(|status| status.message().to_owned())?;
    let (screen, Some(pieces)) = (screen?, pieces) else { return Err("nothing is sent".to_owned()) };
    let mut typed = answered.into_inner();
    let (reader, writer) = tokio::io::split(screen);
    let why = tokio::select! {
        why = show(reader, &pieces) => why,
        why = take(&mut typed, writer) => return Ok(why),
    };
    // What was read last still goes out; the controller ends its side when it has it.
    drop(pieces);
    let _ = tokio::time::timeout(LAST, async { while let Ok(Some(_)) = typed.message().await {} }).await;
    Ok(why)
}

/// Finds the VM's screen and dials it. A port may have been given to another VM between question and dialling, so the question is asked twice.
async fn open(agent: &Arc<Agent>, wanted: &v1::OpenConsole) -> Result<Box<dyn Duplex>, Error> {
    let found = display(agent, wanted).await?;
    let place = match &found.screen {
        Screen::Port(address) => address.to_string(),
        Screen::Socket(path) => path.display().to_string(),
    };
    let closed = |e: std::io::Error| Error {
        code: Code::BadGateway,
        message: format!("the VNC of {} at {place}: {e}", found.name),
        retryable: true,
    };
    let screen = egress::screen(&found.screen).await.map_err(closed)?;
    if display(agent, wanted).await? != found {
        let message = format!("{} was switched off or started anew a moment ago; ask again", found.name);
        return Err(Error { code: Code::Conflict, message, retryable: true });
    }
    Ok(screen)
}

async fn display(agent: &Arc<Agent>, wanted: &v1::OpenConsole) -> Result<Display, Error> {
    let (agent, connection, vm) = (agent.clone(), wanted.connection.clone(), wanted.vm_id.clone());
    let ask = move || agent.source(named(connection.as_ref())?)?.display(&vm);
    tokio::task::spawn_blocking(ask).await.map_err(|e| Error::fatal(Code::Internal, e.to_string()))?
}

/// From the screen, no faster than it is taken.
async fn show(mut screen: ReadHalf<Box<dyn Duplex>>, pieces: &mpsc::Sender<ConsolePiece>) -> &'static str {
    let mut chunk = vec![0; CHUNK];
    loop {
        let length = match screen.read(&mut chunk).await {
            Ok(0) => return "the VM closed it",
            Ok(length) => length,
            Err(_) => return "the VM broke it off",
        };
        let data = Kind::Data(Bytes::copy_from_slice(&chunk[..length]));
        if pieces.send(ConsolePiece { id: 0, kind: Some(data) }).await.is_err() {
            return "the controller takes no more";
        }
    }
}

/// To the screen, no faster than it takes it.
async fn take(typed: &mut Streaming<ConsolePiece>, mut screen: WriteHalf<Box<dyn Duplex>>) -> &'static str {
    loop {
        match typed.message().await {
            Ok(Some(ConsolePiece { kind: Some(Kind::Data(bytes)), .. })) => {
                if screen.write_all(&bytes).await.is_err() {
                    return "the VM takes no more";
                }
            }
            Ok(Some(_)) => {}
            Ok(None) => return "the viewer has left",
            Err(_) => return "the controller went away",
        }
    }
}

//! The console of a VM for a VNC viewer on this host.
//!
//! ```text
//! viewer ◄─ TCP, loopback ─► here ◄═ WebSocket over TLS ═► controller ◄─► agent ◄─► the VM's VNC
//! ```
//! Owns: the port that a viewer connects to; one viewer at a time, the next when the one before has left. Never: listens on more than the
//! loopback, reads what goes through. A crash here costs the viewer; the VM does not notice.

use std::time::Duration;

use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt as _, StreamExt as _};
use serde_json::json;
use shared::segment::segment;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio_tungstenite::tungstenite::{Bytes, Error, Message};

use crate::args::{Console, Style};
use crate::client::{Client, Socket};
use crate::failure::{Exit, Failure, Outcome};
use crate::jobs;
use crate::output;

/// The controller pings each 5 s; without a word for this long it is gone.
const SILENCE: Duration = Duration::from_secs(30);
/// Most bytes of a frame; the controller takes 64 KiB.
const CHUNK: usize = 16 << 10;
/// How long a parting may take.
const PARTING: Duration = Duration::from_secs(2);

/// Listens until interrupted.
pub async fn console(client: &Client, wanted: &Console, style: Style) -> Outcome {
    let provider = match &wanted.provider {
        Some(provider) => provider.clone(),
        None => jobs::provider_of(client, &wanted.vm).await?,
    };
    let path = format!("/vms/{}/{}/console", segment(&provider), segment(&wanted.vm));
    // Whether there is a console is said now, not when somebody connects.
    part(client.socket(&path).await?).await;
    let listener = TcpListener::bind(wanted.listen).await.map_err(|e| Failure::failed(format!("{}: {e}", wanted.listen)))?;
    let address = listener.local_addr().map_err(|e| Failure::failed(e.to_string()))?;
    match style {
        Style::Json => output::line(json!({"vm": wanted.vm, "provider": provider, "address": address.to_string()}).to_string()),
        Style::Table => output::line(format!("VNC for {} at {address} (Ctrl-C ends it)", output::clean(&wanted.vm))),
    }
    tokio::select! {
        ended = serve(client, &listener, &path) => ended,
        _ = tokio::signal::ctrl_c() => Ok(()),
    }
}

async fn serve(client: &Client, listener: &TcpListener, path: &str) -> Outcome {
    loop {
        let (viewer, _) = listener.accept().await.map_err(|e| Failure::failed(format!("nobody can connect any more: {e}")))?;
        // A key must not wait for the next one; without it one only would.
        let _ = viewer.set_nodelay(true);
        match client.socket(path).await {
            Ok(socket) => {
                if let Some(why) = carry(socket, viewer).await {
                    output::remark(why);
                }
            }
            Err(failure) if failure.exit == Exit::NotAllowed => return Err(failure),
            Err(failure) => output::remark(format!("{failure}; the next viewer may have more luck")),
        }
    }
}

/// Carries until either side leaves; answers why, where it was not the viewer.
async fn carry(socket: Socket, viewer: TcpStream) -> Option<String> {
    let (mut to_vm, mut from_vm) = socket.split();
    let (keys, screen) = viewer.into_split();
    let why = tokio::select! {
        why = show(&mut from_vm, screen) => why,
        why = take(keys, &mut to_vm) => why,
    };
    // It is over; where the controller hears it late, its pings tell.
    let _ = tokio::time::timeout(PARTING, to_vm.send(Message::Close(None))).await;
    why
}

async fn part(mut socket: Socket) {
    // The controller ends it by itself, too.
    let _ = tokio::time::timeout(PARTING, socket.close(None)).await;
}

async fn show(from_vm: &mut SplitStream<Socket>, mut screen: OwnedWriteHalf) -> Option<String> {
    loop {
        // Reading answers the controller's pings.
        let message = match tokio::time::timeout(SILENCE, from_vm.next()).await {
            Err(_) => return Some(format!("the controller said nothing for {} s", SILENCE.as_secs())),
            Ok(None | Some(Err(Error::ConnectionClosed))) => return Some("the controller closed the console".to_owned()),
            Ok(Some(Err(e))) => return Some(format!("the console broke off: {e}")),
            Ok(Some(Ok(message))) => message,
        };
        match message {
            Message::Binary(bytes) => match screen.write_all(&bytes).await {
                Ok(()) => {}
                Err(_) => return None,
            },
            Message::Close(frame) => {
                let why = frame.map(|frame| output::clean(frame.reason.as_str())).filter(|why| !why.is_empty());
                return Some(why.unwrap_or_else(|| "the controller closed the console".to_owned()));
            }
            _ => {}
        }
    }
}

async fn take(mut keys: OwnedReadHalf, to_vm: &mut SplitSink<Socket, Message>) -> Option<String> {
    let mut chunk = vec![0; CHUNK];
    loop {
        let length = match keys.read(&mut chunk).await {
            Ok(0) | Err(_) => return None,
            Ok(length) => length,
        };
        if let Err(e) = to_vm.send(Message::Binary(Bytes::copy_from_slice(&chunk[..length]))).await {
            return Some(format!("the console broke off: {e}"));
        }
    }
}

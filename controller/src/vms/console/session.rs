//! One viewer's WebSocket.
//!
//! ```text
//! VM ─► [2 pieces] ─► frame ▸ ping n ─► viewer ─► pong n: so much is taken          viewer ─► frame ─► [16] ─► VM; full: nothing is read
//! ```
//! Owns: how much a viewer may leave unread, and that one who is silent is put out. Never: holds more than a window of what is shown.
//! A crash here costs one viewer.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use actix::prelude::*;
use actix_http::ws::Item;
use actix_web::web::Bytes;
use actix_web_actors::ws::{self, CloseCode, CloseReason, ProtocolError, WebsocketContext};
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;

use crate::fleet::console::{Ended, Line, Remote, Side};

/// Bytes that a viewer may leave unread.
const WINDOW: usize = 1 << 20;
/// How often a session looks after itself.
const TICK: Duration = Duration::from_secs(5);
/// A viewer that has not been heard from this long is gone.
const SILENCE: Duration = Duration::from_secs(60);
/// Most bytes of a close frame's reason.
const REASON: usize = 123;

pub(super) struct Session {
    /// Away while it is waited for.
    shown: Option<mpsc::Receiver<Bytes>>,
    typed: mpsc::Sender<Bytes>,
    line: Arc<Line>,
    /// What went out and is not known to be read: number and bytes of each frame.
    unread: VecDeque<(u64, usize)>,
    /// The sum of its bytes.
    open: usize,
    /// Number of the last frame.
    number: u64,
    heard: Instant,
}

impl Session {
    pub(super) fn new(remote: Remote) -> Self {
        let Remote { shown, typed, line } = remote;
        Self { shown: Some(shown), typed, line, unread: VecDeque::new(), open: 0, number: 0, heard: Instant::now() }
    }

    /// Shows what comes next, unless it is waited for already or the viewer is behind.
    fn show(&mut self, context: &mut WebsocketContext<Self>) {
        if self.open >= WINDOW {
            return;
        }
        let Some(mut shown) = self.shown.take() else { return };
        let next = async move {
            let bytes = shown.recv().await;
            (shown, bytes)
        };
        context.spawn(next.into_actor(self).map(|(shown, bytes), session, context| {
            session.shown = Some(shown);
            let Some(bytes) = bytes else { return session.over(context) };
            session.number += 1;
            session.open += bytes.len();
            session.unread.push_back((session.number, bytes.len()));
            context.binary(bytes);
            context.ping(&session.number.to_be_bytes());
            session.show(context);
        }));
    }

    /// A pong answers its frame and all before it.
    fn read(&mut self, number: u64) {
        while let Some((_, bytes)) = self.unread.pop_front_if(|(of, _)| *of <= number) {
            self.open = self.open.saturating_sub(bytes);
        }
    }

    /// What was typed goes on; where nobody takes it, nothing more is read of this viewer.
    fn typed(&mut self, bytes: Bytes, context: &mut WebsocketContext<Self>) {
        if bytes.is_empty() {
            return;
        }
        match self.typed.try_send(bytes) {
            Ok(()) => {}
            Err(TrySendError::Closed(_)) => self.over(context),
            Err(TrySendError::Full(bytes)) => {
                let typed = self.typed.clone();
                let sent = async move { typed.send(bytes).await.is_ok() };
                context.wait(sent.into_actor(self).map(|sent, session, context| {
                    if !sent {
                        session.over(context);
                    }
                }));
            }
        }
    }

    /// It has ended elsewhere: the viewer is told why.
    fn over(&self, context: &mut WebsocketContext<Self>) {
        let Ended { side, why } = self.line.reason().unwrap_or_else(|| Ended::new(Side::Vm, "the console has ended"));
        let code = match side {
            Side::Viewer | Side::Vm => CloseCode::Normal,
            Side::Agent => CloseCode::Error,
            Side::Refused => CloseCode::Policy,
            Side::Controller => CloseCode::Away,
        };
        close(context, code, &why);
    }

    /// It ends here.
    fn end(&self, context: &mut WebsocketContext<Self>, code: CloseCode, why: &str) {
        self.line.end(Ended::new(Side::Refused, why));
        close(context, code, why);
    }
}

fn close(context: &mut WebsocketContext<Session>, code: CloseCode, why: &str) {
    context.close(Some(CloseReason { code, description: Some(clip(why).to_owned()) }));
    context.stop();
}

fn clip(why: &str) -> &str {
    &why[..why.floor_char_boundary(REASON)]
}

impl Actor for Session {
    type Context = WebsocketContext<Self>;

    fn started(&mut self, context: &mut Self::Context) {
        context.run_interval(TICK, |session, context| {
            if session.heard.elapsed() > SILENCE {
                return session.end(context, CloseCode::Policy, "no answer to pings");
            }
            if session.unread.is_empty() {
                context.ping(b"");
            }
        });
        self.show(context);
    }

    fn stopped(&mut self, _: &mut Self::Context) {
        self.line.end(Ended::new(Side::Viewer, "the viewer has left"));
    }
}

impl StreamHandler<Result<ws::Message, ProtocolError>> for Session {
    fn handle(&mut self, message: Result<ws::Message, ProtocolError>, context: &mut Self::Context) {
        self.heard = Instant::now();
        match message {
            Ok(ws::Message::Binary(bytes)) => self.typed(bytes, context),
            // RFB is a stream: where a message begins and ends means nothing.
            Ok(ws::Message::Continuation(Item::FirstBinary(bytes) | Item::Continue(bytes) | Item::Last(bytes))) => {
                self.typed(bytes, context)
            }
            Ok(ws::Message::Ping(bytes)) => context.pong(&bytes),
            Ok(ws::Message::Pong(bytes)) => {
                if let Ok(number) = <[u8; 8]>::try_from(bytes.as_ref()) {
                    self.read(u64::from_be_bytes(number));
                    self.show(context);
                }
            }
            Ok(ws::Message::Close(_)) => {
                self.line.end(Ended::new(Side::Viewer, "the viewer has left"));
                context.close(None);
                context.stop();
            }
            Ok(ws::Message::Text(_) | ws::Message::Continuation(Item::FirstText(_))) => {
                self.end(context, CloseCode::Unsupported, "send the bytes of RFB in binary frames")
            }
            Ok(ws::Message::Nop) => {}
            Err(ProtocolError::Overflow) => self.end(context, CloseCode::Size, "a frame of at most 64 KiB"),
            Err(_) => self.end(context, CloseCode::Protocol, "malformed frame"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_fits_a_close_frame() {
        assert_eq!(clip("short"), "short");
        let long = "é".repeat(100);
        assert!(clip(&long).len() <= REASON && long.starts_with(clip(&long)));
    }
}

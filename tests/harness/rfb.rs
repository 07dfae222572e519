//! A VNC viewer: as much of RFB 3.8 as shows a picture and presses a key.
//!
//! Owns: one conversation, over a WebSocket or over TCP. Never: guesses: what it does not know fails the test. A crash here costs one test.
//! Source: RFC 6143.

use std::time::Duration;

use futures_util::{SinkExt as _, StreamExt as _};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::protocol::frame::Frame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::{Data, OpCode};
use tokio_tungstenite::tungstenite::{Bytes, Message};

use super::live::Socket;

/// What the bytes go over.
pub enum Wire {
    /// Binary frames.
    Web(Box<Socket>),
    /// Bytes.
    Tcp(TcpStream),
}

/// How a WebSocket was closed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Closed {
    /// The code of the close frame; 0 where there was none.
    pub code: u16,
    /// Its reason.
    pub why: String,
}

/// Longest wait for a byte.
const PATIENCE: Duration = Duration::from_secs(20);

impl Wire {
    /// Sends bytes.
    pub async fn send(&mut self, bytes: &[u8]) {
        match self {
            Wire::Web(socket) => socket.send(Message::Binary(Bytes::copy_from_slice(bytes))).await.unwrap(),
            Wire::Tcp(stream) => stream.write_all(bytes).await.unwrap(),
        }
    }

    /// Sends bytes as a message in two frames, where there are frames.
    pub async fn send_in_parts(&mut self, bytes: &[u8]) {
        let Wire::Web(socket) = self else { return self.send(bytes).await };
        let (first, rest) = bytes.split_at(bytes.len() / 2);
        for (part, kind, is_last) in [(first, Data::Binary, false), (rest, Data::Continue, true)] {
            let frame = Frame::message(part.to_vec(), OpCode::Data(kind), is_last);
            socket.send(Message::Frame(frame)).await.unwrap();
        }
    }

    /// Sends text, which is no RFB.
    pub async fn say(&mut self, text: &str) {
        let Wire::Web(socket) = self else { panic!("there are no texts over TCP") };
        socket.send(Message::text(text)).await.unwrap();
    }

    /// Reads until it is closed; answers how.
    pub async fn closed(&mut self, limit: Duration) -> Closed {
        let end = async {
            loop {
                if let Err(closed) = self.next().await {
                    return closed;
                }
            }
        };
        tokio::time::timeout(limit, end).await.unwrap_or_else(|_| panic!("it is open after {limit:?}"))
    }

    /// What comes next, or how it ended.
    pub async fn next(&mut self) -> Result<Vec<u8>, Closed> {
        let broken = |why: String| Closed { code: 0, why };
        match self {
            Wire::Web(socket) => loop {
                match socket.next().await {
                    Some(Ok(Message::Binary(bytes))) => return Ok(bytes.to_vec()),
                    Some(Ok(Message::Close(Some(frame)))) => {
                        return Err(Closed { code: frame.code.into(), why: frame.reason.to_string() });
                    }
                    Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                    other => return Err(broken(format!("{other:?}"))),
                }
            },
            Wire::Tcp(stream) => {
                let mut chunk = vec![0; 64 << 10];
                match stream.read(&mut chunk).await {
                    Ok(0) => Err(broken("closed".to_owned())),
                    Ok(length) => Ok(chunk[..length].to_vec()),
                    Err(e) => Err(broken(e.to_string())),
                }
            }
        }
    }
}

/// A viewer.
pub struct Viewer {
    wire: Wire,
    came: Vec<u8>,
    /// Pixels.
    pub width: usize,
    /// Pixels.
    pub height: usize,
    /// What the server calls the screen.
    pub name: String,
    /// Four bytes a pixel, as they came last.
    pixels: Vec<u8>,
    /// All bytes that came.
    pub received: usize,
}

impl Viewer {
    /// The kinds of security that a server offers.
    pub async fn offered(wire: Wire) -> (Self, Vec<u8>) {
        let mut viewer = Self { wire, came: Vec::new(), width: 0, height: 0, name: String::new(), pixels: Vec::new(), received: 0 };
        assert_eq!(viewer.take(12).await, b"RFB 003.008\n");
        viewer.wire.send(b"RFB 003.008\n").await;
        let count = viewer.take(1).await[0];
        let kinds = viewer.take(usize::from(count)).await;
        (viewer, kinds)
    }

    /// Begins to look, without a password.
    pub async fn open(wire: Wire) -> Self {
        let (mut viewer, kinds) = Self::offered(wire).await;
        assert!(kinds.contains(&1), "no security is not offered: {kinds:?}");
        viewer.wire.send(&[1]).await;
        assert_eq!(viewer.take(4).await, [0; 4], "security result");
        // Shared.
        viewer.wire.send(&[1]).await;
        let init = viewer.take(24).await;
        viewer.width = usize::from(u16::from_be_bytes([init[0], init[1]]));
        viewer.height = usize::from(u16::from_be_bytes([init[2], init[3]]));
        assert_eq!(init[4], 32, "bits of a pixel");
        let length = u32::from_be_bytes(init[20..24].try_into().unwrap());
        viewer.name = String::from_utf8(viewer.take(length as usize).await).unwrap();
        viewer.pixels = vec![0; viewer.width * viewer.height * 4];
        // Raw, and nothing else.
        viewer.wire.send(&[2, 0, 0, 1, 0, 0, 0, 0]).await;
        viewer
    }

    async fn take(&mut self, count: usize) -> Vec<u8> {
        while self.came.len() < count {
            let next = tokio::time::timeout(PATIENCE, self.wire.next()).await.expect("the server says something");
            let bytes = next.unwrap_or_else(|closed| panic!("closed: {closed:?}"));
            self.received += bytes.len();
            self.came.extend_from_slice(&bytes);
        }
        let rest = self.came.split_off(count);
        std::mem::replace(&mut self.came, rest)
    }

    /// Asks for the whole picture.
    pub async fn ask(&mut self) {
        let [[a, b], [c, d]] = [self.width, self.height].map(|side| (side as u16).to_be_bytes());
        self.wire.send(&[3, 0, 0, 0, 0, 0, a, b, c, d]).await;
    }

    /// The whole picture, as it is now.
    pub async fn picture(&mut self) -> Vec<u8> {
        self.ask().await;
        loop {
            match self.take(1).await[0] {
                0 => break,
                // Bell.
                2 => {}
                other => panic!("message {other} of the server"),
            }
        }
        let head = self.take(3).await;
        for _ in 0..u16::from_be_bytes([head[1], head[2]]) {
            let rectangle = self.take(12).await;
            let number = |at: usize| usize::from(u16::from_be_bytes([rectangle[at], rectangle[at + 1]]));
            let (x, y, width, height) = (number(0), number(2), number(4), number(6));
            assert_eq!(rectangle[8..12], [0; 4], "raw");
            let data = self.take(width * height * 4).await;
            for (row, line) in data.chunks_exact(width * 4).enumerate() {
                let at = ((y + row) * self.width + x) * 4;
                self.pixels[at..at + line.len()].copy_from_slice(line);
            }
        }
        self.pixels.clone()
    }

    /// Presses a key and lets it go.
    pub async fn press(&mut self, keysym: u32) {
        for is_down in [1, 0] {
            let mut event = vec![4, is_down, 0, 0];
            event.extend_from_slice(&keysym.to_be_bytes());
            self.wire.send_in_parts(&event).await;
        }
    }

    /// Types without end; answers after how many bytes nobody takes more.
    pub async fn type_until_full(&mut self, most: usize) -> usize {
        // Keys that are let go of.
        let events: Vec<u8> = [4u8, 0, 0, 0, 0, 0, 0xff, 0x1b].into_iter().cycle().take(32 << 10).collect();
        let mut sent = 0;
        while sent < most {
            match tokio::time::timeout(Duration::from_secs(3), self.wire.send(&events)).await {
                Ok(()) => sent += events.len(),
                Err(_) => break,
            }
        }
        sent
    }

    /// Reads until it is closed; answers how.
    pub async fn closed(&mut self, limit: Duration) -> Closed {
        self.wire.closed(limit).await
    }
}

/// How many pixels of two pictures are others.
pub fn difference(a: &[u8], b: &[u8]) -> usize {
    a.chunks_exact(4).zip(b.chunks_exact(4)).filter(|(a, b)| a != b).count()
}

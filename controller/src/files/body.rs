//! The body of a download.
//!
//! ```text
//! file ─► pread 256 KiB on threads for that, two at a time ─► socket        agent ─► transfer ─► socket
//! ```
//! Owns: how far it reads ahead. Never: waits for the disk on a worker of the server. A crash here costs one download.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use actix_web::body::{BodySize, MessageBody};
use actix_web::web::Bytes;
use shared::vault;
use tokio::task::JoinHandle;

use crate::fleet::transfer::Remote;
use crate::http::reply::Error;

/// Bytes of one read.
const CHUNK: u64 = 256 << 10;
/// Reads that are under way while another is sent.
const AHEAD: usize = 2;

/// A range of a file.
pub enum Body {
    /// Its head alone was asked for.
    Head(u64),
    /// Of this host.
    Local(Local),
    /// Of an agent's.
    Remote(u64, Remote),
}

/// A range of a file of this host.
pub struct Local {
    file: Arc<File>,
    length: u64,
    at: u64,
    end: u64,
    reads: VecDeque<JoinHandle<io::Result<Vec<u8>>>>,
}

impl Local {
    /// `length` bytes from `offset`.
    pub fn new(file: File, offset: u64, length: u64) -> Self {
        Self { file: Arc::new(file), length, at: offset, end: offset.saturating_add(length), reads: VecDeque::with_capacity(AHEAD + 1) }
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Error>>> {
        while self.at < self.end && self.reads.len() <= AHEAD {
            let (file, at, length) = (self.file.clone(), self.at, (self.end - self.at).min(CHUNK));
            self.reads.push_back(tokio::task::spawn_blocking(move || {
                let bytes = vault::read_chunk(&file, at, length as usize)?;
                if bytes.len() as u64 == length { Ok(bytes) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
            }));
            self.at += length;
        }
        let Some(first) = self.reads.front_mut() else { return Poll::Ready(None) };
        let read = ready!(Pin::new(first).poll(cx));
        self.reads.pop_front();
        Poll::Ready(Some(match read {
            Ok(Ok(bytes)) => Ok(bytes.into()),
            Ok(Err(e)) => Err(Error::internal(format!("a download broke off: {e}"))),
            Err(e) => Err(Error::internal(e)),
        }))
    }
}

impl MessageBody for Body {
    type Error = Error;

    fn size(&self) -> BodySize {
        match self {
            Body::Head(length) | Body::Remote(length, _) => BodySize::Sized(*length),
            Body::Local(local) => BodySize::Sized(local.length),
        }
    }

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Error>>> {
        match self.get_mut() {
            Body::Head(_) => Poll::Ready(None),
            Body::Local(local) => local.poll_next(cx),
            Body::Remote(_, remote) => remote.bytes.poll_recv(cx),
        }
    }
}

//! The body of a chunk on its way to the disk.
//!
//! ```text
//! payload ─► 256 KiB ─► hash ─► pwrite (a thread for that) ─► … ─► fdatasync
//! ```
//! Owns: how much of a body is in memory (256 KiB and what the socket gave). How slow a sender may be: `http::pace`.
//! Never: reads past what the chunk may have. A crash here costs one chunk.

use std::fs::File;
use std::sync::Arc;

use actix_web::web;
use ring::digest::{Context, SHA256};
use shared::error::Code;
use tokio::sync::{OwnedRwLockReadGuard, OwnedRwLockWriteGuard};

use super::part;
use crate::http::pace::Pace;
use crate::http::reply::Error;

/// Bytes that are written at a time.
const STEP: usize = 256 << 10;
/// Where a chunk is written: the part, and the turns that whoever writes holds. A write that outlives its request holds them to its end.
pub struct Place {
    /// The part.
    pub file: File,
    /// Nobody completes or removes the upload meanwhile.
    pub beside_others: OwnedRwLockReadGuard<()>,
    /// Nobody else writes this chunk.
    pub alone: OwnedRwLockWriteGuard<()>,
}

/// A body that keeps its limits.
pub struct Body {
    payload: web::Payload,
    pace: Pace,
}

impl Body {
    /// Of a request.
    pub fn new(payload: web::Payload) -> Self {
        Self { payload, pace: Pace::new("the chunk") }
    }

    /// Writes the body to its place in a part, where it has just `length` bytes; durable when it returns. Answers its SHA-256. `largest` is
    /// what any chunk may have.
    pub async fn write(&mut self, place: Arc<Place>, offset: u64, length: u64, largest: u64) -> Result<String, Error> {
        let mut context = Context::new(&SHA256);
        let mut buffer = Vec::with_capacity(STEP);
        let mut at = offset;
        while let Some(bytes) = self.pace.next(&mut self.payload).await? {
            if self.pace.taken() > length {
                return Err(wrong_length(self.pace.taken(), length, largest));
            }
            context.update(&bytes);
            buffer.extend_from_slice(&bytes);
            if buffer.len() >= STEP {
                let full = std::mem::replace(&mut buffer, Vec::with_capacity(STEP));
                let size = full.len() as u64;
                let place = place.clone();
                blocking(move || part::write(&place.file, &full, at)).await?;
                at += size;
            }
        }
        if self.pace.taken() != length {
            return Err(wrong_length(self.pace.taken(), length, largest));
        }
        blocking(move || {
            part::write(&place.file, &buffer, at)?;
            place.file.sync_data()
        })
        .await?;
        Ok(hex::encode(context.finish()))
    }
}

/// A body that is not as long as its chunk.
pub fn wrong_length(has: u64, length: u64, largest: u64) -> Error {
    if has > largest {
        return Error::new(Code::TooLarge, format!("a chunk has {largest} bytes at most"));
    }
    let has = if has > length { "more".to_owned() } else { format!("{has}") };
    Error::bad_request(format!("this chunk has {length} bytes, the body has {has}"))
}

/// Work on the disk, on a thread for that.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> std::io::Result<T> + Send + 'static) -> Result<T, Error> {
    match tokio::task::spawn_blocking(work).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(e)) if matches!(e.kind(), std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded) => {
            Err(Error::new(Code::NoSpace, "no space left in the root `uploads`"))
        }
        Ok(Err(e)) => Err(Error::internal(e)),
        Err(e) => Err(Error::internal(e)),
    }
}

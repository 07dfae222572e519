//! How slow the sender of a body may be.
//!
//! Owns: that one rule, for JSON and for chunks of uploads. Never: keeps a byte. A crash here costs one answer.

use std::time::{Duration, Instant};

use actix_web::error::PayloadError;
use actix_web::web::Bytes;
use futures_util::{Stream, StreamExt};

use super::reply::Error;

/// How long nothing may come.
const SILENCE: Duration = Duration::from_secs(30);
/// Before a sender is measured.
const GRACE: Duration = Duration::from_secs(10);
/// Bytes a second that a sender must keep after that.
const SLOWEST: f64 = 16.0 * 1024.0;

/// A body on its way: since when, and how much of it came.
pub struct Pace {
    began: Instant,
    taken: u64,
    /// What whoever was too slow should send again, for messages.
    what: &'static str,
}

impl Pace {
    /// Of a body that begins now. `what` is to be sent again: `it`, `the chunk`.
    pub fn new(what: &'static str) -> Self {
        Self { began: Instant::now(), taken: 0, what }
    }

    /// Bytes that came.
    pub fn taken(&self) -> u64 {
        self.taken
    }

    /// The next piece; nothing at the end. Who stops or is too slow is refused.
    pub async fn next(&mut self, payload: &mut (impl Stream<Item = Result<Bytes, PayloadError>> + Unpin)) -> Result<Option<Bytes>, Error> {
        let refused = |why: String| Error::bad_request(format!("{why}; send {} again", self.what));
        let next = tokio::time::timeout(SILENCE, payload.next()).await;
        let next = next.map_err(|_| refused(format!("the body stopped for {} s", SILENCE.as_secs())))?;
        let Some(bytes) = next else { return Ok(None) };
        let bytes = bytes.map_err(|e| refused(format!("the body could not be read: {e}")))?;
        self.taken += bytes.len() as u64;
        if is_too_slow(self.taken, self.began.elapsed()) {
            return Err(refused("the body comes slower than 16 KiB a second".to_owned()));
        }
        Ok(Some(bytes))
    }
}

fn is_too_slow(taken: u64, elapsed: Duration) -> bool {
    elapsed > GRACE && (taken as f64) < SLOWEST * (elapsed - GRACE).as_secs_f64()
}

#[cfg(test)]
impl Pace {
    /// Of a body that began a while ago.
    pub fn since(ago: Duration) -> Self {
        Self { began: Instant::now().checked_sub(ago).unwrap_or_else(Instant::now), ..Self::new("it") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sender_has_ten_seconds_and_then_16_kib_for_each() {
        for (taken, seconds, slow) in [(0, 10, false), (1, 11, true), (16 << 10, 11, false), (1 << 20, 74, false), (1 << 20, 75, true)] {
            assert_eq!(is_too_slow(taken, Duration::from_secs(seconds)), slow, "{taken} bytes in {seconds} s");
        }
    }
}

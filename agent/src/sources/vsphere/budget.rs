//! How many streams one host gives us at a time.
//!
//! Owns: the turns of all copies from one host, first come first served, so that none starves; fewer of them while the host says 503.
//! Never: ends a stream that runs. A crash here costs nothing.
//! Why: an ESXi host has 52 NFC connections for everybody and a buffer of 48 MB behind them; who takes them all stops backups and moves.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Streams to a host where the settings say nothing.
pub const STREAMS: usize = 12;
/// Most that the settings may say.
pub const MOST: usize = 48;
/// Streams that are left however often the host says 503.
const LEAST: usize = 2;
/// For how long a turn is given back to a host that asked for patience.
const CALM: Duration = Duration::from_secs(30);

/// The turns of one host.
pub struct Budget {
    turns: Arc<Semaphore>,
    streams: usize,
    withheld: Arc<AtomicUsize>,
}

impl Budget {
    /// So many at a time.
    pub fn new(streams: usize) -> Self {
        Self { turns: Arc::new(Semaphore::new(streams)), streams, withheld: Arc::default() }
    }

    /// Waits for a turn; it ends when this is dropped.
    pub async fn turn(&self) -> Option<OwnedSemaphorePermit> {
        // The semaphore is never closed.
        self.turns.clone().acquire_owned().await.ok()
    }

    /// Streams that may run, that run, and turns that the host has back.
    pub fn figures(&self) -> (usize, usize, usize) {
        let withheld = self.withheld.load(Ordering::Acquire);
        (self.streams, self.streams.saturating_sub(self.turns.available_permits()).saturating_sub(withheld), withheld)
    }

    /// The host asked for patience: one turn fewer for a while.
    pub fn slow_down(&self) {
        let most = self.streams.saturating_sub(LEAST);
        let one_more = |withheld: usize| (withheld < most).then_some(withheld + 1);
        if self.withheld.fetch_update(Ordering::AcqRel, Ordering::Acquire, one_more).is_err() {
            return;
        }
        let (turns, withheld) = (self.turns.clone(), self.withheld.clone());
        tokio::spawn(async move {
            let turn = turns.acquire_owned().await;
            tokio::time::sleep(CALM).await;
            drop(turn);
            withheld.fetch_sub(1, Ordering::AcqRel);
        });
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_host_that_asks_for_patience_gets_fewer_streams() {
        let budget = Budget::new(4);
        let turn = budget.turn().await.unwrap();
        for _ in 0..9 {
            budget.slow_down();
        }
        // Two are left: one is taken, one is free.
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        assert_eq!((budget.turns.available_permits(), budget.withheld.load(Ordering::Relaxed)), (1, 2));
        drop(turn);
        assert_eq!(budget.turns.available_permits(), 2);
    }
}

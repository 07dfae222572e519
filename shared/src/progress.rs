//! Progress that is true: it counts bytes that are safe on disk and bytes that were read back, never bytes that were merely sent.
//!
//! Owns: the counters and the one formula. Never: guesses. A crash here costs nothing: the agent's journal says again what is durable.

use serde::{Deserialize, Serialize};

/// Counters of one attempt, in bytes of data extents (holes count nothing).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Progress {
    /// All data of all disks.
    pub data: u64,
    /// Read from the source and hashed in this attempt.
    pub read: u64,
    /// Synced to the output, earlier attempts included.
    pub durable: u64,
    /// Read back and compared, earlier attempts included.
    pub verified: u64,
    /// What this attempt found done by earlier ones when it started.
    pub resumed: u64,
}

impl Progress {
    /// Whole percent: `floor(99·(durable + verified)/(2·data))`, without verification `floor(99·durable/data)`. 100 is only for a published job.
    pub fn percent(&self, verify: bool) -> u8 {
        let (done, all) = match verify {
            true => (u128::from(self.durable) + u128::from(self.verified), 2 * u128::from(self.data)),
            false => (u128::from(self.durable), u128::from(self.data)),
        };
        // An empty disk has nothing left to do before it is published.
        (99 * done).checked_div(all).map_or(99, |percent| percent.min(99) as u8)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percent_counts_both_passes_and_stops_at_99_before_publication() {
        let half = Progress { data: 100, durable: 100, ..Progress::default() };
        assert_eq!((half.percent(true), half.percent(false)), (49, 99));
        let all = Progress { data: 100, durable: 100, verified: 100, ..Progress::default() };
        assert_eq!(all.percent(true), 99);
        assert_eq!(Progress::default().percent(true), 99);
        let huge = Progress { data: u64::MAX, durable: u64::MAX, verified: u64::MAX, ..Progress::default() };
        assert_eq!(huge.percent(true), 99);
    }
}

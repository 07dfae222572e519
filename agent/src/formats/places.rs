//! Places in an output file, handed out to whoever has units to write.
//!
//! Owns: which clusters of the file nobody has asked for yet. A worker that holds a unit while it is hot in its core's cache asks for a place
//! and writes there at once; that the places do not follow the disk's order is the tables' business.
//! Never: writes, or learns whether what was handed out is used: the writer takes note of that in the order of the disk ([`Occupied`]).
//! A crash here costs nothing: what the checkpoints know is occupied, the rest is free again.
//!
//! ```text
//!  file:  │ front │ occupied │ gap │ occupied │ gap │ occupied │ end ──► never used
//!                              ▲ filled first, then behind the end
//! ```

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use super::disk::UNIT;

/// Neighbouring clusters of the file, counted in [`UNIT`]s from the output's base.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// The first.
    pub first: u64,
    /// How many, never 0.
    pub count: u64,
}

impl Span {
    /// First byte, counted from the output's base.
    pub fn offset(self) -> u64 {
        self.first * UNIT as u64
    }
}

/// The places of one output, shared by all who write it.
#[derive(Debug)]
pub struct Places(Mutex<Free>);

#[derive(Debug)]
struct Free {
    /// Start and end of what is free below `end`; the last goes first.
    gaps: Vec<(u64, u64)>,
    end: u64,
}

impl Places {
    /// All that `occupied` leaves.
    pub fn new(occupied: &Occupied) -> Self {
        let gaps = occupied.gaps.iter().rev().map(|(from, to)| (*from, *to)).collect();
        Self(Mutex::new(Free { gaps, end: occupied.end }))
    }

    /// Places for at most `count` units (not 0) side by side; who needs more asks again. They are the caller's until the process ends.
    pub fn take(&self, count: u64) -> Span {
        let mut free = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((from, to)) = free.gaps.pop() else {
            let first = free.end;
            free.end += count;
            return Span { first, count };
        };
        let count = count.min(to - from);
        if from + count < to {
            free.gaps.push((from + count, to));
        }
        Span { first: from, count }
    }

    /// Takes back what was not written.
    pub fn give_back(&self, span: Span) {
        let mut free = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if span.first + span.count == free.end {
            free.end = span.first;
        } else if span.count > 0 {
            free.gaps.push((span.first, span.first + span.count));
        }
    }
}

/// The clusters that tables lead to, and their gaps: a few at most, where blocks of an attempt were written and never came in order.
#[derive(Clone, Debug, Default)]
pub struct Occupied {
    /// Start and end.
    gaps: BTreeMap<u64, u64>,
    end: u64,
}

impl Occupied {
    /// The first `front` clusters.
    pub fn new(front: u64) -> Self {
        Self { gaps: BTreeMap::new(), end: front }
    }

    /// One past the last.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// Adds clusters; false, and nothing done, when one of them is occupied or their numbers do not end.
    pub fn add(&mut self, span: Span) -> bool {
        let Some(to) = span.first.checked_add(span.count).filter(|to| *to > span.first) else { return false };
        if span.first >= self.end {
            if span.first > self.end {
                self.gaps.insert(self.end, span.first);
            }
            self.end = to;
            return true;
        }
        let Some((from, until)) = self.gaps.range(..=span.first).next_back().map(|(from, until)| (*from, *until)) else { return false };
        if to > until {
            return false;
        }
        self.gaps.remove(&from);
        for (from, until) in [(from, span.first), (to, until)] {
            if from < until {
                self.gaps.insert(from, until);
            }
        }
        true
    }

    /// The gaps between `from` and `to`, in ascending order: start and end.
    pub fn gaps(&self, from: u64, to: u64) -> impl Iterator<Item = (u64, u64)> {
        // One may reach in from below; gaps are few.
        self.gaps.iter().map(move |(a, b)| ((*a).max(from), (*b).min(to))).filter(|(a, b)| a < b)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn span(first: u64, count: u64) -> Span {
        Span { first, count }
    }

    #[test]
    fn gaps_are_filled_first_and_nothing_is_handed_out_twice() {
        let mut occupied = Occupied::new(3);
        assert!(occupied.add(span(8, 2)) && occupied.add(span(12, 1)) && occupied.add(span(4, 1)));
        for taken in [span(0, 1), span(3, 2), span(4, 1), span(7, 2), span(9, 1), span(9, 9), span(11, 3), span(u64::MAX, 2), span(20, 0)] {
            assert!(!occupied.add(taken), "{taken:?}");
        }
        assert_eq!(occupied.gaps(0, 99).collect::<Vec<_>>(), [(3, 4), (5, 8), (10, 12)]);
        assert_eq!(occupied.gaps(6, 11).collect::<Vec<_>>(), [(6, 8), (10, 11)]);
        let places = Places::new(&occupied);
        let given: Vec<Span> = [4, 2, 9, 9, 2, 1].into_iter().map(|count| places.take(count)).collect();
        assert_eq!(given, [span(3, 1), span(5, 2), span(7, 1), span(10, 2), span(13, 2), span(15, 1)]);
        for span in given {
            assert!(occupied.add(span));
        }
        let (whole, behind) = (places.take(8), places.take(1));
        places.give_back(span(whole.first + 6, 2));
        places.give_back(behind);
        assert_eq!((places.take(9), places.take(3)), (span(22, 2), span(24, 3)));
        assert_eq!((occupied.end(), occupied.gaps(0, 99).count()), (16, 0));
    }
}

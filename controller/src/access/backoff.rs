//! The login's back-off: after a few failures every further try must wait, twice as long each time, up to a minute.
//!
//! Owns: counters per account and address, and per address. Never: locks anybody out for good: a counter is forgotten after a quarter
//! of an hour, and another address is not held up by what this one did to the account.
//! A crash here costs the counters.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

const FORGET: Duration = Duration::from_secs(15 * 60);
const LONGEST: Duration = Duration::from_secs(60);
/// Most counters that are kept.
const COUNTERS: usize = 100_000;

#[derive(Clone, PartialEq, Eq, Hash)]
enum Key {
    Account(String, IpAddr),
    Address(IpAddr),
}

struct Counter {
    failures: u32,
    last: Instant,
    until: Instant,
}

/// The counters.
pub struct Backoff {
    counters: Mutex<HashMap<Key, Counter>>,
    account_tries: u32,
    address_tries: u32,
}

impl Backoff {
    /// With the number of failures that are free.
    pub fn new(account_tries: u32, address_tries: u32) -> Self {
        Self { counters: Mutex::default(), account_tries, address_tries }
    }

    /// How long this caller has to wait before the next try; `None`: not at all.
    pub fn wait(&self, account: &str, address: IpAddr, now: Instant) -> Option<Duration> {
        let counters = self.counters.lock().unwrap_or_else(PoisonError::into_inner);
        let keys = [Key::Account(account.to_owned(), address), Key::Address(address)];
        let until = keys.iter().filter_map(|key| counters.get(key)).map(|counter| counter.until).max()?;
        until.checked_duration_since(now).filter(|wait| !wait.is_zero())
    }

    /// Counts a failure.
    pub fn failed(&self, account: &str, address: IpAddr, now: Instant) {
        let mut counters = self.counters.lock().unwrap_or_else(PoisonError::into_inner);
        if counters.len() >= COUNTERS {
            counters.retain(|_, counter| now.saturating_duration_since(counter.last) < FORGET);
            if counters.len() >= COUNTERS {
                counters.clear();
            }
        }
        let keys = [(Key::Account(account.to_owned(), address), self.account_tries), (Key::Address(address), self.address_tries)];
        for (key, free) in keys {
            let counter = counters.entry(key).or_insert(Counter { failures: 0, last: now, until: now });
            if now.saturating_duration_since(counter.last) >= FORGET {
                counter.failures = 0;
            }
            counter.failures = counter.failures.saturating_add(1);
            counter.last = now;
            if let Some(over) = counter.failures.checked_sub(free.max(1)) {
                counter.until = now + Duration::from_secs(1 << over.min(6)).min(LONGEST);
            }
        }
    }

    /// Forgets the account's failures from this address.
    pub fn succeeded(&self, account: &str, address: IpAddr) {
        self.counters.lock().unwrap_or_else(PoisonError::into_inner).remove(&Key::Account(account.to_owned(), address));
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn tries_slow_down_and_nobody_is_locked_out_for_good() {
        let (backoff, now) = (Backoff::new(5, 30), Instant::now());
        let (here, there): (IpAddr, IpAddr) = ("192.0.2.1".parse().unwrap(), "192.0.2.2".parse().unwrap());
        for _ in 0..4 {
            backoff.failed("admin", here, now);
            assert!(backoff.wait("admin", here, now).is_none());
        }
        backoff.failed("admin", here, now);
        assert_eq!(backoff.wait("admin", here, now), Some(Duration::from_secs(1)));
        for _ in 0..20 {
            backoff.failed("admin", here, now);
        }
        assert_eq!(backoff.wait("admin", here, now), Some(LONGEST));
        assert!(backoff.wait("admin", there, now).is_none(), "another address is held up");
        assert!(backoff.wait("other", here, now).is_none());
        assert!(backoff.wait("admin", here, now + LONGEST).is_none());
        for n in 0..10 {
            backoff.failed(&format!("user{n}"), here, now);
        }
        assert!(backoff.wait("anybody", here, now).is_some(), "an address tries all accounts");
    }
}

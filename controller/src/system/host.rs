//! This host in figures, from the kernel.
//!
//! Owns: reading `/proc`, and the rates between two looks. Never: fails: what the kernel does not tell is 0. A crash here costs nothing.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use shared::vault;

/// Rates need this much time between two looks.
const APART: Duration = Duration::from_secs(1);

/// Counters at one moment.
#[derive(Clone, Default)]
struct Counters {
    busy: u64,
    all: u64,
    interfaces: BTreeMap<String, Traffic>,
}

/// What went through an interface since the boot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes received.
    pub received: u64,
    /// Bytes sent.
    pub sent: u64,
    /// Packets both ways.
    pub packets: u64,
    /// Errors and drops both ways.
    pub errors: u64,
}

/// An interface and its rates.
#[derive(Clone, Debug, Default)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Since the boot.
    pub total: Traffic,
    /// Bytes received in a second.
    pub received_bps: u64,
    /// Bytes sent in a second.
    pub sent_bps: u64,
    /// Errors and drops for each packet, 0–1.
    pub error_ratio: f64,
}

/// What changed between two looks.
#[derive(Clone, Debug, Default)]
pub struct Rates {
    /// Share of all processors that was busy, 0–100.
    pub cpu_percent: f64,
    /// Interfaces but the loopback, by name.
    pub interfaces: Vec<Interface>,
}

#[derive(Default)]
struct Looks {
    last: Option<(Instant, Counters)>,
    rates: Rates,
}

/// Rates since the look before. Clones share the looks.
#[derive(Clone, Default)]
pub struct Sampler(Arc<Mutex<Looks>>);

impl Sampler {
    /// The rates since the last look that is a second old or older; a quicker one gets the same rates again.
    pub fn rates(&self) -> Rates {
        let mut looks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if looks.last.as_ref().is_some_and(|(when, _)| now.duration_since(*when) < APART) {
            return looks.rates.clone();
        }
        let counters = counters();
        let before = looks.last.replace((now, counters.clone()));
        let (when, old) = before.unwrap_or((now, Counters::default()));
        looks.rates = between(&old, &counters, now.duration_since(when).as_secs_f64());
        looks.rates.clone()
    }
}

fn between(old: &Counters, new: &Counters, seconds: f64) -> Rates {
    let (busy, all) = (new.busy.saturating_sub(old.busy), new.all.saturating_sub(old.all));
    // The first look sees the mean since the boot, which is still true.
    let cpu_percent = if all > 0 { (busy as f64 / all as f64 * 1000.0).round() / 10.0 } else { 0.0 };
    let interface = |(name, total): (&String, &Traffic)| {
        let before = old.interfaces.get(name).copied().unwrap_or(*total);
        let per_second = |now: u64, then: u64| if seconds > 0.0 { (now.saturating_sub(then) as f64 / seconds) as u64 } else { 0 };
        let (packets, errors) = (total.packets.saturating_sub(before.packets), total.errors.saturating_sub(before.errors));
        Interface {
            name: name.clone(),
            total: *total,
            received_bps: per_second(total.received, before.received),
            sent_bps: per_second(total.sent, before.sent),
            error_ratio: errors as f64 / packets.max(1) as f64,
        }
    };
    Rates { cpu_percent, interfaces: new.interfaces.iter().map(interface).collect() }
}

fn read(path: &str) -> String {
    String::from_utf8_lossy(&vault::read_config(Path::new(path)).unwrap_or_default()).into_owned()
}

fn counters() -> Counters {
    let (busy, all) = cpu(&read("/proc/stat"));
    Counters { busy, all, interfaces: interfaces(&read("/proc/net/dev")) }
}

/// Busy and all ticks of the line of all processors: idle and waiting for the disk are not busy.
fn cpu(stat: &str) -> (u64, u64) {
    let fields: Vec<u64> =
        stat.lines().next().unwrap_or_default().split_whitespace().skip(1).map(|field| field.parse().unwrap_or(0)).collect();
    // user nice system idle iowait irq softirq steal; guest time is in user already.
    let all = fields.iter().take(8).fold(0u64, |sum, ticks| sum.saturating_add(*ticks));
    let idle = fields.get(3).copied().unwrap_or(0).saturating_add(fields.get(4).copied().unwrap_or(0));
    (all.saturating_sub(idle), all)
}

fn interfaces(dev: &str) -> BTreeMap<String, Traffic> {
    let line = |line: &str| {
        let (name, fields) = line.split_once(':')?;
        let fields: Vec<u64> = fields.split_whitespace().map(|field| field.parse().unwrap_or(0)).collect();
        let at = |n: usize| fields.get(n).copied().unwrap_or(0);
        let traffic = Traffic {
            received: at(0),
            sent: at(8),
            packets: at(1).saturating_add(at(9)),
            errors: at(2).saturating_add(at(3)).saturating_add(at(10)).saturating_add(at(11)),
        };
        Some((name.trim().to_owned(), traffic)).filter(|(name, _)| name != "lo")
    };
    dev.lines().skip(2).filter_map(line).take(64).collect()
}

/// Memory of this host in bytes: all and available.
pub fn memory() -> (u64, u64) {
    let text = read("/proc/meminfo");
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next()?.parse::<u64>().ok()
    };
    (field("MemTotal:").unwrap_or(0).saturating_mul(1024), field("MemAvailable:").unwrap_or(0).saturating_mul(1024))
}

/// Load of the last minute.
pub fn load() -> f64 {
    read("/proc/loadavg").split_whitespace().next().and_then(|load| load.parse().ok()).unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_words_are_read() {
        assert_eq!(cpu("cpu  100 10 50 800 40 0 0 0 7 0\ncpu0 1 1 1 1"), (160, 1000));
        let dev = "Inter-| Receive | Transmit\n face |bytes packets errs drop fifo frame compressed multicast|bytes packets errs drop fifo colls carrier compressed\n    lo: 9 9 0 0 0 0 0 0 9 9 0 0 0 0 0 0\n  eth0: 1000 10 1 2 0 0 0 0 500 5 3 4 0 0 0 0\n";
        let seen = interfaces(dev);
        assert_eq!((seen.len(), seen.get("eth0").copied()), (1, Some(Traffic { received: 1000, sent: 500, packets: 15, errors: 10 })));
        let old = Counters { busy: 60, all: 500, interfaces: seen.clone() };
        let mut new = Counters { busy: 160, all: 1000, interfaces: seen };
        if let Some(eth0) = new.interfaces.get_mut("eth0") {
            (eth0.received, eth0.packets, eth0.errors) = (3000, 115, 20);
        }
        let rates = between(&old, &new, 2.0);
        let eth0 = rates.interfaces.first().map(|eth0| (eth0.received_bps, eth0.sent_bps, eth0.error_ratio));
        assert_eq!((rates.cpu_percent, eth0), (20.0, Some((1000, 0, 0.1))));
    }
}

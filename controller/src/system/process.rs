//! This process in figures, from the kernel.
//!
//! Owns: reading `/proc/self`. Never: fails: what the kernel does not tell is 0. A crash here costs nothing.

use std::path::Path;

use shared::vault;

/// Resident memory in bytes; 0 where the kernel does not tell.
pub fn resident_bytes() -> u64 {
    let pages = vault::read_config(Path::new("/proc/self/statm")).ok().and_then(|bytes| {
        let text = String::from_utf8(bytes).ok()?;
        text.split_whitespace().nth(1)?.parse::<u64>().ok()
    });
    pages.unwrap_or(0).saturating_mul(rustix::param::page_size() as u64)
}

/// Processor time that this process has used, in seconds; 0 where the kernel does not tell.
pub fn cpu_seconds() -> f64 {
    let ticks = vault::read_config(Path::new("/proc/self/stat")).ok().and_then(|bytes| {
        let text = String::from_utf8_lossy(&bytes).into_owned();
        // The name in brackets may hold spaces; the fields after it do not.
        let (_, fields) = text.rsplit_once(')')?;
        let mut fields = fields.split_whitespace().skip(11);
        let (user, system) = (fields.next()?.parse::<u64>().ok()?, fields.next()?.parse::<u64>().ok()?);
        Some(user.saturating_add(system))
    });
    ticks.unwrap_or(0) as f64 / rustix::param::clock_ticks_per_second() as f64
}

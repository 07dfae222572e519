//! The control plane: REST, WebSocket, job queue, fleet gateway, store.
//!
//! Owns: what people and programs talk to, and the truth about jobs. Never: moves a byte of a disk, opens a host that a user named.
//! A crash here costs nothing that was answered: what comes up from the store is right.

pub mod access;
pub mod admin;
pub mod alerts;
pub mod app;
pub mod carbon;
pub mod config;
pub mod egress;
pub mod files;
pub mod fleet;
pub mod http;
pub mod jobs;
pub mod live;
pub mod providers;
pub mod schedules;
pub mod store;
pub mod system;
pub mod uploads;
pub mod vms;
pub mod webhooks;

pub use app::{App, Error, Running, run};
pub use config::Config;

/// Switches core dumps of this process off: secrets are in its memory.
pub fn no_core_dumps() {
    let none = rustix::process::Rlimit { current: Some(0), maximum: Some(0) };
    if let Err(e) = rustix::process::setrlimit(rustix::process::Resource::Core, none) {
        tracing::warn!(cause = %e, "core dumps could not be switched off");
    }
}

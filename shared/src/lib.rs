//! The vocabulary that the controller, the agents and the CLI share: ids, the job machine, leases, progress, manifests, secrets, paths.
//!
//! Owns: pure types and pure functions, and the one opener of paths ([`vault`]).
//! Never: talks to a network or a database, keeps state of its own.
//! A crash here costs nothing: what has state lives in the controller's store or the agent's journal.

pub mod address;
pub mod clock;
pub mod deploy;
pub mod details;
pub mod error;
pub mod folder;
pub mod guest;
pub mod ids;
pub mod job;
pub mod lease;
pub mod manifest;
pub mod migrate;
pub mod options;
pub mod progress;
pub mod secret;
pub mod segment;
pub mod snapshots;
pub mod sniff;
pub mod telemetry;
pub mod vault;
pub mod vm;

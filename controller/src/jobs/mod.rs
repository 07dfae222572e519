//! Jobs: what people asked for, where it stands, and what came of it.
//!
//! ```text
//! routes ─► service (checks) ─► queue (actor) ─► core ▸ intake ▸ reports ▸ leases ─► store
//!                                   │ effects
//!                       fleet (agents)   live (watchers)   board (readers)
//! ```
//! Owns: the rows of `jobs` and `job_logs`, the queue. Never: moves bytes, trusts an agent's message of another assignment.
//! A crash here costs at most five seconds of progress counters.

pub mod batch;
pub mod batches;
pub mod board;
pub mod core;
pub mod footprint;
pub mod holds;
pub mod intake;
pub mod leases;
pub mod legacy;
pub mod lists;
pub mod logbook;
pub mod logs;
pub mod migrate;
pub mod places;
pub mod plan;
pub mod queue;
pub mod record;
pub mod reports;
pub mod routes;
pub mod service;
pub mod sources;
pub mod state;
pub mod store;
pub mod timing;
pub mod view;

#[cfg(test)]
pub(crate) mod tests;

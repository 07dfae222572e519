//! Carbon: how clean the grid is now and will be, and which jobs wait for it.
//!
//! ```text
//! routes ─► service (cache, back-off, fall-back) ─► sources (HTTP, through egress)
//!               ▲      └─► profile (embedded)          windows (pure): the best hours
//!            waiter ─► decision (pure) ─► jobs::queue (hold, release)
//! ```
//! Owns: intensities and what follows from them. Never: changes a job (the queue does, at the waiter's word); lets a source that is away,
//! slow or wrong stop anything: then the embedded profile answers, and is labelled so.
//! A crash here costs the cache; a job that waits is released by the queue's clock at the start that was planned last.

mod decision;
pub mod profile;
pub mod routes;
pub mod service;
mod sources;
pub mod waiter;
mod windows;

#[cfg(test)]
mod tests;

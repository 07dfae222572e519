//! Schedules: jobs that are made again and again, at the times of a cron expression.
//!
//! ```text
//! ticker (each second) ─► runner ▸ plan: due times become rows ─► claim: compare-and-set ─► check ─► queue.submit with a derived key
//! routes ─► service ─► runner (run now)                                    │
//!                                                    store: schedules, schedule_runs
//! ```
//! A run: `pending ─claim→ claimed ─job made→ started`, or `skipped` (overlap, missed, switched off) or `failed` (the check refused).
//!
//! Owns: the rows of `schedules` and `schedule_runs`, when a job is made. Never: runs a job (the queue does), keeps a due time in memory
//! only. Two controllers, a restart or a clock that jumps make no second run of a due time: it is one row, by a unique key.
//! A crash here costs nothing: between claim and job the run is taken over, and its key finds the job where it was made.

pub mod claims;
pub mod cron;
pub mod plan;
pub mod routes;
pub mod runner;
pub mod service;
pub mod store;
pub mod ticker;
pub mod view;

#[cfg(test)]
mod tests;

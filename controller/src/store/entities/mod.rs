//! The rows as types, one file per table. Times are milliseconds since 1970, UTC.
//!
//! Owns: the shape of rows. Never: decides anything. A crash here costs nothing.

pub mod agents;
pub mod alerts;
pub mod api_tokens;
pub mod audit;
pub mod connections;
pub mod idempotency;
pub mod job_logs;
pub mod jobs;
pub mod join_tokens;
pub mod schedule_runs;
pub mod schedules;
pub mod sessions;
pub mod settings;
pub mod upload_chunks;
pub mod uploads;
pub mod users;
pub mod vms;
pub mod webhook_deliveries;
pub mod webhooks;

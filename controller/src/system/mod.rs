//! System: how the installation is.
//!
//! Owns: health, probes, metrics. Never: changes anything. A crash here costs nothing.

pub mod audit;
pub mod findings;
pub mod health;
pub mod host;
pub mod metrics;
pub mod preflight;
pub mod process;
pub mod readiness;
pub mod routes;
pub mod score;
pub mod state;

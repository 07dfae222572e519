//! System: how the installation is.
//!
//! Owns: health, probes, metrics. Never: changes anything. A crash here costs nothing.

pub mod audit;
pub mod metrics;
pub mod process;
pub mod routes;

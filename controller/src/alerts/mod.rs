//! Alerts: what is wrong with the installation, found by rules over real state.
//!
//! ```text
//! Watch (each 5 s) ─► facts ─► rules (pure) ─► rows, webhook deliveries (one transaction) ─► WebSocket, Prometheus
//!                                                     no row ─raise─► active ─gone─► resolved
//! ```
//! Owns: the table `alerts`, the rules and their thresholds. One alert is active for a rule and a resource at a time.
//! Never: mends anything, raises again after a restart what is raised already.
//! A crash here costs nothing: the next look finds what is wrong, and the rows say what was told.

pub mod facts;
pub mod routes;
pub mod rules;
pub mod store;
pub mod thresholds;
pub mod watch;

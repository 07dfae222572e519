//! The fleet: agents that dial in, who they are, and the way to them.
//!
//! ```text
//! agent ══TLS 1.3══► gateway (tonic) ─► link (one actor per agent) ─► jobs::queue, vms
//!                        │ Enroll, Renewal: enroll ▸ ca                registry ─► every link
//!                        │ Transfer, Pull: transfer ◄─► files, uploads
//!                        │ Console: console ◄─► vms
//! ```
//! Owns: certificates, join tokens, sessions, the rows of `agents` and `join_tokens`.
//! Never: dials out, takes a message from an agent that is not who its certificate says, waits for an agent that does not read.
//! A crash here costs the sessions: agents come back and say what they hold.

pub mod ca;
pub mod console;
pub mod enroll;
pub mod gateway;
pub mod link;
pub mod registry;
pub mod routes;
pub mod session;
pub mod store;
pub mod tls;
pub mod transfer;

#[cfg(test)]
mod tests;

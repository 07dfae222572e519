//! Providers: the connections through which VMs are seen, each served by one agent.
//!
//! Owns: the `connections` table, the kinds and what this installation can do with them now.
//! Never: opens a host or a folder itself: the agent is asked. A crash here costs nothing.

pub mod account;
pub mod capabilities;
pub mod change;
pub mod connect;
pub mod routes;
pub mod service;

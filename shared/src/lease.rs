//! How long a running job belongs to an agent that is not heard from.
//!
//! ```text
//! last answer ── 20 s ── agent stops writing and parks ── 30 s lease ends ── 40 s controller gives the job away
//! ```
//! Owns: the four numbers. The ten seconds between the agent's stop and the lease's end absorb a slow clock; the ten after it, a slow network.
//! Never: measures wall-clock time (both sides count on monotonic clocks). A crash here costs nothing.

use std::time::Duration;

/// An agent reports this often; the controller answers each.
pub const HEARTBEAT: Duration = Duration::from_secs(5);
/// An agent without an answer this long stops writing.
pub const AGENT_STOPS: Duration = Duration::from_secs(20);
/// The lease.
pub const LEASE: Duration = Duration::from_secs(30);
/// The controller takes a job back after this silence.
pub const REASSIGN: Duration = Duration::from_secs(40);

//! VMs: the inventory that connections tell, and how a VM is found in it.
//!
//! Owns: the `vms` table. Never: asks a provider itself (agents do). A crash here costs nothing: the next inventory says it again.

pub mod compare;
pub mod console;
pub mod deploy;
pub mod power;
pub mod routes;
pub mod service;
pub mod snapshots;

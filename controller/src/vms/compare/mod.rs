//! Compare: two VMs side by side, ranked by what breaks a boot; their disks by digest where that is asked for.
//!
//! Owns: the ranking and its words. Never: moves a disk's data: agents answer digests.
//! A crash here costs one answer.

pub mod rank;
pub mod routes;
pub mod service;

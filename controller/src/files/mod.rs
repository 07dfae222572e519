//! Files: what lies in the roots of this controller and of its agents, to look at, to download, and to remove.
//!
//! ```text
//! routes ─► service: whose root is it? ─► here: vault ─► body (two chunks read ahead)
//!                                     └─► an agent: questions over the Session, bytes by fleet::transfer
//! exports: manifest, removal, retention          sweep: what time removes
//! ```
//! Owns: nothing on a disk. Never: leaves a root, keeps a byte of an agent's file. A crash here costs the downloads, which go on by Range.

pub mod body;
pub mod exports;
pub mod range;
pub mod routes;
pub mod service;
pub mod sweep;

//! Uploads: files that people send in chunks, and that jobs take as their source.
//!
//! ```text
//! routes ─► service (checks, quota) ─► part (bytes) ▸ store (rows)        shelf ─► the agent whose assignment names an upload
//! ```
//! Owns: the root `uploads` of this controller. Never: gives an agent what no assignment of it names.
//! A crash here costs the chunks that were not answered.

pub mod shelf;

//! Uploads: files that people send in chunks, and that jobs take as their source.
//!
//! ```text
//! routes ─► service (checks, quota, turns) ─► part (bytes) ▸ store (rows)        shelf ─► the agent whose assignment names an upload
//! ```
//! Owns: the root `uploads` of this controller, the rows of `uploads` and `upload_chunks`.
//! Never: holds a chunk in memory, says that it has a chunk before its bytes are on the disk, gives an agent what no assignment of it names.
//! A crash here costs the chunks that were not answered.

pub mod part;
pub mod receive;
pub mod routes;
pub mod service;
pub mod shelf;
pub mod store;

//! What a window of a file is, from its bytes alone: `shared::sniff` over a window.
//!
//! Owns: nothing but the adapter. Never: decides (see there). A crash here costs nothing.

pub use shared::sniff::{ACCEPTED, Kind};

use super::disk::{Result, Window};

/// Says what the window holds.
pub fn sniff(window: &Window) -> Result<Kind> {
    shared::sniff::sniff(window.len(), &|bytes, at| Ok(window.read_exact_at(bytes, at)?))
}

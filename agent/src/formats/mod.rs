//! Disk formats: one folder a format, one file a structure.
//!
//! Owns: reading and writing of images. Never: opens a path, starts a thread, guesses a format. A crash here costs nothing.

pub mod chain;
pub mod deflate;
pub mod disk;
pub mod ova;
pub mod over;
pub mod places;
pub mod qcow2;
pub mod raw;
pub mod sniff;
pub mod vdi;
pub mod vhd;
pub mod vhdx;
pub mod vmdk;

#[cfg(test)]
mod differential;
#[cfg(test)]
mod refused;

pub use disk::*;

//! Guests: what lies on their disks, and what becomes of them on other hardware.
//!
//! Owns: looking into a guest ([`inspect`]). Never: opens a path or a connection: it is given disks. A crash here costs one answer.

pub mod inspect;

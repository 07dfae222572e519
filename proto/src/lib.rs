//! The fleet protocol between controller and agents, generated from `hypersdk/v1/fleet.proto`.
//!
//! Owns: the messages and the protocol's version. Never: decides anything. A crash here costs nothing.

/// Version that both sides say first. A controller refuses any other, with the reason in `Welcome.refused`.
pub const PROTOCOL: u32 = 1;

/// Generated code.
#[allow(missing_docs, clippy::all)]
pub mod v1 {
    tonic::include_proto!("hypersdk.v1");
}

//! The fleet protocol between controller and agents, generated from `hypersdk/v1/fleet.proto`.
//!
//! Owns: the messages and the protocol's version. Never: decides anything. A crash here costs nothing.

/// Version that both sides say first. A controller refuses any other, with the reason in `Welcome.refused`.
pub const PROTOCOL: u32 = 1;

/// A name that is in every gateway's certificate. The CA is the installation's own and pinned by the join token, so that an agent need not
/// know under which address it reaches its controller.
pub const CONTROLLER_NAME: &str = "controller.hypersdk.internal";

/// Generated code.
#[allow(missing_docs, clippy::all)]
pub mod v1 {
    tonic::include_proto!("hypersdk.v1");
}

impl std::fmt::Debug for v1::Account {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Account").field("insecure", &self.insecure).field("fingerprint", &self.fingerprint).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for v1::ConsolePiece {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ConsolePiece").field("id", &self.id).finish_non_exhaustive()
    }
}

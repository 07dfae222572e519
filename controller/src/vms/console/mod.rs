//! The console of a VM in somebody's browser: VNC over a WebSocket.
//!
//! ```text
//! viewer ◄═ WebSocket, binary frames of RFB ═► session (actor) ◄─► fleet::console ◄═ gRPC ═► agent ◄─► QEMU's VNC
//!                                               service: who may, the audit, whether they still may
//! ```
//! Owns: who may look and type, and that it stands in the audit. Never: reads RFB, keeps or logs what is shown or typed: a password of the
//! VM's VNC is between viewer and VM. A crash here costs the viewers.

pub mod routes;
pub mod service;
mod session;

//! Webhooks: news by HTTP to whoever wants them.
//!
//! ```text
//! alert raised, job ended ─► a row for each webhook that wants it (once) ─► Courier: in order, one call at a time for each webhook
//!     2xx ─► delivered      anything else ─► again after 1, 2, 4 … 1024 s; after 12 calls given up, and the next in line
//! ```
//! Owns: the tables `webhooks` and `webhook_deliveries`, the signature, the calls.
//! Never: calls what `egress` does not permit, follows a redirect, shows a secret after the answer that made it.
//! A crash here costs nothing: what was not noted as delivered is called again (receivers know a call by its `X-HyperSDK-Delivery`).

pub mod courier;
pub mod routes;
pub mod service;
pub mod signature;
pub mod store;

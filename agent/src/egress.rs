//! The one dialer.
//!
//! Owns: every connection that the agent opens. Today there is one kind: gRPC to its controller, TLS with the pinned CA of the join token.
//! Never: follows a redirect, dials a host that a guest or a REST client named. A crash here costs the session; it dials again.

use std::time::Duration;

use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Error, Identity};

/// Dials the controller; with a client identity once there is one.
pub async fn controller(url: &str, ca_pem: &str, identity: Option<(&str, &str)>) -> Result<Channel, Error> {
    let mut tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(ca_pem)).domain_name(proto::CONTROLLER_NAME);
    if let Some((certificate, key)) = identity {
        tls = tls.identity(Identity::from_pem(certificate, key));
    }
    Endpoint::from_shared(url.to_owned())?
        .tls_config(tls)?
        .connect_timeout(Duration::from_secs(10))
        .http2_keep_alive_interval(Duration::from_secs(10))
        .keep_alive_timeout(Duration::from_secs(10))
        .keep_alive_while_idle(true)
        .connect()
        .await
}

//! The one dialer.
//!
//! Owns: every connection that the agent opens: gRPC to its controller, TLS with the pinned CA of the join token; HTTPS to a hypervisor that
//! an admin connected, whose certificate is verified, or pinned by its fingerprint, or not looked at where the admin said so; QEMU's sockets
//! on this host.
//! Never: follows a redirect, asks a proxy, reaches link-local and metadata addresses, dials a host that a guest named.
//! A crash here costs the session; it dials again.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::{CertificateError, DigitallySignedStruct, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use sha2::{Digest, Sha256};
use shared::address::may_be_dialled;
use tokio::io::{AsyncRead, AsyncWrite};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Error, Identity};

/// Longest time to connect.
const CONNECT: Duration = Duration::from_secs(10);

/// Longest silence in the middle of an answer; a question for changes may wait 30 s.
const SILENCE: Duration = Duration::from_secs(60);

/// Dials the controller; with a client identity once there is one.
pub async fn controller(url: &str, ca_pem: &str, identity: Option<(&str, &str)>) -> Result<Channel, Error> {
    let mut tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(ca_pem)).domain_name(proto::CONTROLLER_NAME);
    if let Some((certificate, key)) = identity {
        tls = tls.identity(Identity::from_pem(certificate, key));
    }
    Endpoint::from_shared(url.to_owned())?
        .tls_config(tls)?
        .connect_timeout(CONNECT)
        .http2_keep_alive_interval(Duration::from_secs(10))
        .keep_alive_timeout(Duration::from_secs(10))
        .keep_alive_while_idle(true)
        .connect()
        .await
}

/// Dials a socket of this host: QEMU's, which a backup job of ours has made.
pub fn local(socket: &Path) -> io::Result<UnixStream> {
    UnixStream::connect(socket)
}

/// Where a VM shows its screen: on this host, and nowhere else.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Screen {
    /// A port of the loopback.
    Port(SocketAddr),
    /// A socket that QEMU has made.
    Socket(PathBuf),
}

/// Bytes both ways.
pub trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// Dials a VM's screen.
///
/// # Errors
/// When nobody listens there within 10 s, or it is no address of the loopback.
#[allow(clippy::disallowed_methods)]
pub async fn screen(screen: &Screen) -> io::Result<Box<dyn Duplex>> {
    let dial = async {
        match screen {
            Screen::Port(address) if address.ip().is_loopback() => {
                let stream = tokio::net::TcpStream::connect(address).await?;
                // A key must not wait for the next one.
                stream.set_nodelay(true)?;
                Ok(Box::new(stream) as Box<dyn Duplex>)
            }
            Screen::Port(address) => Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{address} is no address of the loopback"))),
            Screen::Socket(path) => Ok(Box::new(tokio::net::UnixStream::connect(path).await?) as Box<dyn Duplex>),
        }
    };
    tokio::time::timeout(CONNECT, dial).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

/// Whom to believe at the other end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trust {
    /// Any certificate will do.
    pub insecure: bool,
    /// SHA-256 of the one certificate that will do, hex without colons, lower case.
    pub fingerprint: Option<String>,
    /// SHA-1 of the one certificate that will do: what a vCenter, itself trusted, tells of its hosts. Hex without colons, lower case.
    pub thumbprint: Option<String>,
}

/// SHA-256 of the certificate that was refused last.
#[derive(Clone, Debug, Default)]
pub struct Refused(Arc<Mutex<Option<String>>>);

impl Refused {
    /// Takes it.
    pub fn take(&self) -> Option<String> {
        self.0.lock().unwrap_or_else(|e| e.into_inner()).take()
    }
}

/// A client for a hypervisor, and what certificate it refused.
///
/// # Errors
/// When TLS cannot be set up.
pub fn hypervisor(trust: &Trust) -> Result<(reqwest::Client, Refused), String> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let refused = Refused::default();
    let inner = rustls_platform_verifier::Verifier::new(provider.clone()).map_err(|e| e.to_string())?;
    let verifier = Verifier { trust: trust.clone(), inner, provider: provider.clone(), refused: refused.clone() };
    let tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| e.to_string())?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    let client = reqwest::Client::builder()
        .tls_backend_preconfigured(tls)
        .https_only(true)
        .http1_only()
        .redirect(reqwest::redirect::Policy::none())
        .no_proxy()
        .connect_timeout(CONNECT)
        .tcp_keepalive(Duration::from_secs(20))
        .read_timeout(SILENCE)
        .user_agent(concat!("hypersdk/", env!("CARGO_PKG_VERSION")))
        .dns_resolver(Arc::new(Resolver))
        .build()
        .map_err(|e| e.to_string())?;
    Ok((client, refused))
}

/// Whether an address that was given as such may be connected to; names are looked at when they are resolved.
pub fn permits(host: &str) -> bool {
    host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>().map_or(true, may_be_dialled)
}

struct Resolver;

impl Resolve for Resolver {
    fn resolve(&self, name: Name) -> Resolving {
        Box::pin(async move {
            let found: Vec<SocketAddr> =
                tokio::net::lookup_host((name.as_str(), 0)).await?.filter(|found| may_be_dialled(found.ip())).collect();
            if found.is_empty() {
                return Err("it has no address that may be connected to".into());
            }
            Ok(Box::new(found.into_iter()) as Addrs)
        })
    }
}

/// The system's own judgement, but for what an admin pinned or waved through.
#[derive(Debug)]
struct Verifier {
    trust: Trust,
    inner: rustls_platform_verifier::Verifier,
    provider: Arc<CryptoProvider>,
    refused: Refused,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let found = hex::encode(Sha256::digest(end_entity));
        let verdict = match &self.trust.fingerprint {
            Some(pinned) if *pinned == found => Ok(ServerCertVerified::assertion()),
            Some(_) => Err(rustls::Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure)),
            None if self.trust.thumbprint.as_ref().is_some_and(|told| *told == hex::encode(sha1::Sha1::digest(end_entity))) => {
                Ok(ServerCertVerified::assertion())
            }
            None if self.trust.insecure => Ok(ServerCertVerified::assertion()),
            None => self.inner.verify_server_cert(end_entity, intermediates, server_name, ocsp, now),
        };
        if verdict.is_err() {
            *self.refused.0.lock().unwrap_or_else(|e| e.into_inner()) = Some(found);
        }
        verdict
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_near_the_metadata_services_is_dialled() {
        for good in ["10.0.0.7", "127.0.0.1", "vc.example.org", "[2001:db8::1]"] {
            assert!(permits(good), "{good}");
        }
        for bad in ["169.254.169.254", "100.100.100.200", "[fe80::1]", "0.0.0.0", "[::ffff:169.254.1.1]", "224.0.0.1"] {
            assert!(!permits(bad), "{bad}");
        }
    }
}

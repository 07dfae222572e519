//! TLS of the gateway: 1.3 only, our own CA, client certificates offered and checked, demanded by the RPCs that need one.
//!
//! Owns: the handshake. Never: lets a certificate of another CA in; takes a bearer for current because the handshake passed: one whose
//! time has run out passes it too, for Renewal alone, and every other RPC refuses it.
//! A crash here costs one connection.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use rustls::client::danger::HandshakeSignatureValid;
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, RootCertStore, ServerConfig, SignatureScheme};
use rustls_pki_types::{CertificateDer, UnixTime};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::ca::{self, Authority};

/// A handshake that takes longer is dropped.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Handshakes at a time.
const AT_ONCE: usize = 256;

/// Settings for the gateway's side.
pub fn server_config(authority: &Authority, names: &[String]) -> Result<ServerConfig, ca::Error> {
    let wrong = |e: &dyn std::fmt::Display| ca::Error::Certificate(e.to_string());
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut roots = RootCertStore::empty();
    roots.add(authority.der().clone()).map_err(|e| wrong(&e))?;
    let strict = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
        .allow_unauthenticated()
        .build()
        .map_err(|e| wrong(&e))?;
    let (certificate, key) = authority.certify_server(names)?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| wrong(&e))?
        .with_client_cert_verifier(Arc::new(PatientVerifier(strict)))
        .with_single_cert(vec![certificate], key)
        .map_err(|e| wrong(&e))?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

/// Takes what the strict verifier takes, and what it would have taken in the certificate's last second.
#[derive(Debug)]
struct PatientVerifier(Arc<dyn ClientCertVerifier>);

impl ClientCertVerifier for PatientVerifier {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.0.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        match self.0.verify_client_cert(end_entity, intermediates, now) {
            // The time is checked before the signature, so the whole check is done again as of then.
            Err(rustls::Error::InvalidCertificate(CertificateError::Expired | CertificateError::ExpiredContext { .. })) => {
                let last = ca::last_second(end_entity).map_err(|_| rustls::Error::InvalidCertificate(CertificateError::BadEncoding))?;
                self.0.verify_client_cert(end_entity, intermediates, UnixTime::since_unix_epoch(Duration::from_secs(last)))
            }
            other => other,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls12_signature(message, certificate, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls13_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}

/// Accepts connections until the receiver is gone. Handshakes run beside one another, so a slow one holds nobody up.
pub async fn accept(listener: TcpListener, config: ServerConfig, accepted: mpsc::Sender<io::Result<TlsStream<TcpStream>>>) {
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let room = Arc::new(Semaphore::new(AT_ONCE));
    loop {
        let Ok(turn) = room.clone().acquire_owned().await else { return };
        let stream = tokio::select! {
            stream = listener.accept() => stream,
            () = accepted.closed() => return,
        };
        let (stream, address) = match stream {
            Ok(stream) => stream,
            Err(error) => {
                // Too many open files, or a client that left in between: neither ends the gateway.
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (acceptor, accepted) = (acceptor.clone(), accepted.clone());
        tokio::spawn(async move {
            let _turn = turn;
            let nodelay = stream.set_nodelay(true);
            match tokio::time::timeout(HANDSHAKE, acceptor.accept(stream)).await {
                // When nobody takes it any more, the gateway is stopping.
                Ok(Ok(stream)) => drop(accepted.send(Ok(stream)).await),
                Ok(Err(error)) => tracing::debug!(%address, %error, ?nodelay, "tls handshake failed"),
                Err(_) => tracing::debug!(%address, "tls handshake took too long"),
            }
        });
    }
}

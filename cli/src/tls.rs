//! Which server certificate the client accepts.
//!
//! Owns: the check against a pinned SHA-256 fingerprint, as the controller prints it at its first start. The handshake's signatures are
//! always checked by rustls, so a pinned certificate must also be held by whoever shows it.
//! Never: sends a secret to a server whose certificate was not accepted. A crash here costs nothing.

use std::sync::{Arc, Mutex};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, SignatureScheme};
use sha2::{Digest, Sha256};

use crate::failure::Failure;

/// What makes a server trusted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trust {
    /// A certificate that the system's own authorities vouch for.
    System,
    /// This certificate and no other: SHA-256 of its DER form, 64 lower-case hex digits.
    Pinned(String),
    /// Any; what is sent can be read by whoever stands between.
    Insecure,
}

/// A fingerprint in its one spelling: 64 lower-case hex digits; colons, spaces and a leading `sha256:` are taken off.
pub fn parse_fingerprint(text: &str) -> Result<String, String> {
    let lower = text.trim().to_ascii_lowercase();
    let bare = lower.strip_prefix("sha256:").unwrap_or(&lower);
    let hex: String = bare.chars().filter(|c| *c != ':' && !c.is_whitespace()).collect();
    let good = hex.len() == 64 && hex.bytes().all(|b| b.is_ascii_hexdigit());
    if good { Ok(hex) } else { Err("a fingerprint is the SHA-256 of the certificate: 64 hex digits, with or without colons".to_owned()) }
}

/// The verifier behind [`Trust::Pinned`] and [`Trust::Insecure`]; it remembers what it was shown.
#[derive(Debug)]
pub struct Check {
    pin: Option<String>,
    seen: Mutex<Option<String>>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl Check {
    /// Accepts the pinned certificate only, or any where there is none.
    pub fn new(pin: Option<String>) -> Arc<Self> {
        let algorithms = rustls::crypto::ring::default_provider().signature_verification_algorithms;
        Arc::new(Self { pin, seen: Mutex::new(None), algorithms })
    }

    /// The one certificate that is accepted.
    pub fn pin(&self) -> Option<&str> {
        self.pin.as_deref()
    }

    /// Fingerprint of the last certificate that a server showed.
    pub fn seen(&self) -> Option<String> {
        self.seen.lock().ok().and_then(|seen| seen.clone())
    }

    /// A TLS configuration that asks this check.
    pub fn client_config(self: &Arc<Self>) -> Result<ClientConfig, Failure> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let builder = builder.map_err(|e| Failure::failed(format!("TLS cannot be set up: {e}")))?;
        Ok(builder.dangerous().with_custom_certificate_verifier(self.clone()).with_no_client_auth())
    }
}

impl ServerCertVerifier for Check {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let shown = hex::encode(Sha256::digest(end_entity.as_ref()));
        let accepted = self.pin.as_ref().is_none_or(|pin| *pin == shown);
        if let Ok(mut seen) = self.seen.lock() {
            *seen = Some(shown);
        }
        match accepted {
            true => Ok(ServerCertVerified::assertion()),
            false => Err(CertificateError::ApplicationVerificationFailure.into()),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, signed, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, signed, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_fingerprint_has_one_spelling() {
        let plain = "ab".repeat(32);
        let colons = vec!["AB"; 32].join(":");
        assert_eq!(parse_fingerprint(&colons).unwrap(), plain);
        assert_eq!(parse_fingerprint(&format!("SHA256:{plain}")).unwrap(), plain);
        assert!(parse_fingerprint("abcd").is_err());
        assert!(parse_fingerprint(&"zz".repeat(32)).is_err());
    }

    #[test]
    fn only_the_pinned_certificate_passes() {
        let shown = CertificateDer::from(b"certificate".to_vec());
        let pin = hex::encode(Sha256::digest(b"certificate"));
        let name = ServerName::try_from("localhost").unwrap();
        let verify = |check: &Check| check.verify_server_cert(&shown, &[], &name, &[], UnixTime::now()).is_ok();
        assert!(verify(&Check::new(Some(pin.clone()))));
        let other = Check::new(Some("00".repeat(32)));
        assert!(!verify(&other));
        assert_eq!(other.seen(), Some(pin));
    }
}

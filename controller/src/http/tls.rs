//! TLS of the REST server: the operator's certificate, or a self-signed one that is made at the first start and kept.
//!
//! Owns: the key file (mode 0600). Never: speaks anything below TLS 1.2. A crash here costs nothing: whole or not at all.

use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use rcgen::{CertificateParams, DnType, ExtendedKeyUsagePurpose, KeyPair};
use rustls::ServerConfig;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use shared::vault::{self, Dir};

use crate::config::Config;

const CERTIFICATE: &str = "rest-cert.pem";
const KEY: &str = "rest-key.pem";

/// Why there is no TLS.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be read or written.
    #[error("{0}: {1}")]
    Io(String, std::io::Error),
    /// What is in a file is no certificate or key.
    #[error("{0} is no PEM with what it should hold")]
    Pem(String),
    /// Making one failed.
    #[error("cannot make a certificate: {0}")]
    Make(#[from] rcgen::Error),
    /// The two do not fit.
    #[error("certificate and key: {0}")]
    Rustls(#[from] rustls::Error),
}

/// The server's TLS settings and the SHA-256 fingerprint of its certificate, hex.
pub fn server(config: &Config, data: &Dir) -> Result<(ServerConfig, String), Error> {
    let (chain, key) = match (&config.tls_cert, &config.tls_key) {
        (Some(certificate), Some(key)) => (configured(certificate)?, configured(key)?),
        _ => kept_or_made(config, data)?,
    };
    let certificates = CertificateDer::pem_slice_iter(&chain).collect::<Result<Vec<_>, _>>();
    let certificates = certificates.ok().filter(|list| !list.is_empty()).ok_or_else(|| Error::Pem("the certificate".to_owned()))?;
    let key = PrivateKeyDer::from_pem_slice(&key).map_err(|_| Error::Pem("the key".to_owned()))?;
    let fingerprint = certificates.first().map(|first| super::body::digest(first)).unwrap_or_default();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    Ok((builder.with_no_client_auth().with_single_cert(certificates, key)?, fingerprint))
}

fn configured(path: &Path) -> Result<Vec<u8>, Error> {
    vault::read_config(path).map_err(|e| Error::Io(path.display().to_string(), e))
}

fn kept_or_made(config: &Config, data: &Dir) -> Result<(Vec<u8>, Vec<u8>), Error> {
    let read = |name: &str| vault::read_optional(data, name).map_err(|e| Error::Io(name.to_owned(), e));
    if let (Some(certificate), Some(key)) = (read(CERTIFICATE)?, read(KEY)?) {
        return Ok((certificate, key));
    }
    let (certificate, key) = make(config.listen.ip())?;
    // The key first: a certificate without its key would be kept for ever.
    for (name, text) in [(KEY, &key), (CERTIFICATE, &certificate)] {
        vault::write_whole(data, name, text.as_bytes()).map_err(|e| Error::Io(name.to_owned(), e))?;
    }
    Ok((certificate.into_bytes(), key.into_bytes()))
}

fn make(listen: IpAddr) -> Result<(String, String), Error> {
    let mut names = vec!["localhost".to_owned(), "127.0.0.1".to_owned(), "::1".to_owned()];
    names.extend(hostname());
    if !listen.is_unspecified() && !listen.is_loopback() {
        names.push(listen.to_string());
    }
    let mut params = CertificateParams::new(names)?;
    params.distinguished_name.push(DnType::CommonName, "HyperSDK controller");
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let now = chrono::Utc::now();
    let day = |time: chrono::DateTime<chrono::Utc>| {
        use chrono::Datelike;
        let (month, day) = (u8::try_from(time.month()).unwrap_or(1), u8::try_from(time.day()).unwrap_or(1));
        rcgen::date_time_ymd(time.year(), month, day)
    };
    // From yesterday, for clients whose clock is behind; ten years, because nobody renews a pinned fingerprint.
    params.not_before = day(now - chrono::TimeDelta::days(1));
    params.not_after = day(now + chrono::TimeDelta::days(3650));
    let key = KeyPair::generate()?;
    Ok((params.self_signed(&key)?.pem(), key.serialize_pem()))
}

/// Name of this host, where it can stand in a certificate.
pub fn hostname() -> Option<String> {
    let bytes = vault::read_config(Path::new("/proc/sys/kernel/hostname")).ok()?;
    let name = String::from_utf8(bytes).ok()?.trim().to_ascii_lowercase();
    let is_good =
        !name.is_empty() && name.len() <= 253 && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.'));
    is_good.then_some(name)
}

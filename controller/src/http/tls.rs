//! TLS of the REST server: the operator's certificate, or a self-signed one that is made at the first start and kept.
//!
//! Owns: the key file (mode 0600), and the look for a renewed certificate of the operator's: connections that are open stay as they are,
//! new ones get the new one.
//! Never: speaks anything below TLS 1.2; takes a certificate and a key that do not belong together, or that cannot be read: then what
//! was good stays. A crash here costs nothing: whole or not at all.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use rcgen::{CertificateParams, DnType, ExtendedKeyUsagePurpose, KeyPair};
use rustls::ServerConfig;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
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
    /// Nobody would trust it.
    #[error("the certificate ended {0}")]
    Ended(String),
}

/// The server's TLS settings, the SHA-256 fingerprint of its certificate in hex, and, for configured files, who looks after them.
pub fn server(config: &Config, data: &Dir) -> Result<(ServerConfig, String, Option<Watch>), Error> {
    let files = config.tls_cert.clone().zip(config.tls_key.clone());
    let (chain, key) = match &files {
        Some((certificate, key)) => (configured(certificate)?, configured(key)?),
        None => kept_or_made(config, data)?,
    };
    let (certified, fingerprint) = certified(&chain, &key)?;
    let current = Arc::new(Current(RwLock::new(Arc::new(certified))));
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    let server = builder.with_no_client_auth().with_cert_resolver(Arc::clone(&current) as Arc<dyn ResolvesServerCert>);
    let seen = pair_digest(&chain, &key);
    let watch = files.map(|(certificate, key)| Watch { current, certificate, key, seen });
    Ok((server, fingerprint, watch))
}

/// A certificate with its key, if they belong together, and the certificate's fingerprint.
fn certified(chain: &[u8], key: &[u8]) -> Result<(CertifiedKey, String), Error> {
    let certificates = CertificateDer::pem_slice_iter(chain).collect::<Result<Vec<_>, _>>();
    let certificates = certificates.ok().filter(|list| !list.is_empty()).ok_or_else(|| Error::Pem("the certificate".to_owned()))?;
    let key = PrivateKeyDer::from_pem_slice(key).map_err(|_| Error::Pem("the key".to_owned()))?;
    let fingerprint = certificates.first().map(|first| super::body::digest(first)).unwrap_or_default();
    let certified = CertifiedKey::from_der(certificates, key, &rustls::crypto::ring::default_provider())?;
    Ok((certified, fingerprint))
}

fn pair_digest(chain: &[u8], key: &[u8]) -> String {
    format!("{} {}", super::body::digest(chain), super::body::digest(key))
}

/// What new connections get.
#[derive(Debug)]
struct Current(RwLock<Arc<CertifiedKey>>);

impl ResolvesServerCert for Current {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner)))
    }
}

/// Looks after the configured files.
pub struct Watch {
    current: Arc<Current>,
    certificate: PathBuf,
    key: PathBuf,
    /// Digest of what was looked at last, good or bad: each state of the files is said once.
    seen: String,
}

impl Watch {
    /// Looks at the files; takes them where they changed and are good. Answers the new fingerprint. Reads files: not for an async thread.
    pub fn look(&mut self) -> Option<String> {
        let (seen, read) = match (configured(&self.certificate), configured(&self.key)) {
            (Ok(chain), Ok(key)) => (pair_digest(&chain, &key), Ok((chain, key))),
            (Err(e), _) | (_, Err(e)) => (e.to_string(), Err(e)),
        };
        if seen == self.seen {
            return None;
        }
        self.seen = seen;
        let renewed = read.and_then(|(chain, key)| {
            let (certified, fingerprint) = certified(&chain, &key)?;
            check_end(&certified)?;
            Ok((certified, fingerprint))
        });
        match renewed {
            Ok((certified, fingerprint)) => {
                *self.current.0.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(certified);
                tracing::info!(fingerprint, certificate = %self.certificate.display(), "the renewed certificate is in use");
                Some(fingerprint)
            }
            Err(e) => {
                tracing::warn!(cause = %e, certificate = %self.certificate.display(), "the changed certificate is not taken; the one before stays in use");
                None
            }
        }
    }
}

/// At the start the operator's word counts; while a good one is in use, one that is over does not replace it.
fn check_end(certified: &CertifiedKey) -> Result<(), Error> {
    let wrong = || Error::Pem("the certificate".to_owned());
    let (_, parsed) = x509_parser::parse_x509_certificate(certified.end_entity_cert()?).map_err(|_| wrong())?;
    let end = parsed.validity().not_after;
    if end.timestamp() > chrono::Utc::now().timestamp() { Ok(()) } else { Err(Error::Ended(end.to_string())) }
}

/// Last second of the certificate that the next start will load, since 1970; nothing where it cannot be read.
pub fn valid_until(config: &Config) -> Option<i64> {
    let own = config.data_dir.join(CERTIFICATE);
    let chain = vault::read_config(config.tls_cert.as_deref().unwrap_or(&own)).ok()?;
    let first = CertificateDer::pem_slice_iter(&chain).next()?.ok()?;
    i64::try_from(crate::fleet::ca::last_second(&first).ok()?).ok()
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_renewed_pair_is_taken_and_a_bad_one_is_not() {
        let folder = vault::temporary_dir("tls").unwrap();
        let (certificate, key) = (folder.join("cert.pem"), folder.join("key.pem"));
        let put = |path: &Path, text: &str| vault::write_private(path, text.as_bytes()).unwrap();
        let localhost = "127.0.0.1".parse().unwrap();
        let (first, second) = (make(localhost).unwrap(), make(localhost).unwrap());
        put(&certificate, &first.0);
        put(&key, &first.1);
        let config = Config { tls_cert: Some(certificate.clone()), tls_key: Some(key.clone()), ..Config::default() };
        let data = vault::open_data_dir(&folder).unwrap();
        let (_, fingerprint, watch) = server(&config, &data).unwrap();
        let mut watch = watch.unwrap();
        let in_use = |watch: &Watch| super::super::body::digest(watch.current.0.read().unwrap().end_entity_cert().unwrap());
        assert_eq!((watch.look(), in_use(&watch)), (None, fingerprint.clone()));
        // The certificate comes first, the key a moment later; and files that are nonsense, or gone.
        put(&certificate, &second.0);
        assert_eq!((watch.look(), in_use(&watch)), (None, fingerprint.clone()));
        put(&key, "nonsense");
        assert_eq!((watch.look(), in_use(&watch)), (None, fingerprint.clone()));
        data.remove_file("key.pem").unwrap();
        assert_eq!((watch.look(), in_use(&watch)), (None, fingerprint.clone()));
        put(&key, &second.1);
        let renewed = watch.look().unwrap();
        assert!(renewed != fingerprint && renewed == in_use(&watch));
        assert_eq!(watch.look(), None);
        // One that is over.
        let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        (params.not_before, params.not_after) = (rcgen::date_time_ymd(2020, 1, 1), rcgen::date_time_ymd(2021, 1, 1));
        let pair = KeyPair::generate().unwrap();
        put(&certificate, &params.self_signed(&pair).unwrap().pem());
        put(&key, &pair.serialize_pem());
        assert_eq!((watch.look(), in_use(&watch)), (None, renewed));
        vault::open_data_dir(&folder).unwrap().remove_open_dir_all().unwrap();
    }
}

//! The installation's own certificate authority: it certifies agents and the gateway, nobody else.
//!
//! Owns: the CA's key (sealed in the settings, so that several controllers share one), what a certificate says.
//! Never: takes a name from a certificate request; the common name is the agent id that the controller chose.
//! A crash here costs nothing: the CA is made once and stored before it signs anything.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PublicKeyData, SanType,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use sea_orm::sea_query::OnConflict;
use sea_orm::{ActiveValue::Set, EntityTrait};
use serde::{Deserialize, Serialize};
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::store::entities::settings;
use crate::store::sealing::{self, Sealer};
use crate::store::{self, Store};

/// Name of the setting.
const SETTING: &str = "fleet.ca";
const DAY: Duration = Duration::from_secs(24 * 3600);
/// An agent's certificate; it renews at two thirds.
const AGENT_DAYS: u32 = 30;
/// The gateway's certificate; made at every start.
const SERVER_DAYS: u32 = 5 * 365;
const CA_DAYS: u32 = 20 * 365;
/// Largest certificate request.
const CSR_LIMIT: usize = 16 << 10;

/// Why a certificate was not made or not read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not a request that we sign.
    #[error("the certificate request is not good: {0}")]
    Request(String),
    /// Not a certificate of ours.
    #[error("the certificate cannot be read: {0}")]
    Certificate(String),
    /// Our own key or certificate.
    #[error("certificate authority: {0}")]
    Own(#[from] rcgen::Error),
    /// The key cannot be unsealed.
    #[error(transparent)]
    Sealing(#[from] sealing::Error),
    /// The store.
    #[error(transparent)]
    Store(#[from] store::Error),
}

/// As it is sealed.
#[derive(Serialize, Deserialize)]
struct Stored {
    certificate: String,
    key: String,
}

/// The certificate authority.
pub struct Authority {
    certificate_pem: String,
    certificate: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

/// Who a certificate says its bearer is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bearer {
    /// The common name: the agent's id.
    pub agent: String,
    /// SHA-256 of the key (SubjectPublicKeyInfo), hex.
    pub key_sha256: String,
    /// Whether it may be used now.
    pub is_current: bool,
}

impl Authority {
    /// Reads the installation's CA, making it at the very first start. Two controllers that start at once end with the same one.
    pub async fn open(store: &Store, sealer: &Sealer) -> Result<Self, Error> {
        if let Some(authority) = Self::read(store, sealer).await? {
            return Ok(authority);
        }
        let made = Self::generate_parts()?;
        let text = serde_json::to_vec(&made).map_err(|e| Error::Certificate(e.to_string()))?;
        let row = settings::ActiveModel {
            name: Set(SETTING.to_owned()),
            value: Set(sealer.seal(SETTING, &text)?),
            updated_at: Set(shared::clock::now().timestamp_millis()),
        };
        let first_wins = OnConflict::column(settings::Column::Name).do_nothing().to_owned();
        store
            .run(|db| async move { Ok(settings::Entity::insert(row).on_conflict(first_wins).exec_without_returning(&db).await.map(drop)?) })
            .await?;
        Self::read(store, sealer).await?.ok_or_else(|| Error::Certificate("the one just made is not in the store".to_owned()))
    }

    async fn read(store: &Store, sealer: &Sealer) -> Result<Option<Self>, Error> {
        let row = store.read(|db| async move { Ok(settings::Entity::find_by_id(SETTING).one(&db).await?) }).await?;
        let Some(row) = row else { return Ok(None) };
        let text = sealer.open_sealed(SETTING, &row.value)?;
        let stored = serde_json::from_slice(&text).map_err(|e| Error::Certificate(e.to_string()))?;
        Self::from_parts(stored).map(Some)
    }

    fn generate_parts() -> Result<Stored, Error> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name = named(&format!("HyperSDK fleet {}", shared::ids::random_hex::<4>()));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        valid_for(&mut params, CA_DAYS);
        Ok(Stored { certificate: params.self_signed(&key)?.pem(), key: key.serialize_pem() })
    }

    fn from_parts(stored: Stored) -> Result<Self, Error> {
        let key = KeyPair::from_pem(&stored.key)?;
        let (_, pem) = x509_parser::pem::parse_x509_pem(stored.certificate.as_bytes()).map_err(|e| Error::Certificate(e.to_string()))?;
        Ok(Self {
            issuer: Issuer::from_ca_cert_pem(&stored.certificate, key)?,
            certificate: CertificateDer::from(pem.contents),
            certificate_pem: stored.certificate,
        })
    }

    /// A CA that is stored nowhere, for tests.
    #[cfg(test)]
    pub fn generate() -> Result<Self, Error> {
        Self::from_parts(Self::generate_parts()?)
    }

    /// The CA's certificate as PEM: what a join token pins.
    pub fn pem(&self) -> &str {
        &self.certificate_pem
    }

    /// The CA's certificate.
    pub fn der(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// The key of a certificate request (its signature is checked), as [`Bearer::key_sha256`] spells it.
    pub fn request_key(csr_pem: &str) -> Result<String, Error> {
        Ok(key_hash(&request(csr_pem)?.public_key.subject_public_key_info()))
    }

    /// Certifies an agent for 30 days. Whatever names the request asks for are not looked at.
    pub fn certify_agent(&self, csr_pem: &str, agent: &str) -> Result<String, Error> {
        let request = request(csr_pem)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = named(agent);
        params.subject_alt_names = vec![SanType::DnsName(agent.try_into()?)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        valid_for(&mut params, AGENT_DAYS);
        Ok(params.signed_by(&request.public_key, &self.issuer)?.pem())
    }

    /// An agent's certificate whose time has run out, for tests.
    #[cfg(test)]
    pub fn certify_expired(&self, csr_pem: &str, agent: &str) -> Result<String, Error> {
        let mut params = CertificateParams::default();
        params.distinguished_name = named(agent);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        valid_for(&mut params, 1);
        params.not_before -= DAY * 3;
        params.not_after -= DAY * 2;
        Ok(params.signed_by(&request(csr_pem)?.public_key, &self.issuer)?.pem())
    }

    /// A certificate and key for the gateway under these names (DNS names or addresses) and the one that agents ask for.
    pub fn certify_server(&self, names: &[String]) -> Result<(CertificateDer<'static>, PrivateKeyDer<'static>), Error> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new([names, &[proto::CONTROLLER_NAME.to_owned()]].concat())?;
        params.distinguished_name = named("HyperSDK gateway");
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        valid_for(&mut params, SERVER_DAYS);
        let certificate = params.signed_by(&key, &self.issuer)?.der().clone();
        Ok((certificate, PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()))))
    }
}

/// Who the bearer of a certificate is. That our CA signed it, the TLS handshake has checked.
pub fn bearer(certificate: &[u8]) -> Result<Bearer, Error> {
    let (_, certificate) = X509Certificate::from_der(certificate).map_err(|e| Error::Certificate(e.to_string()))?;
    let name = certificate.subject().iter_common_name().next().and_then(|name| name.as_str().ok());
    Ok(Bearer {
        agent: name.ok_or_else(|| Error::Certificate("it has no common name".to_owned()))?.to_owned(),
        key_sha256: key_hash(certificate.public_key().raw),
        is_current: certificate.validity().is_valid(),
    })
}

/// Last second of a certificate's validity since 1970.
pub fn last_second(certificate: &[u8]) -> Result<u64, Error> {
    let (_, certificate) = X509Certificate::from_der(certificate).map_err(|e| Error::Certificate(e.to_string()))?;
    u64::try_from(certificate.validity().not_after.timestamp()).map_err(|_| Error::Certificate("it ended before 1970".to_owned()))
}

fn request(csr_pem: &str) -> Result<CertificateSigningRequestParams, Error> {
    if csr_pem.len() > CSR_LIMIT {
        return Err(Error::Request(format!("it is larger than {CSR_LIMIT} bytes")));
    }
    CertificateSigningRequestParams::from_pem(csr_pem).map_err(|e| Error::Request(e.to_string()))
}

fn key_hash(spki: &[u8]) -> String {
    hex::encode(ring::digest::digest(&ring::digest::SHA256, spki))
}

fn named(common_name: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, common_name);
    name
}

/// From an hour ago (clocks differ) for so many days.
fn valid_for(params: &mut CertificateParams, days: u32) {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let now = rcgen::date_time_ymd(1970, 1, 1) + since_epoch;
    params.not_before = now - Duration::from_secs(3600);
    params.not_after = now + DAY * days;
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(super) mod tests {
    use super::*;

    /// A key and a request that asks for more than it should get.
    pub fn greedy_request() -> (KeyPair, String) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec!["controller.example".to_owned()]).unwrap();
        params.distinguished_name = named("agent-of-somebody-else");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let csr = params.serialize_request(&key).unwrap().pem().unwrap();
        (key, csr)
    }

    #[test]
    fn an_agents_certificate_names_the_agent_and_nothing_it_asked_for() {
        let authority = Authority::generate().unwrap();
        let (_, csr) = greedy_request();
        let pem = authority.certify_agent(&csr, "agent-0011223344556677").unwrap();
        let (_, parsed) = x509_parser::pem::parse_x509_pem(pem.as_bytes()).unwrap();
        let who = bearer(&parsed.contents).unwrap();
        assert_eq!(
            who,
            Bearer { agent: "agent-0011223344556677".into(), key_sha256: Authority::request_key(&csr).unwrap(), is_current: true }
        );
        let (_, certificate) = X509Certificate::from_der(&parsed.contents).unwrap();
        assert!(!certificate.is_ca());
        assert!(!format!("{:?}", certificate.subject_alternative_name()).contains("controller.example"));
        assert!(certificate.verify_signature(Some(X509Certificate::from_der(authority.der()).unwrap().1.public_key())).is_ok());
    }

    #[test]
    fn what_is_no_request_or_was_altered_is_refused() {
        let authority = Authority::generate().unwrap();
        let (_, csr) = greedy_request();
        let other = greedy_request().1;
        // The body of one request under the signature of another.
        let lines: Vec<&str> = csr.lines().collect();
        let swapped: String = other.lines().enumerate().map(|(n, line)| format!("{}\n", if n == 2 { lines[2] } else { line })).collect();
        for bad in
            ["", "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n", swapped.as_str(), &"x".repeat(20_000)]
        {
            assert!(authority.certify_agent(bad, "agent-1").is_err(), "{bad}");
        }
    }
}

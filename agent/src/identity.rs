//! Who this agent is: its data directory, its keys, its certificate.
//!
//! Owns: `lock` (one process a directory), `agent.key`, `agent.crt`, `ca.crt`, `agent.id`, `signing.key`. Files are written whole or not at all.
//! Never: sends a private key anywhere. A crash here costs a join token at most: it was used and the certificate was not kept yet.

use std::fs::File;
use std::io;

use proto::v1::fleet_client::FleetClient;
use proto::v1::{EnrollRequest, RenewalRequest};
use rcgen::{CertificateParams, KeyPair};
use serde::Deserialize;
use shared::manifest::SigningKey;
use shared::secret::Secret;
use shared::vault::{self, Dir};
use tonic::transport::Channel;

use crate::config::Config;
use crate::egress;

/// Why there is no identity.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The directory is in use.
    #[error("another agent runs on this data directory")]
    Locked,
    /// Nothing to enrol with.
    #[error(
        "this agent is not enrolled and has no join token: make one with `hypersdk agents token` and give it as HYPERSDK_TOKEN or --token"
    )]
    NoToken,
    /// The token is not one.
    #[error("the join token cannot be read: {0}")]
    BadToken(String),
    /// The controller said no; trying again with the same token is useless.
    #[error("the controller refused the enrolment: {0}")]
    Refused(String),
    /// Not reachable, or the connection broke; worth another try.
    #[error("the controller is not reachable: {0}")]
    Away(String),
    /// The data directory.
    #[error("data directory: {0}")]
    Io(#[from] io::Error),
    /// A key or request could not be made or read.
    #[error("keys: {0}")]
    Key(String),
}

/// The content of a join token: what `hypersdk agents token` prints, base64url of this as JSON.
#[derive(Deserialize)]
struct JoinToken {
    secret: String,
    ca_pem: String,
}

/// The directory with its lock.
pub struct Home {
    /// The data directory.
    pub dir: Dir,
    /// Signs manifests.
    pub signing: SigningKey,
    /// Held for the life of the process.
    _lock: File,
}

/// A certified identity.
pub struct Identity {
    /// Given by the controller.
    pub agent_id: String,
    certificate: String,
    ca: String,
    key: Secret,
}

impl Home {
    /// Opens and locks the data directory; makes the signing key at the first start.
    pub fn open(config: &Config) -> Result<Self, Error> {
        let dir = vault::open_data_dir(&config.data_dir)?;
        let lock = vault::lock(&dir, "lock")?.ok_or(Error::Locked)?;
        let signing = signing_key(&dir)?;
        Ok(Self { dir, signing, _lock: lock })
    }

    /// The identity kept from an earlier enrolment.
    pub fn identity(&self) -> Result<Option<Identity>, Error> {
        let text = |name: &str| -> Result<Option<String>, Error> {
            let bytes = vault::read_optional(&self.dir, name)?;
            Ok(bytes.and_then(|bytes| String::from_utf8(bytes).ok()))
        };
        // agent.id is written last: without it the enrolment did not finish.
        let (Some(agent_id), Some(certificate), Some(ca), Some(key)) =
            (text("agent.id")?, text("agent.crt")?, text("ca.crt")?, text("agent.key")?)
        else {
            return Ok(None);
        };
        Ok(Some(Identity { agent_id, certificate, ca, key: Secret::new(key) }))
    }

    /// Exchanges the join token for a certificate and keeps it.
    pub async fn enroll(&self, config: &Config) -> Result<Identity, Error> {
        let token = match (&config.token, &config.token_file) {
            (Some(token), _) => token.clone(),
            (None, Some(path)) => match vault::read_config(path) {
                Ok(bytes) => Secret::new(String::from_utf8_lossy(&bytes).trim()),
                Err(e) => return Err(Error::Away(format!("the join token file is not there yet: {e}"))),
            },
            (None, None) => return Err(Error::NoToken),
        };
        let token = read_token(&token)?;
        let key = KeyPair::generate().map_err(|e| Error::Key(e.to_string()))?;
        let csr_pem = request(&config.name, &key)?;
        let channel = egress::controller(&config.controller, &token.ca_pem, None).await.map_err(away)?;
        let request = EnrollRequest {
            protocol: proto::PROTOCOL,
            token: token.secret,
            name: config.name.clone(),
            csr_pem,
            signing_key: self.signing.public_hex(),
        };
        let reply = FleetClient::new(channel).enroll(request).await.map_err(refused)?.into_inner();
        self.keep(&reply.agent_id, &reply.certificate_pem, &reply.ca_pem, &key.serialize_pem())
    }

    /// Renews the certificate when two thirds of its life are over; the old one stays good until then, so that a failure costs nothing.
    pub async fn renew(&self, config: &Config, identity: &Identity) -> Result<Option<Identity>, Error> {
        if !identity.is_due() {
            return Ok(None);
        }
        // The same key: it is who this agent is, and the controller renews for no other.
        let key = KeyPair::from_pem(identity.key.expose()).map_err(|e| Error::Key(e.to_string()))?;
        let csr_pem = request(&config.name, &key)?;
        let channel = identity.dial(config).await?;
        let reply = FleetClient::new(channel).renewal(RenewalRequest { csr_pem }).await.map_err(refused)?.into_inner();
        self.keep(&reply.agent_id, &reply.certificate_pem, &reply.ca_pem, &key.serialize_pem()).map(Some)
    }

    fn keep(&self, agent_id: &str, certificate: &str, ca: &str, key: &str) -> Result<Identity, Error> {
        for (name, text) in [("agent.key", key), ("agent.crt", certificate), ("ca.crt", ca), ("agent.id", agent_id)] {
            vault::write_whole(&self.dir, name, text.as_bytes())?;
        }
        Ok(Identity { agent_id: agent_id.to_owned(), certificate: certificate.to_owned(), ca: ca.to_owned(), key: Secret::new(key) })
    }
}

impl Identity {
    /// Dials the controller as this agent.
    pub async fn dial(&self, config: &Config) -> Result<Channel, Error> {
        egress::controller(&config.controller, &self.ca, Some((&self.certificate, self.key.expose()))).await.map_err(away)
    }

    /// Two thirds of the certificate's life are over.
    pub fn is_due(&self) -> bool {
        let Ok((_, pem)) = x509_parser::pem::parse_x509_pem(self.certificate.as_bytes()) else { return false };
        let Ok(certificate) = pem.parse_x509() else { return false };
        let (from, to) = (certificate.validity().not_before.timestamp(), certificate.validity().not_after.timestamp());
        chrono::Utc::now().timestamp() > from + (to - from) / 3 * 2
    }
}

/// The signing key of a data directory, made when it is not there.
pub fn signing_key(dir: &Dir) -> Result<SigningKey, Error> {
    let pkcs8 = match vault::read_optional(dir, "signing.key")? {
        Some(pkcs8) => pkcs8,
        None => {
            let pkcs8 = SigningKey::generate().map_err(|e| Error::Key(e.to_string()))?;
            vault::write_whole(dir, "signing.key", &pkcs8)?;
            pkcs8
        }
    };
    SigningKey::from_pkcs8(&pkcs8).map_err(|e| Error::Key(format!("signing.key: {e}")))
}

fn request(name: &str, key: &KeyPair) -> Result<String, Error> {
    let mut params = CertificateParams::new(Vec::<String>::new()).map_err(|e| Error::Key(e.to_string()))?;
    params.distinguished_name.push(rcgen::DnType::CommonName, name);
    let request = params.serialize_request(key).map_err(|e| Error::Key(e.to_string()))?;
    request.pem().map_err(|e| Error::Key(e.to_string()))
}

fn read_token(token: &Secret) -> Result<JoinToken, Error> {
    use base64::Engine;
    let json = base64::engine::general_purpose::URL_SAFE_NO_PAD
        .decode(token.expose().trim().trim_end_matches('='))
        .map_err(|_| Error::BadToken("it is not base64url; copy it whole".to_owned()))?;
    serde_json::from_slice(&json).map_err(|_| Error::BadToken("it is cut or not a join token".to_owned()))
}

fn away(error: tonic::transport::Error) -> Error {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(&error);
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    Error::Away(text)
}

fn refused(status: tonic::Status) -> Error {
    match status.code() {
        tonic::Code::PermissionDenied | tonic::Code::Unauthenticated | tonic::Code::InvalidArgument | tonic::Code::FailedPrecondition => {
            Error::Refused(status.message().to_owned())
        }
        _ => Error::Away(status.message().to_owned()),
    }
}

//! Signed tokens: HS256 by `jsonwebtoken` over ring, no other algorithm, one audience per purpose.
//!
//! Owns: the signer and the claims. Never: accepts an algorithm that a token chose. A crash here costs nothing.
//! A good signature alone opens nothing: [`super::service`] asks the store whether the token's id is still alive.

use chrono::{DateTime, Utc};
use jsonwebtoken::crypto::{CryptoProvider, JwtSigner, JwtVerifier, KeyUtils};
use jsonwebtoken::errors::{ErrorKind, Result as JwtResult};
use jsonwebtoken::signature::{Error as SignatureError, Signer, Verifier};
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use ring::hmac;
use serde::{Deserialize, Serialize};

/// Longest token that is looked at, in bytes.
const MAX_LENGTH: usize = 2048;

/// What a token is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// REST and WebSocket, for hours.
    Session,
    /// One WebSocket, for seconds.
    Ticket,
}

impl Purpose {
    fn audience(self) -> &'static str {
        match self {
            Purpose::Session => "hypersdk-api",
            Purpose::Ticket => "hypersdk-ws",
        }
    }
}

/// What a token says.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Claims {
    /// User name.
    pub sub: String,
    /// Id of this token.
    pub jti: String,
    /// Id of the session that a ticket stands for; a session's own id.
    pub sid: String,
    aud: String,
    iat: i64,
    /// End, seconds since 1970.
    pub exp: i64,
}

struct Hs256(hmac::Key);

impl Signer<Vec<u8>> for Hs256 {
    fn try_sign(&self, message: &[u8]) -> Result<Vec<u8>, SignatureError> {
        Ok(hmac::sign(&self.0, message).as_ref().to_vec())
    }
}

impl JwtSigner for Hs256 {
    fn algorithm(&self) -> Algorithm {
        Algorithm::HS256
    }
}

impl Verifier<Vec<u8>> for Hs256 {
    fn verify(&self, message: &[u8], signature: &Vec<u8>) -> Result<(), SignatureError> {
        hmac::verify(&self.0, message, signature).map_err(|_| SignatureError::new())
    }
}

impl JwtVerifier for Hs256 {
    fn algorithm(&self) -> Algorithm {
        Algorithm::HS256
    }
}

static PROVIDER: CryptoProvider =
    CryptoProvider { signer_factory: signer, verifier_factory: verifier, key_utils: KeyUtils::new_unimplemented() };

fn signer(algorithm: &Algorithm, key: &EncodingKey) -> JwtResult<Box<dyn JwtSigner>> {
    match algorithm {
        Algorithm::HS256 => Ok(Box::new(Hs256(hmac::Key::new(hmac::HMAC_SHA256, key.as_bytes())))),
        _ => Err(ErrorKind::InvalidAlgorithm.into()),
    }
}

fn verifier(algorithm: &Algorithm, key: &DecodingKey) -> JwtResult<Box<dyn JwtVerifier>> {
    match algorithm {
        Algorithm::HS256 => Ok(Box::new(Hs256(hmac::Key::new(hmac::HMAC_SHA256, key.try_get_as_bytes()?)))),
        _ => Err(ErrorKind::InvalidAlgorithm.into()),
    }
}

/// Signs and checks with the installation's key.
pub struct Signing {
    encoding: EncodingKey,
    decoding: DecodingKey,
}

impl Signing {
    /// With the key's 32 bytes.
    pub fn new(key: &[u8]) -> Self {
        // A second installation in one process (tests, `hypersdk up`) finds it installed already.
        let _ = PROVIDER.install_default();
        Self { encoding: EncodingKey::from_secret(key), decoding: DecodingKey::from_secret(key) }
    }

    /// A token. `id` is its own, `session` the session's.
    pub fn sign(&self, purpose: Purpose, user: &str, id: &str, session: &str, expires_at: DateTime<Utc>) -> JwtResult<String> {
        let claims = Claims {
            sub: user.to_owned(),
            jti: id.to_owned(),
            sid: session.to_owned(),
            aud: purpose.audience().to_owned(),
            iat: Utc::now().timestamp(),
            exp: expires_at.timestamp(),
        };
        jsonwebtoken::encode(&Header::new(Algorithm::HS256), &claims, &self.encoding)
    }

    /// What a token says, if it is ours, for this purpose, and not over.
    pub fn check(&self, purpose: Purpose, token: &str) -> Option<Claims> {
        if token.len() > MAX_LENGTH {
            return None;
        }
        let mut validation = Validation::new(Algorithm::HS256);
        validation.leeway = 0;
        validation.set_audience(&[purpose.audience()]);
        validation.set_required_spec_claims(&["exp", "aud", "sub"]);
        jsonwebtoken::decode::<Claims>(token, &self.decoding, &validation).ok().map(|token| token.claims)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use base64::Engine;
    use base64::prelude::BASE64_URL_SAFE_NO_PAD as BASE64;
    use chrono::TimeDelta;

    use super::*;

    fn signed(signing: &Signing, purpose: Purpose, minutes: i64) -> String {
        signing.sign(purpose, "admin", "id", "session", Utc::now() + TimeDelta::minutes(minutes)).unwrap()
    }

    #[test]
    fn only_our_own_unexpired_token_for_its_purpose_is_good() {
        let signing = Signing::new(&[7; 32]);
        let good = signed(&signing, Purpose::Session, 1);
        assert_eq!(signing.check(Purpose::Session, &good).unwrap().sub, "admin");
        assert!(signing.check(Purpose::Ticket, &good).is_none(), "a session's token opened as a ticket");
        assert!(signing.check(Purpose::Session, &signed(&signing, Purpose::Ticket, 1)).is_none());
        assert!(signing.check(Purpose::Session, &signed(&signing, Purpose::Session, -1)).is_none(), "expired");
        assert!(signing.check(Purpose::Session, &signed(&Signing::new(&[8; 32]), Purpose::Session, 1)).is_none(), "other key");
        for garbage in ["", ".", "..", "a.b.c", &"a".repeat(5000)] {
            assert!(signing.check(Purpose::Session, garbage).is_none());
        }
    }

    #[test]
    fn no_algorithm_but_hs256_and_no_altered_byte_passes() {
        let signing = Signing::new(&[7; 32]);
        let good = signed(&signing, Purpose::Session, 1);
        let parts: Vec<&str> = good.split('.').collect();
        for algorithm in ["none", "None", "HS384", "HS512", "RS256", "EdDSA"] {
            let header = BASE64.encode(format!(r#"{{"alg":"{algorithm}","typ":"JWT"}}"#));
            for signature in ["", parts[2]] {
                assert!(signing.check(Purpose::Session, &format!("{header}.{}.{signature}", parts[1])).is_none(), "{algorithm}");
            }
        }
        let payload = String::from_utf8(BASE64.decode(parts[1]).unwrap()).unwrap().replace("admin", "other");
        assert!(signing.check(Purpose::Session, &format!("{}.{}.{}", parts[0], BASE64.encode(payload), parts[2])).is_none());
        for at in 0..good.len() {
            let mut altered = good.clone().into_bytes();
            altered[at] = if altered[at] == b'A' { b'B' } else { b'A' };
            let altered = String::from_utf8(altered).unwrap();
            // The last character's lowest bits are padding: another spelling of the same signature is refused by the decoder.
            assert!(altered == good || signing.check(Purpose::Session, &altered).is_none(), "byte {at}");
        }
    }
}

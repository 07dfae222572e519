//! Secrets at rest: sealed with XChaCha20-Poly1305 under a key that is not in the database.
//!
//! Owns: the sealing key (from `HYPERSDK_SEALING_KEY`, else a file of the data directory with mode 0600) and the one format
//! `v1:HEX(nonce ‖ ciphertext)`. The name of what is sealed is authenticated with it, so sealed values cannot be swapped.
//! Never: writes the key or an opened secret anywhere else. A crash here costs nothing.

use chacha20poly1305::aead::{Aead, KeyInit, Payload};
use chacha20poly1305::{Key, XChaCha20Poly1305, XNonce};
use ring::rand::{SecureRandom, SystemRandom};
use shared::secret::Secret;
use shared::vault::{self, Dir};

const KEY_FILE: &str = "sealing.key";

/// Why something could not be sealed or opened.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The key is not 32 bytes in hex.
    #[error("the sealing key must be 64 hex digits (32 bytes)")]
    BadKey,
    /// The key file cannot be read or written.
    #[error("sealing key: {0}")]
    Io(#[from] std::io::Error),
    /// Another key sealed it, or it was changed.
    #[error("{0} was sealed with another key or was changed; give this controller the installation's HYPERSDK_SEALING_KEY")]
    Opened(String),
    /// The system has no random numbers, or the cipher refused.
    #[error("cannot seal")]
    Seal,
}

/// The installation's sealing key.
#[derive(Clone)]
pub struct Sealer {
    cipher: XChaCha20Poly1305,
}

impl Sealer {
    /// Takes the configured key, else the data directory's, else makes one and keeps it there.
    pub fn open(configured: Option<&Secret>, data: &Dir) -> Result<Self, Error> {
        if let Some(key) = configured {
            return Self::from_hex(key.expose());
        }
        if let Some(bytes) = vault::read_optional(data, KEY_FILE)? {
            return Self::from_hex(&String::from_utf8(bytes).map_err(|_| Error::BadKey)?);
        }
        let made = Secret::new(shared::ids::random_hex::<32>());
        vault::write_whole(data, KEY_FILE, made.expose().as_bytes())?;
        Self::from_hex(made.expose())
    }

    fn from_hex(text: &str) -> Result<Self, Error> {
        let bytes: [u8; 32] = hex::decode(text.trim()).ok().and_then(|bytes| bytes.try_into().ok()).ok_or(Error::BadKey)?;
        Ok(Self { cipher: XChaCha20Poly1305::new(&Key::from(bytes)) })
    }

    /// Seals a secret under its name.
    pub fn seal(&self, name: &str, secret: &[u8]) -> Result<String, Error> {
        let mut nonce = [0u8; 24];
        SystemRandom::new().fill(&mut nonce).map_err(|_| Error::Seal)?;
        let payload = Payload { msg: secret, aad: name.as_bytes() };
        let sealed = self.cipher.encrypt(&XNonce::from(nonce), payload).map_err(|_| Error::Seal)?;
        Ok(format!("v1:{}{}", hex::encode(nonce), hex::encode(sealed)))
    }

    /// Opens what was sealed under that name.
    pub fn open_sealed(&self, name: &str, sealed: &str) -> Result<Vec<u8>, Error> {
        let wrong = || Error::Opened(name.to_owned());
        let bytes = sealed.strip_prefix("v1:").and_then(|text| hex::decode(text).ok()).ok_or_else(wrong)?;
        let (nonce, ciphertext) = bytes.split_first_chunk::<24>().ok_or_else(wrong)?;
        let payload = Payload { msg: ciphertext, aad: name.as_bytes() };
        self.cipher.decrypt(&XNonce::from(*nonce), payload).map_err(|_| wrong())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_sealed_value_opens_under_its_own_name_and_key_only() {
        let sealer = Sealer::from_hex(&shared::ids::random_hex::<32>()).unwrap();
        let sealed = sealer.seal("jwt", b"secret").unwrap();
        assert!(!sealed.contains("secret"));
        assert_eq!(sealer.open_sealed("jwt", &sealed).unwrap(), b"secret");
        assert!(sealer.open_sealed("other", &sealed).is_err());
        let other = Sealer::from_hex(&shared::ids::random_hex::<32>()).unwrap();
        assert!(other.open_sealed("jwt", &sealed).is_err());
        for garbage in ["", "v1:", "v1:00", "v2:aa", "v1:zz"] {
            assert!(sealer.open_sealed("jwt", garbage).is_err(), "{garbage}");
        }
        assert!(Sealer::from_hex("abc").is_err());
    }
}

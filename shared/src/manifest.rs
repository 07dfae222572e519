//! The manifest: what proves that the output equals the source.
//!
//! Owns: the block size, the hash of a block, the root over a disk, the signed document beside each export.
//! Never: reads a disk (the agent's pipeline does), decides whom to trust (the caller names a key).
//! A crash here costs nothing: a manifest is written whole, before the export is published.
//!
//! A logical disk is cut into blocks of [`BLOCK`] bytes (the last may be short). Each block's digest is BLAKE3 of its bytes; a block
//! of zeros has no entry and the digest of its length's zeros by definition, so that holes cost nothing. The root is BLAKE3 over
//! `"hypersdk-manifest-v1\0"`, capacity and block size (u64 little endian each), then for each non-zero block its number (u64 little
//! endian) and digest, ascending. Whole-image formats do not enter: the same disk as VMDK, qcow2 or raw has the same root.

use std::collections::BTreeMap;

use ring::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};
use serde::{Deserialize, Serialize};

/// Bytes in a block: the grain of hashing, journalling and comparing.
pub const BLOCK: u64 = 4 << 20;

/// The document's version, in its field `version`.
pub const VERSION: u32 = 1;

/// BLAKE3 of one block.
pub type Digest = [u8; 32];

/// Digest of one block's bytes; `None` for zeros.
pub fn block_digest(bytes: &[u8]) -> Digest {
    *blake3::hash(bytes).as_bytes()
}

/// The non-zero blocks of a logical disk, by number.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Blocks(pub BTreeMap<u64, Digest>);

impl Blocks {
    /// The root digest over a disk of `capacity` bytes.
    pub fn root(&self, capacity: u64) -> Digest {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"hypersdk-manifest-v1\0");
        hasher.update(&capacity.to_le_bytes());
        hasher.update(&BLOCK.to_le_bytes());
        for (index, digest) in &self.0 {
            hasher.update(&index.to_le_bytes());
            hasher.update(digest);
        }
        *hasher.finalize().as_bytes()
    }

    /// The first block in which the two differ, where they do.
    pub fn first_difference(&self, other: &Blocks) -> Option<u64> {
        let mine = self.0.iter().find(|(index, digest)| other.0.get(index) != Some(digest)).map(|(index, _)| *index);
        let theirs = other.0.keys().find(|index| !self.0.contains_key(index)).copied();
        match (mine, theirs) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        }
    }
}

/// One logical disk in a manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskEntry {
    /// The disk's name at the source (`disk-0`).
    pub name: String,
    /// The file beside the manifest that holds it.
    pub file: String,
    /// The member inside that file where it is an OVA; else absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub member: Option<String>,
    /// Size of the logical disk in bytes.
    pub capacity: u64,
    /// Root digest, hex.
    pub root: String,
    /// Digest of each non-zero block, hex, by block number.
    pub blocks: BTreeMap<u64, String>,
    /// What the file lies over, where it holds only what changed since; the blocks are those of the whole disk all the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub over: Option<Over>,
}

/// The disk beneath a layer: another restore point, in a folder beside the one of this manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Over {
    /// The job that made it, which is its folder's name.
    pub job: String,
    /// The file in that folder.
    pub file: String,
    /// Root digest of the disk in it, hex.
    pub root: String,
}

impl DiskEntry {
    /// An entry for these blocks.
    pub fn new(name: &str, file: &str, member: Option<String>, capacity: u64, blocks: &Blocks) -> Self {
        Self {
            name: name.to_owned(),
            file: file.to_owned(),
            member,
            capacity,
            root: hex::encode(blocks.root(capacity)),
            blocks: blocks.0.iter().map(|(index, digest)| (*index, hex::encode(digest))).collect(),
            over: None,
        }
    }

    /// The blocks back as digests; fails when an entry is not 64 hex digits, lies past the capacity, or the root does not follow from them.
    pub fn blocks(&self) -> Result<Blocks, Error> {
        let count = self.capacity.div_ceil(BLOCK);
        let mut blocks = Blocks::default();
        for (index, text) in &self.blocks {
            if *index >= count {
                return Err(Error::Malformed(format!("block {index} of {} lies past the disk's {count} blocks", self.name)));
            }
            let mut digest = [0u8; 32];
            hex::decode_to_slice(text, &mut digest)
                .map_err(|_| Error::Malformed(format!("the digest of block {index} of {} is not 64 hex digits", self.name)))?;
            blocks.0.insert(*index, digest);
        }
        if hex::encode(blocks.root(self.capacity)) != self.root {
            return Err(Error::Malformed(format!("the root digest of {} does not follow from its blocks", self.name)));
        }
        Ok(blocks)
    }
}

/// One file of the export.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// Name beside the manifest.
    pub path: String,
    /// Length in bytes.
    pub size: u64,
    /// SHA-256 of the file, hex; absent for a sparse raw image whose holes would make the time follow the size.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// The format as the API spells it.
    pub format: String,
}

/// How the output was read back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Receipt {
    /// `cache_dropped` (synced, then the page cache dropped), or `not_verified`.
    pub read_back: String,
    /// Blocks read back and compared.
    pub blocks_verified: u64,
    /// Data bytes read back and compared.
    pub bytes_verified: u64,
}

/// What is signed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`VERSION`].
    pub version: u32,
    /// The job that made it; `convert` for a conversion without a server.
    pub job: String,
    /// The VM's name.
    pub vm: String,
    /// When, RFC 3339 UTC.
    pub created_at: String,
    /// Bytes in a block.
    pub block_size: u64,
    /// The logical disks.
    pub disks: Vec<DiskEntry>,
    /// The files.
    pub files: Vec<FileEntry>,
    /// How it was proven.
    pub receipt: Receipt,
    /// Of a restore point: digest of what `restore-point.json` says of its source, hex.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
}

/// The document on disk: the manifest as a string (so that what was signed is what is read), the signer's key and the signature.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Signed {
    /// The manifest (or another document), as JSON text.
    pub manifest: String,
    /// The signer's Ed25519 public key, hex.
    pub public_key: String,
    /// Ed25519 over the manifest's bytes, hex.
    pub signature: String,
}

/// Why a manifest is not good.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not such a document.
    #[error("not a manifest: {0}")]
    Malformed(String),
    /// The signature does not fit the bytes: somebody altered one of them.
    #[error("the manifest's signature does not fit its content")]
    Signature,
    /// Signed by somebody else than the caller trusts.
    #[error("the manifest is signed by {found}, not by the trusted key {trusted}")]
    Untrusted {
        /// Fingerprint of the signer.
        found: String,
        /// Fingerprint that the caller named.
        trusted: String,
    },
}

/// The agent's signing key.
pub struct SigningKey(Ed25519KeyPair);

impl SigningKey {
    /// A new key as PKCS#8, to be kept in the agent's data directory.
    pub fn generate() -> Result<Vec<u8>, Error> {
        let pkcs8 = Ed25519KeyPair::generate_pkcs8(&ring::rand::SystemRandom::new());
        Ok(pkcs8.map_err(|_| Error::Malformed("the system gave no random numbers".to_owned()))?.as_ref().to_vec())
    }

    /// The key from its PKCS#8 form.
    pub fn from_pkcs8(pkcs8: &[u8]) -> Result<Self, Error> {
        Ed25519KeyPair::from_pkcs8(pkcs8).map(Self).map_err(|e| Error::Malformed(format!("not an Ed25519 key in PKCS#8: {e}")))
    }

    /// Its public half, hex.
    pub fn public_hex(&self) -> String {
        hex::encode(self.0.public_key().as_ref())
    }

    /// Signs a manifest.
    pub fn sign(&self, manifest: &Manifest) -> Result<Signed, Error> {
        Ok(self.sign_text(serde_json::to_string(manifest).map_err(|e| Error::Malformed(e.to_string()))?))
    }

    /// Signs another document: the receipt of a migration.
    pub fn sign_text(&self, text: String) -> Signed {
        let signature = hex::encode(self.0.sign(text.as_bytes()).as_ref());
        Signed { public_key: self.public_hex(), signature, manifest: text }
    }
}

/// First 16 bytes of BLAKE3 over a public key, hex: what people compare and `--trust` takes.
pub fn fingerprint(public_key_hex: &str) -> String {
    hex::encode(&blake3::hash(public_key_hex.to_ascii_lowercase().as_bytes()).as_bytes()[..16])
}

impl Signed {
    /// Whether this text was signed so by the owner of this key.
    pub fn is_good(&self) -> bool {
        let (Ok(key), Ok(signature)) = (hex::decode(&self.public_key), hex::decode(&self.signature)) else { return false };
        UnparsedPublicKey::new(&ED25519, key).verify(self.manifest.as_bytes(), &signature).is_ok()
    }

    /// Reads and checks a document; `trust` is a fingerprint or a whole public key.
    pub fn open(bytes: &[u8], trust: Option<&str>) -> Result<(Manifest, Signed), Error> {
        let signed: Signed = serde_json::from_slice(bytes).map_err(|e| Error::Malformed(e.to_string()))?;
        let key = hex::decode(&signed.public_key).map_err(|_| Error::Malformed("public_key is not hex".to_owned()))?;
        let signature = hex::decode(&signed.signature).map_err(|_| Error::Malformed("signature is not hex".to_owned()))?;
        UnparsedPublicKey::new(&ED25519, key).verify(signed.manifest.as_bytes(), &signature).map_err(|_| Error::Signature)?;
        let found = fingerprint(&signed.public_key);
        if let Some(trusted) = trust
            && !trusted.eq_ignore_ascii_case(&found)
            && !trusted.eq_ignore_ascii_case(&signed.public_key)
        {
            return Err(Error::Untrusted { found, trusted: trusted.to_owned() });
        }
        let manifest: Manifest = serde_json::from_str(&signed.manifest).map_err(|e| Error::Malformed(e.to_string()))?;
        if manifest.version != VERSION || manifest.block_size != BLOCK {
            return Err(Error::Malformed(format!(
                "version {} with blocks of {}; this one reads version {VERSION} with {BLOCK}",
                manifest.version, manifest.block_size
            )));
        }
        Ok((manifest, signed))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn sample() -> (SigningKey, Manifest) {
        let key = SigningKey::from_pkcs8(&SigningKey::generate().unwrap()).unwrap();
        let mut blocks = Blocks::default();
        blocks.0.insert(3, block_digest(b"three"));
        let manifest = Manifest {
            version: VERSION,
            job: "job-00000001".into(),
            vm: "web".into(),
            created_at: "2026-01-01T00:00:00Z".into(),
            block_size: BLOCK,
            disks: vec![DiskEntry::new("disk-0", "web.raw", None, 64 << 20, &blocks)],
            files: vec![],
            receipt: Receipt { read_back: "cache_dropped".into(), blocks_verified: 1, bytes_verified: 5 },
            source: None,
        };
        (key, manifest)
    }

    #[test]
    fn an_altered_byte_breaks_the_signature_and_a_foreign_key_is_not_trusted() {
        let (key, manifest) = sample();
        let signed = key.sign(&manifest).unwrap();
        let bytes = serde_json::to_vec(&signed).unwrap();
        assert_eq!(Signed::open(&bytes, Some(&fingerprint(&key.public_hex()))).unwrap().0, manifest);
        let altered = String::from_utf8(bytes.clone()).unwrap().replace("web.raw", "wed.raw");
        assert!(matches!(Signed::open(altered.as_bytes(), None), Err(Error::Signature)));
        assert!(matches!(Signed::open(&bytes, Some("00")), Err(Error::Untrusted { .. })));
    }

    #[test]
    fn a_root_follows_from_capacity_and_blocks_and_the_first_difference_is_named() {
        let (_, manifest) = sample();
        let blocks = manifest.disks[0].blocks().unwrap();
        assert_ne!(blocks.root(64 << 20), blocks.root(65 << 20));
        let mut other = blocks.clone();
        other.0.insert(1, block_digest(b"one"));
        assert_eq!(blocks.first_difference(&other), Some(1));
        assert_eq!(other.first_difference(&blocks), Some(1));
        assert_eq!(blocks.first_difference(&blocks.clone()), None);
        let mut entry = manifest.disks[0].clone();
        entry.capacity += 1;
        assert!(entry.blocks().is_err());
    }
}

//! The manifest of an OVA: one digest a file (DSP0243, "Manifest").
//!
//! Owns: its lines, read and written. Never: reads a member. A crash here costs nothing: pure functions.
//!
//! This is the archive's own list of digests, which any tool understands; our signed manifest is another document.

use sha1::Sha1;
use sha2::{Digest, Sha256, Sha512};

use super::super::disk::Result;
use super::{MAX_ENTRIES, bare, corrupt, refused, shown};

/// Longest manifest, in bytes.
pub const MAX_BYTES: u64 = 64 << 10;

/// The digests that a manifest may carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Algorithm {
    /// As OVF 1.x tools write it, VirtualBox among them. It proves a whole transfer, not a friendly sender.
    Sha1,
    /// As OVF 2 tools and we write it.
    Sha256,
    /// Rare.
    Sha512,
}

/// One line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// Which digest.
    pub algorithm: Algorithm,
    /// The file's bare name.
    pub name: String,
    /// The digest's bytes.
    pub digest: Vec<u8>,
}

/// A digest in the making.
pub enum Hasher {
    /// SHA-1.
    Sha1(Sha1),
    /// SHA-256.
    Sha256(Sha256),
    /// SHA-512.
    Sha512(Sha512),
}

impl Algorithm {
    /// Starts a digest.
    pub fn hasher(self) -> Hasher {
        match self {
            Algorithm::Sha1 => Hasher::Sha1(Sha1::new()),
            Algorithm::Sha256 => Hasher::Sha256(Sha256::new()),
            Algorithm::Sha512 => Hasher::Sha512(Sha512::new()),
        }
    }

    /// Length of its digest in bytes.
    fn len(self) -> usize {
        match self {
            Algorithm::Sha1 => 20,
            Algorithm::Sha256 => 32,
            Algorithm::Sha512 => 64,
        }
    }
}

impl Hasher {
    /// Takes more bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        match self {
            Hasher::Sha1(hasher) => hasher.update(bytes),
            Hasher::Sha256(hasher) => hasher.update(bytes),
            Hasher::Sha512(hasher) => hasher.update(bytes),
        }
    }

    /// The digest's bytes.
    pub fn finish(self) -> Vec<u8> {
        match self {
            Hasher::Sha1(hasher) => hasher.finalize().to_vec(),
            Hasher::Sha256(hasher) => hasher.finalize().to_vec(),
            Hasher::Sha512(hasher) => hasher.finalize().to_vec(),
        }
    }
}

/// Reads `ALGORITHM(NAME)= HEX` lines. An unknown algorithm, a path, a name twice or a digest of the wrong length is an error.
pub fn parse(bytes: &[u8]) -> Result<Vec<Line>> {
    if bytes.len() as u64 > MAX_BYTES {
        return Err(refused(format!("its manifest is over {MAX_BYTES} bytes")));
    }
    let text = std::str::from_utf8(bytes).map_err(|_| corrupt("manifest", 0, 0, "not UTF-8"))?;
    let mut out: Vec<Line> = Vec::new();
    for (number, line) in text.lines().enumerate() {
        // Padding behind the lines is NULs in some archives.
        let line = line.trim_matches(|c: char| c.is_whitespace() || c == '\0');
        if line.is_empty() {
            continue;
        }
        let bad = |reason: String| corrupt("manifest line", number as u64 + 1, 0, reason);
        let parts = line.split_once('(').and_then(|(algorithm, rest)| {
            let (name, rest) = rest.rsplit_once(')')?;
            Some((algorithm.trim(), name, rest.trim_start().strip_prefix('=')?.trim()))
        });
        let Some((algorithm, name, hex)) = parts else {
            return Err(bad(format!("not ALGORITHM(NAME)= HEX: {}", shown(line))));
        };
        let algorithm = match algorithm.to_ascii_uppercase().replace('-', "").as_str() {
            "SHA1" => Algorithm::Sha1,
            "SHA256" => Algorithm::Sha256,
            "SHA512" => Algorithm::Sha512,
            _ => return Err(bad(format!("digest {} is unknown; SHA1, SHA256 and SHA512 can be checked", shown(algorithm)))),
        };
        bare(name, "the manifest")?;
        let digest = hex::decode(hex).ok().filter(|digest| digest.len() == algorithm.len());
        let digest = digest.ok_or_else(|| bad(format!("the digest of {} is not {} hex digits", shown(name), algorithm.len() * 2)))?;
        if out.iter().any(|known| known.name == name) {
            return Err(bad(format!("{} stands there twice", shown(name))));
        }
        if out.len() == MAX_ENTRIES {
            return Err(refused(format!("its manifest has over {MAX_ENTRIES} lines")));
        }
        out.push(Line { algorithm, name: name.to_owned(), digest });
    }
    Ok(out)
}

/// The text over these files and their SHA-256 in hex.
pub fn generate<'a>(files: impl IntoIterator<Item = (&'a str, &'a str)>) -> String {
    files.into_iter().map(|(name, sha256)| format!("SHA256({name})= {sha256}\n")).collect()
}

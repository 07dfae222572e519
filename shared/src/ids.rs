//! Ids: made here, parsed here, so that a malformed one never gets past the door.
//!
//! Owns: the shape of ids. Never: looks one up. A crash here costs nothing.

use std::fmt;
use std::str::FromStr;

use ring::rand::{SecureRandom, SystemRandom};
use serde::{Deserialize, Serialize};

/// `N` random bytes from the operating system, as hex.
///
/// The system's generator fails only before the kernel has gathered entropy at boot; then the process cannot go on safely, and says so.
pub fn random_hex<const N: usize>() -> String {
    let mut bytes = [0u8; N];
    SystemRandom::new().fill(&mut bytes).expect("the operating system has a random number generator");
    hex::encode(bytes)
}

/// A job's id: `job-` and 16 hex digits (the contract asks for 8 or more).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct JobId(String);

impl JobId {
    /// A new one.
    pub fn generate() -> Self {
        Self(format!("job-{}", random_hex::<8>()))
    }

    /// As text; safe as a file name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for JobId {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let hex = text.strip_prefix("job-").unwrap_or_default();
        let good = (8..=32).contains(&hex.len()) && hex.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        if good { Ok(Self(text.to_owned())) } else { Err("a job id is `job-` and 8 to 32 lower-case hex digits".to_owned()) }
    }
}

impl TryFrom<String> for JobId {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<JobId> for String {
    fn from(id: JobId) -> String {
        id.0
    }
}

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

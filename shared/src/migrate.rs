//! What a migration is asked for beyond a copy: where the VM goes, whether its guest is adapted, and what proves that it came up.
//!
//! Owns: the words of these options, as the API takes them, the store keeps them and the agent gets them, and what is sane about them.
//! Never: knows a hypervisor. A crash here costs nothing.

use serde::{Deserialize, Serialize};

use crate::deploy::Wish;

/// Seconds that a guest has to show a sign of life, where nobody says otherwise.
pub const PATIENCE: u64 = 300;
/// Most seconds.
pub const MOST_PATIENCE: u64 = 3600;
/// Longest text that is waited for.
pub const LONGEST_SIGN: usize = 200;

/// Where the VM goes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Target {
    /// Name of the connection.
    pub connection: String,
    /// Its kind.
    pub kind: String,
    /// Its path (of libvirt the URI).
    pub path: String,
    /// The VM; its disks are those that the job makes, its address what `mac` says.
    pub wish: Wish,
    /// `keep`, `new` or an address; absent: kept where the source is off and stays elsewhere, else new.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
}

/// Whether the guest is made ready for its new hardware (virt-v2v-in-place).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Adapt {
    /// Unless the guest is seen to be ready as it is.
    #[default]
    Auto,
    /// In any case.
    Always,
    /// Not at all.
    Never,
}

/// The proof that what arrived comes up: it is started apart from everything, and must show a sign of life.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BootProof {
    /// Default true.
    pub enabled: bool,
    /// A text on the serial console that says that the guest is up; absent: a login prompt, or its guest agent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sign: Option<String>,
    /// Seconds that it has.
    pub timeout_seconds: u64,
    /// Whether it must get an address by DHCP on a network of its own, and answer a ping.
    pub network: bool,
}

impl Default for BootProof {
    fn default() -> Self {
        Self { enabled: true, sign: None, timeout_seconds: PATIENCE, network: false }
    }
}

impl BootProof {
    /// What is wrong with it, in a sentence that says what would be right.
    pub fn flaw(&self) -> Option<String> {
        if !(5..=MOST_PATIENCE).contains(&self.timeout_seconds) {
            return Some(format!("boot_proof.timeout_seconds must be 5 to {MOST_PATIENCE}, not {}", self.timeout_seconds));
        }
        let is_text = |sign: &str| (1..=LONGEST_SIGN).contains(&sign.len()) && !sign.chars().any(char::is_control);
        match &self.sign {
            Some(sign) if !is_text(sign) => Some(format!("boot_proof.sign must be 1 to {LONGEST_SIGN} bytes of one line")),
            _ => None,
        }
    }
}

/// When a warm migration cuts over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Cutover {
    /// As soon as the downtime that is to be expected fits.
    #[default]
    Auto,
    /// When somebody says so: `POST /jobs/{id}/cutover`.
    Manual,
}

/// A warm migration: the VM runs on while it is copied; what it changes follows in passes, and it is stopped only for the last one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Warm {
    /// Seconds that the VM may be away.
    pub max_downtime_seconds: u64,
    /// When it is stopped.
    pub cutover: Cutover,
    /// Somebody has said so: behind the next pass, whatever the downtime.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub now: bool,
}

/// Seconds that a VM may be away, where nobody says otherwise.
pub const DOWNTIME: u64 = 30;

impl Default for Warm {
    fn default() -> Self {
        Self { max_downtime_seconds: DOWNTIME, cutover: Cutover::Auto, now: false }
    }
}

impl Warm {
    /// What is wrong with it, in a sentence that says what would be right.
    pub fn flaw(&self) -> Option<String> {
        let good = (1..=86_400).contains(&self.max_downtime_seconds);
        (!good).then(|| format!("warm.max_downtime_seconds must be 1 to 86400, not {}", self.max_downtime_seconds))
    }
}

/// As the API takes it: `true`, `false`, or an object.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum WarmWish {
    /// With what is usual, or not at all.
    Plain(bool),
    /// In detail.
    Detailed(Warm),
}

impl From<WarmWish> for Option<Warm> {
    fn from(wish: WarmWish) -> Self {
        match wish {
            WarmWish::Plain(false) => None,
            WarmWish::Plain(true) => Some(Warm::default()),
            WarmWish::Detailed(warm) => Some(warm),
        }
    }
}

/// As the API takes it: `true`, `false`, or an object.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum BootProofWish {
    /// With what is usual, or not at all.
    Plain(bool),
    /// In detail.
    Detailed(BootProof),
}

impl From<BootProofWish> for BootProof {
    fn from(wish: BootProofWish) -> Self {
        match wish {
            BootProofWish::Plain(enabled) => Self { enabled, ..Self::default() },
            BootProofWish::Detailed(proof) => proof,
        }
    }
}

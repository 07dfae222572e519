//! What a job is asked to do: type, format and options, as the API takes them and as the agent gets them.
//!
//! Owns: the words and their meaning. Never: checks them against an installation (the controller's jobs room does). A crash here costs nothing.

use serde::{Deserialize, Serialize};

use crate::migrate::{Adapt, BootProof, Target, Warm};

macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $word:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
        #[serde(rename_all = "lowercase")]
        pub enum $name { $($(#[$vdoc])* $variant,)* }
        impl $name {
            /// Every word, in the order of the documentation.
            pub const ALL: &[&str] = &[$($word,)*];
            /// The word on the wire.
            pub fn word(self) -> &'static str { match self { $($name::$variant => $word,)* } }
            /// The variant of a word.
            pub fn from_word(word: &str) -> Option<Self> { match word { $($word => Some($name::$variant),)* _ => None } }
        }
        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result { f.write_str(self.word()) }
        }
    };
}

words! {
    /// What kind of work a job is.
    JobType {
        /// VM to files.
        Export = "export",
        /// File to file.
        Convert = "convert",
        /// Uploaded file to the catalogue.
        Import = "import",
        /// Export, convert, adapt, deploy.
        Migrate = "migrate",
        /// Re-read an artifact.
        Verify = "verify",
        /// Incremental.
        Backup = "backup",
    }
}

words! {
    /// How a VM is switched.
    Action {
        /// On.
        Start = "start",
        /// Off, by asking the guest.
        Shutdown = "shutdown",
        /// Off, at once.
        Stop = "stop",
        /// Off and on, at once.
        Reset = "reset",
    }
}

words! {
    /// Output formats.
    Format {
        /// One tar: OVF, disks as streamOptimized VMDK, `.mf` (DSP0243).
        Ova = "ova",
        /// The same as loose files.
        Ovf = "ovf",
        /// streamOptimized VMDK.
        Vmdk = "vmdk",
        /// qcow2 v3.
        Qcow2 = "qcow2",
        /// Sparse raw.
        Raw = "raw",
        /// VHDX, dynamic.
        Vhdx = "vhdx",
        /// VHD, dynamic.
        Vhd = "vhd",
        /// VDI, dynamic.
        Vdi = "vdi",
    }
}

impl Format {
    /// The format that a file's name declares, by its ending.
    pub fn of_name(name: &str) -> Option<Self> {
        let (_, ending) = name.rsplit_once('.')?;
        match ending.to_ascii_lowercase().as_str() {
            "raw" | "dd" | "img" => Some(Format::Raw),
            "qcow2" | "qcow" => Some(Format::Qcow2),
            "vmdk" => Some(Format::Vmdk),
            "vhdx" => Some(Format::Vhdx),
            "vhd" | "vpc" => Some(Format::Vhd),
            "vdi" => Some(Format::Vdi),
            "ova" => Some(Format::Ova),
            "ovf" => Some(Format::Ovf),
            _ => None,
        }
    }

    /// Whether its disks are stored as they are, always.
    pub fn is_plain(self) -> bool {
        matches!(self, Format::Raw | Format::Vhdx | Format::Vhd | Format::Vdi)
    }
}

words! {
    /// Compression of disks.
    Algorithm {
        /// RFC 1951.
        Deflate = "deflate",
        /// RFC 8878; qcow2 only.
        Zstd = "zstd",
    }
}

/// Options of a job, every one optional on the wire.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// Compress where the format can.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compress: Option<bool>,
    /// With which algorithm.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compression: Option<Algorithm>,
    /// The algorithm's level; absent: the fast one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub level: Option<i32>,
    /// Deflate of qcow2 with distances of at most 4 KiB, as qemu-img writes it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub narrow_window: Option<bool>,
    /// Whether snapshots go along.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub include_snapshots: Option<bool>,
    /// Folder inside a configured root of the agent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub destination: Option<String>,
    /// A backup that begins anew, over no earlier restore point; default false.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub full: Option<bool>,
    /// Read the output back and compare; default true.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verify: Option<bool>,
    /// Shut a running VM down first; default false.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub power_off: Option<bool>,
    /// Have the guest of a running VM flush and freeze its file systems for the moment that is read; default false.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quiesce: Option<bool>,
    /// Bytes of data a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth_limit: Option<u64>,
    /// 0–100, higher first; default 50.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub priority: Option<u8>,
    /// Not to begin before this time, RFC 3339 in UTC.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub not_before: Option<String>,
    /// To be done by this time, RFC 3339 in UTC.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deadline: Option<String>,
    /// Waits for a clean grid, within the deadline.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub carbon_aware: Option<bool>,
    /// Of a migration: where the VM goes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target: Option<Target>,
    /// Of a migration: whether the guest is adapted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adapt: Option<Adapt>,
    /// Of a migration: the proof that it comes up.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub boot_proof: Option<BootProof>,
    /// Of a migration: the VM runs on while it is copied.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warm: Option<Warm>,
}

impl Options {
    /// Whether the output is read back: true unless the caller said no.
    pub fn verifies(&self) -> bool {
        self.verify != Some(false)
    }
}

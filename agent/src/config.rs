//! Settings of an agent.
//!
//! Owns: where each setting comes from: a TOML file, over it `HYPERSDK_*`, over both the command line; secrets also as `*_FILE`.
//! Never: keeps a secret in anything that can be printed. A crash here costs nothing: it happens before the first connection.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use shared::secret::Secret;
use shared::vault;

use crate::sources::vsphere::budget;

/// Streams to a hypervisor where the settings say nothing.
pub const VSPHERE_STREAMS: usize = budget::STREAMS;

/// Name of the root that imports go to, and of the connection over it where nobody gave it another.
pub const IMAGES: &str = "images";

/// Where libvirt's packages let QEMU write.
pub const LIBVIRT_DIR: &str = "/var/lib/libvirt/qemu";

/// Everything an agent needs to know.
#[derive(Clone)]
pub struct Config {
    /// The controller's gRPC address, `https://HOST:5443`.
    pub controller: String,
    /// Join token; needed until the first enrolment.
    pub token: Option<Secret>,
    /// A file that holds a join token; read anew at each try, so that whoever writes it may come later.
    pub token_file: Option<PathBuf>,
    /// Keys, certificate, journals, ledger.
    pub data_dir: PathBuf,
    /// The name an operator sees.
    pub name: String,
    /// The writable root `exports`.
    pub exports_dir: PathBuf,
    /// The writable root `images`: what imports made, shown as VMs of the connection named next.
    pub images_dir: PathBuf,
    /// Name of the connection over `images`; another one where a second agent has `images` already.
    pub images_connection: String,
    /// A folder of images and OVAs that becomes the connection `local` and the root `vms`.
    pub local_root: Option<PathBuf>,
    /// More roots, only read: name and path.
    pub roots: BTreeMap<String, PathBuf>,
    /// Streams that a vCenter or ESXi gives this agent at a time, 1 to 48.
    pub vsphere_streams: usize,
    /// Where QEMU may make the sockets and scratch files of a running domain's export, and this agent may open them.
    pub libvirt_dir: PathBuf,
    /// How deployed domains run: `kvm`, `tcg`, or `auto`: KVM where a virtual CPU really starts.
    pub libvirt_accel: String,
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct File {
    controller: Option<String>,
    token: Option<String>,
    token_file: Option<PathBuf>,
    data_dir: Option<PathBuf>,
    agent_name: Option<String>,
    exports_dir: Option<PathBuf>,
    images_dir: Option<PathBuf>,
    images_connection: Option<String>,
    local_root: Option<PathBuf>,
    roots: BTreeMap<String, PathBuf>,
    vsphere_streams: Option<usize>,
    libvirt_dir: Option<PathBuf>,
    libvirt_accel: Option<String>,
}

/// What the command line said.
#[derive(Default)]
pub struct Overrides {
    /// `--config`
    pub file: Option<PathBuf>,
    /// `--controller`
    pub controller: Option<String>,
    /// `--token`
    pub token: Option<Secret>,
}

impl Config {
    /// Puts the three sources together. Errors are sentences for the operator.
    pub fn load(overrides: Overrides) -> Result<Self, String> {
        let mut file = match &overrides.file {
            Some(path) => read_file(path)?,
            None => File::default(),
        };
        let env = |name: &str| std::env::var(format!("HYPERSDK_{name}")).ok().filter(|value| !value.is_empty());
        let path = |name: &str| env(name).map(PathBuf::from);
        if let Some(roots) = env("ROOTS") {
            for pair in roots.split(',') {
                let (name, path) = pair.split_once('=').ok_or_else(|| format!("HYPERSDK_ROOTS: {pair:?} is not NAME=PATH"))?;
                file.roots.insert(name.trim().to_owned(), PathBuf::from(path.trim()));
            }
        }
        let controller = overrides.controller.or_else(|| env("CONTROLLER")).or(file.controller);
        let controller = controller.ok_or("no controller: give --controller https://HOST:5443 or HYPERSDK_CONTROLLER")?;
        if !controller.starts_with("https://") {
            return Err(format!("the controller's address must start with https://, not {controller:?}"));
        }
        let data_dir = path("DATA_DIR").or(file.data_dir).unwrap_or_else(|| PathBuf::from("/var/lib/hypersdk/agent"));
        let streams = match env("VSPHERE_STREAMS") {
            Some(text) => Some(text.trim().parse().map_err(|_| format!("HYPERSDK_VSPHERE_STREAMS: {text:?} is no number"))?),
            None => file.vsphere_streams,
        };
        let vsphere_streams = streams.unwrap_or(VSPHERE_STREAMS);
        if !(1..=budget::MOST).contains(&vsphere_streams) {
            return Err(format!("vsphere_streams must be 1 to {}, not {vsphere_streams}", budget::MOST));
        }
        let libvirt_accel = env("LIBVIRT_ACCEL").or(file.libvirt_accel).unwrap_or_else(|| "auto".to_owned());
        if !matches!(libvirt_accel.as_str(), "auto" | "kvm" | "tcg") {
            return Err(format!("libvirt_accel must be auto, kvm or tcg, not {libvirt_accel:?}"));
        }
        Ok(Self {
            vsphere_streams,
            libvirt_accel,
            libvirt_dir: path("LIBVIRT_DIR").or(file.libvirt_dir).unwrap_or_else(|| PathBuf::from(LIBVIRT_DIR)),
            controller,
            token: overrides.token.or_else(|| env("TOKEN").or(file.token).map(Secret::new)),
            token_file: path("TOKEN_FILE").or(file.token_file),
            name: env("AGENT_NAME").or(file.agent_name).unwrap_or_else(default_name),
            exports_dir: path("EXPORTS_DIR").or(file.exports_dir).unwrap_or_else(|| PathBuf::from("/var/lib/hypersdk/exports")),
            images_dir: path("IMAGES_DIR").or(file.images_dir).unwrap_or_else(|| data_dir.join("images")),
            images_connection: env("IMAGES_CONNECTION").or(file.images_connection).unwrap_or_else(|| IMAGES.to_owned()),
            local_root: path("LOCAL_ROOT").or(file.local_root),
            roots: file.roots,
            data_dir,
        })
    }

    /// One whose folders all lie in `base`.
    #[cfg(test)]
    pub fn in_folder(base: &Path) -> Self {
        Self {
            controller: "https://127.0.0.1:1".to_owned(),
            token: None,
            token_file: None,
            data_dir: base.join("data"),
            name: "agent".to_owned(),
            exports_dir: base.join("exports"),
            images_dir: base.join("images"),
            images_connection: IMAGES.to_owned(),
            local_root: None,
            roots: BTreeMap::new(),
            vsphere_streams: budget::STREAMS,
            libvirt_dir: base.join("libvirt"),
            libvirt_accel: "tcg".to_owned(),
        }
    }
}

fn read_file(path: &Path) -> Result<File, String> {
    let bytes = vault::read_config(path).map_err(|e| format!("{}: {e}", path.display()))?;
    let text = String::from_utf8(bytes).map_err(|_| format!("{}: not UTF-8", path.display()))?;
    toml::from_str(&text).map_err(|e| format!("{}: {e}", path.display()))
}

/// The host's name, in the letters that a certificate and a URL like.
pub fn default_name() -> String {
    let host = rustix::system::uname().nodename().to_string_lossy().to_ascii_lowercase();
    let name: String = host.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).take(63).collect();
    let name = name.trim_matches('-').to_owned();
    if name.is_empty() { "agent".to_owned() } else { name }
}

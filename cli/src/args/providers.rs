//! `hypersdk providers`.
//!
//! Owns: its arguments. Never: a password: that comes from the environment, the terminal or standard input. A crash here costs one command.

use clap::{Args, Subcommand};

/// `hypersdk providers`
#[derive(Args)]
pub struct Providers {
    /// What to do; without it the connections are listed.
    #[command(subcommand)]
    pub action: Option<ProvidersAction>,
}

/// What is done with providers.
#[derive(Subcommand)]
pub enum ProvidersAction {
    /// List connections
    List,
    /// Connect a provider
    Connect(Connect),
    /// Ask a connection's agent whether it can serve it now
    Test {
        /// Name of the connection
        name: String,
    },
    /// Remove a connection and its inventory; jobs under way go on
    Remove {
        /// Name of the connection
        name: String,
    },
    /// What this installation can do now, for each kind
    Capabilities,
}

/// What stands below the options.
const HELP: &str = "\
The password of a hypervisor comes from HYPERSDK_PROVIDER_PASSWORD (or
..._FILE), is typed, or is the first line of standard input.

  hypersdk providers connect local --path /srv/images
  hypersdk providers connect libvirt --uri qemu:///system
  hypersdk providers connect vsphere --host vc.example.org --username backup";

/// `hypersdk providers connect`
#[derive(Args)]
#[command(after_help = HELP)]
pub struct Connect {
    /// Its kind: local, libvirt, vsphere
    pub kind: String,
    /// Name of the connection; default: its kind
    #[arg(long)]
    pub name: Option<String>,
    /// local: folder of disk images and OVAs on the agent's host
    #[arg(long)]
    pub path: Option<String>,
    /// libvirt: qemu:///system, qemu+ssh://USER@HOST/system, qemu+tls://...
    #[arg(long)]
    pub uri: Option<String>,
    /// vsphere: HOST or HOST:PORT of a vCenter or ESXi
    #[arg(long)]
    pub host: Option<String>,
    /// vsphere: who logs in
    #[arg(long)]
    pub username: Option<String>,
    /// vsphere: SHA-256 of its certificate, where no authority vouches
    #[arg(long, conflicts_with = "host_insecure")]
    pub host_fingerprint: Option<String>,
    /// vsphere: take any certificate
    #[arg(long)]
    pub host_insecure: bool,
    /// The agent that stands beside it; default: the only one
    #[arg(long)]
    pub agent: Option<String>,
}

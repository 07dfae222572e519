//! `hypersdk snapshots`.
//!
//! Owns: its arguments. Never: decides what a hypervisor takes. A crash here costs one command.

use clap::{Args, Subcommand};

/// `hypersdk snapshots`
#[derive(Args)]
#[command(next_line_help = true)]
pub struct Snapshots {
    /// What to do.
    #[command(subcommand)]
    pub action: SnapshotsAction,
}

/// What is done with a VM's snapshots.
#[derive(Subcommand)]
pub enum SnapshotsAction {
    /// List a VM's snapshots
    List(OfVm),
    /// Take a snapshot and wait until it is there
    Create(CreateSnapshot),
    /// Remove a snapshot; those that were taken over it stay
    Delete(DeleteSnapshot),
}

/// Which VM.
#[derive(Args)]
#[command(next_line_help = true)]
pub struct OfVm {
    /// Name, inventory path or id of the VM
    pub vm: String,
    /// Connection or kind; default: the one that has a VM of this name
    #[arg(long)]
    pub provider: Option<String>,
}

/// `hypersdk snapshots create`
#[derive(Args)]
#[command(next_line_help = true)]
pub struct CreateSnapshot {
    #[command(flatten)]
    pub of: OfVm,
    /// Its name, which the VM has no snapshot of
    pub name: String,
    /// What it is for
    #[arg(long)]
    pub description: Option<String>,
    /// With the memory; a running domain of libvirt needs it
    #[arg(long)]
    pub memory: bool,
    /// vSphere: with the guest's file systems calmed by its tools
    #[arg(long, conflicts_with = "memory")]
    pub quiesce: bool,
}

/// `hypersdk snapshots delete`
#[derive(Args)]
#[command(next_line_help = true)]
pub struct DeleteSnapshot {
    #[command(flatten)]
    pub of: OfVm,
    /// Its id, or its name where no other of the VM bears it
    pub snapshot: String,
    /// With those that were taken over it
    #[arg(long)]
    pub children: bool,
}

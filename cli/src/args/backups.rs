//! `hypersdk backup` and `hypersdk restore`.
//!
//! Owns: their arguments. Never: decides which restore point is the newest. A crash here costs one command.

use clap::Args;
use shared::options::{Algorithm, Format};

use super::{algorithm_parser, format_parser, parse_rate};

/// `hypersdk backup`
#[derive(Args)]
#[command(next_line_help = true)]
pub struct Backup {
    /// Name, inventory path or id of the VM
    pub vm: String,
    /// Connection or kind; default: the one that has a VM of this name
    #[arg(long)]
    pub provider: Option<String>,
    /// Begin anew, over no earlier restore point
    #[arg(long)]
    pub full: bool,
    /// Shut a running VM down first, and switch it on again afterwards
    #[arg(long)]
    pub power_off: bool,
    /// Have its guest freeze its file systems for the moment that is read
    #[arg(long)]
    pub quiesce: bool,
    /// With this algorithm; default: deflate
    #[arg(long, value_parser = algorithm_parser())]
    pub compression: Option<Algorithm>,
    /// Compression level; default: the fast one
    #[arg(long, allow_negative_numbers = true)]
    pub level: Option<i32>,
    /// Folder of the restore points, as ROOT/…; default: exports
    #[arg(long, value_name = "ROOT/DIR")]
    pub destination: Option<String>,
    /// Data a second: 64M, 500K, 1G (powers of 1024) or bytes
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    pub bandwidth_limit: Option<u64>,
    /// 0 to 100, higher first
    #[arg(long, value_parser = clap::value_parser!(u8).range(0..=100))]
    pub priority: Option<u8>,
    /// Print the job's id and return at once
    #[arg(long, short)]
    pub detach: bool,
}

/// `hypersdk restore`
#[derive(Args)]
#[command(next_line_help = true)]
pub struct Restore {
    /// A restore point (its job), or a VM: then its newest one
    #[arg(required_unless_present = "list")]
    pub point: Option<String>,
    /// List the restore points, of one VM where it is named
    #[arg(long, short)]
    pub list: bool,
    /// Connection, where several have a VM of this name
    #[arg(long)]
    pub provider: Option<String>,
    /// Format of the whole disks: ova, ovf, vmdk, qcow2, raw
    #[arg(long, default_value = "qcow2", hide_possible_values = true, value_parser = format_parser())]
    pub format: Format,
    /// Compress the disks where the format can
    #[arg(long)]
    pub compress: bool,
    /// Folder inside a root of the agent, as ROOT/…; default: exports
    #[arg(long, value_name = "ROOT/DIR")]
    pub destination: Option<String>,
    /// Print the job's id and return at once
    #[arg(long, short)]
    pub detach: bool,
}

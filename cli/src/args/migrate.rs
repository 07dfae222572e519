//! `hypersdk migrate`.
//!
//! Owns: its arguments. Never: decides what the new VM takes over from the old one. A crash here costs one command.

use clap::Args;
use shared::options::Format;

use super::{format_parser, parse_rate};

/// `A=B`.
fn parse_pair(text: &str) -> Result<(String, String), String> {
    let (from, to) = text.split_once('=').ok_or_else(|| format!("{text:?} is not FROM=TO"))?;
    if from.is_empty() || to.is_empty() {
        Err(format!("{text:?} lacks one of its sides: FROM=TO"))
    } else {
        Ok((from.to_owned(), to.to_owned()))
    }
}

/// `hypersdk migrate`
#[derive(Args)]
#[command(next_line_help = true)]
pub struct Migrate {
    /// Name, inventory path or id of the VM
    pub vm: String,
    /// Connection or kind that it goes to
    #[arg(long, value_name = "TARGET", default_value = "libvirt")]
    pub to: String,
    /// Connection or kind that it comes from; default: the one that has it
    #[arg(long)]
    pub provider: Option<String>,
    /// Name of the new VM; default: the same
    #[arg(long)]
    pub name: Option<String>,
    /// Its CPUs; default: as before
    #[arg(long)]
    pub cpu: Option<u32>,
    /// Its memory in MiB; default: as before
    #[arg(long, value_name = "MIB")]
    pub memory: Option<u64>,
    /// Its network at the target; default: the one called default
    #[arg(long)]
    pub network: Option<String>,
    /// A bridge of the target's host, in place of a network
    #[arg(long, conflicts_with = "network")]
    pub bridge: Option<String>,
    /// Where cards of a network go: FROM=NETWORK, FROM=user, FROM=bridge:NAME
    #[arg(long, value_name = "FROM=TO", value_parser = parse_pair)]
    pub map_network: Vec<(String, String)>,
    /// Storage pool at the target that the disks are copied into
    #[arg(long, conflicts_with = "warm")]
    pub pool: Option<String>,
    /// keep, new, or an address; default: kept where the VM is off
    #[arg(long)]
    pub mac: Option<String>,
    /// Format of the disks: qcow2 or raw
    #[arg(long, default_value = "qcow2", hide_possible_values = true, value_parser = format_parser())]
    pub format: Format,
    /// Make the guest ready for KVM: auto, always, never
    #[arg(long, value_name = "WHEN", default_value = "auto", hide_possible_values = true, value_parser = ["auto", "always", "never"])]
    pub adapt: String,
    /// Text on the serial console that says that the guest is up
    #[arg(long, value_name = "TEXT")]
    pub sign: Option<String>,
    /// Seconds that the guest has to come up
    #[arg(long, value_name = "SECONDS")]
    pub boot_timeout: Option<u64>,
    /// The guest must also get an address by DHCP and answer a ping
    #[arg(long)]
    pub prove_network: bool,
    /// Do not boot the guest before it is handed over
    #[arg(long, conflicts_with_all = ["sign", "boot_timeout", "prove_network"])]
    pub no_boot_proof: bool,
    /// Copy it while it runs, and stop it only for what it changes last
    #[arg(long)]
    pub warm: bool,
    /// Seconds that it may be away then; default: 30
    #[arg(long, value_name = "SECONDS", requires = "warm")]
    pub max_downtime: Option<u64>,
    /// Wait for `hypersdk jobs cutover` before it is stopped
    #[arg(long, requires = "warm")]
    pub manual_cutover: bool,
    /// Shut it down first; it is switched on again unless the new VM stands
    #[arg(long, conflicts_with = "warm")]
    pub power_off: bool,
    /// Have its guest freeze its file systems for the moment that is read
    #[arg(long)]
    pub quiesce: bool,
    /// Leave the new VM off
    #[arg(long)]
    pub no_start: bool,
    /// Folder inside a root of the agent, as ROOT/…; default: exports
    #[arg(long, value_name = "ROOT/DIR")]
    pub destination: Option<String>,
    /// Data a second: 64M, 500K, 1G (powers of 1024) or bytes
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    pub bandwidth_limit: Option<u64>,
    /// Print the plan and make nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Print each step of the job's log as well
    #[arg(long, short)]
    pub watch: bool,
    /// Print the job's id and return at once
    #[arg(long, short, conflicts_with = "watch")]
    pub detach: bool,
}

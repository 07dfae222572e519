//! The command line: every verb, argument and environment variable, and what each value must look like.
//!
//! Owns: the clap tree. Never: does anything. A crash here costs nothing.

mod backups;
mod console;
mod migrate;
mod providers;
mod snapshots;

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::builder::{FalseyValueParser, PossibleValuesParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use shared::ids::JobId;
use shared::options::{Algorithm, Format, JobType};

pub use self::backups::{Backup, Restore};
pub use self::console::Console;
pub use self::migrate::Migrate;
pub use self::providers::{Connect, Providers, ProvidersAction};
pub use self::snapshots::{OfVm, Snapshots, SnapshotsAction};

/// Heading of the options that every verb takes.
const GLOBAL: &str = "Everywhere";
/// At the end of the first help page.
const EXIT_CODES: &str = "Exit codes: 0 done, 1 failed, 2 usage, 3 not reachable, 4 not allowed,\n            5 verification failed\n\
    Environment: HYPERSDK_URL, HYPERSDK_FINGERPRINT, HYPERSDK_INSECURE,\n             \
    HYPERSDK_AUTH_TOKEN and HYPERSDK_PASSWORD (both also as *_FILE)";

/// Exports VMs, converts their disks, and proves that what arrived is what left
#[derive(Parser)]
#[command(name = "hypersdk", version, after_help = EXIT_CODES)]
pub struct Cli {
    /// Kind of answer: table or json
    #[arg(long, global = true, value_enum, hide_possible_values = true, default_value = "table", value_name = "HOW", help_heading = GLOBAL)]
    pub output: Style,
    #[command(flatten)]
    /// Which server the client verbs talk to.
    pub server: Server,
    /// What to do.
    #[command(subcommand)]
    pub verb: Verb,
}

/// How answers are printed.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Style {
    /// For people, 80 columns.
    #[value(help = None::<&str>)]
    Table,
    /// For programs, as the server answers.
    #[value(help = None::<&str>)]
    Json,
}

/// Which server, and why it is trusted.
#[derive(Args)]
pub struct Server {
    /// The controller; default: where `hypersdk login` was
    #[arg(long, global = true, hide_env = true, env = "HYPERSDK_URL", value_name = "URL", help_heading = GLOBAL)]
    pub url: Option<String>,
    /// Of the controller's certificate
    #[arg(long, global = true, hide_env = true, env = "HYPERSDK_FINGERPRINT", value_name = "HEX", value_parser = crate::tls::parse_fingerprint, help_heading = GLOBAL)]
    pub fingerprint: Option<String>,
    /// Accept any certificate: laboratory only
    #[arg(long, global = true, hide_env = true, env = "HYPERSDK_INSECURE", value_parser = FalseyValueParser::new(), help_heading = GLOBAL)]
    pub insecure: bool,
}

/// The verbs.
#[derive(Subcommand)]
pub enum Verb {
    /// Export a sample VM, or yours, once, and prove the result
    Demo(Demo),
    /// Run controller and agent in this process
    Up(Up),
    /// Convert a disk image or OVA, without a server
    Convert(Convert),
    /// Check an export against its manifest, without a server
    Verify(Verify),
    /// Log in to a controller
    Login(Login),
    /// End the login, here and on the controller
    Logout,
    /// List the VMs of all connected providers
    Vms(Vms),
    /// Export a VM to files
    Export(Export),
    /// Move a VM to another hypervisor: copied, proven, booted
    Migrate(Migrate),
    /// List, take or remove snapshots of a VM
    Snapshots(Snapshots),
    /// Make a restore point of a VM: what changed since the last one
    Backup(Backup),
    /// Make whole disks of a restore point, or list the points
    Restore(Restore),
    /// Open the console of a running VM for a VNC viewer
    Console(Console),
    /// List jobs, or act on one
    Jobs(Jobs),
    /// Print a job's log
    Logs(Logs),
    /// Watch one job to its end, or all jobs
    Watch(Watch),
    /// List provider connections, or make one
    Providers(Providers),
    /// List agents, or act on one
    Agents(Agents),
    /// Lost password, backup, restore: at the controller's machine
    Admin(Admin),
    /// Print a completion script for a shell
    Completions {
        /// Which shell
        shell: Shell,
    },
}

/// `hypersdk demo`
#[derive(Args)]
#[command(next_line_help = true)]
pub struct Demo {
    /// A disk image or OVA; default: a sample of 256 MiB is made
    pub image: Option<PathBuf>,
    /// Format: ova, ovf, vmdk, qcow2, vhdx, vhd, vdi or raw
    #[arg(long, default_value = "ova", hide_possible_values = true, value_parser = format_parser())]
    pub format: Format,
    /// Keep the folder with the export
    #[arg(long)]
    pub keep: bool,
}

/// `hypersdk up`
#[derive(Args)]
#[command(
    next_line_help = true,
    after_help = "Also as HYPERSDK_LISTEN, HYPERSDK_GRPC_LISTEN, HYPERSDK_DATA_DIR and\nHYPERSDK_LOCAL_ROOT. The admin's first password: HYPERSDK_ADMIN_PASSWORD."
)]
pub struct Up {
    /// Web page and REST API
    #[arg(long, hide_env = true, env = "HYPERSDK_LISTEN", default_value = "127.0.0.1:5080", value_name = "ADDR")]
    pub listen: SocketAddr,
    /// Agents' door; port 0: any free one
    #[arg(long, hide_env = true, env = "HYPERSDK_GRPC_LISTEN", default_value = "127.0.0.1:0", value_name = "ADDR")]
    pub grpc_listen: SocketAddr,
    /// Database, keys, exports; default: ~/.local/share/hypersdk
    #[arg(long, hide_env = true, env = "HYPERSDK_DATA_DIR", value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// Disk images and OVAs: becomes provider `local`
    #[arg(long, hide_env = true, env = "HYPERSDK_LOCAL_ROOT", value_name = "DIR")]
    pub vms: Option<PathBuf>,
}

/// `hypersdk convert`
#[derive(Args)]
#[command(next_line_help = true)]
pub struct Convert {
    /// The image or OVA that is read
    #[arg(value_name = "IN")]
    pub input: PathBuf,
    /// The file that is written; it must not exist
    #[arg(value_name = "OUT")]
    pub output_file: PathBuf,
    /// ova, ovf, vmdk, qcow2, vhdx, vhd, vdi or raw; default: by OUT's ending
    #[arg(long, hide_possible_values = true, value_parser = format_parser())]
    pub format: Option<Format>,
    /// Compress (vmdk, ova: always deflate)
    #[arg(long, value_parser = algorithm_parser())]
    pub compression: Option<Algorithm>,
    /// Compression level; default: the fast one
    #[arg(long, allow_negative_numbers = true)]
    pub level: Option<i32>,
    /// Deflate in qcow2 with a window of 4 KiB, as qemu-img does; slower
    #[arg(long)]
    pub narrow_window: bool,
    /// Read OUT back and compare it with what was read from IN
    #[arg(long)]
    pub verify: bool,
    /// Read IN over the parents that it names; they must lie beside it
    #[arg(long)]
    pub follow_chain: bool,
    /// Read this snapshot (id or name) inside of a qcow2
    #[arg(long, value_name = "NAME")]
    pub snapshot: Option<String>,
    /// Have OUT's SHA-256 in the manifest, for other tools
    #[arg(long)]
    pub sha256: bool,
    /// Print errors only
    #[arg(long, short)]
    pub quiet: bool,
}

/// `hypersdk verify`
#[derive(Args)]
pub struct Verify {
    /// A file of an export, or its .manifest.json
    #[arg(value_name = "FILE|MANIFEST")]
    pub file: PathBuf,
    /// Fingerprint of the signer that must have signed it
    #[arg(long, value_name = "FINGERPRINT")]
    pub trust: Option<String>,
}

/// `hypersdk login`
#[derive(Args)]
#[command(
    after_help = "The password comes from HYPERSDK_PASSWORD, from the file that\nHYPERSDK_PASSWORD_FILE names, from the terminal, or from standard input."
)]
pub struct Login {
    /// The controller, https://HOST:5080
    #[arg(value_name = "URL")]
    pub address: Option<String>,
    /// Who
    #[arg(long, short, default_value = "admin")]
    pub username: String,
}

/// `hypersdk vms`
#[derive(Args)]
#[command(next_line_help = true)]
pub struct Vms {
    /// Only of this connection or kind
    #[arg(long)]
    pub provider: Option<String>,
    /// Part of the name or id
    #[arg(long)]
    pub search: Option<String>,
    /// Operating system
    #[arg(long)]
    pub os: Option<String>,
    /// running, stopped or suspended
    #[arg(long)]
    pub status: Option<String>,
    /// Ask the providers now instead of answering from the inventory
    #[arg(long)]
    pub refresh: bool,
    /// How many at most
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..))]
    pub limit: u32,
}

/// `hypersdk export`
#[derive(Args)]
#[command(next_line_help = true)]
pub struct Export {
    /// Name, inventory path or id of the VM
    pub vm: String,
    /// Connection or kind; default: the one that has a VM of this name
    #[arg(long)]
    pub provider: Option<String>,
    /// Format of the export: ova, ovf, vmdk, qcow2, raw
    #[arg(long, default_value = "qcow2", hide_possible_values = true, value_parser = format_parser())]
    pub format: Format,
    /// Compress the disks where the format can
    #[arg(long)]
    pub compress: bool,
    /// With this algorithm
    #[arg(long, value_parser = algorithm_parser())]
    pub compression: Option<Algorithm>,
    /// Compression level; default: the fast one
    #[arg(long, allow_negative_numbers = true)]
    pub level: Option<i32>,
    /// Bring the snapshots along, each as a disk of its own
    #[arg(long)]
    pub include_snapshots: bool,
    /// Shut a running VM down first, and switch it on again afterwards
    #[arg(long)]
    pub power_off: bool,
    /// Have its guest freeze its file systems for the moment that is read
    #[arg(long)]
    pub quiesce: bool,
    /// Folder inside a root of the agent, as ROOT/…; default: exports
    #[arg(long, value_name = "ROOT/DIR")]
    pub destination: Option<String>,
    /// Do not read the output back; the result then says it is not verified
    #[arg(long)]
    pub no_verify: bool,
    /// Data a second: 64M, 500K, 1G (powers of 1024) or bytes
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    pub bandwidth_limit: Option<u64>,
    /// 0 to 100, higher first
    #[arg(long, value_parser = clap::value_parser!(u8).range(0..=100))]
    pub priority: Option<u8>,
    /// Stay until the job has ended (this is the default)
    #[arg(long, conflicts_with = "detach")]
    pub wait: bool,
    /// Print the job's id and return at once
    #[arg(long, short)]
    pub detach: bool,
}

/// `hypersdk jobs`
#[derive(Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Jobs {
    /// What to do; without it the jobs are listed.
    #[command(subcommand)]
    pub action: Option<JobsAction>,
    /// Which jobs are listed.
    #[command(flatten)]
    pub filter: JobFilter,
}

/// Which jobs are listed.
#[derive(Args, Clone)]
pub struct JobFilter {
    /// queued, running, completed, failed or cancelled
    #[arg(long)]
    pub status: Option<String>,
    /// Connection or kind
    #[arg(long)]
    pub provider: Option<String>,
    /// export, convert, import, migrate, verify or backup
    #[arg(long = "type", value_name = "TYPE", hide_possible_values = true, value_parser = PossibleValuesParser::new(JobType::ALL))]
    pub kind: Option<String>,
    /// Part of the VM's name or of the id
    #[arg(long)]
    pub search: Option<String>,
    /// How many at most, newest first
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..))]
    pub limit: u32,
}

/// What is done with jobs.
#[derive(Subcommand)]
pub enum JobsAction {
    /// List jobs
    List(JobFilter),
    /// Show one job
    Get {
        /// The job
        id: JobId,
    },
    /// Stop a job; its partial files go
    Cancel {
        /// The job
        id: JobId,
    },
    /// Run a failed or cancelled job again
    Retry {
        /// The job
        id: JobId,
    },
    /// Stop a job and keep its checkpoint
    Pause {
        /// The job
        id: JobId,
    },
    /// Stop the VM of a warm migration now, and start the new one
    Cutover {
        /// The job
        id: JobId,
    },
    /// Go on with a paused job
    Resume {
        /// The job
        id: JobId,
    },
}

/// `hypersdk logs`
#[derive(Args)]
pub struct Logs {
    /// The job
    pub id: JobId,
    /// Go on until the job has ended
    #[arg(long, short)]
    pub follow: bool,
}

/// `hypersdk watch`
#[derive(Args)]
pub struct Watch {
    /// The job; without it, all jobs until interrupted
    pub id: Option<JobId>,
}

/// `hypersdk agents`
#[derive(Args)]
pub struct Agents {
    /// What to do; without it the agents are listed.
    #[command(subcommand)]
    pub action: Option<AgentsAction>,
}

/// What is done with agents.
#[derive(Subcommand)]
pub enum AgentsAction {
    /// List agents
    List,
    /// Make a join token for a new agent; it is shown once
    Token,
    /// Give an agent no new work
    Drain {
        /// The agent
        id: String,
    },
    /// Give it work again
    Resume {
        /// The agent
        id: String,
    },
}

/// `hypersdk admin`
#[derive(Args)]
#[command(after_help = "Settings come as the controller's do: from --config and HYPERSDK_*.")]
pub struct Admin {
    /// Settings of the controller, TOML
    #[arg(long, global = true, hide_env = true, env = "HYPERSDK_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// The controller's data directory, or `hypersdk up`'s
    #[arg(long, global = true, value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// What to do.
    #[command(subcommand)]
    pub action: AdminAction,
}

/// What is done at the controller's machine.
#[derive(Subcommand)]
pub enum AdminAction {
    /// Give a user a new password
    ResetPassword {
        /// Whose
        #[arg(default_value = "admin")]
        user: String,
    },
    /// Write database and keys into a new file
    Backup {
        /// The file, for its owner's eyes alone
        file: PathBuf,
    },
    /// Put a backup in place of a stopped controller
    Restore {
        /// The backup
        file: PathBuf,
        /// Replace what is there
        #[arg(long)]
        force: bool,
    },
}

fn format_parser() -> impl TypedValueParser<Value = Format> {
    PossibleValuesParser::new(Format::ALL).try_map(|word| Format::from_word(&word).ok_or("not a format"))
}

fn algorithm_parser() -> impl TypedValueParser<Value = Algorithm> {
    PossibleValuesParser::new(Algorithm::ALL).try_map(|word| Algorithm::from_word(&word).ok_or("not an algorithm"))
}

/// Bytes a second: a whole number with K, M, G or T (powers of 1024), `B`, `iB` and `/s` allowed behind.
fn parse_rate(text: &str) -> Result<u64, String> {
    let bad = || "a rate is a whole number of bytes a second, or one with K, M or G: 64M".to_owned();
    let lower = text.trim().to_ascii_lowercase();
    let bare = lower.strip_suffix("/s").unwrap_or(&lower);
    let bare = bare.strip_suffix("ib").or_else(|| bare.strip_suffix('b')).unwrap_or(bare);
    let (number, shift) = match bare.char_indices().last() {
        Some((at, 'k')) => (&bare[..at], 10),
        Some((at, 'm')) => (&bare[..at], 20),
        Some((at, 'g')) => (&bare[..at], 30),
        Some((at, 't')) => (&bare[..at], 40),
        _ => (bare, 0),
    };
    let value: u64 = number.trim_end().parse().map_err(|_| bad())?;
    match value.checked_mul(1u64 << shift) {
        Some(0) => Err("a rate of 0 would never end; leave --bandwidth-limit away for no limit".to_owned()),
        Some(bytes) => Ok(bytes),
        None => Err(bad()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_tree_is_sound_and_its_help_fits_80_columns() {
        Cli::command().debug_assert();
        let mut root = Cli::command();
        root.build();
        check(&mut root);
    }

    fn check(command: &mut clap::Command) {
        for help in [command.render_help(), command.render_long_help()] {
            for line in help.to_string().lines() {
                assert!(line.chars().count() <= 80, "{}: {line}", command.get_name());
            }
        }
        command.get_subcommands_mut().for_each(check);
    }

    #[test]
    fn rates_are_read_in_powers_of_1024() {
        assert_eq!(parse_rate("64M").unwrap(), 64 << 20);
        assert_eq!(parse_rate("1GiB/s").unwrap(), 1 << 30);
        assert_eq!(parse_rate("500kb").unwrap(), 500 << 10);
        assert_eq!(parse_rate("12").unwrap(), 12);
        for bad in ["", "M", "0", "-1", "1.5M", "99999999999999T", "é"] {
            assert!(parse_rate(bad).is_err(), "{bad}");
        }
    }
}

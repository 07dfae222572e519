//! The command `hypersdk`: client verbs against a controller, the engine without one, and everything in one process.
//!
//! ```text
//! args ─► main ─► demo ▸ up ▸ admin  whole installation    ┐
//!              ├► local            the engine, no server   ├► output · progress · failure
//!              └► login ▸ jobs ▸ watch ▸ inventory ▸ snapshots ▸ console ─► client ▸ session ▸ tls
//! ```
//! Owns: which verb runs where, and the exit code. Never: prints a secret but the ones that are shown once by design (a first password, a
//! join token). A crash here costs one command.

mod admin;
mod args;
mod backups;
mod client;
mod console;
mod demo;
mod failure;
mod inventory;
mod jobs;
mod local;
mod login;
mod migrate;
mod output;
mod progress;
mod sample;
mod session;
mod snapshots;
mod tls;
mod up;
mod watch;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use crate::args::{Cli, Verb};
use crate::client::Client;
use crate::failure::{Failure, Outcome};

fn main() -> ExitCode {
    // Secrets of this process must not end up in a core file.
    let none = rustix::process::Rlimit { current: Some(0), maximum: Some(0) };
    let _ = rustix::process::setrlimit(rustix::process::Resource::Core, none);
    // Fails only when a provider was chosen before, which is then the same one.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let cli = Cli::parse();
    match run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            output::remark(format!("hypersdk: {failure}"));
            ExitCode::from(failure.exit as u8)
        }
    }
}

fn run(cli: &Cli) -> Outcome {
    match &cli.verb {
        Verb::Demo(args) => demo::demo(args),
        Verb::Up(args) => up::up(args),
        Verb::Convert(args) => local::convert(args, cli.output),
        Verb::Verify(args) => local::verify(args, cli.output),
        Verb::Admin(args) => admin::admin(args),
        Verb::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "hypersdk", &mut script);
            output::raw(&script);
            Ok(())
        }
        verb => {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let runtime = runtime.map_err(|e| Failure::failed(format!("the runtime does not start: {e}")))?;
            runtime.block_on(converse(cli, verb))
        }
    }
}

/// The verbs that talk to a controller.
async fn converse(cli: &Cli, verb: &Verb) -> Outcome {
    let client = || Client::new(session::current(&cli.server)?);
    let style = cli.output;
    match verb {
        Verb::Login(args) => login::login(&cli.server, args, style).await,
        Verb::Logout => login::logout(&cli.server).await,
        Verb::Vms(args) => inventory::vms(&client()?, args, style).await,
        Verb::Export(args) => jobs::export(&client()?, args, style).await,
        Verb::Migrate(args) => migrate::migrate(&client()?, args, style).await,
        Verb::Snapshots(args) => snapshots::snapshots(&client()?.patient(snapshots::PATIENCE), args, style).await,
        Verb::Backup(args) => backups::backup(&client()?, args, style).await,
        Verb::Restore(args) => backups::restore(&client()?, args, style).await,
        Verb::Console(args) => console::console(&client()?, args, style).await,
        Verb::Jobs(args) => jobs::jobs(&client()?, args, style).await,
        Verb::Logs(args) => watch::logs(&client()?, args, style).await,
        Verb::Watch(args) => watch::watch(&client()?, args, style).await,
        Verb::Providers(args) => inventory::providers(&client()?, args, style).await,
        Verb::Agents(args) => inventory::agents(&client()?, args, style).await,
        Verb::Demo(_) | Verb::Up(_) | Verb::Convert(_) | Verb::Verify(_) | Verb::Admin(_) | Verb::Completions { .. } => Ok(()),
    }
}

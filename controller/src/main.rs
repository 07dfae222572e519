//! `hypersdk-controller`: settings, logs, the actix system, signals.
//!
//! Owns: the process. Never: leaves a core dump (secrets are in memory). A crash here costs nothing: every start is a recovery.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use controller::Config;
use tokio::signal::unix::{SignalKind, signal};

/// A drain that takes longer is cut off; orchestrators kill at 30 s.
const DRAIN: Duration = Duration::from_secs(25);

/// The control plane of HyperSDK. Every setting is also a HYPERSDK_* variable, secrets also as HYPERSDK_*_FILE.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Settings, TOML.
    #[arg(long, env = "HYPERSDK_CONFIG")]
    config: Option<PathBuf>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    controller::no_core_dumps();
    let config = match Config::load(arguments.config.as_deref()) {
        Ok(config) => config,
        Err(e) => {
            eprintln!("hypersdk-controller: {e}");
            return ExitCode::from(2);
        }
    };
    shared::telemetry::start(config.log_json, "info", None);
    actix::System::new().block_on(serve(config))
}

async fn serve(config: Config) -> ExitCode {
    let (mut terminate, mut interrupt) = match (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) {
        (Ok(terminate), Ok(interrupt)) => (terminate, interrupt),
        _ => {
            tracing::error!("cannot listen for signals");
            return ExitCode::FAILURE;
        }
    };
    let running = tokio::select! {
        running = controller::run(config) => running,
        _ = terminate.recv() => return ExitCode::SUCCESS,
        _ = interrupt.recv() => return ExitCode::SUCCESS,
    };
    let running = match running {
        Ok(running) => running,
        Err(e) => {
            tracing::error!(cause = %e, "controller did not start");
            return ExitCode::FAILURE;
        }
    };
    if let Some(password) = &running.admin_password {
        // To the terminal and not into the log; this is the only time that it is shown.
        println!("admin password: {}", password.expose());
    }
    println!("certificate SHA-256: {}", running.fingerprint);
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    if tokio::time::timeout(DRAIN, running.drain()).await.is_err() {
        tracing::warn!("the drain took too long and was cut off");
    }
    ExitCode::SUCCESS
}

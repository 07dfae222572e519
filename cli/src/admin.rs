//! `hypersdk admin`: a lost password, a backup, a restore, at the machine of the controller.
//!
//! Owns: which installation is meant. Never: talks to a controller; what it does is between the data directory and the database.
//! A crash here costs the attempt.

use std::path::{Path, PathBuf};

use controller::Config;
use controller::admin::{self, Error};
use shared::vault;

use crate::args::{Admin, AdminAction};
use crate::failure::{Exit, Failure, Outcome};
use crate::{output, session, up};

/// Runs one of the verbs.
pub fn admin(args: &Admin) -> Outcome {
    let config = config(args)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.map_err(|e| Failure::failed(format!("the runtime does not start: {e}")))?;
    let handle = runtime.handle().clone();
    match &args.action {
        AdminAction::ResetPassword { user } => {
            let given = session::secret_variable("HYPERSDK_PASSWORD")?;
            let made = runtime.block_on(admin::reset_password(&config, user, given, handle)).map_err(failed)?;
            output::line(format!("The password of {user} is new; their sessions have ended."));
            if let Some(password) = made {
                // This is the only time that it is shown.
                output::line(format!("password: {}", password.expose()));
            }
        }
        AdminAction::Backup { file } => {
            let made = runtime.block_on(admin::backup::make(&config, file, handle)).map_err(failed)?;
            let (rows, tables, files) = (made.rows, made.tables, made.files);
            output::line(format!("{}: {rows} rows of {tables} tables and {files} key files.", file.display()));
            output::remark("It holds the keys of the installation: keep it as you keep them. Exports are not in it.");
            if config.tls_cert.is_some() {
                output::remark("Your own certificate (tls_cert, tls_key) is not in it either.");
            }
        }
        AdminAction::Restore { file, force } => {
            let done = runtime.block_on(admin::restore::run(&config, file, *force, handle)).map_err(failed)?;
            let (rows, files) = (done.rows, done.files);
            output::line(format!("Restored the state of {}: {rows} rows and {files} key files.", done.made_at));
        }
    }
    Ok(())
}

fn failed(error: Error) -> Failure {
    match error {
        Error::Running(_) => Failure::new(Exit::NotAllowed, error.to_string()),
        other => Failure::failed(other.to_string()),
    }
}

/// The controller's settings; the data directory of `hypersdk up` is found by its own name, too.
fn config(args: &Admin) -> Result<Config, Failure> {
    let mut config = Config::load(args.config.as_deref()).map_err(|e| Failure::usage(e.to_string()))?;
    if let Some(dir) = &args.data_dir {
        config.data_dir = of_up(dir).unwrap_or_else(|| dir.clone());
    } else if args.config.is_none()
        && session::variable("HYPERSDK_DATA_DIR").is_none()
        && let Some(dir) = up::default_data_dir().ok().and_then(|dir| of_up(&dir))
    {
        config.data_dir = dir;
    }
    // The database's address and the messages bear the whole path.
    config.data_dir = std::path::absolute(&config.data_dir).map_err(|e| Failure::failed(e.to_string()))?;
    Ok(config)
}

/// The controller's part of a directory of `hypersdk up`.
fn of_up(dir: &Path) -> Option<PathBuf> {
    vault::real_user_path(&dir.join("controller")).ok()
}

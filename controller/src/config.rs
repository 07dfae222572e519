//! Settings of the controller: a TOML file, then `HYPERSDK_*` variables over it, secrets also from `HYPERSDK_*_FILE`.
//!
//! Owns: their names, defaults and checks. Never: prints a secret. A crash here costs nothing: it is read once, before anything starts.

pub mod carbon;

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use shared::secret::Secret;
use shared::vault;

use crate::alerts::thresholds::Thresholds;

/// Why the settings cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be read.
    #[error("{path}: {source}")]
    Io {
        /// Which.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// The TOML is wrong.
    #[error("{path}: {message}")]
    Toml {
        /// Which file.
        path: String,
        /// What and where.
        message: String,
    },
    /// A value is wrong.
    #[error("{name}: {message}")]
    Value {
        /// Which setting.
        name: String,
        /// What would be right.
        message: String,
    },
}

/// Request limits.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Requests an anonymous address may make at once.
    pub anonymous_burst: u32,
    /// One of them comes back after this many milliseconds.
    pub anonymous_replenish_ms: u64,
    /// Requests a user may make in a minute.
    pub user_per_minute: u32,
    /// Failed log-ins to one account from one address before the back-off begins.
    pub login_free_tries: u32,
    /// Failed log-ins from one address, over all accounts, before the back-off begins.
    pub login_free_tries_address: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self { anonymous_burst: 100, anonymous_replenish_ms: 600, user_per_minute: 1000, login_free_tries: 5, login_free_tries_address: 30 }
    }
}

/// An address or a network: `10.0.0.1`, `10.0.0.0/8`, `fd00::/8`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Network {
    address: IpAddr,
    prefix: u8,
}

impl TryFrom<String> for Network {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        let wrong = || format!("`{text}` is no address like 10.0.0.1 and no network like 10.0.0.0/8");
        let (address, prefix) = match text.split_once('/') {
            Some((address, prefix)) => (address, Some(prefix)),
            None => (text.as_str(), None),
        };
        let address: IpAddr = address.trim().parse().map_err(|_| wrong())?;
        let widest = if address.is_ipv4() { 32 } else { 128 };
        let prefix = match prefix {
            Some(prefix) => prefix.trim().parse::<u8>().ok().filter(|prefix| *prefix <= widest).ok_or_else(wrong)?,
            None => widest,
        };
        Ok(Self { address, prefix })
    }
}

impl Network {
    /// Whether an address lies in it.
    pub fn contains(&self, address: IpAddr) -> bool {
        match (self.address, address.to_canonical()) {
            (IpAddr::V4(network), IpAddr::V4(address)) => {
                let shift = 32 - u32::from(self.prefix);
                u64::from(network.to_bits()) >> shift == u64::from(address.to_bits()) >> shift
            }
            (IpAddr::V6(network), IpAddr::V6(address)) => match 128 - u32::from(self.prefix) {
                128 => true,
                shift => network.to_bits() >> shift == address.to_bits() >> shift,
            },
            _ => false,
        }
    }
}

/// All settings.
#[derive(Clone)]
pub struct Config {
    /// Where REST and WebSocket listen; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Where agents dial in; port 0 takes a free one.
    pub grpc_listen: SocketAddr,
    /// Names and addresses that the agents know this controller by; they stand in its certificate.
    pub grpc_names: Vec<String>,
    /// Folder for keys and the embedded database; made with mode 0700.
    pub data_dir: PathBuf,
    /// The root `uploads`; absent: `uploads` in the data directory.
    pub uploads_dir: Option<PathBuf>,
    /// Bytes that all uploads together may have; 0: as much as the disk has.
    pub uploads_quota_bytes: u64,
    /// Hours without a chunk after which an unfinished upload goes.
    pub uploads_expiry_hours: f64,
    /// Days after which the files of finished jobs go from their agents' disks; 0: never.
    pub exports_retention_days: f64,
    /// `postgres://…` or `sqlite://…`; absent: SQLite in the data directory. May hold a password.
    pub database_url: Option<Secret>,
    /// Password of the first admin; absent: one is made.
    pub admin_password: Option<Secret>,
    /// Key that seals secrets at rest, 64 hex digits; absent: made and kept in the data directory. Several controllers must share it.
    pub sealing_key: Option<Secret>,
    /// Whether `/metrics` answers without a token.
    pub metrics_public: bool,
    /// Request limits.
    pub limits: Limits,
    /// Proxies whose `X-Forwarded-For` counts.
    pub trusted_proxies: Vec<Network>,
    /// Origins, beside our own, that browsers may open `/ws` from: `https://ui.example.org`.
    pub allowed_origins: Vec<String>,
    /// Where a fresh join token is written at the start, for agents on the same host.
    pub join_token_out: Option<PathBuf>,
    /// Certificate chain for REST, PEM; absent: a self-signed one is made and kept.
    pub tls_cert: Option<PathBuf>,
    /// Its key, PEM.
    pub tls_key: Option<PathBuf>,
    /// Logs as JSON.
    pub log_json: bool,
    /// bcrypt's cost, 10 to 16.
    pub bcrypt_cost: u32,
    /// How long a token is good, in minutes.
    pub token_minutes: u32,
    /// Threads that answer HTTP; 0: one per processor.
    pub workers: usize,
    /// The grid.
    pub carbon: carbon::Carbon,
    /// When alerts are raised.
    pub alerts: Thresholds,
    /// Networks that webhooks may reach beside public addresses.
    pub webhooks_allowed: Vec<Network>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 5080)),
            grpc_listen: SocketAddr::from(([0, 0, 0, 0], 5443)),
            grpc_names: Vec::new(),
            data_dir: PathBuf::from("/var/lib/hypersdk/controller"),
            uploads_dir: None,
            uploads_quota_bytes: 0,
            uploads_expiry_hours: 24.0,
            exports_retention_days: 0.0,
            database_url: None,
            admin_password: None,
            sealing_key: None,
            metrics_public: false,
            limits: Limits::default(),
            trusted_proxies: Vec::new(),
            allowed_origins: Vec::new(),
            join_token_out: None,
            tls_cert: None,
            tls_key: None,
            log_json: false,
            bcrypt_cost: 12,
            token_minutes: 720,
            workers: 0,
            carbon: carbon::Carbon::default(),
            alerts: Thresholds::default(),
            webhooks_allowed: Vec::new(),
        }
    }
}

/// The file as it is written; every setting is optional.
#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct File {
    listen: Option<SocketAddr>,
    grpc_listen: Option<SocketAddr>,
    grpc_names: Option<Vec<String>>,
    data_dir: Option<PathBuf>,
    uploads_dir: Option<PathBuf>,
    uploads_quota_bytes: Option<u64>,
    uploads_expiry_hours: Option<f64>,
    exports_retention_days: Option<f64>,
    database_url: Option<String>,
    admin_password: Option<String>,
    sealing_key: Option<String>,
    metrics: Option<MetricsFile>,
    metrics_public: Option<bool>,
    limits: Option<Limits>,
    trusted_proxies: Option<Vec<Network>>,
    allowed_origins: Option<Vec<String>>,
    join_token_out: Option<PathBuf>,
    tls_cert: Option<PathBuf>,
    tls_key: Option<PathBuf>,
    log_json: Option<bool>,
    bcrypt_cost: Option<u32>,
    token_minutes: Option<u32>,
    workers: Option<usize>,
    carbon: Option<carbon::File>,
    alerts: Option<Thresholds>,
    webhooks_allowed: Option<Vec<Network>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct MetricsFile {
    public: bool,
}

impl Config {
    /// Reads the file (where one is named) and the environment, and checks the result.
    pub fn load(path: Option<&Path>) -> Result<Self, Error> {
        let file = match path {
            Some(path) => parse(path)?,
            None => File::default(),
        };
        let mut config = Self::default();
        config.take(file);
        config.take_environment(&|name| std::env::var(name).ok())?;
        config.check()?;
        Ok(config)
    }

    fn take(&mut self, file: File) {
        macro_rules! take {
            ($($field:ident),*) => { $(if let Some(value) = file.$field { self.$field = value; })* };
        }
        take!(listen, grpc_listen, grpc_names, data_dir, metrics_public, limits, trusted_proxies, allowed_origins);
        take!(log_json, bcrypt_cost, token_minutes, workers, alerts, webhooks_allowed);
        take!(uploads_quota_bytes, uploads_expiry_hours, exports_retention_days);
        macro_rules! take_optional {
            ($($field:ident),*) => { $(if file.$field.is_some() { self.$field = file.$field; })* };
        }
        take_optional!(uploads_dir, join_token_out, tls_cert, tls_key);
        macro_rules! take_secret {
            ($($field:ident),*) => { $(if let Some(value) = file.$field { self.$field = Some(Secret::new(value)); })* };
        }
        take_secret!(database_url, admin_password, sealing_key);
        if let Some(carbon) = file.carbon {
            self.carbon.take(carbon);
        }
        if let Some(metrics) = file.metrics {
            self.metrics_public = metrics.public;
        }
    }

    /// Takes `HYPERSDK_*` over what is set; the caller says where variables come from.
    pub fn take_environment(&mut self, variable: &dyn Fn(&str) -> Option<String>) -> Result<(), Error> {
        let get = |name: &str| variable(&format!("HYPERSDK_{name}")).filter(|value| !value.is_empty());
        let list = |text: String| text.split(',').map(|part| part.trim().to_owned()).filter(|part| !part.is_empty()).collect::<Vec<_>>();
        macro_rules! parsed {
            ($($field:expr, $name:literal, $right:literal;)*) => {
                $(if let Some(text) = get($name) {
                    $field = text.parse().map_err(|_| wrong(concat!("HYPERSDK_", $name), $right))?;
                })*
            };
        }
        parsed! {
            self.listen, "LISTEN", "must be ADDRESS:PORT";
            self.grpc_listen, "GRPC_LISTEN", "must be ADDRESS:PORT";
            self.metrics_public, "METRICS_PUBLIC", "must be true or false";
            self.log_json, "LOG_JSON", "must be true or false";
            self.bcrypt_cost, "BCRYPT_COST", "must be a whole number from 10 to 16";
            self.token_minutes, "TOKEN_MINUTES", "must be a whole number of minutes";
            self.workers, "WORKERS", "must be a whole number";
            self.uploads_quota_bytes, "UPLOADS_QUOTA_BYTES", "must be a whole number of bytes";
            self.uploads_expiry_hours, "UPLOADS_EXPIRY_HOURS", "must be a number of hours";
            self.exports_retention_days, "EXPORTS_RETENTION_DAYS", "must be a number of days";
            self.limits.anonymous_burst, "LIMITS_ANONYMOUS_BURST", "must be a whole number";
            self.limits.anonymous_replenish_ms, "LIMITS_ANONYMOUS_REPLENISH_MS", "must be a whole number of milliseconds";
            self.limits.user_per_minute, "LIMITS_USER_PER_MINUTE", "must be a whole number";
            self.limits.login_free_tries, "LIMITS_LOGIN_FREE_TRIES", "must be a whole number";
            self.limits.login_free_tries_address, "LIMITS_LOGIN_FREE_TRIES_ADDRESS", "must be a whole number";
        }
        if let Some(text) = get("DATA_DIR") {
            self.data_dir = PathBuf::from(text);
        }
        for (field, name) in [
            (&mut self.uploads_dir, "UPLOADS_DIR"),
            (&mut self.join_token_out, "JOIN_TOKEN_OUT"),
            (&mut self.tls_cert, "TLS_CERT"),
            (&mut self.tls_key, "TLS_KEY"),
        ] {
            if let Some(text) = get(name) {
                *field = Some(PathBuf::from(text));
            }
        }
        if let Some(text) = get("GRPC_NAMES") {
            self.grpc_names = list(text);
        }
        if let Some(text) = get("ALLOWED_ORIGINS") {
            self.allowed_origins = list(text);
        }
        if let Some(text) = get("TRUSTED_PROXIES") {
            let networks = list(text).into_iter().map(Network::try_from).collect::<Result<_, _>>();
            self.trusted_proxies = networks.map_err(|message| wrong("HYPERSDK_TRUSTED_PROXIES", message))?;
        }
        self.carbon.take_environment(&get)?;
        if let Some(text) = get("WEBHOOKS_ALLOWED") {
            let networks = list(text).into_iter().map(Network::try_from).collect::<Result<_, _>>();
            self.webhooks_allowed = networks.map_err(|message| wrong("HYPERSDK_WEBHOOKS_ALLOWED", message))?;
        }
        self.alerts.take_environment(&get).map_err(|name| wrong(&name, "must be a whole number"))?;
        let secrets = [
            (&mut self.database_url, "DATABASE_URL"),
            (&mut self.admin_password, "ADMIN_PASSWORD"),
            (&mut self.sealing_key, "SEALING_KEY"),
        ];
        for (field, name) in secrets {
            if let Some(secret) = secret(&get, name)? {
                *field = Some(secret);
            }
        }
        Ok(())
    }

    /// Refuses what cannot work.
    pub fn check(&self) -> Result<(), Error> {
        if !(10..=16).contains(&self.bcrypt_cost) {
            return Err(wrong("bcrypt_cost", "must be a whole number from 10 to 16"));
        }
        if !(1..=525_600).contains(&self.token_minutes) {
            return Err(wrong("token_minutes", "must be from 1 to 525600"));
        }
        if self.limits.anonymous_burst == 0 || self.limits.anonymous_replenish_ms == 0 || self.limits.user_per_minute == 0 {
            return Err(wrong("limits", "must be 1 or more"));
        }
        if !(self.uploads_expiry_hours > 0.0 && self.uploads_expiry_hours <= 87_600.0) {
            return Err(wrong("uploads_expiry_hours", "must be above 0 and at most 87600"));
        }
        if !(self.exports_retention_days >= 0.0 && self.exports_retention_days <= 36_500.0) {
            return Err(wrong("exports_retention_days", "must be 0 (for ever) to 36500"));
        }
        self.alerts.check().map_err(|(name, right)| wrong(name, right))?;
        if self.tls_cert.is_some() != self.tls_key.is_some() {
            return Err(wrong("tls_cert, tls_key", "give both or none"));
        }
        self.carbon.check()?;
        Ok(())
    }

    /// Where uploads lie.
    pub fn uploads(&self) -> PathBuf {
        self.uploads_dir.clone().unwrap_or_else(|| self.data_dir.join("uploads"))
    }

    /// The database's address: the configured one, else SQLite in the data directory.
    pub fn database(&self) -> Secret {
        match &self.database_url {
            Some(url) => url.clone(),
            None => Secret::new(format!("sqlite://{}?mode=rwc", self.data_dir.join("hypersdk.db").display())),
        }
    }
}

fn wrong(name: &str, message: impl Into<String>) -> Error {
    Error::Value { name: name.to_owned(), message: message.into() }
}

/// `HYPERSDK_NAME`, else the content of the file that `HYPERSDK_NAME_FILE` names.
fn secret(get: &dyn Fn(&str) -> Option<String>, name: &str) -> Result<Option<Secret>, Error> {
    if let Some(text) = get(name) {
        return Ok(Some(Secret::new(text)));
    }
    let Some(path) = get(&format!("{name}_FILE")) else { return Ok(None) };
    let bytes = vault::read_config(Path::new(&path)).map_err(|source| Error::Io { path: path.clone(), source })?;
    let text = String::from_utf8(bytes).map_err(|_| wrong(&format!("HYPERSDK_{name}_FILE"), "must hold UTF-8 text"))?;
    Ok(Some(Secret::new(text.trim_end_matches(['\r', '\n']))))
}

fn parse(path: &Path) -> Result<File, Error> {
    let name = path.display().to_string();
    let bytes = vault::read_config(path).map_err(|source| Error::Io { path: name.clone(), source })?;
    let text = String::from_utf8(bytes).map_err(|_| Error::Toml { path: name.clone(), message: "not UTF-8".to_owned() })?;
    // The whole message would quote the line, which may hold a secret.
    toml::from_str(&text).map_err(|e| Error::Toml { path: name, message: e.message().to_owned() })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_stands_over_the_file_and_typing_errors_are_named() {
        let mut config = Config::default();
        config.take(toml::from_str("listen = '127.0.0.1:1'\nmetrics = { public = true }\nlimits = { anonymous_burst = 7 }").unwrap());
        assert_eq!((config.listen.port(), config.metrics_public, config.limits.anonymous_burst), (1, true, 7));
        let variables = |name: &str| match name {
            "HYPERSDK_LISTEN" => Some("127.0.0.1:2".to_owned()),
            "HYPERSDK_TRUSTED_PROXIES" => Some("10.0.0.0/8, ::1".to_owned()),
            "HYPERSDK_ADMIN_PASSWORD" => Some("secret".to_owned()),
            _ => None,
        };
        config.take_environment(&variables).unwrap();
        assert_eq!((config.listen.port(), config.trusted_proxies.len()), (2, 2));
        assert_eq!(config.admin_password.unwrap().expose(), "secret");
        assert!(toml::from_str::<File>("listn = '127.0.0.1:1'").is_err());
        let bad = |name: &str| (name == "HYPERSDK_LISTEN").then(|| "here".to_owned());
        assert!(Config::default().take_environment(&bad).is_err());
    }

    #[test]
    fn networks_hold_what_lies_in_them() {
        let holds = |network: &str, address: &str| Network::try_from(network.to_owned()).unwrap().contains(address.parse().unwrap());
        assert!(holds("10.0.0.0/8", "10.255.0.1") && !holds("10.0.0.0/8", "11.0.0.1"));
        assert!(holds("0.0.0.0/0", "1.2.3.4") && holds("::/0", "::1") && !holds("::/0", "1.2.3.4"));
        assert!(holds("127.0.0.1", "::ffff:127.0.0.1"));
        assert!(Network::try_from("10.0.0.0/33".to_owned()).is_err());
    }
}

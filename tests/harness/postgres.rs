//! A Postgres of the tests' own: one cluster while anybody needs one, one database for each installation.
//!
//! Owns: the cluster's folder and process. Never: touches a Postgres of the machine.
//! A crash here leaves a folder; the server dies with the test binary.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use super::process::{Process, output, run, tail};

/// The running cluster; it stops when the last holder lets go.
pub struct Cluster {
    process: Mutex<Process>,
    port: u16,
    dir: PathBuf,
}

static CURRENT: Mutex<Weak<Cluster>> = Mutex::new(Weak::new());

/// A database of its own, and the cluster kept alive under it.
pub struct Db {
    /// For `HYPERSDK_DATABASE_URL`.
    pub url: String,
    name: String,
    /// Keeps the server alive.
    cluster: Arc<Cluster>,
}

impl Db {
    /// Makes a database, starting the cluster when nobody has.
    pub fn create() -> Self {
        let cluster = {
            let mut current = CURRENT.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            match current.upgrade() {
                Some(cluster) => cluster,
                None => {
                    let cluster = Arc::new(Cluster::start());
                    *current = Arc::downgrade(&cluster);
                    cluster
                }
            }
        };
        let name = format!("h{}", shared::ids::random_hex::<5>());
        cluster.sql("postgres", &format!("CREATE DATABASE {name}"));
        Self { url: format!("postgres://hypersdk@127.0.0.1:{}/{name}", cluster.port), name, cluster }
    }

    /// Throws everybody out and lets nobody in, or lets them in again.
    pub fn away(&self, away: bool) {
        self.cluster.sql("postgres", &format!("ALTER DATABASE {} ALLOW_CONNECTIONS {}", self.name, !away));
        if away {
            let out = format!("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{}'", self.name);
            self.cluster.sql("postgres", &out);
        }
    }
}

impl Db {
    /// Runs a statement in this database; answers what it printed.
    pub fn sql(&self, statement: &str) -> String {
        let name = self.url.rsplit('/').next().expect("the address names the database");
        self.cluster.sql(name, statement)
    }
}

impl Cluster {
    fn start() -> Self {
        let bin = server_binaries();
        // Below the system's temporary folder: a socket's path is short, and the server's user can walk there.
        let dir = std::env::temp_dir().join(format!("hypersdk-pg-{}", shared::ids::random_hex::<4>()));
        std::fs::create_dir(&dir).unwrap();
        let user = is_root().then(|| "postgres".to_owned());
        if let Some(user) = &user {
            run(Command::new("chown").arg(user).arg(&dir));
        }
        let data = dir.join("data");
        let mut init = as_user(user.as_deref(), &bin.join("initdb"));
        run(init.args(["--auth=trust", "--username=hypersdk", "--no-sync", "--encoding=UTF8", "--locale=C", "-D"]).arg(&data));
        for _ in 0..5 {
            if let Some(cluster) = Self::serve(&bin, &dir, &data, user.as_deref()) {
                return cluster;
            }
        }
        panic!("Postgres does not start:\n{}", tail(&dir.join("log"), 4 << 10));
    }

    /// Postgres cannot choose its own port, so one that was free a moment ago is tried; `None` when somebody was faster.
    fn serve(bin: &Path, dir: &Path, data: &Path, user: Option<&str>) -> Option<Self> {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut server = as_user(user, &bin.join("postgres"));
        server.arg("-D").arg(data).arg("-k").arg(dir).args(["-p", &port.to_string()]);
        // The machine never loses power here, and no test kills the server itself.
        server.args(["-c", "listen_addresses=127.0.0.1", "-c", "fsync=off", "-c", "max_connections=300"]);
        let mut process = Process::start("postgres", server, &dir.join("log"));
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(30) {
            if process.ended().is_some() {
                return None;
            }
            let ready = output(Command::new("psql").args(psql(port, "postgres")).args(["-c", "SELECT 1"]));
            if ready.status.success() {
                return Some(Self { process: Mutex::new(process), port, dir: dir.to_owned() });
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        None
    }

    fn sql(&self, database: &str, statement: &str) -> String {
        run(Command::new("psql").args(psql(self.port, database)).args(["-c", statement]))
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.process.get_mut().unwrap_or_else(|poisoned| poisoned.into_inner()).kill();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

fn psql(port: u16, database: &str) -> Vec<String> {
    let port = port.to_string();
    ["-h", "127.0.0.1", "-p", &port, "-U", "hypersdk", "-d", database, "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1"]
        .map(str::to_owned)
        .to_vec()
}

fn is_root() -> bool {
    std::fs::metadata("/proc/self").unwrap().uid() == 0
}

/// A command that dies with the test binary and, for root, runs as `user`: Postgres refuses to be root.
fn as_user(user: Option<&str>, program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    if let Some(user) = user {
        command.args(["--reuid", user, "--regid", user, "--clear-groups"]);
    }
    command.args(["--pdeathsig", "KILL", "--"]).arg(program).current_dir("/").env_remove("PGDATA");
    command
}

/// The newest server that Debian's packages installed, else what the path holds.
fn server_binaries() -> PathBuf {
    let mut versions: Vec<(u32, PathBuf)> = std::fs::read_dir("/usr/lib/postgresql")
        .map(|entries| {
            entries.flatten().filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path().join("bin")))).collect()
        })
        .unwrap_or_default();
    versions.retain(|(_, bin)| bin.join("postgres").is_file());
    versions.sort();
    if let Some((_, bin)) = versions.pop() {
        return bin;
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).find(|dir| dir.join("initdb").is_file() && dir.join("postgres").is_file());
    found.expect("no Postgres server: tests/run installs the package `postgresql`")
}

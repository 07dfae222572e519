//! An installation: a controller, its database and its agents, as processes of their own; or `hypersdk up`.
//!
//! Owns: their folders, settings, start, death and return. Never: knows what they should do. A crash here kills the installation.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use reqwest::Method;
use serde_json::{Value, json};

use super::client::Client;
use super::postgres::Db;
use super::process::{Process, mortal};
use super::{Scratch, binary, lab, seconds, wait_for};

/// The admin's password in every installation of the tests.
pub const PASSWORD: &str = "correct horse battery";

/// Where the truth lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Database {
    /// The embedded default.
    Sqlite,
    /// A database in the tests' own cluster.
    Postgres,
}

type Env = BTreeMap<String, String>;

fn env<const N: usize>(pairs: [(&str, String); N]) -> Env {
    pairs.into_iter().map(|(name, value)| (format!("HYPERSDK_{name}"), value)).collect()
}

/// A program of ours that can die and come back to the same place.
pub struct Service {
    name: String,
    program: &'static str,
    /// A command that becomes the program, with its arguments; mostly none.
    within: Vec<String>,
    args: Vec<String>,
    env: Env,
    home: PathBuf,
    process: Option<Process>,
}

impl Service {
    fn new(name: &str, program: &'static str, home: &Path, env: Env) -> Self {
        Self { name: name.to_owned(), program, within: Vec::new(), args: Vec::new(), env, home: home.to_owned(), process: None }
    }

    /// An agent by name, with its data in `home`; it still wants `EXPORTS_DIR`.
    pub fn agent(name: &str, home: &Path, grpc: &str, token: &str) -> Self {
        let settings = env([
            ("CONTROLLER", format!("https://{grpc}")),
            ("TOKEN", token.to_owned()),
            ("DATA_DIR", home.join("data").display().to_string()),
            ("AGENT_NAME", name.to_owned()),
        ]);
        Self::new(name, "hypersdk-agent", home, settings)
    }

    /// Starts it (again).
    pub fn start(&mut self) {
        let program = binary(self.program);
        let mut command = match self.within.split_first() {
            Some((first, rest)) => {
                let mut command = mortal(Path::new(first));
                command.args(rest).arg(program);
                command
            }
            None => mortal(&program),
        };
        command.args(&self.args).envs(&self.env).current_dir(&self.home);
        self.process = Some(Process::start(&self.name, command, &self.home.join(format!("{}.log", self.name))));
    }

    /// From its next start on it runs within a command that becomes it.
    pub fn within(&mut self, command: &[&str]) {
        self.within = command.iter().map(|word| (*word).to_owned()).collect();
    }

    /// kill -9.
    pub fn kill(&mut self) {
        self.process().kill();
    }

    /// The process.
    pub fn process(&mut self) -> &mut Process {
        self.process.as_mut().expect("it was started")
    }

    /// Sets a variable for the next start.
    pub fn set(&mut self, name: &str, value: &str) {
        self.env.insert(format!("HYPERSDK_{name}"), value.to_owned());
    }

    /// Its folder.
    pub fn home(&self) -> &Path {
        &self.home
    }
}

/// Where a controller can be reached, as it writes it into `endpoints.json` of its data directory.
#[derive(Clone, Debug)]
pub struct Endpoints {
    /// `https://HOST:PORT` of REST.
    pub rest: String,
    /// `HOST:PORT` of the agents' door.
    pub grpc: String,
    /// SHA-256 of the REST certificate.
    pub fingerprint: String,
}

impl Endpoints {
    fn read(text: &str) -> Result<Self, String> {
        let value: Value = serde_json::from_str(text).map_err(|e| format!("{text:?}: {e}"))?;
        let field = |name: &str| value[name].as_str().map(str::to_owned).ok_or_else(|| format!("no {name} in {text}"));
        let bare = |url: String| url.trim_start_matches("https://").trim_end_matches('/').to_owned();
        Ok(Self { rest: format!("https://{}", bare(field("rest")?)), grpc: bare(field("grpc")?), fingerprint: field("fingerprint")? })
    }
}

/// Limits out of the way: tests poll.
fn no_limits() -> Env {
    env([
        ("LIMITS_ANONYMOUS_BURST", "100000".into()),
        ("LIMITS_ANONYMOUS_REPLENISH_MS", "1".into()),
        ("LIMITS_USER_PER_MINUTE", "1000000".into()),
    ])
}

/// What makes every sync slow by so many milliseconds; nothing for none.
fn slow_disk(ms: u64) -> Env {
    if ms == 0 {
        return Env::new();
    }
    let shim = lab().join("slow-sync.so");
    assert!(shim.is_file(), "{} is not built: tests/run builds it", shim.display());
    Env::from([("LD_PRELOAD".into(), shim.display().to_string()), ("HYPER_SLOW_SYNC_MS".into(), ms.to_string())])
}

/// How an installation differs from the plain one.
#[derive(Clone)]
pub struct Plan {
    /// Where the truth lies.
    pub database: Database,
    /// How many agents.
    pub agents: usize,
    /// The published rate limits instead of none.
    pub limited: bool,
    /// Where the first agent's exports go, instead of into its folder.
    pub exports: Option<PathBuf>,
    /// Milliseconds that every sync of the controller and of the agents takes longer.
    pub slow_sync: u64,
}

impl Plan {
    /// SQLite, one agent, no limits.
    pub fn plain() -> Self {
        Self { database: Database::Sqlite, agents: 1, limited: false, exports: None, slow_sync: 0 }
    }
}

/// A controller with its agents.
pub struct Fleet {
    /// Logged in as admin.
    pub client: Client,
    /// Where it can be reached.
    pub endpoints: Endpoints,
    /// The controller.
    pub controller: Service,
    /// The agents.
    pub agents: Vec<Service>,
    /// Its database, where that is on Postgres.
    pub db: Option<Db>,
    /// Everything of it.
    pub scratch: Scratch,
}

impl Fleet {
    /// Starts an installation; the VMs are those that `fill` puts into the first agent's folder.
    pub async fn start(name: &str, plan: Plan, fill: impl FnOnce(&Path)) -> Self {
        let scratch = Scratch::new(name);
        fill(&scratch.dir("agent-0/vms"));
        let db = (plan.database == Database::Postgres).then(Db::create);
        let home = scratch.dir("controller");
        let mut settings = env([
            ("LISTEN", "127.0.0.1:0".into()),
            ("GRPC_LISTEN", "127.0.0.1:0".into()),
            ("DATA_DIR", home.join("data").display().to_string()),
            ("ADMIN_PASSWORD", PASSWORD.into()),
            ("BCRYPT_COST", "10".into()),
        ]);
        if !plan.limited {
            settings.extend(no_limits());
        }
        settings.extend(slow_disk(plan.slow_sync));
        if let Some(db) = &db {
            settings.insert("HYPERSDK_DATABASE_URL".into(), db.url.clone());
        }
        let mut controller = Service::new("controller", "hypersdk-controller", &home, settings);
        controller.start();
        let endpoints = endpoints(&mut controller, &home.join("data")).await;
        // Its agents must find it again after a restart.
        controller.set("LISTEN", endpoints.rest.trim_start_matches("https://"));
        controller.set("GRPC_LISTEN", &endpoints.grpc);
        let client = Client::new(&endpoints.rest).login("admin", PASSWORD).await;
        let mut fleet = Self { client, endpoints, controller, agents: Vec::new(), db, scratch };
        for number in 0..plan.agents {
            let exports = plan.exports.clone().filter(|_| number == 0);
            fleet.add_agent(number, exports, slow_disk(plan.slow_sync)).await;
        }
        fleet
    }

    async fn add_agent(&mut self, number: usize, exports: Option<PathBuf>, more: Env) {
        let name = format!("agent-{number}");
        let home = self.scratch.dir(&name);
        let vms = self.scratch.dir(&format!("{name}/vms"));
        let token = self.join_token().await;
        let exports = exports.unwrap_or_else(|| home.join("exports"));
        let mut agent = Service::agent(&name, &home, &self.endpoints.grpc, &token);
        agent.set("EXPORTS_DIR", &exports.display().to_string());
        agent.set("LOCAL_ROOT", &vms.display().to_string());
        agent.env.extend(more);
        agent.start();
        self.agents.push(agent);
        let client = self.client.clone();
        let process = self.agents[number].process();
        wait_for(&format!("{name} to connect"), seconds(30), async || {
            assert!(process.ended().is_none(), "{name} ended:\n{}", process.tail());
            let agents = client.try_get("/agents").await?;
            let mut rows = agents["data"].as_array().into_iter().flatten();
            if rows.any(|row| row["name"] == *name && row["status"] == "connected") { Ok(()) } else { Err(agents.to_string()) }
        })
        .await;
        self.refresh().await;
    }

    /// A fresh join token.
    pub async fn join_token(&self) -> String {
        let answer = self.client.post("/agents/tokens", json!({})).await.expect(201);
        answer.body["token"].as_str().expect("a join token").to_owned()
    }

    /// Takes the Postgres database away, or gives it back.
    pub fn database_away(&self, away: bool) {
        self.db.as_ref().expect("an installation on Postgres").away(away);
    }

    /// The first agent's folder of VMs.
    pub fn vms(&self) -> PathBuf {
        self.scratch.join("agent-0/vms")
    }

    /// The first agent's exports, where the plan did not put them elsewhere.
    pub fn exports(&self) -> PathBuf {
        self.scratch.join("agent-0/exports")
    }

    /// Has the agents look at their folders again; answers the VMs.
    pub async fn refresh(&self) -> Vec<Value> {
        let list = self.client.get("/vms/list?refresh=true&limit=200").await.expect(200);
        list.body["data"].as_array().unwrap().clone()
    }

    /// Another controller over the same database, with a data directory of its own and the installation's sealing key. The client's token
    /// is good at both.
    pub async fn second_controller(&self) -> (Service, Client) {
        let home = self.scratch.dir("controller-2");
        let key = std::fs::read_to_string(self.controller.home.join("data/sealing.key")).expect("the first controller's sealing key");
        let mut second = Service::new("controller-2", "hypersdk-controller", &home, self.controller.env.clone());
        for (name, value) in [("LISTEN", "127.0.0.1:0"), ("GRPC_LISTEN", "127.0.0.1:0"), ("SEALING_KEY", key.trim())] {
            second.set(name, value);
        }
        second.set("DATA_DIR", &home.join("data").display().to_string());
        second.start();
        let found = endpoints(&mut second, &home.join("data")).await;
        second.set("LISTEN", found.rest.trim_start_matches("https://"));
        second.set("GRPC_LISTEN", &found.grpc);
        let mut client = self.client.clone();
        client.base = found.rest;
        (second, client)
    }

    /// kill -9 of the controller, and the same again at the same place; ready when it answers.
    pub async fn restart_controller(&mut self) {
        self.controller.kill();
        self.controller.start();
        ready(&mut self.controller, &self.client).await;
    }
}

/// Waits until a controller says where it is; it must not end meanwhile.
async fn endpoints(service: &mut Service, data: &Path) -> Endpoints {
    let process = service.process();
    let found = wait_for("endpoints.json", seconds(60), async || {
        assert!(process.ended().is_none(), "it ended:\n{}", process.tail());
        let text = std::fs::read_to_string(data.join("endpoints.json")).map_err(|e| e.to_string())?;
        Endpoints::read(&text)
    })
    .await;
    ready(service, &Client::new(&found.rest)).await;
    found
}

/// Waits until `/health` is 200.
pub async fn ready(service: &mut Service, client: &Client) {
    let process = service.process();
    wait_for("/health to be 200", seconds(60), async || {
        assert!(process.ended().is_none(), "it ended:\n{}", process.tail());
        client.send(client.request(Method::GET, "/health")).await.and_then(|a| if a.status == 200 { Ok(()) } else { Err(a.text) })
    })
    .await;
}

/// `hypersdk up`.
pub struct Up {
    /// Logged in as admin.
    pub client: Client,
    /// Where it can be reached.
    pub endpoints: Endpoints,
    /// The process.
    pub service: Service,
    /// Everything of it.
    pub scratch: Scratch,
}

impl Up {
    /// Starts it over the VMs that `fill` puts into its folder.
    pub async fn start(name: &str, fill: impl FnOnce(&Path)) -> Self {
        let scratch = Scratch::new(name);
        let (home, vms) = (scratch.dir("up"), scratch.dir("up/vms"));
        fill(&vms);
        let data = home.join("data");
        let mut settings = env([("ADMIN_PASSWORD", PASSWORD.into()), ("BCRYPT_COST", "10".into())]);
        settings.extend(no_limits());
        let mut service = Service::new("up", "hypersdk", &home, settings);
        let arguments = ["up", "--listen", "127.0.0.1:0", "--data-dir", &data.display().to_string(), "--vms", &vms.display().to_string()];
        service.args = arguments.map(str::to_owned).to_vec();
        service.start();
        let endpoints = endpoints(&mut service, &data.join("controller")).await;
        service.args[2] = endpoints.rest.trim_start_matches("https://").to_owned();
        let client = Client::new(&endpoints.rest).login("admin", PASSWORD).await;
        let up = Self { client, endpoints, service, scratch };
        up.connected().await;
        up
    }

    /// Waits until its agent is connected.
    pub async fn connected(&self) {
        wait_for("the agent inside", seconds(30), async || {
            let agents = self.client.try_get("/agents").await?;
            let mut rows = agents["data"].as_array().into_iter().flatten();
            if rows.any(|row| row["status"] == "connected") { Ok(()) } else { Err(agents.to_string()) }
        })
        .await;
        self.client.get("/vms/list?refresh=true").await.expect(200);
    }

    /// The same again at the same place.
    pub async fn restart(&mut self) {
        self.service.start();
        ready(&mut self.service, &self.client).await;
    }
}

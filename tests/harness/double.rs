//! The vSphere double: govmomi's simulator with what an export needs beside it (`lab/fakevc`), and a plain client to ask it what is left.
//!
//! Owns: the processes and the words to them. Never: stands for the product. A crash here costs one test.

use std::path::{Path, PathBuf};

use reqwest::header::SET_COOKIE;

use super::process::{Process, mortal};
use super::{Scratch, lab, seconds, wait_for};

/// Who may log in.
pub const USER: &str = "backup@vsphere.local";
/// With what; looked for in everything that the product writes.
pub const PASSWORD: &str = "canary <&> 7c1f4e";

/// What the double plays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A vCenter: DC0 with a host, a cluster and four VMs.
    Vcenter,
    /// One host with two VMs.
    Esxi,
}

impl Kind {
    /// A VM of it.
    pub fn vm(self) -> &'static str {
        match self {
            Kind::Vcenter => "DC0_H0_VM0",
            Kind::Esxi => "ha-host_VM0",
        }
    }

    /// Another one.
    pub fn other(self) -> &'static str {
        match self {
            Kind::Vcenter => "DC0_H0_VM1",
            Kind::Esxi => "ha-host_VM1",
        }
    }
}

/// A running double.
pub struct Double {
    /// HOST:PORT.
    pub host: String,
    // Held: it ends with its test.
    _process: Process,
    http: reqwest::Client,
    cookie: String,
}

impl Double {
    /// Starts one whose VM [`Kind::vm`] is off, and [`Kind::other`] on; both have the raw image as their first disk.
    pub async fn start(scratch: &Scratch, kind: Kind, image: &Path) -> Self {
        Self::start_with(scratch, kind, image, &[]).await
    }

    /// The same with more settings, as `lab/fakevc` takes them.
    pub async fn start_with(scratch: &Scratch, kind: Kind, image: &Path, more: &[&str]) -> Self {
        let program = lab().join("fakevc");
        assert!(program.is_file(), "{} is not built: tests/run builds it", program.display());
        let folder = scratch.dir(&format!("double-{kind:?}"));
        let log = folder.join("log");
        let listen = free_address();
        let mut command = mortal(&program);
        command.args(["-l", &listen, "-u", USER, "-p", PASSWORD, "-off", kind.vm(), "-lease", "6s"]);
        command.arg("-seed").arg(format!("{}={image},{}={image}", kind.vm(), kind.other(), image = image.display()));
        if kind == Kind::Esxi {
            command.arg("-esx");
        }
        command.args(more);
        // A certificate of its own: the one that comes with Go has too short a key for rustls.
        let made = rcgen::generate_simple_self_signed(vec!["127.0.0.1".to_owned()]).unwrap();
        for (flag, name, text) in [("-cert", "cert.pem", made.cert.pem()), ("-key", "key.pem", made.signing_key.serialize_pem())] {
            std::fs::write(folder.join(name), text).unwrap();
            command.arg(flag).arg(folder.join(name));
        }
        // Its datastores lie in here and go with the scratch folder.
        command.env("TMPDIR", &folder).current_dir(&folder);
        let mut process = Process::start("double", command, &log);
        wait_for("the double", seconds(120), async || {
            assert!(process.ended().is_none(), "it ended:\n{}", process.tail());
            if process.log().contains("listening") { Ok(()) } else { Err(process.tail()) }
        })
        .await;
        let http = reqwest::Client::builder().tls_danger_accept_invalid_certs(true).timeout(seconds(60)).build().unwrap();
        let mut double = Self { host: listen, _process: process, http, cookie: String::new() };
        double.log_in().await;
        double
    }

    async fn log_in(&mut self) {
        let content = self.soap("ServiceInstance", "ServiceInstance", "RetrieveServiceContent", "").await;
        let of = |tag: &str| between(&content, &format!("<{tag} "), "<").split('>').nth(1).unwrap().to_owned();
        let sessions = of("sessionManager");
        let body = format!("<userName>{USER}</userName><password>{}</password>", PASSWORD.replace('&', "&amp;").replace('<', "&lt;"));
        let answer = self.post("SessionManager", &sessions, "Login", &body).await;
        let set = answer.headers().get(SET_COOKIE).expect("a login sets a cookie").to_str().unwrap().to_owned();
        self.cookie = set.split(';').next().unwrap().to_owned();
    }

    async fn post(&self, kind: &str, this: &str, method: &str, body: &str) -> reqwest::Response {
        let envelope = format!(
            "<?xml version=\"1.0\"?><Envelope xmlns=\"http://schemas.xmlsoap.org/soap/envelope/\"><Body><{method} xmlns=\"urn:vim25\">\
             <_this type=\"{kind}\">{this}</_this>{body}</{method}></Body></Envelope>"
        );
        let request =
            self.http.post(format!("https://{}/sdk", self.host)).header("Cookie", &self.cookie).header("Content-Type", "text/xml");
        request.body(envelope).send().await.unwrap()
    }

    /// A call; the answer as it came.
    pub async fn soap(&self, kind: &str, this: &str, method: &str, body: &str) -> String {
        let answer = self.post(kind, this, method, body).await.text().await.unwrap();
        assert!(!answer.contains("Fault>"), "{method}: {answer}");
        answer
    }

    /// Switches a VM on or off, by its id.
    pub async fn power(&self, vm: &str, on: bool) {
        self.soap("VirtualMachine", vm, if on { "PowerOnVM_Task" } else { "PowerOffVM_Task" }, "").await;
    }

    /// Takes a snapshot of a VM, as an operator does.
    pub async fn snapshot(&self, vm: &str, name: &str) {
        let body = format!("<name>{name}</name><memory>false</memory><quiesce>false</quiesce>");
        self.soap("VirtualMachine", vm, "CreateSnapshot_Task", &body).await;
    }

    /// How long a snapshot's making and removal take from here on.
    pub async fn task_time(&self, time: std::time::Duration) {
        let url = format!("https://{}/tasktime?ms={}", self.host, time.as_millis());
        assert!(self.http.get(url).send().await.unwrap().status().is_success());
    }

    async fn told(&self, path: &str) -> serde_json::Value {
        let answer = self.http.get(format!("https://{}{path}", self.host)).send().await.unwrap().text().await.unwrap();
        serde_json::from_str(&answer).unwrap_or_else(|e| panic!("{path}: {e}: {answer}"))
    }

    /// What `/tools` does by this query; answers how many snapshots were to be quiesced so far.
    pub async fn tools(&self, query: &str) -> u64 {
        self.told(&format!("/tools?{query}")).await["asked"].as_u64().unwrap()
    }

    /// What `/inventory` answers to this query.
    pub async fn inventory(&self, query: &str) -> serde_json::Value {
        self.told(&format!("/inventory?{query}")).await
    }

    /// How many leases and snapshots there are.
    pub async fn left(&self) -> (u64, u64) {
        let left = self.told("/left").await;
        (left["leases"].as_u64().unwrap(), left["snapshots"].as_u64().unwrap())
    }

    /// Of how many VMs the changes are tracked.
    pub async fn tracked(&self) -> u64 {
        self.told("/left").await["tracking"].as_u64().unwrap()
    }

    /// Bytes of disks that it gave by ranges of files that a snapshot froze, since this was asked last.
    pub async fn moved(&self) -> u64 {
        self.told("/moved").await["bytes"].as_u64().unwrap()
    }

    /// What may happen to the tracking of a VM's changes: `reset`, `back`, `forget`.
    pub async fn lose_track(&self, vm: &str, how: &str) {
        self.http.get(format!("https://{}/reset?vm={vm}&how={how}", self.host)).send().await.unwrap();
    }

    /// Switches the tracking of a VM's changes, as an operator does.
    pub async fn track(&self, vm: &str, on: bool) {
        let body = format!("<spec><changeTrackingEnabled>{on}</changeTrackingEnabled></spec>");
        self.soap("VirtualMachine", vm, "ReconfigVM_Task", &body).await;
    }

    /// The first disk of [`Kind::vm`] as it lies on the datastore.
    pub fn disk(&self, kind: Kind, scratch: &Scratch) -> PathBuf {
        self.disk_of(kind, kind.vm(), scratch)
    }

    /// The first disk of a VM as it lies on the datastore.
    pub fn disk_of(&self, kind: Kind, vm: &str, scratch: &Scratch) -> PathBuf {
        let stores = std::fs::read_dir(scratch.join(&format!("double-{kind:?}"))).unwrap().map(|entry| entry.unwrap().path());
        let found = stores.map(|store| store.join(vm).join("disk1-flat.vmdk")).find(|path| path.is_file());
        found.expect("the double has seeded a disk")
    }
}

fn between<'a>(text: &'a str, start: &str, end: &str) -> &'a str {
    let rest = text.split_once(start).unwrap_or_else(|| panic!("no {start} in {text}")).1;
    rest.split_once(end).map_or(rest, |(found, _)| found)
}

/// An address that was free a moment ago: the double wants to be told its port.
pub fn free_address() -> String {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
}

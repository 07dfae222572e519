//! A real libvirt: its daemons, started once for all tests of this binary, and the words to it.
//!
//! Owns: the daemons and the settings they need where nobody else runs them. Never: stands for the product.
//! A crash here costs the tests of libvirt; the daemons end with the binary.

use std::io::{Read, Write};
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use super::images::qemu_img;
use super::lab;
use super::process::{Process, mortal, output, run};

/// Where it is.
pub const URI: &str = "qemu:///system";

/// Held as long as the binary runs.
static DAEMONS: OnceLock<Vec<Process>> = OnceLock::new();

fn answers() -> bool {
    output(Command::new("virsh").args(["-q", "-c", URI, "version"])).status.success()
}

/// Starts it, unless it is there.
pub fn start() {
    DAEMONS.get_or_init(|| {
        if answers() {
            return Vec::new();
        }
        settings();
        let logs = lab().join("libvirt");
        std::fs::create_dir_all(&logs).unwrap();
        let daemon = |program: &str| {
            let command = mortal(&Path::new("/usr/sbin").join(program));
            Process::start(program, command, &logs.join(format!("{program}.log")))
        };
        let daemons = vec![daemon("virtlogd"), daemon("libvirtd")];
        let began = Instant::now();
        while !answers() {
            assert!(began.elapsed() < Duration::from_secs(60), "libvirt does not answer:\n{}", daemons[1].tail());
            std::thread::sleep(Duration::from_millis(100));
        }
        daemons
    });
}

/// In a container nobody keeps guests apart: no labels, no owners, no control groups.
fn settings() {
    for folder in ["/run/libvirt", "/run/lock"] {
        std::fs::create_dir_all(folder).unwrap();
    }
    let path = Path::new("/etc/libvirt/qemu.conf");
    let text = std::fs::read_to_string(path).unwrap_or_default();
    if !text.lines().any(|line| line.starts_with("security_driver")) {
        let ours = "security_driver = \"none\"\nuser = \"root\"\ngroup = \"root\"\ndynamic_ownership = 0\nremember_owner = 0\ncgroup_controllers = []\n";
        std::fs::write(path, format!("{text}{ours}")).unwrap();
    }
}

/// Asks its client.
pub fn virsh(arguments: &[&str]) -> String {
    run(Command::new("virsh").args(["-q", "-c", URI]).args(arguments))
}

/// A snapshot of the domain that stands.
pub const STANDING_SNAPSHOT: &str = "stands";

/// The name of a domain that stands as long as the binary runs; who switches it on must be alone with that.
pub fn standing() -> &'static str {
    static NAME: OnceLock<String> = OnceLock::new();
    NAME.get_or_init(|| {
        start();
        // One that an earlier run has left.
        for name in virsh(&["list", "--all", "--name"]).lines().filter(|name| name.starts_with("standing-")) {
            drop(Domain::adopt(name.trim(), ""));
        }
        let disk = lab().join("standing.qcow2");
        qemu_img(&["create", "-q", "-f", "qcow2", disk.to_str().unwrap(), "1M"]);
        let domain = Domain::define("standing", &disk, "qcow2");
        virsh(&["snapshot-create-as", &domain.name, STANDING_SNAPSHOT]);
        let name = domain.name.clone();
        std::mem::forget(domain);
        name
    })
}

/// The network that libvirt's packages bring, active.
pub fn default_network() {
    if !virsh(&["net-list", "--name"]).lines().any(|name| name.trim() == "default") {
        virsh(&["net-start", "default"]);
    }
}

/// A domain that goes with its test.
pub struct Domain {
    /// Its name.
    pub name: String,
    /// Its UUID.
    pub id: String,
}

impl Domain {
    /// Defines one whose disk is this file, under TCG (KVM does not run guests everywhere).
    pub fn define(name: &str, disk: &Path, format: &str) -> Self {
        Self::with_disks(name, &[(disk, format)])
    }

    /// The same with several disks, `vda`, `vdb`, …
    pub fn with_disks(name: &str, disks: &[(&Path, &str)]) -> Self {
        Self::with(name, disks, "")
    }

    /// One with a port for a guest agent, that can switch itself off.
    pub fn with_agent(name: &str, disk: &Path, format: &str) -> Self {
        Self::with(name, &[(disk, format)], "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>")
    }

    fn with(name: &str, disks: &[(&Path, &str)], more: &str) -> Self {
        let name = format!("{name}-{}", shared::ids::random_hex::<4>());
        let disk = |(letter, (disk, format)): (char, &(&Path, &str))| {
            let file = disk.display();
            format!(
                "<disk type='file' device='disk'><driver name='qemu' type='{format}'/><source file='{file}'/><target dev='vd{letter}' bus='virtio'/>\
                 <alias name='ua-{letter}'/></disk>"
            )
        };
        let disks: String = ('a'..='z').zip(disks).map(disk).collect();
        let features = if more.is_empty() { "" } else { "<features><acpi/></features>" };
        let xml = format!(
            "<domain type='qemu'><name>{name}</name><memory unit='MiB'>256</memory><vcpu>1</vcpu><os><type arch='x86_64'>hvm</type></os>{features}\
             <devices>{disks}<interface type='user'><mac address='52:54:00:12:34:56'/><model type='virtio'/></interface><serial type='pty'/>\
             {more}</devices></domain>"
        );
        let file = lab().join(format!("{name}.xml"));
        std::fs::write(&file, xml).unwrap();
        virsh(&["define", file.to_str().unwrap()]);
        std::fs::remove_file(file).unwrap();
        let id = virsh(&["domuuid", &name]).trim().to_owned();
        Self { name, id }
    }
}

impl Domain {
    /// Writes to a disk as the guest would: through QEMU's block layer, which tracks it.
    pub fn write(&self, letter: char, offset: u64, length: u64, byte: u8) {
        for command in [format!("write -P {byte} {offset} {length}"), "flush".to_owned()] {
            let order = format!("qemu-io -d /machine/peripheral/ua-{letter}/virtio-backend \"{command}\"");
            let said = virsh(&["qemu-monitor-command", "--hmp", &self.name, &order]);
            assert!(!said.to_ascii_lowercase().contains("error"), "{order}: {said}");
        }
    }

    /// kill -9 of its QEMU.
    pub fn kill_qemu(&self) {
        let pid = std::fs::read_to_string(format!("/run/libvirt/qemu/{}.pid", self.name)).unwrap();
        run(Command::new("kill").args(["-9", pid.trim()]));
    }

    /// What it has said on its serial console since somebody began to listen.
    pub fn console(&self) -> Console {
        let xml = virsh(&["dumpxml", &self.name]);
        let path =
            xml.split("<serial type='pty'>").nth(1).and_then(|rest| rest.split("path='").nth(1)).and_then(|rest| rest.split('\'').next());
        let file = std::fs::File::open(path.expect("a serial console")).unwrap();
        let said = Arc::new(Mutex::new(String::new()));
        let heard = said.clone();
        std::thread::spawn(move || {
            let (mut file, mut buf) = (file, [0u8; 4096]);
            while let Ok(count @ 1..) = file.read(&mut buf) {
                heard.lock().unwrap().push_str(&String::from_utf8_lossy(&buf[..count]));
            }
        });
        Console(said)
    }

    /// Types a line at its serial console.
    pub fn type_in(&self, line: &str) {
        let xml = virsh(&["dumpxml", &self.name]);
        let path =
            xml.split("<serial type='pty'>").nth(1).and_then(|rest| rest.split("path='").nth(1)).and_then(|rest| rest.split('\'').next());
        let mut console = std::fs::File::options().write(true).open(path.expect("a serial console")).unwrap();
        console.write_all(format!("{line}\n").as_bytes()).unwrap();
    }

    /// Files that backup jobs have made, but those of jobs that run now at other domains.
    fn scratch(&self) -> Vec<String> {
        let files = std::fs::read_dir("/var/lib/libvirt/qemu").unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let files: Vec<String> = files.filter(|name| name.starts_with("hypersdk-")).collect();
        let job = |name: &str| {
            let said = output(Command::new("virsh").args(["-q", "-c", URI, "backup-dumpxml", name]));
            String::from_utf8_lossy(&said.stdout).into_owned()
        };
        let domains = if files.is_empty() { String::new() } else { virsh(&["list", "--name"]) };
        let others: String = domains.lines().map(str::trim).filter(|name| !name.is_empty() && *name != self.name).map(job).collect();
        files.into_iter().filter(|name| !others.contains(name.split('.').next().unwrap_or(name))).collect()
    }

    /// What QEMU holds of a backup job, files that one has left, and checkpoints.
    pub fn left(&self) -> (bool, Vec<String>, usize) {
        let job = output(Command::new("virsh").args(["-q", "-c", URI, "backup-dumpxml", &self.name])).status.success();
        // Of other tests' jobs there may be some that go just now: what is left stays. Those of a job that runs are wanted.
        let mut files = self.scratch();
        let end = Instant::now() + Duration::from_secs(5);
        while !job && !files.is_empty() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(200));
            let now = self.scratch();
            files.retain(|name| now.contains(name));
        }
        let checkpoints = virsh(&["checkpoint-list", &self.name, "--name"]).lines().filter(|line| !line.trim().is_empty()).count();
        (job, files, checkpoints)
    }
}

/// A serial console that is listened to.
pub struct Console(Arc<Mutex<String>>);

impl Console {
    /// All that came so far.
    pub fn said(&self) -> String {
        self.0.lock().unwrap().clone()
    }
}

impl Domain {
    /// One that somebody else has made, which goes with its test.
    pub fn adopt(name: &str, id: &str) -> Self {
        Self { name: name.to_owned(), id: id.to_owned() }
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        for act in
            [&["destroy", self.name.as_str()][..], &["undefine", self.name.as_str(), "--checkpoints-metadata", "--snapshots-metadata"]]
        {
            // It may be off, or gone.
            let _ = output(Command::new("virsh").args(["-q", "-c", URI]).args(act));
        }
    }
}

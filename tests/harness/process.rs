//! Processes that cannot outlive their test: killed when dropped, and by the kernel when the test binary itself dies.
//!
//! Owns: starting, killing and the logs of processes. Never: decides when. A crash here kills what was started.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::LazyLock;
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

type Order = (Command, Sender<std::io::Result<Child>>);

/// The parent-death signal fires when the *thread* that started a process ends, and a test's thread ends with the test.
/// So one thread that lives as long as the binary starts them all.
static STARTER: LazyLock<Sender<Order>> = LazyLock::new(|| {
    let (orders, inbox) = channel::<Order>();
    std::thread::spawn(move || {
        for (mut command, reply) in inbox {
            let _ = reply.send(command.spawn());
        }
    });
    orders
});

/// A command that dies with the test binary: `setpriv` sets the signal and then becomes the program, so the pid is the program's.
pub fn mortal(program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program).env("NO_COLOR", "1");
    clean(&mut command);
    command
}

/// The caller's own HYPERSDK_* settings must not leak into a test.
fn clean(command: &mut Command) {
    for (key, _) in std::env::vars_os().filter(|(key, _)| key.to_string_lossy().starts_with("HYPERSDK_")) {
        command.env_remove(key);
    }
}

/// A running process.
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts a command with both outputs appended to `log`.
    pub fn start(name: &str, mut command: Command, log: &Path) -> Self {
        let file = OpenOptions::new().create(true).append(true).open(log).unwrap();
        command.stdin(Stdio::null()).stdout(file.try_clone().unwrap()).stderr(file);
        let (reply, answer) = channel();
        STARTER.send((command, reply)).expect("the starter lives as long as the binary");
        let child = answer.recv().unwrap().unwrap_or_else(|e| panic!("{name} does not start: {e}"));
        Self { name: name.to_owned(), child, log: log.to_owned() }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it has ended, and how.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().unwrap()
    }

    /// SIGKILL, and waits until the kernel has taken it: nothing of it runs afterwards.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        self.child.wait().unwrap();
    }

    /// Sends a signal by name (`TERM`, `STOP`, `CONT`).
    pub fn signal(&self, name: &str) {
        run(Command::new("kill").arg(format!("-{name}")).arg(self.pid().to_string()));
    }

    /// SIGTERM, then its exit status; panics when it is still there after `limit`.
    pub async fn terminate(&mut self, limit: Duration) -> ExitStatus {
        self.signal("TERM");
        self.wait(limit).await
    }

    /// Its exit status; panics when it is still there after `limit`.
    pub async fn wait(&mut self, limit: Duration) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.ended() {
                return status;
            }
            assert!(start.elapsed() < limit, "{} did not end within {limit:?}; its log ends:\n{}", self.name, self.tail());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Highest resident memory so far, in MiB (VmHWM).
    pub fn peak_mib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("Linux tells VmHWM");
        line.trim().trim_end_matches(" kB").trim().parse::<u64>().unwrap() / 1024
    }

    /// The last 6 KiB of its log.
    pub fn tail(&self) -> String {
        tail(&self.log, 6 << 10)
    }

    /// Its whole log.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).unwrap()).into_owned()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("---- {} (pid {}) said last:\n{}", self.name, self.child.id(), self.tail());
        }
    }
}

/// The end of a file.
pub fn tail(path: &Path, bytes: u64) -> String {
    let Ok(mut file) = File::open(path) else { return format!("no log at {}", path.display()) };
    let length = file.metadata().unwrap().len();
    file.seek(SeekFrom::Start(length.saturating_sub(bytes))).unwrap();
    let mut text = Vec::new();
    file.read_to_end(&mut text).unwrap();
    String::from_utf8_lossy(&text).into_owned()
}

/// Runs a tool to its end; panics with everything it said when it fails.
pub fn run(command: &mut Command) -> String {
    let output = output(command);
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?} ended with {}:\n{said}", output.status);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs a tool to its end, whatever the end.
pub fn output(command: &mut Command) -> Output {
    clean(command);
    command
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|e| panic!("{command:?} does not start: {e}; run tests/run, which installs what the tests need"))
}

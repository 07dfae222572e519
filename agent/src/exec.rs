//! The only starter of processes.
//!
//! Owns: how a tool is started (arguments as a list, never through a shell; a fixed search path and hardly any environment; no input), how
//! long it may take and how much it may say, and that its children end with it. Never: starts what is not in [`Tool`], keeps a process beyond its time or its caller.
//! A crash here ends what was started: the kernel sees to it.

use std::ffi::OsStr;
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

/// Where tools are looked for.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Bytes of what a tool says of its failure.
const COMPLAINT: u64 = 16 << 10;
/// Between two looks at a process.
const LOOK: Duration = Duration::from_millis(10);
/// Lines of a followed process that wait to be read.
const LINES: usize = 256;
/// Longest line of a followed process, bytes; the rest of it is another one.
const LINE: u64 = 64 << 10;

/// What may be started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tool {
    /// libvirt's client.
    Virsh,
    /// The emulator, to see whether a virtual CPU runs.
    Qemu,
    /// Makes a guest ready for KVM, in place.
    V2v,
    /// Looks and writes into a guest that is off.
    Guestfish,
}

impl Tool {
    fn name(self) -> &'static str {
        match self {
            Self::Virsh => "virsh",
            Self::Qemu => "qemu-system-x86_64",
            Self::V2v => "virt-v2v-in-place",
            Self::Guestfish => "guestfish",
        }
    }

    /// What brings it.
    fn package(self) -> &'static str {
        match self {
            Self::Virsh => "libvirt-clients",
            Self::Qemu => "qemu-system-x86",
            Self::V2v => "virt-v2v",
            Self::Guestfish => "guestfish",
        }
    }
}

/// Why a tool did not do it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is not there.
    #[error("{tool} is not installed on the agent's host (Debian: {package})")]
    Missing {
        /// Its name.
        tool: &'static str,
        /// What brings it.
        package: &'static str,
    },
    /// It said no: its own words.
    #[error("{0}")]
    Failed(String),
    /// It took too long.
    #[error("{0} did not end within {1} s")]
    Late(&'static str, u64),
    /// It said more than anybody reads.
    #[error("{0} said more than {1} bytes")]
    TooMuch(&'static str, usize),
    /// It was ended, as nobody wanted it any more.
    #[error("{0} was stopped")]
    Stopped(&'static str),
    /// The system did not start it.
    #[error("{0} cannot be started: {1}")]
    System(&'static str, io::Error),
}

fn command<S: AsRef<OsStr>>(tool: Tool, arguments: &[S]) -> Command {
    let mut command = mortal(&[]);
    command.arg(tool.name()).args(arguments);
    command
}

/// A command without its program. It dies with the thread that started it, and so with the agent, however that ends.
#[allow(clippy::disallowed_methods)]
fn mortal(behind: &[&str]) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).args(behind).env_clear().env("PATH", PATH).env("LC_ALL", "C.UTF-8").stdin(Stdio::null());
    // Keys and known hosts of a remote libvirt.
    if let Some(home) = std::env::var_os("HOME") {
        command.env("HOME", home);
    }
    command
}

fn spawn(tool: Tool, mut command: Command) -> Result<Child, Error> {
    command.spawn().map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => Error::Missing { tool: "setpriv", package: "util-linux" },
        _ => Error::System(tool.name(), e),
    })
}

/// Runs a tool to its end and answers what it said. For threads that may wait.
///
/// # Errors
/// When it is not there, fails (with the last of its own words), takes over `time` or says over `most` bytes.
pub fn run<S: AsRef<OsStr>>(tool: Tool, arguments: &[S], time: Duration, most: usize) -> Result<Vec<u8>, Error> {
    let mut command = command(tool, arguments);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = Reaped(spawn(tool, command)?);
    let (stdout, stderr) = (child.0.stdout.take(), child.0.stderr.take());
    let said = thread::spawn(move || read(stdout, most as u64 + 1));
    let complained = thread::spawn(move || read(stderr, COMPLAINT));
    let status = child.wait(tool, time)?;
    let ended = |_| Error::System(tool.name(), io::Error::other("a thread that reads panicked"));
    let said = said.join().map_err(ended)?.map_err(|e| Error::System(tool.name(), e))?;
    let complaint = complained.join().map_err(ended)?.map_err(|e| Error::System(tool.name(), e))?;
    if said.len() > most {
        return Err(Error::TooMuch(tool.name(), most));
    }
    match status.code() {
        Some(0) => Ok(said),
        // What setpriv answers where there is no such program.
        Some(127) => Err(Error::Missing { tool: tool.name(), package: tool.package() }),
        _ => Err(Error::Failed(words(tool, &complaint, status))),
    }
}

/// Runs a tool to its end for its exit code alone; none where a signal ended it.
pub fn status<S: AsRef<OsStr>>(tool: Tool, arguments: &[S], time: Duration) -> Result<Option<i32>, Error> {
    let mut command = command(tool, arguments);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = Reaped(spawn(tool, command)?);
    Ok(child.wait(tool, time)?.code())
}

/// All that comes, up to `most` bytes; what is beyond is read away, so that the process is not held up.
fn read(source: Option<impl Read>, most: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let Some(mut source) = source else { return Ok(bytes) };
    source.by_ref().take(most).read_to_end(&mut bytes)?;
    io::copy(&mut source, &mut io::sink())?;
    Ok(bytes)
}

/// The last line of a complaint, without the word `error:`.
fn words(tool: Tool, complaint: &[u8], status: ExitStatus) -> String {
    let text = String::from_utf8_lossy(complaint);
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    match lines.last() {
        Some(line) => line.strip_prefix("error: ").unwrap_or(line).to_owned(),
        None => format!("{} ended with {status}", tool.name()),
    }
}

/// A process that does not outlive whoever started it.
struct Reaped(Child);

impl Reaped {
    fn wait(&mut self, tool: Tool, time: Duration) -> Result<ExitStatus, Error> {
        let end = Instant::now() + time;
        loop {
            if let Some(status) = self.0.try_wait().map_err(|e| Error::System(tool.name(), e))? {
                return Ok(status);
            }
            if Instant::now() > end {
                return Err(Error::Late(tool.name(), time.as_secs()));
            }
            thread::sleep(LOOK);
        }
    }
}

impl Drop for Reaped {
    fn drop(&mut self) {
        // One that has ended is gone already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What makes a process's children die with it, whatever groups they make: the first process of a PID namespace takes all others with it.
const NAMESPACE: &[&str] = &["unshare", "--pid", "--fork", "--kill-child=KILL", "--"];

/// Whether this process may make a PID namespace. Where it may not (an agent that is not root, most containers), the children of a tool die
/// with its process group when they are stopped, and a crash of the agent may leave those that do not watch their parent.
fn may_make_namespaces() -> bool {
    static MAY: OnceLock<bool> = OnceLock::new();
    *MAY.get_or_init(|| {
        let mut probe = mortal(NAMESPACE);
        probe.arg("true").stdout(Stdio::null()).stderr(Stdio::null());
        probe.status().is_ok_and(|status| status.success())
    })
}

/// How a tool is run that works for long and has children of its own.
pub struct Long<'a> {
    /// Variables beside the few that every tool gets.
    pub environment: &'a [(&'static str, &'a OsStr)],
    /// Longest time.
    pub time: Duration,
    /// Whether it is to be ended; looked at ten times a second.
    pub is_stopped: &'a dyn Fn() -> bool,
}

/// Runs a tool to its end and tells every line that it says, on either stream. It ends with all its children, or is ended with them.
///
/// # Errors
/// As [`run`]; its own words are the last lines of its complaints.
pub fn follow<S: AsRef<OsStr>>(tool: Tool, arguments: &[S], how: &Long, line: &mut dyn FnMut(&str)) -> Result<(), Error> {
    let mut command = mortal(if may_make_namespaces() { NAMESPACE } else { &[] });
    command.arg(tool.name()).args(arguments).envs(how.environment.iter().copied());
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let mut child = Grouped(Reaped(spawn(tool, command)?));
    let (send, lines) = sync_channel(LINES);
    let (stdout, stderr) = (child.0.0.stdout.take(), child.0.0.stderr.take());
    let complaints = send.clone();
    thread::spawn(move || tell_lines(stdout, |line| send.send((false, line)).is_ok()));
    thread::spawn(move || tell_lines(stderr, |line| complaints.send((true, line)).is_ok()));
    let end = Instant::now() + how.time;
    let mut last = String::new();
    loop {
        match lines.recv_timeout(Duration::from_millis(100)) {
            Ok((is_complaint, text)) => {
                if is_complaint && !text.trim().is_empty() {
                    text.trim().clone_into(&mut last);
                }
                line(&text);
            }
            // It has ended; who still holds its streams has nothing to say for it.
            Err(RecvTimeoutError::Timeout) if matches!(child.0.0.try_wait(), Ok(Some(_))) => break,
            Err(RecvTimeoutError::Timeout) => {}
            // All that could write has ended, or has closed its streams.
            Err(RecvTimeoutError::Disconnected) => break,
        }
        if (how.is_stopped)() {
            return Err(Error::Stopped(tool.name()));
        }
        if Instant::now() > end {
            return Err(Error::Late(tool.name(), how.time.as_secs()));
        }
    }
    let status = child.0.wait(tool, end.saturating_duration_since(Instant::now()).max(LOOK))?;
    match status.code() {
        Some(0) => Ok(()),
        Some(127) => Err(Error::Missing { tool: tool.name(), package: tool.package() }),
        _ => Err(Error::Failed(words(tool, last.as_bytes(), status))),
    }
}

/// A process that is the first of its group, and takes the group with it.
struct Grouped(Reaped);

impl Drop for Grouped {
    fn drop(&mut self) {
        // As long as it was not waited for, the number is its own.
        if matches!(self.0.0.try_wait(), Ok(None)) {
            let _ = rustix::process::kill_process_group(rustix::process::Pid::from_child(&self.0.0), rustix::process::Signal::KILL);
        }
    }
}

/// Reads lines until there are no more, or nobody wants them.
fn tell_lines(source: Option<impl Read>, mut tell: impl FnMut(String) -> bool) {
    let Some(mut reader) = source.map(BufReader::new) else { return };
    loop {
        let mut line = Vec::new();
        match reader.by_ref().take(LINE).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) if !tell(String::from_utf8_lossy(&line).trim_end().to_owned()) => return,
            Ok(_) => {}
        }
    }
}

/// A process whose lines are read as they come. It ends with this value.
pub struct Following {
    _child: Reaped,
    lines: Receiver<String>,
}

/// What a followed process says next.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    /// A line.
    Line(String),
    /// Nothing, for so long.
    Nothing,
    /// It has ended.
    End,
}

impl Following {
    /// Starts a tool.
    pub fn start<S: AsRef<OsStr>>(tool: Tool, arguments: &[S]) -> Result<Self, Error> {
        let mut command = command(tool, arguments);
        command.stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = Reaped(spawn(tool, command)?);
        let (send, lines) = sync_channel(LINES);
        let stdout = child.0.stdout.take();
        thread::spawn(move || tell_lines(stdout, |line| send.send(line).is_ok()));
        Ok(Self { _child: child, lines })
    }

    /// Waits for a line.
    pub fn next(&self, longest: Duration) -> Next {
        match self.lines.recv_timeout(longest) {
            Ok(line) => Next::Line(line),
            Err(RecvTimeoutError::Timeout) => Next::Nothing,
            Err(RecvTimeoutError::Disconnected) => Next::End,
        }
    }
}

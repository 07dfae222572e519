//! The only starter of processes.
//!
//! Owns: how a tool is started (arguments as a list, never through a shell; a fixed search path and no other environment; no input), how
//! long it may take and how much it may say. Never: starts what is not in [`Tool`], keeps a process beyond its time or its caller.
//! A crash here ends what was started: the kernel sees to it.

use std::ffi::OsStr;
use std::io::{self, BufRead, BufReader, Read};
use std::process::{Child, Command, ExitStatus, Stdio};
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
}

impl Tool {
    fn name(self) -> &'static str {
        match self {
            Self::Virsh => "virsh",
            Self::Qemu => "qemu-system-x86_64",
        }
    }

    /// What brings it.
    fn package(self) -> &'static str {
        match self {
            Self::Virsh => "libvirt-clients",
            Self::Qemu => "qemu-system-x86",
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
    /// The system did not start it.
    #[error("{0} cannot be started: {1}")]
    System(&'static str, io::Error),
}

#[allow(clippy::disallowed_methods)]
fn command<S: AsRef<OsStr>>(tool: Tool, arguments: &[S]) -> Command {
    // It dies with the thread that started it, and so with the agent, however that ends.
    let mut command = Command::new("setpriv");
    command
        .args(["--pdeathsig", "KILL", "--", tool.name()])
        .args(arguments)
        .env_clear()
        .env("PATH", PATH)
        .env("LC_ALL", "C.UTF-8")
        .stdin(Stdio::null());
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
        thread::spawn(move || {
            let Some(mut reader) = stdout.map(BufReader::new) else { return };
            loop {
                let mut line = Vec::new();
                match reader.by_ref().take(LINE).read_until(b'\n', &mut line) {
                    Ok(0) | Err(_) => return,
                    Ok(_) if send.send(String::from_utf8_lossy(&line).trim_end().to_owned()).is_err() => return,
                    Ok(_) => {}
                }
            }
        });
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

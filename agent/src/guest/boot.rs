//! The boot proof: the result is started apart from everything, watched until it shows that it lives, and thrown away.
//!
//! ```text
//! noted ─► overlays ─► network ─► create ─► listening ─sign─► up ─(network)─► address ─► ping ─► passed ─┐
//!                                              │ panic, initramfs, no boot, off, paused, too late ─► failed ─┤
//!                                              └ the job is to stop ──────────────────────────────► nothing ─┴─► picture, console ─► destroyed, forgotten
//! ```
//! Owns: that order, what counts as a proof, and that nothing of it stays but its console and its picture. Never: writes to a disk of the
//! subject; lets the guest reach anything (its card has no link, or lies in a network of this host and the guest alone); shows its screen.
//! A crash here leaves a domain and a network that the ledger names, and a folder in the job's part folder; the reaper and the next attempt
//! remove them.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::sync::mpsc::{Receiver, SendError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use proto::v1;
use serde::{Deserialize, Serialize};
use shared::deploy::Wish;
use shared::error::Code;
use shared::vault::{self, Dir};

use super::console::{Console, KEPT, TAIL};
use super::{Subject, failed, isolated, overlay, picture};
use crate::deploy::{self, xml};
use crate::held::Assignment;
use crate::sources::Error;
use crate::sources::libvirt::{self, virsh::Uri};
use crate::{Agent, exec, hypervisors, touched};

/// Where overlays, pipes and descriptions lie, inside the subject's folder.
const FOLDER: &str = "proof";
/// What is kept, beside the disks.
pub const PICTURE: &str = "boot.png";
/// What is kept, beside the disks.
pub const CONSOLE: &str = "console.txt";
/// The pipe that QEMU writes the console into has this name and `.out`, the one that it reads `.in`.
const PIPE: &str = "console";
/// Between two looks at the console.
const LOOK: Duration = Duration::from_millis(50);
/// Between two looks at the domain.
const ASK: Duration = Duration::from_millis(700);
/// How long a guest is listened to that has said why it will not come up: the rest helps whoever reads it.
const LINGER: Duration = Duration::from_secs(1);
/// Most bytes of console that one look takes: a guest that floods it waits.
const GULP: usize = 256 << 10;
/// How long an echo request waits for its answer.
const ECHO: Duration = Duration::from_secs(1);
/// Free bytes below which the guest may not go on filling its overlays.
const RESERVE: u64 = 256 << 20;
/// Between two looks at the free space.
const SPACE: Duration = Duration::from_secs(2);

/// What is asked of a proof.
#[derive(Clone, Debug)]
pub struct Asked<'a> {
    /// A text on the serial console that means "up"; then nothing else does.
    pub sign: Option<&'a str>,
    /// How long it may take.
    pub timeout: Duration,
    /// Whether the guest must get an address by DHCP and answer a ping.
    pub network: bool,
}

/// How a proof went.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Proof {
    /// Whether the guest came up as asked.
    pub passed: bool,
    /// By what it was seen.
    pub sign: Option<String>,
    /// Why not.
    pub cause: Option<String>,
    /// From the start to the end of the proof.
    pub seconds: f64,
    /// The end of what the guest said on its serial console, without control sequences.
    pub console_tail: String,
    /// Name of a PNG beside the disks; none where there was no screen any more.
    pub screenshot: Option<String>,
    /// The address that it got.
    pub address: Option<String>,
    /// Whether it answered a ping.
    pub pinged: bool,
    /// `kvm` or `tcg`.
    pub accelerator: String,
}

/// Starts the subject on throw-away overlays and watches it.
///
/// # Errors
/// When it could not be tried, or the job is to stop. A guest that does not come up is no error but a proof that failed.
pub fn prove(
    agent: &Agent,
    held: &Assignment,
    connection: &v1::Connection,
    subject: &Subject<'_>,
    asked: &Asked<'_>,
) -> Result<Proof, Error> {
    if connection.kind != hypervisors::LIBVIRT {
        return Err(Error::fatal(Code::NotBuilt, format!("a boot proof at {:?} is not built; `libvirt` is", connection.kind)));
    }
    let uri = Uri::parse(&connection.path).map_err(|message| Error::fatal(Code::BadRequest, message))?;
    if !uri.is_here {
        return Err(Error::fatal(Code::NotBuilt, "a boot proof at another host is not built: run an agent there"));
    }
    let begin = Begin {
        name: format!("{}{}-{}", libvirt::PROOF, held.job, shared::ids::random_hex::<4>()),
        domain: deploy::uuid(),
        network: asked.network.then(deploy::uuid),
        macs: deploy::addresses(subject.wish),
        accelerator: deploy::accelerator(agent),
    };
    let log = |text: String| agent.table.log(held, "info", "deploying", text);
    // One proof of a job at a time: what an earlier one has left goes first.
    let note = format!("proof-{}", held.job);
    let done = touched::for_a_while(agent, &note, connection, &begin.domain, begin.network.as_deref(), || {
        let folder = scratch(subject.folder)?;
        start(&uri, &folder, subject, &begin).and_then(|console| {
            log(format!("{} is started ({}), {}", begin.name, begin.accelerator, apart(asked)));
            watch(&uri, held, console, subject, &begin, asked)
        })
    });
    // The domain has no use for it any more.
    remove(subject.folder)?;
    let proof = done??;
    let verdict = match (&proof.sign, &proof.cause) {
        (_, Some(cause)) => format!("the boot proof failed after {:.0} s: {cause}", proof.seconds),
        (sign, None) => format!("the boot proof passed after {:.0} s: {}", proof.seconds, sign.as_deref().unwrap_or_default()),
    };
    agent.table.log(held, if proof.passed { "info" } else { "warn" }, "deploying", verdict);
    Ok(proof)
}

fn apart(asked: &Asked<'_>) -> &'static str {
    if asked.network { "in a network of its own" } else { "without a network" }
}

/// How a proof's parts are called.
struct Begin {
    /// Of the domain and the network.
    name: String,
    domain: String,
    network: Option<String>,
    macs: Vec<String>,
    accelerator: &'static str,
}

fn remove(folder: &Dir) -> Result<(), Error> {
    match folder.remove_dir_all(FOLDER) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed("the proof's folder")(e)),
        _ => Ok(()),
    }
}

/// A new folder; what a crash has left of an earlier one goes.
fn scratch(folder: &Dir) -> Result<Dir, Error> {
    remove(folder)?;
    folder.create_dir(FOLDER).and_then(|()| folder.open_dir(FOLDER)).map_err(failed("the proof's folder"))
}

fn told(e: exec::Error) -> Error {
    match e {
        exec::Error::Failed(words) => Error::fatal(Code::Unprocessable, format!("the boot proof cannot be started: libvirt: {words}")),
        exec::Error::Missing { .. } => Error::fatal(Code::Unprocessable, e.to_string()),
        e => Error { code: Code::BadGateway, message: e.to_string(), retryable: true },
    }
}

/// Starts the domain; answers its console, opened before the guest's first word.
fn start(uri: &Uri, folder: &Dir, subject: &Subject<'_>, begin: &Begin) -> Result<File, Error> {
    let path = subject.path.join(FOLDER);
    let mut overlays = Vec::with_capacity(subject.disks.len());
    for (n, disk) in subject.disks.iter().enumerate() {
        let name = format!("{n}.qcow2");
        overlay(folder, &name, &disk.path.display().to_string(), disk.format, disk.capacity)?;
        overlays.push(path.join(name));
    }
    for end in ["in", "out"] {
        vault::make_pipe(folder, &format!("{PIPE}.{end}")).map_err(failed("the console's pipe"))?;
    }
    let console = vault::open_pipe(folder, &format!("{PIPE}.out")).map_err(failed("the console's pipe"))?;
    if let Some(uuid) = &begin.network {
        isolated::create(uri, &begin.name, uuid, folder, &path).map_err(told)?;
    }
    let wish = Wish { name: begin.name.clone(), ..subject.wish.clone() };
    let disks: Vec<(&Path, &str)> = overlays.iter().map(|path| (path.as_path(), "qcow2")).collect();
    let (console_path, variables) = (path.join(PIPE), path.join("variables.fd"));
    let network = begin.network.as_ref().map(|_| begin.name.as_str());
    let apart = xml::Apart { console: &console_path, variables: &variables, network };
    let description = xml::domain(&wish, &begin.domain, &begin.macs, &disks, begin.accelerator, Some(&apart));
    vault::write_whole(folder, "domain.xml", description.as_bytes()).map_err(failed("the domain's description"))?;
    uri.ask(&["create", &path.join("domain.xml").display().to_string()]).map_err(told)?;
    Ok(console)
}

/// What is known of the guest.
#[derive(Default)]
struct Known {
    alive: Option<String>,
    /// What it said itself.
    dead: Option<String>,
    /// What became of its domain.
    over: Option<String>,
    address: Option<String>,
    pinged: bool,
    /// Why no ping can be sent.
    mute: Option<String>,
}

/// How the proof ends, if it does; the error is the cause. `late`: after so many seconds no more is waited for.
fn verdict(known: &Known, network: bool, late: Option<u64>) -> Option<Result<(), String>> {
    if let Some(cause) = known.dead.as_ref().or(known.over.as_ref()) {
        return Some(Err(cause.clone()));
    }
    if known.alive.is_some() && (!network || known.pinged) {
        return Some(Ok(()));
    }
    let seconds = late?;
    Some(Err(match (&known.alive, &known.address, &known.mute) {
        (None, None, _) => format!("there was no sign of life within {seconds} s"),
        (None, Some(address), _) => format!("it took the address {address}, and there was no sign of life within {seconds} s"),
        (Some(_), None, _) => format!("it came up and took no address by DHCP within {seconds} s: its network does not work"),
        (Some(_), Some(address), None) => format!("it came up and took the address {address}, and no ping was answered within {seconds} s"),
        (Some(_), Some(address), Some(mute)) => format!("it came up and took the address {address}, which this agent cannot ping: {mute}"),
    }))
}

fn watch(uri: &Uri, held: &Assignment, mut pipe: File, subject: &Subject<'_>, begin: &Begin, asked: &Asked<'_>) -> Result<Proof, Error> {
    let began = Instant::now();
    let mut console = Console::new(asked.sign);
    let mut known = Known::default();
    let news = lookout(uri, begin, asked).map_err(failed("the thread that watches the domain"))?;
    let mut looked_at_space = began;
    let mut lingers_until = None;
    let outcome = loop {
        if held.stop().is_some() {
            return Err(Error { code: Code::Conflict, message: "the boot proof was stopped".to_owned(), retryable: true });
        }
        hear(&mut pipe, &mut console).map_err(failed("the console's pipe"))?;
        news.try_iter().for_each(|news| learn(&mut known, news));
        if looked_at_space.elapsed() > SPACE {
            looked_at_space = Instant::now();
            let (free, _) = vault::space(subject.folder).map_err(failed("the destination"))?;
            if free < RESERVE {
                return Err(Error::fatal(Code::NoSpace, format!("{} MiB are free while the result is started for its proof", free >> 20)));
            }
        }
        known.dead = console.dead().map(str::to_owned);
        if known.alive.is_none() {
            known.alive = console.alive().map(str::to_owned);
        }
        let late = (began.elapsed() >= asked.timeout).then_some(asked.timeout.as_secs());
        match verdict(&known, asked.network, late) {
            Some(Err(_)) if late.is_none() && lingers_until.is_none_or(|end| Instant::now() < end) => {
                lingers_until.get_or_insert_with(|| Instant::now() + LINGER);
            }
            Some(outcome) => break outcome,
            None => {}
        }
        thread::sleep(LOOK);
    };
    let screenshot = photograph(uri, &begin.domain, subject);
    vault::write_whole(subject.folder, CONSOLE, console.last(KEPT).as_bytes()).map_err(failed(CONSOLE))?;
    Ok(Proof {
        passed: outcome.is_ok(),
        sign: known.alive,
        cause: outcome.err(),
        seconds: (began.elapsed().as_secs_f64() * 10.0).round() / 10.0,
        console_tail: console.last(TAIL),
        screenshot,
        address: known.address,
        pinged: known.pinged,
        accelerator: begin.accelerator.to_owned(),
    })
}

/// Takes what has come. Before QEMU has opened its end, and after it has gone, nothing comes.
fn hear(pipe: &mut File, console: &mut Console) -> io::Result<()> {
    let mut buf = vec![0; 64 << 10];
    let mut taken = 0;
    while taken < GULP {
        match pipe.read(&mut buf) {
            Ok(0) => break,
            Ok(count) => {
                console.hear(&buf[..count]);
                taken += count;
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// What the lookout has found out.
enum News {
    /// The guest's agent has answered.
    Agent,
    /// The guest has an address.
    Address(String),
    /// It has answered a ping.
    Pinged,
    /// No ping can be sent.
    Mute(String),
    /// The domain does not run any more.
    Over(String),
    /// Nothing new.
    Still,
}

fn learn(known: &mut Known, news: News) {
    match news {
        News::Agent => {
            known.alive.get_or_insert_with(|| "the guest agent answered".to_owned());
        }
        News::Address(address) => known.address = Some(address),
        News::Pinged => known.pinged = true,
        News::Mute(why) => known.mute = Some(why),
        News::Over(why) => {
            known.over.get_or_insert(why);
        }
        News::Still => {}
    }
}

/// Asks about the domain from a thread of its own: libvirt may take its time, and the job may be told to stop meanwhile. The thread ends when
/// nobody wants to know any more.
fn lookout(uri: &Uri, begin: &Begin, asked: &Asked<'_>) -> io::Result<Receiver<News>> {
    let (tell, news) = channel();
    let (uri, domain, macs, network) = (uri.clone(), begin.domain.clone(), begin.macs.clone(), begin.network.clone());
    let wants_agent = asked.sign.is_none();
    thread::Builder::new().name("proof".to_owned()).spawn(move || {
        // Its end means that nobody listens any more.
        let _ = look_out(&tell, &uri, &domain, wants_agent, network.as_deref(), &macs);
    })?;
    Ok(news)
}

fn look_out(
    tell: &Sender<News>,
    uri: &Uri,
    domain: &str,
    mut wants_agent: bool,
    network: Option<&str>,
    macs: &[String],
) -> Result<(), SendError<News>> {
    let mut told = None;
    loop {
        match uri.ask(&["domstate", "--reason", domain]) {
            Ok(state) if state.trim().starts_with("running") => {}
            Ok(state) if state.trim().is_empty() => {}
            Ok(state) if state.trim().starts_with("paused") => {
                return tell.send(News::Over(format!("its domain stopped: {}", state.trim())));
            }
            Ok(state) if state.trim().starts_with("in shutdown") => {}
            Ok(state) => return tell.send(News::Over(format!("its domain ended: {}", state.trim()))),
            Err(exec::Error::Failed(words)) if libvirt::says_gone(&words) => {
                return tell.send(News::Over("it switched itself off, or QEMU ended".to_owned()));
            }
            // Libvirt is not well; the time-out decides.
            Err(_) => {}
        }
        if wants_agent && uri.ask(&["qemu-agent-command", domain, r#"{"execute":"guest-ping"}"#]).is_ok() {
            wants_agent = false;
            tell.send(News::Agent)?;
        }
        // Any of its cards will do: others may have fixed addresses.
        if let Some(address) = network.and_then(|network| macs.iter().find_map(|mac| isolated::lease(uri, network, mac))) {
            if told != Some(address) {
                told = Some(address);
                tell.send(News::Address(address.to_string()))?;
            }
            match isolated::answers(address, ECHO) {
                Ok(true) => tell.send(News::Pinged)?,
                Ok(false) => {}
                Err(e) => tell.send(News::Mute(e.to_string()))?,
            }
        }
        thread::sleep(ASK);
        // Whether anybody listens is only seen by speaking.
        tell.send(News::Still)?;
    }
}

/// The guest's screen beside its disks. What hinders it costs the picture, not the proof.
fn photograph(uri: &Uri, domain: &str, subject: &Subject<'_>) -> Option<String> {
    const SHOT: &str = "screen";
    let path = subject.path.join(FOLDER).join(SHOT);
    uri.ask(&["screenshot", domain, &path.display().to_string()]).ok()?;
    let folder = subject.folder.open_dir(FOLDER).ok()?;
    let mut bytes = Vec::new();
    vault::open_regular(&folder, Path::new(SHOT)).ok()?.take(picture::MOST).read_to_end(&mut bytes).ok()?;
    let png = picture::png(bytes)?;
    vault::write_whole(subject.folder, PICTURE, &png).ok()?;
    Some(PICTURE.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proof_is_what_was_asked_and_no_less() {
        let alive = || Known { alive: Some("login prompt: a login:".into()), ..Known::default() };
        let cause = |known: &Known, network, late| verdict(known, network, late).and_then(Result::err).unwrap_or_default();
        assert_eq!(verdict(&Known::default(), false, None), None);
        assert!(cause(&Known::default(), false, Some(60)).contains("no sign of life within 60 s"));
        assert_eq!(verdict(&alive(), false, None), Some(Ok(())));
        // At the last moment is in time.
        assert_eq!(verdict(&alive(), false, Some(60)), Some(Ok(())));
        assert_eq!(verdict(&alive(), true, None), None);
        assert!(cause(&alive(), true, Some(60)).contains("no address by DHCP"));
        let addressed = Known { address: Some("10.1.2.3".into()), ..alive() };
        assert!(cause(&addressed, true, Some(60)).contains("no ping was answered"));
        assert!(cause(&Known { mute: Some("not permitted".into()), ..alive() }, true, Some(60)).contains("no address"));
        let mute = Known { address: Some("10.1.2.3".into()), mute: Some("not permitted".into()), ..alive() };
        assert!(cause(&mute, true, Some(60)).contains("cannot ping: not permitted"));
        let pinged = || Known { address: Some("10.1.2.3".into()), pinged: true, ..alive() };
        assert_eq!(verdict(&pinged(), true, None), Some(Ok(())));
        // A network alone is no life, and what ended does not live.
        assert_eq!(verdict(&Known { alive: None, ..pinged() }, true, None), None);
        assert_eq!(cause(&Known { dead: Some("panic".into()), ..pinged() }, true, None), "panic");
        assert_eq!(cause(&Known { over: Some("off".into()), ..pinged() }, false, None), "off");
    }
}

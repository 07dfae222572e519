//! `POST /vms/deploy`: a VM made of disks that lie on this host.
//!
//! ```text
//! wish ─► refuse what would not fit ─► (copied into a pool) ─► noted ─► define ─► autostart ─► start ─► forgotten          anything fails, or a crash: undefined
//! ```
//! Owns: that order, the refusals, and that a failure leaves no domain and no volume. Never: changes or removes a disk; takes a name that exists.
//! A crash here leaves a domain that the ledger names; the reaper removes it, never its disks.

mod beneath;
pub mod users;
pub mod volumes;
pub mod xml;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use proto::v1;
use serde_json::{Value, json};
use shared::deploy::{Card, Wish};
use shared::error::Code;
use shared::vault;
use shared::vm::Vm;

use self::volumes::{Ear, Filling};
use crate::exec::{self, Tool};
use crate::formats::Disk;
use crate::pipeline::Format;
use crate::sources::Error;
use crate::sources::libvirt::virsh::Uri;
use crate::sources::local::{Depth, Local};
use crate::{Agent, hypervisors, touched};

/// One disk of a wish, found.
struct Found {
    /// On this host.
    path: PathBuf,
    format: &'static str,
    /// Open, where it was opened, and what makes its content the same content.
    disk: Option<(Arc<dyn Disk>, String)>,
}

fn refused(message: impl Into<String>) -> Error {
    Error::fatal(Code::Unprocessable, message)
}

fn told(e: exec::Error) -> Error {
    match e {
        exec::Error::Failed(words) => refused(format!("libvirt: {words}")),
        e => Error { code: Code::BadGateway, message: e.to_string(), retryable: true },
    }
}

/// Makes the VM. Answers what the API answers. `stop` is set when nobody waits any more.
pub fn deploy(agent: &Agent, asked: &v1::Deploy, stop: &AtomicBool) -> Result<Value, Error> {
    let wish: Wish = serde_json::from_str(&asked.wish_json).map_err(|e| Error::fatal(Code::BadRequest, e.to_string()))?;
    if let Some(flaw) = wish.flaw() {
        return Err(Error::fatal(Code::BadRequest, flaw));
    }
    let connection = asked.connection.clone().unwrap_or_default();
    let uri = here(&connection)?;
    let disks = disks(agent, &wish)?;
    fits(agent, &uri, &connection, &wish, &disks, false)?;
    let uuid = uuid();
    // Held until the VM stands: then they stay.
    let filled = match &wish.pool {
        Some(pool) => {
            // A raw disk among others becomes what these are.
            let format = if disks.iter().all(|disk| disk.format == "raw") { Format::Raw } else { Format::Qcow2 };
            let opened = disks.iter().filter_map(|disk| disk.disk.as_ref().map(|(disk, _)| disk.clone())).collect();
            let filling = Filling { vm: &wish.name, uuid: &uuid, disks: opened, format };
            let tell = |line: String| tracing::info!(vm = wish.name, pool, "{line}");
            let ear = Ear { tell: &tell, stop: &|| stop.load(Ordering::Relaxed) };
            let filled = volumes::fill(agent, &uri, &connection, pool, &filling, &ear)?;
            // That may have taken hours: what was copied is still what it was, and the VM is still wanted and fits.
            let identity = |found: &Found| found.disk.as_ref().map(|(_, identity)| identity.clone());
            let again = self::disks(agent, &wish)?;
            if let Some((disk, _)) = disks.iter().zip(&again).find(|(before, now)| identity(before) != identity(now)) {
                return Err(Error::fatal(Code::Conflict, format!("{} was changed while it was copied", disk.path.display())));
            }
            if stop.load(Ordering::Relaxed) {
                return Err(Error::fatal(Code::Unavailable, "nobody waits for this VM any more"));
            }
            fits(agent, &uri, &connection, &wish, &disks, true)?;
            Some(filled)
        }
        None => None,
    };
    let disks: Vec<(PathBuf, &'static str)> = match &filled {
        Some(filled) => filled.disks.clone(),
        None => disks.into_iter().map(|disk| (disk.path, disk.format)).collect(),
    };
    let (macs, accelerator) = (addresses(&wish), accelerator(agent));
    define(agent, &uri, &connection, &wish, (&uuid, &macs, accelerator), &disks)?;
    Ok(told_of(&uri, &connection, &wish, (&uuid, &macs, accelerator), &disks))
}

/// What a domain is made as: its UUID, its cards' addresses, how its CPUs run.
type Identity<'a> = (&'a str, &'a [String], &'static str);

/// A domain that a job makes of its own disks.
pub struct Standing<'a> {
    /// The domain's UUID, the same in each attempt.
    pub uuid: &'a str,
    /// Its disks in order: absolute path and format.
    pub disks: &'a [(PathBuf, &'static str)],
}

/// Whether the domain of this UUID is there.
pub fn stands(connection: &v1::Connection, uuid: &str) -> Result<bool, Error> {
    let uri = here(connection)?;
    Ok(uri.domains().map_err(told)?.iter().any(|known| known == uuid))
}

/// Whether the hypervisor would take the VM, whose disks are still to be made.
pub fn check(agent: &Agent, connection: &v1::Connection, wish: &Wish) -> Result<(), Error> {
    fits(agent, &here(connection)?, connection, wish, &[], false)
}

/// Makes the domain of a job, unless an earlier attempt has. Answers as [`deploy`].
pub fn place(agent: &Agent, connection: &v1::Connection, wish: &Wish, standing: &Standing<'_>) -> Result<Value, Error> {
    let uri = here(connection)?;
    clear(agent, standing.uuid);
    let accelerator = accelerator(agent);
    if stands(connection, standing.uuid)? {
        let state = uri.ask(&["domstate", standing.uuid]).map_err(told)?;
        if wish.start && state.trim() == "shut off" {
            uri.ask(&["start", standing.uuid]).map_err(told)?;
        }
        let xml = uri.ask(&["dumpxml", standing.uuid]).map_err(told)?;
        let its = xml.split("<mac address='").skip(1).filter_map(|rest| rest.split('\'').next());
        let macs: Vec<String> = its.map(str::to_owned).collect();
        let disks = disks_of(&xml);
        return Ok(told_of(&uri, connection, wish, (standing.uuid, &macs, accelerator), &disks));
    }
    let found: Vec<Found> = standing.disks.iter().map(|(path, format)| Found { path: path.clone(), format, disk: None }).collect();
    fits(agent, &uri, connection, wish, &found, true)?;
    let macs = addresses(wish);
    define(agent, &uri, connection, wish, (standing.uuid, &macs, accelerator), standing.disks)?;
    Ok(told_of(&uri, connection, wish, (standing.uuid, &macs, accelerator), standing.disks))
}

/// Removes a domain that an earlier attempt has left half made.
pub fn clear(agent: &Agent, uuid: &str) {
    touched::undo(agent, &format!("deploy-{uuid}"));
}

/// Copies disks into a pool of the connection's libvirt: see [`volumes::fill`].
pub fn fill<'a>(
    agent: &'a Agent,
    connection: &v1::Connection,
    pool: &str,
    filling: &Filling<'_>,
    ear: &Ear<'_>,
) -> Result<volumes::Filled<'a>, Error> {
    volumes::fill(agent, &here(connection)?, connection, pool, filling, ear)
}

/// A connection to the libvirt of this host.
fn here(connection: &v1::Connection) -> Result<Uri, Error> {
    if connection.kind != hypervisors::LIBVIRT {
        return Err(Error::fatal(Code::NotBuilt, format!("deploying to {:?} is not built yet; `libvirt` is", connection.kind)));
    }
    let uri = Uri::parse(&connection.path).map_err(|message| Error::fatal(Code::BadRequest, message))?;
    if uri.is_here { Ok(uri) } else { Err(Error::fatal(Code::NotBuilt, "deploying to another host is not built yet: run an agent there")) }
}

fn define(
    agent: &Agent,
    uri: &Uri,
    connection: &v1::Connection,
    wish: &Wish,
    (uuid, macs, accelerator): Identity<'_>,
    disks: &[(PathBuf, &'static str)],
) -> Result<(), Error> {
    let files: Vec<(&std::path::Path, &str)> = disks.iter().map(|(path, format)| (path.as_path(), *format)).collect();
    let description = xml::domain(wish, uuid, macs, &files, accelerator, None);
    let note = format!("deploy-{uuid}");
    touched::while_noted(agent, &note, connection, uuid, || make(agent, uri, &note, uuid, &description, wish))?
}

/// The disks' files and formats in a domain's description.
fn disks_of(xml: &str) -> Vec<(PathBuf, &'static str)> {
    let Ok(document) = roxmltree::Document::parse(xml) else { return Vec::new() };
    let disk = |node: roxmltree::Node| {
        let child = |name: &str| node.children().find(|child| child.has_tag_name(name));
        let format = child("driver").and_then(|driver| driver.attribute("type")).filter(|format| *format == "raw");
        Some((child("source")?.attribute("file")?.into(), format.map_or("qcow2", |_| "raw")))
    };
    document.descendants().filter(|node| node.has_tag_name("disk")).filter_map(disk).collect()
}

/// What the API answers.
fn told_of(
    uri: &Uri,
    connection: &v1::Connection,
    wish: &Wish,
    (uuid, macs, accelerator): Identity<'_>,
    disks: &[(PathBuf, &'static str)],
) -> Value {
    let cards = wish.cards();
    let display = uri.ask(&["vncdisplay", uuid]).ok();
    let display = display.and_then(|text| text.trim().rsplit_once(':')?.1.parse::<u32>().ok());
    json!({
        "name": wish.name,
        "uuid": uuid,
        "status": if wish.start { "running" } else { "stopped" },
        "target": connection.name,
        "cpu": wish.cpu,
        "memory_mb": wish.memory_mb,
        "disk_path": disks.first().map(|(path, _)| path.display().to_string()),
        "disks": disks.iter().map(|(path, _)| path.display().to_string()).collect::<Vec<_>>(),
        "network": network_of(&cards[0]),
        "bridge": wish.bridge,
        "mac": macs.first(),
        "nics": cards.iter().zip(macs).map(|(card, mac)| json!({"network": network_of(card), "bridge": card.bridge, "mac": mac})).collect::<Vec<_>>(),
        "autostart": wish.autostart,
        "pool": wish.pool,
        "firmware": wish.firmware.as_deref().unwrap_or("bios"),
        "accelerator": accelerator,
        "created_at": shared::clock::rfc3339(shared::clock::now()),
        "vnc_port": display.map(|display| 5900 + display),
    })
}

/// Defines and starts it; what fails is taken back.
fn make(agent: &Agent, uri: &Uri, note: &str, uuid: &str, description: &str, wish: &Wish) -> Result<(), Error> {
    let failed = |e: std::io::Error| Error::fatal(Code::Internal, format!("the agent's own folder: {e}"));
    let file = format!("{note}.xml");
    vault::write_whole(agent.ledger.dir(), &file, description.as_bytes()).map_err(failed)?;
    let path = agent.config.data_dir.join("jobs").join(&file).display().to_string();
    let defined = uri.ask(&["define", &path]);
    // virsh has read it.
    let _ = agent.ledger.dir().remove_file(&file);
    defined.map_err(told)?;
    let rest = || {
        if wish.autostart {
            uri.ask(&["autostart", uuid])?;
        }
        if wish.start {
            uri.ask(&["start", uuid])?;
        }
        Ok(())
    };
    rest().map_err(|e| {
        // What cannot be taken back now is noted, and the reaper comes back to it.
        match crate::sources::libvirt::remove_domain(uri, uuid) {
            Ok(()) => told(e),
            Err(left) => Error { message: format!("{}; the domain is not gone yet: {}", told(e).message, left.message), ..left },
        }
    })
}

/// The disks, each opened once: damaged images and those that lie over others are refused before a hypervisor sees them.
fn disks(agent: &Agent, wish: &Wish) -> Result<Vec<Found>, Error> {
    let find = |path: &String| {
        let place = agent.vault.locate(path).map_err(|e| Error::fatal(Code::OutsideRoots, e.to_string()))?;
        let named = place.named();
        let format = match place.below.extension().and_then(|ending| ending.to_str()).map(str::to_ascii_lowercase).as_deref() {
            Some("qcow2" | "qcow") => "qcow2",
            Some("raw" | "dd" | "img") => "raw",
            _ => return Err(refused(format!("{named} is neither .qcow2 nor .raw; convert it first (POST /jobs, type convert)"))),
        };
        let (Some(name), Some(parent)) = (place.below.file_name().and_then(|name| name.to_str()), place.below.parent()) else {
            return Err(refused(format!("{named} is a folder; name a disk in it")));
        };
        let root = place.root.dir();
        let folder = if parent.as_os_str().is_empty() { root.try_clone() } else { root.open_dir(parent) };
        let missing = |e: std::io::Error| Error::fatal(Code::NotFound, format!("there is no file {named}: {e}"));
        let folder = folder.map_err(missing)?;
        if !folder.metadata(name).map_err(missing)?.is_file() {
            return Err(refused(format!("{named} is not a regular file")));
        }
        let (_, opened) = Local::new(folder).open_file(name, Depth::Structure)?;
        Ok(Found { path: place.absolute(), format, disk: opened.into_iter().next().map(|opened| (opened.disk, opened.identity)) })
    };
    let disks = std::iter::once(&wish.disk_path).chain(&wish.disks).map(find).collect::<Result<Vec<_>, _>>()?;
    for (n, disk) in disks.iter().enumerate() {
        if disks[..n].iter().any(|other| other.path == disk.path) {
            return Err(refused(format!("{} is named twice", disk.path.display())));
        }
    }
    Ok(disks)
}

/// Whether the host can bear it: the name is free, nobody has the disks, there are as many CPUs, as much memory, and the network.
fn fits(agent: &Agent, uri: &Uri, connection: &v1::Connection, wish: &Wish, disks: &[Found], is_filled: bool) -> Result<(), Error> {
    let vms = agent.source(connection)?.inventory()?;
    if vms.iter().any(|vm| vm.name == wish.name) {
        return Err(Error::fatal(Code::Conflict, format!("a domain `{}` exists already", wish.name)));
    }
    let path = |disk: &Found| disk.path.display().to_string();
    // What is copied may be a disk of a domain that is off: nobody writes to it meanwhile.
    let is_in_the_way = |vm: &&Vm| wish.pool.is_none() || vm.power_state != "poweredOff";
    let others = || vms.iter().filter(is_in_the_way);
    let taken = disks
        .iter()
        .find_map(|disk| others().find(|vm| vm.disks.iter().any(|other| other.source == path(disk))).map(|vm| (path(disk), vm)));
    if let Some((path, vm)) = taken {
        return Err(Error::fatal(Code::Conflict, format!("{path} is a disk of the domain `{}`", vm.name)));
    }
    for (vm, other) in others().flat_map(|vm| vm.disks.iter().map(move |other| (vm, other))) {
        // Nobody is slowed down who has no disks yet.
        let layers = if disks.is_empty() { Vec::new() } else { beneath::layers(&agent.vault, other) };
        if let Some(disk) = disks.iter().find(|disk| layers.contains(&disk.path)) {
            let message = format!("{} lies beneath {}, a disk of the domain `{}`", path(disk), other.source, vm.name);
            return Err(Error::fatal(Code::Conflict, message));
        }
    }
    let cards = wish.cards();
    for mac in cards.iter().filter_map(|card| card.mac.as_ref()) {
        if let Some(vm) = vms.iter().find(|vm| vm.nics.iter().any(|nic| nic.mac.eq_ignore_ascii_case(mac))) {
            return Err(Error::fatal(Code::Conflict, format!("{mac} is the address of the domain `{}`", vm.name)));
        }
    }
    let host = uri.ask(&["nodeinfo"]).map_err(told)?;
    let number = |name: &str| host.lines().find_map(|line| line.strip_prefix(name)?.split_whitespace().next()?.parse::<u64>().ok());
    let kib = number("Memory size:").unwrap_or(u64::MAX);
    // CPUs may be more than the host has; what QEMU can do is the limit.
    let most = uri.ask(&["maxvcpus"]).ok().and_then(|most| most.trim().parse::<u32>().ok()).unwrap_or(u32::MAX);
    if wish.cpu > most {
        return Err(refused(format!("QEMU there gives at most {most} CPUs, {} are asked for", wish.cpu)));
    }
    if wish.memory_mb > kib >> 10 {
        return Err(refused(format!("the host has {} MiB of memory, {} are asked for", kib >> 10, wish.memory_mb)));
    }
    if let Some(pool) = wish.pool.as_deref().filter(|_| !is_filled) {
        volumes::check(agent, uri, pool, &wish.name)?;
    }
    are_there(uri, cards.iter().filter_map(network_of).filter(|name| *name != xml::USER), wish.start)
}

/// The network that a card belongs to; none: a bridge.
fn network_of(card: &Card) -> Option<&str> {
    card.network.as_deref().or(card.bridge.is_none().then_some(xml::DEFAULT))
}

/// Whether libvirt has these networks, active ones where the VM is to start.
fn are_there<'a>(uri: &Uri, networks: impl Iterator<Item = &'a str>, starts: bool) -> Result<(), Error> {
    let mut networks = networks.peekable();
    if networks.peek().is_none() {
        return Ok(());
    }
    let listed = uri.ask(&["net-list", "--all", "--name"]).map_err(told)?;
    let known: Vec<&str> = listed.lines().map(str::trim).filter(|name| !name.is_empty()).collect();
    let active = uri.ask(&["net-list", "--name"]).map_err(told)?;
    for network in networks {
        if !known.contains(&network) {
            let all = known.iter().map(|name| format!("`{name}`")).chain(["`user`".to_owned()]).collect::<Vec<_>>().join(", ");
            return Err(refused(format!("there is no network `{network}`; there are: {all}")));
        }
        if starts && !active.lines().any(|name| name.trim() == network) {
            return Err(refused(format!("the network `{network}` is not active: virsh net-start {network}")));
        }
    }
    Ok(())
}

/// `kvm` where a virtual CPU really runs, else `tcg`.
pub fn accelerator(agent: &Agent) -> &'static str {
    match agent.config.libvirt_accel.as_str() {
        "tcg" => "tcg",
        "kvm" => "kvm",
        _ if runs_a_cpu(agent) => "kvm",
        _ => "tcg",
    }
}

/// Starts QEMU with KVM and a firmware of a few bytes, which says through the debug port that it was executed. The device's file alone says
/// nothing: it may be there and no guest runs.
fn runs_a_cpu(agent: &Agent) -> bool {
    const ROM: usize = 64 << 10;
    let mut rom = vec![0xff; ROM];
    // The reset vector: mov al, 0x10; out 0xf4, al; hlt.
    rom[ROM - 16..ROM - 11].copy_from_slice(&[0xb0, 0x10, 0xe6, 0xf4, 0xf4]);
    let name = format!("cpu-{}.rom", shared::ids::random_hex::<4>());
    if vault::write_whole(agent.ledger.dir(), &name, &rom).is_err() {
        return false;
    }
    let path = agent.config.data_dir.join("jobs").join(&name).display().to_string();
    let arguments = [
        "-accel",
        "kvm",
        "-machine",
        "pc",
        "-nodefaults",
        "-display",
        "none",
        "-m",
        "16",
        "-bios",
        path.as_str(),
        "-device",
        "isa-debug-exit,iobase=0xf4,iosize=4",
    ];
    let ended = exec::status(Tool::Qemu, &arguments, std::time::Duration::from_secs(10));
    let _ = agent.ledger.dir().remove_file(&name);
    // (0x10 << 1) | 1
    ended.is_ok_and(|status| status == Some(0x21))
}

/// A new one.
pub fn uuid() -> String {
    uuid_from(&shared::ids::random_hex::<16>())
}

/// The UUID of the domain that a job makes, the same in each attempt.
pub fn uuid_of(job: &str) -> String {
    uuid_from(&blake3::hash(job.as_bytes()).to_hex()[..32])
}

fn uuid_from(hex: &str) -> String {
    // Version 4, variant 1 (RFC 4122).
    format!("{}-{}-4{}-a{}-{}", &hex[..8], &hex[8..12], &hex[13..16], &hex[17..20], &hex[20..32])
}

/// The addresses of its cards, new ones where it says nothing.
pub fn addresses(wish: &Wish) -> Vec<String> {
    wish.cards().into_iter().map(|card| card.mac.map_or_else(new_mac, |mac| mac.to_ascii_lowercase())).collect()
}

/// A new address of a card.
pub fn new_mac() -> String {
    let hex = shared::ids::random_hex::<3>();
    // QEMU's own prefix.
    format!("52:54:00:{}:{}:{}", &hex[..2], &hex[2..4], &hex[4..6])
}

//! What a migration is asked for beyond an export: where its VM goes, and that it can go there.
//!
//! Owns: the option `target`, what is taken over from the source where it says nothing, and every reason to refuse it before a byte is copied.
//! Never: asks a hypervisor (the agent does, before it copies and again before it deploys). A crash here costs one answer.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use shared::deploy::{Card, Wish};
use shared::error::Code;
use shared::migrate::{Adapt, BootProof, Target, Warm};
use shared::options::Format;
use shared::vm::{Nic, Vm};
use utoipa::ToSchema;

use super::service::{Wishes, clip};
use crate::app::App;
use crate::http::reply::Error;
use crate::jobs::core::Outbox as _;
use crate::store::entities::connections;
use crate::{providers, vms};

/// What POST /vms/deploy takes, without the disks: these are made by the job. What is absent is as at the source.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
#[schema(as = MigrateTarget, example = json!({"target": "libvirt", "name": "web-server-01", "network": "default", "mac": "keep"}))]
pub struct Wanted {
    /// A connection's name, or its kind; default `libvirt`.
    #[schema(example = "libvirt")]
    pub target: Option<String>,
    /// Name of the new VM; one that exists is a conflict.
    pub name: Option<String>,
    /// A storage pool that the disks are copied into, each a whole; absent: the VM runs from the job's folder, from overlays where the guest was
    /// adapted.
    pub pool: Option<String>,
    /// Virtual CPUs.
    pub cpu: Option<u32>,
    /// MiB.
    pub memory_mb: Option<u64>,
    /// What all cards are connected to that `networks` does not name: a libvirt network's name, or `user`; absent, and without `bridge`:
    /// `default`.
    pub network: Option<String>,
    /// A bridge of the host, in place of `network`.
    pub bridge: Option<String>,
    /// By the network's name at the source: a libvirt network's name, `user`, or `bridge:NAME`.
    #[schema(example = json!({"VM Network": "default", "DB Network": "bridge:br1"}))]
    pub networks: BTreeMap<String, String>,
    /// `keep`, `new` or an address (of the first card); absent: kept where the source is off and stays elsewhere, else new.
    #[schema(example = "keep")]
    pub mac: Option<String>,
    /// `bios` or `uefi`.
    pub firmware: Option<String>,
    /// `virtio` (default), `scsi`, `sata` or `ide`.
    pub disk_bus: Option<String>,
    /// `virtio` (default), `e1000`, `e1000e`, `rtl8139` or `vmxnet3`.
    pub nic_model: Option<String>,
    /// Default false.
    pub autostart: Option<bool>,
    /// Default true.
    pub start: Option<bool>,
}

/// What a migration adds to a job's options.
pub(super) struct Plan {
    pub target: Target,
    pub adapt: Adapt,
    pub boot_proof: BootProof,
    pub warm: Option<Warm>,
}

/// The format of a migration: its disks are run from.
pub(super) fn format(word: Option<&str>) -> Result<Format, Error> {
    match super::service::output_format(word.or(Some("qcow2")))? {
        format @ (Format::Qcow2 | Format::Raw) => Ok(format),
        format => Err(Error::new(
            Code::Unprocessable,
            format!("a migrated VM runs from its disks: `format` is qcow2 (default) or raw, not {format}"),
        )),
    }
}

/// Refuses options that belong to migrations alone.
pub(super) fn only_here(wishes: &Wishes) -> Result<(), Error> {
    let given = [
        ("target", wishes.target.is_some()),
        ("adapt", wishes.adapt.is_some()),
        ("boot_proof", wishes.boot_proof.is_some()),
        ("warm", wishes.warm.is_some()),
    ];
    match given.iter().find(|(_, given)| *given) {
        Some((name, _)) => Err(Error::bad_request(format!("`{name}` is for jobs of type `migrate`; leave it out"))),
        None => Ok(()),
    }
}

/// Takes the migration's own options out of the wishes and checks them. Notes say what will be other than one might think.
pub(super) async fn check(
    app: &App,
    source: &connections::Model,
    vm: &Vm,
    wishes: &mut Wishes,
    notes: &mut Vec<String>,
) -> Result<Plan, Error> {
    if wishes.include_snapshots == Some(true) {
        return Err(Error::new(Code::Unprocessable, "a migrated VM has one state: leave `include_snapshots` out"));
    }
    let wanted = wishes.target.take().unwrap_or_default();
    let adapt = wishes.adapt.take().unwrap_or_default();
    let boot_proof: BootProof = wishes.boot_proof.take().map(BootProof::from).unwrap_or_default();
    if let Some(flaw) = boot_proof.flaw() {
        return Err(Error::bad_request(flaw));
    }
    let warm: Option<Warm> = wishes.warm.take().and_then(Into::into);
    if let Some(warm) = &warm {
        fits_warm(warm, source, vm)?;
    }
    let named = wanted.target.as_deref().unwrap_or("libvirt");
    let connection = providers::service::resolve(&app.store, named).await?;
    if connection.kind != "libvirt" {
        return Err(Error::not_built(format!("migrating to `{}`", connection.kind)));
    }
    if !connection.path.starts_with("qemu:///") {
        return Err(Error::not_built("migrating to another host: run an agent there and connect qemu:///system"));
    }
    if connection.agent_id != source.agent_id {
        let (from, to) = (app.fleet.name(&source.agent_id), app.fleet.name(&connection.agent_id));
        let message = format!("migrating through two agents (`{}` is served by `{from}`, `{}` by `{to}`)", source.name, connection.name);
        return Err(Error::not_built(message));
    }
    let is_same = connection.name == source.name;
    if wanted.pool.is_some() && warm.is_some() {
        let message = "a warm migration's VM runs from the job's folder: to copy its disks into a pool would be downtime; leave `pool` out";
        return Err(Error::new(Code::Unprocessable, message));
    }
    let will_stop = warm.is_some() || wishes.power_off == Some(true);
    let mac = address(&wanted, vm, is_same, will_stop)?;
    let wish = wish(wanted, vm)?;
    if vms::service::is_named(&app.store, &connection.name, &wish.name).await? {
        let message =
            format!("`{}` has a VM `{}` already; give the new one another name in `options.target.name`", connection.name, wish.name);
        return Err(Error::new(Code::Conflict, message));
    }
    if vm.power_state == "poweredOn" && !will_stop {
        let consistency = if wishes.quiesce == Some(true) { "its file systems frozen for that" } else { "crash-consistent" };
        notes.push(format!(
            "{} is running: what is migrated is its state of one moment, {consistency}; what it writes later stays behind",
            vm.name
        ));
    }
    if vm.nics.len() > 1 {
        let places = vm.nics.iter().zip(wish.cards()).map(|(nic, card)| {
            let to = card.bridge.map(|bridge| format!("bridge {bridge}")).or(card.network).unwrap_or_else(|| "default".to_owned());
            format!("{} ({}) to {to}", nic.name, clip(&nic.network))
        });
        notes.push(format!("{} has {} network cards: {}", vm.name, vm.nics.len(), places.collect::<Vec<_>>().join(", ")));
    }
    let target = Target { connection: connection.name, kind: connection.kind, path: connection.path, wish, mac };
    Ok(Plan { target, adapt, boot_proof, warm })
}

/// Whether the VM can be copied while it runs, again and again.
fn fits_warm(warm: &Warm, source: &connections::Model, vm: &Vm) -> Result<(), Error> {
    if let Some(flaw) = warm.flaw() {
        return Err(Error::bad_request(flaw));
    }
    if !matches!(source.kind.as_str(), "libvirt" | "vsphere") {
        return Err(Error::new(Code::Unprocessable, format!("nothing runs at a connection of kind `{}`: leave `warm` out", source.kind)));
    }
    if vm.power_state != "poweredOn" {
        let message = format!("`{}` is {}: there is nothing to keep running, leave `warm` out", clip(&vm.name), vm.power_state);
        return Err(Error::new(Code::Conflict, message));
    }
    Ok(())
}

/// What is said of the address, where that can be: a machine that runs must not meet another one with its own address, whether it is called
/// `keep` or by its digits.
fn address(wanted: &Wanted, vm: &Vm, is_same: bool, is_stopped: bool) -> Result<Option<String>, Error> {
    let Some(mac) = wanted.mac.clone() else { return Ok(None) };
    let refused = |code, message: String| Err(Error::new(code, message));
    let is_own = vm.nics.iter().any(|nic| nic.mac.eq_ignore_ascii_case(&mac));
    match if is_own { "keep" } else { mac.as_str() } {
        "new" => {}
        "keep" if vm.power_state != "poweredOff" && !is_stopped => {
            let (name, state) = (clip(&vm.name), if vm.power_state == "poweredOn" { "running" } else { vm.power_state.as_str() });
            let message = format!("`{name}` is {state}: its address cannot be kept as long as it is; switch it off, or say `mac: new`");
            return refused(Code::Conflict, message);
        }
        "keep" if is_same => {
            let name = clip(&vm.name);
            return refused(Code::Conflict, format!("`{name}` stays at the same hypervisor with its address: say `mac: new`"));
        }
        "keep" if !is_own && vm.nics.first().is_none_or(|nic| nic.mac.is_empty()) => {
            return refused(Code::Unprocessable, format!("`{}` has no address that is known: say `mac: new`", clip(&vm.name)));
        }
        "keep" => {}
        address if shared::deploy::is_mac(address) => {}
        other => return Err(Error::bad_request(format!("`options.target.mac` is `keep`, `new` or an address, not {:?}", clip(other)))),
    }
    Ok(Some(mac))
}

fn wish(wanted: Wanted, vm: &Vm) -> Result<Wish, Error> {
    let cards = cards(&wanted, vm)?;
    let missing = |field: &str| Error::bad_request(format!("`options.target.{field}` is missing: the source does not say"));
    let firmware = wanted.firmware.or_else(|| Some(vm.firmware.clone()).filter(|word| shared::deploy::FIRMWARES.contains(&word.as_str())));
    let wish = Wish {
        name: wanted.name.unwrap_or_else(|| vm.name.clone()),
        disk_path: String::new(),
        disks: Vec::new(),
        pool: wanted.pool,
        cpu: wanted.cpu.or(Some(vm.cpu).filter(|cpu| *cpu > 0)).ok_or_else(|| missing("cpu"))?,
        memory_mb: wanted.memory_mb.or(Some(vm.memory_mb).filter(|memory| *memory > 0)).ok_or_else(|| missing("memory_mb"))?,
        network: cards[0].network.clone(),
        bridge: cards[0].bridge.clone(),
        mac: None,
        nics: cards[1..].to_vec(),
        firmware,
        disk_bus: wanted.disk_bus,
        nic_model: wanted.nic_model,
        autostart: wanted.autostart.unwrap_or(false),
        start: wanted.start.unwrap_or(true),
    };
    // The disks are the job's, and there.
    let whole = Wish { disk_path: "made by the job".to_owned(), ..wish.clone() };
    match whole.flaw() {
        Some(flaw) => Err(Error::bad_request(format!("options.target: {flaw}"))),
        None => Ok(wish),
    }
}

/// The cards, as many as the source has and at least one: what each is connected to.
fn cards(wanted: &Wanted, vm: &Vm) -> Result<Vec<Card>, Error> {
    if let Some(name) = wanted.networks.keys().find(|name| !vm.nics.iter().any(|nic| nic.network == **name)) {
        let mut known: Vec<String> = vm.nics.iter().map(|nic| format!("`{}`", clip(&nic.network))).collect();
        known.dedup();
        let known = if known.is_empty() { "it has no card".to_owned() } else { format!("there are: {}", known.join(", ")) };
        return Err(Error::bad_request(format!("options.target.networks: `{}` is no network of the source; {known}", clip(name))));
    }
    let usual = Card { network: wanted.network.clone(), bridge: wanted.bridge.clone(), mac: None };
    let placed = |nic: &Nic| match wanted.networks.get(&nic.network) {
        Some(to) => match to.strip_prefix("bridge:") {
            Some(bridge) => Card { bridge: Some(bridge.to_owned()), ..Card::default() },
            None => Card { network: Some(to.clone()), ..Card::default() },
        },
        None => usual.clone(),
    };
    let cards: Vec<Card> = vm.nics.iter().map(placed).collect();
    Ok(if cards.is_empty() { vec![usual] } else { cards })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_the_source_says_is_taken_over_and_an_address_is_never_there_twice() {
        let nic = Nic { mac: "00:50:56:00:00:01".into(), ..Nic::default() };
        let vm = Vm { name: "web".into(), cpu: 2, memory_mb: 512, firmware: "uefi".into(), nics: vec![nic], ..Vm::default() };
        let vm = Vm { power_state: "poweredOff".into(), ..vm };
        let made = wish(Wanted::default(), &vm).unwrap();
        assert_eq!((made.name.as_str(), made.cpu, made.memory_mb, made.firmware.as_deref()), ("web", 2, 512, Some("uefi")));
        assert!(made.start && !made.autostart);
        let other = wish(Wanted { name: Some("x".into()), cpu: Some(1), memory_mb: Some(64), ..Wanted::default() }, &vm).unwrap();
        assert_eq!((other.name.as_str(), other.cpu, other.memory_mb), ("x", 1, 64));
        assert!(wish(Wanted::default(), &Vm { cpu: 0, ..vm.clone() }).is_err());
        assert!(wish(Wanted { name: Some("a/b".into()), ..Wanted::default() }, &vm).is_err());
        // Each card to its network, and none that is not there.
        let network = |name: &str| Nic { network: name.into(), ..Nic::default() };
        let three = Vm { nics: vec![network("VM Network"), network("DB"), network("VM Network")], ..vm.clone() };
        let map = |pairs: &[(&str, &str)]| pairs.iter().map(|(from, to)| ((*from).to_owned(), (*to).to_owned())).collect();
        let wanted = Wanted { network: Some("lab".into()), networks: map(&[("DB", "bridge:br1")]), ..Wanted::default() };
        let made = wish(wanted, &three).unwrap().cards();
        let placed: Vec<_> = made.iter().map(|card| (card.network.as_deref(), card.bridge.as_deref())).collect();
        assert_eq!(placed, [(Some("lab"), None), (None, Some("br1")), (Some("lab"), None)]);
        let said = wish(Wanted { networks: map(&[("db", "x")]), ..Wanted::default() }, &three).unwrap_err().to_string();
        assert!(said.contains("`VM Network`, `DB`"), "{said}");
        assert!(wish(Wanted { networks: map(&[("DB", "bridge:a/b")]), ..Wanted::default() }, &three).is_err());

        let keep = Wanted { mac: Some("keep".into()), ..Wanted::default() };
        assert_eq!(address(&keep, &vm, false, false).unwrap().as_deref(), Some("keep"));
        assert_eq!(address(&keep, &vm, true, false).unwrap_err().code(), Code::Conflict);
        let running = Vm { power_state: "poweredOn".into(), ..vm.clone() };
        assert_eq!(address(&keep, &running, false, false).unwrap_err().code(), Code::Conflict);
        assert_eq!(address(&keep, &running, false, true).unwrap().as_deref(), Some("keep"));
        let suspended = Vm { power_state: "suspended".into(), ..vm.clone() };
        assert_eq!(address(&keep, &suspended, false, false).unwrap_err().code(), Code::Conflict);
        // The same by its digits, of any of its cards.
        let second = Nic { mac: "00:50:56:00:00:aa".into(), ..Nic::default() };
        let two = |vm: &Vm| Vm { nics: vec![vm.nics[0].clone(), second.clone()], ..vm.clone() };
        let own = Wanted { mac: Some("00:50:56:00:00:AA".into()), ..Wanted::default() };
        for (vm, is_same, is_stopped, fits) in [
            (two(&vm), false, false, true),
            (two(&vm), true, false, false),
            (two(&running), false, false, false),
            (two(&running), false, true, true),
            (two(&suspended), false, false, false),
            // Nobody's.
            (running.clone(), true, false, true),
        ] {
            let said = address(&own, &vm, is_same, is_stopped).map_err(|e| e.code());
            assert_eq!(said, if fits { Ok(own.mac.clone()) } else { Err(Code::Conflict) }, "{} {is_same} {is_stopped}", vm.power_state);
        }
        assert_eq!(address(&keep, &Vm { nics: Vec::new(), ..vm.clone() }, false, false).unwrap_err().code(), Code::Unprocessable);
        let odd = Wanted { mac: Some("01:00:00:00:00:01".into()), ..Wanted::default() };
        assert_eq!(address(&odd, &vm, false, false).unwrap_err().code(), Code::BadRequest);
        assert_eq!(address(&Wanted::default(), &running, false, false).unwrap(), None);
    }
}

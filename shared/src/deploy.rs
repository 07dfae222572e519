//! What a VM is to become at a hypervisor: `POST /vms/deploy`, and a step of a migration.
//!
//! Owns: the wish as the API takes it and the agent gets it, and what is sane about it. Never: knows a hypervisor. A crash here costs nothing.

use serde::{Deserialize, Serialize};

/// A network card.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Card {
    /// A libvirt network's name, or `user`; absent, and without `bridge`: `default`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network: Option<String>,
    /// A bridge of the host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bridge: Option<String>,
    /// MAC address; absent: a new one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
}

/// A wish. What is absent is chosen by the hypervisor's agent.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wish {
    /// Name of the VM; one that exists is refused.
    pub name: String,
    /// The first disk: `ROOT/…` or absolute, inside a root of the agent.
    pub disk_path: String,
    /// Further disks, in order.
    #[serde(default)]
    pub disks: Vec<String>,
    /// A storage pool that the disks are copied into; absent: they are used where they lie.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<String>,
    /// Virtual CPUs.
    pub cpu: u32,
    /// Memory in MiB.
    pub memory_mb: u64,
    /// What the first card is connected to: a libvirt network's name, or `user`.
    #[serde(default)]
    pub network: Option<String>,
    /// A bridge of the host, in its place.
    #[serde(default)]
    pub bridge: Option<String>,
    /// The first card's MAC address; absent: a new one.
    #[serde(default)]
    pub mac: Option<String>,
    /// Further cards, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nics: Vec<Card>,
    /// `bios` or `uefi`.
    #[serde(default)]
    pub firmware: Option<String>,
    /// `virtio`, `scsi`, `sata` or `ide`.
    #[serde(default)]
    pub disk_bus: Option<String>,
    /// The network cards' model: `virtio`, `e1000`, `e1000e`, `rtl8139`, `vmxnet3`.
    #[serde(default)]
    pub nic_model: Option<String>,
    /// Whether it starts with its host.
    #[serde(default)]
    pub autostart: bool,
    /// Whether it is started now.
    #[serde(default = "yes")]
    pub start: bool,
}

fn yes() -> bool {
    true
}

/// Firmwares.
pub const FIRMWARES: &[&str] = &["bios", "uefi"];
/// Buses of disks.
pub const BUSES: &[&str] = &["virtio", "scsi", "sata", "ide"];
/// Models of network cards.
pub const CARDS: &[&str] = &["virtio", "e1000", "e1000e", "rtl8139", "vmxnet3"];
/// How the name of a domain begins that is started for a boot proof: it is nobody's VM, and no inventory shows it.
pub const PROOF: &str = "hypersdk-proof-";
/// Most network cards: a VMware guest has ten at most.
pub const MOST_CARDS: usize = 32;
/// Least memory, MiB: less starts nothing that has a disk.
pub const LEAST_MEMORY: u64 = 16;

impl Wish {
    /// All its cards, in order.
    pub fn cards(&self) -> Vec<Card> {
        let first = Card { network: self.network.clone(), bridge: self.bridge.clone(), mac: self.mac.clone() };
        std::iter::once(first).chain(self.nics.iter().cloned()).collect()
    }

    /// The same with its cards' addresses, in order.
    #[must_use]
    pub fn with_addresses(&self, addresses: &[Option<String>]) -> Self {
        let mut wish = self.clone();
        let mut addresses = addresses.iter().cloned();
        wish.mac = addresses.next().flatten();
        for (card, mac) in wish.nics.iter_mut().zip(addresses.chain(std::iter::repeat(None))) {
            card.mac = mac;
        }
        wish
    }

    /// What is wrong with it whoever it is for, in a sentence that says what would be right.
    pub fn flaw(&self) -> Option<String> {
        let word = |field: &str, value: &Option<String>, known: &[&str]| {
            let value = value.as_deref()?;
            (!known.contains(&value)).then(|| format!("`{field}` is {}: {value:?} is none of them", known.join(", ")))
        };
        let flaws = [
            (!is_name(&self.name))
                .then(|| "`name` must be 1 to 80 letters, digits, blanks, `.`, `_`, `+`, `-`, and begin with a letter or digit".to_owned()),
            self.name
                .starts_with(PROOF)
                .then(|| format!("`name` must not begin with {PROOF}: so are domains called that are started for a boot proof")),
            (self.disk_path.is_empty() || self.disks.iter().any(String::is_empty)).then(|| "a disk's path is empty".to_owned()),
            (self.disks.len() > 16).then(|| format!("{} further disks; at most 16 are taken", self.disks.len())),
            (!(1..=512).contains(&self.cpu)).then(|| format!("`cpu` must be 1 to 512, not {}", self.cpu)),
            (self.memory_mb < LEAST_MEMORY || self.memory_mb > 16 << 20)
                .then(|| format!("`memory_mb` must be {LEAST_MEMORY} to {}, not {}", 16 << 20, self.memory_mb)),
            (self.nics.len() >= MOST_CARDS).then(|| format!("{} network cards; at most {MOST_CARDS} are taken", self.nics.len() + 1)),
            self.pool.as_deref().is_some_and(|name| !is_name(name)).then(|| "`pool` is the name of a storage pool of libvirt".to_owned()),
            self.cards().iter().find_map(Card::flaw),
            self.twice().map(|mac| format!("two cards have the address {mac}")),
            word("firmware", &self.firmware, FIRMWARES),
            word("disk_bus", &self.disk_bus, BUSES),
            word("nic_model", &self.nic_model, CARDS),
        ];
        flaws.into_iter().flatten().next()
    }

    /// An address that two cards have.
    fn twice(&self) -> Option<String> {
        let known: Vec<String> = self.cards().into_iter().filter_map(|card| card.mac).map(|mac| mac.to_ascii_lowercase()).collect();
        known.iter().enumerate().find(|(n, mac)| known[..*n].contains(mac)).map(|(_, mac)| mac.clone())
    }
}

impl Card {
    fn flaw(&self) -> Option<String> {
        let flaws = [
            (self.network.is_some() && self.bridge.is_some(), "`network` and `bridge` exclude each other; give one of them"),
            (self.network.as_deref().is_some_and(|name| !is_name(name)), "`network` is a libvirt network's name, or `user`"),
            (self.bridge.as_deref().is_some_and(|name| !is_interface(name)), "`bridge` is the name of a bridge of the host"),
            (
                self.mac.as_deref().is_some_and(|mac| !is_mac(mac)),
                "`mac` is six pairs of hex digits with colons, of one host (the first pair even)",
            ),
        ];
        flaws.into_iter().find(|(is_wrong, _)| *is_wrong).map(|(_, words)| words.to_owned())
    }
}

fn is_name(name: &str) -> bool {
    let inner = name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, ' ' | '.' | '_' | '+' | '-'));
    inner && (1..=80).contains(&name.len()) && name.starts_with(|c: char| c.is_ascii_alphanumeric()) && name.trim() == name
}

fn is_interface(name: &str) -> bool {
    (1..=15).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
        && !name.starts_with('-')
}

/// Whether a text is the address of one card: six pairs of hex digits, the lowest bit of the first not set.
pub fn is_mac(text: &str) -> bool {
    let pairs: Vec<&str> = text.split(':').collect();
    let good = pairs.len() == 6 && pairs.iter().all(|pair| pair.len() == 2 && pair.bytes().all(|b| b.is_ascii_hexdigit()));
    good && u8::from_str_radix(pairs[0], 16).is_ok_and(|first| first & 1 == 0)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_wish_is_sane_or_says_what_would_be() {
        let page = r#"{"name": "web-server-01", "disk_path": "/var/lib/libvirt/images/web-server-01.qcow2", "cpu": 4, "memory_mb": 8192, "network": "default", "autostart": true}"#;
        let wish: Wish = serde_json::from_str(page).unwrap();
        assert!(wish.flaw().is_none() && wish.start && wish.autostart);
        let flawed = |change: &dyn Fn(&mut Wish)| {
            let mut wish = wish.clone();
            change(&mut wish);
            wish.flaw().unwrap_or_default()
        };
        assert!(flawed(&|wish| wish.name = "a<b".into()).contains("`name`"));
        assert!(flawed(&|wish| wish.name = "-rf".into()).contains("`name`"));
        assert!(flawed(&|wish| wish.name = format!("{PROOF}web")).contains("boot proof"));
        assert!(flawed(&|wish| wish.cpu = 0).contains("`cpu`"));
        assert!(flawed(&|wish| wish.memory_mb = 1).contains("16"));
        assert!(flawed(&|wish| wish.bridge = Some("br0".into())).contains("exclude"));
        assert!(flawed(&|wish| wish.mac = Some("53:54:00:00:00:01".into())).contains("`mac`"));
        assert!(flawed(&|wish| wish.mac = Some("52:54:00:00:00".into())).contains("`mac`"));
        let card = |mac: &str| Card { mac: Some(mac.into()), ..Card::default() };
        assert!(flawed(&|wish| wish.nics = vec![card("52:54:00:00:00:0a"), card("52:54:00:00:00:0A")]).contains("two cards"));
        assert!(flawed(&|wish| wish.nics = vec![card("odd")]).contains("`mac`"));
        assert!(flawed(&|wish| wish.nics = vec![Card::default(); MOST_CARDS]).contains("at most"));
        let addressed = Wish { nics: vec![card("52:54:00:00:00:0a"), Card::default()], ..wish.clone() };
        let addressed = addressed.with_addresses(&[Some("52:54:00:00:00:01".into()), None]);
        assert_eq!((addressed.mac.as_deref(), &addressed.nics), (Some("52:54:00:00:00:01"), &vec![Card::default(); 2]));
        assert!(flawed(&|wish| wish.firmware = Some("efi".into())).contains("uefi"));
        assert!(flawed(&|wish| wish.disk_bus = Some("nvme".into())).contains("virtio"));
        assert!(flawed(&|wish| wish.disks = vec![String::new()]).contains("empty"));
    }
}

//! A Linux guest's network interfaces: which are configured, by name or by address.
//!
//! Owns: reading what six kinds of settings say of that, and whether a name stays on other hardware. Never: brings an interface up, keeps a
//! password that stands beside. A crash here costs nothing.
//!
//! | settings | name | address |
//! |---|---|---|
//! | /etc/network/interfaces and interfaces.d | `iface` | |
//! | netplan | key of `ethernets` | `macaddress` of `match` |
//! | NetworkManager's keyfiles | `interface-name` | `mac-address` |
//! | ifcfg-* of Red Hat and SUSE | `DEVICE`, file name | `HWADDR` |
//! | systemd-networkd | `Name` of `[Match]` | `MACAddress` |
//! | udev's rules, .link files | the name that they give | the address that they give it to |

use shared::guest::Interface;

use super::clean;
use super::linux::{MAX_TEXT, setting};
use super::tree::Rooted;

/// Most files of a folder that are read, and most interfaces that are told.
const MAX_FILES: usize = 100;
const MAX_TOLD: usize = 64;

/// All that is configured. `kernel_names`: whether interfaces keep the kernel's own names.
pub fn interfaces(tree: &Rooted<'_>, kernel_names: bool) -> Vec<Interface> {
    let mut found = Vec::new();
    let files = |folder: &str, is_it: fn(&str) -> bool| {
        let entries = tree.list(folder).into_iter().filter(move |entry| !entry.is_dir && is_it(&entry.name)).take(MAX_FILES);
        let paths = entries.map(|entry| (format!("{folder}/{}", entry.name), entry.name)).collect::<Vec<_>>();
        paths.into_iter().filter_map(|(path, name)| Some((tree.text(&path, MAX_TEXT)?, path, name))).collect::<Vec<_>>()
    };
    if let Some(text) = tree.text("/etc/network/interfaces", MAX_TEXT) {
        ifupdown(&text, "/etc/network/interfaces", &mut found);
    }
    for (text, path, _) in files("/etc/network/interfaces.d", |name| !name.contains('.') || name.ends_with(".cfg")) {
        ifupdown(&text, &path, &mut found);
    }
    for (text, path, _) in files("/etc/netplan", |name| name.ends_with(".yaml") || name.ends_with(".yml")) {
        netplan(&text, &path, &mut found);
    }
    for (text, path, _) in files("/etc/NetworkManager/system-connections", |name| !name.starts_with('.')) {
        keyfile(&text, &path, &mut found);
    }
    for folder in ["/etc/sysconfig/network-scripts", "/etc/sysconfig/network"] {
        for (text, path, name) in files(folder, |name| name.starts_with("ifcfg-") && !name.ends_with('~') && !name.contains(".rpm")) {
            ifcfg(&text, &path, &name, &mut found);
        }
    }
    for (text, path, _) in files("/etc/systemd/network", |name| name.ends_with(".network")) {
        networkd(&text, &path, &mut found);
    }
    // Names that are given by address.
    let mut given: Vec<(String, String)> = Vec::new();
    for (text, ..) in files("/etc/udev/rules.d", |name| name.ends_with(".rules")) {
        given.extend(udev(&text));
    }
    for (text, ..) in files("/etc/systemd/network", |name| name.ends_with(".link")) {
        given.extend(link(&text));
    }
    found.retain(|interface| interface.name != "lo" && !(interface.name.is_empty() && interface.mac.is_empty()));
    found.truncate(MAX_TOLD);
    for interface in &mut found {
        if let Some((_, mac)) = given.iter().find(|(name, _)| *name == interface.name)
            && interface.mac.is_empty()
        {
            interface.mac.clone_from(mac);
        }
        interface.changes = interface.mac.is_empty() && changes(&interface.name, kernel_names);
    }
    found
}

/// Whether an interface of this name has another one on other hardware.
fn changes(name: &str, kernel_names: bool) -> bool {
    let is_pattern = name.contains(['*', '?', '[', '!']);
    let digit_behind = |start: &str| name.strip_prefix(start).is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()));
    match () {
        () if is_pattern || name.is_empty() => false,
        // `ens192`, `enp3s0`, `eno1`: by slot, by path, by the firmware's number.
        () if ["ens", "enp", "eno", "enP"].iter().any(|start| digit_behind(start)) => true,
        // The kernel's own, where they stay: the order may be another one, the name is there.
        () if digit_behind("eth") => !kernel_names,
        () => false,
    }
}

fn mac(text: &str) -> String {
    let mac = text.trim().trim_matches('"').trim_matches('\'').replace('-', ":").to_ascii_lowercase();
    let is_one = mac.len() == 17 && mac.split(':').all(|part| part.len() == 2 && part.bytes().all(|byte| byte.is_ascii_hexdigit()));
    if is_one { mac } else { String::new() }
}

fn interface(name: &str, address: &str, method: &str, file: &str) -> Interface {
    Interface { name: clean(name), mac: mac(address), method: method.to_owned(), file: file.to_owned(), changes: false }
}

fn ifupdown(text: &str, file: &str, found: &mut Vec<Interface>) {
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        if let ["iface", name, family, method, ..] = words.as_slice() {
            let method = if matches!(*method, "dhcp" | "auto") { "dhcp" } else { "static" };
            let is_known = found.iter().any(|known| known.name == *name && known.file == file);
            if !is_known && matches!(*family, "inet" | "inet6") {
                found.push(interface(name, "", method, file));
            }
        }
    }
}

/// YAML, as far as netplan's own examples go: blocks by indentation.
fn netplan(text: &str, file: &str, found: &mut Vec<Interface>) {
    // Indentation of `ethernets`, and of the names in it.
    let (mut section, mut names): (Option<usize>, Option<usize>) = (None, None);
    let mut given = None;
    for line in text.lines() {
        let bare = line.trim_start();
        if bare.is_empty() || bare.starts_with('#') || bare.starts_with('-') {
            continue;
        }
        let depth = line.len() - bare.len();
        let Some((key, value)) = bare.split_once(':') else { continue };
        let (key, value) = (key.trim().trim_matches('"').trim_matches('\''), value.split(" #").next().unwrap_or_default().trim());
        match section {
            Some(at) if depth <= at => (section, names) = (None, None),
            _ => {}
        }
        if section.is_none() {
            if key == "ethernets" {
                section = Some(depth);
            }
            continue;
        }
        if names.is_none_or(|at| at == depth) {
            names = Some(depth);
            found.push(interface(key, "", "static", file));
            given = None;
            continue;
        }
        let Some(last) = found.last_mut() else { continue };
        match (key, value.trim_matches('"').trim_matches('\'')) {
            ("dhcp4" | "dhcp6", "true" | "yes" | "on") => "dhcp".clone_into(&mut last.method),
            ("macaddress", value) if last.mac.is_empty() => last.mac = mac(value),
            // `match` by name: the key is only a label.
            ("name", value) => last.name = clean(value),
            ("set-name", value) => given = Some(clean(value)),
            _ => {}
        }
        if let Some(name) = given.clone().filter(|_| !last.mac.is_empty()) {
            last.name = name;
        }
    }
}

/// A value of a section of an INI.
fn ini<'t>(text: &'t str, section: &str, key: &str) -> Option<&'t str> {
    let mut is_in = false;
    for line in text.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            is_in = name.eq_ignore_ascii_case(section);
        } else if is_in
            && let Some((name, value)) = line.split_once('=')
            && name.trim().eq_ignore_ascii_case(key)
        {
            return Some(value.trim());
        }
    }
    None
}

fn keyfile(text: &str, file: &str, found: &mut Vec<Interface>) {
    let kind = ini(text, "connection", "type").unwrap_or_default();
    if !matches!(kind, "ethernet" | "802-3-ethernet") {
        return;
    }
    let name = ini(text, "connection", "interface-name").or_else(|| ini(text, "match", "interface-name")).unwrap_or_default();
    let address = ini(text, "ethernet", "mac-address").or_else(|| ini(text, "802-3-ethernet", "mac-address")).unwrap_or_default();
    let method = if ini(text, "ipv4", "method") == Some("manual") { "static" } else { "dhcp" };
    found.push(interface(name, address, method, file));
}

fn ifcfg(text: &str, file: &str, file_name: &str, found: &mut Vec<Interface>) {
    let name = setting(text, "DEVICE").or_else(|| setting(text, "NAME")).filter(|name| !name.is_empty());
    let name = name.unwrap_or_else(|| file_name.trim_start_matches("ifcfg-").to_owned());
    let method = match setting(text, "BOOTPROTO").unwrap_or_default().to_ascii_lowercase().as_str() {
        "dhcp" | "dhcp4" | "dhcp6" | "bootp" => "dhcp",
        _ => "static",
    };
    found.push(interface(&name, &setting(text, "HWADDR").unwrap_or_default(), method, file));
}

fn networkd(text: &str, file: &str, found: &mut Vec<Interface>) {
    let address = ini(text, "Match", "MACAddress").or_else(|| ini(text, "Match", "PermanentMACAddress")).unwrap_or_default();
    let dhcp = ini(text, "Network", "DHCP").unwrap_or_default().to_ascii_lowercase();
    let method = if matches!(dhcp.as_str(), "" | "no" | "false") { "static" } else { "dhcp" };
    for name in ini(text, "Match", "Name").unwrap_or_default().split_whitespace() {
        found.push(interface(name, address, method, file));
    }
    if ini(text, "Match", "Name").is_none() && !address.is_empty() {
        found.push(interface("", address, method, file));
    }
}

/// `ATTR{address}=="…", NAME="eth0"`.
fn udev(text: &str) -> Vec<(String, String)> {
    let value = |line: &str, key: &str| line.split(',').map(str::trim).find_map(|part| part.strip_prefix(key).map(str::to_owned));
    let lines = text.lines().filter(|line| !line.trim_start().starts_with('#'));
    let rules =
        lines.filter_map(|line| Some((value(line, "NAME=")?, value(line, "ATTR{address}==").or_else(|| value(line, "ATTRS{address}=="))?)));
    rules.map(|(name, address)| (clean(name.trim_matches('"')), mac(&address))).filter(|(_, mac)| !mac.is_empty()).collect()
}

fn link(text: &str) -> Option<(String, String)> {
    let address = ini(text, "Match", "MACAddress").or_else(|| ini(text, "Match", "PermanentMACAddress"))?;
    let name = ini(text, "Link", "Name")?;
    Some((clean(name), mac(address))).filter(|(_, mac)| !mac.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(found: &[Interface]) -> Vec<(&str, &str, &str)> {
        found.iter().map(|interface| (interface.name.as_str(), interface.mac.as_str(), interface.method.as_str())).collect()
    }

    #[test]
    fn each_kind_of_settings_is_read() {
        let mut found = Vec::new();
        ifupdown(
            "auto lo\niface lo inet loopback\nallow-hotplug ens192\niface ens192 inet dhcp\niface ens192 inet6 auto\n",
            "f",
            &mut found,
        );
        assert_eq!(told(&found), [("lo", "", "static"), ("ens192", "", "dhcp")]);

        found.clear();
        let plan = "network:\n  version: 2\n  ethernets:\n    ens160:\n      dhcp4: true\n    all:\n      match:\n        macaddress: \"00:50:56:AB:cd:ef\"\n      \
            set-name: lan0\n      addresses: [10.0.0.2/24]\n      nameservers:\n        addresses:\n          - 10.0.0.1\n    pattern:\n      match: \n        name: en*\n  \
            bonds:\n    bond0:\n      macaddress: 00:00:00:00:00:01\n";
        netplan(plan, "f", &mut found);
        assert_eq!(told(&found), [("ens160", "", "dhcp"), ("lan0", "00:50:56:ab:cd:ef", "static"), ("en*", "", "static")]);

        found.clear();
        keyfile(
            "[connection]\nid=a\ntype=ethernet\ninterface-name=ens33\n[ethernet]\nmac-address=00:50:56:00:00:01\n[ipv4]\nmethod=manual\n",
            "f",
            &mut found,
        );
        keyfile("[connection]\ntype=wifi\ninterface-name=wlan0\n[wifi-security]\npsk=secret\n", "f", &mut found);
        assert_eq!(told(&found), [("ens33", "00:50:56:00:00:01", "static")]);

        found.clear();
        ifcfg("TYPE=Ethernet\nBOOTPROTO=\"dhcp\"\nDEVICE=eth0\nHWADDR=00-50-56-00-00-02\n", "f", "ifcfg-eth0", &mut found);
        ifcfg("BOOTPROTO='static'\n", "f", "ifcfg-eth1", &mut found);
        assert_eq!(told(&found), [("eth0", "00:50:56:00:00:02", "dhcp"), ("eth1", "", "static")]);

        found.clear();
        networkd("[Match]\nName=ens* eth0\n[Network]\nDHCP=ipv4\n", "f", &mut found);
        networkd("[Match]\nMACAddress=00:50:56:00:00:03\n[Network]\nAddress=10.0.0.1/8\n", "f", &mut found);
        assert_eq!(told(&found), [("ens*", "", "dhcp"), ("eth0", "", "dhcp"), ("", "00:50:56:00:00:03", "static")]);
        let rule = "SUBSYSTEM==\"net\", ACTION==\"add\", ATTR{address}==\"00:50:56:00:00:04\", ATTR{type}==\"1\", NAME=\"eth7\"\n";
        assert_eq!(udev(rule), [("eth7".to_owned(), "00:50:56:00:00:04".to_owned())]);
        assert_eq!(
            link("[Match]\nMACAddress=00:50:56:00:00:05\n[Link]\nName=lan\n"),
            Some(("lan".to_owned(), "00:50:56:00:00:05".to_owned()))
        );
    }

    #[test]
    fn names_by_slot_change_and_patterns_stay() {
        for (name, kernel_names, expected) in [
            ("ens192", false, true),
            ("enp3s0", false, true),
            ("eno1", true, true),
            ("eth0", false, true),
            ("eth0", true, false),
            ("en*", false, false),
            ("lan0", false, false),
            ("bond0", false, false),
            ("ens", false, false),
        ] {
            assert_eq!(changes(name, kernel_names), expected, "{name}");
        }
        for bad in ["", "00:50:56", "00:50:56:00:00:0g", "00:50:56:00:00:000"] {
            assert_eq!(mac(bad), "");
        }
    }
}

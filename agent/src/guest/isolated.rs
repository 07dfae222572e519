//! The network of a proof: nobody is on it but the guest and this host, and nothing leads out of it.
//!
//! Owns: its description, a subnet that nobody uses, the guest's lease, and whether the guest answers an echo request.
//! Never: forwards, resolves names, touches a network of somebody else's. A crash here leaves a network that the ledger names.
//! Source: libvirt, Network XML format (formatnetwork); RFC 792 (echo).

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, ipproto, sockopt};

use shared::vault::{self, Dir};

use crate::exec;
use crate::sources::libvirt::virsh::Uri;

/// How often another subnet is tried where one turns out to be somebody's.
const TRIES: usize = 3;
/// How often a subnet is drawn.
const DRAWS: usize = 256;
/// The host's routes.
const ROUTES: &str = "/proc/net/route";

/// Addresses with a mask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Net {
    address: u32,
    mask: u32,
}

impl Net {
    fn meets(self, other: Net) -> bool {
        let mask = self.mask & other.mask;
        self.address & mask == other.address & mask
    }
}

/// The host's routes but for the default one. The kernel writes addresses as they lie in memory.
fn routes(table: &str) -> Vec<Net> {
    let net = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let number = |n: usize| u32::from_str_radix(words.get(n)?, 16).ok().map(u32::swap_bytes);
        Some(Net { address: number(1)?, mask: number(7)? })
    };
    table.lines().skip(1).filter_map(net).filter(|net| net.mask != 0).collect()
}

/// The subnets in a network's description.
fn subnets(xml: &str) -> Vec<Net> {
    let Ok(document) = roxmltree::Document::parse(xml) else { return Vec::new() };
    let net = |ip: roxmltree::Node| {
        let address: Ipv4Addr = ip.attribute("address")?.parse().ok()?;
        let mask = match (ip.attribute("netmask"), ip.attribute("prefix")) {
            (Some(mask), _) => u32::from(mask.parse::<Ipv4Addr>().ok()?),
            (None, Some(prefix)) => u32::MAX.checked_shl(32 - prefix.parse::<u32>().ok().filter(|prefix| *prefix <= 32)?).unwrap_or(0),
            (None, None) => 0xff00_0000,
        };
        Some(Net { address: u32::from(address), mask })
    };
    document.descendants().filter(|node| node.has_tag_name("ip")).filter_map(net).collect()
}

/// A subnet of 256 addresses in 10/8 that meets none of the others, the first that `draw` gives.
fn free(taken: &[Net], mut draw: impl FnMut() -> [u8; 2]) -> Option<[u8; 3]> {
    (0..DRAWS).find_map(|_| {
        let [a, b] = draw();
        let net = Net { address: u32::from_be_bytes([10, a, b, 0]), mask: 0xffff_ff00 };
        taken.iter().all(|other| !other.meets(net)).then_some([10, a, b])
    })
}

fn description(name: &str, uuid: &str, bridge: &str, [a, b, c]: [u8; 3]) -> String {
    // No `forward`: packets go nowhere. No names: nothing is asked for abroad.
    format!(
        "<network><name>{name}</name><uuid>{uuid}</uuid><bridge name='{bridge}' stp='off' delay='0'/><dns enable='no'/>\
         <ip address='{a}.{b}.{c}.1' netmask='255.255.255.0'><dhcp><range start='{a}.{b}.{c}.2' end='{a}.{b}.{c}.254'/></dhcp></ip></network>"
    )
}

/// Makes a network that is gone when the host restarts. Its description is left in `folder`, which is `path`, for virsh to read. Its name must
/// be of letters, digits and `-`.
pub fn create(uri: &Uri, name: &str, uuid: &str, folder: &Dir, path: &Path) -> Result<(), exec::Error> {
    const FILE: &str = "network.xml";
    let ours = |e: io::Error| exec::Error::Failed(format!("a network's description cannot be written: {e}"));
    let path = path.join(FILE).display().to_string();
    let mut last = exec::Error::Failed("no subnet of 10.0.0.0/8 is free".to_owned());
    for _ in 0..TRIES {
        let table = vault::read_config(Path::new(ROUTES)).unwrap_or_default();
        let mut taken = routes(&String::from_utf8_lossy(&table));
        for network in uri.ask(&["net-list", "--all", "--uuid"])?.lines().map(str::trim).filter(|line| !line.is_empty()) {
            // One that goes meanwhile takes nothing.
            taken.extend(subnets(&uri.ask(&["net-dumpxml", network]).unwrap_or_default()));
        }
        let draw = || hex::decode(shared::ids::random_hex::<2>()).ok().and_then(|pair| pair.try_into().ok()).unwrap_or([0, 0]);
        let Some(subnet) = free(&taken, draw) else { return Err(last) };
        // 15 characters at most.
        let bridge = format!("hsdk{}", shared::ids::random_hex::<4>());
        vault::write_whole(folder, FILE, description(name, uuid, &bridge, subnet).as_bytes()).map_err(ours)?;
        match uri.ask(&["net-create", &path]) {
            Ok(_) => return Ok(()),
            // Somebody was quicker.
            Err(exec::Error::Failed(words)) if words.contains("already in use") => last = exec::Error::Failed(words),
            Err(e) => return Err(e),
        }
    }
    Err(last)
}

/// The address that a card has by DHCP.
pub fn lease(uri: &Uri, network: &str, mac: &str) -> Option<Ipv4Addr> {
    address_of(&uri.ask(&["net-dhcp-leases", network, "--mac", mac]).ok()?, mac)
}

fn address_of(leases: &str, mac: &str) -> Option<Ipv4Addr> {
    let line = leases.lines().rfind(|line| line.to_ascii_lowercase().contains(&mac.to_ascii_lowercase()))?;
    line.split_whitespace().find_map(|word| word.split_once('/')?.0.parse().ok())
}

/// Whether it answers an echo request within `time`.
///
/// # Errors
/// Where this process may send none.
pub fn answers(address: Ipv4Addr, time: Duration) -> io::Result<bool> {
    const REQUEST: u8 = 8;
    // A socket for echo alone, which the kernel may give to everybody, else a raw one.
    let open = |kind| rustix::net::socket_with(AddressFamily::INET, kind, SocketFlags::CLOEXEC, Some(ipproto::ICMP));
    let socket = open(SocketType::DGRAM).or_else(|_| open(SocketType::RAW))?;
    let token = shared::ids::random_hex::<8>();
    let mut packet = vec![REQUEST, 0, 0, 0, 0x48, 0x53, 0, 1];
    packet.extend_from_slice(token.as_bytes());
    let sum = checksum(&packet);
    packet[2..4].copy_from_slice(&sum.to_be_bytes());
    match rustix::net::sendto(&socket, &packet, SendFlags::empty(), &SocketAddrV4::new(address, 0)) {
        // Nobody there yet, or no such route: that is an answer, too.
        Err(rustix::io::Errno::HOSTUNREACH | rustix::io::Errno::NETUNREACH) => return Ok(false),
        sent => sent?,
    };
    let end = Instant::now() + time;
    let mut buf = [0u8; 2048];
    loop {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(false);
        }
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(left))?;
        match rustix::net::recv(&socket, &mut buf, RecvFlags::empty()) {
            Ok((count, _)) if is_reply(&buf[..count], token.as_bytes()) => return Ok(true),
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::HOSTUNREACH | rustix::io::Errno::NETUNREACH) => return Ok(false),
            Err(e) => return Err(e.into()),
        }
    }
}

/// Whether a packet is the answer that carries these bytes: bare, or behind an IPv4 header.
fn is_reply(packet: &[u8], token: &[u8]) -> bool {
    const REPLY: u8 = 0;
    let header = match packet.first() {
        Some(first) if first >> 4 == 4 => usize::from(first & 15) * 4,
        _ => 0,
    };
    let icmp = packet.get(header..).unwrap_or_default();
    icmp.first() == Some(&REPLY) && icmp.get(8..) == Some(token)
}

/// The Internet's checksum (RFC 1071).
fn checksum(bytes: &[u8]) -> u16 {
    let word = |pair: &[u8]| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0));
    let mut sum: u32 = bytes.chunks(2).map(word).sum();
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(u16::MAX)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_subnet_is_nobodys() {
        let table = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n\
                     eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n\
                     eth0\t0000400A\t00000000\t0001\t0\t0\t0\t0000C0FF\t0\t0\t0\n";
        let mut taken = routes(table);
        // 10.64.0.0/10; the default route takes nothing.
        assert_eq!(taken, [Net { address: 0x0a40_0000, mask: 0xffc0_0000 }]);
        taken.extend(subnets("<network><ip address='10.0.7.1' netmask='255.255.255.0'/><ip family='ipv6' address='fd00::1' prefix='64'/><ip address='10.9.0.1' prefix='16'/></network>"));
        assert_eq!(taken.len(), 3);
        let mut draws = [[64, 1], [127, 255], [0, 7], [9, 200], [0, 8]].into_iter();
        assert_eq!(free(&taken, || draws.next().unwrap()), Some([10, 0, 8]));
        assert_eq!(free(&[Net { address: 0x0a00_0000, mask: 0xff00_0000 }], || [1, 1]), None);
        let xml = description("n", "u", "b", [10, 0, 8]);
        assert!(roxmltree::Document::parse(&xml).is_ok() && !xml.contains("forward") && xml.contains("end='10.0.8.254'"), "{xml}");
        assert!(subnets(&xml)[0].meets(Net { address: 0x0a00_0800, mask: 0xffff_ff00 }));
    }

    #[test]
    fn an_address_is_what_libvirt_says() {
        let leases = " 2026-11-26 18:58:57   52:54:00:AA:bb:01   ipv4       10.3.4.5/24   migguest   ff:00\n";
        assert_eq!(address_of(leases, "52:54:00:aa:bb:01"), Some(Ipv4Addr::new(10, 3, 4, 5)));
        assert_eq!(address_of("", "52:54:00:aa:bb:01"), None);
    }

    #[test]
    fn this_host_answers_and_nobody_else_does_for_it() {
        assert_eq!(checksum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]), !0xddf2);
        match answers(Ipv4Addr::LOCALHOST, Duration::from_secs(2)) {
            Ok(answered) => assert!(answered),
            // Who may send none is told so.
            Err(e) => assert!(matches!(e.kind(), io::ErrorKind::PermissionDenied), "{e}"),
        }
        let token = b"0123456789abcdef";
        let reply = [&[0, 0, 1, 2, 0, 0, 0, 1], token.as_slice()].concat();
        let with_header = [&[0x45u8; 20], reply.as_slice()].concat();
        assert!(is_reply(&reply, token) && is_reply(&with_header, token));
        // Our own request comes by, too, on a raw socket at home.
        let request = [&[8, 0, 1, 2, 0, 0, 0, 1], token.as_slice()].concat();
        assert!(!is_reply(&request, token) && !is_reply(&reply[..20], token) && !is_reply(&[], token) && !is_reply(&[0x4f], token));
    }
}

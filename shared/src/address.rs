//! Addresses that no process of ours connects to, whoever asked for it.
//!
//! Owns: the rule. Never: resolves a name: a dialer asks for each address that a name has, at the moment of dialling. A crash here costs one call.

use std::net::{IpAddr, Ipv4Addr};

/// Whether an address is link-local, which the clouds' metadata services are, or one of theirs elsewhere.
pub fn is_metadata(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(v4) => v4.is_link_local() || v4 == Ipv4Addr::new(100, 100, 100, 200),
        IpAddr::V6(v6) => (v6.segments()[0] & 0xffc0) == 0xfe80 || v6.segments()[..3] == [0xfd00, 0x0ec2, 0],
    }
}

/// Whether an address may be connected to where an operator or an admin named it: one host, and not a metadata service.
pub fn may_be_dialled(address: IpAddr) -> bool {
    let address = address.to_canonical();
    !is_metadata(address) && !address.is_unspecified() && !address.is_multicast()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn nothing_near_the_metadata_services_is_dialled() {
        for good in ["10.0.0.7", "127.0.0.1", "8.8.8.8", "2001:db8::1", "fd12::1"] {
            assert!(may_be_dialled(good.parse().unwrap()), "{good}");
        }
        for bad in [
            "169.254.169.254",
            "100.100.100.200",
            "fe80::1",
            "fd00:ec2::254",
            "0.0.0.0",
            "::",
            "::ffff:169.254.1.1",
            "224.0.0.1",
            "ff02::1",
        ] {
            assert!(!may_be_dialled(bad.parse().unwrap()), "{bad}");
        }
    }
}

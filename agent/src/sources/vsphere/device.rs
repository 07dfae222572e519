//! Where a disk hangs in a VM, in the words of its configuration and of an export lease.
//!
//! Owns: which of a lease's devices is which of a VM's disks. Never: guesses by order or size: two disks of one size that were swapped would
//! pass every later check. A crash here costs one look at a lease.
//! Source: vSphere Web Services API, HttpNfcLeaseDeviceUrl (`key`: "identifies the device within the VM"); as servers tell it:
//! `/vm-57/ParaVirtualSCSIController0:1`, the controller's type and bus number and the disk's unit.

/// Where a disk hangs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seat {
    /// The controller's type, `VirtualLsiLogicController`; empty where it is not known.
    pub controller: String,
    /// The controller's bus.
    pub bus: u64,
    /// The unit at that bus; none where it is not said, and then nothing is matched by it.
    pub unit: Option<u64>,
    /// The device's key.
    pub key: u64,
}

impl Seat {
    /// Whether a lease's key names this seat.
    fn is_named_by(&self, key: &str) -> bool {
        let last = key.rsplit('/').next().unwrap_or_default();
        match last.rsplit_once(':') {
            Some(("VirtualDisk", number)) => number.parse() == Ok(self.key),
            Some((controller, unit)) => {
                let digits = controller.trim_end_matches(|c: char| c.is_ascii_digit()).len();
                let (kind, bus) = controller.split_at(digits);
                !kind.is_empty()
                    && kind == self.controller
                    && bus.parse() == Ok(self.bus)
                    && unit.parse().ok() == self.unit
                    && self.unit.is_some()
            }
            None => false,
        }
    }
}

/// Whether a lease's key may be a disk's, for servers that do not say it.
pub fn may_be_disk(key: &str) -> bool {
    let last = key.rsplit('/').next().unwrap_or_default();
    last.rsplit_once(':').is_some_and(|(kind, unit)| (kind == "VirtualDisk" || kind.contains("Controller")) && unit.parse::<u64>().is_ok())
}

/// For each seat the place of its key among `keys`: each seat has exactly one, and none is left over. A single disk is the single device,
/// whatever its key is.
pub fn places(seats: &[Seat], keys: &[&str]) -> Option<Vec<usize>> {
    if seats.len() != keys.len() {
        return None;
    }
    if seats.len() == 1 {
        return Some(vec![0]);
    }
    let mut is_taken = vec![false; keys.len()];
    let mut found = Vec::with_capacity(seats.len());
    for seat in seats {
        let mut named = (0..keys.len()).filter(|place| seat.is_named_by(keys[*place]));
        let (Some(place), None) = (named.next(), named.next()) else { return None };
        if std::mem::replace(&mut is_taken[place], true) {
            return None;
        }
        found.push(place);
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seat(controller: &str, bus: u64, unit: u64, key: u64) -> Seat {
        Seat { controller: controller.to_owned(), bus, unit: Some(unit), key }
    }

    #[test]
    fn a_disk_is_found_by_controller_bus_and_unit() {
        let seats = [
            seat("VirtualLsiLogicController", 0, 1, 2001),
            seat("ParaVirtualSCSIController", 1, 0, 2016),
            seat("VirtualIDEController", 1, 0, 3002),
            seat("VirtualNVMEController", 0, 0, 31000),
        ];
        let real = [
            "/vm-57/VirtualIDEController1:0",
            "/vm-57/VirtualNVMEController0:0",
            "/vm-57/VirtualLsiLogicController0:1",
            "/vm-57/ParaVirtualSCSIController1:0",
        ];
        assert_eq!(places(&seats, &real), Some(vec![2, 3, 0, 1]));
        let by_key = ["/57/VirtualDisk:31000", "/57/VirtualDisk:2016", "/57/VirtualDisk:3002", "/57/VirtualDisk:2001"];
        assert_eq!(places(&seats, &by_key), Some(vec![3, 1, 2, 0]));
        // A VM's name stands in some keys.
        assert_eq!(places(&seats[..2], &["/a/b:1/ParaVirtualSCSIController1:0", "/x/VirtualLsiLogicController0:1"]), Some(vec![1, 0]));
    }

    #[test]
    fn what_is_in_doubt_is_not_matched() {
        let seats = [seat("ParaVirtualSCSIController", 0, 0, 2000), seat("ParaVirtualSCSIController", 2, 0, 2032)];
        for keys in [
            // Controllers counted in their order instead of by their bus.
            vec!["/v/ParaVirtualSCSIController0:0", "/v/ParaVirtualSCSIController1:0"],
            vec!["/v/ParaVirtualSCSIController0:0", "/v/ParaVirtualSCSIController0:0"],
            vec!["/v/ParaVirtualSCSIController0:0", "/v/ParaVirtualSCSIController2:1"],
            vec!["/v/ParaVirtualSCSIController:0", "/v/ParaVirtualSCSIController2:0"],
            vec!["/v/VirtualLsiLogicController0:0", "/v/ParaVirtualSCSIController2:0"],
            vec!["disk-0.vmdk", "disk-1.vmdk"],
            vec!["", ""],
            vec!["/v/ParaVirtualSCSIController0:0"],
        ] {
            assert_eq!(places(&seats, &keys), None, "{keys:?}");
        }
        // Two seats that look the same are two guesses.
        let twice = [seat("X", 0, 0, 1), seat("X", 0, 0, 2)];
        assert_eq!(places(&twice, &["/v/X0:0", "/v/X0:1"]), None);
        let nowhere = [Seat { unit: None, ..seat("X", 0, 0, 1) }, seat("X", 0, 1, 2)];
        assert_eq!(places(&nowhere, &["/v/X0:0", "/v/X0:1"]), None);
        assert_eq!(places(&seats[..1], &["whatever"]), Some(vec![0]));
    }

    #[test]
    fn what_is_no_disk_is_known_where_the_server_does_not_say() {
        assert!(may_be_disk("/vm-57/VirtualAHCIController0:2") && may_be_disk("/1/VirtualDisk:2000"));
        assert!(!may_be_disk("/vm-57/nvram") && !may_be_disk("") && !may_be_disk("/vm-57/VirtualCdrom:x"));
    }
}

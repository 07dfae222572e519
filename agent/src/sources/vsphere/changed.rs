//! Changed blocks: what a server says was written to a disk since an earlier snapshot.
//!
//! ```text
//! tracking on ─► snapshot: each disk gets a change id `UUID/N` ─► QueryChangedDiskAreas(snapshot, disk, id of the earlier one) ─► areas
//! ```
//! Owns: which answers count. An id of another sequence, one that went back, a size that changed, an answer with a gap or of areas outside
//! the disk: unknown, never "nothing changed". Never: reads a disk, makes or removes a snapshot. A crash here costs nothing.
//! Source: vSphere Web Services API, VirtualMachine.QueryChangedDiskAreas, DiskChangeInfo, VirtualDiskFlatVer2BackingInfo.changeId.

use super::client::{CALL, Client, Error};
use super::collect::{self, property, property_text};
use super::wire::{self, Fault, MoRef, child, children, number, quote, text, type_of};
use crate::formats::Extent;
use crate::formats::over::tidy;
use crate::sources::Areas;

/// Most areas of a disk: more than a server gives for 16 TiB in pieces of 1 MiB.
const MOST: usize = 16 << 20;

/// A disk as a snapshot froze it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FrozenDisk {
    /// The device's key.
    pub key: u64,
    /// The file that does not change as long as the snapshot is there.
    pub file: String,
    /// Its state's name; none where changes are not tracked.
    pub change_id: Option<String>,
}

/// Whether the server tracks the changes of a VM.
pub async fn is_tracking(client: &Client, vm: &str) -> Result<bool, Error> {
    let this = MoRef::new("VirtualMachine", vm);
    client
        .within(async |session| {
            let mut tracking = false;
            collect::one(client, session, &this, &["config.changeTrackingEnabled"], |_, object| {
                tracking = property_text(object, "config.changeTrackingEnabled") == "true";
            })
            .await?;
            Ok(tracking)
        })
        .await
}

/// Switches the tracking on or off. It counts from the next snapshot on.
pub async fn track(client: &Client, vm: &str, on: bool) -> Result<(), Error> {
    let this = MoRef::new("VirtualMachine", vm);
    let body = format!("<spec><changeTrackingEnabled>{on}</changeTrackingEnabled></spec>");
    let session = client.session().await?;
    let done = match client.call(&session, "ReconfigVM_Task", &this, &body, CALL).await {
        Ok(answer) => super::snapshot::finished(client, &collect::returned(&answer, "ReconfigVM_Task")?).await,
        Err(e) => Err(e),
    };
    match done {
        Err(Error::Fault(Fault::ManagedObjectNotFound)) if !on => Ok(()),
        // What was said or not said: it is on or it is not.
        Err(e) if e.is_passing() && is_tracking(client, vm).await? == on => Ok(()),
        done => done,
    }
}

/// The disks of a snapshot.
pub async fn disks(client: &Client, snapshot: &MoRef) -> Result<Vec<FrozenDisk>, Error> {
    client
        .within(async |session| {
            let mut disks = Vec::new();
            collect::one(client, session, snapshot, &["config.hardware"], |_, object| {
                let hardware = property(object, "config.hardware");
                let devices = hardware.into_iter().flat_map(|hardware| children(hardware, "device"));
                for device in devices.filter(|device| type_of(*device) == "VirtualDisk") {
                    let Some(backing) = child(device, "backing") else { continue };
                    let change_id = Some(text(backing, "changeId")).filter(|id| !id.is_empty()).map(str::to_owned);
                    let key = number(device, "key").unwrap_or_default();
                    disks.push(FrozenDisk { key, file: text(backing, "fileName").to_owned(), change_id });
                }
            })
            .await?;
            Ok(disks)
        })
        .await
}

/// A change id's sequence and its number in it: `52 de … 8c/17`.
fn parts(id: &str) -> Option<(&str, u64)> {
    let (sequence, number) = id.rsplit_once('/')?;
    number.trim().parse().ok().map(|number| (sequence, number))
}

/// Why what changed between two states cannot be asked for; none where it can.
pub fn obstacle(before: Option<&str>, now: Option<&str>) -> Option<String> {
    let (Some(before), Some(now)) = (before, now) else {
        return Some("the server does not track its changes, or did not then".to_owned());
    };
    match (parts(before), parts(now)) {
        (Some((old, _)), Some((new, _))) if old != new => Some("the tracking of changes was reset since (another sequence)".to_owned()),
        // Each snapshot gets a new number.
        (Some((_, old)), Some((_, new))) if new <= old => {
            Some(format!("the tracking of changes went back from {old} to {new}: the VM was reverted to an earlier state"))
        }
        (Some(_), Some(_)) => None,
        _ => Some(format!("its change ids cannot be read: {before:?}, {now:?}")),
    }
}

/// What was written to a disk between `since` and the snapshot, or with `*` all that holds data. A refusal of the server is an answer:
/// unknown, with the reason.
pub async fn areas(client: &Client, vm: &str, snapshot: &MoRef, key: u64, capacity: u64, since: &str) -> Result<Areas, Error> {
    let this = MoRef::new("VirtualMachine", vm);
    let (mut found, mut at) = (Vec::new(), 0u64);
    while at < capacity {
        let body = format!(
            "<snapshot type=\"VirtualMachineSnapshot\">{}</snapshot><deviceKey>{key}</deviceKey><startOffset>{at}</startOffset><changeId>{}</changeId>",
            quote(&snapshot.value),
            quote(since)
        );
        let method = "QueryChangedDiskAreas";
        let asked = client.within(async |session| client.call(session, method, &this, &body, super::client::PAGE).await).await;
        let answer = match asked {
            Ok(answer) => answer,
            Err(Error::Fault(Fault::NotAuthenticated)) => return Err(Error::Fault(Fault::NotAuthenticated)),
            Err(Error::Fault(fault)) => return Ok(Areas::Unknown(format!("the server does not say what changed: {fault}"))),
            Err(e) => return Err(e),
        };
        let document = wire::parse(&answer).map_err(Error::Odd)?;
        match page(wire::response(&document, method)?, at, capacity, &mut found) {
            Ok(next) => at = next,
            Err(reason) => return Ok(Areas::Unknown(reason)),
        }
        if found.len() > MOST {
            return Ok(Areas::Unknown(format!("the server names over {MOST} areas")));
        }
    }
    let areas = tidy(found, capacity);
    Ok(if since == "*" { Areas::Allocated(areas) } else { Areas::Changed(areas) })
}

/// Takes one answer's areas; where the next question begins.
fn page(response: roxmltree::Node, from: u64, capacity: u64, found: &mut Vec<Extent>) -> Result<u64, String> {
    let info = child(response, "returnval").ok_or("the server gave no areas")?;
    let told = |name: &'static str| number::<u64>(info, name).ok_or_else(|| format!("the server's areas have no {name}"));
    let (start, length) = (told("startOffset")?, told("length")?);
    let end = start.checked_add(length).filter(|end| start <= from && *end > from);
    let end = end.ok_or_else(|| format!("the server told of {start}+{length}, asked from {from}: something is left out"))?;
    for area in children(info, "changedArea") {
        let whole = number::<u64>(area, "start").zip(number::<u64>(area, "length"));
        let (start, length) = whole.ok_or("the server named an area without a start or a length")?;
        if start.checked_add(length).is_none_or(|end| end > capacity) {
            return Err(format!("the server named an area {start}+{length} of a disk of {capacity} bytes"));
        }
        found.push(Extent { offset: start, len: length });
    }
    Ok(end.min(capacity))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_surely_known_is_unknown() {
        assert_eq!(obstacle(Some("52 aa/4"), Some("52 aa/17")), None);
        for (before, now, word) in [
            (None, Some("52 aa/4"), "does not track"),
            (Some("52 aa/4"), None, "does not track"),
            (Some("52 aa/4"), Some("52 bb/9"), "reset"),
            (Some("52 aa/9"), Some("52 aa/4"), "went back"),
            (Some("52 aa/4"), Some("52 aa/4"), "went back"),
            (Some("52 aa"), Some("52 aa/4"), "cannot be read"),
            (Some("*"), Some("52 aa/4"), "cannot be read"),
        ] {
            let reason = obstacle(before, now).unwrap();
            assert!(reason.contains(word), "{before:?} {now:?}: {reason}");
        }
    }

    #[test]
    fn an_answer_with_a_gap_is_no_answer() {
        let answer = |inside: &str| {
            let text = format!("<r xmlns=\"urn:vim25\"><returnval>{inside}</returnval></r>");
            let document = wire::parse(&text).unwrap();
            let mut found = Vec::new();
            page(document.root_element(), 100, 1000, &mut found).map(|next| (next, found))
        };
        let area = |start: u64, length: u64| format!("<changedArea><start>{start}</start><length>{length}</length></changedArea>");
        let told = |start: u64, length: u64| format!("<startOffset>{start}</startOffset><length>{length}</length>");
        let good = answer(&(told(100, 400) + &area(100, 10) + &area(300, 20))).unwrap();
        assert_eq!(good, (500, vec![Extent { offset: 100, len: 10 }, Extent { offset: 300, len: 20 }]));
        assert_eq!(answer(&told(0, 4000)).unwrap(), (1000, vec![]));
        for bad in [
            told(200, 400),
            told(100, 0),
            told(0, 100),
            told(100, u64::MAX),
            "<startOffset>100</startOffset>".to_owned(),
            told(100, 900) + &area(990, 11),
            told(100, 900) + &area(u64::MAX, 11),
            told(100, 900) + "<changedArea><start>5</start></changedArea>",
        ] {
            assert!(answer(&bad).is_err(), "{bad}");
        }
    }
}

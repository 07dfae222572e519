//! Snapshots of VMs: what a list shows, and what may be wished for.
//!
//! Owns: the shape of what agents tell, what a sane name is, and which snapshots lie above another. Never: knows a hypervisor; is stored: it is
//! asked when somebody wants it. A crash here costs nothing.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

/// Most characters of a name.
const LONGEST_NAME: usize = 80;
/// Most bytes of a name: QEMU keeps 255.
const MOST_NAME: usize = 200;
/// Most characters of a description.
const LONGEST_DESCRIPTION: usize = 1000;
/// How the names of snapshots begin that jobs make and remove themselves.
pub const OURS: &str = "hypersdk-";

/// One snapshot, in the words of `details::SnapshotNode`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Snapshot {
    /// The provider's own id. At libvirt that is the name.
    pub id: String,
    /// Its name; several of a VM may bear it at vSphere.
    pub name: String,
    /// What its maker wrote.
    pub description: String,
    /// RFC 3339, by the provider's clock.
    pub created_at: String,
    /// The VM's power state when it was taken: `poweredOn`, `poweredOff`, `suspended`.
    pub power_state: String,
    /// Whether it holds the memory as well; nothing where the provider does not say.
    pub memory: Option<bool>,
    /// Whether the guest calmed its file systems for it; nothing where the provider does not say.
    pub quiesced: Option<bool>,
    /// The id of the one that it was taken over.
    pub parent: Option<String>,
    /// Whether the VM goes on from here.
    pub current: bool,
    /// `internal` or `external` at libvirt; nothing elsewhere.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
}

/// A snapshot that is wished for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wish {
    /// Its name; one that the VM has is refused.
    pub name: String,
    /// For people.
    pub description: String,
    /// With what the memory holds.
    pub memory: bool,
    /// With the guest's file systems calmed.
    pub quiesce: bool,
}

impl Wish {
    /// What is wrong with it whoever it is for, in a sentence that says what would be right.
    pub fn flaw(&self) -> Option<String> {
        if self.name.starts_with(OURS) {
            return Some(format!("`name` must not begin with {OURS}: so are snapshots called that jobs make and remove themselves"));
        }
        if !is_name(&self.name) {
            return Some(format!(
                "`name` must be 1 to {LONGEST_NAME} characters (at most {MOST_NAME} bytes), not digits alone and not `snapshot-` with digits (an id \
                 of vSphere), without control characters, `/`, `\\`, `\"` and `%`, not beginning with `.` or `-`, and neither beginning nor \
                 ending with a blank"
            ));
        }
        // XML has no way to write the last two.
        let is_odd = |c: char| c.is_control() && !matches!(c, '\n' | '\t') || matches!(c, '\u{fffe}' | '\u{ffff}');
        if self.description.chars().count() > LONGEST_DESCRIPTION || self.description.chars().any(is_odd) {
            return Some(format!(
                "`description` must be at most {LONGEST_DESCRIPTION} characters without control characters but line ends and tabs"
            ));
        }
        (self.memory && self.quiesce).then(|| {
            "`memory` and `quiesce` exclude each other: a snapshot with the memory holds what the guest has not written yet".to_owned()
        })
    }
}

/// `/`, `\` and `%` are other characters in a vSphere name; libvirt says that it has made a snapshot with `"` or `\` in its name of a running
/// domain, and QEMU has not; QEMU takes digits alone for an id.
fn is_name(name: &str) -> bool {
    let count = name.chars().count();
    let is_bad = |c: char| c.is_control() || matches!(c, '/' | '\\' | '"' | '%' | '\u{fffe}' | '\u{ffff}');
    (1..=LONGEST_NAME).contains(&count)
        && name.len() <= MOST_NAME
        && !name.chars().any(is_bad)
        && !name.strip_prefix("snapshot-").unwrap_or(name).bytes().all(|byte| byte.is_ascii_digit())
        && !name.starts_with(['.', '-'])
        && name.trim() == name
}

/// The job whose temporary snapshot bears this name: `hypersdk-…JOB-HEX`.
pub fn job_of(name: &str) -> Option<&str> {
    let (before, _) = name.strip_prefix(OURS)?.rsplit_once('-')?;
    let job = &before[before.rfind("job-")?..];
    job.parse::<crate::ids::JobId>().is_ok().then_some(job)
}

/// Finds the one that is meant, by its id or by a name that it alone bears. Several, one of which may be called as another's id is: their ids.
pub fn find<'a>(all: &'a [Snapshot], wanted: &str) -> Result<Option<&'a Snapshot>, Vec<String>> {
    let named: Vec<&Snapshot> = all.iter().filter(|snapshot| snapshot.id == wanted || snapshot.name == wanted).collect();
    match named.as_slice() {
        [] => Ok(None),
        [one] => Ok(Some(one)),
        several => Err(several.iter().map(|snapshot| snapshot.id.clone()).collect()),
    }
}

/// The ids of a snapshot and of all that were taken over it.
pub fn with_those_above(all: &[Snapshot], id: &str) -> BTreeSet<String> {
    let mut above: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for snapshot in all {
        if let Some(parent) = &snapshot.parent {
            above.entry(parent).or_default().push(&snapshot.id);
        }
    }
    let (mut found, mut open) = (BTreeSet::new(), vec![id]);
    while let Some(id) = open.pop() {
        if found.insert(id.to_owned()) {
            open.extend(above.get(id).into_iter().flatten());
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wish(name: &str) -> Wish {
        Wish { name: name.to_owned(), ..Wish::default() }
    }

    #[test]
    fn a_name_is_one_that_every_hypervisor_keeps_as_it_is() {
        for good in [
            "a",
            "snapshot-a",
            "before the update",
            "Vor dem Umzug, 3. März (Büro) #2 & <x> 'y' ?=+;",
            "2026-01-02",
            "ünï",
            &"a".repeat(80),
        ] {
            assert_eq!(wish(good).flaw(), None, "{good}");
        }
        for bad in [
            "",
            " a",
            "a ",
            "17",
            "a/b",
            "a\\b",
            "a\"b",
            "50% a",
            ".a",
            "-a",
            "a\nb",
            "a\0",
            "hypersdk-x",
            "snapshot-12",
            &"a".repeat(81),
            &"語".repeat(70),
        ] {
            assert!(wish(bad).flaw().is_some(), "{bad}");
        }
        assert!(Wish { memory: true, quiesce: true, ..wish("a") }.flaw().is_some());
        for bad in ["a\u{1}", "a\u{fffe}", "\u{ffff}"] {
            assert!(Wish { description: bad.to_owned(), ..wish("a") }.flaw().is_some(), "{bad:?}");
        }
        assert_eq!(Wish { description: "a\n\tb".to_owned(), ..wish("a") }.flaw(), None);
    }

    #[test]
    fn a_jobs_snapshot_bears_its_jobs_name() {
        let job = "job-0123456789abcdef";
        for name in [format!("hypersdk-{job}-0a1b2c3d"), format!("hypersdk-agent-1-kvm-{job}-0a1b2c3d")] {
            assert_eq!(job_of(&name), Some(job), "{name}");
        }
        for name in ["hypersdk-", "hypersdk-job-12-34", "a-job-0123456789abcdef-0a1b2c3d", "hypersdk-x-y", "before"] {
            assert_eq!(job_of(name), None, "{name}");
        }
    }

    #[test]
    fn one_is_found_by_its_id_or_by_a_name_that_it_alone_bears() {
        let one = |id: &str, name: &str, parent: Option<&str>| Snapshot {
            id: id.to_owned(),
            name: name.to_owned(),
            parent: parent.map(str::to_owned),
            ..Snapshot::default()
        };
        // A loop is nobody's tree, and ends all the same.
        let all = [one("1", "a", None), one("2", "a", Some("1")), one("3", "1", Some("2")), one("4", "b", None), one("5", "c", Some("5"))];
        // What is one's name and another's id is either.
        assert_eq!(find(&all, "1"), Err(vec!["1".to_owned(), "3".to_owned()]));
        assert_eq!(find(&all, "3").map(|found| found.map(|found| found.id.as_str())), Ok(Some("3")));
        assert_eq!(find(&all, "b").map(|found| found.map(|found| found.id.as_str())), Ok(Some("4")));
        assert_eq!((find(&all, "a"), find(&all, "z")), (Err(vec!["1".to_owned(), "2".to_owned()]), Ok(None)));
        let above = |id: &str| with_those_above(&all, id).into_iter().collect::<Vec<_>>().join(" ");
        assert_eq!((above("1"), above("2"), above("3"), above("5")), ("1 2 3".into(), "2 3".into(), "3".into(), "5".into()));
    }
}

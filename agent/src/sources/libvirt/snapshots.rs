//! A domain's snapshots: listed, taken inside its images, removed.
//!
//! Owns: what libvirt's description of a snapshot means, which snapshots are taken, and what its refusals mean.
//!
//! | the domain | what is taken |
//! |---|---|
//! | off | the disks, inside their qcow2 images |
//! | on or paused | the disks and the memory, inside the images: one without the memory would be external |
//!
//! Never: takes an external one (libvirt 9.0 removes those and cannot go back to them; each makes the VM's disks other files); takes a word of
//! libvirt's for a snapshot with a quotation mark in its name (of a running domain it says done, and QEMU has done nothing).
//! A crash here leaves an order that libvirt carries out by itself, and a description that the next one with that name writes over.
//! Source: libvirt, formatsnapshot; virsh(1) snapshot-create, snapshot-delete.

use std::collections::BTreeSet;
use std::path::Path;

use roxmltree::{Document, Node, ParsingOptions};
use shared::error::Code;
use shared::snapshots::{Snapshot, Wish};
use shared::vault::{self, Dir};

use super::domain::{self, Domain};
use super::virsh::Uri;
use crate::exec;
use crate::sources::{Error, Waiting};

/// Snapshots that are asked about in one process.
const AT_ONCE: usize = 100;
/// Most nodes of a snapshot's description, which holds its domain's twice.
const NODES: u32 = 200_000;

/// All of a domain.
pub fn list(uri: &Uri, domain: &str) -> Result<Vec<Snapshot>, exec::Error> {
    let said = uri.ask(&["snapshot-list", domain, "--name"])?;
    let names: Vec<&str> = said.lines().filter(|line| !line.trim().is_empty()).collect();
    if names.is_empty() {
        return Ok(Vec::new());
    }
    let mark = shared::ids::random_hex::<16>();
    let mut all = Vec::with_capacity(names.len());
    // It may have none: the last word decides whether an answer is one.
    let current = uri.ask(&[&format!("snapshot-current {domain} --name; echo {mark}")])?;
    let current = current.split(&mark).next().unwrap_or_default().trim_end_matches('\n').to_owned();
    for some in names.chunks(AT_ONCE) {
        let about = |name: &&str| format!("snapshot-dumpxml {domain} --snapshotname {}; echo {mark}; ", word(name));
        let said = uri.ask(&[&some.iter().map(about).collect::<String>()])?;
        // One that has gone meanwhile says nothing.
        for xml in said.split(&mark).map(str::trim).filter(|xml| !xml.is_empty()) {
            match read(xml) {
                Ok(snapshot) => all.push(Snapshot { current: snapshot.name == current, ..snapshot }),
                Err(e) => tracing::warn!(domain, error = e, "a snapshot is left out"),
            }
        }
    }
    Ok(all)
}

/// One word of a line that virsh reads: within single quotes it takes everything as it is.
fn word(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}

/// A name as it is: others may give one that begins or ends with a blank.
fn named<'a>(node: Node<'a, '_>) -> &'a str {
    domain::child(node, "name").and_then(|name| name.text()).unwrap_or_default()
}

fn read(xml: &str) -> Result<Snapshot, String> {
    let options = ParsingOptions { allow_dtd: false, nodes_limit: NODES, ..ParsingOptions::default() };
    let document = Document::parse_with_options(xml, options).map_err(|e| format!("its description cannot be read: {e}"))?;
    let root = document.root_element();
    let name = named(root).to_owned();
    if !root.has_tag_name("domainsnapshot") || name.is_empty() {
        return Err("that is no snapshot with a name".to_owned());
    }
    let way = |node: Node| node.attribute("snapshot").unwrap_or_default().to_owned();
    let memory = domain::child(root, "memory").map(way).unwrap_or_default();
    let disks = domain::child(root, "disks").into_iter().flat_map(|disks| domain::children(disks, "disk"));
    let is_external = memory == "external" || disks.map(way).any(|way| way == "external");
    let created = domain::text(root, "creationTime").parse().ok().and_then(|at| chrono::DateTime::from_timestamp(at, 0));
    Ok(Snapshot {
        id: name.clone(),
        name,
        description: domain::text(root, "description").to_owned(),
        created_at: created.map(shared::clock::rfc3339).unwrap_or_default(),
        power_state: match domain::text(root, "state") {
            "shutoff" | "crashed" => "poweredOff",
            "paused" | "pmsuspended" => "suspended",
            // `disk-snapshot` is one of a domain that was on.
            _ => "poweredOn",
        }
        .to_owned(),
        memory: Some(matches!(memory.as_str(), "internal" | "external")),
        quiesced: None,
        parent: domain::child(root, "parent").map(|parent| named(parent).to_owned()).filter(|name| !name.is_empty()),
        current: false,
        kind: Some(if is_external { "external" } else { "internal" }.to_owned()),
    })
}

/// Why this is not taken, in a sentence that says what would be.
pub fn hindrance(found: &Domain, wish: &Wish) -> Option<String> {
    let (name, state) = (&found.vm.name, &found.vm.power_state);
    if wish.quiesce {
        let why = "a snapshot at libvirt is taken inside the images: of a domain that is on it holds the memory, with what the guest has not \
                   written yet, and one that is off has written everything";
        return Some(format!("`quiesce` is for vSphere: {why}; ask without it"));
    }
    if let Some((target, format)) = found.written().find(|(_, format)| *format != "qcow2") {
        return Some(format!(
            "{name}: {target} is {format}: libvirt takes a snapshot inside the images, so that every disk that the domain writes to has to be \
             qcow2"
        ));
    }
    if wish.memory && found.raw_variables {
        return Some(format!(
            "{name} has UEFI (pflash) with its variables in a raw image, of which libvirt takes no snapshot; shut it down and export it, or make \
             a restore point (a job of type `backup`)"
        ));
    }
    match (found.is_off, wish.memory) {
        (true, true) => Some(format!("{name} is off: there is no memory to keep; ask without `memory`")),
        (false, false) => Some(format!(
            "{name} is {state}: inside its images libvirt takes a snapshot with the memory only; ask with `memory`: true (the guest stands \
             still while its memory is written), or shut it down first"
        )),
        _ => None,
    }
}

fn described(found: &Domain, wish: &Wish) -> String {
    let quoted = super::hot::quoted;
    let of = |target: &String, way: &str| format!("<disk name='{}' snapshot='{way}'/>", quoted(target));
    let way = |target: &String| if found.read_only.contains(target) { "no" } else { "internal" };
    let disks: String = found.targets.iter().map(|target| of(target, way(target))).collect();
    let others: String = found.others.iter().map(|target| of(target, "no")).collect();
    let memory = if wish.memory { "internal" } else { "no" };
    format!(
        "<domainsnapshot><name>{}</name><description>{}</description><memory snapshot='{memory}'/><disks>{disks}{others}</disks></domainsnapshot>",
        quoted(&wish.name),
        quoted(&wish.description)
    )
}

/// Takes one. `notes`: a folder and its path, for the description that virsh reads.
pub fn take(uri: &Uri, found: &Domain, wish: &Wish, notes: (&Dir, &Path), waiting: &Waiting) -> Result<(), Error> {
    let (dir, path) = notes;
    let file = format!("snapshot-{}.xml", found.vm.id);
    let failed = |e| Error::fatal(Code::Internal, format!("the agent's own folder: {e}"));
    vault::write_whole(dir, &file, described(found, wish).as_bytes()).map_err(failed)?;
    let taken = uri.ask_within(&["snapshot-create", &found.vm.id, &path.join(&file).display().to_string()], waiting.left());
    // What virsh has read is of no more use.
    let _ = dir.remove_file(&file);
    taken.map(drop).map_err(refused)
}

/// Removes one, and where several are `going` those that were taken over it.
pub fn remove(uri: &Uri, found: &Domain, name: &str, going: &BTreeSet<String>, waiting: &Waiting) -> Result<(), Error> {
    if let Some(odd) = going.iter().find(|name| !found.is_off && name.contains(['"', '\\'])) {
        let message = format!(
            "{} is {}: libvirt cannot tell QEMU a name with a quotation mark or a backslash while it runs ({odd}); shut it down and remove it \
             then",
            found.vm.name, found.vm.power_state
        );
        return Err(Error::fatal(Code::Unprocessable, message));
    }
    let mut arguments = vec!["snapshot-delete", found.vm.id.as_str(), "--snapshotname", name];
    if going.len() > 1 {
        arguments.push("--children");
    }
    uri.ask_within(&arguments, waiting.left()).map(drop).map_err(refused)
}

/// What libvirt's words mean to whoever asked.
fn refused(e: exec::Error) -> Error {
    if let exec::Error::Late(..) = e {
        let message = format!("{e}: libvirt goes on with it, and the list of snapshots will show what has become of it");
        return Error::fatal(Code::BadGateway, message);
    }
    let exec::Error::Failed(words) = &e else { return super::told(e) };
    let has = |some: &[&str]| some.iter().any(|part| words.contains(part));
    let (code, more) = if has(&["while checkpoint exists"]) {
        let more = "libvirt gives a checkpoint (of a restore point, say) up for a domain that is on only: start it and take the snapshot with \
                    its memory";
        (Code::Conflict, more)
    } else if has(&["already exists"]) {
        (Code::Conflict, "choose another name, or remove that one first")
    } else if has(&["state change lock", "another block job", "in active block job"]) {
        (Code::Conflict, "the domain is at something else; try it again when that has ended")
    } else if has(&["pflash based firmware"]) {
        (Code::Unprocessable, "shut it down and export it, or make a restore point (a job of type `backup`)")
    } else if has(&["unsupported for storage type"]) {
        (Code::Unprocessable, "every disk that the domain writes to has to be qcow2")
    } else if has(&["deletion of"]) && has(&["external"]) {
        (Code::Unprocessable, "an external snapshot is removed by libvirt 9.0 and later, one at a time (without those above it)")
    } else if has(&["No space left"]) {
        (Code::NoSpace, "the folder of its disks is full")
    } else if has(&["unsupported", "not supported", "ot valid", "does not support"]) {
        (Code::Unprocessable, "that is the hypervisor's last word on it")
    } else if has(&["snapshot not found", "no domain snapshot"]) {
        (Code::NotFound, "somebody was quicker")
    } else {
        return super::told(e);
    };
    Error::fatal(code, format!("libvirt: {words}: {more}"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_description_says_what_a_snapshot_holds() {
        let xml = |inner: &str| {
            format!("<domainsnapshot>{inner}<domain><name>other</name><memory unit='KiB'>9</memory></domain></domainsnapshot>")
        };
        let off =
            read(&xml("<name>a &amp; 'b'</name><state>shutoff</state><creationTime>1795727893</creationTime><memory snapshot='no'/>\
            <disks><disk name='vda' snapshot='internal'/><disk name='sda' snapshot='no'/></disks>"))
            .unwrap();
        assert_eq!(
            (off.name.as_str(), off.power_state.as_str(), off.memory, off.kind.as_deref()),
            ("a & 'b'", "poweredOff", Some(false), Some("internal"))
        );
        assert_eq!((off.created_at.as_str(), off.parent, off.description.as_str()), ("2026-11-26T21:18:13.000Z", None, ""));
        let on = read(&xml(
            "<name>n</name><description>d</description><state>running</state><parent><name>a</name></parent><memory snapshot='internal'/>",
        ))
        .unwrap();
        assert_eq!((on.power_state.as_str(), on.memory, on.parent.as_deref()), ("poweredOn", Some(true), Some("a")));
        let outside =
            read(&xml("<name>n</name><state>disk-snapshot</state><disks><disk name='vda' snapshot='external'/></disks>")).unwrap();
        assert_eq!((outside.power_state.as_str(), outside.memory, outside.kind.as_deref()), ("poweredOn", Some(false), Some("external")));
        assert!(read("<domainsnapshot/>").is_err() && read("<domain><name>a</name></domain>").is_err());
        assert_eq!(word("it's $(x); \\"), "'it'\\''s $(x); \\'");
    }
}

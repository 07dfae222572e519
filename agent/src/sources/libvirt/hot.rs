//! A running domain, frozen: a pull-mode backup job, whose disks QEMU gives over a socket as they were when it began.
//!
//! ```text
//! noted ─► backup-begin (with a checkpoint, from an earlier one) ─► NBD … ─► domjobabort: the scratch files go, the guest never stopped
//! ```
//! Owns: the job's description, and that nothing of it stays. Never: aborts a job that does not bear a name of ours.
//! A crash here leaves a job that the ledger names.
//! Source: libvirt, formatbackup, formatcheckpoint; virsh(1) backup-begin.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use shared::vault::{self, Dir};

use super::domain::Domain;
use super::virsh::Uri;
use crate::exec;

/// How long a job that was aborted may take to go, and between two looks at it.
const GOING: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_millis(100);
/// How everything of ours is called at a libvirt.
pub const OURS: &str = "hypersdk-";

/// Where QEMU makes sockets and scratch files, and where the descriptions lie that virsh reads.
pub struct Place<'a> {
    /// QEMU's side: it may write there.
    pub folder: &'a Path,
    /// Ours: a folder and its path.
    pub notes: (&'a Dir, &'a Path),
}

/// What of a domain's disks is wanted.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// By disk: the checkpoint since which changes are asked for.
    pub since: Vec<Option<String>>,
    /// A checkpoint to make for the next time, of disks that can bear one.
    pub checkpoint: Option<String>,
}

/// A disk that can bear a bitmap.
pub fn bears_bitmap(format: &str) -> bool {
    format == "qcow2"
}

/// The name of a disk's bitmap in its export.
pub fn bitmap(target: &str) -> String {
    format!("since-{target}")
}

/// The checkpoint's name in a change id, which holds the image's path behind it.
pub fn checkpoint_of(change_id: &str) -> &str {
    change_id.split_once(' ').map_or(change_id, |(name, _)| name)
}

/// The socket of the job of this name: in the domain's own folder, where the confinement of its QEMU lets it make one, else beside the
/// scratch files.
pub fn socket(folder: &Path, domain: &Domain, name: &str) -> PathBuf {
    let own = domain.number.map(|number| format!("domain-{number}-{}", domain.vm.name.chars().take(20).collect::<String>()));
    let own = own.map(|own| folder.join(own)).filter(|own| own.is_dir());
    own.unwrap_or_else(|| folder.to_owned()).join(format!("{name}.sock"))
}

/// Whether these words speak of checkpoints: then the job may begin without them.
pub fn is_about_checkpoints(words: &str) -> bool {
    let words = words.to_ascii_lowercase();
    ["checkpoint", "bitmap", "incremental"].iter().any(|word| words.contains(word))
}

/// Text as it may stand in an element or an attribute.
pub fn quoted(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('\'', "&apos;").replace('"', "&quot;")
}

fn backup_xml(domain: &Domain, wanted: &Wanted, folder: &Path, name: &str) -> String {
    let path = |path: &Path| quoted(&path.display().to_string());
    let disk = |(n, target): (usize, &String)| {
        let since = wanted.since.get(n).and_then(Option::as_ref);
        let mode = match since {
            Some(checkpoint) => {
                format!(" backupmode='incremental' incremental='{}' exportbitmap='{}'", quoted(checkpoint), quoted(&bitmap(target)))
            }
            None => " backupmode='full'".to_owned(),
        };
        let scratch = path(&folder.join(format!("{name}.{target}")));
        format!("<disk name='{0}' backup='yes' type='file' exportname='{0}'{mode}><scratch file='{scratch}'/></disk>", quoted(target))
    };
    let disks: String = domain.targets.iter().enumerate().map(disk).collect();
    let others: String = domain.others.iter().map(|target| format!("<disk name='{}' backup='no'/>", quoted(target))).collect();
    let socket = path(&socket(folder, domain, name));
    format!("<domainbackup mode='pull'><server transport='unix' socket='{socket}'/><disks>{disks}{others}</disks></domainbackup>")
}

fn checkpoint_xml(domain: &Domain, name: &str) -> String {
    let disk = |(target, format): (&String, &String)| {
        let kind = if bears_bitmap(format) { "bitmap" } else { "no" };
        format!("<disk name='{}' checkpoint='{kind}'/>", quoted(target))
    };
    let disks: String = domain.targets.iter().zip(&domain.formats).map(disk).collect();
    let others: String = domain.others.iter().map(|target| format!("<disk name='{}' checkpoint='no'/>", quoted(target))).collect();
    format!("<domaincheckpoint><name>{}</name><disks>{disks}{others}</disks></domaincheckpoint>", quoted(name))
}

/// Why a job did not begin.
pub enum Failed {
    /// libvirt said no.
    Tool(exec::Error),
    /// The description could not be written.
    Notes(io::Error),
}

/// Begins a job of this name. Whoever calls it holds [`OPENING`](super::virsh::OPENING).
pub fn begin(uri: &Uri, domain: &Domain, wanted: &Wanted, place: &Place, name: &str) -> Result<(), Failed> {
    let (dir, path) = place.notes;
    let (backup, checkpoint) = (format!("{name}.backup.xml"), format!("{name}.checkpoint.xml"));
    vault::write_whole(dir, &backup, backup_xml(domain, wanted, place.folder, name).as_bytes()).map_err(Failed::Notes)?;
    let (backup_path, checkpoint_path) = (path.join(&backup).display().to_string(), path.join(&checkpoint).display().to_string());
    let mut arguments = vec!["backup-begin", domain.vm.id.as_str(), backup_path.as_str()];
    if let Some(new) = &wanted.checkpoint {
        vault::write_whole(dir, &checkpoint, checkpoint_xml(domain, new).as_bytes()).map_err(Failed::Notes)?;
        arguments.push(&checkpoint_path);
    }
    let begun = uri.ask(&arguments).map(drop).map_err(Failed::Tool);
    // What virsh has read is of no more use; what stays is written over or removed with the next of its name.
    let _ = dir.remove_file(&backup);
    let _ = dir.remove_file(&checkpoint);
    begun
}

/// Whether these words say that what is to be gone is gone.
pub fn says_gone(words: &str) -> bool {
    let words = words.to_ascii_lowercase();
    [
        "no domain backup job present",
        "no job is active",
        "domain is not running",
        "failed to get domain",
        "domain not found",
        "no domain with matching",
        "failed to get network",
        "no network with matching",
        "network is not active",
        "no domain checkpoint",
        "domain checkpoint not found",
        // A client that is older than they are.
        "unknown command: 'backup-",
        "unknown command: 'checkpoint-",
        // Its bitmap cannot be removed now; the next backup of the running domain does.
        "inactive domain",
    ]
    .iter()
    .any(|gone| words.contains(gone))
}

fn unless_gone(said: Result<String, exec::Error>) -> Result<Option<String>, exec::Error> {
    match said {
        Ok(said) => Ok(Some(said)),
        Err(exec::Error::Failed(words)) if says_gone(&words) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Ends the job of this name, where it runs, and removes what a killed QEMU left of it. Answers whether it was there.
pub fn end(uri: &Uri, domain: &str, folder: Option<&Dir>, name: &str) -> Result<bool, exec::Error> {
    let runs = || Ok(unless_gone(uri.ask(&["backup-dumpxml", domain]))?.is_some_and(|xml| xml.contains(&format!("{name}.sock"))));
    let is_there = runs()?;
    if is_there {
        unless_gone(uri.ask(&["domjobabort", domain]))?;
        // The order is given; the job is gone a moment later.
        let end = Instant::now() + GOING;
        while runs()? {
            if Instant::now() > end {
                return Err(exec::Error::Failed(format!("the backup job {name} was aborted and is not gone yet")));
            }
            std::thread::sleep(LOOK);
        }
    }
    let Some(folder) = folder else { return Ok(is_there) };
    for entry in folder.entries().into_iter().flatten().flatten() {
        let Ok(file) = entry.file_name().into_string() else { continue };
        if file.strip_prefix(name).is_some_and(|rest| rest.starts_with('.')) {
            // One that vanishes meanwhile is gone.
            let _ = folder.remove_file(&file);
        }
    }
    Ok(is_there)
}

/// Lets a guest go on that was stopped between two instructions; one that is off, or whose QEMU has ended meanwhile, is started. One that is
/// gone is left as it is, and one that runs. Answers whether it ran.
pub fn resume(uri: &Uri, domain: &str) -> Result<bool, exec::Error> {
    match unless_gone(uri.ask(&["domstate", domain]))?.as_deref().map(str::trim) {
        Some("paused") => unless_gone(uri.ask(&["resume", domain])).map(|_| false),
        Some("shut off") => unless_gone(uri.ask(&["start", domain])).map(|_| false),
        Some(_) => Ok(true),
        None => Ok(false),
    }
}

/// Removes a checkpoint, where it still is. Of a domain that is off it cannot be removed: the next backup of the running domain does.
pub fn forget(uri: &Uri, domain: &str, checkpoint: &str) -> Result<(), exec::Error> {
    match unless_gone(uri.ask(&["checkpoint-delete", domain, checkpoint])) {
        // A QEMU that was killed has never written the bitmap: only libvirt remembers it.
        Err(exec::Error::Failed(words)) if words.contains("not found in backing chain") => {
            unless_gone(uri.ask(&["checkpoint-delete", domain, checkpoint, "--metadata"])).map(drop)
        }
        other => other.map(drop),
    }
}

/// Removes a domain with its firmware's variables, never its disks.
pub fn remove(uri: &Uri, domain: &str) -> Result<(), exec::Error> {
    unless_gone(uri.ask(&["destroy", domain]))?;
    unless_gone(uri.ask(&["undefine", domain, "--nvram"])).map(drop)
}

/// Removes a network that was made for a while.
pub fn remove_network(uri: &Uri, network: &str) -> Result<(), exec::Error> {
    unless_gone(uri.ask(&["net-destroy", network])).map(drop)
}

/// The domain's checkpoints.
pub fn checkpoints(uri: &Uri, domain: &str) -> Result<Vec<String>, exec::Error> {
    let said = unless_gone(uri.ask(&["checkpoint-list", domain, "--name"]))?.unwrap_or_default();
    Ok(said.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use shared::vm::Vm;

    use super::*;

    #[test]
    fn a_job_names_what_is_wanted_and_nothing_else() {
        let domain = Domain {
            vm: Vm::default(),
            formats: vec!["qcow2".into(), "raw".into()],
            targets: vec!["vda".into(), "v'b".into()],
            others: vec!["sda".into()],
            read_only: Vec::new(),
            raw_variables: false,
            number: None,
            is_off: false,
        };
        let wanted = Wanted { since: vec![Some("hypersdk-job-1".into()), None], checkpoint: None };
        let xml = backup_xml(&domain, &wanted, Path::new("/run/q"), "n");
        assert_eq!(
            xml,
            "<domainbackup mode='pull'><server transport='unix' socket='/run/q/n.sock'/><disks>\
             <disk name='vda' backup='yes' type='file' exportname='vda' backupmode='incremental' incremental='hypersdk-job-1' exportbitmap='since-vda'>\
             <scratch file='/run/q/n.vda'/></disk>\
             <disk name='v&apos;b' backup='yes' type='file' exportname='v&apos;b' backupmode='full'><scratch file='/run/q/n.v&apos;b'/></disk>\
             <disk name='sda' backup='no'/></disks></domainbackup>"
        );
        let checkpoint = checkpoint_xml(&domain, "c");
        assert!(checkpoint.contains("<disk name='vda' checkpoint='bitmap'/><disk name='v&apos;b' checkpoint='no'/>"), "{checkpoint}");
        assert!(
            says_gone("Domain backup job id not found: no domain backup job present") && !says_gone("cannot acquire state change lock")
        );
    }
}

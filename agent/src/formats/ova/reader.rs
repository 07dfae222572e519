//! An OVA or an OVF folder as a VM and the windows of its disks.
//!
//! Owns: putting archive, description and manifest together. Never: unpacks; a disk's window lies inside the archive.
//! A crash here costs nothing: it only reads.

use std::io;

use shared::vm::Vm;

use super::super::disk::{FormatError, Result, Window};
use super::mf::{self, Algorithm, Line};
use super::parse::{self, DiskRef};
use super::tar;
use super::{MAX_OVF, bare, corrupt, refused, shown};

/// Called while digests are made, with the bytes done since the last call; an error stops the work.
pub type Progress<'a> = &'a mut dyn FnMut(u64) -> Result<()>;

/// Bytes read at once for a digest.
const CHUNK: usize = 1 << 20;

/// A disk of the VM and where its file's bytes lie.
#[derive(Clone, Debug)]
pub struct Member {
    /// What the description says of it.
    pub entry: DiskRef,
    /// The file's bytes.
    pub window: Window,
}

/// What a check of the manifest found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checked {
    /// There is no manifest.
    Absent,
    /// This many files have the digest that the manifest says.
    Good(usize),
}

/// An opened OVA or OVF folder.
#[derive(Clone, Debug)]
pub struct Ova {
    /// The VM; its `id` is left to the caller.
    pub vm: Vm,
    /// Its disks in order, as many as `vm.disks`.
    pub disks: Vec<Member>,
    /// The lines of the manifest, where there is one. A certificate (`.cert`) is not looked at.
    pub manifest: Option<Vec<Line>>,
    /// The files that the manifest may speak of.
    files: Vec<(String, Window)>,
    /// Name of the description.
    ovf: String,
}

fn read(window: &Window, limit: u64, what: &str) -> Result<Vec<u8>> {
    if window.len() > limit {
        return Err(refused(format!("its {what} is over {limit} bytes")));
    }
    let mut bytes = vec![0u8; window.len() as usize];
    window.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

fn has_extension(name: &str, extension: &str) -> bool {
    name.rsplit_once('.').is_some_and(|(_, found)| found.eq_ignore_ascii_case(extension))
}

/// Opens an archive in place. Digests are not checked here: see [`Ova::check_manifest`].
pub fn open(window: &Window) -> Result<Ova> {
    let mut files = Vec::new();
    for entry in tar::entries(window)? {
        let part = window.part(entry.offset, entry.size)?;
        files.push((entry.name, part));
    }
    let only = |extension: &str| {
        let mut found = files.iter().filter(|(name, _)| has_extension(name, extension));
        match (found.next(), found.next()) {
            (Some(_), Some((second, _))) => Err(refused(format!("a second .{extension} ({}); one is accepted", shown(second)))),
            (first, _) => Ok(first.cloned()),
        }
    };
    let Some((ovf, text)) = only("ovf")? else {
        return Err(refused("no .ovf in the archive; an OVA has one, as its first member"));
    };
    let manifest =
        only("mf")?.map(|(_, window)| read(&window, mf::MAX_BYTES, "manifest").and_then(|bytes| mf::parse(&bytes))).transpose()?;
    let find = |name: &str| files.iter().find(|(known, _)| known == name).map(|(_, window)| window.clone());
    let (vm, disks) = assemble(&read(&text, MAX_OVF, "OVF")?, |name| {
        find(name).ok_or_else(|| corrupt("OVF", 0, 0, format!("it names {}, which is not in the archive", shown(name))))
    })?;
    Ok(Ova { vm, disks, manifest, files, ovf })
}

/// Opens a description that lies beside its files; `opener` opens those by bare name. `name` is the description's own, and gives the manifest's.
pub fn open_folder(name: &str, ovf: &Window, opener: &dyn Fn(&str) -> io::Result<Window>) -> Result<Ova> {
    bare(name, "the caller")?;
    let missing = |file: &str, e: io::Error| match e.kind() {
        io::ErrorKind::NotFound => corrupt("OVF", 0, 0, format!("{} does not lie beside the OVF", shown(file))),
        _ => FormatError::Io(e),
    };
    let mut files = vec![(name.to_owned(), ovf.clone())];
    let (vm, disks) = assemble(&read(ovf, MAX_OVF, "OVF")?, |file| {
        let window = opener(file).map_err(|e| missing(file, e))?;
        files.push((file.to_owned(), window.clone()));
        Ok(window)
    })?;
    let stem = name.rsplit_once('.').map_or(name, |(stem, _)| stem);
    let manifest = match opener(&format!("{stem}.mf")) {
        Ok(window) => Some(mf::parse(&read(&window, mf::MAX_BYTES, "manifest")?)?),
        Err(e) if e.kind() == io::ErrorKind::NotFound => None,
        Err(e) => return Err(e.into()),
    };
    for line in manifest.iter().flatten() {
        if files.iter().all(|(known, _)| *known != line.name) {
            let window = opener(&line.name).map_err(|e| missing(&line.name, e))?;
            files.push((line.name.clone(), window));
        }
    }
    Ok(Ova { vm, disks, manifest, files, ovf: name.to_owned() })
}

/// The VM and its disks' windows, from the description's text.
fn assemble(text: &[u8], mut find: impl FnMut(&str) -> Result<Window>) -> Result<(Vm, Vec<Member>)> {
    let ovf = parse::parse(text)?;
    let mut disks = Vec::with_capacity(ovf.disks.len());
    for (k, entry) in ovf.disks.into_iter().enumerate() {
        let window = find(&entry.file)?;
        if let Some(size) = entry.size.filter(|size| *size != window.len()) {
            let reason = format!("{} has {} bytes, the OVF says {size}: cut off or exchanged", shown(&entry.file), window.len());
            return Err(corrupt("disk file", k as u64, 0, reason));
        }
        disks.push(Member { entry, window });
    }
    Ok((ovf.vm, disks))
}

impl Ova {
    /// Reads every file that the manifest lists and compares digests. The description and each disk must be listed; the first file that differs is named.
    pub fn check_manifest(&self, progress: Progress<'_>) -> Result<Checked> {
        let Some(lines) = &self.manifest else {
            return Ok(Checked::Absent);
        };
        let needed = self.disks.iter().map(|disk| &disk.entry.file).chain([&self.ovf]);
        for name in needed {
            if lines.iter().all(|line| line.name != *name) {
                return Err(corrupt("manifest", 0, 0, format!("it has no digest of {}", shown(name))));
            }
        }
        for (k, line) in lines.iter().enumerate() {
            let Some((_, window)) = self.files.iter().find(|(name, _)| *name == line.name) else {
                return Err(corrupt("manifest line", k as u64 + 1, 0, format!("{} is not there", shown(&line.name))));
            };
            let found = digest(window, line.algorithm, progress)?;
            if found != line.digest {
                let reason =
                    format!("{} has the digest {}, the manifest says {}", shown(&line.name), hex::encode(found), hex::encode(&line.digest));
                return Err(corrupt("manifest line", k as u64 + 1, 0, reason));
            }
        }
        Ok(Checked::Good(lines.len()))
    }
}

/// A window's digest, streamed.
fn digest(window: &Window, algorithm: Algorithm, progress: Progress<'_>) -> Result<Vec<u8>> {
    let mut hasher = algorithm.hasher();
    let mut chunk = vec![0u8; window.len().min(CHUNK as u64) as usize];
    let mut at = 0;
    while at < window.len() {
        let len = (window.len() - at).min(CHUNK as u64);
        let bytes = &mut chunk[..len as usize];
        window.read_exact_at(bytes, at)?;
        hasher.update(bytes);
        at += len;
        progress(len)?;
    }
    Ok(hasher.finish())
}

/// SHA-256 of a window, hex.
pub fn sha256(window: &Window, progress: Progress<'_>) -> Result<String> {
    digest(window, Algorithm::Sha256, progress).map(hex::encode)
}

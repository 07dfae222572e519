//! An OVA in one pass, and the description beside loose disks.
//!
//! Owns: the archive's layout (a padded slot for the OVF, disks one behind the other, the manifest last; DSP0243 allows it there) and its finish.
//! Never: writes a disk: its writer is given [`Layout::disk_base`]. A crash here costs nothing: [`Layout::finish`] writes the same bytes again.

use std::fs::File;
use std::os::unix::fs::FileExt;

use shared::vm::Vm;

use super::super::disk::{Result, Window};
use super::generate::{DiskFile, generate};
use super::reader::{Progress, sha256};
use super::{MAX_ENTRIES, MAX_OVF, mf, refused, tar};

/// A disk as its writer left it inside the archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finished {
    /// Member name, bare, at most 100 bytes.
    pub name: String,
    /// Size of the logical disk in bytes.
    pub capacity: u64,
    /// First byte of the disk's file inside the archive, from [`Layout::disk_base`].
    pub base: u64,
    /// Length of the disk's file in bytes.
    pub size: u64,
    /// Bytes of the logical disk that hold data.
    pub populated: u64,
    /// SHA-256 of the disk's file where it is known, hex; else it is read back.
    pub sha256: Option<String>,
}

/// A member of the finished archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// Member name.
    pub name: String,
    /// Length in bytes.
    pub size: u64,
    /// SHA-256, hex, of what lies in the file.
    pub sha256: String,
}

/// What [`Layout::finish`] made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finish {
    /// Length of the archive in bytes.
    pub len: u64,
    /// The description, the disks, the manifest.
    pub members: Vec<Written>,
}

/// Where everything lies in an archive that is being written. Follows from the VM alone, so it is the same after a crash.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    stem: String,
    slot: u64,
    disks: usize,
    mtime: u64,
}

/// A file name's stem from a VM's name: ASCII letters, digits, `.`, `_` and `-`, at most 60, never hidden.
pub fn stem(name: &str) -> String {
    let mapped: String = name.chars().take(60).map(|c| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '_' }).collect();
    let trimmed = mapped.trim_start_matches(['.', '-']);
    if trimmed.is_empty() { "vm".to_owned() } else { trimmed.to_owned() }
}

impl Layout {
    /// The layout for this VM and all of `vm.disks`. `mtime` (seconds since 1970) goes into every header; keep it for a resume.
    pub fn new(vm: &Vm, mtime: u64) -> Result<Self> {
        // The description and the manifest are members too.
        if vm.disks.len() > MAX_ENTRIES - 2 {
            return Err(refused(format!("{} disks; an OVA of ours has at most {}", vm.disks.len(), MAX_ENTRIES - 2)));
        }
        // No description of this VM is longer than one whose every number has all its digits and every name its most bytes, all escaped.
        let longest = DiskFile { name: "&".repeat(tar::MAX_NAME), size: u64::MAX, capacity: u64::MAX, populated: u64::MAX };
        let text = generate(vm, &vec![longest; vm.disks.len()]);
        let slot = (text.len() as u64).next_multiple_of(4096);
        if slot > MAX_OVF {
            return Err(refused(format!("its OVF would be over {MAX_OVF} bytes")));
        }
        Ok(Self { stem: stem(&vm.name), slot, disks: vm.disks.len(), mtime })
    }

    /// Name for disk `k`'s member.
    pub fn disk_name(&self, k: usize) -> String {
        format!("{}-disk-{k}.vmdk", self.stem)
    }

    /// Bytes kept for the description.
    pub fn slot(&self) -> u64 {
        self.slot
    }

    /// First byte of disk `k`'s file inside the archive; `previous_end` is the end of disk `k - 1`'s (base and size), of no meaning for the first.
    pub fn disk_base(&self, k: usize, previous_end: u64) -> u64 {
        if k == 0 { 2 * tar::BLOCK + self.slot } else { previous_end.next_multiple_of(tar::BLOCK) + tar::BLOCK }
    }

    /// Puts description, headers, manifest and end around the disks that lie in `file` (opened for reading and writing), reading every member
    /// back whose digest is not known. May run again, also after a crash inside of it. The caller syncs.
    pub fn finish(&self, file: &File, vm: &Vm, disks: &[Finished], progress: Progress<'_>) -> Result<Finish> {
        if disks.len() != self.disks {
            return Err(refused(format!("{} disks were written, the layout is for {}", disks.len(), self.disks)));
        }
        let ovf_name = format!("{}.ovf", self.stem);
        let mut text = generate(vm, &disks.iter().map(Finished::file).collect::<Vec<_>>()).into_bytes();
        if text.len() as u64 > self.slot {
            return Err(refused(format!(
                "its OVF has {} bytes, the slot {}: the VM is not the one that the layout was made for",
                text.len(),
                self.slot
            )));
        }
        text.resize(self.slot as usize, b'\n');
        file.write_all_at(&tar::header(&ovf_name, self.slot, self.mtime)?, 0)?;
        file.write_all_at(&text, tar::BLOCK)?;
        let mut members = vec![(ovf_name, tar::BLOCK, self.slot, None)];
        let mut end = tar::BLOCK + self.slot;
        for (k, disk) in disks.iter().enumerate() {
            let base = self.disk_base(k, end);
            if disk.base != base || disk.size > i64::MAX as u64 - base {
                return Err(refused(format!("disk {k} lies at byte {}, {base} would be right", disk.base)));
            }
            if members.iter().any(|(name, ..)| *name == disk.name) {
                return Err(refused(format!("two members are named {}", disk.name)));
            }
            file.write_all_at(&tar::header(&disk.name, disk.size, self.mtime)?, base - tar::BLOCK)?;
            end = base + disk.size;
            pad(file, end)?;
            members.push((disk.name.clone(), base, disk.size, disk.sha256.clone()));
        }
        let mut written = Vec::with_capacity(members.len() + 1);
        let window = Window::whole(file.try_clone()?)?;
        for (name, base, size, known) in members {
            let sha256 = match known {
                Some(digest) => digest,
                None => sha256(&window.part(base, size)?, progress)?,
            };
            written.push(Written { name, size, sha256 });
        }
        let lines = mf::generate(written.iter().map(|member| (member.name.as_str(), member.sha256.as_str())));
        let at = end.next_multiple_of(tar::BLOCK);
        let mf_name = format!("{}.mf", self.stem);
        let mut tail = tar::header(&mf_name, lines.len() as u64, self.mtime)?.to_vec();
        tail.extend_from_slice(lines.as_bytes());
        let mf_sha256 = {
            let mut hasher = mf::Algorithm::Sha256.hasher();
            hasher.update(lines.as_bytes());
            hex::encode(hasher.finish())
        };
        tail.resize(tail.len().next_multiple_of(tar::BLOCK as usize) + 2 * tar::BLOCK as usize, 0);
        file.write_all_at(&tail, at)?;
        let len = at + tail.len() as u64;
        file.set_len(len)?;
        written.push(Written { name: mf_name, size: lines.len() as u64, sha256: mf_sha256 });
        Ok(Finish { len, members: written })
    }
}

impl Finished {
    fn file(&self) -> DiskFile {
        DiskFile { name: self.name.clone(), size: self.size, capacity: self.capacity, populated: self.populated }
    }
}

/// Zeros from `end` to the next block.
fn pad(file: &File, end: u64) -> Result<()> {
    let len = (end.next_multiple_of(tar::BLOCK) - end) as usize;
    file.write_all_at(&[0u8; tar::BLOCK as usize][..len], end)?;
    Ok(())
}

/// The description and the manifest for loose streamOptimized disks: each disk with its file's SHA-256 in hex. `name` is the OVF's own file name.
pub fn folder(name: &str, vm: &Vm, disks: &[(DiskFile, String)]) -> (String, String) {
    let text = generate(vm, &disks.iter().map(|(disk, _)| disk.clone()).collect::<Vec<_>>());
    let mut hasher = mf::Algorithm::Sha256.hasher();
    hasher.update(text.as_bytes());
    let own = hex::encode(hasher.finish());
    let lines = disks.iter().map(|(disk, sha256)| (disk.name.as_str(), sha256.as_str()));
    let manifest = mf::generate(std::iter::once((name, own.as_str())).chain(lines));
    (text, manifest)
}

//! What stands around the disks: nothing, a description beside them, or an archive.
//!
//! Owns: where each disk lies, and the finish of OVF and OVA.
//! Never: touches a disk's bytes. A crash here costs nothing: the finish runs again and writes the same bytes.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::control::Control;
use super::files::{Hashing, Input, mostly_holes};
use super::part::PartDir;
use super::verify::damaged;
use super::{Error, Format, Job, output_error};
use crate::formats::{FormatError, Window, ova};

/// Where a disk came to lie.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    /// First byte in its file.
    pub(super) base: u64,
    /// Bytes.
    pub(super) length: u64,
    /// Data bytes of the logical disk.
    pub(super) data: u64,
}

/// The package of one job.
pub(super) struct Package<'a> {
    job: &'a Job,
    layout: Option<ova::Layout>,
}

impl<'a> Package<'a> {
    pub(super) fn new(job: &'a Job) -> Result<Self, Error> {
        let described = matches!(job.format, Format::Ovf | Format::Ova);
        if described && job.vm.disks.len() != job.disks.len() {
            let text = format!("the description has {} disks, {} are exported; they must be the same", job.vm.disks.len(), job.disks.len());
            return Err(Error::Output(FormatError::Unsupported(text)));
        }
        let layout = match job.format {
            Format::Ova => Some(ova::Layout::new(&job.vm, job.created).map_err(Error::Output)?),
            _ => None,
        };
        Ok(Self { job, layout })
    }

    /// First byte of disk `n` in its file, behind those before it.
    pub(super) fn base(&self, n: usize, before: &[Place]) -> u64 {
        let end = before.last().map_or(0, |place| place.base + place.length);
        self.layout.as_ref().map_or(0, |layout| layout.disk_base(n, end))
    }

    /// Name of the member that holds disk `n`, in an archive.
    pub(super) fn member(&self, n: usize) -> Option<String> {
        self.layout.as_ref().map(|layout| layout.disk_name(n))
    }

    /// Writes what belongs around the disks and syncs it.
    pub(super) fn finish(&self, part: &PartDir, places: &[Place], hashing: &Hashing, control: &Control<'_>) -> Result<(), Error> {
        match (&self.layout, self.job.format) {
            (Some(layout), _) => self.finish_archive(layout, part, places, hashing, control),
            (None, Format::Ovf) => self.finish_folder(part, places, hashing, control),
            _ => Ok(()),
        }
    }

    fn finish_archive(
        &self,
        layout: &ova::Layout,
        part: &PartDir,
        places: &[Place],
        hashing: &Hashing,
        control: &Control<'_>,
    ) -> Result<(), Error> {
        let name = self.job.disk_file(0);
        let fail = |e: FormatError| output_error(e, &name);
        let file = part.open_existing(&name).map_err(|e| fail(e.into()))?;
        let stop = || {
            control.poll();
            control.stopped()
        };
        let mut disks = Vec::new();
        for (n, place) in places.iter().enumerate() {
            let name = layout.disk_name(n);
            let member = file.try_clone().map_err(|e| fail(e.into()))?;
            let input = Input { name: name.clone(), file: member, base: place.base, size: place.length, format: "vmdk", skip: false };
            hashing.hash(&input, &stop).map_err(|e| fail(e.into()))?;
            control.check()?;
            disks.push(ova::Finished {
                sha256: hashing.digest(&name),
                name,
                capacity: self.job.disks[n].disk.capacity(),
                base: place.base,
                size: place.length,
                populated: place.data,
            });
        }
        let mut progress = |_| {
            control.poll();
            if control.stopped() { Err(FormatError::Io(io::ErrorKind::Interrupted.into())) } else { Ok(()) }
        };
        let finished = layout.finish(&file, &self.job.vm, &disks, &mut progress);
        control.check()?;
        finished.map_err(fail)?;
        file.sync_data().map_err(|e| fail(e.into()))
    }

    fn finish_folder(&self, part: &PartDir, places: &[Place], hashing: &Hashing, control: &Control<'_>) -> Result<(), Error> {
        let mut disks = Vec::new();
        for (n, place) in places.iter().enumerate() {
            let name = self.job.disk_file(n);
            let fail = |e: io::Error| output_error(e.into(), &name);
            let file = part.open(&name).map_err(fail)?;
            let input = Input { name: name.clone(), file, base: 0, size: place.length, format: self.job.format.disk_format(), skip: false };
            let stop = || {
                control.poll();
                control.stopped()
            };
            hashing.hash(&input, &stop).map_err(fail)?;
            control.check()?;
            let digest = hashing.digest(&name).ok_or(Error::Parked)?;
            let capacity = self.job.disks[n].disk.capacity();
            disks.push((ova::DiskFile { name, size: place.length, capacity, populated: place.data }, digest));
        }
        let [ovf, mf] = self.texts();
        let (description, manifest) = ova::folder(&ovf, &self.job.vm, &disks);
        write_whole(part, &ovf, description.as_bytes())?;
        write_whole(part, &mf, manifest.as_bytes())?;
        part.sync().map_err(|e| output_error(e.into(), &ovf))
    }

    /// Names of description and manifest of an OVF folder.
    fn texts(&self) -> [String; 2] {
        ["ovf", "mf"].map(|extension| format!("{}.{extension}", ova::stem(&self.job.vm.name)))
    }

    /// Whether the files are all there in the lengths that they had when the package was complete.
    pub(super) fn is_whole(&self, part: &PartDir, files: &[(String, u64)]) -> bool {
        files.iter().all(|(name, len)| part.open(name).and_then(|file| file.metadata()).is_ok_and(|meta| meta.len() == *len))
    }

    /// The bytes of each disk as a reader of the package finds them.
    pub(super) fn disks(&self, part: &PartDir) -> Result<Vec<Window>, Error> {
        let open = |name: &str| part.open(name).and_then(Window::whole);
        let [ovf, _] = self.texts();
        let fail = |e: FormatError| damaged(e, "the package", 0);
        let described = match self.job.format {
            Format::Ova => ova::open(&open(&self.job.disk_file(0)).map_err(|e| fail(e.into()))?),
            Format::Ovf => open(&ovf).map_err(FormatError::Io).and_then(|text| ova::open_folder(&ovf, &text, &open)),
            _ => {
                let windows = (0..self.job.disks.len()).map(|n| open(&self.job.disk_file(n)).map_err(|e| Error::Output(e.into())));
                return windows.collect();
            }
        };
        let windows: Vec<Window> = described.map_err(fail)?.disks.into_iter().map(|member| member.window).collect();
        match windows.len() == self.job.disks.len() {
            true => Ok(windows),
            false => {
                Err(fail(FormatError::Refused { format: self.job.format.name(), reason: format!("it describes {} disks", windows.len()) }))
            }
        }
    }

    /// All files of the finished package, opened for reading.
    pub(super) fn files(&self, part: &PartDir, places: &[Place]) -> Result<Vec<Input>, Error> {
        let disks = if self.layout.is_some() { 1 } else { self.job.disks.len() };
        let mut names: Vec<(String, &'static str)> = (0..disks).map(|n| (self.job.disk_file(n), self.job.format.disk_format())).collect();
        match self.job.format {
            Format::Ova => names.iter_mut().for_each(|name| name.1 = "ova"),
            Format::Ovf => names.extend(self.texts().into_iter().zip(["ovf", "mf"])),
            _ => {}
        }
        let open = |(n, (name, format)): (usize, (String, &'static str))| {
            let skip = format == "raw" && mostly_holes(self.job.disks[n].disk.capacity(), places[n].data);
            let input = part.open(&name).and_then(|file| {
                let size = file.metadata()?.len();
                Ok(Input { file, base: 0, size, format, skip, name: name.clone() })
            });
            input.map_err(|e| output_error(e.into(), &name))
        };
        names.into_iter().enumerate().map(open).collect()
    }
}

fn write_whole(part: &PartDir, name: &str, bytes: &[u8]) -> Result<(), Error> {
    let write = |file: File| {
        file.set_len(0)?;
        file.write_all_at(bytes, 0)?;
        file.sync_all()
    };
    part.open_or_create(name).and_then(write).map_err(|e| output_error(e.into(), name))
}

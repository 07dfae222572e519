//! Conversion and proof without a server: the same engine, in the caller's process, with the caller's rights.
//!
//! Owns: `hypersdk convert` and `hypersdk verify`. Never: overwrites a file that is there, talks to anybody.
//! A crash here costs the conversion: it writes into `OUT.part/` beside the output, which is removed at the next try.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use shared::error::Code;
use shared::manifest::{self, FileEntry, Over, Signed};
use shared::options::{Algorithm, Format, Options};
use shared::progress::Progress;
use shared::vault::{self, Dir};

use crate::formats::FormatError;
use crate::journal::Journal;
use crate::pipeline::{self, PartDir, Snapshot, Stage, Watch};
use crate::sources::local::{Local, OpenOptions};
use crate::{identity, points, proof, worker};

/// What to convert.
pub struct Request {
    /// An image, an OVA or a folder that is a VM.
    pub input: PathBuf,
    /// The file to make; for `ovf` the folder.
    pub output: PathBuf,
    /// Output format; else the output's extension says it.
    pub format: Option<Format>,
    /// Compression; qcow2 is plain without.
    pub compression: Option<Algorithm>,
    /// The algorithm's level; the fast one without.
    pub level: Option<i32>,
    /// Deflate with distances of at most 4 KiB; qcow2 only.
    pub narrow_window: bool,
    /// Read the output back and compare.
    pub verify: bool,
    /// Read an image over the parents that it names (qcow2 backing files, VMDK deltas) instead of refusing it; they must lie beside it.
    pub follow_chain: bool,
    /// Id or name of a snapshot inside a qcow2 that is to be read instead of the disk as it is.
    pub snapshot: Option<String>,
    /// Have the SHA-256 of the output in its manifest, for tools that do not know ours.
    pub sha256: bool,
}

/// What a conversion made.
pub struct Report {
    /// The files.
    pub files: Vec<FileEntry>,
    /// Name and root digest of each disk.
    pub roots: Vec<(String, String)>,
    /// Data bytes.
    pub bytes: u64,
    /// Seconds it took.
    pub seconds: f64,
    /// The manifest beside the output.
    pub manifest: PathBuf,
}

/// Why there is none.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    code: Code,
    message: String,
}

impl Error {
    fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    fn path(path: &Path, e: &io::Error) -> Self {
        let code = match e.kind() {
            io::ErrorKind::NotFound => Code::NotFound,
            io::ErrorKind::PermissionDenied => Code::Forbidden,
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Code::NoSpace,
            io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput => Code::BadRequest,
            _ => Code::Internal,
        };
        Self::new(code, format!("{}: {e}", path.display()))
    }

    /// The stable word.
    pub fn code(&self) -> Code {
        self.code
    }
}

impl From<pipeline::Error> for Error {
    fn from(e: pipeline::Error) -> Self {
        let code = match &e {
            pipeline::Error::NoSpace(_) => Code::NoSpace,
            pipeline::Error::Source { .. } => Code::BadImage,
            pipeline::Error::Mismatch { .. } => Code::VerificationFailed,
            pipeline::Error::Output(_) => Code::Unprocessable,
            _ => Code::Internal,
        };
        Self::new(code, e.to_string())
    }
}

/// Converts; `progress` is told about five times a second, with the stage's name.
pub fn convert(request: &Request, progress: &(dyn Fn(&Progress, &str) + Sync)) -> Result<Report, Error> {
    let began = Instant::now();
    let format = output_format(request)?;
    let (vm, disks) = open_input(request)?;
    if disks.len() > 1 && !matches!(format, pipeline::Format::Ova | pipeline::Format::Ovf) {
        let message =
            format!("{} holds {} disks and {} holds one; choose --format ova or ovf", request.input.display(), disks.len(), format.name());
        return Err(Error::new(Code::Unprocessable, message));
    }
    let (folder, name) = vault::open_user_dir_of(&request.output, true).map_err(|e| Error::path(&request.output, &e))?;
    let place = |e: io::Error| Error::path(&request.output, &e);
    if folder.try_exists(&name).map_err(place)? {
        return Err(Error::new(Code::Conflict, format!("{} exists; remove it or choose another name", request.output.display())));
    }
    let narrow_window = request.narrow_window.then_some(true);
    let options = Options { compression: request.compression, level: request.level, narrow_window, ..Options::default() };
    let job = pipeline::Job {
        id: "convert".to_owned(),
        vm,
        disks: disks.into_iter().map(worker::source_disk).collect(),
        format,
        compression: worker::compression(format, &options),
        pass_on: request.level.is_none(),
        sha256: request.sha256,
        verify: request.verify,
        bandwidth: None,
        cid: crc32fast::hash(name.as_bytes()),
        created: u64::try_from(shared::clock::now().timestamp()).unwrap_or_default(),
        // Nothing resumes a conversion. What is behind a checkpoint may be hashed for the package's `.mf` meanwhile.
        tuning: pipeline::Tuning {
            checkpoint_bytes: 32 << 20,
            checkpoint_every: Duration::from_secs(3600),
            resumable: false,
            ..pipeline::Tuning::default()
        },
    };
    let part_name = format!("{name}.part");
    remove_all(&folder, &part_name).map_err(place)?;
    let made = make(&folder, &part_name, &name, &job, &Listener(progress));
    if made.is_err() {
        remove_all(&folder, &part_name).map_err(place)?;
    }
    let (files, roots, bytes) = made?;
    let parent = request.output.parent().unwrap_or(Path::new(""));
    let manifest = match format {
        pipeline::Format::Ovf => request.output.join(proof::manifest_name(&files[0].path)),
        _ => parent.join(proof::manifest_name(&name)),
    };
    Ok(Report { files, roots, bytes, seconds: began.elapsed().as_secs_f64(), manifest })
}

type Made = (Vec<FileEntry>, Vec<(String, String)>, u64);

/// Writes into the part folder and gives its content the final names.
fn make(folder: &Dir, part_name: &str, name: &str, job: &pipeline::Job, listener: &Listener<'_>) -> Result<Made, Error> {
    let part_error = |e: io::Error| Error::path(Path::new(part_name), &e);
    folder.create_dir(part_name).map_err(part_error)?;
    let part = folder.open_dir(part_name).map_err(part_error)?;
    let mut options = vault::file_options();
    options.read(true).write(true).create(true);
    let journal = part.open_with("journal", &options).map_err(part_error)?.into_std();
    let mut journal = Journal::open(journal, &job.identity()).map_err(part_error)?;
    let output = PartDir::new(part.try_clone().map_err(part_error)?);
    let mut outcome = pipeline::run(job, &output, &mut journal, listener)?;
    drop(journal);
    part.remove_file("journal").map_err(part_error)?;
    let roots = outcome.disks.iter().map(|disk| (disk.name.clone(), hex::encode(disk.root))).collect();
    let key = signing_key().map_err(|e| Error::new(Code::Internal, format!("the signing key: {e}")))?;

    if job.format == pipeline::Format::Ovf {
        proof::write_manifests(&part, &key, (&job.id, &job.vm.name), &outcome, None).map_err(part_error)?;
        vault::rename_without_replacing(folder, part_name, name).map_err(part_error)?;
    } else {
        let written = std::mem::replace(&mut outcome.files[0].path, name.to_owned());
        for disk in &mut outcome.disks {
            name.clone_into(&mut disk.file);
        }
        let manifests = proof::write_manifests(&part, &key, (&job.id, &job.vm.name), &outcome, None).map_err(part_error)?;
        // A manifest of an earlier output of this name is replaced: that output is gone.
        for manifest in &manifests {
            part.rename(manifest, folder, manifest).map_err(part_error)?;
        }
        part.rename(&written, folder, name).map_err(part_error)?;
        folder.remove_dir(part_name).map_err(part_error)?;
    }
    vault::sync_dir(folder).map_err(part_error)?;
    Ok((outcome.files, roots, outcome.data_bytes))
}

fn remove_all(folder: &Dir, name: &str) -> io::Result<()> {
    match folder.remove_dir_all(name) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

fn output_format(request: &Request) -> Result<pipeline::Format, Error> {
    let by_name = || match request.output.extension().and_then(|extension| extension.to_str())? {
        "qcow2" => Some(Format::Qcow2),
        "vhdx" => Some(Format::Vhdx),
        "vhd" | "vpc" => Some(Format::Vhd),
        "vdi" => Some(Format::Vdi),
        "vmdk" => Some(Format::Vmdk),
        "raw" | "img" => Some(Format::Raw),
        "ova" => Some(Format::Ova),
        "ovf" => Some(Format::Ovf),
        _ => None,
    };
    let format = request.format.or_else(by_name).ok_or_else(|| {
        let message = format!("{} does not say its format; give --format {}", request.output.display(), crate::OUTPUT_FORMATS.join("|"));
        Error::new(Code::BadRequest, message)
    })?;
    if format.is_plain() && (request.compression.is_some() || request.level.is_some()) {
        return Err(Error::new(Code::Unprocessable, format!("{format} is never compressed; leave --compression and --level out")));
    }
    if request.compression == Some(Algorithm::Zstd) && format != Format::Qcow2 {
        return Err(Error::new(Code::Unprocessable, format!("zstd is for qcow2 only; {format} uses deflate or nothing")));
    }
    if request.narrow_window && (format != Format::Qcow2 || request.compression == Some(Algorithm::Zstd)) {
        return Err(Error::new(Code::Unprocessable, "--narrow-window is for qcow2 with deflate; leave it out, or choose these"));
    }
    worker::output_format(format.word()).map_err(|e| Error::new(e.code, e.message))
}

fn open_input(request: &Request) -> Result<(shared::vm::Vm, Vec<crate::sources::Opened>), Error> {
    let path = request.input.as_path();
    let real = vault::real_user_path(path).map_err(|e| Error::path(path, &e))?;
    let (folder, name) = vault::open_user_dir_of(&real, false).map_err(|e| Error::path(path, &e))?;
    let options = OpenOptions { follow_chain: request.follow_chain, snapshot: request.snapshot.clone(), ..OpenOptions::default() };
    Local::new(folder).open_with(&name, options).map_err(|e| Error::new(e.code, e.message))
}

/// The user's own signing key, kept beside their other HyperSDK data; one for this run where there is no home.
fn signing_key() -> Result<manifest::SigningKey, identity::Error> {
    let home = std::env::var_os("XDG_DATA_HOME").map(PathBuf::from);
    let home = home.or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".local/share")));
    if let Some(dir) = home.and_then(|home| vault::open_data_dir(&home.join("hypersdk/convert")).ok()) {
        return identity::signing_key(&dir);
    }
    let once = manifest::SigningKey::generate().and_then(|pkcs8| manifest::SigningKey::from_pkcs8(&pkcs8));
    once.map_err(|e| identity::Error::Key(e.to_string()))
}

struct Listener<'a>(&'a (dyn Fn(&Progress, &str) + Sync));

impl Watch for Listener<'_> {
    fn progress(&self, s: &Snapshot) {
        let stage = match s.stage {
            Stage::Preparing => "preparing",
            Stage::Copying => "copying",
            Stage::Verifying => "verifying",
        };
        let progress = Progress { data: s.data_bytes, read: s.read, durable: s.durable, verified: s.verified, resumed: s.resumed };
        (self.0)(&progress, stage);
    }

    fn log(&self, _: tracing::Level, _: Stage, text: &str) {
        tracing::info!("{text}");
    }

    fn stop(&self) -> Option<pipeline::Stop> {
        None
    }
}

/// What a check found.
pub struct Verdict {
    /// Nothing is wrong.
    pub intact: bool,
    /// Fingerprint of the signer.
    pub signer: String,
    /// Whether the caller named that signer.
    pub trusted: bool,
    /// A sentence for each thing that is wrong.
    pub damage: Vec<String>,
    /// Name, root digest and capacity of each disk.
    pub disks: Vec<(String, String, u64)>,
    /// Names of the files.
    pub files: Vec<String>,
}

/// Checks an export against its manifest, offline. `path` is the manifest, or a file that it covers.
pub fn verify(path: &Path, trust: Option<&str>) -> Result<Verdict, Error> {
    let real = vault::real_user_path(path).map_err(|e| Error::path(path, &e))?;
    let (folder, name) = vault::open_user_dir_of(&real, false).map_err(|e| Error::path(path, &e))?;
    let missing = || {
        let beside = proof::manifest_name(&name);
        io::Error::new(io::ErrorKind::NotFound, format!("there is no manifest for it (neither {beside} nor another that names it)"))
    };
    let found = proof::find_manifest(&folder, &name).and_then(|found| found.ok_or_else(missing));
    let (bytes, from) = found.map_err(|e| Error::path(path, &e))?;
    let (manifest, signed) = Signed::open(&bytes, trust).map_err(|e| Error::new(Code::VerificationFailed, format!("{from}: {e}")))?;
    let opener = |name: &str| vault::open_regular(&folder, Path::new(name));
    // A layer of a chain: the points beneath lie beside the folder that it is in.
    let points = real.parent().map(|folder| vault::open_user_dir_of(folder, false));
    let below = |over: &Over| match &points {
        Some(Ok((points, _))) => points::below(points, over),
        _ => Err(FormatError::Unsupported(format!("it lies over {} of {}, which is not beside its folder", over.file, over.job))),
    };
    let report = pipeline::verify_files_at(&manifest, &opener, &below, None, &|_| true)?;
    Ok(Verdict {
        intact: report.intact(),
        signer: manifest::fingerprint(&signed.public_key),
        trusted: trust.is_some(),
        damage: proof::damage(&report),
        disks: manifest.disks.iter().map(|disk| (disk.name.clone(), disk.root.clone(), disk.capacity)).collect(),
        files: manifest.files.iter().map(|file| file.path.clone()).collect(),
    })
}

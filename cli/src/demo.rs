//! `hypersdk demo`: the main job once, from nothing to a proof.
//!
//! Owns: a throw-away installation and what is shown of its one job. It goes the whole way that a user goes: REST, queue, agent, engine,
//! publication, and then `verify`, which shares no state with the job.
//! Never: leaves a process, and without `--keep` a file, behind; an interrupt cleans up too. A crash here costs the demo's folder.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use shared::ids::random_hex;
use shared::secret::Secret;
use shared::vault;

use crate::args::Demo;
use crate::client::Client;
use crate::failure::{Exit, Failure, Outcome};
use crate::progress::Display;
use crate::up::{Installation, Settings, Stops};
use crate::{jobs, local, login, output, sample, watch};

/// Name of the sample's file and, without its end, of the VM.
const SAMPLE: &str = "demo-vm.raw";
/// The agent is connected and has told its VMs within this time.
const INVENTORY: Duration = Duration::from_secs(20);
/// Between two looks at the job: it may be over in a second.
const POLL: Duration = Duration::from_millis(100);

/// Where the demo works and on what.
struct Scene {
    /// Holds everything, removed at the end.
    folder: PathBuf,
    /// The folder that becomes the provider `local`.
    vms: PathBuf,
    /// The image's name in it.
    image: String,
    /// The sample was made here, so its digest can be checked from outside.
    is_sample: bool,
}

/// Runs the demo.
pub fn demo(args: &Demo) -> Outcome {
    let began = Instant::now();
    shared::telemetry::start(false, "error", None);
    let scene = Scene::set(args)?;
    let result = actix::System::new().block_on(run(&scene, args));
    let result = result.map(|shown| {
        output::pairs(8, &[("job", shown), ("in all", format!("{:.1} s", began.elapsed().as_secs_f64())), ("memory", peak_memory())]);
    });
    if args.keep {
        output::line(format!("Kept: {}", scene.folder.display()));
        return result;
    }
    remove(&scene.folder)?;
    if result.is_ok() {
        output::line("Stopped, and its folder removed; --keep would keep it.");
    }
    result
}

impl Scene {
    fn set(args: &Demo) -> Result<Self, Failure> {
        let Some(image) = &args.image else { return Self::with_sample() };
        let real = vault::real_user_path(image).map_err(|e| at(image, &e))?;
        let name = real.file_name().and_then(|name| name.to_str());
        let name = name.ok_or_else(|| Failure::usage(format!("{}: its name is not UTF-8", image.display())))?.to_owned();
        let vms = real.parent().unwrap_or(Path::new("/")).to_owned();
        // A VM of the user's own may be larger than the system's temporary folder.
        let folder = std::path::absolute(format!("hypersdk-demo-{}", random_hex::<4>())).map_err(|e| at(image, &e))?;
        vault::open_data_dir(&folder).map_err(|e| at(&folder, &e))?;
        Ok(Self { folder, vms, image: name, is_sample: false })
    }

    fn with_sample() -> Result<Self, Failure> {
        let folder = vault::temporary_dir("hypersdk-demo").map_err(|e| Failure::failed(format!("no temporary folder: {e}")))?;
        let vms = folder.join("vms");
        let made = vault::open_data_dir(&vms).and_then(|dir| sample::write(&dir.create(SAMPLE)?.into_std()));
        if let Err(e) = made {
            let _ = remove(&folder);
            return Err(at(&vms, &e));
        }
        Ok(Self { folder, vms, image: SAMPLE.to_owned(), is_sample: true })
    }
}

/// Starts the installation, does the job, stops the installation, whatever came of the job.
async fn run(scene: &Scene, args: &Demo) -> Result<String, Failure> {
    let mut stops = Stops::listen()?;
    let password = Secret::new(random_hex::<16>());
    let loopback = std::net::SocketAddr::from(([127, 0, 0, 1], 0));
    let settings = Settings {
        listen: loopback,
        grpc_listen: loopback,
        data_dir: scene.folder.join("data"),
        vms: Some(scene.vms.clone()),
        controller: controller::Config { admin_password: Some(password.clone()), bcrypt_cost: 10, ..controller::Config::default() },
    };
    let mut installation = Installation::start(settings).await?;
    let (url, fingerprint) = (installation.url.clone(), installation.running.fingerprint.clone());
    output::pairs(8, &[("controller", url.clone()), ("folder", scene.folder.display().to_string())]);
    let result = tokio::select! {
        result = job(scene, args, &url, &fingerprint, &password) => result,
        () = stops.next() => Err(Failure::failed("interrupted")),
        failure = installation.agent_ended() => Err(failure),
    };
    installation.stop().await;
    result
}

async fn job(scene: &Scene, args: &Demo, url: &str, fingerprint: &str, password: &Secret) -> Result<String, Failure> {
    let mut client = login::pinned(url, fingerprint)?;
    login::authenticate(&mut client, "admin", password).await?;
    let vm = find(&client, scene).await?;
    let name = output::text(&vm, "name");
    let body =
        json!({ "type": "export", "provider": "local", "vm_name": vm["id"], "format": args.format, "options": { "compress": true } });
    let began = Instant::now();
    let created = client.post("/jobs", Some(&body)).await?;
    let id = jobs::id_of(&created)?;
    output::pairs(8, &[("job", format!("{id}: export {name} as {}", args.format))]);
    let mut display = Display::new(false);
    let ended = watch::until_end(&client, &id, POLL, &mut display, None).await;
    display.clear();
    let ended = ended?;
    let seconds = began.elapsed().as_secs_f64();
    if output::text(&ended, "status") != "completed" {
        return jobs::conclude(&ended, crate::args::Style::Table).map(|()| String::new());
    }
    prove(scene, &ended).await?;
    let data = output::number(&ended, "bytes_total");
    Ok(format!("{seconds:.1} s, {} of data copied and read back, {}", output::bytes(data), local::speed(data, seconds)))
}

/// Waits until the agent has told the VM.
async fn find(client: &Client, scene: &Scene) -> Result<Value, Failure> {
    let deadline = Instant::now() + INVENTORY;
    let stem = Path::new(&scene.image).file_stem().and_then(|stem| stem.to_str()).unwrap_or(&scene.image).to_owned();
    let mut seen = 0;
    loop {
        // Counted before the search: an inventory that comes between the two must not look as if it lacked the VM.
        if seen == 0 {
            seen = client.list("/vms/list", &[], 1).await?.total;
        }
        // By the file's name, since an OVA's VM bears the name in its OVF.
        let listing = client.list("/vms/list", &[("search", scene.image.clone())], 200).await?;
        let vm = listing.rows.into_iter().find(|vm| vm.get("id").and_then(Value::as_str) == Some(scene.image.as_str()));
        if let Some(vm) = vm {
            let problem = output::text(&vm, "problem");
            return if problem.is_empty() { Ok(vm) } else { Err(Failure::failed(format!("{}: {problem}", scene.image))) };
        }
        if seen > 0 || Instant::now() > deadline {
            // The inventory of a connection comes whole: what is not in it is no VM.
            let message = match seen {
                0 => "the agent has told no VM within 20 s".to_owned(),
                _ => format!("{} is no VM image by its name: {stem}.raw, .qcow2, .vmdk, .img or .ova would be", scene.image),
            };
            return Err(Failure::failed(message));
        }
        tokio::time::sleep(POLL).await;
    }
}

/// Reads the export once more, independent of the job, and compares it with what was read from the source.
async fn prove(scene: &Scene, job: &Value) -> Outcome {
    let result = &job["result"];
    let disks = result["disks"].as_array().map(Vec::as_slice).unwrap_or_default();
    let manifests: Vec<PathBuf> =
        result["manifests"].as_array().into_iter().flatten().filter_map(Value::as_str).map(PathBuf::from).collect();
    let Some(folder) = manifests.first().and_then(|manifest| manifest.parent()).filter(|_| !disks.is_empty()) else {
        return Err(Failure::new(Exit::VerificationFailed, "the job's result names no disk or no manifest"));
    };
    // Paths are long and the folder is one, so names follow it.
    let name = |path: &Path| path.strip_prefix(folder).unwrap_or(path).display().to_string();
    output::line(format!("\nExported {} to", output::text(job, "vm_name")));
    output::line(folder.display().to_string());
    for file in result["files"].as_array().into_iter().flatten() {
        output::pairs(
            8,
            &[
                ("file", format!("{}, {}", name(Path::new(&output::text(file, "path"))), output::bytes(output::number(file, "size")))),
                ("sha256", output::text(file, "sha256")),
            ],
        );
    }
    for manifest in &manifests {
        output::pairs(8, &[("manifest", name(manifest))]);
    }
    output::pairs(8, &[("signer", output::text(result, "signer"))]);

    output::line("\nRead once more by `verify`, which knows only these files; digests of the disks:");
    let signer = output::text(result, "signer");
    for manifest in manifests {
        let trust = signer.clone();
        let checked = tokio::task::spawn_blocking(move || agent::convert::verify(&manifest, Some(&trust))).await;
        let verdict = checked.map_err(|e| Failure::failed(e.to_string()))?.map_err(|e| local::engine_failure(&e))?;
        for sentence in &verdict.damage {
            output::line(output::clean(sentence));
        }
        local::conclude(&verdict, true)?;
        for (name, root, capacity) in &verdict.disks {
            let source =
                disks.iter().find(|disk| output::text(disk, "name") == *name).map(|disk| output::text(disk, "root")).unwrap_or_default();
            output::pairs(
                8,
                &[
                    ("disk", format!("{}, {}", output::clean(name), output::bytes(*capacity))),
                    ("source", source.clone()),
                    ("output", root.clone()),
                ],
            );
            if source != *root {
                return Err(Failure::new(Exit::VerificationFailed, format!("{name}: the output is not what was read from the source")));
            }
        }
    }
    if scene.is_sample {
        second_opinion(scene, disks).await?;
    }
    output::line("Equal: what arrived is what left.\n");
    Ok(())
}

/// The sample is raw, so its digest can be had without the engine.
async fn second_opinion(scene: &Scene, disks: &[Value]) -> Outcome {
    let path = scene.vms.join(&scene.image);
    let read = tokio::task::spawn_blocking(move || vault::open_user_file(&path).and_then(|file| sample::root(&file))).await;
    let root = read.map_err(|e| Failure::failed(e.to_string()))?.map_err(|e| at(&scene.vms, &e))?;
    output::pairs(8, &[("sample", root.clone())]);
    match disks.first().map(|disk| output::text(disk, "root")) == Some(root) {
        true => Ok(()),
        false => Err(Failure::new(Exit::VerificationFailed, "the sample's own digest differs from the one that the engine read")),
    }
}

/// Largest resident size of this process so far, as the kernel counts it: controller, agent and demo together.
fn peak_memory() -> String {
    let status = vault::read_config(Path::new("/proc/self/status")).unwrap_or_default();
    let text = String::from_utf8_lossy(&status);
    let peak = text
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    peak.map(|kib| format!("{} at its peak, controller and agent together", output::bytes(kib * 1024))).unwrap_or_default()
}

fn remove(folder: &Path) -> Outcome {
    let removed = vault::open_data_dir(folder).and_then(|dir| dir.remove_open_dir_all());
    removed.map_err(|e| Failure::failed(format!("{} could not be removed: {e}", folder.display())))
}

fn at(path: &Path, error: &std::io::Error) -> Failure {
    Failure::failed(format!("{}: {error}", path.display()))
}

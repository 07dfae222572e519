//! What arrived is what left: every form of a real guest to every format, by REST jobs against real processes, judged by other people's tools.
//!
//! Owns: the identity promise. Never: asks our own reader whether our own writer was right, but where the promise is about that reader.
//! A crash here costs the test.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use shared::manifest::Signed;

use crate::harness::client::file_of;
use crate::harness::fleet::{Fleet, Plan};
use crate::harness::images::{check, convert, flip, foreign_ova, guest, identical, link, pattern, qemu_img, sha256, untar};
use crate::harness::process::{output, run};
use crate::harness::{binary, seconds};

const MIB: u64 = 1 << 20;

/// The forms in which a VM comes, as VMs of these names.
const FORMS: [&str; 8] = ["stream", "sparse", "flat", "split-sparse", "split-flat", "cow", "plain", "package"];

/// Puts the guest into a folder in a form.
fn put(form: &str, vms: &Path) {
    let raw = &guest().raw;
    let vmdk = |subformat: &str| {
        convert(("raw", raw), ("vmdk", &vms.join(format!("{form}.vmdk"))), &["-o", &format!("subformat={subformat}")]);
    };
    match form {
        "stream" => vmdk("streamOptimized"),
        "sparse" => vmdk("monolithicSparse"),
        "flat" => vmdk("monolithicFlat"),
        "split-sparse" => vmdk("twoGbMaxExtentSparse"),
        "split-flat" => vmdk("twoGbMaxExtentFlat"),
        "cow" => convert(("raw", raw), ("qcow2", &vms.join("cow.qcow2")), &[]),
        "plain" => link(raw, &vms.join("plain.raw")),
        "package" => foreign_ova(&vms.join("package.ova"), "package", &[raw]),
        other => panic!("no form {other}"),
    }
}

/// The formats and the options that matter, with a label.
fn targets() -> [(&'static str, &'static str, Value); 7] {
    [
        ("ova", "ova", json!({})),
        ("ovf", "ovf", json!({})),
        ("vmdk", "vmdk", json!({})),
        ("raw", "raw", json!({})),
        ("qcow2", "qcow2", json!({})),
        ("qcow2 deflate", "qcow2", json!({"compress": true})),
        ("qcow2 zstd", "qcow2", json!({"compress": true, "compression": "zstd"})),
    ]
}

/// Judges a completed export against the source's raw disks, and answers where its disks lie.
fn judge(label: &str, job: &Value, sources: &[&Path]) -> Vec<PathBuf> {
    let folder = file_of(job, "").parent().unwrap().to_owned();
    assert_eq!(folder.file_name().unwrap().to_str(), job["id"].as_str(), "each job has a folder of its own: {job:#}");
    assert_eq!(job["result"]["verified"], true, "{job:#}");
    assert_eq!(job["result"]["receipt"]["read_back"], "cache_dropped", "{job:#}");
    assert!(job["result"]["receipt"]["blocks_verified"].as_u64().is_some_and(|blocks| blocks > 0), "{job:#}");
    for file in job["result"]["files"].as_array().unwrap() {
        let path = Path::new(file["path"].as_str().unwrap());
        assert_eq!(file["size"], std::fs::metadata(path).unwrap().len(), "{label}: {file}");
        if let Some(digest) = file["sha256"].as_str() {
            assert_eq!(digest, sha256(path), "{label}: {file}");
        }
    }
    let (format, disks) = match label {
        "ova" => ("vmdk", opened_package(&file_of(job, ".ova"))),
        "ovf" => ("vmdk", opened_folder(&folder)),
        "vmdk" | "raw" => (label, with_ending(&folder, label)),
        _ => ("qcow2", with_ending(&folder, "qcow2")),
    };
    assert_eq!(disks.len(), sources.len(), "{label}: {disks:?}");
    for (disk, source) in disks.iter().zip(sources) {
        identical(("raw", source), (format, disk));
        check(format, disk);
        if let Some(algorithm) = label.strip_prefix("qcow2 ") {
            let info: Value = serde_json::from_str(&qemu_img(&["info", "--output=json", disk.to_str().unwrap()])).unwrap();
            let expected = if algorithm == "deflate" { "zlib" } else { algorithm };
            assert_eq!(info["format-specific"]["data"]["compression-type"], expected, "{info:#}");
        }
    }
    disks
}

fn with_ending(folder: &Path, ending: &str) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|found| found == ending));
    paths.sort();
    paths
}

/// A foreign tar reads it, the OVF lies first, and the manifest's digests hold by sha256sum.
fn opened_package(ova: &Path) -> Vec<PathBuf> {
    let into = ova.with_extension("opened");
    let members = untar(ova, &into);
    assert!(members[0].ends_with(".ovf"), "DSP0243: the OVF lies first: {members:?}");
    opened_folder(&into)
}

fn opened_folder(folder: &Path) -> Vec<PathBuf> {
    let [manifest] = &with_ending(folder, "mf")[..] else { panic!("one .mf in {}", folder.display()) };
    let [ovf] = &with_ending(folder, "ovf")[..] else { panic!("one .ovf in {}", folder.display()) };
    let text = std::fs::read_to_string(manifest).unwrap();
    let mut lines = String::new();
    for line in text.lines().filter(|line| !line.trim().is_empty()) {
        let (file, digest) = line.strip_prefix("SHA256(").and_then(|rest| rest.split_once(")=")).unwrap_or_else(|| panic!("{line:?}"));
        lines += &format!("{}  {file}\n", digest.trim());
    }
    let sums = folder.join("sums");
    std::fs::write(&sums, &lines).unwrap();
    run(Command::new("sha256sum").args(["--check", "--strict"]).arg(&sums).current_dir(folder));
    let disks = with_ending(folder, "vmdk");
    assert_eq!(lines.lines().count(), disks.len() + 1, "the manifest names the OVF and every disk:\n{text}");
    let description = std::fs::read_to_string(ovf).unwrap();
    for disk in &disks {
        let name = disk.file_name().unwrap().to_str().unwrap();
        let size = std::fs::metadata(disk).unwrap().len();
        assert!(description.contains(name) && description.contains(&format!("\"{size}\"")), "{name} of {size} bytes:\n{description}");
    }
    disks
}

/// `hypersdk verify`: its exit code and everything it said.
fn verify(file: &Path, more: &[&str]) -> (i32, String) {
    let said = output(Command::new(binary("hypersdk")).arg("verify").arg(file).args(more));
    let text = format!("{}{}", String::from_utf8_lossy(&said.stdout), String::from_utf8_lossy(&said.stderr));
    (said.status.code().unwrap_or(-1), text)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_form_of_the_guest_becomes_every_format_and_stays_the_same_disk() {
    let fleet = Fleet::start("identity", Plan::plain(), |vms| FORMS.iter().for_each(|form| put(form, vms))).await;
    let vms = fleet.refresh().await;
    let names: Vec<&str> = vms.iter().filter_map(|vm| vm["name"].as_str()).collect();
    assert_eq!(
        names,
        { FORMS.map(str::to_owned).into_iter().collect::<std::collections::BTreeSet<_>>() }.iter().collect::<Vec<_>>(),
        "{vms:#?}"
    );
    for form in FORMS {
        let mut jobs = Vec::new();
        for (label, format, options) in targets() {
            jobs.push((label, fleet.client.export(form, format, options).await));
        }
        let mut sizes = Vec::new();
        for (label, id) in jobs {
            let job = fleet.client.completed(&id, seconds(60)).await;
            println!("{form} to {label}: {} bytes", job["result"]["counters"]["bytes_read"]);
            let disks = judge(label, &job, &[&guest().raw]);
            let stored = std::fs::metadata(&disks[0]).unwrap();
            sizes.push((label, std::os::unix::fs::MetadataExt::blocks(&stored) * 512));
            std::fs::remove_dir_all(fleet.exports().join(&id)).unwrap();
        }
        let size = |label: &str| sizes.iter().find(|(found, _)| *found == label).unwrap().1;
        assert!(size("qcow2 deflate") < size("qcow2") && size("qcow2 zstd") < size("qcow2"), "compression compresses: {sizes:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_of_several_disks_and_a_disk_of_several_extents_arrive_whole() {
    let mut second = PathBuf::new();
    let mut large = PathBuf::new();
    let fleet = Fleet::start("several", Plan::plain(), |vms| {
        std::fs::create_dir(vms.join("pair")).unwrap();
        convert(("raw", &guest().raw), ("qcow2", &vms.join("pair/1-system.qcow2")), &[]);
        second = vms.join("pair/2-data.raw");
        pattern(&second, 96 * MIB + 512, &[(0, 5 * MIB + 512), (64 * MIB, 9 * MIB), (96 * MIB, 512)], 7);
        foreign_ova(&vms.join("foreign.ova"), "foreign", &[&guest().raw, &second.clone()]);
        // Three extents of 2 GB, data on both sides of each border.
        large = vms.parent().unwrap().join("large-source");
        let gib = 1 << 30;
        pattern(&large, 5 * gib, &[(0, MIB), (2 * gib - 3 * MIB, 6 * MIB), (4 * gib - MIB, 2 * MIB), (5 * gib - 4096, 4096)], 8);
        convert(("raw", &large), ("vmdk", &vms.join("large.vmdk")), &["-o", "subformat=twoGbMaxExtentSparse"]);
    })
    .await;
    let vms = fleet.refresh().await;
    let foreign = vms.iter().find(|vm| vm["name"] == "foreign").unwrap_or_else(|| panic!("{vms:#?}"));
    assert_eq!(
        (&foreign["cpu"], &foreign["memory_mb"], foreign["disks"].as_array().unwrap().len()),
        (&json!(3), &json!(768), 2),
        "{foreign:#}"
    );
    assert_eq!((&foreign["nics"][0]["network"], foreign["os"].as_str()), (&json!("VM Network"), Some("linux")), "{foreign:#}");
    for (vm, sources) in [
        ("pair", vec![guest().raw.as_path(), &second]),
        ("foreign", vec![guest().raw.as_path(), &second]),
        ("large", vec![large.as_path()]),
    ] {
        for (label, format, options) in targets() {
            let id = fleet.client.export(vm, format, options).await;
            let job = fleet.client.completed(&id, seconds(60)).await;
            judge(label, &job, &sources);
            std::fs::remove_dir_all(fleet.exports().join(&id)).unwrap();
        }
    }
    // A package of ours is a source like any other.
    let id = fleet.client.export("pair", "ova", json!({})).await;
    let job = fleet.client.completed(&id, seconds(60)).await;
    link(&file_of(&job, ".ova"), &fleet.vms().join("again.ova"));
    let kept = fleet.scratch.join("kept-second");
    link(&second, &kept);
    std::fs::remove_dir_all(fleet.vms().join("pair")).unwrap();
    let vms = fleet.refresh().await;
    let again = vms.iter().find(|vm| vm["path"] == "/again.ova").unwrap_or_else(|| panic!("{vms:#?}"));
    assert_eq!((again["name"].as_str(), again["disks"].as_array().map(Vec::len)), (Some("pair"), Some(2)), "{again:#}");
    let id = fleet.client.export("/again.ova", "raw", json!({})).await;
    judge("raw", &fleet.client.completed(&id, seconds(60)).await, &[&guest().raw, &kept]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_snapshots_inside_a_qcow2_come_along_as_disks_of_their_own() {
    let mut states = Vec::new();
    let fleet = Fleet::start("snapshots", Plan::plain(), |vms| {
        std::fs::create_dir(vms.join("kept")).unwrap();
        let (disk, kept) = (vms.join("kept/system.qcow2"), vms.parent().unwrap().join("states"));
        std::fs::create_dir(&kept).unwrap();
        pattern(&kept.join("first"), 48 * MIB, &[(0, 9 * MIB), (40 * MIB, MIB)], 11);
        convert(("raw", &kept.join("first")), ("qcow2", &disk), &[]);
        pattern(&vms.join("kept/zdata.raw"), 8 * MIB, &[(0, MIB)], 12);
        let path = disk.to_str().unwrap();
        for (name, write) in [("before the update", "write -P 171 4M 7M"), ("../odd\u{e9}", "write -z 0 2M"), ("", "")] {
            let state = kept.join(states.len().to_string());
            convert(("qcow2", &disk), ("raw", &state), &[]);
            states.push((name, state));
            if !write.is_empty() {
                qemu_img(&["snapshot", "-c", name, path]);
                run(Command::new("qemu-io").args(["-f", "qcow2", "-c", write, path]));
            }
        }
    })
    .await;
    let vms = fleet.refresh().await;
    assert_eq!((vms.len(), &vms[0]["snapshots"]), (1, &json!(2)), "{vms:#?}");
    for format in ["raw", "qcow2", "vmdk"] {
        let id = fleet.client.export("kept", format, json!({"include_snapshots": true})).await;
        let job = fleet.client.completed(&id, seconds(60)).await;
        let disks = job["result"]["disks"].as_array().unwrap();
        let found: Vec<_> = disks
            .iter()
            .map(|disk| (disk["name"].as_str().unwrap(), disk["snapshot"]["name"].as_str(), disk["file"].as_str().unwrap()))
            .collect();
        let file = |ending: &str| format!("kept-disk-{ending}.{format}");
        assert_eq!(
            found.iter().map(|(name, snapshot, file)| (*name, *snapshot, (*file).to_owned())).collect::<Vec<_>>(),
            [
                ("disk-0", None, file("0")),
                ("disk-1", None, file("1")),
                ("disk-0-snapshot-1", Some(states[0].0), file("0-snapshot-1")),
                ("disk-0-snapshot-2", Some(states[1].0), file("0-snapshot-2")),
            ],
            "{job:#}"
        );
        assert!(
            disks[2]["snapshot"]["created_at"].as_str().is_some_and(|at| at.ends_with('Z')) && disks[2]["snapshot"]["id"] == "1",
            "{job:#}"
        );
        for (of, state) in [(0, 2), (2, 0), (3, 1)] {
            identical(("raw", &states[state].1), (format, &fleet.exports().join(&id).join(found[of].2)));
        }
    }
    // Without the wish there is the present state alone, and a package holds no other.
    let job = fleet.client.completed(&fleet.client.export("kept", "raw", json!({})).await, seconds(60)).await;
    assert_eq!(job["result"]["disks"].as_array().unwrap().len(), 2, "{job:#}");
    let body = json!({"type": "export", "provider": "local", "vm_name": "kept", "format": "ova", "options": {"include_snapshots": true}});
    let said = fleet.client.post("/jobs", body).await.refused(422, "unprocessable");
    assert!(said.contains("one state") && said.contains("qcow2"), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flipped_block_is_caught_and_named() {
    let areas = [(8 * MIB, 16 * MIB)];
    let fleet = Fleet::start("flipped", Plan::plain(), |vms| pattern(&vms.join("marked.raw"), 64 * MIB, &areas, 3)).await;
    let key = {
        let job = fleet.client.completed(&fleet.client.export("marked", "raw", json!({})).await, seconds(60)).await;
        let bytes = std::fs::read(job["result"]["manifest"].as_str().unwrap()).unwrap();
        let (manifest, signed) = Signed::open(&bytes, None).unwrap();
        assert_eq!((manifest.job.as_str(), manifest.vm.as_str()), (job["id"].as_str().unwrap(), "marked"));
        shared::manifest::fingerprint(&signed.public_key)
    };
    for (label, format, options) in targets() {
        let id = fleet.client.export("marked", format, options).await;
        let job = fleet.client.completed(&id, seconds(60)).await;
        let file = match label {
            "ova" => file_of(&job, ".ova"),
            "ovf" => file_of(&job, ".vmdk"),
            _ => file_of(&job, format),
        };
        let (code, text) = verify(&file, &[]);
        assert!(
            code == 0 && text.contains("Intact") && text.contains("unknown"),
            "{label}, untouched, without a trusted key: {code} {text}"
        );
        let manifest = PathBuf::from(job["result"]["manifest"].as_str().unwrap());
        assert!(manifest.to_str().unwrap().ends_with(".manifest.json"), "{job:#}");
        let (code, text) = verify(&manifest, &["--trust", &key]);
        assert!(code == 0 && !text.contains("unknown"), "{label}, by its manifest, trusted: {code} {text}");
        let (code, text) = verify(&file, &["--trust", "00112233445566778899aabbccddeeff"]);
        assert_eq!(code, 5, "{label}, another signer than trusted: {text}");

        // Byte 13 MiB + 5 of the disk lies in block 3. Where it lies in the file only plain formats say beforehand.
        let at = 13 * MIB + 5;
        let known = match label {
            "raw" => Some(at),
            "qcow2" => Some(place(&file, at)),
            _ => None,
        };
        flip(&file, known.unwrap_or_else(|| std::fs::metadata(&file).unwrap().len() / 2));
        let (code, text) = verify(&file, &[]);
        assert_eq!(code, 5, "{label}, flipped: {text}");
        let named = (2..6).find(|block| text.contains(&format!("block {block}")));
        assert!(named.is_some() && (known.is_none() || named == Some(3)), "{label}: the damaged block is named: {text}");
        println!("{label}: {}", text.lines().find(|line| line.contains("block")).unwrap_or_default());
    }
}

/// Where qemu-img says that a byte of the disk lies in the file.
fn place(file: &Path, at: u64) -> u64 {
    let map: Value = serde_json::from_str(&qemu_img(&["map", "--output=json", "-f", "qcow2", file.to_str().unwrap()])).unwrap();
    let areas = map.as_array().unwrap();
    let found = areas
        .iter()
        .find(|area| (area["start"].as_u64().unwrap()..area["start"].as_u64().unwrap() + area["length"].as_u64().unwrap()).contains(&at));
    let area = found.unwrap();
    area["offset"].as_u64().unwrap() + at - area["start"].as_u64().unwrap()
}

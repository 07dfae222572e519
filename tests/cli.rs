//! The binary as people run it: demo, convert, verify, and the client verbs against a running `up`.
//!
//! Owns: what is printed for people and programs, and the six exit codes. Never: asks the engine in process. A crash here costs the test.

use std::path::Path;
use std::process::{Command, Output};
use std::time::Instant;

use serde_json::Value;

use crate::harness::fleet::{PASSWORD, Up};
use crate::harness::images::{check, convert, flip, foreign_ova, guest, identical, link, pattern, untar};
use crate::harness::process::output;
use crate::harness::{Scratch, binary};

const MIB: u64 = 1 << 20;

/// Runs `hypersdk` with a home of its own.
pub fn hypersdk(home: &Path, args: &[&str], env: &[(&str, &str)]) -> (i32, String, String) {
    let mut command = Command::new(binary("hypersdk"));
    // What the harness takes out of the environment must be set after that.
    command.args(args).current_dir(home);
    let Output { status, stdout, stderr } = {
        let mut wrapped = Command::new("env");
        wrapped.arg(format!("HYPERSDK_HOME={}", home.display())).args(env.iter().map(|(name, value)| format!("{name}={value}")));
        output(wrapped.arg(command.get_program()).args(command.get_args()).current_dir(home))
    };
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (status.code().unwrap_or(-1), text(stdout), text(stderr))
}

/// What it printed, where it ended well.
#[track_caller]
pub fn done(result: (i32, String, String)) -> String {
    assert_eq!(result.0, 0, "{}\n{}", result.1, result.2);
    result.1
}

fn files(folder: &Path) -> usize {
    std::fs::read_dir(folder).unwrap().count()
}

#[test]
fn the_demo_proves_itself_and_leaves_nothing() {
    let scratch = Scratch::new("demo");
    let (home, temporary) = (scratch.dir("home"), scratch.dir("tmp"));
    let env = [("TMPDIR", temporary.to_str().unwrap())];
    let start = Instant::now();
    let said = done(hypersdk(&home, &["demo"], &env));
    println!("demo took {:.1} s:\n{said}", start.elapsed().as_secs_f64());
    for word in ["sha256", "source", "output", "/s", "Equal"] {
        assert!(said.contains(word), "{word} in:\n{said}");
    }
    assert_eq!((files(&temporary), files(&home)), (0, 0), "a folder was left behind");
    // With a disk of somebody's own, in any form.
    let images = scratch.dir("images");
    let at = |name: &str| images.join(name);
    link(&guest().raw, &at("own.raw"));
    convert(("raw", &guest().raw), ("qcow2", &at("own.qcow2")), &["-c"]);
    convert(("raw", &guest().raw), ("vmdk", &at("own.vmdk")), &["-o", "subformat=streamOptimized"]);
    foreign_ova(&at("own.ova"), "own", &[&guest().raw]);
    for name in ["own.raw", "own.qcow2", "own.vmdk", "own.ova"] {
        let said = done(hypersdk(&home, &["demo", at(name).to_str().unwrap()], &env));
        assert!(said.contains("Equal"), "{name}:\n{said}");
    }
    assert_eq!((files(&temporary), files(&home), files(&images)), (0, 0, 4), "a folder was left behind");
    let (code, _, complaint) = hypersdk(&home, &["demo", "nothing.raw"], &env);
    assert!(code != 0 && complaint.contains("nothing.raw"), "{code} {complaint}");
}

#[test]
fn convert_is_equal_to_qemu_img_for_every_pair() {
    let scratch = Scratch::new("convert");
    let home = scratch.dir("home");
    let raw = scratch.join("in.raw");
    pattern(&raw, 100 * MIB + 512, &[(0, 3 * MIB + 512), (50 * MIB, 20 * MIB), (100 * MIB, 512)], 9);
    for (name, format, options) in [
        ("in-stream.vmdk", "vmdk", "subformat=streamOptimized"),
        ("in-sparse.vmdk", "vmdk", "subformat=monolithicSparse"),
        ("in-flat.vmdk", "vmdk", "subformat=monolithicFlat"),
        ("in-2.qcow2", "qcow2", "compat=0.10"),
        ("in-512.qcow2", "qcow2", "cluster_size=512"),
        ("in-2m.qcow2", "qcow2", "cluster_size=2M"),
        ("in.vhdx", "vhdx", "subformat=dynamic"),
        ("in.vhd", "vpc", "subformat=dynamic,force_size=on"),
        ("in.vdi", "vdi", "static=off"),
    ] {
        convert(("raw", &raw), (format, &scratch.join(name)), &["-o", options]);
    }
    convert(("raw", &raw), ("qcow2", &scratch.join("in-zlib.qcow2")), &["-c"]);
    convert(("raw", &raw), ("qcow2", &scratch.join("in-zstd.qcow2")), &["-c", "-o", "compression_type=zstd"]);
    foreign_ova(&scratch.join("in.ova"), "in", &[&raw]);
    let inputs = [
        "in.raw",
        "in-stream.vmdk",
        "in-sparse.vmdk",
        "in-flat.vmdk",
        "in-2.qcow2",
        "in-512.qcow2",
        "in-2m.qcow2",
        "in-zlib.qcow2",
        "in-zstd.qcow2",
        "in.vhdx",
        "in.vhd",
        "in.vdi",
        "in.ova",
    ];
    let outputs: [(&str, &[&str]); 11] = [
        ("out.raw", &[]),
        ("out.qcow2", &[]),
        ("out.qcow2", &["--compression", "deflate"]),
        ("out.qcow2", &["--compression", "deflate", "--level", "6"]),
        ("out.qcow2", &["--narrow-window", "--verify"]),
        ("out.qcow2", &["--compression", "zstd", "--level", "3"]),
        ("out.vmdk", &["--verify"]),
        ("out.ova", &[]),
        ("out.vhdx", &["--verify"]),
        ("out.vhd", &["--verify"]),
        ("out.vdi", &["--verify"]),
    ];
    for input in inputs {
        for (name, more) in outputs {
            let folder = scratch.dir("out");
            let (from, to) = (scratch.join(input), folder.join(name));
            let args = [&["convert", "--quiet"], more, &[from.to_str().unwrap(), to.to_str().unwrap()]].concat();
            let said = done(hypersdk(&home, &args, &[]));
            assert_eq!(said, "", "--quiet");
            match name {
                "out.ova" => {
                    let members = untar(&to, &folder.join("opened"));
                    let disk = members.iter().find(|member| member.ends_with(".vmdk")).unwrap();
                    identical(("raw", &raw), ("vmdk", &folder.join("opened").join(disk)));
                }
                // qemu-img has no check for it.
                "out.vhd" => identical(("raw", &raw), ("vpc", &to)),
                _ => {
                    let format = name.rsplit('.').next().unwrap();
                    identical(("raw", &raw), (format, &to));
                    check(format, &to);
                }
            }
            std::fs::remove_dir_all(folder).unwrap();
        }
    }
    // What exists is never overwritten, and what cannot be read leaves nothing.
    let (code, _, complaint) =
        hypersdk(&home, &["convert", scratch.join("in.raw").to_str().unwrap(), scratch.join("in-2.qcow2").to_str().unwrap()], &[]);
    assert!(code == 1 && complaint.contains("in-2.qcow2"), "{code} {complaint}");
    let bad = scratch.join("bad.vmdk");
    link(&scratch.join("in-stream.vmdk"), &bad);
    flip(&bad, std::fs::metadata(&bad).unwrap().len() / 2);
    let folder = scratch.dir("bad-out");
    let (code, _, complaint) = hypersdk(&home, &["convert", bad.to_str().unwrap(), folder.join("x.qcow2").to_str().unwrap()], &[]);
    assert!(code == 1 && complaint.contains("grain"), "{code} {complaint}");
    assert_eq!(files(&folder), 0, "a failed conversion leaves nothing");
    let (code, _, complaint) = hypersdk(&home, &["convert", "one"], &[]);
    assert_eq!(code, 2, "{complaint}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_client_verbs_work_against_up_with_a_pinned_certificate() {
    let mut up = Up::start("verbs", |vms| {
        link(&guest().raw, &vms.join("guest.raw"));
        pattern(&vms.join("slow.raw"), 64 * MIB, &[(0, 64 * MIB)], 5);
    })
    .await;
    let home = up.scratch.dir("home");
    let (url, pin) = (up.endpoints.rest.clone(), up.endpoints.fingerprint.clone());
    let run = |args: &[&str]| hypersdk(&home, args, &[]);
    let json = |args: &[&str]| -> Value { serde_json::from_str(&done(run(&[&["--output", "json"], args].concat()))).unwrap() };

    assert_eq!(run(&["vms"]).0, 4, "not logged in is not allowed");
    let login = |pin: &str, password: &str| hypersdk(&home, &["login", &url, "--fingerprint", pin], &[("HYPERSDK_PASSWORD", password)]);
    assert_eq!(login(&pin, "wrong").0, 4);
    let strange = "00".repeat(32);
    let (code, _, complaint) = login(&strange, PASSWORD);
    assert!(code == 3 && !complaint.contains(PASSWORD), "another certificate than the pinned one: {code} {complaint}");
    done(login(&pin, PASSWORD));
    let saved = home.join("session.json");
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&saved).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600, "the session is its owner's");

    let table = done(run(&["vms"]));
    assert!(table.contains("guest") && table.contains("slow") && table.lines().all(|line| line.chars().count() <= 80), "{table}");
    assert_eq!(json(&["vms", "--search", "gue"]).as_array().map(Vec::len), Some(1));

    let job = json(&["export", "guest", "--format", "qcow2", "--compress"]);
    assert_eq!((job["status"].as_str(), job["progress"].as_u64()), (Some("completed"), Some(100)), "{job:#}");
    let file = job["result"]["files"][0]["path"].as_str().unwrap();
    identical(("raw", &up.service.home().join("vms/guest.raw")), ("qcow2", Path::new(file)));
    let id = job["id"].as_str().unwrap();
    assert!(done(run(&["jobs"])).contains(&id[..12]));
    assert_eq!(json(&["jobs", "get", id])["id"], *id);
    let log = done(run(&["logs", id]));
    assert!(log.lines().count() >= 2 && log.contains("published"), "{log}");
    done(run(&["verify", file]));
    assert!(done(run(&["agents"])).lines().count() >= 2 && done(run(&["providers"])).contains("local"));

    let slow = json(&["export", "slow", "--detach", "--format", "raw", "--bandwidth-limit", "8M"]);
    let slow = slow["id"].as_str().unwrap();
    done(run(&["jobs", "cancel", slow]));
    let (code, _, complaint) = run(&["watch", slow]);
    assert_eq!(code, 1, "a cancelled job is no success: {complaint}");
    assert_eq!(run(&["export", "nobody"]).0, 1);
    assert_eq!(run(&["jobs", "get", "not-an-id"]).0, 2);
    assert_eq!(run(&["export", "guest", "--format", "floppy"]).0, 2);
    assert!(done(run(&["completions", "bash"])).contains("hypersdk"));

    flip(Path::new(file), std::fs::metadata(file).unwrap().len() / 2);
    assert_eq!(run(&["verify", file]).0, 5);
    done(run(&["logout"]));
    assert_eq!(run(&["jobs"]).0, 4);

    // SIGTERM ends it in time, and then it is not reachable.
    done(login(&pin, PASSWORD));
    let status = up.service.process().terminate(crate::harness::seconds(25)).await;
    assert!(status.success(), "{status}");
    assert_eq!(run(&["vms"]).0, 3);
    assert!(!up.service.process().log().contains(PASSWORD), "the password is in the log");
}

//! The rules of the house that a compiler does not know: imports run one way, files stay small, nothing is left undone.
//!
//! Owns: the edges between rooms. Never: runs the product. A crash here costs the test.

use std::path::{Path, PathBuf};

use crate::harness::workspace;

/// Lines above which a file is two rooms, and above which it is refused.
const LARGE: usize = 500;
const TOO_LARGE: usize = 600;

/// Every source file of ours, with its path below the workspace.
fn sources() -> Vec<(String, String)> {
    fn walk(dir: &Path, found: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(dir).unwrap().flatten() {
            let path = entry.path();
            let name = entry.file_name();
            if path.is_dir() && name != "target" && name != "lab" && !name.to_string_lossy().starts_with('.') {
                walk(&path, found);
            } else if path.extension().is_some_and(|ending| ending == "rs") {
                found.push(path);
            }
        }
    }
    let root = workspace();
    let mut paths = Vec::new();
    for member in ["shared", "proto", "controller", "agent", "cli", "tests"] {
        walk(&root.join(member), &mut paths);
    }
    paths.sort();
    let below = |path: &Path| path.strip_prefix(&root).unwrap().display().to_string();
    paths.iter().map(|path| (below(path), std::fs::read_to_string(path).unwrap())).collect()
}

/// The code of a file: no comments, and nothing from the first test module on.
fn code(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let end = text.find("#[cfg(test)]\n#[allow").or_else(|| text.find("#[cfg(test)]\nmod tests {")).unwrap_or(text.len());
    text[..end].lines().enumerate().map(|(n, line)| (n + 1, line.split("//").next().unwrap_or_default()))
}

/// A room may not know those that stand left of it. `crate::X` in a file of FROM is a wrong edge.
const WRONG: &[(&str, &[&str])] = &[
    // session → worker → pipeline → formats, sources
    (
        "agent/src/formats/",
        &["pipeline", "worker", "session", "held", "journal", "ledger", "sources", "config", "identity", "proof", "convert"],
    ),
    ("agent/src/sources/", &["pipeline", "worker", "session", "held", "journal", "ledger", "identity", "proof"]),
    ("agent/src/pipeline/", &["worker", "session", "held", "ledger", "sources", "config", "identity", "proof", "convert"]),
    ("agent/src/journal", &["pipeline", "worker", "session", "held", "sources", "config", "identity"]),
    ("agent/src/ledger", &["pipeline", "worker", "session", "held", "sources", "config", "identity"]),
    ("agent/src/held", &["pipeline", "worker", "session", "journal", "ledger", "sources"]),
    ("agent/src/worker", &["session", "identity"]),
    // routes → service → actor → store
    ("controller/src/store/", &["http", "jobs::", "fleet::", "vms::", "providers::", "access", "system", "live", "app"]),
    ("controller/src/jobs/store", &["http", "jobs::queue", "jobs::routes", "jobs::core", "fleet", "live", "app"]),
    ("controller/src/jobs/core", &["http", "jobs::routes", "app"]),
    ("controller/src/jobs/queue", &["jobs::routes", "app"]),
    ("controller/src/fleet/store", &["http", "fleet::routes", "fleet::registry", "fleet::gateway", "jobs", "live", "app"]),
    ("controller/src/fleet/link", &["http", "fleet::routes", "app"]),
    ("controller/src/live/hub", &["http", "jobs", "fleet", "vms", "providers", "app"]),
];

/// Values that a room may hold although their home lies left of it: the key is a row that is inserted together with what it made.
const VALUES: &[&str] = &["crate::http::idempotency::Idempotency"];

#[test]
fn imports_run_one_way() {
    let mut wrong = Vec::new();
    for (path, text) in sources() {
        for (from, rooms) in WRONG.iter().filter(|(from, _)| path.starts_with(from)) {
            for (n, line) in code(&text).filter(|(_, line)| !VALUES.iter().any(|value| line.contains(value))) {
                let bad = rooms.iter().find(|room| {
                    let needle = format!("crate::{room}");
                    line.match_indices(&needle).any(|(at, _)| {
                        let next = line[at + needle.len()..].chars().next();
                        room.ends_with(':') || !next.is_some_and(|c| c.is_alphanumeric() || c == '_')
                    })
                });
                if let Some(room) = bad {
                    wrong.push(format!("{path}:{n}: {from} must not know {room}: {}", line.trim()));
                }
            }
        }
        // The vocabulary knows nobody; the agent and the controller know each other by proto only.
        let strangers: &[&str] = match path.split('/').next() {
            Some("shared") => &["controller::", "agent::", "proto::"],
            Some("agent") => &["controller::"],
            Some("controller") => &["agent::"],
            _ => &[],
        };
        for (n, line) in code(&text).filter(|(_, line)| line.trim_start().starts_with("use ")) {
            if strangers.iter().any(|stranger| line.trim_start().trim_start_matches("use ").starts_with(stranger)) {
                wrong.push(format!("{path}:{n}: {}", line.trim()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn files_are_one_room_each_and_say_what_they_own() {
    let mut wrong = Vec::new();
    for (path, text) in sources() {
        let lines = text.lines().count();
        if lines > LARGE {
            println!("{path} has {lines} lines; above {LARGE} a file is two rooms");
        }
        if lines > TOO_LARGE {
            wrong.push(format!("{path} has {lines} lines, more than {TOO_LARGE}"));
        }
        let is_test = path.contains("/tests/") || path.ends_with("tests.rs") || path.ends_with("build.rs");
        if !is_test && !text.trim_start_matches(|c: char| c.is_whitespace()).starts_with("//!") {
            wrong.push(format!("{path} does not begin with //!: what it owns, what it never does, what a crash there costs"));
        }
        for (n, line) in code(&text) {
            // The words are put together here, so that this file does not hold them.
            for word in ["todo", "unimplemented", "dbg"].map(|word| format!("{word}!(")) {
                if line.contains(&word) {
                    wrong.push(format!("{path}:{n}: {word}"));
                }
            }
        }
        if path.contains("utils") || path.contains("helpers") {
            wrong.push(format!("{path}: a room has a noun of the domain for a name"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_doors_stay_few() {
    let mut allowed = Vec::new();
    for (path, text) in sources() {
        let opened =
            text.lines().any(|line| line.contains("allow(") && line.contains("disallowed_methods") && !line.trim_start().starts_with("//"));
        let only_in_tests =
            text.find("disallowed_methods").is_some_and(|at| text[..at].contains("#[cfg(test)]")) || path.contains("/tests");
        if opened && !only_in_tests && !path.starts_with("tests/") {
            allowed.push(path);
        }
    }
    let known = ["agent/src/egress.rs", "agent/src/exec.rs", "proto/build.rs", "shared/src/vault.rs"];
    let strange: Vec<_> = allowed.iter().filter(|path| !known.contains(&path.as_str())).collect();
    assert!(strange.is_empty(), "paths are opened, dialled and started in few places only; also in {strange:?}");
}

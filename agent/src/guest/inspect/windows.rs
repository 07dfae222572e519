//! A Windows guest, by the files that are there.
//!
//! Owns: whether a tree is Windows, and which drivers and tools lie in it. Never: reads its registry: which version it is, and whether a driver
//! starts early enough, is not told. A crash here costs nothing.

use shared::guest::{Answer, Software, System};

use super::tree::{Rooted, Tree};

/// What it is; nothing where it is no Windows.
pub fn system(tree: &dyn Tree) -> Option<System> {
    let names = tree.list("/Windows").ok()?;
    let has = |name: &str| names.iter().any(|entry| entry.name.eq_ignore_ascii_case(name));
    if !has("System32") || !(has("explorer.exe") || has("WinSxS")) {
        return None;
    }
    let architecture = if has("SysWOW64") { "x86_64" } else { "" };
    Some(System {
        family: "windows".to_owned(),
        id: "windows".to_owned(),
        pretty_name: "Windows".to_owned(),
        architecture: architecture.to_owned(),
        ..System::default()
    })
}

/// Whether it boots on virtio: not without a driver; with one nobody knows.
pub fn virtio(tree: &Rooted<'_>) -> Answer {
    let drivers = tree.list("/Windows/System32/drivers");
    let has = |name: &str| drivers.iter().any(|entry| entry.name.eq_ignore_ascii_case(name));
    match (drivers.is_empty(), has("viostor.sys") || has("vioscsi.sys")) {
        (false, false) => Answer::No,
        _ => Answer::Unknown,
    }
}

/// What is installed.
pub fn software(tree: &Rooted<'_>) -> Software {
    let any = |folders: &[&str]| if folders.iter().any(|folder| !tree.list(folder).is_empty()) { Answer::Yes } else { Answer::No };
    let tools = any(&["/Program Files/VMware/VMware Tools"]);
    Software {
        vmware_tools: tools,
        vmware_tools_version: if tools == Answer::Yes { "/Program Files/VMware/VMware Tools".to_owned() } else { String::new() },
        guest_agent: any(&["/Program Files/Qemu-ga", "/Program Files/QEMU-GA"]),
        cloud_init: any(&["/Program Files/Cloudbase Solutions"]),
        grub_mkconfig: Answer::No,
    }
}

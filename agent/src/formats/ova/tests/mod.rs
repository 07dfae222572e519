//! Tests of the OVA code, with GNU tar, sha256sum and qemu-img as oracles. They fail where those are missing.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

mod hostile;
mod real;
mod write;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use shared::vm::{Disk, Nic, Vm};

use super::*;
use crate::formats::disk::Window;

/// A directory that goes with the test.
struct Dir(PathBuf);

impl Dir {
    fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let path = std::env::temp_dir().join(format!("hypersdk-ova-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed)));
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn put(&self, name: &str, bytes: &[u8]) -> Window {
        std::fs::write(self.path(name), bytes).unwrap();
        self.window(name)
    }

    fn window(&self, name: &str) -> Window {
        Window::whole(File::open(self.path(name)).unwrap()).unwrap()
    }

    /// Opens an OVF of this directory.
    fn folder(&self, name: &str) -> Result<Ova> {
        open_folder(name, &self.window(name), &|file| Window::whole(File::open(self.path(file))?))
    }

    /// Runs a tool in this directory and gives what it prints.
    fn run(&self, tool: &str, args: &[&str]) -> String {
        let out = Command::new(tool).args(args).current_dir(&self.0).output().unwrap_or_else(|e| panic!("these tests need {tool}: {e}"));
        assert!(out.status.success(), "{tool} {args:?}: {}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8_lossy(&out.stdout).into_owned()
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// No one waits for the digests of these tests.
fn quiet(_: u64) -> Result<()> {
    Ok(())
}

/// A tar of these files, made by our header and nothing else of ours.
fn archive(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut out = Vec::new();
    for (name, content) in files {
        out.extend_from_slice(&tar::header(name, content.len() as u64, 1).unwrap());
        out.extend_from_slice(content);
        out.resize(out.len().next_multiple_of(512), 0);
    }
    out.resize(out.len() + 1024, 0);
    out
}

/// A description with these References, Disks and hardware Items.
fn envelope(references: &str, disks: &str, items: &str) -> String {
    format!(
        r#"<?xml version="1.0"?><Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1"
        xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData"><References>{references}</References>
        <DiskSection><Info/>{disks}</DiskSection><VirtualSystem ovf:id="v"><VirtualHardwareSection>{items}</VirtualHardwareSection></VirtualSystem></Envelope>"#
    )
}

/// One whose only disk is `a.vmdk`.
fn simple() -> String {
    envelope(
        r#"<File ovf:href="a.vmdk" ovf:id="f" ovf:size="3"/>"#,
        r#"<Disk ovf:capacity="4" ovf:capacityAllocationUnits="byte * 2^20" ovf:diskId="d" ovf:fileRef="f"/>"#,
        "<Item><rasd:HostResource>ovf:/disk/d</rasd:HostResource><rasd:ResourceType>17</rasd:ResourceType></Item>",
    )
}

//! What lies beneath a domain's disk: the files that qcow2 images name as theirs.
//!
//! Owns: the walk from an image to the one beneath it, by headers alone. Never: follows a name out of the roots, reads a guest's bytes,
//! decides (what cannot be read ends the walk, and says nothing).
//! A crash here costs one look.

use std::path::{Component, Path, PathBuf};

use shared::vault::Vault;
use shared::vm::Disk;

use crate::formats::Window;
use crate::formats::chain::MAX_PARENTS;
use crate::formats::qcow2::Header;

/// The files beneath a domain's disk, absolute, from the top downwards; as far as they lie in the roots.
pub fn layers(vault: &Vault, disk: &Disk) -> Vec<PathBuf> {
    let mut found = Vec::new();
    // What is declared raw names nothing, whatever a guest has written at its beginning.
    if disk.format != "qcow2" {
        return found;
    }
    let mut top = PathBuf::from(&disk.source);
    while found.len() < MAX_PARENTS {
        let Some(below) = beneath(vault, &top) else { break };
        if found.contains(&below) {
            break;
        }
        found.push(below.clone());
        top = below;
    }
    found
}

fn beneath(vault: &Vault, image: &Path) -> Option<PathBuf> {
    let file = vault.open_file(image.to_str()?).ok()?;
    let name = Header::read_layer(&Window::whole(file).ok()?).ok()?.backing?.name;
    let below = resolved(image.parent()?, &name)?;
    Some(vault.locate(below.to_str()?).ok()?.absolute())
}

/// The path that an image in `folder` means by the name of its backing file; none where that is no file's.
fn resolved(folder: &Path, name: &str) -> Option<PathBuf> {
    let name = name.strip_prefix("file:").unwrap_or(name);
    let mut path = PathBuf::new();
    for part in folder.join(name).components() {
        match part {
            Component::ParentDir => {
                path.pop();
            }
            Component::CurDir => {}
            part => path.push(part),
        }
    }
    (!name.starts_with("json:")).then_some(path)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::disallowed_methods)]
mod tests {
    use super::*;
    use shared::vault::{self, Root};

    /// Version 2, 64 KiB clusters, nothing in it; over `name`.
    fn image(name: &str) -> Vec<u8> {
        let mut bytes = vec![0u8; 4 << 16];
        bytes[..8].copy_from_slice(b"QFI\xfb\0\0\0\x02");
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        if !name.is_empty() {
            put(8, &4096u64.to_be_bytes());
            put(16, &u32::try_from(name.len()).unwrap().to_be_bytes());
            put(4096, name.as_bytes());
        }
        put(20, &16u32.to_be_bytes());
        put(24, &(1u64 << 20).to_be_bytes());
        put(36, &1u32.to_be_bytes());
        put(40, &(3u64 << 16).to_be_bytes());
        put(48, &(1u64 << 16).to_be_bytes());
        put(56, &1u32.to_be_bytes());
        bytes
    }

    #[test]
    fn every_file_beneath_is_found_and_a_circle_ends() {
        let base = vault::temporary_dir("beneath").unwrap();
        let mut vault = Vault::default();
        vault.add(Root::open("vms", &base, false).unwrap());
        let base = vault.root("vms").unwrap().path.clone();
        std::fs::create_dir(base.join("job-1")).unwrap();
        let at = |name: &str| base.join(name);
        std::fs::write(at("top.qcow2"), image("job-1/middle.qcow2")).unwrap();
        std::fs::write(at("job-1/middle.qcow2"), image(&format!("file:{}", at("job-1/../low.qcow2").display()))).unwrap();
        std::fs::write(at("low.qcow2"), image("base.raw")).unwrap();
        // The bottom is what a guest wrote, and may look like anything.
        std::fs::write(at("base.raw"), b"no image").unwrap();
        std::fs::write(at("out.qcow2"), image("/etc/passwd")).unwrap();
        std::fs::write(at("circle.qcow2"), image("./circle.qcow2")).unwrap();
        std::fs::write(at("alone.qcow2"), image("")).unwrap();
        let below = |name: &str, format: &str| {
            layers(&vault, &Disk { source: at(name).display().to_string(), format: format.into(), ..Disk::default() })
        };
        assert_eq!(below("top.qcow2", "qcow2"), [at("job-1/middle.qcow2"), at("low.qcow2"), at("base.raw")]);
        assert_eq!(below("circle.qcow2", "qcow2"), [at("circle.qcow2")]);
        for (name, format) in [("top.qcow2", "raw"), ("out.qcow2", "qcow2"), ("alone.qcow2", "qcow2"), ("gone.qcow2", "qcow2")] {
            assert!(below(name, format).is_empty(), "{name}");
        }
        std::fs::remove_dir_all(base).unwrap();
    }
}

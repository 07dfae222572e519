//! Boot loaders: in boot sectors for BIOS, in EFI system partitions for UEFI; and what their settings give to the kernel.
//!
//! Owns: which are there, which firmware they need, the first `root=`. Never: follows a loader into what it would do. A crash here costs nothing.

use shared::guest::{Boot, Loader};

use super::clean;
use super::linux::{MAX_TEXT, setting};
use super::tree::{Rooted, Tree};
use super::volume::Volume;

/// Most loaders that are told.
const MAX_TOLD: usize = 16;

/// What the boot sector of a disk or a partition starts; `place`: what that is called.
pub fn in_sector(volume: &Volume, place: &str) -> Option<Loader> {
    let sector = volume.bytes(0, 512).ok()?;
    let code = &sector[..440];
    let has = |text: &[u8]| code.windows(text.len()).any(|window| window == text);
    let kind = match () {
        () if sector.get(510..512)? != [0x55, 0xaa] => return None,
        () if sector.get(3..11)? == b"SYSLINUX" => "syslinux",
        () if sector.get(3..11)? == b"EXTLINUX" => "extlinux",
        () if has(b"GRUB") => "grub",
        () if has(b"LILO") => "lilo",
        () if has(b"Invalid partition table") && has(b"Error loading operating system") => "windows",
        () if sector.get(3..7)? == b"NTFS" && sector.windows(7).any(|window| window == b"BOOTMGR") => "windows",
        () => return None,
    };
    Some(Loader { kind: kind.to_owned(), firmware: "bios".to_owned(), at: place.to_owned() })
}

/// Those of an EFI system partition.
pub fn in_efi(tree: &dyn Tree, place: &str) -> Vec<Loader> {
    let mut loaders = Vec::new();
    let Ok(folders) = tree.list("/EFI") else { return loaders };
    for folder in folders.iter().filter(|entry| entry.is_dir) {
        // Windows keeps its own one deeper.
        for path in [format!("/EFI/{}", folder.name), format!("/EFI/{}/Boot", folder.name)] {
            let files = tree.list(&path).unwrap_or_default();
            for file in files.iter().filter(|entry| !entry.is_dir && entry.name.to_ascii_lowercase().ends_with(".efi")) {
                let Some(kind) = kind(&folder.name.to_ascii_lowercase(), &file.name.to_ascii_lowercase()) else { continue };
                let at = clean(&format!("{place}: {path}/{}", file.name));
                loaders.push(Loader { kind: kind.to_owned(), firmware: "uefi".to_owned(), at });
            }
        }
    }
    loaders.truncate(MAX_TOLD);
    loaders
}

/// What a file of an EFI system partition is; nothing where it is only a helper.
fn kind(folder: &str, file: &str) -> Option<&'static str> {
    let begins = |starts: &[&str]| starts.iter().any(|start| file.starts_with(start));
    match () {
        () if begins(&["fbx64", "mm", "fwup", "memtest", "shell"]) => None,
        () if file == "bootmgfw.efi" => Some("windows"),
        () if begins(&["grub", "shim"]) => Some("grub"),
        () if begins(&["systemd-boot"]) => Some("systemd-boot"),
        () if folder == "boot" && begins(&["boot"]) => Some("other"),
        () => None,
    }
}

/// Which firmware they need.
pub fn firmware(loaders: &[Loader]) -> &'static str {
    let any = |firmware: &str| loaders.iter().any(|loader| loader.firmware == firmware);
    match (any("bios"), any("uefi")) {
        (true, true) => "both",
        (true, false) => "bios",
        (false, true) => "uefi",
        (false, false) => "unknown",
    }
}

/// Reads what the loaders' settings give to the kernel.
pub fn arguments(tree: &Rooted<'_>, boot: &mut Boot) {
    let mut settings: Vec<String> =
        ["/boot/grub/grub.cfg", "/boot/grub2/grub.cfg", "/grub/grub.cfg", "/grub2/grub.cfg"].map(str::to_owned).to_vec();
    for folder in ["/boot/loader/entries", "/loader/entries"] {
        let entries = tree.list(folder).into_iter().filter(|entry| entry.name.ends_with(".conf") && !entry.name.contains("rescue"));
        settings.extend(entries.take(8).map(|entry| format!("{folder}/{}", entry.name)));
    }
    settings.extend(["/syslinux.cfg", "/extlinux.conf", "/boot/extlinux/extlinux.conf", "/boot/syslinux/syslinux.cfg"].map(str::to_owned));
    for path in settings {
        let Some(text) = tree.text(&path, MAX_TEXT) else { continue };
        for line in text.lines().map(str::trim) {
            let first = line.split_whitespace().next().unwrap_or_default().to_ascii_lowercase();
            if matches!(first.as_str(), "linux" | "linux16" | "linuxefi" | "options" | "append" | "kernel") {
                take(line, boot);
            }
        }
        if !boot.root_argument.is_empty() {
            break;
        }
    }
    if let Some(text) = tree.text("/etc/default/grub", MAX_TEXT) {
        for key in ["GRUB_CMDLINE_LINUX", "GRUB_CMDLINE_LINUX_DEFAULT"] {
            take(&setting(&text, key).unwrap_or_default(), boot);
        }
    }
}

fn take(line: &str, boot: &mut Boot) {
    for word in line.split_whitespace() {
        if let Some(root) = word.strip_prefix("root=").filter(|_| boot.root_argument.is_empty()) {
            boot.root_argument = clean(root);
        }
        boot.kernel_names |= word == "net.ifnames=0";
        boot.serial_console |= word.starts_with("console=ttyS");
    }
}

#[cfg(test)]
mod tests {
    use super::super::volume::tests::volume;
    use super::*;

    #[test]
    fn boot_sectors_and_efi_files_are_told_apart() {
        let sector = |at: usize, text: &[u8]| {
            let mut bytes = vec![0u8; 1024];
            bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
            bytes[at..at + text.len()].copy_from_slice(text);
            in_sector(&volume(bytes), "disk 0").map(|loader| loader.kind)
        };
        assert_eq!(sector(0x180, b"GRUB \0Geom\0").as_deref(), Some("grub"));
        assert_eq!(sector(3, b"SYSLINUX").as_deref(), Some("syslinux"));
        assert_eq!(sector(3, b"NTFS    "), None);
        assert_eq!(sector(0x163, b"Invalid partition table\0Error loading operating system\0").as_deref(), Some("windows"));
        assert_eq!(sector(500, b"GRUB"), None);
        assert_eq!(kind("debian", "shimx64.efi"), Some("grub"));
        assert_eq!(kind("microsoft", "bootmgfw.efi"), Some("windows"));
        assert_eq!((kind("boot", "bootx64.efi"), kind("debian", "mmx64.efi"), kind("dell", "update.efi")), (Some("other"), None, None));
    }

    #[test]
    fn arguments_are_taken_from_the_first_that_has_them() {
        let mut boot = Boot::default();
        take("linux /boot/vmlinuz root=UUID=1 ro net.ifnames=0 console=ttyS0,115200", &mut boot);
        take("linux /boot/vmlinuz root=/dev/sda1 ro", &mut boot);
        assert!(boot.root_argument == "UUID=1" && boot.kernel_names && boot.serial_console);
    }
}

//! Disks: the bootable guest, deterministic patterns, and what qemu-img, tar and sha256sum say about them.
//!
//! Owns: making and judging images with other people's tools. Never: reads or writes one with ours. A crash here costs one test.

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use sha2::{Digest as _, Sha256};

use super::process::{output, run};
use super::{lab, workspace};

/// The bootable guest.
pub struct Guest {
    /// 256 MiB, raw.
    pub raw: PathBuf,
    /// SHA-256 that it prints of its payload when it boots.
    pub payload: String,
}

/// Makes the guest, or takes the one that `tests/run` or an earlier run made.
pub fn guest() -> &'static Guest {
    static GUEST: OnceLock<Guest> = OnceLock::new();
    GUEST.get_or_init(|| {
        let dir = lab().join("guest");
        run(Command::new(workspace().join("tests/lab/guest/tiny.sh")).arg(&dir));
        let payload = std::fs::read_to_string(dir.join("payload.sha256")).unwrap().trim().to_owned();
        Guest { raw: dir.join("tiny.raw"), payload }
    })
}

/// The guest that keeps writing: it says `TINYGUEST-WRITE N` once that number stands in the file `log` of its second partition.
pub fn writer() -> &'static Path {
    static WRITER: OnceLock<PathBuf> = OnceLock::new();
    WRITER.get_or_init(|| variant("writer", "writer"))
}

/// The same with what a guest agent does, where its machine has the port for one.
pub fn agent() -> &'static Path {
    static AGENT: OnceLock<PathBuf> = OnceLock::new();
    AGENT.get_or_init(|| variant("agent", "writer agent"))
}

/// The guest with these words on its kernel's command line.
fn variant(folder: &str, append: &str) -> PathBuf {
    let (dir, from) = (lab().join(folder), guest().raw.parent().unwrap());
    std::fs::create_dir_all(&dir).unwrap();
    // The kernel's package is there already.
    for entry in std::fs::read_dir(from).unwrap().flatten() {
        let (path, name) = (entry.path(), entry.file_name());
        if path.extension().is_some_and(|ending| ending == "deb") && !dir.join(&name).exists() {
            link(&path, &dir.join(&name));
        }
    }
    run(Command::new(workspace().join("tests/lab/guest/tiny.sh")).arg(&dir).env("APPEND", append));
    dir.join("tiny.raw")
}

/// The second partition of the guest's raw disk, in a file of its own beside it.
fn second_part(disk: &Path) -> PathBuf {
    const START: u64 = 133_120 * 512;
    let part = disk.with_extension("part");
    let mut from = File::open(disk).unwrap();
    std::io::Seek::seek(&mut from, std::io::SeekFrom::Start(START)).unwrap();
    std::io::copy(&mut from, &mut File::create(&part).unwrap()).unwrap();
    part
}

/// Whether the file system of the writing guest on this raw disk was at rest: its journal holds nothing to replay, and nothing is wrong with it.
pub fn is_at_rest(disk: &Path) -> bool {
    let part = second_part(disk);
    let head = run(Command::new("dumpe2fs").arg("-h").arg(&part));
    let checked = output(Command::new("e2fsck").args(["-fn"]).arg(&part));
    std::fs::remove_file(part).unwrap();
    let replays = head.lines().any(|line| line.starts_with("Filesystem features:") && line.contains("needs_recovery"));
    !replays && checked.status.success()
}

/// The number in the writing guest's `log` on this raw disk, whose file system must be whole once its journal was replayed.
pub fn written(disk: &Path) -> u64 {
    let part = second_part(disk);
    // 1: the journal was replayed, nothing else was to be done. What it says of more is in the text.
    let checked = output(Command::new("e2fsck").args(["-fy"]).arg(&part));
    let said = String::from_utf8_lossy(&checked.stdout).into_owned();
    assert!(matches!(checked.status.code(), Some(0 | 1)) && !said.contains("Fix<y>") && !said.contains("FIXED"), "{said}");
    let log = run(Command::new("debugfs").args(["-R", "cat /log"]).arg(&part));
    std::fs::remove_file(part).unwrap();
    log.trim().parse().unwrap_or_else(|_| panic!("the log says {log:?}"))
}

/// The same bytes under another name, without a copy.
pub fn link(from: &Path, to: &Path) {
    std::fs::hard_link(from, to).unwrap();
}

/// A sparse raw image whose data lies at these (offset, length) in bytes. The same seed gives the same bytes; half of each page is noise,
/// the other half is not, so that it compresses to some 55 %. Every page differs from every other.
pub fn pattern(path: &Path, capacity: u64, areas: &[(u64, u64)], seed: u64) {
    const PAGE: usize = 4096;
    let file = File::create(path).unwrap();
    file.set_len(capacity).unwrap();
    let mut pool = vec![0u8; 1 << 20];
    let mut state = seed | 1;
    for word in pool.chunks_exact_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word.copy_from_slice(&state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes());
    }
    let mut buffer = vec![0u8; 1 << 20];
    for (offset, length) in areas {
        let mut at = *offset;
        while at < offset + length {
            let size = (offset + length - at).min(buffer.len() as u64) as usize;
            for (n, page) in buffer[..size].chunks_mut(PAGE).enumerate() {
                let number = (at / PAGE as u64 + n as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ seed;
                let from = (number >> 44) as usize % (pool.len() - PAGE);
                let half = page.len() / 2;
                page[..half].copy_from_slice(&pool[from..from + half]);
                page[half..].fill(number as u8 | 1);
                page[..8].copy_from_slice(&number.to_le_bytes());
            }
            file.write_all_at(&buffer[..size], at).unwrap();
            at += size as u64;
        }
    }
}

/// qemu-img in words.
pub fn qemu_img(args: &[&str]) -> String {
    run(Command::new("qemu-img").args(args))
}

/// Converts with qemu-img; `options` go to `-o`, and `-c` compresses.
pub fn convert(from: (&str, &Path), to: (&str, &Path), more: &[&str]) {
    let (source, target) = (from.1.to_str().unwrap(), to.1.to_str().unwrap());
    qemu_img(&[&["convert", "-f", from.0, "-O", to.0], more, &[source, target]].concat());
}

/// Whether two images hold the same disk of the same size. (How they allocate it may differ, so not `-s`.)
#[track_caller]
pub fn identical(a: (&str, &Path), b: (&str, &Path)) {
    let said = output(Command::new("qemu-img").args(["compare", "-f", a.0, "-F", b.0]).arg(a.1).arg(b.1));
    let text = format!("{}{}", String::from_utf8_lossy(&said.stdout), String::from_utf8_lossy(&said.stderr));
    assert!(
        said.status.success() && text.contains("identical") && !text.contains("mismatch"),
        "{} and {}: {text}",
        a.1.display(),
        b.1.display()
    );
}

/// `qemu-img check` finds nothing. A raw image has nothing to check.
#[track_caller]
pub fn check(format: &str, path: &Path) {
    if format == "raw" {
        return;
    }
    let said = output(Command::new("qemu-img").args(["check", "-f", format]).arg(path));
    let text = format!("{}{}", String::from_utf8_lossy(&said.stdout), String::from_utf8_lossy(&said.stderr));
    assert!(said.status.success() && text.contains("No errors were found"), "{}: {:?} {text}", path.display(), said.status);
}

/// Unpacks an archive with the system's tar; answers its members in the order in which they lie.
pub fn untar(archive: &Path, into: &Path) -> Vec<String> {
    std::fs::create_dir_all(into).unwrap();
    run(Command::new("tar").arg("-xf").arg(archive).arg("-C").arg(into));
    run(Command::new("tar").arg("-tf").arg(archive)).lines().map(str::to_owned).collect()
}

/// SHA-256 of a file, hex.
pub fn sha256(path: &Path) -> String {
    let mut file = File::open(path).unwrap();
    let mut hasher = Sha256::new();
    let mut buffer = vec![0u8; 1 << 20];
    loop {
        match file.read(&mut buffer).unwrap() {
            0 => return hex::encode(hasher.finalize()),
            n => hasher.update(&buffer[..n]),
        }
    }
}

/// Changes one byte in the middle of a file's data; answers where.
pub fn flip(path: &Path, at: u64) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0u8];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x55], at).unwrap();
}

/// A package as VMware's tools write it: OVF, manifest and streamOptimized disks in an ustar archive, made without any code of ours.
pub fn foreign_ova(path: &Path, name: &str, raws: &[&Path]) {
    let work = path.with_extension("work");
    std::fs::create_dir_all(&work).unwrap();
    let disks: Vec<String> = (1..=raws.len()).map(|n| format!("{name}-disk{n}.vmdk")).collect();
    for (raw, disk) in raws.iter().zip(&disks) {
        convert(("raw", raw), ("vmdk", &work.join(disk)), &["-o", "subformat=streamOptimized"]);
    }
    let capacities: Vec<u64> = raws.iter().map(|raw| std::fs::metadata(raw).unwrap().len()).collect();
    std::fs::write(work.join(format!("{name}.ovf")), ovf(name, &disks, &capacities)).unwrap();
    let mut files = vec![format!("{name}.ovf"), format!("{name}.mf")];
    files.extend(disks);
    let digests = files.iter().filter(|file| !file.ends_with(".mf")).map(|file| format!("SHA256({file})= {}\n", sha256(&work.join(file))));
    let manifest: String = digests.collect();
    std::fs::write(work.join(format!("{name}.mf")), manifest).unwrap();
    run(Command::new("tar").args(["--format=ustar", "-cf"]).arg(path).arg("-C").arg(&work).args(&files));
    std::fs::remove_dir_all(work).unwrap();
}

/// An OVF 1.0 description of a VM with these disks.
pub fn ovf(name: &str, files: &[String], capacities: &[u64]) -> String {
    let (mut references, mut disks, mut items) = (String::new(), String::new(), String::new());
    for (n, (file, capacity)) in files.iter().zip(capacities).enumerate() {
        references += &format!("    <File ovf:href=\"{file}\" ovf:id=\"file{n}\"/>\n");
        disks += &format!(
            "    <Disk ovf:capacity=\"{capacity}\" ovf:capacityAllocationUnits=\"byte\" ovf:diskId=\"vmdisk{n}\" ovf:fileRef=\"file{n}\" \
             ovf:format=\"http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized\"/>\n"
        );
        items += &format!(
            "      <Item><rasd:AddressOnParent>{n}</rasd:AddressOnParent><rasd:ElementName>Hard disk {n}</rasd:ElementName>\
             <rasd:HostResource>ovf:/disk/vmdisk{n}</rasd:HostResource><rasd:InstanceID>{}</rasd:InstanceID><rasd:Parent>3</rasd:Parent>\
             <rasd:ResourceType>17</rasd:ResourceType></Item>\n",
            10 + n
        );
    }
    format!(
        r#"<?xml version="1.0" encoding="UTF-8"?>
<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1" xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData" xmlns:vssd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_VirtualSystemSettingData">
  <References>
{references}  </References>
  <DiskSection><Info>Disks</Info>
{disks}  </DiskSection>
  <NetworkSection><Info>Networks</Info><Network ovf:name="VM Network"><Description>The VM Network</Description></Network></NetworkSection>
  <VirtualSystem ovf:id="{name}">
    <Info>A virtual machine</Info>
    <Name>{name}</Name>
    <OperatingSystemSection ovf:id="94"><Info>Guest</Info><Description>Debian GNU/Linux</Description></OperatingSystemSection>
    <VirtualHardwareSection><Info>Hardware</Info>
      <System><vssd:ElementName>Family</vssd:ElementName><vssd:InstanceID>0</vssd:InstanceID><vssd:VirtualSystemType>vmx-13</vssd:VirtualSystemType></System>
      <Item><rasd:ElementName>3 CPU</rasd:ElementName><rasd:InstanceID>1</rasd:InstanceID><rasd:ResourceType>3</rasd:ResourceType><rasd:VirtualQuantity>3</rasd:VirtualQuantity></Item>
      <Item><rasd:AllocationUnits>byte * 2^20</rasd:AllocationUnits><rasd:ElementName>768 MB</rasd:ElementName><rasd:InstanceID>2</rasd:InstanceID><rasd:ResourceType>4</rasd:ResourceType><rasd:VirtualQuantity>768</rasd:VirtualQuantity></Item>
      <Item><rasd:Address>0</rasd:Address><rasd:ElementName>SCSI</rasd:ElementName><rasd:InstanceID>3</rasd:InstanceID><rasd:ResourceSubType>VirtualSCSI</rasd:ResourceSubType><rasd:ResourceType>6</rasd:ResourceType></Item>
{items}      <Item><rasd:AddressOnParent>7</rasd:AddressOnParent><rasd:Connection>VM Network</rasd:Connection><rasd:ElementName>Ethernet</rasd:ElementName><rasd:InstanceID>40</rasd:InstanceID><rasd:ResourceSubType>VmxNet3</rasd:ResourceSubType><rasd:ResourceType>10</rasd:ResourceType></Item>
    </VirtualHardwareSection>
  </VirtualSystem>
</Envelope>
"#
    )
}

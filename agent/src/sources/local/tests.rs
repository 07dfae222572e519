//! Chains and snapshots through a folder: what is followed reads as qemu-img reads it, what leads elsewhere is refused in words.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

use std::os::unix::fs::symlink;
use std::process::Command;

use super::*;
use crate::formats::Scratch;

/// A root with a place outside of it; both go with the test.
struct Root(PathBuf);

impl Root {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("hypersdk-local-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(path.join("root")).unwrap();
        Self(path)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join("root").join(name)
    }

    fn run(&self, program: &str, args: &[&str]) {
        let out = Command::new(program).args(args).current_dir(self.path("")).output().expect("these tests need qemu-utils");
        assert!(out.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&out.stderr));
    }

    fn put(&self, name: &str, bytes: impl AsRef<[u8]>) {
        std::fs::create_dir_all(self.path(name).parent().unwrap()).unwrap();
        std::fs::write(self.path(name), bytes).unwrap();
    }

    fn local(&self) -> Local {
        Local::new(Dir::open_ambient_dir(self.path(""), cap_std::ambient_authority()).unwrap())
    }

    /// Opens with the chain followed.
    fn follow(&self, id: &str) -> Result<(Vm, Vec<Opened>), Error> {
        self.local().open_with(id, OpenOptions { follow_chain: true, ..OpenOptions::default() })
    }

    fn refused(&self, id: &str) -> String {
        match self.follow(id) {
            Ok(_) => panic!("{id} was opened"),
            Err(e) => {
                assert_eq!((e.code, e.retryable), (Code::BadImage, false), "{e}");
                e.message
            }
        }
    }

    /// A qcow2 with this backing file and declared format in its header, whether there is such a file or not.
    fn child(&self, name: &str, backing: &str, format: &str) {
        self.run("qemu-img", &["create", "-q", "-f", "qcow2", name, "1M"]);
        self.run("qemu-img", &["rebase", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", format, name]);
    }

    /// A VMDK without bytes of its own over this parent.
    fn delta(&self, name: &str, cid: u32, parent: &str) {
        let text = format!(
            "# Disk DescriptorFile\nversion=1\nCID={cid:08x}\n{parent}\ncreateType=\"vmfsSparse\"\nRW 2048 VMFSSPARSE \"{name}-delta\"\n"
        );
        self.put(name, text);
        let mut file = vec![0u8; 4096];
        file[..4].copy_from_slice(b"COWD");
        for (at, value) in [(4, 1u32), (8, 3), (12, 2048), (16, 1), (20, 4), (24, 1), (28, 8)] {
            file[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
        self.put(&format!("{name}-delta"), file);
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn content(opened: &Opened) -> Vec<u8> {
    let mut data = vec![0u8; opened.disk.capacity() as usize];
    opened.disk.read_at(0, &mut data, &mut Scratch::default()).unwrap();
    data
}

const MIB: usize = 1 << 20;

#[test]
fn a_chain_is_followed_by_consent_only_and_reads_as_qemu_reads_it() {
    let root = Root::new("follow");
    root.put("vm/below/base.raw", vec![7; MIB]);
    root.run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "below/base.raw", "-F", "raw", "vm/mid.qcow2"]);
    root.run("qemu-io", &["-f", "qcow2", "-c", "write -P 8 64k 256k", "vm/mid.qcow2"]);
    root.run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "./mid.qcow2", "-F", "qcow2", "vm/top.qcow2"]);
    root.run("qemu-io", &["-f", "qcow2", "-c", "write -P 9 128k 64k", "-c", "write -z 0 32k", "vm/top.qcow2"]);
    root.run("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", "vm/top.qcow2", "flat.raw"]);
    let strict = root.local().open("vm/top.qcow2").err().unwrap().message;
    assert!(strict.contains("it names a backing file") && strict.contains("allow its chain to be followed"), "{strict}");
    let (_, disks) = root.follow("vm/top.qcow2").unwrap();
    assert!(content(&disks[0]) == std::fs::read(root.path("flat.raw")).unwrap());
    assert_eq!(disks[0].identity.matches('+').count(), 2, "{}", disks[0].identity);
    // A folder's images: what is only a parent is no disk of the VM.
    let (vm, disks) = root.follow("vm").unwrap();
    assert_eq!(vm.disks.iter().map(|disk| disk.source.as_str()).collect::<Vec<_>>(), ["vm/top.qcow2"]);
    assert!(content(&disks[0]) == std::fs::read(root.path("flat.raw")).unwrap());
    root.run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2", "vm/other.qcow2"]);
    let said = root.refused("vm");
    assert!(said.contains("vm/other.qcow2 and vm/top.qcow2 both lie over vm/mid.qcow2"), "{said}");
    // A parent that was changed is another content for a resume.
    let before = root.follow("vm/top.qcow2").unwrap().1.remove(0).identity;
    root.put("vm/below/base.raw", vec![7; MIB + 512]);
    assert_ne!(root.follow("vm/top.qcow2").unwrap().1[0].identity, before);
}

#[test]
fn an_esxi_chain_of_three_with_its_extents() {
    let root = Root::new("esxi");
    root.put("vm/web-flat.vmdk", vec![5; MIB]);
    let base = "# Disk DescriptorFile\nversion=1\nCID=00000011\nparentCID=ffffffff\ncreateType=\"vmfs\"\nRW 2048 VMFS \"web-flat.vmdk\"\n";
    root.put("vm/web.vmdk", base);
    root.delta("vm/web-000001.vmdk", 0x22, "parentCID=00000011\nparentFileNameHint=\"web.vmdk\"");
    root.delta("vm/web-000002.vmdk", 0x33, "parentCID=00000022\nparentFileNameHint=\"web-000001.vmdk\"");
    for name in ["web-000001", "web-000002"] {
        let text = std::fs::read_to_string(root.path(&format!("vm/{name}.vmdk"))).unwrap();
        root.put(&format!("vm/{name}.vmdk"), text.replace(&format!("vm/{name}.vmdk-delta"), &format!("{name}-delta.vmdk")));
        std::fs::rename(root.path(&format!("vm/{name}.vmdk-delta")), root.path(&format!("vm/{name}-delta.vmdk"))).unwrap();
    }
    // Sector 3 in the first delta, sector 4 in the second.
    for (name, sector, byte) in [("web-000001", 3usize, 6u8), ("web-000002", 4, 7)] {
        let path = root.path(&format!("vm/{name}-delta.vmdk"));
        let mut file = std::fs::read(&path).unwrap();
        file.resize(8 * 512 + 4096 * 4, 0);
        file[2048..2052].copy_from_slice(&8u32.to_le_bytes());
        file[8 * 512 + sector * 4..][..4].copy_from_slice(&40u32.to_le_bytes());
        file.extend_from_slice(&[byte; 512]);
        std::fs::write(&path, file).unwrap();
    }
    let mut expected = vec![5u8; MIB];
    expected[3 * 512..4 * 512].fill(6);
    expected[4 * 512..5 * 512].fill(7);
    let (vm, disks) = root.follow("vm").unwrap();
    assert_eq!((vm.disks.len(), vm.disks[0].source.as_str(), disks[0].disk.subformat()), (1, "vm/web-000002.vmdk", "vmfsSparse"));
    assert!(content(&disks[0]) == expected);
    let said = root.local().open("vm").err().unwrap().message;
    assert!(said.contains("it has a parent (\"web.vmdk\")"), "{said}");
    // In an inventory the deltas stay visible with the reason, and their extents are no VMs.
    root.put("x.vmdk", base.replace("web-flat", "vm/web-flat"));
    root.delta("d.vmdk", 1, "parentCID=00000011\nparentFileNameHint=\"web.vmdk\"");
    std::fs::rename(root.path("d.vmdk-delta"), root.path("d-delta.vmdk")).unwrap();
    let text = std::fs::read_to_string(root.path("d.vmdk")).unwrap().replace("d.vmdk-delta", "d-delta.vmdk");
    root.put("d.vmdk", text);
    let names: Vec<(String, bool)> = root.local().inventory().unwrap().into_iter().map(|vm| (vm.name, vm.problem.is_empty())).collect();
    assert_eq!(names, [("d".to_owned(), false), ("vm".to_owned(), false), ("x".to_owned(), false)]);
}

#[test]
fn a_qcow2_that_names_something_else_is_refused() {
    let root = Root::new("hostile");
    std::fs::write(root.0.join("secret.raw"), vec![1; MIB]).unwrap();
    root.put("base.raw", vec![2; MIB]);
    root.put("sub/base.raw", vec![2; MIB]);
    symlink("base.raw", root.path("link.raw")).unwrap();
    symlink("../secret.raw", root.path("out.raw")).unwrap();
    symlink("sub", root.path("linked")).unwrap();
    symlink("..", root.path("up")).unwrap();
    std::fs::create_dir(root.path("folder")).unwrap();
    root.run("mkfifo", &["pipe"]);
    let outside = root.0.join("secret.raw");
    let followed = "only a file beside it or in a folder below is followed";
    for (backing, words) in [
        (outside.to_str().unwrap(), followed),
        ("/etc/passwd", "it names the parent \"/etc/passwd\""),
        ("/", "it names the parent \"/\""),
        ("../secret.raw", "it names the parent \"../secret.raw\""),
        ("sub/../base.raw", "it names the parent \"sub/../base.raw\""),
        ("..", "it names the parent \"..\""),
        (".", "it names the parent \".\""),
        ("sub/", "it names the parent \"sub/\""),
        ("file:base.raw", "it names the parent \"file:base.raw\""),
        ("nbd://127.0.0.1/x", "it names the parent \"nbd://127.0.0.1/x\""),
        ("json:{\"driver\":\"file\"}", "it names the parent \"json:"),
        ("..\\secret.raw", "it names the parent \"..\\\\secret.raw\""),
        ("C:\\base.raw", "it names the parent \"C:"),
        ("base.raw\n", "it names the parent \"base.raw\\n\""),
        ("link.raw", "its parent \"link.raw\" is reached through a symbolic link"),
        ("out.raw", "its parent \"out.raw\" is reached through a symbolic link"),
        ("linked/base.raw", "its parent \"linked/base.raw\" is reached through a symbolic link"),
        ("up/secret.raw", "its parent \"up/secret.raw\" is reached through a symbolic link"),
        ("missing.raw", "its parent \"missing.raw\" is not there"),
        ("sub/missing.raw", "its parent \"sub/missing.raw\" is not there"),
        ("folder", "its parent \"folder\" cannot be read: not a regular file"),
        ("pipe", "its parent \"pipe\" cannot be read: not a regular file"),
        ("base.raw/x", "its parent \"base.raw/x\" cannot be read"),
    ] {
        root.child("c.qcow2", backing, "raw");
        let said = root.refused("c.qcow2");
        assert!(said.contains(words), "{backing}: {said}");
        assert!(root.local().open("c.qcow2").is_err(), "{backing}: refused without consent");
    }
    for (format, words) in [
        ("vhdx", "its backing file is said to be \"vhdx\"; raw, qcow2 and vmdk are followed"),
        ("luks", "is said to be \"luks\""),
        ("qcow2", "does not start with the magic bytes 51 46 49 fb (in the parent \"base.raw\")"),
        ("vmdk", "(in the parent \"base.raw\")"),
    ] {
        root.child("c.qcow2", "base.raw", format);
        let said = root.refused("c.qcow2");
        assert!(said.contains(words), "{format}: {said}");
    }
    // qemu-img does not make an image without a declared format any more: the extension's type is changed to an unknown one.
    root.child("c.qcow2", "base.raw", "raw");
    let mut bytes = std::fs::read(root.path("c.qcow2")).unwrap();
    let at = bytes.windows(4).position(|four| four == [0xe2, 0x79, 0x2a, 0xca]).unwrap();
    bytes[at..at + 4].copy_from_slice(b"none");
    root.put("c.qcow2", bytes);
    let said = root.refused("c.qcow2");
    assert!(said.contains("declare it: qemu-img rebase -u -F FORMAT -b \"base.raw\" CHILD"), "{said}");
    // A guest's bytes that look like an image stay bytes: the declared format rules.
    root.child("guest.raw", "/etc/passwd", "raw");
    root.child("c.qcow2", "guest.raw", "raw");
    let (_, disks) = root.follow("c.qcow2").unwrap();
    assert!(content(&disks[0]).starts_with(b"QFI\xfb"));
}

#[test]
fn cycles_and_endless_chains_are_refused() {
    let root = Root::new("cycles");
    root.child("self.qcow2", "self.qcow2", "qcow2");
    let said = root.refused("self.qcow2");
    assert!(said.contains("its chain of parents comes back to \"self.qcow2\""), "{said}");
    root.child("a.qcow2", "b.qcow2", "qcow2");
    root.child("b.qcow2", "c.qcow2", "qcow2");
    root.child("c.qcow2", "b.qcow2", "qcow2");
    let said = root.refused("a.qcow2");
    assert!(said.contains("its chain of parents comes back to \"b.qcow2\""), "{said}");
    // The same file by another name.
    std::fs::hard_link(root.path("a.qcow2"), root.path("hard.qcow2")).unwrap();
    root.child("b.qcow2", "hard.qcow2", "qcow2");
    let said = root.refused("a.qcow2");
    assert!(said.contains("comes back to \"hard.qcow2\""), "{said}");
    root.put("0.raw", vec![3; MIB]);
    for n in 1..=34 {
        let (parent, format) = if n == 1 { ("0.raw".to_owned(), "raw") } else { (format!("{}.qcow2", n - 1), "qcow2") };
        root.child(&format!("{n}.qcow2"), &parent, format);
    }
    let (_, disks) = root.follow("32.qcow2").unwrap();
    assert!(content(&disks[0]) == vec![3; MIB]);
    let said = root.refused("33.qcow2");
    assert!(said.contains("its chain has over 32 parents"), "{said}");
    assert!(root.refused("34.qcow2").contains("over 32 parents"));
}

#[test]
fn a_vmdk_delta_that_names_something_else_is_refused() {
    let root = Root::new("vmdk");
    root.put("base-flat.vmdk", vec![4; MIB]);
    let base = "# Disk DescriptorFile\nversion=1\nCID=0000abcd\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\nRW 2048 FLAT \"base-flat.vmdk\" 0\n";
    root.put("base.vmdk", base);
    symlink("base.vmdk", root.path("link.vmdk")).unwrap();
    root.put("nocid.vmdk", base.replace("CID=0000abcd\n", ""));
    root.put("oddcid.vmdk", base.replace("0000abcd", "xyz"));
    root.put("text.vmdk", "hello");
    let named = |hint: &str| format!("parentCID=0000abcd\nparentFileNameHint=\"{hint}\"");
    root.delta("c.vmdk", 1, &named("base.vmdk"));
    assert!(content(&root.follow("c.vmdk").unwrap().1[0]) == vec![4; MIB]);
    for (parent, words) in [
        (named("/vmfs/volumes/one/base.vmdk"), "it names the parent \"/vmfs/volumes/one/base.vmdk\""),
        (named("../base.vmdk"), "it names the parent \"../base.vmdk\""),
        (named("C:\\vms\\base.vmdk"), "it names the parent \"C:\\\\vms\\\\base.vmdk\""),
        (named("[one] base.vmdk"), "its parent \"[one] base.vmdk\" is not there"),
        (named("link.vmdk"), "its parent \"link.vmdk\" is reached through a symbolic link"),
        (named("c.vmdk"), "comes back to \"c.vmdk\""),
        (named("c.vmdk-delta"), "one extent of a split disk; give the descriptor file instead (in the parent"),
        (named("text.vmdk"), "(in the parent \"text.vmdk\")"),
        (named("nocid.vmdk"), "over the content 0000abcd (parentCID) and its CID is none"),
        (named("oddcid.vmdk"), "its CID is none"),
        (
            "parentCID=0000abce\nparentFileNameHint=\"base.vmdk\"".to_owned(),
            "over the content 0000abce (parentCID) and its CID is 0000abcd",
        ),
        ("parentCID=0000abcd".to_owned(), "has no name (parentFileNameHint)"),
        ("parentFileNameHint=\"base.vmdk\"".to_owned(), "has no parentCID to prove it by"),
        ("parentCID=0x1\nparentFileNameHint=\"base.vmdk\"".to_owned(), "is not a hexadecimal number"),
    ] {
        root.delta("c.vmdk", 1, &parent);
        let said = root.refused("c.vmdk");
        assert!(said.contains(words), "{parent}: {said}");
        assert!(root.local().open("c.vmdk").is_err(), "{parent}: refused without consent");
    }
    // Two deltas that are each other's parent, with the right identifiers.
    root.delta("x.vmdk", 1, "parentCID=00000002\nparentFileNameHint=\"y.vmdk\"");
    root.delta("y.vmdk", 2, "parentCID=00000001\nparentFileNameHint=\"x.vmdk\"");
    let said = root.refused("x.vmdk");
    assert!(said.contains("comes back to \"x.vmdk\""), "{said}");
}

#[test]
fn a_snapshot_is_opened_by_name_and_only_where_there_is_one() {
    let root = Root::new("snapshot");
    root.put("base.raw", vec![2; MIB]);
    root.run("qemu-img", &["create", "-q", "-f", "qcow2", "a.qcow2", "1M"]);
    root.run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "b.qcow2"]);
    for name in ["a.qcow2", "b.qcow2"] {
        root.run("qemu-io", &["-f", "qcow2", "-c", "write -P 3 0 64k", name]);
        root.run("qemu-img", &["snapshot", "-c", "before", name]);
        root.run("qemu-io", &["-f", "qcow2", "-c", "write -P 4 0 1M", name]);
    }
    let open = |id: &str, follow_chain, snapshot: &str| {
        root.local()
            .open_with(id, OpenOptions { follow_chain, snapshot: Some(snapshot.to_owned()), ..OpenOptions::default() })
            .map_err(|e| e.message)
    };
    let expected = |rest: u8| [vec![3; 64 << 10], vec![rest; MIB - (64 << 10)]].concat();
    let (vm, disks) = open("a.qcow2", false, "before").unwrap();
    assert!(vm.snapshots == 1 && content(&disks[0]) == expected(0));
    let (_, present) = root.local().open("a.qcow2").unwrap();
    assert!(present[0].identity != disks[0].identity && content(&present[0]) == vec![4; MIB]);
    assert!(content(&open("a.qcow2", true, "1").unwrap().1[0]) == expected(0));
    assert!(content(&open("b.qcow2", true, "before").unwrap().1[0]) == expected(2));
    assert!(open("b.qcow2", false, "before").err().unwrap().contains("backing file"));
    assert!(open("a.qcow2", false, "after").err().unwrap().contains("it has no snapshot \"after\"; it has \"before\""));
    assert!(open("base.raw", true, "before").err().unwrap().contains("base.raw has no snapshot \"before\""));
    root.put("o.ova", "");
    assert!(open("o.ova", false, "before").err().unwrap().contains("read from qcow2 images only"));
    root.put("p/x.ovf", "");
    assert!(open("p", false, "before").err().unwrap().contains("x.ovf has no snapshot"));
    root.put("q/x.raw", [0; 512]);
    assert!(open("q", true, "before").err().unwrap().contains("x.raw has no snapshot"));
}

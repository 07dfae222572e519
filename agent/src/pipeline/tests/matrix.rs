//! Every source format to every target: the same disk, by our reader's word and by QEMU's.

use super::*;
use crate::formats::{ova, vmdk};

/// Bytes of the disk in the matrix: no whole number of blocks, units or 4 KiB pages.
const CAPACITY: usize = (13 << 20) + 3 * 512;

fn sources(folder: &Folder, data: &[u8]) -> Vec<(String, Arc<dyn Disk>)> {
    let path = folder.path("source.raw");
    write_sparse(&path, data);
    let mut sources = vec![("raw".to_owned(), open_raw(&path))];
    for (i, options) in
        ["compat=0.10", "compat=1.1", "compat=0.10 -c", "compression_type=zstd -c", "cluster_size=4k", "cluster_size=2M"].iter().enumerate()
    {
        let image = folder.path(&format!("source-{i}.qcow2"));
        let (options, flag) = options.split_once(' ').unwrap_or((options, "-S4k"));
        qemu_img(&["convert", "-f", "raw", "-O", "qcow2", flag, "-o", options, text(&path), text(&image)]);
        sources.push((format!("qcow2 {options}"), open_qcow2(&image)));
    }
    let image = folder.path("source.vmdk");
    qemu_img(&["convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", text(&path), text(&image)]);
    let window = Window::whole(File::open(&image).unwrap()).unwrap();
    sources.push(("vmdk".to_owned(), Arc::new(vmdk::open_single(window).unwrap())));
    sources
}

/// QEMU's name of a file, or of a member inside of it.
fn for_qemu(path: &Path, format: Format) -> (String, &'static str) {
    if format != Format::Ova {
        let driver = if format == Format::Vhd { "vpc" } else { format.disk_format() };
        return (text(path).to_owned(), driver);
    }
    let entries = ova::tar::entries(&Window::whole(File::open(path).unwrap()).unwrap()).unwrap();
    let disk = entries.iter().find(|entry| entry.name.ends_with(".vmdk")).unwrap();
    let json = format!(
        r#"json:{{"driver":"vmdk","file":{{"driver":"raw","offset":{},"size":{},"file":{{"driver":"file","filename":"{}"}}}}}}"#,
        disk.offset,
        disk.size,
        text(path)
    );
    (json, "vmdk")
}

#[test]
fn the_same_disk_from_every_format_to_every_format() {
    let folder = Folder::fast("matrix");
    let data = sample(CAPACITY, 77);
    let mut roots = std::collections::BTreeSet::new();
    for (name, source) in sources(&folder, &data) {
        for (format, compression) in targets() {
            folder.clear();
            let job = job(std::slice::from_ref(&source), format, compression);
            let listener = Listener::default();
            let outcome = folder.run(&job, &listener).unwrap_or_else(|e| panic!("{name} to {format:?}: {e}"));
            let disk = &outcome.disks[0];
            roots.insert(disk.root);
            assert_eq!(outcome.bytes_read, outcome.data_bytes);
            assert_eq!(outcome.receipt.bytes_verified, outcome.data_bytes);
            let last = *listener.snapshots.lock().unwrap().last().unwrap();
            assert_eq!(
                (last.durable, last.verified, last.stage),
                (outcome.data_bytes, outcome.data_bytes, Stage::Verifying),
                "{name} to {format:?}"
            );
            let (path, qemu_format) = for_qemu(&folder.part_path(&disk.file), format);
            if path.starts_with("json:") {
                qemu_img(&["compare", "-f", "raw", text(&folder.path("source.raw")), &path]);
            } else {
                qemu_img(&["compare", "-f", "raw", "-F", qemu_format, text(&folder.path("source.raw")), &path]);
            }
            if format == Format::Qcow2 {
                let check = qemu_img(&["check", "-f", "qcow2", &path]);
                assert!(check.contains("No errors were found"), "{check}");
            }
            for file in &outcome.files {
                let output = Command::new("sha256sum").arg(folder.part_path(&file.path)).output().unwrap();
                assert_eq!(String::from_utf8_lossy(&output.stdout).split(' ').next(), file.sha256.as_deref());
            }
            let report = super::super::verify_files(&manifest(&outcome), &|name| File::open(folder.part_path(name)), &|_| true).unwrap();
            assert!(report.intact(), "{report:?}");
        }
    }
    assert_eq!(roots.len(), 1, "the root depends on the format");
}

#[test]
fn several_disks_one_of_them_empty_in_every_format() {
    let folder = Folder::fast("several");
    let contents = [sample(9 << 20, 5), vec![0u8; 6 << 20], sample((5 << 20) + 512, 6)];
    let disks: Vec<Arc<dyn Disk>> = contents
        .iter()
        .enumerate()
        .map(|(i, data)| {
            let path = folder.path(&format!("{i}.raw"));
            write_sparse(&path, data);
            open_raw(&path)
        })
        .collect();
    for (format, compression) in targets() {
        folder.clear();
        let outcome = folder.run(&job(&disks, format, compression), &Listener::default()).unwrap();
        let window = |disk: &super::super::DiskOutcome| {
            let window = Window::whole(File::open(folder.part_path(&disk.file)).unwrap()).unwrap();
            match &disk.member {
                None => window,
                Some(member) => {
                    let found = ova::tar::entries(&window).unwrap().into_iter().find(|entry| entry.name == *member).unwrap();
                    window.part(found.offset, found.size).unwrap()
                }
            }
        };
        for (disk, data) in outcome.disks.iter().zip(&contents) {
            let back = super::super::target::open_output(format.disk_format(), window(disk)).unwrap();
            assert!(read_all(back.as_ref()) == *data, "{format:?} {}", disk.name);
        }
        if format == Format::Ova {
            let archive = ova::open(&Window::whole(File::open(folder.part_path("web.ova")).unwrap()).unwrap()).unwrap();
            assert!(matches!(archive.check_manifest(&mut |_| Ok(())).unwrap(), ova::Checked::Good(_)));
        }
        if format == Format::Ovf {
            let open = |name: &str| Window::whole(File::open(folder.part_path(name))?);
            let described = ova::open_folder("web.ovf", &open("web.ovf").unwrap(), &open).unwrap();
            assert!(matches!(described.check_manifest(&mut |_| Ok(())).unwrap(), ova::Checked::Good(_)));
        }
    }
}

#[test]
fn what_a_format_does_not_know_is_said_before_a_byte_is_moved() {
    let folder = Folder::new("unknown");
    write_sparse(&folder.path("a.raw"), &[1; 4096]);
    let disk = open_raw(&folder.path("a.raw"));
    let zstd = |level| Some(Compression::new(Method::Zstd, level));
    for (format, compression, words) in [
        (Format::Raw, zstd(1), "not compressed"),
        (Format::Vmdk, zstd(1), "only deflate"),
        (Format::Qcow2, zstd(23), "1 to 22"),
        (Format::Qcow2, Some(Compression::new(Method::Deflate, 13)), "0 to 12"),
    ] {
        let error = folder.run(&job(std::slice::from_ref(&disk), format, compression), &Listener::default()).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
    let mut other = job(&[disk], Format::Ova, None);
    other.vm.disks.clear();
    assert!(folder.run(&other, &Listener::default()).unwrap_err().to_string().contains("0 disks"));
    assert_eq!(std::fs::read_dir(folder.path("part")).unwrap().count(), 0);
}

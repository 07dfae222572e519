//! Copies that hold only what changed, over each other, with QEMU reading the chain as the oracle.

use super::*;
use crate::formats::chain::{Chain, Link};
use crate::formats::over::Over;
use crate::formats::{Extent, FormatError};
use crate::pipeline::{Base, verify_files_at};
use shared::manifest::{self, Blocks};

const CAPACITY: usize = 37 * (1 << 20) + 512;
const UNIT: usize = 64 << 10;

fn id(n: usize) -> String {
    format!("job-{n:016x}")
}

/// A disk that writes changes to itself as a guest does, and tells where.
struct Guest {
    bytes: Vec<u8>,
    next: Box<dyn FnMut() -> u64>,
}

impl Guest {
    fn change(&mut self) -> Vec<Extent> {
        let mut areas = Vec::new();
        for _ in 0..6 {
            let offset = (self.next)() as usize % (CAPACITY - 4 * UNIT) / 512 * 512;
            let len = 512 + (self.next)() as usize % (3 * UNIT);
            let part = &mut self.bytes[offset..offset + len];
            match (self.next)() % 3 {
                // To zeros, to something, and as it was: a write that changes nothing.
                0 => part.fill(0),
                1 => part.iter_mut().for_each(|byte| *byte = byte.wrapping_add(7)),
                _ => {}
            }
            areas.push(Extent { offset: offset as u64, len: len as u64 });
        }
        // The end of the disk, which is no whole unit.
        self.bytes[CAPACITY - 1] ^= 1;
        areas.push(Extent { offset: CAPACITY as u64 - 512, len: 512 });
        areas
    }

    fn disk(&self, folder: &Folder) -> Arc<dyn Disk> {
        let path = folder.path("now.raw");
        let _ = std::fs::remove_file(&path);
        write_sparse(&path, &self.bytes);
        open_raw(&path)
    }
}

/// The point `n` as one disk, and its digests.
fn point(folder: &Folder, n: usize, outcomes: &[Outcome]) -> (Arc<dyn Disk>, Arc<Blocks>) {
    let link = |n: usize| {
        let file = File::open(folder.path(&id(n)).join("web.qcow2")).unwrap();
        let layer = Arc::new(qcow2::Reader::open_layer(Window::whole(file).unwrap(), None, 1 << 30).unwrap());
        Link { name: id(n), layer }
    };
    let mut chain = Chain::new(link(n)).unwrap();
    let mut at = n;
    while outcomes[at].disks[0].over.is_some() {
        at -= 1;
        chain.push(link(at)).unwrap();
    }
    (chain.into_disk(), Arc::new(outcomes[n].disks[0].blocks.clone()))
}

fn over(n: usize, outcomes: &[Outcome]) -> manifest::Over {
    manifest::Over { job: id(n), file: "web.qcow2".into(), root: hex::encode(outcomes[n].disks[0].root) }
}

fn make(folder: &Folder, n: usize, disk: Arc<dyn Disk>, base: Option<Base>, method: Method) -> Result<Outcome, Error> {
    folder.clear();
    let mut wanted = job(&[disk], Format::Qcow2, Some(Compression::new(method, 1)));
    wanted.id = id(n);
    wanted.disks[0].base = base;
    let outcome = folder.run(&wanted, &Listener::default())?;
    std::fs::rename(folder.path("part"), folder.path(&id(n))).unwrap();
    std::fs::create_dir(folder.path("part")).unwrap();
    Ok(outcome)
}

/// The point equals the guest: by our reader, by QEMU's, by its digests, and by the check of its manifest.
fn holds(folder: &Folder, n: usize, guest: &Guest, outcomes: &[Outcome]) {
    let (disk, blocks) = point(folder, n, outcomes);
    assert!(read_all(disk.as_ref()) == guest.bytes, "point {n}");
    let file = folder.path(&id(n)).join("web.qcow2");
    let flat = folder.path("flat.raw");
    qemu_img(&["check", "-q", text(&file)]);
    qemu_img(&["convert", "-O", "raw", text(&file), text(&flat)]);
    assert!(std::fs::read(&flat).unwrap() == guest.bytes, "point {n} by qemu-img");
    let mut expected = Blocks::default();
    for (block, bytes) in guest.bytes.chunks(BLOCK as usize).enumerate().filter(|(_, bytes)| bytes.iter().any(|b| *b != 0)) {
        expected.0.insert(block as u64, manifest::block_digest(bytes));
    }
    assert_eq!(*blocks, expected, "digests of point {n}");
    let open = |name: &str| File::open(folder.path(&id(n)).join(name));
    let mut signed = super::manifest(&outcomes[n]);
    signed.disks[0].over = outcomes[n].disks[0].over.clone();
    let below = |_: &manifest::Over| Ok(point(folder, n - 1, outcomes).0);
    assert!(verify_files_at(&signed, &open, &below, None, &|_| true).unwrap().intact(), "point {n}");
}

#[test]
fn each_point_of_a_chain_is_the_disk_as_it_was_and_takes_what_changed() {
    for (seed, method) in [(1, Method::Deflate), (2, Method::Zstd), (3, Method::Deflate)] {
        let folder = Folder::fast("layers");
        let mut guest = Guest { bytes: sample(CAPACITY, seed), next: Box::new(noise(seed + 100)) };
        let mut outcomes = vec![make(&folder, 0, guest.disk(&folder), None, method).unwrap()];
        holds(&folder, 0, &guest, &outcomes);
        for n in 1..6 {
            let areas = guest.change();
            let now = guest.disk(&folder);
            let (before, held) = point(&folder, n - 1, &outcomes);
            // In turn: a comparing pass, known areas complete in itself, known areas.
            let (changed, whole) = ((n % 3 != 1).then_some(areas), n % 3 == 2);
            let base = Base { disk: before.clone(), blocks: held.clone(), over: (!whole).then(|| over(n - 1, &outcomes)) };
            let disk = Arc::new(Over::new(now, before, held, changed, whole));
            outcomes.push(make(&folder, n, disk, Some(base), method).unwrap());
            holds(&folder, n, &guest, &outcomes);
            let size = |n: usize| std::fs::metadata(folder.path(&id(n)).join("web.qcow2")).unwrap().len();
            assert!(whole || size(n) * 3 < size(0), "point {n} has {} bytes, the first {}", size(n), size(0));
        }
    }
}

#[test]
fn nothing_is_built_on_an_earlier_state_that_is_damaged() {
    let folder = Folder::fast("damaged-base");
    let mut guest = Guest { bytes: sample(CAPACITY, 9), next: Box::new(noise(9)) };
    let outcomes = vec![make(&folder, 0, guest.disk(&folder), None, Method::Deflate).unwrap()];
    let areas = guest.change();
    let touched = areas[0].offset / BLOCK;
    let (before, mut held) = point(&folder, 0, &outcomes);
    Arc::make_mut(&mut held).0.insert(touched, [7; 32]);
    let base = Base { disk: before.clone(), blocks: held.clone(), over: Some(over(0, &outcomes)) };
    let disk = Arc::new(Over::new(guest.disk(&folder), before, held, Some(areas), false));
    match make(&folder, 1, disk, Some(base), Method::Deflate).unwrap_err() {
        Error::Source { source: FormatError::Corrupt { index, .. }, .. } => assert_eq!(index, touched),
        other => panic!("{other}"),
    }
}

//! ESXi's vmfsSparse deltas, and what a parent's name in a descriptor leads to.

use super::*;

const COWD_GTES: usize = 4096;

/// The text of an ESXi descriptor with this kind, parent lines and extent lines.
fn descriptor(kind: &str, parent: &str, extents: &str) -> String {
    format!("# Disk DescriptorFile\nversion=1\nCID=0000beef\n{parent}\ncreateType=\"{kind}\"\n\n{extents}\n\n#DDB\nddb.uuid = \"60 00\"\n")
}

const ALONE: &str = "parentCID=ffffffff";

/// A `COWD` file: `grains` are (number, bytes) in the order in which they lie in the file.
fn cowd(sectors: usize, grain: usize, grains: &[(usize, Vec<u8>)]) -> Vec<u8> {
    let tables = sectors.div_ceil(grain * COWD_GTES);
    let mut file = vec![0u8; 2048];
    let directory_at = file.len() / 512;
    file.resize((file.len() + tables * 4).next_multiple_of(512), 0);
    let mut directory = vec![0u32; tables];
    let mut places = vec![0usize; tables];
    for (number, bytes) in grains {
        let table = number / COWD_GTES;
        if directory[table] == 0 {
            places[table] = file.len();
            directory[table] = (file.len() / 512) as u32;
            file.resize(file.len() + COWD_GTES * 4, 0);
        }
        let sector = (file.len() / 512) as u32;
        let at = places[table] + number % COWD_GTES * 4;
        file[at..at + 4].copy_from_slice(&sector.to_le_bytes());
        file.extend_from_slice(bytes);
        file.resize(file.len().next_multiple_of(grain * 512), 0);
    }
    for (k, table) in directory.iter().enumerate() {
        file[directory_at * 512 + k * 4..][..4].copy_from_slice(&table.to_le_bytes());
    }
    file[..4].copy_from_slice(b"COWD");
    for (at, value) in [(4, 1), (8, 3), (12, sectors), (16, grain), (20, directory_at), (24, tables), (28, file.len() / 512)] {
        file[at..at + 4].copy_from_slice(&(value as u32).to_le_bytes());
    }
    file
}

/// A delta and the raw bytes that it says, for sizes of grain that ESXi and GSX used.
fn delta(sectors: usize, grain: usize, seed: u64) -> (Vec<u8>, Vec<u8>) {
    let mut numbers = Numbers(seed);
    let mut raw = vec![0u8; sectors * 512];
    let mut grains = Vec::new();
    let last = (sectors - 1) / grain;
    for number in (0..last).filter(|_| numbers.below(5) == 0).chain([last]).collect::<Vec<_>>() {
        let len = (grain * 512).min(raw.len() - number * grain * 512);
        let bytes = numbers.bytes(len);
        raw[number * grain * 512..][..len].copy_from_slice(&bytes);
        grains.push((number, bytes));
    }
    // Not in the order of the disk.
    let half = grains.len() / 2;
    grains.rotate_left(half);
    (cowd(sectors, grain, &grains), raw)
}

#[test]
fn a_vmfs_sparse_delta_without_a_parent_reads_as_qemu_reads_it() {
    let dir = Dir::new();
    for (sectors, grain) in [(3 * 4096 + 77, 1), (5 * 4096, 1), (1, 1), (4096 * 8 + 5, 8), (70_001, 128)] {
        let (file, raw) = delta(sectors, grain, 5 + grain as u64);
        dir.put("a-delta.vmdk", &file);
        dir.put("a.vmdk", descriptor("vmfsSparse", ALONE, &format!("RW {sectors} VMFSSPARSE \"a-delta.vmdk\"")).as_bytes());
        dir.put("a.raw", &raw);
        let disk = dir.open("a.vmdk").unwrap();
        assert_eq!((disk.subformat(), disk.cid()), ("vmfsSparse", Some(0xbeef)));
        assert_equal(&disk, &dir.window("a.raw"));
        assert_eq!(extent_names(&dir.window("a.vmdk")).unwrap(), ["a-delta.vmdk"]);
        // qemu-img 7.2 counts such an extent twice: the first of the two copies is held against ours.
        qemu_ok(&["convert", "-f", "vmdk", "-O", "raw", text(&dir.path("a.vmdk")), text(&dir.path("q.raw"))]);
        assert!(std::fs::read(dir.path("q.raw")).unwrap()[..raw.len()] == raw, "{sectors} sectors in grains of {grain}");
    }
}

#[test]
fn damaged_deltas_are_named() {
    let dir = Dir::new();
    let (good, _) = delta(9000, 1, 3);
    dir.put("a.vmdk", descriptor("vmfsSparse", ALONE, "RW 9000 VMFSSPARSE \"a-delta.vmdk\"").as_bytes());
    let word = |bytes: &[u8], at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    let set = |bytes: &mut Vec<u8>, at: usize, value: u32| bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    let first_table = word(&good, 2048) as usize * 512;
    let first_grain = (0..COWD_GTES).find(|k| word(&good, first_table + k * 4) != 0).unwrap();
    type Change<'a> = Box<dyn Fn(&mut Vec<u8>) + 'a>;
    let changes: [(&str, Change<'_>); 14] = [
        ("does not start with COWD", Box::new(|b| b[..4].copy_from_slice(b"KDMV"))),
        ("vmfsSparse version 2", Box::new(|b| set(b, 4, 2))),
        ("a grain of 0 sectors", Box::new(|b| set(b, 16, 0))),
        ("a grain of 3 sectors", Box::new(|b| set(b, 16, 3))),
        ("a grain of 4096 sectors", Box::new(|b| set(b, 16, 4096))),
        ("the descriptor says 9000 sectors, the header 9001", Box::new(|b| set(b, 12, 9001))),
        ("the header 8999", Box::new(|b| set(b, 12, 8999))),
        ("a grain directory of 2 entries; 9000 sectors need 3", Box::new(|b| set(b, 24, 2))),
        ("grain directory 0 at byte 0", Box::new(|b| set(b, 20, 0))),
        ("grain directory 0 at byte 2199023255040", Box::new(|b| set(b, 20, u32::MAX))),
        ("grain table 1 at byte 2199023255040: it lies past", Box::new(|b| set(b, 2052, u32::MAX))),
        ("overlaps another one", Box::new(|b| set(b, 2052, word(b, 2048) + 31))),
        ("inside the header of 4 sectors", Box::new(|b| set(b, first_table + first_grain * 4, 1))),
        ("past the file's end", Box::new(|b| set(b, first_table + first_grain * 4, 1 << 30))),
    ];
    for (expected, change) in changes {
        let mut bytes = good.clone();
        change(&mut bytes);
        dir.put("a-delta.vmdk", &bytes);
        let mut whole = vec![0u8; 9000 * 512];
        let read = dir.open("a.vmdk").and_then(|disk| disk.read_at(0, &mut whole, &mut Scratch::default()));
        let said = read.unwrap_err().to_string();
        assert!(said.contains(expected), "{expected}: {said}");
    }
    for len in [0, 3, 511, 600, 2048, 2055, good.len() - 1] {
        dir.put("a-delta.vmdk", &good[..len]);
        let mut whole = vec![0u8; 9000 * 512];
        assert!(dir.open("a.vmdk").and_then(|disk| disk.read_at(0, &mut whole, &mut Scratch::default())).is_err(), "cut to {len}");
    }
    let said = open_single(dir.put("a-delta.vmdk", &good)).unwrap_err().to_string();
    assert!(said.contains("give the descriptor file instead"), "{said}");
    dir.put("a.vmdk", descriptor("twoGbMaxExtentSparse", ALONE, "RW 9000 SPARSE \"a-delta.vmdk\"").as_bytes());
    let said = dir.open("a.vmdk").unwrap_err().to_string();
    assert!(said.contains("does not start with KDMV"), "{said}");
}

#[test]
fn a_parent_is_refused_on_its_own_and_noted_for_a_chain() {
    let dir = Dir::new();
    let extents = "RW 9000 VMFSSPARSE \"a-delta.vmdk\"";
    let (file, _) = delta(9000, 1, 4);
    dir.put("a-delta.vmdk", &file);
    let layer = |parent: &str| {
        let window = dir.put("a.vmdk", descriptor("vmfsSparse", parent, extents).as_bytes());
        let strict = open(window.clone(), &|name| panic!("opened {name}")).unwrap_err().to_string();
        assert!(strict.contains("it has a parent") && strict.contains("consolidate the snapshots first"), "{strict}");
        let image = open_layer(window, &|name| Window::whole(File::open(dir.path(name))?)).unwrap();
        image.parent().unwrap().named().map(|(cid, hint)| (cid, hint.to_owned())).map_err(|e| e.to_string())
    };
    assert_eq!(layer("parentCID=DEADBEEF\nparentFileNameHint=\"base.vmdk\""), Ok((0xdead_beef, "base.vmdk".to_owned())));
    assert_eq!(layer("parentCID=1f\nparentFileNameHint=\"/vmfs/volumes/x/base.vmdk\""), Ok((0x1f, "/vmfs/volumes/x/base.vmdk".to_owned())));
    for (parent, expected) in [
        ("parentCID=deadbeef", "has no name"),
        ("parentCID=ffffffff\nparentFileNameHint=\"base.vmdk\"", "no parentCID to prove it by"),
        ("parentFileNameHint=\"base.vmdk\"", "no parentCID to prove it by"),
        ("parentCID=+1\nparentFileNameHint=\"base.vmdk\"", "not a hexadecimal number"),
        ("parentCID=123456789\nparentFileNameHint=\"base.vmdk\"", "not a hexadecimal number"),
    ] {
        let said = layer(parent).unwrap_err();
        assert!(said.contains(expected), "{parent}: {said}");
    }
    let twice = descriptor("vmfsSparse", "parentCID=1\nparentFileNameHint=\"a\"\nparentFileNameHint=\"b\"", extents);
    let said = open_layer(dir.put("a.vmdk", twice.as_bytes()), &|name| panic!("opened {name}")).unwrap_err().to_string();
    assert!(said.contains("parentfilenamehint stands there twice"), "{said}");
}

#[test]
fn any_changed_byte_of_a_delta_gives_an_answer_and_not_a_panic() {
    let dir = Dir::new();
    let (good, _) = delta(9000, 1, 12);
    let mut numbers = Numbers(23);
    let mut buf = vec![0u8; 9000 * 512];
    dir.put("a.vmdk", descriptor("vmfsSparse", ALONE, "RW 9000 VMFSSPARSE \"a-delta.vmdk\"").as_bytes());
    for _ in 0..400 {
        let mut bytes = good.clone();
        for _ in 0..1 + numbers.below(4) {
            let end = [32, 2100, 40_000][numbers.below(3) as usize];
            bytes[numbers.below(end) as usize] = numbers.next() as u8;
        }
        dir.put("a-delta.vmdk", &bytes);
        let Ok(disk) = dir.open("a.vmdk") else { continue };
        let _ = disk.covered(0, u64::MAX);
        let _ = disk.extents(0, u64::MAX);
        let _ = disk.read_at(0, &mut buf, &mut Scratch::default());
    }
}

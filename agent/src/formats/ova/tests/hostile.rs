//! Archives and descriptions that want something: refused by name, without a panic, in no time.

use std::time::{Duration, Instant};

use super::*;

fn said(bytes: &[u8]) -> String {
    let dir = Dir::new();
    open(&dir.put("a.ova", bytes)).unwrap_err().to_string()
}

/// A header of this kind and name, the checksum made right again.
fn header(name: &[u8], kind: u8, size: u64) -> [u8; 512] {
    let mut out = tar::header("x", size, 1).unwrap();
    out[0] = 0;
    out[..name.len()].copy_from_slice(name);
    out[156] = kind;
    checksum(&mut out);
    out
}

fn checksum(header: &mut [u8; 512]) {
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|b| u32::from(*b)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

#[test]
fn members_that_lead_elsewhere_are_refused() {
    let end = [0u8; 1024];
    for (name, kind, expected) in [
        (&b"../a.vmdk"[..], b'0', "bare file name"),
        (b"..", b'0', "bare file name"),
        (b"/etc/passwd", b'0', "bare file name"),
        (b"a/b.vmdk", b'0', "bare file name"),
        (b"./../b.vmdk", b'0', "bare file name"),
        (b"a\\b", b'0', "bare file name"),
        (b"", b'0', "bare file name"),
        (b"a\nb", b'0', "bare file name"),
        (b"\xff\xfe", b'0', "UTF-8"),
        (b"a", b'1', "hard link"),
        (b"a", b'2', "symbolic link"),
        (b"a", b'3', "device"),
        (b"a", b'5', "directory"),
        (b"a", b'6', "fifo"),
        (b"a", b'g', "global PAX"),
        (b"a", b'K', "long link"),
        (b"a", b'L', "long name"),
        (b"a", b'S', "sparse"),
        (b"a", 0xff, "unknown kind"),
    ] {
        let refused = said(&[&header(name, kind, 0)[..], &end].concat());
        assert!(refused.contains(expected), "{name:?} {kind}: {refused}");
    }
    let mut prefixed = header(b"a", b'0', 0);
    prefixed[345..348].copy_from_slice(b"etc");
    checksum(&mut prefixed);
    assert!(said(&[&prefixed[..], &end].concat()).contains("folder"));
    for record in ["19 path=/etc/passwd", "13 size=99999", "18 linkpath=/a/bcd", "22 GNU.sparse.major=100", "9 hdrcharset=x"] {
        let mut pax = header(b"p", b'x', record.len() as u64).to_vec();
        pax.extend_from_slice(record.as_bytes());
        pax.resize(1024, 0);
        let refused = said(&[&pax[..], &end].concat());
        assert!(refused.contains("PAX"), "{record}: {refused}");
    }
    assert!(said(&[&header(b"p", b'x', 1 << 20)[..], &vec![0; 1 << 21]].concat()).contains("PAX"));
}

#[test]
fn what_gnu_tar_makes_of_links_and_long_names_is_refused() {
    let dir = Dir::new();
    dir.put("a.ovf", simple().as_bytes());
    std::os::unix::fs::symlink("/etc/passwd", dir.path("a.vmdk")).unwrap();
    dir.run("tar", &["-cf", "link.tar", "a.ovf", "a.vmdk"]);
    assert!(open(&dir.window("link.tar")).unwrap_err().to_string().contains("symbolic link"));
    let long = "l".repeat(150);
    dir.put(&long, b"");
    dir.run("tar", &["--format=gnu", "-cf", "gnu.tar", &long]);
    assert!(open(&dir.window("gnu.tar")).unwrap_err().to_string().contains("long name"));
    dir.run("tar", &["--format=pax", "-cf", "pax.tar", &long]);
    assert!(open(&dir.window("pax.tar")).unwrap_err().to_string().contains("path"));
}

#[test]
fn a_damaged_or_truncated_frame_is_named() {
    let whole = archive(&[("a.ovf", simple().as_bytes()), ("a.vmdk", b"abc")]);
    let dir = Dir::new();
    assert_eq!(open(&dir.put("a.ova", &whole)).unwrap().disks.len(), 1);
    for cut in [0, 1, 511, 512, 600, whole.len() - 1024, whole.len() - 1025, whole.len() - 1536] {
        let refused = said(&whole[..cut]);
        assert!(refused.contains("cut off"), "{cut}: {refused}");
    }
    let mut flipped = whole.clone();
    flipped[3] ^= 1;
    assert!(said(&flipped).contains("checksum"));
    let mut unmarked = whole.clone();
    unmarked[257] = 0;
    assert!(said(&unmarked).contains("ustar"));
    for size in [
        &b"77777777777\0"[..],
        b"zzzzzzzzzzz\0",
        b"           \0",
        b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff",
        b"\x80\0\0\x01\0\0\0\0\0\0\0\0",
        b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
    ] {
        let mut odd = header(b"a", b'0', 0);
        odd[124..136].copy_from_slice(size);
        checksum(&mut odd);
        let refused = said(&[&odd[..], &[0; 1024]].concat());
        assert!(refused.contains("cut off") || refused.contains("not a number"), "{refused}");
    }
    let names: Vec<String> = (0..65).map(|k| format!("f{k}")).collect();
    let many: Vec<(&str, &[u8])> = names.iter().map(|name| (name.as_str(), &b""[..])).collect();
    assert!(said(&archive(&many)).contains("over 64"));
    assert!(said(&archive(&[("a", b"1"), ("a", b"2")])).contains("two members"));
    assert!(said(&archive(&[("a.vmdk", b"1")])).contains("no .ovf"));
    assert!(said(&archive(&[("a.ovf", b"1"), ("b.OVF", b"2")])).contains("second .ovf"));
}

#[test]
fn the_description_names_only_what_is_there() {
    let ovf = simple();
    assert!(said(&archive(&[("a.ovf", ovf.as_bytes())])).contains("a.vmdk"));
    assert!(said(&archive(&[("a.ovf", ovf.as_bytes()), ("a.vmdk", b"ab")])).contains("cut off"));
    for name in ["/etc/passwd", "../a", "..", "http://x/a.vmdk", "", "a\\b"] {
        let text = ovf.replace("a.vmdk", name);
        assert!(said(&archive(&[("a.ovf", text.as_bytes())])).contains("bare file name"), "{name}");
    }
}

#[test]
fn descriptions_of_other_kinds_are_refused_by_name() {
    let simple = simple();
    for (from, to, expected) in [
        (r#"ovf:size="3""#, r#"ovf:compression="gzip""#, "gzip"),
        (r#"ovf:size="3""#, r#"ovf:chunkSize="100""#, "chunks"),
        (r#"ovf:fileRef="f""#, r#"ovf:fileRef="f" ovf:parentRef="e""#, "delta"),
        (r#"ovf:fileRef="f""#, "", "no file"),
        (r#"ovf:fileRef="f""#, r#"ovf:fileRef="g""#, "not in References"),
        (r#"ovf:capacity="4""#, r#"ovf:capacity="${size}""#, "not a number"),
        (r#"ovf:capacity="4""#, r#"ovf:capacity="18446744073709551615""#, "overflows"),
        ("2^20", "2^64", "unit"),
        ("2^20", "9^999999999", "unit"),
        ("byte *", "parsec *", "unit"),
        ("ovf:/disk/d", "ovf:/disk/e", "not in the DiskSection"),
        ("ovf:/disk/d", "ovf:/file/f", "ovf:/disk/ID"),
        ("<?xml version=\"1.0\"?>", "<!DOCTYPE a [<!ENTITY x SYSTEM \"file:///etc/passwd\">]>", "DTD"),
        ("<?xml version=\"1.0\"?>", "<!DOCTYPE a>", "DTD"),
        ("Envelope", "Envelop", "Envelop"),
        ("VirtualSystem", "VirtualSystems", "no VirtualSystem"),
        ("</VirtualSystem>", "</VirtualSystem><VirtualSystem/>", "several VMs"),
        ("</References>", "</Reference>", "well-formed"),
        ("</Envelope>", "", "well-formed"),
        ("</Envelope>", "<!-- ", "inside a tag"),
        ("<DiskSection>", "<DiskSection><Disk ovf:capacity=\"1\" ovf:diskId=\"d\" ovf:fileRef=\"f\"/>", "twice"),
    ] {
        assert!(simple.contains(from), "{from}");
        let refused = parse(simple.replace(from, to).as_bytes()).unwrap_err().to_string();
        assert!(refused.contains(expected), "{to}: {refused}");
    }
    assert!(parse(&vec![b' '; (1 << 20) + 1]).unwrap_err().to_string().contains("1048576"));
    assert!(parse(b"\xff\xfe<\0").unwrap_err().to_string().contains("UTF-8"));
    assert!(parse(b"").is_err());
}

#[test]
fn an_expensive_text_costs_nothing() {
    let begun = Instant::now();
    let filled =
        |unit: &str, open: &str, close: &str| format!("{open}{}{close}", unit.repeat((1_000_000 - open.len() - close.len()) / unit.len()));
    let attributes: String = (0..100_000).map(|k| format!(" a{k}=''")).collect();
    let namespaces: String = (0..60_000).map(|k| format!("<a xmlns:b{k}='c'/>")).take(50_000).collect::<String>();
    for (text, expected) in [
        (filled("<a>", "", ""), "deep"),
        (format!("<Envelope{attributes}/>"), "attributes"),
        (format!("<Envelope>{}</Envelope>", &namespaces[..900_000]), "namespaces"),
        (filled("<a/>", "<Envelope>", "</Envelope>"), "limit"),
        (filled("&lt;", "<Envelope>", "</Envelope>"), "no VirtualSystem"),
        (filled("<", "", ""), "inside a tag"),
        (filled("<!--", "", ""), "inside a tag"),
    ] {
        let refused = parse(text.as_bytes()).unwrap_err().to_string();
        assert!(refused.contains(expected), "{expected}: {refused}");
    }
    let items = "<Item/>".repeat(1025);
    assert!(parse(envelope("", "", &items).as_bytes()).unwrap_err().to_string().contains("1024"));
    let files: String = (0..65).map(|k| format!("<File ovf:id='f{k}' ovf:href='a'/>")).collect();
    assert!(parse(envelope(&files, "", "").as_bytes()).unwrap_err().to_string().contains("64"));
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
}

#[test]
fn a_manifest_that_does_not_fit_is_named() {
    let ovf = simple();
    let zeros = "0".repeat(64);
    let sum = |bytes: &[u8]| {
        let mut hasher = mf::Algorithm::Sha256.hasher();
        hasher.update(bytes);
        hex::encode(hasher.finish())
    };
    let good = format!("SHA256(a.ovf)= {}\nSHA256(a.vmdk)= {}\n", sum(ovf.as_bytes()), sum(b"abc"));
    let dir = Dir::new();
    let check = |manifest: &str| {
        let window = dir.put("a.ova", &archive(&[("a.ovf", ovf.as_bytes()), ("a.vmdk", b"abc"), ("a.mf", manifest.as_bytes())]));
        open(&window).and_then(|ova| ova.check_manifest(&mut quiet)).map_err(|e| e.to_string())
    };
    assert_eq!(check(&good), Ok(Checked::Good(2)));
    for (manifest, expected) in [
        (good.replace(&sum(b"abc"), &zeros), "a.vmdk"),
        (good.replace("a.vmdk", "b.vmdk"), "no digest of"),
        (good.clone() + &format!("SHA256(c)= {zeros}"), "is not there"),
        (good.clone() + &format!("SHA256(../c)= {zeros}"), "bare file name"),
        (good.replace("SHA256(a.v", "MD5(a.v"), "MD5"),
        (good.clone() + &good, "twice"),
        (good.replace(&sum(b"abc"), "00"), "64 hex digits"),
        ("hello".to_owned(), "HEX"),
        ((0..65).map(|k| format!("SHA256(f{k})= {zeros}\n")).collect(), "over 64"),
        ("\n".repeat(70_000), "65536"),
    ] {
        let refused = check(&manifest).unwrap_err();
        assert!(refused.contains(expected), "{expected}: {refused}");
    }
}

#[test]
fn any_changed_byte_gives_an_answer_and_not_a_panic() {
    let dir = Dir::new();
    let whole = archive(&[("a.ovf", simple().as_bytes()), ("a.vmdk", b"abc"), ("a.mf", b"SHA1(a.ovf)= 00")]);
    let mut number = 88_172_645_463_325_252u64;
    let mut next = || {
        number ^= number << 13;
        number ^= number >> 7;
        number ^= number << 17;
        number
    };
    for _ in 0..2000 {
        let mut bytes = whole.clone();
        for _ in 0..1 + next() % 5 {
            let at = next() as usize % bytes.len();
            bytes[at] = next() as u8;
        }
        // The checksums made right again, so that what lies behind them is met.
        for at in [0, 512 + simple().len().next_multiple_of(512)] {
            let mut header: [u8; 512] = bytes[at..at + 512].try_into().unwrap();
            checksum(&mut header);
            bytes[at..at + 512].copy_from_slice(&header);
        }
        if let Ok(ova) = open(&dir.put("f.ova", &bytes)) {
            let _ = ova.check_manifest(&mut quiet);
        }
        let _ = parse(&bytes[512..512 + simple().len()]);
    }
}

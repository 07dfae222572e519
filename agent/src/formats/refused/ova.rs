//! OVA archives: frames, members and manifests that want something else than to be read in place.
//!
//! Owns: a builder of tar headers that knows no rules. A crash here costs nothing: tests only.

use sha2::{Digest, Sha256};

use super::ovf::simple;
use super::{Case, Damaged, Good, Image, Input, Refused, case};

/// A header of this name, kind and size; the rest as GNU tar writes it.
fn header(name: &[u8], kind: u8, size: u64) -> [u8; 512] {
    let mut out = [0u8; 512];
    out[..name.len()].copy_from_slice(name);
    out[100..108].copy_from_slice(b"0000644\0");
    out[124..136].copy_from_slice(format!("{size:011o}\0").as_bytes());
    out[136..148].copy_from_slice(b"00000000001\0");
    out[156] = kind;
    out[257..265].copy_from_slice(b"ustar\x0000");
    summed(out)
}

fn summed(mut header: [u8; 512]) -> [u8; 512] {
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|b| u32::from(*b)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    header
}

/// A header with these bytes at this place, its checksum right.
fn altered(at: usize, bytes: &[u8]) -> [u8; 512] {
    let mut out = header(b"a", b'0', 0);
    out[at..at + bytes.len()].copy_from_slice(bytes);
    summed(out)
}

/// A header and its content, filled up to a block.
fn member(header: [u8; 512], content: &[u8]) -> Vec<u8> {
    let mut out = [&header[..], content].concat();
    out.resize(out.len().next_multiple_of(512), 0);
    out
}

fn file(name: &str, content: &[u8]) -> Vec<u8> {
    member(header(name.as_bytes(), b'0', content.len() as u64), content)
}

fn archive(members: &[Vec<u8>]) -> Input {
    Input::Ova(Image::of([members.concat(), vec![0; 1024]].concat()))
}

/// Header blocks alone, with an end mark.
fn frame(blocks: &[u8]) -> Input {
    archive(&[blocks.to_vec()])
}

fn sum(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

fn manifest(ovf: &str, vmdk: &str) -> Vec<u8> {
    file("a.mf", format!("SHA256(a.ovf)= {ovf}\nSHA256(a.vmdk)= {vmdk}\n").as_bytes())
}

/// A PAX record before a member.
fn pax(record: &str) -> Input {
    frame(&member(header(b"p", b'x', record.len() as u64), record.as_bytes()))
}

pub(super) fn cases() -> Vec<Case> {
    let text = simple();
    let (ovf, disk) = (file("a.ovf", text.as_bytes()), file("a.vmdk", b"abc"));
    let (of_ovf, of_disk) = (sum(text.as_bytes()), sum(b"abc"));
    let good = [ovf.clone(), disk.clone(), manifest(&of_ovf, &of_disk)];
    let whole = Image::of([good.concat(), vec![0; 1024]].concat());
    let cut = |len: u64| Input::Ova(whole.clone().cut(len));
    let mut unsummed = header(b"a", b'0', 0);
    unsummed[0] = b'b';
    let numbered: Vec<Vec<u8>> = (0..65).map(|k| file(&format!("f{k}"), b"")).collect();
    let time = member(header(b"p", b'x', 12), b"12 mtime=1.5");
    let mut out = vec![
        case("good", archive(&good), Good(None)),
        case("good, without a manifest", archive(&[ovf.clone(), disk.clone()]), Good(None)),
        case("good, with times in PAX", archive(&[time, ovf.clone(), disk.clone()]), Good(None)),
        // The frame.
        case("nothing", cut(0), Damaged("tar header 0 at byte 0: the archive is cut off: it ends at 0 ")),
        case("half a header", cut(511), Damaged("it ends at 511 without")),
        case("cut inside the description", cut(600), Damaged("tar header 0 at byte 0: its content of")),
        case("cut behind the description", cut(ovf.len() as u64), Damaged("tar header 1 at byte")),
        case("no end mark", cut(whole.len - 1024), Damaged("tar header 3 at byte")),
        case("not a tar", frame(&altered(257, b"other")), Damaged("no ustar mark")),
        case("neither POSIX' tar nor GNU's", frame(&altered(262, b"X")), Damaged("neither POSIX nor GNU")),
        case("checksum of another header", frame(&unsummed), Damaged("its checksum is")),
        case(
            "no checksum",
            frame(&{
                let mut none = header(b"a", b'0', 0);
                none[148..156].fill(0);
                none
            }),
            Damaged("the header says nothing"),
        ),
        case("size past the end", frame(&altered(124, b"77777777777\0")), Damaged("its content of 8589934591 bytes")),
        case("size of words", frame(&altered(124, b"zzzzzzzzzzz\0")), Damaged("its size is not a number that fits")),
        case(
            "size of 2^63 - 1",
            frame(&altered(124, b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff")),
            Damaged("its content of 9223372036854775807 bytes"),
        ),
        case("size of 2^40", frame(&altered(124, b"\x80\0\0\0\0\0\x01\0\0\0\0\0")), Damaged("its content of 1099511627776 bytes")),
        case(
            "size below zero",
            archive(&[file("b", b""), altered(124, &[0xff; 12]).to_vec()]),
            Damaged("tar header 1 at byte 512: its size"),
        ),
        // The members.
        case("absolute", frame(&header(b"/etc/passwd", b'0', 0)), Refused("a member names \"/etc/passwd\"")),
        case("of the folder above", frame(&header(b"../a.vmdk", b'0', 0)), Refused("a member names \"../a.vmdk\"")),
        case("the folder above", frame(&header(b"..", b'0', 0)), Refused("a member names \"..\"")),
        case("the folder above, said otherwise", frame(&header(b"./../b", b'0', 0)), Refused("a member names \"../b\"")),
        case("in a folder below", frame(&header(b"a/b.vmdk", b'0', 0)), Refused("a member names \"a/b.vmdk\"")),
        case("in Windows' spelling", frame(&header(b"..\\a", b'0', 0)), Refused("a member names \"..\\\\a\"")),
        case("no name", frame(&header(b"", b'0', 0)), Refused("a member names \"\"")),
        case("a line end in the name", frame(&header(b"a\nb", b'0', 0)), Refused("a member names \"a\\nb\"")),
        case("a name that is not UTF-8", frame(&header(b"\xff\xfe", b'0', 0)), Refused("a member's name is not UTF-8")),
        case("in a folder by its prefix", frame(&altered(345, b"etc")), Refused("a member lies in a folder")),
        case("hard link", frame(&header(b"a", b'1', 0)), Refused("member 0 is a hard link")),
        case("symbolic link", frame(&header(b"a", b'2', 0)), Refused("member 0 is a symbolic link")),
        case("character device", frame(&header(b"a", b'3', 0)), Refused("member 0 is a device")),
        case("block device, second", archive(&[file("b", b""), header(b"a", b'4', 0).to_vec()]), Refused("member 1 is a device")),
        case("directory", frame(&header(b"a", b'5', 0)), Refused("member 0 is a directory")),
        case("fifo", frame(&header(b"a", b'6', 0)), Refused("member 0 is a fifo")),
        case("contiguous file", frame(&header(b"a", b'7', 0)), Refused("member 0 is a contiguous file")),
        case("global PAX record", frame(&header(b"a", b'g', 0)), Refused("member 0 is a global PAX record")),
        case("GNU long link", frame(&header(b"a", b'K', 0)), Refused("member 0 is a GNU long link")),
        case("GNU long name", frame(&header(b"a", b'L', 0)), Refused("member 0 is a GNU long name")),
        case("GNU sparse file", frame(&header(b"a", b'S', 0)), Refused("member 0 is a GNU sparse file")),
        case("unknown kind", frame(&header(b"a", 0xff, 0)), Refused("member 0 is of an unknown kind")),
        case("PAX path", pax("19 path=/etc/passwd"), Refused("a PAX record sets \"path\"")),
        case("PAX size", pax("13 size=99999"), Refused("a PAX record sets \"size\"")),
        case("PAX link", pax("18 linkpath=/a/bcd"), Refused("a PAX record sets \"linkpath\"")),
        case("PAX sparse file", pax("22 GNU.sparse.major=1\n"), Refused("a PAX record sets \"GNU.sparse.major\"")),
        case("PAX size for star", pax("22 SCHILY.realsize=99\n"), Refused("a PAX record sets \"SCHILY.realsize\"")),
        case("PAX character set", pax("17 hdrcharset=ab\n"), Refused("a PAX record sets \"hdrcharset\"")),
        case(
            "PAX size of a sparse file behind a time",
            pax("11 mtime=1\n21 GNU.sparse.size=9\n"),
            Refused("a PAX record sets \"GNU.sparse.size\""),
        ),
        case(
            "PAX record of 64 KiB and more",
            frame(&member(header(b"p", b'x', 65_537), &[b'1'; 65_537])),
            Refused("a PAX record of 65537 bytes"),
        ),
        case("PAX record without a length", pax("path=a"), Damaged("PAX record 0 at byte 512: not LENGTH KEY=VALUE")),
        case(
            "PAX record longer than it is",
            archive(&[file("b", b""), member(header(b"p", b'x', 9), b"99 uid=11")]),
            Damaged("PAX record 1 at byte 1024"),
        ),
        case("65 members", archive(&numbered), Refused("over 64 members")),
        case("two members of one name", archive(&[file("a", b"1"), file("a", b"2")]), Refused("two members are named \"a\"")),
    ];
    out.extend(contents(&ovf, &disk, &text, (&of_ovf, &of_disk)));
    out.extend(folders(&text, &of_ovf, &of_disk));
    out
}

/// The same in a folder.
fn folders(text: &str, of_ovf: &str, of_disk: &str) -> Vec<Case> {
    let folder = |beside: Vec<(&'static str, Image)>| Input::Folder(Image::of(text), beside);
    let disk = || ("a.vmdk", Image::of(b"abc"));
    let lines = format!("SHA256(a.ovf)= {of_ovf}\nSHA256(a.vmdk)= {of_disk}\n");
    let manifest = |more: &str| ("a.mf", Image::of(format!("{lines}{more}")));
    vec![
        case("good folder", folder(vec![disk(), manifest("")]), Good(None)),
        case("folder without its disk", folder(Vec::new()), Damaged("\"a.vmdk\" does not lie beside the OVF")),
        case("folder whose disk is cut off", folder(vec![("a.vmdk", Image::of(b"a"))]), Damaged("\"a.vmdk\" has 1 bytes, the OVF says 3")),
        case(
            "folder whose manifest names what is not there",
            folder(vec![disk(), manifest(&format!("SHA256(c)= {of_disk}"))]),
            Damaged("\"c\" does not lie beside the OVF"),
        ),
        case(
            "folder whose manifest names a path",
            folder(vec![disk(), manifest(&format!("SHA256(/etc/shadow)= {of_disk}"))]),
            Refused("the manifest names \"/etc/shadow\""),
        ),
        case(
            "folder of another disk",
            folder(vec![("a.vmdk", Image::of(b"abd")), manifest("")]),
            Damaged("manifest line 2 at byte 0: \"a.vmdk\" has the digest a52d159f"),
        ),
    ]
}

/// Archives whose frame is sound.
fn contents(ovf: &[u8], disk: &[u8], text: &str, (of_ovf, of_disk): (&str, &str)) -> Vec<Case> {
    let (ovf, disk) = (|| ovf.to_vec(), || disk.to_vec());
    let mut other = of_disk.to_owned();
    other.replace_range(..1, if of_disk.starts_with('0') { "1" } else { "0" });
    vec![
        case("no description", archive(&[disk()]), Refused("no .ovf in the archive")),
        case("two descriptions", archive(&[ovf(), file("b.OVF", text.as_bytes())]), Refused("a second .ovf (\"b.OVF\")")),
        case("two manifests", archive(&[ovf(), file("a.mf", b""), file("b.mf", b"")]), Refused("a second .mf (\"b.mf\")")),
        case("description over 1 MiB", archive(&[file("a.ovf", &vec![b' '; (1 << 20) + 1])]), Refused("its OVF is over 1048576 bytes")),
        case("manifest over 64 KiB", archive(&[ovf(), file("a.mf", &vec![b' '; 65_537])]), Refused("its manifest is over 65536 bytes")),
        case("disk that is not there", archive(&[ovf()]), Damaged("it names \"a.vmdk\", which is not in the archive")),
        case(
            "disk cut off",
            archive(&[ovf(), file("a.vmdk", b"ab")]),
            Damaged("disk file 0 at byte 0: \"a.vmdk\" has 2 bytes, the OVF says 3"),
        ),
        case(
            "disk that is the manifest's",
            archive(&[file("a.ovf", text.replace("a.vmdk", "a.mf").as_bytes()), file("a.mf", b"abc")]),
            Damaged("not ALGORITHM"),
        ),
        case(
            "manifest without the disk",
            archive(&[ovf(), disk(), file("a.mf", format!("SHA256(a.ovf)= {of_ovf}").as_bytes())]),
            Damaged("it has no digest of \"a.vmdk\""),
        ),
        case(
            "manifest without the description",
            archive(&[ovf(), disk(), file("a.mf", format!("SHA256(a.vmdk)= {of_disk}").as_bytes())]),
            Damaged("it has no digest of \"a.ovf\""),
        ),
        case(
            "disk of another digest",
            archive(&[ovf(), disk(), manifest(of_ovf, &other)]),
            Damaged("manifest line 2 at byte 0: \"a.vmdk\" has the digest"),
        ),
        case(
            "description of another digest",
            archive(&[ovf(), disk(), manifest(of_disk, of_disk)]),
            Damaged("manifest line 1 at byte 0: \"a.ovf\" has the digest"),
        ),
        case(
            "manifest of what is not there",
            archive(&[
                ovf(),
                disk(),
                file("a.mf", format!("SHA256(a.ovf)= {of_ovf}\nSHA256(a.vmdk)= {of_disk}\nSHA256(c)= {of_disk}").as_bytes()),
            ]),
            Damaged("manifest line 3 at byte 0: \"c\" is not there"),
        ),
    ]
}

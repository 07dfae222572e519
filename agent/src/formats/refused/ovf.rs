//! OVF descriptions: a VM that cannot be read for sure is refused, never guessed.
//!
//! Owns: a minimal valid description. A crash here costs nothing: tests only.

use super::{Case, Damaged, Good, Input, Refused, Unbuilt, case};

/// A description with these References, Disks and hardware Items.
fn envelope(references: &str, disks: &str, items: &str) -> String {
    format!(
        r#"<?xml version="1.0"?><Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1" xmlns:rasd="urn:rasd"><References>{references}</References><DiskSection><Info/>{disks}</DiskSection><VirtualSystem ovf:id="v"><VirtualHardwareSection>{items}</VirtualHardwareSection></VirtualSystem></Envelope>"#
    )
}

/// One whose only disk is `a.vmdk`, of 3 bytes.
pub(super) fn simple() -> String {
    envelope(
        r#"<File ovf:href="a.vmdk" ovf:id="f" ovf:size="3"/>"#,
        r#"<Disk ovf:capacity="4" ovf:capacityAllocationUnits="byte * 2^20" ovf:diskId="d" ovf:fileRef="f"/>"#,
        "<Item><rasd:HostResource>ovf:/disk/d</rasd:HostResource><rasd:ResourceType>17</rasd:ResourceType></Item>",
    )
}

fn ovf(text: impl AsRef<[u8]>) -> Input {
    Input::Ovf(text.as_ref().to_vec())
}

/// The good one with one text exchanged for another.
fn with(from: &str, to: &str) -> Input {
    let text = simple();
    assert!(text.contains(from), "{from}");
    ovf(text.replacen(from, to, 1))
}

pub(super) fn cases() -> Vec<Case> {
    let mut out = vec![
        case("good", ovf(simple()), Good(None)),
        case("good, with a mark of its bytes' order and padding", ovf(format!("\u{feff}{}\0\0", simple())), Good(None)),
    ];
    out.extend(texts());
    out.extend(files());
    out.extend(disks());
    out
}

const XML: &str = "<?xml version=\"1.0\"?>";

fn texts() -> Vec<Case> {
    let deep = |depth: usize| "<a>".repeat(depth) + &"</a>".repeat(depth);
    let spaces: String =
        (0..257).map(|k| format!(" xmlns:n{k}=\"u\"")).collect::<Vec<_>>().chunks(32).map(|c| format!("<a{}/>", c.concat())).collect();
    let attributes: String = (0..65).map(|k| format!(" a{k}=\"\"")).collect();
    let nodes = "<a/>".repeat(100_001);
    vec![
        case("nothing", ovf(""), Damaged("not well-formed XML")),
        case("over 1 MiB", ovf(" ".repeat((1 << 20) + 1)), Refused("its OVF is over 1048576 bytes")),
        case("not UTF-8", ovf(b"<a>\xff</a>"), Refused("its OVF is not UTF-8")),
        case("UTF-16", ovf(simple().encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<u8>>()), Damaged("not well-formed XML: ")),
        case(
            "a DTD that reads a file",
            with(XML, "<!DOCTYPE a [<!ENTITY x SYSTEM \"file:///etc/passwd\">]>"),
            Refused("its OVF has a DTD"),
        ),
        case("an entity nobody declared", with("<Info/>", "<Info>&laugh;</Info>"), Damaged("unknown entity reference 'laugh'")),
        case("65 deep", ovf(deep(65)), Refused("nests elements over 64 deep")),
        case("an element of 65 attributes", ovf(format!("<a{attributes}/>")), Refused("has over 64 attributes")),
        case("257 namespaces", ovf(format!("<b>{spaces}</b>")), Refused("declares over 256 namespaces")),
        case("100,001 nodes", ovf(format!("<b>{nodes}</b>")), Damaged("nodes limit")),
        case("cut inside a tag", ovf(&simple()[..300]), Damaged("the text ends inside a tag")),
        case("cut inside a comment", ovf("<a><!-- "), Damaged("OVF 0 at byte 3: the text ends inside a tag")),
        case("cut inside CDATA", ovf("<ab><![CDATA[x"), Damaged("OVF 0 at byte 4: the text ends inside a tag")),
        case("cut inside a processing instruction", ovf("<?xml "), Damaged("OVF 0 at byte 0: the text ends inside a tag")),
        case("cut behind a tag", ovf("<abc>"), Damaged("not well-formed XML: ")),
        case("tags that cross", ovf("<a><b></a></b>"), Damaged("expected 'b' tag, not 'a'")),
        case("an unknown prefix", ovf("<nope:a/>"), Damaged("unknown namespace prefix 'nope'")),
        case("another root", ovf(simple().replace("Envelope", "Envelop")), Damaged("its root is \"Envelop\"")),
        case("no VM", ovf("<Envelope/>"), Damaged("no VirtualSystem")),
        case("two VMs", with("<VirtualSystem ", "<VirtualSystem/><VirtualSystem "), Unbuilt("an OVF of several VMs")),
    ]
}

fn files() -> Vec<Case> {
    let file = |k: usize| format!(r#"<File ovf:href="f{k}" ovf:id="i{k}"/>"#);
    let href = |name: &str| with("ovf:href=\"a.vmdk\"", &format!("ovf:href=\"{name}\""));
    vec![
        case("absolute", href("/etc/passwd"), Refused("its OVF names \"/etc/passwd\"")),
        case("of the folder above", href("../a.vmdk"), Refused("its OVF names \"../a.vmdk\"")),
        case("the folder above", href(".."), Refused("its OVF names \"..\"")),
        case("from the network", href("http://x/a.vmdk"), Refused("its OVF names \"http://x/a.vmdk\"")),
        case("a device", href("file:///dev/sda"), Refused("its OVF names \"file:///dev/sda\"")),
        case("in Windows' spelling", href("a\\b"), Refused("its OVF names \"a\\\\b\"")),
        case("a line end in the name", href("a&#10;b"), Refused("its OVF names \"a\\nb\"")),
        case("a name of entities", href("&#46;&#46;&#47;b"), Refused("its OVF names \"../b\"")),
        case("no name", with("ovf:href=\"a.vmdk\"", ""), Refused("its OVF names \"\"")),
        case("file without an id", with("ovf:id=\"f\"", ""), Damaged("a File without an id")),
        case("two files of one id", with("<References>", "<References><File ovf:id=\"f\"/>"), Damaged("two files have the id \"f\"")),
        case("65 files", ovf(envelope(&(0..65).map(file).collect::<String>(), "", "")), Refused("its OVF names over 64 files")),
        case("compressed file", with("ovf:size=\"3\"", "ovf:compression=\"gzip\""), Unbuilt("has compression \"gzip\"")),
        case("file in chunks", with("ovf:size=\"3\"", "ovf:chunkSize=\"9\""), Unbuilt("is cut into chunks")),
        case("size of words", with("ovf:size=\"3\"", "ovf:size=\"big\""), Damaged("\"big\" is not a number of the disk \"d\"")),
        case("size below zero", with("ovf:size=\"3\"", "ovf:size=\"-3\""), Damaged("\"-3\" is not a number")),
    ]
}

fn disks() -> Vec<Case> {
    let file = |k: usize| format!(r#"<File ovf:href="f{k}" ovf:id="i{k}"/>"#);
    let disk = |k: usize| format!(r#"<Disk ovf:capacity="4" ovf:diskId="d{k}" ovf:fileRef="i{}"/>"#, k % 64);
    let many: String = (0..65).map(disk).collect();
    let items = "<Item><rasd:ResourceType>3</rasd:ResourceType></Item>".repeat(1025);
    let capacity = |value: &str| with("ovf:capacity=\"4\"", &format!("ovf:capacity=\"{value}\""));
    let units = |value: &str| with("byte * 2^20", value);
    vec![
        case("disk without an id", with("ovf:diskId=\"d\"", ""), Damaged("a Disk without a diskId")),
        case("delta disk", with("ovf:fileRef=\"f\"", "ovf:fileRef=\"f\" ovf:parentRef=\"e\""), Refused("the disk \"d\" is a delta")),
        case("disk without a file", with("ovf:fileRef=\"f\"", ""), Unbuilt("the disk \"d\" has no file")),
        case(
            "disk of a file that is not listed",
            with("ovf:fileRef=\"f\"", "ovf:fileRef=\"g\""),
            Damaged("names the file id \"g\", which is not in References"),
        ),
        case(
            "one disk twice",
            ovf(envelope(&(file(0) + &file(1)), &(disk(0) + &disk(1)).replace("d1", "d0"), "")),
            Damaged("the disk \"d0\" or its file stands there twice"),
        ),
        case(
            "one file of two disks",
            with("<Info/>", "<Info/><Disk ovf:capacity=\"4\" ovf:diskId=\"c\" ovf:fileRef=\"f\"/>"),
            Damaged("the disk \"d\" or its file stands"),
        ),
        case("65 disks", ovf(envelope(&(0..64).map(file).collect::<String>(), &many, "")), Refused("its OVF has over 64 disks")),
        case("no capacity", capacity(""), Damaged("\"\" is not a number of the disk \"d\"")),
        case("capacity by reference", capacity("${size}"), Damaged("\"${size}\" is not a number")),
        case("capacity that overflows", capacity("18446744073709551615"), Damaged("the capacity of the disk \"d\" overflows")),
        case("capacity over 2^64", capacity("18446744073709551616"), Damaged("\"18446744073709551616\" is not a number")),
        case("unit that overflows", units("byte * 2^64"), Damaged("the unit \"byte * 2^64\"")),
        case("unit of a huge power", units("byte * 9^999999999"), Damaged("the unit \"byte * 9^999999999\"")),
        case("unit of many factors", units(&format!("byte{}", " * 2^20".repeat(9))), Damaged("the unit \"byte * 2^20 * 2^20")),
        case("unit of words", units("parsec * 2^20"), Damaged("the unit \"parsec * 2^20\"")),
        case("item of a disk that is not listed", with("ovf:/disk/d", "ovf:/disk/e"), Damaged("an item names the disk \"e\"")),
        case("item of a file", with("ovf:/disk/d", "ovf:/file/f"), Unbuilt("a disk with the resource \"ovf:/file/f\"")),
        case("item of nothing", with("ovf:/disk/d", ""), Unbuilt("a disk with the resource \"\"")),
        case("1025 items", ovf(envelope("", "", &items)), Refused("over 1024 hardware items")),
    ]
}

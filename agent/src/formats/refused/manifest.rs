//! Manifests of an OVA: lines that are none.
//!
//! A crash here costs nothing: tests only.

use super::{Case, Damaged, Good, Input, Refused, case};

fn manifest(text: impl AsRef<[u8]>) -> Input {
    Input::Manifest(text.as_ref().to_vec())
}

pub(super) fn cases() -> Vec<Case> {
    let digest = "0".repeat(64);
    let line = |name: &str| format!("SHA256({name})= {digest}\n");
    let many: String = (0..65).map(|k| line(&format!("f{k}"))).collect();
    vec![
        case("good", manifest(line("a.vmdk") + "\r\n\0\0" + &format!("SHA1(b)= {}", "f".repeat(40))), Good(None)),
        case("over 64 KiB", manifest(" ".repeat((64 << 10) + 1)), Refused("its manifest is over 65536 bytes")),
        case("not UTF-8", manifest(b"SHA256(\xff)= 00"), Damaged("not UTF-8")),
        case("a line of words", manifest("hello"), Damaged("not ALGORITHM(NAME)= HEX: \"hello\"")),
        case("a line without a name", manifest(format!("SHA256= {digest}")), Damaged("not ALGORITHM(NAME)= HEX: \"SHA256=")),
        case("an unknown digest", manifest("CRC32(a)= 00000000"), Damaged("digest \"CRC32\" is unknown")),
        case("a digest that proves nothing", manifest(format!("MD5(a)= {}", "0".repeat(32))), Damaged("digest \"MD5\" is unknown")),
        case("a digest cut short", manifest(format!("SHA256(a)= {}", &digest[1..])), Damaged("the digest of \"a\" is not 64 hex digits")),
        case(
            "a digest of words",
            manifest(format!("SHA512(b)= {}", "g".repeat(128))),
            Damaged("the digest of \"b\" is not 128 hex digits"),
        ),
        case("a digest of another kind", manifest(format!("SHA1(c)= {digest}")), Damaged("the digest of \"c\" is not 40 hex digits")),
        case("a path", manifest(line("../a.vmdk")), Refused("the manifest names \"../a.vmdk\"")),
        case("no name", manifest(line("")), Refused("the manifest names \"\"")),
        case("a name twice", manifest(line("a") + &line("a")), Damaged("manifest line 2 at byte 0: \"a\" stands there twice")),
        case("65 lines", manifest(many), Refused("its manifest has over 64 lines")),
    ]
}

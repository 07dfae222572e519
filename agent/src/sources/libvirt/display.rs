//! Where a domain shows its screen.
//!
//! Owns: which `<graphics>` a console is carried from. Never: dials; leads away from this host, whatever a domain's XML names.
//! A crash here costs one console.
//! Source: libvirt, Domain XML format (graphical framebuffers).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;

use roxmltree::{Document, Node, ParsingOptions};
use shared::error::Code;

use crate::egress::Screen;
use crate::sources::{Display, Error};

/// Most nodes of a domain's description.
const NODES: u32 = 100_000;

/// Reads it from the XML of a domain as it is now.
///
/// # Errors
/// 409 where the domain is off; 422 where it has no VNC that this host reaches, with what would be right; 502 where that is no domain's XML.
pub fn of(xml: &str) -> Result<Display, Error> {
    let options = ParsingOptions { allow_dtd: false, nodes_limit: NODES, ..ParsingOptions::default() };
    let unread = |why: String| Error::fatal(Code::BadGateway, format!("the domain's XML cannot be read: {why}"));
    let document = Document::parse_with_options(xml, options).map_err(|e| unread(e.to_string()))?;
    let root = document.root_element();
    let name = child(root, "name").and_then(|name| name.text()).map(str::trim).filter(|_| root.has_tag_name("domain"));
    let name = name.ok_or_else(|| unread("it is of no domain with a name".to_owned()))?;
    // Only what exists in memory has a number.
    let Some(life) = root.attribute("id").and_then(|id| id.parse().ok()) else {
        return Err(Error::fatal(Code::Conflict, format!("{name} is off and shows nothing; switch it on")));
    };
    let devices = child(root, "devices");
    let graphics: Vec<Node> = devices.iter().flat_map(Node::children).filter(|node| node.has_tag_name("graphics")).collect();
    let mut elsewhere = None;
    for vnc in graphics.iter().filter(|node| node.attribute("type") == Some("vnc")) {
        match screen(*vnc) {
            Ok(screen) => return Ok(Display { name: name.to_owned(), screen, life }),
            Err(why) => elsewhere = Some(why),
        }
    }
    let right = "a console needs <graphics type='vnc'> that listens on the loopback or on a socket (virsh edit, then start it anew)";
    let message = match (elsewhere, graphics.iter().find_map(|node| node.attribute("type"))) {
        (Some(why), _) => format!("the VNC of {name} {why}; {right}"),
        (None, Some(other)) => format!("{name} shows its screen by {other:?} alone; {right}"),
        (None, None) => format!("{name} has no display; {right}"),
    };
    Err(Error::fatal(Code::Unprocessable, message))
}

fn screen(vnc: Node) -> Result<Screen, String> {
    let listen = child(vnc, "listen");
    let of = |name: &str| listen.and_then(|listen| listen.attribute(name)).or_else(|| vnc.attribute(name));
    if let Some(socket) = of("socket") {
        let is_path = Path::new(socket).is_absolute();
        return if is_path { Ok(Screen::Socket(socket.into())) } else { Err("listens on a socket without a whole path".to_owned()) };
    }
    if listen.and_then(|listen| listen.attribute("type")) == Some("none") {
        return Err("listens nowhere".to_owned());
    }
    let port = vnc.attribute("port").and_then(|port| port.parse::<u16>().ok()).filter(|port| *port > 0);
    let port = port.ok_or("has no port")?;
    let address = listen.and_then(|listen| listen.attribute("address")).or_else(|| vnc.attribute("listen")).unwrap_or("127.0.0.1");
    let ip = match address {
        "localhost" => IpAddr::V4(Ipv4Addr::LOCALHOST),
        other => other.parse().map_err(|_| format!("listens at {other:?}"))?,
    };
    let ip = match ip {
        // Who listens everywhere listens on the loopback.
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip if ip.is_loopback() => ip,
        ip => return Err(format!("listens at {ip} alone")),
    };
    Ok(Screen::Port(SocketAddr::new(ip, port)))
}

fn child<'a, 'input>(node: Node<'a, 'input>, name: &str) -> Option<Node<'a, 'input>> {
    node.children().find(|child| child.has_tag_name(name))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn domain(id: &str, graphics: &str) -> Result<Display, Error> {
        of(&format!("<domain type='kvm'{id}><name>web</name><devices>{graphics}</devices></domain>"))
    }

    #[test]
    fn a_screen_lies_on_the_loopback_or_on_a_socket() {
        for (graphics, place) in [
            ("<graphics type='vnc' port='5901' autoport='yes' listen='127.0.0.1'/>", "127.0.0.1:5901"),
            ("<graphics type='vnc' port='5902'/>", "127.0.0.1:5902"),
            ("<graphics type='vnc' port='5903' listen='0.0.0.0'><listen type='address' address='0.0.0.0'/></graphics>", "127.0.0.1:5903"),
            ("<graphics type='vnc' port='5904' listen='::'><listen type='address' address='::'/></graphics>", "[::1]:5904"),
            ("<graphics type='spice' port='5900'/><graphics type='vnc' port='5905' listen='localhost'/>", "127.0.0.1:5905"),
            ("<graphics type='vnc' port='5906' listen='10.0.0.5'/><graphics type='vnc' port='5907' listen='127.0.0.2'/>", "127.0.0.2:5907"),
        ] {
            let found = domain(" id='7'", graphics).unwrap();
            assert_eq!((found.screen, found.life, found.name.as_str()), (Screen::Port(place.parse().unwrap()), 7, "web"), "{graphics}");
        }
        let socket = "<graphics type='vnc' socket='/run/q/vnc.sock'><listen type='socket' socket='/run/q/vnc.sock'/></graphics>";
        assert_eq!(domain(" id='1'", socket).unwrap().screen, Screen::Socket("/run/q/vnc.sock".into()));
    }

    #[test]
    fn what_has_no_screen_here_is_told_what_would_be_right() {
        for (id, graphics, code, word) in [
            ("", "<graphics type='vnc' port='-1' autoport='yes'/>", Code::Conflict, "switch it on"),
            (" id='7'", "", Code::Unprocessable, "no display"),
            (" id='7'", "<graphics type='spice' port='5900'/>", Code::Unprocessable, "spice"),
            (" id='7'", "<graphics type='vnc' port='-1'/>", Code::Unprocessable, "no port"),
            (" id='7'", "<graphics type='vnc' port='5900' listen='10.0.0.5'/>", Code::Unprocessable, "10.0.0.5"),
            (" id='7'", "<graphics type='vnc'><listen type='none'/></graphics>", Code::Unprocessable, "nowhere"),
            (" id='7'", "<graphics type='vnc' socket='q.sock'/>", Code::Unprocessable, "whole path"),
        ] {
            let refused = domain(id, graphics).unwrap_err();
            assert!(refused.code == code && refused.message.contains(word), "{graphics}: {} {}", refused.code.word(), refused.message);
        }
        assert_eq!(of("<network><name>a</name></network>").unwrap_err().code, Code::BadGateway);
    }
}

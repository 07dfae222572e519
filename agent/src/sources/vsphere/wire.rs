//! SOAP as vCenter and ESXi speak it: a call's envelope, an answer's elements, a fault's type.
//!
//! Owns: quoting, and what an answer may be (64 MiB, no DTD). Never: dials. A crash here costs one call.
//! Source: vSphere Web Services API, "urn:vim25"; SOAP 1.1.

use std::fmt::Write as _;

use roxmltree::{Document, Node, ParsingOptions};

/// The namespace whose `type` attribute names a value's type; its prefix differs from server to server.
const XSI: &str = "http://www.w3.org/2001/XMLSchema-instance";
/// Most elements of an answer.
const NODES: u32 = 8_000_000;

/// A reference to an object of the server.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MoRef {
    /// `VirtualMachine`, `Folder`, …
    pub kind: String,
    /// `vm-57`, …; means something to this server only.
    pub value: String,
}

impl MoRef {
    /// Of a kind and a value.
    pub fn new(kind: &str, value: &str) -> Self {
        Self { kind: kind.to_owned(), value: value.to_owned() }
    }

    /// From an element whose text is the value and whose plain attribute `type` is the kind.
    pub fn of(node: Node) -> Option<Self> {
        let value = node.text().unwrap_or_default().trim();
        // A property bears `xsi:type` as well, and asked by the bare name either is answered.
        let kind = node.attributes().find(|attribute| attribute.namespace().is_none() && attribute.name() == "type")?;
        (!value.is_empty()).then(|| Self::new(kind.value(), value))
    }
}

/// What a server says in place of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// No session, or it ended.
    NotAuthenticated,
    /// Wrong user or password.
    InvalidLogin,
    /// The account may not do this; the privilege where it is named.
    NoPermission(String),
    /// The object is gone.
    ManagedObjectNotFound,
    /// The VM is on where it should be off, or the other way round.
    InvalidPowerState,
    /// Anything else: its type and the server's sentence.
    Other(String, String),
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::NotAuthenticated => write!(f, "the session is not authenticated"),
            Self::InvalidLogin => write!(f, "user or password is wrong"),
            Self::NoPermission(privilege) if privilege.is_empty() => write!(f, "the account lacks a privilege"),
            Self::NoPermission(privilege) => write!(f, "the account lacks the privilege {privilege}"),
            Self::ManagedObjectNotFound => write!(f, "the object is not there any more"),
            Self::InvalidPowerState => write!(f, "the VM's power state does not allow it"),
            Self::Other(kind, message) => write!(f, "{kind}: {message}"),
        }
    }
}

/// Text as it may stand in an element or attribute.
pub fn quote(text: &str) -> String {
    let mut quoted = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => quoted.push_str("&amp;"),
            '<' => quoted.push_str("&lt;"),
            '>' => quoted.push_str("&gt;"),
            '"' => quoted.push_str("&quot;"),
            // XML 1.0 has no way to write these.
            c if c.is_control() && !matches!(c, '\t' | '\n' | '\r') => {}
            c => quoted.push(c),
        }
    }
    quoted
}

/// A call's envelope; `body` are the elements behind `_this`.
pub fn envelope(method: &str, this: &MoRef, body: &str) -> String {
    let mut text = String::with_capacity(body.len() + 512);
    // Writing into a String cannot fail.
    let _ = write!(
        text,
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?><e:Envelope xmlns:e=\"http://schemas.xmlsoap.org/soap/envelope/\" xmlns:xsi=\"{XSI}\"><e:Body>\
         <{method} xmlns=\"urn:vim25\"><_this type=\"{}\">{}</_this>{body}</{method}></e:Body></e:Envelope>",
        quote(&this.kind),
        quote(&this.value)
    );
    text
}

/// The type of a value, without its prefix.
pub fn type_of<'a>(node: Node<'a, '_>) -> &'a str {
    let full = node.attribute((XSI, "type")).unwrap_or_default();
    full.rsplit_once(':').map_or(full, |(_, name)| name)
}

/// The child of that name.
pub fn child<'a, 'input>(node: Node<'a, 'input>, name: &str) -> Option<Node<'a, 'input>> {
    node.children().find(|child| child.is_element() && child.tag_name().name() == name)
}

/// The children of that name.
pub fn children<'a, 'input: 'a>(node: Node<'a, 'input>, name: &'static str) -> impl Iterator<Item = Node<'a, 'input>> {
    node.children().filter(move |child| child.is_element() && child.tag_name().name() == name)
}

/// The text of the child of that name, empty where there is none.
pub fn text<'a>(node: Node<'a, '_>, name: &str) -> &'a str {
    child(node, name).and_then(|child| child.text()).unwrap_or_default()
}

/// The number in the child of that name.
pub fn number<T: std::str::FromStr>(node: Node, name: &str) -> Option<T> {
    text(node, name).trim().parse().ok()
}

/// Parses an answer; no DTD, so no entity of its own.
pub fn parse(text: &str) -> Result<Document<'_>, String> {
    let options = ParsingOptions { allow_dtd: false, nodes_limit: NODES, ..ParsingOptions::default() };
    Document::parse_with_options(text, options).map_err(|e| format!("the answer is no XML that can be read: {e}"))
}

/// The element `METHODResponse`, or the fault in its place.
pub fn response<'a, 'input>(document: &'a Document<'input>, method: &str) -> Result<Node<'a, 'input>, Fault> {
    let odd = |what: &str| Fault::Other("answer".to_owned(), format!("it holds no {what}"));
    let body = child(document.root_element(), "Body").ok_or_else(|| odd("SOAP body"))?;
    if let Some(fault) = child(body, "Fault") {
        return Err(fault_of(fault));
    }
    child(body, &format!("{method}Response")).ok_or_else(|| odd(&format!("{method}Response")))
}

fn fault_of(fault: Node) -> Fault {
    let message = text(fault, "faultstring").trim().chars().take(500).collect::<String>();
    let Some(detail) = child(fault, "detail").and_then(|detail| detail.children().find(Node::is_element)) else {
        return Fault::Other("fault".to_owned(), message);
    };
    let named = detail.tag_name().name();
    let kind = match type_of(detail) {
        "" => named.strip_suffix("Fault").unwrap_or(named),
        kind => kind,
    };
    match kind {
        "NotAuthenticated" => Fault::NotAuthenticated,
        "InvalidLogin" => Fault::InvalidLogin,
        "NoPermission" => Fault::NoPermission(text(detail, "privilegeId").to_owned()),
        "ManagedObjectNotFound" => Fault::ManagedObjectNotFound,
        "InvalidPowerState" => Fault::InvalidPowerState,
        kind => Fault::Other(kind.to_owned(), message),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_into_an_envelope_stays_text() {
        let call = envelope("Login", &MoRef::new("SessionManager", "s"), &format!("<userName>{}</userName>", quote("a<b&\"c\"\u{1}")));
        let document = parse(&call).unwrap();
        let body = child(document.root_element(), "Body").unwrap();
        assert_eq!(text(child(body, "Login").unwrap(), "userName"), "a<b&\"c\"");
    }

    #[test]
    fn a_reference_is_read_past_the_type_of_its_property() {
        let text = format!("<val xmlns:x=\"{XSI}\" x:type=\"ManagedObjectReference\" type=\"Folder\">group-v3</val>");
        assert_eq!(MoRef::of(parse(&text).unwrap().root_element()), Some(MoRef::new("Folder", "group-v3")));
    }

    #[test]
    fn a_fault_is_known_by_its_type_whatever_the_prefix() {
        let answer = |detail: &str| {
            format!(
                "<s:Envelope xmlns:s=\"http://schemas.xmlsoap.org/soap/envelope/\" xmlns:q=\"{XSI}\"><s:Body><s:Fault>\
                 <faultstring>no</faultstring><detail>{detail}</detail></s:Fault></s:Body></s:Envelope>"
            )
        };
        let fault = |detail: &str| response(&parse(&answer(detail)).unwrap(), "X").unwrap_err();
        assert_eq!(fault("<InvalidLoginFault xmlns=\"urn:vim25\" q:type=\"InvalidLogin\"/>"), Fault::InvalidLogin);
        assert_eq!(fault("<NotAuthenticatedFault xmlns=\"urn:vim25\"/>"), Fault::NotAuthenticated);
        let lack =
            fault("<NoPermissionFault xmlns=\"urn:vim25\" q:type=\"v:NoPermission\"><privilegeId>A.B</privilegeId></NoPermissionFault>");
        assert_eq!(lack, Fault::NoPermission("A.B".to_owned()));
        assert_eq!(fault(""), Fault::Other("fault".to_owned(), "no".to_owned()));
        assert!(parse("<!DOCTYPE x [<!ENTITY a \"b\">]><x>&a;</x>").is_err());
    }
}

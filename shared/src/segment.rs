//! A text as one segment of a URL's path.
//!
//! Owns: which bytes stand as they are. Never: takes a URL apart. A crash here costs nothing.
//! Source: RFC 3986, 2.1 and 2.3.

/// Everything but unreserved characters, escaped.
pub fn segment(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => escaped.push(char::from(byte)),
            _ => escaped.push_str(&format!("%{byte:02X}")),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::segment;

    #[test]
    fn a_name_stays_one_segment() {
        assert_eq!(segment("agent-1"), "agent-1");
        assert_eq!(segment("a/../b ü~"), "a%2F..%2Fb%20%C3%BC~");
    }
}

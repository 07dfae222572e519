//! What an XML text costs, counted before the parser sees it.
//!
//! Owns: the limits that keep a hostile text from costing time: no DTD, depth, attributes of one element, namespaces. The parser compares
//! each attribute with all others of its element and each prefix with all namespaces in scope, so those two must be few.
//! Never: decides whether the text is well formed; the parser does. A crash here costs nothing.

use super::super::disk::Result;
use super::{corrupt, refused};

/// Deepest nesting of elements.
const MAX_DEPTH: usize = 64;
/// Most attributes of one element, namespaces included.
const MAX_ATTRIBUTES: usize = 64;
/// Most namespace declarations in the text.
const MAX_NAMESPACES: usize = 256;

/// Refuses a text over the limits.
pub fn check(text: &str) -> Result<()> {
    let bytes = text.as_bytes();
    let (mut at, mut depth, mut namespaces) = (0, 0usize, 0usize);
    while let Some(open) = find(bytes, at, b"<") {
        let rest = &bytes[open..];
        let cut = |end: Option<usize>| end.ok_or_else(|| corrupt("OVF", 0, open as u64, "the text ends inside a tag"));
        if rest.starts_with(b"<!--") {
            at = cut(find(bytes, open + 4, b"-->"))? + 3;
        } else if rest.starts_with(b"<![CDATA[") {
            at = cut(find(bytes, open + 9, b"]]>"))? + 3;
        } else if rest.starts_with(b"<?") {
            at = cut(find(bytes, open + 2, b"?>"))? + 2;
        } else if rest.starts_with(b"<!") {
            return Err(refused("its OVF has a DTD; only plain elements are accepted"));
        } else if rest.starts_with(b"</") {
            at = cut(find(bytes, open, b">"))? + 1;
            depth = depth.saturating_sub(1);
        } else {
            let end = cut(tag_end(bytes, open, &mut namespaces)?)?;
            depth += usize::from(bytes[end - 1] != b'/');
            at = end + 1;
        }
        if depth > MAX_DEPTH {
            return Err(refused(format!("its OVF nests elements over {MAX_DEPTH} deep")));
        }
        if namespaces > MAX_NAMESPACES {
            return Err(refused(format!("its OVF declares over {MAX_NAMESPACES} namespaces")));
        }
    }
    Ok(())
}

/// Where a start tag's `>` lies; counts its attributes.
fn tag_end(bytes: &[u8], open: usize, namespaces: &mut usize) -> Result<Option<usize>> {
    let mut quote = None;
    let mut attributes = 0;
    for (k, b) in bytes.iter().enumerate().skip(open) {
        match (quote, *b) {
            (Some(q), b) if b == q => quote = None,
            (Some(_), _) => {}
            (None, b'"' | b'\'') => quote = Some(*b),
            (None, b'>') => return Ok(Some(k)),
            (None, b'=') => {
                attributes += 1;
                if attributes > MAX_ATTRIBUTES {
                    return Err(refused(format!("an element of its OVF has over {MAX_ATTRIBUTES} attributes")));
                }
            }
            (None, b'x') if bytes[k..].starts_with(b"xmlns") => *namespaces += 1,
            _ => {}
        }
    }
    Ok(None)
}

fn find(bytes: &[u8], from: usize, needle: &[u8]) -> Option<usize> {
    let rest = bytes.get(from..)?;
    if needle.len() == 1 {
        return rest.iter().position(|b| *b == needle[0]).map(|k| from + k);
    }
    rest.windows(needle.len()).position(|window| window == needle).map(|k| from + k)
}

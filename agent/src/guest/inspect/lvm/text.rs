//! The text in which LVM describes a group: `key = value` and `name { … }`.
//!
//! Owns: parsing it, with a bound on its depth. Never: knows what it means. A crash here costs nothing.

use std::collections::BTreeMap;

/// Deepest nesting; LVM's own is 4.
const MAX_DEPTH: usize = 16;

/// A value.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// A number that is not negative.
    Number(u64),
    /// A text.
    Text(String),
    /// Several.
    List(Vec<Value>),
    /// What stands in braces.
    Section(Section),
}

/// Names with their values.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Section(BTreeMap<String, Value>);

impl Section {
    /// A value.
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.0.get(name)
    }

    /// A number.
    pub fn number(&self, name: &str) -> Option<u64> {
        if let Value::Number(number) = self.0.get(name)? { Some(*number) } else { None }
    }

    /// A text.
    pub fn text(&self, name: &str) -> Option<&str> {
        if let Value::Text(text) = self.0.get(name)? { Some(text) } else { None }
    }

    /// The texts of a list.
    pub fn words(&self, name: &str) -> impl Iterator<Item = &str> {
        let list = if let Some(Value::List(list)) = self.0.get(name) { list.as_slice() } else { &[] };
        list.iter().filter_map(|value| if let Value::Text(text) = value { Some(text.as_str()) } else { None })
    }

    /// A section in it.
    pub fn section(&self, name: &str) -> Option<&Section> {
        if let Value::Section(section) = self.0.get(name)? { Some(section) } else { None }
    }

    /// All sections in it.
    pub fn sections(&self) -> impl Iterator<Item = (&str, &Section)> {
        self.0.iter().filter_map(|(name, value)| if let Value::Section(section) = value { Some((name.as_str(), section)) } else { None })
    }

    /// The same, taken out.
    pub fn into_sections(self) -> impl Iterator<Item = (String, Section)> {
        self.0.into_iter().filter_map(|(name, value)| if let Value::Section(section) = value { Some((name, section)) } else { None })
    }
}

/// Parses a whole text.
pub fn parse(text: &str) -> Result<Section, String> {
    let mut reader = Reader { rest: text };
    let section = reader.section(0)?;
    reader.blank();
    if reader.rest.trim_matches('\0').is_empty() { Ok(section) } else { Err("a brace too many".to_owned()) }
}

struct Reader<'t> {
    rest: &'t str,
}

impl<'t> Reader<'t> {
    /// Over blanks and comments.
    fn blank(&mut self) {
        loop {
            self.rest = self.rest.trim_start();
            if !self.rest.starts_with('#') {
                return;
            }
            self.rest = self.rest.find('\n').map_or("", |end| &self.rest[end..]);
        }
    }

    fn take(&mut self, mark: char) -> bool {
        self.blank();
        let found = self.rest.strip_prefix(mark);
        self.rest = found.unwrap_or(self.rest);
        found.is_some()
    }

    fn word(&mut self) -> &'t str {
        self.blank();
        let end = self.rest.find(|c: char| !(c.is_ascii_alphanumeric() || "_-.+/@".contains(c))).unwrap_or(self.rest.len());
        let (word, rest) = self.rest.split_at(end);
        self.rest = rest;
        word
    }

    fn section(&mut self, depth: usize) -> Result<Section, String> {
        if depth > MAX_DEPTH {
            return Err("it is nested too deep".to_owned());
        }
        let mut section = Section::default();
        loop {
            let name = self.word();
            if name.is_empty() {
                return Ok(section);
            }
            let value = if self.take('{') {
                let inner = self.section(depth + 1)?;
                if !self.take('}') {
                    return Err(format!("`{name}` does not end"));
                }
                Value::Section(inner)
            } else if self.take('=') {
                self.value(depth)?
            } else {
                return Err(format!("`{name}` is followed by nothing that is known"));
            };
            section.0.insert(name.to_owned(), value);
        }
    }

    fn value(&mut self, depth: usize) -> Result<Value, String> {
        if depth > MAX_DEPTH {
            return Err("it is nested too deep".to_owned());
        }
        if self.take('"') {
            let mut text = String::new();
            let mut chars = self.rest.char_indices();
            while let Some((at, c)) = chars.next() {
                match c {
                    '"' => {
                        self.rest = &self.rest[at + 1..];
                        return Ok(Value::Text(text));
                    }
                    '\\' => text.extend(chars.next().map(|(_, c)| c)),
                    c => text.push(c),
                }
            }
            return Err("a text does not end".to_owned());
        }
        if self.take('[') {
            let mut list = Vec::new();
            while !self.take(']') {
                list.push(self.value(depth + 1)?);
                if !self.take(',') {
                    if self.take(']') {
                        break;
                    }
                    return Err("a list does not end".to_owned());
                }
            }
            return Ok(Value::List(list));
        }
        let word = self.word();
        // Times may be negative; nobody here asks for them.
        if word.is_empty() { Err("a value is missing".to_owned()) } else { Ok(Value::Number(word.parse().unwrap_or(u64::MAX))) }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_lvm_writes_is_parsed_and_else_refused() {
        let root =
            parse("# made by\nvg-1 {\n\tseqno = 3\n\tflags = []\n\tname = \"a \\\"b\\\"\"\n\tl = [\"x\", 4]\n\tt = -5\n}\nv = 1\n\0\0")
                .unwrap();
        let group = root.section("vg-1").unwrap();
        assert_eq!((group.number("seqno"), group.text("name"), root.number("v")), (Some(3), Some("a \"b\""), Some(1)));
        assert_eq!(group.get("l"), Some(&Value::List(vec![Value::Text("x".into()), Value::Number(4)])));
        assert_eq!((group.words("l").collect::<Vec<_>>(), group.number("name")), (vec!["x"], None));
        let deep = |open: &str| open.repeat(100_000);
        for bad in ["a", "a {", "a = ", "a = \"x", "a = [1", "a = [1 2]", "}", "a { b = 1 ", &deep("a { "), &format!("a = {}", deep("["))] {
            assert!(parse(bad).is_err(), "{}", &bad[..bad.len().min(20)]);
        }
    }
}

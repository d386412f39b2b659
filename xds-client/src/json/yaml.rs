//! YAML to [`Node`]s. Plain scalars get their type by the rules of yaml-cpp as Envoy applies them: booleans in all
//! their YAML 1.1 spellings, integers in decimal, octal (`010`) and hexadecimal, and everything else a string, which
//! becomes a floating point number only where a field is one.

use std::collections::HashMap;

use granit_parser::{ErrorKind, Event, Marker, Parser, ScalarStyle, ScanError, StrInput, Tag};

use super::ConfigError;
use super::tree::{Content, Entry, Node};

/// The deepest nesting taken, as in protobuf's own JSON parser.
const MAX_DEPTH: usize = 100;
/// How many values aliases may add to those written out. Bounds documents made to explode ("billion laughs"). A long text
/// counts as several.
const MAX_ALIASED_NODES: usize = 1_000_000;
/// How many values are kept for aliases: those of anchors within each other once for each.
const MAX_ANCHORED_NODES: usize = 2_000_000;
/// How many bytes of text count as one value.
const TEXT_OF_A_NODE: usize = 64;

/// Parses one YAML document.
pub(super) fn parse(text: &str) -> Result<Node, ConfigError> {
    let parser = Parser::new_from_str(text);
    let mut builder = Builder { text, parser, anchors: HashMap::new(), anchored: 0, aliased: 0 };
    builder.document()
}

struct Builder<'input> {
    text: &'input str,
    parser: Parser<'input, StrInput<'input>>,
    /// Values with an anchor, and how many nodes each holds.
    anchors: HashMap<usize, (Node, usize)>,
    anchored: usize,
    aliased: usize,
}

impl<'input> Builder<'input> {
    /// The first document. As in Envoy, what follows it is not read.
    fn document(&mut self) -> Result<Node, ConfigError> {
        let mut root = None;
        while let Some((event, at)) = self.next()? {
            match event {
                Event::StreamStart | Event::DocumentStart(..) | Event::StreamEnd => {}
                Event::DocumentEnd => {
                    if let Ok(Some((Event::DocumentStart(..), at))) = self.next() {
                        tracing::warn!(line = at.line(), "only the first YAML document is read: others follow it here");
                    }
                    break;
                }
                event => root = Some(self.node(event, at, 0)?),
            }
        }
        root.ok_or_else(|| ConfigError::new("", "the document is empty"))
    }

    /// The next event that is not a comment.
    fn next(&mut self) -> Result<Option<(Event<'input>, Marker)>, ConfigError> {
        loop {
            match self.parser.next_event() {
                None => return Ok(None),
                Some(Err(scan)) => return Err(scan_error(&scan, self.text)),
                Some(Ok((Event::Comment(..), _))) => {}
                Some(Ok((event, span))) => return Ok(Some((event, span.start))),
            }
        }
    }

    fn next_inside(&mut self, at: Marker) -> Result<(Event<'input>, Marker), ConfigError> {
        self.next()?.ok_or_else(|| error(at, "the document ends inside this value"))
    }

    fn node(&mut self, event: Event<'input>, at: Marker, depth: usize) -> Result<Node, ConfigError> {
        let container = matches!(event, Event::SequenceStart(..) | Event::MappingStart(..));
        if container && depth >= MAX_DEPTH {
            return Err(error(at, format!("nested deeper than {MAX_DEPTH} levels")));
        }
        let (anchor, content) = match event {
            Event::Alias(id) => return self.alias(id, at, depth),
            Event::Scalar(text, style, anchor, tag) => (anchor, scalar(&text, style, tag.as_deref())),
            Event::SequenceStart(_, anchor, _) => {
                let mut items = Vec::new();
                loop {
                    match self.next_inside(at)? {
                        (Event::SequenceEnd, _) => break,
                        (event, at) => items.push(self.node(event, at, depth + 1)?),
                    }
                }
                (anchor, Content::List(items))
            }
            Event::MappingStart(_, anchor, _) => (anchor, Content::Map(self.map(at, depth)?)),
            _ => return Err(error(at, "a value is expected here")),
        };
        let node = Node { position: Some(position(at)), content };
        self.keep(anchor, &node, at)?;
        Ok(node)
    }

    /// Keeps a value for aliases of it, where it has an anchor.
    fn keep(&mut self, anchor: usize, node: &Node, at: Marker) -> Result<(), ConfigError> {
        if anchor != 0 {
            let nodes = count(node);
            self.anchored += nodes;
            if self.anchored > MAX_ANCHORED_NODES {
                return Err(error(at, format!("anchors hold more than {MAX_ANCHORED_NODES} values")));
            }
            self.anchors.insert(anchor, (node.clone(), nodes));
        }
        Ok(())
    }

    fn map(&mut self, at: Marker, depth: usize) -> Result<Vec<Entry>, ConfigError> {
        let mut entries: Vec<Entry> = Vec::new();
        let mut keys: HashMap<String, usize> = HashMap::new();
        loop {
            let (key, key_at, ignored) = match self.next_inside(at)? {
                (Event::MappingEnd, _) => return Ok(entries),
                (Event::Scalar(text, style, anchor, tag), at) => {
                    if anchor != 0 {
                        let content = scalar(&text, style, tag.as_deref());
                        self.keep(anchor, &Node { position: Some(position(at)), content }, at)?;
                    }
                    (text.into_owned(), at, tag.is_some_and(|tag| tag.handle() == "!" && tag.suffix() == "ignore"))
                }
                (Event::Alias(id), at) => match self.alias(id, at, depth)?.content {
                    Content::String(text) => (text, at, false),
                    Content::Number(number) => (number.to_string(), at, false),
                    Content::Bool(value) => (value.to_string(), at, false),
                    _ => return Err(error(at, "a key must be a plain value")),
                },
                (_, at) => return Err(error(at, "a key must be a plain value")),
            };
            let (event, value_at) = self.next_inside(key_at)?;
            let value = self.node(event, value_at, depth + 1)?;
            // Envoy's own tag, for what is only there to be anchored.
            if ignored {
                continue;
            }
            let entry = Entry { position: Some(position(key_at)), key, value };
            match keys.get(&entry.key).and_then(|index| entries.get_mut(*index)) {
                // As in Envoy the last one counts.
                Some(first) => {
                    let (key, (line, column)) = (&entry.key, position(key_at));
                    tracing::warn!(%key, line, column, "the key occurs twice: the last one counts");
                    *first = entry;
                }
                None => {
                    keys.insert(entry.key.clone(), entries.len());
                    entries.push(entry);
                }
            }
        }
    }

    fn alias(&mut self, id: usize, at: Marker, depth: usize) -> Result<Node, ConfigError> {
        // The parser refuses aliases of anchors it has not seen; one of a value that is still open has no value yet.
        let Some((node, nodes)) = self.anchors.get(&id) else {
            return Err(error(at, "the alias names a value that contains it"));
        };
        self.aliased += nodes;
        if self.aliased > MAX_ALIASED_NODES {
            return Err(error(at, format!("aliases expand to more than {MAX_ALIASED_NODES} values")));
        }
        if depth + height(node) > MAX_DEPTH {
            return Err(error(at, format!("nested deeper than {MAX_DEPTH} levels")));
        }
        Ok(node.clone())
    }
}

/// A scalar with the type that yaml-cpp and Envoy give it: quoted text without a tag is a string, and anything else is
/// looked at; tags say no more than that (`!!int "3"` is three, `!!str 3` too).
fn scalar(text: &str, style: ScalarStyle, tag: Option<&Tag>) -> Content {
    let quoted = style != ScalarStyle::Plain;
    match tag {
        None if quoted => Content::String(text.to_owned()),
        None => plain(text),
        Some(tag) if format!("{}{}", tag.handle(), tag.suffix()) == "!" => Content::String(text.to_owned()),
        // Only an untagged scalar is null.
        Some(_) => match plain(text) {
            Content::Null => Content::String(text.to_owned()),
            content => content,
        },
    }
}

/// The type of a plain (unquoted) scalar.
fn plain(text: &str) -> Content {
    if matches!(text, "" | "~" | "null" | "Null" | "NULL") {
        return Content::Null;
    }
    if let Some(value) = boolean(text) {
        return Content::Bool(value);
    }
    match integer(text) {
        // Beyond 32 bits a JSON number may lose digits: Envoy carries such integers as strings too.
        Some(value) => match i32::try_from(value) {
            Ok(value) => Content::Number(value.into()),
            Err(_) => Content::String(value.to_string()),
        },
        None => Content::String(text.to_owned()),
    }
}

/// YAML 1.1 booleans in lower, UPPER and Capitalised form.
fn boolean(text: &str) -> Option<bool> {
    let lower = text.to_ascii_lowercase();
    let capitalised = text.chars().next().is_some_and(|c| c.is_ascii_uppercase()) && text[1..] == lower[1..];
    if text != lower && text != text.to_ascii_uppercase() && !capitalised {
        return None;
    }
    match lower.as_str() {
        "y" | "yes" | "true" | "on" => Some(true),
        "n" | "no" | "false" | "off" => Some(false),
        _ => None,
    }
}

/// C's integer notation: an optional sign, then decimal, `0x` hexadecimal or `0` octal digits.
fn integer(text: &str) -> Option<i64> {
    let (negative, digits) = match text.as_bytes().first()? {
        b'-' => (true, &text[1..]),
        b'+' => (false, &text[1..]),
        _ => (false, text),
    };
    let (radix, digits) = match digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X")) {
        Some(hex) => (16, hex),
        None if digits.len() > 1 && digits.starts_with('0') => (8, &digits[1..]),
        None => (10, digits),
    };
    if !digits.bytes().all(|b| b.is_ascii_alphanumeric()) {
        return None;
    }
    let value = i128::from(u64::from_str_radix(digits, radix).ok()?);
    i64::try_from(if negative { -value } else { value }).ok()
}

/// How many values a value is.
fn count(node: &Node) -> usize {
    let of_text = |text: &str| text.len() / TEXT_OF_A_NODE;
    1 + match &node.content {
        Content::List(items) => items.iter().map(count).sum(),
        Content::Map(entries) => entries.iter().map(|entry| of_text(&entry.key) + count(&entry.value)).sum(),
        Content::String(text) => of_text(text),
        _ => 0,
    }
}

/// How many objects and lists are in each other.
fn height(node: &Node) -> usize {
    match &node.content {
        Content::List(items) => 1 + items.iter().map(height).max().unwrap_or(0),
        Content::Map(entries) => 1 + entries.iter().map(|entry| height(&entry.value)).max().unwrap_or(0),
        _ => 0,
    }
}

fn position(at: Marker) -> (u64, u64) {
    (at.line() as u64, at.col() as u64 + 1)
}

fn error(at: Marker, message: impl Into<String>) -> ConfigError {
    ConfigError { path: String::new(), position: Some(position(at)), message: message.into() }
}

fn scan_error(scan: &ScanError, text: &str) -> ConfigError {
    let at = position(*scan.marker());
    let at = match scan.kind() {
        // These are said of where the value begins.
        ErrorKind::TabInPlainScalar | ErrorKind::TabAtBlockScalarStart => indenting_tab(text, at.0 + 1).unwrap_or(at),
        ErrorKind::TabInBlockIndentation => indenting_tab(text, at.0).unwrap_or(at),
        _ => at,
    };
    ConfigError { position: Some(at), ..error(*scan.marker(), format!("not valid YAML: {}", scan.kind())) }
}

/// The first tab that something is indented with, in this line or after it.
fn indenting_tab(text: &str, first: u64) -> Option<(u64, u64)> {
    let lines = (1..).zip(text.lines()).skip_while(|(line, _)| *line < first);
    lines.into_iter().find_map(|(line, text)| {
        let after = text.trim_start_matches(' ');
        let indents = after.starts_with('\t') && !matches!(after.trim_start().chars().next(), None | Some('#'));
        indents.then(|| (line, (text.len() - after.len()) as u64 + 1))
    })
}

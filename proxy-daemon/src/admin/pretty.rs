//! JSON laid out as Envoy does, written piece by piece: a dump never exists as one tree.

use serde::Serialize as _;
use serde_json::{Value as Json, ser::PrettyFormatter};

/// A value on a line of its own, `depth` levels below the outermost.
pub(super) fn write(out: &mut Vec<u8>, value: &Json, depth: usize) {
    let start = out.len();
    let mut serializer = serde_json::Serializer::with_formatter(&mut *out, PrettyFormatter::with_indent(b" "));
    // Writing a JSON value to memory cannot fail.
    let _ = value.serialize(&mut serializer);
    if depth == 0 {
        return;
    }
    // Strings have no raw line breaks in them: every one is of the layout.
    let breaks = out[start..].iter().filter(|byte| **byte == b'\n').count();
    let (mut from, end) = (out.len(), out.len() + breaks * depth);
    out.resize(end, b' ');
    let mut to = end;
    while from > start && from != to {
        from -= 1;
        if out[from] == b'\n' {
            out[to - depth..to].fill(b' ');
            to -= depth;
        }
        to -= 1;
        out[to] = out[from];
    }
}

/// Begins a line at `depth`.
pub(super) fn line(out: &mut Vec<u8>, depth: usize) {
    out.push(b'\n');
    out.resize(out.len() + depth, b' ');
}

/// `"name": `
pub(super) fn key(out: &mut Vec<u8>, name: &str) {
    write(out, &Json::from(name), 0);
    out.extend_from_slice(b": ");
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn lines_are_moved_in() {
        let mut out = b"x".to_vec();
        write(&mut out, &json!({ "a": [1, {}], "b": "two\nlines" }), 2);
        let text = String::from_utf8(out).unwrap();
        assert_eq!(text, "x{\n   \"a\": [\n    1,\n    {}\n   ],\n   \"b\": \"two\\nlines\"\n  }");
    }
}

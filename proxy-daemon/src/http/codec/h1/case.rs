//! Names of fields in another case than the lower one: `header_key_format`.

use std::{cmp::Ordering, sync::Arc};

use bytes::Bytes;
use memchr::{memchr, memchr_iter};

use crate::config::model::PreserveCase;

/// In the extensions of a message whose names of fields are to be written as they came.
#[derive(Debug, Clone)]
pub(super) struct OriginalCase(Arc<Original>);

#[derive(Debug)]
struct Original {
    /// Sorted without regard to case; of several that differ in nothing else the first came first.
    names: Vec<Bytes>,
    /// Of a response that is passed on with its reason.
    reason: Option<Bytes>,
    proper_case_others: bool,
}

impl OriginalCase {
    /// Remembers the names of a head that has been understood.
    pub(super) fn of(head: &Bytes, config: PreserveCase) -> OriginalCase {
        let ends = || memchr_iter(b'\n', head);
        let mut names: Vec<Bytes> = ends()
            .zip(ends().skip(1))
            .filter_map(|(before, end)| {
                let from = before + 1;
                Some(head.slice(from..from + memchr(b':', &head[from..end])?))
            })
            .collect();
        names.sort_by(|one, other| in_lower_case(one, other));
        // `HTTP/1.1 200 Fine`
        let line = ends().next().map(|end| head.slice(..end.saturating_sub(1)));
        let reason = line.filter(|line| config.forward_reason_phrase && line.len() > 13).map(|line| line.slice(13..));
        OriginalCase(Arc::new(Original { names, reason, proper_case_others: config.proper_case_others }))
    }

    /// A response's reason, where it is to be passed on.
    pub(super) fn reason(&self) -> Option<&[u8]> {
        self.0.reason.as_deref()
    }

    /// Writes the names of `lines`, which are in lower case, as they came; the first line has none.
    pub(super) fn restore(&self, lines: &mut [u8]) {
        for name in names(lines) {
            let first = self.0.names.partition_point(|known| in_lower_case(known, name) == Ordering::Less);
            match self.0.names.get(first) {
                // They are as long as each other.
                Some(known) if known.eq_ignore_ascii_case(name) => name.copy_from_slice(known),
                _ if self.0.proper_case_others => capitalise(name),
                _ => {}
            }
        }
    }
}

/// Names of fields as Envoy's `proper_case_words` has them; the first line has none.
pub(super) fn to_proper_case(lines: &mut [u8]) {
    names(lines).for_each(capitalise);
}

/// Each letter that comes after no letter and no digit becomes large.
fn capitalise(name: &mut [u8]) {
    let mut within = false;
    for byte in name {
        if !within {
            byte.make_ascii_uppercase();
        }
        within = byte.is_ascii_alphanumeric();
    }
}

fn names(lines: &mut [u8]) -> impl Iterator<Item = &mut [u8]> {
    lines.split_mut(|&byte| byte == b'\n').skip(1).filter_map(|line| {
        let colon = memchr(b':', line)?;
        Some(&mut line[..colon])
    })
}

fn in_lower_case(one: &[u8], other: &[u8]) -> Ordering {
    one.iter().map(u8::to_ascii_lowercase).cmp(other.iter().map(u8::to_ascii_lowercase))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &[u8] = b"GET / HTTP/1.1\r\nX-ONE: 1\r\nhost: a:b\r\nx-One: 2\r\nContent-LENGTH: 3\r\n\r\n";

    fn restored(config: PreserveCase, lines: &str) -> String {
        let mut lines = lines.as_bytes().to_vec();
        OriginalCase::of(&Bytes::from_static(HEAD), config).restore(&mut lines);
        String::from_utf8(lines).unwrap()
    }

    #[test]
    fn names_are_written_as_they_came() {
        let lines = "x-one: q\r\nx-one: x-one: 1\r\nx-new: host: 1\r\ncontent-length: 3\r\nhost: y\r\n\r\n";
        let expected = "x-one: q\r\nX-ONE: x-one: 1\r\nx-new: host: 1\r\nContent-LENGTH: 3\r\nhost: y\r\n\r\n";
        assert_eq!(restored(PreserveCase::default(), lines), expected);
        let others = PreserveCase { proper_case_others: true, ..PreserveCase::default() };
        assert_eq!(restored(others, lines), expected.replace("x-new:", "X-New:"));
    }

    #[test]
    fn reasons_are_passed_on_where_asked_for() {
        let reason = |head: &'static str, forward_reason_phrase| {
            let config = PreserveCase { forward_reason_phrase, ..PreserveCase::default() };
            OriginalCase::of(&Bytes::from_static(head.as_bytes()), config).reason().map(<[u8]>::to_vec)
        };
        assert_eq!(reason("HTTP/1.1 200 Very fine\r\na: b\r\n\r\n", true).as_deref(), Some(&b"Very fine"[..]));
        assert_eq!(reason("HTTP/1.1 200 Very fine\r\na: b\r\n\r\n", false), None);
        assert_eq!(reason("HTTP/1.1 200 \r\n\r\n", true), None);
        assert_eq!(reason("HTTP/1.1 200\r\n\r\n", true), None);
    }

    #[test]
    fn proper_case() {
        let mut lines = *b"a-b: c-d\r\nx-b2b_name.c1d: a-b: c\r\nte: 1\r\n\r\n";
        to_proper_case(&mut lines);
        assert_eq!(&lines, b"a-b: c-d\r\nX-B2b_Name.C1d: a-b: c\r\nTe: 1\r\n\r\n");
    }
}

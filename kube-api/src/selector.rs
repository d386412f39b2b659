//! Label selectors, as far as it can be said whether one is any: what it selects is the API server's affair.

use std::fmt::Write as _;

/// The longest name or value of a label, in bytes; and the longest prefix of a name.
const LONGEST: usize = 63;
const LONGEST_PREFIX: usize = 253;

/// Says what is wrong with a selector: `a=b,c!=d,e in (f,g),h notin (i),j,!k`. An empty one selects everything.
///
/// # Errors
/// With the part of it that an API server would refuse.
pub fn check(selector: &str) -> Result<(), String> {
    if selector.trim().is_empty() {
        return Ok(());
    }
    parts(selector)?.into_iter().try_for_each(|part| {
        requirement(part.trim()).map_err(|reason| {
            let mut text = format!("`{}`", part.trim().escape_debug());
            // The whole of it, where that says more.
            if part.trim() != selector.trim() {
                let _ = write!(text, " of `{}`", selector.escape_debug());
            }
            format!("{text}: {reason}")
        })
    })
}

/// The parts between commas, but for those in parentheses.
fn parts(selector: &str) -> Result<Vec<&str>, String> {
    let (mut parts, mut start, mut open) = (Vec::new(), 0, false);
    for (at, byte) in selector.bytes().enumerate() {
        match byte {
            b'(' | b')' if open == (byte == b'(') => {
                return Err(format!("`{}`: the parentheses do not match", selector.escape_debug()));
            }
            b'(' | b')' => open = byte == b'(',
            b',' if !open => {
                parts.push(&selector[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    if open {
        return Err(format!("`{}`: `)` is missing", selector.escape_debug()));
    }
    parts.push(&selector[start..]);
    Ok(parts)
}

/// One requirement: of a label's value, or that there is such a label.
fn requirement(text: &str) -> Result<(), String> {
    if let Some(absent) = text.strip_prefix('!') {
        return key(absent.trim());
    }
    if let Some((before, rest)) = text.split_once('(') {
        let values = rest.strip_suffix(')').ok_or("something stands behind `)`")?;
        let (name, operator) =
            before.trim().rsplit_once(char::is_whitespace).ok_or("`in` or `notin` is needed before `(`")?;
        if !matches!(operator, "in" | "notin") {
            return Err(format!("`{}` is neither `in` nor `notin`", operator.escape_debug()));
        }
        key(name.trim())?;
        return values.split(',').try_for_each(|text| value(text.trim()));
    }
    let Some(at) = text.find(['=', '!', '<', '>']) else { return key(text) };
    let (name, rest) = text.split_at(at);
    key(name.trim())?;
    let operator = ["==", "!=", "=", "<", ">"].into_iter().find(|operator| rest.starts_with(operator));
    let operator = operator.ok_or("`!` stands before a name, or before `=`")?;
    let stated = rest[operator.len()..].trim();
    match operator {
        "<" | ">" if stated.parse::<i64>().is_err() => Err(format!("`{}` is not a number", stated.escape_debug())),
        _ => value(stated),
    }
}

/// A label's name, which may have a prefix.
fn key(text: &str) -> Result<(), String> {
    let (prefix, name) = text.split_once('/').map_or((None, text), |(prefix, name)| (Some(prefix), name));
    let lower = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let is_label = |label: &str| {
        label.bytes().all(|byte| lower(byte) || byte == b'-')
            && label.bytes().next().is_some_and(lower)
            && label.bytes().next_back().is_some_and(lower)
    };
    let good_prefix = prefix.is_none_or(|prefix| prefix.len() <= LONGEST_PREFIX && prefix.split('.').all(is_label));
    if name.is_empty() || !good_prefix || !is_name(name) {
        return Err(format!("`{}` is not the name of a label", text.escape_debug()));
    }
    Ok(())
}

fn value(text: &str) -> Result<(), String> {
    if text.is_empty() || is_name(text) {
        return Ok(());
    }
    Err(format!("`{}` is not the value of a label", text.escape_debug()))
}

fn is_name(text: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    let outer = |byte: Option<u8>| byte.is_some_and(|byte| byte.is_ascii_alphanumeric());
    text.len() <= LONGEST && text.bytes().all(inner) && outer(text.bytes().next()) && outer(text.bytes().next_back())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An API server of Kubernetes 1.36 says the same of each.
    #[test]
    fn those_that_an_api_server_takes_are_taken_and_no_others() {
        for good in [
            "",
            " ",
            "a",
            "!a",
            "a=b",
            "a==b",
            "a!=b",
            "a=",
            "a = b , c",
            "a in (b)",
            "a in (b, c),d",
            "a notin (b,c)",
            "a in ()",
            "a>1",
            "a in (b,,c)",
            "a in(b)",
            "! a",
            "in in (b)",
            "notin",
            "example.com/Role=Web_1.x",
            "a,!b,c!=d,e in (f,g),h notin (i)",
            "app.kubernetes.io/part-of=mesh",
        ] {
            assert_eq!(check(good), Ok(()), "{good}");
        }
        for (bad, reason) in [
            ("mesh in (yes", "`)` is missing"),
            ("mesh in yes)", "the parentheses do not match"),
            ("mesh in ((yes))", "the parentheses do not match"),
            ("mesh within (yes)", "`within` is neither `in` nor `notin`"),
            ("in (yes)", "`in` or `notin` is needed"),
            ("a in (b) c", "something stands behind `)`"),
            ("a,,b", "`` of `a,,b`: `` is not the name of a label"),
            ("a=b,", "`` is not the name of a label"),
            ("=b", "`` is not the name of a label"),
            ("a b", "`a b` is not the name of a label"),
            ("a=b c", "`b c` is not the value of a label"),
            ("a=b=c", "`b=c` is not the value of a label"),
            ("a=-b", "`-b` is not the value of a label"),
            ("a!b", "`!` stands before a name"),
            ("a>b", "`b` is not a number"),
            ("a=(b)", "`in` or `notin` is needed"),
            ("a<-2", "`-2` is not the value of a label"),
            ("Example.com/a=b", "is not the name of a label"),
            ("a/b/c=d", "is not the name of a label"),
            ("a=\u{e4}", "is not the value of a label"),
        ] {
            let error = check(bad).unwrap_err();
            assert!(error.contains(reason), "{bad}: {error:?} does not contain {reason:?}");
        }
        assert!(check(&format!("a={}", "x".repeat(64))).is_err());
    }
}

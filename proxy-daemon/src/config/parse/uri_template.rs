//! Envoy's URI templates: `/api/{version}/*`, `/files/{rest=**}.png`. The texts of errors are Envoy's.

use std::{collections::HashSet, fmt::Write as _};

use regex::Regex;

use super::common::Result;
use crate::config::{FieldError, model::TemplatePiece};

/// What a segment of a path may consist of: RFC 3986's `pchar`. Templates themselves have no `*` and `=`.
const SEGMENT: &str = r"a-zA-Z0-9\-._~%!$&'()+,;:@=*";
/// How many variables a template may have, and how long their names may be, as in Envoy.
const MAX_VARIABLES: usize = 5;
const MAX_VARIABLE_NAME: usize = 16;

/// The anchored expression that a template stands for.
pub(in crate::config) fn matcher(template: &str, path: &str) -> Result<Regex> {
    let refuse = |reason: &str| {
        FieldError::new(path, format!("path_match_policy.path_template {template} is invalid: {reason}"))
    };
    let expression = expression(template).map_err(refuse)?;
    Regex::new(&format!("^{expression}$")).map_err(|_| refuse("Invalid pattern"))
}

/// The pieces of a rewrite template, whose variables are those of `matched`.
pub(in crate::config) fn rewrite(template: &str, matched: &Regex, path: &str) -> Result<Vec<TemplatePiece>> {
    let refuse = |reason: &str| {
        FieldError::new(path, format!("path_rewrite_policy.path_template_rewrite {template} is invalid: {reason}"))
    };
    let pieces = pieces(template).map_err(refuse)?;
    let known = |name: &str| matched.capture_names().flatten().any(|known| known == name);
    let unknown = pieces.iter().any(|piece| matches!(piece, TemplatePiece::Variable(name) if !known(name)));
    if unknown {
        Err(refuse("mismatch between variables in path_match_policy and path_rewrite_policy"))
    } else {
        Ok(pieces)
    }
}

type Parsed<T> = std::result::Result<T, &'static str>;

fn is_literal(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~%!$&'()+,;:@".contains(&byte)
}

fn is_variable_name(name: &str) -> bool {
    let mut bytes = name.bytes();
    bytes.next().is_some_and(|first| first.is_ascii_alphabetic())
        && bytes.all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
}

struct Compiler {
    out: String,
    variables: HashSet<String>,
    /// `**` stands for whatever follows: nothing after it may be open as well.
    text_glob: bool,
}

impl Compiler {
    /// Takes the literal that `rest` begins with.
    fn literal<'a>(&mut self, rest: &'a str) -> Parsed<&'a str> {
        let (literal, after) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        if literal.is_empty() || !literal.bytes().all(is_literal) {
            return Err("Invalid literal");
        }
        self.out.push_str(&regex::escape(literal));
        Ok(after)
    }

    /// Takes the `*` or `**` that `rest` begins with.
    fn glob<'a>(&mut self, rest: &'a str) -> Parsed<&'a str> {
        if self.text_glob {
            return Err("Glob after text glob.");
        }
        let (pattern, after) = match rest.strip_prefix("**") {
            Some(after) => {
                self.text_glob = true;
                (format!("[{SEGMENT}/]*"), after)
            }
            None => (format!("[{SEGMENT}]+"), &rest[1..]),
        };
        self.out.push_str(&pattern);
        Ok(after)
    }

    /// Takes the variable that `rest` begins with.
    fn variable<'a>(&mut self, rest: &'a str) -> Parsed<&'a str> {
        let (inner, after) = rest[1..].split_once('}').ok_or("Unmatched variable bracket")?;
        let (name, pattern) = inner.split_once('=').map_or((inner, None), |(name, pattern)| (name, Some(pattern)));
        if !is_variable_name(name) {
            return Err("Invalid variable name");
        }
        if self.variables.len() >= MAX_VARIABLES {
            return Err("Exceeded variable count limit");
        }
        if name.len() > MAX_VARIABLE_NAME {
            return Err("Invalid variable length");
        }
        if !self.variables.insert(name.to_owned()) {
            return Err("Repeated variable name");
        }
        // Writing to a String cannot fail.
        let _ = write!(self.out, "(?P<{name}>");
        match pattern {
            Some("") => return Err("Empty variable match"),
            None if self.text_glob => return Err("Implicit variable path glob after text glob."),
            None => drop(self.glob("*")?),
            Some(mut pattern) => loop {
                pattern = if pattern.starts_with('*') { self.glob(pattern)? } else { self.literal(pattern)? };
                match pattern.strip_prefix('/') {
                    None if pattern.is_empty() => break,
                    None | Some("") => return Err("Invalid variable match"),
                    Some(more) => {
                        self.out.push('/');
                        pattern = more;
                    }
                }
            },
        }
        self.out.push(')');
        Ok(after)
    }
}

fn expression(template: &str) -> Parsed<String> {
    if !template.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err("Invalid pattern");
    }
    let mut rest = template.strip_prefix('/').ok_or("Invalid pattern")?;
    let mut compiler = Compiler { out: "/".to_owned(), variables: HashSet::new(), text_glob: false };
    while !rest.is_empty() {
        rest = match rest.as_bytes()[0] {
            b'*' => compiler.glob(rest)?,
            b'{' => compiler.variable(rest)?,
            _ => compiler.literal(rest)?,
        };
        match rest.strip_prefix('/') {
            Some(more) => {
                compiler.out.push('/');
                rest = more;
            }
            None if rest.is_empty() => break,
            // A suffix, after which nothing may come.
            None => {
                if !compiler.literal(rest)?.is_empty() {
                    return Err("Prefix match not supported.");
                }
                break;
            }
        }
    }
    Ok(compiler.out)
}

fn pieces(template: &str) -> Parsed<Vec<TemplatePiece>> {
    if !template.starts_with('/') {
        return Err("Invalid rewrite variable placement");
    }
    if template.contains("//") {
        return Err("Invalid rewrite literal");
    }
    let mut pieces = Vec::new();
    let mut rest = template;
    while !rest.is_empty() {
        let (literal, variable) = rest.split_once('{').map_or((rest, None), |(text, after)| (text, Some(after)));
        if !literal.is_empty() {
            if !literal.bytes().all(|byte| is_literal(byte) || byte == b'/') {
                return Err("Invalid rewrite literal pattern");
            }
            pieces.push(TemplatePiece::Literal(literal.into()));
        }
        let Some(variable) = variable else { break };
        let (name, after) = variable.split_once('}').ok_or("Unmatched variable bracket")?;
        if !is_variable_name(name) {
            return Err("Invalid variable name");
        }
        pieces.push(TemplatePiece::Variable(name.into()));
        rest = after;
    }
    Ok(pieces)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matches(template: &str, path: &str) -> bool {
        matcher(template, "").unwrap().is_match(path)
    }

    #[test]
    fn templates_match_segments() {
        assert!(matches("/api/{id}/x", "/api/7/x") && !matches("/api/{id}/x", "/api/7/8/x"));
        assert!(matches("/deep/**", "/deep/a/b") && matches("/deep/**", "/deep/") && !matches("/deep/**", "/deep"));
        assert!(matches("/img/{name=*}.png", "/img/a.png") && !matches("/img/{name=*}.png", "/img/a.jpg"));
        assert!(matches("/a.b(c)+d", "/a.b(c)+d") && !matches("/a.b", "/axb"), "literals are no expressions");
        assert!(!matches("/api/*", "/api/") && !matches("/api/*", "/api/<"));
    }

    #[test]
    fn what_envoy_refuses_is_refused() {
        let reason = |template: &str| expression(template).unwrap_err();
        assert_eq!(reason("api"), "Invalid pattern");
        assert_eq!(reason("/{a}/{a}"), "Repeated variable name");
        assert_eq!(reason("/{a}/{b}/{c}/{d}/{e}/{f}"), "Exceeded variable count limit");
        assert_eq!(reason("/**/*"), "Glob after text glob.");
        assert_eq!(reason("/{a=**}/{b}"), "Implicit variable path glob after text glob.");
        assert_eq!(reason("/{a"), "Unmatched variable bracket");
        assert_eq!(reason("/{1a}"), "Invalid variable name");
        assert_eq!(reason("/{a=}"), "Empty variable match");
        assert_eq!(reason("/{a=b/}"), "Invalid variable match");
        assert_eq!(reason("/a//b"), "Invalid literal");
        assert_eq!(reason("/{a}b/c"), "Prefix match not supported.");
        assert_eq!(pieces("/x/{a}{b}").unwrap().len(), 3);
        assert_eq!(pieces("x").unwrap_err(), "Invalid rewrite variable placement");
        assert_eq!(pieces("/a//b").unwrap_err(), "Invalid rewrite literal");
    }
}

//! JSON text to [`Node`]s, in the dialect that protobuf's parser takes in Envoy's settings: besides JSON proper, strings in
//! single quotes, keys without quotes and a comma after the last item. Keys may occur twice: what that means depends on the
//! field. YAML's own notations (`0x10`, comments, indentation) are errors here.

use super::ConfigError;
use super::tree::{Content, Entry, Node};

/// The deepest nesting of objects and lists, as in protobuf's own parser.
const MAX_DEPTH: usize = 100;

type Result<T> = std::result::Result<T, ConfigError>;

/// Parses one JSON value and nothing after it.
pub(super) fn parse(text: &str) -> Result<Node> {
    let mut lexer = Lexer { rest: text, line: 1, column: 1 };
    let node = lexer.value(0)?;
    match lexer.peek() {
        None => Ok(node),
        Some(c) => Err(lexer.error(format!("not valid JSON: {c:?} follows the end of the value"))),
    }
}

struct Lexer<'a> {
    rest: &'a str,
    line: u64,
    column: u64,
}

impl<'a> Lexer<'a> {
    fn error(&self, message: impl Into<String>) -> ConfigError {
        ConfigError { path: String::new(), position: Some((self.line, self.column)), message: message.into() }
    }

    fn unexpected(&self, wanted: &str) -> ConfigError {
        match self.rest.chars().next() {
            Some(c) => self.error(format!("not valid JSON: expected {wanted}, found {c:?}")),
            None => self.error(format!("not valid JSON: expected {wanted}, and the text ends")),
        }
    }

    fn take(&mut self) -> Option<char> {
        let c = self.rest.chars().next()?;
        self.rest = &self.rest[c.len_utf8()..];
        match c {
            '\n' => (self.line, self.column) = (self.line + 1, 1),
            _ => self.column += 1,
        }
        Some(c)
    }

    /// The next character that is not white space.
    fn peek(&mut self) -> Option<char> {
        while self.rest.starts_with([' ', '\t', '\r', '\n']) {
            self.take();
        }
        self.rest.chars().next()
    }

    /// Takes `c` if it comes next.
    fn taken(&mut self, c: char) -> bool {
        let found = self.peek() == Some(c);
        if found {
            self.take();
        }
        found
    }

    fn value(&mut self, depth: usize) -> Result<Node> {
        let next = self.peek();
        let position = Some((self.line, self.column));
        let content = match next {
            Some('{' | '[') if depth == MAX_DEPTH => {
                return Err(self.error(format!("nested deeper than {MAX_DEPTH} levels")));
            }
            Some('{') => Content::Map(self.object(depth + 1)?),
            Some('[') => Content::List(self.list(depth + 1)?),
            Some('"' | '\'') => Content::String(self.string()?),
            Some('-' | '0'..='9') => self.number()?,
            _ => self.word()?,
        };
        Ok(Node { position, content })
    }

    fn object(&mut self, depth: usize) -> Result<Vec<Entry>> {
        self.take();
        let mut entries = Vec::new();
        while !self.taken('}') {
            if !entries.is_empty() && !self.taken(',') {
                return Err(self.unexpected("',' or '}'"));
            }
            if !entries.is_empty() && self.taken('}') {
                break;
            }
            let next = self.peek();
            let position = Some((self.line, self.column));
            let key = if matches!(next, Some('"' | '\'')) { self.string()? } else { self.bare_key()? };
            if !self.taken(':') {
                return Err(self.unexpected("':'"));
            }
            entries.push(Entry { position, key, value: self.value(depth)? });
        }
        Ok(entries)
    }

    fn list(&mut self, depth: usize) -> Result<Vec<Node>> {
        self.take();
        let mut items = Vec::new();
        while !self.taken(']') {
            if !items.is_empty() && !self.taken(',') {
                return Err(self.unexpected("',' or ']'"));
            }
            if !items.is_empty() && self.taken(']') {
                break;
            }
            items.push(self.value(depth)?);
        }
        Ok(items)
    }

    fn take_while(&mut self, wanted: impl Fn(char) -> bool) -> &'a str {
        let text = self.rest;
        while self.rest.starts_with(&wanted) {
            self.take();
        }
        &text[..text.len() - self.rest.len()]
    }

    fn word(&mut self) -> Result<Content> {
        let words = [("true", Content::Bool(true)), ("false", Content::Bool(false)), ("null", Content::Null)];
        match words.into_iter().find(|(word, _)| self.rest.starts_with(word)) {
            Some((word, content)) => {
                for _ in word.chars() {
                    self.take();
                }
                Ok(content)
            }
            None => Err(self.unexpected("a value")),
        }
    }

    fn bare_key(&mut self) -> Result<String> {
        let before = self.unexpected("a key");
        let key = self.take_while(|c| c == '_' || c.is_ascii_alphanumeric());
        let reserved = matches!(key, "" | "true" | "false" | "null") || key.starts_with(|c: char| c.is_ascii_digit());
        if reserved { Err(before) } else { Ok(key.to_owned()) }
    }

    fn number(&mut self) -> Result<Content> {
        let before = self.unexpected("a number");
        let text = self.take_while(|c| matches!(c, '0'..='9' | '-' | '+' | '.' | 'e' | 'E'));
        // serde_json knows JSON's notation: no leading zeros, digits on both sides of the point, no infinity.
        serde_json::from_str(text).map(Content::Number).map_err(|_| before)
    }

    fn string(&mut self) -> Result<String> {
        let start = self.error("not valid JSON: the string has no end");
        let quote = self.take();
        let mut text = String::new();
        loop {
            let Some(c) = self.take() else { return Err(start) };
            match c {
                c if Some(c) == quote => return Ok(text),
                '\\' => text.push(self.escape()?),
                c => text.push(c),
            }
        }
    }

    fn escape(&mut self) -> Result<char> {
        let bad = self.error("not valid JSON: there is no such escape in a string");
        Ok(match self.take() {
            Some(c @ ('"' | '\\' | '/' | '\'')) => c,
            Some('b') => '\u{8}',
            Some('f') => '\u{c}',
            Some('n') => '\n',
            Some('r') => '\r',
            Some('t') => '\t',
            Some('u' | 'U') => {
                let first = self.hex4().ok_or_else(|| bad.clone())?;
                let code = match first {
                    0xd800..=0xdbff => {
                        let low =
                            if self.rest.starts_with("\\u") { (self.take(), self.take(), self.hex4()).2 } else { None };
                        let low = low.filter(|low| (0xdc00..=0xdfff).contains(low)).ok_or_else(|| bad.clone())?;
                        0x10000 + ((first & 0x3ff) << 10) + (low & 0x3ff)
                    }
                    code => code,
                };
                char::from_u32(code).ok_or(bad)?
            }
            _ => return Err(bad),
        })
    }

    fn hex4(&mut self) -> Option<u32> {
        let mut code = 0;
        for _ in 0..4 {
            code = code * 16 + self.take()?.to_digit(16)?;
        }
        Some(code)
    }
}

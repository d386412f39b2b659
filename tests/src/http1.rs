//! A small HTTP/1.1 codec for the lab's own programs, independent of the proxy's: the tests must not share its mistakes.

use std::io::{BufRead, Read, Write};

use anyhow::{Context, Result, bail, ensure};

/// The longest line accepted, in bytes.
const LINE_MAX: u64 = 64 * 1024;

/// Header fields in the order of the wire, names as sent.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Headers(pub Vec<(String, String)>);

/// A request.
#[derive(Debug, Clone)]
pub struct Request {
    /// The method.
    pub method: String,
    /// The request target as sent.
    pub target: String,
    /// The header fields.
    pub headers: Headers,
    /// The whole body.
    pub body: Vec<u8>,
}

/// A response.
#[derive(Debug, Clone)]
pub struct Response {
    /// The status code.
    pub status: u16,
    /// The reason phrase.
    pub reason: String,
    /// The header fields.
    pub headers: Headers,
    /// The whole body.
    pub body: Vec<u8>,
}

impl Headers {
    /// The first value of `name`, compared without case.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    /// Appends a field.
    pub fn push(&mut self, name: &str, value: &str) {
        self.0.push((name.to_owned(), value.to_owned()));
    }

    fn wants_close(&self) -> bool {
        self.get("connection").is_some_and(|value| value.eq_ignore_ascii_case("close"))
    }
}

impl Request {
    /// A GET without headers; the caller adds `host`.
    pub fn get(target: &str) -> Self {
        Self { method: "GET".to_owned(), target: target.to_owned(), headers: Headers::default(), body: Vec::new() }
    }

    /// Adds a header.
    #[must_use]
    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push(name, value);
        self
    }

    /// Whether the client closes after the response.
    pub fn wants_close(&self) -> bool {
        self.headers.wants_close()
    }

    /// Reads the next request; none if the client has closed between requests.
    pub fn read(from: &mut impl BufRead) -> Result<Option<Self>> {
        let Some(line) = read_line(from)? else { return Ok(None) };
        let mut words = line.split(' ');
        let (Some(method), Some(target), Some("HTTP/1.1" | "HTTP/1.0")) = (words.next(), words.next(), words.next())
        else {
            bail!("not a request line: `{line}`");
        };
        let headers = read_headers(from)?;
        let body = read_body(from, &headers, false)?;
        Ok(Some(Self { method: method.to_owned(), target: target.to_owned(), headers, body }))
    }

    /// Writes the request, with a content-length if it has a body.
    pub fn write(&self, to: &mut impl Write) -> Result<()> {
        let mut bytes = format!("{} {} HTTP/1.1\r\n", self.method, self.target).into_bytes();
        write_fields(&mut bytes, &self.headers, &self.body, !self.body.is_empty());
        to.write_all(&bytes).context("sending the request")
    }
}

impl Response {
    /// A response with a body.
    pub fn new(status: u16, content_type: &str, body: Vec<u8>) -> Self {
        let headers = Headers(vec![("content-type".to_owned(), content_type.to_owned())]);
        Self { status, reason: reason(status).to_owned(), headers, body }
    }

    /// Whether the server closes after it.
    pub fn wants_close(&self) -> bool {
        self.headers.wants_close()
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// Reads the response to a request with the given method. Fails with an [`UnexpectedEof`](std::io::ErrorKind) in its
    /// chain if the server closes before it is whole.
    pub fn read(from: &mut impl BufRead, method: &str) -> Result<Self> {
        loop {
            let line = read_line(from)?
                .ok_or_else(|| std::io::Error::new(std::io::ErrorKind::UnexpectedEof, "closed before the response"))?;
            let mut words = line.splitn(3, ' ');
            let (Some("HTTP/1.1" | "HTTP/1.0"), Some(status), reason) = (words.next(), words.next(), words.next())
            else {
                bail!("not a status line: `{line}`");
            };
            let status: u16 = status.parse().with_context(|| format!("not a status line: `{line}`"))?;
            let reason = reason.unwrap_or_default().to_owned();
            let headers = read_headers(from)?;
            if (100..200).contains(&status) {
                continue;
            }
            let has_body = method != "HEAD" && status != 204 && status != 304;
            let body = if has_body { read_body(from, &headers, true)? } else { Vec::new() };
            return Ok(Self { status, reason, headers, body });
        }
    }

    /// Writes the response with a content-length; `head_only` leaves out the body.
    pub fn write(&self, to: &mut impl Write, head_only: bool) -> Result<()> {
        let mut bytes = format!("HTTP/1.1 {} {}\r\n", self.status, self.reason).into_bytes();
        let body: &[u8] = if head_only { &[] } else { &self.body };
        write_fields(&mut bytes, &self.headers, body, self.status != 204 && self.status != 304);
        to.write_all(&bytes).context("sending the response")
    }
}

fn write_fields(to: &mut Vec<u8>, headers: &Headers, body: &[u8], with_length: bool) {
    for (name, value) in &headers.0 {
        to.extend_from_slice(format!("{name}: {value}\r\n").as_bytes());
    }
    if with_length && headers.get("content-length").is_none() {
        to.extend_from_slice(format!("content-length: {}\r\n", body.len()).as_bytes());
    }
    to.extend_from_slice(b"\r\n");
    to.extend_from_slice(body);
}

/// A line without its CRLF; none at the end of the stream.
fn read_line(from: &mut impl BufRead) -> Result<Option<String>> {
    let mut line = String::new();
    if from.by_ref().take(LINE_MAX).read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let Some(line) = line.strip_suffix("\r\n") else {
        return Err(
            std::io::Error::new(std::io::ErrorKind::UnexpectedEof, format!("an unfinished line: `{line}`")).into()
        );
    };
    Ok(Some(line.to_owned()))
}

fn read_headers(from: &mut impl BufRead) -> Result<Headers> {
    let mut headers = Headers::default();
    loop {
        let line = read_line(from)?.context("closed within the headers")?;
        if line.is_empty() {
            return Ok(headers);
        }
        let (name, value) = line.split_once(':').with_context(|| format!("not a header: `{line}`"))?;
        headers.push(name, value.trim());
    }
}

fn read_body(from: &mut impl BufRead, headers: &Headers, until_close: bool) -> Result<Vec<u8>> {
    let mut body = Vec::new();
    if headers.get("transfer-encoding").is_some_and(|value| value.eq_ignore_ascii_case("chunked")) {
        loop {
            let size = read_line(from)?.context("closed within a chunked body")?;
            let size = usize::from_str_radix(size.split(';').next().unwrap_or_default().trim(), 16)
                .with_context(|| format!("not a chunk size: `{size}`"))?;
            if size == 0 {
                // Trailers are read and dropped.
                read_headers(from)?;
                return Ok(body);
            }
            let start = body.len();
            body.resize(start + size, 0);
            from.read_exact(&mut body[start..])?;
            ensure!(read_line(from)?.as_deref() == Some(""), "a chunk is longer than its size says");
        }
    } else if let Some(length) = headers.get("content-length") {
        body.resize(length.parse().with_context(|| format!("not a content-length: `{length}`"))?, 0);
        from.read_exact(&mut body)?;
    } else if until_close {
        from.read_to_end(&mut body)?;
    }
    Ok(body)
}

fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        201 => "Created",
        204 => "No Content",
        404 => "Not Found",
        500 => "Internal Server Error",
        502 => "Bad Gateway",
        503 => "Service Unavailable",
        504 => "Gateway Timeout",
        _ => "Unknown",
    }
}

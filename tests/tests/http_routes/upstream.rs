//! The services behind a proxy: they note what they see, and answer as the request tells them to.

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::TcpStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::Result;
use culvert_tests::http1::{Request, Response};
use culvert_tests::server;

/// What the services of one proxy have seen, by the request's `x-id`.
#[derive(Debug, Default)]
pub struct Seen(Mutex<HashMap<String, Vec<String>>>);

impl Seen {
    /// What belongs to this `x-id`, one text a request, in their order.
    pub fn of(&self, id: &str) -> Vec<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(id).cloned().unwrap_or_default()
    }

    /// Notes a request; returns how many of this `x-id` came before it at this service.
    pub fn note(&self, service: &str, request: &Request) -> usize {
        let id = request.headers.get("x-id").unwrap_or_default().to_owned();
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let seen = all.entry(id).or_default();
        let before = seen.iter().filter(|text| text.starts_with(&format!("{service}: "))).count();
        seen.push(describe(service, request));
        before
    }
}

fn describe(service: &str, request: &Request) -> String {
    let mut text = format!("{service}: {} {}", request.method, request.target);
    let mut headers: Vec<_> =
        request.headers.0.iter().map(|(name, value)| super::harness::shown(name, value)).collect();
    // A value's place among others of its name is kept, the order of names is not.
    headers.sort_by(|a, b| a.split(':').next().cmp(&b.split(':').next()));
    for header in headers {
        text.push_str(&format!("\n    {header}"));
    }
    if !request.body.is_empty() {
        text.push_str(&format!("\n    body of {} bytes", request.body.len()));
    }
    text
}

/// Starts a service; returns its port.
///
/// The request's header `x-do` says what it does: a step for each request of the same `x-id`, `,` between them, the last for all
/// further ones. A step is a status (after 101, which takes no word but `delay`, whatever comes is sent back in capitals, up to `bye`), `reset` (closes without an answer) or `hang` (answers after five seconds), and may be
/// followed by `+name=value` for response headers, of which `interim` (a response with that status, before the response), `delay` (milliseconds), `bytes` (a body of so many), `frames` (of gRPC, so many), and
/// `gzip`, `br` and `zstd` (a body that is compressed, of so many), and `cut` (closes in the middle of a body: `length` or `chunk`) are told to the service. `x-do-a` is for the service `a` alone.
pub fn start(name: &'static str, seen: Arc<Seen>) -> Result<u16> {
    server::start(move |stream| serve(name, stream, &seen))
}

fn serve(name: &str, mut stream: TcpStream, seen: &Seen) -> Result<()> {
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream.try_clone()?);
    while let Some(request) = Request::read(&mut reader)? {
        let before = seen.note(name, &request);
        let wanted = request.headers.get(&format!("x-do-{name}")).or_else(|| request.headers.get("x-do"));
        let steps: Vec<&str> = wanted.unwrap_or("200").split(',').map(str::trim).collect();
        let mut words = steps[before.min(steps.len() - 1)].split('+');
        let what = words.next().unwrap_or_default();
        if what == "101" {
            let delay = words.find_map(|word| word.strip_prefix("delay=")?.parse().ok());
            thread::sleep(Duration::from_millis(delay.unwrap_or_default()));
            return echo(&mut reader, stream);
        }
        if what == "reset" {
            return Ok(());
        }
        let mut response =
            Response::new(what.parse().unwrap_or(200), "text/plain", format!("from {name}\n").into_bytes());
        let mut cut = None;
        if what == "hang" {
            thread::sleep(Duration::from_secs(5));
        }
        for (name, value) in words.filter_map(|word| word.split_once('=')) {
            match (name, value.parse()) {
                ("interim", Ok(status)) => {
                    write!(stream, "HTTP/1.1 {status} Continue\r\nx-early: 1\r\n\r\n")?;
                }
                ("delay", Ok(milliseconds)) => thread::sleep(Duration::from_millis(milliseconds)),
                ("bytes", Ok(bytes)) => response.body = vec![b'x'; usize::try_from(bytes)?],
                ("content-type", _) => {
                    response.headers.0.retain(|(name, _)| !name.eq_ignore_ascii_case("content-type"));
                    response.headers.push(name, value);
                }
                ("cut", _) => cut = Some(value),
                ("frames", Ok(frames)) => response.body = b"\0\0\0\0\x03abc".repeat(usize::try_from(frames)?),
                // Text that becomes a good deal shorter.
                ("gzip" | "br" | "zstd", Ok(bytes)) => {
                    response.body = compressed(name, usize::try_from(bytes)?)?;
                    response.headers.push("content-encoding", name);
                }
                _ => response.headers.push(name, value),
            }
        }
        if let Some(cut) = cut {
            let text = response.text();
            let (framing, body) = match cut {
                "chunk" => ("transfer-encoding: chunked", format!("64\r\n{text}")),
                _ => ("content-length: 100", text),
            };
            return Ok(write!(stream, "HTTP/1.1 {} OK\r\n{framing}\r\n\r\n{body}", response.status)?);
        }
        response.write(&mut stream, request.method == "HEAD")?;
        stream.flush()?;
    }
    Ok(())
}

/// So many letters, compressed.
fn compressed(coding: &str, letters: usize) -> Result<Vec<u8>> {
    let text: Vec<u8> = (b'a'..=b'z').cycle().take(letters).collect();
    Ok(match coding {
        "gzip" => {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
            encoder.write_all(&text)?;
            encoder.finish()?
        }
        "br" => {
            let mut encoder = brotli::CompressorWriter::new(Vec::new(), 4096, 5, 22);
            encoder.write_all(&text)?;
            encoder.into_inner()
        }
        _ => zstd::encode_all(&text[..], 3)?,
    })
}

/// Has another protocol from here on.
fn echo(reader: &mut BufReader<TcpStream>, mut stream: TcpStream) -> Result<()> {
    stream.write_all(
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nx-agreed: 1\r\n\r\n",
    )?;
    loop {
        let piece = reader.fill_buf()?.to_vec();
        if piece.is_empty() {
            return Ok(());
        }
        reader.consume(piece.len());
        stream.write_all(&piece.to_ascii_uppercase())?;
        if piece.ends_with(b"bye") {
            return Ok(());
        }
    }
}

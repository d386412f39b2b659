//! Hosts: bytes that come back, by themselves, by HTTP/1.1 and by HTTP/2.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};
use bytes::Bytes;
use culvert_tests::server;

use super::shown;

/// How long a host takes that is asked to be `late`.
const LATE: Duration = Duration::from_millis(1200);

/// The requests that hosts have seen.
#[derive(Default)]
pub struct Seen(Mutex<Vec<String>>);

impl Seen {
    fn add(&self, text: String) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(text);
    }

    pub fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

fn echo(mut from: impl std::io::Read, mut to: TcpStream) -> Result<()> {
    std::io::copy(&mut from, &mut to)?;
    // What was said has been said again.
    to.write_all(b"bye")?;
    to.shutdown(std::net::Shutdown::Write)?;
    Ok(())
}

/// Says everything again, and `bye` at its end.
pub fn tcp() -> Result<u16> {
    server::start(|stream| echo(stream.try_clone()?, stream))
}

/// Agrees to tunnels and upgrades, unless `x-do` says otherwise (a status, or `late`), and says everything again.
pub fn http1(seen: &Arc<Seen>) -> Result<u16> {
    let seen = Arc::clone(seen);
    server::start(move |stream| {
        let mut reader = BufReader::new(stream.try_clone()?);
        let mut lines = Vec::new();
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line)? == 0 {
                return Ok(());
            }
            match line.trim_end() {
                "" => break,
                line => lines.push(line.to_owned()),
            }
        }
        let request = lines.remove(0);
        let chunked = lines.iter().any(|line| line == "transfer-encoding: chunked");
        let wanted = lines.iter().find_map(|line| line.strip_prefix("x-do: ")).map(str::to_owned);
        let upgrade = lines.iter().any(|line| line.starts_with("upgrade:"));
        let mut fields: Vec<_> =
            lines.iter().filter_map(|line| line.split_once(": ")).map(|(name, value)| shown(name, value)).collect();
        fields.sort();
        seen.add(format!("{request}\n    {}", fields.join("\n    ")));
        let refused = request.contains("refused") || lines.iter().any(|line| line.contains("refused"));
        if wanted.as_deref() == Some("late") {
            thread::sleep(LATE);
        }
        let status = wanted.filter(|wanted| wanted != "late").unwrap_or(
            if refused {
                "403"
            } else if upgrade {
                "101"
            } else {
                "200"
            }
            .to_owned(),
        );
        let mut stream = stream;
        let connect = request.starts_with("CONNECT");
        match status.as_str() {
            "101" => {
                stream.write_all(
                    b"HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\nupgrade: websocket\r\nx-up: 1\r\n\r\n",
                )?;
                echo(reader, stream)
            }
            "200" | "201" if connect => {
                stream.write_all(format!("HTTP/1.1 {status} OK\r\nx-up: 1\r\n\r\n").as_bytes())?;
                echo(reader, stream)
            }
            "200" if chunked => {
                stream.write_all(b"HTTP/1.1 200 OK\r\nx-up: 1\r\ntransfer-encoding: chunked\r\n\r\n")?;
                loop {
                    let mut line = String::new();
                    reader.read_line(&mut line)?;
                    let size = usize::from_str_radix(line.trim(), 16).context("a chunk")?;
                    let mut data = vec![0; size + 2];
                    reader.read_exact(&mut data)?;
                    if size == 0 {
                        stream.write_all(b"3\r\nbye\r\n0\r\n\r\n")?;
                        return Ok(());
                    }
                    stream.write_all(&[line.as_bytes(), &data].concat())?;
                }
            }
            status => {
                let answer = format!("HTTP/1.1 {status} Some\r\ncontent-length: 2\r\nx-up: 1\r\n\r\nno");
                stream.write_all(answer.as_bytes())?;
                Ok(())
            }
        }
    })
}

/// The same by HTTP/2.
pub fn http2(seen: &Arc<Seen>) -> Result<u16> {
    let seen = Arc::clone(seen);
    server::start_async(move |stream| serve(stream, Arc::clone(&seen)))
}

async fn serve(stream: tokio::net::TcpStream, seen: Arc<Seen>) -> Result<()> {
    let mut connection = h2::server::Builder::new().enable_connect_protocol().handshake::<_, Bytes>(stream).await?;
    while let Some(request) = connection.accept().await {
        let (request, mut respond) = request?;
        let (parts, mut body) = request.into_parts();
        let header = |name: &str| parts.headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
        let mut fields: Vec<_> = parts
            .headers
            .iter()
            .map(|(name, value)| shown(name.as_str(), value.to_str().unwrap_or_default()))
            .collect();
        fields.sort();
        let protocol = parts.extensions.get::<h2::ext::Protocol>().map(|protocol| protocol.as_str().to_owned());
        seen.add(format!("{} {} {protocol:?}\n    {}", parts.method, parts.uri, fields.join("\n    ")));
        let refused = parts.uri.to_string().contains("refused");
        let wanted = header("x-do");
        let late = wanted.as_deref() == Some("late");
        let wanted = wanted.filter(|_| !late);
        let status = wanted.unwrap_or(if refused { "403" } else { "200" }.to_owned());
        let tunnel = status.starts_with('2') && (parts.method != http::Method::GET);
        tokio::spawn(async move {
            if late {
                tokio::time::sleep(LATE).await;
            }
            let response = http::Response::builder().status(status.as_str()).header("x-up", "1").body(())?;
            let mut stream = respond.send_response(response, false)?;
            if !tunnel {
                stream.send_data(Bytes::from_static(b"no"), true)?;
                return Ok(());
            }
            while let Some(data) = body.data().await {
                let data = data?;
                body.flow_control().release_capacity(data.len())?;
                stream.send_data(data, false)?;
            }
            stream.send_data(Bytes::from_static(b"bye"), true)?;
            anyhow::Ok(())
        });
    }
    Ok(())
}

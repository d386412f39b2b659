//! Clients: what they say, and what comes back.

use std::io::{BufRead as _, BufReader, ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;

use super::shown;

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// What a client asks for, and what it says then.
#[derive(Debug, Clone)]
pub struct Ask {
    by: By,
    /// CONNECT, another method, or a protocol in lower case.
    what: &'static str,
    authority: &'static str,
    path: &'static str,
    headers: Vec<(&'static str, &'static str)>,
    /// Each is said when the one before it has come back.
    says: Vec<&'static str>,
    /// Envoy breaks the tunnel off when the client has said all, and what the host says last is lost.
    pub broken_off: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum By {
    Http1,
    Http2,
    Tcp,
}

impl Ask {
    pub fn http1(
        what: &'static str,
        authority: &'static str,
        headers: &[(&'static str, &'static str)],
        says: &[&'static str],
    ) -> Ask {
        Ask {
            by: By::Http1,
            what,
            authority,
            path: "/",
            headers: headers.to_vec(),
            says: says.to_vec(),
            broken_off: false,
        }
    }

    pub fn http2(
        what: &'static str,
        authority: &'static str,
        path: &'static str,
        headers: &[(&'static str, &'static str)],
        says: &[&'static str],
    ) -> Ask {
        Ask { by: By::Http2, what, authority, path, headers: headers.to_vec(), says: says.to_vec(), broken_off: false }
    }

    pub fn tcp(says: &[&'static str]) -> Ask {
        Ask {
            by: By::Tcp,
            what: "",
            authority: "",
            path: "",
            headers: Vec::new(),
            says: says.to_vec(),
            broken_off: false,
        }
    }

    pub fn broken_off(mut self) -> Ask {
        self.broken_off = true;
        self
    }

    pub fn at(mut self, path: &'static str) -> Ask {
        self.path = path;
        self
    }
}

/// What the client sees.
pub fn run(port: u16, ask: &Ask) -> Result<String> {
    match ask.by {
        By::Http1 | By::Tcp => in_order(port, ask),
        By::Http2 => tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
            tokio::time::timeout(PATIENCE, by_http2(port, ask))
                .await
                .unwrap_or_else(|_| Ok("it takes too long".to_owned()))
        }),
    }
}

fn in_order(port: u16, ask: &Ask) -> Result<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut text = String::new();
    let mut tunnel = true;
    if ask.by == By::Http1 {
        let mut head = match ask.what {
            "CONNECT" => format!("CONNECT {} HTTP/1.1\r\n", ask.authority),
            _ => format!(
                "GET {} HTTP/1.1\r\nhost: {}\r\nconnection: Upgrade\r\nupgrade: {}\r\n",
                ask.path, ask.authority, ask.what
            ),
        };
        for (name, value) in &ask.headers {
            head += &format!("{name}: {value}\r\n");
        }
        stream.write_all(format!("{head}\r\n").as_bytes())?;
        let mut lines = Vec::new();
        loop {
            let mut line = String::new();
            ensure!(reader.read_line(&mut line)? > 0, "closed before the response");
            match line.trim_end() {
                "" => break,
                line => lines.push(line.split_once(": ").map_or(line.to_owned(), |(name, value)| shown(name, value))),
            }
        }
        text = lines.remove(0);
        lines.sort();
        text += &format!("\n{}\n", lines.join("\n"));
        tunnel = [" 101 ", " 200 ", " 201 "].iter().any(|status| text.contains(status));
    }
    for piece in ask.says.iter().filter(|_| tunnel) {
        stream.write_all(piece.as_bytes())?;
        let mut answer = Vec::new();
        // What a host is told first comes back too.
        while !String::from_utf8_lossy(&answer).ends_with(piece) {
            let mut piece = [0; 256];
            match reader.read(&mut piece) {
                Ok(length) if length > 0 => answer.extend_from_slice(&piece[..length]),
                _ => return Ok(format!("{text}{} and no more\n", printed(&answer))),
            }
        }
        text += &format!("{}\n", printed(&answer));
    }
    if tunnel {
        stream.shutdown(Shutdown::Write)?;
    }
    let mut rest = Vec::new();
    let ended = match reader.read_to_end(&mut rest) {
        Err(error) if error.kind() == ErrorKind::WouldBlock => "open",
        _ => "closed",
    };
    Ok(format!("{text}{} {ended}\n", printed(&rest)))
}

/// Ports that nobody chose are not shown.
fn printed(bytes: &[u8]) -> String {
    if let Some(rest) = bytes.strip_prefix(b"PROXY ") {
        let text = String::from_utf8_lossy(rest).into_owned();
        let words: Vec<_> =
            text.split(' ').enumerate().map(|(at, word)| if at == 3 { "SOURCE" } else { word }).collect();
        return format!("PROXY {}", words.join(" "));
    }
    if bytes.starts_with(b"\r\n\r\n\0\r\nQUIT\n") && bytes.len() >= 28 {
        return format!("{:?} {}", &bytes[..24], String::from_utf8_lossy(&bytes[28..]));
    }
    String::from_utf8_lossy(bytes).into_owned()
}

async fn by_http2(port: u16, ask: &Ask) -> Result<String> {
    let stream = tokio::net::TcpStream::connect(("127.0.0.1", port)).await?;
    let (sender, connection) = h2::client::handshake(stream).await?;
    let driver = tokio::spawn(connection);
    let mut sender = sender.ready().await?;
    let is_method = ask.what.starts_with(|first: char| first.is_ascii_uppercase());
    let mut request = http::Request::builder().version(http::Version::HTTP_2);
    request = match ask.what {
        "CONNECT" => request.method("CONNECT").uri(ask.authority),
        what if is_method => request.method(what).uri(format!("http://{}{}", ask.authority, ask.path)),
        _ => request.method("CONNECT").uri(format!("http://{}{}", ask.authority, ask.path)),
    };
    if !is_method {
        request = request.extension(h2::ext::Protocol::from(ask.what));
        // The server says first that it knows such requests.
        while !sender.is_extended_connect_protocol_enabled() {
            tokio::task::yield_now().await;
        }
    }
    for (name, value) in &ask.headers {
        request = request.header(*name, *value);
    }
    let end = ask.what == "GET";
    let (response, mut send) = sender.send_request(request.body(())?, end)?;
    // A body that is a tunnel may have to be begun before there is an answer.
    let (parts, mut body) = match response.await {
        Ok(response) => response.into_parts(),
        Err(error) => return Ok(format!("reset: {:?}", error.reason())),
    };
    let mut fields: Vec<_> =
        parts.headers.iter().map(|(name, value)| shown(name.as_str(), value.to_str().unwrap_or_default())).collect();
    fields.sort();
    let mut text = format!("{}\n{}\n", parts.status.as_u16(), fields.join("\n"));
    for piece in ask.says.iter().filter(|_| parts.status.is_success()) {
        send.send_data(Bytes::from_static(piece.as_bytes()), false)?;
        let mut answer = Vec::new();
        while !String::from_utf8_lossy(&answer).ends_with(piece) {
            let Some(data) = body.data().await else { return Ok(format!("{text}{} and no more\n", printed(&answer))) };
            let data = data.context("a piece")?;
            body.flow_control().release_capacity(data.len())?;
            answer.extend_from_slice(&data);
        }
        text += &format!("{}\n", printed(&answer));
    }
    if !is_method {
        // Nobody says in HTTP that it has nothing more to say.
        return Ok(text);
    }
    if parts.status.is_success() && !end {
        let _ = send.send_data(Bytes::new(), true);
    }
    let mut rest = Vec::new();
    let ended = loop {
        match body.data().await {
            Some(Ok(data)) => rest.extend_from_slice(&data),
            Some(Err(error)) => break format!("reset: {:?}", error.reason()),
            None => break "end".to_owned(),
        }
    };
    driver.abort();
    Ok(format!("{text}{} {ended}\n", printed(&rest)))
}

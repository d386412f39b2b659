//! Requests over plain HTTP: all that the status pages, discovery's own API and the admin interface need.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs as _};
use std::time::Duration;

use anyhow::{Context, bail, ensure};

/// How long connecting, and any one read or write, may take.
const TIMEOUT: Duration = Duration::from_secs(5);
/// The largest response that is read, in bytes.
const MAX_RESPONSE: u64 = 256 * 1024 * 1024;

/// Fetches `path` from the server at `base`, for example `http://127.0.0.1:18001`.
///
/// # Errors
/// When the server cannot be reached or does not answer with 200.
pub fn get(base: &str, path: &str) -> anyhow::Result<Vec<u8>> {
    request(base, "GET", path)
}

/// Fetches `path` from each address of the name in `base`: from all replicas, where it is that of a headless Service.
///
/// # Errors
/// When the name has no address. What is said by whom is in the list.
pub fn get_all(base: &str, path: &str) -> anyhow::Result<Vec<(SocketAddr, anyhow::Result<Vec<u8>>)>> {
    let mut addresses: Vec<_> = resolve(base)?.1.collect();
    addresses.sort_unstable();
    addresses.dedup();
    let ask = |address: SocketAddr| (address, get(&address.to_string(), path));
    let mut said: Vec<_> = addresses.into_iter().map(ask).collect();
    let some = said.iter().any(|(_, answer)| answer.is_ok());
    // `localhost` has an address in each family, of which discovery may have one.
    said.retain(|(address, answer)| answer.is_ok() || !some || !address.ip().is_loopback());
    Ok(said)
}

/// The authority of a URL, and its addresses.
fn resolve(base: &str) -> anyhow::Result<(&str, impl Iterator<Item = SocketAddr>)> {
    let authority = match base.split_once("://") {
        Some(("http", rest)) => rest,
        Some((scheme, _)) => bail!("`{scheme}` URLs are not supported, only http"),
        None => base,
    };
    let authority = authority.trim_end_matches('/');
    ensure!(!authority.is_empty() && !authority.contains('/'), "`{base}` is not of the form http://HOST:PORT");
    let port = if has_port(authority) { "" } else { ":80" };
    let addresses = format!("{authority}{port}").to_socket_addrs();
    Ok((authority, addresses.with_context(|| format!("cannot resolve {authority}"))?))
}

/// Posts nothing to `path` of the server at `base`, which has it do something.
///
/// # Errors
/// When the server cannot be reached or does not answer with 200.
pub fn post(base: &str, path: &str) -> anyhow::Result<Vec<u8>> {
    request(base, "POST", path)
}

/// Sends a request with further header lines, each with its line end, and a body. Gives status and body of the answer.
///
/// # Errors
/// When the server cannot be reached or does not answer in HTTP.
pub fn send(base: &str, method: &str, path: &str, headers: &str, body: &str) -> anyhow::Result<(u16, Vec<u8>)> {
    let (authority, addresses) = resolve(base)?;
    let mut last = None;
    for address in addresses {
        match TcpStream::connect_timeout(&address, TIMEOUT) {
            Ok(connection) => return exchange(connection, authority, (method, path), headers, body),
            Err(error) => last = Some(error),
        }
    }
    match last {
        Some(error) => Err(error).with_context(|| format!("cannot connect to {authority}")),
        None => bail!("{authority} has no address"),
    }
}

fn request(base: &str, method: &str, path: &str) -> anyhow::Result<Vec<u8>> {
    let (status, body) = send(base, method, path, "", "")?;
    let text = String::from_utf8_lossy(&body[..body.len().min(200)]).trim().to_owned();
    ensure!(status == 200, "{base} answered {path} with {status}: {text}");
    Ok(body)
}

/// An answer that has to be JSON.
///
/// # Errors
/// What it is in its place, for people.
pub fn json(body: &[u8]) -> Result<serde_json::Value, String> {
    if body.trim_ascii().is_empty() {
        return Err("nothing".to_owned());
    }
    serde_json::from_slice(body).map_err(|error| format!("what is no JSON ({error})"))
}

fn has_port(authority: &str) -> bool {
    // In an IPv6 address without a port, the last colon is inside of the brackets.
    authority.rsplit_once(':').is_some_and(|(_, port)| !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()))
}

fn exchange(
    mut connection: TcpStream,
    authority: &str,
    (method, path): (&str, &str),
    headers: &str,
    body: &str,
) -> anyhow::Result<(u16, Vec<u8>)> {
    connection.set_read_timeout(Some(TIMEOUT))?;
    connection.set_write_timeout(Some(TIMEOUT))?;
    // HTTP/1.0: the body ends with the connection, without chunks.
    let length = body.len();
    let request = format!(
        "{method} {path} HTTP/1.0\r\nHost: {authority}\r\nAccept: */*\r\nContent-Length: {length}\r\n{headers}\r\n{body}"
    );
    connection.write_all(request.as_bytes()).with_context(|| format!("writing to {authority}"))?;
    let mut response = Vec::new();
    connection.take(MAX_RESPONSE).read_to_end(&mut response).with_context(|| format!("reading from {authority}"))?;
    let end = response.windows(4).position(|window| window == b"\r\n\r\n");
    let end = end.with_context(|| format!("{authority} does not speak HTTP"))?;
    let head = String::from_utf8_lossy(&response[..end]).into_owned();
    let body = response.split_off(end + 4);
    let status = head.split_whitespace().nth(1).unwrap_or_default();
    let status = status.parse().with_context(|| format!("{authority} does not speak HTTP"))?;
    let length = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().ok())?
    });
    ensure!(length.is_none_or(|length| length == body.len()), "{authority} ended its answer to {path} too early");
    Ok((status, body))
}

//! `culvert cluster`: the clusters, and taking one out or back in.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs as _};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use clap::{Args, Subcommand};

use crate::Outcome;

/// How long connecting, and any one read or write, may take. Discovery waits until the mesh knows.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Shown after the help.
pub const HELP: &str = "\
Examples:
  culvert cluster drain west        its endpoints drain wherever other clusters can take over
  culvert cluster undrain west

If the name in --discovery has several addresses, as that of a headless Service has, all replicas are told.";

/// What is done to a cluster.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Take a cluster out: no new requests for its endpoints, where others have the service
    Drain(Flags),
    /// Take a drained cluster back in
    Undrain(Flags),
}

/// Which cluster, and whom to tell.
#[derive(Debug, Args)]
pub struct Flags {
    /// The cluster, as culvert-discovery calls it
    #[arg(value_name = "NAME")]
    name: String,

    /// The status address of culvert-discovery (its --http)
    #[arg(long, value_name = "URL", env = "CULVERT_DISCOVERY", default_value = "http://127.0.0.1:18001")]
    discovery: String,

    /// A file with the operators' token, if discovery has one (its operator_token_file)
    #[arg(long, value_name = "FILE", env = "CULVERT_OPERATOR_TOKEN_FILE")]
    token_file: Option<PathBuf>,
}

/// Runs `culvert cluster`.
///
/// # Errors
/// When a name or a token is no such thing, or nobody is found at the address.
pub fn run(command: &Command) -> anyhow::Result<Outcome> {
    let (flags, verb) = match command {
        Command::Drain(flags) => (flags, "drain"),
        Command::Undrain(flags) => (flags, "undrain"),
    };
    let name = |byte: u8| byte.is_ascii_graphic() && !matches!(byte, b'/' | b'?' | b'#' | b'%');
    ensure!(!flags.name.is_empty() && flags.name.bytes().all(name), "`{}` is not the name of a cluster", flags.name);
    let mut headers = "X-Culvert-Operator: cli\r\n".to_owned();
    if let Some(path) = &flags.token_file {
        let token = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let token = token.trim();
        ensure!(!token.is_empty() && token.bytes().all(|b| b.is_ascii_graphic()), "{} has no token", path.display());
        headers.push_str(&format!("Authorization: Bearer {token}\r\n"));
    }
    let authority = flags.discovery.strip_prefix("http://").unwrap_or(&flags.discovery).trim_end_matches('/');
    ensure!(!authority.contains('/'), "`{}` is not of the form http://HOST:PORT", flags.discovery);
    let addresses = authority.to_socket_addrs().with_context(|| format!("cannot resolve {authority}"))?;
    let mut addresses: Vec<SocketAddr> = addresses.collect();
    addresses.sort_unstable();
    addresses.dedup();
    ensure!(!addresses.is_empty(), "{authority} has no address");
    let request = format!(
        "POST /clusters/{}/{verb} HTTP/1.0\r\nHost: {authority}\r\nContent-Length: 0\r\n{headers}\r\n",
        flags.name
    );
    let tell = |address: &SocketAddr| (*address, exchange(*address, &request));
    let mut told: Vec<_> = addresses.iter().map(tell).collect();
    let some = told.iter().any(|(_, answer)| answer.is_ok());
    // `localhost` has an address in each family, of which discovery may have one.
    told.retain(|(address, answer)| answer.is_ok() || !some || !address.ip().is_loopback());
    if !some {
        let reasons: Vec<_> = told
            .iter()
            .map(|(address, answer)| {
                format!("{address}: {}", answer.as_ref().err().map_or(String::new(), |e| format!("{e:#}")))
            })
            .collect();
        bail!("{}", reasons.join("; "));
    }
    let mut text = String::new();
    let mut failed = false;
    let alone = told.len() == 1;
    for (address, answer) in told {
        match answer {
            Ok(said) if alone => text.push_str(&format!("{said}\n")),
            Ok(said) => text.push_str(&format!("{address}: {said}\n")),
            Err(error) => {
                failed = true;
                text.push_str(&format!("{address}: not told: {error:#}\n"));
            }
        }
    }
    Ok(Outcome { text, code: u8::from(failed) })
}

/// Sends a request; gives the body of an answer of 200.
fn exchange(address: SocketAddr, request: &str) -> anyhow::Result<String> {
    let mut connection = TcpStream::connect_timeout(&address, TIMEOUT).context("cannot connect")?;
    connection.set_read_timeout(Some(TIMEOUT))?;
    connection.set_write_timeout(Some(TIMEOUT))?;
    connection.write_all(request.as_bytes())?;
    let mut answer = String::new();
    connection.take(64 * 1024).read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("it does not speak HTTP")?;
    let status = head.split_whitespace().nth(1).unwrap_or_default();
    let advice = match (status, body.trim().ends_with("is needed")) {
        ("401", true) => "; give the file that it is in with --token-file, or CULVERT_OPERATOR_TOKEN_FILE",
        _ => "",
    };
    ensure!(status == "200", "{status}: {}{advice}", body.trim());
    Ok(body.trim().to_owned())
}

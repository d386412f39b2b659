//! `culvert override proxy`: curl, a browser and clients that know no proxies, through it.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use culvert_tests::server;
use nix::sys::signal::Signal;
use serde_json::Value;

use super::harness::{DEADLINE, Mesh, Running, refused};

/// A running proxy, and where it listens.
fn proxy(further: &[&str]) -> Result<(Running, String)> {
    let flags = ["override", "proxy", "--set", "users=feature-x", "--listen", "127.0.0.1:0"];
    let mut running = Running::spawn("culvert", &[&flags, further].concat())?;
    let line = running.until_said("listening on ")?;
    let address = line.split_once("http://").context("no address")?.1.trim().to_owned();
    Ok((running, address))
}

/// Runs curl; gives status and body.
fn curl(arguments: &[&str]) -> Result<(String, String)> {
    let output = Command::new("curl").args(["-sS", "-m", "20", "-w", "\n%{http_code}"]).args(arguments).output()?;
    ensure!(output.status.success(), "curl {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout)?;
    let (body, status) = text.rsplit_once('\n').context("no status")?;
    Ok((status.to_owned(), body.to_owned()))
}

#[test]
fn everything_gets_the_header() -> Result<()> {
    let mesh = Mesh::start()?;
    let (mut running, address) = proxy(&[])?;
    let (through, url) = (format!("http://{address}"), format!("http://127.0.0.1:{}/path?q=1", mesh.port));
    let arguments = ["-x", &through, &url, "-H", "baggage: user=7", "-H", "proxy-connection: x", "-d", "four"];
    let (status, body) = curl(&arguments)?;
    let answer: Value = serde_json::from_str(&body)?;
    assert_eq!((&*status, &answer["revision"], &answer["path"]), ("200", &"feature-x".into(), &"/path?q=1".into()));
    assert_eq!((&answer["method"], &answer["body_bytes"]), (&"POST".into(), &4.into()));
    let headers = answer["headers"].to_string();
    assert!(headers.contains("user=7") && !headers.contains("proxy-connection"), "{headers}");
    let line = running.until_said("POST http://127.0.0.1")?;
    assert!(line.contains(" 200 ") && line.contains("by envoy"), "{line}");

    // Upstreams that are not there, and what is no proxy request, are answered with what to do.
    let (status, body) = curl(&["-x", &through, "http://127.0.0.1:1/"])?;
    assert!(status == "502" && body.contains("Connection refused"), "{status} {body}");
    let (status, body) = curl(&[&through])?;
    assert!(status == "400" && body.contains(&format!("use `curl -x {through} http://SERVICE/`")), "{status} {body}");
    // It does not call itself for ever.
    let (status, body) = curl(&["-x", &through, &format!("{through}/")])?;
    assert!(status == "400" || status == "508", "{status} {body}");

    running.signal(Signal::SIGINT)?;
    assert!(running.wait()?.success());
    Ok(())
}

#[test]
fn a_fixed_target_serves_clients_that_know_no_proxies() -> Result<()> {
    let mesh = Mesh::start()?;
    let target = format!("http://127.0.0.1:{}", mesh.port);
    let (_running, address) = proxy(&["--target", &target])?;
    let (status, body) = curl(&[&format!("http://{address}/a")])?;
    let answer: Value = serde_json::from_str(&body)?;
    assert_eq!((&*status, &answer["revision"], &answer["path"]), ("200", &"feature-x".into(), &"/a".into()));
    assert_eq!(answer["headers"]["host"], format!("127.0.0.1:{}", mesh.port));
    // As of a phone whose hosts file has the service's name lead here.
    let (status, body) = curl(&["-H", "host: users.default", &format!("http://{address}/a")])?;
    let answer: Value = serde_json::from_str(&body)?;
    assert_eq!((&*status, &answer["headers"]["host"]), ("200", &"users.default".into()));
    Ok(())
}

/// CONNECT: what comes out is what went in, and it is said that it has no header.
#[test]
fn what_is_encrypted_passes_with_a_warning() -> Result<()> {
    let port = server::start(|mut stream| {
        let mut word = [0; 5];
        stream.read_exact(&mut word)?;
        stream.write_all(&word)?;
        Ok(())
    })?;
    let (mut running, address) = proxy(&[])?;
    let mut stream = TcpStream::connect(&address)?;
    stream.set_read_timeout(Some(DEADLINE))?;
    write!(stream, "CONNECT 127.0.0.1:{port} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n")?;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        head.extend(byte);
    }
    assert!(head.starts_with(b"HTTP/1.1 200 "), "{}", String::from_utf8_lossy(&head));
    stream.write_all(b"hello")?;
    let mut all = String::new();
    stream.read_to_string(&mut all)?;
    assert_eq!(all, "hello");
    let line = running.until_said("warning:")?;
    assert!(line.contains("to which no header can be added: it passes without the override"), "{line}");
    Ok(())
}

#[test]
fn a_browser_goes_through_it() -> Result<()> {
    let mesh = Mesh::start()?;
    let (mut running, address) = proxy(&[])?;
    let profile = culvert_tests::daemon::scratch_dir()?;
    let output = Command::new("chromium")
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"])
        // Also for this host's own names, which browsers take no proxy for otherwise.
        .args(["--proxy-bypass-list=<-loopback>", "--virtual-time-budget=5000", "--dump-dom"])
        .arg(format!("--user-data-dir={}", profile.display()))
        .arg(format!("--proxy-server=http://{address}"))
        .arg(format!("http://127.0.0.1:{}/page", mesh.port))
        .output()
        .context("chromium is needed; `cargo xtask setup` installs it")?;
    let page = String::from_utf8(output.stdout)?;
    assert!(page.contains("feature-x"), "{page} {}", String::from_utf8_lossy(&output.stderr));
    running.until_said("/page")?;
    Ok(())
}

#[test]
fn mistakes_say_what_to_do() -> Result<()> {
    let (_running, address) = proxy(&[])?;
    for (arguments, expected) in [
        (&["override", "proxy"][..], "--set"),
        (&["override", "proxy", "--set", "users=x", "--target", "https://x"], "only http:// targets are possible"),
        (&["override", "proxy", "--set", "Users=x"], "service `Users`"),
        (&["override", "proxy", "--share", "x"], "`culvert override share list` shows the tokens"),
        (&["override", "proxy", "--set", "users=x", "--listen", &address], "--listen sets the address"),
    ] {
        let error = refused(arguments)?;
        assert!(error.contains(expected), "{arguments:?}: {error}");
    }
    Ok(())
}

/// What it says is what a phone can be given.
#[test]
fn at_all_addresses_it_names_those_that_others_reach() -> Result<()> {
    let flags = ["override", "proxy", "--set", "users=feature-x", "--listen", "0.0.0.0:0"];
    let mut running = Running::spawn("culvert", &flags)?;
    running.until_said("try: curl")?;
    let said = running.said();
    let own = std::process::Command::new("hostname").arg("-I").output()?;
    let own = String::from_utf8(own.stdout)?;
    for address in own.split_whitespace().filter(|address| !address.contains(':')) {
        ensure!(said.contains(&format!("other machines reach it at http://{address}:")), "{address}: {said}");
    }
    ensure!(own.trim().is_empty() || !said.contains("curl -x http://0.0.0.0"), "{said}");
    Ok(())
}

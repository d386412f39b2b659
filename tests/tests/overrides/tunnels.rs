//! `culvert override connect`: a program on a developer's machine answers for a revision.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use culvert_tests::app::App;
use culvert_tests::daemon::{fetch, free_port};
use culvert_tests::http1::Request;
use culvert_tests::wait_until;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::harness::{DEADLINE, Discovery, Mesh, Running, culvert, header, refused, revision, until_revision};

fn connect(discovery: &Discovery, target: &str, revision: &str) -> Result<Running> {
    let access = ["--discovery", &discovery.url, "--token-file", &discovery.token_file];
    Running::spawn("culvert", &[&["override", "connect", target, "--revision", revision], &access[..]].concat())
}

fn laptop() -> Result<u16> {
    App { pod: "laptop".into(), revision: "laptop".into(), upstream: None }.start()
}

#[test]
fn requests_reach_the_laptop_while_the_tunnel_is_there() -> Result<()> {
    let mut mesh = Mesh::start()?;
    let port = laptop()?;
    let mut tunnel = connect(&mesh.discovery, &format!("users=127.0.0.1:{port}"), "me")?;
    let line = tunnel.until_said("open: ")?;
    assert!(line.contains(&format!("users.default:80, revision me -> 127.0.0.1:{port}")), "{line}");
    let headers = header(&["--set", "users=me"])?;
    mesh.until_revision(&headers, "laptop")?;
    assert_eq!(mesh.revision(&[])?, "main");
    assert_eq!(mesh.revision(&header(&["--set", "users=feature-x"])?)?, "feature-x");

    // It shows wherever offloaded deployments do.
    let status = mesh.discovery.status()?;
    let tunnels = status["tunnels"].as_array().unwrap();
    assert_eq!(
        (tunnels.len(), &tunnels[0]["revision"], &tunnels[0]["envoy_cluster"]),
        (1, &json!("me"), &json!("users.default:80"))
    );
    assert!(tunnels[0]["connections_total"].as_u64() > Some(0), "{tunnels:?}");
    let listed = culvert(&["override", "list", "--discovery", &mesh.discovery.url])?;
    assert!(listed.contains("tunnel/me"), "{listed}");
    let services = culvert(&["services", "--discovery", &mesh.discovery.url])?;
    let tunnels = services.split_once("TUNNELS").map(|(_, rest)| rest).unwrap_or_default();
    assert!(tunnels.contains("users.default:80") && tunnels.contains("127.0.0.1"), "{services}");

    // Discovery goes and comes back: the tunnel is made again by itself.
    mesh.discovery.restart()?;
    tunnel.until_said("down: users")?;
    wait_until(DEADLINE, "the tunnel to be open again", || {
        ensure!(tunnel.said().matches("open: ").count() == 2, "{}", tunnel.said());
        Ok(())
    })?;
    mesh.until_revision(&headers, "laptop")?;

    // The laptop is closed: the revision is gone, and its requests go where they would have gone.
    tunnel.signal(Signal::SIGKILL)?;
    tunnel.wait()?;
    let closed = Instant::now();
    mesh.until_revision(&headers, "main")?;
    assert!(closed.elapsed() < Duration::from_secs(10), "{:?}", closed.elapsed());
    assert_eq!(mesh.discovery.status()?["tunnels"], json!([]));
    Ok(())
}

/// A machine that sleeps closes nothing: only pings tell.
#[test]
fn a_laptop_that_falls_asleep_is_gone_within_seconds() -> Result<()> {
    let mesh = Mesh::start()?;
    let mut tunnel = connect(&mesh.discovery, &format!("users=127.0.0.1:{}", laptop()?), "me")?;
    tunnel.until_said("open: ")?;
    let headers = header(&["--set", "users=me"])?;
    mesh.until_revision(&headers, "laptop")?;
    tunnel.signal(Signal::SIGSTOP)?;
    let asleep = Instant::now();
    wait_until(DEADLINE, "requests to go where they would have gone", || {
        // Requests that meet the dead tunnel end, one way or another.
        let response = mesh.ask(&headers)?;
        ensure!(response.status == 200 && response.text().contains("\"main\""), "{}", response.status);
        Ok(())
    })?;
    assert!(asleep.elapsed() < Duration::from_secs(25), "{:?}", asleep.elapsed());
    // It wakes up, and is back.
    tunnel.signal(Signal::SIGCONT)?;
    mesh.until_revision(&headers, "laptop")?;
    Ok(())
}

/// Nobody is left who could tell proxies that the tunnel is gone.
#[test]
fn requests_leave_a_tunnel_whose_discovery_is_killed() -> Result<()> {
    let mut mesh = Mesh::start()?;
    let mut tunnel = connect(&mesh.discovery, &format!("users=127.0.0.1:{}", laptop()?), "me")?;
    tunnel.until_said("open: ")?;
    let mut headers = header(&["--set", "users=me"])?;
    headers.push(("x-culvert-override-debug".to_owned(), "1".to_owned()));
    mesh.until_revision(&headers, "laptop")?;
    mesh.discovery.kill()?;
    // From the first request on, with its body, and also when it is tried again whether the tunnel is there.
    let gone = "users.default:80: refused route tunnel_gone";
    let began = Instant::now();
    let mut requests = 0;
    while requests < 5 || began.elapsed() < Duration::from_secs(5) {
        let request = Request { method: "POST".to_owned(), body: b"four".to_vec(), ..Request::get("/") };
        let request = headers.iter().fold(request, |request, (name, value)| request.header(name, value));
        let response = fetch(mesh.port, request)?;
        let answer: serde_json::Value = serde_json::from_str(&response.text())?;
        assert_eq!((response.status, &answer["revision"], &answer["body_bytes"]), (200, &json!("main"), &json!(4)));
        assert_eq!(response.headers.get("x-culvert-override"), Some(gone), "request {requests}");
        requests += 1;
    }
    assert_eq!((mesh.stat("refused.tunnel_gone")?, mesh.stat("rejected")?), (requests, requests));
    // They are the service's, which has answered them.
    let users = "cluster.users.default_80";
    let answered = |mesh: &Mesh| Ok::<_, anyhow::Error>(mesh.daemon.stats()?.get(&format!("{users}.upstream_rq_200")));
    assert_eq!(answered(&mesh)?, requests);
    // Pods are there all the same, and so is the tunnel when discovery is.
    assert_eq!(mesh.revision(&header(&["--set", "users=feature-x"])?)?, "feature-x");
    mesh.discovery.start_again()?;
    mesh.until_revision(&headers, "laptop")
}

/// Two ports in a row.
fn two_ports() -> Result<u16> {
    wait_until(DEADLINE, "two free ports in a row", || {
        let port = free_port()?;
        let next = port.checked_add(1).context("there is no port after it")?;
        TcpListener::bind(("127.0.0.1", next))?;
        Ok(port)
    })
}

/// The ports of the tunnels, by revision.
fn ports(discovery: &Discovery) -> Result<BTreeMap<String, String>> {
    let status = discovery.status()?;
    let services = status["services"].as_array().context("services")?;
    let offloaded = services.iter().flat_map(|service| service["offloaded"].as_array().into_iter().flatten());
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let tunnels =
        offloaded.filter(|it| it["cluster"] == "tunnel").map(|it| (text(&it["revision"]), text(&it["address"])));
    Ok(tunnels.collect())
}

/// A proxy that has not heard of anything since discovery was killed sends requests to the ports that tunnels had.
#[test]
fn after_a_crash_nobody_answers_at_anothers_port() -> Result<()> {
    let first = two_ports()?;
    let mut mesh = Mesh::start_with(&["--tunnels", &format!("127.0.0.1:{first}-{},quarantine=0", first + 1)])?;
    let names = ["bob", "me"];
    let connected = |name: &str| -> Result<Running> {
        let port = App { pod: name.into(), revision: name.into(), upstream: None }.start()?;
        let mut tunnel = connect(&mesh.discovery, &format!("users=127.0.0.1:{port}"), name)?;
        tunnel.until_said("open: ")?;
        Ok(tunnel)
    };
    let [bob, me] = [connected("bob")?, connected("me")?];
    let headers = |name: &str| header(&["--set", &format!("users={name}")]);
    for name in names {
        mesh.until_revision(&headers(name)?, name)?;
    }
    let before = ports(&mesh.discovery)?;
    assert_eq!(before.len(), 2, "{before:?}");

    // The daemon hears of nothing, and they come back in the other order.
    mesh.daemon.signal(Signal::SIGSTOP)?;
    mesh.discovery.kill()?;
    bob.signal(Signal::SIGSTOP)?;
    mesh.discovery.start_again()?;
    for (tunnel, was_held) in [(&me, false), (&bob, true)] {
        if was_held {
            tunnel.signal(Signal::SIGCONT)?;
        }
        wait_until(DEADLINE, "the tunnel to be open again", || {
            ensure!(tunnel.said().matches("open: ").count() == 2, "{}", tunnel.said());
            Ok(())
        })?;
    }
    wait_until(DEADLINE, "both to have the ports that they had", || {
        let now = ports(&mesh.discovery)?;
        ensure!(now == before, "{now:?}, and {before:?} before");
        Ok(())
    })?;

    // What is asked now is answered before the daemon hears of the new tunnels, or after it.
    let asking: Vec<_> = names
        .iter()
        .cycle()
        .take(12)
        .map(|name| {
            let (name, port, headers) = ((*name).to_owned(), mesh.port, headers(name)?);
            Ok(std::thread::spawn(move || (name, revision(port, &headers))))
        })
        .collect::<Result<_>>()?;
    mesh.daemon.signal(Signal::SIGCONT)?;
    for asked in asking {
        let (wanted, answered) = asked.join().map_err(|_| anyhow::anyhow!("a request panicked"))?;
        let answered = answered?;
        assert!(answered == wanted || answered == "main", "{wanted}'s request was answered by {answered}");
    }
    for name in names {
        mesh.until_revision(&headers(name)?, name)?;
    }
    Ok(())
}

/// Developers that start anew after a crash know nothing of the ports that they had.
#[test]
fn after_a_crash_nobody_listens_at_ports_that_may_be_anothers() -> Result<()> {
    let first = two_ports()?;
    let tunnels = format!("127.0.0.1:{first}-{},quarantine=600", first + 1);
    let mut mesh = Mesh::start_with(&["--tunnels", &tunnels.replace("=600", "=0")])?;
    let connected = |mesh: &Mesh, name: &str| -> Result<Running> {
        let port = App { pod: name.into(), revision: name.into(), upstream: None }.start()?;
        let mut tunnel = connect(&mesh.discovery, &format!("users=127.0.0.1:{port}"), name)?;
        tunnel.until_said("open: ")?;
        Ok(tunnel)
    };
    let before = [connected(&mesh, "bob")?, connected(&mesh, "me")?];
    let headers = |name: &str| header(&["--set", &format!("users={name}")]);
    for name in ["bob", "me"] {
        mesh.until_revision(&headers(name)?, name)?;
    }
    mesh.daemon.signal(Signal::SIGSTOP)?;
    mesh.discovery.kill()?;
    drop(before);
    mesh.discovery.start_again_with("--tunnels", &tunnels)?;
    let mut after = [connected(&mesh, "me")?, connected(&mesh, "bob")?];
    for tunnel in &mut after {
        tunnel.until_said("requests come in ")?;
    }
    for port in [first, first + 1] {
        let error = TcpStream::connect(("127.0.0.1", port)).expect_err("nobody may be there");
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused, "{port}");
    }
    assert_eq!(mesh.discovery.status()?["tunnels"], json!([]));
    mesh.daemon.signal(Signal::SIGCONT)?;
    for name in ["me", "bob", "me"] {
        assert_eq!(mesh.revision(&headers(name)?)?, "main", "{name}");
    }
    Ok(())
}

/// A network that is lost closes nothing: a client is back before discovery knows, and there is one port only.
#[test]
fn a_client_that_is_not_missed_yet_has_its_port_again() -> Result<()> {
    let mesh = Mesh::start()?;
    let token = std::fs::read_to_string(&mesh.discovery.token_file)?;
    let begin = |session: &str| -> Result<(TcpStream, String)> {
        let mut stream = TcpStream::connect(("127.0.0.1", mesh.discovery.http))?;
        stream.set_read_timeout(Some(DEADLINE))?;
        write!(
            stream,
            "GET /overrides/tunnels HTTP/1.1\r\nhost: discovery\r\nconnection: upgrade\r\nupgrade: culvert-tunnel\r\n\
             authorization: Bearer {}\r\nx-culvert-service: users\r\nx-culvert-revision: me\r\nx-culvert-session: \
             {session}\r\nx-culvert-tunnel-port: 0\r\n\r\n",
            token.trim()
        )?;
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte)?;
            head.extend(byte);
        }
        Ok((stream, String::from_utf8(head)?.to_lowercase()))
    };
    let port =
        |head: &str| head.lines().find_map(|line| Some(line.strip_prefix("x-culvert-tunnel-port: ")?.to_owned()));
    let (_first, head) = begin("one")?;
    let before = port(&head).context(head)?;
    let (_second, head) = begin("one")?;
    ensure!(head.starts_with("http/1.1 101") && port(&head).as_ref() == Some(&before), "{before}: {head}");
    // Another one is not it.
    let (_, head) = begin("two")?;
    ensure!(head.starts_with("http/1.1 409"), "{head}");
    Ok(())
}

/// A laptop is connected to each replica, so that the proxies of all of them reach it.
#[test]
fn each_replica_has_the_tunnel() -> Result<()> {
    let mut mesh = Mesh::start()?;
    let replica = mesh.replica("127.0.0.2")?;
    let (other, port) = mesh.node("other", replica.xds)?;
    until_revision(port, &header(&["--set", "users=feature-x"])?, "feature-x")?;
    let target = format!("users=127.0.0.1:{}", laptop()?);

    // By the address of one: the other one's proxies do not know it, and say so.
    let mut alone = connect(&mesh.discovery, &target, "alone")?;
    let headers = header(&["--set", "users=alone"])?;
    mesh.until_revision(&headers, "laptop")?;
    assert_eq!(revision(port, &headers)?, "main");
    assert_eq!(other.stats()?.get("http.ingress.override.refused.unlisted"), 1);
    alone.signal(Signal::SIGKILL)?;
    alone.wait()?;
    mesh.until_revision(&headers, "main")?;

    // By a name that has the addresses of both.
    let hosts = "127.0.0.1 localhost\n127.0.0.1 discovery.test\n127.0.0.2 discovery.test\n";
    let (url, file) = (format!("http://discovery.test:{}", mesh.discovery.http), mesh.discovery.token_file.clone());
    let arguments = ["override", "connect", &target, "--revision", "me", "--discovery", &url, "--token-file", &file];
    let tunnel = Running::spawn_with_hosts(hosts, "culvert", &arguments)?;
    let headers = header(&["--set", "users=me"])?;
    mesh.until_revision(&headers, "laptop")?;
    until_revision(port, &headers, "laptop")?;
    for address in ["127.0.0.1", "127.0.0.2"] {
        ensure!(tunnel.said().contains(&format!("(by {address}:")), "{}", tunnel.said());
    }
    // One of them ends: the laptop is reached through the other.
    mesh.discovery.kill()?;
    mesh.until_revision(&headers, "main")?;
    for _ in 0..20 {
        assert_eq!(revision(port, &headers)?, "laptop");
    }
    mesh.discovery.start_again()?;
    mesh.until_revision(&headers, "laptop")
}

#[test]
fn large_bodies_pass_and_a_program_that_is_not_there_is_said() -> Result<()> {
    let mesh = Mesh::start()?;
    let held = TcpListener::bind("127.0.0.1:0")?;
    let port = held.local_addr()?.port();
    drop(held);
    let mut tunnel = connect(&mesh.discovery, &format!("users=127.0.0.1:{port}"), "me")?;
    tunnel.until_said("open: ")?;
    let headers = header(&["--set", "users=me"])?;
    wait_until(DEADLINE, "the daemon to know the revision", || {
        let response = mesh.ask(&headers)?;
        ensure!(response.status == 503, "{}", response.status);
        Ok(())
    })?;
    let line = tunnel.until_said("cannot be reached")?;
    assert!(line.contains("is your program running?"), "{line}");

    // Now it is there, and sends more than any buffer on the way holds.
    const SIZE: usize = 8 << 20;
    let listener = TcpListener::bind(("127.0.0.1", port))?;
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let mut stream = stream;
            let _ = stream.read(&mut [0; 4096]);
            let _ = write!(stream, "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {SIZE}\r\n\r\n");
            let _ = stream.write_all(&vec![b'x'; SIZE]);
        }
    });
    let response = mesh.ask(&headers)?;
    assert_eq!((response.status, response.body.len()), (200, SIZE));
    Ok(())
}

#[test]
fn what_cannot_be_is_refused_with_what_to_do() -> Result<()> {
    let mesh = Mesh::start()?;
    let (url, file) = (&*mesh.discovery.url, &*mesh.discovery.token_file);
    let wrong = std::path::Path::new(file).with_file_name("wrong");
    std::fs::write(&wrong, "something-else")?;
    let wrong = wrong.display().to_string();
    let tell = |target: &str, revision: &str, file: &str| {
        let flags = ["override", "connect", target, "--revision", revision, "--discovery", url, "--token-file", file];
        refused(&flags)
    };
    for (target, revision, file, expected) in [
        ("users=localhost:1", "me", &*wrong, "the token that was sent is not the developers' token"),
        ("nobody=localhost:1", "me", file, "there is no service nobody.default; `culvert services` lists"),
        ("users:81=localhost:1", "me", file, "no port 81 that speaks HTTP"),
        ("users=localhost:1", "feature-x", file, "is pod default/users-x; choose another with --revision"),
        ("users=localhost", "me", file, "expected SERVICE=HOST:PORT"),
    ] {
        let error = tell(target, revision, file)?;
        assert!(error.contains(expected), "{target}: {error}");
    }
    let mut first = connect(&mesh.discovery, "users=localhost:1", "me")?;
    first.until_said("open: ")?;
    let error = tell("users=localhost:1", "me", file)?;
    // There is one port: a second tunnel finds none, or the revision taken.
    assert!(error.contains("is a tunnel from 127.0.0.1") || error.contains("is free for another tunnel"), "{error}");
    Ok(())
}

#[test]
fn without_a_token_in_the_configuration_there_are_no_tunnels() -> Result<()> {
    let bin = culvert_tests::binaries::binary("culvert-discovery")?;
    let output = std::process::Command::new(bin)
        .args(["--registration", "memory", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0"])
        .args(["--tunnels", "127.0.0.1:19000-19001"])
        .output()?;
    let error = String::from_utf8(output.stderr)?;
    assert!(!output.status.success() && error.contains("tunnels need the developers' token"), "{error}");
    Ok(())
}

//! Hosts that end connections when it hurts, and hosts that speak first, with culvertd and with the real Envoy on the same bootstrap.

use std::io::{BufReader, Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use culvert_tests::bootstrap::Bootstrap;
use culvert_tests::daemon::{Daemon, Kind, fetch, free_port};
use culvert_tests::http1::Request;
use culvert_tests::{server, wait_until};
use socket2::SockRef;

const DEADLINE: Duration = Duration::from_secs(30);
const KINDS: [Kind; 2] = [Kind::Envoy, Kind::Culvert];
const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
const ALL: &str = "- {name: all, domains: ['*'], routes: [{match: {prefix: /}, route: {cluster: app}}]}";

#[test]
fn a_host_that_stalls_after_its_fin_has_no_further_request() -> Result<()> {
    for kind in KINDS {
        let host = server::start(|mut stream| {
            let mut requests = BufReader::new(stream.try_clone()?);
            if Request::read(&mut requests)?.is_some() {
                stream.write_all(ANSWER)?;
                stream.shutdown(Shutdown::Write)?;
                // It says nothing any more, and does not go away either, for as long as the other side does not.
                while requests.read(&mut [0; 64])? > 0 {}
            }
            Ok(())
        })?;
        let web = free_port()?;
        let daemon = Daemon::start(kind, &Bootstrap::new().http(web, ALL, &[]).cluster("app", &[host], &[]).yaml())?;
        for request in 1..=3 {
            let response = fetch(web, Request::get("/"))?;
            assert_eq!(response.status, 200, "{kind:?}: request {request}");
            // Our side of the connection is closed as well: it is not kept half open until it is wanted.
            wait_until(DEADLINE, "the end of the connection", || {
                let stats = daemon.stats()?;
                let counted =
                    (stats.get("cluster.app.upstream_cx_destroy"), stats.get("cluster.app.upstream_cx_active"));
                ensure!(counted == (request, 0), "{kind:?}: {counted:?}");
                Ok(())
            })?;
        }
    }
    Ok(())
}

#[test]
fn a_fin_comes_after_all_that_was_said_before_it() -> Result<()> {
    const SIZE: usize = 8 << 20;
    for kind in KINDS {
        let host = server::start(|mut stream| {
            stream.write_all(&vec![b'x'; SIZE])?;
            stream.shutdown(Shutdown::Write)?;
            // What the client says afterwards still arrives.
            let mut said = String::new();
            stream.read_to_string(&mut said)?;
            Ok(())
        })?;
        let port = free_port()?;
        let daemon = Daemon::start(kind, &Bootstrap::new().tcp(port, "app").cluster("app", &[host], &[]).yaml())?;
        let mut client = TcpStream::connect(("127.0.0.1", port))?;
        client.set_read_timeout(Some(DEADLINE))?;
        // The host has said all, and waits for the client, which has read nothing.
        wait_until(DEADLINE, "bytes of the host", || {
            ensure!(daemon.stats()?.get("cluster.app.upstream_cx_active") == 1);
            Ok(())
        })?;
        let (mut read, mut buffer) = (0, vec![0; 64 * 1024]);
        loop {
            let count = client.read(&mut buffer).with_context(|| format!("{kind:?}: after {read} bytes"))?;
            if count == 0 {
                break;
            }
            read += count;
        }
        assert_eq!(read, SIZE, "{kind:?}");
        client.write_all(b"and you?").with_context(|| format!("{kind:?}"))?;
        client.shutdown(Shutdown::Write)?;
        wait_until(DEADLINE, "the end", || {
            let stats = daemon.stats()?;
            ensure!(stats.get("cluster.app.upstream_cx_active") == 0);
            ensure!(stats.get("cluster.app.upstream_cx_tx_bytes_total") == 8, "the host has not heard the client");
            Ok(())
        })
        .with_context(|| format!("{kind:?}"))?;
    }
    Ok(())
}

#[test]
fn connections_that_die_with_their_answer_are_not_used() -> Result<()> {
    const REQUESTS: u64 = 200;
    for kind in KINDS {
        let host = server::start(|mut stream| {
            let mut requests = BufReader::new(stream.try_clone()?);
            if Request::read(&mut requests)?.is_some() {
                // The FIN is in the packet of the answer: there is no moment between them.
                SockRef::from(&stream).set_tcp_cork(true)?;
                stream.write_all(ANSWER)?;
            }
            Ok(())
        })?;
        let web = free_port()?;
        let daemon = Daemon::start(kind, &Bootstrap::new().http(web, ALL, &[]).cluster("app", &[host], &[]).yaml())?;
        let mut client = BufReader::new(TcpStream::connect(("127.0.0.1", web))?);
        client.get_ref().set_nodelay(true)?;
        for number in 0..REQUESTS {
            let mut request = Request::get("/");
            request.headers.push("host", "a");
            request.write(client.get_mut())?;
            let response = culvert_tests::http1::Response::read(&mut client, "GET")?;
            assert_eq!(response.status, 200, "{kind:?}: request {number}: {}", response.text());
        }
        assert_eq!(daemon.stats()?.get("cluster.app.upstream_cx_total"), REQUESTS, "{kind:?}");
    }
    Ok(())
}

/// The host has closed an idle connection at the moment at which a request was sent on it: nobody knows what it did with that.
#[test]
fn a_request_on_a_connection_that_was_just_closed_fails_or_is_tried_again() -> Result<()> {
    let answers = |kind| -> Result<Vec<String>> {
        let host = server::start(|mut stream| {
            let mut requests = BufReader::new(stream.try_clone()?);
            if Request::read(&mut requests)?.is_some() {
                stream.write_all(ANSWER)?;
                // The next one finds nobody.
                Request::read(&mut requests)?;
            }
            Ok(())
        })?;
        let web = free_port()?;
        let retry = |on: &str| format!("route: {{cluster: app, retry_policy: {{retry_on: {on}, num_retries: 1}}}}");
        let cases = ["reset", "reset-before-request", "connect-failure", "5xx", "gateway-error", "retriable-4xx"];
        let mut routes: Vec<_> = cases.iter().map(|on| format!("{{match: {{path: /{on}}}, {}}}", retry(on))).collect();
        routes.push("{match: {prefix: /}, route: {cluster: app}}".to_owned());
        let routes = format!("- {{name: all, domains: ['*'], routes: [{}]}}", routes.join(", "));
        let daemon =
            Daemon::start(kind, &Bootstrap::new().http(web, &routes, &[]).cluster("app", &[host], &[]).yaml())?;
        let mut answers = Vec::new();
        for case in ["plain"].iter().chain(&cases) {
            for method in ["GET", "POST"] {
                // One that waits, and has been used once.
                if daemon.stats()?.get("cluster.app.upstream_cx_active") == 0 {
                    ensure!(
                        fetch(web, Request::get("/"))?.status == 200,
                        "{kind:?}: the first request of a connection"
                    );
                }
                let mut request = Request::get(&format!("/{case}"));
                request.method = method.to_owned();
                if method == "POST" {
                    request.body = b"some".to_vec();
                }
                let response = fetch(web, request)?;
                // A further attempt has left one behind.
                let left = u64::from(response.status == 200);
                wait_until(DEADLINE, "the end of the connection", || {
                    ensure!(daemon.stats()?.get("cluster.app.upstream_cx_active") == left, "{kind:?}: {case}");
                    Ok(())
                })?;
                answers.push(format!("{method} {case}: {} {}", response.status, response.text()));
            }
        }
        Ok(answers)
    };
    let (envoy, culvert) = (answers(Kind::Envoy)?, answers(Kind::Culvert)?);
    assert_eq!(culvert, envoy);
    assert!(envoy.iter().any(|line| line.starts_with("GET plain: 503")), "{envoy:?}");
    assert!(envoy.iter().any(|line| line.starts_with("GET reset: 200")), "{envoy:?}");
    Ok(())
}

#[test]
fn hosts_that_speak_first_are_heard() -> Result<()> {
    /// Envoy's timers are not exact.
    const WAITS: Duration = Duration::from_millis(600);
    let tls = "listener_filters: [{name: i, typed_config: {\"@type\": \
               type.googleapis.com/envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector}}]";
    let disabled = |rule: &str| tls.replace("name: i,", &format!("name: i, filter_disabled: {rule},"));
    const LOW: &str = "destination_port_range: {start: 1, end: 1024}";
    let every = disabled("{any_match: true}");
    let other = disabled(&format!("{{not_match: {{{LOW}}}}}"));
    let neither = disabled(&format!(
        "{{and_match: {{rules: [{{any_match: true}}, {{or_match: {{rules: [{{{LOW}}}, {{not_match: {{any_match: true}}}}]}}}}]}}}}"
    ));
    for kind in KINDS {
        let told = std::sync::Arc::new(AtomicUsize::new(0));
        let counted = std::sync::Arc::clone(&told);
        let host = server::start(move |mut stream| {
            stream.write_all(b"220 who are you?\n")?;
            counted.fetch_add(1, SeqCst);
            let mut said = [0; 5];
            stream.read_exact(&mut said)?;
            Ok(stream.write_all(&said)?)
        })?;
        let cases = [
            // What the listener says, and whether the client hears the host, at once or after a while.
            (vec![], Some(Duration::ZERO)),
            (vec![tls, "listener_filters_timeout: 0.7s", "continue_on_listener_filters_timeout: true"], Some(WAITS)),
            (vec![tls, "listener_filters_timeout: 0.7s"], None),
            // Not waited for at all, or waited for: by the port.
            (vec![&*every, "listener_filters_timeout: 600s"], Some(Duration::ZERO)),
            (vec![&*other, "listener_filters_timeout: 600s"], Some(Duration::ZERO)),
            (vec![&*neither, "listener_filters_timeout: 0.7s"], None),
        ];
        let mut bootstrap = Bootstrap::new().cluster("app", &[host], &[]);
        let mut ports = Vec::new();
        for (fields, _) in &cases {
            ports.push(free_port()?);
            bootstrap = bootstrap.tcp_with(ports[ports.len() - 1], "cluster: app", fields);
        }
        let _daemon = Daemon::start(kind, &bootstrap.yaml())?;
        for ((fields, heard), port) in cases.iter().zip(ports) {
            let began = Instant::now();
            let mut client = BufReader::new(TcpStream::connect(("127.0.0.1", port))?);
            client.get_ref().set_read_timeout(Some(DEADLINE))?;
            let mut greeting = String::new();
            std::io::BufRead::read_line(&mut client, &mut greeting)?;
            match heard {
                Some(after) => {
                    assert_eq!(greeting, "220 who are you?\n", "{kind:?}: {fields:?}");
                    assert!(began.elapsed() >= *after, "{kind:?}: {fields:?}");
                    client.get_mut().write_all(b"me: a")?;
                    let mut answer = String::new();
                    client.read_to_string(&mut answer)?;
                    assert_eq!(answer, "me: a", "{kind:?}: {fields:?}");
                }
                None => assert_eq!(greeting, "", "{kind:?}: {fields:?}"),
            }
        }
        // Where the client was shut out the host was not asked.
        assert_eq!(told.load(SeqCst), 4, "{kind:?}");
    }
    Ok(())
}

#[test]
fn heads_of_responses_have_their_limits() -> Result<()> {
    // So many headers, or so many bytes of them, as the path says.
    let serve = |mut stream: TcpStream| {
        let mut requests = BufReader::new(stream.try_clone()?);
        while let Some(request) = Request::read(&mut requests)? {
            let mut parts = request.target.trim_start_matches('/').split('/');
            let mut number = || parts.next().and_then(|part| part.parse::<usize>().ok()).unwrap_or(0);
            let (count, size) = (number(), number());
            let mut head = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n".to_owned();
            (0..count).for_each(|at| head += &format!("x-{at}: v\r\n"));
            (0..size / 4000).for_each(|_| head += &format!("x-large: {}\r\n", "v".repeat(3990)));
            stream.write_all(format!("{head}\r\n").as_bytes())?;
        }
        Ok(())
    };
    let host = server::start(serve)?;
    let options = |common: &str| {
        format!(
            "typed_extension_protocol_options: {{envoy.extensions.upstreams.http.v3.HttpProtocolOptions: {{\"@type\": \
             type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, common_http_protocol_options: \
             {{{common}}}, explicit_http_config: {{http_protocol_options: {{}}}}}}}}"
        )
    };
    let clusters = [
        ("none", options("")),
        ("few", options("max_headers_count: 10")),
        ("many", options("max_headers_count: 300")),
        ("small", options("max_response_headers_kb: 4")),
        ("large", options("max_response_headers_kb: 200")),
    ];
    let outcomes = |kind: Kind| -> Result<Vec<String>> {
        let web = free_port()?;
        let routes: Vec<String> = clusters
            .iter()
            .map(|(name, _)| format!("{{match: {{prefix: /{name}/}}, route: {{cluster: {name}, prefix_rewrite: /}}}}"))
            .collect();
        let hosts = format!("- {{name: all, domains: ['*'], routes: [{}]}}", routes.join(", "));
        let bootstrap = clusters.iter().fold(Bootstrap::new().http(web, &hosts, &[]), |bootstrap, (name, fields)| {
            bootstrap.cluster(name, &[host], &[fields])
        });
        let _daemon = Daemon::start(kind, &bootstrap.yaml())?;
        let mut outcomes = Vec::new();
        for (name, _) in &clusters {
            for path in ["5", "8", "12", "90", "150", "320", "0/4000", "0/8000", "0/72000", "0/120000", "0/300000"] {
                let answer = fetch(web, Request::get(&format!("/{name}/{path}")))?;
                outcomes.push(format!("{name}/{path}: {} {:?}", answer.status, answer.text()));
            }
        }
        Ok(outcomes)
    };
    let (theirs, ours) = (outcomes(Kind::Envoy)?, outcomes(Kind::Culvert)?);
    let different: Vec<_> = theirs.iter().zip(&ours).filter(|(theirs, ours)| theirs != ours).collect();
    ensure!(different.is_empty(), "Envoy and culvertd: {different:#?}");
    Ok(())
}

const HTTP2: &str = "typed_extension_protocol_options: {envoy.extensions.upstreams.http.v3.HttpProtocolOptions: {\"@type\": \
                     type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, explicit_http_config: \
                     {http2_protocol_options: {}}}}";

#[test]
fn what_a_host_says_before_it_closes_is_heard() -> Result<()> {
    const TRIES: u64 = 40;
    let mut seen = Vec::new();
    for kind in KINDS {
        // They speak HTTP/1.1 where HTTP/2 is meant: one answers what it takes for a head, and has the rest unread when it closes; one does
        // not even wait for a head; and one says nothing.
        let answers = server::start(|mut stream| {
            let (mut head, mut byte) = (Vec::new(), [0]);
            while !head.ends_with(b"\r\n\r\n") {
                stream.read_exact(&mut byte)?;
                head.extend(byte);
            }
            Ok(stream.write_all(ANSWER)?)
        })?;
        let refuses = server::start(|mut stream| Ok(stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")?))?;
        let closes = server::start(|_| Ok(()))?;
        let web = free_port()?;
        let hosts = [("answers", answers), ("refuses", refuses), ("closes", closes)];
        let routes = hosts.map(|(name, _)| format!("{{match: {{prefix: /{name}}}, route: {{cluster: {name}}}}}"));
        let all = format!("- {{name: all, domains: ['*'], routes: [{}]}}", routes.join(", "));
        let bootstrap = Bootstrap::new().http(web, &all, &[]);
        let bootstrap =
            hosts.iter().fold(bootstrap, |bootstrap, (name, port)| bootstrap.cluster(name, &[*port], &[HTTP2]));
        let daemon = Daemon::start(kind, &bootstrap.yaml())?;
        let mut outcomes = Vec::new();
        for (name, _) in hosts {
            let mut answers = std::collections::BTreeMap::new();
            for _ in 0..TRIES {
                let response = fetch(web, Request::get(&format!("/{name}")))?;
                *answers.entry(format!("{} {}", response.status, response.text())).or_insert(0) += 1;
            }
            let stats = wait_until(DEADLINE, "the end of the connections", || {
                let stats = daemon.stats()?;
                ensure!(stats.get(&format!("cluster.{name}.upstream_cx_active")) == 0, "{kind:?}");
                Ok(stats)
            })?;
            let counted = ["destroy_local", "destroy_remote", "destroy_local_with_active_rq", "protocol_error"]
                .map(|end| format!("{end} {}", stats.get(&format!("cluster.{name}.upstream_cx_{end}"))));
            outcomes.push(format!("{name}: {answers:?} {counted:?}"));
        }
        seen.push(outcomes);
    }
    assert_eq!(seen[1], seen[0], "Envoy's are on the right");
    Ok(())
}

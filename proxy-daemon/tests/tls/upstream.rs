//! Clusters: whom they trust, what they show, and what is spoken.

use super::*;

/// A TLS server that answers every HTTP/1 request with the protocol and the name that it was asked for, and echoes what
/// else it gets; by its handshake count.
async fn https_server(issued: &Issued, clients: Option<&Authority>, alpn: &[&str]) -> (SocketAddr, Arc<AtomicUsize>) {
    let (chain, key) = der(issued);
    let builder = ServerConfig::builder_with_provider(Arc::clone(provider()));
    let builder = builder.with_safe_default_protocol_versions().unwrap();
    let verifier = match clients {
        None => WebPkiClientVerifier::no_client_auth(),
        Some(authority) => {
            WebPkiClientVerifier::builder_with_provider(roots(authority), Arc::clone(provider())).build().unwrap()
        }
    };
    let mut config = builder.with_client_cert_verifier(verifier).with_single_cert(chain, key).unwrap();
    config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let handshakes = Arc::new(AtomicUsize::new(0));
    let counting = Arc::clone(&handshakes);
    tokio::task::spawn_local(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (acceptor, counting) = (acceptor.clone(), Arc::clone(&counting));
            tokio::task::spawn_local(async move {
                let Ok(stream) = acceptor.accept(stream).await else { return };
                counting.fetch_add(1, Ordering::Relaxed);
                let session = stream.get_ref().1;
                let text = format!(
                    "{} {}",
                    session.alpn_protocol().map_or("-".into(), String::from_utf8_lossy),
                    session.server_name().unwrap_or("-")
                );
                let service = hyper::service::service_fn(move |_| {
                    let text = text.clone();
                    async move {
                        Ok::<_, std::convert::Infallible>(hyper::Response::new(http_body_util::Full::new(
                            bytes::Bytes::from(text),
                        )))
                    }
                });
                let io = hyper_util::rt::TokioIo::new(stream);
                let http2 = io.inner().get_ref().1.alpn_protocol() == Some(b"h2");
                if http2 {
                    let executor = crate::executor::LocalExecutor;
                    drop(hyper::server::conn::http2::Builder::new(executor).serve_connection(io, service).await);
                } else {
                    drop(hyper::server::conn::http1::Builder::new().serve_connection(io, service).await);
                }
            });
        }
    });
    (address, handshakes)
}

async fn fetch(address: SocketAddr) -> support::Response {
    tokio::task::spawn_blocking(move || support::get(address, "/", &[])).await.unwrap()
}

fn plain_chain() -> String {
    format!("{{ {} }}", http_filters("plain", "route: { cluster: up }"))
}

#[test]
fn hosts_are_verified_and_see_our_certificate() {
    run(async {
        let authority = Authority::new("ca");
        let own = authority.issue(&[], &["spiffe://td/proxy"]);
        let server = authority.issue(&["host.test"], &["spiffe://td/server"]);
        let (address, handshakes) = https_server(&server, Some(&authority), &["h2", "http/1.1"]).await;
        let context = |more: &str| {
            format!(
                "{more} common_tls_context: {{ tls_certificates: [{}], validation_context: {{ trusted_ca: {{ inline_string: {} }}, \
                 match_typed_subject_alt_names: [{{ san_type: URI, matcher: {{ prefix: 'spiffe://td/' }} }}] }} }}",
                certificate(&own),
                yaml(&authority.pem)
            )
        };
        let (plane, addresses) =
            start(&bootstrap("up1", &[plain_chain()], &[cluster(address, &context("sni: a.test,"), "")])).await;
        assert_eq!(fetch(addresses[0]).await.body, "http/1.1 a.test");
        assert_eq!(fetch(addresses[0]).await.body, "http/1.1 a.test");
        assert_eq!(handshakes.load(Ordering::Relaxed), 1, "the connection is pooled");
        assert_eq!(count("cluster.up.ssl.handshake"), 1);
        plane.stop();
        // What the host's certificate must be for is the name that is sent.
        for (name, status) in [("auto_host_sni: true,", 200), ("sni: other.test,", 503)] {
            let context = context(&format!("{name} auto_sni_san_validation: true,"));
            let (plane, addresses) =
                start(&bootstrap("up2", &[plain_chain()], &[cluster(address, &context, "")])).await;
            assert_eq!(fetch(addresses[0]).await.status, status, "{name}");
            if status == 503 {
                counted("cluster.up.ssl.fail_verify_san", 1).await;
                assert_eq!(count("cluster.up.upstream_cx_connect_fail"), 1);
            }
            plane.stop();
        }
    });
}

#[test]
fn the_handshake_with_a_host_is_logged() {
    run(async {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let (authority, stranger) = (Authority::new("ca"), Authority::new("other"));
        let server = authority.issue(&["host.test"], &["spiffe://td/server"]);
        let (address, _) = https_server(&server, None, &["http/1.1"]).await;
        let format = "%UPSTREAM_LOCAL_ADDRESS_WITHOUT_PORT%|%UPSTREAM_TLS_VERSION%|%UPSTREAM_PEER_SUBJECT%|%UPSTREAM_PEER_URI_SAN%|\
                      %UPSTREAM_PEER_DNS_SAN%|%UPSTREAM_TRANSPORT_FAILURE_REASON%\n";
        let log = format!(
            "access_log: [{{ name: f, typed_config: {{ '@type': \
             type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog, path: {}, log_format: {{ text_format_source: {{ \
             inline_string: {} }} }} }} }}]",
            path.display(),
            yaml(format)
        );
        for (index, trusted) in [&authority, &stranger].into_iter().enumerate() {
            let chain = plain_chain().replace("stat_prefix: plain,", &format!("stat_prefix: plain, {log},"));
            let context = format!(
                "common_tls_context: {{ validation_context: {{ trusted_ca: {{ inline_string: {} }} }} }}",
                yaml(&trusted.pem)
            );
            let (plane, addresses) = start(&bootstrap("logged", &[chain], &[cluster(address, &context, "")])).await;
            fetch(addresses[0]).await;
            let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
            while std::fs::read_to_string(&path).unwrap_or_default().lines().count() <= index {
                assert!(tokio::time::Instant::now() < deadline, "no line {index} in the access log");
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            plane.stop();
        }
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "127.0.0.1|TLSv1.2|O=Org\\, Inc,CN=host.test|spiffe://td/server|host.test|-");
        let reason = lines[1].strip_prefix("-|-|-|-|-|TLS_error:|").expect(lines[1]);
        assert!(reason.ends_with(":TLS_error_end") && reason.len() > 20 && !reason.contains(' '), "{reason}");
    });
}

#[test]
fn a_host_that_cannot_be_trusted_gets_nothing() {
    run(async {
        let (authority, stranger) = (Authority::new("ca"), Authority::new("other"));
        let server = stranger.issue(&["host.test"], &[]);
        let (address, _) = https_server(&server, None, &[]).await;
        let trusting = format!(
            "common_tls_context: {{ validation_context: {{ trusted_ca: {{ inline_string: {} }} }} }}",
            yaml(&authority.pem)
        );
        for (context, status) in [(trusting.as_str(), 503), ("sni: x.test", 200)] {
            let (plane, addresses) = start(&bootstrap("up3", &[plain_chain()], &[cluster(address, context, "")])).await;
            let response = fetch(addresses[0]).await;
            assert_eq!(response.status, status, "without a validation context nothing is verified, as in Envoy");
            if status == 503 {
                assert!(response.body.ends_with("reset reason: remote connection failure"), "{}", response.body);
                // Before the cluster goes: its statistics go with it.
                counted("cluster.up.ssl.fail_verify_error", 1).await;
            }
            plane.stop();
        }
    });
}

#[test]
fn the_host_chooses_the_protocol() {
    run(async {
        let authority = Authority::new("ca");
        let server = authority.issue(&["host.test"], &[]);
        let options = format!(
            "typed_extension_protocol_options: {{ {HTTP_OPTIONS}: {{ '@type': type.googleapis.com/{HTTP_OPTIONS}, auto_config: {{}} }} }},"
        );
        for (offered, chosen) in [(&["h2", "http/1.1"][..], "h2"), (&["http/1.1"], "http/1.1"), (&[], "-")] {
            let (address, handshakes) = https_server(&server, None, offered).await;
            let (plane, addresses) =
                start(&bootstrap("up4", &[plain_chain()], &[cluster(address, "sni: host.test", &options)])).await;
            for _ in 0..3 {
                assert_eq!(fetch(addresses[0]).await.body, format!("{chosen} host.test"));
            }
            assert_eq!(handshakes.load(Ordering::Relaxed), 1, "{chosen}");
            plane.stop();
        }
    });
}

/// A TLS server that sends back what it gets, until it gets no more.
async fn echo_server(issued: &Issued) -> SocketAddr {
    let (chain, key) = der(issued);
    let builder = ServerConfig::builder_with_provider(Arc::clone(provider()));
    let builder = builder.with_safe_default_protocol_versions().unwrap().with_no_client_auth();
    let acceptor = TlsAcceptor::from(Arc::new(builder.with_single_cert(chain, key).unwrap()));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::task::spawn_local(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::task::spawn_local(async move {
                let Ok(stream) = acceptor.accept(stream).await else { return };
                let (mut from, mut to) = tokio::io::split(stream);
                drop(tokio::io::copy(&mut from, &mut to).await);
                drop(to.shutdown().await);
            });
        }
    });
    address
}

#[test]
fn tcp_passes_through_two_tls_connections() {
    run(async {
        let authority = Authority::new("ca");
        let server = authority.issue(&["a.test"], &[]);
        let host = echo_server(&server).await;
        let chain = chain("", &[&server], "", "", &tcp_filters());
        let (plane, addresses) = start(&bootstrap("tcp", &[chain], &[cluster(host, "sni: a.test", "")])).await;
        let stream = connect(addresses[0], "a.test", client_config(&authority, None, &[])).await.unwrap();
        let (mut from, mut to) = tokio::io::split(stream);
        let payload: Vec<u8> = (0..3_000_000_u32).map(|n| (n % 251) as u8).collect();
        let mut received = Vec::new();
        let send = async {
            to.write_all(&payload).await.unwrap();
            to.shutdown().await.unwrap();
        };
        let (_, read) = tokio::join!(send, from.read_to_end(&mut received));
        read.unwrap();
        assert!(received == payload, "{} of {} bytes came back", received.len(), payload.len());
        // A small message does not wait for a larger one.
        let mut stream = connect(addresses[0], "a.test", client_config(&authority, None, &[])).await.unwrap();
        for _ in 0..3 {
            stream.write_all(b"ping").await.unwrap();
            let mut pong = [0; 4];
            stream.read_exact(&mut pong).await.unwrap();
            assert_eq!(&pong, b"ping");
        }
        plane.stop();
    });
}

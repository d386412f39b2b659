//! Listeners: protocols, names, and the certificates of clients.

use super::*;

#[test]
fn alpn_chooses_the_codec() {
    run(async {
        let authority = Authority::new("ca");
        let server = authority.issue(&["a.test"], &[]);
        let text =
            bootstrap("alpn", &[chain("", &[&server], "alpn_protocols: [h2, http/1.1]", "", &says("hello"))], &[]);
        let (plane, addresses) = start(&text).await;
        // Who offers nothing that is known here has no protocol, and an answer.
        for (offered, chosen) in [(vec![], None), (vec!["http/1.1"], Some("http/1.1")), (vec!["x"], None)] {
            let mut stream = connect(addresses[0], "a.test", client_config(&authority, None, &offered)).await.unwrap();
            assert_eq!(stream.get_ref().1.alpn_protocol(), chosen.map(str::as_bytes));
            assert!(ask(&mut stream, GET).await.unwrap().ends_with("hello"));
        }
        let stream = connect(addresses[0], "a.test", client_config(&authority, None, &["h2"])).await.unwrap();
        let io = hyper_util::rt::TokioIo::new(stream);
        let executor = crate::executor::LocalExecutor;
        let (mut sender, driver) = hyper::client::conn::http2::handshake(executor, io).await.unwrap();
        tokio::task::spawn_local(driver);
        let request =
            hyper::Request::get("https://a.test/").body(http_body_util::Empty::<bytes::Bytes>::new()).unwrap();
        assert_eq!(sender.send_request(request).await.unwrap().status(), 200);
        assert_eq!(count("listener.alpn.ssl.handshake"), 4);
        assert_eq!(count("listener.alpn.ssl.no_certificate"), 4);
        assert_eq!(count("listener.alpn.ssl.versions.TLSv1.3"), 4);
        assert_eq!(count("http.tls.downstream_cx_ssl_total"), 4);
        plane.stop();
    });
}

#[test]
fn clients_show_certificates_with_the_right_name() {
    run(async {
        let (authority, stranger) = (Authority::new("ca"), Authority::new("other"));
        let server = authority.issue(&["a.test"], &[]);
        let validation = format!(
            "validation_context: {{ trusted_ca: {{ inline_string: {} }}, match_typed_subject_alt_names: [{{ san_type: URI, matcher: {{ exact: \
             'spiffe://td/client' }} }}] }}",
            yaml(&authority.pem)
        );
        let chain = chain("", &[&server], &validation, "require_client_certificate: true,", &says("hello"));
        let (plane, addresses) = start(&bootstrap("mtls", &[chain], &[])).await;
        let attempt = async |own: Option<&Issued>| {
            let mut stream = connect(addresses[0], "a.test", client_config(&authority, own, &[])).await?;
            ask(&mut stream, GET).await
        };
        let right = authority.issue(&[], &["spiffe://td/client"]);
        assert!(attempt(Some(&right)).await.unwrap().ends_with("hello"));
        let wrong_name = authority.issue(&[], &["spiffe://td/other"]);
        assert!(attempt(Some(&wrong_name)).await.is_err());
        counted("listener.mtls.ssl.fail_verify_san", 1).await;
        let wrong_issuer = stranger.issue(&[], &["spiffe://td/client"]);
        assert!(attempt(Some(&wrong_issuer)).await.is_err());
        counted("listener.mtls.ssl.fail_verify_error", 1).await;
        assert!(attempt(None).await.is_err());
        counted("listener.mtls.ssl.fail_verify_no_cert", 1).await;
        let mut garbage = TcpStream::connect(addresses[0]).await.unwrap();
        garbage.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        counted("listener.mtls.ssl.connection_error", 1).await;
        assert_eq!(count("listener.mtls.ssl.handshake"), 1);
        plane.stop();
    });
}

#[test]
fn the_server_name_chooses_the_chain_and_the_certificate() {
    run(async {
        let authority = Authority::new("ca");
        let (a, b, wild) = (
            authority.issue(&["a.test"], &[]),
            authority.issue(&["b.test"], &[]),
            authority.issue(&["*.wild.test"], &[]),
        );
        let chains = [
            chain("server_names: [A.test, b.test]", &[&a, &b], "", "", &says("named")),
            chain("server_names: ['*.wild.test']", &[&wild], "", "", &says("wild")),
            format!("{{ filter_chain_match: {{ transport_protocol: raw_buffer }}, {} }}", says("plain")),
        ];
        let (plane, addresses) = start(&bootstrap("sni", &chains, &[])).await;
        for (name, expected) in [("a.test", "named"), ("b.test", "named"), ("x.wild.test", "wild")] {
            let mut stream = connect(addresses[0], name, client_config(&authority, None, &[])).await.unwrap();
            assert!(ask(&mut stream, GET).await.unwrap().ends_with(expected), "{name}");
        }
        assert!(connect(addresses[0], "nobody.test", client_config(&authority, None, &[])).await.is_err());
        counted("listener.sni.no_filter_chain_match", 1).await;
        let plain = tokio::task::spawn_blocking({
            let address = addresses[0];
            move || support::get(address, "/", &[])
        });
        assert_eq!(plain.await.unwrap().body, "plain");
        plane.stop();
    });
}

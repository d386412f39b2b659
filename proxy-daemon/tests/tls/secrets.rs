//! Secrets that change, tickets and resumption.

use super::*;

fn secret(text: &str) -> culvert_proxy_daemon::config::model::Secret {
    let message: ProtoSecret = json::from_yaml(text).unwrap();
    parse::secret(&message, "").unwrap()
}

#[test]
fn a_changed_secret_is_used_by_the_next_handshake() {
    run(async {
        let (old, new) = (Authority::new("old"), Authority::new("new"));
        let named = |authority: &Authority| {
            format!("name: s\ntls_certificate: {}", certificate(&authority.issue(&["a.test"], &[])))
        };
        let chain = format!(
            "{{ transport_socket: {{ name: tls, typed_config: {{ '@type': {DOWNSTREAM}, common_tls_context: {{ \
             tls_certificate_sds_secret_configs: [{{ name: s }}] }} }} }}, {} }}",
            says("hello")
        );
        let text = bootstrap("sds", &[chain], &[]);
        let first = format!(
            "{}, secrets: [{{ name: s, tls_certificate: {} }}] }}",
            text.strip_suffix(" }").unwrap(),
            certificate(&old.issue(&["a.test"], &[]))
        );
        let (plane, addresses) = start(&first).await;
        let mut before = connect(addresses[0], "a.test", client_config(&old, None, &[])).await.unwrap();
        assert!(connect(addresses[0], "a.test", client_config(&new, None, &[])).await.is_err());
        let name = culvert_proxy_daemon::config::model::SecretName { source: None, name: "s".into() };
        plane.secrets().set(name.clone(), secret(&named(&new)));
        let mut after = connect(addresses[0], "a.test", client_config(&new, None, &[])).await.unwrap();
        assert!(connect(addresses[0], "a.test", client_config(&old, None, &[])).await.is_err());
        for stream in [&mut before, &mut after] {
            assert!(ask(stream, GET).await.unwrap().ends_with("hello"), "connections in force stay");
        }
        assert_eq!(count("listener.sds.server_ssl_socket_factory.ssl_context_update_by_sds"), 1);
        // One that is gone leaves the context as it is.
        plane.secrets().remove(&name);
        assert!(connect(addresses[0], "a.test", client_config(&new, None, &[])).await.is_ok());
        plane.stop();
    });
}

/// What the second connection of a client to the listener of each of these contexts came to, the first having been to the
/// first of them. `versions`: what the client speaks.
async fn resumed(
    name: &str,
    versions: &[&'static rustls::SupportedProtocolVersion],
    contexts: &[&str],
    secrets: &str,
) -> Vec<bool> {
    let authority = Authority::new("ca");
    let server = authority.issue(&["a.test"], &[]);
    let builder = ClientConfig::builder_with_provider(Arc::clone(provider()));
    let builder = builder.with_protocol_versions(versions).unwrap().with_root_certificates(roots(&authority));
    let config = Arc::new(builder.with_no_client_auth());
    let mut outcomes = Vec::new();
    for context in contexts {
        let chain = chain("", &[&server], "", context, &says("hello"));
        let text = bootstrap(name, &[chain], &[]);
        let text = format!("{}, secrets: [{secrets}] }}", text.strip_suffix(" }").unwrap());
        // Each is a process of its own, as far as tickets are concerned.
        let (plane, addresses) = start(&text).await;
        let mut stream = connect(addresses[0], "a.test", Arc::clone(&config)).await.unwrap();
        // The tickets of TLS 1.3 come with the answer.
        assert!(ask(&mut stream, GET).await.unwrap().ends_with("hello"));
        outcomes.push(stream.get_ref().1.handshake_kind() == Some(rustls::HandshakeKind::Resumed));
        plane.stop();
    }
    outcomes
}

fn ticket_keys(seeds: &[u8]) -> String {
    let keys: Vec<_> = seeds
        .iter()
        .map(|seed| format!("{{ inline_string: {} }}", yaml(&char::from(*seed).to_string().repeat(80))))
        .collect();
    format!("session_ticket_keys: {{ keys: [{}] }}", keys.join(", "))
}

#[test]
fn sessions_survive_a_restart_by_their_ticket_keys() {
    run(async {
        let (old, both, new) = (ticket_keys(b"A"), ticket_keys(b"BA"), ticket_keys(b"B"));
        let (old, both, new) = (format!("{old},"), format!("{both},"), format!("{new},"));
        for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
            // The same key; rotated: the old one still opens; the new one has sealed; the old one is gone.
            let outcome = resumed("keys", &[version], &[&old, &old, &both, &new, &old], "").await;
            assert_eq!(outcome, [false, true, true, true, false], "{version:?}");
            let without = resumed("own", &[version], &["", ""], "").await;
            assert_eq!(without, [false, false], "every process has its own keys");
        }
        // What lets clients in differs: a session of the one is none of the other.
        let other = format!("{old} require_client_certificate: false,");
        assert_eq!(resumed("same", &[&rustls::version::TLS13], &[&old, &other], "").await, [false, true]);
        let secrets = format!("{{ name: t, {} }}", ticket_keys(b"A"));
        let by_name = "session_ticket_keys_sds_secret_config: { name: t },";
        assert_eq!(resumed("named", &[&rustls::version::TLS13], &[by_name, &old], &secrets).await, [false, true]);
    });
}

/// Two connections of one client to one listener; whether the second took up the session of the first.
async fn resumed_at(
    address: SocketAddr,
    authority: &Authority,
    version: &'static rustls::SupportedProtocolVersion,
    pause: Duration,
) -> bool {
    let builder = ClientConfig::builder_with_provider(Arc::clone(provider()));
    let builder = builder.with_protocol_versions(&[version]).unwrap().with_root_certificates(roots(authority));
    let config = Arc::new(builder.with_no_client_auth());
    let mut kind = None;
    for wait in [Duration::ZERO, pause] {
        // A session's age is what is tested: nothing but time makes it.
        tokio::time::sleep(wait).await;
        let mut stream = connect(address, "a.test", Arc::clone(&config)).await.unwrap();
        assert!(ask(&mut stream, GET).await.unwrap().ends_with("hello"));
        kind = stream.get_ref().1.handshake_kind();
    }
    kind == Some(rustls::HandshakeKind::Resumed)
}

#[test]
fn resumption_is_switched_off_and_ends_with_its_time() {
    run(async {
        let authority = Authority::new("ca");
        let server = authority.issue(&["a.test"], &[]);
        let (no_ids, no_tickets) =
            ("disable_stateful_session_resumption: true,", "disable_stateless_session_resumption: true,");
        let neither = format!("{no_ids} {no_tickets}");
        let keyed = format!("session_timeout: 1s, {},", ticket_keys(b"A"));
        let late = Duration::from_millis(2100);
        for (context, pause, tls12, tls13) in [
            ("", Duration::ZERO, true, true),
            (no_ids, Duration::ZERO, true, true),
            (no_tickets, Duration::ZERO, true, false),
            (neither.as_str(), Duration::ZERO, false, false),
            ("session_timeout: 60s,", Duration::ZERO, true, true),
            ("session_timeout: 1s,", late, false, false),
            ("session_timeout: 1s, disable_stateless_session_resumption: true,", late, false, false),
            (keyed.as_str(), late, false, false),
        ] {
            let chain = chain("", &[&server], "", context, &says("hello"));
            let (plane, addresses) = start(&bootstrap("switched", &[chain], &[])).await;
            for (version, expected) in [(&rustls::version::TLS12, tls12), (&rustls::version::TLS13, tls13)] {
                let outcome = resumed_at(addresses[0], &authority, version, pause).await;
                assert_eq!(outcome, expected, "{context:?} {version:?}");
            }
            plane.stop();
        }
    });
}

#[test]
fn ticket_keys_of_sds_are_waited_for_and_rotate() {
    run(async {
        let authority = Authority::new("ca");
        let server = authority.issue(&["a.test"], &[]);
        let ads = "{ name: t, sds_config: { ads: {}, resource_api_version: V3 } }";
        let context = format!("session_ticket_keys_sds_secret_config: {ads},");
        let text = bootstrap("tickets", &[chain("", &[&server], "", &context, &says("hello"))], &[]);
        let text = format!(
            "node: {{ id: node, cluster: c }}, dynamic_resources: {{ ads_config: {{ api_type: GRPC, transport_api_version: V3, \
             grpc_services: [{{ envoy_grpc: {{ cluster_name: up }} }}] }} }}, {text}"
        );
        let text = format!("{{ {} }}", text.replace("clusters: []", &format!("clusters: [{}]", PLAIN_CLUSTER)));
        let (plane, addresses) = start(&text).await;
        let config = client_config(&authority, None, &[]);
        assert!(connect(addresses[0], "a.test", Arc::clone(&config)).await.is_err(), "the keys are missing");
        let name = culvert_proxy_daemon::config::model::SecretName {
            source: Some(Arc::new(culvert_xds_client::source::Source::Ads)),
            name: "t".into(),
        };
        let rotate =
            |seeds: &[u8]| plane.secrets().set(name.clone(), secret(&format!("{{ name: t, {} }}", ticket_keys(seeds))));
        for (keys, expected) in [(&b"A"[..], false), (b"BA", true), (b"B", true), (b"C", false)] {
            rotate(keys);
            let mut stream = connect(addresses[0], "a.test", Arc::clone(&config)).await.unwrap();
            assert!(ask(&mut stream, GET).await.unwrap().ends_with("hello"));
            let resumed = stream.get_ref().1.handshake_kind() == Some(rustls::HandshakeKind::Resumed);
            assert_eq!(resumed, expected, "{keys:?}");
        }
        plane.stop();
    });
}

const PLAIN_CLUSTER: &str = "{ name: up, type: STATIC, http2_protocol_options: {}, load_assignment: { cluster_name: up, endpoints: [{ \
    lb_endpoints: [{ endpoint: { address: { socket_address: { address: 127.0.0.1, port_value: 1 } } } }] }] } }";

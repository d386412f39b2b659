use http::Request;

use super::*;

fn request(uri: &str, headers: &[(&str, &str)]) -> RequestHead {
    let mut builder = Request::builder().uri(uri);
    for (name, value) in headers {
        builder = builder.header(*name, *value);
    }
    builder.body(()).unwrap().into_parts().0
}

fn prepare(head: &mut RequestHead, config: &HttpConnectionManagerConfig, peer: &str) -> Trusted {
    prepare_request(head, config, peer.parse().unwrap(), "10.9.9.9".parse().unwrap(), None).unwrap()
}

#[test]
fn an_edge_request_is_sanitised() {
    let config = HttpConnectionManagerConfig { use_remote_address: true, ..HttpConnectionManagerConfig::default() };
    let mut head = request(
        "/",
        &[
            ("host", "a"),
            ("x-forwarded-for", "1.2.3.4"),
            ("x-request-id", "theirs"),
            ("x-envoy-retry-on", "5xx"),
            ("x-envoy-internal", "true"),
            ("x-envoy-downstream-service-cluster", "forged"),
        ],
    );
    let trusted = prepare(&mut head, &config, "192.0.2.7:5000");
    assert!(!trusted.internal);
    assert_eq!(head.headers["x-forwarded-for"], "1.2.3.4,192.0.2.7");
    assert_eq!(head.headers["x-envoy-external-address"], "192.0.2.7");
    assert_eq!(head.headers["x-forwarded-proto"], "http");
    assert_ne!(head.headers["x-request-id"], "theirs");
    for gone in ["x-envoy-retry-on", "x-envoy-internal", "x-envoy-downstream-service-cluster"] {
        assert!(!head.headers.contains_key(gone), "{gone}");
    }
}

#[test]
fn a_loopback_client_is_written_as_the_node() {
    let config = HttpConnectionManagerConfig { use_remote_address: true, ..HttpConnectionManagerConfig::default() };
    let mut head = request("/", &[("host", "a")]);
    prepare(&mut head, &config, "127.0.0.1:5000");
    assert_eq!(head.headers["x-forwarded-for"], "10.9.9.9");
}

#[test]
fn without_remote_address_the_header_is_trusted_and_left_alone() {
    let mut head = request("/", &[("host", "a"), ("x-forwarded-for", "1.2.3.4, 5.6.7.8"), ("x-request-id", "theirs")]);
    let trusted = prepare(&mut head, &HttpConnectionManagerConfig::default(), "192.0.2.7:5000");
    assert_eq!(trusted.remote.ip(), "5.6.7.8".parse::<IpAddr>().unwrap());
    assert_eq!(head.headers["x-forwarded-for"], "1.2.3.4, 5.6.7.8");
    assert_eq!(head.headers["x-request-id"], "theirs");
}

#[test]
fn bytes_that_are_no_text_do_not_hide_what_proxies_say() {
    let config = HttpConnectionManagerConfig {
        use_remote_address: true,
        xff_num_trusted_hops: 1,
        ..HttpConnectionManagerConfig::default()
    };
    let mut head = request("/", &[("host", "a")]);
    head.headers.insert("x-forwarded-for", HeaderValue::from_bytes(b"\xff, 203.0.113.9").unwrap());
    let trusted = prepare(&mut head, &config, "10.0.0.1:5000");
    assert_eq!(trusted.remote.ip(), "203.0.113.9".parse::<IpAddr>().unwrap());
}

#[test]
fn internal_is_one_address_in_a_configured_range() {
    let config = HttpConnectionManagerConfig {
        use_remote_address: true,
        internal_ranges: vec!["10.0.0.0/8".parse().unwrap()],
        ..HttpConnectionManagerConfig::default()
    };
    let mut head = request("/", &[("host", "a"), ("x-envoy-retry-on", "5xx")]);
    assert!(prepare(&mut head, &config, "10.1.2.3:1").internal);
    assert_eq!(head.headers["x-envoy-internal"], "true");
    assert_eq!(head.headers["x-envoy-retry-on"], "5xx");
    let mut head = request("/", &[("host", "a"), ("x-forwarded-for", "10.1.1.1")]);
    assert!(!prepare(&mut head, &config, "10.1.2.3:1").internal, "two addresses");
}

#[test]
fn what_is_no_address_is_not_internal() {
    let config = HttpConnectionManagerConfig {
        internal_ranges: vec!["10.0.0.0/8".parse().unwrap()],
        ..HttpConnectionManagerConfig::default()
    };
    for (forwarded, internal) in [("10.1.1.1", true), ("nonsense", false), ("10.1.1.1,10.1.1.2", false), ("", false)] {
        let mut head = request("/", &[("host", "a"), ("x-forwarded-for", forwarded)]);
        assert_eq!(prepare(&mut head, &config, "10.1.2.3:1").internal, internal, "{forwarded}");
    }
    let config = HttpConnectionManagerConfig { xff_num_trusted_hops: 1, ..config };
    let mut head = request("/", &[("host", "a"), ("x-forwarded-for", "10.1.1.1")]);
    assert!(!prepare(&mut head, &config, "10.1.2.3:1").internal, "the hop is not there");
}

#[test]
fn lines_of_forwarded_addresses_are_joined() {
    let config = HttpConnectionManagerConfig { use_remote_address: true, ..HttpConnectionManagerConfig::default() };
    let mut head = request("/", &[("host", "a"), ("x-forwarded-for", "1.1.1.1"), ("x-forwarded-for", "2.2.2.2")]);
    prepare(&mut head, &config, "192.0.2.7:5000");
    let lines: Vec<_> = head.headers.get_all("x-forwarded-for").iter().collect();
    assert_eq!(lines, ["1.1.1.1,2.2.2.2,192.0.2.7"]);
}

#[test]
fn kept_ids_are_not_traced() {
    let config = |pack_trace_reason| HttpConnectionManagerConfig {
        use_remote_address: true,
        preserve_external_request_id: true,
        pack_trace_reason,
        ..HttpConnectionManagerConfig::default()
    };
    for (pack, id, expected) in [
        (true, "12345678-1234-a234-8234-123456789012", "12345678-1234-4234-8234-123456789012"),
        (false, "12345678-1234-a234-8234-123456789012", "12345678-1234-a234-8234-123456789012"),
        (true, "short", "short"),
    ] {
        let mut head = request("/", &[("host", "a"), ("x-request-id", id)]);
        prepare(&mut head, &config(pack), "192.0.2.7:5000");
        assert_eq!(head.headers["x-request-id"], expected);
    }
}

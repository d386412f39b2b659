use http::Request;

use super::*;

fn config() -> HttpConnectionManagerConfig {
    HttpConnectionManagerConfig::default()
}

fn request(uri: &str, headers: &[(&str, &str)]) -> RequestHead {
    let mut builder = Request::builder().uri(uri);
    for (name, value) in headers {
        builder = builder.header(*name, *value);
    }
    builder.body(()).unwrap().into_parts().0
}

#[test]
fn hop_by_hop_headers_go_and_trust_headers_cannot_be_nominated() {
    let mut head = request(
        "/",
        &[
            ("connection", "close, x-drop-me, x-forwarded-for"),
            ("x-drop-me", "1"),
            ("x-forwarded-for", "1.2.3.4"),
            ("keep-alive", "1"),
            ("proxy-connection", "keep-alive"),
            ("transfer-encoding", "chunked"),
            ("te", "gzip"),
            ("upgrade", "h2c"),
        ],
    );
    strip_hop_by_hop(&mut head.headers);
    let left: Vec<_> = head.headers.keys().map(HeaderName::as_str).collect();
    assert_eq!(left, ["x-forwarded-for"]);
    let two_lines = [("connection", "keep-alive"), ("connection", "X-One, X-Envoy-Attempt-Count"), ("x-one", "1")];
    let mut head = request("/", &[&two_lines[..], &[("x-envoy-attempt-count", "1")]].concat());
    strip_hop_by_hop(&mut head.headers);
    let left: Vec<_> = head.headers.keys().map(HeaderName::as_str).collect();
    assert_eq!(left, ["x-envoy-attempt-count"], "of each line, in whatever case");
    let mut head = request("/", &[("te", "trailers")]);
    strip_hop_by_hop(&mut head.headers);
    assert!(head.headers.contains_key("te"), "gRPC needs it");
    let mut head = request("/", &[("connection", "te"), ("te", "gzip, Trailers")]);
    strip_hop_by_hop(&mut head.headers);
    assert_eq!(head.headers["te"], "trailers");
}

#[test]
fn what_trust_rests_on_may_not_be_nominated() {
    let refused = |value: &str| nominates_too_much(&request("/", &[("connection", value)]).headers);
    assert!(["x-forwarded-for", "close, X-Forwarded-Host", "a,x-forwarded-proto", ":path"].into_iter().all(refused));
    assert!(!refused("close, x-forwarded-port, cookie") && !refused("a,b,c,d,e,f,g,h,i,j"));
    assert!(refused("a,b,c,d,e,f,g,h,i,j,k"));
}

#[test]
fn paths_are_normalised_as_configured() {
    let config = HttpConnectionManagerConfig { normalize_path: true, merge_slashes: true, ..config() };
    for (path, expected) in [
        ("/a/../b", "/b"),
        ("/a/./b/", "/a/b/"),
        ("/../../etc", "/etc"),
        ("/a/%2E%2e/b?x=/../y", "/b?x=/../y"),
        ("//a///b", "/a/b"),
        ("/a/..", "/"),
        ("/%61/%7Eb/%2f", "/a/~b/%2f"),
        ("/a%zz/%", "/a%zz/%"),
        ("/x//../b", "/x/b"),
        ("/a/b", "/a/b"),
    ] {
        let mut head = request(path, &[("host", "a")]);
        normalize(&mut head, &config);
        assert_eq!(head.uri.to_string(), expected, "{path}");
    }
}

#[test]
fn ambiguous_requests_are_refused() {
    let status = |head: &RequestHead| check_request(head, 3, None).map_err(|reply| reply.status.as_u16());
    assert_eq!(status(&request("/", &[("host", "a")])), Ok(()));
    assert_eq!(status(&request("/", &[])), Err(400));
    let many = [("host", "a"), ("a", "1"), ("b", "2"), ("c", "3")];
    assert_eq!(status(&request("/", &many)), Err(431));
    let asks = |fields: &[(&'static str, &'static str)]| wants_upgrade(&request("/", fields).headers);
    assert!(asks(&[("connection", "keep-alive, Upgrade"), ("upgrade", "websocket")]));
    assert!(!asks(&[("upgrade", "websocket")]), "it is not for this connection");
    assert!(!asks(&[("connection", "Upgrade"), ("upgrade", "h2c")]), "an offer of HTTP/2 is passed over");
    let nominated = [("host", "a"), ("connection", "host")];
    assert_eq!(status(&request("/", &nominated)), Err(400), "it would be removed");
}

#[test]
fn header_values_are_added_as_their_action_says() {
    let add = |action| HeaderAdd {
        name: HeaderName::from_static("x"),
        value: AddedValue::Literal(HeaderValue::from_static("new")),
        keep_empty_value: false,
        action,
    };
    let run = |before: &[(&str, &str)], action| {
        let mut head = request("/", before);
        let mutations = HeaderMutations { request_add: vec![add(action)], ..HeaderMutations::default() };
        mutate_request(&mut head.headers, &mutations, &Record::default());
        head.headers.get_all("x").iter().map(|value| value.to_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    use HeaderAppendAction::*;
    assert_eq!(run(&[("x", "old")], AppendIfExistsOrAdd), ["old", "new"]);
    assert_eq!(run(&[("x", "old")], AddIfAbsent), ["old"]);
    assert_eq!(run(&[], AddIfAbsent), ["new"]);
    assert_eq!(run(&[("x", "old")], OverwriteIfExistsOrAdd), ["new"]);
    assert_eq!(run(&[], OverwriteIfExists), Vec::<String>::new());
}

#[test]
fn grpc_is_told_by_its_content_type() {
    for (value, expected) in [
        ("application/grpc", true),
        ("application/grpc+proto", true),
        ("application/grpc; charset=utf-8", false),
        ("application/grpc-web", false),
        ("application/json", false),
    ] {
        assert_eq!(is_grpc(&request("/", &[("content-type", value)]).headers), expected, "{value}");
    }
}

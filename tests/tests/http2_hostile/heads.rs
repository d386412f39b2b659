//! Requests that are malformed as RFC 9113, section 8, has it.

use super::harness::{Case, case, get, post, request};
use super::wire::{block, continued, data, headers};

fn field(name: &'static str, field: (&str, &str)) -> Case {
    request(name, &get(&[field]))
}

/// With one pseudo-header of a GET replaced, or left out.
fn pseudo(name: &'static str, which: &str, value: Option<&str>) -> Case {
    let mut fields = get(&[]);
    match value {
        Some(value) => fields.iter_mut().filter(|field| field.0 == which).for_each(|field| field.1 = value),
        None => fields.retain(|field| field.0 != which),
    }
    request(name, &fields)
}

pub fn pseudo_headers() -> Vec<Case> {
    let after = [(":method", "GET"), (":scheme", "http"), ("x-a", "b"), (":path", "/app"), (":authority", "a")];
    vec![
        request("a plain request", &get(&[("x-a", "b")])),
        pseudo("no method", ":method", None),
        pseudo("no scheme", ":scheme", None),
        pseudo("no path", ":path", None),
        pseudo("no authority", ":authority", None),
        field("two methods", (":method", "GET")),
        field("two schemes", (":scheme", "http")),
        field("two paths", (":path", "/evil")),
        field("two authorities", (":authority", "b")),
        request("a pseudo-header after others", &after),
        field("an unknown pseudo-header", (":evil", "b")),
        field("a response's pseudo-header", (":status", "200")),
        field("a pseudo-header without a name", (":", "b")),
        field("a protocol on a GET", (":protocol", "websocket")),
        pseudo("an empty method", ":method", Some("")),
        pseudo("a method in lower case", ":method", Some("get")),
        pseudo("an unknown method", ":method", Some("FOO")),
        pseudo("a blank in the method", ":method", Some("GET /evil HTTP/1.1")),
        pseudo("a line feed in the method", ":method", Some("GET\n")),
        pseudo("an empty scheme", ":scheme", Some("")),
        pseudo("another scheme", ":scheme", Some("ftp")),
        pseudo("a scheme in capitals", ":scheme", Some("HTTP")),
        pseudo("a scheme of https", ":scheme", Some("https")),
        pseudo("a scheme that is none", ":scheme", Some("http://evil/?")),
        pseudo("an empty path", ":path", Some("")),
        pseudo("a path without a slash", ":path", Some("app")),
        pseudo("a query without a path", ":path", Some("?a=b")),
        pseudo("an asterisk", ":path", Some("*")),
        pseudo("a URL as path", ":path", Some("http://evil/app")),
        pseudo("a fragment", ":path", Some("/app#evil"))
            .own("stream 1: reset PROTOCOL_ERROR; the connection serves", "it is no part of a request's target"),
        pseudo("OPTIONS and an asterisk", ":path", Some("*")).with_method("OPTIONS"),
        request(
            "OPTIONS and a path without a slash",
            &[(":method", "OPTIONS"), (":scheme", "http"), (":path", "app"), (":authority", "a")],
        ),
        pseudo("a blank in the path", ":path", Some("/app HTTP/1.1")),
        pseudo("a line feed in the path", ":path", Some("/app\r\nx: y")),
        pseudo("a NUL in the path", ":path", Some("/a\0b")),
        pseudo("a DEL in the path", ":path", Some("/a\u{7f}b")),
        pseudo("a byte above ASCII in the path", ":path", Some("/a\u{e9}b"))
            .own("stream 1: reset PROTOCOL_ERROR; the connection serves", "no URI has it (RFC 3986)"),
        pseudo("an empty authority", ":authority", Some("")),
        pseudo("a user in the authority", ":authority", Some("user@a")),
        pseudo("a slash in the authority", ":authority", Some("a/b")),
        pseudo("a blank in the authority", ":authority", Some("a b")),
        pseudo("a line feed in the authority", ":authority", Some("a\r\nx: y")),
        pseudo("a list as authority", ":authority", Some("a,b")),
        pseudo("CONNECT with a path", ":method", Some("CONNECT")),
        request("CONNECT", &[(":method", "CONNECT"), (":authority", "a:80")]),
        request("CONNECT without an authority", &[(":method", "CONNECT")]),
        request(
            "CONNECT with a protocol",
            &[
                (":method", "CONNECT"),
                (":protocol", "websocket"),
                (":scheme", "http"),
                (":path", "/app"),
                (":authority", "a"),
            ],
        ),
        field("a host that is the authority", ("host", "a")),
        field("a host that is another", ("host", "evil")),
        request("only a host", &[(":method", "GET"), (":scheme", "http"), (":path", "/app"), ("host", "a")]),
        request(
            "two hosts",
            &[(":method", "GET"), (":scheme", "http"), (":path", "/app"), ("host", "a"), ("host", "b")],
        ),
    ]
}

pub fn fields() -> Vec<Case> {
    vec![
        field("a name in capitals", ("X-A", "b")),
        field("an empty name", ("", "b")),
        field("a blank in a name", ("x a", "b")),
        field("a colon in a name", ("x:a", "b")),
        field("a NUL in a name", ("x\0a", "b")),
        field("a line feed in a name", ("x\r\ny", "b")),
        field("a byte above ASCII in a name", ("x\u{e9}", "b")),
        field("a NUL in a value", ("x", "a\0b")),
        field("a line feed in a value", ("x", "a\nb")),
        field("a carriage return in a value", ("x", "a\rb")),
        field("a whole request in a value", ("x", "a\r\n\r\nGET /evil HTTP/1.1\r\nhost: b")),
        field("a control character in a value", ("x", "a\u{1}b")),
        field("a DEL in a value", ("x", "a\u{7f}b")),
        field("a byte above ASCII in a value", ("x", "a\u{e9}b")),
        field("a blank before a value", ("x", " a")),
        field("a blank after a value", ("x", "a ")),
        field("a tab in a value", ("x", "a\tb")),
        field("connection: close", ("connection", "close")),
        field("connection: a name", ("connection", "x-a")),
        field("keep-alive", ("keep-alive", "timeout=5")),
        field("proxy-connection", ("proxy-connection", "keep-alive")),
        field("transfer-encoding", ("transfer-encoding", "chunked")),
        field("upgrade", ("upgrade", "websocket")),
        field("te: trailers", ("te", "trailers")),
        field("te: gzip", ("te", "gzip")),
        field("te: a list", ("te", "trailers, deflate;q=0.5")),
        field("http2-settings", ("http2-settings", "AAMAAABk")),
        field("expect", ("expect", "100-continue")),
        request("a cookie in crumbs", &get(&[("cookie", "a=b"), ("cookie", "c=d")])),
        request("98 headers", &get(&vec![("x", "a"); 94])),
        request("100 headers", &get(&vec![("x", "a"); 96])),
        request("101 headers", &get(&vec![("x", "a"); 97])).code("INTERNAL_ERROR"),
        case("a large head", &[continued(1, &block(&get(&[("x", &"a".repeat(50_000))])), 16_000)]),
        case("a head that is a bit too large", &[continued(1, &block(&get(&[("x", &"a".repeat(62_000))])), 16_000)])
            .code("INTERNAL_ERROR"),
        case("a head that is too large", &[continued(1, &block(&get(&[("x", &"a".repeat(70_000))])), 16_000)])
            .own("stream 1: 431 end; the connection serves", "it can be said what is wrong"),
    ]
}

pub fn bodies() -> Vec<Case> {
    let with = |name, fields: &[(&str, &str)], body: &str| {
        case(name, &[headers(1, false, &post(fields)), data(1, true, body.as_bytes())])
    };
    let trailers = |name, fields: &[(&str, &str)]| {
        case(name, &[headers(1, false, &post(&[])), data(1, false, b"abc"), headers(1, true, fields)]).alone()
    };
    vec![
        with("a body", &[], "abc"),
        with("a body and its length", &[("content-length", "3")], "abc"),
        with("more than the length", &[("content-length", "2")], "abc"),
        with("less than the length", &[("content-length", "4")], "abc"),
        with("two lengths", &[("content-length", "3"), ("content-length", "4")], "abc"),
        with("the same length twice", &[("content-length", "3"), ("content-length", "3")], "abc"),
        with("a list of lengths", &[("content-length", "3, 3")], "abc"),
        with("a length with a plus", &[("content-length", "+3")], "abc"),
        with("a negative length", &[("content-length", "-3")], "abc"),
        with("an empty length", &[("content-length", "")], "abc"),
        with("a length beyond 64 bits", &[("content-length", "99999999999999999999999")], "abc"),
        with("a length and chunked", &[("content-length", "3"), ("transfer-encoding", "chunked")], "abc"),
        case("a length without a body", &[headers(1, true, &post(&[("content-length", "3")]))]),
        case("a length of 0 without a body", &[headers(1, true, &post(&[("content-length", "0")]))]),
        case(
            "a length that is exceeded later",
            &[headers(1, false, &post(&[("content-length", "4")])), data(1, false, b"abc"), data(1, true, b"abc")],
        ),
        trailers("trailers", &[("x-t", "1")]),
        trailers("a path in trailers", &[(":path", "/evil")]),
        trailers("a status in trailers", &[(":status", "200")]),
        trailers("a name in capitals in trailers", &[("X-T", "1")]),
        trailers("connection in trailers", &[("connection", "close")]),
        trailers("a length in trailers", &[("content-length", "5")])
            .own("stream 1: 400 end; the connection serves", "it can be said what is wrong"),
        trailers("a line feed in trailers", &[("x-t", "a\nb")]),
        trailers("a coding in trailers", &[("transfer-encoding", "chunked")]),
        trailers("an unknown pseudo-header in trailers", &[(":evil", "b")]),
        case(
            "trailers that do not end the stream",
            &[headers(1, false, &post(&[])), data(1, false, b"abc"), headers(1, false, &[("x-t", "1")])],
        ),
        case(
            "data after trailers",
            &[headers(1, false, &post(&[])), headers(1, true, &[("x-t", "1")]), data(1, true, b"abc")],
        )
        .begins_well(),
    ]
}

impl Case {
    /// The request on stream 1 with another method.
    fn with_method(self, method: &str) -> Case {
        let fields = [(":method", method), (":scheme", "http"), (":path", "*"), (":authority", "a")];
        Case { bytes: headers(1, true, &fields), ..self }
    }
}

/// Names with `_`, which some servers take for `-`.
pub fn underscores() -> Vec<Case> {
    vec![
        field("an underscore", ("x_a", "b")).code("INTERNAL_ERROR"),
        field("an underscore in a value", ("x-a", "b_c")),
        request("two underscores", &get(&[("x_a", "b"), ("x_b", "b"), ("x-c", "d")])).code("INTERNAL_ERROR"),
    ]
}

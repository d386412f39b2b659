//! Requests and responses that two parsers could read differently, or that are no HTTP at all, sent as they are to culvertd and to
//! the real Envoy: the same answers, the same words in the access log, the same counters; and where Envoy repairs what it gets,
//! culvertd refuses it. What is refused never reaches a host whole.

use std::io::{BufReader, Write as _};
use std::net::TcpStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};
use culvert_tests::bootstrap::Bootstrap;
use culvert_tests::daemon::{Daemon, Kind, fetch_raw, free_port};
use culvert_tests::http1::{Request, Response};
use culvert_tests::server;
use culvert_tests::wait_until;
use nix::sys::signal::Signal;

/// What is expected of culvertd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Expect {
    /// What Envoy does.
    AsEnvoy,
    /// Envoy repairs it and answers with another status; culvertd answers with this one, and nothing is forwarded.
    Refused(u16),
}

struct Case {
    name: &'static str,
    bytes: Vec<u8>,
    expect: Expect,
}

use Expect::{AsEnvoy, Refused};

fn get(name: &'static str, fields: &str) -> Case {
    Case { name, bytes: latin1(&format!("GET /app HTTP/1.1\r\nhost: a\r\n{fields}\r\n")), expect: AsEnvoy }
}

fn line(name: &'static str, line: &str) -> Case {
    Case { name, bytes: latin1(&format!("{line}\r\nhost: a\r\n\r\n")), expect: AsEnvoy }
}

fn post(name: &'static str, fields: &str, body: &str) -> Case {
    Case { name, bytes: latin1(&format!("POST /app HTTP/1.1\r\nhost: a\r\n{fields}\r\n{body}")), expect: AsEnvoy }
}

fn chunks(name: &'static str, body: &str) -> Case {
    post(name, "transfer-encoding: chunked\r\n", body)
}

fn raw(name: &'static str, bytes: &str) -> Case {
    Case { name, bytes: latin1(bytes), expect: AsEnvoy }
}

fn latin1(text: &str) -> Vec<u8> {
    text.chars().map(|character| u8::try_from(u32::from(character)).unwrap_or(b'?')).collect()
}

impl Case {
    fn refused(mut self, status: u16) -> Case {
        self.expect = Refused(status);
        self
    }

    fn method(&self) -> &str {
        if self.bytes.starts_with(b"HEAD") { "HEAD" } else { "GET" }
    }
}

fn request_lines() -> Vec<Case> {
    vec![
        line("a plain request", "GET /app HTTP/1.1"),
        line("two blanks", "GET  /app HTTP/1.1").refused(400),
        line("a blank at the end", "GET /app HTTP/1.1 ").refused(400),
        line("a blank in front", " GET /app HTTP/1.1"),
        line("tabs", "GET\t/app\tHTTP/1.1").refused(400),
        line("a blank in the path", "GET /a b HTTP/1.1"),
        line("a tab in the path", "GET /a\tb HTTP/1.1"),
        line("a NUL in the path", "GET /a\0b HTTP/1.1"),
        line("a DEL in the path", "GET /a\u{7f} HTTP/1.1"),
        line("a byte above ASCII in the path", "GET /\u{e9} HTTP/1.1"),
        line("no slash", "GET app HTTP/1.1"),
        line("no path", "GET HTTP/1.1"),
        line("an asterisk", "GET * HTTP/1.1"),
        line("OPTIONS *", "OPTIONS * HTTP/1.1"),
        line("an authority", "GET b:80 HTTP/1.1"),
        line("a URL", "GET http://b/app HTTP/1.1"),
        line("a URL of another scheme", "GET ftp://b/app HTTP/1.1"),
        line("a URL without a host", "GET http:///app HTTP/1.1"),
        line("a URL with a user", "GET http://user@b/app HTTP/1.1"),
        line("a URL with a port", "GET http://b:8080/app HTTP/1.1"),
        line("a URL with a port that is none", "GET http://b:x/app HTTP/1.1"),
        line("a URL with an empty port", "GET http://b:/app HTTP/1.1"),
        line("a URL with a port that is too large", "GET http://b:65536/app HTTP/1.1"),
        line("a URL with a port with zeros in front", "GET http://b:080/app HTTP/1.1"),
        line("a URL with a sign before the port", "GET http://b:+80/app HTTP/1.1"),
        line("a URL with two ports", "GET http://b:80:81/app HTTP/1.1"),
        line("a URL with an address", "GET http://[::1]:80/app HTTP/1.1"),
        line("a URL with half an address", "GET http://[::1/app HTTP/1.1"),
        line("a URL with something after the address", "GET http://[::1]b/app HTTP/1.1"),
        line("a URL with a name in brackets", "GET http://[b]/app HTTP/1.1"),
        line("a URL with a list of hosts", "GET http://b,c/app HTTP/1.1"),
        line("a URL with an encoded host", "GET http://b%41/app HTTP/1.1"),
        line("a URL with an underscore in the host", "GET http://b_c/app HTTP/1.1"),
        line("a URL with a port alone", "GET http://:80/app HTTP/1.1"),
        line("a URL with a fragment", "GET http://b/app#x HTTP/1.1"),
        line("a URL without a path", "GET http://b HTTP/1.1"),
        line("a URL with a query alone", "GET http://b?x HTTP/1.1"),
        line("a fragment", "GET /app#x HTTP/1.1"),
        line("two slashes", "GET //b/app HTTP/1.1"),
        line("a backslash", "GET /a\\b HTTP/1.1"),
        line("a vertical tab in the path", "GET /a\u{b}b HTTP/1.1"),
        line("CONNECT with a path", "CONNECT /app HTTP/1.1"),
        line("CONNECT without a port", "CONNECT b HTTP/1.1"),
        line("TRACE", "TRACE /app HTTP/1.1"),
        line("a method with a colon", "GET: /app HTTP/1.1"),
        line("a lower-case method", "get /app HTTP/1.1"),
        line("an unknown method", "FOO /app HTTP/1.1"),
        line("a method with a bracket", "G(T /app HTTP/1.1"),
        line("HTTP/0.9", "GET /app"),
        line("HTTP/1.0", "GET /app HTTP/1.0"),
        line("HTTP/1.2", "GET /app HTTP/1.2"),
        line("HTTP/2.0", "GET /app HTTP/2.0"),
        line("HTTP/1.10", "GET /app HTTP/1.10"),
        line("HTTP/01.1", "GET /app HTTP/01.1"),
        line("http/1.1", "GET /app http/1.1"),
        raw("nonsense", "nonsense\r\n\r\n"),
        raw("another protocol", "\u{16}\u{3}\u{1}\0\u{a5}\u{1}\0\0\u{a1}\u{3}\u{3}"),
        raw("empty lines in front", "\r\n\r\nGET /app HTTP/1.1\r\nhost: a\r\n\r\n"),
        raw("a bare line feed in front", "\nGET /app HTTP/1.1\r\nhost: a\r\n\r\n").refused(400),
        raw("bare line feeds", "GET /app HTTP/1.1\nhost: a\n\n").refused(400),
        raw("one bare line feed", "GET /app HTTP/1.1\r\nhost: a\nx: b\r\n\r\n").refused(400),
        raw("a bare line feed at the end", "GET /app HTTP/1.1\r\nhost: a\r\n\n\r\n").refused(400),
        line("a path that is too long", &format!("GET /{} HTTP/1.1", "a".repeat(70_000))),
    ]
}

fn fields() -> Vec<Case> {
    vec![
        raw("no host", "GET /app HTTP/1.1\r\n\r\n"),
        get("two hosts", "host: b\r\n").refused(400),
        get("the same host twice", "host: a\r\n").refused(400),
        raw("a blank in the host", "GET /app HTTP/1.1\r\nhost: a b\r\n\r\n"),
        raw("a slash in the host", "GET /app HTTP/1.1\r\nhost: a/b\r\n\r\n"),
        raw("an empty host", "GET /app HTTP/1.1\r\nhost:\r\n\r\n"),
        raw("a list of hosts", "GET /app HTTP/1.1\r\nhost: a, b\r\n\r\n"),
        raw("a user in the host", "GET /app HTTP/1.1\r\nhost: user@a\r\n\r\n"),
        raw("two ports in the host", "GET /app HTTP/1.1\r\nhost: a:80:81\r\n\r\n"),
        raw("an address as host", "GET /app HTTP/1.1\r\nhost: [::1]:80\r\n\r\n"),
        raw("half an address as host", "GET /app HTTP/1.1\r\nhost: [::1\r\n\r\n"),
        raw("a query in the host", "GET /app HTTP/1.1\r\nhost: a?b\r\n\r\n"),
        raw("a blank before the host's colon", "GET /app HTTP/1.1\r\nhost : a\r\n\r\n"),
        raw("a tab before the host", "GET /app HTTP/1.1\r\nhost:\ta\r\n\r\n"),
        get("an underscore in a name", "transfer_encoding: chunked\r\n"),
        get("an expectation that nobody knows", "expect: magic\r\n"),
        get("te: trailers", "te: trailers\r\nconnection: te\r\n"),
        get("a form feed before a value", "x:\u{c}a\r\n"),
        get("a NUL in a value", "x: a\0b\r\n"),
        get("a control character in a value", "x: a\u{1}b\r\n"),
        get("a DEL in a value", "x: a\u{7f}b\r\n"),
        get("a byte above ASCII in a value", "x: a\u{e9}b\r\n"),
        get("a bare carriage return in a value", "x: a\rb\r\n").refused(400),
        get("two carriage returns at a line's end", "x: a\r\r\n").refused(400),
        get("a folded line", "x: a\r\n b\r\n").refused(400),
        get("a line folded with a tab", "x: a\r\n\tb\r\n").refused(400),
        raw("the first line folded", "GET /app HTTP/1.1\r\n x: a\r\nhost: a\r\n\r\n"),
        get("a blank before the colon", "x : a\r\n"),
        get("a tab before the colon", "x\t: a\r\n"),
        get("a blank in a name", "x y: a\r\n"),
        get("no colon", "xyz\r\n"),
        get("no name", ": a\r\n"),
        get("a bracket in a name", "x(y): a\r\n"),
        get("a NUL in a name", "x\0y: a\r\n"),
        get("a byte above ASCII in a name", "x\u{e9}: a\r\n"),
        get("a pseudo-header", ":path: /evil\r\n"),
        get("100 headers", &"x: a\r\n".repeat(99)),
        get("101 headers", &"x: a\r\n".repeat(100)),
        get("a large head", &format!("x: {}\r\n", "a".repeat(60_000))),
        get("a head that is too large", &format!("x: {}\r\n", "a".repeat(70_000))),
        get("a nominated header", "connection: x-a\r\nx-a: 1\r\n"),
        get("a nominated host", "connection: host\r\n"),
        get(
            "an offer of HTTP/2",
            "connection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABk\r\n",
        ),
    ]
}

fn bodies() -> Vec<Case> {
    let te = |value: &str| format!("transfer-encoding: {value}\r\n");
    let end = "0\r\n\r\n";
    vec![
        post("a length", "content-length: 3\r\n", "abc"),
        post("length and chunked", &format!("content-length: 3\r\n{}", te("chunked")), end),
        post("chunked and length", &format!("{}content-length: 3\r\n", te("chunked")), end),
        post("identity and length", &format!("{}content-length: 3\r\n", te("identity")), "abc"),
        post("two lengths", "content-length: 3\r\ncontent-length: 4\r\n", "abcd"),
        post("the same length twice", "content-length: 3\r\ncontent-length: 3\r\n", "abc"),
        post("a list of lengths", "content-length: 3, 3\r\n", "abc"),
        post("a length with a plus", "content-length: +3\r\n", "abc"),
        post("a negative length", "content-length: -3\r\n", "abc"),
        post("a hexadecimal length", "content-length: 0x3\r\n", "abc"),
        post("an empty length", "content-length: \r\n", "abc"),
        post("two numbers as length", "content-length: 3 4\r\n", "abc"),
        post("a length beyond 64 bits", "content-length: 99999999999999999999999\r\n", "abc"),
        post("a length in two lines, one empty", "content-length: 3\r\ncontent-length: \r\n", "abc"),
        post("a length with a point", "content-length: 3.0\r\n", "abc"),
        post("a length and a semicolon", "content-length: 3;\r\n", "abc"),
        post("a tab before the length", "content-length:\t3\r\n", "abc"),
        post("a vertical tab before the length", "content-length: \u{b}3\r\n", "abc"),
        post("a length of 2^64", "content-length: 18446744073709551616\r\n", "abc"),
        post("lengths in other letters", "Content-Length: 3\r\ncontent-length: 4\r\n", "abcd"),
        get("GET with a body that is a request", "content-length: 35\r\n\r\nGET /evil HTTP/1.1\r\nhost: evil\r\n"),
        raw(
            "a request after connection: close",
            "GET /app HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\nGET /evil HTTP/1.1\r\nhost: evil\r\n\r\n",
        ),
        post("a blank between length and colon", "content-length : 3\r\n", "abc"),
        post("a blank between coding and colon", "content-length: 3\r\ntransfer-encoding : chunked\r\n", "abc"),
        post("a nominated length", "connection: content-length\r\ncontent-length: 3\r\n", "abc"),
        post("a nominated coding", "connection: transfer-encoding\r\ntransfer-encoding: chunked\r\n", end),
        post("identity, then chunked", &format!("{}{}", te("identity"), te("chunked")), end),
        post("a length with an underscore", "content-length: 1_0\r\n", "abc"),
        post("gzip", &te("gzip"), end),
        post("gzip, chunked", &te("gzip, chunked"), end),
        post("chunked, gzip", &te("chunked, gzip"), end),
        post("chunked, chunked", &te("chunked, chunked"), end),
        post("chunked twice", &te("chunked").repeat(2), end),
        post("chunked and identity", &format!("{}{}", te("chunked"), te("identity")), end),
        post("identity", &te("identity"), ""),
        post("CHUNKED", &te("CHUNKED"), end),
        post("chunked and blanks", &te("chunked \t "), end),
        post("a tab before chunked", "transfer-encoding:\tchunked\r\n", end),
        post("chunk", &te("chunk"), end),
        post("chunked chunked", &te("chunked chunked"), end),
        post("a DEL after chunked", &te("chunked\u{7f}"), end),
        post("a coding with an underscore, and a length", "content-length: 3\r\ntransfer_encoding: chunked\r\n", "abc"),
        post("trailers as a coding", &te("trailers, chunked"), end),
        post("xchunked", &te("xchunked"), end),
        post("\"chunked\"", &te("\"chunked\""), end),
        post("a vertical tab before chunked", &te("\u{b}chunked"), end),
        post("chunked with a parameter", &te("chunked;q=1"), end),
        post("chunked and a comma", &te("chunked,"), end),
        post("no coding", &te(""), end),
        post("chunked on a folded line", "transfer-encoding:\r\n chunked\r\n", end).refused(400),
        raw("chunked in HTTP/1.0", "POST /app HTTP/1.0\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"),
        chunks("chunks", "5\r\nhello\r\n00A;a=\"b\"\r\n0123456789\r\n0\r\n\r\n"),
        chunks("a blank after the size", "5 \r\nhello\r\n0\r\n\r\n"),
        chunks("an extension that is too long", &format!("5;{}\r\nhello\r\n0\r\n\r\n", "a".repeat(20_000)))
            .refused(400),
        chunks("a bare line feed in an extension", "5;a\nhello\r\n0\r\n\r\n"),
        chunks("a bare carriage return in an extension", "5;a\rb\r\nhello\r\n0\r\n\r\n"),
        chunks("a NUL in an extension", "5;a\0b\r\nhello\r\n0\r\n\r\n").refused(400),
        chunks("zeros before the size", "000000000000000000005\r\nhello\r\n0\r\n\r\n"),
        chunks("many zeros as the last chunk", "00000\r\n\r\n"),
        chunks("a last chunk with an extension", "5\r\nhello\r\n0;a=b\r\n\r\n"),
        chunks("a size with an underscore", "1_0\r\nhello\r\n0\r\n\r\n"),
        chunks("a size with a point", "5.\r\nhello\r\n0\r\n\r\n"),
        chunks("a size with a comma", "5,\r\nhello\r\n0\r\n\r\n"),
        chunks("a tab after the size", "5\t\r\nhello\r\n0\r\n\r\n"),
        chunks("a bare carriage return after the size", "5\rhello\r\n0\r\n\r\n"),
        chunks("a quoted extension over two lines", "5;a=\"\r\nhello\r\n0\r\n\r\n"),
        chunks("a blank before the size", " 5\r\nhello\r\n0\r\n\r\n"),
        chunks("no size", "\r\nhello\r\n0\r\n\r\n"),
        chunks("a size with 0x", "0x5\r\nhello\r\n0\r\n\r\n"),
        chunks("a negative size", "-5\r\nhello\r\n0\r\n\r\n"),
        chunks("a size with a plus", "+5\r\nhello\r\n0\r\n\r\n"),
        chunks("a size that is no number", "zz\r\nhello\r\n0\r\n\r\n"),
        chunks("a size beyond 64 bits", "fffffffffffffffff\r\nhello\r\n0\r\n\r\n"),
        chunks("a bare line feed after the size", "5\nhello\r\n0\r\n\r\n"),
        chunks("a bare line feed after the data", "5\r\nhello\n0\r\n\r\n").refused(400),
        chunks("more data than its size", "3\r\nhello\r\n0\r\n\r\n").refused(400),
        chunks("trailers", "5\r\nhello\r\n0\r\nx-t: 1\r\n\r\n"),
        chunks("a length in the trailers", "5\r\nhello\r\n0\r\ncontent-length: 1\r\n\r\n"),
        chunks("a coding in the trailers", "5\r\nhello\r\n0\r\ntransfer-encoding: chunked\r\n\r\n"),
        chunks("a host in the trailers", "5\r\nhello\r\n0\r\nhost: evil\r\n\r\n"),
        chunks("a pseudo-header in the trailers", "5\r\nhello\r\n0\r\n:path: /evil\r\n\r\n"),
        chunks("a blank before a trailer's colon", "5\r\nhello\r\n0\r\nx : y\r\n\r\n"),
        chunks("a NUL in a trailer", "5\r\nhello\r\n0\r\nx: \0\r\n\r\n"),
        chunks("trailers that are too many", &format!("5\r\nhello\r\n0\r\n{}\r\n", "x: y\r\n".repeat(200)))
            .refused(431),
        chunks("a trailer that is too long", &format!("5\r\nhello\r\n0\r\nx: {}\r\n\r\n", "y".repeat(70_000))),
        chunks("a folded trailer", "5\r\nhello\r\n0\r\nx: t\r\n u\r\n\r\n").refused(400),
    ]
}

macro_rules! ten {
    () => {
        "x: y\r\nx: y\r\nx: y\r\nx: y\r\nx: y\r\nx: y\r\nx: y\r\nx: y\r\nx: y\r\nx: y\r\n"
    };
}

/// 120 fields, where 100 are taken.
const MANY_HEADERS: &str = concat!(
    "HTTP/1.1 200 OK\r\n",
    ten!(),
    ten!(),
    ten!(),
    ten!(),
    ten!(),
    ten!(),
    ten!(),
    ten!(),
    ten!(),
    ten!(),
    ten!(),
    ten!(),
    "content-length: 2\r\n\r\nok"
);

/// Answers of hosts, by path.
const ANSWERS: [(&str, &str, Expect); 37] = [
    ("/ok", "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok", AsEnvoy),
    ("/chunked", "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nx-t: 1\r\n\r\n", AsEnvoy),
    ("/204", "HTTP/1.1 204 No Content\r\ncontent-length: 0\r\n\r\n", AsEnvoy),
    ("/204-length", "HTTP/1.1 204 No Content\r\ncontent-length: 3\r\n\r\nabc", AsEnvoy),
    ("/204-chunked", "HTTP/1.1 204 No Content\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", Refused(502)),
    (
        "/hints-length",
        "HTTP/1.1 103 Early Hints\r\ncontent-length: 3\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok",
        AsEnvoy,
    ),
    ("/304", "HTTP/1.1 304 Not Modified\r\ncontent-length: 10\r\n\r\n", AsEnvoy),
    ("/continue", "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok", AsEnvoy),
    ("/hints", "HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok", AsEnvoy),
    (
        "/surplus",
        "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nokHTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil",
        AsEnvoy,
    ),
    ("/both", "HTTP/1.1 200 OK\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", AsEnvoy),
    ("/lengths", "HTTP/1.1 200 OK\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\nabcd", AsEnvoy),
    ("/same", "HTTP/1.1 200 OK\r\ncontent-length: 3\r\ncontent-length: 3\r\n\r\nabc", AsEnvoy),
    ("/list", "HTTP/1.1 200 OK\r\ncontent-length: 3, 3\r\n\r\nabc", AsEnvoy),
    ("/plus", "HTTP/1.1 200 OK\r\ncontent-length: +3\r\n\r\nabc", AsEnvoy),
    ("/gzip", "HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\nabc", AsEnvoy),
    ("/gzip-chunked", "HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n", AsEnvoy),
    ("/blank", "HTTP/1.1 200 OK\r\nx-a : b\r\ncontent-length: 2\r\n\r\nok", AsEnvoy),
    ("/nul", "HTTP/1.1 200 OK\r\nx-a: b\0c\r\ncontent-length: 2\r\n\r\nok", AsEnvoy),
    ("/empty-length", "HTTP/1.1 200 OK\r\ncontent-length: \r\n\r\nabc", AsEnvoy),
    ("/negative", "HTTP/1.1 200 OK\r\ncontent-length: -3\r\n\r\nabc", AsEnvoy),
    ("/huge", "HTTP/1.1 200 OK\r\ncontent-length: 99999999999999999999999\r\n\r\nabc", AsEnvoy),
    ("/no-reason", "HTTP/1.1 200\r\ncontent-length: 2\r\n\r\nok", AsEnvoy),
    ("/1.0-chunked", "HTTP/1.0 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", Refused(502)),
    (
        "/twice-chunked",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        AsEnvoy,
    ),
    ("/205", "HTTP/1.1 205 Reset Content\r\ncontent-length: 0\r\n\r\n", AsEnvoy),
    ("/no-colon", "HTTP/1.1 200 OK\r\nxyz\r\ncontent-length: 2\r\n\r\nok", AsEnvoy),
    ("/many", MANY_HEADERS, AsEnvoy),
    (
        "/100-length",
        "HTTP/1.1 100 Continue\r\ncontent-length: 3\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok",
        AsEnvoy,
    ),
    ("/nonsense", "nonsense\r\n\r\n", AsEnvoy),
    ("/99", "HTTP/1.1 099 OK\r\ncontent-length: 2\r\n\r\nok", AsEnvoy),
    ("/fold", "HTTP/1.1 200 OK\r\nx-a: b\r\n c\r\ncontent-length: 2\r\n\r\nok", Refused(502)),
    ("/cr", "HTTP/1.1 200 OK\r\nx-a: b\rc\r\ncontent-length: 2\r\n\r\nok", Refused(502)),
    ("/lf", "HTTP/1.1 200 OK\nx-a: b\ncontent-length: 2\n\nok", Refused(502)),
    ("/1000", "HTTP/1.1 1000 OK\r\ncontent-length: 2\r\n\r\nok", Refused(502)),
    ("/2.0", "HTTP/2.0 200 OK\r\ncontent-length: 2\r\n\r\nok", Refused(502)),
    ("/switch", "HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n", Refused(502)),
];

/// A host that writes down the requests that reach it whole, and answers as [`ANSWERS`] has it.
#[derive(Clone, Default)]
struct Host(Arc<Mutex<Vec<String>>>);

impl Host {
    fn start(&self) -> Result<u16> {
        let host = self.clone();
        server::start(move |stream| host.serve(stream))
    }

    fn serve(&self, stream: TcpStream) -> Result<()> {
        let mut stream = BufReader::new(stream);
        while let Some(request) = Request::read(&mut stream)? {
            let mut fields: Vec<_> = request.headers.0.iter().map(|(name, value)| format!("{name}: {value}")).collect();
            fields.retain(|field| !field.starts_with("x-request-id"));
            fields.sort();
            let (method, target, body) = (&request.method, &request.target, String::from_utf8_lossy(&request.body));
            let seen = format!("{method} {target} {} {body:?}", fields.join("|"));
            self.0.lock().unwrap_or_else(PoisonError::into_inner).push(seen);
            let known = ANSWERS.iter().find(|(path, ..)| *path == request.target);
            stream.get_mut().write_all(&latin1(known.unwrap_or(&ANSWERS[0]).1))?;
        }
        Ok(())
    }

    fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

struct Stage {
    proxy: Daemon,
    port: u16,
    host: Host,
    log: std::path::PathBuf,
}

impl Stage {
    fn start(kind: Kind) -> Result<Stage> {
        Stage::start_with(kind, "codec_type: AUTO")
    }

    /// With one more line for the connection manager.
    fn start_with(kind: Kind, manager: &str) -> Result<Stage> {
        let (host, port) = (Host::default(), free_port()?);
        let upstream = host.start()?;
        let log = culvert_tests::daemon::scratch_dir()?.join("access.log");
        let format = "%REQ(:METHOD)% %RESPONSE_CODE% %RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS%\\n";
        let access_log = format!(
            "access_log: [{{name: envoy.access_loggers.file, typed_config: {{\"@type\": \
             type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog, path: {}, \
             log_format: {{text_format_source: {{inline_string: \"{format}\"}}}}}}}}]",
            log.display()
        );
        let routes = "- {name: all, domains: [\"*\"], routes: [{match: {prefix: /}, route: {cluster: app}}]}";
        let yaml = Bootstrap::new().http(port, routes, &[&access_log, manager]).cluster("app", &[upstream], &[]).yaml();
        Ok(Stage { proxy: Daemon::start(kind, &yaml)?, port, host, log })
    }

    /// What the client got and what the host saw.
    fn outcome(&self, bytes: &[u8], method: &str) -> (u16, String, Vec<String>) {
        self.host.take();
        let (status, shown) = match fetch_raw(self.port, bytes, method) {
            Ok(response) => (response.status, show(&response)),
            Err(error) => (0, format!("no response: {error:#}")),
        };
        (status, shown, self.host.take())
    }

    /// The lines of the access log, which both write out when they are told to end.
    fn log(&self, lines: usize) -> Result<Vec<String>> {
        self.proxy.signal(Signal::SIGTERM)?;
        wait_until(Duration::from_secs(12), "the access log", || {
            let text = std::fs::read_to_string(&self.log)?;
            let found: Vec<_> = text.lines().map(str::to_owned).collect();
            (found.len() >= lines).then_some(found).with_context(|| format!("it has {} lines", text.lines().count()))
        })
    }
}

fn show(response: &Response) -> String {
    let own = ["date", "x-envoy-upstream-service-time"];
    let mut fields: Vec<_> = response.headers.0.iter().map(|(name, value)| format!("{name}: {value}")).collect();
    fields.retain(|field| !own.iter().any(|name| field.starts_with(name)));
    fields.sort();
    format!("{} {}|{}|{:?}", response.status, response.reason, fields.join("|"), response.text())
}

/// Counters that must come to the same.
const COUNTERS: [&str; 8] = [
    "http.ingress.downstream_cx_protocol_error",
    "http.ingress.downstream_rq_total",
    "http.ingress.downstream_rq_2xx",
    "http.ingress.downstream_rq_4xx",
    "http.ingress.downstream_rq_5xx",
    "http.ingress.downstream_rq_non_relative_path",
    "cluster.app.upstream_rq_502",
    "cluster.app.upstream_rq_200",
];

fn compare(cases: &[Case]) -> Result<()> {
    compare_on(Stage::start(Kind::Envoy)?, Stage::start(Kind::Culvert)?, cases)
}

fn compare_on(envoy: Stage, culvert: Stage, cases: &[Case]) -> Result<()> {
    let mut wrong = Vec::new();
    for case in cases {
        let seen = culvert.outcome(&case.bytes, case.method());
        match case.expect {
            Refused(status) => {
                let forwarded = !seen.2.is_empty() && status != 502;
                if seen.0 != status || forwarded {
                    wrong.push(format!("--- {}: expected {status}, got {seen:?}", case.name));
                }
            }
            AsEnvoy => {
                let expected = envoy.outcome(&case.bytes, case.method());
                if seen != expected {
                    wrong.push(format!("--- {}\nEnvoy:    {expected:?}\nculvertd: {seen:?}", case.name));
                }
            }
        }
    }
    let same = cases.iter().filter(|case| case.expect == AsEnvoy).count();
    let (expected, seen) = (envoy.log(same)?, culvert.log(cases.len())?);
    let seen = seen.iter().zip(cases).filter(|(_, case)| case.expect == AsEnvoy);
    for (expected, (seen, case)) in expected.iter().zip(seen).filter(|(expected, (seen, _))| expected != seen) {
        wrong.push(format!("--- {}, in the access log\nEnvoy:    {expected}\nculvertd: {seen}", case.name));
    }
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
    Ok(())
}

#[test]
fn hostile_request_lines() -> Result<()> {
    compare(&request_lines())
}

#[test]
fn hostile_fields() -> Result<()> {
    compare(&fields())
}

#[test]
fn hostile_bodies() -> Result<()> {
    compare(&bodies())
}

#[test]
fn hostile_responses() -> Result<()> {
    let case = |(path, _, expect): (&'static str, _, _)| {
        let bytes = format!("GET {path} HTTP/1.1\r\nhost: a\r\n\r\n").into_bytes();
        Case { name: path, bytes, expect }
    };
    compare(&ANSWERS.map(case))
}

#[test]
fn http_1_0_where_it_is_accepted() -> Result<()> {
    let kept = "connection: keep-alive\r\n";
    let cases = [
        line("a request", "GET /app HTTP/1.0"),
        raw("without a host", "GET /app HTTP/1.0\r\n\r\n"),
        raw("kept", &format!("GET /app HTTP/1.0\r\nhost: a\r\n{kept}\r\n")),
        raw("a body", "POST /app HTTP/1.0\r\nhost: a\r\ncontent-length: 3\r\n\r\nabc"),
        line("an answer of unknown length", "GET /chunked HTTP/1.0"),
        raw("kept, and an answer of unknown length", &format!("GET /chunked HTTP/1.0\r\nhost: a\r\n{kept}\r\n")),
        line("HEAD", "HEAD /204 HTTP/1.0"),
        raw("chunked", "POST /app HTTP/1.0\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n").refused(501),
    ];
    let options = "http_protocol_options: {accept_http_10: true, default_host_for_http_10: default.example}";
    compare_on(Stage::start_with(Kind::Envoy, options)?, Stage::start_with(Kind::Culvert, options)?, &cases)
}

/// Sends the first piece at once, and then a byte at a time for as long as nothing comes back.
fn drip(port: u16, first: &[u8], byte: &[u8]) -> Result<Response> {
    let stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let mut writer = stream.try_clone()?;
    let (first, byte) = (first.to_vec(), byte.to_vec());
    thread::spawn(move || -> Result<()> {
        writer.write_all(&first)?;
        loop {
            // The pace of a slow client.
            thread::sleep(Duration::from_millis(50));
            writer.write_all(&byte)?;
        }
    });
    Response::read(&mut BufReader::new(stream), "GET")
}

/// Clients that say something again and again, and never all.
#[test]
fn slow_heads_and_bodies_end_as_in_envoy() -> Result<()> {
    let options = "request_headers_timeout: 0.5s\n          request_timeout: 1s";
    let (envoy, culvert) = (Stage::start_with(Kind::Envoy, options)?, Stage::start_with(Kind::Culvert, options)?);
    let head = "POST /app HTTP/1.1\r\nhost: a\r\n";
    for (first, byte) in [
        (head.to_owned(), "x"),
        (head.to_owned(), "x: y\r\n"),
        (format!("{head}content-length: 100000\r\n\r\n"), "x"),
        (format!("{head}transfer-encoding: chunked\r\n\r\n"), "1\r\nx\r\n"),
        (format!("{head}transfer-encoding: chunked\r\n\r\n"), "1"),
        (format!("{head}transfer-encoding: chunked\r\n\r\n0\r\n"), "x: y\r\n"),
    ] {
        let outcome = |stage: &Stage| match drip(stage.port, first.as_bytes(), byte.as_bytes()) {
            Ok(response) => show(&response),
            Err(error) => format!("no response: {error:#}"),
        };
        let (expected, seen) = (outcome(&envoy), outcome(&culvert));
        assert_eq!(seen, expected, "{first:?} and {byte:?}");
        assert!(seen.starts_with("408 ") || seen.starts_with("400 ") || seen.starts_with("431 "), "{seen}");
        assert_eq!(culvert.host.take(), Vec::<String>::new(), "{first:?} and {byte:?}");
    }
    let (expected, seen) = (envoy.proxy.stats()?, culvert.proxy.stats()?);
    for name in ["http.ingress.downstream_rq_header_timeout", "http.ingress.downstream_rq_timeout"] {
        assert_eq!(seen.get(name), expected.get(name), "{name}");
    }
    Ok(())
}

/// What is the same is counted the same.
#[test]
fn hostile_requests_are_counted_as_in_envoy() -> Result<()> {
    let (envoy, culvert) = (Stage::start(Kind::Envoy)?, Stage::start(Kind::Culvert)?);
    for case in request_lines().iter().chain(&fields()).chain(&bodies()).filter(|case| case.expect == AsEnvoy) {
        envoy.outcome(&case.bytes, case.method());
        culvert.outcome(&case.bytes, case.method());
    }
    let (expected, seen) = (envoy.proxy.stats()?, culvert.proxy.stats()?);
    for name in COUNTERS {
        assert_eq!(seen.get(name), expected.get(name), "{name}");
    }
    Ok(())
}

use super::*;

const LIMITS: Limits = Limits { bytes: 1024, headers: 8, any_method: false };

fn read(bytes: &[u8]) -> Result<RequestHead> {
    let mut buffer = BytesMut::from(bytes);
    let head = Scanner::default().take(&mut buffer, Kind::Request, LIMITS)?.expect("a whole head");
    request(&head, LIMITS, &Http1Options::default())
}

fn read_response(bytes: &[u8]) -> Result<ResponseHead> {
    let mut buffer = BytesMut::from(bytes);
    let head = Scanner::default().take(&mut buffer, Kind::Response, LIMITS)?.expect("a whole head");
    response(&head, LIMITS)
}

#[test]
fn a_request() {
    let head = read(b"POST /a?b HTTP/1.1\r\nHost: x\r\nX-A:  b\t\r\nContent-Length: 3\r\n\r\n").unwrap();
    assert_eq!((head.parts.method, head.parts.uri.to_string()), (Method::POST, "/a?b".to_owned()));
    assert_eq!((head.framing, head.target), (Framing::Length(3), Target::Path));
    assert_eq!(
        (&head.parts.headers["host"], &head.parts.headers["x-a"]),
        (&"x".parse().unwrap(), &"b".parse().unwrap())
    );
}

/// Wherever the bytes are cut, the head is the same, and what follows stays.
#[test]
fn every_split_of_a_request() {
    let whole = b"\r\nGET /a HTTP/1.1\r\nhost: x\r\nx-a: b\r\n\r\nGET /next";
    for cut in 0..whole.len() {
        let (mut scanner, mut buffer) = (Scanner::default(), BytesMut::from(&whole[..cut]));
        let first = scanner.take(&mut buffer, Kind::Request, LIMITS).unwrap();
        let head = first.unwrap_or_else(|| {
            buffer.extend_from_slice(&whole[cut..]);
            scanner.take(&mut buffer, Kind::Request, LIMITS).unwrap().expect("it is whole by now")
        });
        assert_eq!(request(&head, LIMITS, &Http1Options::default()).unwrap().parts.uri, "/a", "cut at {cut}");
        assert!(b"GET /next".starts_with(&buffer[..]), "cut at {cut}: {buffer:?}");
    }
}

#[test]
fn byte_by_byte() {
    let (mut scanner, mut buffer) = (Scanner::default(), BytesMut::new());
    let whole = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
    for (at, byte) in whole.iter().enumerate() {
        buffer.extend_from_slice(&[*byte]);
        let head = scanner.take(&mut buffer, Kind::Response, LIMITS).unwrap();
        assert_eq!(head.is_some(), at + 1 == whole.len(), "at {at}");
    }
}

#[test]
fn what_is_refused_in_requests() {
    let te = "host: a\r\ntransfer-encoding: ";
    let cases: [(String, CodecError); 37] = [
        ("get / HTTP/1.1\r\nhost: a\r\n\r\n".into(), CodecError::CODEC),
        ("FOO / HTTP/1.1\r\nhost: a\r\n\r\n".into(), CodecError::CODEC),
        ("GET  / HTTP/1.1\r\nhost: a\r\n\r\n".into(), CodecError::CODEC),
        ("GET / HTTP/1.1 \r\nhost: a\r\n\r\n".into(), CodecError::CODEC),
        ("GET\t/\tHTTP/1.1\r\nhost: a\r\n\r\n".into(), CodecError::CODEC),
        ("GET /\r\n\r\n".into(), CodecError::LOW_VERSION),
        ("GET / HTTP/1.0\r\n\r\n".into(), CodecError::LOW_VERSION),
        ("GET / HTTP/1.2\r\n\r\n".into(), CodecError::LOW_VERSION),
        ("GET / HTTP/1.10\r\n\r\n".into(), CodecError::CODEC),
        ("GET /\u{e9} HTTP/1.1\r\nhost: a\r\n\r\n".into(), CodecError::CODEC),
        ("GET /\0 HTTP/1.1\r\nhost: a\r\n\r\n".into(), CodecError::INVALID_CHARACTERS),
        ("GET ftp://a/ HTTP/1.1\r\nhost: a\r\n\r\n".into(), CodecError::SCHEME),
        ("GET http:///x HTTP/1.1\r\nhost: a\r\n\r\n".into(), CodecError::URL),
        ("GET http://a:x/ HTTP/1.1\r\nhost: a\r\n\r\n".into(), CodecError::URL),
        ("GET http://[a]/ HTTP/1.1\r\nhost: a\r\n\r\n".into(), CodecError::URL),
        ("GET http://a_b/ HTTP/1.1\r\nhost: a\r\n\r\n".into(), CodecError::URL),
        ("GET * HTTP/1.1\r\nhost: a\r\n\r\n".into(), CodecError::URL),
        ("GET / HTTP/1.1\nhost: a\r\n\r\n".into(), CodecError::CODEC),
        ("GET / HTTP/1.1\r\nhost: a\nx: b\r\n\r\n".into(), CodecError::CODEC),
        ("GET / HTTP/1.1\r\nhost: a\r\nx: a\rb\r\n\r\n".into(), CodecError::INVALID_CHARACTERS),
        ("GET / HTTP/1.1\r\nhost: a\r\nx: a\0b\r\n\r\n".into(), CodecError::INVALID_CHARACTERS),
        ("GET / HTTP/1.1\r\nhost: a\r\nx: a\r\n b\r\n\r\n".into(), CodecError::CODEC),
        ("GET / HTTP/1.1\r\n x: a\r\nhost: a\r\n\r\n".into(), CodecError::CODEC),
        ("GET / HTTP/1.1\r\nhost: a\r\nx : b\r\n\r\n".into(), CodecError::CODEC),
        ("GET / HTTP/1.1\r\nhost: a\r\nx\r\n\r\n".into(), CodecError::CODEC),
        ("GET / HTTP/1.1\r\nhost: a\r\n: b\r\n\r\n".into(), CodecError::CODEC),
        ("GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n".into(), CodecError::DUPLICATE_HOST),
        ("GET / HTTP/1.1\r\nhost: a b\r\n\r\n".into(), CodecError::AUTHORITY),
        (format!("GET / HTTP/1.1\r\nhost: a\r\n{}\r\n", "x: y\r\n".repeat(8)), CodecError::TOO_MANY_HEADERS),
        (format!("GET / HTTP/1.1\r\nhost: {}\r\n\r\n", "a".repeat(1024)), CodecError::HEADERS_TOO_LARGE),
        (format!("POST / HTTP/1.1\r\n{te}chunked\r\ncontent-length: 3\r\n\r\n"), CodecError::LENGTH_AND_CHUNKED),
        (format!("POST / HTTP/1.1\r\n{te}gzip, chunked\r\n\r\n"), CodecError::TRANSFER_ENCODING),
        (
            format!("POST / HTTP/1.1\r\n{te}chunked\r\ntransfer-encoding: chunked\r\n\r\n"),
            CodecError::TRANSFER_ENCODING,
        ),
        (format!("POST / HTTP/1.1\r\n{te}\u{b}chunked\r\n\r\n"), CodecError::INVALID_CHARACTERS),
        ("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\ncontent-length: 3\r\n\r\n".into(), CodecError::CODEC),
        ("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: +3\r\n\r\n".into(), CodecError::CODEC),
        ("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 99999999999999999999\r\n\r\n".into(), CodecError::CODEC),
    ];
    for (text, expected) in cases {
        assert_eq!(read(text.as_bytes()).map(|head| head.framing), Err(expected), "{text:?}");
    }
}

/// Nobody waits for the end of what cannot become a request.
#[test]
fn what_is_refused_before_its_end() {
    for text in ["\u{16}\u{3}\u{1}", "nonsense\r\n", "NONSENSE\r\n", "GET / HTTP/1.1\n", "\n"] {
        let mut buffer = BytesMut::from(text.as_bytes());
        assert!(Scanner::default().take(&mut buffer, Kind::Request, LIMITS).is_err(), "{text:?}");
    }
    let many = format!("GET / HTTP/1.1\r\n{}", "a:b\r\n".repeat(9));
    let refused = Scanner::default().take(&mut BytesMut::from(many.as_bytes()), Kind::Request, LIMITS);
    assert_eq!(refused, Err(CodecError::TOO_MANY_HEADERS));
}

#[test]
fn an_absolute_target_wins_over_host() {
    let head = read(b"GET http://user@b:80/x?y HTTP/1.1\r\nhost: a\r\n\r\n").unwrap();
    assert_eq!(
        (head.parts.uri.to_string(), &head.parts.headers["host"]),
        ("/x?y".to_owned(), &"b:80".parse().unwrap())
    );
    assert_eq!(read(b"OPTIONS * HTTP/1.1\r\nhost: a\r\n\r\n").unwrap().target, Target::NoPath);
    assert_eq!(read(b"GET /a#b HTTP/1.1\r\nhost: a\r\n\r\n").unwrap().target, Target::Fragment);
}

#[test]
fn responses() {
    let head = read_response(b"HTTP/1.1 200\r\n\r\n").unwrap();
    assert_eq!((head.parts.status, head.told), (StatusCode::OK, Framing::UntilClose));
    let head = read_response(b"HTTP/1.1 404 Not Found\r\nTransfer-Encoding: Chunked\r\n\r\n").unwrap();
    assert_eq!(head.told, Framing::Chunked);
    for (status, to_head, expected) in [
        (200, false, Framing::Chunked),
        (200, true, Framing::None),
        (204, false, Framing::None),
        (304, false, Framing::None),
    ] {
        assert_eq!(response_framing(Framing::Chunked, StatusCode::from_u16(status).unwrap(), to_head), expected);
    }
    for text in [
        "HTTP/2.0 200 OK\r\n\r\n",
        "HTTP/1.1 1000 OK\r\n\r\n",
        "HTTP/1.1 099 OK\r\n\r\n",
        "HTTP/1.1  200 OK\r\n\r\n",
        "HTTP/1.1 200 O\0K\r\n\r\n",
        "HTTP/1.1 200 OK\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\n",
        "HTTP/1.1 200 OK\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\n",
        "HTTP/1.0 200 OK\r\ntransfer-encoding: chunked\r\n\r\n",
    ] {
        assert!(read_response(text.as_bytes()).is_err(), "{text:?}");
    }
}

#[test]
fn methods_that_envoy_does_not_know() {
    let any = Limits { any_method: true, ..LIMITS };
    let read = |line: &str, limits| {
        let mut buffer = BytesMut::from(format!("{line} / HTTP/1.1\r\nhost: a\r\n\r\n").as_bytes());
        let head = Scanner::default().take(&mut buffer, Kind::Request, limits)?.ok_or(CodecError::CODEC)?;
        request(&head, limits, &Http1Options::default()).map(|head| head.parts.method.to_string())
    };
    for method in ["BREW", "get", "x-a"] {
        assert_eq!(read(method, any).unwrap(), method);
        assert!(read(method, LIMITS).is_err(), "{method}");
    }
    for nonsense in ["", "B\tREW", "A(B", "\u{1}", "A\0", ":path"] {
        assert!(read(nonsense, any).is_err(), "{nonsense:?}");
    }
}

#[test]
fn urls_where_only_paths_are_taken() {
    let options = Http1Options { refuses_absolute_url: true, ..Http1Options::default() };
    let head = Bytes::from_static(b"GET http://b/x HTTP/1.1\r\nhost: a\r\n\r\n");
    let refused = request(&head, LIMITS, &options).unwrap();
    assert_eq!(refused.target, Target::NoPath);
    assert_eq!(refused.parts.headers[HOST], "a");
    assert_eq!(request(&head, LIMITS, &Http1Options::default()).unwrap().parts.headers[HOST], "b");
}

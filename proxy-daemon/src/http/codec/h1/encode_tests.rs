use http::{HeaderValue, Request};

use super::*;

const NONE: BodyLength = BodyLength { ended: true, exact: Some(0) };
const STREAM: BodyLength = BodyLength { ended: false, exact: None };
const CX: ResponseCx = ResponseCx { to_head: false, to_connect: false, http_10: false, close: false, keep_alive: true };

fn answer(
    status: u16,
    headers: &[(&'static str, &'static str)],
    body: BodyLength,
    cx: ResponseCx,
) -> (String, Framing) {
    let mut map = HeaderMap::new();
    for (name, value) in headers {
        map.append(*name, HeaderValue::from_static(value));
    }
    map.insert(DATE, HeaderValue::from_static("now"));
    let mut out = Vec::new();
    let framing = response(&mut out, (StatusCode::from_u16(status).unwrap(), None), &map, body, cx);
    let text = String::from_utf8(out).unwrap();
    (text.replace("date: now\r\n", "").replace("\r\n", "|"), framing)
}

#[test]
fn responses_are_framed_as_envoy_frames_them() {
    let head = ResponseCx { to_head: true, ..CX };
    let old = ResponseCx { http_10: true, ..CX };
    let length = [("content-length", "5")];
    for (seen, expected) in [
        (answer(200, &length, STREAM, CX), ("HTTP/1.1 200 OK|content-length: 5||", Framing::Length(5))),
        (answer(200, &[], STREAM, CX), ("HTTP/1.1 200 OK|transfer-encoding: chunked||", Framing::Chunked)),
        (answer(200, &[], NONE, CX), ("HTTP/1.1 200 OK|content-length: 0||", Framing::None)),
        (answer(200, &[], NONE, head), ("HTTP/1.1 200 OK|transfer-encoding: chunked||", Framing::None)),
        (answer(200, &length, NONE, head), ("HTTP/1.1 200 OK|content-length: 5||", Framing::None)),
        (answer(204, &length, NONE, CX), ("HTTP/1.1 204 No Content||", Framing::None)),
        (answer(304, &length, NONE, CX), ("HTTP/1.1 304 Not Modified|content-length: 5||", Framing::None)),
        (answer(304, &[], NONE, CX), ("HTTP/1.1 304 Not Modified||", Framing::None)),
        (answer(200, &[], STREAM, old), ("HTTP/1.0 200 OK|connection: close||", Framing::UntilClose)),
        (
            answer(200, &length, STREAM, old),
            ("HTTP/1.0 200 OK|content-length: 5|connection: keep-alive||", Framing::Length(5)),
        ),
        (
            answer(299, &[("connection", "x"), ("transfer-encoding", "gzip")], NONE, ResponseCx { close: true, ..CX }),
            ("HTTP/1.1 299 Unknown|content-length: 0|connection: close||", Framing::None),
        ),
        // Two lengths are none.
        (
            answer(200, &[("content-length", "5"), ("content-length", "6")], STREAM, CX),
            ("HTTP/1.1 200 OK|transfer-encoding: chunked||", Framing::Chunked),
        ),
    ] {
        assert_eq!((seen.0.as_str(), seen.1), expected);
    }
}

#[test]
fn requests_say_whether_they_have_a_body() {
    for (method, length, body, expected) in [
        ("GET", None, NONE, "GET /x HTTP/1.1||"),
        ("POST", None, NONE, "POST /x HTTP/1.1|content-length: 0||"),
        ("DELETE", None, NONE, "DELETE /x HTTP/1.1||"),
        ("GET", Some("3"), STREAM, "GET /x HTTP/1.1|content-length: 3||"),
        ("POST", None, STREAM, "POST /x HTTP/1.1|transfer-encoding: chunked||"),
    ] {
        let mut built = Request::builder().method(method).uri("/x");
        if let Some(length) = length {
            built = built.header("content-length", length);
        }
        let (parts, ()) = built.body(()).unwrap().into_parts();
        let mut out = Vec::new();
        request(&mut out, &parts, body);
        assert_eq!(String::from_utf8(out).unwrap().replace("\r\n", "|"), expected);
    }
}

#[test]
fn a_date_is_added_where_there_is_none() {
    let mut out = Vec::new();
    response(&mut out, (StatusCode::OK, None), &HeaderMap::new(), NONE, CX);
    let text = String::from_utf8(out).unwrap();
    let date = text.split("date: ").nth(1).unwrap().split("\r\n").next().unwrap();
    assert!(httpdate::parse_http_date(date).is_ok(), "{date}");
}

#[test]
fn chunks_and_large_pieces() {
    let mut writer = Writer::default();
    writer.data(Bytes::from_static(b"hello"), true);
    assert_eq!(writer.out(), b"5\r\nhello\r\n");
    writer.data(Bytes::from(vec![b'x'; 70_000]), true);
    assert!(!writer.has_room() && writer.out().ends_with(b"11170\r\n"));
    // However little is taken at a time, it comes out in order.
    let (mut seen, mut stream) = (Vec::new(), Slow::default());
    let mut cx = Context::from_waker(std::task::Waker::noop());
    while writer.poll_write(&mut stream, &mut cx).is_pending() {
        seen.append(&mut stream.0);
    }
    seen.append(&mut stream.0);
    assert_eq!(seen.len(), 10 + 7 + 70_000 + 2);
    assert!(seen.starts_with(b"5\r\nhello\r\n11170\r\nxxx") && seen.ends_with(b"xxx\r\n") && writer.is_empty());
}

/// Takes 999 bytes, then none, and so on.
#[derive(Default)]
struct Slow(Vec<u8>);

impl AsyncWrite for Slow {
    fn poll_write(mut self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if !self.0.is_empty() {
            return Poll::Pending;
        }
        let taken = bytes.len().min(999);
        self.0.extend_from_slice(&bytes[..taken]);
        Poll::Ready(Ok(taken))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let first = slices.iter().find(|slice| !slice.is_empty()).map_or(&b""[..], |slice| slice);
        self.poll_write(cx, first)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[test]
fn names_in_proper_case() {
    let mut trailers = HeaderMap::new();
    trailers.insert("x-checksum-b2_c", "a:b-c".parse().unwrap());
    let mut writer = Writer::in_case(HeaderKeyFormat::ProperCaseWords);
    writer.last_chunk(Some(&trailers));
    assert_eq!(String::from_utf8_lossy(writer.out()), "0\r\nX-Checksum-B2_C: a:b-c\r\n\r\n");
    let mut writer = Writer::default();
    writer.last_chunk(Some(&trailers));
    assert_eq!(String::from_utf8_lossy(writer.out()), "0\r\nx-checksum-b2_c: a:b-c\r\n\r\n");
}

use bytes::Bytes;

use super::*;
use crate::http::buffered::Buffered;

fn answer(trailers: &[(&'static str, &'static str)]) -> (ResponseHead, Bytes) {
    let mut map = HeaderMap::new();
    trailers.iter().for_each(|(name, value)| drop(map.insert(*name, HeaderValue::from_static(value))));
    let mut body = Body::Wrapped(Box::new(Buffered::new(Bytes::from_static(b"message"), Some(map))));
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let Ok((data, Some(trailers))) = runtime.block_on(read(&mut body, 7)) else { panic!("not read") };
    let (mut head, ()) = http::Response::new(()).into_parts();
    bridge(&mut head, &trailers, data.len());
    (head, data)
}

#[test]
fn the_status_of_the_trailers_is_told_in_the_head() {
    let (head, data) = answer(&[("grpc-status", "0"), ("x-other", "1")]);
    assert_eq!((head.status, &data[..]), (StatusCode::OK, &b"message"[..]));
    assert_eq!((&head.headers[GRPC_STATUS], &head.headers[CONTENT_LENGTH]), (&"0".parse().unwrap(), &7.into()));
    assert_eq!(head.headers.len(), 2);
    for status in ["5", "x", ""] {
        let (head, _) = answer(&[("grpc-status", status), ("grpc-message", "gone")]);
        assert_eq!(head.status, StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(head.headers[GRPC_STATUS], status);
        assert_eq!(head.headers[GRPC_MESSAGE], "gone");
    }
}

#[test]
fn an_answer_is_held_up_to_a_limit() {
    let mut body = Body::Full(Bytes::from_static(b"message"));
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    assert!(matches!(runtime.block_on(read(&mut body, 6)), Err(Unread::TooLong)));
}

#[test]
fn messages_are_put_into_frames_and_taken_out_of_them() {
    let progress = Progress::new(crate::runtime::clock::now(), true);
    let framed = |limit| InFrame::new(Body::Full(Bytes::from_static(b"message")), limit, &progress);
    let mut body = Body::Wrapped(Box::new(framed(7)));
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    assert_eq!(body.size_hint().exact(), None);
    let Ok((data, None)) = runtime.block_on(read(&mut body, 100)) else { panic!("not read") };
    assert_eq!(data, &b"\0\0\0\0\x07message"[..]);
    assert_eq!(out_of_frame(data), "message");
    assert_eq!(out_of_frame(Bytes::from_static(b"\0\0\0")), "");
    let mut long = std::pin::pin!(framed(6));
    assert!(long.as_mut().poll_frame(&mut Context::from_waker(std::task::Waker::noop())).is_pending());
    assert_eq!(progress.take_answer().map(|reply| reply.status), Some(StatusCode::PAYLOAD_TOO_LARGE));
}

#[test]
fn paths_lose_their_queries() {
    for (uri, expected) in
        [("/a.B/C?x=1?y", "/a.B/C"), ("http://host/a.B/C?x", "http://host/a.B/C"), ("/a.B/C", "/a.B/C"), ("/?", "/")]
    {
        let mut uri = Uri::from_static(uri);
        drop_query(&mut uri);
        assert_eq!(uri, expected);
    }
}

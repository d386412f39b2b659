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

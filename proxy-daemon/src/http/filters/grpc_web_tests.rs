use super::*;
use crate::http::buffered::Buffered;

fn message(text: &str) -> Vec<u8> {
    let length = u32::try_from(text.len()).unwrap();
    [&[0], &length.to_be_bytes()[..], text.as_bytes()].concat()
}

async fn framed(text: bool) -> Bytes {
    let trailers = HeaderMap::from_iter([(GRPC_STATUS, HeaderValue::from_static("0"))]);
    let body = Body::Wrapped(Box::new(Buffered::new(message("hello").into(), Some(trailers))));
    let body = Framed { body, encoder: text.then(Encoder::default), call: None, ended: false };
    let collected = body.collect().await.unwrap();
    assert!(collected.trailers().is_none());
    collected.to_bytes()
}

#[tokio::test]
async fn trailers_are_the_last_frame() {
    let whole = [message("hello"), b"\x80\0\0\0\x0fgrpc-status:0\r\n".to_vec()].concat();
    assert_eq!(framed(false).await, whole);
    let text = STANDARD.encode(message("hello")) + &STANDARD.encode(&whole[10..]);
    assert_eq!(framed(true).await, text);
}

#[test]
fn frames_are_encoded_each_by_itself_wherever_their_bytes_are_parted() {
    let messages = ["a", "", "four", "a longer text"].map(message);
    let whole: String = messages.iter().map(|message| STANDARD.encode(message)).collect();
    for size in [1, 2, 5, 100] {
        let (mut encoder, mut text) = (Encoder::default(), String::new());
        messages.concat().chunks(size).for_each(|piece| encoder.encode(piece, &mut text));
        assert_eq!(text, whole, "{size}");
    }
}

#[tokio::test]
async fn base64_is_decoded_four_by_four() {
    let text = STANDARD.encode("a") + &STANDARD.encode("bcd");
    let decoded = |text: String| async {
        let progress = Progress::new(std::time::Instant::now(), false);
        let body =
            Decoded { body: Body::Full(text.into()), held: Vec::new(), progress: Rc::clone(&progress), ended: false };
        let collected = body.collect().await.map(|collected| collected.to_bytes());
        let refused = progress.instead.take().map(|reply| (reply.status.as_u16(), reply.details.into_owned()));
        collected.map_err(|_| refused)
    };
    assert_eq!(decoded(text.clone()).await.unwrap(), "abcd");
    for (bad, details) in
        [(text + "YQ", "grpc_base_64_decode_failed_bad_size"), ("!!!!".to_owned(), "grpc_base_64_decode_failed")]
    {
        assert_eq!(decoded(bad).await, Err(Some((400, details.to_owned()))));
    }
}

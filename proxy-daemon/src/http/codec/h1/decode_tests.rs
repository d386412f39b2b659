use super::*;

const LIMITS: Limits = Limits { bytes: 1024, headers: 8, any_method: false };

/// Feeds the pieces one after the other: the body, the trailers, and what is left behind it.
fn decode(pieces: &[&[u8]]) -> Result<Option<(Vec<u8>, HeaderMap, BytesMut)>, CodecError> {
    let (mut decoder, mut buffer, mut body) = (Decoder::new(Framing::Chunked), BytesMut::new(), Vec::new());
    for (at, piece) in pieces.iter().enumerate() {
        buffer.extend_from_slice(piece);
        while let Some(item) = decoder.decode(&mut buffer, LIMITS)? {
            match item {
                Item::Data(data) => body.extend_from_slice(&data),
                Item::End(trailers) => {
                    pieces[at + 1..].iter().for_each(|piece| buffer.extend_from_slice(piece));
                    return Ok(Some((body, trailers, buffer)));
                }
            }
        }
    }
    Ok(None)
}

#[test]
fn every_split_of_a_chunked_body() {
    let whole = b"5;ext=\"1\"\r\nhello\r\n00a \r\n, worldly \r\n0\r\nx-t: 1\r\n\r\nGET";
    for first in 0..whole.len() {
        for second in first..whole.len() {
            let pieces = [&whole[..first], &whole[first..second], &whole[second..]];
            let (body, trailers, rest) = decode(&pieces).unwrap().expect("a whole body");
            assert_eq!(body, b"hello, worldly ", "{first} {second}");
            assert_eq!((trailers["x-t"].as_bytes(), &rest[..]), (&b"1"[..], &b"GET"[..]), "{first} {second}");
        }
    }
}

#[test]
fn a_body_may_have_as_many_chunks_as_it_likes() {
    let many = [b"1\r\nx\r\n".repeat(20_000), b"0\r\n\r\n".to_vec()].concat();
    let (body, ..) = decode(&[&many]).unwrap().expect("a whole body");
    assert_eq!(body.len(), 20_000);
}

#[test]
fn what_is_refused() {
    let long = format!("5;{}\r\n", "a".repeat(17_000));
    let zeros = format!("{}5\r\n", "0".repeat(17_000));
    for text in [
        "\r\n",
        "zz\r\n",
        "-5\r\n",
        "+5\r\n",
        "0x5\r\n",
        " 5\r\n",
        "5\n",
        "5;a\nb\r\n",
        "5;a\rb\r\n",
        "5;a\0b\r\n",
        "fffffffffffffffff\r\n",
        "ffffffffffffffff\r\n",
        "5\r\nhello\n",
        "3\r\nhello\r\n",
        "0\n\n",
        "0\r\n\n",
        "0\r\nx t: 1\r\n\r\n",
        "0\r\nxt\r\n\r\n",
        "0\r\nx: t\r\n u\r\n\r\n",
        &long,
        &zeros,
    ] {
        assert_eq!(decode(&[text.as_bytes()]).map(|_| ()), Err(CodecError::CODEC), "{text:.30?}");
    }
    let many = format!("0\r\n{}\r\n", "a: b\r\n".repeat(9));
    assert_eq!(decode(&[many.as_bytes()]).map(|_| ()), Err(CodecError::TOO_MANY_HEADERS));
    let large = format!("0\r\nx: {}", "a".repeat(2000));
    assert_eq!(decode(&[large.as_bytes()]).map(|_| ()), Err(CodecError::HEADERS_TOO_LARGE));
}

#[test]
fn a_body_of_known_length_takes_no_more() {
    let (mut decoder, mut buffer) = (Decoder::new(Framing::Length(5)), BytesMut::from(&b"hel"[..]));
    let Ok(Some(Item::Data(data))) = decoder.decode(&mut buffer, LIMITS) else { panic!("data") };
    assert_eq!((&data[..], decoder.is_done()), (&b"hel"[..], false));
    buffer.extend_from_slice(b"loGET");
    let Ok(Some(Item::Data(data))) = decoder.decode(&mut buffer, LIMITS) else { panic!("data") };
    assert_eq!((&data[..], decoder.is_done(), &buffer[..]), (&b"lo"[..], true, &b"GET"[..]));
}

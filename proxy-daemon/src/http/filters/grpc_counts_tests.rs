use super::*;

#[test]
fn messages_are_counted_wherever_their_bytes_are_parted() {
    let mut bytes = Vec::new();
    for length in [0_u32, 3, 300] {
        bytes.push(0);
        bytes.extend(length.to_be_bytes());
        bytes.extend(vec![7; length as usize]);
    }
    for size in [1, 2, 4, 7, 1000] {
        let mut messages = Messages::default();
        let begun: u64 = bytes.chunks(size).map(|piece| messages.begun(piece)).sum();
        assert_eq!((begun, messages.header, messages.left), (3, 0, 0), "{size}");
    }
}

#[test]
fn nothing_is_counted_behind_what_is_no_message() {
    let mut messages = Messages::default();
    assert_eq!(messages.begun(b"\0\0\0\0\x01a\x01\0\0\0\0\x02\0\0\0\0"), 2);
    assert_eq!(messages.begun(b"\0\0\0\0\x01a"), 0);
}

#[test]
fn a_path_of_two_parts_names_a_method() {
    for (path, named) in [
        ("/a.B/C", Some(("a.B", "C"))),
        ("/a.B/C?x=/1", Some(("a.B", "C"))),
        ("/a.B", None),
        ("/a/b/c", None),
        ("/", None),
    ] {
        let (head, ()) = http::Request::builder().uri(path).body(()).unwrap().into_parts();
        assert_eq!(service_and_method(&head), named, "{path}");
    }
}

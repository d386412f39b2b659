use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::{HeaderMap, HeaderValue};
use proptest::prelude::*;
use prost::Message as _;

use super::*;

/// A header as a client of the original tracer wrote it.
const PUBLISHED: &str = "EigJOjioEaYHBgcRNmifUO7/xlgYASISCgdjaGVja2VkEgdiYWdnYWdl";

fn published() -> SpanContext {
    SpanContext {
        trace_id: 506_100_417_967_962_170,
        span_id: 6_397_081_719_746_291_766,
        sampled: true,
        baggage: BTreeMap::from([("checked".to_owned(), "baggage".to_owned())]),
    }
}

fn users_override() -> Overrides {
    Overrides::new([("users", "feature-x")]).unwrap()
}

fn span_context_with(overrides: &Overrides) -> String {
    let baggage = BTreeMap::from([(BAGGAGE_ITEM.to_owned(), overrides.to_baggage_item())]);
    encode_ot_span_context(&SpanContext { trace_id: 1, span_id: 2, sampled: false, baggage })
}

fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
    pairs.iter().map(|(name, value)| (HeaderName::from_static(name), value.parse().unwrap())).collect()
}

#[test]
fn published_span_context_is_read_and_written() {
    assert_eq!(decode_ot_span_context(PUBLISHED.as_bytes()), Ok(published()));
    assert_eq!(encode_ot_span_context(&published()), PUBLISHED);
}

#[test]
fn span_context_keys_are_lower_cased() {
    let context = SpanContext { baggage: BTreeMap::from([("OverRides".into(), "v".into())]), ..published() };
    let decoded = decode_ot_span_context(encode_ot_span_context(&context).as_bytes()).unwrap();
    assert_eq!(decoded.baggage, BTreeMap::from([("overrides".into(), "v".into())]));
}

#[test]
fn corrupted_span_contexts_say_what_is_wrong() {
    let unpadded = STANDARD.encode([0x12, 0]).trim_end_matches('=').to_owned();
    for (value, expected) in [
        ("not base64!", "x-ot-span-context is corrupted: not standard padded base64"),
        (unpadded.as_str(), "x-ot-span-context is corrupted: not standard padded base64"),
        (STANDARD.encode([0x12, 0x50]).as_str(), "x-ot-span-context is corrupted: not a BinaryCarrier message"),
        (STANDARD.encode([0x0a, 0x01, 0x61]).as_str(), "has no basic_ctx"),
        ("A".repeat(MAX_HEADER_BYTES + 4).as_str(), "bytes long, at most 65536 are read"),
    ] {
        let error = decode_ot_span_context(value.as_bytes()).unwrap_err().to_string();
        assert!(error.contains(expected), "{error:?} does not contain {expected:?}");
    }
}

#[test]
fn overrides_match_with_and_without_namespace() {
    let overrides = Overrides::new([("users", "feature-x"), ("orders.shop", "r2")]).unwrap();
    assert_eq!(overrides.revision_of("users.default"), Some("feature-x"));
    assert_eq!(overrides.revision_of("users.shop"), None);
    assert_eq!(overrides.revision_of("orders.shop"), Some("r2"));
    assert_eq!(overrides.revision_of("orders.default"), None);
    assert_eq!(overrides.revision_of(""), None);
}

#[test]
fn overrides_outside_the_limits_are_refused() {
    let long = "a".repeat(64);
    let cases: [(Vec<(String, String)>, &str); 7] = [
        (vec![(String::new(), "r".into())], "overrides[0].service ``"),
        (vec![("Users".into(), "r".into())], "overrides[0].service `Users`"),
        (vec![("a.b.c".into(), "r".into())], "overrides[0].service `a.b.c`"),
        (vec![("users".into(), String::new())], "overrides[0].revision ``"),
        (vec![("users".into(), long)], "overrides[0].revision `aaaa"),
        (
            vec![("users".into(), "1".into()), ("users.default".into(), "2".into())],
            "`users.default` is overridden twice",
        ),
        ((0..65).map(|i| (format!("s{i}"), "r".into())).collect(), "65 overrides, at most 64"),
    ];
    for (entries, expected) in cases {
        let error = Overrides::new(entries).unwrap_err().to_string();
        assert!(error.contains(expected), "{error:?} does not contain {expected:?}");
    }
    let newer = Overrides { version: 2, overrides: Vec::new() }.to_baggage_item();
    assert_eq!(Overrides::from_baggage_item(&newer), Err(ContextError::UnknownVersion(2)));
    assert_eq!(Overrides::from_baggage_item(""), Err(ContextError::UnknownVersion(0)));
}

#[test]
fn the_largest_overrides_fit_into_a_header() {
    let name = |i: usize| format!("{i:0>63}.{i:0>63}");
    let overrides = Overrides::new((0..MAX_OVERRIDES).map(|i| (name(i), "r".repeat(MAX_REVISION_BYTES)))).unwrap();
    let headers = headers(&[("x-ot-span-context", &span_context_with(&overrides))]);
    assert_eq!(overrides_from_headers(&headers), Some(Ok(overrides)));
}

#[test]
fn headers_are_read_in_order_of_precedence() {
    let [first, second, third] = ["one", "two", "three"].map(|r| Overrides::new([("users", r)]).unwrap());
    let (span, own) = (span_context_with(&first), second.to_baggage_item());
    let w3c = format_baggage([("k", "v"), (BAGGAGE_ITEM, &third.to_baggage_item())]);
    let all = [("x-ot-span-context", &*span), ("ot-baggage-overrides", &*own), ("baggage", &*w3c)];
    assert_eq!(overrides_from_headers(&headers(&all)), Some(Ok(first)));
    assert_eq!(overrides_from_headers(&headers(&all[1..])), Some(Ok(second.clone())));
    assert_eq!(overrides_from_headers(&headers(&all[2..])), Some(Ok(third)));
    assert_eq!(overrides_from_headers(&headers(&[])), None);
    // A span context without the item leaves the word to the next header.
    let other = [("x-ot-span-context", PUBLISHED), all[1]];
    assert_eq!(overrides_from_headers(&headers(&other)), Some(Ok(second)));
    // A damaged one does not.
    let damaged = [("x-ot-span-context", "%"), all[1]];
    assert!(matches!(overrides_from_headers(&headers(&damaged)), Some(Err(ContextError::Base64 { .. }))));
}

#[test]
fn baggage_without_overrides_is_not_an_error() {
    assert_eq!(overrides_from_headers(&headers(&[("baggage", "userId=alice,broken,=x,k=%zz")])), None);
}

#[test]
fn baggage_of_several_headers_counts_together() {
    let item = format_baggage([(BAGGAGE_ITEM, &*users_override().to_baggage_item())]);
    let mut many = HeaderMap::new();
    many.append(BAGGAGE, HeaderValue::from_static("a=1"));
    many.append(BAGGAGE, item.parse().unwrap());
    assert_eq!(overrides_from_headers(&many), Some(Ok(users_override())));

    let mut members = HeaderMap::new();
    let sixty_four = vec!["k=v"; 64].join(",");
    members.append(BAGGAGE, sixty_four.parse().unwrap());
    members.append(BAGGAGE, item.parse().unwrap());
    assert_eq!(overrides_from_headers(&members), Some(Err(ContextError::TooManyMembers)));

    let mut long = HeaderMap::new();
    long.append(BAGGAGE, format!("k={}", "v".repeat(MAX_BAGGAGE_BYTES - 2)).parse().unwrap());
    assert_eq!(overrides_from_headers(&long), None);
    long.append(BAGGAGE, item.parse().unwrap());
    assert!(matches!(overrides_from_headers(&long), Some(Err(ContextError::TooLong { what: "baggage", .. }))));
}

#[test]
fn baggage_follows_the_specification() {
    // The examples of https://www.w3.org/TR/baggage/ with properties and optional white space.
    let parsed =
        parse_baggage(b"key1=value1;property1;property2, key2 = value2, key3=value3; propertyKey=propertyValue");
    let members = [("key1", "value1"), ("key2", "value2"), ("key3", "value3")];
    assert_eq!(parsed.unwrap().members, members.map(|(k, v)| (k.to_owned(), v.to_owned())));
    let parsed = parse_baggage(b"userId=Am%C3%A9lie,serverNode=DF%2028,eq=a=b==,broken=%f,n o=x").unwrap();
    assert_eq!(parsed.members[..3].iter().map(|(_, v)| &**v).collect::<Vec<_>>(), ["Amélie", "DF 28", "a=b=="]);
    assert_eq!(parsed.malformed, 2);
}

#[test]
fn overrides_value_survives_readers_that_mangle_plus_and_slash() {
    let header = format_baggage([(BAGGAGE_ITEM, "a+b/c==")]);
    assert_eq!(header, "overrides=a%2Bb%2Fc%3D%3D");
}

proptest! {
    #[test]
    fn span_contexts_round_trip(
        trace_id: u64, span_id: u64, sampled: bool,
        baggage in prop::collection::btree_map("[a-z0-9-]{0,12}", ".{0,40}", 0..8),
    ) {
        let context = SpanContext { trace_id, span_id, sampled, baggage };
        prop_assert_eq!(decode_ot_span_context(encode_ot_span_context(&context).as_bytes()), Ok(context));
    }

    #[test]
    fn baggage_round_trips(members in prop::collection::vec(("[a-zA-Z0-9!#$&'*+.^_`|~-]{1,12}", ".{0,20}"), 0..20)) {
        let header = format_baggage(members.iter().map(|(k, v)| (&**k, &**v)));
        prop_assert_eq!(parse_baggage(header.as_bytes()), Ok(Baggage { members, malformed: 0 }));
    }

    #[test]
    fn overrides_round_trip(
        entries in prop::collection::btree_map("[a-z]{1,9}\\.[a-z]{1,9}", "[a-zA-Z0-9._-]{1,63}", 0..MAX_OVERRIDES),
    ) {
        let overrides = Overrides::new(entries).unwrap();
        prop_assert_eq!(Overrides::from_baggage_item(&overrides.to_baggage_item()), Ok(overrides.clone()));
        let headers = headers(&[("x-ot-span-context", &span_context_with(&overrides))]);
        prop_assert_eq!(overrides_from_headers(&headers), Some(Ok(overrides)));
    }

    #[test]
    fn hostile_input_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..300), name in 0..3usize) {
        let _ = decode_ot_span_context(&bytes);
        let _ = decode_ot_span_context(STANDARD.encode(&bytes).as_bytes());
        let _ = parse_baggage(&bytes);
        let _ = Overrides::from_baggage_item(&String::from_utf8_lossy(&bytes));
        let _ = Overrides::from_baggage_item(&STANDARD.encode(&bytes));
        if let Ok(value) = HeaderValue::from_bytes(&bytes) {
            let mut headers = HeaderMap::new();
            headers.append([OT_SPAN_CONTEXT, OT_BAGGAGE_OVERRIDES, BAGGAGE][name].clone(), value);
            let _ = overrides_from_headers(&headers);
        }
    }

    #[test]
    fn damaged_overrides_never_panic(position: prop::sample::Index, bit in 0..8u32) {
        let mut bytes = users_override().encode_to_vec();
        let at = position.index(bytes.len());
        bytes[at] ^= 1 << bit;
        let _ = Overrides::from_baggage_item(&STANDARD.encode(&bytes));
    }
}

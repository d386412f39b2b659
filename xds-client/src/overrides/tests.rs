use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::{HeaderMap, HeaderName, HeaderValue};
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
    let mut headers = HeaderMap::new();
    for (name, value) in pairs {
        headers.append(HeaderName::from_static(name), value.parse().unwrap());
    }
    headers
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
    let cases: [(Vec<(String, String)>, &str); 8] = [
        (vec![(String::new(), "r".into())], "overrides[0].service ``"),
        (vec![("Users".into(), "r".into())], "overrides[0].service `Users`"),
        (vec![("a.b.c".into(), "r".into())], "overrides[0].service `a.b.c`"),
        (vec![("users".into(), String::new())], "overrides[0] asks for nothing"),
        (vec![("users".into(), "a/b".into())], "overrides[0].revision `a/b`"),
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
    let newer = Overrides { version: 2, ..Overrides::default() }.to_baggage_item();
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
fn other_tracers_baggage_is_read_after_these() {
    let [jaeger, people, b3] = ["jaeger", "people", "b3"].map(|r| Overrides::new([("users", r)]).unwrap());
    let escaped = jaeger.to_baggage_item().replace('+', "%2B").replace('/', "%2f").replace('=', "%3D");
    let members = format!("a=1, {}", format_baggage([(BAGGAGE_ITEM, &*people.to_baggage_item())]));
    let item = b3.to_baggage_item();
    let all = [("uberctx-overrides", &*escaped), ("jaeger-baggage", &*members), ("baggage-overrides", &*item)];
    assert_eq!(overrides_from_headers(&headers(&all)), Some(Ok(jaeger)));
    assert_eq!(overrides_from_headers(&headers(&all[1..])), Some(Ok(people)));
    assert_eq!(overrides_from_headers(&headers(&all[2..])), Some(Ok(b3)));
    let found = find(&headers(&all), MAX_HEADER_BYTES).unwrap().unwrap();
    assert_eq!(found.carrier, UBERCTX_OVERRIDES);
}

#[test]
fn headers_that_contradict_themselves_are_refused() {
    let [one, two] = ["one", "two"].map(|r| Overrides::new([("users", r)]).unwrap().to_baggage_item());
    for name in ["ot-baggage-overrides", "uberctx-overrides", "baggage-overrides"] {
        let error = overrides_from_headers(&headers(&[(name, &one), (name, &two)])).unwrap().unwrap_err();
        assert_eq!(error.to_string(), format!("{name} is there twice, and says different things"));
        assert!(overrides_from_headers(&headers(&[(name, &one), (name, &one)])).unwrap().is_ok());
    }
    let both = format_baggage([(BAGGAGE_ITEM, &*one), (BAGGAGE_ITEM, &*two)]);
    for lines in [vec![("baggage", &*both)], both.split(',').map(|member| ("baggage", member)).collect()] {
        let error = overrides_from_headers(&headers(&lines)).unwrap().unwrap_err();
        assert_eq!(error, ContextError::Contradicts { what: "baggage" });
    }
}

#[test]
fn less_may_be_looked_at() {
    let item = users_override().to_baggage_item();
    let w3c = format_baggage([(BAGGAGE_ITEM, &*item)]);
    let span = span_context_with(&users_override());
    for (name, value) in [("ot-baggage-overrides", item), ("baggage", w3c), ("x-ot-span-context", span)] {
        let headers = headers(&[(name, &value)]);
        assert!(find(&headers, value.len()).unwrap().is_ok(), "{name}");
        let error = find(&headers, value.len() - 1).unwrap().unwrap_err();
        assert!(matches!(error, ContextError::TooLong { what, .. } if what == name), "{error}");
    }
}

#[test]
fn overrides_are_taken_out_of_every_format() {
    let item = users_override().to_baggage_item();
    let w3c = format!("a=1;p=q,{}, b=2", format_baggage([(BAGGAGE_ITEM, &*item)]));
    let baggage = BTreeMap::from([(BAGGAGE_ITEM.to_owned(), item.clone()), ("k".to_owned(), "v".to_owned())]);
    let span = SpanContext { baggage, ..published() };
    let mut all = headers(&[
        ("x-ot-span-context", &encode_ot_span_context(&span)),
        ("x-ot-span-context", "unreadable"),
        ("ot-baggage-overrides", &item),
        ("ot-baggage-other", "stays"),
        ("baggage", &w3c),
        // What somebody else might read as it.
        ("baggage", "Overrides=1,%6fverrides=2,over%zz=3"),
        ("uberctx-overrides", &item),
        ("jaeger-baggage", "overrides=x"),
        ("baggage-overrides", &item),
        ("traceparent", "stays"),
    ]);
    assert!(carries_overrides(&all) && strip(&mut all));
    let left = SpanContext { baggage: BTreeMap::from([("k".to_owned(), "v".to_owned())]), ..published() };
    let expected = headers(&[
        ("x-ot-span-context", &encode_ot_span_context(&left)),
        ("ot-baggage-other", "stays"),
        ("baggage", "a=1;p=q,b=2"),
        ("traceparent", "stays"),
    ]);
    assert_eq!(all, expected);
    assert!(!strip(&mut all) && all == expected, "what is clean stays as it is");
    let mut long = headers(&[("baggage", &format!("k={}", "v".repeat(MAX_BAGGAGE_BYTES)))]);
    assert!(strip(&mut long) && long.is_empty(), "what is not read to its end does not pass");
}

fn actions() -> Override {
    Override {
        service: "users".into(),
        fault: Some(Fault { http_status: Some(503), grpc_status: None }),
        delay_ms: 100,
        timeout_ms: 2000,
        debug: true,
        sample: Some(true),
        config: vec![ConfigValue { name: "new-checkout".into(), value: "on, please".into() }],
        ..Override::default()
    }
}

#[test]
fn actions_are_told_and_read() {
    let message = Overrides::of(vec![actions()], 5).unwrap();
    assert_eq!(Overrides::from_baggage_item(&message.to_baggage_item()).as_ref(), Ok(&message));
    let entry = message.of_service("users.default").unwrap();
    let names: Vec<_> = entry.actions().map(Action::name).collect();
    assert_eq!(names, ["debug", "sample", "config", "timeout", "delay", "fault"]);
    assert_eq!(entry.config_header(), "new-checkout=on%2C%20please");
    assert_eq!(entry.in_words(Action::Fault), "answered with status 503");
    assert_eq!(message.revision_of("users.default"), None);
    assert!(!message.is_expired(4) && message.is_expired(5));
}

#[test]
fn actions_outside_the_limits_are_refused() {
    let value = |name: &str, value: &str| ConfigValue { name: name.into(), value: value.into() };
    let with = |change: &dyn Fn(&mut Override)| {
        let mut entry = actions();
        change(&mut entry);
        Overrides::of(vec![entry], 0).unwrap_err().to_string()
    };
    let fault = |http_status, grpc_status| with(&|it| it.fault = Some(Fault { http_status, grpc_status }));
    for wrong in [
        fault(None, None),
        fault(Some(200), Some(0)),
        fault(Some(199), None),
        fault(Some(600), None),
        fault(None, Some(17)),
    ] {
        assert!(wrong.starts_with("overrides[0].fault is not one HTTP status"), "{wrong}");
    }
    let config = |config: Vec<ConfigValue>| with(&|it| it.config = config.clone());
    assert!(config(vec![value("a", "b"), value("a", "c")]).contains("a name twice"));
    assert!(config(vec![value("A", "b")]).contains("a name that is not"));
    assert!(config(vec![value("a", "b\nx: y")]).contains("control characters"));
    assert!(config(vec![value("a", &"b".repeat(257))]).contains("256 bytes"));
    assert!(config((0..17).map(|i| value(&i.to_string(), "")).collect()).contains("more than 16"));
    let address = |address: &str| with(&|it| it.address = address.into());
    for wrong in ["users", "10.0.0.1:0", "10.0.0.1:70000", "[::1]"] {
        assert!(address(wrong).contains("is not an IP address"), "{wrong}");
    }
    let both = with(&|it| (it.address, it.revision) = ("10.0.0.1".into(), "x".into()));
    assert!(both.contains("beside a revision"), "{both}");
}

const KEY: &[u8] = b"0123456789abcdef0123456789abcdef";

#[test]
fn signatures_hold_for_one_key_one_id_and_one_message() {
    let message = Overrides::of(vec![actions()], 1000).unwrap();
    let signed = message.sign("k1", KEY).unwrap();
    let read = Overrides::from_baggage_item(&signed.to_baggage_item()).unwrap();
    let signature = read.signed.unwrap();
    assert!(signature.is_of(KEY));
    assert_eq!(signature.message(), Ok(message.clone()));
    assert!(!signature.is_of(b"0123456789abcdef0123456789abcdeF"), "another key");
    let other = Overrides::new([("users", "other")]).unwrap().encode_to_vec();
    assert!(!Signed { payload: other, ..signature.clone() }.is_of(KEY), "another set");
    assert!(!Signed { key_id: "k2".into(), ..signature.clone() }.is_of(KEY), "another id");
    let mut damaged = signature.clone();
    damaged.signature[31] ^= 1;
    assert!(!damaged.is_of(KEY));
}

#[test]
fn the_signature_of_a_message_does_not_change() {
    // By `openssl dgst -sha256 -hmac` over the bytes that the proto names.
    let signed = Overrides::of(vec![Override { service: "a".into(), revision: "b".into(), ..Default::default() }], 1);
    let signed = signed.unwrap().sign("k", KEY).unwrap().signed.unwrap();
    let hex: String = signed.signature.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(
        (signed.payload.as_slice(), &*hex),
        (
            &b"\x08\x01\x12\x06\x0a\x01a\x12\x01b\x18\x01"[..],
            "95cd27ba06aa999745aa65864e63bafc009c4fd2691498e7db2d09807aa9b1fa"
        )
    );
}

#[test]
fn signed_messages_are_formed_one_way() {
    let ends = Overrides::of(vec![actions()], 1000).unwrap();
    let signed = ends.sign("k1", KEY).unwrap();
    let refuses = |message: &Overrides, expected: &str| {
        let error = Overrides::from_baggage_item(&message.to_baggage_item()).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    };
    refuses(&Overrides { overrides: vec![actions()], ..signed.clone() }, "something beside it");
    refuses(&Overrides { expires: 9, ..signed.clone() }, "something beside it");
    let with = |change: &dyn Fn(&mut Signed)| {
        let mut signed = signed.clone();
        change(signed.signed.as_mut().unwrap());
        signed
    };
    refuses(&with(&|it| it.key_id = "k\n1".into()), "key id");
    refuses(&with(&|it| it.signature.truncate(31)), "32 bytes");
    let inner =
        |message: &Overrides| Signed { payload: message.encode_to_vec(), ..signed.signed.clone().unwrap() }.message();
    assert_eq!(inner(&signed), Err(ContextError::BadSigned("is signed twice")));
    assert_eq!(inner(&users_override()), Err(ContextError::BadSigned("does not expire")));
    for (message, id, key, expected) in [
        (&users_override(), "k1", KEY, "does not expire"),
        (&ends, "k 1", KEY, "key id"),
        (&ends, "k1", &KEY[1..], "at least 32 bytes"),
        (&signed, "k1", KEY, "signed already"),
    ] {
        let error = message.sign(id, key).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    assert_eq!((key_of_file(b"k\r\n"), key_of_file(b"k\n\n"), key_of_file(b"k")), (&b"k"[..], &b"k\n"[..], &b"k"[..]));
}

#[test]
fn all_trace_contexts_are_told_whether_they_are_recorded() {
    let trace = "0af7651916cd43dd8448eb211c80319c";
    let ids = |flags: &str| format!("00-{trace}-b7ad6b7169203331-{flags}");
    let span = |sampled| encode_ot_span_context(&SpanContext { sampled, ..published() });
    for (name, before, yes, no) in [
        ("traceparent", ids("00"), ids("01"), ids("00")),
        ("traceparent", ids("03"), ids("03"), ids("02")),
        ("b3", format!("{trace}-1"), format!("{trace}-1-1"), format!("{trace}-1-0")),
        ("b3", "t-s-d-p".into(), "t-s-1-p".into(), "t-s-0-p".into()),
        ("b3", "0".into(), "1".into(), "0".into()),
        ("uber-trace-id", "a:b:0:2".into(), "a:b:0:3".into(), "a:b:0:0".into()),
        ("uber-trace-id", "a%3Ab%3A0%3A0".into(), "a%3Ab%3A0%3A1".into(), "a%3Ab%3A0%3A0".into()),
        ("x-ot-span-context", PUBLISHED.into(), span(true), span(false)),
    ] {
        for (sampled, expected) in [(true, yes), (false, no)] {
            let mut headers = headers(&[(name, &before)]);
            assert!(has_trace_context(&headers) && set_sampled(&mut headers, sampled));
            assert_eq!((headers[name].to_str().unwrap(), headers.len()), (&*expected, 1), "{name} {sampled}");
        }
    }
    let mut b3 =
        headers(&[("x-b3-traceid", "1"), ("x-b3-flags", "1"), ("x-datadog-trace-id", "1"), ("ot-tracer-traceid", "1")]);
    assert!(set_sampled(&mut b3, false));
    for (name, value) in [("x-b3-sampled", "0"), ("x-datadog-sampling-priority", "-1"), ("ot-tracer-sampled", "false")]
    {
        assert_eq!(b3[name], value);
    }
    assert!(!b3.contains_key("x-b3-flags"));
    for broken in
        [None, Some("00-zz"), Some("\u{e9}"), Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01x")]
    {
        let mut none: HeaderMap = headers(&broken.map(|broken| vec![("traceparent", broken)]).unwrap_or_default());
        assert!(!set_sampled(&mut none, false));
        assert!(set_sampled(&mut none, true), "a trace begins");
        let made = none["traceparent"].to_str().unwrap();
        assert!(made.len() == 55 && made.starts_with("00-") && made.ends_with("-01"), "{made}");
    }
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
    fn hostile_input_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..300), name in 0..CARRIERS.len()) {
        let _ = decode_ot_span_context(&bytes);
        let _ = decode_ot_span_context(STANDARD.encode(&bytes).as_bytes());
        let _ = parse_baggage(&bytes);
        let _ = Overrides::from_baggage_item(&String::from_utf8_lossy(&bytes));
        let _ = Overrides::from_baggage_item(&STANDARD.encode(&bytes));
        if let Ok(value) = HeaderValue::from_bytes(&bytes) {
            let mut headers = HeaderMap::new();
            headers.append(&CARRIERS[name], value);
            let _ = overrides_from_headers(&headers);
            strip(&mut headers);
            prop_assert!(!matches!(overrides_from_headers(&headers), Some(Ok(_))), "{:?}", headers);
            prop_assert!(overrides_from_headers(&headers).is_none(), "{:?}", headers);
            set_sampled(&mut headers, true);
        }
    }

    #[test]
    fn damaged_headers_never_break_what_must_hold(
        which: u8, carrier in 0..CARRIERS.len(), position: prop::sample::Index, bit in 0..7u32, signed: bool,
    ) {
        let message = Overrides::of(vec![actions()], 1000).unwrap();
        let message = if signed { message.sign("k1", KEY).unwrap() } else { message };
        let item = message.to_baggage_item();
        let mut value = match CARRIERS[carrier].as_str() {
            "x-ot-span-context" => span_context_with(&message),
            "baggage" | "jaeger-baggage" => format_baggage([("a", "b"), (BAGGAGE_ITEM, &item)]),
            _ => item,
        }
        .into_bytes();
        let at = position.index(value.len());
        value[at] ^= 1 << bit;
        fuzz(&[&[which], &value[..]].concat());
    }

    #[test]
    fn damaged_overrides_never_panic(position: prop::sample::Index, bit in 0..8u32) {
        let mut bytes = users_override().encode_to_vec();
        let at = position.index(bytes.len());
        bytes[at] ^= 1 << bit;
        let _ = Overrides::from_baggage_item(&STANDARD.encode(&bytes));
    }
}

#[test]
fn lines_that_together_are_more_than_is_read_go() {
    let line = HeaderValue::try_from(["a=b"; 40].join(",")).unwrap();
    for name in [BAGGAGE, JAEGER_BAGGAGE] {
        let mut headers = HeaderMap::new();
        headers.append(&name, line.clone());
        headers.append(&name, line.clone());
        assert!(strip(&mut headers));
        assert_eq!((find(&headers, usize::MAX), headers.contains_key(&name)), (None, false), "{name}");
        headers.append(&name, line.clone());
        assert!(!strip(&mut headers) && headers.contains_key(&name), "{name}: one of them is read");
    }
}

#[test]
fn a_share_is_a_token_and_the_message_itself_counts_before_it() {
    let entries = |entries: &[(&str, &str)]| Overrides::new(entries.iter().copied()).unwrap();
    let none = entries(&[]);
    for token in ["", "abcd2345", &"a".repeat(64)] {
        let item = none.clone().with_share(token).unwrap().to_baggage_item();
        assert_eq!(Overrides::from_baggage_item(&item).unwrap().share, token);
    }
    for token in ["abcd234", &"a".repeat(65), "ABCD2345", "abcd 2345", "abcd-2345"] {
        let error = none.clone().with_share(token).unwrap_err();
        assert!(matches!(error, ContextError::BadShare(_)), "{token}: {error}");
    }
    let share = entries(&[("users", "a"), ("orders.shop", "b"), ("front", "c")]);
    let own = entries(&[("users.default", "mine"), ("pay", "d")]).with_share("abcd2345").unwrap();
    let joined = own.joined_with(&share).unwrap();
    assert_eq!(joined, entries(&[("orders.shop", "b"), ("front", "c"), ("users.default", "mine"), ("pay", "d")]));
    assert_eq!(none.with_share("abcd2345").unwrap().joined_with(&share).unwrap(), share);
    assert!(own.check_shared() == Err(ContextError::NestedShare) && share.check_shared().is_ok());
    let many: Vec<_> = (0..MAX_OVERRIDES).map(|i| (format!("s{i}"), "r")).collect();
    let many = Overrides::new(many).unwrap();
    assert_eq!(own.joined_with(&many), Err(ContextError::TooManyOverrides(MAX_OVERRIDES + 2)));
}

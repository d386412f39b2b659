use clap::Parser;

use super::*;

#[derive(Parser)]
struct Line {
    #[command(subcommand)]
    command: Command,
}

fn culvert_override(arguments: &[&str]) -> anyhow::Result<String> {
    let line = Line::try_parse_from([&["override"], arguments].concat())?;
    run(line.command)
}

#[test]
fn both_headers_are_made_and_mean_the_same() {
    let text = culvert_override(&["header", "--set", "users=feature-x", "--set", "orders.shop=r2"]).unwrap();
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines.len(), 2);
    assert!(lines[0].starts_with("x-ot-span-context: ") && lines[1].starts_with("baggage: overrides="));
    for line in lines {
        let decoded = culvert_override(&["decode", line]).unwrap();
        assert!(decoded.contains("  users -> revision feature-x\n  orders.shop -> revision r2\n"), "{decoded}");
        let (_, value) = line.split_once(": ").unwrap();
        assert_eq!(culvert_override(&["decode", value]).unwrap(), decoded);
    }
}

#[test]
fn the_wire_format_does_not_change() {
    let line = ["header", "--set", "users=feature-x", "--trace-id", "1", "--span-id", "0x2"];
    let text = culvert_override(&line).unwrap();
    // Checked by hand against the message's definition: 0x12 len, 0x09 trace, 0x11 span, 0x22 the baggage entry.
    let expected = concat!(
        "x-ot-span-context: EkEJAQAAAAAAAAARAgAAAAAAAAAiLQoJb3ZlcnJpZGVzEiBDQUVTRWdvRmRYTmxjbk1TQ1dabFlYUjFj",
        "bVV0ZUE9PQ=="
    );
    assert_eq!(text.lines().next(), Some(expected));
    assert_eq!(
        Overrides::from_baggage_item("CAESEgoFdXNlcnMSCWZlYXR1cmUteA==").unwrap().revision_of("users.default"),
        Some("feature-x")
    );
    assert_eq!(text.lines().nth(1), Some("baggage: overrides=CAESEgoFdXNlcnMSCWZlYXR1cmUteA%3D%3D"));
}

#[test]
fn curl_arguments_survive_word_splitting() {
    let text = culvert_override(&["header", "--set", "users=feature-x", "--output", "curl"]).unwrap();
    let words: Vec<_> = text.split_whitespace().collect();
    assert_eq!(words.len(), 4);
    assert_eq!((words[0], words[2]), ("-H", "-H"));
    assert!(words[1].starts_with("x-ot-span-context:") && words[3].starts_with("baggage:overrides="));
    assert!(!text.contains(['\'', '"', '*', '?', '[', '$', '\\']), "{text}");
}

#[test]
fn one_format_can_be_chosen() {
    for (format, name) in [("baggage", "baggage"), ("x-ot-span-context", "x-ot-span-context")] {
        let text = culvert_override(&["header", "--set", "a=b", "--format", format, "--output", "json"]).unwrap();
        let object: serde_json::Map<String, Value> = serde_json::from_str(&text).unwrap();
        assert_eq!(object.keys().collect::<Vec<_>>(), [name]);
    }
}

#[test]
fn everything_that_can_be_asked_for_is_told() {
    let line = [
        "header",
        "--set",
        "users=x",
        "--delay",
        "users=1.5s",
        "--timeout",
        "users.default=200ms",
        "--debug",
        "users",
        "--sample",
        "users=false",
        "--config",
        "users:a.b=c=d",
        "--fault",
        "orders.shop=grpc:14",
        "--address",
        "front=10.0.0.1:80",
        "--expires",
        "30m",
    ];
    for (format, name) in [
        ("baggage", "baggage"),
        ("x-ot-span-context", "x-ot-span-context"),
        ("ot-baggage-overrides", "ot-baggage-overrides"),
        ("jaeger", "uberctx-overrides"),
        ("b3", "baggage-overrides"),
    ] {
        let text = culvert_override(&[&line[..], &["--format", format]].concat()).unwrap();
        assert!(text.starts_with(&format!("{name}: ")) && text.lines().count() == 1, "{text}");
        let decoded = culvert_override(&["decode", text.trim()]).unwrap();
        for expected in [
            "expires in 1",
            "users -> revision x",
            "users -> delayed by 1500 ms",
            "users -> 200 ms for the answer",
            "users -> logged",
            "users -> trace not recorded",
            "users -> told a.b=c%3Dd",
            "orders.shop -> answered with gRPC status 14",
            "front -> address 10.0.0.1:80",
        ] {
            assert!(decoded.contains(expected), "{format}: {expected} is not in {decoded}");
        }
    }
    let text = culvert_override(&[&line[..], &["--format", "baggage"]].concat()).unwrap();
    let json: Value = serde_json::from_str(&culvert_override(&["decode", &text, "--output", "json"]).unwrap()).unwrap();
    let users = json!({ "service": "users", "revision": "x", "delay_ms": 1500, "timeout_ms": 200, "debug": true,
                        "sample": false, "config": { "a.b": "c=d" } });
    assert_eq!(json["overrides"]["overrides"][0], users);
}

#[test]
fn headers_are_printed_for_browsers_and_grpc() {
    let make =
        |output| culvert_override(&["header", "--set", "a=b", "--format", "baggage", "--output", output]).unwrap();
    let browser = make("browser");
    assert!(browser.starts_with("fetch(location.href, {\"headers\":{\"baggage\":\"overrides="), "{browser}");
    assert!(make("grpcurl").starts_with("-H baggage:overrides="));
}

#[test]
fn what_is_signed_says_by_which_key() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), format!("{}\n", "k".repeat(32))).unwrap();
    let key = format!("dev-1={}", file.path().display());
    let text = culvert_override(&["header", "--set", "users=x", "--sign-key", &key, "--format", "baggage"]).unwrap();
    let decoded = culvert_override(&["decode", &text]).unwrap();
    assert!(decoded.contains("  signed with key dev-1 (not verified here)\n  expires in "), "{decoded}");
    assert!(decoded.contains("  users -> revision x\n"), "{decoded}");
    std::fs::write(file.path(), "short").unwrap();
    let error = format!("{:#}", culvert_override(&["header", "--set", "users=x", "--sign-key", &key]).unwrap_err());
    assert!(error.contains("at least 32 bytes"), "{error}");
}

#[test]
fn mistakes_are_named() {
    for (arguments, expected) in [
        (&["header"][..], "nothing is asked for: name a service with --set"),
        (&["header", "--set", "users"], "expected SERVICE=REVISION"),
        (&["header", "--set", "Users=x"], "--set Users=x: service `Users` is not `name`"),
        (&["header", "--set", "users=a", "--set", "users.default=b"], "overridden twice"),
        (&["header", "--set", "users=a", "--address", "users=10.0.0.1"], "beside a revision"),
        (&["header", "--fault", "users=abc"], "`abc` is no status"),
        (&["header", "--fault", "users=99"], "--fault users=99: fault is not one HTTP status"),
        (&["header", "--delay", "users=-1s"], "`-1s` is not a time"),
        (&["header", "--delay", "users=0s"], "`0s` is not a time"),
        (&["header", "--config", "users=a"], "expected SERVICE:NAME=VALUE"),
        (&["header", "--config", "users:A=b"], "a name that is not"),
        (&["header", "--sample", "users=maybe"], "true or false"),
        (&["header", "--debug", "Users"], "Users: service `Users` is not"),
        (&["header", "--set", "users=a", "--expires", "31d"], "--expires: at most 30d"),
        (&["header", "--set", "users=a", "--expires", "soon"], "`soon` is not a time"),
        (&["header", "--set", "users=a", "--sign-key", "k=/nowhere/key"], "cannot read /nowhere/key"),
        (&["header", "--set", "users=a", "--trace-id", "xyz"], "hexadecimal"),
        (&["decode", "x-request-id: 1"], "`x-request-id` carries no overrides"),
        (&["decode", "x-ot-span-context: !"], "not standard padded base64"),
        (&["decode", "nonsense"], "neither a span context nor an Overrides message"),
    ] {
        let error = format!("{:#}", culvert_override(arguments).unwrap_err());
        assert!(error.contains(expected), "{arguments:?}: {error:?} does not contain {expected:?}");
    }
}

#[test]
fn decoding_shows_the_rest_of_the_context() {
    let published = "x-ot-span-context: EigJOjioEaYHBgcRNmifUO7/xlgYASISCgdjaGVja2VkEgdiYWdnYWdl";
    let text = culvert_override(&["decode", published]).unwrap();
    let expected = "x-ot-span-context\n  trace 070607a611a8383a, span 58c6ffee509f6836, sampled\n  no overrides\n  \
                    other baggage: checked = baggage\n";
    assert_eq!(text, expected);
    let json: Value =
        serde_json::from_str(&culvert_override(&["decode", published, "--output", "json"]).unwrap()).unwrap();
    assert_eq!((&json["span"]["sampled"], &json["overrides"]), (&json!(true), &Value::Null));
}

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
fn mistakes_are_named() {
    for (arguments, expected) in [
        (&["header"][..], "--set"),
        (&["header", "--set", "users"], "expected SERVICE=REVISION"),
        (&["header", "--set", "Users=x"], "overrides[0].service `Users`"),
        (&["header", "--set", "users=a", "--set", "users.default=b"], "overridden twice"),
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

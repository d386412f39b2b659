use super::*;

#[test]
fn globs_match_as_in_a_shell() {
    for (pattern, name, expected) in [
        ("veth*", "veth12ab", true),
        ("veth*", "eth0", false),
        ("*", "", true),
        ("eth?", "eth0", true),
        ("eth?", "eth10", false),
        ("*a*b", "xxaxxab", true),
        ("*a*b", "xxaxxabc", false),
        ("eth0", "eth0", true),
        ("eth0", "eth01", false),
        ("", "", true),
        ("", "x", false),
        ("a**b", "ab", true),
    ] {
        assert_eq!(glob_matches(pattern, name), expected, "{pattern} against {name}");
    }
}

#[test]
fn ranges_of_both_families_are_read() {
    assert_eq!(Range::parse("10.0.0.0/8"), Ok(Range { address: "10.0.0.0".parse().unwrap(), length: 8 }));
    assert_eq!(Range::parse("fd00::/8"), Ok(Range { address: "fd00::".parse().unwrap(), length: 8 }));
    assert_eq!(Range::parse("192.0.2.1"), Ok(Range { address: "192.0.2.1".parse().unwrap(), length: 32 }));
    assert_eq!(Range::parse("::/0"), Ok(Range { address: "::".parse().unwrap(), length: 0 }));
}

#[test]
fn bad_ranges_are_refused_in_words() {
    for (text, words) in [
        ("10.0.0.0/33", "from 0 to 32"),
        ("::/129", "from 0 to 128"),
        ("10.0.0/8", "not an address range"),
        ("10.0.0.0/", "from 0 to 32"),
        ("10.0.0.0/-1", "from 0 to 32"),
        ("", "not an address range"),
        ("service.example", "not an address range"),
    ] {
        let error = Range::parse(text).unwrap_err();
        assert!(error.contains(words), "{text}: {error}");
    }
}

use super::*;

fn text(text: &str) -> Entry {
    Entry::from_text(text).unwrap()
}

/// What the real Envoy 1.40 made of these, given to `/runtime_modify` for the key of a `runtime_fraction`.
#[test]
fn text_has_the_types_that_envoy_gives_it() {
    for (given, integer) in [
        ("50", Some(50)),
        ("1e2", Some(100)),
        ("99.9", Some(99)),
        ("-1", None),
        ("0x64", Some(100)),
        (" 100", Some(100)),
        ("+100", Some(100)),
        ("010", Some(8)),
        ("100 # c", Some(100)),
        ("18446744073709551616", Some(u64::MAX)),
        ("inf", None),
        ("nan", None),
        ("\"100\"", None),
        ("[1]", None),
        ("&x", None),
        ("null", None),
        ("1_0", None),
        ("yes", None),
    ] {
        assert_eq!(text(given).integer, integer, "{given}");
        assert_eq!(text(given).raw, given);
    }
    for (given, boolean) in [("true", Some(true)), ("no", Some(false)), ("5", Some(true)), ("0", Some(false))] {
        assert_eq!(text(given).boolean, boolean, "{given}");
    }
    assert_eq!(text("2.5").boolean, None);
    assert_eq!(text("-2.5").double, Some(-2.5));
    assert_eq!(text("# only a comment"), Entry { raw: "# only a comment".to_owned(), ..Entry::default() });
    assert!(Entry::from_text("a: [").is_err());
}

#[test]
fn objects_are_fractions() {
    let hundred = |numerator| Some(Fraction::percent(numerator));
    for (given, fraction) in [
        ("{numerator: 50}", hundred(50)),
        ("{\"numerator\":100}", hundred(100)),
        ("numerator: 100", hundred(100)),
        (
            "{numerator: 5000, denominator: TEN_THOUSAND}",
            Some(Fraction { numerator: 5000, denominator: Denominator::TenThousand }),
        ),
        ("{numerator: 7, denominator: MILLION}", Some(Fraction { numerator: 7, denominator: Denominator::Million })),
        ("{numerator: '100'}", hundred(0)),
        ("{numerator: 100.7}", hundred(0)),
        ("{numerator: -5}", hundred(u32::MAX - 4)),
        ("{denominator: HUNDRED}", hundred(0)),
        ("{}", hundred(0)),
        ("{numerator: 100, denominator: 0}", None),
        ("{numerator: 100, denominator: NOPE}", None),
        ("{numerator: 100, more: 1}", None),
        ("'{numerator: 100}'", None),
    ] {
        assert_eq!(text(given).fraction, fraction, "{given}");
    }
    assert!(Fraction::percent(1).includes(100) && !Fraction::percent(1).includes(101));
    assert!(Fraction { numerator: 1, denominator: Denominator::Million }.includes(3_000_000));
    assert!(!Fraction { numerator: 1, denominator: Denominator::Million }.includes(100));
}

/// As the real Envoy's `/runtime` prints the numbers of a static layer.
#[test]
fn numbers_have_six_digits() {
    for (number, text) in [
        (5.0, "5"),
        (-3.0, "-3"),
        (0.0, "0"),
        (999_999.0, "999999"),
        (1_000_000.0, "1e+06"),
        (1_234_567.0, "1.23457e+06"),
        (2_147_483_647.0, "2.14748e+09"),
        (0.25, "0.25"),
        (0.0001, "0.0001"),
        (0.00001, "1e-05"),
        (1.0 / 3.0, "0.333333"),
    ] {
        let entry = Entry::from_value(&Value { kind: Some(Kind::NumberValue(number)) }).unwrap();
        assert_eq!(entry.raw, text);
    }
    assert_eq!(Entry::from_value(&Value { kind: Some(Kind::NullValue(0)) }), None);
}

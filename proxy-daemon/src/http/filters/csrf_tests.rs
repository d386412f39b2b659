use super::*;

fn head(headers: &[(&str, &str)]) -> RequestHead {
    let request = http::Request::builder().uri("/");
    let request = headers.iter().fold(request, |request, (name, value)| request.header(*name, *value));
    request.body(()).unwrap().into_parts().0
}

#[test]
fn a_url_is_as_good_as_its_host_and_port() {
    for (url, expected) in [
        ("http://a.test", "a.test"),
        ("https://a.test:8443/path?x=http://b.test", "a.test:8443"),
        ("http://a.test?x", "a.test"),
        ("http://a.test#x", "a.test"),
        ("http://b.test@a.test/", "a.test"),
        ("a.test", "a.test"),
        ("http:///path", "http:///path"),
        ("", ""),
    ] {
        assert_eq!(host_and_port(url), expected, "{url}");
    }
}

#[test]
fn the_origin_counts_before_the_referer() {
    for (headers, expected) in [
        (&[][..], ""),
        (&[("origin", "http://a.test")], "a.test"),
        (&[("referer", "http://b.test/path")], "b.test"),
        (&[("origin", "http://a.test"), ("referer", "http://b.test")], "a.test"),
        (&[("origin", ""), ("referer", "http://b.test")], "b.test"),
        (&[("origin", "null"), ("referer", "http://b.test")], ""),
        (&[("origin", "\u{e9}")], ""),
    ] {
        assert_eq!(source(&head(headers)), expected, "{headers:?}");
    }
}

use super::*;

fn cookie_of(path: &str, ttl: u64) -> Cookie {
    Cookie {
        name: "s".to_owned(),
        ttl: Duration::from_secs(ttl),
        path: path.to_owned(),
        attributes: "; HttpOnly".to_owned(),
    }
}

fn with_cookie(value: &str) -> RequestHead {
    http::Request::builder().header("cookie", value).body(()).unwrap().into_parts().0
}

#[test]
fn a_cookie_is_for_its_path_and_what_is_below() {
    for (of, path, covers) in [
        ("", "/x", true),
        ("/", "/x", true),
        ("/a", "/a", true),
        ("/a", "/a/b", true),
        ("/a", "/a?b", true),
        ("/a", "/ab", false),
        ("/a", "/", false),
        ("/a/", "/a", false),
        ("/a/", "/a/b", true),
    ] {
        assert_eq!(cookie_of(of, 0).covers(path), covers, "{of} {path}");
    }
}

#[test]
fn what_a_cookie_says_is_read_until_it_expires() {
    let cookie = cookie_of("", 10);
    let told = cookie.with("127.0.0.1:80", 1000);
    let (kept, attributes) = told.split_once("; ").unwrap();
    assert_eq!(attributes, "HttpOnly");
    let head = with_cookie(kept);
    assert_eq!(cookie.address(&head, 1010).as_deref(), Some("127.0.0.1:80"));
    assert_eq!(cookie.address(&head, 1011), None);
    // As Envoy writes it.
    let envoys = "a=b; s=\"Cg8xMjcuMC4wLjE6MjE5MTE=\"";
    assert_eq!(cookie_of("", 0).with("127.0.0.1:21911", 5), "s=\"Cg8xMjcuMC4wLjE6MjE5MTE=\"; HttpOnly");
    assert_eq!(cookie.address(&with_cookie(envoys), i64::MAX).as_deref(), Some("127.0.0.1:21911"));
    // As Envoy wrote it once.
    assert_eq!(cookie.address(&with_cookie("s=MTI3LjAuMC4xOjgw"), 0).as_deref(), Some("127.0.0.1:80"));
    for nonsense in ["s=!", "s=", "t=MTI3LjAuMC4xOjgw", "s=MTI3LjAuMC4xOjg"] {
        let address = cookie.address(&with_cookie(nonsense), 0).filter(|address| !address.is_empty());
        assert_eq!(address, None, "{nonsense}");
    }
}

use super::*;

const FORM: &str = "application/x-www-form-urlencoded";
const TAGS: &str = "tags=%7B%22az%22%3A%22a%22%2C%22region%22%3A%22r%22%2C%22instance_id%22%3A%22i%22%7D";

fn call(method: &str, path: &str, body: &str) -> Result<Call, Refusal> {
    parse(method, path, Sent { content_type: FORM, body: body.as_bytes(), remote: "192.168.3.4" })
}

fn check(path: &str, body: &str) -> Result<Host, Refusal> {
    match call("POST", path, body)? {
        Call::CheckIn(host) => Ok(host),
        other => panic!("not a registration: {other:?}"),
    }
}

#[test]
fn a_registration_is_read() {
    let host =
        check("/v1/registration/users", &format!("ip=10.0.0.1&port=80&revision=a%20b+c&service_repo_name=repo&{TAGS}"));
    let host = host.unwrap();
    assert_eq!((&*host.service, host.ip_address.to_string(), host.port), ("users", "10.0.0.1".to_owned(), 80));
    assert_eq!((&*host.revision, &*host.service_repo_name), ("a b c", "repo"));
    assert_eq!((host.tag("az"), host.tag("region"), host.tag("instance_id")), ("a", "r", "i"));
    // As Python's int and Flask's form read them: spaces and a sign, and of a repeated field the first.
    let host =
        check("/v1/registration/my%20service", &format!("ip=10.0.0.1&port=+%2B80+&port=81&revision=r&{TAGS}")).unwrap();
    assert_eq!((&*host.service, host.port, &*host.service_repo_name), ("my service", 80, ""));
}

/// As `curl -F` and Python's `requests(files=...)` send it.
fn multipart(fields: &[(&str, &str)]) -> String {
    let part = |(name, value): &(&str, &str)| {
        format!("--x\r\nContent-Disposition: form-data; name=\"{name}\"\r\n\r\n{value}\r\n")
    };
    fields.iter().map(part).collect::<String>() + "--x--\r\n"
}

const JSON_TAGS: &str = r#"{"az": "a", "region": "r", "instance_id": "ü"}"#;

#[test]
fn a_multipart_form_is_a_form() {
    let call = |content_type, body: &str| {
        parse("POST", "/v1/registration/users", Sent { content_type, body: body.as_bytes(), remote: "10.0.0.9" })
    };
    let fields = [("ip", "10.0.0.1"), ("port", "80"), ("revision", "a\r\nb"), ("port", "81"), ("tags", JSON_TAGS)];
    let good = multipart(&fields);
    let Ok(Call::CheckIn(host)) = call("multipart/form-data; boundary=x", &good) else { panic!("refused") };
    assert_eq!((host.ip_address.to_string(), host.port, &*host.revision), ("10.0.0.1".to_owned(), 80, "a\r\nb"));
    assert_eq!(host.tag("instance_id"), "ü");
    // A file is no field; nor is anything of what breaks off, or has another boundary or none.
    let file = good.replace("name=\"ip\"", "name=\"ip\"; filename=\"f\"");
    let cut = &good[..good.len() - 20];
    for (content_type, body, expected) in [
        ("multipart/form-data; boundary=x", &*file, "ip is missing"),
        ("multipart/form-data; boundary=x", cut, "the body is no form"),
        ("multipart/form-data; boundary=y", &good, "the body is no form"),
        ("multipart/form-data", &good, "the body is no form"),
        ("multipart/mixed; boundary=x", &good, "the body is no form"),
    ] {
        let error = call(content_type, body).unwrap_err();
        assert!(error.reason.contains(expected), "{content_type}: {error:?}");
    }
    // As many parts as fit into a body.
    let many: Vec<_> = (0..MAX_BODY / 60).map(|_| ("ip", "")).collect();
    assert!(call("multipart/form-data; boundary=x", &multipart(&many)).is_err());
}

#[test]
fn what_is_wrong_is_answered_as_ever_with_the_reason_in_a_header() {
    let tags = |json: &str| {
        let tags: String = form_urlencoded::byte_serialize(json.as_bytes()).collect();
        format!("ip=10.0.0.1&port=80&revision=r&tags={tags}")
    };
    let long = "x".repeat(MAX_NAME + 1);
    let big = "x".repeat(MAX_TAGS);
    let cases = [
        (format!("port=80&revision=r&{TAGS}"), "ip is missing"),
        (format!("ip=&port=80&revision=r&{TAGS}"), "ip is missing"),
        (format!("ip=555.1.1.1&port=80&revision=r&{TAGS}"), "ip `555.1.1.1` is not an IPv4 address"),
        (format!("ip=010.0.0.1&port=80&revision=r&{TAGS}"), "is not an IPv4 address"),
        (format!("ip=::1&port=80&revision=r&{TAGS}"), "is not an IPv4 address"),
        (format!("ip=10.0.0.1&revision=r&{TAGS}"), "port is missing"),
        (format!("ip=10.0.0.1&port=test&revision=r&{TAGS}"), "port is not a number of 1 to 65535"),
        (format!("ip=10.0.0.1&port=0&revision=r&{TAGS}"), "port is not a number"),
        (format!("ip=10.0.0.1&port=-1&revision=r&{TAGS}"), "port is not a number"),
        (format!("ip=10.0.0.1&port=65536&revision=r&{TAGS}"), "port is not a number"),
        (format!("ip=10.0.0.1&port=80&{TAGS}"), "revision is missing"),
        (format!("ip=10.0.0.1&port=80&revision={long}&{TAGS}"), "revision is longer than 253 bytes"),
        (format!("ip=10.0.0.1&port=80&revision=r&service_repo_name={long}&{TAGS}"), "service_repo_name is longer"),
        ("ip=10.0.0.1&port=80&revision=r".to_owned(), "tags.az is missing"),
        (tags("{\"az\":\"a\",\"region\":\"r\"}"), "tags.instance_id is missing"),
        (tags("{\"az\":\"a\",\"instance_id\":\"r\"}"), "tags.region is missing"),
        (tags("[]"), "tags is not a JSON object"),
        (tags("{\"az\":1,\"region\":\"r\",\"instance_id\":\"i\"}"), "tags.az and tags.region must be text"),
        (
            tags("{\"az\":\"a\",\"region\":\"r\",\"instance_id\":\"i\",\"canary\":\"yes\"}"),
            "tags.canary must be true or false",
        ),
        (
            tags("{\"az\":\"a\",\"region\":\"r\",\"instance_id\":\"i\",\"load_balancing_weight\":101}"),
            "between 1 and 100",
        ),
        (
            tags(&format!("{{\"az\":\"a\",\"region\":\"r\",\"instance_id\":\"i\",\"x\":\"{big}\"}}")),
            "tags are longer than",
        ),
    ];
    for (body, expected) in cases {
        let reply = Reply::from(check("/v1/registration/users", &body).unwrap_err());
        assert_eq!((reply.status, &*reply.body), (400, "{}\n"), "{body}");
        assert!(reply.error.as_ref().is_some_and(|error| error.contains(expected)), "{:?} of {expected}", reply.error);
    }
    for body in [tags("{"), tags(""), tags(&"[".repeat(10_000)), "tags=&ip=x".to_owned()] {
        let reply = Reply::from(check("/v1/registration/users", &body).unwrap_err());
        assert_eq!((reply.status, &*reply.body), (400, "{\"error\": \"Invalid json supplied in tags\"}\n"));
    }
    // A body that is no form has no fields.
    let sent = Sent { content_type: "application/json", body: TAGS.as_bytes(), remote: "" };
    let reply = Reply::from(parse("POST", "/v1/registration/users", sent).unwrap_err());
    assert_eq!((reply.status, &*reply.body), (400, "{}\n"));
}

#[test]
fn the_address_of_the_caller_counts_only_where_it_can_be_its_own() {
    let body = format!("auto_ip=True&port=80&revision=r&{TAGS}");
    let from = |remote| parse("POST", "/v1/registration/u", Sent { content_type: FORM, body: body.as_bytes(), remote });
    let Ok(Call::CheckIn(host)) = from("192.168.216.186") else { panic!("refused") };
    assert_eq!(host.ip_address.to_string(), "192.168.216.186");
    for remote in ["0.168.216.186", "192.169.216.186", "192.168.256.186", "192.168.216.256", "::1", "unknown", ""] {
        let Err(refusal) = from(remote) else { panic!("{remote} is taken") };
        assert_eq!((refusal.status, refusal.bare), (400, true));
    }
    // A stated address takes precedence.
    let host = check("/v1/registration/u", &format!("ip=10.0.0.1&{body}")).unwrap();
    assert_eq!(host.ip_address.to_string(), "10.0.0.1");
}

#[test]
fn weights_are_read() {
    let path = "/v1/loadbalancing/users/10.0.0.1";
    let set = |path: &str, body: &str| call("POST", path, body).map_err(Reply::from);
    let weight = |ip_address: Option<&str>, weight| Call::SetWeight {
        service: "users".into(),
        ip_address: ip_address.map(|text| text.parse().unwrap()),
        weight,
    };
    assert_eq!(set(path, "load_balancing_weight=100"), Ok(weight(Some("10.0.0.1"), 100)));
    assert_eq!(set("/v1/loadbalancing/users", "load_balancing_weight=1"), Ok(weight(None, 1)));
    for body in ["", "weight=5", "load_balancing_weight="] {
        let reply = set(path, body).unwrap_err();
        assert_eq!((reply.status, &*reply.body), (400, "{\"error\": \"Required parameter 'weight' is missing.\"}\n"));
    }
    for weight in ["0", "101", "9001", "-1", "not_an_integer", "1.5", "99999999999999999999"] {
        let reply = set(path, &format!("load_balancing_weight={weight}")).unwrap_err();
        let expected = "{\"error\": \"Invalid load_balancing_weight. Supply an integer between 1 and 100.\"}\n";
        assert_eq!((reply.status, &*reply.body), (400, expected), "{weight}");
    }
    let reply = set("/v1/loadbalancing/users/nowhere", "load_balancing_weight=1").unwrap_err();
    assert_eq!((reply.status, &*reply.body), (404, "{\"error\": \"Host not found\"}\n"));
}

#[test]
fn other_requests_are_told_what_there_is() {
    assert_eq!(call("GET", "/v1/registration/repo/r", ""), Ok(Call::OfRepository("r".into())));
    assert_eq!(call("GET", "/v1/registration/r%C3%A9po", ""), Ok(Call::OfService("répo".into())));
    // A service may be called `repo`: only to read its hosts there is no path.
    let key = HostKey { service: "repo".into(), ip_address: Ipv4Addr::LOCALHOST };
    assert_eq!(call("DELETE", "/v1/registration/repo/127.0.0.1", ""), Ok(Call::Remove(key)));
    let status = |method, path| call(method, path, "").map_err(|refusal| (refusal.status, refusal.allow)).unwrap_err();
    assert_eq!(status("PUT", "/v1/registration/users"), (405, Some("GET, HEAD, POST")));
    assert_eq!(status("GET", "/v1/registration/users/10.0.0.1"), (405, Some("DELETE")));
    assert_eq!(status("GET", "/v1/loadbalancing/users"), (405, Some("POST")));
    assert_eq!(status("DELETE", "/v1/registration/users/bar"), (400, None));
    for path in ["/v1/", "/v1/registration", "/v1/other/x", "/v1/registration/a/b/c", "/v1/registration/a/10.0.0.1/"] {
        assert_eq!(status("GET", path), (404, None), "{path}");
    }
    for path in ["/v1/registration/", "/v1/registration/%00", "/v1/registration/a%2Fb", "/v1/registration/%ff"] {
        assert_eq!(status("GET", path), (400, None), "{path}");
    }
}

#[test]
fn answers_are_written_as_python_writes_them() {
    let value = json!({ "b": [1, "é\n\"𝄞"], "a": {}, "c": null });
    assert_eq!(python_json(&value), "{\"a\": {}, \"b\": [1, \"\\u00e9\\n\\\"\\ud834\\udd1e\"], \"c\": null}\n");
}

#[test]
fn the_fuzzer_s_function_takes_what_is_good_and_what_is_not() {
    fuzz(format!("registration/users\nip=10.0.0.1&port=80&revision=r&{TAGS}").as_bytes());
    let mut seed = fastrand::Rng::with_seed(7);
    let urlencoded = format!("registration/users\nip=10.0.0.1&port=80&revision=r&auto_ip=1&{TAGS}").into_bytes();
    let fields = [("ip", "10.0.0.1"), ("port", "80"), ("revision", "r"), ("tags", JSON_TAGS)];
    let multipart = format!("registration/users\n{}", multipart(&fields)).into_bytes();
    for round in 0..2000 {
        let mut bytes = if round % 2 == 0 { urlencoded.clone() } else { multipart.clone() };
        for _ in 0..seed.usize(1..6) {
            let at = seed.usize(..bytes.len());
            bytes[at] = seed.u8(..);
        }
        fuzz(&bytes);
    }
}

//! Which route a request takes.

use super::harness::{Case, case};

pub fn cases() -> Vec<Case> {
    [paths(), headers(), deprecated_headers(), parameters(), cookies(), hosts(), tls(), others()].concat()
}

fn paths() -> Vec<Case> {
    vec![
        case(
            "prefix",
            "- {match: {prefix: /api}, $1}\n- {match: {prefix: /}, $2}",
            &["GET /api", "GET /apis", "GET /api/x", "GET /ap", "GET /API", "GET /?/api", "GET /api?x", "GET /%61pi"],
        ),
        case("empty prefix", "- {match: {prefix: \"\"}, $1}", &["GET /", "GET /x"]),
        case("prefix, any case", "- {match: {prefix: /Api, case_sensitive: false}, $1}", &["GET /aPI/x", "GET /x"]),
        case(
            "path",
            "- {match: {path: /one}, $1}\n- {match: {path: /one/}, $2}",
            &["GET /one", "GET /one/", "GET /one?a=b", "GET /onee", "GET /ONE"],
        ),
        case("path, any case", "- {match: {path: /One, case_sensitive: false}, $1}", &["GET /oNE", "GET /one/"]),
        case(
            "path_separated_prefix",
            "- {match: {path_separated_prefix: /a/b}, $1}",
            &["GET /a/b", "GET /a/b/", "GET /a/b/c", "GET /a/bc", "GET /a/b?c", "GET /A/b", "GET /a"],
        ),
        case(
            "path_separated_prefix, any case",
            "- {match: {path_separated_prefix: /a/B, case_sensitive: false}, $1}",
            &["GET /A/b", "GET /A/b/c", "GET /a/bc"],
        ),
        case(
            "safe_regex",
            "- {match: {safe_regex: {regex: \"/v[0-9]+/.*\"}}, $1}\n- {match: {safe_regex: {regex: \"/x|/y\"}}, $2}",
            &["GET /v1/", "GET /v12/x?y", "GET /v/x", "GET /v1", "GET /a/v1/", "GET /y", "GET /yy", "GET /x?q=/"],
        ),
        case(
            "safe_regex knows no case_sensitive",
            "- {match: {safe_regex: {regex: \"/Aa\"}, case_sensitive: false}, $1}",
            &["GET /Aa", "GET /aa"],
        ),
        case(
            "the first that matches",
            "- {match: {prefix: /a}, $1}\n- {match: {path: /a}, $2}\n- {match: {safe_regex: {regex: \"/b.*\"}}, $3}\n\
             - {match: {path: /b}, $4}\n- {match: {prefix: /b, case_sensitive: false}, $5}\n- {match: {prefix: /}, $6}",
            &["GET /a", "GET /ab", "GET /b", "GET /bb", "GET /B", "GET /c"],
        ),
        case(
            "path_match_policy",
            &["/api/{id}/x", "/files/*", "/deep/**", "/img/{name=*}.png", "/v/{version=**}/end"]
                .iter()
                .zip(1..)
                .map(|(template, number)| template_match(template, number))
                .collect::<String>(),
            &[
                "GET /api/7/x",
                "GET /api/7/x?y=z",
                "GET /api/7/8/x",
                "GET /api//x",
                "GET /api/7/x/",
                "GET /files/a",
                "GET /files/",
                "GET /files/a/b",
                "GET /deep/a/b/c",
                "GET /deep/",
                "GET /deep",
                "GET /img/a.png",
                "GET /img/a.jpg",
                "GET /img/.png",
                "GET /v/1/2/3/end",
                "GET /v/1/end",
                "GET /v/end",
                "GET /api/%2f/x",
                "GET /api/a%20b/x",
                "GET /api/a:b@c/x",
                "GET /api/a=b*c;d=1/x",
                "GET /API/7/x",
            ],
        ),
    ]
}

fn template_match(template: &str, number: u8) -> String {
    format!(
        "- {{match: {{path_match_policy: {{name: t, typed_config: {{\"@type\": \
         type.googleapis.com/envoy.extensions.path.match.uri_template.v3.UriTemplateMatchConfig, path_template: \
         \"{template}\"}}}}}}, ${number}}}\n"
    )
}

/// A case of one header matcher: 1 where it matches, 2 where not.
fn header(name: &'static str, matcher: &str, requests: &[&str]) -> Case {
    let routes = format!("- {{match: {{prefix: /, headers: [{{{matcher}}}]}}, $1}}\n- {{match: {{prefix: /}}, $2}}");
    case(name, &routes, requests)
}

const VALUES: &[&str] = &[
    "GET /",
    "GET /\nx-h: abc",
    "GET /\nx-h: ABC",
    "GET /\nx-h:",
    "GET /\nx-h: xabcx",
    "GET /\nx-h: abcx",
    "GET /\nx-h: xabc",
    "GET /\nx-h: abc\nx-h: abc",
    "GET /\nx-h: a\nx-h: abc",
];

fn headers() -> Vec<Case> {
    let mut cases = Vec::new();
    for (name, plain) in [
        ("header, exact", "string_match: {exact: abc}"),
        ("header, exact list", "string_match: {exact: \"abc,abc\"}"),
        ("header, exact, any case", "string_match: {exact: aBc, ignore_case: true}"),
        ("header, prefix", "string_match: {prefix: abc}"),
        ("header, prefix, any case", "string_match: {prefix: Abc, ignore_case: true}"),
        ("header, suffix", "string_match: {suffix: abc}"),
        ("header, suffix, any case", "string_match: {suffix: aBC, ignore_case: true}"),
        ("header, contains", "string_match: {contains: abc}"),
        ("header, contains, any case", "string_match: {contains: BC, ignore_case: true}"),
        ("header, regex", "string_match: {safe_regex: {regex: \"a.c|\"}}"),
        ("header, present", "present_match: true"),
        ("header, not present", "present_match: false"),
        ("header, nothing said", ""),
    ] {
        let matcher = |more: &str| {
            ["name: x-h", plain, more].into_iter().filter(|s| !s.is_empty()).collect::<Vec<_>>().join(", ")
        };
        cases.push(header(name, &matcher(""), VALUES));
        cases.push(header(name, &matcher("invert_match: true"), VALUES));
        cases.push(header(name, &matcher("treat_missing_header_as_empty: true"), VALUES));
        cases.push(header(name, &matcher("invert_match: true, treat_missing_header_as_empty: true"), VALUES));
    }
    let numbers = &[
        "GET /",
        "GET /\nx-h: 0",
        "GET /\nx-h: -5",
        "GET /\nx-h: 10",
        "GET /\nx-h: 9",
        "GET /\nx-h: +9",
        "GET /\nx-h: 9.5",
        "GET /\nx-h: 9x",
        "GET /\nx-h: 007",
        "GET /\nx-h: 5\nx-h: 6",
        "GET /\nx-h: 99999999999999999999",
    ];
    for more in ["", ", invert_match: true", ", treat_missing_header_as_empty: true"] {
        cases.push(header("header, range", &format!("name: x-h, range_match: {{start: -5, end: 10}}{more}"), numbers));
    }
    cases.extend([
        header("header :method", "name: \":method\", string_match: {exact: POST}", &["GET /", "POST /", "PUT /"]),
        header(
            "header :path",
            "name: \":path\", string_match: {prefix: \"/a?b\"}",
            &["GET /a?b=c", "GET /a", "GET /a?c"],
        ),
        header("header :scheme", "name: \":scheme\", string_match: {exact: http}", &["GET /"]),
        header(
            "header :authority",
            "name: \":authority\", string_match: {suffix: .test}",
            &["GET /", "GET http://other.example/"],
        ),
        header("header host", "name: host, string_match: {suffix: .test}", &["GET /"]),
        header(
            "header name in capitals",
            "name: X-Ha, string_match: {exact: b}",
            &["GET /\nx-ha: b", "GET /\nX-HA: b"],
        ),
        header(
            "header cookie",
            "name: cookie, string_match: {exact: \"a=b; c=d\"}",
            &["GET /\ncookie: a=b\ncookie: c=d"],
        ),
        header(
            "several headers",
            "name: x-a, present_match: true}, {name: x-b, string_match: {exact: \"1\"}",
            &["GET /\nx-a: 1\nx-b: 1", "GET /\nx-a: 1", "GET /\nx-b: 1"],
        ),
    ]);
    cases
}

fn deprecated_headers() -> Vec<Case> {
    let mut cases = Vec::new();
    for (name, plain) in [
        ("exact_match", "exact_match: abc"),
        ("prefix_match", "prefix_match: abc"),
        ("suffix_match", "suffix_match: abc"),
        ("contains_match", "contains_match: abc"),
        ("safe_regex_match", "safe_regex_match: {regex: \"a.c\"}"),
    ] {
        for more in ["", ", invert_match: true", ", treat_missing_header_as_empty: true"] {
            cases.push(header(name, &format!("name: x-h, {plain}{more}"), VALUES));
        }
    }
    cases
}

fn parameters() -> Vec<Case> {
    let parameter = |name, matcher: &str, requests: &[&str]| {
        let routes = format!(
            "- {{match: {{prefix: /, query_parameters: [{{{matcher}}}]}}, $1}}\n- {{match: {{prefix: /}}, $2}}"
        );
        case(name, &routes, requests)
    };
    let requests = &[
        "GET /",
        "GET /?",
        "GET /?q",
        "GET /?q=",
        "GET /?q=abc",
        "GET /?q=ABC",
        "GET /?x=1&q=abc",
        "GET /?q=x&q=abc",
        "GET /?q=abc&q=x",
        "GET /?Q=abc",
        "GET /?q=a%62c",
        "GET /?%71=abc",
        "GET /?q=abc=d",
        "GET /?q=a+c",
        "GET /?qq=abc",
        "GET /?&&q=abc",
        "GET /?q=abc;r=s",
    ];
    vec![
        parameter("parameter, exact", "name: q, string_match: {exact: abc}", requests),
        parameter("parameter, any case", "name: q, string_match: {exact: abC, ignore_case: true}", requests),
        parameter("parameter, prefix", "name: q, string_match: {prefix: ab}", requests),
        parameter("parameter, regex", "name: q, string_match: {safe_regex: {regex: \"a.c\"}}", requests),
        parameter("parameter, present", "name: q, present_match: true", requests),
        parameter("parameter, not present", "name: q, present_match: false", requests),
        parameter("parameter, nothing said", "name: q", requests),
        parameter(
            "two parameters",
            "name: q, string_match: {exact: a}}, {name: r, string_match: {exact: b}",
            &["GET /?q=a&r=b", "GET /?r=b&q=a", "GET /?q=a"],
        ),
    ]
}

fn cookies() -> Vec<Case> {
    let cookie = |name, matcher: &str| {
        let routes =
            format!("- {{match: {{prefix: /, cookies: [{{{matcher}}}]}}, $1}}\n- {{match: {{prefix: /}}, $2}}");
        case(
            name,
            &routes,
            &[
                "GET /",
                "GET /\ncookie: c=abc",
                "GET /\ncookie: c=\"abc\"",
                "GET /\ncookie: a=b; c=abc",
                "GET /\ncookie: a=b;c=abc",
                "GET /\ncookie: a=b\ncookie: c=abc",
                "GET /\ncookie: c=x; c=abc",
                "GET /\ncookie: c=abc; c=x",
                "GET /\ncookie: C=abc",
                "GET /\ncookie: c=",
                "GET /\ncookie: c",
                "GET /\ncookie: cc=abc",
            ],
        )
    };
    vec![
        cookie("cookie, exact", "name: c, string_match: {exact: abc}"),
        cookie("cookie, prefix", "name: c, string_match: {prefix: a}"),
        cookie("cookie, inverted", "name: c, string_match: {exact: abc}, invert_match: true"),
        cookie("two cookies", "name: c, string_match: {exact: abc}}, {name: a, string_match: {exact: b}"),
    ]
}

fn tls() -> Vec<Case> {
    let requests = &[
        "GET /x?y",
        "POST /x\n\nbody",
        "GET /\nx-forwarded-proto: https",
        "GET /\nx-forwarded-proto: http",
        "GET /\nx-envoy-internal: true",
        "GET /none",
    ];
    let routes = "- {match: {path: /none}, $2}\n- {match: {prefix: /}, $a}";
    let internal = "internal_address_config: {cidr_ranges: [{address_prefix: 127.0.0.0, prefix_len: 8}]}";
    vec![
        case("require_tls: ALL", routes, requests)
            .of_host("require_tls: ALL")
            .of_host("response_headers_to_add: [{header: {key: x-added, value: added}}]"),
        case("require_tls: EXTERNAL_ONLY", routes, requests).of_host("require_tls: EXTERNAL_ONLY"),
        case("require_tls: EXTERNAL_ONLY, internal", routes, requests)
            .of_host("require_tls: EXTERNAL_ONLY")
            .of_manager(internal)
            .of_manager("use_remote_address: true"),
        case("require_tls: NONE", routes, requests).of_host("require_tls: NONE"),
        case(
            "tls_context of plain connections",
            "- {match: {prefix: /a, tls_context: {presented: true}}, $1}\n\
             - {match: {prefix: /b, tls_context: {presented: false}}, $2}\n- {match: {prefix: /, tls_context: {}}, $3}",
            &["GET /a", "GET /b", "GET /c"],
        ),
    ]
}

fn hosts() -> Vec<Case> {
    let host = |name: &str, domains: &str, number: u8| {
        format!("- {{name: {name}, domains: [{domains}], routes: [{{match: {{prefix: /x}}, ${number}}}]}}\n")
    };
    let order = host("any", "\"*\"", 1)
        + &host("suffix", "\"*.example\", \"*-x.example\"", 2)
        + &host("longer", "\"*.b.example\"", 3)
        + &host("prefix", "\"www.*\", \"www.b.*\"", 4)
        + &host("exact", "\"www.b.example\", \"port.example:8080\"", 5);
    let requests = &[
        "GET /x\nhost: www.b.example",
        "GET /x\nhost: WWW.b.example",
        "GET /x\nhost: a.b.example",
        "GET /x\nhost: b.example",
        "GET /x\nhost: .example",
        "GET /x\nhost: a-x.example",
        "GET /x\nhost: -x.example",
        "GET /x\nhost: www.c.example",
        "GET /x\nhost: www.c.org",
        "GET /x\nhost: www.",
        "GET /x\nhost: www.b.org",
        "GET /x\nhost: www.b.example:80",
        "GET /x\nhost: port.example:8080",
        "GET /x\nhost: port.example",
        "GET /x\nhost: a.example:1234",
        "GET /x\nhost: [::1]:80",
        "GET /x\nhost: nowhere",
        "GET /y\nhost: www.b.example",
        "GET http://www.b.example/x\nhost: nowhere",
        "GET http://www.b.example\nhost: nowhere",
    ];
    let some = host("a", "a.example", 1) + &host("b", "\"b.example:80\"", 2);
    let ports = &[
        "GET /x\nhost: a.example",
        "GET /x\nhost: a.example:80",
        "GET /x\nhost: a.example:8080",
        "GET /x\nhost: a.example:",
        "GET /x\nhost: a.example:x",
        "GET /x\nhost: b.example",
        "GET /x\nhost: b.example:80",
        "GET /x\nhost: c.example",
    ];
    vec![
        case("hosts in Envoy's order", &order, requests).hosts(),
        case("no host matches", &some, ports).hosts(),
        case("ignore_port_in_host_matching", &some, ports).hosts().of_config("ignore_port_in_host_matching: true"),
        case("vhost_header", &order, &["GET /x\nhost: h\nx-host: www.b.example", "GET /x\nhost: www.b.example"])
            .hosts()
            .of_config("vhost_header: x-host"),
        case(
            "ignore_path_parameters_in_path_matching",
            "- {match: {path: /a/b}, $1}\n- {match: {prefix: /c/d}, $2}\n- {match: {safe_regex: {regex: \"/e[^;]*\"}}, $3}",
            &["GET /a/b;x=y", "GET /a;x/b", "GET /c/d;x", "GET /c;x/d", "GET /e;f", "GET /a/b?x;y"],
        )
        .of_config("ignore_path_parameters_in_path_matching: true"),
        case("ignore_port_in_host_matching, order", &order, requests)
            .hosts()
            .of_config("ignore_port_in_host_matching: true"),
    ]
}

fn others() -> Vec<Case> {
    vec![
        case(
            "grpc",
            "- {match: {prefix: /, grpc: {}}, $1}\n- {match: {prefix: /}, $2}",
            &[
                "POST /\ncontent-type: application/grpc",
                "POST /\ncontent-type: application/grpc+proto",
                "POST /\ncontent-type: application/grpc;x",
                "POST /\ncontent-type: application/grpcx",
                "POST /\ncontent-type: application/grpc-web",
                "GET /\ncontent-type: application/json",
                "GET /",
            ],
        ),
        case(
            "runtime_fraction",
            "- {match: {prefix: /none, runtime_fraction: {default_value: {numerator: 0}}}, $1}\n\
             - {match: {prefix: /all, runtime_fraction: {default_value: {numerator: 100}}}, $2}\n\
             - {match: {prefix: /more, runtime_fraction: {default_value: {numerator: 1000000, denominator: MILLION}}}, $3}\n\
             - {match: {prefix: /}, $4}",
            &["GET /none", "GET /all", "GET /more"],
        ),
        case("no route", "- {match: {path: /only}, $1}", &["GET /", "HEAD /", "POST /\n\nbody"]),
        case("a fragment", "- {match: {path: /x}, $1}", &["GET /x#f"]),
    ]
}

//! Filters for what browsers send: cors, csrf.

use super::harness::{By, Case, case};

const CORS: &str = "cors.v3.Cors";
const POLICY: &str = "cors.v3.CorsPolicy";
const CSRF: &str = "csrf.v3.CsrfPolicy";

pub fn cases() -> Vec<Case> {
    [cors(), csrf()].concat()
}

fn cors() -> Vec<Case> {
    let origins = "allow_origin_string_match: [{exact: \"http://a.test\"}, {suffix: .b.test}]";
    let full = format!(
        "{origins}, allow_methods: \"GET,PUT\", allow_headers: x-a, expose_headers: x-b, max_age: \"100\", \
         allow_credentials: true"
    );
    let preflight =
        |origin: &str, more: &str| format!("OPTIONS /\norigin: {origin}\naccess-control-request-method: PUT{more}");
    let private = "\naccess-control-request-private-network: true";
    let requests = [
        "GET /".to_owned(),
        "GET /\norigin: http://a.test".to_owned(),
        "GET /\norigin: https://x.b.test".to_owned(),
        "GET /\norigin: http://c.test".to_owned(),
        "GET /\norigin:".to_owned(),
        "OPTIONS /\norigin: http://a.test".to_owned(),
        "OPTIONS /\norigin: http://a.test\naccess-control-request-method:".to_owned(),
        preflight("http://a.test", ""),
        preflight("http://c.test", ""),
        preflight("http://a.test", private),
        preflight("http://a.test", "\naccess-control-request-headers: x-c, x-d"),
        "GET /direct\norigin: http://a.test".to_owned(),
        "GET /plain\norigin: http://a.test".to_owned(),
        "GET /\norigin: http://a.test\nx-do: 200+access-control-allow-origin=x+access-control-expose-headers=y"
            .to_owned(),
    ];
    let requests: Vec<&str> = requests.iter().map(String::as_str).collect();
    let share = |field: &str, percent: u32| format!("{field}: {{default_value: {{numerator: {percent}}}}}");
    let by_route = |name, policy: &str| case(name, CORS, "", &requests).told(By::Route, POLICY, policy);
    vec![
        case("no policy", CORS, "", &requests),
        by_route("policy", &full),
        by_route("only origins", origins),
        by_route("an empty policy", ""),
        by_route("any origin", "allow_origin_string_match: [{exact: \"*\"}], allow_credentials: false"),
        by_route(
            "all that is asked for",
            &format!("{origins}, allow_methods: \"*\", allow_headers: \"*\", expose_headers: \"*\""),
        ),
        by_route(
            "all that is asked for, with credentials",
            &format!("{origins}, allow_methods: \"*\", allow_headers: \"*\", allow_credentials: true"),
        ),
        by_route(
            "several lines of one header",
            "allow_origin_string_match: [{suffix: .test}], allow_methods: \"*\", allow_headers: \"*\"",
        )
        .with_requests(&[
            &preflight("http://a.test", "\naccess-control-request-headers: x-c\naccess-control-request-headers: x-d"),
            &preflight("http://a.test", "\norigin: http://b.test"),
            &preflight("http://a.test", "\norigin: http://b.none").replace("OPTIONS /", "OPTIONS /direct"),
        ]),
        by_route("private networks", &format!("{origins}, allow_private_network_access: true")),
        by_route("preflights are kept", &format!("{origins}, forward_not_matching_preflights: false")),
        by_route("not enabled", &format!("{full}, {}", share("filter_enabled", 0))),
        by_route("shadow", &format!("{full}, {}, {}", share("filter_enabled", 0), share("shadow_enabled", 100))),
        by_route(
            "shadow, preflights kept",
            &format!(
                "{full}, {}, {}, forward_not_matching_preflights: false",
                share("filter_enabled", 0),
                share("shadow_enabled", 100)
            ),
        ),
        case("levels of policies", CORS, "", &requests)
            .told(By::Config, POLICY, &full)
            .told(By::Host, POLICY, "allow_methods: DELETE, allow_credentials: false")
            .told(By::Route, POLICY, "max_age: \"7\""),
        case("the deprecated cors of routes", CORS, "", &requests).of_routes("", &format!("cors: {{{full}}}")),
        case("the deprecated cors of virtual hosts", CORS, "", &requests).of_routes(&format!("cors: {{{full}}}"), ""),
        case("the deprecated cors of both", CORS, "", &requests)
            .of_routes(&format!("cors: {{{full}}}"), "cors: {allow_methods: DELETE, allow_credentials: false}"),
        case("the deprecated cors, not enabled", CORS, "", &requests)
            .of_routes("", &format!("cors: {{{full}, {}}}", share("filter_enabled", 0))),
        case("the deprecated cors beside a policy", CORS, "", &requests)
            .told(By::Config, POLICY, origins)
            .of_routes(&format!("cors: {{{full}}}"), ""),
    ]
}

fn csrf() -> Vec<Case> {
    let on = "filter_enabled: {default_value: {numerator: 100}}";
    let off = "filter_enabled: {default_value: {numerator: 0}}";
    let shadow = "shadow_enabled: {default_value: {numerator: 100}}";
    let requests = [
        "GET /",
        "POST /\n\nbody",
        "POST /\norigin: http://case.test\n\nbody",
        "PUT /\norigin: https://case.test",
        "DELETE /\norigin: http://other.test",
        "PATCH /\norigin: case.test",
        "POST /\norigin: http://case.test:80",
        "POST /\nhost: case.test:80\norigin: http://case.test:80",
        "POST /\nhost: case.test:80\norigin: http://case.test",
        "POST /\norigin: null",
        "POST /\norigin: null\nreferer: http://case.test/a?b",
        "POST /\nreferer: http://case.test/a?b",
        "POST /\nreferer: http://other.test/a?b",
        "POST /\norigin: http://other.test\nreferer: http://case.test/",
        "POST /\norigin: http://more.test",
        "POST /\norigin: http://CASE.test",
        "POST /\norigin: ftp://case.test",
        "POST /\norigin: http://",
        "POST /\norigin: http://u@case.test/",
        "HEAD /",
        "POST /direct\norigin: http://other.test",
        "POST /plain\norigin: http://other.test",
    ];
    vec![
        case("csrf", CSRF, on, &requests),
        case("additional origins", CSRF, &format!("{on}, additional_origins: [{{prefix: more}}]"), &requests),
        case("csrf off", CSRF, off, &requests),
        case("csrf in the shadow", CSRF, &format!("{off}, {shadow}"), &requests),
        case("csrf by route", CSRF, on, &requests).told(By::Host, CSRF, off).told(
            By::Route,
            CSRF,
            &format!("{on}, additional_origins: [{{prefix: more}}]"),
        ),
    ]
}

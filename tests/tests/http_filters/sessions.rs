//! stateful_session.

use super::harness::{By, Case, case};

const SESSION: &str = "stateful_session.v3.StatefulSession";
const OF_ROUTE: &str = "stateful_session.v3.StatefulSessionPerRoute";

fn cookie(fields: &str) -> String {
    format!(
        "session_state: {{name: envoy.http.stateful_session.cookie, typed_config: {{\"@type\": \
         type.googleapis.com/envoy.extensions.http.stateful_session.cookie.v3.CookieBasedSessionState, cookie: {{{fields}}}}}}}"
    )
}

fn header(name: &str) -> String {
    format!(
        "session_state: {{name: envoy.http.stateful_session.header, typed_config: {{\"@type\": \
         type.googleapis.com/envoy.extensions.http.stateful_session.header.v3.HeaderBasedSessionState, name: {name}}}}}"
    )
}

fn envelope(name: &str) -> String {
    format!(
        "session_state: {{name: envoy.http.stateful_session.envelope, typed_config: {{\"@type\": \
         type.googleapis.com/envoy.extensions.http.stateful_session.envelope.v3.EnvelopeSessionState, header: {{name: {name}}}}}}}"
    )
}

/// Sessions beside what the hosts themselves keep in the header.
fn in_envelopes() -> Vec<Case> {
    let requests = [
        "GET /many",
        "GET /many\nx-do: 200+x-session=own",
        "GET /many\nx-do: 200+x-session=one+x-session=two",
        "GET /many\nx-session: $address_of_backup;UV:b3du\nx-do: 200+x-session=own",
        "GET /many\nx-session: $address_of_first;UV:b3du\nx-do: 200+x-session=next",
        "GET /many\nx-session: ;$address_of_backup;;X:1;UV:b3du\nx-do: 200+x-session=own",
        "GET /many\nx-session: $address_of_backup\nx-do: 200+x-session=own",
        "GET /many\nx-session: $address_of_backup;UV:\nx-do: 200+x-session=own",
        "GET /many\nx-session: $address_of_backup;UV:!\nx-do: 200+x-session=own",
        "GET /many\nx-session: !;UV:b3du\nx-do: 200+x-session=own",
        "GET /many\nx-session: bm9uc2Vuc2U=;UV:b3du\nx-do: 200+x-session=own",
        "GET /many\nx-session: ;\nx-do: 200+x-session=own",
        "GET /many\nx-session: \nx-do: 200+x-session=own",
        "GET /direct\nx-session: $address_of_backup;UV:b3du",
        "GET /plain\nx-session: $address_of_backup;UV:b3du\nx-do: 200+x-session=own",
    ];
    let state = envelope("x-session");
    vec![
        case("envelope", SESSION, &format!("stat_prefix: sessions, {state}"), &requests),
        case("strict envelope", SESSION, &format!("strict: true, stat_prefix: sessions, {state}"), &requests),
    ]
}

pub fn cases() -> Vec<Case> {
    let hosts = ["first", "backup", "degraded", "unhealthy", "draining"];
    let mut of_cookies: Vec<String> =
        hosts.iter().map(|host| format!("GET /many\ncookie: a=b; s=\"$cookie_of_{host}\"")).collect();
    of_cookies.extend(hosts.iter().map(|host| format!("GET /other\ncookie: s=$address_of_{host}; s=x")));
    let more = [
        "GET /many",
        "GET /many\ncookie: s=$expired_cookie_of_backup",
        "GET /many\ncookie: s=$valid_cookie_of_backup",
        "GET /many\ncookie: s=bm9uc2Vuc2U=",
        "GET /many\ncookie: s=Cg4xMjcuMC4wLjk6MTAwMDA=",
        "GET /many\ncookie: s=!",
        "GET /many\ncookie: s=",
        "GET /many\ncookie: s=Cgl1bmtub3duOjE=\nx-do: 200+set-cookie=a",
        "GET /many\ncookie: s=$cookie_of_backup\nx-do: reset",
        "GET /many\ncookie: s=$cookie_of_backup\nx-do: 503",
        "GET /many\nx-do: reset",
        "GET /direct",
        "GET /direct\ncookie: s=$cookie_of_backup",
        "GET /plain\ncookie: s=$cookie_of_backup",
    ];
    of_cookies.extend(more.map(str::to_owned));
    let of_cookies: Vec<&str> = of_cookies.iter().map(String::as_str).collect();
    let of_headers: Vec<String> =
        hosts.iter().map(|host| format!("GET /many\nx-session: $address_of_{host}\nx-do: 200+x-session=1")).collect();
    let more = ["GET /many", "GET /many\nx-session: !", "GET /many\nx-session: bm9uc2Vuc2U=", "GET /many\nx-session: "];
    let of_headers: Vec<&str> = of_headers.iter().map(String::as_str).chain(more).collect();
    let paths =
        ["GET /many", "GET /many/a?b", "GET /manyother", "GET /many?a", "GET /other\ncookie: s=$cookie_of_backup"];
    let retry = "retry_policy: {retry_on: 5xx, num_retries: 2}";
    let retried = [
        "GET /many\ncookie: s=$cookie_of_backup\nx-do: 503,200",
        "GET /many\ncookie: s=$cookie_of_unhealthy\nx-do: 503,200",
        "GET /many\ncookie: s=$cookie_of_backup\nx-do: reset,503,200",
    ];
    let with_stats = "stat_prefix: sessions, ";
    let strict = "strict: true, stat_prefix: sessions, ";
    let name = cookie("name: s");
    let mut cases = in_envelopes();
    cases.extend([
        case("cookie", SESSION, &name, &of_cookies),
        case("cookie with statistics", SESSION, &format!("{with_stats}{name}"), &of_cookies),
        case("strict", SESSION, &format!("{strict}{name}"), &of_cookies),
        case(
            "strict with a status",
            SESSION,
            &format!("{strict}status_on_strict_destination_not_found: 410, {name}"),
            &of_cookies,
        ),
        case("header", SESSION, &format!("{with_stats}{}", header("x-session")), &of_headers),
        case("strict header", SESSION, &format!("{strict}{}", header("x-session")), &of_headers),
        case("nothing", SESSION, "stat_prefix: sessions", &["GET /many", "GET /many\ncookie: s=$cookie_of_backup"]),
        case(
            "attributes",
            SESSION,
            &cookie("name: s, path: /, attributes: [{name: SameSite, value: Lax}, {name: Secure}]"),
            &["GET /many", "GET /many\ncookie: s=$cookie_of_backup"],
        ),
        case("path", SESSION, &format!("{with_stats}{}", cookie("name: s, path: /many")), &paths),
        case("path of a directory", SESSION, &format!("{with_stats}{}", cookie("name: s, path: /many/")), &paths),
        case("retries", SESSION, &format!("{with_stats}{name}"), &retried).of_routes("", retry),
        case("strict retries", SESSION, &format!("{strict}{name}"), &retried).of_routes("", retry),
        case("by route", SESSION, &format!("{with_stats}{name}"), &of_cookies)
            .told(By::Host, OF_ROUTE, &format!("stateful_session: {{stat_prefix: $case, {}}}", header("x-session")))
            .told(By::Route, OF_ROUTE, &format!("stateful_session: {{stat_prefix: $caser, strict: true, {name}}}")),
        case("off by route", SESSION, &format!("{with_stats}{name}"), &of_cookies).told(
            By::Route,
            OF_ROUTE,
            "disabled: true",
        ),
    ]);
    cases
}

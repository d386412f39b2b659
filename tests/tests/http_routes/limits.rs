//! Paths that are made normal ones, and how much a client may send.

use super::harness::{Case, case};

pub fn cases() -> Vec<Case> {
    [normal_paths(), sizes()].concat()
}

fn of_manager(name: &'static str, lines: &[&str], requests: &[&str]) -> Case {
    let case = case(name, "- {match: {prefix: /a/b}, route: {cluster: b}}\n- {match: {prefix: /}, $a}", requests);
    lines.iter().fold(case, |case, line| case.of_manager(line))
}

fn normal_paths() -> Vec<Case> {
    let requests = [
        "GET /a/b",
        "GET /a/./b",
        "GET /a/../a/b?x=/../y",
        "GET /a/../b",
        "GET /a//b",
        "GET //a/b",
        "GET /a///b//",
        "GET /a/b//?x=//",
        "GET /..",
        "GET /.",
        "GET /../../a/b",
        "GET /a/..",
        "GET /a/.",
        "GET /a/b/..",
        "GET /a/x/../../../b",
        "GET /a/..b/.c",
        "GET /a/...",
        "GET /x//../a/b",
        "GET /a/%2e%2e/b",
        "GET /a/%2E/b",
        "GET /a/.%2e/b",
        "GET /a/%2e%2E%2e/b",
        "GET /%61/%62",
        "GET /%7Euser",
        "GET /a%20b/%41%2f%5c%3F",
        "GET /%e4%bd%a0/%E4",
        "GET /a;x=1/../a/b",
        "GET /a\\b\\..\\c",
        "GET /\\a/b",
        "GET /%5ca/..%5cb",
        "GET /%zz",
        "GET /a%",
        "GET /%00",
        "GET http://other.test/a/../a/b",
        "OPTIONS *",
    ];
    let with = |name, lines: &[&str]| of_manager(name, lines, &requests);
    vec![
        with("paths as they are", &["normalize_path: false"]),
        with("normalize_path", &["normalize_path: true"]),
        with("merge_slashes", &["merge_slashes: true"]),
        with("normalize_path and merge_slashes", &["normalize_path: true", "merge_slashes: true"]),
    ]
}

fn sizes() -> Vec<Case> {
    let header = |bytes: usize| format!("GET /\nx-large: {}", "x".repeat(bytes));
    let path = |bytes: usize| format!("GET /{}", "x".repeat(bytes));
    let large: Vec<_> = [500, 1100, 3000, 9000].into_iter().flat_map(|bytes| [header(bytes), path(bytes)]).collect();
    let large: Vec<_> = large.iter().map(String::as_str).collect();
    let many: Vec<_> = (1..6).map(|count| "GET /".to_owned() + &"\nx-one: 1".repeat(count)).collect();
    let many: Vec<_> = many.iter().map(String::as_str).collect();
    vec![
        of_manager("max_request_headers_kb", &["max_request_headers_kb: 1"], &large),
        of_manager("max_request_headers_kb, more of it", &["max_request_headers_kb: 8"], &large),
        of_manager("max_headers_count", &["common_http_protocol_options: {max_headers_count: 6}"], &many),
    ]
}

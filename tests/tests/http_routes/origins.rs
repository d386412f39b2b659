//! What formats tell of where a response came from; and the words of statuses.

use super::harness::{Case, case};

const ROUTES: &str = "- {match: {prefix: /dead}, route: {cluster: dead}}\n\
                      - {match: {prefix: /empty}, route: {cluster: empty}}\n\
                      - {match: {prefix: /direct}, direct_response: {status: 200, body: {inline_string: here}}}\n\
                      - {match: {prefix: /redirect}, redirect: {path_redirect: /new}}\n\
                      - {match: {prefix: /slow}, route: {cluster: a, timeout: 0.3s}}\n\
                      - {match: {prefix: /}, route: {cluster: a}}";

const REQUESTS: [&str; 7] =
    ["GET /", "GET /\nx-do: 503", "GET /dead", "GET /empty", "GET /direct", "GET /redirect", "GET /slow\nx-do: hang"];

pub fn cases() -> Vec<Case> {
    let added = ["RESPONSE_CODE_DETAILS", "RESPONSE_FLAGS", "UPSTREAM_TRANSPORT_FAILURE_REASON", "UPSTREAM_CLUSTER"];
    let added: Vec<_> = added
        .iter()
        .enumerate()
        .map(|(number, operator)| format!("{{header: {{key: x-{number}, value: \"%{operator}%\"}}}}"))
        .collect();
    let told = "local_reply_config: {body_format: {text_format_source: {inline_string: \
                \"%UPSTREAM_TRANSPORT_FAILURE_REASON% %RESPONSE_CODE_DETAILS% %RESPONSE_FLAGS%\"}}}";
    let statuses = [200, 203, 226, 299, 306, 418, 421, 425, 451, 499, 506, 511, 599];
    let words: Vec<_> = statuses
        .iter()
        .map(|status| format!("- {{match: {{path: /{status}}}, direct_response: {{status: {status}}}}}"))
        .collect();
    let requests: Vec<_> = statuses.iter().map(|status| format!("GET /{status}")).collect();
    let requests: Vec<_> = requests.iter().map(String::as_str).collect();
    vec![
        case("response_headers_to_add", ROUTES, &REQUESTS)
            .of_host(&format!("response_headers_to_add: [{}]", added.join(", "))),
        case("local_reply_config", ROUTES, &REQUESTS).of_manager(told),
        case("the words of statuses", &words.join("\n"), &requests),
    ]
}

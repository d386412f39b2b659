//! custom_response.

use super::harness::{By, Case, case};

const RESPONSE: &str = "custom_response.v3.CustomResponse";

/// An input of this message of `envoy.type.matcher.v3`.
fn input(message: &str, fields: &str) -> String {
    format!(
        "input: {{name: i, typed_config: {{\"@type\": type.googleapis.com/envoy.type.matcher.v3.{message}, {fields}}}}}"
    )
}

fn status(status: &str) -> String {
    format!(
        "single_predicate: {{{}, value_match: {{exact: \"{status}\"}}}}",
        input("HttpResponseStatusCodeMatchInput", "")
    )
}

fn class(class: &str) -> String {
    format!(
        "single_predicate: {{{}, value_match: {{exact: {class}}}}}",
        input("HttpResponseStatusCodeClassMatchInput", "")
    )
}

fn local(fields: &str) -> String {
    format!(
        "action: {{name: a, typed_config: {{\"@type\": \
         type.googleapis.com/envoy.extensions.http.custom_response.local_response_policy.v3.LocalResponsePolicy, {fields}}}}}"
    )
}

/// The policy that leads requests elsewhere.
fn redirect(fields: &str) -> String {
    format!(
        "action: {{name: a, typed_config: {{\"@type\": \
         type.googleapis.com/envoy.extensions.http.custom_response.redirect_policy.v3.RedirectPolicy, {fields}}}}}"
    )
}

/// Cases of answers that are another route's.
pub fn redirects() -> Vec<Case> {
    let requests = [
        "GET /",
        "GET /path?q=1\nx-do: 503,200+x-from=second",
        "HEAD /\nx-do: 503,200+x-from=second",
        "GET /\nx-do: 503",
        "GET /\nx-do: 503,404",
        "GET /\nx-do: 503,302+location=http://elsewhere.test/",
        "POST /\nx-do: 503,201+bytes=3\n\nbody",
        "GET /\nx-do: reset,200+bytes=3",
        "GET /\nx-do: reset",
        "GET /plain\nx-do: 503,200",
        "GET /direct",
        "GET /\nx-do: 418\nx-a: 1",
    ];
    let all = class("5xx");
    let uri = redirect("uri: \"http://other.test/other/page?x=y#z\"");
    let direct = redirect(
        "uri: \"https://other.test/direct\", status_code: 299, response_headers_to_add: [{header: {key: x-a, value: \
         \"%RESPONSE_CODE% %RESP(content-type)%\"}}]",
    );
    let headers = redirect(
        "uri: \"http://other.test:81/plain\", request_headers_to_add: [{header: {key: x-do, value: 200+x-from=b}, append_action: \
         OVERWRITE_IF_EXISTS_OR_ADD}, {header: {key: x-b, value: \"%REQ(:path)% %REQ(x-do)%\"}}], response_headers_to_add: \
         [{header: {key: x-from, value: \"%REQ(x-b)%\"}}]",
    );
    let made = |fields: &str| redirect(&format!("redirect_action: {{{fields}}}"));
    let host = made("host_redirect: other.test, port_redirect: 82, https_redirect: true");
    let path = made("path_redirect: \"/other?p=1\"");
    let stripped = made("path_redirect: /plain/x, strip_query: true, scheme_redirect: http");
    let deny = "abort: {http_status: 503, percentage: {numerator: 100}}, headers: [{name: x-a, present_match: true}]";
    let mut cases = vec![
        case("to a host", RESPONSE, &list(&[(&all, &uri)]), &requests),
        case("to an answer of the proxy's", RESPONSE, &list(&[(&all, &direct)]), &requests),
        case(
            "errors are changed too",
            RESPONSE,
            &list(&[(
                &all,
                &redirect(
                    "uri: \"http://a.test/\", status_code: 299, response_headers_to_add: [{header: {key: x-a, value: b}}]",
                ),
            )]),
            &requests,
        ),
        case("with other headers", RESPONSE, &list(&[(&all, &headers)]), &requests)
            .of_routes("request_headers_to_add: [{header: {key: x-routed, value: \"1\"}}]", ""),
        case("another host", RESPONSE, &list(&[(&all, &host)]), &requests),
        case("another path", RESPONSE, &list(&[(&all, &path)]), &requests),
        case("without the query", RESPONSE, &list(&[(&all, &stripped)]), &requests),
        case("answers of filters behind", RESPONSE, &list(&[(&all, &headers)]), &requests)
            .then("fault.v3.HTTPFault", deny),
        case("answers of filters before", RESPONSE, &list(&[(&all, &headers)]), &requests)
            .before("fault.v3.HTTPFault", deny),
        case("two kinds", RESPONSE, &list(&[(&all, &uri), (&class("4xx"), &local("status_code: 499"))]), &requests),
    ];
    // Which there is no route for.
    let domains = "domains: [\"case.test\"]";
    cases.push(case("nowhere", RESPONSE, &list(&[(&all, &uri)]), &requests).only_domains(domains));
    cases
}

fn list(matchers: &[(&str, &str)]) -> String {
    let matchers: Vec<_> =
        matchers.iter().map(|(predicate, on)| format!("{{predicate: {{{predicate}}}, on_match: {{{on}}}}}")).collect();
    format!("custom_response_matcher: {{matcher_list: {{matchers: [{}]}}}}", matchers.join(", "))
}

pub fn cases() -> Vec<Case> {
    let requests = [
        "GET /",
        "GET /\nx-do: 404",
        "GET /\nx-do: 503",
        "HEAD /\nx-do: 503",
        "GET /\nx-do: 503+x-a=1+x-a=2+bytes=0",
        "GET /\nx-do: 500+bytes=100000",
        "POST /\nx-do: 503\n\nbody",
        "GET /\nx-do: reset",
        "GET /direct",
        "GET /plain\nx-do: 503",
        "POST /a/B\ncontent-type: application/grpc\nx-do: 503\n\nx",
        "GET /\nx-do: 418\nx-accept: application/json\nx-accept: b",
        "GET /\nx-do: 410",
        "GET /\nx-do: 413",
    ];
    // Of details that Envoy has made for a request it keeps what the memory says where they were.
    let of_upstreams: Vec<_> = requests.into_iter().filter(|request| !request.contains("reset")).collect();
    let all = class("5xx");
    let fixed = local("status_code: 499, body: {inline_string: \"not now\"}");
    let added = local(
        "response_headers_to_add: [{header: {key: x-a, value: \"%RESPONSE_CODE% %REQ(:path)% %RESP(x-a)%\"}}, \
         {header: {key: x-a, value: two}}, {header: {key: content-type, value: text/x-mine}}], body: {inline_string: b}",
    );
    let json = local(
        "body: {inline_string: text}, body_format: {json_format: {status: \"%RESPONSE_CODE%\", body: \"%LOCAL_REPLY_BODY%\", \
         path: \"%REQ(:path)%\", had: \"%RESP(x-a)%\", none: \"%REQ(nothing)%\"}}",
    );
    let text = local(
        "body_format: {text_format_source: {inline_string: \"<%LOCAL_REPLY_BODY%> %RESPONSE_CODE% %REQ(nothing)%\"}, \
         content_type: text/html}",
    );
    let kept = local("preserve_response_code_details: true, status_code: 599");
    let named = local("response_code_details: by_policy");
    let accept = format!(
        "single_predicate: {{{}, value_match: {{exact: \"application/json,b\"}}}}",
        input("HttpRequestHeaderMatchInput", "header_name: x-accept")
    );
    let answered = format!(
        "single_predicate: {{{}, value_match: {{prefix: \"1,\"}}}}",
        input("HttpResponseHeaderMatchInput", "header_name: x-a")
    );
    let here = format!(
        "single_predicate: {{{}, value_match: {{exact: \"true\"}}}}",
        input("HttpResponseLocalReplyMatchInput", "")
    );
    let either = format!("or_matcher: {{predicate: [{{{}}}, {{{accept}}}]}}", status("404"));
    let both = format!("and_matcher: {{predicate: [{{{all}}}, {{{answered}}}]}}");
    let neither = format!("not_matcher: {{or_matcher: {{predicate: [{{{all}}}, {{{}}}]}}}}", class("2xx"));
    let map = |kind: &str, input: &str, entries: &str| {
        format!("custom_response_matcher: {{matcher_tree: {{{input}, {kind}: {{map: {{{entries}}}}}}}")
    };
    let status_input = input("HttpResponseStatusCodeMatchInput", "");
    let exact = map("exact_match_map", &status_input, &format!("\"404\": {{{fixed}}}, \"503\": {{{json}}}"));
    let nested = format!(
        "matcher: {{matcher_list: {{matchers: [{{predicate: {{{}}}, on_match: {{{json}}}}}]}}}}",
        status("503")
    );
    let prefix = map(
        "prefix_match_map",
        &status_input,
        &format!("\"5\": {{{fixed}}}, \"50\": {{{nested}}}, \"41\": {{{named}}}"),
    );
    let deny = "abort: {http_status: 503, percentage: {numerator: 100}}, \
                headers: [{name: x-abort, present_match: true}]";
    vec![
        case("fixed", RESPONSE, &list(&[(&all, &fixed)]), &requests),
        case("headers", RESPONSE, &list(&[(&all, &added)]), &requests),
        case("json", RESPONSE, &list(&[(&all, &json)]), &requests),
        case("text", RESPONSE, &list(&[(&all, &text)]), &requests),
        case("details", RESPONSE, &list(&[(&all, &kept), (&class("4xx"), &named)]), &of_upstreams),
        case("empty", RESPONSE, "", &requests),
        case("first of a list", RESPONSE, &list(&[(&both, &fixed), (&either, &json), (&neither, &named), (&all, &text)]), &requests),
        case("of proxies alone", RESPONSE, &list(&[(&here, &json)]), &requests),
        case("exact", RESPONSE, &format!("{exact}, on_no_match: {{{named}}}}}"), &requests),
        case("prefix", RESPONSE, &format!("{prefix}}}"), &requests),
        case("other filters' answers", RESPONSE, &list(&[(&all, &json)]), &["GET /\nx-abort: 1", "GET /\nx-do: 503"])
            .then("fault.v3.HTTPFault", deny),
        case("other filters' answers, behind", RESPONSE, &list(&[(&all, &json)]), &["GET /\nx-abort: 1", "GET /\nx-do: 503"])
            .before("fault.v3.HTTPFault", deny)
            .before(
                "header_mutation.v3.HeaderMutation",
                "mutations: {response_mutations: [{append: {header: {key: x-m, value: \"%RESPONSE_CODE%\"}}}]}",
            ),
        case("twice", RESPONSE, &list(&[(&all, &fixed)]), &requests)
            .then(RESPONSE, &list(&[(&class("5xx"), &json), (&class("4xx"), &kept)])),
        case("with local_reply_config", RESPONSE, &list(&[(&all, &fixed), (&class("4xx"), &json)]), &requests).of_manager(
            "local_reply_config: {mappers: [{filter: {status_code_filter: {comparison: {op: EQ, value: {default_value: 499, \
             runtime_key: a.b}}}}, status_code: 498, headers_to_add: [{header: {key: x-mapped, value: a}}]}], \
             body_format: {text_format: \"[%LOCAL_REPLY_BODY%]\"}}",
        ),
        case("routes' headers", RESPONSE, &list(&[(&all, &fixed)]), &requests)
            .of_routes("response_headers_to_add: [{header: {key: x-host, value: a}}]", ""),
        case("by route", RESPONSE, &list(&[(&class("4xx"), &fixed), (&all, &fixed)]), &requests)
            .told(By::Host, RESPONSE, &list(&[(&all, &json), (&status("404"), &json)]))
            .told(By::Route, RESPONSE, &list(&[(&status("404"), &text)])),
    ]
}

//! `ExtensionWithMatcher`: filters that some requests pass by.

use super::harness::{By, Case, case};

const WITH_MATCHER: &str = "envoy.extensions.common.matching.v3.ExtensionWithMatcher";
const BY_ROUTE: &str = "envoy.extensions.common.matching.v3.ExtensionWithMatcherPerRoute";
const MUTATION: &str = "header_mutation.v3.HeaderMutation";

/// The message of another filter.
fn inner(message: &str, config: &str) -> String {
    format!(
        "extension_config: {{name: inner, typed_config: {{\"@type\": type.googleapis.com/envoy.extensions.filters.http.{message}, \
         {config}}}}}"
    )
}

fn input(message: &str, fields: &str) -> String {
    format!("{{name: input, typed_config: {{\"@type\": type.googleapis.com/{message}, {fields}}}}}")
}

fn header(name: &str) -> String {
    input("envoy.type.matcher.v3.HttpRequestHeaderMatchInput", &format!("header_name: {name}"))
}

const SKIP: &str = "{action: {name: skip, typed_config: {\"@type\": \
                    type.googleapis.com/envoy.extensions.filters.common.matcher.action.v3.SkipFilter}}}";

/// Those whose value is `skip` pass by.
fn exact(input: &str) -> String {
    format!("xds_matcher: {{matcher_tree: {{input: {input}, exact_match_map: {{map: {{skip: {SKIP}}}}}}}}}")
}

pub fn cases() -> Vec<Case> {
    let marks = "mutations: {request_mutations: [{append: {header: {key: x-up, value: seen}}}], response_mutations: [{append: \
                 {header: {key: x-down, value: seen}}}]}";
    let mutation = |matcher: &str| format!("{}, {matcher}", inner(MUTATION, marks));
    let requests = [
        "GET /",
        "GET /\nx-a: skip",
        "GET /\nx-a: skip\nx-a: skip",
        "GET /\nx-a: other",
        "GET /direct",
        "GET /direct\nx-a: skip",
        "GET /?a=skip",
        "GET /?a=sk%69p&a=no",
        "GET /?a=no&a=skip",
        "GET /plain\nx-a: skip",
        "GET /plain",
        "GET /\nx-b: skip",
    ];
    let with = |name, matcher: &str| case(name, WITH_MATCHER, &mutation(matcher), &requests);
    let query = input("envoy.type.matcher.v3.HttpRequestQueryParamMatchInput", "query_param: a");
    let server = input("envoy.extensions.matching.common_inputs.network.v3.SourceIPInput", "");
    let single = |input: &str, value: &str| format!("{{single_predicate: {{input: {input}, value_match: {value}}}}}");
    let list = |predicate: &str| {
        format!("xds_matcher: {{matcher_list: {{matchers: [{{predicate: {predicate}, on_match: {SKIP}}}]}}}}")
    };
    let refuse = "rules: {action: DENY, policies: {all: {permissions: [{any: true}], principals: [{any: true}]}}}";
    vec![
        with("no matcher", ""),
        with("by a header", &exact(&header("x-a"))),
        with("by a query parameter", &exact(&query)),
        with("by the client", &list(&single(&server, "{exact: 127.0.0.1}"))),
        with(
            "by two",
            &list(&format!(
                "{{or_matcher: {{predicate: [{}, {}]}}}}",
                single(&header("x-a"), "{prefix: ot}"),
                single(&query, "{exact: skip}")
            )),
        ),
        with("what nothing is found for", &format!("xds_matcher: {{on_no_match: {SKIP}}}")),
        with("routes have their own", &exact(&header("x-a"))).told(By::Route, BY_ROUTE, &exact(&header("x-b"))),
        with("only routes have one", "").told(By::Route, BY_ROUTE, &exact(&header("x-a"))),
        with("routes match the client", &exact(&header("x-a"))).told(
            By::Route,
            BY_ROUTE,
            &list(&single(&server, "{prefix: \"127.\"}")),
        ),
        with("a route that says nothing", &exact(&header("x-a"))).told(By::Route, BY_ROUTE, ""),
        with("a route without a matcher", &exact(&header("x-a"))).told(By::Route, BY_ROUTE, "xds_matcher: {}"),
        with("routes tell the inner filter", &exact(&header("x-a"))).told(
            By::Route,
            "header_mutation.v3.HeaderMutationPerRoute",
            "mutations: {response_mutations: [{append: {header: {key: x-route, value: seen}}}]}",
        ),
        with("after an answer", &exact(&header("x-a"))).before("rbac.v3.RBAC", refuse),
        case(
            "a filter that answers",
            WITH_MATCHER,
            &format!("{}, {}", inner("rbac.v3.RBAC", refuse), exact(&header("x-a"))),
            &requests,
        ),
        case(
            "a filter that waits",
            WITH_MATCHER,
            &format!("{}, {}", inner("buffer.v3.Buffer", "max_request_bytes: 3"), exact(&header("x-a"))),
            &["POST /\n\nbody", "POST /\n\nbod", "POST /\nx-a: skip\n\nbody"],
        ),
        case(
            "one in another",
            WITH_MATCHER,
            &format!(
                "extension_config: {{name: outer, typed_config: {{\"@type\": type.googleapis.com/{WITH_MATCHER}, {}}}}}, {}",
                mutation(&exact(&query)),
                exact(&header("x-a"))
            ),
            &requests,
        ),
    ]
}

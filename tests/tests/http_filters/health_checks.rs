//! health_check.

use super::harness::{Case, case};

const HEALTH_CHECK: &str = "health_check.v3.HealthCheck";

pub fn cases() -> Vec<Case> {
    let on_path = "headers: [{name: \":path\", string_match: {exact: /health}}]";
    let requests = ["GET /health", "GET /", "POST /health\n\nbody", "HEAD /health", "GET /healthy"];
    let check = |name, more: &str| case(name, HEALTH_CHECK, &format!("{on_path}, {more}"), &requests);
    let clusters =
        |clusters: &str| format!("pass_through_mode: false, cluster_min_healthy_percentages: {{{clusters}}}");
    vec![
        check("answered", "pass_through_mode: false"),
        check("passed through", "pass_through_mode: true"),
        check("healthy cluster", &clusters("a: {value: 100}")),
        check("missing cluster", &clusters("a: {value: 100}, b: {value: 0}")),
        check("passed through, whatever the cluster", &clusters("b: {value: 50}").replacen("false", "true", 1)),
        case("everything", HEALTH_CHECK, "pass_through_mode: false", &requests),
        case(
            "cached",
            HEALTH_CHECK,
            &format!("{on_path}, pass_through_mode: true, cache_time: 100s"),
            &["GET /health\nx-do: 503", "GET /health", "POST /health\n\nbody", "GET /\nx-do: 200"],
        ),
        case(
            "cached, degraded",
            HEALTH_CHECK,
            &format!("{on_path}, pass_through_mode: true, cache_time: 100s"),
            &["GET /health\nx-do: 200+x-envoy-degraded=1", "GET /health"],
        ),
    ]
}

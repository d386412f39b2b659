//! admission_control.

use super::harness::{Case, case};

const CONTROL: &str = "admission_control.v3.AdmissionControl";

/// Answers that count, and with them requests that are refused with a probability of 0 or 1: nothing here is left to chance.
pub fn cases() -> Vec<Case> {
    let failure = "GET /\nx-do: 503";
    let of = |name, config: &str, requests: &[&str]| case(name, CONTROL, config, requests);
    // Of one failure the probability is at most a half, of a hundred it is a hundred of a hundred and one: of 10,000 it would take
    // 9,999 to be sure.
    let all = [
        "GET /",
        "GET /\nx-do: 404",
        failure,
        failure,
        "GET /direct",
        "POST /a/B\ncontent-type: application/grpc\nx-do: 200+content-type=application/grpc+grpc-status=0\n\nx",
        "POST /a/B\ncontent-type: application/grpc\nx-do: 200+content-type=application/grpc+grpc-status=13\n\nx",
        "POST /a/B\ncontent-type: application/grpc\nx-do: 200+content-type=application/grpc+grpc-status=17\n\nx",
        "POST /a/B\ncontent-type: application/grpc\nx-do: 200+content-type=application/grpc+grpc-status=x\n\nx",
        "POST /a/B\ncontent-type: application/grpc\nx-do: 200+content-type=application/grpc\n\nx",
        "POST /a/B\ncontent-type: application/grpc\nx-do: 200+content-type=application/grpc+grpc-status=7+bytes=0\n\nx",
        "POST /a/B\ncontent-type: application/grpc\nx-do: reset\n\nx",
        "GET /\nx-do: 200+grpc-status=14",
        "GET /\nx-do: 200+grpc-status=14+bytes=0",
        "GET /\nx-do: reset",
        &super::grpc::called("application/grpc", "", "{}"),
        &super::grpc::called("application/grpc", "", "status 14"),
    ];
    let never = "max_rejection_probability: {default_value: {value: 0}, runtime_key: admission.most}";
    let quiet = "rps_threshold: {default_value: 1000, runtime_key: admission.rps}";
    let high = "sr_threshold: {default_value: {value: 1}, runtime_key: admission.sr}";
    vec![
        of("never", &format!("success_criteria: {{}}, {never}"), &all),
        of("few requests", &format!("success_criteria: {{}}, {quiet}"), &all),
        of("few successes are enough", &format!("success_criteria: {{}}, {high}"), &[&["GET /"][..], &all].concat()),
        of(
            "criteria",
            &format!(
                "success_criteria: {{http_criteria: {{http_success_status: [{{start: 200, end: 201}}, \
                 {{start: 404, end: 504}}]}}, grpc_criteria: {{grpc_success_status: [13, 7]}}}}, {never}"
            ),
            &all,
        ),
        of(
            "disabled",
            "success_criteria: {}, enabled: {default_value: false, runtime_key: admission.enabled}",
            &[failure, failure, "GET /"],
        ),
        of("answered before", &format!("success_criteria: {{}}, {never}"), &["GET /", "GET /x"]).before(
            "fault.v3.HTTPFault",
            "abort: {http_status: 503, percentage: {numerator: 100}}, headers: [{name: \":path\", string_match: {exact: /x}}]",
        ),
        of("health checks", "success_criteria: {}", &["GET /health", failure]).before(
            "health_check.v3.HealthCheck",
            "pass_through_mode: true, headers: [{name: \":path\", string_match: {exact: /health}}]",
        ),
    ]
}

/// What has failed often enough that next to all requests are refused.
pub fn refusals() -> Case {
    let aggressive = "success_criteria: {}, sampling_window: 60s, aggression: {default_value: 1000000, runtime_key: a.b}, \
                      sr_threshold: {default_value: {value: 99}, runtime_key: a.c}, \
                      max_rejection_probability: {default_value: {value: 100}, runtime_key: a.d}";
    case("refused", CONTROL, aggressive, &["GET /\nx-do: 500", "GET /", "GET /direct", "GET /"])
}

use http::{Request, Response};

use super::*;
use crate::config::model::ResetHeader;

fn policy(retry_on: &str) -> RetryPolicy {
    let mut on = RetryOn::default();
    on.add(retry_on);
    on.add_grpc(retry_on);
    RetryPolicy { retry_on: on, retriable_status_codes: vec![418], ..RetryPolicy::default() }
}

fn request(headers: &[(&'static str, &'static str)]) -> RequestHead {
    let request = headers.iter().fold(Request::builder(), |request, (name, value)| request.header(*name, *value));
    request.body(()).expect("valid headers").into_parts().0
}

fn response(status: u16, headers: &[(&'static str, &'static str)]) -> ResponseHead {
    let response = Response::builder().status(status);
    let response = headers.iter().fold(response, |response, (name, value)| response.header(*name, *value));
    response.body(()).expect("valid headers").into_parts().0
}

fn wants(policy: &RetryPolicy, response: &ResponseHead) -> bool {
    RetryState::take((Some(policy), false), &mut request(&[]), None).is_some_and(|state| state.wants_response(response))
}

#[test]
fn what_was_sent_is_retried_only_where_the_policy_says_so() {
    let wants = |kinds, failure, started| wants_failure(&policy(kinds).retry_on, failure, started);
    assert!(wants("connect-failure", Failure::Connect, false));
    assert!(!wants("connect-failure", Failure::AfterRequest, true));
    let before = "reset-before-request,refused-stream";
    assert!(wants(before, Failure::BeforeRequest, false) && wants(before, Failure::Refused, true));
    assert!(!wants(before, Failure::AfterRequest, true));
    // An earlier attempt has sent something.
    assert!(!wants(before, Failure::Connect, true));
    assert!(wants("gateway-error", Failure::AfterRequest, true));
    assert!(!wants("5xx,connect-failure", Failure::Overflow, false));
}

#[test]
fn responses() {
    assert!(wants(&policy("gateway-error"), &response(502, &[])));
    assert!(!wants(&policy("gateway-error"), &response(500, &[])));
    assert!(wants(&policy("retriable-status-codes"), &response(418, &[])));
    assert!(!wants(&policy("retriable-status-codes"), &response(200, &[])));
    assert!(wants(&policy("unavailable"), &response(200, &[("grpc-status", "14")])));
    assert!(!wants(&policy("unavailable"), &response(200, &[("grpc-status", "13")])));
    assert!(!wants(&policy("unavailable"), &response(200, &[("grpc-status", "99")])));
    let limited = response(503, &[("x-envoy-ratelimited", "true")]);
    assert!(!wants(&policy("5xx"), &limited) && wants(&policy("envoy-ratelimited"), &limited));
}

#[test]
fn clients_say_what_is_retried() {
    let mut asks = request(&[
        ("x-envoy-retry-on", "retriable-status-codes, retriable-headers"),
        ("x-envoy-retry-grpc-on", "internal"),
        ("x-envoy-max-retries", "7"),
        ("x-envoy-retriable-status-codes", "204, x, 205"),
        ("x-envoy-retriable-header-names", "x-again, not a name"),
        ("x-other", "stays"),
    ]);
    let state = RetryState::take((None, false), &mut asks, None).expect("there are kinds of retries");
    assert_eq!((state.remaining, asks.headers.len()), (7, 1));
    assert!(state.wants_response(&response(205, &[])) && !state.wants_response(&response(206, &[])));
    assert!(state.wants_response(&response(200, &[("x-again", "")])));
    assert!(state.wants_response(&response(200, &[("grpc-status", "13")])));
    let mut nothing = request(&[("x-envoy-max-retries", "7")]);
    assert!(RetryState::take((None, false), &mut nothing, None).is_none() && nothing.headers.is_empty());
}

#[test]
fn upstreams_say_when_to_come_back() {
    let header = |name, is_unix_timestamp| ResetHeader { name: HeaderName::from_static(name), is_unix_timestamp };
    let reset_headers = vec![header("retry-after", false), header("x-reset", true)];
    let policy = RateLimitedBackOff { reset_headers, max_interval: Duration::from_secs(100) };
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
    let interval = |headers: &[_]| reset_interval(&policy, &response(429, headers).headers, now);
    assert_eq!(interval(&[("retry-after", "3")]), Some(Duration::from_secs(3)));
    assert_eq!(interval(&[("retry-after", "tomorrow"), ("x-reset", "1100")]), Some(Duration::from_secs(100)));
    assert_eq!(interval(&[("retry-after", "101")]), None);
    assert_eq!(interval(&[("x-reset", "999")]), None);
    assert_eq!(interval(&[]), None);
}

#[test]
fn back_off_is_bounded() {
    let policy = policy("");
    for retry in 1..100 {
        assert!(back_off(&policy, retry) <= Duration::from_millis(250));
    }
    assert!(back_off(&policy, 1) <= Duration::from_millis(25));
}

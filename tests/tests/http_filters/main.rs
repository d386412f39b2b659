//! HTTP filters side by side with the real Envoy: tables of filters, and of requests that meet them. What clients see, what the
//! services behind the proxies see, what the access logs say and what the filters count must be the same.

mod access;
mod admission;
mod authorization;
mod bandwidth;
mod browsers;
mod changes;
mod compression;
mod connections;
mod delegates;
mod duplex;
mod entries;
mod faults;
mod grpc;
mod harness;
mod health_checks;
mod illegal;
mod limits;
mod logs;
mod metadata;
mod processing;
mod responses;
mod rotation;
mod services;
mod sessions;
mod slow_clients;
mod slow_hosts;
mod strict;
mod taps;
mod tokens;
#[path = "../http_routes/upstream.rs"]
mod upstream;

use anyhow::{Result, ensure};

#[test]
fn access_is_granted_as_by_envoy() -> Result<()> {
    harness::compare(access::cases())
}

#[test]
fn faults_are_injected_as_by_envoy() -> Result<()> {
    harness::compare(faults::cases())
}

#[test]
fn messages_are_changed_as_by_envoy() -> Result<()> {
    harness::compare(changes::cases())
}

#[test]
fn bodies_are_compressed_as_by_envoy() -> Result<()> {
    harness::compare(compression::cases())
}

#[test]
fn requests_are_admitted_as_by_envoy() -> Result<()> {
    let mut cases = admission::cases();
    cases.push(admission::refusals());
    harness::compare(cases)
}

#[test]
fn grpc_is_counted_and_translated_as_by_envoy() -> Result<()> {
    harness::compare(grpc::cases())
}

#[test]
fn times_of_grpc_are_recorded_as_by_envoy() -> Result<()> {
    grpc::times()
}

#[test]
fn bodies_pass_at_a_rate_as_by_envoy() -> Result<()> {
    harness::compare(bandwidth::cases())
}

#[test]
fn browsers_are_answered_as_by_envoy() -> Result<()> {
    harness::compare(browsers::cases())
}

#[test]
fn metadata_is_told_as_by_envoy() -> Result<()> {
    harness::compare(metadata::cases())
}

#[test]
fn health_checks_are_answered_as_by_envoy() -> Result<()> {
    harness::compare(health_checks::cases())
}

#[test]
fn authorization_services_are_asked_as_by_envoy() -> Result<()> {
    harness::compare(authorization::cases())
}

#[test]
fn lines_are_written_as_by_envoy() -> Result<()> {
    harness::compare(logs::cases())
}

#[test]
fn tunnels_have_a_line_of_their_own() -> Result<()> {
    let texts = harness::of_culvert(&logs::tunnels())?;
    let lines = texts.iter().flatten().flat_map(|text| text.lines()).filter(|line| line.contains("DownstreamTunnel"));
    let lines: Vec<_> = lines.collect();
    // As Envoy writes it.
    let expected = "0-0 101 - via_upstream 0 0 DownstreamTunnelSuccessfullyEstablished ";
    ensure!(lines.len() == 1 && lines[0].starts_with(expected), "{texts:#?}");
    Ok(())
}

#[test]
fn log_services_are_told_what_envoy_tells() -> Result<()> {
    harness::compare(entries::cases())
}

#[test]
fn messages_are_processed_as_by_envoy() -> Result<()> {
    harness::compare(processing::cases())
}

#[test]
fn messages_are_processed_in_both_directions_at_once_as_by_envoy() -> Result<()> {
    harness::compare(duplex::cases())
}

#[test]
fn a_processor_is_held_up_by_slow_clients() -> Result<()> {
    slow_clients::hold_up_a_processor()
}

#[test]
fn answers_that_come_before_the_request_is_taken_are_processed_as_by_envoy() -> Result<()> {
    slow_hosts::answer_early()
}

#[test]
fn a_processor_that_leaves_with_a_body_fails_the_request() -> Result<()> {
    for (case, texts) in harness::of_culvert(&duplex::cut_short())?.iter().enumerate() {
        let log = texts.iter().find(|text| text.starts_with("log:")).map_or("", String::as_str);
        let why = if case < 2 { "ext_proc_error_stream_closed_within_a_body" } else { "spurious_message" };
        ensure!(log.contains(&format!(" 500 - {why}")), "case {case}: {texts:#?}");
    }
    Ok(())
}

#[test]
fn requests_are_limited_as_by_envoy() -> Result<()> {
    harness::compare(limits::cases())
}

#[test]
fn sessions_stay_with_their_hosts_as_by_envoy() -> Result<()> {
    harness::compare(sessions::cases())
}

#[test]
fn responses_are_replaced_as_by_envoy() -> Result<()> {
    harness::compare(responses::cases())
}

#[test]
fn streams_are_tapped_as_by_envoy() -> Result<()> {
    harness::compare(taps::cases())
}

#[test]
fn responses_are_looked_for_elsewhere_as_by_envoy() -> Result<()> {
    harness::compare(responses::redirects())
}

#[test]
fn headers_are_checked_as_by_envoy() -> Result<()> {
    harness::compare(strict::cases())
}

#[test]
fn tokens_are_verified_as_by_envoy() -> Result<()> {
    harness::compare(tokens::cases())
}

#[test]
fn what_a_service_says_too_much_of_is_no_answer() -> Result<()> {
    for (case, texts) in harness::of_culvert(&authorization::too_much())?.iter().enumerate() {
        let log = texts.iter().find(|text| text.starts_with("log:")).map_or("", String::as_str);
        ensure!(log.contains(" 403 UAEX ext_authz_error"), "case {case}: {texts:?}");
    }
    Ok(())
}

#[test]
fn what_is_no_header_is_refused_as_by_envoy() -> Result<()> {
    harness::compare(illegal::cases())
}

#[test]
fn filters_are_switched_as_by_envoy() -> Result<()> {
    harness::compare(illegal::switched())
}

#[test]
fn filters_with_matchers_are_envoys() -> Result<()> {
    harness::compare(delegates::cases())
}

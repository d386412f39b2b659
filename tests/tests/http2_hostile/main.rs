//! HTTP/2 that is wrong, or meant to hurt, frame by frame, sent to culvertd and to the real Envoy.

mod answers;
mod cut;
mod floods;
mod frames;
mod goaways;
mod harness;
mod heads;
mod resets;
mod wire;

use anyhow::Result;

#[test]
fn pseudo_headers_are_held_to_the_rules() -> Result<()> {
    harness::compare(&heads::pseudo_headers(), &[])
}

#[test]
fn fields_are_held_to_the_rules() -> Result<()> {
    harness::compare(&heads::fields(), &[])
}

#[test]
fn bodies_are_held_to_their_lengths() -> Result<()> {
    harness::compare(&heads::bodies(), &[])
}

#[test]
fn clients_that_answer_no_pings_are_left() -> Result<()> {
    floods::unanswered_pings()
}

#[test]
fn clients_that_acknowledge_no_end_are_left() -> Result<()> {
    floods::silent_clients()
}

#[test]
fn what_nobody_takes_is_reset() -> Result<()> {
    floods::not_taken()
}

#[test]
fn hosts_may_go_away_while_requests_are_tried_again() -> Result<()> {
    goaways::side_by_side()
}

#[test]
fn moved_requests_are_not_the_hosts_fault() -> Result<()> {
    goaways::moved_requests_are_not_the_hosts_fault()
}

#[test]
fn streams_are_reset_by_whom_envoy_says() -> Result<()> {
    resets::side_by_side()
}

#[test]
fn frames_have_their_sizes() -> Result<()> {
    harness::compare(&frames::sizes(), &[])
}

#[test]
fn frames_come_where_they_may() -> Result<()> {
    harness::compare(&frames::states(), &[])
}

#[test]
fn header_blocks_are_hpack() -> Result<()> {
    harness::compare(&frames::compression(), &[])
}

#[test]
fn underscores_are_refused_where_they_shall_be() -> Result<()> {
    let options = "common_http_protocol_options: {headers_with_underscores_action: REJECT_REQUEST}";
    harness::compare(&heads::underscores(), &[options])
}

/// Where Envoy is told that what is malformed is its stream's matter alone, it is so there as well.
#[test]
fn malformed_heads_cost_their_stream() -> Result<()> {
    harness::compare_resets(
        &heads::fields(),
        &["http2_protocol_options: {override_stream_error_on_invalid_http_message: true}"],
    )
}

#[test]
fn malformed_answers_cost_their_stream() -> Result<()> {
    answers::side_by_side()
}

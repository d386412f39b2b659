use super::*;

fn of(yaml: &str) -> Matcher {
    let predicate: MatchPredicate = culvert_xds_client::json::from_yaml(yaml).unwrap();
    parse(&predicate, "match").unwrap()
}

fn request(headers: &[(&'static str, &'static str)]) -> RequestHead {
    let mut head = http::Request::get("/path?q").body(()).unwrap().into_parts().0;
    for (name, value) in headers {
        head.headers.append(*name, http::HeaderValue::from_static(value));
    }
    head
}

/// Whether it matches after each of these, and whether it may change.
fn course(matcher: &Matcher, events: &[Event<'_>]) -> Vec<(bool, bool)> {
    let mut statuses = matcher.begin();
    let mut course = vec![(statuses.matches(), statuses.may_change())];
    for event in events {
        matcher.see(*event, &mut statuses);
        course.push((statuses.matches(), statuses.may_change()));
    }
    course
}

const A: &str = "http_request_headers_match: {headers: [{name: x-a, present_match: true}]}";

#[test]
fn what_has_not_come_does_not_match_and_what_is_not_matched_does() {
    let (with, without) = (request(&[("x-a", "1")]), request(&[]));
    let (with, without) = (Event::RequestHeaders(&with), Event::RequestHeaders(&without));
    assert_eq!(course(&of("any_match: true"), &[]), [(true, false)]);
    assert_eq!(course(&of(A), &[with]), [(false, true), (true, false)]);
    assert_eq!(course(&of(A), &[without]), [(false, true), (false, false)]);
    let not = of(&format!("not_match: {{{A}}}"));
    assert_eq!(course(&not, &[with]), [(true, true), (false, false)]);
    assert_eq!(course(&of("http_request_headers_match: {}"), &[with]), [(false, true), (true, false)]);
}

#[test]
fn several_are_joined() {
    let status = "http_response_headers_match: {headers: [{name: \":status\", string_match: {exact: \"503\"}}]}";
    let head = request(&[("x-a", "1")]);
    let mut response = http::Response::new(()).into_parts().0;
    response.status = StatusCode::SERVICE_UNAVAILABLE;
    let events = [Event::RequestHeaders(&head), Event::ResponseHeaders(&response)];
    let and = of(&format!("and_match: {{rules: [{{{A}}}, {{{status}}}]}}"));
    assert_eq!(course(&and, &events), [(false, true), (false, true), (true, false)]);
    let or = of(&format!("or_match: {{rules: [{{{status}}}, {{{A}}}]}}"));
    assert_eq!(course(&or, &events), [(false, true), (true, true), (true, false)]);
}

#[test]
fn patterns_are_found_across_pieces_and_not_beyond_the_limit() {
    let body = |limit: u32| {
        of(&format!(
            "http_request_generic_body_match: {{bytes_limit: {limit}, patterns: [{{string_match: needle}}, {{binary_match: QUI=}}]}}"
        ))
    };
    let see = |matcher: &Matcher, pieces: &[&str]| {
        let events: Vec<_> = pieces.iter().map(|piece| Event::RequestBody(piece.as_bytes())).collect();
        course(matcher, &events).pop().unwrap()
    };
    assert_eq!(see(&body(0), &["a needle", "AB"]), (true, false));
    assert_eq!(see(&body(0), &["a ne", "d", "leA", "B"]), (false, true));
    assert_eq!(see(&body(0), &["a nee", "d", "leA", "B"]), (true, false));
    assert_eq!(see(&body(10), &["a nee", "dle", "AB"]), (true, false));
    assert_eq!(see(&body(9), &["a nee", "dle", "AB"]), (false, false));
}

//! `MatchPredicate`: whether a stream is tapped, by its heads, trailers and bodies as they come.

use envoy_types::pb::envoy::config::{
    common::matcher::v3::{
        HttpGenericBodyMatch, HttpHeadersMatch, MatchPredicate,
        http_generic_body_match::generic_text_match::Rule as Pattern,
        match_predicate::{MatchSet, Rule},
    },
    route::v3::HeaderMatcher as ProtoHeader,
};
use http::{HeaderMap, StatusCode};
use memchr::memmem;

use crate::{
    config::{
        FieldError,
        model::{HeaderMatcher, MatchedHeader},
        parse,
    },
    http::{
        route_match::{header_matches, matches_any, values_match},
        stream::{RequestHead, ResponseHead},
    },
};

type Result<T> = std::result::Result<T, FieldError>;

/// How deep predicates may be in each other.
const MAX_DEPTH: usize = 32;

/// What has come of a stream.
#[derive(Clone, Copy)]
pub(super) enum Event<'a> {
    /// Nothing yet.
    Begin,
    RequestHeaders(&'a RequestHead),
    RequestBody(&'a [u8]),
    RequestTrailers(&'a HeaderMap),
    ResponseHeaders(&'a ResponseHead),
    ResponseBody(&'a [u8]),
    ResponseTrailers(&'a HeaderMap),
}

/// What a predicate looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Of {
    RequestHeaders,
    RequestTrailers,
    ResponseHeaders,
    ResponseTrailers,
}

/// A predicate. Those that it is made of are further behind in the list; the first is the whole.
#[derive(Debug)]
pub(super) struct Matcher(Vec<Node>);

#[derive(Debug)]
enum Node {
    Any,
    Or(Vec<usize>),
    And(Vec<usize>),
    Not(usize),
    Headers(Of, Vec<HeaderRule>),
    Body(BodyRule),
}

#[derive(Debug)]
struct HeaderRule {
    matcher: HeaderMatcher,
    /// It is of `:status`, which is no header here.
    status: bool,
}

/// All patterns must be in the body.
#[derive(Debug)]
struct BodyRule {
    of_response: bool,
    patterns: Vec<Vec<u8>>,
    /// Of the body's first bytes only; `usize::MAX`: of all.
    limit: usize,
    /// The longest pattern's length less one: what is remembered of the pieces before.
    overlap: usize,
}

/// How far a stream's predicates have come.
pub(super) struct Statuses(Vec<Status>);

#[derive(Debug, Default)]
struct Status {
    matches: bool,
    /// It will not change any more.
    settled: bool,
    search: Option<Box<Search>>,
}

/// How far the search through a body has come.
#[derive(Debug)]
struct Search {
    found: Vec<bool>,
    /// The end of what has come before.
    tail: Vec<u8>,
    seen: usize,
}

impl Matcher {
    /// The state of a stream of which nothing has come.
    pub(super) fn begin(&self) -> Statuses {
        let mut statuses = Statuses(self.0.iter().map(|_| Status::default()).collect());
        self.update(0, Event::Begin, &mut statuses.0);
        statuses
    }

    /// Something has come.
    pub(super) fn see(&self, event: Event<'_>, statuses: &mut Statuses) {
        self.update(0, event, &mut statuses.0);
    }

    fn update(&self, index: usize, event: Event<'_>, statuses: &mut [Status]) {
        if statuses[index].settled {
            return;
        }
        let (matches, settled) = match &self.0[index] {
            Node::Any => (true, true),
            Node::Or(all) | Node::And(all) => {
                for inner in all {
                    self.update(*inner, event, statuses);
                }
                let mut found = all.iter().map(|inner| statuses[*inner].matches);
                let is_and = matches!(&self.0[index], Node::And(_));
                let matches = if is_and { found.all(|matches| matches) } else { found.any(|matches| matches) };
                (matches, all.iter().all(|inner| statuses[*inner].settled))
            }
            Node::Not(inner) => {
                self.update(*inner, event, statuses);
                (!statuses[*inner].matches, statuses[*inner].settled)
            }
            Node::Headers(of, rules) => match verdict(*of, rules, event) {
                Some(matches) => (matches, true),
                None => return,
            },
            Node::Body(rule) => {
                let piece = match event {
                    Event::RequestBody(piece) if !rule.of_response => piece,
                    Event::ResponseBody(piece) if rule.of_response => piece,
                    _ => return,
                };
                let search = statuses[index].search.get_or_insert_with(|| Box::new(Search::new(rule)));
                search.see(rule, piece);
                let found = search.found.iter().all(|found| *found);
                (found, found || search.seen >= rule.limit)
            }
        };
        (statuses[index].matches, statuses[index].settled) = (matches, settled);
    }
}

impl Statuses {
    /// Whether the stream matches, as far as it has come.
    pub(super) fn matches(&self) -> bool {
        self.0.first().is_some_and(|status| status.matches)
    }

    /// Whether that may change.
    pub(super) fn may_change(&self) -> bool {
        self.0.first().is_some_and(|status| !status.settled)
    }
}

/// Whether the headers or trailers that have come are as the rules say; `None`: it is something else that has come.
fn verdict(of: Of, rules: &[HeaderRule], event: Event<'_>) -> Option<bool> {
    let in_map = |headers: &HeaderMap, status: Option<StatusCode>| {
        let holds = |rule: &HeaderRule| match (&rule.matcher.name, rule.status) {
            (_, true) => matches_any(&rule.matcher, status.iter().map(StatusCode::as_str)),
            (MatchedHeader::Name(name), false) => values_match(&rule.matcher, name, headers),
            // What only requests have.
            _ => matches_any::<&str>(&rule.matcher, std::iter::empty()),
        };
        rules.iter().all(holds)
    };
    match event {
        Event::RequestHeaders(head) if of == Of::RequestHeaders => {
            let holds = |rule: &HeaderRule| match rule.status {
                true => matches_any::<&str>(&rule.matcher, std::iter::empty()),
                false => header_matches(&rule.matcher, head),
            };
            Some(rules.iter().all(holds))
        }
        Event::RequestTrailers(trailers) if of == Of::RequestTrailers => Some(in_map(trailers, None)),
        Event::ResponseHeaders(head) if of == Of::ResponseHeaders => Some(in_map(&head.headers, Some(head.status))),
        Event::ResponseTrailers(trailers) if of == Of::ResponseTrailers => Some(in_map(trailers, None)),
        _ => None,
    }
}

impl Search {
    fn new(rule: &BodyRule) -> Search {
        Search { found: vec![false; rule.patterns.len()], tail: Vec::new(), seen: 0 }
    }

    fn see(&mut self, rule: &BodyRule, piece: &[u8]) {
        let piece = &piece[..piece.len().min(rule.limit.saturating_sub(self.seen))];
        self.seen += piece.len();
        // A pattern may begin in the pieces before.
        let before = self.tail.len();
        self.tail.extend_from_slice(&piece[..piece.len().min(rule.overlap)]);
        for (pattern, found) in rule.patterns.iter().zip(&mut self.found) {
            let across = || before > 0 && memmem::find(&self.tail, pattern).is_some();
            *found = *found || memmem::find(piece, pattern).is_some() || across();
        }
        if piece.len() >= rule.overlap {
            self.tail.clear();
            self.tail.extend_from_slice(&piece[piece.len() - rule.overlap..]);
        } else {
            self.tail.drain(..self.tail.len().saturating_sub(rule.overlap));
        }
    }
}

/// Reads a predicate.
pub(super) fn parse(predicate: &MatchPredicate, path: &str) -> Result<Matcher> {
    let mut nodes = Vec::new();
    add(predicate, path, &mut nodes, 0)?;
    Ok(Matcher(nodes))
}

/// Adds a predicate, and before it a place for it: returns that.
fn add(predicate: &MatchPredicate, path: &str, nodes: &mut Vec<Node>, depth: usize) -> Result<usize> {
    if depth > MAX_DEPTH {
        return Err(FieldError::new(path, "is nested too deeply"));
    }
    let place = nodes.len();
    nodes.push(Node::Any);
    let mut all = |set: &MatchSet, field: &str| {
        let rules = set.rules.iter().enumerate();
        rules
            .map(|(index, rule)| add(rule, &format!("{path}.{field}.rules[{index}]"), nodes, depth + 1))
            .collect::<Result<Vec<_>>>()
    };
    nodes[place] = match &predicate.rule {
        None => return Err(FieldError::new(path, "is needed")),
        Some(Rule::AnyMatch(_)) => Node::Any,
        Some(Rule::OrMatch(set)) => Node::Or(all(set, "or_match")?),
        Some(Rule::AndMatch(set)) => Node::And(all(set, "and_match")?),
        Some(Rule::NotMatch(inner)) => Node::Not(add(inner, &format!("{path}.not_match"), nodes, depth + 1)?),
        Some(Rule::HttpRequestHeadersMatch(headers)) => {
            Node::Headers(Of::RequestHeaders, rules(headers, path, "http_request_headers_match")?)
        }
        Some(Rule::HttpRequestTrailersMatch(headers)) => {
            Node::Headers(Of::RequestTrailers, rules(headers, path, "http_request_trailers_match")?)
        }
        Some(Rule::HttpResponseHeadersMatch(headers)) => {
            Node::Headers(Of::ResponseHeaders, rules(headers, path, "http_response_headers_match")?)
        }
        Some(Rule::HttpResponseTrailersMatch(headers)) => {
            Node::Headers(Of::ResponseTrailers, rules(headers, path, "http_response_trailers_match")?)
        }
        Some(Rule::HttpRequestGenericBodyMatch(body)) => Node::Body(body_rule(body, false)),
        Some(Rule::HttpResponseGenericBodyMatch(body)) => Node::Body(body_rule(body, true)),
    };
    Ok(place)
}

fn rules(headers: &HttpHeadersMatch, path: &str, field: &str) -> Result<Vec<HeaderRule>> {
    let one = |(index, header): (usize, &ProtoHeader)| {
        let status = header.name == ":status";
        let path = format!("{path}.{field}.headers[{index}]");
        let matcher = if status {
            parse::matcher::header(&ProtoHeader { name: "status".to_owned(), ..header.clone() }, &path)?
        } else {
            parse::matcher::header(header, &path)?
        };
        Ok(HeaderRule { matcher, status })
    };
    headers.headers.iter().enumerate().map(one).collect()
}

fn body_rule(rule: &HttpGenericBodyMatch, of_response: bool) -> BodyRule {
    let pattern = |rule: &Pattern| match rule {
        Pattern::StringMatch(text) => text.as_bytes().to_vec(),
        Pattern::BinaryMatch(bytes) => bytes.clone(),
    };
    let patterns: Vec<_> = rule.patterns.iter().filter_map(|item| item.rule.as_ref()).map(pattern).collect();
    let overlap = patterns.iter().map(Vec::len).max().unwrap_or(0).saturating_sub(1);
    let limit = if rule.bytes_limit == 0 { usize::MAX } else { rule.bytes_limit as usize };
    BodyRule { of_response, patterns, limit, overlap }
}

#[cfg(test)]
#[path = "matcher_tests.rs"]
mod tests;

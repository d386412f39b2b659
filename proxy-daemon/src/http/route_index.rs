//! Finds the first route of many without looking at all of them.
//!
//! Which routes a path can match at all is found by hash: those for exactly this path, and those for each of its beginnings
//! that is as long as some route's prefix. Only routes that no hash can find (expressions, paths of any case) are looked
//! at one after the other. Of all that match the lowest wins, so that the order of the configuration holds.

use std::{collections::HashMap, sync::Arc};

use crate::config::model::{PathMatch, Route};

/// Up to so many routes are just looked at in their order.
const SMALL: usize = 8;

/// An index of a virtual host's routes.
#[derive(Debug)]
pub(super) enum RouteIndex {
    /// Of so few routes that there is none.
    Scan(usize),
    /// Of many.
    Hashed(Box<Hashed>),
}

#[derive(Debug, Default)]
pub(super) struct Hashed {
    /// The routes of whole paths, in their order.
    exact: HashMap<Box<str>, Vec<u32>>,
    /// The routes of prefixes, in their order.
    prefix: HashMap<Box<str>, Vec<u32>>,
    /// The lengths of the prefixes, shortest first.
    lengths: Vec<usize>,
    /// The others, in their order.
    rest: Vec<u32>,
}

impl RouteIndex {
    pub(super) fn new(routes: &[Arc<Route>]) -> RouteIndex {
        if routes.len() <= SMALL { RouteIndex::Scan(routes.len()) } else { RouteIndex::hashed(routes) }
    }

    fn hashed(routes: &[Arc<Route>]) -> RouteIndex {
        let mut index = Hashed::default();
        // More routes than 32 bits can count do not fit into a message.
        for (number, route) in (0_u32..).zip(routes) {
            let rule = &route.route_match;
            match &rule.path {
                PathMatch::Path(text) if rule.case_sensitive => {
                    index.exact.entry(text.clone()).or_default().push(number);
                }
                PathMatch::Prefix(text) | PathMatch::PathSeparatedPrefix(text) if rule.case_sensitive => {
                    index.prefix.entry(text.clone()).or_default().push(number);
                }
                _ => index.rest.push(number),
            }
        }
        index.lengths = index.prefix.keys().map(|prefix| prefix.len()).collect();
        index.lengths.sort_unstable();
        index.lengths.dedup();
        RouteIndex::Hashed(Box::new(index))
    }

    /// The first route for which `matches`, among those that `path` can match.
    pub(super) fn find(&self, path: &str, matches: impl Fn(usize) -> bool) -> Option<usize> {
        let index = match self {
            RouteIndex::Scan(count) => return (0..*count).find(|number| matches(*number)),
            RouteIndex::Hashed(index) => index,
        };
        let mut best = u32::MAX;
        let mut look = |candidates: &[u32]| {
            let found =
                candidates.iter().take_while(|number| **number < best).find(|number| matches(**number as usize));
            best = found.copied().unwrap_or(best);
        };
        if let Some(exact) = index.exact.get(path) {
            look(exact);
        }
        for length in index.lengths.iter().take_while(|length| **length <= path.len()) {
            if let Some(prefix) = path.get(..*length).and_then(|start| index.prefix.get(start)) {
                look(prefix);
            }
        }
        look(&index.rest);
        (best != u32::MAX).then_some(best as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::model::{RouteAction, RouteMatch};

    fn route(path: PathMatch, case_sensitive: bool) -> Arc<Route> {
        let action =
            RouteAction::DirectResponse { status: http::StatusCode::OK, body: bytes::Bytes::new(), format: None };
        let (headers, per_filter) = Default::default();
        let route_match = RouteMatch { case_sensitive, ..RouteMatch::new(path) };
        Arc::new(Route {
            name: String::new(),
            route_match,
            action,
            headers,
            per_filter,
            body_buffer_limit: None,
            stat_prefix: None,
            metadata: None,
        })
    }

    fn text(random: &mut fastrand::Rng) -> String {
        (0..random.usize(..6)).fold("/".to_owned(), |text, _| text + random.choice(["a", "b", "A", "/"]).unwrap_or(""))
    }

    /// On random tables and paths the index finds what looking at every route in its order finds.
    #[test]
    fn the_index_finds_what_a_scan_finds() {
        let mut random = fastrand::Rng::with_seed(7);
        for _ in 0..2000 {
            let routes: Vec<_> = (0..random.usize(..30))
                .map(|_| {
                    let text = text(&mut random);
                    let path = match random.u8(..4) {
                        0 => PathMatch::Prefix(text.into()),
                        1 => PathMatch::Path(text.into()),
                        2 => PathMatch::PathSeparatedPrefix(text.into()),
                        _ => PathMatch::Regex(regex::Regex::new(&format!("^{text}.*$")).unwrap()),
                    };
                    route(path, random.u8(..4) > 0)
                })
                .collect();
            // Stands for everything else that a rule may ask for.
            let refused = random.u64(..);
            let index = RouteIndex::hashed(&routes);
            for _ in 0..20 {
                let path = text(&mut random);
                let matches = |number: usize| {
                    let rule = &routes[number].route_match;
                    refused >> (number % 64) & 1 == 0
                        && super::super::route_match::path_matches(&rule.path, rule.case_sensitive, &path)
                };
                assert_eq!(index.find(&path, matches), (0..routes.len()).find(|number| matches(*number)), "{path}");
            }
        }
    }

    #[test]
    fn of_thousands_of_routes_only_those_that_can_match_are_looked_at() {
        let routes: Vec<_> = (0..5000)
            .map(|number| match number % 2 {
                0 => route(PathMatch::Path(format!("/exact/{number}").into()), true),
                _ => route(PathMatch::Prefix(format!("/prefix/{number}/").into()), true),
            })
            .collect();
        let index = RouteIndex::new(&routes);
        let looks = std::cell::Cell::new(0);
        let matches = |number: usize| {
            looks.set(looks.get() + 1);
            let rule = &routes[number].route_match;
            super::super::route_match::path_matches(&rule.path, true, "/prefix/4999/x")
        };
        assert_eq!(index.find("/prefix/4999/x", matches), Some(4999));
        assert_eq!(looks.get(), 1);
    }
}

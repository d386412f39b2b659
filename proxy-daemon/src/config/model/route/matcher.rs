use std::{borrow::Cow, ops::Range};

use http::request::Parts;

use super::MatchedHeader;
use crate::{
    config::model::{MatchInput, MatchTree},
    http::value_of,
};

/// `VirtualHost.matcher`: finds the routes that are looked at.
#[derive(Debug)]
pub struct RouteMatcher {
    /// Finds the number of a list.
    pub tree: MatchTree<RouteInput, usize>,
    /// Which of the virtual host's routes are in each list: `Route`, or `RouteList`.
    pub lists: Vec<Range<usize>>,
}

/// `HttpRequestHeaderMatchInput`: the only input that Envoy takes here, besides the state of filters.
#[derive(Debug)]
pub struct RouteInput(pub MatchedHeader);

impl MatchInput for RouteInput {
    type Of<'a> = Parts;

    fn value<'a>(&'a self, request: &'a Parts) -> Option<Cow<'a, str>> {
        value_of(&self.0, request)
    }
}

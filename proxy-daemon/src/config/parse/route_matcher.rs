//! `VirtualHost.matcher`

use std::sync::Arc;

use culvert_xds_client::json::unpack;
use envoy_types::pb::{
    envoy::{
        config::route::v3::{Route as ProtoRoute, RouteList},
        r#type::matcher::v3::HttpRequestHeaderMatchInput,
    },
    google::protobuf::Any,
    xds::r#type::matcher::v3::Matcher,
};
use prost::Name as _;

use super::{
    common::{Result, type_name},
    match_tree::{MatchParts, match_tree},
    matcher::{request_header_input, unknown_action},
    route::{all_routes, route},
    support::join,
};
use crate::config::model::{Route, RouteInput, RouteMatcher};

/// The routes of all lists, one list after the other, and what finds a list.
struct Lists {
    max_body: u32,
    routes: Vec<Arc<Route>>,
    lists: Vec<std::ops::Range<usize>>,
}

/// Reads a matcher; direct responses have at most `max_body` bytes.
pub(super) fn route_matcher(matcher: &Matcher, max_body: u32, path: &str) -> Result<(RouteMatcher, Vec<Arc<Route>>)> {
    let mut lists = Lists { max_body, routes: Vec::new(), lists: Vec::new() };
    let tree = match_tree(matcher, path, &mut lists)?;
    Ok((RouteMatcher { tree, lists: lists.lists }, lists.routes))
}

impl MatchParts for Lists {
    type Input = RouteInput;
    /// The number of a list.
    type Action = usize;

    fn input(&mut self, config: &Any, path: &str) -> Result<Option<RouteInput>> {
        if type_name(config) != HttpRequestHeaderMatchInput::full_name() {
            return Ok(None);
        }
        Ok(Some(RouteInput(request_header_input(config, path)?)))
    }

    fn action(&mut self, config: &Any, path: &str) -> Result<usize> {
        let wanted = type_name(config);
        let begin = self.routes.len();
        if wanted == ProtoRoute::full_name() {
            let item: ProtoRoute = unpack(config, path)?;
            self.routes.push(Arc::new(route(&item, self.max_body, path)?));
        } else if wanted == RouteList::full_name() {
            let list: RouteList = unpack(config, path)?;
            self.routes.extend(all_routes(&list.routes, self.max_body, &join(path, "routes"))?);
        } else {
            return Err(unknown_action(config, path));
        }
        self.lists.push(begin..self.routes.len());
        Ok(self.lists.len() - 1)
    }
}

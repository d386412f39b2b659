use std::collections::HashSet;

use http::{HeaderName, StatusCode};

/// `InternalRedirectPolicy`: which of an upstream's redirects are followed here.
#[derive(Debug)]
pub struct InternalRedirectPolicy {
    /// How often one request is redirected, by whichever routes. Default 1.
    pub max_internal_redirects: u32,
    /// The statuses that are followed. Default 302.
    pub response_codes: Vec<StatusCode>,
    /// All must accept the route that the redirect leads to; asked in their order.
    pub predicates: Vec<InternalRedirectPredicate>,
    /// From http to https and the other way round.
    pub allow_cross_scheme_redirect: bool,
    /// Headers of the response that the redirected request has: those that the response lacks are taken out of it.
    pub response_headers_to_copy: Vec<HeaderName>,
}

/// One of `InternalRedirectPolicy.predicates`.
#[derive(Debug)]
pub enum InternalRedirectPredicate {
    /// `previous_routes`: no request is sent to the same route twice by redirects of this route.
    PreviousRoutes,
    /// `allow_listed_routes`: only routes of these names.
    AllowListedRoutes(HashSet<Box<str>>),
    /// `safe_cross_scheme`: never from http to https.
    SafeCrossScheme,
}

//! `rate_limits` of routes, virtual hosts and filters: what requests are counted under.

use super::{Cidr, HeaderMatcher, MatchedHeader, QueryParameterMatcher};
use crate::{access_log::HeaderFormat, layered_runtime::RuntimeFraction};

/// `RateLimit`: makes a descriptor of a request, out of what its actions say, or none where one of them has nothing to say.
#[derive(Debug)]
pub struct RateLimit {
    /// Filters of this stage take it.
    pub stage: u32,
    /// `disable_key`: the share of requests that get it.
    pub enabled: Option<RuntimeFraction>,
    /// Each makes an entry.
    pub actions: Box<[RateLimitAction]>,
    /// `limit`: the limit itself, in the place of the service's.
    pub limit: Option<LimitOverride>,
    /// `hits_addend`: what the request counts for.
    pub hits: Option<Hits>,
    /// `apply_on_stream_done`: it counts when the request is over.
    pub on_done: bool,
    /// `x_ratelimit_option`: whether responses tell of it; `None`: as the filter says.
    pub is_told: Option<bool>,
}

/// `RateLimit.HitsAddend`.
#[derive(Debug)]
pub struct Hits {
    /// How much.
    pub amount: HitsAmount,
    /// `is_negative_hits`: it is given back.
    pub negative: bool,
}

/// How much a request counts for.
#[derive(Debug)]
pub enum HitsAmount {
    /// `number`
    Fixed(u64),
    /// `format`: what this makes of the request, where it is a number.
    Format(HeaderFormat),
}

/// `RateLimit.Override`.
#[derive(Debug)]
pub enum LimitOverride {
    /// `rate_limit`: requests, and the number of the unit.
    Fixed(u32, i32),
    /// `dynamic_metadata`: what filters have told there, where it is a limit.
    Metadata {
        /// Where it is.
        namespace: Box<str>,
        /// Below the namespace.
        path: Box<[Box<str>]>,
    },
}

/// `RateLimit.Action`.
#[derive(Debug)]
pub enum RateLimitAction {
    /// `source_cluster`: the node's own.
    SourceCluster,
    /// `destination_cluster`: the route's.
    DestinationCluster,
    /// `request_headers`
    RequestHeaders {
        /// The header.
        header: MatchedHeader,
        /// The entry's.
        key: Box<str>,
        /// Without the header there is a descriptor without the entry.
        skip_if_absent: bool,
    },
    /// `query_parameters`
    QueryParameters {
        /// The parameter.
        name: Box<str>,
        /// The entry's.
        key: Box<str>,
        /// Without the parameter there is a descriptor without the entry.
        skip_if_absent: bool,
    },
    /// `remote_address`
    RemoteAddress,
    /// `masked_remote_address`
    MaskedRemoteAddress {
        /// Bits of IPv4 addresses.
        v4: u8,
        /// Bits of IPv6 addresses.
        v6: u8,
    },
    /// `generic_key`
    GenericKey {
        /// The entry's.
        key: Box<str>,
        /// The entry's.
        value: Box<str>,
    },
    /// `header_value_match`
    HeaderValueMatch {
        /// The entry's.
        key: Box<str>,
        /// The entry's.
        value: Box<str>,
        /// Whether all are to match, or not all.
        expect_match: bool,
        /// What is matched.
        headers: Box<[HeaderMatcher]>,
    },
    /// `query_parameter_value_match`
    QueryParameterValueMatch {
        /// The entry's.
        key: Box<str>,
        /// The entry's.
        value: Box<str>,
        /// Whether all are to match, or not all.
        expect_match: bool,
        /// What is matched.
        parameters: Box<[QueryParameterMatcher]>,
    },
    /// `remote_address_match`
    RemoteAddressMatch {
        /// The entry's.
        key: Box<str>,
        /// The entry's.
        value: Box<str>,
        /// Where the client's address is to be.
        ranges: Box<[Cidr]>,
        /// Where it is not to be.
        inverted: bool,
    },
    /// `metadata`, which filters have told, or the route's configuration.
    Metadata {
        /// The route's configuration.
        of_route: bool,
        /// The entry's.
        key: Box<str>,
        /// Where it is.
        namespace: Box<str>,
        /// Below the namespace.
        path: Box<[Box<str>]>,
        /// Where there is nothing; may be empty.
        default: Box<str>,
        /// Without a value there is a descriptor without the entry.
        skip_if_absent: bool,
    },
}

/// Which rate limits of the virtual host count beside the route's.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum VirtualHostRateLimits {
    /// Where the route has none.
    #[default]
    Override,
    /// Always.
    Include,
    /// Never.
    Ignore,
}

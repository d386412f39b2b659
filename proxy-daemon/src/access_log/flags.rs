use std::ops::{BitOr, BitOrAssign};

/// Flags whose order is remembered: more than a stream ever has.
const ORDERED: usize = 8;

/// `%RESPONSE_FLAGS%`: why a response or connection was not an ordinary one. A set, which is printed in the order in which
/// its flags were set, as in Envoy; the constants have Envoy's short names.
#[derive(Debug, Clone, Copy, Default)]
pub struct ResponseFlags {
    bits: u32,
    /// The bits' numbers in the order in which they were set.
    order: [u8; ORDERED],
}

macro_rules! flags {
    ($($bit:literal $name:ident $doc:literal,)*) => {
        impl ResponseFlags {
            $(#[doc = $doc] pub const $name: ResponseFlags = ResponseFlags::only($bit);)*
        }
        /// By the bit's number.
        const NAMES: &[&str] = &[$(stringify!($name),)*];
    };
}

// In Envoy's order.
flags! {
    0 LH "The local service failed its health check.",
    1 UH "No healthy upstream host in the cluster.",
    2 UT "Upstream request timeout (504).",
    3 LR "The connection was reset locally.",
    4 UR "The upstream reset the stream.",
    5 UF "Upstream connection failure.",
    6 UC "The upstream closed the connection.",
    7 UO "Upstream overflow: a circuit breaker is open.",
    8 NR "No route, or for a connection no filter chain.",
    9 DI "A fault filter delayed the request.",
    10 FI "A fault filter aborted the request.",
    11 RL "Rate limited locally or by the rate limit service (429).",
    12 UAEX "Denied by the external authorisation service.",
    13 RLSE "Rejected because the rate limit service failed.",
    14 DC "The downstream closed the connection.",
    15 URX "The retry limit, or the maximum of connect attempts, was reached.",
    16 SI "Stream idle timeout.",
    17 IH "A strictly checked header had an invalid value.",
    18 DPE "The downstream request had a protocol error.",
    19 UMSDR "The upstream request reached its longest duration.",
    20 RFCF "The response came from a cache.",
    21 NFCF "A filter's configuration had not arrived in time.",
    22 DT "A connection or request reached its longest duration.",
    23 UPE "The upstream response had a protocol error.",
    24 NC "The upstream cluster does not exist.",
    25 OM "The overload manager ended the request.",
    26 DF "DNS resolution failed.",
    27 DO "Dropped by the cluster's drop_overload.",
    28 DR "The downstream reset the stream.",
    29 UDO "Dropped unconditionally by drop_overload.",
}

/// By the bit's number: `%RESPONSE_FLAGS_LONG%`.
const LONG_NAMES: [&str; 30] = [
    "FailedLocalHealthCheck",
    "NoHealthyUpstream",
    "UpstreamRequestTimeout",
    "LocalReset",
    "UpstreamRemoteReset",
    "UpstreamConnectionFailure",
    "UpstreamConnectionTermination",
    "UpstreamOverflow",
    "NoRouteFound",
    "DelayInjected",
    "FaultInjected",
    "RateLimited",
    "UnauthorizedExternalService",
    "RateLimitServiceError",
    "DownstreamConnectionTermination",
    "UpstreamRetryLimitExceeded",
    "StreamIdleTimeout",
    "InvalidEnvoyRequestHeaders",
    "DownstreamProtocolError",
    "UpstreamMaxStreamDurationReached",
    "ResponseFromCacheFilter",
    "NoFilterConfigFound",
    "DurationTimeout",
    "UpstreamProtocolError",
    "NoClusterFound",
    "OverloadManagerTerminated",
    "DnsResolutionFailed",
    "DropOverload",
    "DownstreamRemoteReset",
    "UnconditionalDropOverload",
];

impl ResponseFlags {
    const fn only(bit: u8) -> ResponseFlags {
        let mut order = [0; ORDERED];
        order[0] = bit;
        ResponseFlags { bits: 1 << bit, order }
    }

    /// Whether no flag is set.
    pub fn is_empty(self) -> bool {
        self.bits == 0
    }

    /// Whether every flag of `other` is set.
    pub fn contains(self, other: ResponseFlags) -> bool {
        self.bits & other.bits == other.bits
    }

    /// Whether any flag of `other` is set.
    pub fn intersects(self, other: ResponseFlags) -> bool {
        self.bits & other.bits != 0
    }

    /// The flag of a short name.
    pub fn from_name(name: &str) -> Option<ResponseFlags> {
        let bit = NAMES.iter().position(|known| *known == name)?;
        Some(ResponseFlags::only(u8::try_from(bit).ok()?))
    }

    /// The short names of the set flags.
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        self.numbers().filter_map(|bit| NAMES.get(usize::from(bit)).copied())
    }

    /// The long names of the set flags.
    pub fn long_names(self) -> impl Iterator<Item = &'static str> {
        self.numbers().filter_map(|bit| LONG_NAMES.get(usize::from(bit)).copied())
    }

    /// The numbers of the bits that are set, in the order in which they were.
    fn numbers(self) -> impl Iterator<Item = u8> {
        self.order.into_iter().take(self.bits.count_ones() as usize)
    }
}

impl PartialEq for ResponseFlags {
    fn eq(&self, other: &ResponseFlags) -> bool {
        self.bits == other.bits
    }
}

impl Eq for ResponseFlags {}

impl BitOr for ResponseFlags {
    type Output = ResponseFlags;

    fn bitor(mut self, other: ResponseFlags) -> ResponseFlags {
        self |= other;
        self
    }
}

impl BitOrAssign for ResponseFlags {
    fn bitor_assign(&mut self, other: ResponseFlags) {
        for bit in other.numbers().filter(|bit| other.bits >> bit & 1 != 0) {
            if self.bits >> bit & 1 == 0 {
                if let Some(place) = self.order.get_mut(self.bits.count_ones() as usize) {
                    *place = bit;
                }
                self.bits |= 1 << bit;
            }
        }
    }
}

use std::ops::{BitOr, BitOrAssign};

/// `%RESPONSE_FLAGS%`: why a response or connection was not an ordinary one. A set; the constants have Envoy's short names.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct ResponseFlags(u32);

macro_rules! flags {
    ($($bit:literal $name:ident $doc:literal,)*) => {
        impl ResponseFlags {
            $(#[doc = $doc] pub const $name: ResponseFlags = ResponseFlags(1 << $bit);)*
        }
        const NAMES: &[(ResponseFlags, &str)] = &[$((ResponseFlags::$name, stringify!($name)),)*];
    };
}

// In Envoy's order, in which they are printed.
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

impl ResponseFlags {
    /// Whether no flag is set.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether every flag of `other` is set.
    pub fn contains(self, other: ResponseFlags) -> bool {
        self.0 & other.0 == other.0
    }

    /// Whether any flag of `other` is set.
    pub fn intersects(self, other: ResponseFlags) -> bool {
        self.0 & other.0 != 0
    }

    /// The flag of a short name.
    pub fn from_name(name: &str) -> Option<ResponseFlags> {
        NAMES.iter().find(|(_, known)| *known == name).map(|(flag, _)| *flag)
    }

    /// The short names of the set flags.
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        NAMES.iter().filter(move |(flag, _)| self.contains(*flag)).map(|(_, name)| *name)
    }
}

impl BitOr for ResponseFlags {
    type Output = ResponseFlags;

    fn bitor(self, other: ResponseFlags) -> ResponseFlags {
        ResponseFlags(self.0 | other.0)
    }
}

impl BitOrAssign for ResponseFlags {
    fn bitor_assign(&mut self, other: ResponseFlags) {
        self.0 |= other.0;
    }
}

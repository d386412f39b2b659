//! HTTP's statuses and gRPC's, as Envoy maps them onto each other.

/// The `grpc-status` that an HTTP status stands for, where an answer tells none
/// ([http-grpc-status-mapping](https://github.com/grpc/grpc/blob/master/doc/http-grpc-status-mapping.md)).
pub(crate) const fn of_http(status: u16) -> u16 {
    match status {
        400 => 13,
        401 => 16,
        403 => 7,
        404 => 12,
        429 | 502..=504 => 14,
        _ => 2,
    }
}

/// The HTTP status that a `grpc-status` stands for.
pub(crate) const fn to_http(status: Option<u32>) -> u16 {
    match status {
        Some(0) => 200,
        Some(1) => 499,
        Some(3 | 9 | 11) => 400,
        Some(4) => 504,
        Some(5) => 404,
        Some(6 | 10) => 409,
        Some(7) => 403,
        Some(8) => 429,
        Some(12) => 501,
        Some(14) => 503,
        Some(16) => 401,
        // Unknown, Internal, DataLoss, and what is no status.
        _ => 500,
    }
}

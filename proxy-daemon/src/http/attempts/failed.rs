//! How an attempt fails, and what that is told as.

use http::StatusCode;

use crate::{
    access_log::ResponseFlags,
    http::{body::Body, retry::Failure, stream::RequestHead},
    upstream::{ConnectError, PoolError, Reset, ResetReason},
};

/// How one attempt failed.
pub(in crate::http) struct Failed {
    pub(in crate::http) failure: Failure,
    /// As Envoy words it.
    pub(super) reason: &'static str,
    /// What the transport said of it, where that is known.
    pub(super) transport: Option<Box<str>>,
    pub(in crate::http) status: StatusCode,
    pub(super) flags: ResponseFlags,
    /// The request, where it can be sent again.
    pub(super) request: Option<Box<(RequestHead, Body)>>,
    /// A pooled connection had died unnoticed and nothing was sent: the next attempt is free.
    pub(in crate::http) stale: bool,
    /// The host has gone away, and says that it has not looked at the request.
    pub(in crate::http) gone_away: bool,
}

impl Failed {
    /// There was nobody at the address, or nobody who took connections.
    pub(super) fn is_unconnected(&self) -> bool {
        self.failure == Failure::Connect && self.flags == ResponseFlags::UF
    }
}

/// The request is answered in another way than this.
pub(super) fn unsendable() -> Failed {
    let (status, flags) = (StatusCode::SERVICE_UNAVAILABLE, ResponseFlags::DPE);
    let (failure, reason) = (Failure::BeforeRequest, "local reset");
    Failed { failure, reason, transport: None, status, flags, request: None, stale: false, gone_away: false }
}

pub(super) fn connect_failed(error: PoolError, head: RequestHead, body: Body) -> Failed {
    let transport = match &error {
        PoolError::Connect(error) => error.transport_failure().map(Into::into),
        PoolError::Handshake(_) | PoolError::Overflow | PoolError::TooManyRequests | PoolError::NoPool => None,
    };
    let (reason, status, flags): (&'static str, _, _) = match error {
        PoolError::NoPool => ("no connection pool", StatusCode::SERVICE_UNAVAILABLE, ResponseFlags::UH),
        PoolError::Overflow | PoolError::TooManyRequests => {
            ("overflow", StatusCode::SERVICE_UNAVAILABLE, ResponseFlags::UO)
        }
        PoolError::Connect(error) if matches!(*error, ConnectError::Timeout) => {
            ("connection timeout", StatusCode::SERVICE_UNAVAILABLE, ResponseFlags::UF)
        }
        PoolError::Connect(error) if error.is_local() => {
            ("local connection failure", StatusCode::SERVICE_UNAVAILABLE, ResponseFlags::UF)
        }
        PoolError::Connect(_) => ("remote connection failure", StatusCode::SERVICE_UNAVAILABLE, ResponseFlags::UF),
        PoolError::Handshake(_) => ("connection termination", StatusCode::SERVICE_UNAVAILABLE, ResponseFlags::UC),
    };
    let request = Some(Box::new((head, body)));
    let failure = match reason {
        "overflow" => Failure::Overflow,
        "no connection pool" => Failure::NoPool,
        _ => Failure::Connect,
    };
    Failed { failure, reason, transport, status, flags, request, stale: false, gone_away: false }
}

pub(super) fn reset(Reset { request, reason: cause }: Reset, reused: bool) -> Failed {
    let unsent = request.is_some();
    let failure = Failure::of_reset(unsent, cause);
    let (reason, status, flags) = match cause {
        ResetReason::Protocol => ("protocol error", StatusCode::BAD_GATEWAY, ResponseFlags::UPE),
        ResetReason::Refused | ResetReason::GoneAway => {
            ("remote refused stream reset", StatusCode::SERVICE_UNAVAILABLE, ResponseFlags::UR)
        }
        ResetReason::Remote => ("remote reset", StatusCode::SERVICE_UNAVAILABLE, ResponseFlags::UR),
        ResetReason::Closed => ("connection termination", StatusCode::SERVICE_UNAVAILABLE, ResponseFlags::UC),
    };
    let request = request.map(|request| Box::new(request.into_parts()));
    let gone_away = cause == ResetReason::GoneAway;
    Failed { failure, reason, transport: None, status, flags, request, stale: unsent && reused, gone_away }
}

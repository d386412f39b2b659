//! Why something is not done that a request asks for, and what is counted.

use culvert_xds_client::{api::culvert::overrides::v1::Action, overrides::ContextError};

use crate::stats::{Counter, Lease, Scope};

/// Why something is not done. docs/overrides.md has the list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    // Of a whole message.
    Production,
    Stripped,
    Undecodable,
    TooLarge,
    TooMany,
    Contradiction,
    Source,
    NotSigned,
    UnknownKey,
    BadSignature,
    Expired,
    LastsTooLong,
    ShareUnknown,
    ShareExpired,
    // Of one override, or of a part of it.
    NotOptedIn,
    ServiceSource,
    ActionNotAllowed,
    ActionNotOptedIn,
    OverLimit,
    Unlisted,
    TunnelGone,
    DebugBusy,
}

impl Refusal {
    pub(super) const ALL: [Refusal; 22] = [
        Refusal::Production,
        Refusal::Stripped,
        Refusal::Undecodable,
        Refusal::TooLarge,
        Refusal::TooMany,
        Refusal::Contradiction,
        Refusal::Source,
        Refusal::NotSigned,
        Refusal::UnknownKey,
        Refusal::BadSignature,
        Refusal::Expired,
        Refusal::LastsTooLong,
        Refusal::ShareUnknown,
        Refusal::ShareExpired,
        Refusal::NotOptedIn,
        Refusal::ServiceSource,
        Refusal::ActionNotAllowed,
        Refusal::ActionNotOptedIn,
        Refusal::OverLimit,
        Refusal::Unlisted,
        Refusal::TunnelGone,
        Refusal::DebugBusy,
    ];

    /// Its name in stats and in the response header.
    pub(super) fn name(self) -> &'static str {
        match self {
            Refusal::Production => "production",
            Refusal::Stripped => "stripped",
            Refusal::Undecodable => "undecodable",
            Refusal::TooLarge => "too_large",
            Refusal::TooMany => "too_many",
            Refusal::Contradiction => "contradiction",
            Refusal::Source => "source",
            Refusal::NotSigned => "not_signed",
            Refusal::UnknownKey => "unknown_key",
            Refusal::BadSignature => "bad_signature",
            Refusal::Expired => "expired",
            Refusal::LastsTooLong => "lasts_too_long",
            Refusal::ShareUnknown => "share_unknown",
            Refusal::ShareExpired => "share_expired",
            Refusal::NotOptedIn => "not_opted_in",
            Refusal::ServiceSource => "service_source",
            Refusal::ActionNotAllowed => "action_not_allowed",
            Refusal::ActionNotOptedIn => "action_not_opted_in",
            Refusal::OverLimit => "over_limit",
            Refusal::Unlisted => "unlisted",
            Refusal::TunnelGone => "tunnel_gone",
            Refusal::DebugBusy => "debug_busy",
        }
    }
}

impl From<&ContextError> for Refusal {
    fn from(error: &ContextError) -> Refusal {
        match error {
            ContextError::TooLong { .. } | ContextError::TooManyMembers => Refusal::TooLarge,
            ContextError::TooManyOverrides(_) => Refusal::TooMany,
            ContextError::Contradicts { .. } => Refusal::Contradiction,
            _ => Refusal::Undecodable,
        }
    }
}

/// What is counted.
#[derive(Debug)]
pub(super) struct Stats {
    /// Requests that were sent to an offloaded endpoint.
    pub(super) applied: Counter,
    /// Requests of which something was refused that could be read.
    pub(super) rejected: Counter,
    /// Requests whose headers could not be read.
    pub(super) undecodable: Counter,
    /// Requests that carried `x-envoy-original-dst-host`, which was removed.
    pub(super) header_removed: Counter,
    /// The same of `x-culvert-config`.
    pub(super) config_removed: Counter,
    actions: [Counter; Action::ALL.len()],
    refused: [Counter; Refusal::ALL.len()],
    _lease: Lease,
}

impl Stats {
    pub(super) fn new(stat_prefix: &str) -> Stats {
        let scope = Scope::http(stat_prefix);
        let lease = scope.lease();
        let counter = |name: &str| scope.counter(&format!("override.{name}"));
        Stats {
            applied: counter("applied"),
            rejected: counter("rejected"),
            undecodable: counter("undecodable"),
            header_removed: counter("header_removed"),
            config_removed: counter("config_removed"),
            actions: Action::ALL.map(|action| counter(&format!("action.{}", action.name()))),
            refused: Refusal::ALL.map(|refusal| counter(&format!("refused.{}", refusal.name()))),
            _lease: lease,
        }
    }

    /// Something was done.
    pub(super) fn done(&self, action: Action) {
        // Actions are numbered from 1.
        if let Some(counter) = (action as usize).checked_sub(1).and_then(|at| self.actions.get(at)) {
            counter.inc();
        }
        if action == Action::Route {
            self.applied.inc();
        }
    }

    /// Something was not done.
    pub(super) fn refused(&self, refusal: Refusal) {
        self.refused[refusal as usize].inc();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_found_by_number() {
        for (index, refusal) in Refusal::ALL.into_iter().enumerate() {
            assert_eq!(refusal as usize, index, "{refusal:?}");
        }
        for (index, action) in Action::ALL.into_iter().enumerate() {
            assert_eq!(action as usize, index + 1, "{action:?}");
        }
    }
}

//! `strict_check_headers`: requests whose `x-envoy-*` headers say nothing that the router understands are refused. They would go on without what
//! they ask for otherwise.

use http::{HeaderMap, HeaderName, StatusCode};

use super::{headers::names::*, stream::LocalReply};
use crate::{access_log::ResponseFlags, config::model::RetryOn};

/// The headers that can be checked, in the order in which Envoy names them.
static CHECKED: [HeaderName; 5] = [
    X_ENVOY_UPSTREAM_RQ_TIMEOUT_MS,
    X_ENVOY_UPSTREAM_RQ_PER_TRY_TIMEOUT_MS,
    X_ENVOY_MAX_RETRIES,
    X_ENVOY_RETRY_GRPC_ON,
    X_ENVOY_RETRY_ON,
];

/// A header that is checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StrictCheck(HeaderName);

impl StrictCheck {
    /// The check of the header of this name.
    ///
    /// # Errors
    /// What is wrong, in Envoy's words.
    pub(crate) fn of(name: &str) -> Result<StrictCheck, String> {
        let known = CHECKED.iter().find(|known| known.as_str() == name);
        known.cloned().map(StrictCheck).ok_or_else(|| {
            let names: Vec<_> = CHECKED.iter().map(HeaderName::as_str).collect();
            format!("value must be in list [{}]", names.join(" "))
        })
    }

    fn allows(&self, value: &str) -> bool {
        if self.0 == X_ENVOY_RETRY_ON || self.0 == X_ENVOY_RETRY_GRPC_ON {
            return RetryOn::is_valid(value, self.0 == X_ENVOY_RETRY_GRPC_ON);
        }
        value.trim().parse::<u64>().is_ok()
    }
}

/// The answer to a request that one of the checks refuses.
pub(super) fn refusal(checks: &[StrictCheck], headers: &HeaderMap) -> Option<LocalReply> {
    checks.iter().find_map(|check| {
        let StrictCheck(name) = check;
        let value = String::from_utf8_lossy(headers.get(name)?.as_bytes());
        if check.allows(&value) {
            return None;
        }
        let text = format!("invalid header '{name}' with value '{value}'");
        let details = format!("request_headers_failed_strict_check{{{name}}}");
        Some(LocalReply::new(StatusCode::BAD_REQUEST, text, ResponseFlags::IH, details))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_checked_by_what_they_say() {
        let allows = |name: &str, value: &str| StrictCheck::of(name).unwrap().allows(value);
        for (name, good, bad) in [
            ("x-envoy-max-retries", "2", "2.0"),
            ("x-envoy-upstream-rq-timeout-ms", " 100 ", "-1"),
            ("x-envoy-upstream-rq-per-try-timeout-ms", "18446744073709551615", ""),
            ("x-envoy-retry-on", "5xx , reset,", "5xx,cancelled"),
            ("x-envoy-retry-grpc-on", "cancelled, internal", "5xx"),
        ] {
            assert!(allows(name, good) && !allows(name, bad), "{name}");
        }
        assert!(
            StrictCheck::of("x-envoy-force-trace").unwrap_err().ends_with("x-envoy-retry-grpc-on x-envoy-retry-on]")
        );
    }
}

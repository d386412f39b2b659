//! Changes of headers that a processor asks for, and which of them it may.

use envoy_types::pb::envoy::{
    config::{common::mutation_rules::v3::HeaderMutationRules, core::v3::HeaderValueOption},
    service::ext_proc::v3::HeaderMutation,
};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header::CONTENT_LENGTH, uri::Authority};
use regex::Regex;

use crate::{
    config::{FieldError, parse},
    http::{
        changes::{Action, Change, Place, place},
        stream::{RequestHead, ResponseHead},
    },
    stats::Counter,
};

/// `HeaderMutationRules`
#[derive(Debug)]
pub(in crate::http::filters) struct Rules {
    all_routing: bool,
    envoy: bool,
    no_system: bool,
    none: bool,
    allowed: Option<Regex>,
    disallowed: Option<Regex>,
    is_error: bool,
}

/// The most headers that a message has after it was changed, and the most that one change names.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// How many.
    pub(super) count: usize,
    /// How many bytes, of names and values.
    pub(super) bytes: usize,
}

/// Why a change is refused: what `%RESPONSE_CODE_DETAILS%` says.
pub(super) type Refused = &'static str;

/// What is changed.
pub(super) enum Target<'a> {
    Request(&'a mut RequestHead),
    Response(&'a mut ResponseHead),
    /// Trailers, or an answer's headers.
    Fields(&'a mut HeaderMap),
}

impl Target<'_> {
    pub(super) fn headers(&mut self) -> &mut HeaderMap {
        match self {
            Target::Request(head) => &mut head.headers,
            Target::Response(head) => &mut head.headers,
            Target::Fields(headers) => headers,
        }
    }

    fn change(&mut self, change: &Change) {
        match self {
            Target::Request(head) => change.apply_to_request(head),
            Target::Response(head) => match (&change.place, change.action) {
                (Place::Status, Action::Set | Action::Overwrite) => {
                    let status = change.value.to_str().ok().and_then(|text| text.parse().ok());
                    head.status = status.unwrap_or(head.status);
                }
                _ => change.apply_to_fields(&mut head.headers),
            },
            Target::Fields(headers) => change.apply_to_fields(headers),
        }
    }
}

impl Rules {
    /// # Errors
    /// An expression that is none, below `path`.
    pub(in crate::http::filters) fn parse(
        rules: Option<&HeaderMutationRules>,
        path: &str,
    ) -> Result<Rules, FieldError> {
        let rules = rules.cloned().unwrap_or_default();
        let set = |value: Option<envoy_types::pb::google::protobuf::BoolValue>| value.is_some_and(|value| value.value);
        let regex = |matcher: &Option<_>, field: &str| {
            matcher.as_ref().map(|matcher| parse::matcher::regex(matcher, &format!("{path}.{field}"))).transpose()
        };
        Ok(Rules {
            all_routing: set(rules.allow_all_routing),
            envoy: set(rules.allow_envoy),
            no_system: set(rules.disallow_system),
            none: set(rules.disallow_all),
            allowed: regex(&rules.allow_expression, "allow_expression")?,
            disallowed: regex(&rules.disallow_expression, "disallow_expression")?,
            is_error: set(rules.disallow_is_error),
        })
    }

    /// Whether what is not allowed refuses all else with it.
    pub(in crate::http::filters) fn is_error(&self) -> bool {
        self.is_error
    }

    /// Whether a header of this name, in lower case, may be set, or removed.
    pub(in crate::http::filters) fn allows(&self, name: &str, removes: bool) -> bool {
        let system = name.starts_with(':');
        if removes && (system || name == "host") {
            return false;
        }
        if self.disallowed.as_ref().is_some_and(|regex| regex.is_match(name)) {
            return false;
        }
        if self.allowed.as_ref().is_some_and(|regex| regex.is_match(name)) {
            return true;
        }
        if self.none || self.no_system && system || !self.envoy && name.starts_with("x-envoy") {
            return false;
        }
        self.all_routing || !matches!(name, "host" | ":authority" | ":method" | ":scheme")
    }

    /// Carries out a change as far as it may be. `replaces`: the whole message is replaced. `keeps_length`: `content-length` can be set.
    ///
    /// # Errors
    /// It is refused as a whole.
    pub(super) fn apply(
        &self,
        mutation: &HeaderMutation,
        target: &mut Target<'_>,
        replaces: bool,
        keeps_length: bool,
        limits: Limits,
        rejected: Counter,
    ) -> Result<(), Refused> {
        let refuse = |text: &'static str| {
            rejected.inc();
            Err(text)
        };
        let (set, remove) = (&mutation.set_headers, &mutation.remove_headers);
        if set.len() > limits.count || remove.len() > limits.count {
            return refuse("header_mutation_operation_count_exceeds_limit");
        }
        for name in remove {
            let name = name.to_ascii_lowercase();
            if !is_name(&name) {
                return refuse("header_mutation_remove_contains_invalid_character");
            }
            if !self.allows(&name, true) {
                if self.is_error {
                    return refuse("header_mutation_remove_headers_failed");
                }
                rejected.inc();
            } else if let Some(Place::Header(name)) = place(&name) {
                target.headers().remove(name);
            }
        }
        for option in set {
            let Some(header) = &option.header else { continue };
            let name = header.key.to_ascii_lowercase();
            if !keeps_length && name == CONTENT_LENGTH.as_str() {
                continue;
            }
            // As in Envoy, the text beside it stays without effect.
            let Ok(value) = HeaderValue::from_bytes(&header.raw_value) else {
                return refuse("header_mutation_set_contains_invalid_character");
            };
            if !is_name(&name) {
                return refuse("header_mutation_set_contains_invalid_character");
            }
            let allowed = self.allows(&name, false) && is_value(&name, &value) || replaces && name == ":method";
            if allowed {
                // The scheme is that of the client's connection, and there is no other pseudo-header.
                if let Some(place) = place(&name) {
                    target.change(&Change { place, value, action: action(option) });
                }
            } else if self.is_error {
                return refuse("header_mutation_set_headers_failed");
            } else {
                rejected.inc();
            }
        }
        let headers = target.headers();
        let bytes: usize = headers.iter().map(|(name, value)| name.as_str().len() + value.len()).sum();
        if headers.len() > limits.count || bytes > limits.bytes {
            return refuse("header_mutation_result_exceeds_limit");
        }
        Ok(())
    }
}

fn is_name(name: &str) -> bool {
    let rest = name.strip_prefix(':').unwrap_or(name);
    HeaderName::try_from(rest).is_ok()
}

/// Whether a pseudo-header, or the host, can have such a value.
pub(in crate::http::filters) fn is_value(name: &str, value: &HeaderValue) -> bool {
    match name {
        ":authority" | "host" => Authority::try_from(value.as_bytes()).is_ok(),
        ":scheme" => matches!(value.as_bytes(), b"http" | b"https"),
        ":method" => Method::from_bytes(value.as_bytes()).is_ok(),
        ":status" => {
            value.to_str().ok().and_then(|text| text.parse::<StatusCode>().ok()).is_some_and(|it| it.as_u16() >= 200)
        }
        _ => true,
    }
}

/// What an option asks for. As in Envoy, `append_action` stays without effect.
fn action(option: &HeaderValueOption) -> Action {
    #[expect(deprecated, reason = "the one that Envoy looks at")]
    let appends = option.append.is_some_and(|append| append.value);
    if appends { Action::Add } else { Action::Set }
}

//! `hash_policy`

use envoy_types::pb::envoy::config::route::v3::route_action::{
    HashPolicy as ProtoPolicy,
    hash_policy::{Cookie, PolicySpecifier},
};

use super::{
    common::{Result, duration, required},
    matcher::{matched_header, regex_rewrite},
    support::join,
};
use crate::config::{
    FieldError,
    model::{HashCookie, HashPolicy, HashSource},
};

/// What requests of a route are hashed by, in its order.
pub(super) fn hash_policies(policies: &[ProtoPolicy], path: &str) -> Result<Box<[HashPolicy]>> {
    let mut parsed = Vec::with_capacity(policies.len());
    for (index, policy) in policies.iter().enumerate() {
        let path = format!("{}[{index}]", join(path, "hash_policy"));
        let source = match &policy.policy_specifier {
            Some(PolicySpecifier::Header(header)) => {
                let path = join(&path, "header");
                let rewrite = header.regex_rewrite.as_ref();
                let rewrite = rewrite.map(|rewrite| regex_rewrite(rewrite, &join(&path, "regex_rewrite")));
                HashSource::Header {
                    name: matched_header(&header.header_name, &join(&path, "header_name"))?,
                    rewrite: rewrite.transpose()?.map(Box::new),
                }
            }
            Some(PolicySpecifier::Cookie(cookie)) => HashSource::Cookie(self::cookie(cookie, &join(&path, "cookie"))?),
            Some(PolicySpecifier::ConnectionProperties(properties)) if properties.source_ip => HashSource::SourceIp,
            // It asks for nothing.
            Some(PolicySpecifier::ConnectionProperties(_)) => continue,
            Some(PolicySpecifier::QueryParameter(parameter)) => {
                HashSource::QueryParameter(parameter.name.as_str().into())
            }
            Some(PolicySpecifier::FilterState(state)) => HashSource::FilterState(state.key.as_str().into()),
            None => return Err(required(&path, "header")),
        };
        parsed.push(HashPolicy { source, terminal: policy.terminal });
    }
    Ok(parsed.into())
}

fn cookie(cookie: &Cookie, path: &str) -> Result<HashCookie> {
    let attributes = cookie.attributes.iter();
    let made = HashCookie {
        name: cookie.name.as_str().into(),
        ttl: duration(cookie.ttl, path, "ttl")?,
        path: cookie.path.as_str().into(),
        attributes: attributes.map(|it| (it.name.as_str().into(), it.value.as_str().into())).collect(),
    };
    let is_bad = |text: &str| http::HeaderValue::from_str(text).is_err();
    let bad = is_bad(&made.name) || is_bad(&made.path);
    if made.ttl.is_some() && (bad || made.attributes.iter().any(|(name, value)| is_bad(name) || is_bad(value))) {
        return Err(FieldError::new(path, "a header's value cannot hold this"));
    }
    Ok(made)
}

//! `internal_redirect_policy`, and the two fields before it.

use culvert_xds_client::json::unpack;
use envoy_types::pb::envoy::{
    config::{
        core::v3::TypedExtensionConfig,
        route::v3::{
            InternalRedirectPolicy as ProtoPolicy, RouteAction as ProtoAction, route_action::InternalRedirectAction,
        },
    },
    extensions::internal_redirect::{
        allow_listed_routes::v3::AllowListedRoutesConfig, previous_routes::v3::PreviousRoutesConfig,
        safe_cross_scheme::v3::SafeCrossSchemeConfig,
    },
};
use http::{HeaderName, StatusCode};

use super::{
    common::{Result, header_name, number, required, type_name},
    support::join,
};
use crate::config::{
    FieldError,
    model::{InternalRedirectPolicy, InternalRedirectPredicate},
};

/// What may be followed; others that are listed are passed over, as in Envoy.
const REDIRECTS: [u16; 5] = [301, 302, 303, 307, 308];

/// Which of its upstream's redirects a route follows; `None`: none.
#[expect(deprecated, reason = "the fields that internal_redirect_policy replaced, which Envoy still takes")]
pub(super) fn internal_redirect(action: &ProtoAction, path: &str) -> Result<Option<Box<InternalRedirectPolicy>>> {
    let path_of_policy = join(path, "internal_redirect_policy");
    if let Some(found) = &action.internal_redirect_policy {
        return Ok(Some(Box::new(policy(found, &path_of_policy)?)));
    }
    if action.internal_redirect_action != InternalRedirectAction::HandleInternalRedirect as i32 {
        return Ok(None);
    }
    let found = ProtoPolicy { max_internal_redirects: action.max_internal_redirects, ..ProtoPolicy::default() };
    Ok(Some(Box::new(policy(&found, path)?)))
}

fn policy(policy: &ProtoPolicy, path: &str) -> Result<InternalRedirectPolicy> {
    let codes = policy.redirect_response_codes.iter();
    let codes = codes.filter_map(|code| u16::try_from(*code).ok()).filter(|code| REDIRECTS.contains(code));
    let predicates = policy.predicates.iter().enumerate();
    let predicates = predicates.map(|(index, item)| predicate(item, &format!("{}[{index}]", join(path, "predicates"))));
    let copied = policy.response_headers_to_copy.iter().enumerate();
    let copied = copied
        .map(|(index, name)| copied_header(name, &format!("{}[{index}]", join(path, "response_headers_to_copy"))));
    Ok(InternalRedirectPolicy {
        max_internal_redirects: number(policy.max_internal_redirects, 1),
        response_codes: match policy.redirect_response_codes.is_empty() {
            true => vec![StatusCode::FOUND],
            false => codes.filter_map(|code| StatusCode::from_u16(code).ok()).collect(),
        },
        predicates: predicates.collect::<Result<_>>()?,
        allow_cross_scheme_redirect: policy.allow_cross_scheme_redirect,
        response_headers_to_copy: copied.collect::<Result<_>>()?,
    })
}

fn predicate(item: &TypedExtensionConfig, path: &str) -> Result<InternalRedirectPredicate> {
    let path = join(path, "typed_config");
    let config = item.typed_config.as_ref().ok_or_else(|| required(&path, "typed_config"))?;
    match type_name(config) {
        "envoy.extensions.internal_redirect.previous_routes.v3.PreviousRoutesConfig" => {
            let PreviousRoutesConfig {} = unpack(config, &path)?;
            Ok(InternalRedirectPredicate::PreviousRoutes)
        }
        "envoy.extensions.internal_redirect.allow_listed_routes.v3.AllowListedRoutesConfig" => {
            let config: AllowListedRoutesConfig = unpack(config, &path)?;
            let names = config.allowed_route_names.into_iter().map(Into::into);
            Ok(InternalRedirectPredicate::AllowListedRoutes(names.collect()))
        }
        "envoy.extensions.internal_redirect.safe_cross_scheme.v3.SafeCrossSchemeConfig" => {
            let SafeCrossSchemeConfig {} = unpack(config, &path)?;
            Ok(InternalRedirectPredicate::SafeCrossScheme)
        }
        _ => Err(FieldError::unsupported(path)),
    }
}

fn copied_header(name: &str, path: &str) -> Result<HeaderName> {
    if name.starts_with(':') || name.eq_ignore_ascii_case("host") {
        return Err(FieldError::new(path, ":-prefixed headers or Hosts may not be specified here."));
    }
    header_name(name, path)
}

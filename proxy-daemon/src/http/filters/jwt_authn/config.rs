//! The configuration of `envoy.filters.http.jwt_authn`.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use culvert_xds_client::json::unpack;
use envoy_types::pb::{
    envoy::{
        config::core::v3::{RetryPolicy, http_uri::HttpUpstreamType},
        extensions::filters::http::jwt_authn::v3::{
            JwtAuthentication, JwtProvider, JwtRequirement, PerRouteConfig as ProtoPerRoute, RemoteJwks,
            jwt_provider::JwksSourceSpecifier, jwt_requirement::RequiresType, per_route_config::RequirementSpecifier,
            requirement_rule::RequirementType,
        },
    },
    google::protobuf::Any,
};
use http::{HeaderName, Uri};

use super::{
    JwtFactory, Stats, Told,
    cache::Cache,
    extract::Places,
    jwks::{KeySource, Keys, Remote, Retry, State},
};
use crate::http::filters::shared::Shared;
use crate::{
    config::{
        FieldError,
        model::{RouteMatch, StringMatcher},
        parse,
    },
    http::filters::{FilterCx, HttpFilterFactory, PerRouteConfig},
    stats::Scope,
};

const DEFAULT_SKEW: u64 = 60;
const DEFAULT_CACHE: Duration = Duration::from_secs(600);
const DEFAULT_FAILED_REFETCH: Duration = Duration::from_secs(1);
const DEFAULT_BASE_INTERVAL: Duration = Duration::from_secs(1);

type Result<T> = std::result::Result<T, FieldError>;

/// The header that a claim becomes, and the way to the claim.
pub(super) type ClaimToHeader = (HeaderName, Box<[Box<str>]>);

/// `JwtProvider`
#[derive(Debug)]
pub(super) struct Provider {
    pub(super) issuer: Box<str>,
    pub(super) audiences: Box<[String]>,
    pub(super) keys: KeySource,
    pub(super) forward: bool,
    pub(super) places: Places,
    pub(super) payload_header: Option<HeaderName>,
    pub(super) pad_payload: bool,
    pub(super) payload_in_metadata: Box<str>,
    /// Claims that are lists there: texts with blanks between the items.
    pub(super) lists: Box<[String]>,
    pub(super) failed_status_in_metadata: Box<str>,
    pub(super) subjects: Option<StringMatcher>,
    /// How long a token may still be valid for; `Some(None)`: for any time that has an end.
    pub(super) max_lifetime: Option<Option<Duration>>,
    pub(super) header_in_metadata: Box<str>,
    pub(super) skew: u64,
    pub(super) claims: Box<[ClaimToHeader]>,
    pub(super) clear_route_cache: bool,
    /// `jwt_cache_config`
    pub(super) cache: Option<Cache>,
}

/// What a request must have.
#[derive(Debug)]
pub(super) enum Requirement {
    /// A token of this provider; with audiences in the place of the provider's own.
    Provider(usize, Option<Box<[String]>>),
    /// One of these.
    Any { of: Vec<Requirement>, allow_missing: bool, allow_failed: bool },
    /// Each of these.
    All(Vec<Requirement>),
    /// A good token of any provider, or none.
    AllowMissing,
    /// Nothing; a good token of any provider is told of.
    AllowMissingOrFailed,
}

/// The numbers of requirements, by names.
pub(super) type Named = BTreeMap<Box<str>, usize>;

/// What is configured. Streams hold on to it while their tokens are verified.
#[derive(Debug)]
pub(super) struct Settings {
    pub(super) providers: Vec<Provider>,
    /// What `rules` and `named` mean, by their numbers.
    pub(super) requirements: Vec<Requirement>,
    pub(super) rules: Vec<(RouteMatch, Option<usize>)>,
    pub(super) named: Named,
    /// `filter_state_rules`: a key of the filter state, and the requirements that its values stand for where no rule fits.
    pub(super) by_state: Option<(Box<str>, Named)>,
    pub(super) bypass_cors_preflight: bool,
    /// Clients are not told what is wrong with their tokens.
    pub(super) strip_failure_response: bool,
    pub(super) stats: Stats,
}

pub(in crate::http::filters) fn parse(typed_config: &Any, cx: &FilterCx<'_>) -> Result<Arc<dyn HttpFilterFactory>> {
    // What is not here is refused by the table of honoured fields.
    let config: JwtAuthentication = unpack(typed_config, cx.path)?;
    let field = |name: &str| format!("{}.{name}", cx.path);
    let mut names = HashMap::new();
    let mut providers = Vec::new();
    // In an order that does not change.
    for (name, config) in config.providers.iter().collect::<BTreeMap<_, _>>() {
        names.insert(name.as_str(), providers.len());
        providers.push(provider(name, config, &field(&format!("providers[\"{name}\"]")))?);
    }
    let mut requirements = Vec::new();
    let mut number = |requirement| {
        requirements.push(requirement);
        requirements.len() - 1
    };
    let of_names = config.requirement_map.iter().map(|(name, it)| {
        let path = field(&format!("requirement_map[\"{name}\"]"));
        Ok((name.as_str().into(), number(requirement(it, &names, &path)?)))
    });
    let named: BTreeMap<Box<str>, usize> = of_names.collect::<Result<_>>()?;
    let rules = config.rules.iter().enumerate().map(|(index, rule)| {
        let path = field(&format!("rules[{index}]"));
        let required = |name| FieldError::new(format!("{path}.{name}"), "value is required");
        let matched = rule.r#match.as_ref().ok_or_else(|| required("match"))?;
        let matched = parse::matcher::route_match(matched, &format!("{path}.match"))?;
        let requires = match &rule.requirement_type {
            None => None,
            Some(RequirementType::Requires(requires)) if requires.requires_type.is_none() => None,
            Some(RequirementType::Requires(requires)) => {
                Some(number(requirement(requires, &names, &format!("{path}.requires"))?))
            }
            Some(RequirementType::RequirementName(name)) => match named.get(name.as_str()) {
                Some(known) => Some(*known),
                None => {
                    let text = format!("Wrong requirement_name: {name}. It should be in requirement_map");
                    return Err(FieldError::new(format!("{path}.requirement_name"), text));
                }
            },
        };
        Ok((matched, requires))
    });
    let rules = rules.collect::<Result<Vec<_>>>()?;
    let by_state = config.filter_state_rules.as_ref().map(|rule| {
        let of_values = rule.requires.iter().map(|(value, it)| {
            let path = field(&format!("filter_state_rules.requires[\"{value}\"]"));
            Ok((value.as_str().into(), number(requirement(it, &names, &path)?)))
        });
        Ok::<(Box<str>, _), FieldError>((
            rule.name.as_str().into(),
            of_values.collect::<Result<BTreeMap<Box<str>, usize>>>()?,
        ))
    });
    let by_state = by_state.transpose()?;
    let scope = Scope::http(cx.stat_prefix).child("jwt_authn");
    let scope = if config.stat_prefix.is_empty() { scope } else { scope.child(&config.stat_prefix) };
    Ok(Arc::new(JwtFactory(Shared::new(Settings {
        providers,
        requirements,
        rules,
        named,
        by_state,
        bypass_cors_preflight: config.bypass_cors_preflight,
        strip_failure_response: config.strip_failure_response,
        stats: Stats::new(&scope),
    }))))
}

pub(in crate::http::filters) fn parse_per_route(config: &Any, path: &str) -> Result<PerRouteConfig> {
    let ProtoPerRoute { requirement_specifier } = unpack(config, path)?;
    match requirement_specifier {
        Some(RequirementSpecifier::Disabled(true)) => Ok(Arc::new(Told::Disabled)),
        Some(RequirementSpecifier::Disabled(false)) => {
            Err(FieldError::new(format!("{path}.disabled"), "value must equal true"))
        }
        Some(RequirementSpecifier::RequirementName(name)) => Ok(Arc::new(Told::Requirement(name.into()))),
        None => Err(FieldError::new(format!("{path}.requirement_specifier"), "value is required")),
    }
}

fn requirement(requirement: &JwtRequirement, names: &HashMap<&str, usize>, path: &str) -> Result<Requirement> {
    let known = |name: &str, field: &str| {
        let unknown =
            || FieldError::new(format!("{path}.{field}"), format!("Required provider [\"{name}\"] is unknown"));
        names.get(name).copied().ok_or_else(unknown)
    };
    let each = |items: &[JwtRequirement], field: &str| {
        let parse = |(index, it)| self::requirement(it, names, &format!("{path}.{field}.requirements[{index}]"));
        items.iter().enumerate().map(parse).collect::<Result<Vec<_>>>()
    };
    Ok(match &requirement.requires_type {
        Some(RequiresType::ProviderName(name)) => Requirement::Provider(known(name, "provider_name")?, None),
        Some(RequiresType::ProviderAndAudiences(both)) => {
            let number = known(&both.provider_name, "provider_and_audiences.provider_name")?;
            Requirement::Provider(number, Some(both.audiences.clone().into()))
        }
        Some(RequiresType::RequiresAny(list)) => {
            let all = each(&list.requirements, "requires_any")?;
            let allow_missing = all.iter().any(|it| matches!(it, Requirement::AllowMissing));
            let allow_failed = all.iter().any(|it| matches!(it, Requirement::AllowMissingOrFailed));
            let regular =
                |it: &Requirement| !matches!(it, Requirement::AllowMissing | Requirement::AllowMissingOrFailed);
            Requirement::Any { of: all.into_iter().filter(regular).collect(), allow_missing, allow_failed }
        }
        Some(RequiresType::RequiresAll(list)) => Requirement::All(each(&list.requirements, "requires_all")?),
        Some(RequiresType::AllowMissing(_)) => Requirement::AllowMissing,
        Some(RequiresType::AllowMissingOrFailed(_)) => Requirement::AllowMissingOrFailed,
        Some(RequiresType::ExtractOnlyWithoutValidation(_)) => {
            return Err(FieldError::unsupported(format!("{path}.extract_only_without_validation")));
        }
        None => return Err(FieldError::new(format!("{path}.requires_type"), "value is required")),
    })
}

fn header_name(name: &str, path: &str) -> Result<HeaderName> {
    HeaderName::try_from(name).map_err(|_| FieldError::new(path, format!("{name:?} is not a header name")))
}

fn provider(name: &str, provider: &JwtProvider, path: &str) -> Result<Provider> {
    let keys = match &provider.jwks_source_specifier {
        Some(JwksSourceSpecifier::LocalJwks(source)) => {
            let path = format!("{path}.local_jwks");
            let keys = Keys::parse(&parse::data_source(source, &path)?);
            let wrong = |error| {
                FieldError::new(&path, format!("Provider '{name}' in jwt_authn config has invalid local jwks: {error}"))
            };
            KeySource::Local(keys.map_err(wrong)?)
        }
        Some(JwksSourceSpecifier::RemoteJwks(remote)) => {
            KeySource::Remote(Arc::new(self::remote(remote, &format!("{path}.remote_jwks"))?))
        }
        None => return Err(FieldError::new(format!("{path}.jwks_source_specifier"), "value is required")),
    };
    let headers = provider.from_headers.iter().enumerate().map(|(index, header)| {
        let name = header_name(&header.name, &format!("{path}.from_headers[{index}].name"))?;
        Ok((name, header.value_prefix.as_str().into()))
    });
    let boxed = |texts: &[String]| texts.iter().map(|text| text.as_str().into()).collect();
    let mut places = Places {
        headers: headers.collect::<Result<_>>()?,
        params: boxed(&provider.from_params),
        cookies: boxed(&provider.from_cookies),
    };
    if places.headers.is_empty() && places.params.is_empty() && places.cookies.is_empty() {
        places = Places::usual();
    }
    let claims = provider.claim_to_headers.iter().enumerate().map(|(index, claim)| {
        let path = format!("{path}.claim_to_headers[{index}]");
        let way: Box<[Box<str>]> = match (claim.claim_name.as_str(), claim.claim_path.as_slice()) {
            ("", []) => return Err(FieldError::new(format!("{path}.claim_name"), "value is required")),
            ("", segments) => segments.iter().map(|segment| segment.key.as_str().into()).collect(),
            (name, []) => name.split('.').map(Into::into).collect(),
            _ => return Err(FieldError::new(format!("{path}.claim_path"), "claim_name is set too")),
        };
        Ok((header_name(&claim.header_name, &format!("{path}.header_name"))?, way))
    });
    let payload_header = Some(provider.forward_payload_header.as_str()).filter(|name| !name.is_empty());
    let payload_header = payload_header.map(|name| header_name(name, &format!("{path}.forward_payload_header")));
    let subjects = provider.subjects.as_ref();
    let subjects = subjects.map(|matcher| parse::matcher::string(matcher, &format!("{path}.subjects")));
    let max_lifetime = parse::duration(provider.max_lifetime, path, "max_lifetime")?;
    Ok(Provider {
        issuer: provider.issuer.as_str().into(),
        audiences: provider.audiences.clone().into(),
        keys,
        forward: provider.forward,
        places,
        payload_header: payload_header.transpose()?,
        pad_payload: provider.pad_forward_payload_header,
        payload_in_metadata: provider.payload_in_metadata.as_str().into(),
        lists: provider.normalize_payload_in_metadata.clone().unwrap_or_default().space_delimited_claims.into(),
        failed_status_in_metadata: provider.failed_status_in_metadata.as_str().into(),
        subjects: subjects.transpose()?,
        max_lifetime: max_lifetime.map(Some).or_else(|| provider.require_expiration.then_some(None)),
        header_in_metadata: provider.header_in_metadata.as_str().into(),
        skew: match provider.clock_skew_seconds {
            0 => DEFAULT_SKEW,
            seconds => u64::from(seconds),
        },
        claims: claims.collect::<Result<_>>()?,
        clear_route_cache: provider.clear_route_cache,
        cache: provider.jwt_cache_config.as_ref().map(Cache::new),
    })
}

fn remote(remote: &RemoteJwks, path: &str) -> Result<Remote> {
    let Some(http) = &remote.http_uri else {
        return Err(FieldError::new(format!("{path}.http_uri"), "value is required"));
    };
    let Some(HttpUpstreamType::Cluster(cluster)) = &http.http_upstream_type else {
        return Err(FieldError::new(format!("{path}.http_uri.cluster"), "value is required"));
    };
    // The type also takes a query without a path, which no server does.
    let is_url =
        |uri: &Uri| uri.authority().is_some() && uri.path_and_query().is_none_or(|it| it.as_str().starts_with('/'));
    let uri = http.uri.parse::<Uri>().ok().filter(is_url);
    let uri =
        uri.ok_or_else(|| FieldError::new(format!("{path}.http_uri.uri"), format!("{:?} is no URI", http.uri)))?;
    let timeout = parse::duration(http.timeout, &format!("{path}.http_uri"), "timeout")?;
    let cache = parse::duration(remote.cache_duration, path, "cache_duration")?.unwrap_or(DEFAULT_CACHE);
    let retry =
        remote.retry_policy.as_ref().map(|policy| retry(policy, &format!("{path}.retry_policy"))).transpose()?;
    let renewed = remote.async_fetch.as_ref().map(|renewed| -> Result<Duration> {
        let path = format!("{path}.async_fetch");
        let failed = parse::duration(renewed.failed_refetch_duration, &path, "failed_refetch_duration")?;
        Ok(failed.unwrap_or(DEFAULT_FAILED_REFETCH))
    });
    Ok(Remote {
        cluster: cluster.as_str().into(),
        uri,
        timeout: timeout.filter(|limit| !limit.is_zero()),
        cache_duration: cache,
        retry,
        renewed: renewed.transpose()?,
        state: State::default(),
    })
}

fn retry(policy: &RetryPolicy, path: &str) -> Result<Retry> {
    if !policy.retry_on.is_empty() {
        return Err(FieldError::unsupported(format!("{path}.retry_on")));
    }
    let path = format!("{path}.retry_back_off");
    let back_off = policy.retry_back_off.unwrap_or_default();
    let base = parse::duration(back_off.base_interval, &path, "base_interval")?.unwrap_or(DEFAULT_BASE_INTERVAL);
    let max = parse::duration(back_off.max_interval, &path, "max_interval")?.unwrap_or(base.saturating_mul(10));
    if max < base {
        let text = "max_interval must be greater than or equal to the base_interval";
        return Err(FieldError::new(format!("{path}.max_interval"), text));
    }
    Ok(Retry { retries: policy.num_retries.map_or(1, |retries| retries.value), base, max })
}

//! `envoy.filters.http.rbac`: lets requests pass or refuses them, by who sends them and what they are for.

use std::{ops::Range, sync::Arc};

use culvert_xds_client::json::unpack;
use envoy_types::pb::{
    envoy::{
        config::rbac::v3::{
            Permission, Principal, Rbac as Rules, permission::Rule as PermissionRule, principal::Identifier,
            rbac::Action as ProtoAction,
        },
        extensions::filters::http::rbac::v3::{Rbac, RbacPerRoute},
        r#type::{
            matcher::v3::{PathMatcher, path_matcher},
            v3::Int32Range,
        },
    },
    google::protobuf::Any,
};
use http::StatusCode;
use regex::Regex;

use super::{FilterCx, Flow, HttpFilter, HttpFilterFactory, PerRoute, PerRouteConfig};
use crate::{
    access_log::ResponseFlags,
    config::{
        FieldError,
        model::{Cidr, HeaderMatcher, StringMatcher},
        parse,
    },
    http::{
        body::Body,
        route_match::header_matches,
        stream::{LocalReply, RequestHead, StreamCx},
    },
    stats::{Counter, Lease, Scope},
};

type Result<T> = std::result::Result<T, FieldError>;

#[derive(Debug)]
struct RbacFactory {
    /// Where a route says nothing.
    own: Engines,
    counters: Verdicts,
    shadow_counters: Verdicts,
    /// Both are counted wherever the filter is.
    _leases: [Lease; 2],
}

/// What a filter or a route asks for.
#[derive(Debug, Default)]
struct Engines {
    /// Obeyed.
    rules: Option<Engine>,
    /// Only counted.
    shadow: Option<Engine>,
}

/// The filter's, also for rules of routes.
#[derive(Debug)]
struct Verdicts {
    allowed: Counter,
    denied: Counter,
}

/// `config.rbac.v3.RBAC`
#[derive(Debug)]
struct Engine {
    /// What becomes of a request that a policy matches: the others get the opposite.
    allow: bool,
    /// By name: the first that matches counts.
    policies: Box<[Policy]>,
}

#[derive(Debug)]
struct Policy {
    /// As access logs show it.
    name: Box<str>,
    /// One of them is enough.
    permissions: Box<[Rule]>,
    /// One of them is enough.
    principals: Box<[Rule]>,
    /// With `track_per_rule_stats`: requests that were allowed and that were denied because of it.
    tracked: Option<(Counter, Counter)>,
}

/// A permission or a principal.
#[derive(Debug)]
enum Rule {
    Any,
    All(Box<[Rule]>),
    OneOf(Box<[Rule]>),
    Not(Box<Rule>),
    Header(Box<HeaderMatcher>),
    UrlPath(StringMatcher),
    UriTemplate(Regex),
    DestinationIp(Cidr),
    DestinationPort(Range<i32>),
    RequestedServerName(StringMatcher),
    Authenticated(Option<StringMatcher>),
    DirectRemoteIp(Cidr),
    RemoteIp(Cidr),
}

impl Rule {
    fn holds(&self, head: &RequestHead, cx: &StreamCx) -> bool {
        match self {
            Rule::Any => true,
            Rule::All(rules) => rules.iter().all(|rule| rule.holds(head, cx)),
            Rule::OneOf(rules) => one_holds(rules, head, cx),
            Rule::Not(rule) => !rule.holds(head, cx),
            Rule::Header(matcher) => header_matches(matcher, head),
            Rule::UrlPath(matcher) => matcher.matches(head.uri.path()),
            Rule::UriTemplate(template) => template.is_match(head.uri.path()),
            Rule::DestinationIp(range) => range.contains(cx.connection.local.ip()),
            Rule::DestinationPort(range) => range.contains(&i32::from(cx.connection.local.port())),
            Rule::RequestedServerName(matcher) => {
                matcher.matches(cx.connection.requested_server_name().unwrap_or_default())
            }
            Rule::Authenticated(name) => authenticated(name.as_ref(), cx),
            Rule::DirectRemoteIp(range) => range.contains(cx.connection.remote.ip()),
            Rule::RemoteIp(range) => range.contains(cx.remote.ip()),
        }
    }
}

fn one_holds(rules: &[Rule], head: &RequestHead, cx: &StreamCx) -> bool {
    rules.iter().any(|rule| rule.holds(head, cx))
}

/// Whether the client is one of these: one of its URI or DNS names, or else its subject, which is empty without a
/// certificate. As in Envoy, without a name any client on TLS is.
fn authenticated(name: Option<&StringMatcher>, cx: &StreamCx) -> bool {
    let Some(tls) = cx.connection.tls() else { return false };
    let Some(matcher) = name else { return true };
    let Some(peer) = tls.peer() else { return matcher.matches("") };
    peer.uri_and_dns_names().any(|name| matcher.matches(name)) || matcher.matches(&peer.subject)
}

impl Engine {
    /// Whether the request may pass, and the policy that it matches.
    fn judge(&self, verdicts: &Verdicts, head: &RequestHead, cx: &StreamCx) -> (bool, Option<&Policy>) {
        let matches =
            |policy: &&Policy| one_holds(&policy.permissions, head, cx) && one_holds(&policy.principals, head, cx);
        let policy = self.policies.iter().find(matches);
        let allowed = policy.is_some() == self.allow;
        let counter = if allowed { verdicts.allowed } else { verdicts.denied };
        counter.inc();
        if let Some((allows, denies)) = policy.and_then(|policy| policy.tracked) {
            let counter = if allowed { allows } else { denies };
            counter.inc();
        }
        (allowed, policy)
    }
}

impl HttpFilterFactory for RbacFactory {
    fn request(
        &self,
        head: &mut RequestHead,
        _body: &mut Body,
        cx: &mut StreamCx,
        route: PerRoute<'_>,
        _instances: &mut Vec<Box<dyn HttpFilter>>,
    ) -> Flow {
        let engines = route.most_specific().unwrap_or(&self.own);
        if let Some(shadow) = &engines.shadow {
            shadow.judge(&self.shadow_counters, head, cx);
        }
        let Some(rules) = &engines.rules else { return Flow::Continue };
        match rules.judge(&self.counters, head, cx) {
            (true, _) => Flow::Continue,
            (false, policy) => {
                let name = policy.map_or("none", |policy| &policy.name);
                let details = format!("rbac_access_denied_matched_policy[{name}]");
                let (status, text) = (StatusCode::FORBIDDEN, "RBAC: access denied");
                Flow::Respond(LocalReply::new(status, text, ResponseFlags::default(), details))
            }
        }
    }
}

pub(super) fn parse(typed_config: &Any, cx: &FilterCx<'_>) -> Result<Arc<dyn HttpFilterFactory>> {
    let Rbac {
        rules,
        rules_stat_prefix,
        shadow_rules,
        shadow_rules_stat_prefix,
        track_per_rule_stats,
        // Refused by the table of honoured fields.
        matcher: _,
        shadow_matcher: _,
    } = unpack(typed_config, cx.path)?;
    let scope = Scope::http(cx.stat_prefix).child("rbac");
    // Envoy has one dot between, whether or not a prefix ends with one.
    let below = |stat_prefix: &str| match stat_prefix.trim_end_matches('.') {
        "" => scope.clone(),
        prefix => scope.clone().child(prefix),
    };
    let (scope, shadow_scope) = (below(&rules_stat_prefix), below(&shadow_rules_stat_prefix));
    let engine = |rules: Option<Rules>, counters: &Counters<'_>, field: &str| {
        let path = format!("{}.{field}", cx.path);
        rules.map(|rules| engine(rules, track_per_rule_stats.then_some(counters), &path)).transpose()
    };
    let counted = Counters { scope: &scope, kind: "" };
    let shadow_counted = Counters { scope: &shadow_scope, kind: "shadow_" };
    let shadow = engine(shadow_rules, &shadow_counted, "shadow_rules")?;
    let rules = engine(rules, &counted, "rules")?;
    Ok(Arc::new(RbacFactory {
        own: Engines { rules, shadow },
        counters: counted.verdicts(),
        shadow_counters: shadow_counted.verdicts(),
        _leases: [scope.lease(), shadow_scope.lease()],
    }))
}

/// A route's rules are in the place of the filter's own, both kinds; without any, all requests pass.
pub(super) fn parse_per_route(config: &Any, path: &str) -> Result<PerRouteConfig> {
    let RbacPerRoute { rbac } = unpack(config, path)?;
    let Some(rbac) = rbac else { return Ok(Arc::new(Engines::default())) };
    let at = |field: &str| format!("{path}.rbac.{field}");
    // They have the filter's counters, whose names are not known here.
    if rbac.track_per_rule_stats {
        return Err(FieldError::unsupported(at("track_per_rule_stats")));
    }
    let engine = |rules: Option<Rules>, field: &str| rules.map(|rules| engine(rules, None, &at(field))).transpose();
    let (rules, shadow) = (engine(rbac.rules, "rules")?, engine(rbac.shadow_rules, "shadow_rules")?);
    Ok(Arc::new(Engines { rules, shadow }))
}

/// Where an engine counts.
struct Counters<'a> {
    scope: &'a Scope,
    /// Stands before the names.
    kind: &'a str,
}

impl Counters<'_> {
    fn verdicts(&self) -> Verdicts {
        Verdicts { allowed: self.count("allowed"), denied: self.count("denied") }
    }

    fn count(&self, what: &str) -> Counter {
        self.scope.counter(&format!("{}{what}", self.kind))
    }

    fn count_for(&self, policy: &str, what: &str) -> Counter {
        self.scope.counter(&format!("policy.{policy}.{}{what}", self.kind))
    }
}

fn engine(
    rules: Rules,
    // Of each policy, where they are wanted.
    tracked: Option<&Counters<'_>>,
    path: &str,
) -> Result<Engine> {
    let allow = match ProtoAction::try_from(rules.action) {
        Ok(ProtoAction::Allow) => true,
        Ok(ProtoAction::Deny) => false,
        Ok(ProtoAction::Log) | Err(_) => {
            return Err(FieldError::new(format!("{path}.action"), "LOG is not supported by culvert yet"));
        }
    };
    let mut policies: Vec<_> = rules.policies.into_iter().collect();
    policies.sort_by(|(a, _), (b, _)| a.cmp(b));
    let policy = |(name, policy): (String, envoy_types::pb::envoy::config::rbac::v3::Policy)| {
        let path = format!("{path}.policies[\"{name}\"]");
        let permissions = each(&policy.permissions, &format!("{path}.permissions"), permission)?;
        let principals = each(&policy.principals, &format!("{path}.principals"), principal)?;
        let tracked =
            tracked.map(|counters| (counters.count_for(&name, "allowed"), counters.count_for(&name, "denied")));
        let name = name.replace([' ', '\t', '\u{b}', '\u{c}', '\n', '\r'], "_").into();
        Ok(Policy { name, permissions, principals, tracked })
    };
    let policies = policies.into_iter().map(policy).collect::<Result<_>>()?;
    Ok(Engine { allow, policies })
}

fn each<T>(items: &[T], path: &str, parse: impl Fn(&T, &str) -> Result<Rule>) -> Result<Box<[Rule]>> {
    items.iter().enumerate().map(|(index, item)| parse(item, &format!("{path}[{index}]"))).collect()
}

#[expect(deprecated, reason = "a deprecated field that is set must be refused, not passed over")]
fn permission(permission: &Permission, path: &str) -> Result<Rule> {
    let at = |field: &str| format!("{path}.{field}");
    let Some(rule) = &permission.rule else { return Err(FieldError::new(at("rule"), "value is required")) };
    Ok(match rule {
        PermissionRule::AndRules(set) => Rule::All(each(&set.rules, &at("and_rules.rules"), self::permission)?),
        PermissionRule::OrRules(set) => Rule::OneOf(each(&set.rules, &at("or_rules.rules"), self::permission)?),
        PermissionRule::Any(_) => Rule::Any,
        PermissionRule::Header(matcher) => Rule::Header(Box::new(parse::matcher::header(matcher, &at("header"))?)),
        PermissionRule::UrlPath(matcher) => url_path(matcher, &at("url_path"))?,
        PermissionRule::DestinationIp(range) => Rule::DestinationIp(parse::cidr(range, &at("destination_ip"))?),
        PermissionRule::DestinationPort(port) => {
            let port = i32::try_from(*port).map_err(|_| FieldError::new(at("destination_port"), "is not a port"))?;
            Rule::DestinationPort(port..port + 1)
        }
        PermissionRule::DestinationPortRange(Int32Range { start, end }) => {
            let error = |text| Err(FieldError::new(at("destination_port_range"), text));
            match (*start, *end) {
                (start, _) if !(0..=65536).contains(&start) => {
                    return error(format!("range start {start} is out of bounds"));
                }
                (_, end) if !(0..=65536).contains(&end) => return error(format!("range end {end} is out of bounds")),
                (start, end) if start >= end => {
                    return error(format!("range start {start} cannot be greater or equal than range end {end}"));
                }
                (start, end) => Rule::DestinationPort(start..end),
            }
        }
        PermissionRule::NotRule(rule) => Rule::Not(Box::new(self::permission(rule, &at("not_rule"))?)),
        PermissionRule::RequestedServerName(matcher) => {
            Rule::RequestedServerName(parse::matcher::string(matcher, &at("requested_server_name"))?)
        }
        PermissionRule::UriTemplate(template) => {
            Rule::UriTemplate(parse::matcher::uri_template(template, &at("uri_template"))?)
        }
        PermissionRule::Metadata(_) => return Err(FieldError::unsupported(at("metadata"))),
        PermissionRule::Matcher(_) => return Err(FieldError::unsupported(at("matcher"))),
        PermissionRule::SourcedMetadata(_) => return Err(FieldError::unsupported(at("sourced_metadata"))),
    })
}

#[expect(deprecated, reason = "the field that direct_remote_ip replaced, which Envoy still takes")]
fn principal(principal: &Principal, path: &str) -> Result<Rule> {
    let at = |field: &str| format!("{path}.{field}");
    let Some(id) = &principal.identifier else { return Err(FieldError::new(at("identifier"), "value is required")) };
    Ok(match id {
        Identifier::AndIds(set) => Rule::All(each(&set.ids, &at("and_ids.ids"), self::principal)?),
        Identifier::OrIds(set) => Rule::OneOf(each(&set.ids, &at("or_ids.ids"), self::principal)?),
        Identifier::Any(_) => Rule::Any,
        Identifier::Authenticated(authenticated) => {
            let path = at("authenticated.principal_name");
            let name = authenticated.principal_name.as_ref();
            Rule::Authenticated(name.map(|name| parse::matcher::string(name, &path)).transpose()?)
        }
        Identifier::SourceIp(range) => Rule::DirectRemoteIp(parse::cidr(range, &at("source_ip"))?),
        Identifier::DirectRemoteIp(range) => Rule::DirectRemoteIp(parse::cidr(range, &at("direct_remote_ip"))?),
        Identifier::RemoteIp(range) => Rule::RemoteIp(parse::cidr(range, &at("remote_ip"))?),
        Identifier::Header(matcher) => Rule::Header(Box::new(parse::matcher::header(matcher, &at("header"))?)),
        Identifier::UrlPath(matcher) => url_path(matcher, &at("url_path"))?,
        Identifier::NotId(id) => Rule::Not(Box::new(self::principal(id, &at("not_id"))?)),
        Identifier::Metadata(_) => return Err(FieldError::unsupported(at("metadata"))),
        Identifier::FilterState(_) => return Err(FieldError::unsupported(at("filter_state"))),
        Identifier::SourcedMetadata(_) => return Err(FieldError::unsupported(at("sourced_metadata"))),
        Identifier::Custom(_) => return Err(FieldError::unsupported(at("custom"))),
    })
}

fn url_path(matcher: &PathMatcher, path: &str) -> Result<Rule> {
    let Some(path_matcher::Rule::Path(matcher)) = &matcher.rule else {
        return Err(FieldError::new(format!("{path}.path"), "value is required"));
    };
    Ok(Rule::UrlPath(parse::matcher::string(matcher, &format!("{path}.path"))?))
}

//! `envoy.filters.http.rbac`: lets requests pass or refuses them, by who sends them and what they are for.

use std::{ops::Range, sync::Arc};

use culvert_xds_client::json::unpack;
use envoy_types::pb::{
    envoy::{
        config::rbac::v3::{
            MetadataSource, Permission, Principal, Rbac as Rules, SourcedMetadata, permission::Rule as PermissionRule,
            principal::Identifier, rbac::Action as ProtoAction,
        },
        extensions::filters::http::rbac::v3::{Rbac, RbacPerRoute},
        r#type::{
            matcher::v3::{PathMatcher, path_matcher},
            v3::Int32Range,
        },
    },
    google::protobuf::{Any, Value, value::Kind},
    xds::r#type::matcher::v3::Matcher,
};
use http::StatusCode;
use regex::Regex;

use super::{FilterCx, Flow, HttpFilter, HttpFilterFactory, PerRoute, PerRouteConfig};
use crate::{
    access_log::ResponseFlags,
    config::{
        FieldError,
        model::{Cidr, FilterStateMatcher, HeaderMatcher, MatchTree, MetadataMatcher, StringMatcher},
        parse,
    },
    http::{
        body::Body,
        match_input::{RequestInput, Told},
        metadata::{self, Metadata},
        route_match::header_matches,
        stream::{LocalReply, RequestHead, StreamCx},
    },
    stats::{Counter, Lease, Scope},
};

mod matcher;

/// What may not be in `%RESPONSE_CODE_DETAILS%`.
const BLANKS: [char; 6] = [' ', '\t', '\u{b}', '\u{c}', '\n', '\r'];

type Result<T> = std::result::Result<T, FieldError>;

#[derive(Debug)]
struct RbacFactory {
    /// Where a route says nothing.
    own: Engines,
    counters: Verdicts,
    shadow_counters: Verdicts,
    /// `rules_stat_prefix`, which stands before what others are told of rules.
    prefix: Box<str>,
    /// `shadow_rules_stat_prefix`, which stands before what others are told of shadow rules.
    shadow_prefix: Box<str>,
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

/// `config.rbac.v3.RBAC`, or a matcher.
#[derive(Debug)]
enum Engine {
    Rules {
        /// What becomes of a request that a policy matches: unless it is only logged, the others get the opposite.
        action: Action,
        /// By name: the first that matches counts.
        policies: Box<[Policy]>,
    },
    /// A request that it finds nothing for is denied.
    Matcher {
        tree: MatchTree<RequestInput, matcher::Found>,
        /// One of its actions is `LOG`: for each request is told whether it found that one.
        logs: bool,
    },
}

/// `config.rbac.v3.RBAC.Action`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    Allow,
    Deny,
    /// Allowed, and the access logs are told whether it was matched.
    Log,
}

/// What an engine says of a request.
struct Verdict<'a> {
    allowed: bool,
    /// The name of the policy that it matches.
    policy: Option<&'a str>,
    /// `access_log_hint`
    hint: Option<bool>,
}

#[derive(Debug)]
struct Policy {
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
    /// Of what filters have told.
    DynamicMetadata(Box<MetadataMatcher>),
    /// Of what the route's configuration says.
    RouteMetadata(Box<MetadataMatcher>),
    FilterState(Box<FilterStateMatcher>),
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
            Rule::DynamicMetadata(matcher) => metadata_matches(matcher, cx.progress.metadata.borrow().as_deref()),
            Rule::FilterState(matcher) => matcher.matches(cx.progress.metadata.borrow().as_deref()),
            Rule::RouteMetadata(matcher) => {
                metadata_matches(matcher, cx.route.as_ref().and_then(|route| route.metadata.as_deref()))
            }
        }
    }
}

fn one_holds(rules: &[Rule], head: &RequestHead, cx: &StreamCx) -> bool {
    rules.iter().any(|rule| rule.holds(head, cx))
}

fn metadata_matches(matcher: &MetadataMatcher, metadata: Option<&Metadata>) -> bool {
    matcher.matches(metadata.and_then(|metadata| metadata.namespace(&matcher.filter)))
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
    /// Whether the request may pass, and why.
    fn judge(&self, verdicts: &Verdicts, head: &RequestHead, cx: &StreamCx) -> Verdict<'_> {
        let (verdict, tracked) = match self {
            Engine::Rules { action, policies } => {
                let matches = |policy: &&Policy| {
                    one_holds(&policy.permissions, head, cx) && one_holds(&policy.principals, head, cx)
                };
                let policy = policies.iter().find(matches);
                let allowed = match action {
                    Action::Allow => policy.is_some(),
                    Action::Deny => policy.is_none(),
                    Action::Log => true,
                };
                let hint = (*action == Action::Log).then_some(policy.is_some());
                let verdict = Verdict { allowed, policy: policy.map(|policy| &*policy.name), hint };
                (verdict, policy.and_then(|policy| policy.tracked))
            }
            Engine::Matcher { tree, logs } => {
                let metadata = cx.progress.metadata.borrow();
                let metadata = metadata.as_deref();
                let found = tree.find(&Told { head, connection: &cx.connection, remote: cx.remote, metadata });
                let action = found.map_or(Action::Deny, |found| found.action);
                let hint = logs.then_some(action == Action::Log);
                let policy = found.map(|found| &*found.name);
                (Verdict { allowed: action != Action::Deny, policy, hint }, found.and_then(|found| found.tracked))
            }
        };
        let counter = if verdict.allowed { verdicts.allowed } else { verdicts.denied };
        counter.inc();
        if let Some((allows, denies)) = tracked {
            let counter = if verdict.allowed { allows } else { denies };
            counter.inc();
        }
        verdict
    }
}

fn text(text: &str) -> Value {
    Value { kind: Some(Kind::StringValue(text.to_owned())) }
}

impl RbacFactory {
    /// Tells the result, and the policy, as dynamic metadata of these names.
    fn tell(&self, [result, policy]: [&str; 2], prefix: &str, verdict: &Verdict<'_>, cx: &StreamCx) {
        // A map and its strings for each request, of which most are told to nobody.
        if !metadata::rbac_is_read() {
            return;
        }
        let told = [(result, Some(if verdict.allowed { "allowed" } else { "denied" })), (policy, verdict.policy)];
        cx.progress.with_metadata(|all| {
            let fields = &mut all.namespace_mut(metadata::RBAC).fields;
            for (name, value) in told.iter().filter_map(|(name, value)| Some((name, (*value)?))) {
                fields.insert(format!("{prefix}{name}"), text(value));
            }
        });
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
            let verdict = shadow.judge(&self.shadow_counters, head, cx);
            self.tell(["shadow_engine_result", "shadow_effective_policy_id"], &self.shadow_prefix, &verdict, cx);
        }
        let Some(rules) = &engines.rules else { return Flow::Continue };
        let verdict = rules.judge(&self.counters, head, cx);
        self.tell(["enforced_engine_result", "enforced_effective_policy_id"], &self.prefix, &verdict, cx);
        if let Some(hint) = verdict.hint {
            cx.progress.with_metadata(|metadata| {
                let hint = Value { kind: Some(Kind::BoolValue(hint)) };
                metadata.namespace_mut("envoy.common").fields.insert("access_log_hint".to_owned(), hint);
            });
        }
        match verdict.allowed {
            true => Flow::Continue,
            false => {
                let name = verdict.policy.unwrap_or("none").replace(BLANKS, "_");
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
        matcher,
        shadow_matcher,
    } = unpack(typed_config, cx.path)?;
    let scope = Scope::http(cx.stat_prefix).child("rbac");
    // Envoy has one dot between, whether or not a prefix ends with one.
    let below = |stat_prefix: &str| match stat_prefix.trim_end_matches('.') {
        "" => scope.clone(),
        prefix => scope.clone().child(prefix),
    };
    let (scope, shadow_scope) = (below(&rules_stat_prefix), below(&shadow_rules_stat_prefix));
    let engine = |rules: Option<Rules>, matcher: Option<Matcher>, counters: &Counters<'_>, fields: [&str; 2]| {
        let tracked = track_per_rule_stats.then_some(counters);
        engine(rules, matcher, tracked, fields.map(|field| format!("{}.{field}", cx.path)))
    };
    let counted = Counters { scope: &scope, kind: "" };
    let shadow_counted = Counters { scope: &shadow_scope, kind: "shadow_" };
    let shadow = engine(shadow_rules, shadow_matcher, &shadow_counted, ["shadow_rules", "shadow_matcher"])?;
    let rules = engine(rules, matcher, &counted, ["rules", "matcher"])?;
    Ok(Arc::new(RbacFactory {
        own: Engines { rules, shadow },
        counters: counted.verdicts(),
        shadow_counters: shadow_counted.verdicts(),
        prefix: rules_stat_prefix.into(),
        shadow_prefix: shadow_rules_stat_prefix.into(),
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
    let rules = engine(rbac.rules, rbac.matcher, None, [at("rules"), at("matcher")])?;
    let shadow = engine(rbac.shadow_rules, rbac.shadow_matcher, None, [at("shadow_rules"), at("shadow_matcher")])?;
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

    /// What is counted of one policy: requests that were allowed and that were denied because of it.
    fn of_policy(&self, policy: &str) -> (Counter, Counter) {
        let count = |what| self.scope.counter(&format!("policy.{policy}.{}{what}", self.kind));
        (count("allowed"), count("denied"))
    }
}

/// The engine of rules, or of a matcher, which is in their place; `paths` are theirs.
fn engine(
    rules: Option<Rules>,
    matcher: Option<Matcher>,
    // Of each policy, where they are wanted.
    tracked: Option<&Counters<'_>>,
    paths: [String; 2],
) -> Result<Option<Engine>> {
    let [path, matcher_path] = paths;
    if let Some(matcher) = matcher {
        return matcher::engine(&matcher, tracked, &matcher_path).map(Some);
    }
    let Some(rules) = rules else { return Ok(None) };
    let action = action(rules.action);
    let mut policies: Vec<_> = rules.policies.into_iter().collect();
    policies.sort_by(|(a, _), (b, _)| a.cmp(b));
    let policy = |(name, policy): (String, envoy_types::pb::envoy::config::rbac::v3::Policy)| {
        let path = format!("{path}.policies[\"{name}\"]");
        let permissions = each(&policy.permissions, &format!("{path}.permissions"), permission)?;
        let principals = each(&policy.principals, &format!("{path}.principals"), principal)?;
        let tracked = tracked.map(|counters| counters.of_policy(&name));
        Ok(Policy { name: name.into(), permissions, principals, tracked })
    };
    let policies = policies.into_iter().map(policy).collect::<Result<_>>()?;
    Ok(Some(Engine::Rules { action, policies }))
}

fn action(action: i32) -> Action {
    match ProtoAction::try_from(action) {
        Ok(ProtoAction::Deny) => Action::Deny,
        Ok(ProtoAction::Log) => Action::Log,
        Ok(ProtoAction::Allow) | Err(_) => Action::Allow,
    }
}

fn each<T>(items: &[T], path: &str, parse: impl Fn(&T, &str) -> Result<Rule>) -> Result<Box<[Rule]>> {
    items.iter().enumerate().map(|(index, item)| parse(item, &format!("{path}[{index}]"))).collect()
}

#[expect(deprecated, reason = "metadata, which Envoy still takes")]
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
        PermissionRule::Metadata(matcher) => {
            Rule::DynamicMetadata(Box::new(parse::metadata_match::metadata(matcher, &at("metadata"))?))
        }
        PermissionRule::Matcher(_) => return Err(FieldError::unsupported(at("matcher"))),
        PermissionRule::SourcedMetadata(sourced) => sourced_metadata(sourced, &at("sourced_metadata"))?,
    })
}

#[expect(
    deprecated,
    reason = "the fields that direct_remote_ip and sourced_metadata replaced, which Envoy still takes"
)]
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
        Identifier::Metadata(matcher) => {
            Rule::DynamicMetadata(Box::new(parse::metadata_match::metadata(matcher, &at("metadata"))?))
        }
        Identifier::FilterState(matcher) => {
            Rule::FilterState(Box::new(parse::metadata_match::filter_state(matcher, &at("filter_state"))?))
        }
        Identifier::SourcedMetadata(sourced) => sourced_metadata(sourced, &at("sourced_metadata"))?,
        Identifier::Custom(_) => return Err(FieldError::unsupported(at("custom"))),
    })
}

fn sourced_metadata(sourced: &SourcedMetadata, path: &str) -> Result<Rule> {
    let at = format!("{path}.metadata_matcher");
    let matcher = sourced.metadata_matcher.as_ref().ok_or_else(|| FieldError::new(&*at, "value is required"))?;
    let matcher = Box::new(parse::metadata_match::metadata(matcher, &at)?);
    Ok(match MetadataSource::try_from(sourced.metadata_source) {
        Ok(MetadataSource::Route) => Rule::RouteMetadata(matcher),
        Ok(MetadataSource::Dynamic) | Err(_) => Rule::DynamicMetadata(matcher),
    })
}

fn url_path(matcher: &PathMatcher, path: &str) -> Result<Rule> {
    let Some(path_matcher::Rule::Path(matcher)) = &matcher.rule else {
        return Err(FieldError::new(format!("{path}.path"), "value is required"));
    };
    Ok(Rule::UrlPath(parse::matcher::string(matcher, &format!("{path}.path"))?))
}

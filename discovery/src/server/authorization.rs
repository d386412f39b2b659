//! What a client may have, by who it is.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use envoy_types::pb::envoy::config::core::v3::Node;
use serde::Deserialize;
use tonic::Status;

use super::tls::Identity;
use super::viewer;
use crate::access::Pattern;
use crate::kubernetes::ObjectKey;
use crate::policy::ServiceName;
use crate::secrets;

/// Who may be which nodes, of which services. The first rule for an identity of a client that lets its node pass counts.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// A URI name of the client's certificate, `spiffe://...`, or `dns:` and a DNS name of it.
    pub identity: Pattern,
    /// The ids of nodes that it may have; all, if nothing is said.
    pub nodes: Option<Vec<Pattern>>,
    /// The services that its nodes may be of. If nothing is said: all, and none.
    pub services: Option<Vec<ServiceName>>,
    /// Whether it may ask what other clients have (CSDS).
    #[serde(default)]
    pub status: bool,
    /// Whether its nodes' word on the health of endpoints counts (HDS).
    #[serde(default)]
    pub health: bool,
    /// The secrets that its nodes are given (SDS); none, if nothing is said.
    #[serde(default)]
    pub secrets: Vec<Pattern>,
    /// The secret that its nodes are given as `own`.
    pub own_secret: Option<String>,
}

impl Rule {
    fn is_for(&self, identity: &Identity) -> bool {
        match self.identity.as_str().strip_prefix("dns:") {
            Some(name) => {
                let pattern = Pattern::new(&name.to_ascii_lowercase());
                identity.dns.iter().any(|name| pattern.matches(name))
            }
            None => identity.uris.iter().any(|uri| self.identity.matches(uri)),
        }
    }

    fn check(&self, node: &Node) -> Result<(), Refusal> {
        if self.nodes.as_ref().is_some_and(|nodes| !nodes.iter().any(|pattern| pattern.matches(&node.id))) {
            return Err(Refusal::Node);
        }
        let Some(services) = &self.services else { return Ok(()) };
        let may: BTreeSet<ObjectKey> = services.iter().map(|name| name.seen_from("default")).collect();
        let states = viewer(node).services;
        if states.is_empty() || !states.is_subset(&may) { Err(Refusal::Services) } else { Ok(()) }
    }
}

/// Why a client is not served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// No rule is for its certificate.
    Identity,
    /// It may not be this node.
    Node,
    /// Its node may not be of these services.
    Services,
    /// It has not said which node it is.
    Nameless,
    /// It may not ask what others have.
    Status,
    /// It may not say which endpoints work.
    Health,
}

impl Refusal {
    /// All there are.
    pub const ALL: [Self; 6] = [Self::Identity, Self::Node, Self::Services, Self::Nameless, Self::Status, Self::Health];

    /// Its name in statistics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Identity => "identity",
            Self::Node => "node",
            Self::Services => "services",
            Self::Nameless => "nameless",
            Self::Status => "status",
            Self::Health => "health",
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Identity => "no rule is for the names in this certificate",
            Self::Node => "this certificate may not be used by a node of this id",
            Self::Services => "this certificate may not be used by a node of these services, or of none",
            Self::Nameless => "the first request needs a node",
            Self::Status => "this certificate may not be used to ask what others have",
            Self::Health => "this certificate may not be used to say which endpoints work",
        })
    }
}

/// That somebody was refused: what it is told, `PERMISSION_DENIED`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// The id of the node, if it has said so.
    node: String,
    /// The reason.
    pub why: String,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "node `{}`: {}", self.node, self.why)
    }
}

impl From<Refused> for Status {
    fn from(refused: Refused) -> Self {
        Self::permission_denied(refused.to_string())
    }
}

/// The rules, and how often they refused.
#[derive(Debug, Default)]
pub struct Authorization {
    rules: Vec<Rule>,
    refused: [AtomicU64; Refusal::ALL.len()],
    failed_handshakes: AtomicU64,
}

impl Authorization {
    /// These rules. Without any, all may have everything.
    #[must_use]
    pub fn new(rules: Vec<Rule>) -> Self {
        Self { rules, ..Self::default() }
    }

    /// How often clients were refused for a reason.
    #[must_use]
    pub fn refused(&self, why: Refusal) -> u64 {
        self.refused[why as usize].load(Ordering::Relaxed)
    }

    /// How often a client and this server did not come to terms on TLS: clients without a good certificate, for example.
    #[must_use]
    pub fn failed_handshakes(&self) -> u64 {
        self.failed_handshakes.load(Ordering::Relaxed)
    }

    pub(super) fn handshake_failed(&self) {
        self.failed_handshakes.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether the client may have what this node is given.
    ///
    /// # Errors
    /// `PERMISSION_DENIED`, which is counted.
    pub fn check(&self, identity: &Identity, node: Option<&Node>) -> Result<(), Refused> {
        self.check_by(identity, node, |_| None)
    }

    /// Whether the client's word on the health of endpoints counts.
    ///
    /// # Errors
    /// `PERMISSION_DENIED`, which is counted.
    pub fn check_health(&self, identity: &Identity, node: Option<&Node>) -> Result<(), Refused> {
        self.check_by(identity, node, |rule| (!rule.health).then_some(Refusal::Health))
    }

    /// Whether a rule lets the node pass for which there is no further objection.
    fn check_by(
        &self,
        identity: &Identity,
        node: Option<&Node>,
        objection: impl Fn(&Rule) -> Option<Refusal>,
    ) -> Result<(), Refused> {
        if self.rules.is_empty() {
            return Ok(());
        }
        let mut outcome = Err(Refusal::Identity);
        match node {
            None => outcome = Err(Refusal::Nameless),
            Some(node) => {
                for rule in self.rules.iter().filter(|rule| rule.is_for(identity)) {
                    outcome = rule.check(node).and_then(|()| objection(rule).map_or(Ok(()), Err));
                    if outcome.is_ok() {
                        break;
                    }
                }
            }
        }
        outcome.map_err(|why| self.refuse(why, node.map(|node| node.id.as_str()).unwrap_or_default(), identity))
    }

    /// Which secrets the client may have when it is this node: those of each rule that lets it pass.
    #[must_use]
    pub fn secrets(&self, identity: &Identity, node: &Node) -> secrets::Access {
        let mut access = secrets::Access::default();
        for rule in self.rules.iter().filter(|rule| rule.is_for(identity) && rule.check(node).is_ok()) {
            access.names.extend(rule.secrets.iter().cloned());
            access.own = access.own.or_else(|| rule.own_secret.clone());
        }
        access
    }

    /// Whether any rule gives any secret.
    #[must_use]
    pub fn gives_secrets(rules: &[Rule]) -> bool {
        rules.iter().any(|rule| !rule.secrets.is_empty() || rule.own_secret.is_some())
    }

    /// Whether the client may ask what others have.
    ///
    /// # Errors
    /// `PERMISSION_DENIED`, which is counted.
    pub fn check_status(&self, identity: &Identity) -> Result<(), Refused> {
        let may = self.rules.is_empty() || self.rules.iter().any(|rule| rule.status && rule.is_for(identity));
        if may { Ok(()) } else { Err(self.refuse(Refusal::Status, "", identity)) }
    }

    fn refuse(&self, why: Refusal, id: &str, identity: &Identity) -> Refused {
        self.refused[why as usize].fetch_add(1, Ordering::Relaxed);
        let names = if why == Refusal::Identity { format!(": {}", names_of(identity)) } else { String::new() };
        Refused { node: id.to_owned(), why: format!("{why}{names}") }
    }
}

/// The names of a certificate as rules have them, the first few and not at any length.
fn names_of(identity: &Identity) -> String {
    const MOST: usize = 4;
    const LONGEST: usize = 200;
    let uris = identity.uris.iter().cloned();
    let names = uris.chain(identity.dns.iter().map(|name| format!("dns:{name}")));
    let shown =
        names.take(MOST).map(|name| name.chars().take(LONGEST).flat_map(char::escape_debug).collect::<String>());
    let shown = shown.collect::<Vec<_>>().join(", ");
    let more = if identity.uris.len() + identity.dns.len() > MOST { ", ..." } else { "" };
    if shown.is_empty() { "it has no URI and no DNS name".to_owned() } else { shown + more }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_is_what_its_certificate_lets_it_be() {
        let rules = "
- {identity: 'spiffe://mesh/ns/*/sa/proxy', nodes: ['node-*'], services: [users, payments.shop]}
- {identity: 'spiffe://mesh/ns/*/sa/proxy', nodes: [edge]}
- {identity: 'dns:*.Nodes.example'}
- {identity: 'spiffe://mesh/operator', nodes: [], status: true}
";
        let authorization = Authorization::new(serde_saphyr::from_str(rules).unwrap());
        let proxy = Identity { uris: vec!["spiffe://mesh/ns/a/sa/proxy".into()], dns: vec![] };
        let host = Identity { uris: vec![], dns: vec!["a.nodes.example".into()] };
        let other = Identity { uris: vec!["spiffe://other/ns/a/sa/proxy".into()], dns: vec!["x".into()] };
        let node = |id: &str, cluster: &str| Node { id: id.into(), cluster: cluster.into(), ..Default::default() };
        for (identity, node, expected) in [
            (&proxy, Some(node("node-1", "users")), None),
            (&proxy, Some(node("node-1", "payments.shop")), None),
            (&proxy, Some(node("node-1", "orders")), Some("edge")),
            (&proxy, Some(node("node-1", "")), Some("edge")),
            (&proxy, Some(node("edge", "")), None),
            (&proxy, None, Some("needs a node")),
            (&host, Some(node("anything", "")), None),
            (&other, Some(node("node-1", "users")), Some("no rule is for")),
        ] {
            match (authorization.check(identity, node.as_ref()), expected) {
                (Ok(()), None) => {}
                (Err(status), Some("edge")) => {
                    // The last rule that is for it says why.
                    assert!(status.to_string().contains("may not be used by a node of this id"), "{status}");
                }
                (Err(status), Some(text)) => assert!(status.to_string().contains(text), "{status}"),
                (outcome, _) => panic!("{identity:?} {node:?}: {outcome:?}"),
            }
        }
        let counts = Refusal::ALL.map(|why| authorization.refused(why));
        assert_eq!(counts, [1, 2, 0, 1, 0, 0]);
        let status = authorization.check_status(&host).unwrap_err();
        assert!(status.to_string().contains("may not be used to ask"), "{status}");
        let operator = Identity { uris: vec!["spiffe://mesh/operator".into()], dns: vec![] };
        assert!(authorization.check_status(&operator).is_ok());
        assert!(authorization.check(&operator, Some(&node("node-1", "users"))).is_err());
        let reporting = "[{identity: 'dns:a.nodes.example', health: true}, {identity: 'spiffe://mesh/*'}]";
        let reporting = Authorization::new(serde_saphyr::from_str(reporting).unwrap());
        assert!(reporting.check_health(&host, Some(&node("n", ""))).is_ok());
        assert!(reporting.check(&proxy, Some(&node("n", ""))).is_ok());
        let status = reporting.check_health(&proxy, Some(&node("n", ""))).unwrap_err();
        assert!(status.to_string().contains("may not be used to say which endpoints work"), "{status}");
        assert_eq!(reporting.refused(Refusal::Health), 1);
        let giving = "
- {identity: 'spiffe://mesh/*', nodes: [node-1], secrets: [users], own_secret: shop/a}
- {identity: 'spiffe://mesh/*', secrets: ['shop/*']}
";
        let giving = Authorization::new(serde_saphyr::from_str(giving).unwrap());
        let given = |id: &str| giving.secrets(&proxy, &node(id, "").clone());
        assert_eq!((given("node-1").names.len(), given("node-1").own.as_deref()), (2, Some("shop/a")));
        assert_eq!((given("node-2").names.len(), given("node-2").own), (1, None));
        assert_eq!(giving.secrets(&other, &node("node-1", "")), secrets::Access::default());
        assert!(Authorization::default().check(&other, None).is_ok(), "without rules nobody is refused");
    }
}

//! What discovery tells of overrides: the offloaded endpoints of clusters, and what their services have to say.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use culvert_xds_client::{
    api::culvert::overrides::v1::{OffloadedService, Override, OverrideShare},
    overrides::{Overrides, is_share_token},
};

use super::{
    refusal::Refusal,
    settings::{Actions, Sources},
};
use crate::config::FieldError;

/// Every offloaded endpoint that discovery lists, by cluster, with the services' policies.
#[derive(Debug, Default, PartialEq)]
pub struct OffloadedTable {
    by_cluster: HashMap<String, Offloaded>,
    /// What it is made of, to be shown.
    resources: Vec<OffloadedService>,
    /// By token.
    shares: HashMap<String, Share>,
}

/// A stored set of overrides.
#[derive(Debug, PartialEq)]
struct Share {
    /// In seconds since the epoch.
    expires: i64,
    overrides: Overrides,
}

/// An endpoint that overrides reach.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) address: SocketAddr,
    /// It is a tunnel's port, which nobody listens at once the tunnel is gone.
    pub(super) tunnel: bool,
}

/// What is known of one cluster.
#[derive(Debug, Default, PartialEq, Eq)]
struct Offloaded {
    by_revision: HashMap<String, Vec<Target>>,
    policy: Option<Arc<Policy>>,
}

/// What a service has to say about overrides of its requests.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Policy {
    pub(super) allowed: bool,
    /// `None`: all that the filter allows.
    pub(super) actions: Option<Actions>,
    /// `None`: all whom the filter allows.
    pub(super) sources: Option<Sources>,
}

impl OffloadedTable {
    /// The table of some resources.
    ///
    /// # Errors
    /// The first endpoint that cannot be reached, by a bad address or port; or what is wrong in a policy.
    pub fn from_resources<'a>(
        resources: impl IntoIterator<Item = &'a OffloadedService>,
    ) -> Result<OffloadedTable, FieldError> {
        let mut table = OffloadedTable::default();
        for service in resources {
            table.resources.push(service.clone());
            let cluster = table.by_cluster.entry(service.cluster_name.clone()).or_default();
            for (index, endpoint) in service.endpoints.iter().enumerate() {
                let path = |field| format!("endpoints[{index}].{field}");
                let ip = endpoint.address.parse().map_err(|_| {
                    FieldError::new(path("address"), format!("\"{}\" is not an IP address", endpoint.address))
                })?;
                let port = u16::try_from(endpoint.port)
                    .ok()
                    .filter(|port| *port != 0)
                    .ok_or_else(|| FieldError::new(path("port"), format!("{} is not a TCP port", endpoint.port)))?;
                let target = Target { address: SocketAddr::new(ip, port), tunnel: endpoint.tunnel };
                cluster.by_revision.entry(endpoint.revision.clone()).or_default().push(target);
            }
            if let Some(policy) = &service.policy {
                let sources = policy.sources.as_ref().map(|sources| Sources::parse(sources, "policy.sources"));
                let actions = Actions::parse(&policy.actions, "policy.actions")?;
                cluster.policy = Some(Arc::new(Policy {
                    allowed: policy.allowed,
                    actions: (!policy.actions.is_empty()).then_some(actions),
                    sources: sources.transpose()?,
                }));
            }
        }
        Ok(table)
    }

    /// This table with some shares.
    ///
    /// # Errors
    /// The first share with a token or overrides that make no sense.
    pub fn with_shares<'a>(
        mut self,
        shares: impl IntoIterator<Item = &'a OverrideShare>,
    ) -> Result<OffloadedTable, FieldError> {
        for share in shares {
            if !is_share_token(&share.token) {
                return Err(FieldError::new("token", "must be 8 to 64 of a-z0-9"));
            }
            let overrides = share.overrides.clone().ok_or_else(|| FieldError::new("overrides", "is missing"))?;
            overrides.check_shared().map_err(|error| FieldError::new("overrides", error.to_string()))?;
            self.shares.insert(share.token.clone(), Share { expires: share.expires, overrides });
        }
        Ok(self)
    }

    /// What a share stands for at a time in seconds since the epoch.
    pub(super) fn share(&self, token: &str, now: u64) -> Result<&Overrides, Refusal> {
        let share = self.shares.get(token).ok_or(Refusal::ShareUnknown)?;
        let ended = i64::try_from(now).is_ok_and(|now| now >= share.expires);
        if ended { Err(Refusal::ShareExpired) } else { Ok(&share.overrides) }
    }

    /// What it is made of.
    pub fn resources(&self) -> &[OffloadedService] {
        &self.resources
    }

    /// The clusters that something is known of.
    pub(super) fn clusters(&self) -> impl Iterator<Item = &str> {
        self.resources.iter().map(|service| &*service.cluster_name)
    }

    /// What the service of a cluster has to say.
    pub(super) fn policy(&self, cluster: &str) -> Option<Arc<Policy>> {
        self.by_cluster.get(cluster)?.policy.clone()
    }

    /// The endpoint that an override asks for, of those of a cluster: one of the revision's, or the one at the address.
    pub(super) fn find(&self, cluster: &str, wanted: &Override) -> Option<Target> {
        let revisions = &self.by_cluster.get(cluster)?.by_revision;
        if wanted.revision.is_empty() {
            let (ip, port) = wanted.wanted_address()?;
            return at(revisions, ip, port);
        }
        let endpoints = revisions.get(&wanted.revision)?;
        endpoints.get(fastrand::usize(..endpoints.len().max(1))).copied()
    }
}

/// The listed endpoint at an address. A service has few that are offloaded.
fn at(revisions: &HashMap<String, Vec<Target>>, ip: IpAddr, port: Option<u16>) -> Option<Target> {
    let is = |listed: SocketAddr| listed.ip() == ip && port.is_none_or(|port| port == listed.port());
    revisions.values().flatten().find(|listed| is(listed.address)).copied()
}

#[cfg(test)]
mod tests {
    use culvert_xds_client::api::culvert::overrides::v1::{self as api, Action, OffloadedEndpoint};

    use super::*;

    fn service(endpoint: OffloadedEndpoint, policy: Option<api::Policy>) -> OffloadedService {
        OffloadedService {
            cluster_name: "users.default:80".to_owned(),
            service: "users.default".to_owned(),
            endpoints: vec![endpoint],
            policy,
        }
    }

    fn endpoint(revision: &str, address: &str, port: u32) -> OffloadedEndpoint {
        OffloadedEndpoint {
            revision: revision.to_owned(),
            address: address.to_owned(),
            port,
            pod: String::new(),
            tunnel: false,
        }
    }

    #[test]
    fn only_what_is_listed_for_the_cluster_is_found() {
        let table = OffloadedTable::from_resources([&service(endpoint("feature-x", "10.1.0.9", 8080), None)]).unwrap();
        let revision = |revision: &str| Override { revision: revision.to_owned(), ..Override::default() };
        let address = |address: &str| Override { address: address.to_owned(), ..Override::default() };
        let listed = Some(Target { address: "10.1.0.9:8080".parse().unwrap(), tunnel: false });
        assert_eq!(table.find("users.default:80", &revision("feature-x")), listed);
        assert_eq!(table.find("users.default:80", &revision("feature-y")), None);
        assert_eq!(table.find("front.default:80", &revision("feature-x")), None);
        assert_eq!(table.find("users.default:80", &address("10.1.0.9")), listed);
        assert_eq!(table.find("users.default:80", &address("10.1.0.9:8080")), listed);
        assert_eq!(table.find("users.default:80", &address("10.1.0.9:22")), None, "no other port of a pod");
        assert_eq!(table.find("users.default:80", &address("10.1.0.8")), None);
        assert_eq!(table.find("front.default:80", &address("10.1.0.9")), None, "of another service");
        assert_eq!(table.policy("users.default:80"), None);
    }

    #[test]
    fn mistakes_are_named() {
        let error =
            |endpoint, policy| OffloadedTable::from_resources([&service(endpoint, policy)]).unwrap_err().to_string();
        let good = || endpoint("x", "10.0.0.1", 80);
        assert_eq!(error(endpoint("x", "nowhere", 80), None), "endpoints[0].address: \"nowhere\" is not an IP address");
        assert_eq!(error(endpoint("x", "10.0.0.1", 70000), None), "endpoints[0].port: 70000 is not a TCP port");
        let policy = api::Policy { actions: vec![Action::Route.into(), 77], ..api::Policy::default() };
        assert_eq!(error(good(), Some(policy)), "policy.actions[1]: 77 is no action");
        let sources = api::Sources { ranges: vec!["10.0.0.0".to_owned()], ..api::Sources::default() };
        let policy = api::Policy { sources: Some(sources), ..api::Policy::default() };
        assert!(
            error(good(), Some(policy)).starts_with("policy.sources.ranges[0]: \"10.0.0.0\" is not an address range")
        );
    }

    #[test]
    fn a_share_stands_for_its_overrides_until_it_ends() {
        let share = |token: &str, overrides| OverrideShare {
            token: token.to_owned(),
            name: "checkout".to_owned(),
            expires: 100,
            overrides,
        };
        let overrides = Overrides::new([("users", "feature-x")]).unwrap();
        let table = OffloadedTable::default().with_shares([&share("abcd2345", Some(overrides.clone()))]).unwrap();
        assert_eq!(table.share("abcd2345", 99), Ok(&overrides));
        assert_eq!(table.share("abcd2345", 100), Err(Refusal::ShareExpired));
        assert_eq!(table.share("abcd2346", 99), Err(Refusal::ShareUnknown));

        let nested = overrides.clone().with_share("abcd2345").unwrap();
        for (bad, expected) in [
            (share("x", Some(overrides)), "token: must be 8 to 64 of a-z0-9"),
            (share("abcd2345", None), "overrides: is missing"),
            (share("abcd2345", Some(nested)), "overrides: a share cannot stand for another share"),
        ] {
            let error = OffloadedTable::default().with_shares([&bad]).unwrap_err();
            assert_eq!(error.to_string(), expected);
        }
    }
}

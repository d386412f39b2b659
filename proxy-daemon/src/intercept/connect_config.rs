//! The checked configuration of what happens when processes connect: host mode, and balanced services.

use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};
use std::path::{Component, PathBuf};
use std::sync::Arc;

use culvert_proxy_ebpf::MAX_SERVICES;
use culvert_xds_client::api::culvert::extensions::bootstrap::interception::v1::interception::{
    self as message, connect_balancing::service::Protocol,
};

use super::config::{FailurePolicy, FieldError, absolute, at, failure};

/// Host processes whose connections are redirected when they connect.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostMode {
    /// Their cgroups: absolute paths, whose names may be shell globs. Empty: those that are enrolled by command.
    pub cgroups: Vec<PathBuf>,
    /// What happens to their connections while no daemon serves them.
    pub failure_policy: FailurePolicy,
}

/// Services that the kernel balances.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConnectBalancing {
    /// The cgroups of the processes that get it, as in [`HostMode`].
    pub cgroups: Vec<PathBuf>,
    /// The services that are named.
    pub services: Vec<BalancedService>,
    /// Also the plain TCP proxies of the outbound listener.
    pub tcp_proxies: bool,
}

/// A service that the kernel balances.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct BalancedService {
    /// What clients connect or send to.
    pub address: SocketAddr,
    /// UDP; else TCP.
    pub udp: bool,
    /// The cluster whose hosts serve it.
    pub cluster: Arc<str>,
}

impl HostMode {
    /// Checks the message; without a policy of its own it has `default_policy`.
    pub(super) fn from_proto(proto: &message::HostMode, default_policy: FailurePolicy) -> Result<Self, FieldError> {
        let message::HostMode { cgroups: paths, failure_policy } = proto;
        Ok(Self {
            cgroups: cgroups(paths, "host.cgroups")?,
            failure_policy: match failure_policy {
                Some(value) => failure(*value, "host.failure_policy")?,
                None => default_policy,
            },
        })
    }
}

impl ConnectBalancing {
    /// Checks the message.
    pub(super) fn from_proto(proto: &message::ConnectBalancing) -> Result<Self, FieldError> {
        let message::ConnectBalancing { cgroups: paths, services, tcp_proxies } = proto;
        if services.len() > MAX_SERVICES {
            let reason = format!("{} services; there can be {MAX_SERVICES} at most", services.len());
            return Err(("balancing.services".to_owned(), reason));
        }
        let mut seen = HashSet::new();
        let mut checked = Vec::with_capacity(services.len());
        for (index, service) in services.iter().enumerate() {
            let path = |field: &str| format!("balancing.services[{index}]{field}");
            let service = BalancedService::from_proto(service).map_err(|(field, reason)| (path(field), reason))?;
            if !seen.insert((service.address, service.udp)) {
                return Err((path(""), format!("{} is listed twice", service.address)));
            }
            checked.push(service);
        }
        if checked.is_empty() && !tcp_proxies {
            return Err(("balancing.services".to_owned(), "name a service, or set tcp_proxies".to_owned()));
        }
        if paths.is_empty() {
            let reason = "at least one cgroup v2 directory is needed".to_owned();
            return Err(("balancing.cgroups".to_owned(), reason));
        }
        let cgroups = cgroups(paths, "balancing.cgroups")?;
        Ok(Self { cgroups, services: checked, tcp_proxies: *tcp_proxies })
    }
}

impl BalancedService {
    fn from_proto(proto: &message::connect_balancing::Service) -> Result<Self, (&'static str, String)> {
        let message::connect_balancing::Service { address, port, protocol, cluster } = proto;
        let parsed: Option<IpAddr> = address.parse().ok().map(|address: IpAddr| address.to_canonical());
        let usable = parsed.filter(|it| !it.is_unspecified() && !it.is_loopback() && !it.is_multicast());
        let Some(ip) = usable else {
            return Err((".address", format!("`{address}` is not an IPv4 or IPv6 address that a service can have")));
        };
        let port = u16::try_from(*port).ok().filter(|port| *port != 0);
        let port = port.ok_or_else(|| (".port", "a port is a number from 1 to 65535".to_owned()))?;
        let udp = match Protocol::try_from(*protocol) {
            Ok(Protocol::Tcp) => false,
            Ok(Protocol::Udp) => true,
            Err(_) => return Err((".protocol", format!("{protocol} is neither TCP (0) nor UDP (1)"))),
        };
        if cluster.is_empty() {
            return Err((".cluster", "a cluster's name is needed".to_owned()));
        }
        Ok(Self { address: SocketAddr::new(ip, port), udp, cluster: cluster.as_str().into() })
    }
}

fn cgroups(paths: &[String], field: &str) -> Result<Vec<PathBuf>, FieldError> {
    let check = |(index, path): (usize, &String)| cgroup(path).map_err(|reason| at(field, index, reason));
    paths.iter().enumerate().map(check).collect()
}

/// The path of a cgroup; or what is wrong with it.
pub(super) fn cgroup(path: &str) -> Result<PathBuf, String> {
    let path = absolute(path)?;
    match path.components().any(|component| component == Component::ParentDir) {
        true => Err(format!("`{}` has `..` in it", path.display())),
        false => Ok(path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(address: &str, port: u32) -> message::connect_balancing::Service {
        let address = address.to_owned();
        message::connect_balancing::Service { address, port, protocol: 1, cluster: "dns".to_owned() }
    }

    fn balancing(services: Vec<message::connect_balancing::Service>) -> message::ConnectBalancing {
        let cgroups = vec!["/sys/fs/cgroup/kubepods.slice".to_owned()];
        message::ConnectBalancing { cgroups, services, tcp_proxies: false }
    }

    #[test]
    fn every_field_is_taken() {
        let host = message::HostMode { cgroups: vec!["/sys/fs/cgroup/a/b-*".to_owned()], failure_policy: None };
        let host = HostMode::from_proto(&host, FailurePolicy::Closed).unwrap();
        let cgroups = vec![PathBuf::from("/sys/fs/cgroup/a/b-*")];
        assert_eq!(host, HostMode { cgroups, failure_policy: FailurePolicy::Closed });

        let checked = ConnectBalancing::from_proto(&balancing(vec![service("::ffff:10.96.0.10", 53)])).unwrap();
        let expected = BalancedService { address: "10.96.0.10:53".parse().unwrap(), udp: true, cluster: "dns".into() };
        assert_eq!(checked.services, [expected]);
        assert!(!checked.tcp_proxies);
    }

    #[test]
    fn a_cgroup_has_host_mode_or_balancing() {
        use culvert_xds_client::api::culvert::extensions::bootstrap::interception::v1::Interception;

        let cgroups = |names: &[&str]| names.iter().map(|name| format!("/sys/fs/cgroup/{name}")).collect::<Vec<_>>();
        let both = |host: &[&str], balanced: &[&str]| Interception {
            host: Some(message::HostMode { cgroups: cgroups(host), failure_policy: None }),
            balancing: Some(message::ConnectBalancing {
                cgroups: cgroups(balanced),
                ..balancing(vec![service("10.96.0.10", 53)])
            }),
            ..Interception::default()
        };
        let (path, reason) =
            crate::intercept::InterceptionConfig::from_proto(&both(&["a", "b"], &["c", "b"])).unwrap_err();
        assert_eq!(path, "balancing.cgroups[1]");
        assert!(reason.contains("/sys/fs/cgroup/b is in host.cgroups already"), "{reason}");
        crate::intercept::InterceptionConfig::from_proto(&both(&["a"], &["c", "b"])).unwrap();
    }

    #[test]
    fn what_is_wrong_is_named_with_its_path() {
        let spoiled = |spoil: fn(&mut message::connect_balancing::Service)| {
            let mut one = service("10.96.0.10", 53);
            spoil(&mut one);
            balancing(vec![one])
        };
        let good = || service("10.96.0.10", 53);
        for (message, path, words) in [
            (balancing(vec![]), "balancing.services", "tcp_proxies"),
            (balancing(vec![good(), good()]), "balancing.services[1]", "twice"),
            (spoiled(|it| it.address = "dns".to_owned()), "balancing.services[0].address", "`dns` is not"),
            (spoiled(|it| it.address = "127.0.0.1".to_owned()), "balancing.services[0].address", "`127.0.0.1` is not"),
            (spoiled(|it| it.port = 0), "balancing.services[0].port", "1 to 65535"),
            (spoiled(|it| it.protocol = 7), "balancing.services[0].protocol", "neither TCP"),
            (spoiled(|it| it.cluster.clear()), "balancing.services[0].cluster", "name is needed"),
            (
                message::ConnectBalancing { cgroups: vec![], ..balancing(vec![good()]) },
                "balancing.cgroups",
                "at least one",
            ),
        ] {
            let (found, reason) = ConnectBalancing::from_proto(&message).expect_err(path);
            assert_eq!(found, path);
            assert!(reason.contains(words), "{path}: {reason}");
        }
        for (path, words) in [("kubepods", "absolute"), ("/sys/../etc", "`..`")] {
            let message = message::HostMode { cgroups: vec![path.to_owned()], failure_policy: None };
            let (found, reason) = HostMode::from_proto(&message, FailurePolicy::Open).expect_err(path);
            assert_eq!(found, "host.cgroups[0]");
            assert!(reason.contains(words), "{reason}");
        }
    }
}

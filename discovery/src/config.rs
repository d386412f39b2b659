//! What discovery is told: the command line and the configuration file.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use culvert_xds_client::api::culvert::extensions::filters::http::overrides::v1::Override;
use culvert_xds_client::json;
use serde::Deserialize;

use crate::mesh::Protocol;
use crate::overrides::{self, tunnels};
use crate::registration::Settings;
use crate::registration::store::Storage;
use crate::registry::ClusterInfo;
use crate::resources::Options;
use crate::resources::edge::EdgeOptions;
use crate::server;
use crate::server::authorization::{Authorization, Rule};
use crate::server::tls::TlsFiles;
use crate::source::api_server::config::KubernetesConfig;

/// A cluster and where its objects are read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterConfig {
    /// Name, region and zone.
    pub info: ClusterInfo,
    /// Where its objects are read.
    pub source: SourceConfig,
    /// Whether it starts drained.
    pub drained: bool,
}

/// Where a cluster's objects are read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SourceConfig {
    /// A directory of manifests.
    Manifests(PathBuf),
    /// An API server.
    Kubernetes(Box<KubernetesConfig>),
}

/// How long to wait for clusters that cannot be read, if nothing was said.
pub const INITIAL_WAIT: Duration = Duration::from_secs(30);

/// Everything that is configured.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where xDS is served.
    pub listen: SocketAddr,
    /// Where the status pages are served.
    pub http: SocketAddr,
    /// The clusters; in a conflict the first one counts.
    pub clusters: Vec<ClusterConfig>,
    /// The registration API, if it is served.
    pub registration: Option<Settings>,
    /// Shares of overrides and tunnels.
    pub overrides: crate::overrides::Settings,
    /// How clusters are drained.
    pub drain: crate::drain::Settings,
    /// How long to wait at most for clusters that cannot be read, before the others are served without them.
    pub initial_wait: Duration,
    /// What goes into the resources.
    pub options: Options,
    /// How xDS is served.
    pub serving: server::Settings,
    /// A directory of secrets.
    pub secrets: Option<PathBuf>,
}

/// The configuration file. A flag of the same name takes precedence; clusters of both are joined.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConfigFile {
    /// Where xDS is served.
    pub listen: Option<SocketAddr>,
    /// Where the status pages are served.
    pub http: Option<SocketAddr>,
    /// The port of the proxies' outbound listener.
    pub outbound_port: Option<u16>,
    /// The address of the proxies' outbound listener.
    pub outbound_address: Option<std::net::IpAddr>,
    /// The port of sidecars' inbound listener.
    pub inbound_port: Option<u16>,
    /// How edge proxies are configured.
    pub edge: Option<EdgeOptions>,
    /// The proxies' access log file.
    pub access_log: Option<String>,
    /// How long to wait for clusters that cannot be read, in seconds.
    pub initial_wait: Option<u64>,
    /// Where it is kept which clusters are drained.
    pub drain_file: Option<PathBuf>,
    /// A file with the token of operators on other hosts.
    pub operator_token_file: Option<PathBuf>,
    /// TLS of the xDS port.
    pub tls: Option<TlsFiles>,
    /// Who may have what.
    #[serde(default)]
    pub authorization: Vec<Rule>,
    /// How often proxies report loads, in seconds.
    pub load_report_interval: Option<std::num::NonZeroU32>,
    /// Where secrets are.
    pub secrets: Option<ConfigFileSecrets>,
    /// How often proxies that check endpoints report, in seconds.
    pub health_report_interval: Option<std::num::NonZeroU32>,
    /// How many proxies check each endpoint.
    pub health_checkers: Option<std::num::NonZeroUsize>,
    /// The clusters.
    #[serde(default)]
    pub clusters: Vec<ConfigFileCluster>,
    /// The registration API.
    pub registration: Option<ConfigFileRegistration>,
    /// The proxies' override filter: the fields of `culvert.extensions.filters.http.overrides.v1.Override`.
    pub override_filter: Option<serde_json::Value>,
    /// Shares of overrides and tunnels.
    pub overrides: Option<ConfigFileOverrides>,
}

/// Where secrets are, in the configuration file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConfigFileSecrets {
    /// A directory with a directory for each.
    pub directory: PathBuf,
}

/// Shares of overrides and tunnels in the configuration file.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConfigFileOverrides {
    storage: Option<String>,
    token_file: Option<PathBuf>,
    max_shares: Option<usize>,
    tunnels: Option<ConfigFileTunnels>,
}

/// Where tunnels are, in the configuration file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConfigFileTunnels {
    address: std::net::IpAddr,
    /// `FIRST-LAST`.
    ports: String,
    max_connections: Option<usize>,
    /// In seconds.
    quarantine: Option<u64>,
}

impl TryFrom<ConfigFileOverrides> for overrides::Settings {
    type Error = anyhow::Error;

    fn try_from(file: ConfigFileOverrides) -> anyhow::Result<Self> {
        let ConfigFileOverrides { storage, token_file, max_shares, tunnels } = file;
        let defaults = Self::default();
        let storage = storage.map(|text| text.parse()).transpose();
        let tunnels = tunnels.map(|ConfigFileTunnels { address, ports, max_connections, quarantine }| {
            let settings: tunnels::Settings = format!("[{address}]:{ports}").parse()?;
            let max_connections = max_connections.unwrap_or(settings.max_connections);
            let quarantine = quarantine.map_or(settings.quarantine, Duration::from_secs);
            tunnels::Settings { max_connections, quarantine, ..settings }.checked()
        });
        Ok(Self {
            storage: storage
                .map_err(|error| anyhow::anyhow!("overrides.storage: {error}"))?
                .unwrap_or(defaults.storage),
            token_file,
            max_shares: max_shares.unwrap_or(defaults.max_shares),
            tunnels: tunnels.transpose().map_err(|error| anyhow::anyhow!("overrides.tunnels: {error}"))?,
        })
    }
}

/// A cluster in the configuration file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConfigFileCluster {
    name: String,
    manifests: Option<PathBuf>,
    kubernetes: Option<Box<KubernetesConfig>>,
    #[serde(default)]
    region: String,
    #[serde(default)]
    zone: String,
    /// Whether its services are one with those of their names in other clusters.
    #[serde(default = "yes")]
    merge: bool,
    #[serde(default)]
    drained: bool,
}

fn yes() -> bool {
    true
}

impl TryFrom<ConfigFileCluster> for ClusterConfig {
    type Error = anyhow::Error;

    fn try_from(cluster: ConfigFileCluster) -> anyhow::Result<Self> {
        let ConfigFileCluster { name, manifests, kubernetes, region, zone, merge, drained } = cluster;
        let source = match (manifests, kubernetes) {
            (Some(manifests), None) => SourceConfig::Manifests(manifests),
            (None, Some(kubernetes)) => SourceConfig::Kubernetes(kubernetes),
            _ => bail!("cluster `{name}`: one of `manifests` and `kubernetes` is needed"),
        };
        Ok(Self { info: ClusterInfo { name, region, zone, apart: !merge }, source, drained })
    }
}

/// The registration API in the configuration file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConfigFileRegistration {
    storage: String,
    /// In seconds.
    ttl: Option<u32>,
    env: Option<String>,
    namespace: Option<String>,
    port: Option<u16>,
    protocol: Option<String>,
    max_hosts: Option<usize>,
}

impl TryFrom<ConfigFileRegistration> for Settings {
    type Error = anyhow::Error;

    fn try_from(file: ConfigFileRegistration) -> anyhow::Result<Self> {
        let ConfigFileRegistration { storage, ttl, env, namespace, port, protocol, max_hosts } = file;
        let storage = storage.parse().map_err(|error| anyhow::anyhow!("registration.storage: {error}"))?;
        let defaults = Self::new(storage);
        let protocol = protocol.map(|name| {
            let unknown = || format!("registration.protocol: `{name}` is not tcp, http, http2 or grpc");
            if name == "tcp" { Ok(Protocol::Tcp) } else { Protocol::parse(&name).with_context(unknown) }
        });
        let settings = Self {
            ttl: ttl.map_or(defaults.ttl, |seconds| Duration::from_secs(seconds.into())),
            env: env.unwrap_or(defaults.env),
            namespace: namespace.unwrap_or(defaults.namespace),
            port: port.unwrap_or(defaults.port),
            protocol: protocol.transpose()?.unwrap_or(defaults.protocol),
            max_hosts: max_hosts.unwrap_or(defaults.max_hosts),
            storage: defaults.storage,
        };
        ensure!(settings.ttl > Duration::ZERO, "registration.ttl: 0 would remove each host at once");
        ensure!(settings.port != 0, "registration.port: 0 is not a port");
        let is_label = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        ensure!(
            !settings.namespace.is_empty() && settings.namespace.bytes().all(is_label),
            "registration.namespace: `{}` is not a namespace (a-z, 0-9 and `-`)",
            settings.namespace
        );
        Ok(settings)
    }
}

/// Reads `override_filter`.
///
/// # Errors
/// The field that is unknown or of the wrong kind.
pub fn override_filter(stated: Option<serde_json::Value>) -> anyhow::Result<Override> {
    let Some(stated) = stated else { return Ok(Override::default()) };
    let config: Override = json::from_json(stated).map_err(|error| anyhow::anyhow!("override_filter.{error}"))?;
    ensure!(config.original_dst_cluster.is_empty(), "override_filter.original_dst_cluster: discovery has its own");
    Ok(config)
}

impl ConfigFile {
    /// Reads a configuration file.
    ///
    /// # Errors
    /// When it cannot be read, is not YAML, or has a field that is unknown or of the wrong kind.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let options = serde_saphyr::options! { with_snippet: false };
        let file: Option<Self> = serde_saphyr::from_str_with_options(&text, options)
            .map_err(|error| anyhow::anyhow!("{}: {}", path.display(), error.to_string().replace('\n', " ")))?;
        Ok(file.unwrap_or_default())
    }
}

/// Reads `name=WHERE[,region=R][,zone=Z]`, where WHERE is a directory, `kubeconfig:FILE` or `in-cluster`.
///
/// # Errors
/// With what is missing or unknown.
pub fn parse_cluster(text: &str) -> anyhow::Result<ClusterConfig> {
    const FORM: &str = "expected name=DIR[,region=REGION][,zone=ZONE], for example east=/etc/culvert/east,zone=east-1a; in \
                        the place of DIR, kubeconfig:FILE[,context=CONTEXT] or in-cluster";
    let (name, rest) = text.split_once('=').context(FORM)?;
    let mut parts = rest.split(',');
    let place = parts.next().unwrap_or_default();
    ensure!(!place.is_empty(), "the directory of cluster `{name}` is missing; {FORM}");
    let mut source = match place.strip_prefix("kubeconfig:") {
        Some(file) => {
            ensure!(!file.is_empty(), "the kubeconfig of cluster `{name}` is missing; {FORM}");
            let kubeconfig = Some(PathBuf::from(file));
            SourceConfig::Kubernetes(Box::new(KubernetesConfig { kubeconfig, ..Default::default() }))
        }
        None if place == "in-cluster" => {
            SourceConfig::Kubernetes(Box::new(KubernetesConfig { in_cluster: true, ..Default::default() }))
        }
        None => SourceConfig::Manifests(PathBuf::from(place)),
    };
    let mut info = ClusterInfo { name: name.to_owned(), ..Default::default() };
    for part in parts {
        match (part.split_once('='), &mut source) {
            (Some(("region", value)), _) => value.clone_into(&mut info.region),
            (Some(("zone", value)), _) => value.clone_into(&mut info.zone),
            (Some(("context", value)), SourceConfig::Kubernetes(config)) => config.context = Some(value.to_owned()),
            _ => bail!("`{part}` is not understood; {FORM} (a directory with a comma goes into the config file)"),
        }
    }
    Ok(ClusterConfig { info, source, drained: false })
}

/// Checks what must hold before anything starts.
///
/// # Errors
/// For no cluster, an empty or repeated name, a directory that is not there, or port 0 for proxies.
pub fn check(config: &Config) -> anyhow::Result<()> {
    ensure!(
        !config.clusters.is_empty() || config.registration.is_some(),
        "no cluster is configured; name at least one with --cluster name=DIR or in the config file's `clusters`, or have \
         services register themselves (--registration)"
    );
    let mut names = BTreeSet::new();
    for ClusterConfig { info, source, .. } in &config.clusters {
        let location = match source {
            SourceConfig::Manifests(manifests) => manifests.display().to_string(),
            SourceConfig::Kubernetes(kubernetes) => kubernetes.location(),
        };
        ensure!(!info.name.is_empty(), "the cluster that reads {location} has no name");
        ensure!(names.insert(&info.name), "two clusters are called `{}`; rename one of them", info.name);
        if info.apart {
            let label = |name: &str| name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
            ensure!(
                label(&info.name),
                "cluster `{}`: with `merge: false` the name becomes a part of host names: a-z, 0-9 and `-` are possible",
                info.name
            );
        }
        match source {
            SourceConfig::Manifests(manifests) => {
                let metadata = std::fs::metadata(manifests)
                    .with_context(|| format!("cluster `{}`: cannot read {location}", info.name))?;
                ensure!(metadata.is_dir(), "cluster `{}`: {location} is not a directory", info.name);
            }
            SourceConfig::Kubernetes(kubernetes) => {
                kubernetes.check().map_err(|error| anyhow::anyhow!("cluster `{}`: {error}", info.name))?;
            }
        }
    }
    let has_authorities = config.serving.tls.as_ref().is_some_and(|tls| tls.client_authorities.is_some());
    ensure!(
        config.serving.rules.is_empty() || has_authorities,
        "authorization: goes by clients' certificates, and none are asked for; name `tls.client_authorities`"
    );
    let read = config.clusters.iter().any(|cluster| match &cluster.source {
        SourceConfig::Kubernetes(kubernetes) => kubernetes.secrets,
        SourceConfig::Manifests(_) => false,
    });
    ensure!(
        !(read || config.secrets.is_some()) || Authorization::gives_secrets(&config.serving.rules),
        "secrets are read, and nobody may have any: say in `authorization` who may (`secrets`, `own_secret`)"
    );
    if let (Some(registration), Storage::Embedded(path)) = (&config.registration, &config.overrides.storage) {
        let other = &registration.storage;
        ensure!(
            *other != Storage::Embedded(path.clone()),
            "registrations and shares of overrides cannot be in one file ({}): name another for one of them",
            path.display()
        );
    }
    ensure!(
        config.overrides.tunnels.is_none() || config.overrides.token_file.is_some(),
        "tunnels need the developers' token: `overrides.token_file` (--developer-token-file)"
    );
    let Options { outbound_port, inbound_port, edge, .. } = &config.options;
    ensure!(*outbound_port != 0, "the outbound port of proxies cannot be 0");
    ensure!(*inbound_port != 0, "inbound_port: 0 is not a port");
    ensure!(outbound_port != inbound_port, "inbound_port: {inbound_port} is the outbound port of proxies, too");
    edge.as_ref().map_or(Ok(()), |edge| edge.check([*outbound_port, *inbound_port])).map_err(anyhow::Error::msg)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clusters_on_the_command_line() {
        let cluster = parse_cluster("east=kubeconfig:/k,context=c,zone=z").unwrap();
        let SourceConfig::Kubernetes(kubernetes) = cluster.source else { panic!("not an API server") };
        assert_eq!((kubernetes.kubeconfig, kubernetes.context.as_deref()), (Some("/k".into()), Some("c")));
        let cluster = parse_cluster("east=in-cluster").unwrap();
        assert!(matches!(cluster.source, SourceConfig::Kubernetes(kubernetes) if kubernetes.in_cluster));
        let cluster = parse_cluster("east=/m/east,region=eu,zone=eu-1").unwrap();
        let info = ClusterInfo { name: "east".into(), region: "eu".into(), zone: "eu-1".into(), apart: false };
        let source = SourceConfig::Manifests("/m/east".into());
        assert_eq!(cluster, ClusterConfig { info, source, drained: false });
        for (text, expected) in [
            ("east", "expected name=DIR"),
            ("east=", "the directory of cluster `east` is missing"),
            ("east=kubeconfig:", "the kubeconfig of cluster `east` is missing"),
            ("east=/m,context=x", "`context=x` is not understood"),
            ("east=/m,rgion=x", "`rgion=x` is not understood"),
        ] {
            let error = parse_cluster(text).unwrap_err().to_string();
            assert!(error.contains(expected), "{error:?} does not contain {expected:?}");
        }
    }

    #[test]
    fn the_override_filter_is_configured_by_its_own_fields() {
        let stated = |json: serde_json::Value| override_filter(Some(json)).map_err(|error| error.to_string());
        let config = stated(serde_json::json!({ "actions": ["DELAY"], "limits": { "delay_ms": 5 } })).unwrap();
        assert_eq!(config.limits.unwrap().delay_ms, Some(5));
        assert_eq!(override_filter(None).unwrap(), Override::default());
        for (json, expected) in [
            (serde_json::json!({ "action": ["DELAY"] }), "override_filter.action: "),
            (serde_json::json!({ "actions": ["EVERYTHING"] }), "override_filter.actions[0]: "),
            (serde_json::json!({ "original_dst_cluster": "x" }), "discovery has its own"),
        ] {
            let error = stated(json).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn config_files_are_strict() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("discovery.yaml");
        std::fs::write(&path, "listen: 127.0.0.1:1\nclusters:\n- {name: a, manifests: /m, zone: z}\n").unwrap();
        let file = ConfigFile::read(&path).unwrap();
        assert_eq!((file.listen.map(|a| a.port()), file.clusters.len()), (Some(1), 1));
        std::fs::write(&path, "clusters:\n- {name: a, manifest: /m}\n").unwrap();
        let error = ConfigFile::read(&path).unwrap_err().to_string();
        assert!(error.contains("discovery.yaml") && error.contains("`manifest`"), "{error}");
        assert!(!error.contains('\n'), "{error}");
        std::fs::write(&path, "# nothing\n").unwrap();
        assert!(ConfigFile::read(&path).unwrap().clusters.is_empty());
    }

    #[test]
    fn tunnels_and_shares_are_configured() {
        let read = |text: &str| {
            let file: ConfigFile = serde_saphyr::from_str(text).unwrap();
            overrides::Settings::try_from(file.overrides.unwrap()).map_err(|error| error.to_string())
        };
        let settings = read(
            "overrides: {storage: 'redb:/x', token_file: /t, max_shares: 5, tunnels: {address: 10.0.0.5, ports: 7-9}}",
        );
        let expected = overrides::Settings {
            storage: Storage::Embedded("/x".into()),
            token_file: Some("/t".into()),
            max_shares: 5,
            tunnels: Some("10.0.0.5:7-9".parse().unwrap()),
        };
        assert_eq!(settings, Ok(expected));
        assert_eq!(read("overrides: {}"), Ok(overrides::Settings::default()));
        for (text, expected) in [
            ("overrides: {storage: disk}", "overrides.storage: `disk` is not"),
            ("overrides: {tunnels: {address: '::', ports: 7-9}}", "overrides.tunnels: :: is not an address"),
            ("overrides: {tunnels: {address: '::1', ports: 9-7}}", "overrides.tunnels: 9-7 has no port"),
            ("overrides: {tunnels: {address: '::1', ports: '7', max_connections: 0}}", "0 connections"),
            (
                "overrides: {tunnels: {address: '::1', ports: '7', quarantine: 4000}}",
                "overrides.tunnels: quarantine: at most",
            ),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
        let config = |registration: Option<&str>, overrides: overrides::Settings| {
            let registration = registration.map(|text| Settings::new(text.parse().unwrap()));
            check(&Config {
                listen: ([127, 0, 0, 1], 0).into(),
                http: ([127, 0, 0, 1], 0).into(),
                clusters: Vec::new(),
                registration: registration.or_else(|| Some(Settings::new(Storage::Memory))),
                serving: server::Settings::default(),
                secrets: None,
                overrides,
                initial_wait: INITIAL_WAIT,
                drain: crate::drain::Settings::default(),
                options: Options::default(),
            })
        };
        let stored = |text: &str| overrides::Settings { storage: text.parse().unwrap(), ..Default::default() };
        assert!(config(Some("redb:/x"), stored("redb:/y")).is_ok());
        let error = config(Some("redb:/x"), stored("redb:/x")).unwrap_err().to_string();
        assert!(error.contains("cannot be in one file (/x)"), "{error}");
        let tunnels = overrides::Settings { tunnels: "10.0.0.5:7-9".parse().ok(), ..Default::default() };
        let error = config(None, tunnels).unwrap_err().to_string();
        assert!(error.contains("tunnels need the developers' token"), "{error}");
    }

    #[test]
    fn configurations_that_cannot_work_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let cluster = |name: &str, path: &Path| ClusterConfig {
            info: ClusterInfo { name: name.into(), ..Default::default() },
            source: SourceConfig::Manifests(path.into()),
            drained: false,
        };
        let config = |clusters| Config {
            listen: ([127, 0, 0, 1], 0).into(),
            http: ([127, 0, 0, 1], 0).into(),
            clusters,
            registration: None,
            overrides: overrides::Settings::default(),
            initial_wait: INITIAL_WAIT,
            drain: crate::drain::Settings::default(),
            options: Options::default(),
            serving: server::Settings::default(),
            secrets: None,
        };
        let good = directory.path();
        let missing = directory.path().join("missing");
        assert!(check(&config(vec![cluster("a", good)])).is_ok());
        let mut unknown = config(vec![cluster("a", good)]);
        unknown.serving.rules = serde_saphyr::from_str("[{identity: 'spiffe://mesh/*'}]").unwrap();
        let error = check(&unknown).unwrap_err().to_string();
        assert!(error.contains("name `tls.client_authorities`"), "{error}");
        let mut secrets = config(vec![cluster("a", good)]);
        secrets.secrets = Some(good.into());
        let error = check(&secrets).unwrap_err().to_string();
        assert!(error.contains("nobody may have any"), "{error}");
        for (clusters, expected) in [
            (vec![], "no cluster is configured"),
            (vec![cluster("a", good), cluster("a", good)], "two clusters are called `a`"),
            (vec![cluster("", good)], "has no name"),
            (vec![cluster("a", &missing)], "cluster `a`: cannot read"),
        ] {
            let error = check(&config(clusters)).unwrap_err().to_string();
            assert!(error.contains(expected), "{error:?} does not contain {expected:?}");
        }
    }
}

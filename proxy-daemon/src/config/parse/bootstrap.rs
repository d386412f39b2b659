use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::SocketAddr,
    path::PathBuf,
    sync::Arc,
};

use culvert_xds_client::{
    ads::{Variant, type_url, xdstp},
    api::culvert::extensions::bootstrap::interception::v1::Interception,
    json::unpack,
    source::{GrpcService, GrpcSource, Server, Source},
    sources::{Config as SourcesConfig, unsupported},
};
use envoy_types::pb::envoy::{
    config::{
        bootstrap::v3::{Bootstrap as ProtoBootstrap, bootstrap::DynamicResources},
        cluster::v3::Cluster,
        core::v3::ApiConfigSource,
        listener::v3::Listener as ProtoListener,
    },
    extensions::transport_sockets::tls::v3::Secret as ProtoSecret,
};
use prost::Name;

use super::{
    bind::upstream_bind,
    cluster,
    common::{Result, ip, socket_address},
    config_source::{ads_source, config_source},
    dns,
    layered_runtime::layered_runtime,
    listener, secret, secret_files,
    support::{self, join},
};
use crate::{
    config::{
        FieldError,
        model::{
            ClusterConfig, ConfigSource, Discovery, DnsResolver, HttpConnectionManagerConfig, Listener, LocalNode,
            Locality, ResourceRef, ScopeSource, Secret, SecretName, SecretRef, SecretType, UpstreamBind,
            UpstreamProtocol,
        },
    },
    http::filters::HttpFilterFactory,
    intercept::InterceptionConfig,
    layered_runtime::{Layer, LayerSource},
    tls,
    upstream::ClusterStats,
};

/// A checked bootstrap.
#[derive(Debug)]
pub struct Bootstrap {
    /// Who this daemon is, for the control plane; the aggregated discovery service, where there is one; and the servers
    /// that a config source may name, by cluster. Those with TLS cannot be reached before [`tls::secure_servers`].
    pub sources: SourcesConfig,
    /// Where the admin interface listens; `None`: nowhere.
    pub admin: Option<SocketAddr>,
    /// Clusters of the bootstrap.
    pub clusters: Vec<ClusterConfig>,
    /// Secrets of the bootstrap.
    pub secrets: Vec<StaticSecret>,
    /// Listeners of the bootstrap.
    pub listeners: Vec<Listener>,
    /// Where load reports go.
    pub load_stats: Option<GrpcService>,
    /// Who says what to check, and is told how it is.
    pub health_discovery: Option<GrpcService>,
    /// Where clusters come from, besides the bootstrap.
    pub cds: Option<ConfigSource>,
    /// Which of them, where not all: a collection, by its xdstp name.
    pub cds_collection: Option<String>,
    /// Where listeners come from, besides the bootstrap.
    pub lds: Option<ConfigSource>,
    /// Which of them, where not all: a collection, by its xdstp name.
    pub lds_collection: Option<String>,
    /// The layers of runtime values, of which the later win.
    pub runtime: Vec<Layer>,
    /// The extension `culvert.bootstrap.interception`.
    pub interception: Option<InterceptionConfig>,
    /// Where this node is, and which cluster it is of.
    pub local: LocalNode,
    /// `cluster_manager.outlier_detection.event_log_path`
    pub outlier_log: Option<PathBuf>,
    /// Who is asked for the addresses of names where a cluster names nobody.
    pub resolver: DnsResolver,
    /// `cluster_manager.upstream_bind_config`: where connections of all clusters come from that do not say it themselves.
    pub bind: Option<Arc<UpstreamBind>>,
    /// What is deprecated in it: where, and what to write instead.
    pub warnings: Vec<FieldError>,
}

impl Bootstrap {
    /// Whether anything comes from somewhere else. As in Envoy the node must have a name then, even where the source is a file.
    pub fn has_sources(&self) -> bool {
        let is_discovered = |(_, secret): (SecretType, &SecretRef)| matches!(secret, SecretRef::Discovered(_));
        let of_cluster = |cluster: &ClusterConfig| {
            matches!(cluster.discovery, Discovery::Eds { .. }) || cluster.secrets().any(is_discovered)
        };
        let is_srds = |manager: &HttpConnectionManagerConfig| {
            manager.scoped().is_some_and(|scoped| matches!(scoped.scopes, ScopeSource::Srds { .. }))
        };
        let of_listener = |listener: &Listener| {
            listener.rds().next().is_some()
                || listener.discovered_filters().next().is_some()
                || listener.secrets().any(is_discovered)
                || listener.connection_managers().any(|manager| is_srds(manager))
        };
        self.sources.ads.is_some()
            || self.cds.is_some()
            || self.lds.is_some()
            || self.runtime.iter().any(|layer| matches!(layer.source, LayerSource::Rtds(_)))
            || self.clusters.iter().any(of_cluster)
            || self.listeners.iter().any(of_listener)
    }
}

/// A secret of the bootstrap.
#[derive(Debug)]
pub struct StaticSecret {
    /// Its name.
    pub name: SecretName,
    /// What it is now.
    pub secret: Secret,
    /// Where its files are read again when something is moved into a directory: how, and which directory.
    pub followed: Option<(ProtoSecret, PathBuf)>,
}

/// A checked bootstrap.
///
/// # Errors
/// The field that is wrong or not honoured.
pub fn bootstrap(message: &ProtoBootstrap) -> Result<Bootstrap> {
    let warnings = support::check_bootstrap(message)?;
    let resources = message.static_resources.clone().unwrap_or_default();
    let secrets = static_secrets(&resources.secrets)?;
    let clusters = resources.clusters.iter().enumerate();
    let clusters = clusters.map(|(index, item)| cluster(item, &format!("static_resources.clusters[{index}]")));
    let clusters: Vec<_> = clusters.collect::<Result<_>>()?;
    let listeners = resources.listeners.iter().enumerate();
    let listeners = listeners.map(|(index, item)| listener(item, &format!("static_resources.listeners[{index}]")));
    let listeners: Vec<_> = listeners.collect::<Result<_>>()?;
    unique("clusters", clusters.iter().map(|cluster| &*cluster.name))?;
    unique("listeners", listeners.iter().map(|listener| &*listener.name))?;
    distinct_addresses(&listeners)?;

    let dynamic = message.dynamic_resources.clone().unwrap_or_default();
    let servers = servers(&clusters);
    let node = message.node.clone().unwrap_or_default();
    let unsupported = out_of_reach(&clusters);
    let mut sources = SourcesConfig { node, servers, unsupported, ..SourcesConfig::default() };
    let (cds, lds) = dynamic_resources(&dynamic, &mut sources)?;
    let cds_collection = collection(&dynamic.cds_resources_locator, cds.as_ref(), "cds", &Cluster::full_name())?;
    let lds_collection = collection(&dynamic.lds_resources_locator, lds.as_ref(), "lds", &ProtoListener::full_name())?;
    static_sources(&listeners, &clusters, &sources)?;
    let load_stats = message.cluster_manager.as_ref().and_then(|manager| manager.load_stats_config.as_ref());
    let service = |config: Option<&ApiConfigSource>, path: &str| {
        let source = config.map(|config| grpc_client(config, &sources, path)).transpose()?;
        Ok::<_, FieldError>(source.map(|source| source.service))
    };
    let load_stats = service(load_stats, "cluster_manager.load_stats_config")?;
    let health_discovery = service(message.hds_config.as_ref(), "hds_config")?;
    known_clusters(&listeners, &clusters)?;
    for (index, listener) in listeners.iter().enumerate() {
        known_secrets(listener.secrets(), &secrets, &sources, &format!("static_resources.listeners[{index}]"))?;
    }
    for (index, cluster) in clusters.iter().enumerate() {
        known_secrets(cluster.secrets(), &secrets, &sources, &format!("static_resources.clusters[{index}]"))?;
    }
    let admin = match message.admin.as_ref().and_then(|admin| admin.address.as_ref()) {
        Some(address) => {
            let (socket, port) = socket_address(address, "admin.address")?;
            Some((ip(socket, "admin.address")?, port).into())
        }
        None => None,
    };
    #[expect(deprecated, reason = "still the usual way to write it")]
    let log_path = message.admin.as_ref().map(|admin| admin.access_log_path.clone()).unwrap_or_default();
    if !matches!(log_path.as_str(), "" | "/dev/null") {
        return Err(FieldError::unsupported("admin.access_log_path"));
    }
    let runtime = layered_runtime(message, &sources)?;
    let local = local_node(message, &clusters)?;
    let outlier = message.cluster_manager.as_ref().and_then(|manager| manager.outlier_detection.as_ref());
    let outlier_log = outlier.map(|config| PathBuf::from(&config.event_log_path));
    let bind = message.cluster_manager.as_ref().and_then(|manager| manager.upstream_bind_config.as_ref());
    let bind = bind.map(|bind| upstream_bind(bind, "cluster_manager.upstream_bind_config")).transpose()?;
    let interception = interception(message, lds.is_none().then_some(&*listeners))?;
    Ok(Bootstrap {
        bind: bind.map(Arc::new),
        local,
        outlier_log: outlier_log.filter(|path| !path.as_os_str().is_empty()),
        sources,
        admin,
        clusters,
        secrets,
        listeners,
        load_stats,
        health_discovery,
        cds,
        cds_collection,
        lds,
        lds_collection,
        runtime,
        interception,
        resolver: dns::of_bootstrap(message)?,
        warnings,
    })
}

fn local_node(message: &ProtoBootstrap, clusters: &[ClusterConfig]) -> Result<LocalNode> {
    let locality = message.node.as_ref().and_then(|node| node.locality.clone()).unwrap_or_default();
    let name = message.cluster_manager.as_ref().map_or("", |manager| &manager.local_cluster_name);
    if !name.is_empty() && !clusters.iter().any(|cluster| *cluster.name == *name) {
        let text = format!("local cluster '{name}' must be defined");
        return Err(FieldError::new("cluster_manager.local_cluster_name", text));
    }
    Ok(LocalNode {
        locality: Locality { region: locality.region, zone: locality.zone, sub_zone: locality.sub_zone },
        cluster: (!name.is_empty()).then(|| name.into()),
    })
}

fn static_secrets(messages: &[ProtoSecret]) -> Result<Vec<StaticSecret>> {
    let mut secrets: Vec<StaticSecret> = Vec::with_capacity(messages.len());
    for (index, message) in messages.iter().enumerate() {
        let path = format!("static_resources.secrets[{index}]");
        let secret = secret(message, &path)?;
        let name = SecretName { source: None, name: message.name.as_str().into() };
        if secrets.iter().any(|known| known.name == name) {
            return Err(FieldError::new(join(&path, "name"), format!("duplicate name '{}'", message.name)));
        }
        let directory = secret_files::followed_directory(message, &path)?;
        let followed = directory.map(|directory| (message.clone(), directory));
        secrets.push(StaticSecret { name, secret, followed });
    }
    Ok(secrets)
}

/// Refuses what names a secret of the bootstrap that is not there, or is of another type, or one that cannot be had from where it says.
fn known_secrets<'a>(
    mut wanted: impl Iterator<Item = (SecretType, &'a SecretRef)>,
    secrets: &[StaticSecret],
    sources: &SourcesConfig,
    path: &str,
) -> Result<()> {
    let is_known = |kind: SecretType, name: &str| {
        secrets.iter().any(|known| *known.name.name == *name && known.secret.secret_type() == kind)
    };
    wanted.try_for_each(|(kind, secret)| match secret {
        SecretRef::Static(name) if !is_known(kind, name) => {
            Err(FieldError::new(path, format!("Unknown static secret: {name}")))
        }
        SecretRef::Static(_) => Ok(()),
        SecretRef::Discovered(ResourceRef { name, from }) => {
            let checked = sources.check_static(&from.source, type_url::SECRET);
            checked.map_err(|text| FieldError::new(path, format!("secret {name}: {text}")))
        }
    })
}

fn unique<'a>(kind: &str, names: impl Iterator<Item = &'a str>) -> Result<()> {
    let mut seen = std::collections::HashSet::new();
    for (index, name) in names.enumerate() {
        if !seen.insert(name) {
            let path = format!("static_resources.{kind}[{index}].name");
            return Err(FieldError::new(path, format!("duplicate name '{name}'")));
        }
    }
    Ok(())
}

/// A gRPC client that is there from the start: its cluster must be.
fn grpc_client(config: &ApiConfigSource, sources: &SourcesConfig, path: &str) -> Result<GrpcSource> {
    let source = ads_source(config, path)?;
    match source.service.target.cluster().filter(|name| !sources.servers.contains_key(*name)) {
        Some(name) => {
            let path = join(path, "grpc_services[0].envoy_grpc.cluster_name");
            let unknown = || format!("Unknown gRPC client cluster '{name}'");
            let text = if sources.unsupported.contains(name) { unsupported(name) } else { unknown() };
            Err(FieldError::new(path, text))
        }
        None => Ok(source),
    }
}

/// Where clusters and listeners come from besides.
type Dynamic = (Option<ConfigSource>, Option<ConfigSource>);

fn dynamic_resources(dynamic: &DynamicResources, sources: &mut SourcesConfig) -> Result<Dynamic> {
    const PATH: &str = "dynamic_resources";
    if let Some(config) = &dynamic.ads_config {
        sources.ads = Some(grpc_client(config, sources, &join(PATH, "ads_config"))?);
    }
    let source = |config: Option<&_>, field: &str, type_url: String| -> Result<_> {
        let Some(config) = config else { return Ok(None) };
        let path = join(PATH, field);
        let source = config_source(Some(config), &path)?;
        sources.check_static(&source.source, &type_url).map_err(|text| FieldError::new(&path, text))?;
        Ok(Some(source))
    };
    let cds = source(dynamic.cds_config.as_ref(), "cds_config", Cluster::type_url())?;
    let lds = source(dynamic.lds_config.as_ref(), "lds_config", ProtoListener::type_url())?;
    Ok((cds, lds))
}

/// What `cds_resources_locator` or `lds_resources_locator` names, with Envoy's words for what it refuses: such collections come over
/// ADS, or over a stream of their own that is incremental.
fn collection(locator: &str, from: Option<&ConfigSource>, field: &str, of: &str) -> Result<Option<String>> {
    if locator.is_empty() {
        return Ok(None);
    }
    let path = format!("dynamic_resources.{field}_resources_locator");
    if ["file:", "http:"].iter().any(|scheme| locator.starts_with(scheme)) {
        return Err(FieldError::unsupported_value(path, locator, "xdstp:"));
    }
    if !xdstp::has_scheme(locator) {
        return Err(FieldError::new(path, format!("{locator} does not have a xdstp:, http: or file: scheme")));
    }
    let name = xdstp::Name::parse(locator).map_err(|error| FieldError::new(&path, error.to_string()))?;
    if name.resource_type != of {
        return Err(FieldError::new(path, format!("xdstp:// type does not match {of} in {locator}")));
    }
    if !name.is_collection() {
        return Err(FieldError::unsupported_value(path, locator, "names that end in /*"));
    }
    match from.map(|from| &*from.source) {
        Some(Source::Ads) => Ok(Some(name.to_string())),
        Some(Source::Grpc(grpc)) if grpc.variant == Variant::Delta => Ok(Some(name.to_string())),
        Some(Source::Grpc(_) | Source::Rest(_)) => {
            let source = format!("dynamic_resources.{field}_config.api_config_source.api_type");
            Err(FieldError::new(source, "Unknown xdstp:// transport API type: a collection needs DELTA_GRPC"))
        }
        Some(Source::File(_)) | None => {
            let text = "Missing or not supported config source specifier in envoy::config::core::v3::ConfigSource for a \
                        collection. Only ADS and gRPC in delta-xDS mode are supported.";
            Err(FieldError::new(format!("dynamic_resources.{field}_config"), text))
        }
    }
}

/// The clusters that can be reached before anything else is known.
fn servers(clusters: &[ClusterConfig]) -> BTreeMap<String, Server> {
    let known = clusters.iter().filter(|it| matches!(it.discovery, Discovery::Static) || it.discovery.dns().is_some());
    let server = |cluster: &ClusterConfig| {
        let endpoints = cluster.endpoints.iter().flat_map(|group| &group.endpoints);
        Server {
            endpoints: endpoints.map(|endpoint| endpoint.address.dial()).collect(),
            connect_timeout: cluster.connect_timeout,
            // Its secrets are not at hand here: until they are, it cannot be reached.
            tls: cluster.tls.as_ref().map(|_| tls::not_ready()),
            http2: matches!(cluster.protocol, UpstreamProtocol::Http2(_)),
            usage: Some(Arc::new(ClusterStats::new(cluster))),
        }
    };
    known.map(|cluster| (cluster.name.to_string(), server(cluster))).collect()
}

/// Clusters behind which Envoy finds a control plane, and we do not yet. (It has no EDS clusters there either, but for those
/// whose endpoints are in a file.)
fn out_of_reach(clusters: &[ClusterConfig]) -> BTreeSet<String> {
    let unsupported = clusters.iter().filter(|cluster| match &cluster.discovery {
        Discovery::OriginalDst { .. } | Discovery::Aggregate { .. } | Discovery::DynamicForwardProxy { .. } => true,
        Discovery::Eds { endpoints } => matches!(*endpoints.from.source, Source::File(_)),
        Discovery::Static | Discovery::StrictDns(_) | Discovery::LogicalDns(_) => false,
    });
    unsupported.map(|cluster| cluster.name.to_string()).collect()
}

/// Refuses two listeners on one address. Port 0 is another port each time.
fn distinct_addresses(listeners: &[Listener]) -> Result<()> {
    let mut seen = HashMap::new();
    for (index, listener) in listeners.iter().enumerate() {
        for address in listener.addresses.iter().map(|address| address.address).filter(|address| address.port() != 0) {
            // One that a listener itself names twice is bound once, as in Envoy.
            if seen.insert(address, index).is_some_and(|other| other != index) {
                let path = format!("static_resources.listeners[{index}].address");
                return Err(FieldError::new(path, format!("'{}' has duplicate address '{address}'", listener.name)));
            }
        }
    }
    Ok(())
}

/// Refuses static routes to clusters that are not in the bootstrap, as Envoy does, unless they say `validate_clusters:
/// false`. Clusters of a TCP proxy may be delivered later.
fn known_clusters(listeners: &[Listener], clusters: &[ClusterConfig]) -> Result<()> {
    let known: HashSet<&str> = clusters.iter().map(|cluster| &*cluster.name).collect();
    for (index, listener) in listeners.iter().enumerate() {
        for (path, routes) in listener.own_routes() {
            if routes.validate_clusters == Some(false) {
                continue;
            }
            if let Some((route, text)) = routes.unknown_cluster(|name| known.contains(name)) {
                let path = format!("static_resources.listeners[{index}].{path}.{route}");
                return Err(FieldError::new(path, text));
            }
        }
    }
    Ok(())
}

/// Refuses static resources whose endpoints or routes cannot be had from where they say.
fn static_sources(listeners: &[Listener], clusters: &[ClusterConfig], sources: &SourcesConfig) -> Result<()> {
    for (index, cluster) in clusters.iter().enumerate() {
        if let Discovery::Eds { endpoints } = &cluster.discovery {
            let path = format!("static_resources.clusters[{index}].eds_cluster_config.eds_config");
            let checked = sources.check_static(&endpoints.from.source, type_url::ENDPOINT);
            checked.map_err(|text| FieldError::new(path, text))?;
        }
    }
    for (index, listener) in listeners.iter().enumerate() {
        for routes in listener.rds() {
            let path = format!("static_resources.listeners[{index}]");
            let checked = sources.check_static(&routes.from.source, type_url::ROUTE);
            checked.map_err(|text| FieldError::new(path, format!("rds {text}")))?;
        }
        for filter in listener.discovered_filters() {
            let path = format!("static_resources.listeners[{index}]");
            let checked = sources.check_static(&filter.wanted.from.source, type_url::EXTENSION_CONFIG);
            checked.map_err(|text| FieldError::new(path, format!("config_discovery {text}")))?;
        }
        for filter in listener.connection_managers().flat_map(|manager| &manager.http_filters) {
            let path = format!("static_resources.listeners[{index}]");
            let check = |filter: &dyn HttpFilterFactory| match filter.source() {
                Some((from, type_url)) => sources.check(&from.source, type_url),
                None => Ok(()),
            };
            let checked = filter.source.with(check).unwrap_or(Ok(()));
            checked.map_err(|text| FieldError::new(path, format!("{} {text}", filter.name)))?;
        }
        for scoped in listener.connection_managers().filter_map(|manager| manager.scoped()) {
            let ScopeSource::Srds { scopes, routes } = &scoped.scopes else { continue };
            for (from, type_url) in [(scopes, type_url::SCOPED_ROUTES), (routes, type_url::ROUTE)] {
                let path = format!("static_resources.listeners[{index}]");
                let checked = sources.check_static(&from.source, type_url);
                checked.map_err(|text| FieldError::new(path, format!("scoped_routes {text}")))?;
            }
        }
    }
    Ok(())
}

/// `listeners`: all that there are, where no more can come.
fn interception(message: &ProtoBootstrap, listeners: Option<&[Listener]>) -> Result<Option<InterceptionConfig>> {
    let node = message.node.as_ref().map(|node| node.id.clone()).unwrap_or_default();
    let mut found = None;
    for (index, extension) in message.bootstrap_extensions.iter().enumerate() {
        let path = format!("bootstrap_extensions[{index}].typed_config");
        let config = extension.typed_config.as_ref().ok_or_else(|| FieldError::new(&path, "value is required"))?;
        if !config.type_url.ends_with(&Interception::full_name()) {
            return Err(FieldError::unsupported(path));
        }
        if found.is_some() {
            return Err(FieldError::new(path, "there is one interception extension already"));
        }
        let message = unpack(config, &path)?;
        let checked = InterceptionConfig::from_proto(&message).and_then(|config| config.on_node(&node));
        let config = checked.map_err(|(field, message)| FieldError::new(join(&path, &field), message))?;
        for (field, name) in config.listeners() {
            if listeners.is_some_and(|listeners| listeners.iter().all(|listener| *listener.name != *name)) {
                let text =
                    format!("there is no listener `{name}`, and no `dynamic_resources.lds_config` that may bring one");
                return Err(FieldError::new(join(&path, field), text));
            }
        }
        found = Some(config);
    }
    Ok(found)
}

use std::{
    collections::{BTreeMap, HashSet},
    net::SocketAddr,
};

use culvert_xds_client::{
    ads::Variant,
    api::culvert::extensions::bootstrap::interception::v1::Interception,
    json::unpack,
    source::{GrpcService, GrpcSource, Server, Target},
};
use envoy_types::pb::envoy::config::{
    bootstrap::v3::{Bootstrap as ProtoBootstrap, bootstrap::DynamicResources},
    core::v3::{ApiConfigSource, Node, api_config_source::ApiType, grpc_service::TargetSpecifier},
};
use prost::Name;

use super::{
    cluster,
    common::{Result, from_ads, ip, required, socket_address},
    layered_runtime::layered_runtime,
    listener,
    support::{self, join},
};
use crate::{
    config::{
        FieldError,
        model::{ClusterConfig, Discovery, EndpointAddress, Listener, RouteSource},
    },
    intercept::InterceptionConfig,
    layered_runtime::Layer,
};

/// A checked bootstrap.
#[derive(Debug)]
pub struct Bootstrap {
    /// Who this daemon is, for the control plane.
    pub node: Node,
    /// Where the admin interface listens; `None`: nowhere.
    pub admin: Option<SocketAddr>,
    /// Clusters of the bootstrap.
    pub clusters: Vec<ClusterConfig>,
    /// Listeners of the bootstrap.
    pub listeners: Vec<Listener>,
    /// The aggregated discovery service, where there is one.
    pub ads: Option<GrpcSource>,
    /// Servers that a config source may name, by cluster.
    pub servers: BTreeMap<String, Server>,
    /// Where load reports go.
    pub load_stats: Option<GrpcService>,
    /// Clusters come from the control plane.
    pub cds: bool,
    /// Listeners come from the control plane.
    pub lds: bool,
    /// The layers of runtime values, of which the later win.
    pub runtime: Vec<Layer>,
    /// The extension `culvert.bootstrap.interception`.
    pub interception: Option<InterceptionConfig>,
}

/// A checked bootstrap.
///
/// # Errors
/// The field that is wrong or not honoured.
pub fn bootstrap(message: &ProtoBootstrap) -> Result<Bootstrap> {
    support::check(message, "")?;
    let resources = message.static_resources.clone().unwrap_or_default();
    let clusters = resources.clusters.iter().enumerate();
    let clusters = clusters.map(|(index, item)| cluster(item, &format!("static_resources.clusters[{index}]")));
    let clusters: Vec<_> = clusters.collect::<Result<_>>()?;
    let listeners = resources.listeners.iter().enumerate();
    let listeners = listeners.map(|(index, item)| listener(item, &format!("static_resources.listeners[{index}]")));
    let listeners: Vec<_> = listeners.collect::<Result<_>>()?;
    unique("clusters", clusters.iter().map(|cluster| &*cluster.name))?;
    unique("listeners", listeners.iter().map(|listener| &*listener.name))?;

    let dynamic = message.dynamic_resources.clone().unwrap_or_default();
    let servers = servers(&clusters);
    let (ads, cds, lds) = dynamic_resources(&dynamic, &clusters, &servers)?;
    if ads.is_none() {
        needs_no_ads(&listeners, &clusters)?;
    }
    let load_stats = message.cluster_manager.as_ref().and_then(|manager| manager.load_stats_config.as_ref());
    let load_stats = load_stats
        .map(|config| grpc_source(config, &clusters, &servers, "cluster_manager.load_stats_config"))
        .transpose()?
        .map(|source| source.service);
    known_clusters(&listeners, &clusters)?;
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
    Ok(Bootstrap {
        node: message.node.clone().unwrap_or_default(),
        admin,
        clusters,
        listeners,
        ads,
        servers,
        load_stats,
        cds,
        lds,
        runtime: layered_runtime(message)?,
        interception: extensions(message)?,
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

fn dynamic_resources(
    dynamic: &DynamicResources,
    clusters: &[ClusterConfig],
    servers: &BTreeMap<String, Server>,
) -> Result<(Option<GrpcSource>, bool, bool)> {
    const PATH: &str = "dynamic_resources";
    let ads = dynamic.ads_config.as_ref();
    let ads = ads.map(|config| grpc_source(config, clusters, servers, "dynamic_resources.ads_config")).transpose()?;
    let mut wanted = [false; 2];
    for (wanted, (field, source)) in
        wanted.iter_mut().zip([("cds_config", &dynamic.cds_config), ("lds_config", &dynamic.lds_config)])
    {
        if source.is_some() {
            from_ads(source.as_ref(), &join(PATH, field))?;
            if ads.is_none() {
                return Err(FieldError::new(join(PATH, field), "names ADS, but ads_config is not set"));
            }
            *wanted = true;
        }
    }
    Ok((ads, wanted[0], wanted[1]))
}

/// The clusters that can be reached before anything else is known.
fn servers(clusters: &[ClusterConfig]) -> BTreeMap<String, Server> {
    let known = clusters.iter().filter(|it| matches!(it.discovery, Discovery::Static | Discovery::StrictDns { .. }));
    let server = |cluster: &ClusterConfig| {
        let endpoints = cluster.endpoints.iter().flat_map(|group| &group.endpoints);
        let address = |address: &EndpointAddress| match address {
            EndpointAddress::Ip(address) => Some(address.to_string()),
            EndpointAddress::Dns { host, port } => Some(format!("{host}:{port}")),
            EndpointAddress::Pipe(_) => None,
        };
        Server {
            endpoints: endpoints.filter_map(|endpoint| address(&endpoint.address)).collect(),
            connect_timeout: cluster.connect_timeout,
        }
    };
    let servers = known.map(|cluster| (cluster.name.to_string(), server(cluster)));
    servers.filter(|(_, server)| !server.endpoints.is_empty()).collect()
}

fn grpc_source(
    config: &ApiConfigSource,
    clusters: &[ClusterConfig],
    servers: &BTreeMap<String, Server>,
    path: &str,
) -> Result<GrpcSource> {
    let variant = match ApiType::try_from(config.api_type) {
        Ok(ApiType::Grpc) => Variant::Sotw,
        Ok(ApiType::DeltaGrpc) => Variant::Delta,
        _ => return Err(FieldError::unsupported(join(path, "api_type"))),
    };
    let [service] = config.grpc_services.as_slice() else {
        return Err(FieldError::new(join(path, "grpc_services"), "exactly one service is needed"));
    };
    let path = join(path, "grpc_services[0]");
    let (target, authority) = match &service.target_specifier {
        Some(TargetSpecifier::GoogleGrpc(google)) => {
            let uri = &google.target_uri;
            (Target::Address(uri.trim_start_matches("dns:///").to_owned()), uri.clone())
        }
        Some(TargetSpecifier::EnvoyGrpc(envoy)) => {
            let path = join(&path, "envoy_grpc.cluster_name");
            let name = &envoy.cluster_name;
            if !clusters.iter().any(|cluster| *cluster.name == **name) {
                return Err(FieldError::new(&path, format!("no static cluster is named '{name}'")));
            }
            if !servers.contains_key(name) {
                let text = format!("cluster '{name}' must be STATIC or STRICT_DNS and have an endpoint");
                return Err(FieldError::new(path, text));
            }
            let authority = if envoy.authority.is_empty() { name } else { &envoy.authority };
            (Target::Cluster(name.clone()), authority.clone())
        }
        _ => return Err(required(&path, "envoy_grpc")),
    };
    Ok(GrpcSource {
        service: GrpcService { target, authority, initial_metadata: Vec::new() },
        variant,
        set_node_on_first_message_only: config.set_node_on_first_message_only,
    })
}

/// Refuses static routes to clusters that are not in the bootstrap, as Envoy does, unless they say `validate_clusters:
/// false`. Clusters of a TCP proxy may be delivered later.
fn known_clusters(listeners: &[Listener], clusters: &[ClusterConfig]) -> Result<()> {
    let known: HashSet<&str> = clusters.iter().map(|cluster| &*cluster.name).collect();
    for (index, listener) in listeners.iter().enumerate() {
        for manager in listener.connection_managers() {
            let RouteSource::Static(routes) = &manager.routes else { continue };
            if routes.validate_clusters == Some(false) {
                continue;
            }
            if let Some(name) = routes.unknown_cluster(|name| known.contains(name)) {
                let path = format!("static_resources.listeners[{index}]");
                return Err(FieldError::new(path, format!("route: unknown cluster '{name}'")));
            }
        }
    }
    Ok(())
}

/// Refuses static resources that wait for a control plane where there is none.
fn needs_no_ads(listeners: &[Listener], clusters: &[ClusterConfig]) -> Result<()> {
    const TEXT: &str = "names ADS, but dynamic_resources.ads_config is not set";
    let eds = clusters.iter().position(|cluster| matches!(cluster.discovery, Discovery::Eds { .. }));
    if let Some(index) = eds {
        let path = format!("static_resources.clusters[{index}].eds_cluster_config.eds_config");
        return Err(FieldError::new(path, TEXT));
    }
    match listeners.iter().position(|listener| listener.rds_names().next().is_some()) {
        Some(index) => Err(FieldError::new(format!("static_resources.listeners[{index}]"), format!("rds {TEXT}"))),
        None => Ok(()),
    }
}

fn extensions(message: &ProtoBootstrap) -> Result<Option<InterceptionConfig>> {
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
        let checked = InterceptionConfig::from_proto(&message);
        found = Some(checked.map_err(|(field, message)| FieldError::new(join(&path, &field), message))?);
    }
    Ok(found)
}

//! The client status discovery service: what the daemon has of each resource, for control planes and for people.

mod node_match;

use std::{pin::Pin, sync::Arc};

use culvert_xds_client::json;
use envoy_types::pb::{
    envoy::{
        admin::v3::{
            ClientResourceStatus, ClustersConfigDump, ListenersConfigDump, RoutesConfigDump, UpdateFailureState,
            clusters_config_dump::DynamicCluster,
            listeners_config_dump::{DynamicListener, DynamicListenerState},
            routes_config_dump::DynamicRouteConfig,
        },
        config::{cluster::v3::Cluster, core::v3::ConfigSource, listener::v3::Listener, route::v3::RouteConfiguration},
        service::status::v3::{
            ClientConfig, ClientStatusRequest, ClientStatusResponse, PerXdsConfig,
            client_config::GenericXdsConfig,
            client_status_discovery_service_server::{
                ClientStatusDiscoveryService, ClientStatusDiscoveryServiceServer,
            },
            per_xds_config::PerXdsConfig as Dump,
        },
    },
    google::protobuf::Any,
};
use futures_util::{Stream, StreamExt as _, stream};
use prost::Name;
use tokio::task;
use tonic::{Request, Response, Status, Streaming};

use crate::config::{
    dump::{self, Configuration},
    status::{Missing, Resource, Snapshot, SourceFault, SourceState, Type, Version},
};

/// The largest request that is taken, in bytes.
const MAX_REQUEST: usize = 1 << 20;
/// Where its methods are.
pub(super) const PATH: &str = "/envoy.service.status.v3.ClientStatusDiscoveryService/";

/// Serves the status of one configuration.
#[derive(Clone)]
pub(super) struct Csds(Arc<Configuration>);

/// The service behind gRPC.
pub(super) type Server = ClientStatusDiscoveryServiceServer<Csds>;

/// A service for the admin server.
pub(super) fn server(config: Arc<Configuration>) -> Server {
    // A response holds every resource: it may be large.
    ClientStatusDiscoveryServiceServer::new(Csds(config))
        .max_decoding_message_size(MAX_REQUEST)
        .max_encoding_message_size(usize::MAX)
}

impl Csds {
    async fn status(&self, request: ClientStatusRequest) -> Result<ClientStatusResponse, Status> {
        let config = Arc::clone(&self.0);
        // Copying thousands of resources takes longer than the control thread should be kept waiting.
        let status = task::spawn_blocking(move || respond(&config, &request));
        status.await.map_err(|error| {
            tracing::error!(%error, "the client status cannot be told; please report this");
            Status::internal("see the log of culvertd")
        })?
    }
}

#[tonic::async_trait]
impl ClientStatusDiscoveryService for Csds {
    type StreamClientStatusStream = Pin<Box<dyn Stream<Item = Result<ClientStatusResponse, Status>> + Send>>;

    async fn stream_client_status(
        &self,
        request: Request<Streaming<ClientStatusRequest>>,
    ) -> Result<Response<Self::StreamClientStatusStream>, Status> {
        // One answer for each request, in turn: a client that does not read is not read from either.
        let service = self.clone();
        let answers = stream::unfold(Some(request.into_inner()), move |requests| {
            let service = service.clone();
            async move {
                let mut requests = requests?;
                match requests.next().await? {
                    Ok(request) => match service.status(request).await {
                        Ok(answer) => Some((Ok(answer), Some(requests))),
                        Err(status) => Some((Err(status), None)),
                    },
                    Err(status) => Some((Err(status), None)),
                }
            }
        });
        Ok(Response::new(Box::pin(answers)))
    }

    async fn fetch_client_status(
        &self,
        request: Request<ClientStatusRequest>,
    ) -> Result<Response<ClientStatusResponse>, Status> {
        Ok(Response::new(self.status(request.into_inner()).await?))
    }
}

/// The answer to a request. Without matchers it is about this node; with some, where one of them matches it.
fn respond(config: &Configuration, request: &ClientStatusRequest) -> Result<ClientStatusResponse, Status> {
    let bootstrap = config.bootstrap();
    let node = bootstrap.node.unwrap_or_default();
    if !node_match::matches(&request.node_matchers, &node)
        .map_err(|error| Status::invalid_argument(error.to_string()))?
    {
        return Ok(ClientStatusResponse::default());
    }
    let with_content = !request.exclude_resource_contents;
    let resources = bootstrap.static_resources.unwrap_or_default();
    let started = Some(dump::timestamp(config.started()));
    let fixed = |type_url: String, name: &str, content: Any| GenericXdsConfig {
        type_url,
        name: name.to_owned(),
        xds_config: with_content.then(|| json::redacted(&content)),
        last_updated: started,
        is_static_resource: true,
        ..Default::default()
    };
    let mut generic = Vec::new();
    generic.extend(resources.clusters.iter().map(|it| fixed(Cluster::type_url(), &it.name, dump::pack(it))));
    generic.extend(resources.listeners.iter().map(|it| fixed(Listener::type_url(), &it.name, dump::pack(it))));
    let snapshot = config.snapshot();
    for of_type in &snapshot.types {
        // What only drains is not the control plane's any more.
        let current = of_type
            .resources
            .iter()
            .filter(|it| it.active.is_some() || it.warming.is_some() || it.failure.is_some() || it.missing.is_some());
        generic.extend(current.map(|resource| generic_config(of_type, resource, with_content)));
    }
    generic.extend(snapshot.faults.iter().map(unusable));
    generic.extend(snapshot.sources.iter().map(source));
    #[expect(deprecated, reason = "the only place in the API where a resource can be shown to be warming")]
    let config = ClientConfig {
        node: Some(node),
        xds_config: warming(&snapshot),
        generic_xds_configs: generic,
        ..Default::default()
    };
    Ok(ClientStatusResponse { config: vec![config] })
}

fn generic_config(of_type: &Type, resource: &Resource, with_content: bool) -> GenericXdsConfig {
    // What serves; where nothing does yet, what is about to.
    let accepted = resource.active.as_ref().or(resource.warming.as_ref());
    let status = match (&resource.failure, resource.missing) {
        (Some(_), _) => ClientResourceStatus::Nacked,
        (None, Some(Missing::Requested)) => ClientResourceStatus::Requested,
        (None, Some(Missing::DoesNotExist)) => ClientResourceStatus::DoesNotExist,
        (None, None) => ClientResourceStatus::Acked,
    };
    let error_state = resource.failure.as_deref().map(|failure| {
        let mut state = dump::error_state(failure);
        // Keys and passwords stay here, as in the dumps.
        state.failed_configuration = state.failed_configuration.filter(|_| with_content).map(|it| json::redacted(&it));
        state
    });
    let why_missing = || UpdateFailureState {
        details: "the control plane has not sent it in time, or does not have it".to_owned(),
        ..Default::default()
    };
    let error_state = error_state.or_else(|| (status == ClientResourceStatus::DoesNotExist).then(why_missing));
    GenericXdsConfig {
        type_url: of_type.type_url.clone(),
        name: resource.name.clone(),
        version_info: accepted.map(|version| version.version.clone()).unwrap_or_default(),
        xds_config: accepted.filter(|_| with_content).map(|version| json::redacted(&version.body)),
        last_updated: accepted.map(|version| dump::timestamp(version.updated)),
        client_status: status.into(),
        error_state,
        ..Default::default()
    }
}

/// A source of which nothing could be taken, as if it were a resource of the type that it is for: the API has no other
/// place for it.
fn unusable(source: &SourceFault) -> GenericXdsConfig {
    GenericXdsConfig {
        type_url: source.type_url.clone(),
        name: source.place.clone(),
        client_status: ClientResourceStatus::Nacked.into(),
        error_state: Some(UpdateFailureState {
            version_info: source.version.clone(),
            last_update_attempt: Some(dump::timestamp(source.fault.since)),
            details: source.fault.details.clone(),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// A server that resources are had from, as if it were a resource: the API has no other place for it. Its version is its
/// transport.
fn source(SourceState { name, connection }: &SourceState) -> GenericXdsConfig {
    let since = Some(dump::timestamp(connection.since));
    let details = || connection.error.clone().unwrap_or_else(|| "there was no connection yet".to_owned());
    let error_state = (!connection.is_well()).then(|| UpdateFailureState {
        last_update_attempt: since,
        details: details(),
        ..Default::default()
    });
    let status = if connection.is_well() { ClientResourceStatus::Acked } else { ClientResourceStatus::Nacked };
    GenericXdsConfig {
        type_url: ConfigSource::type_url(),
        name: name.clone(),
        version_info: connection.transport.to_owned(),
        last_updated: since,
        client_status: status.into(),
        error_state,
        ..Default::default()
    }
}

/// Clusters, listeners and routes that are accepted and wait, or serve without something they need, without their content, and
/// with what that is in the place of an error.
fn warming(snapshot: &Snapshot) -> Vec<PerXdsConfig> {
    let of = |type_url: String| {
        let resources = snapshot.of(&type_url).iter();
        resources.filter_map(|it| Some((it, it.warming.clone()?))).collect::<Vec<_>>()
    };
    let waits_for = |targets: &[String]| {
        let details = format!("waits for {}", targets.join(", "));
        (!targets.is_empty()).then(|| UpdateFailureState { details, ..Default::default() })
    };
    let incomplete = |type_url: String| {
        let all = snapshot.incomplete.iter().filter(move |it| it.type_url == type_url);
        all.map(|it| {
            let details = format!("serves without {}", it.lacks.join(", "));
            (it.name.clone(), Some(UpdateFailureState { details, ..Default::default() }))
        })
    };
    let updated = |version: &Version| Some(dump::timestamp(version.updated));
    let clusters = of(Cluster::type_url()).into_iter().map(|(it, version)| DynamicCluster {
        version_info: version.version.clone(),
        cluster: Some(dump::pack(&Cluster { name: it.name.clone(), ..Default::default() })),
        last_updated: updated(&version),
        error_state: waits_for(&it.waits_for),
        ..Default::default()
    });
    let clusters: Vec<_> = clusters.collect();
    let listeners = of(Listener::type_url()).into_iter().map(|(it, version)| DynamicListener {
        name: it.name.clone(),
        error_state: waits_for(&it.waits_for),
        warming_state: Some(DynamicListenerState {
            version_info: version.version.clone(),
            last_updated: updated(&version),
            ..Default::default()
        }),
        ..Default::default()
    });
    let fixed = snapshot.unready.iter().filter(|it| it.is_static).map(|it| DynamicListener {
        name: it.listener.clone(),
        warming_state: Some(DynamicListenerState::default()),
        error_state: waits_for(&it.targets),
        ..Default::default()
    });
    let routes = of(RouteConfiguration::type_url()).into_iter().map(|(it, version)| DynamicRouteConfig {
        version_info: version.version.clone(),
        route_config: Some(dump::pack(&RouteConfiguration { name: it.name.clone(), ..Default::default() })),
        last_updated: updated(&version),
        error_state: waits_for(&it.waits_for),
        ..Default::default()
    });
    let routes: Vec<_> = routes.collect();
    let lacking = incomplete(Listener::type_url()).map(|(name, error_state)| DynamicListener {
        name,
        active_state: Some(DynamicListenerState::default()),
        error_state,
        ..Default::default()
    });
    let listeners: Vec<_> = listeners.chain(fixed).chain(lacking).collect();
    let mut dumps = Vec::new();
    let lacking = incomplete(Cluster::type_url()).map(|(name, error_state)| DynamicCluster {
        cluster: Some(dump::pack(&Cluster { name, ..Default::default() })),
        error_state,
        ..Default::default()
    });
    let lacking: Vec<_> = lacking.collect();
    if !clusters.is_empty() || !lacking.is_empty() {
        dumps.push(Dump::ClusterConfig(ClustersConfigDump {
            dynamic_warming_clusters: clusters,
            dynamic_active_clusters: lacking,
            ..Default::default()
        }));
    }
    if !listeners.is_empty() {
        dumps.push(Dump::ListenerConfig(ListenersConfigDump { dynamic_listeners: listeners, ..Default::default() }));
    }
    if !routes.is_empty() {
        dumps.push(Dump::RouteConfig(RoutesConfigDump { dynamic_route_configs: routes, ..Default::default() }));
    }
    dumps.into_iter().map(|dump| PerXdsConfig { per_xds_config: Some(dump), ..Default::default() }).collect()
}

#[cfg(test)]
mod tests;

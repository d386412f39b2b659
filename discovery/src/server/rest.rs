//! REST: `POST /v3/discovery:clusters` and so on, with a `DiscoveryRequest` as JSON, as Envoy's `api_type: REST` polls.
//!
//! What a client is given names where the rest is to be had, which is here, by REST again: in the place of ADS, clusters and
//! listeners have a source of that kind. Its cluster is what the client calls this server.

use std::sync::Arc;

use culvert_xds_client::json::{Format, UnknownFields, read, to_json_with_secrets};
use envoy_types::pb::envoy::config::cluster::v3::Cluster;
use envoy_types::pb::envoy::config::core::v3::config_source::ConfigSourceSpecifier;
use envoy_types::pb::envoy::config::core::v3::transport_socket::ConfigType as SocketConfig;
use envoy_types::pb::envoy::config::core::v3::{
    ApiConfigSource, ApiVersion, ConfigSource, Node, TransportSocket, api_config_source::ApiType,
};
use envoy_types::pb::envoy::config::listener::v3::Listener;
use envoy_types::pb::envoy::config::listener::v3::filter::ConfigType as FilterConfig;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::HttpConnectionManager;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::http_connection_manager::RouteSpecifier;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::common_tls_context::ValidationContextType as Validation;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::{
    CommonTlsContext, DownstreamTlsContext, UpstreamTlsContext,
};
use envoy_types::pb::envoy::service::discovery::v3::DiscoveryRequest;
use envoy_types::pb::google::protobuf::value::Kind;
use envoy_types::pb::google::protobuf::{Any, Duration};
use http::header::CONTENT_TYPE;
use http::{HeaderValue, Method, Response, StatusCode};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::{Bytes, Incoming};
use prost::{Message, Name};
use serde_json::json;
use tonic::body::Body;

use super::tls::Identity;
use super::{MAX_REQUEST_BYTES, WILDCARD, Xds, viewer};
use crate::resources::{Viewer, type_url};

/// What the paths begin with.
pub(super) const PREFIX: &str = "/v3/discovery:";
/// The metadata of a node that says what it calls this server.
const CLUSTER_METADATA: &str = "discovery_cluster";
/// What nodes call this server that do not say so.
const CLUSTER: &str = "discovery";
/// How often clients ask for what these resources name.
const REFRESH: Duration = Duration { seconds: 1, nanos: 0 };

/// A status and what to say.
type Refusal = (StatusCode, String);

impl Xds {
    /// Answers a poll.
    pub(super) async fn poll(&self, request: http::Request<Incoming>, identity: &Identity) -> Response<Body> {
        match self.answer_poll(request, identity).await {
            Ok(Some(body)) => respond(StatusCode::OK, "application/json", body),
            Ok(None) => respond(StatusCode::NOT_MODIFIED, "application/json", Vec::new()),
            Err((status, said)) => respond(status, "text/plain; charset=utf-8", format!("{said}\n").into_bytes()),
        }
    }

    /// The answer; `None`: nothing has changed since the version that the client has.
    async fn answer_poll(
        &self,
        request: http::Request<Incoming>,
        identity: &Identity,
    ) -> Result<Option<Vec<u8>>, Refusal> {
        let type_url = match request.uri().path().strip_prefix(PREFIX) {
            Some("clusters") => type_url::CLUSTER,
            Some("endpoints") => type_url::ENDPOINT,
            Some("listeners") => type_url::LISTENER,
            Some("routes") => type_url::ROUTE,
            Some("secrets") => type_url::SECRET,
            _ => {
                let paths =
                    "/v3/discovery:clusters, :endpoints, :listeners, :routes and :secrets are what there is".to_owned();
                return Err((StatusCode::NOT_FOUND, paths));
            }
        };
        if request.method() != Method::POST {
            return Err((StatusCode::METHOD_NOT_ALLOWED, "this is asked for by POST".to_owned()));
        }
        let wrong = |what: &dyn std::fmt::Display| (StatusCode::BAD_REQUEST, what.to_string());
        let body =
            Limited::new(request.into_body(), MAX_REQUEST_BYTES).collect().await.map_err(|error| wrong(&error))?;
        let body = body.to_bytes();
        let text = std::str::from_utf8(&body).map_err(|error| wrong(&error))?;
        let DiscoveryRequest { version_info, node, resource_names, type_url: stated, error_detail, .. } =
            read(text, Format::Json, UnknownFields::Ignore).map_err(|error| wrong(&error))?;
        if !stated.is_empty() && stated != type_url {
            return Err(wrong(&format!("type_url: `{stated}` is not what this path has")));
        }
        let node = node.unwrap_or_default();
        self.authorization
            .check(identity, Some(&node))
            .inspect_err(|refusal| self.refused(Some(&node), refusal))
            .map_err(|refusal| (StatusCode::FORBIDDEN, refusal.to_string()))?;
        self.check_role(&node).map_err(|error| wrong(&error))?;
        self.clients.polled(&node.id, error_detail.map(|error| error.message));
        let snapshot = self.snapshots.borrow().clone();
        let secrets = Arc::new(self.authorization.secrets(identity, &node));
        let view = snapshot.view(&Viewer { secrets, ..viewer(&node) }, None);
        self.clients.keep_polled(&view.set);
        let Some(available) = view.of_type(type_url) else { return Ok(None) };
        let (version, resources) = if resource_names.is_empty() || resource_names.iter().any(|name| name == WILDCARD) {
            (available.version.clone(), available.resources.values().cloned().collect())
        } else {
            available.only(&resource_names)
        };
        if *version == *version_info {
            return Ok(None);
        }
        let source = source(&node);
        // Who may have a secret gets it: what is not shown otherwise is what was asked for.
        let resources: Vec<_> =
            resources.iter().map(|resource| to_json_with_secrets(&by_rest(resource.body(), &source))).collect();
        let answer = json!({ "version_info": &*version, "resources": resources, "type_url": type_url });
        serde_json::to_vec(&answer).map(Some).map_err(|error| (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))
    }
}

/// "Ask for it here."
fn source(node: &Node) -> ConfigSource {
    let stated = node.metadata.as_ref().and_then(|metadata| metadata.fields.get(CLUSTER_METADATA));
    let cluster = match stated.and_then(|value| value.kind.as_ref()) {
        Some(Kind::StringValue(name)) => name.clone(),
        _ => CLUSTER.to_owned(),
    };
    ConfigSource {
        resource_api_version: ApiVersion::V3.into(),
        config_source_specifier: Some(ConfigSourceSpecifier::ApiConfigSource(ApiConfigSource {
            api_type: ApiType::Rest.into(),
            transport_api_version: ApiVersion::V3.into(),
            cluster_names: vec![cluster],
            refresh_delay: Some(REFRESH),
            ..Default::default()
        })),
        ..Default::default()
    }
}

/// A resource, with this source in the place of ADS. What does not decode is as it is: it was encoded here.
fn by_rest(body: Any, source: &ConfigSource) -> Any {
    let changed = match &*body.type_url {
        type_url::CLUSTER => Cluster::decode(&*body.value).ok().map(|mut cluster| {
            if let Some(eds) = &mut cluster.eds_cluster_config {
                eds.eds_config = Some(source.clone());
            }
            secrets_by_rest(cluster.transport_socket.as_mut(), source);
            cluster.encode_to_vec()
        }),
        type_url::LISTENER => Listener::decode(&*body.value).ok().map(|mut listener| {
            for chain in &mut listener.filter_chains {
                secrets_by_rest(chain.transport_socket.as_mut(), source);
                for filter in &mut chain.filters {
                    let Some(FilterConfig::TypedConfig(any)) = &mut filter.config_type else { continue };
                    change::<HttpConnectionManager>(any, |manager| {
                        if let Some(RouteSpecifier::Rds(rds)) = &mut manager.route_specifier {
                            rds.config_source = Some(source.clone());
                        }
                    });
                }
            }
            listener.encode_to_vec()
        }),
        _ => None,
    };
    Any { value: changed.unwrap_or(body.value), type_url: body.type_url }
}

/// The secrets of a TLS context, from this source.
fn secrets_by_rest(socket: Option<&mut TransportSocket>, source: &ConfigSource) {
    let Some(SocketConfig::TypedConfig(any)) = socket.and_then(|socket| socket.config_type.as_mut()) else { return };
    let from_source = |context: &mut Option<CommonTlsContext>| {
        let Some(context) = context else { return };
        let validation = match &mut context.validation_context_type {
            Some(Validation::ValidationContextSdsSecretConfig(secret)) => Some(secret),
            Some(Validation::CombinedValidationContext(both)) => both.validation_context_sds_secret_config.as_mut(),
            _ => None,
        };
        for secret in context.tls_certificate_sds_secret_configs.iter_mut().chain(validation) {
            secret.sds_config = Some(source.clone());
        }
    };
    change::<UpstreamTlsContext>(any, |tls| from_source(&mut tls.common_tls_context));
    change::<DownstreamTlsContext>(any, |tls| from_source(&mut tls.common_tls_context));
}

/// Changes a packed message, if it is of this type.
fn change<M: Message + Name + Default>(any: &mut Any, change: impl FnOnce(&mut M)) {
    if any.type_url == M::type_url()
        && let Ok(mut message) = M::decode(&*any.value)
    {
        change(&mut message);
        any.value = message.encode_to_vec();
    }
}

fn respond(status: StatusCode, kind: &'static str, body: Vec<u8>) -> Response<Body> {
    let mut response = Response::new(Body::new(Full::new(Bytes::from(body))));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

//! CSDS: what each connected client was sent, and has accepted.

use std::pin::Pin;
use std::sync::Arc;

use envoy_types::pb::envoy::config::core::v3::Node;
use envoy_types::pb::envoy::config::core::v3::node::UserAgentVersionType;
use envoy_types::pb::envoy::service::status::v3::client_config::GenericXdsConfig;
use envoy_types::pb::envoy::service::status::v3::client_status_discovery_service_server::ClientStatusDiscoveryService;
use envoy_types::pb::envoy::service::status::v3::{
    ClientConfig, ClientStatusRequest, ClientStatusResponse, ConfigStatus,
};
use envoy_types::pb::envoy::r#type::matcher::v3::string_matcher::MatchPattern;
use envoy_types::pb::envoy::r#type::matcher::v3::{NodeMatcher, StringMatcher};
use futures_util::Stream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::clients::{ClientStatus, Clients};
use crate::resources::{Resource, type_url};

/// One resource of a client, as far as we know.
#[derive(Debug, Clone)]
pub struct Held {
    /// Its type.
    pub type_url: String,
    /// Its name.
    pub name: Arc<str>,
    /// The version that the client was sent last.
    pub version: Option<Arc<str>>,
    /// Whether the client has accepted it.
    pub state: HeldState,
    /// It, if it is still what the client would be sent now.
    pub resource: Option<Arc<Resource>>,
}

/// How far a client has got with a resource.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeldState {
    /// It has accepted it.
    Accepted,
    /// It has not answered yet.
    Sent,
    /// It has refused it.
    Refused,
    /// It has asked for it, and there is no such resource.
    Missing,
}

/// The service.
#[derive(Debug, Clone)]
pub(super) struct Csds(pub(super) Clients);

impl Csds {
    async fn answer(&self, request: ClientStatusRequest) -> Result<ClientStatusResponse, Status> {
        let ClientStatusRequest { node_matchers, node: _, exclude_resource_contents } = request;
        let matchers = node_matchers.iter().map(check).collect::<Result<Vec<_>, _>>()?;
        let mut config = Vec::new();
        for (status, held) in
            self.0.held(|status| matchers.is_empty() || matchers.iter().any(|m| m(&status.node))).await
        {
            let generic_xds_configs = held.into_iter().map(|held| describe(held, exclude_resource_contents)).collect();
            config.push(ClientConfig {
                node: Some(node_of(&status)),
                generic_xds_configs,
                client_scope: status.peer,
                ..Default::default()
            });
        }
        Ok(ClientStatusResponse { config })
    }
}

fn describe(held: Held, without_content: bool) -> GenericXdsConfig {
    let Held { type_url, name, version, state, resource } = held;
    let status = match state {
        HeldState::Accepted => ConfigStatus::Synced,
        HeldState::Sent => ConfigStatus::Stale,
        HeldState::Refused => ConfigStatus::Error,
        HeldState::Missing => ConfigStatus::NotSent,
    };
    // Who may know who has what may not have everything.
    let is_secret = type_url == type_url::SECRET;
    GenericXdsConfig {
        type_url,
        name: name.to_string(),
        version_info: version.map(|version| version.to_string()).unwrap_or_default(),
        xds_config: resource.filter(|_| !without_content && !is_secret).map(|resource| resource.body()),
        config_status: status.into(),
        ..Default::default()
    }
}

fn node_of(status: &ClientStatus) -> Node {
    let version = status.user_agent_version.clone();
    Node {
        id: status.node.clone(),
        cluster: status.cluster.clone(),
        user_agent_name: status.user_agent.clone(),
        user_agent_version_type: Some(UserAgentVersionType::UserAgentVersion(version)),
        ..Default::default()
    }
}

type Matcher<'a> = Box<dyn Fn(&str) -> bool + Send + Sync + 'a>;

/// Matchers of node ids by exact text, prefix, suffix or part.
fn check(matcher: &NodeMatcher) -> Result<Matcher<'_>, Status> {
    let wrong = |what: &str| Status::invalid_argument(format!("node_matchers: {what}"));
    let NodeMatcher { node_id, node_metadatas } = matcher;
    if !node_metadatas.is_empty() {
        return Err(wrong("`node_metadatas` are not kept; match `node_id`"));
    }
    let Some(StringMatcher { ignore_case, match_pattern }) = node_id else { return Ok(Box::new(|_| true)) };
    let fold = |text: &str| if *ignore_case { text.to_ascii_lowercase() } else { text.to_owned() };
    Ok(match match_pattern {
        Some(MatchPattern::Exact(text)) => {
            let text = fold(text);
            Box::new(move |id| fold(id) == text)
        }
        Some(MatchPattern::Prefix(text)) => {
            let text = fold(text);
            Box::new(move |id| fold(id).starts_with(&text))
        }
        Some(MatchPattern::Suffix(text)) => {
            let text = fold(text);
            Box::new(move |id| fold(id).ends_with(&text))
        }
        Some(MatchPattern::Contains(text)) => {
            let text = fold(text);
            Box::new(move |id| fold(id).contains(&text))
        }
        _ => return Err(wrong("`node_id` needs exact, prefix, suffix or contains")),
    })
}

#[tonic::async_trait]
impl ClientStatusDiscoveryService for Csds {
    type StreamClientStatusStream = Pin<Box<dyn Stream<Item = Result<ClientStatusResponse, Status>> + Send>>;

    async fn stream_client_status(
        &self,
        request: Request<Streaming<ClientStatusRequest>>,
    ) -> Result<Response<Self::StreamClientStatusStream>, Status> {
        let (csds, mut requests) = (self.clone(), request.into_inner());
        let (answers, stream) = mpsc::channel(1);
        tokio::spawn(async move {
            while let Ok(Some(request)) = requests.message().await {
                if answers.send(csds.answer(request).await).await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn fetch_client_status(
        &self,
        request: Request<ClientStatusRequest>,
    ) -> Result<Response<ClientStatusResponse>, Status> {
        self.answer(request.into_inner()).await.map(Response::new)
    }
}

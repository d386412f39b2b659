//! `envoy.filters.http.dynamic_forward_proxy`: has the host that a request asks for looked up before the request goes on to a
//! `envoy.clusters.dynamic_forward_proxy` cluster.

use std::sync::Arc;

use culvert_xds_client::json::unpack;
use envoy_types::pb::{
    envoy::extensions::filters::http::dynamic_forward_proxy::v3::{
        FilterConfig, PerRouteConfig as ProtoPerRoute, filter_config::ImplementationSpecifier,
        per_route_config::HostRewriteSpecifier,
    },
    google::protobuf::Any,
};
use http::{HeaderName, HeaderValue, StatusCode};

use super::{FilterCx, Flow, HttpFilter, HttpFilterFactory, PerRoute, PerRouteConfig, Waiting};
use crate::{
    access_log::ResponseFlags,
    config::{FieldError, model::Discovery, parse},
    http::{
        body::Body,
        forward::{Original, set_host},
        route_match::authority,
        stream::{LocalReply, RequestHead, StreamCx},
    },
    upstream::{Asked, DnsCache, Found, Pending},
};

#[derive(Debug)]
struct ForwardProxyFactory(Arc<DnsCache>);

/// A request that waits for its host.
#[derive(Debug)]
struct Waits(Option<Pending>);

/// What a route makes of a request's host.
enum Rewrite {
    Literal(HeaderValue),
    Header(HeaderName),
}

fn refuse(status: StatusCode, text: &'static str, flags: ResponseFlags, details: String) -> Flow {
    Flow::Respond(LocalReply::new(status, text, flags, details))
}

/// What becomes of a request whose host has been looked up.
fn judge(found: Option<&Found>) -> Flow {
    match found {
        Some(found) if !found.addresses.is_empty() => Flow::Continue,
        found => {
            let details = found.map_or("no_host", |found| &*found.details).to_owned();
            refuse(StatusCode::SERVICE_UNAVAILABLE, "DNS resolution failure", ResponseFlags::DF, details)
        }
    }
}

impl HttpFilterFactory for ForwardProxyFactory {
    fn request(
        &self,
        head: &mut RequestHead,
        _body: &mut Body,
        cx: &mut StreamCx,
        route: PerRoute<'_>,
        instances: &mut Vec<Box<dyn HttpFilter>>,
    ) -> Flow {
        let Some(cluster) = &cx.cluster else { return Flow::Continue };
        let Discovery::DynamicForwardProxy { .. } = &cluster.cluster.config.discovery else { return Flow::Continue };
        let rewritten = match route.most_specific::<Rewrite>() {
            Some(Rewrite::Literal(host)) => Some(host.clone()),
            Some(Rewrite::Header(name)) => head.headers.get(name).cloned(),
            None => None,
        };
        if let Some(host) = rewritten {
            set_host(head, host, false, Original::Untold);
        }
        let none = ResponseFlags::default();
        if authority(head).is_empty() {
            return refuse(StatusCode::BAD_REQUEST, "Empty host header", none, "empty_host_header".to_owned());
        }
        match self.0.ask(authority(head), cluster.default_port()) {
            Asked::Known(found) => judge(Some(&found)),
            Asked::HostOverflow => {
                refuse(StatusCode::SERVICE_UNAVAILABLE, "DNS cache overflow", none, "dns_cache_overflow".to_owned())
            }
            Asked::PendingOverflow => {
                let details = "dynamic_forward_proxy_pending_request_overflow".to_owned();
                let text = "Dynamic forward proxy pending request overflow";
                refuse(StatusCode::SERVICE_UNAVAILABLE, text, none, details)
            }
            Asked::Pending(pending) => {
                instances.push(Box::new(Waits(Some(pending))));
                Flow::Wait
            }
        }
    }
}

impl HttpFilter for Waits {
    fn wait_request<'a>(
        &'a mut self,
        _head: &'a mut RequestHead,
        _body: &'a mut Body,
        _cx: &'a mut StreamCx,
    ) -> Waiting<'a> {
        Box::pin(async move {
            let Some(mut pending) = self.0.take() else { return Flow::Continue };
            judge(pending.over().await.as_deref())
        })
    }
}

pub(super) fn parse(typed_config: &Any, cx: &FilterCx<'_>) -> Result<Arc<dyn HttpFilterFactory>, FieldError> {
    let config: FilterConfig = unpack(typed_config, cx.path)?;
    let path = format!("{}.dns_cache_config", cx.path);
    match &config.implementation_specifier {
        Some(ImplementationSpecifier::DnsCacheConfig(cache)) => {
            Ok(Arc::new(ForwardProxyFactory(parse::dns_cache(cache, &path)?)))
        }
        Some(ImplementationSpecifier::SubClusterConfig(_)) => {
            Err(FieldError::unsupported(format!("{}.sub_cluster_config", cx.path)))
        }
        None => Err(FieldError::new(path, "value is required")),
    }
}

pub(super) fn parse_per_route(config: &Any, path: &str) -> Result<PerRouteConfig, FieldError> {
    let ProtoPerRoute { host_rewrite_specifier } = unpack(config, path)?;
    let rewrite = match host_rewrite_specifier {
        Some(HostRewriteSpecifier::HostRewriteLiteral(host)) => {
            let host = HeaderValue::from_str(&host);
            let path = format!("{path}.host_rewrite_literal");
            Some(Rewrite::Literal(host.map_err(|_| FieldError::new(path, "is not a header's value"))?))
        }
        Some(HostRewriteSpecifier::HostRewriteHeader(name)) => {
            let path = format!("{path}.host_rewrite_header");
            Some(Rewrite::Header(name.parse().map_err(|_| FieldError::new(path, "is not a header name"))?))
        }
        None => None,
    };
    match rewrite {
        Some(Rewrite::Literal(host)) if host.is_empty() => Ok(Arc::new(())),
        Some(rewrite) => Ok(Arc::new(rewrite)),
        None => Ok(Arc::new(())),
    }
}

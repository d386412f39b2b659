//! The resource types of xDS that have services of their own, and what those are called.

/// How resources of one type are asked for outside the aggregated stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ResourceType {
    /// The type.
    pub type_url: &'static str,
    /// The method of the state-of-the-world stream, `/package.Service/Method`; `None`: there is none.
    pub sotw: Option<&'static str>,
    /// The method of the incremental stream.
    pub delta: &'static str,
    /// What is posted to for one poll; `None`: it cannot be polled.
    pub rest: Option<&'static str>,
}

impl ResourceType {
    /// All of them.
    pub const ALL: [ResourceType; 9] = [
        ResourceType {
            type_url: "type.googleapis.com/envoy.config.cluster.v3.Cluster",
            sotw: Some("/envoy.service.cluster.v3.ClusterDiscoveryService/StreamClusters"),
            delta: "/envoy.service.cluster.v3.ClusterDiscoveryService/DeltaClusters",
            rest: Some("/v3/discovery:clusters"),
        },
        ResourceType {
            type_url: "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment",
            sotw: Some("/envoy.service.endpoint.v3.EndpointDiscoveryService/StreamEndpoints"),
            delta: "/envoy.service.endpoint.v3.EndpointDiscoveryService/DeltaEndpoints",
            rest: Some("/v3/discovery:endpoints"),
        },
        ResourceType {
            type_url: "type.googleapis.com/envoy.config.listener.v3.Listener",
            sotw: Some("/envoy.service.listener.v3.ListenerDiscoveryService/StreamListeners"),
            delta: "/envoy.service.listener.v3.ListenerDiscoveryService/DeltaListeners",
            rest: Some("/v3/discovery:listeners"),
        },
        ResourceType {
            type_url: "type.googleapis.com/envoy.config.route.v3.RouteConfiguration",
            sotw: Some("/envoy.service.route.v3.RouteDiscoveryService/StreamRoutes"),
            delta: "/envoy.service.route.v3.RouteDiscoveryService/DeltaRoutes",
            rest: Some("/v3/discovery:routes"),
        },
        ResourceType {
            type_url: "type.googleapis.com/envoy.config.route.v3.ScopedRouteConfiguration",
            sotw: Some("/envoy.service.route.v3.ScopedRoutesDiscoveryService/StreamScopedRoutes"),
            delta: "/envoy.service.route.v3.ScopedRoutesDiscoveryService/DeltaScopedRoutes",
            rest: Some("/v3/discovery:scoped-routes"),
        },
        ResourceType {
            type_url: "type.googleapis.com/envoy.config.route.v3.VirtualHost",
            sotw: None,
            delta: "/envoy.service.route.v3.VirtualHostDiscoveryService/DeltaVirtualHosts",
            rest: None,
        },
        ResourceType {
            type_url: "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret",
            sotw: Some("/envoy.service.secret.v3.SecretDiscoveryService/StreamSecrets"),
            delta: "/envoy.service.secret.v3.SecretDiscoveryService/DeltaSecrets",
            rest: Some("/v3/discovery:secrets"),
        },
        ResourceType {
            type_url: "type.googleapis.com/envoy.service.runtime.v3.Runtime",
            sotw: Some("/envoy.service.runtime.v3.RuntimeDiscoveryService/StreamRuntime"),
            delta: "/envoy.service.runtime.v3.RuntimeDiscoveryService/DeltaRuntime",
            rest: Some("/v3/discovery:runtime"),
        },
        ResourceType {
            type_url: "type.googleapis.com/envoy.config.core.v3.TypedExtensionConfig",
            sotw: Some("/envoy.service.extension.v3.ExtensionConfigDiscoveryService/StreamExtensionConfigs"),
            delta: "/envoy.service.extension.v3.ExtensionConfigDiscoveryService/DeltaExtensionConfigs",
            rest: Some("/v3/discovery:extension_configs"),
        },
    ];

    /// The type of this URL, where it has a service of its own.
    pub fn of(type_url: &str) -> Option<&'static ResourceType> {
        const { &ResourceType::ALL }.iter().find(|it| it.type_url == type_url)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::json;

    #[test]
    fn every_method_and_path_is_that_of_envoys_services() {
        for it in &ResourceType::ALL {
            let message = it.type_url.strip_prefix("type.googleapis.com/").unwrap();
            assert!(json::pool().get_message_by_name(message).is_some(), "{message}");
            for (method, request) in [(it.sotw, "DiscoveryRequest"), (Some(it.delta), "DeltaDiscoveryRequest")] {
                let Some(method) = method else { continue };
                let (service, name) = method.trim_start_matches('/').split_once('/').unwrap();
                let service = json::pool().get_service_by_name(service).expect("the service");
                let method = service.methods().find(|it| it.name() == name).expect("the method");
                assert_eq!(method.input().name(), request);
                assert!(method.is_client_streaming() && method.is_server_streaming());
            }
            // The path is the `google.api.http` option of the service's unary method.
            if let Some(path) = it.rest {
                let service = it.delta.trim_start_matches('/').split_once('/').unwrap().0;
                let service = json::pool().get_service_by_name(service).expect("the service");
                let options: Vec<String> = service.methods().map(|it| format!("{:?}", it.options())).collect();
                assert!(options.iter().any(|text| text.contains(path)), "{path} is not in {options:?}");
            }
        }
    }
}

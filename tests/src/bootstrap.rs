//! Static Envoy bootstraps for tests, put together from pieces of YAML.

/// A bootstrap without `admin`; see [`Bootstrap::yaml`].
#[derive(Debug, Clone, Default)]
pub struct Bootstrap {
    listeners: String,
    clusters: String,
}

impl Bootstrap {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an HTTP listener on 127.0.0.1:`port`. `virtual_hosts` is the YAML of that list in one line or as a block whose
    /// indentation does not matter; `manager` are further lines `field: value` of the HTTP connection manager.
    #[must_use]
    pub fn http(mut self, port: u16, virtual_hosts: &str, manager: &[&str]) -> Self {
        let manager: String = manager.iter().map(|line| format!("          {line}\n")).collect();
        let virtual_hosts = indent(virtual_hosts, 12);
        self.listeners += &format!(
            r#"  - name: http_{port}
    address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: ingress
{manager}          route_config:
            name: local
            virtual_hosts:
{virtual_hosts}
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
"#
        );
        self
    }

    /// Adds a TCP proxy on 127.0.0.1:`port`.
    #[must_use]
    pub fn tcp(self, port: u16, cluster: &str) -> Self {
        self.tcp_of(port, &format!("cluster: {cluster}"))
    }

    /// Adds a TCP proxy on 127.0.0.1:`port` of these fields, in one line.
    #[must_use]
    pub fn tcp_of(self, port: u16, proxy: &str) -> Self {
        self.tcp_with(port, proxy, &[])
    }

    /// The same, on a listener with further lines `field: value`.
    #[must_use]
    pub fn tcp_with(mut self, port: u16, proxy: &str, listener: &[&str]) -> Self {
        let listener: String = listener.iter().map(|line| format!("    {line}\n")).collect();
        self.listeners += &format!(
            r#"  - name: tcp_{port}
    address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}
{listener}    filter_chains:
    - filters:
      - name: envoy.filters.network.tcp_proxy
        typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy, stat_prefix: tcp, {proxy}}}
"#
        );
        self
    }

    /// Adds a cluster of these lines `field: value`.
    #[must_use]
    pub fn cluster_of(mut self, name: &str, fields: &[&str]) -> Self {
        let fields: String = fields.iter().map(|line| format!("    {line}\n")).collect();
        self.clusters += &format!("  - name: {name}\n{fields}");
        self
    }

    /// Adds a STATIC cluster of endpoints on 127.0.0.1. `fields` are further lines `field: value`.
    #[must_use]
    pub fn cluster(mut self, name: &str, ports: &[u16], fields: &[&str]) -> Self {
        let endpoints: String = ports
            .iter()
            .map(|port| {
                format!(
                    "        - {{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}}}}}\n"
                )
            })
            .collect();
        let endpoints = match ports {
            [] => "      endpoints: []\n".to_owned(),
            _ => format!("      endpoints:\n      - lb_endpoints:\n{endpoints}"),
        };
        let fields: String = fields.iter().map(|line| format!("    {line}\n")).collect();
        self.clusters += &format!(
            "  - name: {name}\n    type: STATIC\n    connect_timeout: 1s\n{fields}    load_assignment:\n      \
             cluster_name: {name}\n{endpoints}"
        );
        self
    }

    /// The YAML.
    pub fn yaml(&self) -> String {
        let section = |name: &str, content: &str| match content {
            "" => String::new(),
            content => format!("  {name}:\n{content}"),
        };
        format!("static_resources:\n{}{}", section("listeners", &self.listeners), section("clusters", &self.clusters))
    }
}

/// A bootstrap whose clusters and listeners come over ADS (`api_type`: GRPC or DELTA_GRPC) from a control plane at a port of
/// 127.0.0.1.
pub fn ads_bootstrap(port: u16, api_type: &str) -> String {
    format!(
        r#"
node: {{ id: node-1, cluster: test }}
dynamic_resources:
  ads_config:
    api_type: {api_type}
    transport_api_version: V3
    grpc_services: [{{ envoy_grpc: {{ cluster_name: xds }} }}]
  cds_config: {{ resource_api_version: V3, ads: {{}} }}
  lds_config: {{ resource_api_version: V3, ads: {{}} }}
static_resources:
  clusters:
  - name: xds
    type: STATIC
    connect_timeout: 1s
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {{ http2_protocol_options: {{}} }}
    load_assignment:
      cluster_name: xds
      endpoints: [{{ lb_endpoints: [{{ endpoint: {{ address: {{ socket_address: {{ address: 127.0.0.1, port_value: {port} }} }} }} }}] }}]
"#
    )
}

/// Puts a block below a key: removes the indentation of its first line from every line and adds `width` blanks.
fn indent(block: &str, width: usize) -> String {
    let block = block.trim_start_matches('\n').trim_end();
    let own = block.len() - block.trim_start().len();
    let lines = block.lines().map(|line| format!("{:width$}{}", "", line.get(own..).unwrap_or_default()));
    lines.collect::<Vec<_>>().join("\n")
}

/// A bootstrap with `head` before it, and one HTTP listener on 127.0.0.1:`listen` whose responses say in `x-host` which host they are from.
/// `routes` and `clusters` are items of these lists, with the indentation that they have in a file.
pub fn telling_hosts(head: &str, listen: u16, routes: &str, clusters: &str) -> String {
    format!(
        r#"{head}
static_resources:
  listeners:
  - name: http
    address: {{socket_address: {{address: 127.0.0.1, port_value: {listen}}}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: ingress
          route_config:
            virtual_hosts:
            - name: all
              domains: ["*"]
              response_headers_to_add: [{{header: {{key: x-host, value: "%UPSTREAM_REMOTE_ADDRESS%"}}}}]
              routes:
{routes}
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
  clusters:
{clusters}"#
    )
}

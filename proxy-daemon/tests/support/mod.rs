//! Upstreams, clients and configuration for tests of the data plane.

#![allow(missing_docs, dead_code, clippy::unwrap_used, reason = "each test uses a part of it")]

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use culvert_proxy_daemon::{
    config::model::*,
    http::filters::{FilterCx, FilterSource, HttpFilterFactory},
    runtime::DataPlane,
};

pub const DEADLINE: Duration = Duration::from_secs(10);

pub fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

pub fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < DEADLINE, "not in time: {what}");
        thread::yield_now();
    }
}

/// A server on a thread of its own that counts its connections.
pub struct Upstream {
    pub address: SocketAddr,
    connections: Arc<AtomicUsize>,
    last_request: Arc<Mutex<String>>,
}

impl Upstream {
    fn start(serve: impl Fn(TcpStream, Arc<Mutex<String>>) + Clone + Send + 'static) -> Upstream {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (connections, last_request) = (Arc::new(AtomicUsize::new(0)), Arc::default());
        let (counted, seen) = (Arc::clone(&connections), Arc::clone(&last_request));
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                counted.fetch_add(1, Ordering::SeqCst);
                let (serve, seen) = (serve.clone(), Arc::clone(&seen));
                thread::spawn(move || serve(stream, seen));
            }
        });
        Upstream { address, connections, last_request }
    }

    /// Answers every request with 200 and this body, and keeps connections open.
    pub fn http(body: &'static str) -> Upstream {
        Upstream::start(move |stream, seen| serve_http(stream, body, usize::MAX, &seen))
    }

    /// Closes each connection after so many answers, without saying so.
    pub fn http_closing_after(requests: usize) -> Upstream {
        Upstream::start(move |stream, seen| serve_http(stream, "x", requests, &seen))
    }

    /// Accepts and reads, and never answers.
    pub fn silent() -> Upstream {
        Upstream::start(|mut stream, _| {
            let _ = std::io::copy(&mut stream, &mut std::io::sink());
        })
    }

    /// Answers with all that was sent, once the client has closed its half.
    pub fn echo_after_eof() -> Upstream {
        Upstream::start(|mut stream, _| {
            let mut all = Vec::new();
            if stream.read_to_end(&mut all).is_ok() {
                let _ = stream.write_all(&all);
            }
        })
    }

    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }

    pub fn last_request(&self) -> String {
        self.last_request.lock().unwrap().clone()
    }
}

fn serve_http(stream: TcpStream, body: &str, requests: usize, seen: &Mutex<String>) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut writer = stream;
    for _ in 0..requests {
        let mut head = String::new();
        loop {
            match reader.read_line(&mut head) {
                Ok(0) | Err(_) => return,
                Ok(_) if head.ends_with("\r\n\r\n") => break,
                Ok(_) => {}
            }
        }
        *seen.lock().unwrap() = head;
        let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len());
        if writer.write_all(answer.as_bytes()).is_err() {
            return;
        }
    }
}

/// A port that nobody listens on.
pub fn closed_port() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

#[derive(Debug)]
pub struct Response {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: String,
}

impl Response {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }
}

/// A client connection that is used again and again.
pub struct KeepAlive(BufReader<TcpStream>);

impl KeepAlive {
    pub fn connect(address: SocketAddr) -> KeepAlive {
        let stream = TcpStream::connect_timeout(&address, DEADLINE).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        KeepAlive(BufReader::new(stream))
    }

    pub fn get(&mut self, path: &str) -> Response {
        self.request(path, &[])
    }

    pub fn request(&mut self, path: &str, headers: &[(&str, &str)]) -> Response {
        let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
        let request = format!("GET {path} HTTP/1.1\r\nhost: test\r\n{headers}\r\n");
        self.0.get_mut().write_all(request.as_bytes()).unwrap();
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        let status = line.split(' ').nth(1).unwrap_or_else(|| panic!("no status line: {line:?}")).parse().unwrap();
        let mut headers = Vec::new();
        loop {
            let mut line = String::new();
            self.0.read_line(&mut line).unwrap();
            let Some((name, value)) = line.trim_end().split_once(": ") else { break };
            headers.push((name.to_owned(), value.to_owned()));
        }
        let length = headers.iter().find(|(name, _)| name == "content-length").map_or(0, |(_, n)| n.parse().unwrap());
        let mut body = vec![0; length];
        self.0.read_exact(&mut body).unwrap();
        Response { status, headers, body: String::from_utf8(body).unwrap() }
    }

    /// Waits for the other side to close.
    pub fn is_closed(&mut self) -> bool {
        let mut rest = Vec::new();
        self.0.read_to_end(&mut rest).is_ok() && rest.is_empty()
    }
}

/// One request on a connection of its own.
pub fn get(address: SocketAddr, path: &str, headers: &[(&str, &str)]) -> Response {
    KeepAlive::connect(address).request(path, headers)
}

pub fn send_and_finish(address: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect_timeout(&address, DEADLINE).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream.write_all(bytes).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    answer
}

pub fn cluster<const N: usize>(name: &str, hosts: [SocketAddr; N], lb_policy: LbPolicy) -> ClusterConfig {
    let endpoint = |address| Endpoint {
        address: EndpointAddress::Ip(address),
        weight: 1,
        health: HealthStatus::Healthy,
        hostname: Box::default(),
        additional_addresses: Box::default(),
        details: None,
    };
    ClusterConfig {
        name: name.into(),
        stat_name: name.to_owned(),
        discovery: Discovery::Static,
        lb_policy,
        lb: LbOptions::default(),
        reported_metrics: [].into(),
        socket_matches: Default::default(),
        peer_name: None,
        connect_timeout: Duration::from_secs(5),
        protocol: UpstreamProtocol::Http1,
        http1: Http1ClientOptions::default(),
        max_requests_per_connection: 0,
        max_stream_duration: None,
        idle_timeout: None,
        pool: PoolOptions::default(),
        circuit_breakers: Default::default(),
        per_connection_buffer_limit_bytes: 1 << 20,
        tcp_keepalive: None,
        bind: None,
        happy_eyeballs: HappyEyeballs::default(),
        tls: None,
        health: HealthOptions::default(),
        tracked: Default::default(),
        endpoints: vec![LocalityEndpoints {
            locality: Locality::default(),
            priority: 0,
            endpoints: hosts.map(endpoint).to_vec(),
            ..LocalityEndpoints::default()
        }],
    }
}

pub fn retry(retry_on: RetryOn, num_retries: u32) -> RetryPolicy {
    RetryPolicy {
        retry_on,
        num_retries,
        per_try_timeout: None,
        base_interval: Some(Duration::from_millis(1)),
        max_interval: Some(Duration::from_millis(10)),
        retriable_status_codes: Vec::new(),
        ..RetryPolicy::default()
    }
}

pub fn listener(name: &str, address: SocketAddr, filter: NetworkFilterConfig) -> Listener {
    Listener {
        inbound: false,
        name: name.into(),
        addresses: vec![ListenAddress { address, ipv4_compat: false }],
        stat_prefix: String::new(),
        transparent: false,
        freebind: false,
        backlog: 128,
        use_original_dst: false,
        original_src: None,
        tls_inspector: None,
        not_inspected: None,
        listener_filters_timeout: None,
        continue_on_listener_filters_timeout: false,
        filter_chains: vec![Arc::new(FilterChain {
            name: "".into(),
            chain_match: FilterChainMatch::default(),
            tls: None,
            transport_socket_connect_timeout: None,
            filters: vec![filter],
        })],
        default_filter_chain: None,
        per_connection_buffer_limit_bytes: 1 << 20,
        access_logs: Vec::new(),
    }
}

pub fn tcp_chain(cluster: &str) -> NetworkFilterConfig {
    NetworkFilterConfig::TcpProxy(Arc::new(TcpProxyConfig {
        tunneling: None,
        stat_prefix: "tcp".to_owned(),
        cluster: ClusterChoice::Cluster(cluster.into()),
        metadata_match: None,
        idle_timeout: None,
        max_connect_attempts: 1,
        max_downstream_connection_duration: None,
        duration_jitter: 0.0,
        hash_policy: Box::default(),
        backoff: None,
        access_logs: Vec::new(),
    }))
}

async fn listen(plane: &DataPlane, listener: Listener) -> SocketAddr {
    let name = Arc::clone(&listener.name);
    plane.upsert_listener(Arc::new(listener)).await.unwrap();
    plane.listeners().into_iter().find(|running| running.name == name).unwrap().addresses[0]
}

pub async fn tcp_listener(plane: &DataPlane, name: &str, cluster: &str) -> SocketAddr {
    listen(plane, listener(name, "127.0.0.1:0".parse().unwrap(), tcp_chain(cluster))).await
}

pub async fn http_listener(
    plane: &DataPlane,
    name: &str,
    cluster: &str,
    edit: impl FnOnce(&mut ForwardAction),
) -> SocketAddr {
    let mut action = ForwardAction::to(ClusterChoice::Cluster(cluster.into()));
    edit(&mut action);
    let filter = NetworkFilterConfig::HttpConnectionManager(Arc::new(connection_manager(name, action)));
    listen(plane, listener(name, "127.0.0.1:0".parse().unwrap(), filter)).await
}

fn connection_manager(stat_prefix: &str, action: ForwardAction) -> HttpConnectionManagerConfig {
    let route = Route {
        metadata: None,
        stat_prefix: None,
        body_buffer_limit: None,
        name: String::new(),
        route_match: RouteMatch::new(PathMatch::Prefix("/".into())),
        action: RouteAction::Forward(Box::new(action)),
        headers: HeaderMutations::default(),
        per_filter: Default::default(),
    };
    let host = VirtualHost {
        name: "all".to_owned(),
        domains: vec!["*".to_owned()],
        routes: vec![Arc::new(route)],
        ..VirtualHost::default()
    };
    let routes = RouteConfig { virtual_hosts: vec![host.into()], ..RouteConfig::default() };
    HttpConnectionManagerConfig {
        stat_prefix: stat_prefix.to_owned(),
        routes: RouteSource::Static(Arc::new(routes)),
        http_filters: vec![HttpFilterEntry {
            name: "router".into(),
            disabled: false,
            source: FilterSource::Fixed(router()),
        }],
        ..HttpConnectionManagerConfig::default()
    }
}

fn router() -> Arc<dyn HttpFilterFactory> {
    let any = envoy_types::pb::google::protobuf::Any {
        type_url: "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router".to_owned(),
        value: Default::default(),
    };
    culvert_proxy_daemon::http::filters::parse(&any, &FilterCx { path: "", stat_prefix: "" }).unwrap()
}

use std::net::SocketAddr;

use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
    time::timeout,
};

use super::*;

#[path = "dump_tests.rs"]
pub(super) mod dumps;
use crate::{
    config::model::{
        ClusterConfig, Discovery, Endpoint, EndpointAddress, HappyEyeballs, HealthOptions, HealthStatus,
        Http1ClientOptions, LbOptions, LbPolicy, ListenAddress, Listener, Locality, LocalityEndpoints, PoolOptions,
        Thresholds, UpstreamProtocol,
    },
    layered_runtime::{Entry, Layer, LayerSource},
    runtime::Options,
    stats,
};

/// An admin interface on a port of its own, over a data plane with one worker.
pub(super) struct Admin {
    pub(super) address: SocketAddr,
    data_plane: DataPlane,
    state: SharedState,
    shutdown: Arc<Notify>,
    server: JoinHandle<()>,
}

/// What it answered.
pub(super) struct Answer {
    pub(super) status: u16,
    head: String,
    body: String,
}

impl Answer {
    fn json(&self) -> Json {
        assert!(self.head.contains("content-type: application/json"), "{}", self.head);
        serde_json::from_str(&self.body).unwrap()
    }
}

impl Admin {
    pub(super) async fn start() -> Admin {
        let data_plane =
            DataPlane::start(Options { workers: 1, drain_time: std::time::Duration::from_secs(5), interception: None })
                .unwrap();
        let (state, shutdown) = (SharedState::new(), Arc::new(Notify::new()));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let level = std::sync::Mutex::new(LevelFilter::INFO);
        let values = [("a.b".to_owned(), Entry::from_text("1").unwrap())];
        let layers = vec![
            Layer { name: "base".to_owned(), source: LayerSource::Static(values.into()) },
            Layer { name: "admin".to_owned(), source: LayerSource::Admin },
        ];
        let runtime = Runtime::start(layers).unwrap();
        let admin_state = AdminState {
            data_plane: data_plane.clone(),
            started: Instant::now(),
            concurrency: 1,
            state: state.clone(),
            options: json!({ "concurrency": 1, "mode": "Serve" }),
            node: json!({ "id": "n1" }),
            config: Arc::new(dumps::configuration()),
            log_level: Box::new(move |wanted| {
                let mut level = level.lock().unwrap();
                *level = wanted.unwrap_or(*level);
                *level
            }),
            runtime,
            shutdown: Arc::clone(&shutdown),
            drain_time: Duration::from_millis(1),
            extra_stats: vec![Box::new(|| vec![stats::Metric::external("culvert.kernel.redirected", 17)])],
        };
        Admin { address, data_plane, state, shutdown, server: tokio::spawn(run(admin_state, listener)) }
    }

    async fn request(&self, method: &str, target: &str) -> Answer {
        self.exchange(&format!("{method} {target} HTTP/1.1\r\nhost: admin\r\nconnection: close\r\n\r\n")).await
    }

    async fn exchange(&self, request: &str) -> Answer {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut text = String::new();
        timeout(Duration::from_secs(10), stream.read_to_string(&mut text)).await.expect("an answer").unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        Answer { status, head: head.to_owned(), body: body.to_owned() }
    }

    /// A POST of a form.
    async fn form(&self, target: &str, content_type: &str, body: &str) -> Answer {
        let fields = format!("content-type: {content_type}\r\ncontent-length: {}\r\n", body.len());
        self.exchange(&format!("POST {target} HTTP/1.1\r\nhost: admin\r\nconnection: close\r\n{fields}\r\n{body}"))
            .await
    }

    pub(super) async fn get(&self, target: &str) -> Answer {
        self.request("GET", target).await
    }

    async fn post(&self, target: &str) -> Answer {
        self.request("POST", target).await
    }

    async fn listen(&self) {
        let listener = Listener {
            inbound: false,
            name: "web".into(),
            addresses: vec![ListenAddress { address: "127.0.0.1:0".parse().unwrap(), ipv4_compat: false }],
            stat_prefix: String::new(),
            transparent: false,
            freebind: false,
            backlog: 16,
            use_original_dst: false,
            original_src: None,
            tls_inspector: None,
            not_inspected: None,
            listener_filters_timeout: None,
            continue_on_listener_filters_timeout: false,
            filter_chains: Vec::new(),
            default_filter_chain: None,
            per_connection_buffer_limit_bytes: 1 << 20,
            access_logs: Vec::new(),
        };
        self.data_plane.upsert_listener(Arc::new(listener)).await.unwrap();
    }

    pub(super) async fn stop(self) {
        self.server.abort();
        let data_plane = self.data_plane;
        tokio::task::spawn_blocking(move || data_plane.stop()).await.unwrap();
    }
}

fn cluster(name: &str) -> ClusterConfig {
    let endpoint = |address: &str, health| Endpoint {
        address: EndpointAddress::Ip(address.parse().unwrap()),
        weight: 1,
        health,
        hostname: Box::default(),
        additional_addresses: Box::default(),
        details: None,
    };
    ClusterConfig {
        name: name.into(),
        stat_name: name.replace(':', "_"),
        discovery: Discovery::Static,
        lb_policy: LbPolicy::RoundRobin,
        lb: LbOptions::default(),
        reported_metrics: [].into(),
        socket_matches: Default::default(),
        peer_name: None,
        connect_timeout: Duration::from_secs(5),
        protocol: UpstreamProtocol::Http1,
        http1: Http1ClientOptions::default(),
        tracked: Default::default(),
        max_requests_per_connection: 0,
        max_stream_duration: None,
        idle_timeout: None,
        pool: PoolOptions::default(),
        circuit_breakers: [Thresholds::default(), Thresholds { max_retries: 9, ..Thresholds::default() }],
        per_connection_buffer_limit_bytes: 1 << 20,
        tcp_keepalive: None,
        bind: None,
        happy_eyeballs: HappyEyeballs::default(),
        tls: None,
        health: HealthOptions::default(),
        endpoints: vec![LocalityEndpoints {
            locality: Locality { region: "eu".into(), zone: "eu-1".into(), sub_zone: String::new() },
            priority: 0,
            endpoints: vec![
                endpoint("127.0.0.1:19090", HealthStatus::Unknown),
                endpoint("[::1]:80", HealthStatus::Draining),
            ],
            ..LocalityEndpoints::default()
        }],
    }
}

#[tokio::test]
async fn ready_follows_the_state() {
    let admin = Admin::start().await;
    let answer = admin.get("/ready").await;
    assert_eq!((answer.status, answer.body.as_str()), (503, "PRE_INITIALIZING\n"));
    assert_eq!(admin.post("/healthcheck/ok").await.status, 200);
    assert_eq!(admin.state.get(), ServerState::PreInitializing, "a server that starts is not made ready");
    admin.state.set(ServerState::Live);
    let answer = admin.get("/ready").await;
    assert_eq!((answer.status, answer.body.as_str()), (200, "LIVE\n"));
    assert_eq!(admin.post("/healthcheck/fail").await.body, "OK\n");
    let answer = admin.get("/ready").await;
    assert_eq!((answer.status, answer.body.as_str()), (503, "DRAINING\n"));
    admin.post("/healthcheck/ok").await;
    assert_eq!(admin.get("/ready").await.status, 200);
    admin.stop().await;
}

#[tokio::test]
async fn what_changes_something_needs_a_post() {
    let admin = Admin::start().await;
    for path in
        ["/quitquitquit", "/drain_listeners", "/reset_counters", "/reopen_logs", "/logging", "/healthcheck/fail"]
    {
        let answer = admin.get(path).await;
        assert_eq!((answer.status, answer.body.as_str()), (405, "Method GET not allowed, POST required."), "{path}");
    }
    assert_eq!(admin.post("/reopen_logs").await.body, "OK\n");
    assert_eq!(admin.post("/quitquitquit").await.body, "OK\n");
    timeout(Duration::from_secs(5), admin.shutdown.notified()).await.expect("quitquitquit wakes the daemon");
    admin.stop().await;
}

#[tokio::test]
async fn an_unknown_path_gets_the_help() {
    let admin = Admin::start().await;
    let help = admin.get("/help").await;
    assert_eq!(help.status, 200);
    assert!(help.body.starts_with("admin commands are:\n  /: Admin home page\n"), "{}", help.body);
    assert!(help.body.contains("\n  /quitquitquit (POST): exit the server\n"), "{}", help.body);
    assert!(help.body.contains("\n      usedonly: Only include"), "{}", help.body);
    let unknown = admin.get("/nope").await;
    assert_eq!(unknown.status, 404);
    assert_eq!(unknown.body, format!("invalid path. {}", help.body));
    for header in ["content-type: text/plain; charset=UTF-8", "cache-control: no-cache, max-age=0", "server: envoy"] {
        assert!(unknown.head.contains(header), "{}", unknown.head);
    }
    let home = admin.get("/").await;
    assert!(home.head.contains("content-type: text/html; charset=UTF-8"), "{}", home.head);
    assert!(
        home.body.contains("<a href='stats/prometheus'>")
            && home.body.contains("<form action='logging' method='post'>")
    );
    let head = admin.request("HEAD", "/help").await;
    assert_eq!((head.status, head.body.as_str()), (200, ""));
    admin.stop().await;
}

#[tokio::test]
async fn stats_in_every_format() {
    let admin = Admin::start().await;
    admin.state.set(ServerState::Live);
    stats::Scope::cluster("admin.test").counter("upstream_rq_total").add(3);
    stats::counter("cluster.admin.test.unused");
    let text = admin.get("/stats").await;
    assert_eq!(text.status, 200);
    for line in [
        "cluster.admin.test.upstream_rq_total: 3",
        "cluster.admin.test.unused: 0",
        "culvert.kernel.redirected: 17",
        "server.live: 1",
        "server.state: 0",
        "server.concurrency: 1",
    ] {
        assert!(text.body.lines().any(|found| found == line), "{line} is not in {}", text.body);
    }
    let physical = text.body.lines().find_map(|line| line.strip_prefix("server.memory_physical_size: ")).unwrap();
    assert!(physical.parse::<u64>().unwrap() > 1 << 20, "{physical}");
    let names: Vec<_> = text.body.lines().filter(|line| !line.contains("P0(") && !line.contains("No rec")).collect();
    assert!(names.is_sorted_by_key(|line| line.split(": ").next()), "sorted by name");

    let used = admin.get("/stats?usedonly&filter=%5Ecluster%5C.admin").await;
    assert_eq!(used.body, "cluster.admin.test.upstream_rq_total: 3\n");
    let json = admin.get("/stats?format=json&filter=admin.test.up").await.json();
    assert_eq!(json, json!({ "stats": [{ "name": "cluster.admin.test.upstream_rq_total", "value": 3 }] }));
    for target in ["/stats/prometheus?filter=redirected", "/stats?format=prometheus&filter=redirected"] {
        let body = admin.get(target).await.body;
        assert_eq!(body, "# TYPE envoy_culvert_kernel_redirected counter\nenvoy_culvert_kernel_redirected{} 17\n\n");
    }
    for bad in ["filter=(", "type=Bogus", "format=bogus", "histogram_buckets=x"] {
        let answer = admin.get(&format!("/stats?{bad}")).await;
        assert_eq!(answer.status, 400, "{bad}: {}", answer.body);
    }
    assert_eq!(admin.get("/stats/prometheus?histogram_buckets=disjoint").await.status, 400);
    admin.stop().await;
}

#[tokio::test]
async fn clusters_are_listed_as_envoy_does() {
    let admin = Admin::start().await;
    admin.data_plane.upsert_cluster(cluster("users.default:80"));
    admin.data_plane.upsert_cluster(cluster("front"));
    let text = admin.get("/clusters?filter=users").await.body;
    // The real Envoy's lines; docs/stats.md says which of them are missing.
    let expected = "users.default:80::observability_name::users.default:80
users.default:80::default_priority::max_connections::1024
users.default:80::default_priority::max_pending_requests::1024
users.default:80::default_priority::max_requests::1024
users.default:80::default_priority::max_retries::3
users.default:80::high_priority::max_connections::1024
users.default:80::high_priority::max_pending_requests::1024
users.default:80::high_priority::max_requests::1024
users.default:80::high_priority::max_retries::9
users.default:80::added_via_api::true
users.default:80::127.0.0.1:19090::cx_active::0
users.default:80::127.0.0.1:19090::cx_connect_fail::0
users.default:80::127.0.0.1:19090::cx_total::0
users.default:80::127.0.0.1:19090::rq_active::0
users.default:80::127.0.0.1:19090::rq_error::0
users.default:80::127.0.0.1:19090::rq_success::0
users.default:80::127.0.0.1:19090::rq_timeout::0
users.default:80::127.0.0.1:19090::rq_total::0
users.default:80::127.0.0.1:19090::hostname::
users.default:80::127.0.0.1:19090::health_flags::healthy
users.default:80::127.0.0.1:19090::weight::1
users.default:80::127.0.0.1:19090::region::eu
users.default:80::127.0.0.1:19090::zone::eu-1
users.default:80::127.0.0.1:19090::sub_zone::
users.default:80::127.0.0.1:19090::canary::false
users.default:80::127.0.0.1:19090::priority::0
users.default:80::127.0.0.1:19090::success_rate::-1
users.default:80::127.0.0.1:19090::local_origin_success_rate::-1
";
    assert_eq!(text.split_at(expected.len().min(text.len())).0, expected);
    assert!(text.contains("users.default:80::[::1]:80::health_flags::/eds_status_draining\n"), "{text}");
    let all = admin.get("/clusters").await.body;
    assert!(all.starts_with("front::observability_name::front\n") && all.ends_with(&text), "in the order of the names");

    let json = admin.get("/clusters?format=json").await.json();
    let users = &json["cluster_statuses"][1];
    assert_eq!(users["name"], "users.default:80");
    assert_eq!(users["circuit_breakers"]["thresholds"][1]["priority"], "HIGH");
    assert_eq!(
        users["host_statuses"][0],
        json!({
            "address": { "socket_address": { "address": "127.0.0.1", "port_value": 19090 } },
            "stats": [
                { "name": "cx_active", "type": "GAUGE" }, { "name": "cx_connect_fail" }, { "name": "cx_total" },
                { "name": "rq_active", "type": "GAUGE" }, { "name": "rq_error" }, { "name": "rq_success" },
                { "name": "rq_timeout" }, { "name": "rq_total" },
            ],
            "health_status": { "eds_health_status": "HEALTHY" },
            "weight": 1,
            "locality": { "region": "eu", "zone": "eu-1" },
        })
    );
    assert_eq!(admin.get("/clusters?filter=(").await.status, 400);
    admin.stop().await;
}

#[tokio::test]
async fn listeners_are_listed_and_drained() {
    let admin = Admin::start().await;
    admin.listen().await;
    let address = admin.data_plane.listeners()[0].addresses[0];
    assert_eq!(admin.get("/listeners").await.body, format!("web::{address}\n"));
    let local = json!({ "socket_address": { "address": "127.0.0.1", "port_value": address.port() } });
    assert_eq!(
        admin.get("/listeners?format=json").await.json(),
        json!({ "listener_statuses": [{ "name": "web", "local_address": local }] })
    );
    let answer = admin.post("/drain_listeners?inbound").await;
    let expected = "unknown parameter inbound: graceful, skip_exit, inboundonly are known\n";
    assert_eq!((answer.status, answer.body.as_str()), (400, expected));
    assert_eq!(admin.post("/drain_listeners?inboundonly").await.body, "OK\n");
    TcpStream::connect(address).await.expect("still open: it is not for inbound traffic");
    assert_eq!(admin.post("/drain_listeners").await.body, "OK\n");
    TcpStream::connect(address).await.expect_err("closed when the answer is there");

    admin.listen().await;
    assert_eq!(admin.post("/drain_listeners?graceful").await.body, "OK\n");
    let drained = async {
        while !admin.data_plane.listeners().is_empty() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(Duration::from_secs(10), drained).await.expect("drained after the drain time");
    admin.stop().await;
}

#[tokio::test]
async fn server_info_logging_and_the_rest() {
    let admin = Admin::start().await;
    let info = admin.get("/server_info").await.json();
    assert_eq!(info["version"].as_str().unwrap().split('/').nth(1), Some(env!("CARGO_PKG_VERSION")));
    assert_eq!(info["state"], "PRE_INITIALIZING");
    assert!(info["uptime_current_epoch"].as_str().unwrap().ends_with('s'));
    assert_eq!((&info["command_line_options"]["mode"], &info["node"]["id"]), (&json!("Serve"), &json!("n1")));
    assert_eq!(admin.get("/certs").await.json(), json!({ "certificates": [] }));
    assert!(admin.get("/memory").await.json()["allocated"].as_str().unwrap().parse::<u64>().unwrap() > 0);

    assert_eq!(admin.post("/logging").await.body, "active loggers:\n  culvert: info\n");
    assert_eq!(admin.post("/logging?level=warning").await.body, "active loggers:\n  culvert: warning\n");
    assert_eq!(admin.post("/logging").await.body, "active loggers:\n  culvert: warning\n");
    for bad in ["level=bogus", "http=debug"] {
        let answer = admin.post(&format!("/logging?{bad}")).await;
        assert!(answer.status == 400 && answer.body.contains("usage: /logging"), "{}", answer.body);
    }
    admin.stop().await;
}

/// The texts are the real Envoy's.
#[tokio::test]
async fn runtime_values_are_shown_and_modified() {
    let admin = Admin::start().await;
    let entry = |answer: &Answer, key: &str| answer.json()["entries"][key].clone();
    let before = admin.get("/runtime").await;
    assert_eq!(before.json()["layers"], json!(["base", "admin"]));
    assert_eq!(entry(&before, "a.b"), json!({ "final_value": "1", "layer_values": ["1", ""] }));

    let done = admin.post("/runtime_modify?a.b=%35&c=x+y&a.b=6").await;
    assert_eq!((done.status, done.body.as_str()), (200, "OK\n"));
    let form = "application/x-www-form-urlencoded";
    assert_eq!(admin.form("/runtime_modify", form, "d=4&e=5").await.status, 200);
    let after = admin.get("/runtime").await;
    assert_eq!(entry(&after, "a.b"), json!({ "final_value": "5", "layer_values": ["1", "5"] }));
    assert_eq!(entry(&after, "c")["final_value"], "x+y");
    assert_eq!(entry(&after, "e")["final_value"], "5");

    assert_eq!(admin.post("/runtime_modify?a.b=&c").await.status, 200);
    let after = admin.get("/runtime").await;
    assert_eq!(entry(&after, "a.b")["final_value"], "1");
    assert_eq!(entry(&after, "c"), Json::Null);

    let refused = admin.get("/runtime_modify?a=1").await;
    assert_eq!((refused.status, refused.body.as_str()), (405, "Method GET not allowed, POST required."));
    for answer in [admin.post("/runtime_modify").await, admin.form("/runtime_modify", "text/plain", "a=1").await] {
        assert_eq!(answer.status, 400);
        let usage = "usage: /runtime_modify?key1=value1&key2=value2&keyN=valueN\n       or send the parameters as form \
                     values\nuse an empty value to remove a previously added override";
        assert_eq!(answer.body, usage);
    }
    assert_eq!(admin.post("/runtime_modify?a=x:%20%5B").await.status, 503);
}

//! Discovery at scale: API servers in this process, the built program, and delta clients in this process again.
//!
//! Each client is a node: it is given the services that a service's manifest lists, and asks for clusters, endpoints, listeners
//! and routes as a proxy does. Endpoints are replaced at a steady rate; a new endpoint's address says which change it
//! is, so that each receipt has its delay. `cargo xtask bench discovery` runs this.

#[path = "../tests/kube_api/mod.rs"]
mod kube_api;

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use clap::Parser;
use culvert_discovery::resources::type_url;
use envoy_types::pb::envoy::config::core::v3::Node;
use envoy_types::pb::envoy::config::core::v3::address::Address;
use envoy_types::pb::envoy::config::endpoint::v3::ClusterLoadAssignment;
use envoy_types::pb::envoy::config::endpoint::v3::lb_endpoint::HostIdentifier;
use envoy_types::pb::envoy::service::discovery::v3::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use envoy_types::pb::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use envoy_types::pb::google::protobuf::value::Kind;
use envoy_types::pb::google::protobuf::{ListValue, Struct, Value};
use prost::Message as _;
use serde_json::json;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use kube_api::{KubeApi, SERVICES, SLICES};

/// Discovery at scale.
#[derive(Parser, Debug, Clone)]
struct Args {
    #[arg(long, default_value_t = 5)]
    clusters: usize,
    /// Services, each in all clusters.
    #[arg(long, default_value_t = 2000)]
    services: usize,
    /// Endpoints of all of them.
    #[arg(long, default_value_t = 100_000)]
    endpoints: usize,
    #[arg(long, default_value_t = 1000)]
    clients: usize,
    /// How many services a client may call, itself among them; 0 is all.
    #[arg(long, default_value_t = 20)]
    egress: usize,
    /// Whether the clients are sidecars, each of its own service.
    #[arg(long)]
    sidecars: bool,

    /// How many endpoints are replaced each second.
    #[arg(long, default_value_t = 500)]
    rate: u32,
    /// For how long.
    #[arg(long, default_value_t = 30)]
    seconds: u32,
    /// Passed by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

/// The changes so far, and how long they took to each client that was told.
#[derive(Default)]
struct Seen {
    sent: Mutex<Vec<Instant>>,
    delays: Mutex<Vec<Duration>>,
    in_sync: AtomicUsize,
}

fn name(service: usize) -> String {
    format!("svc-{service:04}")
}

fn namespace(service: usize) -> String {
    format!("ns-{:02}", service % 20)
}

struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Server {
    fn start(config: &Path) -> (Self, SocketAddr) {
        let mut child = Command::new(env!("CARGO_BIN_EXE_culvert-discovery"))
            .args([
                "--listen",
                "127.0.0.1:0",
                "--http",
                "127.0.0.1:0",
                "-l",
                "culvert_discovery=warn,culvert_discovery=info",
            ])
            .arg("-c")
            .arg(config)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let listen = lines
            .by_ref()
            .map_while(Result::ok)
            .find_map(|line| line.split_once("serving xDS on ")?.1.split(',').next()?.parse().ok())
            .expect("it ended");
        std::thread::spawn(move || lines.for_each(drop));
        (Self(child), listen)
    }

    fn cpu(&self) -> f64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.0.id())).unwrap();
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
        (fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap()) / 100.0
    }

    fn memory(&self, what: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.0.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(what)).unwrap();
        line.split_whitespace().next().unwrap().parse::<u64>().unwrap() / 1024
    }
}

/// What the slices of one cluster hold: the addresses of each service.
struct World {
    api: KubeApi,
    addresses: Vec<Vec<Ipv4Addr>>,
}

impl World {
    fn put_slice(&self, service: usize) {
        let endpoints: Vec<_> = self.addresses[service]
            .iter()
            .map(|address| {
                let pod = format!("{}-{}", name(service), u32::from(*address));
                json!({ "addresses": [address], "zone": "zone-1", "nodeName": format!("node-{}", u32::from(*address) % 500),
                        "conditions": { "ready": true, "serving": true, "terminating": false },
                        "targetRef": { "kind": "Pod", "namespace": namespace(service), "name": pod,
                                       "uid": format!("00000000-0000-0000-0000-{:012}", u32::from(*address)) } })
            })
            .collect();
        self.api.put(
            SLICES,
            json!({ "kind": "EndpointSlice", "apiVersion": "discovery.k8s.io/v1", "addressType": "IPv4",
                    "metadata": { "namespace": namespace(service), "name": format!("{}-1", name(service)),
                                  "labels": { "kubernetes.io/service-name": name(service) } },
                    "ports": [{ "name": "http", "port": 8080, "protocol": "TCP" }], "endpoints": endpoints }),
        );
    }
}

#[tokio::main]
async fn main() {
    let args = Args::parse();
    let directory = tempfile::tempdir().unwrap();
    let policy = directory.path().join("policy");
    std::fs::create_dir(&policy).unwrap();
    let manifests: String = (0..args.services).map(|service| manifest(service, &args)).collect();
    std::fs::write(policy.join("manifests.yaml"), manifests).unwrap();
    let each = args.endpoints / args.clusters / args.services;
    let mut config = format!("clusters:\n- {{name: policy, manifests: {}}}\n", policy.display());
    let mut worlds = Vec::new();
    for cluster in 0..args.clusters {
        let api = KubeApi::start().await;
        config.push_str(&format!(
            "- {{name: c{cluster}, region: r{cluster}, kubernetes: {{server: '{}'}}}}\n",
            api.url()
        ));
        let first = (10 << 24) + u32::try_from(cluster * args.services * each).unwrap();
        let address = |service, i| Ipv4Addr::from(first + u32::try_from(service * each + i).unwrap());
        let addresses = (0..args.services).map(|service| (0..each).map(|i| address(service, i)).collect()).collect();
        let world = World { api, addresses };
        for service in 0..args.services {
            let vip =
                Ipv4Addr::from((172 << 24) + (16 << 16) + u32::try_from(cluster * args.services + service).unwrap());
            world.api.put(
                SERVICES,
                json!({ "kind": "Service", "apiVersion": "v1",
                        "metadata": { "namespace": namespace(service), "name": name(service) },
                        "spec": { "clusterIP": vip, "ports": [{ "name": "http", "port": 80, "protocol": "TCP" }] } }),
            );
            world.put_slice(service);
        }
        world.api.compact();
        worlds.push(world);
    }
    let path = directory.path().join("discovery.yaml");
    std::fs::write(&path, config).unwrap();
    let started = Instant::now();
    let (server, listen) = Server::start(&path);
    let load = std::fs::read_to_string("/proc/loadavg").unwrap();
    println!("{args:?}, load average before {}", load.trim());
    println!("serves after {:.1?}, {} MiB", started.elapsed(), server.memory("VmRSS:"));

    let seen = Arc::new(Seen::default());
    let started = Instant::now();
    for client in 0..args.clients {
        let (seen, args) = (Arc::clone(&seen), args.clone());
        tokio::spawn(async move { follow(client, listen, &args, &seen).await });
    }
    while seen.in_sync.load(Ordering::Relaxed) < args.clients {
        tokio::time::sleep(Duration::from_millis(10)).await;
        assert!(started.elapsed() < Duration::from_secs(600), "{:?} clients in sync", seen.in_sync);
    }
    println!("all clients have all after {:.1?}, {} MiB", started.elapsed(), server.memory("VmRSS:"));

    let (started, cpu) = (Instant::now(), server.cpu());
    let changes = args.rate * args.seconds;
    let mut random = fastrand::Rng::with_seed(7);
    for change in 0..changes {
        tokio::time::sleep_until((started + Duration::from_secs(1) / args.rate * change).into()).await;
        let world = &mut worlds[random.usize(..args.clusters)];
        let service = random.usize(..args.services);
        world.addresses[service][random.usize(..each)] = Ipv4Addr::from((11 << 24) + change);
        seen.sent.lock().unwrap().push(Instant::now());
        world.put_slice(service);
    }
    let elapsed = started.elapsed().as_secs_f64();
    let cpu = (server.cpu() - cpu) / elapsed * 100.0;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let mut delays = std::mem::take(&mut *seen.delays.lock().unwrap());
    delays.sort();
    let at = |share: f64| delays[((delays.len() - 1) as f64 * share) as usize].as_secs_f64() * 1000.0;
    println!(
        "{changes} changes in {elapsed:.1} s: {} receipts, p50 {:.0} ms, p99 {:.0} ms, longest {:.0} ms; CPU {cpu:.0} % of one core, \
         {} MiB, at most {} MiB",
        delays.len(),
        at(0.5),
        at(0.99),
        at(1.0),
        server.memory("VmRSS:"),
        server.memory("VmHWM:"),
    );
}

/// What a service's pods may call: those that follow it.
fn manifest(service: usize, args: &Args) -> String {
    if args.egress == 0 {
        return String::new();
    }
    let others = (service + 1..service + args.egress).map(|other| other % args.services);
    let egress: Vec<_> = others.map(|other| format!("{}.{}", name(other), namespace(other))).collect();
    format!(
        "---\napiVersion: culvert.dev/v1alpha1\nkind: ServiceManifest\nmetadata: {{name: {}, namespace: {}}}\nspec: {{egress: \
         [{}]}}\n",
        name(service),
        namespace(service),
        egress.join(", ")
    )
}

/// One client: acknowledges all and notes when it heard of which change.
async fn follow(client: usize, listen: SocketAddr, args: &Args, seen: &Seen) {
    let mut ads = AggregatedDiscoveryServiceClient::connect(format!("http://{listen}")).await.unwrap();
    let (requests, stream) = mpsc::channel(16);
    let service = client * args.services / args.clients;
    let services = Value {
        kind: Some(Kind::ListValue(ListValue {
            values: vec![Value { kind: Some(Kind::StringValue(format!("{}.{}", name(service), namespace(service)))) }],
        })),
    };
    let mut fields = HashMap::from([("services".to_owned(), services)]);
    if args.sidecars {
        let role = Value { kind: Some(Kind::StringValue("sidecar".to_owned())) };
        fields.insert("culvert.proxy".to_owned(), role);
    }
    let metadata = Struct { fields };
    let node = Node { id: format!("node-{client}"), metadata: Some(metadata), ..Default::default() };
    let ask = |type_url: &str, names: Vec<String>| DeltaDiscoveryRequest {
        node: Some(node.clone()),
        type_url: type_url.to_owned(),
        resource_names_subscribe: names,
        ..Default::default()
    };
    requests.send(ask(type_url::CLUSTER, vec!["*".to_owned()])).await.unwrap();
    let mut responses = ads.delta_aggregated_resources(ReceiverStream::new(stream)).await.unwrap().into_inner();
    let mut newest: HashMap<String, u32> = HashMap::new();
    let (mut wanted, mut has) = (usize::MAX, 0);
    while let Ok(Some(response)) = responses.message().await {
        let DeltaDiscoveryResponse { resources, type_url, nonce, .. } = response;
        let now = Instant::now();
        let ack = DeltaDiscoveryRequest { type_url: type_url.clone(), response_nonce: nonce, ..Default::default() };
        requests.send(ack).await.unwrap();
        if type_url == type_url::CLUSTER {
            let names: Vec<_> = resources.into_iter().map(|r| r.name).filter(|name| is_of_endpoints(name)).collect();
            wanted = names.len();
            requests.send(ask(type_url::ENDPOINT, names)).await.unwrap();
            requests.send(ask(type_url::LISTENER, vec!["*".to_owned()])).await.unwrap();
            requests.send(ask(type_url::ROUTE, vec!["outbound_http_80".to_owned()])).await.unwrap();
            continue;
        }
        if type_url != type_url::ENDPOINT {
            continue;
        }
        let before = has;
        has += resources.len();
        if before < wanted && has >= wanted {
            seen.in_sync.fetch_add(1, Ordering::Relaxed);
        }
        let mut delays = Vec::new();
        for resource in resources {
            let newest = newest.entry(resource.name).or_default();
            let assignment = ClusterLoadAssignment::decode(&*resource.resource.unwrap().value).unwrap();
            let changes: Vec<u32> =
                assignment.endpoints.iter().flat_map(|l| &l.lb_endpoints).filter_map(change_of).collect();
            let sent = seen.sent.lock().unwrap();
            delays.extend(changes.iter().filter(|c| **c >= *newest).map(|c| now - sent[*c as usize]));
            *newest = changes.into_iter().map(|change| change + 1).max().unwrap_or_default().max(*newest);
        }
        seen.delays.lock().unwrap().extend(delays);
    }
}

/// Whether a cluster has endpoints that discovery tells: not those that lead where the client wanted to go, or nowhere.
fn is_of_endpoints(cluster: &str) -> bool {
    cluster.contains(':') && !cluster.starts_with("inbound_")
}

/// Which change brought an endpoint, if one did.
fn change_of(endpoint: &envoy_types::pb::envoy::config::endpoint::v3::LbEndpoint) -> Option<u32> {
    let Some(HostIdentifier::Endpoint(endpoint)) = &endpoint.host_identifier else { return None };
    let Some(Address::SocketAddress(address)) = endpoint.address.as_ref()?.address.as_ref() else { return None };
    let rest = address.address.strip_prefix("11.")?;
    Some(u32::from(format!("0.{rest}").parse::<Ipv4Addr>().ok()?))
}

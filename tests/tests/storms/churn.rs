//! Hosts and clusters that come and go all the time, as a control plane says: a change every 10 ms, and 10,000 clusters with their endpoints.

use std::collections::HashSet;
use std::fs;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use culvert_tests::bootstrap::Bootstrap;
use culvert_tests::control_plane::{ControlPlane, Push, Request as Asked, Resource, Stream};
use culvert_tests::daemon::{Daemon, Kind, fetch, free_port};
use culvert_tests::http1::{Request, Response};
use culvert_tests::wait_until;
use envoy_types::pb::envoy::config::cluster::v3::Cluster;
use envoy_types::pb::envoy::config::cluster::v3::cluster::{ClusterDiscoveryType, DiscoveryType, EdsClusterConfig};
use envoy_types::pb::envoy::config::core::v3::config_source::ConfigSourceSpecifier;
use envoy_types::pb::envoy::config::core::v3::socket_address::PortSpecifier;
use envoy_types::pb::envoy::config::core::v3::{
    Address, AggregatedConfigSource, ApiVersion, ConfigSource, SocketAddress, address,
};
use envoy_types::pb::envoy::config::endpoint::v3::lb_endpoint::HostIdentifier;
use envoy_types::pb::envoy::config::endpoint::v3::{ClusterLoadAssignment, Endpoint, LbEndpoint, LocalityLbEndpoints};
use envoy_types::pb::google::protobuf::Any;
use prost::{Message, Name};

use super::clients::{Clients, Count};

const DEADLINE: Duration = Duration::from_secs(30);
/// Hosts are `127.0.5.<number>`.
const HOSTS: usize = 250;
/// How many of them there are at a time.
const AT_A_TIME: usize = 20;

/// What the hosts, which all listen at one port, know and count.
#[derive(Default)]
struct Hosts {
    /// The last step of the control plane, from which on the hosts are `step..step + AT_A_TIME`.
    step: Arc<AtomicUsize>,
    served: AtomicU64,
    /// Requests to hosts that the proxy had acknowledged to be gone before the requests were sent.
    late: AtomicU64,
}

impl Hosts {
    fn start() -> Result<(u16, Arc<Hosts>)> {
        let listener = TcpListener::bind("0.0.0.0:0")?;
        let port = listener.local_addr()?.port();
        let hosts = Arc::<Hosts>::default();
        let shared = Arc::clone(&hosts);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let hosts = Arc::clone(&shared);
                thread::spawn(move || hosts.serve(stream));
            }
        });
        Ok((port, hosts))
    }

    fn serve(&self, stream: TcpStream) -> Result<()> {
        let number = match stream.local_addr()?.ip() {
            std::net::IpAddr::V4(address) => usize::from(address.octets()[3]),
            std::net::IpAddr::V6(_) => 0,
        };
        let mut reader = std::io::BufReader::new(stream);
        while let Some(request) = Request::read(&mut reader)? {
            // What was acknowledged when it was sent, and what may have been said since.
            if let Some(sent) = request.headers.get("x-step").and_then(|step| step.parse::<usize>().ok()) {
                let last = self.step.load(Ordering::SeqCst) + 1 + AT_A_TIME;
                if (sent..last).all(|there| there % HOSTS != number) {
                    self.late.fetch_add(1, Ordering::Relaxed);
                }
            }
            self.served.fetch_add(1, Ordering::Relaxed);
            Response::new(200, "text/plain", b"ok".to_vec()).write(reader.get_mut(), false)?;
        }
        Ok(())
    }
}

fn resource<M: Message + Name>(name: &str, version: usize, message: &M) -> Resource {
    let body = Any { type_url: M::type_url(), value: message.encode_to_vec() };
    Resource { name: name.to_owned(), version: version.to_string(), body }
}

fn assignment(cluster: &str, port: u16, numbers: impl Iterator<Item = usize>) -> ClusterLoadAssignment {
    let endpoint = |number: usize| {
        let address = Ipv4Addr::new(127, 0, 5, number as u8).to_string();
        let port_specifier = Some(PortSpecifier::PortValue(port.into()));
        let address = address::Address::SocketAddress(SocketAddress { address, port_specifier, ..Default::default() });
        let address = Some(Address { address: Some(address) });
        let endpoint = HostIdentifier::Endpoint(Endpoint { address, ..Default::default() });
        LbEndpoint { host_identifier: Some(endpoint), ..Default::default() }
    };
    let group = LocalityLbEndpoints { lb_endpoints: numbers.map(endpoint).collect(), ..Default::default() };
    ClusterLoadAssignment { cluster_name: cluster.to_owned(), endpoints: vec![group], ..Default::default() }
}

/// A bootstrap that asks a control plane for more; `fields`: what it asks for by itself.
fn bootstrap(plane: &ControlPlane, api_type: &str, fields: &str, rest: Bootstrap) -> String {
    let options = "typed_extension_protocol_options: {envoy.extensions.upstreams.http.v3.HttpProtocolOptions: {'@type': \
                   type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, explicit_http_config: \
                   {http2_protocol_options: {}}}}";
    let rest = rest.cluster("xds", &[plane.address.port()], &[options]).yaml();
    format!(
        "node: {{id: node-1, cluster: test}}\ndynamic_resources: {{ads_config: {{api_type: {api_type}, transport_api_version: V3, \
         grpc_services: [{{envoy_grpc: {{cluster_name: xds}}}}]}}{fields}}}\n{rest}"
    )
}

/// Waits for a request that is asked for; none may refuse anything.
fn requested(stream: &Stream, what: &str, mut wanted: impl FnMut(&Asked) -> bool) -> Result<()> {
    loop {
        let request = stream.next(DEADLINE)?.with_context(|| format!("no {what}"))?;
        ensure!(request.error.is_none(), "refused: {request:?}");
        if wanted(&request) {
            return Ok(());
        }
    }
}

fn acknowledged(stream: &Stream, nonce: &str) -> Result<()> {
    requested(stream, &format!("answer to {nonce}"), |request| request.nonce == nonce)
}

/// Hosts come and go every 10 ms, as fast as the proxy acknowledges that. None of them fails.
fn hosts_come_and_go(kind: Kind) -> Result<(Count, u64)> {
    let (plane, (port, hosts), listen) = (ControlPlane::start()?, Hosts::start()?, free_port()?);
    let routes = "- {name: all, domains: ['*'], routes: [{match: {prefix: /}, route: {cluster: app}}]}";
    let eds = ["type: EDS", "eds_cluster_config: {eds_config: {resource_api_version: V3, ads: {}}}"];
    let rest = Bootstrap::new().http(listen, routes, &[]).cluster_of("app", &eds);
    let yaml = bootstrap(&plane, "GRPC", "", rest);
    // It is ready when it has its first endpoints.
    let starting = thread::spawn(move || Daemon::start(kind, &yaml));
    let stream = plane.stream(DEADLINE)?;
    let asked = stream.next(DEADLINE)?.context("nothing was asked")?;
    let push = |step: usize| {
        let there = (step..step + AT_A_TIME).map(|number| number % HOSTS);
        let resources = vec![resource("app", step, &assignment("app", port, there))];
        let (version, nonce) = (step.to_string(), step.to_string());
        stream.push(Push { type_url: asked.type_url.clone(), version, nonce, resources, removed: Vec::new() });
        acknowledged(&stream, &step.to_string())
    };
    push(0)?;
    let proxy = starting.join().map_err(|_| anyhow::anyhow!("the thread that starts the proxy panicked"))??;
    let clients = Clients::start_telling(listen, &["/"], &hosts.step);
    let begun = Instant::now();
    for step in 1..=2 * HOSTS {
        thread::sleep(Duration::from_millis(10 * step as u64).saturating_sub(begun.elapsed()));
        push(step)?;
        hosts.step.store(step, Ordering::SeqCst);
    }
    let [count] = <[Count; 1]>::try_from(clients.stop()?).ok().context("one count")?;
    ensure!(proxy.stats()?.get("cluster.app.membership_change") > 100, "the hosts have not changed");
    Ok((count, hosts.late.load(Ordering::Relaxed)))
}

#[test]
fn hosts_that_come_and_go_fail_nothing() -> Result<()> {
    for kind in [Kind::Envoy, Kind::Culvert] {
        let (count, late) = hosts_come_and_go(kind).with_context(|| format!("{kind:?}"))?;
        println!("{kind:?}: {count:?}, {late} requests to hosts that were gone");
        ensure!(count.requests > 100, "{kind:?}: {count:?}");
        ensure!(count.failed() == 0, "{kind:?}: {count:?}");
        // Envoy acknowledges before its workers know.
        ensure!(late == 0 || kind == Kind::Envoy, "{late} requests to hosts that were gone");
    }
    Ok(())
}

/// What a process holds.
#[derive(Debug, Clone, Copy)]
struct Held {
    files: usize,
    threads: usize,
    tasks: u64,
    memory: u64,
    stats: usize,
}

fn held(proxy: &Daemon) -> Result<Held> {
    let directory = format!("/proc/{}", proxy.pid());
    let count = |name: &str| -> Result<usize> { Ok(fs::read_dir(format!("{directory}/{name}"))?.count()) };
    let (tasks, stats) = (proxy.stats()?.get("server.tasks"), proxy.admin("/stats")?.lines().count());
    ensure!(tasks > 0, "nobody counts tasks");
    Ok(Held { files: count("fd")?, threads: count("task")?, tasks, memory: proxy.memory()?, stats })
}

/// Clusters of new names come, are used and go, with endpoints that change meanwhile.
#[test]
fn ten_thousand_cycles_leave_nothing_behind() -> Result<()> {
    const CYCLES: usize = 10_000;
    /// The first ones fill what is kept for the next.
    const WARM: usize = 2_000;
    /// So many clusters live through the same cycle.
    const AT_ONCE: usize = 16;
    let (plane, (port, hosts), listen) = (ControlPlane::start()?, Hosts::start()?, free_port()?);
    let routes = "- {name: all, domains: ['*'], routes: [{match: {prefix: /}, route: {cluster_header: x-cluster}}]}";
    let cds = ", cds_config: {resource_api_version: V3, ads: {}}";
    let yaml = bootstrap(&plane, "DELTA_GRPC", cds, Bootstrap::new().http(listen, routes, &[]));
    let starting = thread::spawn(move || Daemon::start(Kind::Culvert, &yaml));
    let stream = plane.stream(DEADLINE)?;
    let (clusters, endpoints) = (Cluster::type_url(), ClusterLoadAssignment::type_url());
    let mut nonce = 0;
    let mut push = |type_url: &str, resources: Vec<Resource>, removed: Vec<String>| {
        nonce += 1;
        let (version, nonce, type_url) = (nonce.to_string(), nonce.to_string(), type_url.to_owned());
        stream.push(Push { type_url, version, nonce: nonce.clone(), resources, removed });
        nonce
    };
    let first = push(&clusters, Vec::new(), Vec::new());
    acknowledged(&stream, &first)?;
    let proxy = starting.join().map_err(|_| anyhow::anyhow!("the thread that starts the proxy panicked"))??;
    let ads = ConfigSource {
        resource_api_version: ApiVersion::V3.into(),
        config_source_specifier: Some(ConfigSourceSpecifier::Ads(AggregatedConfigSource {})),
        ..Default::default()
    };
    let mut live: Vec<String> = Vec::new();
    let mut before = None;
    // In each cycle a cluster comes, is said its endpoints twice, is used, and goes.
    for cycle in (0..CYCLES).step_by(AT_ONCE) {
        let names: Vec<_> = (cycle..cycle + AT_ONCE).map(|number| format!("cluster-{number}")).collect();
        let cluster = |name: &String| {
            let eds = EdsClusterConfig { eds_config: Some(ads.clone()), ..Default::default() };
            let cluster = Cluster {
                name: name.clone(),
                cluster_discovery_type: Some(ClusterDiscoveryType::Type(DiscoveryType::Eds.into())),
                eds_cluster_config: Some(eds),
                ..Default::default()
            };
            resource(name, cycle, &cluster)
        };
        let gone = std::mem::replace(&mut live, names);
        let changed = push(&clusters, live.iter().map(cluster).collect(), gone);
        let with = |version: usize| {
            let numbers = |number: usize| (0..3).map(move |host| (number + version + host) % HOSTS);
            let said = |(number, name): (usize, &String)| {
                resource(name, version, &assignment(name, port, numbers(cycle + number)))
            };
            live.iter().enumerate().map(said).collect()
        };
        let mut unasked: HashSet<&String> = live.iter().collect();
        requested(&stream, "question for endpoints", |request| {
            unasked.retain(|name| !request.names.contains(name));
            unasked.is_empty()
        })?;
        // The clusters warm until they have them.
        push(&endpoints, with(0), Vec::new());
        acknowledged(&stream, &changed)?;
        let changed = push(&endpoints, with(1), Vec::new());
        acknowledged(&stream, &changed)?;
        for name in &live {
            let used = Request::get("/").header("x-cluster", name);
            wait_until(DEADLINE, "the new cluster to serve", || {
                let status = fetch(listen, used.clone())?.status;
                ensure!(status == 200, "{name} answers {status}");
                Ok(())
            })?;
        }
        if cycle == WARM {
            before = Some(held(&proxy)?);
        }
    }
    let before = before.context("it was looked at after the warm-up")?;
    let mut after = before;
    let settled = wait_until(DEADLINE, "what is gone to be let go of", || {
        after = held(&proxy)?;
        ensure!(after.files <= before.files + 8, "open files: {} and {}", before.files, after.files);
        // The admin interface may have one or two more that wait for work: it is asked all the time.
        ensure!(after.threads <= before.threads + 2, "threads: {} and {}", before.threads, after.threads);
        ensure!(after.tasks <= before.tasks + 16, "tasks: {} and {}", before.tasks, after.tasks);
        ensure!(after.stats <= before.stats + 100, "statistics: {} and {}", before.stats, after.stats);
        // A cluster of three hosts that were used costs more than 10 KiB.
        ensure!(after.memory <= before.memory + 8 * 1024 * 1024, "bytes: {} and {}", before.memory, after.memory);
        Ok(())
    });
    println!("before {before:?}, after {after:?}, {} requests", hosts.served.load(Ordering::Relaxed));
    settled
}

//! `/metrics`: counters and gauges in Prometheus' text format.

use std::collections::HashMap;
use std::fmt::{Display, Write as _};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use culvert_xds_client::overrides::contexts::Carried;

use super::StatusPages;
use crate::mesh::{Health, Mesh, MeshPort, OffloadedEndpoint, cluster_name};
use crate::overrides::contexts::Passed;
use crate::registry::Cluster;
use crate::resources::ProxyKind;
use crate::server::authorization::Refusal;
use crate::server::clients::ClientStatus;
use crate::server::loads::Load;

/// The kernel's ticks a second in `/proc`, the same on every machine that this runs on.
const TICKS: f64 = 100.0;

/// What the service has done since it was started.
#[derive(Debug)]
pub struct Activity {
    /// When it was started, in seconds since the epoch.
    pub started: u64,
    builds: AtomicU64,
    build_microseconds: AtomicU64,
    /// Since when which offloaded endpoints are there, in seconds since the epoch.
    offloaded: Mutex<HashMap<Offloaded, i64>>,
}

/// Cluster, revision and address of an offloaded endpoint.
type Offloaded = (String, String, SocketAddr);

impl Default for Activity {
    fn default() -> Self {
        let started = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let (builds, build_microseconds) = (AtomicU64::new(0), AtomicU64::new(0));
        Self { started, builds, build_microseconds, offloaded: Mutex::default() }
    }
}

impl Activity {
    /// Notes that a mesh and its resources were made.
    pub fn built(&self, took: Duration) {
        self.builds.fetch_add(1, Ordering::Relaxed);
        let took = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.build_microseconds.fetch_add(took, Ordering::Relaxed);
    }

    /// Notes which offloaded endpoints there are.
    pub fn saw(&self, mesh: &Mesh) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let now = i64::try_from(now).unwrap_or(i64::MAX);
        let mut known = self.offloaded();
        let ports = mesh.services.values().flat_map(|service| service.ports.values());
        let there = ports.flat_map(|port| &port.offloaded).map(key);
        *known =
            there.map(|key| (known.get(&key).copied().unwrap_or(now), key)).map(|(since, key)| (key, since)).collect();
    }

    /// Since when an offloaded endpoint is there, in seconds since the epoch.
    pub fn offloaded_since(&self, endpoint: &OffloadedEndpoint) -> i64 {
        self.offloaded().get(&key(endpoint)).copied().unwrap_or_default()
    }

    fn offloaded(&self) -> MutexGuard<'_, HashMap<Offloaded, i64>> {
        // The map is replaced as a whole, so a panic elsewhere does not spoil it.
        self.offloaded.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn key(endpoint: &OffloadedEndpoint) -> Offloaded {
    (endpoint.cluster.clone(), endpoint.revision.clone(), endpoint.address)
}

/// The text being written.
#[derive(Default)]
struct Exposition(String);

impl Exposition {
    /// A metric with all its samples.
    fn family<const N: usize, V: Display>(
        &mut self,
        name: &str,
        kind: &str,
        help: &str,
        samples: impl IntoIterator<Item = ([(&'static str, String); N], V)>,
    ) {
        // Writing to a String cannot fail, here and below.
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
        for (labels, value) in samples {
            self.0.push_str(name);
            for (index, (label, text)) in labels.iter().enumerate() {
                self.0.push(if index == 0 { '{' } else { ',' });
                let text = text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
                let _ = write!(self.0, "{label}=\"{text}\"");
            }
            if N > 0 {
                self.0.push('}');
            }
            let _ = writeln!(self.0, " {value}");
        }
    }

    fn gauge(&mut self, name: &str, help: &str, value: impl Display) {
        self.family(name, "gauge", help, [([], value)]);
    }

    fn counter(&mut self, name: &str, help: &str, value: impl Display) {
        self.family(name, "counter", help, [([], value)]);
    }
}

impl StatusPages {
    /// The document at `/metrics`.
    #[must_use]
    pub fn metrics(&self) -> String {
        let mut to = Exposition::default();
        let version = [("version", env!("CARGO_PKG_VERSION").to_owned())];
        to.family("culvert_discovery_build_info", "gauge", "The version of the program.", [(version, 1)]);
        to.gauge("culvert_discovery_ready", "Whether every source has been read.", u8::from(self.is_ready()));
        self.write_sources(&mut to);
        self.write_mesh(&mut to);
        self.write_clients(&mut to);
        self.write_loads(&mut to);
        self.write_checks(&mut to);
        self.write_secrets(&mut to);
        self.write_registrations(&mut to);
        self.write_overrides(&mut to);
        self.write_contexts(&mut to);
        let seconds = Duration::from_micros(self.activity.build_microseconds.load(Ordering::Relaxed)).as_secs_f64();
        let builds = self.activity.builds.load(Ordering::Relaxed);
        to.counter("culvert_discovery_builds_total", "How often the mesh and its resources were made.", builds);
        to.counter("culvert_discovery_build_seconds_total", "How long that took.", seconds);
        write_process(&mut to, self.activity.started);
        to.0
    }

    fn write_sources(&self, to: &mut Exposition) {
        let registry = self.registry.borrow().clone();
        to.counter("culvert_discovery_source_updates_total", "Changes that sources reported.", registry.version);
        let mut family = |name: &str, help: &str, value: &dyn Fn(&Cluster) -> usize| {
            let clusters = registry.clusters.iter();
            let samples = clusters.map(|cluster| ([("cluster", cluster.info.name.clone())], value(cluster)));
            to.family(&format!("culvert_discovery_{name}"), "gauge", help, samples);
        };
        let stale = "Whether a cluster cannot be read, so that its last objects, if there are any, stay in force.";
        let is_stale = |cluster: &Cluster| cluster.health.stale || cluster.objects.is_none();
        family("source_stale", stale, &|cluster| usize::from(is_stale(cluster)));
        let errors = "Files that are not in force as they are.";
        family("source_file_errors", errors, &|cluster| cluster.health.file_errors.len());
        let objects = |cluster: &Cluster| cluster.objects.clone().unwrap_or_default();
        family("cluster_services", "Services of a cluster.", &|cluster| objects(cluster).services.len());
        family("cluster_endpoint_slices", "EndpointSlices of a cluster.", &|cluster| objects(cluster).slices.len());
        family("cluster_pods", "Pods of a cluster.", &|cluster| objects(cluster).pods.len());
    }

    fn write_mesh(&self, to: &mut Exposition) {
        let snapshot = self.snapshots.borrow().clone();
        let mesh = &snapshot.mesh;
        let ports: Vec<&MeshPort> = mesh.services.values().flat_map(|service| service.ports.values()).collect();
        let with = |health| {
            let endpoints = ports.iter().flat_map(|port| &port.endpoints);
            endpoints.filter(|endpoint| endpoint.health == health).count()
        };
        to.gauge("culvert_discovery_services", "Services of the mesh.", mesh.services.len());
        to.gauge("culvert_discovery_service_ports", "Ports of services of the mesh.", ports.len());
        let endpoints =
            [("healthy", Health::Healthy), ("draining", Health::Draining), ("unhealthy", Health::Unhealthy)];
        let endpoints = endpoints.map(|(name, health)| ([("health", name.to_owned())], with(health)));
        to.family("culvert_discovery_endpoints", "gauge", "Load-balanced endpoints.", endpoints);
        let offloaded: usize = ports.iter().map(|port| port.offloaded.len()).sum();
        to.gauge("culvert_discovery_offloaded_endpoints", "Endpoints that only overrides reach.", offloaded);
        to.gauge("culvert_discovery_warnings", "Inconsistencies between objects or clusters.", mesh.warnings.len());
        let served = ProxyKind::ALL.into_iter().flat_map(|kind| {
            let types = snapshot.resources(kind).types();
            types.map(move |(type_url, resources)| {
                let labels = [("kind", kind.name().to_owned()), ("type", short(type_url).to_owned())];
                (labels, resources.resources.size())
            })
        });
        to.family("culvert_discovery_resources", "gauge", "Resources by kind of proxy and type.", served);
    }

    fn write_clients(&self, to: &mut Exposition) {
        let clients = self.clients.list();
        // Clients choose their names: only those that are known become labels, so that there are not ever more series.
        let agents = ["culvert", "envoy", "grpc", "other"];
        let agent = |client: &ClientStatus| match client.user_agent.as_str() {
            "culvert" => "culvert",
            "envoy" => "envoy",
            name if name.starts_with("gRPC ") => "grpc",
            _ => "other",
        };
        let connected = agents.into_iter().flat_map(|name| {
            ["sotw", "delta"].map(|variant| {
                let is = |client: &&ClientStatus| client.variant == variant && agent(client) == name;
                let labels = [("agent", name.to_owned()), ("variant", variant.to_owned())];
                (labels, clients.iter().filter(is).count())
            })
        });
        to.family("culvert_discovery_clients", "gauge", "Connected xDS streams.", connected.collect::<Vec<_>>());
        let state = |state: &str| clients.iter().filter(|client| client.state() == state).count();
        let states = ["in sync", "waiting", "rejected"].map(|name| ([("state", name.to_owned())], state(name)));
        to.family("culvert_discovery_client_states", "gauge", "Connected xDS streams by what they have.", states);
        let totals = self.clients.totals();
        to.counter("culvert_discovery_streams_total", "xDS streams that were opened.", self.clients.streams());
        let responses = totals.responses.load(Ordering::Relaxed);
        to.counter("culvert_discovery_responses_total", "xDS responses that were sent.", responses);
        let rejections = totals.rejections.load(Ordering::Relaxed);
        to.counter("culvert_discovery_rejections_total", "xDS responses that clients rejected.", rejections);
        let polls = totals.polls.load(Ordering::Relaxed);
        to.counter("culvert_discovery_polls_total", "Requests for xDS over REST.", polls);
        let refused = Refusal::ALL.map(|why| ([("reason", why.name().to_owned())], self.authorization.refused(why)));
        to.family(
            "culvert_discovery_refused_total",
            "counter",
            "Clients that may not have what they asked for.",
            refused,
        );
        let handshakes = self.authorization.failed_handshakes();
        to.counter(
            "culvert_discovery_tls_failures_total",
            "Connections for xDS without an agreement on TLS.",
            handshakes,
        );
    }

    fn write_loads(&self, to: &mut Exposition) {
        to.counter("culvert_discovery_load_reports_total", "Load reports of proxies.", self.loads.reports());
        // Proxies report on clusters of their own as well, whose names are not ours to make series of.
        let mesh = Arc::clone(&self.snapshots.borrow().mesh);
        let ports = mesh.services.iter().flat_map(|(key, service)| service.ports.keys().map(move |port| (key, *port)));
        let reported = self.loads.clusters();
        let loads: Vec<_> = ports
            .filter_map(|(key, port)| reported.get_key_value(&cluster_name(key, port)))
            .flat_map(|(name, load)| {
                let Load { issued, succeeded, failed, dropped } = *load;
                let results = [("issued", issued), ("succeeded", succeeded), ("failed", failed), ("dropped", dropped)];
                results.map(|(what, count)| ([("cluster", name.clone()), ("what", what.to_owned())], count))
            })
            .collect();
        to.family("culvert_discovery_load_requests_total", "counter", "Requests that proxies reported.", loads);
    }

    fn write_checks(&self, to: &mut Exposition) {
        let reporting = self.checks.status().iter().filter(|checker| checker.reports).count();
        to.gauge("culvert_discovery_health_checkers", "Nodes that check endpoints and report.", reporting);
        let (reports, ignored) = self.checks.counts();
        to.counter("culvert_discovery_health_reports_total", "Reports of such nodes.", reports);
        let help = "Endpoints in reports that were not given to who reported.";
        to.counter("culvert_discovery_health_ignored_total", help, ignored);
    }

    fn write_secrets(&self, to: &mut Exposition) {
        let mesh = Arc::clone(&self.snapshots.borrow().mesh);
        to.gauge("culvert_discovery_secrets", "Secrets that proxies may be given.", mesh.secrets.len());
        let help = "Secrets of files that cannot be used as they are.";
        to.gauge("culvert_discovery_secret_errors", help, self.secrets.errors().len());
        let expires = mesh.secrets.values().filter_map(|secret| secret.not_after()).min();
        if let Some(expires) = expires {
            let help = "When the first of their certificates ends, since the epoch.";
            to.gauge("culvert_discovery_secrets_expire_seconds", help, expires);
        }
    }

    fn write_overrides(&self, to: &mut Exposition) {
        let shares = self.overrides.shares.list();
        let live = shares.iter().filter(|share| !share.is_expired()).count();
        to.gauge("culvert_discovery_override_shares", "Shares of overrides that have not ended.", live);
        let stale = u8::from(self.overrides.shares.health().error.is_some());
        to.gauge("culvert_discovery_override_shares_stale", "Whether their storage cannot be used.", stale);
        let tunnels = self.overrides.tunnels.status();
        to.gauge("culvert_discovery_tunnels", "Tunnels to developers' machines.", tunnels.len());
        let connections: usize = tunnels.iter().map(|tunnel| tunnel.connections).sum();
        to.gauge("culvert_discovery_tunnel_connections", "Connections in them.", connections);
    }

    fn write_contexts(&self, to: &mut Exposition) {
        let contexts = &self.overrides.contexts;
        let help = "Reports of proxies about contexts of overrides.";
        to.counter("culvert_discovery_context_reports_total", help, contexts.reports());
        let mesh = Arc::clone(&self.snapshots.borrow().mesh);
        let services = contexts.services(&mesh);
        let requests = services.iter().flat_map(|(service, Passed { came, went })| {
            [("came", came), ("went", went)].into_iter().flat_map(move |(direction, carried)| {
                let Carried { overrides, trace_only, nothing } = *carried;
                [("overrides", overrides), ("trace_only", trace_only), ("nothing", nothing)].map(|(what, count)| {
                    let labels = [
                        ("service", service.clone()),
                        ("direction", direction.to_owned()),
                        ("carried", what.to_owned()),
                    ];
                    (labels, count)
                })
            })
        });
        let help = "Requests that came to services and went out from their pods, by the context that they carried.";
        to.family("culvert_discovery_context_requests_total", "counter", help, requests);
        let drops = services.iter().filter(|(_, passed)| passed.came.overrides > 0);
        let drops = drops.map(|(service, passed)| ([("service", service.clone())], u8::from(passed.verdict().1)));
        let help =
            "Whether a service that requests with overrides came to drops them, by the reports to this replica alone.";
        to.family("culvert_discovery_context_dropped", "gauge", help, drops);
    }

    fn write_registrations(&self, to: &mut Exposition) {
        let Some(registrations) = &self.registrations else { return };
        let health = registrations.health();
        to.gauge("culvert_discovery_registered_hosts", "Hosts that registered themselves.", health.hosts);
        let stale = u8::from(health.stale);
        to.gauge("culvert_discovery_registrations_stale", "Whether their storage cannot be used.", stale);
        let counters = registrations.counters();
        for (name, help, value) in [
            ("check_ins", "Registrations and heartbeats that were taken in.", &counters.check_ins),
            ("refused", "Requests of the registration API that were refused.", &counters.refused),
            ("expired", "Hosts that were removed because they did not check in.", &counters.expired),
            ("storage_errors", "Calls of the storage that failed.", &counters.storage_errors),
        ] {
            let name = format!("culvert_discovery_registrations_{name}_total");
            to.counter(&name, help, value.load(Ordering::Relaxed));
        }
    }
}

/// The last part of a type URL.
fn short(type_url: &str) -> &str {
    type_url.rsplit('.').next().unwrap_or(type_url)
}

/// What Prometheus' own clients say of every process. What the system does not tell is left out.
fn write_process(to: &mut Exposition, started: u64) {
    to.gauge("process_start_time_seconds", "When the process was started, since the epoch.", started);
    // The name of the program, which may hold spaces, ends with the last parenthesis.
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |index: usize| fields.get(index).and_then(|field| field.parse::<f64>().ok());
    if let (Some(user), Some(system)) = (ticks(11), ticks(12)) {
        to.counter("process_cpu_seconds_total", "User and system time.", (user + system) / TICKS);
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    if let Some(kilobytes) = resident.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok()) {
        to.gauge("process_resident_memory_bytes", "Memory in use.", kilobytes * 1024);
    }
    if let Ok(files) = std::fs::read_dir("/proc/self/fd") {
        to.gauge("process_open_fds", "Open files.", files.count());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_from_outside_are_escaped() {
        let mut to = Exposition::default();
        to.family("x", "gauge", "Help.", [([("a", "q\"\\\n".to_owned()), ("b", String::new())], 1.5)]);
        assert_eq!(to.0, "# HELP x Help.\n# TYPE x gauge\nx{a=\"q\\\"\\\\\\n\",b=\"\"} 1.5\n");
    }

    #[test]
    fn the_process_is_described() {
        let mut to = Exposition::default();
        write_process(&mut to, 7);
        for name in ["process_cpu_seconds_total ", "process_resident_memory_bytes ", "process_open_fds "] {
            assert!(to.0.contains(&format!("\n{name}")), "{name} is not in {}", to.0);
        }
    }
}

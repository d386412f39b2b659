//! `cargo xtask bench lb`: what choosing a host costs a worker, what hosts cost in memory, and how long a worker pauses while all of
//! them are replaced. docs/performance.md has the method.

use std::{
    alloc::{GlobalAlloc, Layout},
    fmt,
    hint::black_box,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use culvert_proxy_daemon::{
    config::{
        model::{Endpoint, EndpointAddress, HealthStatus, LocalityEndpoints},
        parse,
    },
    runtime::allocator,
    upstream::{Clusters, PickCx, WorkerCluster, WorkerClusters},
};
use envoy_types::pb::envoy::config::cluster::v3::{
    Cluster,
    cluster::{ClusterDiscoveryType, DiscoveryType, LbPolicy},
};
use mimalloc::MiMalloc;
use nix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};

/// Each is measured with hosts of equal weights, and of three weights.
const POLICIES: [(LbPolicy, &str); 5] = [
    (LbPolicy::RoundRobin, "round_robin"),
    (LbPolicy::LeastRequest, "least_request"),
    (LbPolicy::Random, "random"),
    (LbPolicy::RingHash, "ring_hash"),
    (LbPolicy::Maglev, "maglev"),
];

/// The workers that clusters are made for: what a worker has of its own is counted apart.
const WORKERS: usize = 2;

/// So often all hosts are replaced.
const REPLACEMENTS: u32 = 7;

/// Nanoseconds per pick of each load balancing policy, memory per host, and the pauses of a worker while all hosts are replaced.
#[derive(Parser)]
#[command(name = "cargo xtask bench lb")]
struct Args {
    /// How many hosts there are, one measurement for each.
    #[arg(long, value_delimiter = ',', default_value = "10,1000,100000")]
    hosts: Vec<u32>,
    /// Only policies whose name contains this.
    #[arg(long)]
    only: Option<String>,
    /// Print a JSON document instead of tables.
    #[arg(long)]
    json: bool,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> Result<()> {
    let args = Args::parse();
    allocator::prepare();
    let wanted = |name: &str| args.only.as_ref().is_none_or(|only| name.contains(only));
    let policies: Vec<_> = POLICIES.into_iter().filter(|(_, name)| wanted(name)).collect();
    let names = POLICIES.map(|(_, name)| name).join(", ");
    ensure!(!policies.is_empty(), "no policy's name contains that; there are: {names}");
    ensure!(args.hosts.iter().all(|hosts| (1..=1 << 23).contains(hosts)), "--hosts: from 1 to 8388608");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let tasks = tokio::task::LocalSet::new();
    let mut rows = Vec::new();
    for (policy, name) in policies {
        for weights in [1, 3] {
            for &hosts in &args.hosts {
                eprintln!("{name}, {hosts} hosts of {weights} weight(s) ...");
                let row = tasks.block_on(&runtime, measure((policy, name), hosts, weights))?;
                rows.push(row);
            }
        }
    }
    let table = Table(rows);
    if args.json {
        println!("{}", serde_json::to_string_pretty(&table.json())?);
    } else {
        println!("{table}");
    }
    Ok(())
}

struct Row {
    policy: &'static str,
    hosts: u32,
    weights: u32,
    pick: f64,
    /// Bytes for each host: of all workers together; of each worker, before any host is used and with all of them used.
    shared: f64,
    unused: f64,
    used: f64,
    pauses: Pauses,
    /// Likewise while as many hosts of another cluster are replaced, which is none of the worker's business: what the machine does by itself.
    others: Pauses,
}

/// The longest processor time between two picks in each of several replacements of all hosts: times in which others had the processor are
/// no pauses of the worker's making.
struct Pauses {
    median: Duration,
    worst: Duration,
}

/// One policy with one number of hosts.
async fn measure((policy, name): (LbPolicy, &'static str), hosts: u32, weights: u32) -> Result<Row> {
    let per_host = |bytes: usize| bytes as f64 / f64::from(hosts);
    let config = |name: &str| {
        let config = Cluster {
            name: name.to_owned(),
            lb_policy: policy.into(),
            cluster_discovery_type: Some(ClusterDiscoveryType::Type(DiscoveryType::Static.into())),
            ..Cluster::default()
        };
        parse::cluster(&config, "cluster").map_err(|error| anyhow::anyhow!("{error}"))
    };
    let clusters = Arc::new(Clusters::new(WORKERS));
    clusters.upsert(config("bench")?);
    let endpoints = [group(0..hosts, weights)];
    let before = allocated();
    clusters.set_endpoints("bench", &endpoints);
    let shared = per_host(allocated() - before);

    let worker = WorkerClusters::new(Arc::clone(&clusters), 0);
    let mine = worker.get("bench").context("the cluster that was added")?;
    let before = allocated();
    pick(&mine, 0)?;
    let unused = per_host(allocated() - before);
    // Each is used some time.
    for hash in 0..hosts.saturating_mul(20) {
        pick(&mine, hash)?;
    }
    let used = per_host(allocated() - before);

    let picks = 1_000_000;
    let began = Instant::now();
    for hash in 0..picks {
        pick(&mine, hash)?;
    }
    let pick = began.elapsed().as_nanos() as f64 / f64::from(picks);
    let pauses = replace(&clusters, "bench", &worker, &mine, (hosts, weights)).await?;
    // Its hosts take the places of those of before, and it is no more to the worker than a name.
    clusters.upsert(config("other")?);
    let others = replace(&clusters, "other", &worker, &mine, (hosts, weights)).await?;
    Ok(Row { policy: name, hosts, weights, pick, shared, unused, used, pauses, others })
}

fn pick(cluster: &WorkerCluster, number: u32) -> Result<()> {
    // Any hash will do that spreads.
    let hash = Some(u64::from(number).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let cx = PickCx { hash, ..PickCx::default() };
    black_box(cluster.pick(&cx)).context("no host")?;
    Ok(())
}

/// Replaces all hosts of a cluster several times while a worker goes on picking.
async fn replace(
    clusters: &Arc<Clusters>,
    name: &'static str,
    worker: &WorkerClusters,
    mine: &WorkerCluster,
    (hosts, weights): (u32, u32),
) -> Result<Pauses> {
    let mut longest = Vec::new();
    for round in 1..=REPLACEMENTS {
        let done = Arc::new(AtomicBool::new(false));
        let control = {
            let (clusters, done) = (Arc::clone(clusters), Arc::clone(&done));
            std::thread::spawn(move || {
                clusters.set_endpoints(name, &[group(round * hosts..(round + 1) * hosts, weights)]);
                // As culvertd does after each large update.
                allocator::give_back();
                done.store(true, Relaxed);
            })
        };
        longest.push(longest_pause(worker, mine, hosts, &done).await?);
        ensure!(control.join().is_ok(), "the thread that replaces hosts panicked");
    }
    longest.sort_unstable();
    Ok(Pauses { median: longest[longest.len() / 2], worst: longest[longest.len() - 1] })
}

/// The longest time between two picks until it is done, and as many picks again as there are hosts: what is left of old hosts is let go
/// of little by little.
async fn longest_pause(
    worker: &WorkerClusters,
    mine: &WorkerCluster,
    hosts: u32,
    done: &AtomicBool,
) -> Result<Duration> {
    let (mut longest, mut last) = (Duration::ZERO, processor_time()?);
    let (mut number, mut left) = (0_u32, hosts.max(1000));
    while left > 0 {
        worker.tick();
        pick(mine, number)?;
        // Other tasks of the worker have their turn.
        tokio::task::yield_now().await;
        let now = processor_time()?;
        longest = longest.max(now.saturating_sub(last));
        last = now;
        number = number.wrapping_add(1);
        left -= u32::from(done.load(Relaxed));
    }
    Ok(longest)
}

/// What this thread has had of the processor.
fn processor_time() -> Result<Duration> {
    Ok(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?.into())
}

/// Hosts of one locality. `weights`: how many different ones there are.
fn group(numbers: std::ops::Range<u32>, weights: u32) -> LocalityEndpoints {
    let endpoint = |number: u32| Endpoint {
        address: EndpointAddress::Ip(SocketAddr::from((Ipv4Addr::from_bits(0x0a00_0000 + number), 8080))),
        weight: 1 + number % weights,
        health: HealthStatus::Healthy,
        hostname: Box::default(),
        details: None,
        additional_addresses: Box::default(),
    };
    LocalityEndpoints { endpoints: numbers.map(endpoint).collect(), ..LocalityEndpoints::default() }
}

struct Table(Vec<Row>);

impl Table {
    fn json(&self) -> Value {
        let micros = |pause: Duration| pause.as_secs_f64() * 1e6;
        let pauses = |of: &Pauses| json!({"median": micros(of.median), "worst": micros(of.worst)});
        let row = |row: &Row| {
            json!({
                "policy": row.policy, "hosts": row.hosts, "weights": row.weights, "ns_per_pick": row.pick,
                "bytes_per_host": {"shared": row.shared, "worker_unused": row.unused, "worker_used": row.used},
                "longest_pause_us": pauses(&row.pauses), "of_another_cluster_us": pauses(&row.others),
            })
        };
        self.0.iter().map(row).collect()
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "| policy | weights | hosts | ns per pick | bytes per host | per worker | when used | longest pause, ms: median | worst | of \
             another cluster: median | worst |"
        )?;
        writeln!(f, "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|")?;
        for Row { policy, hosts, weights, pick, shared, unused, used, pauses, others } in &self.0 {
            write!(f, "| {policy} | {weights} | {hosts} | {pick:.0} | {shared:.0} | {unused:.1} | {used:.0} |")?;
            for pause in [pauses.median, pauses.worst, others.median, others.worst] {
                write!(f, " {:.2} |", pause.as_secs_f64() * 1e3)?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

/// Counts what is allocated. It is culvertd's own allocator that does so.
struct Counting;

static ALLOCATED: AtomicUsize = AtomicUsize::new(0);

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Bytes now.
fn allocated() -> usize {
    ALLOCATED.load(Relaxed)
}

/// What a piece takes, about: the allocator keeps pieces of sizes that are multiples of this, and nothing beside them.
fn taken(layout: Layout) -> usize {
    layout.size().next_multiple_of(16)
}

// SAFETY: all is done by an allocator that keeps the promises.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATED.fetch_add(taken(layout), Relaxed);
        // SAFETY: the caller's promise is the same.
        unsafe { MiMalloc.alloc(layout) }
    }

    unsafe fn dealloc(&self, piece: *mut u8, layout: Layout) {
        ALLOCATED.fetch_sub(taken(layout), Relaxed);
        // SAFETY: the caller's promise is the same.
        unsafe { MiMalloc.dealloc(piece, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        ALLOCATED.fetch_add(taken(layout), Relaxed);
        // SAFETY: the caller's promise is the same.
        unsafe { MiMalloc.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, piece: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        let after = taken(Layout::from_size_align(size, layout.align()).unwrap_or(layout));
        ALLOCATED.fetch_add(after.wrapping_sub(taken(layout)), Relaxed);
        // SAFETY: the caller's promise is the same.
        unsafe { MiMalloc.realloc(piece, layout, size) }
    }
}

//! One proxy, one variant of the protocol, one number of clusters.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use culvert_tests::control_plane::ControlPlane;

use crate::proxy::{Client, Contender, Programs, Proxy, leave_first_core, origin};
use crate::world::{World, cluster_name};

/// How much is pushed.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    pub(super) clusters: usize,
    pub(super) changes: usize,
}

/// What one run showed.
#[derive(Clone, Debug)]
pub(super) struct Sample {
    pub(super) proxy: Contender,
    pub(super) clusters: usize,
    pub(super) delta: bool,
    /// From the first byte of the push until all is acknowledged.
    pub(super) acked: Duration,
    /// From there until a request to the last cluster is answered.
    pub(super) serving: Duration,
    pub(super) push_cpu: Duration,
    pub(super) again_cpu: Duration,
    pub(super) rss_per_cluster: f64,
    pub(super) change_cpu: Duration,
    pub(super) change_p50: Duration,
    pub(super) change_p99: Duration,
    /// A light route, before the push and during it.
    pub(super) quiet_p99: Duration,
    pub(super) busy_p99: Duration,
}

/// Starts the proxy and measures it.
pub(super) fn measure(contender: Contender, programs: &Programs, sizes: Sizes, delta: bool) -> Result<Sample> {
    let control_plane = ControlPlane::start()?;
    let ports = [origin('a')?, origin('b')?];
    let proxy = Proxy::start(contender, programs, control_plane.address, ports[0], delta)?;
    leave_first_core()?;
    let stream = control_plane.stream(Duration::from_secs(30))?;
    let mut world = World::new(stream, sizes.clusters, ports);
    world.wait_for_subscription()?;
    // Neither listens before it has clusters: this push holds none but lets it.
    world.push_first()?;
    proxy.wait_until_listening()?;
    let quiet_p99 = p99(light(proxy.listener, || {
        thread::sleep(Duration::from_secs(2));
        Ok(())
    })?);

    let (rss, cpu) = (proxy.rss()?, proxy.cpu()?);
    let start = Instant::now();
    world.push_all()?;
    let acked = start.elapsed();
    let mut client = Client::connect(proxy.listener)?;
    let last = cluster_name(sizes.clusters - 1);
    let serving = client.ask_until(&last, "a", Duration::from_secs(60))?.duration_since(start).saturating_sub(acked);
    let push_cpu = settled_cpu(&proxy)?.saturating_sub(cpu);
    #[expect(clippy::cast_precision_loss, reason = "bytes and clusters are far below 2^52")]
    let rss_per_cluster = proxy.rss()?.saturating_sub(rss) as f64 / sizes.clusters as f64;

    let cpu = settled_cpu(&proxy)?;
    world.push_again()?;
    let again_cpu = settled_cpu(&proxy)?.saturating_sub(cpu);

    let cpu = settled_cpu(&proxy)?;
    for change in 0..sizes.changes {
        world.change(pick(change, sizes.clusters), true);
        world.settle()?;
    }
    let changes = u32::try_from(sizes.changes).context("too many changes")?;
    let change_cpu = settled_cpu(&proxy)?.saturating_sub(cpu) / changes;

    let mut visible = Vec::new();
    for change in 0..sizes.changes {
        let index = pick(change, sizes.clusters);
        let start = Instant::now();
        world.change(index, false);
        visible.push(client.ask_until(&cluster_name(index), "a", Duration::from_secs(20))?.duration_since(start));
        world.settle()?;
    }
    visible.sort();

    let busy = light(proxy.listener, || world.push_changed())?;
    Ok(Sample {
        proxy: contender,
        clusters: sizes.clusters,
        delta,
        acked,
        serving,
        push_cpu,
        again_cpu,
        rss_per_cluster,
        change_cpu,
        change_p50: quantile(&visible, 50),
        change_p99: quantile(&visible, 99),
        quiet_p99,
        busy_p99: p99(busy),
    })
}

/// Spreads changes over all clusters.
fn pick(change: usize, clusters: usize) -> usize {
    change * 7919 % clusters
}

/// The processor time when the proxy has come to rest.
fn settled_cpu(proxy: &Proxy) -> Result<Duration> {
    let deadline = Instant::now() + Duration::from_secs(60);
    let mut before = proxy.cpu()?;
    loop {
        thread::sleep(Duration::from_millis(200));
        let now = proxy.cpu()?;
        if now.saturating_sub(before) < Duration::from_millis(4) {
            return Ok(now);
        }
        if Instant::now() > deadline {
            return Err(anyhow!("the proxy does not come to rest"));
        }
        before = now;
    }
}

/// The latencies of a light route, a request a millisecond, while `during` runs; sorted.
fn light(listener: SocketAddr, during: impl FnOnce() -> Result<()>) -> Result<Vec<Duration>> {
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    let load = thread::spawn(move || -> Result<Vec<Duration>> {
        let (mut client, mut latencies) = (Client::connect(listener)?, Vec::new());
        while !stopped.load(Ordering::Relaxed) {
            let start = Instant::now();
            client.get("/light", "-")?;
            let elapsed = start.elapsed();
            latencies.push(elapsed);
            thread::sleep(Duration::from_millis(1).saturating_sub(elapsed));
        }
        latencies.sort();
        Ok(latencies)
    });
    let result = during();
    stop.store(true, Ordering::Relaxed);
    let latencies = load.join().map_err(|_| anyhow!("the light load panicked"))??;
    result.map(|()| latencies)
}

fn p99(sorted: Vec<Duration>) -> Duration {
    quantile(&sorted, 99)
}

fn quantile(sorted: &[Duration], percent: usize) -> Duration {
    sorted.get((sorted.len() * percent / 100).min(sorted.len().saturating_sub(1))).copied().unwrap_or_default()
}

//! Joins many Kubernetes clusters into one mesh and serves it to proxies by Envoy's xDS.
//!
//! ```text
//! shares and tunnels --+
//! registrations -------+
//! source (a cluster) --+
//! source (a cluster) --+-> registry -> mesh -> resources (a snapshot) -> one session a client stream
//! ```
//! Each arrow is a `watch` channel: whoever is behind sees the newest state next, never a queue of older ones.

pub mod access;
pub mod config;
pub mod drain;
pub mod health;
pub mod http;
pub mod kubernetes;
pub mod mesh;
pub mod overrides;
pub mod policy;
pub mod registration;
pub mod registry;
pub mod resources;
pub mod secrets;
pub mod server;
pub mod source;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tracing::{error, info, warn};

use crate::config::{Config, SourceConfig};
use crate::drain::Drains;
use crate::health::Checks;
use crate::http::{Activity, StatusPages};
use crate::mesh::Joiner;
use crate::overrides::Overrides;
use crate::registration::Registrations;
use crate::registration::join::Registered;
use crate::registry::{Registry, RegistryControl, RegistryHandle};
use crate::resources::{Options, Snapshot};
use crate::secrets::files::SecretFiles;
use crate::server::Xds;
use crate::server::authorization::Authorization;
use crate::server::clients::Clients;
use crate::server::loads::Loads;
use crate::server::tls::Tls;
use crate::source::Source as _;
use crate::source::api_server::ApiServer;
use crate::source::directory::Directory;

/// A running discovery service.
#[derive(Debug)]
pub struct Discovery {
    /// Where xDS is served.
    pub listen: SocketAddr,
    /// What the status pages show.
    pub pages: StatusPages,
    /// Where the status pages are served.
    pub http: SocketAddr,
    shutdown: watch::Sender<bool>,
    tasks: JoinSet<anyhow::Result<()>>,
}

impl Discovery {
    /// Reads all clusters once, then starts serving.
    ///
    /// Nobody is served before every source has reported, or `initial_wait` is over and one has: a proxy must not be told
    /// to forget services that were merely not read yet.
    ///
    /// # Errors
    /// When a port cannot be listened on or a source cannot start.
    pub async fn start(config: Config) -> anyhow::Result<Self> {
        config::check(&config)?;
        let registrations = config.registration.map(Registrations::open).transpose().context("registrations")?;
        let (shutdown, asked) = watch::channel(false);
        let overrides = Overrides::open(config.overrides, asked.clone()).context("shares of overrides")?;
        let secrets =
            SecretFiles::open(config.secrets).map_err(|error| anyhow::anyhow!("secrets.directory: {error}"))?;
        let http = bind(config.http, "--http").await?;
        let listen = bind(config.listen, "--listen").await?;
        let (http_address, listen_address) = (http.local_addr()?, listen.local_addr()?);
        let mut tasks = JoinSet::new();
        let (handles, registry) = registry::start(config.clusters.iter().map(|c| c.info.clone()).collect());
        let control = handles.first().map(RegistryHandle::control);
        for cluster in config.clusters.iter().filter(|cluster| cluster.drained) {
            if let Some(control) = &control {
                control.set_drained(&cluster.info.name, true).await?;
            }
        }
        // What an operator said counts over the configuration.
        let drains = Drains::open(config.drain, control.clone(), registry.clone()).await?;
        for (cluster, handle) in config.clusters.into_iter().zip(handles) {
            let name = cluster.info.name;
            let source = cluster.source;
            tasks.spawn(async move {
                let ended = match source {
                    SourceConfig::Manifests(manifests) => Directory::new(manifests).run(handle).await,
                    SourceConfig::Kubernetes(config) => ApiServer::new(name.clone(), *config).run(handle).await,
                };
                ended.with_context(|| format!("cluster `{name}`"))
            });
        }
        let server::Settings { tls, rules, load_report_interval, health } = config.serving;
        let tls = tls.map(Tls::new).transpose()?;
        let authorization = Arc::new(Authorization::new(rules));
        let loads = Loads::default();
        let checks = Checks::new(health);
        let (publish, snapshots) = watch::channel(Arc::new(Snapshot::default()));
        let clients = Clients::default();
        let pages = StatusPages {
            registry: registry.clone(),
            snapshots: snapshots.clone(),
            clients: clients.clone(),
            registrations: registrations.clone(),
            overrides: overrides.clone(),
            drains,
            activity: Arc::default(),
            authorization: Arc::clone(&authorization),
            loads: loads.clone(),
            checks: checks.clone(),
            secrets: secrets.clone(),
        };
        let serving_pages = pages.clone().serve(http, asked.clone());
        tasks.spawn(async move {
            serving_pages.await;
            Ok(())
        });
        if let Some(registrations) = &registrations {
            let following = registrations.clone().run();
            tasks.spawn(async move {
                following.await;
                Ok(())
            });
        }
        // As far as they can be read now: the mesh does not wait for them.
        let contexts = overrides.contexts.clone();
        overrides.shares.refresh().await;
        let following = overrides.shares.clone().run();
        tasks.spawn(async move {
            following.await;
            Ok(())
        });
        let mut ready = registry.clone();
        tokio::select! {
            ready = wait_until_ready(&mut ready, control, config.initial_wait) => ready?,
            Some(ended) = tasks.join_next() => ended??,
        }
        if let Some(registrations) = &registrations {
            tokio::select! {
                () = registrations.loaded() => {}
                Some(ended) = tasks.join_next() => ended??,
            }
        }
        let activity = Arc::clone(&pages.activity);
        let joiner = Joiner::new(config.options.overrides.clone());
        let mut sources = Sources {
            registry,
            registrations,
            overrides,
            checks: checks.clone(),
            secrets: secrets.clone(),
            options: config.options,
            joiner,
            activity,
        };
        // Before the first build, so that no change after it is missed.
        let changes = sources.changes();
        if let Some(first) = sources.build(None) {
            publish.send_replace(Arc::new(first));
        }
        tasks.spawn(sources.follow(changes, publish));
        tasks.spawn(async move {
            secrets.run().await;
            Ok(())
        });
        let dividing = checks.clone().run(snapshots.clone());
        tasks.spawn(async move {
            dividing.await;
            Ok(())
        });
        let owners = contexts.clone().run(snapshots.clone());
        tasks.spawn(async move {
            owners.await;
            Ok(())
        });
        let xds =
            Xds { snapshots, shutdown: asked, clients, authorization, loads, contexts, load_report_interval, checks };
        tasks.spawn(async move { xds.serve(listen, tls).await.context("serving xDS") });
        info!("serving xDS on {listen_address}, status on http://{http_address}/status");
        Ok(Self { listen: listen_address, http: http_address, pages, shutdown, tasks })
    }

    /// Runs until `until` is done, then closes all streams and ends.
    ///
    /// # Errors
    /// When a part of the service failed before that.
    pub async fn run(mut self, until: impl Future<Output = ()>) -> anyhow::Result<()> {
        tokio::pin!(until);
        let outcome = tokio::select! {
            () = until => Ok(()),
            Some(ended) = self.tasks.join_next() => match ended {
                Ok(Ok(())) => Err(anyhow::anyhow!("a part of the service ended by itself")),
                Ok(Err(error)) => Err(error),
                Err(error) => Err(error.into()),
            },
        };
        // While the streams are there: nobody can tell proxies of it later.
        if self.pages.overrides.tunnels.withdraw() {
            tokio::time::sleep(FAREWELL).await;
        }
        // Nobody listening is as good as everybody having heard.
        let _ = self.shutdown.send(true);
        if let Err(error) = &outcome {
            error!("shutting down: {error:#}");
        }
        tokio::time::timeout(Duration::from_secs(1), async {
            // Let streams end with a proper close; the sources never end by themselves.
            while !self.pages.clients.list().is_empty() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await
        .ok();
        self.tasks.shutdown().await;
        outcome
    }
}

/// Waits for all clusters, then for any one: an API server that is away when discovery starts must not keep the other
/// clusters from being served.
async fn wait_until_ready(
    registry: &mut watch::Receiver<Arc<Registry>>,
    control: Option<RegistryControl>,
    at_most: Duration,
) -> anyhow::Result<()> {
    let waiting: Vec<_> = registry.borrow().clusters.iter().map(|cluster| cluster.info.name.clone()).collect();
    info!("reading the clusters for the first time, for {at_most:?} at most: {}", waiting.join(", "));
    let all = tokio::time::timeout(at_most, registry.wait_for(|registry| registry.is_ready())).await;
    if let Ok(ready) = all.map(|ready| ready.map(drop)) {
        return ready.context("the registry ended");
    }
    for cluster in registry.borrow().clusters.iter().filter(|cluster| cluster.objects.is_none()) {
        let error = cluster.health.error.as_deref().unwrap_or("no answer yet");
        warn!("cluster `{}` has not been read in {at_most:?}, and is left out until it is: {error}", cluster.info.name);
    }
    // Without clusters there is nothing to wait for.
    if let Some(control) = control {
        control.stop_waiting().await?;
    }
    registry.wait_for(|registry| registry.is_ready()).await.context("the registry ended")?;
    Ok(())
}

async fn bind(address: SocketAddr, flag: &str) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot listen on {address}; is another process there? {flag} sets the address"))
}

/// How long proxies have to hear that there are no tunnels any more.
const FAREWELL: Duration = Duration::from_millis(300);

/// The shortest time between two snapshots. Changes that come one by one do not wait for it.
const BETWEEN_SNAPSHOTS: Duration = Duration::from_millis(20);

/// What tells that there is something new beside the registry.
struct Changes {
    registered: Option<watch::Receiver<u64>>,
    overrides: watch::Receiver<u64>,
    checks: watch::Receiver<u64>,
    secrets: watch::Receiver<u64>,
}

/// What snapshots are made of.
struct Sources {
    registry: watch::Receiver<Arc<Registry>>,
    registrations: Option<Registrations>,
    overrides: Overrides,
    checks: Checks,
    secrets: SecretFiles,
    options: Options,
    joiner: Joiner,
    activity: Arc<Activity>,
}

impl Sources {
    fn changes(&self) -> Changes {
        Changes {
            registered: self.registrations.as_ref().map(Registrations::watch),
            overrides: self.overrides.watch(),
            checks: self.checks.watch(),
            secrets: self.secrets.watch(),
        }
    }

    /// Turns each new state into a snapshot.
    async fn follow(
        mut self,
        Changes { mut registered, mut overrides, mut checks, mut secrets }: Changes,
        publish: watch::Sender<Arc<Snapshot>>,
    ) -> anyhow::Result<()> {
        loop {
            let may_end = registered.is_none();
            let registry_changed = async {
                match self.registry.changed().await {
                    // Without clusters nobody reports to the registry.
                    Err(_) if !may_end => std::future::pending().await,
                    changed => changed,
                }
            };
            let registrations_changed = async {
                match &mut registered {
                    Some(registered) => registered.changed().await,
                    None => std::future::pending().await,
                }
            };
            let (changed, hosts_changed) = tokio::select! {
                changed = registry_changed => (changed, false),
                changed = registrations_changed => (changed, true),
                changed = overrides.changed() => (changed, false),
                changed = checks.changed() => (changed, false),
                changed = secrets.changed() => (changed, false),
            };
            if changed.is_err() {
                return Ok(());
            }
            let started = Instant::now();
            let before = publish.borrow().clone();
            let hosts_changed = registered.as_mut().is_some_and(|registered| {
                let changed = registered.has_changed().unwrap_or(false) || hosts_changed;
                registered.mark_unchanged();
                changed
            });
            if let Some(snapshot) = tokio::task::block_in_place(|| self.build(Some((&before, hosts_changed)))) {
                publish.send_replace(Arc::new(snapshot));
            }
            // Each snapshot wakes every client. What comes in the meantime goes into the next one.
            tokio::time::sleep_until((started + BETWEEN_SNAPSHOTS).into()).await;
        }
    }

    /// The newest snapshot, `None` if it would be the same as `before`. Registered hosts are only looked at if there is none
    /// before, or they have changed since.
    fn build(&mut self, before: Option<(&Snapshot, bool)>) -> Option<Snapshot> {
        let started = Instant::now();
        let registry = self.registry.borrow_and_update().clone();
        if let Some(registrations) = &self.registrations
            && before.is_none_or(|(_, hosts_changed)| hosts_changed)
        {
            self.joiner.register(Registered::new(&registrations.hosts(), registrations.settings()));
        }
        self.joiner.keep(self.secrets.secrets());
        self.joiner.mark_failed(self.checks.failed());
        self.joiner.offer(self.overrides.tunnels.offered());
        self.joiner.share(self.overrides.shares.list());
        let (mesh, changed) = self.joiner.update(&registry);
        if before.is_none() || !changed.is_empty() {
            self.activity.saw(&mesh);
        }
        let known = before.map_or(&[][..], |(before, _)| &before.mesh.warnings);
        for warning in mesh.warnings.iter().filter(|warning| !known.contains(warning)) {
            warn!("{warning}");
        }
        let snapshot = match before {
            None => Some(Snapshot::build(mesh, &self.options)),
            Some((before, _)) if changed.is_empty() && Arc::ptr_eq(&mesh, &before.mesh) => None,
            Some((before, _)) => Some(before.next(mesh, &changed)),
        };
        self.activity.built(started.elapsed());
        snapshot
    }
}

//! `culvertd`: flags, start-up, signals. What it does is in the library.

use std::{
    io::ErrorKind,
    process::ExitCode,
    sync::{Arc, Mutex},
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context, Result, bail};
use clap::Parser;
use culvert_proxy_daemon::{
    access_log::EventLog,
    admin::{self, AdminState, ServerState, SharedState},
    bootstrap::{
        Flags,
        flags::{LogLevel, Mode},
        load,
    },
    config::{
        dump::Configuration,
        parse::{Bootstrap, StaticSecret},
        status::{Snapshot, source_faults, source_states},
        store::{self, Applier, ConfigStore, Kind, Need, StartUp},
    },
    intercept::Interception,
    layered_runtime::Runtime,
    report,
    runtime::{DataPlane, Options, allocator},
    stats::{self, Metric},
    tasks::Tasks,
    tls, upstream,
};
use culvert_xds_client::{
    grpc::Dialer,
    json,
    sources::{self, Subscriptions},
    stats::SourceStats,
};
use envoy_types::pb::envoy::config::bootstrap::v3::Bootstrap as BootstrapMessage;
use tokio::{
    net::TcpListener,
    runtime::Handle,
    signal::unix::{SignalKind, signal},
    sync::Notify,
};
use tracing::level_filters::LevelFilter;
use tracing_subscriber::{layer::SubscriberExt, reload, util::SubscriberInitExt};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    allocator::prepare();
    let flags = Flags::parse();
    if flags.version {
        println!("culvertd  version: {}", admin::version());
        return ExitCode::SUCCESS;
    }
    match start(&flags) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("culvertd: {error:#}");
            ExitCode::FAILURE
        }
    }
}

type LogControl = Box<dyn Fn(Option<LevelFilter>) -> LevelFilter + Send + Sync>;

fn start(flags: &Flags) -> Result<()> {
    let log_level = start_logging(flags)?;
    store::set_unknown_fields(flags.unknown_dynamic_fields());
    let (message, bootstrap) = load(flags)?;
    if flags.mode == Mode::Validate {
        // Envoy's words; it leaves the name out where the text came by --config-yaml alone.
        let file = flags.config_path.as_ref().map(|path| path.display().to_string()).unwrap_or_default();
        println!("configuration '{file}' OK");
        return Ok(());
    }
    let runtime = |name: &str| {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        let built = builder.worker_threads(1).thread_name(name).enable_all().build();
        built.with_context(|| format!("cannot start the {name} thread"))
    };
    // Whoever asks whether this daemon is ready is not kept waiting while it reads an update.
    let admin = runtime("admin")?;
    let control = runtime("control")?;
    control.block_on(serve(flags, message, bootstrap, (log_level, admin.handle().clone())))
}

fn start_logging(flags: &Flags) -> Result<LogControl> {
    let (filter, handle) = reload::Layer::new(flags.log_level.filter());
    let registry = tracing_subscriber::registry().with(filter);
    match &flags.log_path {
        Some(path) => {
            let file = std::fs::OpenOptions::new().create(true).append(true).open(path);
            let file = file.with_context(|| format!("--log-path {}", path.display()))?;
            registry.with(tracing_subscriber::fmt::layer().with_ansi(false).with_writer(Mutex::new(file))).init();
        }
        None => {
            let colours = std::io::IsTerminal::is_terminal(&std::io::stderr());
            registry.with(tracing_subscriber::fmt::layer().with_ansi(colours).with_writer(std::io::stderr)).init();
        }
    }
    Ok(Box::new(move |level| {
        if let Some(level) = level {
            // Fails only when the subscriber is gone, and then nothing is logged anyway.
            let _ = handle.modify(|filter| *filter = level);
        }
        handle.with_current(|filter| *filter).unwrap_or(LogLevel::Off.filter())
    }))
}

async fn serve(
    flags: &Flags,
    message: BootstrapMessage,
    mut bootstrap: Bootstrap,
    admin: (LogControl, Handle),
) -> Result<()> {
    let (started, started_at) = (Instant::now(), SystemTime::now());
    let (id, cluster) = message.node.as_ref().map(|node| (&*node.id, &*node.cluster)).unwrap_or_default();
    culvert_proxy_daemon::http::set_node(id, cluster);
    culvert_proxy_daemon::access_log::set_log_node(bootstrap.sources.node.clone());
    let mut signals = Signals::new()?;
    let workers = flags.workers();
    let interception = match bootstrap.interception.take() {
        Some(config) => Some(Interception::start(config, workers).context("interception")?),
        None => None,
    };
    let plane = DataPlane::start(Options { workers, drain_time: drain_time(flags), interception })
        .context("cannot start the workers")?;
    let admin = Admin { log_level: admin.0, thread: admin.1, leave: Arc::new(Notify::new()) };
    let leave_admin = Arc::clone(&admin.leave);
    let result = run(flags, message, bootstrap, admin, &plane, &mut signals, (started, started_at)).await;
    // After a failure whoever starts it again is not kept waiting.
    if result.is_ok() {
        drain(flags, &plane, &mut signals, &leave_admin).await;
    } else {
        plane.let_go().await;
    }
    // Joins threads: not on a thread that must not block.
    let stopping = plane.clone();
    tokio::task::spawn_blocking(move || stopping.stop()).await.context("cannot stop the workers")?;
    result
}

/// What the admin interface needs of its own.
struct Admin {
    log_level: LogControl,
    thread: Handle,
    /// Woken when its address is to be another daemon's.
    leave: Arc<Notify>,
}

async fn run(
    flags: &Flags,
    message: BootstrapMessage,
    mut bootstrap: Bootstrap,
    Admin { log_level, thread: admin_thread, leave }: Admin,
    plane: &DataPlane,
    signals: &mut Signals,
    (started, started_at): (Instant, SystemTime),
) -> Result<()> {
    // First of all: what follows may refer to its values.
    let runtime = Runtime::start(bootstrap.runtime.clone()).map_err(anyhow::Error::msg).context("layered_runtime")?;
    plane.set_local_node(std::mem::take(&mut bootstrap.local));
    if let Some(path) = &bootstrap.outlier_log {
        let log = EventLog::open(path).map_err(anyhow::Error::msg);
        plane.set_outlier_log(log.context("cluster_manager.outlier_detection.event_log_path")?);
    }
    plane.set_resolver(std::mem::take(&mut bootstrap.resolver));
    let state = SharedState::new();
    let shutdown = Arc::new(Notify::new());
    let (subscriptions, wanted) = Subscriptions::channel();
    let source_stats = Arc::new(SourceStats::default());
    let first = runtime.rtds().map(|wanted| Need::new(Kind::Runtime, wanted.clone())).collect();
    let secrets = bootstrap.secrets.iter().map(|it| (it.secret.secret_type(), Arc::clone(&it.name.name))).collect();
    let followed = bootstrap.secrets.iter_mut().filter_map(|StaticSecret { name, followed, .. }| {
        followed.take().map(|(message, directory)| (name.clone(), message, directory))
    });
    let followed = followed.collect();
    let sources = bootstrap.sources.clone();
    let watches = Arc::clone(&sources.watches);
    let start_up = StartUp {
        first,
        cds: bootstrap.cds,
        cds_collection: bootstrap.cds_collection,
        lds: bootstrap.lds,
        lds_collection: bootstrap.lds_collection,
        secrets,
        followed,
        watches,
        sources,
        bind: bootstrap.bind,
        drain_time: drain_time(flags),
    };
    let mut tasks = Tasks::default();
    let (applier, listener_changes) = Applier::new(plane.clone(), runtime.clone());
    tasks.spawn("changes listeners", listener_changes);
    let store = ConfigStore::new(applier, start_up, subscriptions);

    if let Some(address) = bootstrap.admin {
        let bound = admin_thread.spawn(TcpListener::bind(address)).await.context("the admin thread")?;
        let listener = match bound {
            // The daemon that this one replaces gives it up when it ends.
            Err(error) if error.kind() == ErrorKind::AddrInUse && replaces(plane) => {
                tracing::info!(%address, "the daemon before has the admin address: waiting for it");
                None
            }
            listener => Some(listener.with_context(|| format!("admin.address: cannot bind {address}"))?),
        };
        let path = flags.admin_address_path.clone();
        if let Some(listener) = &listener {
            tell_admin_address(listener, path.as_deref())?;
        }
        let (dump, kernel) = (store.clone(), plane.clone());
        let sources = Arc::clone(&source_stats);
        let snapshot = move || {
            let mut snapshot = Snapshot { sources: source_states(&sources), ..dump.snapshot() };
            snapshot.faults.extend(source_faults(&sources));
            snapshot
        };
        let node = message.node.as_ref().map(json::to_json).unwrap_or_default();
        let admin = AdminState {
            data_plane: plane.clone(),
            started,
            concurrency: flags.workers(),
            state: state.clone(),
            options: flags.to_json(),
            node,
            config: Arc::new(Configuration::new(&message, started_at, snapshot)),
            log_level,
            runtime,
            shutdown: Arc::clone(&shutdown),
            drain_time: drain_time(flags),
            extra_stats: vec![
                Box::new(move || {
                    let counters = kernel.kernel_counters().into_iter();
                    counters.map(|(name, value)| Metric::external(name, value)).collect()
                }),
                Box::new({
                    let sources = Arc::clone(&source_stats);
                    move || admin::xds_stats(&sources)
                }),
                Box::new({
                    let plane = plane.clone();
                    move || upstream::breaker_gauges(&plane.clusters())
                }),
                Box::new({
                    let plane = plane.clone();
                    move || upstream::endpoint_metrics(&plane.clusters())
                }),
                Box::new({
                    let store = store.clone();
                    move || store.metrics()
                }),
            ],
        };
        let serving = async move {
            let listener = match listener {
                Some(listener) => listener,
                None => {
                    let listener = bind_when_free(address).await;
                    if let Err(error) = tell_admin_address(&listener, path.as_deref()) {
                        tracing::error!("{error:#}");
                    }
                    listener
                }
            };
            admin::run(admin, listener).await;
        };
        let serving = async move {
            tokio::select! {
                () = serving => {}
                () = leave.notified() => std::future::pending().await,
            }
        };
        tasks.spawn_on("serves the admin interface", serving, &admin_thread);
    }

    // The admin interface keeps it, encoded.
    drop(message);
    for StaticSecret { name, secret, .. } in bootstrap.secrets {
        plane.secrets().set(name, secret);
    }
    tls::secure_servers(&mut bootstrap.sources.servers, &bootstrap.clusters, plane.secrets());
    if let Some(service) = bootstrap.load_stats {
        // Checked with the bootstrap.
        let server = service.target.server(&bootstrap.sources.servers).context("cluster_manager.load_stats_config")?;
        let dialer = Dialer::new(server, service);
        tasks.spawn("reports load", report::report_load(dialer, bootstrap.sources.node.clone(), plane.clone()));
    }
    if let Some(service) = bootstrap.health_discovery {
        let server = service.target.server(&bootstrap.sources.servers).context("hds_config")?;
        let dialer = Dialer::new(server, service);
        tasks.spawn("reports health", report::report_health(dialer, bootstrap.sources.node.clone()));
    }
    let config = sources::Config { unknown_fields: flags.unknown_dynamic_fields(), ..bootstrap.sources };
    state.set(ServerState::Initializing);
    tasks.spawn("keeps time", store.clone().keep_time());
    tasks.spawn("gives memory back", store.clone().tidy_up(allocator::give_back, allocator::EVERY));
    tasks.spawn("follows files", store.clone().follow_files());
    if let Some(messages) = plane.on_demand() {
        tasks.spawn("hears what requests need", store.clone().serve_on_demand(messages));
    }
    tasks.spawn("gets resources", sources::run(config, Arc::new(store.clone()), wanted, source_stats));
    store.start(bootstrap.clusters, bootstrap.listeners);
    tokio::select! {
        started = store.initialized() => started.map_err(anyhow::Error::msg)?,
        ended = tasks.ended() => bail!(ended),
        () = signals.stop() => return Ok(()),
        () = shutdown.notified() => return Ok(()),
    }
    state.set(ServerState::Live);
    stats::gauge("server.live").set(1);
    for fault in plane.interception_faults() {
        tracing::warn!(fault, "interception is not ready");
    }
    if store.is_answered() && !store.is_in_force() {
        tracing::warn!(
            workers = flags.workers(),
            "serving, but for what was refused: `culvert xds status` says what, and why"
        );
    } else if store.is_answered() {
        tracing::info!(workers = flags.workers(), "all configuration is in force: serving");
    } else if flags.mode == Mode::InitOnly {
        bail!("the control plane has not answered: is it running, and reachable from here?");
    } else {
        tracing::warn!(workers = flags.workers(), "serving without the control plane, which has not answered yet");
    }
    if flags.mode == Mode::InitOnly {
        return Ok(());
    }
    tokio::select! {
        () = signals.stop() => {}
        () = shutdown.notified() => {}
        ended = tasks.ended() => bail!(ended),
    }
    state.set(ServerState::Draining);
    stats::gauge("server.live").set(0);
    Ok(())
}

/// Whether this daemon replaces one that still runs.
fn replaces(plane: &DataPlane) -> bool {
    plane.with_interception(Interception::has_predecessor).unwrap_or(false)
}

/// Says where the admin interface listens.
fn tell_admin_address(listener: &TcpListener, path: Option<&std::path::Path>) -> Result<()> {
    let bound = listener.local_addr().context("admin.address")?;
    if let Some(path) = path {
        std::fs::write(path, bound.to_string()).with_context(|| format!("--admin-address-path {}", path.display()))?;
    }
    tracing::info!(address = %bound, "admin interface listens");
    Ok(())
}

/// Waits for an address that another process has.
async fn bind_when_free(address: std::net::SocketAddr) -> TcpListener {
    let mut tick = tokio::time::interval(Duration::from_millis(50));
    loop {
        tick.tick().await;
        if let Ok(listener) = TcpListener::bind(address).await {
            return listener;
        }
    }
}

/// Lets connections finish, for at most `--drain-time-s`, or until a second signal. Where another daemon has taken over, the admin
/// interface is left to that one at once: who asks whether the node is ready, means that one.
async fn drain(flags: &Flags, plane: &DataPlane, signals: &mut Signals, leave_admin: &Notify) {
    let leaving = async {
        plane.let_go().await;
        plane.shut().await;
    };
    tokio::select! {
        () = leaving => {}
        () = signals.stop() => {
            tracing::warn!(connections = plane.connections(), "told twice: not waiting for a drain");
            return;
        }
    }
    let limit = drain_time(flags);
    let followed = async {
        let mut tick = tokio::time::interval(Duration::from_millis(250));
        loop {
            tick.tick().await;
            if plane.with_interception(Interception::is_followed).unwrap_or(false) {
                tracing::info!("another daemon serves: the admin interface is left to it");
                leave_admin.notify_one();
                return std::future::pending::<()>().await;
            }
        }
    };
    let finished = async {
        let mut tick = tokio::time::interval(Duration::from_millis(10));
        while plane.connections() > 0 {
            tick.tick().await;
        }
    };
    if plane.connections() > 0 {
        tracing::info!(connections = plane.connections(), limit = ?limit, "draining; a second signal ends it");
    }
    tokio::select! {
        () = finished => {}
        () = followed => {}
        () = tokio::time::sleep(limit) => tracing::warn!(connections = plane.connections(), "drain time is over"),
        () = signals.stop() => tracing::warn!(connections = plane.connections(), "told twice: not waiting any longer"),
    }
}

fn drain_time(flags: &Flags) -> Duration {
    Duration::from_secs(u64::from(flags.drain_time_s))
}

struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

impl Signals {
    fn new() -> Result<Signals> {
        let listen = |kind| signal(kind).context("cannot listen for signals");
        Ok(Signals { terminate: listen(SignalKind::terminate())?, interrupt: listen(SignalKind::interrupt())? })
    }

    async fn stop(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

//! `culvert-discovery`: flags and start-up.

use std::io::IsTerminal as _;
use std::net::{IpAddr, SocketAddr};
use std::num::{NonZeroU32, NonZeroUsize};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::Parser;
use culvert_discovery::Discovery;
use culvert_discovery::config::{ClusterConfig, Config, ConfigFile, INITIAL_WAIT, override_filter, parse_cluster};
use culvert_discovery::health;
use culvert_discovery::overrides::{self, tunnels};
use culvert_discovery::registration::Settings;
use culvert_discovery::registration::store::Storage;
use culvert_discovery::resources::Options;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// Joins Kubernetes clusters into one mesh and serves it to proxies by Envoy's xDS (CDS, EDS, LDS and RDS over ADS).
///
/// Each cluster is an API server, or a directory of manifests (Service, EndpointSlice and Pod; *.yaml, *.yml or *.json).
/// Both are watched: what changes takes effect at once. Services of the same name and namespace are one service, wherever they run.
///
/// Pods labelled culvert.dev/offloaded: "true" get no traffic but that of requests which name their label
/// culvert.dev/revision: see `culvert override --help`.
#[derive(Debug, Parser)]
#[command(name = "culvert-discovery", version, after_long_help = AFTER_HELP)]
struct Flags {
    /// A cluster, as name=DIR[,region=REGION][,zone=ZONE]. May be repeated; in a conflict the first one counts.
    /// In the place of DIR, kubeconfig:FILE[,context=CONTEXT] or in-cluster watches an API server.
    #[arg(long = "cluster", value_name = "NAME=DIR", value_parser = parse_cluster)]
    clusters: Vec<ClusterConfig>,

    /// Where proxies connect to (gRPC without TLS) [default: 127.0.0.1:18000]
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: Option<SocketAddr>,

    /// Where the pages (/, /status, /metrics, /healthcheck, /ready) and the registration API are served
    /// [default: 127.0.0.1:18001]
    #[arg(long, value_name = "ADDRESS:PORT")]
    http: Option<SocketAddr>,

    /// Let hosts register over the v1 REST API, and keep them in: memory, redb:PATH (a file) or redis://HOST:PORT.
    /// Whoever reaches --http can then bring endpoints into the mesh.
    #[arg(long, value_name = "STORAGE", value_parser = str::parse::<Storage>)]
    registration: Option<Storage>,

    /// Keep shares of overrides (`culvert override share`) in: memory, redb:PATH (a file) or redis://HOST:PORT
    /// [default: memory]
    #[arg(long, value_name = "STORAGE", value_parser = str::parse::<Storage>)]
    shares: Option<Storage>,

    /// A file with the token that developers need for shares from other hosts, and for tunnels from any
    #[arg(long, value_name = "FILE")]
    developer_token_file: Option<PathBuf>,

    /// Let developers' machines answer for revisions of services (`culvert override connect`): an address of this host that
    /// the proxies can reach, and a port for each tunnel. Needs --developer-token-file.
    #[arg(long, value_name = "ADDRESS:FIRST-LAST[,quarantine=SECONDS]", value_parser = str::parse::<tunnels::Settings>)]
    tunnels: Option<tunnels::Settings>,

    /// A configuration file. Flags take precedence over it, clusters of both are joined.
    #[arg(short = 'c', long = "config", value_name = "FILE")]
    config: Option<PathBuf>,

    /// The port of the proxies' outbound listener [default: 15001]
    #[arg(long, value_name = "PORT")]
    outbound_port: Option<u16>,

    /// The address of the proxies' outbound listener; `::` takes IPv4 too [default: ::]
    #[arg(long, value_name = "ADDRESS")]
    outbound_address: Option<IpAddr>,

    /// Have proxies write an HTTP access log to this file, in Envoy's default format
    #[arg(long, value_name = "PATH")]
    access_log: Option<String>,

    /// What is logged: error, warn, info, debug or trace; or a filter such as info,culvert_discovery::server=debug
    #[arg(short = 'l', long = "log-level", value_name = "LEVEL", default_value = "info")]
    log_level: String,
}

const AFTER_HELP: &str = "\
Example:
  culvert-discovery --cluster east=./east,region=eu,zone=eu-1 --cluster west=./west,region=us,zone=us-1
  curl http://127.0.0.1:18001/status      # or: culvert status, or http://127.0.0.1:18001/ in a browser

A configuration file with every field:
  listen: 127.0.0.1:18000
  http: 127.0.0.1:18001
  outbound_port: 15001
  outbound_address: '::'
  inbound_port: 15006       # of sidecars
  edge:                     # what edge proxies listen to
    listeners: [{port: 8080}, {address: '::', port: 8443, tls: shop/edge}]
    overrides: strip        # or strip_external, keep
    internal_ranges: [10.0.0.0/8]
    trusted_hops: 0
  access_log: /var/log/culvert/access.log
  initial_wait: 30 # seconds
  clusters:
  - {name: east, manifests: /etc/culvert/east, region: eu, zone: eu-1, merge: true, drained: false}
  - {name: west, kubernetes: {kubeconfig: /etc/culvert/west.kubeconfig, context: reader@west}}
  drain_file: /var/lib/culvert/drained.json
  operator_token_file: /etc/culvert/operator-token
  tls: {certificate: /etc/culvert/tls.crt, private_key: /etc/culvert/tls.key, client_authorities: /etc/culvert/ca.crt}
  authorization:
  - {identity: 'spiffe://mesh/ns/*/sa/culvertd', nodes: ['node-*'], services: [users, payments.shop], status: false, health: true,
     secrets: [users, 'shop/*'], own_secret: shop/culvertd}
  secrets: {directory: /etc/culvert/secrets}
  load_report_interval: 10 # seconds
  health_report_interval: 2 # seconds, of proxies that check endpoints
  health_checkers: 3        # how many check each
  registration:
    storage: redb:/var/lib/culvert/registrations.redb    # or memory, or redis://HOST:PORT/DB
    ttl: 600                # seconds that a host counts after it checked in
    env: development        # what answers state as `env`
    namespace: default      # registered services are called by NAME.NAMESPACE ...
    port: 80                # ... and this port
    protocol: http          # tcp, http, http2 or grpc
    max_hosts: 100000
  override_filter:          # what requests may ask for: docs/overrides.md
    actions: [DELAY, FAULT]
    debug_response: true
  overrides:
    storage: redb:/var/lib/culvert/shares.redb           # or memory, or redis://HOST:PORT/DB
    token_file: /etc/culvert/developer-token
    max_shares: 1000
    tunnels: {address: 10.0.0.5, ports: 19000-19099, max_connections: 128, quarantine: 35}

A proxy's bootstrap needs `ads_config` with a gRPC cluster that leads to --listen, and `ads: {}` for LDS and CDS.
docs/discovery.md describes the manifests, the names and the status page.";

fn main() -> ExitCode {
    match run(Flags::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("culvert-discovery: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(flags: Flags) -> anyhow::Result<()> {
    // This one repeats as errors what the sources report, at every try.
    let filter = EnvFilter::try_new(format!("kube_client::client::builder=off,{}", flags.log_level))
        .with_context(|| format!("--log-level: `{}` is not a level or filter", flags.log_level))?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    let config = configuration(flags)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("cannot start threads")?;
    runtime.block_on(async {
        // Before anything else, so that no signal is missed.
        let mut terminate = signal(SignalKind::terminate()).context("cannot handle SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot handle SIGINT")?;
        let asked = async move {
            tokio::select! {
                _ = terminate.recv() => tracing::info!("SIGTERM: closing"),
                _ = interrupt.recv() => tracing::info!("SIGINT: closing"),
            }
        };
        tokio::pin!(asked);
        // To start may take for ever: it waits for a cluster that can be read.
        let discovery = tokio::select! {
            started = Discovery::start(config) => started?,
            () = &mut asked => return Ok(()),
        };
        discovery.run(asked).await
    })
}

fn health(interval: Option<NonZeroU32>, checkers: Option<NonZeroUsize>) -> health::Settings {
    let defaults = health::Settings::default();
    health::Settings {
        interval: interval.map_or(defaults.interval, |seconds| Duration::from_secs(seconds.get().into())),
        checkers: checkers.map_or(defaults.checkers, NonZeroUsize::get),
    }
}

fn configuration(flags: Flags) -> anyhow::Result<Config> {
    let file = flags.config.as_deref().map(ConfigFile::read).transpose()?.unwrap_or_default();
    let defaults = Options::default();
    let clusters = file.clusters.into_iter().map(ClusterConfig::try_from).collect::<anyhow::Result<_>>();
    let mut clusters: Vec<ClusterConfig> = clusters.context("the config file")?;
    clusters.extend(flags.clusters);
    let mut registration = file.registration.map(Settings::try_from).transpose().context("the config file")?;
    if let Some(storage) = flags.registration {
        registration = Some(match registration {
            Some(settings) => Settings { storage, ..settings },
            None => Settings::new(storage),
        });
    }
    let mut overrides =
        file.overrides.map(overrides::Settings::try_from).transpose().context("the config file")?.unwrap_or_default();
    overrides.storage = flags.shares.unwrap_or(overrides.storage);
    overrides.token_file = flags.developer_token_file.or(overrides.token_file);
    overrides.tunnels = flags.tunnels.or(overrides.tunnels);
    Ok(Config {
        listen: flags.listen.or(file.listen).unwrap_or(SocketAddr::from(([127, 0, 0, 1], 18000))),
        http: flags.http.or(file.http).unwrap_or(SocketAddr::from(([127, 0, 0, 1], 18001))),
        clusters,
        registration,
        overrides,
        drain: culvert_discovery::drain::Settings { file: file.drain_file, token_file: file.operator_token_file },
        initial_wait: file.initial_wait.map_or(INITIAL_WAIT, Duration::from_secs),
        options: Options {
            overrides: override_filter(file.override_filter).context("the config file")?,
            outbound_address: flags.outbound_address.or(file.outbound_address).unwrap_or(defaults.outbound_address),
            outbound_port: flags.outbound_port.or(file.outbound_port).unwrap_or(defaults.outbound_port),
            inbound_port: file.inbound_port.unwrap_or(defaults.inbound_port),
            edge: file.edge,
            access_log: flags.access_log.or(file.access_log),
        },
        serving: culvert_discovery::server::Settings {
            tls: file.tls,
            rules: file.authorization,
            load_report_interval: file
                .load_report_interval
                .map_or(culvert_discovery::server::loads::INTERVAL, |seconds| {
                    Duration::from_secs(seconds.get().into())
                }),
            health: health(file.health_report_interval, file.health_checkers),
        },
        secrets: file.secrets.map(|secrets| secrets.directory),
    })
}

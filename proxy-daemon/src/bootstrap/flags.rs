//! The command line: Envoy's flags, as far as they mean something here.

use std::path::PathBuf;

use clap::{Parser, ValueEnum};
use culvert_xds_client::json::{self, UnknownFields};

/// The Culvert node proxy.
#[derive(Debug, Parser)]
#[command(
    name = "culvertd",
    about = "The Culvert node proxy: Envoy's configuration, one process a node",
    after_help = "Examples:\n  culvertd -c /etc/culvert/bootstrap.yaml\n  culvertd --mode validate -c bootstrap.yaml    \
                  # check a file and exit\n  culvertd -c bootstrap.yaml --concurrency 2 -l debug\n\nThe bootstrap is \
                  Envoy's (config.bootstrap.v3). A field that is set and not supported ends the start with its path; \
                  docs/support.md lists what is supported.",
    disable_version_flag = true
)]
pub struct Flags {
    /// The bootstrap file: YAML, or JSON.
    #[arg(short = 'c', long, value_name = "FILE")]
    pub config_path: Option<PathBuf>,
    /// Bootstrap text, merged over the file's.
    #[arg(long, value_name = "YAML")]
    pub config_yaml: Option<String>,
    /// What to do.
    #[arg(long, value_enum, default_value_t = Mode::Serve)]
    pub mode: Mode,
    /// Number of worker threads. Default: one a processor, at most 16.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub concurrency: Option<u16>,
    /// This node's name, for the control plane; replaces node.id.
    #[arg(long, value_name = "NAME")]
    pub service_node: Option<String>,
    /// The service or group that this node belongs to; replaces node.cluster.
    #[arg(long, value_name = "NAME")]
    pub service_cluster: Option<String>,
    /// The zone that this node is in; replaces node.locality.zone.
    #[arg(long, value_name = "ZONE")]
    pub service_zone: Option<String>,
    /// How much is logged, to standard error.
    #[arg(short = 'l', long, value_enum, default_value_t = LogLevel::Info)]
    pub log_level: LogLevel,
    /// Logs go to this file instead.
    #[arg(long, value_name = "FILE")]
    pub log_path: Option<PathBuf>,
    /// Keeps apart several daemons of one host: BPF pins and lock files carry it.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub base_id: u32,
    /// The admin interface's address is written to this file once it listens.
    #[arg(long, value_name = "FILE")]
    pub admin_address_path: Option<PathBuf>,
    /// Seconds that connections have to finish when the daemon ends or a listener is replaced.
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    pub drain_time_s: u32,
    /// Accepted for Envoy's sake: there is no hot restart to disable.
    #[arg(long)]
    pub disable_hot_restart: bool,
    /// Fields of the bootstrap that are not in the API are passed over with a warning, instead of ending the start.
    #[arg(long, alias = "allow-unknown-fields")]
    pub allow_unknown_static_fields: bool,
    /// xDS resources with fields that are not in the API are rejected, instead of the fields being passed over with a
    /// warning.
    #[arg(long)]
    pub reject_unknown_dynamic_fields: bool,
    /// Fields of xDS resources that are not in the API are passed over without a warning, and not counted.
    #[arg(long)]
    pub ignore_unknown_dynamic_fields: bool,
    /// Print the version and exit.
    #[arg(long)]
    pub version: bool,
}

/// `--mode`
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum Mode {
    /// Serve traffic.
    Serve,
    /// Check the configuration and exit: 0 where it is good.
    Validate,
    /// Start, wait for the control plane's configuration, and exit.
    InitOnly,
}

/// `--log-level`, by Envoy's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "lower")]
pub enum LogLevel {
    /// Everything.
    Trace,
    /// What helps to find an error.
    Debug,
    /// What an operator wants to know.
    Info,
    /// What went wrong and was survived.
    #[value(alias = "warn")]
    Warning,
    /// What did not work.
    Error,
    /// As `error`.
    Critical,
    /// Nothing.
    Off,
}

impl LogLevel {
    /// The filter of the tracing crate.
    pub fn filter(self) -> tracing::level_filters::LevelFilter {
        use tracing::level_filters::LevelFilter;
        match self {
            LogLevel::Trace => LevelFilter::TRACE,
            LogLevel::Debug => LevelFilter::DEBUG,
            LogLevel::Info => LevelFilter::INFO,
            LogLevel::Warning => LevelFilter::WARN,
            LogLevel::Error | LogLevel::Critical => LevelFilter::ERROR,
            LogLevel::Off => LevelFilter::OFF,
        }
    }
}

impl Default for Flags {
    /// As without any flag.
    fn default() -> Flags {
        Flags::parse_from(["culvertd"])
    }
}

impl Flags {
    /// The number of workers: as asked for, else one a processor, at most 16. A node proxy shares its host: on a big one
    /// a worker a processor would cost more memory and wake-ups than it brings.
    pub fn workers(&self) -> usize {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        self.concurrency.map_or(processors.min(16), usize::from)
    }

    /// What becomes of unknown fields in the bootstrap.
    pub fn unknown_static_fields(&self) -> UnknownFields {
        if self.allow_unknown_static_fields { UnknownFields::Warn(&json::STATIC_FIELDS) } else { UnknownFields::Reject }
    }

    /// What becomes of unknown fields in what xDS delivers.
    pub fn unknown_dynamic_fields(&self) -> UnknownFields {
        match (self.reject_unknown_dynamic_fields, self.ignore_unknown_dynamic_fields) {
            (true, _) => UnknownFields::Reject,
            (false, false) => UnknownFields::Warn(&json::DYNAMIC_FIELDS),
            (false, true) => UnknownFields::Ignore,
        }
    }

    /// As `/server_info` shows them, by Envoy's names.
    pub fn to_json(&self) -> serde_json::Value {
        let text = |path: &Option<PathBuf>| path.as_ref().map(|path| path.display().to_string()).unwrap_or_default();
        let mode = match self.mode {
            Mode::Serve => "Serve",
            Mode::Validate => "Validate",
            Mode::InitOnly => "InitOnly",
        };
        serde_json::json!({
            "base_id": self.base_id.to_string(),
            "concurrency": self.workers(),
            "config_path": text(&self.config_path),
            "config_yaml": self.config_yaml.clone().unwrap_or_default(),
            "admin_address_path": text(&self.admin_address_path),
            "log_level": format!("{:?}", self.log_level).to_lowercase(),
            "log_path": text(&self.log_path),
            "service_cluster": self.service_cluster.clone().unwrap_or_default(),
            "service_node": self.service_node.clone().unwrap_or_default(),
            "service_zone": self.service_zone.clone().unwrap_or_default(),
            "mode": mode,
            "drain_time": format!("{}s", self.drain_time_s),
        })
    }
}

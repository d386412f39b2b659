//! Clusters that an operator takes out, and back in: `POST /clusters/NAME/drain` and `/undrain` at `--http`.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use http::{HeaderMap, Method, StatusCode};
use tokio::sync::{Mutex, watch};
use tracing::info;

use crate::access;
use crate::registry::{Registry, RegistryControl};

/// What the paths begin with.
pub const PREFIX: &str = "/clusters/";
/// A header that a page in a browser cannot send elsewhere unasked: otherwise any page could have the browser of somebody
/// on the same host drain a cluster.
const OPERATOR: &str = "x-culvert-operator";
/// How long it may take until the mesh knows.
const PATIENCE: Duration = Duration::from_secs(5);

/// How clusters may be drained.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Settings {
    /// Where it is kept which clusters are drained; without it a restart goes back to the configuration.
    pub file: Option<PathBuf>,
    /// A file with the token that operators from other hosts must have; without it they must be on this host.
    pub token_file: Option<PathBuf>,
}

/// The clusters and which of them are drained.
#[derive(Debug, Clone)]
pub struct Drains {
    settings: Arc<Settings>,
    control: Option<RegistryControl>,
    registry: watch::Receiver<Arc<Registry>>,
    /// One change at a time, so that the file says what is so.
    said: Arc<Mutex<BTreeMap<String, bool>>>,
}

/// A status and one line.
type Answer = (StatusCode, String);

impl Drains {
    /// Reads what was said before, and has it count over the configuration.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub async fn open(
        settings: Settings,
        control: Option<RegistryControl>,
        registry: watch::Receiver<Arc<Registry>>,
    ) -> anyhow::Result<Self> {
        let said: BTreeMap<String, bool> = match &settings.file {
            None => BTreeMap::new(),
            Some(path) => match std::fs::read_to_string(path) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => BTreeMap::new(),
                Err(error) => return Err(error).with_context(|| format!("drained clusters: {}", path.display())),
                Ok(text) => serde_json::from_str(&text).with_context(|| {
                    format!("drained clusters: {} is not of the form {{\"NAME\": true}}", path.display())
                })?,
            },
        };
        for (cluster, drained) in &said {
            if let Some(control) = &control {
                control.set_drained(cluster, *drained).await?;
            }
        }
        Ok(Self { settings: settings.into(), control, registry, said: Arc::new(Mutex::new(said)) })
    }

    /// Answers a request.
    pub async fn answer(&self, method: &Method, path: &str, headers: &HeaderMap, peer: IpAddr) -> Answer {
        let asked = path.strip_prefix(PREFIX).and_then(|rest| rest.rsplit_once('/'));
        let (cluster, drained) = match asked {
            Some((cluster, "drain")) => (cluster, true),
            Some((cluster, "undrain")) => (cluster, false),
            _ => {
                return (StatusCode::NOT_FOUND, "the paths are /clusters/NAME/drain and /clusters/NAME/undrain".into());
            }
        };
        if method != Method::POST {
            return (StatusCode::METHOD_NOT_ALLOWED, "this is asked for by POST".into());
        }
        if let Err(refusal) = self.admit(headers, peer) {
            return refusal;
        }
        let known = self.registry.borrow().clusters.iter().any(|known| known.info.name == cluster);
        let Some(control) = self.control.as_ref().filter(|_| known) else {
            return (StatusCode::NOT_FOUND, format!("there is no cluster `{cluster}`"));
        };
        match self.set(control, cluster, drained).await {
            Ok(told) => (StatusCode::OK, told),
            Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error:#}")),
        }
    }

    fn admit(&self, headers: &HeaderMap, peer: IpAddr) -> Result<(), Answer> {
        if !headers.contains_key(OPERATOR) {
            return Err((StatusCode::FORBIDDEN, "the header x-culvert-operator is missing".to_owned()));
        }
        access::admit(self.settings.token_file.as_deref(), headers, peer, "operators'", "operator_token_file")
    }

    async fn set(&self, control: &RegistryControl, cluster: &str, drained: bool) -> anyhow::Result<String> {
        let mut said = self.said.lock().await;
        let mut newer = said.clone();
        newer.insert(cluster.to_owned(), drained);
        if let Some(path) = &self.settings.file {
            // Beside it and over it, so that a crash leaves one or the other.
            let temporary = path.with_extension("new");
            std::fs::write(&temporary, serde_json::to_vec_pretty(&newer)?)
                .and_then(|()| std::fs::rename(&temporary, path))
                .with_context(|| format!("nothing was changed: cannot write {}", path.display()))?;
        }
        control.set_drained(cluster, drained).await?;
        *said = newer;
        let mut registry = self.registry.clone();
        let known = |registry: &Arc<Registry>| {
            registry.clusters.iter().any(|known| known.info.name == cluster && known.drained == drained)
        };
        tokio::time::timeout(PATIENCE, registry.wait_for(known)).await.context("it takes long to take effect")??;
        info!("an operator {} cluster `{cluster}`", if drained { "drained" } else { "undrained" });
        let state = if drained { "is drained" } else { "takes requests" };
        let until = if self.settings.file.is_some() { "" } else { ", until discovery restarts" };
        Ok(format!("cluster {cluster} {state}{until}"))
    }
}

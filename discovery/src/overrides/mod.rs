//! What developers keep at discovery for their overrides: shares, which are stored, and tunnels, which are connections. And what proxies
//! report of who passes contexts on.
//!
//! ```text
//! GET    /overrides/shares         all shares
//! POST   /overrides/shares         a new one: {"name", "overrides": [{"service", "revision"}] or "item", "expires_in"}
//! GET    /overrides/shares/NAME    one of them, by its name or its token
//! DELETE /overrides/shares/NAME
//! GET    /overrides/tunnels        with `Upgrade: culvert-tunnel`: begins a tunnel
//! ```

pub mod contexts;
pub mod shares;
pub mod tunnels;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use http::{HeaderMap, Method, StatusCode, header};
use serde_json::{Value, json};
use tokio::sync::watch;

use self::contexts::Contexts;
use self::shares::Shares;
use self::tunnels::Tunnels;
use crate::access::{self, Denied};
use crate::mesh::Mesh;
use crate::registration::store::{Storage, StoreError};

/// What the paths begin with.
pub const PREFIX: &str = "/overrides/";
/// The path of the shares.
pub const SHARES: &str = "/overrides/shares";
/// The most shares, if nothing is said.
pub const MAX_SHARES: usize = 1000;
/// How the developers' token is configured.
const TOKEN_SETTING: &str = "overrides.token_file";
/// Whose it is.
const TOKEN_OF: &str = "developers'";

/// What is configured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Where shares are kept.
    pub storage: Storage,
    /// A file with the token that developers must have; without it they must be on this host, and there are no tunnels.
    pub token_file: Option<PathBuf>,
    /// The most shares.
    pub max_shares: usize,
    /// Where tunnels are, if there may be any.
    pub tunnels: Option<tunnels::Settings>,
}

impl Default for Settings {
    fn default() -> Self {
        Self { storage: Storage::Memory, token_file: None, max_shares: MAX_SHARES, tunnels: None }
    }
}

/// Shares and tunnels.
#[derive(Debug, Clone)]
pub struct Overrides {
    /// The shares.
    pub shares: Shares,
    /// The tunnels.
    pub tunnels: Tunnels,
    /// Who passes contexts on.
    pub contexts: Contexts,
    token_file: Option<Arc<PathBuf>>,
    changes: watch::Sender<u64>,
}

impl Overrides {
    /// Opens the storage.
    ///
    /// # Errors
    /// When the storage cannot ever work.
    pub fn open(settings: Settings, shutdown: watch::Receiver<bool>) -> Result<Self, StoreError> {
        let Settings { storage, token_file, max_shares, tunnels } = settings;
        let changes = watch::channel(0).0;
        let shares = Shares::open(storage, max_shares, changes.clone())?;
        let tunnels = Tunnels::new(tunnels, changes.clone(), shutdown);
        Ok(Self { shares, tunnels, contexts: Contexts::default(), token_file: token_file.map(Arc::new), changes })
    }

    /// Changes each time that proxies are to be told something else.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Whether somebody may use the shares.
    ///
    /// # Errors
    /// Why not.
    pub fn admit(&self, headers: &HeaderMap, peer: SocketAddr) -> Result<(), Denied> {
        access::admit(self.token_file.as_deref().map(PathBuf::as_path), headers, peer.ip(), TOKEN_OF, TOKEN_SETTING)
    }

    /// Whether somebody may open a tunnel. Who reaches the host is not enough: what is at its other end answers for a service.
    ///
    /// # Errors
    /// Why not.
    pub fn admit_tunnel(&self, headers: &HeaderMap) -> Result<(), Denied> {
        match &self.token_file {
            Some(path) => access::bearer(path, headers, TOKEN_OF),
            None => {
                let reason = format!("tunnels need `{TOKEN_SETTING}` in the configuration (or --developer-token-file)");
                Err((StatusCode::FORBIDDEN, reason))
            }
        }
    }

    /// Answers a request about shares, of somebody who may ask.
    ///
    /// # Errors
    /// Why it is refused.
    pub async fn answer(
        &self,
        method: &Method,
        path: &str,
        headers: &HeaderMap,
        body: &[u8],
        mesh: &Mesh,
    ) -> Result<(StatusCode, Value), Denied> {
        let name = match path.strip_prefix(SHARES) {
            Some("" | "/") => None,
            Some(rest) if rest.starts_with('/') => Some(&rest[1..]),
            _ => {
                let reason = format!("the paths are {SHARES}, {SHARES}/NAME and {}", tunnels::PATH);
                return Err((StatusCode::NOT_FOUND, reason));
            }
        };
        let find = |name: &str| {
            let unknown = || (StatusCode::NOT_FOUND, format!("there is no share `{}`", name.escape_default()));
            self.shares.find(name).ok_or_else(unknown)
        };
        match (method, name) {
            (&Method::GET, None) => {
                Ok((StatusCode::OK, self.shares.list().iter().map(|share| share.as_answer()).collect()))
            }
            (&Method::GET, Some(name)) => Ok((StatusCode::OK, find(name)?.as_answer())),
            (&Method::DELETE, Some(name)) => {
                let share = find(name)?;
                self.shares.remove(&share).await?;
                Ok((StatusCode::OK, share.as_answer()))
            }
            (&Method::POST, None) => {
                // A page in a browser cannot send this elsewhere unasked, as it can a form.
                let kind = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
                if !kind.split(';').next().unwrap_or_default().trim().eq_ignore_ascii_case("application/json") {
                    let reason = "a share is sent as content-type application/json".to_owned();
                    return Err((StatusCode::UNSUPPORTED_MEDIA_TYPE, reason));
                }
                let asked = serde_json::from_slice(body)
                    .map_err(|error| (StatusCode::BAD_REQUEST, format!("the body is not a share: {error}")))?;
                let share = self.shares.create(asked).await?;
                let mut answer = share.as_answer();
                answer["unlisted"] = unlisted(&share, mesh).into();
                Ok((StatusCode::CREATED, answer))
            }
            _ => Err((StatusCode::METHOD_NOT_ALLOWED, "shares know GET, POST and DELETE".to_owned())),
        }
    }
}

/// The overrides of a share that name what is not offloaded at present, as `service=revision`.
fn unlisted(share: &shares::Share, mesh: &Mesh) -> Vec<Value> {
    let overrides = share.overrides().unwrap_or_default();
    let missing = overrides.overrides.iter().filter(|entry| {
        let (name, namespace) = culvert_xds_client::overrides::split_service(&entry.service);
        let service = mesh.services.get(&crate::kubernetes::ObjectKey::new(namespace, name));
        let mut offloaded =
            service.into_iter().flat_map(|service| service.ports.values()).flat_map(|port| &port.offloaded);
        !entry.revision.is_empty() && !offloaded.any(|endpoint| endpoint.revision == entry.revision)
    });
    missing.map(|entry| json!(format!("{}={}", entry.service, entry.revision))).collect()
}

//! What operators are shown of the resources: the seam between the store, which takes a [`Snapshot`], and `/config_dump`,
//! `/init_dump` and the client status service, which print it.
//!
//! A snapshot is taken under the store's lock and read without it, so it holds references, not copies: ten thousand
//! resources are some megabytes of pointers and names.

use std::{sync::Arc, time::SystemTime};

use culvert_xds_client::{
    Any,
    source::Source,
    stats::{Connection, Fault, SourceStats, TypeStats},
};

/// One version of a resource, as it came. The store keeps these behind an [`Arc`], for itself and for every snapshot.
#[derive(Debug, Clone)]
pub struct Version {
    /// The control plane's name of the version: the resource's own where it has one, else that of its response.
    pub version: String,
    /// The resource.
    pub body: Any,
    /// When it was taken, or refused.
    pub updated: SystemTime,
}

/// The newest attempt to change a resource, where it failed.
#[derive(Debug)]
pub struct Failure {
    /// What was refused.
    pub attempt: Arc<Version>,
    /// Why, with the path of the field at fault.
    pub details: String,
}

/// A resource that was asked for by name and is not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Missing {
    /// The control plane has not said anything of it yet, and is waited for.
    Requested,
    /// The control plane has removed it, or has not sent it within the time that it is waited for.
    DoesNotExist,
}

/// All that is known of one resource. At least one of the versions, `failure` or `missing` is there.
#[derive(Debug, Clone, Default)]
pub struct Resource {
    /// The name that it is subscribed to by.
    pub name: String,
    /// What traffic obeys now.
    pub active: Option<Arc<Version>>,
    /// Accepted, and waiting for what it needs; `active` serves until then. The same version is never in both.
    pub warming: Option<Arc<Version>>,
    /// What `warming` waits for, in words.
    pub waits_for: Vec<String>,
    /// Removed or replaced, with connections that have not ended yet.
    pub draining: Option<Arc<Version>>,
    /// The newest version was refused, or is accepted and does not serve (a listener that cannot be bound, for example).
    /// Gone with the next version that is taken.
    pub failure: Option<Arc<Failure>>,
    /// Neither was it ever accepted, nor refused.
    pub missing: Option<Missing>,
}

/// The resources of one type.
#[derive(Debug, Clone, Default)]
pub struct Type {
    /// For example `type.googleapis.com/envoy.config.cluster.v3.Cluster`.
    pub type_url: String,
    /// The one version that the newest of each of `resources` has; empty where they differ, and where there are none.
    pub version: String,
    /// In the order of their names.
    pub resources: Vec<Resource>,
}

/// A listener that is not serving because something is not there yet.
#[derive(Debug, Clone)]
pub struct Unready {
    /// The listener's name.
    pub listener: String,
    /// Whether it is one of the bootstrap, which is in no [`Type`].
    pub is_static: bool,
    /// What it waits for, each in the words of Envoy's init targets: `RdsRouteConfigSubscription RDS routes init`.
    pub targets: Vec<String>,
}

/// A listener or a cluster in use without something that was refused, or did not come in time: secrets (TLS handshakes that need
/// them fail), routes (requests are answered 404), endpoints (503).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Incomplete {
    /// Of the listener or the cluster.
    pub type_url: String,
    /// Its name; it may be one of the bootstrap, which is in no [`Type`].
    pub name: String,
    /// What it lacks, in words.
    pub lacks: Vec<String>,
}

/// What the store knew at one moment of everything that came from the control plane or from files. What stands in the
/// bootstrap is not in here.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    /// Every type that is asked for, or of which there is something.
    pub types: Vec<Type>,
    /// Listeners that wait, static ones as well.
    pub unready: Vec<Unready>,
    /// Listeners and clusters that serve without something they need, static ones as well.
    pub incomplete: Vec<Incomplete>,
    /// Files and polled servers of which nothing could be taken the last time, responses that were rejected for their own
    /// faults, and secrets of the bootstrap whose newest files cannot be used.
    pub faults: Vec<SourceFault>,
    /// The servers that resources are had from.
    pub sources: Vec<SourceState>,
    /// What SRDS delivered, once for each name of `ScopedRoutes`.
    pub scoped: Vec<Scoped>,
}

/// A file, or the answer of a server that is polled, that cannot be used as a whole; or a response with faults that no resource
/// can be shown with.
#[derive(Debug, Clone)]
pub struct SourceFault {
    /// What it was to bring.
    pub type_url: String,
    /// The file's path, or the server (its cluster or address), or the secret's name.
    pub place: String,
    /// The response's version; empty where none was read.
    pub version: String,
    /// Why not.
    pub fault: Fault,
}

/// How a server stands that resources are had from.
#[derive(Debug, Clone)]
pub struct SourceState {
    /// `ads`, or the type that it is asked for, with the server.
    pub name: String,
    /// Whether there is a connection.
    pub connection: Connection,
}

/// All servers that resources are had from.
pub fn source_states(sources: &SourceStats) -> Vec<SourceState> {
    let clients = sources.clients().into_iter().map(|(_, only, client)| {
        let connection = client.connection();
        let what = only.as_deref().map_or("ads", |only| only.rsplit(['.', '/']).next().unwrap_or(only));
        SourceState { name: format!("{what}: {}", connection.server), connection }
    });
    clients.filter(|state| !state.connection.transport.is_empty()).collect()
}

/// The faults of all sources.
pub fn source_faults(sources: &SourceStats) -> Vec<SourceFault> {
    let clients = sources.clients().into_iter();
    let faults = clients.flat_map(|(source, _, client)| {
        let (place, is_stream) = match source {
            Source::File(file) => (file.path.display().to_string(), false),
            Source::Rest(rest) => (format!("cluster {}", rest.cluster), false),
            Source::Ads | Source::Grpc(_) => (client.connection().server, true),
        };
        let of_type = |(type_url, stats): (String, Arc<TypeStats>)| {
            let of = |version, fault| SourceFault { type_url: type_url.clone(), place: place.clone(), version, fault };
            // Where nothing could be read, an older response is history. Streams do not bring that about.
            let unusable = stats.fault().filter(|_| !is_stream).map(|fault| of(String::new(), fault));
            unusable.or_else(|| stats.nack().map(|nack| of(nack.version, nack.fault)))
        };
        client.types().into_iter().filter_map(of_type).collect::<Vec<_>>()
    });
    faults.collect()
}

/// The scopes that connection managers have by one name.
#[derive(Debug, Clone)]
pub struct Scoped {
    /// `ScopedRoutes.name`
    pub name: Arc<str>,
    /// The scopes in force, by their names.
    pub scopes: Vec<Arc<Version>>,
}

impl Snapshot {
    /// The resources of a type; none where nobody asks for that type.
    pub fn of(&self, type_url: &str) -> &[Resource] {
        self.types.iter().find(|known| known.type_url == type_url).map(|known| &*known.resources).unwrap_or_default()
    }

    /// See [`Type::version`].
    pub fn version_of(&self, type_url: &str) -> &str {
        self.types.iter().find(|known| known.type_url == type_url).map(|known| &*known.version).unwrap_or_default()
    }
}

//! The store with the xDS state machine before it, and a server that sends what that asks for, and nothing else.

use std::{
    collections::BTreeSet,
    sync::mpsc::{Receiver, Sender, channel},
};

use culvert_xds_client::{
    Any,
    ads::{Core, Handled, Request, Response, Token, Variant},
};
use envoy_types::pb::envoy::{
    config::{
        core::v3::{Node, TypedExtensionConfig},
        route::v3::ScopedRouteConfiguration,
    },
    service::discovery::v3::{DeltaDiscoveryResponse, DiscoveryResponse, Resource as Wrapper},
};

use super::{
    extensions::{self, listener_of, router},
    scopes::{scope, scoped_listener},
    secrets::{certificate, cluster, sds, secret_url},
    *,
};
use crate::tls::testing::Authority;

/// More rounds than any change takes.
const MAX_ROUNDS: usize = 1000;

/// A control plane with one client.
#[derive(Default)]
pub(super) struct Server {
    version: u64,
    nonce: u64,
    /// All resources, by type and name.
    pub(super) resources: BTreeMap<String, BTreeMap<String, (u64, Any)>>,
    types: BTreeMap<String, Subscribed>,
}

/// What the client has asked for of a type.
#[derive(Default)]
struct Subscribed {
    names: BTreeSet<String>,
    wildcard: bool,
    /// Names were given: from then on none means none.
    named: bool,
    /// The newest response, until it is answered.
    unanswered: bool,
    newest: String,
    answered_once: bool,
    /// What the client was sent.
    known: BTreeMap<String, u64>,
}

impl Server {
    pub(super) fn set(&mut self, type_url: String, resource: Resource) {
        let of_type = self.resources.entry(type_url).or_default();
        if of_type.get(&resource.name).is_some_and(|(_, body)| *body == resource.body) {
            return;
        }
        self.version += 1;
        of_type.insert(resource.name, (self.version, resource.body));
    }

    pub(super) fn remove(&mut self, type_url: String, name: &str) {
        self.version += 1;
        self.resources.entry(type_url).or_default().remove(name);
    }

    fn request(&mut self, request: Request) {
        match request {
            Request::Sotw(request) => {
                let it = self.types.entry(request.type_url).or_default();
                if request.response_nonce != it.newest {
                    return;
                }
                it.unanswered = false;
                it.names = request.resource_names.into_iter().collect();
                it.named |= !it.names.is_empty();
                it.wildcard = it.names.remove("*") || !it.named;
                let names = &it.names;
                it.known.retain(|name, _| it.wildcard || names.contains(name));
            }
            Request::Delta(request) => {
                let first = !self.types.contains_key(&request.type_url);
                let it = self.types.entry(request.type_url).or_default();
                it.unanswered &= request.response_nonce != it.newest;
                it.wildcard |= first && request.resource_names_subscribe.is_empty();
                for name in request.resource_names_unsubscribe {
                    it.wildcard &= name != "*";
                    it.names.remove(&name);
                    it.known.remove(&name);
                }
                for name in request.resource_names_subscribe {
                    it.wildcard |= name == "*";
                    it.known.remove(&name);
                    it.names.insert(name);
                }
                if first {
                    // What it has of a stream before; without a version where that is not in force yet. What is not there any more is going to be removed.
                    let had = request.initial_resource_versions.into_iter();
                    it.known = had.map(|(name, version)| (name, version.parse().unwrap_or_default())).collect();
                }
            }
        }
    }

    fn response(&mut self, variant: Variant) -> Option<Response> {
        for (type_url, it) in self.types.iter_mut().filter(|(_, it)| !it.unanswered) {
            let all = self.resources.entry(type_url.clone()).or_default();
            let wanted = all.iter().filter(|(name, _)| it.wildcard || it.names.contains(*name));
            let wanted: BTreeMap<&String, &(u64, Any)> = wanted.collect();
            let is_new = |name: &String, version: u64| it.known.get(name) != Some(&version);
            let changed = wanted.iter().any(|(name, (version, _))| is_new(name, *version));
            let gone: Vec<String> = it.known.keys().filter(|name| !wanted.contains_key(name)).cloned().collect();
            let first = it.wildcard && !it.answered_once;
            if !changed && gone.is_empty() && !first {
                continue;
            }
            self.nonce += 1;
            let (nonce, type_url) = (self.nonce.to_string(), type_url.clone());
            let version_info = self.version.to_string();
            let response = match variant {
                Variant::Sotw => Response::Sotw(DiscoveryResponse {
                    version_info,
                    resources: wanted.values().map(|(_, body)| body.clone()).collect(),
                    type_url,
                    nonce: nonce.clone(),
                    ..Default::default()
                }),
                Variant::Delta => {
                    let new = wanted.iter().filter(|(name, (version, _))| is_new(name, *version));
                    let wrapped = new.map(|(name, (version, body))| Wrapper {
                        name: name.to_string(),
                        version: version.to_string(),
                        resource: Some(body.clone()),
                        ..Default::default()
                    });
                    Response::Delta(DeltaDiscoveryResponse {
                        system_version_info: version_info,
                        resources: wrapped.collect(),
                        type_url,
                        removed_resources: gone,
                        nonce: nonce.clone(),
                        ..Default::default()
                    })
                }
            };
            it.known = wanted.into_iter().map(|(name, (version, _))| (name.clone(), *version)).collect();
            (it.newest, it.unanswered, it.answered_once) = (nonce, true, true);
            return Some(response);
        }
        None
    }
}

/// What the data plane has, as far as the [`Recorder`] tells.
#[derive(Debug, Default, Clone, PartialEq)]
pub(super) struct View {
    /// How many endpoints each cluster has.
    pub(super) clusters: BTreeMap<String, usize>,
    pub(super) listeners: BTreeSet<String>,
    pub(super) routes: BTreeSet<String>,
    pub(super) secrets: BTreeSet<String>,
    pub(super) scopes: bool,
    /// Those that ECDS has filled.
    pub(super) filters: BTreeSet<String>,
}

impl View {
    fn see(&mut self, line: &str) {
        let words: Vec<&str> = line.split(' ').collect();
        match words[..] {
            ["cluster", name] => drop(self.clusters.insert(name.to_owned(), 0)),
            ["cluster", name, "with", count] | [name, "has", count] => {
                self.clusters.insert(name.to_owned(), count.parse().expect("a number"));
            }
            ["no", "cluster", name] => drop(self.clusters.remove(name)),
            ["listener", name] => drop(self.listeners.insert(name.to_owned())),
            ["no", "listener", name] => drop(self.listeners.remove(name)),
            ["routes", name] => drop(self.routes.insert(name.to_owned())),
            ["no", "routes", name] => drop(self.routes.remove(name)),
            ["secret", name, _] => drop(self.secrets.insert(name.trim_end_matches(':').to_owned())),
            ["no", "secret", name] => drop(self.secrets.remove(name)),
            ["filter", name, ..] => drop(self.filters.insert(name.to_owned())),
            ["no", "scopes"] => self.scopes = false,
            ["scopes", ..] => self.scopes = true,
            _ => {}
        }
    }
}

/// A store, and the client and the server that it has its resources from.
pub(super) struct Driven {
    pub(super) store: Fixture,
    pub(super) calls: Recorder,
    pub(super) view: View,
    pub(super) server: Server,
    variant: Variant,
    core: Core,
    done: Sender<(Token, Option<Outcome>)>,
    finished: Receiver<(Token, Option<Outcome>)>,
    /// Everything that was rejected since the start.
    pub(super) rejected: Vec<Rejection>,
}

impl Driven {
    pub(super) fn new(variant: Variant, server: Server) -> Driven {
        let (store, calls) = store(&[Cluster::type_url(), Listener::type_url()]);
        let mut core = Core::new(Node::default(), variant);
        core.connected();
        let (done, finished) = channel();
        let (view, rejected) = (View::default(), Vec::new());
        let mut driven = Driven { store, calls, view, server, variant, core, done, finished, rejected };
        driven.run();
        assert!(driven.store.is_initialized());
        driven
    }

    /// Changes what the server has, and lets all sides come to rest.
    pub(super) fn change(&mut self, change: impl FnOnce(&mut Server)) {
        change(&mut self.server);
        self.run();
    }

    /// Until nobody has anything to say any more.
    pub(super) fn run(&mut self) {
        for _ in 0..MAX_ROUNDS {
            if !self.round() {
                return;
            }
        }
        panic!("they do not come to rest");
    }

    /// The stream is lost, and there is a new one at once.
    pub(super) fn lose_stream(&mut self) {
        self.server.types.clear();
        self.core.connected();
    }

    /// Lets each side say something; whether one had something to say.
    pub(super) fn round(&mut self) -> bool {
        let mut wanted = self.store.wanted.lock().unwrap();
        while let Ok(Subscription { source, type_url, change }) = wanted.try_recv() {
            assert_eq!(source, Source::Ads);
            match change {
                Change::To(interest) => self.core.set_interest(&type_url, interest),
                Change::Names(names) => {
                    names.iter().for_each(|(name, wanted)| self.core.set_wanted(&type_url, name, *wanted));
                }
            }
        }
        drop(wanted);
        while let Ok((token, outcome)) = self.finished.try_recv() {
            match outcome {
                Some(outcome) => self.rejected.extend(self.core.finish(token, outcome)),
                None => self.core.abandon(token),
            }
        }
        let mut active = false;
        for request in self.core.outgoing() {
            active = true;
            self.server.request(request);
        }
        if let Some(response) = self.server.response(self.variant) {
            active = true;
            if let Handled::Update(token, update) = self.core.handle(response, std::time::Instant::now()) {
                let done = self.done.clone();
                let then = move |outcome| done.send((token, outcome)).expect("it is waited for");
                self.store.store.update(&Source::Ads, update, Done::new(then));
                self.store.workers();
            }
        }
        for line in self.calls.take() {
            self.view.see(&line);
        }
        active
    }
}

pub(super) fn both(test: impl Fn(Variant)) {
    [Variant::Sotw, Variant::Delta].into_iter().for_each(test);
}

#[test]
fn routes_that_one_listener_has_from_another_stay() {
    both(|variant| {
        let mut server = Server::default();
        server.set(Listener::type_url(), listener("a", "web"));
        server.set(RouteConfiguration::type_url(), routes("web", "nobody"));
        let mut it = Driven::new(variant, server);
        assert_eq!((it.view.listeners.len(), it.view.routes.len()), (1, 1));
        it.change(|server| {
            server.remove(Listener::type_url(), "a");
            server.set(Listener::type_url(), listener("b", "web"));
        });
        assert_eq!(it.view.listeners, ["b".to_owned()].into(), "{variant:?}");
        assert_eq!(it.view.routes, ["web".to_owned()].into(), "{variant:?}");
        // They are followed still.
        it.calls.take();
        it.change(|server| server.set(RouteConfiguration::type_url(), routes("web", "other")));
        let shown = it.store.snapshot().of(&RouteConfiguration::type_url())[0].active.clone().expect("it is in force");
        assert_eq!(shown.body, routes("web", "other").body);
        // And forgotten when nobody needs them.
        it.change(|server| server.remove(Listener::type_url(), "b"));
        assert!(it.view.routes.is_empty() && it.store.snapshot().of(&RouteConfiguration::type_url()).is_empty());
    });
}

#[test]
fn clusters_may_swap_their_endpoints() {
    both(|variant| {
        let mut server = Server::default();
        server.set(Cluster::type_url(), eds_cluster_of("blue", "one"));
        server.set(Cluster::type_url(), eds_cluster_of("green", "two"));
        server.set(ClusterLoadAssignment::type_url(), assignment("one", &[1]));
        server.set(ClusterLoadAssignment::type_url(), assignment("two", &[1, 2]));
        let mut it = Driven::new(variant, server);
        let has = |blue: usize, green: usize| [("blue".to_owned(), blue), ("green".to_owned(), green)].into();
        assert_eq!(it.view.clusters, has(1, 2), "{variant:?}");
        it.change(|server| {
            server.set(Cluster::type_url(), eds_cluster_of("blue", "two"));
            server.set(Cluster::type_url(), eds_cluster_of("green", "one"));
        });
        assert_eq!(it.view.clusters, has(2, 1), "{variant:?}");
        it.change(|server| server.set(ClusterLoadAssignment::type_url(), assignment("one", &[1, 2, 3])));
        assert_eq!(it.view.clusters, has(2, 3), "{variant:?}");
    });
}

#[test]
fn so_may_they_their_secrets() {
    let own =
        |name: &str, secret: &str| cluster(name, &format!("tls_certificate_sds_secret_configs: [{}]", sds(secret)));
    both(|variant| {
        let authority = Authority::new("ca");
        let mut server = Server::default();
        for (name, secret) in [("blue", "one"), ("green", "two")] {
            server.set(Cluster::type_url(), own(name, secret));
            server.set(secret_url(), certificate(secret, &authority.issue(&[], &[])));
        }
        let mut it = Driven::new(variant, server);
        let all = BTreeSet::from(["one".to_owned(), "two".to_owned()]);
        assert_eq!((it.view.clusters.len(), &it.view.secrets), (2, &all), "{variant:?}");
        it.change(|server| {
            server.set(Cluster::type_url(), own("blue", "two"));
            server.set(Cluster::type_url(), own("green", "one"));
        });
        assert_eq!(it.view.secrets, all, "{variant:?}");
        let state = it.store.lock();
        assert_eq!(state.clusters.warming, 0, "{variant:?}");
        assert!(state.clusters.by_name.values().all(|entry| entry.warming.is_none()), "{variant:?}");
    });
}

#[test]
fn scopes_that_one_listener_has_from_another_stay() {
    both(|variant| {
        let mut server = Server::default();
        server.set(Listener::type_url(), scoped_listener("a"));
        server.set(ScopedRouteConfiguration::type_url(), scope("s", "web", "one"));
        server.set(RouteConfiguration::type_url(), routes("web", "nobody"));
        let mut it = Driven::new(variant, server);
        it.change(|server| {
            server.remove(Listener::type_url(), "a");
            server.set(Listener::type_url(), scoped_listener("b"));
        });
        assert_eq!(it.view.listeners, ["b".to_owned()].into(), "{variant:?}");
        assert_eq!((it.view.scopes, it.view.routes.len()), (true, 1), "{variant:?}");
        it.change(|server| server.remove(Listener::type_url(), "b"));
        assert_eq!((it.view.scopes, it.view.routes.len()), (false, 0), "{variant:?}");
    });
}

#[test]
fn filters_that_one_listener_has_from_another_stay() {
    both(|variant| {
        let mut server = Server::default();
        server.set(Listener::type_url(), listener_of("a", "ext.kept", extensions::ROUTER, ""));
        server.set(TypedExtensionConfig::type_url(), router("ext.kept", true));
        let mut it = Driven::new(variant, server);
        assert_eq!(std::mem::take(&mut it.view.filters).len(), 1);
        it.change(|server| {
            server.remove(Listener::type_url(), "a");
            server.set(Listener::type_url(), listener_of("b", "ext.kept", extensions::ROUTER, ""));
        });
        assert_eq!(it.view.listeners, ["b".to_owned()].into(), "{variant:?}");
        assert_eq!(it.view.filters, ["ext.kept".to_owned()].into(), "{variant:?}");
    });
}

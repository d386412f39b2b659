//! Listeners: bound, fed to the kernel, given to the workers, drained.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    os::fd::AsFd,
    sync::{Arc, atomic::Ordering},
};

use arc_swap::ArcSwap;

use super::{Command, DataPlane, lock};
use crate::{
    config::model::{ListenAddress, Listener, RouteSource},
    listener::{ActiveListener, BoundAddress, Intercepted, Prints, SharedListener, bind},
    stats,
};

/// A listener, for people.
#[derive(Debug, Clone)]
pub struct ListenerStatus {
    /// Its name.
    pub name: Arc<str>,
    /// What it is bound to.
    pub addresses: Vec<SocketAddr>,
}

/// A listener that the workers serve.
pub(super) struct Running {
    pub(super) shared: Arc<SharedListener>,
    addresses: Vec<OpenAddress>,
}

/// An address that the workers accept connections on.
#[derive(Clone)]
struct OpenAddress {
    /// As configured.
    wanted: ListenAddress,
    /// As bound.
    actual: SocketAddr,
    /// What the workers know its sockets by.
    id: u64,
}

/// A listener that is ready to be started. Dropped, it gives its addresses back.
#[derive(Debug)]
pub struct PreparedListener {
    active: Arc<ActiveListener>,
    /// The addresses that the version before does not have.
    bound: Vec<BoundAddress>,
}

impl PreparedListener {
    /// Its configuration.
    pub fn config(&self) -> &Arc<Listener> {
        &self.active.config
    }

    /// An address that another listener wants as well; one that leaves the port to the kernel is nobody's.
    pub fn shared_address(&self, other: &Listener) -> Option<SocketAddr> {
        let mut mine = self.active.config.addresses.iter().filter(|wanted| wanted.address.port() != 0);
        mine.find(|wanted| other.addresses.contains(wanted)).map(|wanted| wanted.address)
    }
}

impl DataPlane {
    /// Adds a listener, or replaces the one of the same name: [`prepare_listener`](Self::prepare_listener) and
    /// [`start_listener`](Self::start_listener) in one.
    ///
    /// # Errors
    /// One line that says which address could not be bound, or which log could not be opened, and why. The version before,
    /// if there is one, serves on then.
    pub async fn upsert_listener(&self, config: Arc<Listener>) -> Result<(), String> {
        let prepared = self.prepare_listener(config, None)?;
        self.start_listener(prepared).await
    }

    /// Makes everything ready that a listener needs of this machine: its addresses are bound, and refuse connections.
    /// `prints`: of its message, for what need not be made anew.
    ///
    /// # Errors
    /// One line that says which address could not be bound, or which log could not be opened, and why.
    pub fn prepare_listener(&self, config: Arc<Listener>, prints: Option<Prints>) -> Result<PreparedListener, String> {
        if *self.0.draining.borrow() {
            return Err("the daemon is draining: no listener is added any more".to_owned());
        }
        let managers = config.connection_managers().flat_map(|manager| &manager.http_filters);
        let by_filters = managers.filter_map(|filter| Some(("http_filters", filter.source.original_src()?)));
        for (place, source) in config.original_src.map(|it| ("listener_filters", it)).into_iter().chain(by_filters) {
            if self.with_interception(|interception| interception.mark() == source.mark) == Some(true) {
                // The kernel would deliver the daemon's own connections to the daemon.
                return Err(format!(
                    "{place}: original_src.mark {:#x} is the mark of culvert.bootstrap.interception: connections with it \
                     would come back to this daemon; leave it out, or choose another",
                    source.mark
                ));
            }
        }
        let before = lock(&self.0.listeners).get(&config.name).map(|running| Arc::clone(&running.shared));
        let before = before.map(|before| before.active.load_full());
        let routes = |source: &RouteSource| self.0.routes.of(source);
        let active = ActiveListener::new(Arc::clone(&config), prints, before.as_deref(), routes, self.secrets());
        let active = Arc::new(active.map_err(|error| error.to_string())?);
        let intercepted = lock(&self.0.interception)
            .as_ref()
            .filter(|interception| interception.feeds(&config.name))
            .map(|interception| Intercepted { takes_over: interception.has_predecessor() });
        let has = |wanted: &ListenAddress| before.as_ref().is_some_and(|old| old.config.addresses.contains(wanted));
        let same = before.as_ref().is_some_and(|old| same_options(&old.config, &config));
        let new = config.addresses.iter().filter(|wanted| !(same && has(wanted)));
        let bound = new.map(|wanted| {
            bind(&config, wanted, self.0.worker_count, intercepted, has(wanted), |address| {
                self.holder(&config.name, address)
            })
        });
        Ok(PreparedListener { active, bound: bound.collect::<Result<_, _>>()? })
    }

    /// Which other listener has an address, or one that shuts it out.
    fn holder(&self, name: &str, address: SocketAddr) -> Option<Arc<str>> {
        let overlaps = |other: SocketAddr| {
            let anywhere = other.ip().is_unspecified() || address.ip().is_unspecified();
            other.port() == address.port() && (other.ip() == address.ip() || anywhere)
        };
        let listeners = lock(&self.0.listeners);
        let mut others = listeners.iter().filter(|(other, _)| ***other != *name);
        let holder = others.find(|(_, running)| running.addresses.iter().any(|open| overlaps(open.actual)));
        holder.map(|(name, _)| Arc::clone(name))
    }

    /// Has the workers serve a listener. The addresses that the version before has as well stay open all the time; its
    /// other addresses are closed, and its connections are told to finish, but for those of filter chains that stay.
    ///
    /// # Errors
    /// One line that says which address cannot be listened on, and why. The version before, if there is one, serves on then.
    pub async fn start_listener(&self, prepared: PreparedListener) -> Result<(), String> {
        let PreparedListener { active, bound } = prepared;
        if *self.0.draining.borrow() {
            return Err("the daemon is draining: no listener is added any more".to_owned());
        }
        let config = Arc::clone(&active.config);
        let name = Arc::clone(&config.name);
        let mut opened = Vec::new();
        for address in bound {
            let id = self.0.next_socket.fetch_add(1, Ordering::Relaxed);
            let open = OpenAddress { wanted: address.wanted.clone(), actual: address.address, id };
            opened.push((open, address.listen()?));
        }
        if let Some(interception) = lock(&self.0.interception).as_ref().filter(|it| it.feeds(&name)) {
            for (_, sockets) in &opened {
                for (worker, socket) in sockets.iter().enumerate() {
                    interception.feed(&name, worker, socket.as_fd()).map_err(|error| error.to_string())?;
                }
            }
        }
        let (shared, gone, old) = {
            let mut listeners = lock(&self.0.listeners);
            let running = listeners.entry(Arc::clone(&name)).or_insert_with(|| Running {
                shared: Arc::new(SharedListener { name: Arc::clone(&name), active: ArcSwap::new(Arc::clone(&active)) }),
                addresses: Vec::new(),
            });
            let old = running.shared.active.swap(Arc::clone(&active));
            let old = (!Arc::ptr_eq(&old, &active)).then_some(old);
            let stays = |wanted: &ListenAddress| {
                config.addresses.contains(wanted) && !opened.iter().any(|(open, _)| open.wanted == *wanted)
            };
            let gone: Vec<_> =
                running.addresses.extract_if(.., |open| !stays(&open.wanted)).map(|open| open.id).collect();
            running.addresses.extend(opened.iter().map(|(open, _)| open.clone()));
            running.addresses.sort_by_key(|open| config.addresses.iter().position(|other| *other == open.wanted));
            (Arc::clone(&running.shared), gone, old)
        };
        let mut per_worker: Vec<Vec<_>> = (0..self.0.worker_count).map(|_| Vec::new()).collect();
        for (open, sockets) in opened {
            for (mine, socket) in per_worker.iter_mut().zip(sockets) {
                mine.push((open.id, socket));
            }
        }
        if per_worker.iter().any(|sockets| !sockets.is_empty()) {
            let mut sockets = per_worker.into_iter();
            self.tell_workers(|done| Command::Listen {
                listener: Arc::clone(&shared),
                sockets: sockets.next().unwrap_or_default(),
                done,
            })
            .await;
        }
        if !gone.is_empty() {
            self.tell_workers(|done| Command::Close { name: Arc::clone(&name), only: Some(gone.clone()), done }).await;
        }
        if let Some(old) = old {
            old.start_drain(Some(&active));
        }
        Ok(())
    }

    /// Closes a listener's sockets and tells its connections to finish.
    pub async fn remove_listener(&self, name: &str) {
        let Some(running) = lock(&self.0.listeners).remove(name) else { return };
        self.close(running).await;
    }

    async fn close(&self, running: Running) {
        self.tell_workers(|done| Command::Close { name: Arc::clone(&running.shared.name), only: None, done }).await;
        running.shared.active.load().start_drain(None);
    }

    /// Closes all listeners for good: none is added from now on, whatever the control plane still says.
    pub async fn shut(&self) {
        self.0.draining.send_replace(true);
        self.drain_listeners(false).await;
    }

    /// Closes all listeners, or those for inbound traffic, and tells their connections to finish.
    pub async fn drain_listeners(&self, inbound_only: bool) {
        let drained: BTreeMap<_, _> = {
            let mut listeners = lock(&self.0.listeners);
            let (drained, kept) = std::mem::take(&mut *listeners)
                .into_iter()
                .partition(|(_, running)| !inbound_only || running.shared.active.load().config.inbound);
            *listeners = kept;
            drained
        };
        for running in drained.into_values() {
            self.close(running).await;
            stats::counter("listener_manager.listener_stopped").inc();
        }
    }

    /// All listeners now.
    pub fn listeners(&self) -> Vec<ListenerStatus> {
        let listeners = lock(&self.0.listeners);
        let status = |(name, running): (&Arc<str>, &Running)| ListenerStatus {
            name: Arc::clone(name),
            addresses: running.addresses.iter().map(|open| open.actual).collect(),
        };
        listeners.iter().map(status).collect()
    }
}

/// Whether sockets of the one serve for the other.
fn same_options(old: &Listener, new: &Listener) -> bool {
    (old.transparent, old.freebind, old.backlog) == (new.transparent, new.freebind, new.backlog)
}

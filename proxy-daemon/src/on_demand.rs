//! Requests that wait for configuration that is asked for because of them: from the workers to the store and back.
//!
//! A paused request is a [`Wait`]. It holds one of a bounded number of places until the store has seen the end of it, so that
//! neither the queue nor what the store remembers grows with what clients ask for; dropped, for example because its client
//! has gone, it takes its question back. A name that no control plane would have, for its length, is not asked for.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use culvert_xds_client::source::Source;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

/// How many requests may be paused at a time, in the whole process. What comes then goes on at once, without.
pub const MAX_REQUESTS: usize = 10_000;
/// The longest name, in bytes, that is asked for because of a request: clients choose them. A host name has 253 at most.
pub const MAX_NAME: usize = 512;

/// What a request waits for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Wanted {
    /// A cluster of this name.
    Cluster {
        /// Where it is had from.
        source: Arc<Source>,
        /// Its name.
        name: Arc<str>,
    },
    /// A virtual host.
    VirtualHost {
        /// Where it is had from.
        source: Arc<Source>,
        /// `<route configuration>/<host>`
        name: Arc<str>,
    },
    /// The route configuration of a scope.
    Routes {
        /// Where the scope comes from.
        scopes: Arc<Source>,
        /// Where the routes are had from.
        source: Arc<Source>,
        /// Their name.
        name: Arc<str>,
    },
}

impl Wanted {
    /// Where it is had from, and by what name.
    pub fn parts(&self) -> (&Arc<Source>, &Arc<str>) {
        match self {
            Wanted::Cluster { source, name }
            | Wanted::VirtualHost { source, name }
            | Wanted::Routes { source, name, .. } => (source, name),
        }
    }

    /// Whether a client chose a name that is too long to be asked for.
    fn is_too_long(&self) -> bool {
        match self {
            Wanted::Cluster { name, .. } | Wanted::VirtualHost { name, .. } => name.len() > MAX_NAME,
            // The control plane's own.
            Wanted::Routes { .. } => false,
        }
    }
}

/// Names a request that waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WaitId(u64);

/// A request that waits, as the store knows it.
#[derive(Debug)]
pub struct Waiter {
    /// Which.
    pub id: WaitId,
    told: oneshot::Sender<()>,
    _place: OwnedSemaphorePermit,
}

impl Waiter {
    /// What it waits for is there, or will not come: it goes on.
    pub fn go_on(self) {
        // It may have gone.
        let _ = self.told.send(());
    }
}

/// What the workers say.
#[derive(Debug)]
pub enum Message {
    /// A request needs this.
    Asked(Wanted, Waiter),
    /// It does not any more.
    TakenBack(WaitId),
}

/// The workers' end. Cheap to clone.
#[derive(Debug, Clone)]
pub struct OnDemand {
    // Each place has two messages in it at most.
    messages: mpsc::UnboundedSender<Message>,
    places: Arc<Semaphore>,
    next: Arc<AtomicU64>,
}

/// The store's end.
#[derive(Debug)]
pub struct Messages(mpsc::UnboundedReceiver<Message>);

/// A paused request. Ends when it may go on.
#[derive(Debug)]
pub struct Wait {
    id: WaitId,
    told: oneshot::Receiver<()>,
    messages: mpsc::UnboundedSender<Message>,
    over: bool,
}

/// Both ends.
pub fn channel() -> (OnDemand, Messages) {
    let (messages, receiver) = mpsc::unbounded_channel();
    let places = Arc::new(Semaphore::new(MAX_REQUESTS));
    (OnDemand { messages, places, next: Arc::default() }, Messages(receiver))
}

impl OnDemand {
    /// Asks for something; `None` where too many requests wait already, the name is longer than [`MAX_NAME`], or nobody is left
    /// who could answer.
    pub fn ask(&self, wanted: Wanted) -> Option<Wait> {
        if wanted.is_too_long() {
            return None;
        }
        let place = Arc::clone(&self.places).try_acquire_owned().ok()?;
        let id = WaitId(self.next.fetch_add(1, Ordering::Relaxed));
        let (sender, told) = oneshot::channel();
        let waiter = Waiter { id, told: sender, _place: place };
        self.messages.send(Message::Asked(wanted, waiter)).ok()?;
        Some(Wait { id, told, messages: self.messages.clone(), over: false })
    }
}

impl Wait {
    /// Ends when the request may go on.
    pub async fn over(&mut self) {
        // An error: the store has ended, and with it the process.
        let _ = (&mut self.told).await;
        self.over = true;
    }
}

impl Drop for Wait {
    fn drop(&mut self) {
        if !self.over {
            let _ = self.messages.send(Message::TakenBack(self.id));
        }
    }
}

impl Messages {
    /// What has been said since the last call, at least one message; `None` when the workers have ended.
    pub async fn next(&mut self) -> Option<Vec<Message>> {
        let mut all = Vec::new();
        if self.0.recv_many(&mut all, 1024).await == 0 {
            return None;
        }
        Some(all)
    }

    /// What has been said and not been heard.
    #[cfg(test)]
    pub(crate) fn now(&mut self) -> Vec<Message> {
        std::iter::from_fn(|| self.0.try_recv().ok()).collect()
    }
}

/// Who waits for what.
#[derive(Debug, Default)]
pub struct Waiting {
    by_wanted: HashMap<Wanted, Vec<Waiter>>,
    wanted_of: HashMap<WaitId, Wanted>,
}

impl Waiting {
    /// Adds a request.
    pub fn add(&mut self, wanted: Wanted, waiter: Waiter) {
        self.wanted_of.insert(waiter.id, wanted.clone());
        self.by_wanted.entry(wanted).or_default().push(waiter);
    }

    /// A request has gone: what it waited for, if nobody else does.
    pub fn take_back(&mut self, id: WaitId) -> Option<Wanted> {
        let wanted = self.wanted_of.remove(&id)?;
        let waiters = self.by_wanted.get_mut(&wanted)?;
        waiters.retain(|waiter| waiter.id != id);
        if !waiters.is_empty() {
            return None;
        }
        self.by_wanted.remove(&wanted);
        Some(wanted)
    }

    /// All who wait for this wait no longer: them.
    pub fn end(&mut self, wanted: &Wanted) -> Vec<Waiter> {
        let waiters = self.by_wanted.remove(wanted).unwrap_or_default();
        for waiter in &waiters {
            self.wanted_of.remove(&waiter.id);
        }
        waiters
    }

    /// The names that are waited for from there.
    pub fn names(&self, from: &Source) -> Vec<Arc<str>> {
        let all = self.by_wanted.keys().map(Wanted::parts);
        all.filter(|(source, _)| ***source == *from).map(|(_, name)| Arc::clone(name)).collect()
    }

    /// Whether nobody waits for anything.
    pub fn is_empty(&self) -> bool {
        self.by_wanted.is_empty()
    }

    /// All that is waited for.
    pub fn wanted(&self) -> impl Iterator<Item = &Wanted> {
        self.by_wanted.keys()
    }

    /// Whether anybody waits for this.
    pub fn contains(&self, wanted: &Wanted) -> bool {
        self.by_wanted.contains_key(wanted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(name: &str) -> Wanted {
        Wanted::Cluster { source: Arc::default(), name: name.into() }
    }

    #[test]
    fn names_that_are_too_long_are_not_asked_for() {
        let (asking, mut messages) = channel();
        let longest = "n".repeat(MAX_NAME);
        assert!(asking.ask(wanted(&longest)).is_some());
        assert!(asking.ask(wanted(&format!("{longest}n"))).is_none());
        let host = Wanted::VirtualHost { source: Arc::default(), name: format!("{longest}/").into() };
        assert!(asking.ask(host).is_none());
        let routes =
            Wanted::Routes { scopes: Arc::default(), source: Arc::default(), name: format!("{longest}/").into() };
        assert!(asking.ask(routes).is_some(), "no client chose it");
        assert_eq!(messages.now().len(), 4, "two questions, both taken back");
        assert_eq!(asking.places.available_permits(), MAX_REQUESTS);
    }

    #[tokio::test]
    async fn a_request_that_goes_takes_its_question_back_and_frees_its_place() {
        let (asking, mut messages) = channel();
        let mut all: Vec<Wait> = (0..MAX_REQUESTS).filter_map(|_| asking.ask(wanted("a"))).collect();
        assert_eq!(all.len(), MAX_REQUESTS);
        assert!(asking.ask(wanted("a")).is_none(), "there are no places left");
        let mut first = all.remove(0);
        all.clear();
        assert!(asking.ask(wanted("a")).is_none(), "the store has not seen it yet");
        drop(asking);

        let mut waiting = Waiting::default();
        let mut gone = Vec::new();
        let mut seen = 0;
        while seen < 2 * MAX_REQUESTS - 1 {
            for message in messages.next().await.expect("there are more") {
                seen += 1;
                match message {
                    Message::Asked(wanted, waiter) => waiting.add(wanted, waiter),
                    Message::TakenBack(id) => gone.extend(waiting.take_back(id)),
                }
            }
        }
        assert!(gone.is_empty() && waiting.contains(&wanted("a")), "one still waits");
        waiting.end(&wanted("a")).into_iter().for_each(Waiter::go_on);
        first.over().await;
        drop(first);
        assert!(waiting.wanted_of.is_empty() && waiting.by_wanted.is_empty());
        assert!(messages.next().await.is_none());
    }
}

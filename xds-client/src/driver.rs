//! What all transports share: the state machine, and its way to the sink and back.

use std::{collections::HashMap, sync::Arc, time::Instant};

use envoy_types::pb::envoy::config::core::v3::Node;
use tokio::sync::mpsc;

use crate::{
    ads::{Core, Done, Handled, Interest, Outcome, Response, Sink, Token, Update, Variant, nack_detail},
    source::Source,
    stats::ClientStats,
};

/// The state machine of one client, with its sink and its queue.
pub(crate) struct Driver<S> {
    pub(crate) source: Source,
    pub(crate) core: Core,
    pub(crate) sink: Arc<S>,
    pub(crate) stats: Arc<ClientStats>,
    /// State of the world: the newest response of each type that was dealt with. What became of older ones is history.
    newest: HashMap<String, Token>,
    /// One queue for both, so that what is wanted because of an update is asked for before the update is answered.
    events: mpsc::UnboundedReceiver<Event>,
    sender: mpsc::UnboundedSender<Event>,
}

/// What a client is told from outside.
pub(crate) enum Event {
    /// What is wanted of a type.
    Want(String, Interest),
    /// Which names of a type are wanted more, or less.
    WantNames(String, Vec<(String, bool)>),
    /// An update of which the sink has said what became, or that it will never be applied. `version`: of the response that
    /// it came of, if it did.
    Applied { token: Token, type_url: String, version: Option<String>, outcome: Option<Outcome> },
    /// Something has outlived its time to live.
    Expired,
}

/// What came of an [`Event`].
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Came {
    /// Something else is wanted than before.
    Wanted,
    /// An update is done with; whether all of it is in force.
    Finished(Token, bool),
    /// Resources are removed whose time to live is over.
    Expired,
}

/// Changes what a client wants.
#[derive(Clone)]
pub struct Interests(mpsc::UnboundedSender<Event>);

impl Interests {
    /// Sets what is wanted of a type.
    pub fn set(&self, type_url: impl Into<String>, interest: Interest) {
        // A client that is gone wants nothing.
        let _ = self.0.send(Event::Want(type_url.into(), interest));
    }

    /// Wants some names of a type more, or less.
    pub fn set_names(&self, type_url: impl Into<String>, names: Vec<(String, bool)>) {
        // As above.
        let _ = self.0.send(Event::WantNames(type_url.into(), names));
    }
}

impl<S: Sink> Driver<S> {
    pub(crate) fn new(source: Source, node: Node, variant: Variant, sink: Arc<S>) -> Self {
        let (sender, events) = mpsc::unbounded_channel();
        let stats = Arc::new(ClientStats::default());
        let (core, newest) = (Core::new(node, variant), HashMap::new());
        Driver { source, core, sink, stats, newest, events, sender }
    }

    pub(crate) fn interests(&self) -> Interests {
        Interests(self.sender.clone())
    }

    /// The next event. Cancelling this loses nothing.
    pub(crate) async fn next(&mut self) -> Event {
        let expiry = self.core.next_expiry();
        let expired = async {
            match expiry {
                Some(at) => tokio::time::sleep_until(at.into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            // This client holds a sender itself: the queue does not end.
            Some(event) = self.events.recv() => event,
            () = expired => Event::Expired,
        }
    }

    /// Hands a response to the sink; by what name [`Came::Finished`] tells of it, if it was one to apply.
    pub(crate) fn take(&mut self, response: Response) -> Option<Token> {
        let (type_url, version, control_plane) = match &response {
            Response::Sotw(response) => (&response.type_url, &response.version_info, &response.control_plane),
            Response::Delta(response) => (&response.type_url, &response.system_version_info, &response.control_plane),
        };
        let (type_url, version) = (type_url.clone(), version.clone());
        if let Some(control_plane) = control_plane {
            self.stats.set_identifier(&control_plane.identifier);
        }
        let (token, update) = match self.core.handle(response, Instant::now()) {
            Handled::Update(token, update) => (token, update),
            Handled::Ignored(why) => {
                tracing::warn!(%type_url, "response of the control plane ignored: {why}");
                return None;
            }
        };
        self.hand_out(token.clone(), Some(version), update);
        Some(token)
    }

    fn hand_out(&self, token: Token, version: Option<String>, update: Update) {
        let Update { type_url, added, unchanged, removed, .. } = &update;
        let (added, unchanged, removed) = (added.len(), unchanged.len(), removed.len());
        tracing::debug!(%type_url, added, unchanged, removed, "update");
        let (sender, type_url) = (self.sender.clone(), type_url.clone());
        // A client that is gone has nobody left to answer.
        let done = Done::new(move |outcome| drop(sender.send(Event::Applied { token, type_url, version, outcome })));
        self.sink.update(&self.source, update, done);
    }

    pub(crate) fn event(&mut self, event: Event) -> Came {
        match event {
            Event::Want(type_url, interest) => {
                if interest != Interest::None {
                    self.stats.of(&type_url);
                } else if self.core.interest(&type_url) != &interest {
                    self.stats.of(&type_url).set_nack(None);
                }
                self.core.set_interest(&type_url, interest);
                Came::Wanted
            }
            Event::WantNames(type_url, names) => {
                names.iter().for_each(|(name, wanted)| self.core.set_wanted(&type_url, name, *wanted));
                Came::Wanted
            }
            Event::Expired => {
                for (token, update) in self.core.expire(Instant::now()) {
                    tracing::warn!(type_url = %update.type_url, names = ?update.removed, "time to live has run out");
                    self.hand_out(token, None, update);
                }
                Came::Expired
            }
            Event::Applied { token, outcome: None, .. } => {
                self.core.abandon(token.clone());
                Came::Finished(token, false)
            }
            Event::Applied { token, type_url, version, outcome: Some(outcome) } => {
                let at_fault = self.core.is_at_fault(&token);
                let rejected = self.core.finish(token.clone(), outcome);
                let stats = self.stats.of(&type_url);
                if let Some(version) = &version
                    && self.is_newest(&type_url, &token)
                {
                    match nack_detail(&rejected) {
                        Some(nack) if at_fault => stats.set_nack(Some((version.clone(), nack.message))),
                        // The resources that are shown have it.
                        Some(_) => {}
                        None => stats.set_nack(None),
                    }
                }
                match version {
                    Some(version) if rejected.is_empty() => stats.accepted(&version),
                    Some(_) => stats.rejected(),
                    None => {}
                }
                for rejection in &rejected {
                    tracing::warn!(%type_url, name = %rejection.name, "resource rejected: {}", rejection.message);
                }
                Came::Finished(token, rejected.is_empty())
            }
        }
    }

    /// Whether what became of this response is what the server is to be told last; notes it.
    fn is_newest(&mut self, type_url: &str, token: &Token) -> bool {
        if self.core.variant() == Variant::Delta {
            // Each response stands for itself.
            return true;
        }
        match self.newest.get_mut(type_url) {
            Some(newest) if *newest > *token => false,
            Some(newest) => {
                newest.clone_from(token);
                true
            }
            None => {
                self.newest.insert(type_url.to_owned(), token.clone());
                true
            }
        }
    }
}

//! Documents: what the transports without a stream bring. Each is all there is of a type, and mostly what was there before.

use std::hash::{DefaultHasher, Hash, Hasher};

use envoy_types::pb::envoy::service::discovery::v3::DiscoveryResponse;
use prost::Message as _;

use crate::{
    ads::{Response, Token},
    aside::aside,
    json::{self, ConfigError, Format, UnknownFields},
    stats::ClientStats,
};

/// What a resource with a time to live is wrapped in.
const WRAPPER: &str = "envoy.service.discovery.v3.Resource";
/// Bytes that take too long to read for other tasks of the thread to wait.
const LONG: usize = 64 << 10;

/// Why a document is not used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unusable {
    #[error("{0}")]
    Parse(ConfigError),
    /// It would be used if fields that are not known were passed over.
    #[error("{0}")]
    UnknownField(ConfigError),
    #[error("it is not a DiscoveryResponse: {0}")]
    Decode(#[from] prost::DecodeError),
}

/// How a document is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Encoding {
    /// YAML, of which JSON is a part.
    Text,
    /// JSON.
    Json,
    /// Protobuf's own.
    Binary,
}

/// Reads a document.
pub(crate) fn read(bytes: &[u8], encoding: Encoding, unknown: UnknownFields) -> Result<DiscoveryResponse, Unusable> {
    let format = match encoding {
        Encoding::Binary => return Ok(DiscoveryResponse::decode(bytes)?),
        Encoding::Text => Format::Yaml,
        Encoding::Json => Format::Json,
    };
    let text = json::text(bytes).map_err(Unusable::Parse)?;
    json::read(text, format, unknown).map_err(|error| {
        match json::read::<DiscoveryResponse>(text, format, UnknownFields::Ignore) {
            Ok(_) => Unusable::UnknownField(error),
            Err(_) => Unusable::Parse(error),
        }
    })
}

/// What became of a document.
enum State {
    /// It could not be used; as Envoy counts it: rejected, or failed.
    Unusable { rejected: bool },
    /// It was handed to the sink, as `update`. `accepted`: all of it; `None`: that is not known yet.
    Taken { version: String, update: Option<Token>, accepted: Option<bool> },
}

/// What is to be done with a document.
pub(crate) enum Judged {
    /// To be handed to the sink.
    New(Response),
    /// Nothing: it has been handed to the sink already. Whether all of it was accepted, as far as that is known.
    Same { accepted: bool },
    /// Nothing: it cannot be used; as Envoy counts it: rejected, or failed.
    Unusable { rejected: bool },
}

/// The documents of one type from one place.
pub(crate) struct Documents {
    type_url: String,
    /// The place, for the log.
    place: String,
    unknown: UnknownFields,
    /// The last one, by its hash.
    last: Option<(u64, State)>,
    /// Why there was none the last time.
    missing: Option<String>,
}

impl Documents {
    pub(crate) fn new(type_url: &str, place: String, unknown: UnknownFields) -> Documents {
        Documents { type_url: type_url.to_owned(), place, unknown, last: None, missing: None }
    }

    /// What they are of.
    pub(crate) fn type_url(&self) -> &str {
        &self.type_url
    }

    /// What was passed over in the last one may be wanted now.
    pub(crate) fn wanted(&mut self) {
        self.last.take_if(|(_, state)| matches!(state, State::Taken { .. }));
    }

    /// The last one was handed to the sink by this name.
    pub(crate) fn handed_out(&mut self, token: Option<Token>) {
        if let Some((_, State::Taken { update, .. })) = &mut self.last {
            *update = token;
        }
    }

    /// The sink has said of an update whether all of it is in force. It may be of an older document, or of none.
    pub(crate) fn finished(&mut self, token: &Token, all: bool) {
        if let Some((_, State::Taken { update, accepted, .. })) = &mut self.last
            && update.as_ref() == Some(token)
        {
            *accepted = Some(all);
        }
    }

    /// Reads a document, unless it is what the last one was: then it only counts.
    pub(crate) fn came(&mut self, bytes: &[u8], encoding: Encoding, stats: &ClientStats) -> Judged {
        let stats = stats.of(&self.type_url);
        self.missing = None;
        let mut hasher = DefaultHasher::new();
        bytes.hash(&mut hasher);
        let hash = hasher.finish();
        if let Some((_, state)) = self.last.as_ref().filter(|(last, _)| *last == hash) {
            match state {
                State::Unusable { rejected: true } | State::Taken { accepted: Some(false), .. } => stats.rejected(),
                State::Unusable { rejected: false } => stats.failed(),
                State::Taken { version, accepted: Some(true), .. } => stats.accepted(version),
                State::Taken { accepted: None, .. } => stats.attempted(),
            }
            return match state {
                State::Unusable { rejected } => Judged::Unusable { rejected: *rejected },
                State::Taken { accepted, .. } => {
                    // What was wrong in between is over.
                    stats.set_fault(None);
                    Judged::Same { accepted: accepted.unwrap_or(true) }
                }
            };
        }
        let unknown = self.unknown;
        let read = || read(bytes, encoding, unknown);
        match if bytes.len() >= LONG { aside(read) } else { read() } {
            Ok(response) => {
                stats.set_fault(None);
                let version = response.version_info.clone();
                // One with times to live is a heartbeat as well: those count from each answer.
                let lasting = response.resources.iter().all(|it| it.type_url.rsplit('/').next() != Some(WRAPPER));
                self.last = lasting.then_some((hash, State::Taken { version, update: None, accepted: None }));
                let response = DiscoveryResponse { type_url: self.type_url.clone(), nonce: String::new(), ..response };
                Judged::New(Response::Sotw(response))
            }
            Err(error) => {
                // As Envoy counts them: whatever is wrong with an answer, and of files, what only it does not know.
                let rejected = encoding == Encoding::Json || matches!(error, Unusable::UnknownField(_));
                if rejected {
                    stats.rejected()
                } else {
                    stats.failed()
                }
                self.last = Some((hash, State::Unusable { rejected }));
                tracing::warn!(place = %self.place, "not used, configuration in force stays: {error}");
                stats.set_fault(Some(error.to_string()));
                Judged::Unusable { rejected }
            }
        }
    }

    /// There was no document. The same reason is logged once.
    pub(crate) fn failed(&mut self, why: String, stats: &ClientStats) {
        if self.is_news(&why, stats) {
            stats.of(&self.type_url).set_fault(Some(why));
        }
    }

    /// The same, where it is told with the connection that there was none: nothing is wrong with any document.
    pub(crate) fn not_fetched(&mut self, why: &str, stats: &ClientStats) {
        self.is_news(why, stats);
    }

    fn is_news(&mut self, why: &str, stats: &ClientStats) -> bool {
        stats.of(&self.type_url).failed();
        if self.missing.as_deref() == Some(why) {
            return false;
        }
        tracing::warn!(place = %self.place, "configuration in force stays: {why}");
        // When it is back, what is wrong with it is news.
        self.last.take_if(|(_, state)| matches!(state, State::Unusable { .. }));
        self.missing = Some(why.to_owned());
        true
    }

    /// Nothing has changed since the version in force: what was wrong with the connection, or with a document in between,
    /// is over.
    pub(crate) fn unchanged(&mut self, stats: &ClientStats) {
        self.missing = None;
        self.last.take_if(|(_, state)| matches!(state, State::Unusable { .. }));
        let stats = stats.of(&self.type_url);
        stats.attempted();
        stats.set_fault(None);
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::atomic::Ordering::Relaxed, time::Instant};

    use envoy_types::pb::envoy::config::core::v3::Node;

    use super::*;
    use crate::{
        ads::{Core, Handled, Interest, Variant, type_url::CLUSTER},
        test_sink::clusters,
    };

    /// The core names an update.
    fn token(core: &mut Core, documents: &mut Documents, response: Response) -> Token {
        let Handled::Update(token, _) = core.handle(response, Instant::now()) else { panic!("it is wanted") };
        documents.handed_out(Some(token.clone()));
        token
    }

    #[test]
    fn what_became_of_an_older_document_does_not_count_for_the_last() {
        let (mut documents, stats) = documents();
        let counts = stats.of(CLUSTER);
        let mut core = Core::new(Node::default(), Variant::Sotw);
        core.set_interest(CLUSTER, Interest::Wildcard);
        core.connected();
        assert_eq!(core.outgoing().len(), 1);
        let came = |documents: &mut Documents, text: &str| documents.came(text.as_bytes(), Encoding::Json, &stats);
        let (first, second) = (clusters("1", &["a"]), clusters("2", &["bad"]));
        let Judged::New(response) = came(&mut documents, &first) else { panic!("it is new") };
        let first = token(&mut core, &mut documents, response);
        let Judged::New(response) = came(&mut documents, &second) else { panic!("it is new") };
        let newer = token(&mut core, &mut documents, response);
        documents.finished(&newer, false);
        documents.finished(&first, true);
        assert!(matches!(came(&mut documents, &second), Judged::Same { accepted: false }));
        assert_eq!((counts.update_rejected.load(Relaxed), counts.update_success.load(Relaxed)), (1, 0));
    }

    fn documents() -> (Documents, ClientStats) {
        (Documents::new(CLUSTER, "here".to_owned(), UnknownFields::Reject), ClientStats::default())
    }

    #[test]
    fn what_was_wrong_in_between_is_over_with_the_same_document_or_with_none() {
        let (mut documents, stats) = documents();
        let good = clusters("1", &["a"]);
        let counts = stats.of(CLUSTER);
        assert!(matches!(documents.came(good.as_bytes(), Encoding::Json, &stats), Judged::New(_)));
        documents.failed("status 503".to_owned(), &stats);
        assert_eq!(counts.fault().unwrap().details, "status 503");
        assert!(matches!(documents.came(good.as_bytes(), Encoding::Json, &stats), Judged::Same { .. }));
        assert_eq!(counts.fault(), None);

        documents.failed("status 503".to_owned(), &stats);
        documents.unchanged(&stats);
        assert_eq!(counts.fault(), None);
        for _ in 0..2 {
            assert!(matches!(documents.came(b"{", Encoding::Json, &stats), Judged::Unusable { .. }));
            assert!(counts.fault().is_some());
        }
        documents.unchanged(&stats);
        assert_eq!(counts.fault(), None, "the server says that nothing has changed since the version in force");
        assert!(matches!(documents.came(b"{", Encoding::Json, &stats), Judged::Unusable { .. }));
        assert!(counts.fault().is_some(), "it is news again");
    }

    #[test]
    fn what_a_server_answers_is_json_and_what_is_wrong_with_it_counts_as_rejected() {
        for (encoding, counted) in [(Encoding::Json, (1, 0)), (Encoding::Text, (0, 1))] {
            let (mut documents, stats) = documents();
            assert!(matches!(documents.came(b"{nope", encoding, &stats), Judged::Unusable { .. }));
            let counts = stats.of(CLUSTER);
            assert_eq!((counts.update_rejected.load(Relaxed), counts.update_failure.load(Relaxed)), counted);
            let told = counts.fault().unwrap().details;
            let is_json = encoding == Encoding::Json;
            assert_eq!(told.to_lowercase().contains("json"), is_json, "{told}");
            assert_eq!(told.to_lowercase().contains("yaml"), !is_json, "{told}");
        }
    }
}

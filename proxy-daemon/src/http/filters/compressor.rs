//! `envoy.filters.http.compressor`: compresses responses, as far as their clients take that, and requests.

use std::{
    borrow::Cow,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http::{
    HeaderMap, HeaderValue, StatusCode,
    header::{
        ACCEPT_ENCODING, CACHE_CONTROL, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, ETAG, TRANSFER_ENCODING,
        UPGRADE, VARY,
    },
};
use http_body::{Body as _, Frame};

mod config;

pub(super) use config::{parse, parse_per_route};

use super::{
    Flow, HttpFilter, HttpFilterFactory, PerRoute,
    compression::{Compress, Compressors, Library, has_token},
    shared::{Kept, Shared},
};
use crate::{
    config::model::StringMatcher,
    http::{
        body::{Body, BodyError, WrappedBody},
        headers::joined,
        stream::{RequestHead, ResponseHead, StreamCx},
    },
    layered_runtime::RuntimeFlag,
    stats::{Counter, Lease, Scope},
};

/// Codings that a `transfer-encoding` may say the message has already.
const TRANSFER_CODINGS: [&str; 5] = ["gzip", "br", "deflate", "compress", "zstd"];

/// What is configured. Streams hold on to it.
#[derive(Debug)]
struct Configured {
    library: Library<dyn Compressors>,
    /// `None`: requests pass as they are.
    request: Option<Direction>,
    request_stats: Stats,
    response: Direction,
    response_stats: Stats,
    accept: AcceptStats,
    disable_on_etag: bool,
    weaken_etag: bool,
    remove_accept_encoding: bool,
    uncompressible: Vec<u32>,
    choose_first: bool,
    _lease: Lease,
}

#[derive(Debug)]
struct Direction {
    enabled: RuntimeFlag,
    min_length: u64,
    types: Types,
}

#[derive(Debug)]
enum Types {
    Named(Vec<String>),
    Matching(Vec<StringMatcher>),
}

#[derive(Debug, Clone, Copy)]
struct Stats {
    compressed: Counter,
    not_compressed: Counter,
    total_uncompressed_bytes: Counter,
    total_compressed_bytes: Counter,
    content_length_too_small: Counter,
}

impl Stats {
    fn new(scope: &Scope) -> Stats {
        Stats {
            compressed: scope.counter("compressed"),
            not_compressed: scope.counter("not_compressed"),
            total_uncompressed_bytes: scope.counter("total_uncompressed_bytes"),
            total_compressed_bytes: scope.counter("total_compressed_bytes"),
            content_length_too_small: scope.counter("content_length_too_small"),
        }
    }
}

/// What became of `accept-encoding`.
#[derive(Debug)]
struct AcceptStats {
    no_accept_header: Counter,
    header_identity: Counter,
    header_compressor_used: Counter,
    header_compressor_overshadowed: Counter,
    header_wildcard: Counter,
    header_not_valid: Counter,
    not_compressed_etag: Counter,
}

/// What a route says: about the whole filter, and about `remove_accept_encoding_header`.
#[derive(Debug, Default)]
struct Told {
    enabled: Option<bool>,
    remove_accept_encoding: Option<bool>,
}

/// The compressors of a stream, in their order, and which encoding has been chosen, once it has.
#[derive(Debug, Clone, Default)]
struct InChain {
    compressors: Vec<Kept<Configured>>,
    /// How many of them the request has come to. Those behind come before them when the response does.
    asked: usize,
    decision: Option<Decision>,
}

/// Which encoding a response gets, and by which word of `accept-encoding`.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Decision {
    NotValid,
    Identity,
    Wildcard(HeaderValue),
    Named(HeaderValue),
}

#[derive(Debug)]
struct CompressorFactory(Shared<Configured>);

/// One stream's filter.
#[derive(Debug)]
struct CompressorFilter {
    configured: Kept<Configured>,
    enabled: Option<bool>,
    asked: bool,
    accept_encoding: Option<String>,
}

impl Direction {
    /// Whether a message says that it is long enough, or says nothing.
    fn is_long_enough(&self, headers: &HeaderMap, body: &Body, stats: &Stats) -> bool {
        let length: Option<u64> = match (headers.get(CONTENT_LENGTH), body) {
            (Some(length), _) => length.to_str().ok().and_then(|length| length.parse().ok()),
            // Made here: its length is said when it is sent.
            (None, Body::Full(bytes)) if !bytes.is_empty() => Some(bytes.len() as u64),
            (None, _) => return true,
        };
        let enough = length.is_some_and(|length| length >= self.min_length);
        if !enough {
            stats.content_length_too_small.inc();
        }
        enough
    }

    fn takes_type(&self, headers: &HeaderMap) -> bool {
        let Some(value) = headers.get(CONTENT_TYPE) else { return true };
        let Ok(value) = value.to_str() else { return false };
        let value = value.split(';').next().unwrap_or_default().trim();
        match &self.types {
            Types::Named(names) => names.iter().any(|name| name.eq_ignore_ascii_case(value)),
            Types::Matching(matchers) => matchers.iter().any(|matcher| matcher.matches(value)),
        }
    }
}

fn is_upgrade(headers: &HeaderMap) -> bool {
    headers.contains_key(UPGRADE)
}

impl Configured {
    /// The message says that it has been compressed on its way.
    fn is_transfer_coded(&self, headers: &HeaderMap) -> bool {
        let Some(codings) = joined(headers, &TRANSFER_ENCODING) else { return false };
        TRANSFER_CODINGS.iter().any(|coding| has_token(&codings, coding))
            || self.library.encoding.to_str().is_ok_and(|own| has_token(&codings, own))
    }

    /// The request's body, compressed if it may be.
    fn request(&self, head: &mut RequestHead, body: &mut Body) {
        let stats = &self.request_stats;
        let headers = &head.headers;
        let compressor = self.request.as_ref().filter(|direction| {
            !body.is_end_stream()
                && direction.enabled.get()
                && !is_upgrade(headers)
                && direction.is_long_enough(headers, body, stats)
                && direction.takes_type(headers)
                && !headers.contains_key(CONTENT_ENCODING)
                && !self.is_transfer_coded(headers)
        });
        match compressor.and_then(|_| self.library.codecs.compressor()) {
            Some(compressor) => {
                stats.compressed.inc();
                self.begin(&mut head.headers, body, compressor, *stats);
            }
            None => stats.not_compressed.inc(),
        }
    }

    fn begin(&self, headers: &mut HeaderMap, body: &mut Body, compressor: Box<dyn Compress>, stats: Stats) {
        headers.remove(CONTENT_LENGTH);
        headers.insert(CONTENT_ENCODING, self.library.encoding.clone());
        body.wrap(|body| Compressed { body, compressor: Some(compressor), trailers: None, stats });
    }

    fn is_etag_allowed(&self, headers: &HeaderMap) -> bool {
        let allowed = self.weaken_etag || !self.disable_on_etag || !headers.contains_key(ETAG);
        if !allowed {
            self.accept.not_compressed_etag.inc();
        }
        allowed
    }

    /// An entity tag that says that two bodies are the same to the byte is not true any more.
    fn sanitize_etag(&self, headers: &mut HeaderMap) {
        let Some(etag) = headers.get(ETAG) else { return };
        let bytes = etag.as_bytes();
        if bytes.len() <= 2 || bytes[..2].eq_ignore_ascii_case(b"w/") {
            return;
        }
        match HeaderValue::from_bytes(&[b"W/", bytes].concat()) {
            Ok(weak) if self.weaken_etag => drop(headers.insert(ETAG, weak)),
            _ => drop(headers.remove(ETAG)),
        }
    }

    /// Whether this is the compressor that has been chosen.
    fn is_chosen(&self, decision: &Decision) -> bool {
        let own = |encoding: &HeaderValue| *encoding == self.library.encoding;
        let (counter, chosen) = match decision {
            Decision::NotValid => (self.accept.header_not_valid, false),
            Decision::Identity => (self.accept.header_identity, false),
            Decision::Wildcard(encoding) => (self.accept.header_wildcard, own(encoding)),
            Decision::Named(encoding) if own(encoding) => (self.accept.header_compressor_used, true),
            Decision::Named(_) => (self.accept.header_compressor_overshadowed, false),
        };
        counter.inc();
        chosen
    }
}

/// Chooses among the compressors of a chain by a client's `accept-encoding`.
fn choose(accept_encoding: &str, headers: &HeaderMap, compressors: &[Kept<Configured>]) -> Decision {
    // Of several with the same encoding the first counts.
    let mut allowed: Vec<(&str, &Configured)> = Vec::new();
    for compressor in compressors {
        let encoding = compressor.library.encoding.to_str().unwrap_or_default();
        if compressor.response.takes_type(headers) && !allowed.iter().any(|(known, _)| *known == encoding) {
            allowed.push((encoding, compressor));
        }
    }
    let mut asked: Vec<(&str, f32)> = Vec::new();
    for token in accept_encoding.split(',').filter(|token| !token.is_empty()) {
        let (encoding, parameter) = token.split_once(';').unwrap_or((token, ""));
        let quality = match parameter.split_once('=') {
            Some((name, value)) if name.trim().eq_ignore_ascii_case("q") => {
                let Ok(quality) = value.trim().parse::<f32>() else { continue };
                quality
            }
            _ => 1.0,
        };
        let encoding = encoding.trim();
        asked.push((encoding, quality));
        if quality == 0.0 {
            allowed.retain(|(known, _)| *known != encoding);
        }
    }
    let Some((first, _)) = allowed.first() else { return Decision::NotValid };
    let mut choice = ("identity", 0.0);
    for (encoding, quality) in asked {
        let known = allowed.iter().find(|(known, _)| *known == encoding);
        if known.is_none() && !["identity", "*"].contains(&encoding) {
            continue;
        }
        let first = known.is_some_and(|(_, compressor)| compressor.choose_first);
        if quality > choice.1 || (quality == choice.1 && first) {
            choice = (encoding, quality);
        }
    }
    // Those that there are were made from static text.
    let value = |encoding: &str| HeaderValue::from_str(encoding).unwrap_or(HeaderValue::from_static("identity"));
    match choice {
        (_, 0.0) => Decision::NotValid,
        ("identity", _) => Decision::Identity,
        ("*", _) => Decision::Wildcard(value(first)),
        (encoding, _) => Decision::Named(value(encoding)),
    }
}

impl HttpFilterFactory for CompressorFactory {
    fn stream(&self, route: PerRoute<'_>) -> Option<Box<dyn HttpFilter>> {
        let enabled = route.most_specific::<Told>().and_then(|told| told.enabled);
        let configured = self.0.keep();
        Some(Box::new(CompressorFilter { configured, enabled, asked: false, accept_encoding: None }))
    }

    fn request(
        &self,
        head: &mut RequestHead,
        body: &mut Body,
        cx: &mut StreamCx,
        route: PerRoute<'_>,
        instances: &mut Vec<Box<dyn HttpFilter>>,
    ) -> Flow {
        let (configured, told) = (&self.0, route.most_specific::<Told>());
        let enabled = told.and_then(|told| told.enabled);
        let removes = told.and_then(|told| told.remove_accept_encoding);
        let accept_encoding = joined(&head.headers, &ACCEPT_ENCODING).map(Cow::into_owned);
        // Envoy makes one line of several.
        if head.headers.get_all(ACCEPT_ENCODING).iter().nth(1).is_some()
            && let Some(Ok(one)) = accept_encoding.as_deref().map(HeaderValue::from_str)
        {
            head.headers.insert(ACCEPT_ENCODING, one);
        }
        if enabled.unwrap_or_else(|| configured.response.enabled.get())
            && removes.unwrap_or(configured.remove_accept_encoding)
        {
            head.headers.remove(ACCEPT_ENCODING);
        }
        let chain = cx.shared.get_or_insert_default::<InChain>();
        chain.compressors.push(configured.keep());
        chain.asked += 1;
        configured.request(head, body);
        let configured = configured.keep();
        instances.push(Box::new(CompressorFilter { configured, enabled, asked: true, accept_encoding }));
        Flow::Continue
    }
}

impl CompressorFilter {
    /// Whether the client wants what this filter makes.
    fn is_accepted(&self, headers: &HeaderMap, cx: &mut StreamCx) -> bool {
        let configured = &self.configured;
        let Some(accept_encoding) = &self.accept_encoding else {
            configured.accept.no_accept_header.inc();
            return false;
        };
        let chain = cx.shared.get_or_insert_default::<InChain>();
        let InChain { compressors, decision, .. } = chain;
        let decision = decision.get_or_insert_with(|| choose(accept_encoding, headers, compressors));
        configured.is_chosen(decision)
    }

    fn can_be_compressed(&self, status: StatusCode, headers: &HeaderMap) -> bool {
        let configured = &self.configured;
        !is_upgrade(headers)
            && configured.response.takes_type(headers)
            && !joined(headers, &CACHE_CONTROL).is_some_and(|control| has_token(&control, "no-transform"))
            && configured.is_etag_allowed(headers)
            && !headers.contains_key(CONTENT_ENCODING)
            && !configured.uncompressible.contains(&u32::from(status.as_u16()))
    }
}

impl HttpFilter for CompressorFilter {
    fn response(&mut self, head: &mut ResponseHead, body: &mut Body, cx: &mut StreamCx) -> Flow {
        let configured = &self.configured;
        if !self.asked {
            let chain = cx.shared.get_or_insert_default::<InChain>();
            chain.compressors.insert(chain.asked, configured.clone());
        }
        let stats = &configured.response_stats;
        let headers = &mut head.headers;
        let enabled = self.enabled.unwrap_or_else(|| configured.response.enabled.get())
            && configured.response.is_long_enough(headers, body, stats);
        let possible = enabled && self.can_be_compressed(head.status, headers);
        let wanted = !body.is_end_stream()
            && enabled
            && self.is_accepted(headers, cx)
            && possible
            && !configured.is_transfer_coded(headers);
        let compressor = wanted.then(|| configured.library.codecs.compressor()).flatten();
        match compressor {
            Some(compressor) => {
                configured.sanitize_etag(headers);
                stats.compressed.inc();
                configured.begin(headers, body, compressor, *stats);
            }
            None => stats.not_compressed.inc(),
        }
        // Caches have to know that the next client may get another answer.
        if possible {
            let vary = joined(headers, &VARY);
            let value = match &vary {
                None => Some("Accept-Encoding".to_owned()),
                Some(vary) if vary.split(',').any(|word| word.trim() == "Accept-Encoding") => None,
                Some(vary) => Some(format!("{vary}, Accept-Encoding")),
            };
            if let Some(Ok(value)) = value.map(HeaderValue::try_from) {
                headers.insert(VARY, value);
            }
        }
        Flow::Continue
    }
}

/// A body that is compressed as it passes: each piece is sent on as a whole.
struct Compressed {
    body: Body,
    /// `None` when all has been compressed.
    compressor: Option<Box<dyn Compress>>,
    trailers: Option<HeaderMap>,
    stats: Stats,
}

impl WrappedBody for Compressed {}

impl http_body::Body for Compressed {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = &mut *self;
        loop {
            let Some(compressor) = &mut this.compressor else {
                return Poll::Ready(this.trailers.take().map(|trailers| Ok(Frame::trailers(trailers))));
            };
            let data = match ready!(Pin::new(&mut this.body).poll_frame(cx)).transpose()?.map(Frame::into_data) {
                Some(Ok(data)) => data,
                Some(Err(frame)) => {
                    this.trailers = frame.into_trailers().ok();
                    Bytes::new()
                }
                None => Bytes::new(),
            };
            let last = this.trailers.is_some() || this.body.is_end_stream();
            let mut out = Vec::new();
            let failed = |_| BodyError::from("a body could not be compressed");
            compressor.compress(&data, last, &mut out).map_err(failed)?;
            if last {
                this.compressor = None;
            }
            this.stats.total_uncompressed_bytes.add(data.len() as u64);
            this.stats.total_compressed_bytes.add(out.len() as u64);
            if !out.is_empty() {
                return Poll::Ready(Some(Ok(Frame::data(out.into()))));
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.compressor.is_none() && self.trailers.is_none()
    }
}

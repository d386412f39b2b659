//! `envoy.filters.http.decompressor`: decompresses what upstreams or clients send compressed.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::{Buf as _, Bytes};
use culvert_xds_client::json::unpack;
use envoy_types::pb::{
    envoy::extensions::filters::http::decompressor::v3::{Decompressor, decompressor::CommonDirectionConfig},
    google::protobuf::Any,
};
use http::{
    HeaderMap, HeaderName, HeaderValue,
    header::{ACCEPT_ENCODING, CACHE_CONTROL, CONTENT_ENCODING, CONTENT_LENGTH},
};
use http_body::{Body as _, Frame};

use super::{
    FilterCx, Flow, HttpFilter, HttpFilterFactory, PerRoute,
    compression::{self, Decompress, Decompressors, Library, Step, has_token},
    shared::{Kept, Shared},
};
use crate::{
    config::{FieldError, parse},
    http::{
        body::{Body, BodyError, WrappedBody},
        headers::joined,
        stream::{RequestHead, ResponseHead, StreamCx},
    },
    layered_runtime::RuntimeFlag,
    stats::{Counter, Lease, Scope},
};

/// About how much is sent on at a time.
const PIECE: usize = 16 << 10;

/// What is configured. Streams hold on to it.
#[derive(Debug)]
struct Configured {
    library: Library<dyn Decompressors>,
    request: Direction,
    response: Direction,
    advertise: bool,
    reporting: Reporting,
    _lease: Lease,
}

#[derive(Debug)]
struct Direction {
    enabled: RuntimeFlag,
    ignore_no_transform: bool,
    decompressed: Counter,
    not_decompressed: Counter,
    total_uncompressed_bytes: Counter,
    total_compressed_bytes: Counter,
}

/// What bodies that are decompressed tell, in counters and in trailers.
#[derive(Debug)]
struct Reporting {
    compressed: HeaderName,
    uncompressed: HeaderName,
    errors: Vec<(&'static str, Counter)>,
}

#[derive(Debug)]
struct DecompressorFactory(Shared<Configured>);

/// One stream's filter, for its response.
#[derive(Debug)]
struct DecompressorFilter(Kept<Configured>);

#[derive(Debug, Clone, Copy)]
enum Way {
    Up,
    Down,
}

impl Configured {
    fn direction(&self, way: Way) -> &Direction {
        match way {
            Way::Up => &self.request,
            Way::Down => &self.response,
        }
    }

    /// Decompresses a message if it is to be.
    fn pass(configured: &Kept<Self>, headers: &mut HeaderMap, body: &mut Body, way: Way) {
        if body.is_end_stream() {
            return;
        }
        let direction = configured.direction(way);
        let kept = || joined(headers, &CACHE_CONTROL).is_some_and(|control| has_token(&control, "no-transform"));
        let codings = || joined(headers, &CONTENT_ENCODING).unwrap_or_default();
        let rest = || {
            let codings = codings();
            let (first, rest) = codings.split_once(',').unwrap_or((&codings, ""));
            let own = configured.library.encoding.as_bytes().eq_ignore_ascii_case(first.trim().as_bytes());
            own.then(|| rest.trim().to_owned())
        };
        let wanted = direction.enabled.get() && (direction.ignore_no_transform || !kept());
        let rest = wanted.then(rest).flatten();
        let Some((rest, decompressor)) = rest.and_then(|rest| Some((rest, configured.library.codecs.decompressor()?)))
        else {
            direction.not_decompressed.inc();
            return;
        };
        direction.decompressed.inc();
        headers.remove(CONTENT_LENGTH);
        match HeaderValue::try_from(rest) {
            Ok(rest) if !rest.is_empty() => drop(headers.insert(CONTENT_ENCODING, rest)),
            _ => drop(headers.remove(CONTENT_ENCODING)),
        }
        let configured = configured.clone();
        body.wrap(|body| Decompressed {
            body,
            decompressor,
            input: Bytes::new(),
            limit: 0,
            more: false,
            compressed: 0,
            uncompressed: 0,
            ended: false,
            configured,
            way,
        });
    }
}

impl HttpFilterFactory for DecompressorFactory {
    fn stream(&self, _route: PerRoute<'_>) -> Option<Box<dyn HttpFilter>> {
        Some(Box::new(DecompressorFilter(self.0.keep())))
    }

    fn request(
        &self,
        head: &mut RequestHead,
        body: &mut Body,
        _cx: &mut StreamCx,
        _route: PerRoute<'_>,
        instances: &mut Vec<Box<dyn HttpFilter>>,
    ) -> Flow {
        let configured = self.0.keep();
        if configured.advertise && configured.response.enabled.get() {
            advertise(&mut head.headers, &configured.library.encoding);
        }
        Configured::pass(&configured, &mut head.headers, body, Way::Up);
        instances.push(Box::new(DecompressorFilter(configured)));
        Flow::Continue
    }
}

/// Tells the upstream that this encoding is welcome, as much as any.
fn advertise(headers: &mut HeaderMap, encoding: &HeaderValue) {
    let own = encoding.to_str().unwrap_or_default();
    let before = joined(headers, &ACCEPT_ENCODING).unwrap_or_default();
    let others = |token: &&str| !token.is_empty() && token.split(';').next().unwrap_or_default().trim() != own;
    let all: Vec<&str> = before.split(',').map(str::trim).filter(others).chain([own]).collect();
    if let Ok(value) = HeaderValue::try_from(all.join(",")) {
        headers.insert(ACCEPT_ENCODING, value);
    }
}

impl HttpFilter for DecompressorFilter {
    fn response(&mut self, head: &mut ResponseHead, body: &mut Body, _cx: &mut StreamCx) -> Flow {
        Configured::pass(&self.0, &mut head.headers, body, Way::Down);
        Flow::Continue
    }
}

/// A body that is decompressed as it passes, a piece at a time.
struct Decompressed {
    body: Body,
    decompressor: Box<dyn Decompress>,
    /// What has come and has not been taken.
    input: Bytes,
    /// How much more may come of what came last.
    limit: u64,
    /// There may be more to come of what has been taken.
    more: bool,
    compressed: u64,
    uncompressed: u64,
    ended: bool,
    configured: Kept<Configured>,
    way: Way,
}

impl Decompressed {
    /// What comes of the input, up to about a piece.
    fn piece(&mut self) -> Bytes {
        let mut out = Vec::new();
        while self.more && out.len() < PIECE {
            let (mut input, before) = (&self.input[..], out.len());
            let step = self.decompressor.step(&mut input, &mut out);
            let taken = self.input.len() - input.len();
            self.input.advance(taken);
            let grown = (out.len() - before) as u64;
            let error = match step {
                Step::Broken(error) => Some(error),
                // Nothing comes of nothing: too much of too little is an attack.
                Step::More if grown > self.limit => self.configured.reporting.errors.first().map(|(name, _)| *name),
                Step::More => None,
                Step::Drained => {
                    self.more = false;
                    None
                }
            };
            self.limit = self.limit.saturating_sub(grown);
            if let Some(error) = error {
                let counted = self.configured.reporting.errors.iter().find(|(name, _)| *name == error);
                counted.inspect(|(_, counter)| counter.inc());
                self.more = false;
            }
        }
        let direction = self.configured.direction(self.way);
        self.uncompressed += out.len() as u64;
        direction.total_uncompressed_bytes.add(out.len() as u64);
        out.into()
    }

    /// The trailers, with how much it has been.
    fn trailers(&self, mut trailers: HeaderMap) -> Frame<Bytes> {
        let reporting = &self.configured.reporting;
        trailers.append(reporting.compressed.clone(), self.compressed.into());
        trailers.append(reporting.uncompressed.clone(), self.uncompressed.into());
        Frame::trailers(trailers)
    }
}

impl WrappedBody for Decompressed {}

impl http_body::Body for Decompressed {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = &mut *self;
        if this.ended {
            return Poll::Ready(None);
        }
        loop {
            let piece = this.piece();
            if !piece.is_empty() {
                return Poll::Ready(Some(Ok(Frame::data(piece))));
            }
            let frame = ready!(Pin::new(&mut this.body).poll_frame(cx)).transpose()?;
            match frame.map(Frame::into_data) {
                Some(Ok(data)) => {
                    this.limit = (data.len() as u64).saturating_mul(this.configured.library.codecs.max_ratio());
                    this.compressed += data.len() as u64;
                    this.configured.direction(this.way).total_compressed_bytes.add(data.len() as u64);
                    (this.input, this.more) = (data, true);
                }
                Some(Err(frame)) => {
                    this.ended = true;
                    return Poll::Ready(Some(Ok(this.trailers(frame.into_trailers().unwrap_or_default()))));
                }
                None => {
                    this.ended = true;
                    return Poll::Ready(Some(Ok(this.trailers(HeaderMap::new()))));
                }
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.ended
    }
}

pub(super) fn parse(typed_config: &Any, cx: &FilterCx<'_>) -> Result<Arc<dyn HttpFilterFactory>, FieldError> {
    let Decompressor { decompressor_library, request_direction_config, response_direction_config } =
        unpack(typed_config, cx.path)?;
    let path = format!("{}.decompressor_library", cx.path);
    let library = compression::decompressors(decompressor_library.as_ref(), &path)?;
    let scope = Scope::http(cx.stat_prefix).child("decompressor").child(&library.name).child(library.kind);
    let trailer = |what: &str| {
        let name = format!("x-envoy-decompressor-{}-{what}-bytes", library.name);
        HeaderName::try_from(name)
            .map_err(|_| FieldError::new(format!("{path}.name"), "cannot be part of a header name"))
    };
    let errors = scope.clone().child("decompressor_library");
    let reporting = Reporting {
        compressed: trailer("compressed")?,
        uncompressed: trailer("uncompressed")?,
        errors: compression::error_names(library.kind).iter().map(|name| (*name, errors.counter(name))).collect(),
    };
    let request = request_direction_config.unwrap_or_default();
    let response = response_direction_config.unwrap_or_default();
    let advertise = request.advertise_accept_encoding.is_none_or(|value| value.value);
    Ok(Arc::new(DecompressorFactory(Shared::new(Configured {
        request: direction(request.common_config.as_ref(), &scope.clone().child("request")),
        response: direction(response.common_config.as_ref(), &scope.clone().child("response")),
        library,
        advertise,
        reporting,
        _lease: scope.lease(),
    }))))
}

fn direction(config: Option<&CommonDirectionConfig>, scope: &Scope) -> Direction {
    Direction {
        enabled: parse::runtime_switch(config.and_then(|config| config.enabled.as_ref())),
        ignore_no_transform: config.is_some_and(|config| config.ignore_no_transform_header),
        decompressed: scope.counter("decompressed"),
        not_decompressed: scope.counter("not_decompressed"),
        total_uncompressed_bytes: scope.counter("total_uncompressed_bytes"),
        total_compressed_bytes: scope.counter("total_compressed_bytes"),
    }
}

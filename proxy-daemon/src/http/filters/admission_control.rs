//! `envoy.filters.http.admission_control`: refuses a share of the requests where too few of those before have succeeded.

use std::{
    cell::RefCell,
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use culvert_xds_client::json::unpack;
use envoy_types::pb::{
    envoy::{
        config::core::v3::{RuntimeDouble, RuntimePercent},
        extensions::filters::http::admission_control::v3::{
            AdmissionControl,
            admission_control::{EvaluationCriteria, SuccessCriteria},
        },
    },
    google::protobuf::Any,
};
use http::{HeaderMap, StatusCode};
use http_body::Body as _;
use thread_local::ThreadLocal;

use super::{
    FilterCx, Flow, HttpFilter, HttpFilterFactory, PerRoute,
    shared::{Kept, Shared},
    trailers::with_trailers,
};
use crate::{
    access_log::ResponseFlags,
    config::{FieldError, parse},
    http::{
        body::Body,
        headers::{is_grpc, names::GRPC_STATUS},
        stream::{LocalReply, RequestHead, ResponseHead, StreamCx},
    },
    layered_runtime::{Key, RuntimeFlag, RuntimeInteger},
    stats::{Counter, Lease, Scope},
};

const DEFAULT_WINDOW: Duration = Duration::from_secs(30);

/// How long requests are counted together.
const SLICE: Duration = Duration::from_secs(1);

/// The highest code of gRPC.
const MAX_GRPC_STATUS: u32 = 16;

/// Those of gRPC's codes that fewer requests would not change.
const GRPC_SUCCESS: [u32; 11] = [0, 1, 2, 3, 5, 6, 7, 9, 11, 12, 16];

#[derive(Debug)]
struct AdmissionControlFactory(Shared<Configured>);

/// What is configured. Streams hold on to it: it learns from their answers.
#[derive(Debug)]
struct Configured {
    enabled: RuntimeFlag,
    criteria: Criteria,
    window: Duration,
    aggression: Number,
    sr_threshold: Number,
    rps_threshold: RuntimeInteger,
    max_rejection_probability: Number,
    /// Of each worker its own, as Envoy has it.
    seen: ThreadLocal<RefCell<Window>>,
    rq_rejected: Counter,
    rq_success: Counter,
    rq_failure: Counter,
    _lease: Lease,
}

/// A number that a runtime value may replace.
#[derive(Debug)]
struct Number {
    default: f64,
    key: Option<Key>,
}

impl Number {
    fn get(&self) -> f64 {
        self.key.as_ref().and_then(Key::double).unwrap_or(self.default)
    }

    /// Where it is a share: of 1.
    fn share(&self) -> f64 {
        let percent = self.get();
        (if (0.0..=100.0).contains(&percent) { percent } else { self.default }) / 100.0
    }
}

/// What counts as a success.
#[derive(Debug)]
struct Criteria {
    /// Each from its first status to the one behind its last.
    http: Vec<(u16, u16)>,
    grpc: Vec<u32>,
}

impl Criteria {
    fn http(&self, status: StatusCode) -> bool {
        self.http.iter().any(|(first, end)| (*first..*end).contains(&status.as_u16()))
    }

    fn grpc(&self, status: Option<u32>) -> bool {
        status.is_some_and(|status| self.grpc.contains(&status))
    }
}

/// Requests and how many of them were successes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Counts {
    requests: u32,
    successes: u32,
}

impl Counts {
    fn add(&mut self, success: bool) {
        self.requests = self.requests.saturating_add(1);
        self.successes = self.successes.saturating_add(u32::from(success));
    }

    /// How likely it is that the next request is refused.
    fn rejection(self, sr_threshold: f64, aggression: f64, most: f64) -> f64 {
        let (requests, successes) = (f64::from(self.requests), f64::from(self.successes));
        let missing = (requests - successes / sr_threshold) / (requests + 1.0);
        // No number where the threshold is 0 and there were no successes: nothing is refused then.
        if missing > 0.0 { missing.powf(1.0 / aggression).min(most) } else { 0.0 }
    }
}

/// What has come of the requests of the last while.
#[derive(Debug, Default)]
struct Window {
    /// A slice each, with when it began; the oldest first.
    slices: VecDeque<(Instant, Counts)>,
    /// All of them together.
    all: Counts,
}

impl Window {
    /// Forgets what is older than `window`, and begins a new slice where it is time.
    fn advance(&mut self, now: Instant, window: Duration) {
        while let Some((began, counts)) = self.slices.front()
            && now.saturating_duration_since(*began) >= window
        {
            self.all.requests = self.all.requests.saturating_sub(counts.requests);
            self.all.successes = self.all.successes.saturating_sub(counts.successes);
            self.slices.pop_front();
        }
        if self.slices.back().is_none_or(|(began, _)| now.saturating_duration_since(*began) >= SLICE) {
            self.slices.push_back((now, Counts::default()));
        }
    }

    fn record(&mut self, success: bool, now: Instant, window: Duration) {
        self.advance(now, window);
        if let Some((_, counts)) = self.slices.back_mut() {
            counts.add(success);
            self.all.add(success);
        }
    }

    /// Requests a second, on average: whole ones. As in Envoy, what is too old counts until the next request is looked at.
    fn average_rps(&self, now: Instant, window: Duration) -> u64 {
        let Some((oldest, _)) = self.slices.front() else { return 0 };
        let seconds = window.max(now.saturating_duration_since(*oldest)).as_secs();
        u64::from(self.all.requests) / seconds.max(1)
    }
}

impl Configured {
    /// Whether the next request is to be refused.
    fn refuses(&self) -> bool {
        let (now, window) = (Instant::now(), self.window);
        let mut seen = self.seen.get_or_default().borrow_mut();
        if seen.average_rps(now, window) < self.rps_threshold.get() {
            return false;
        }
        seen.advance(now, window);
        let (threshold, aggression) = (self.sr_threshold.share(), self.aggression.get().max(1.0));
        let probability = seen.all.rejection(threshold, aggression, self.max_rejection_probability.share());
        // To four digits, as in Envoy.
        probability * 10_000.0 > fastrand::u32(..10_000).into()
    }

    fn record(&self, success: bool) {
        let counter = if success { self.rq_success } else { self.rq_failure };
        counter.inc();
        self.seen.get_or_default().borrow_mut().record(success, Instant::now(), self.window);
    }
}

/// The stream of a request whose answer counts.
struct AdmissionControlFilter(Kept<Configured>);

impl HttpFilterFactory for AdmissionControlFactory {
    fn stream(&self, _route: PerRoute<'_>) -> Option<Box<dyn HttpFilter>> {
        Some(Box::new(AdmissionControlFilter(self.0.keep())))
    }

    fn request(
        &self,
        _head: &mut RequestHead,
        _body: &mut Body,
        cx: &mut StreamCx,
        route: PerRoute<'_>,
        instances: &mut Vec<Box<dyn HttpFilter>>,
    ) -> Flow {
        let configured = &self.0;
        if !configured.enabled.get() || cx.progress.health_check.get() {
            return Flow::Continue;
        }
        if configured.refuses() {
            configured.rq_rejected.inc();
            let (status, flags) = (StatusCode::SERVICE_UNAVAILABLE, ResponseFlags::default());
            // It says nothing of the upstreams: it does not count.
            return Flow::Respond(LocalReply::new(status, "", flags, "denied_by_admission_control"));
        }
        instances.extend(self.stream(route));
        Flow::Continue
    }
}

impl HttpFilter for AdmissionControlFilter {
    fn response(&mut self, head: &mut ResponseHead, body: &mut Body, _cx: &mut StreamCx) -> Flow {
        let configured = &self.0;
        let ended = body.is_end_stream();
        let grpc = if ended {
            head.headers.contains_key(GRPC_STATUS)
        } else {
            head.status == StatusCode::OK && is_grpc(&head.headers)
        };
        if !grpc {
            configured.record(configured.criteria.http(head.status));
        } else if head.headers.contains_key(GRPC_STATUS) {
            configured.record(configured.criteria.grpc(grpc_status(&head.headers)));
        } else {
            let configured = configured.clone();
            with_trailers(body, move |trailers| configured.record(configured.criteria.grpc(grpc_status(trailers))));
        }
        Flow::Continue
    }
}

/// The status that headers or trailers tell, where it is one.
fn grpc_status(headers: &HeaderMap) -> Option<u32> {
    headers.get(GRPC_STATUS)?.to_str().ok()?.parse().ok().filter(|status| *status <= MAX_GRPC_STATUS)
}

pub(super) fn parse(typed_config: &Any, cx: &FilterCx<'_>) -> Result<Arc<dyn HttpFilterFactory>, FieldError> {
    let path = cx.path;
    let config: AdmissionControl = unpack(typed_config, path)?;
    let percent = |value: Option<RuntimePercent>, default| {
        value.map_or(Number { default, key: None }, |value| Number {
            default: value.default_value.unwrap_or_default().value,
            key: Key::optional(&value.runtime_key),
        })
    };
    let double = |value: Option<RuntimeDouble>, default| {
        value.map_or(Number { default, key: None }, |RuntimeDouble { default_value, runtime_key }| Number {
            default: default_value,
            key: Key::optional(&runtime_key),
        })
    };
    let sr_threshold = percent(config.sr_threshold, 95.0);
    if sr_threshold.default < 1.0 {
        let text = "Success rate threshold cannot be less than 1.0%.";
        return Err(FieldError::new(format!("{path}.sr_threshold.default_value"), text));
    }
    let Some(EvaluationCriteria::SuccessCriteria(criteria)) = config.evaluation_criteria else {
        return Err(FieldError::new(format!("{path}.success_criteria"), "is needed"));
    };
    let window = parse::duration(config.sampling_window, path, "sampling_window")?.unwrap_or(DEFAULT_WINDOW);
    let scope = Scope::http(cx.stat_prefix).child("admission_control");
    Ok(Arc::new(AdmissionControlFactory(Shared::new(Configured {
        enabled: parse::runtime_switch(config.enabled.as_ref()),
        criteria: self::criteria(criteria, &format!("{path}.success_criteria"))?,
        window: Duration::from_secs(window.as_secs().max(1)),
        aggression: double(config.aggression, 1.0),
        sr_threshold,
        rps_threshold: config.rps_threshold.map_or(RuntimeInteger { default: 0, key: None }, |threshold| {
            RuntimeInteger { default: threshold.default_value.into(), key: Key::optional(&threshold.runtime_key) }
        }),
        max_rejection_probability: percent(config.max_rejection_probability, 80.0),
        seen: ThreadLocal::new(),
        rq_rejected: scope.counter("rq_rejected"),
        rq_success: scope.counter("rq_success"),
        rq_failure: scope.counter("rq_failure"),
        _lease: scope.lease(),
    }))))
}

fn criteria(criteria: SuccessCriteria, path: &str) -> Result<Criteria, FieldError> {
    let http = match criteria.http_criteria {
        None => vec![(100, 500)],
        Some(criteria) => {
            let ranges = criteria.http_success_status.iter().enumerate().map(|(index, range)| {
                let statuses = 100..=600;
                let bounds = u16::try_from(range.start).ok().zip(u16::try_from(range.end).ok());
                bounds
                    .filter(|(first, end)| statuses.contains(first) && statuses.contains(end) && first < end)
                    .ok_or_else(|| {
                        let path = format!("{path}.http_criteria.http_success_status[{index}]");
                        FieldError::new(path, format!("invalid HTTP range: [{}, {})", range.start, range.end))
                    })
            });
            ranges.collect::<Result<_, _>>()?
        }
    };
    let grpc = criteria.grpc_criteria.map_or_else(|| GRPC_SUCCESS.to_vec(), |criteria| criteria.grpc_success_status);
    if let Some(index) = grpc.iter().position(|status| *status > MAX_GRPC_STATUS) {
        let path = format!("{path}.grpc_criteria.grpc_success_status[{index}]");
        return Err(FieldError::new(path, format!("invalid gRPC code {}", grpc[index])));
    }
    Ok(Criteria { http, grpc })
}

#[cfg(test)]
#[path = "admission_control_tests.rs"]
mod tests;

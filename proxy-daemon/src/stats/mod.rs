//! Counters, gauges and histograms under Envoy's names. docs/stats.md has the picture.
//!
//! A name becomes a slot when configuration is applied ([`counter`], [`gauge`], [`histogram`], or a [`Scope`]'s methods,
//! which lock the registry); on the request path a handle is a slot number, and counting is a load and a store in the
//! thread's own slab. The control side sums the slabs when it is asked.

mod group;
mod histogram;
mod metered;
mod metric;
mod prometheus;
mod registry;
mod response_codes;
mod scope;
mod slab;
mod snapshot;
mod tags;
mod text;

pub use histogram::{PROMETHEUS_BOUNDS, QUANTILES, Summary};
pub use metered::Metered;
pub use metric::{Metric, Value};
pub use prometheus::write_prometheus;
#[cfg(test)]
pub(crate) use registry::slots;
pub use registry::{Kind, Lease, register_worker, reset_counters};
pub use response_codes::ResponseCodes;
pub use scope::Scope;
pub use snapshot::{flush_intervals, snapshot};
pub use text::{HistogramBuckets, Query, write_json, write_text};
use twox_hash::XxHash64;

/// A number that only grows. A handle: copying it is free, and the same name always gives the same one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Counter(u32);

impl Counter {
    /// Adds one.
    #[inline]
    pub fn inc(self) {
        slab::add(self.0, 1);
    }

    /// Adds `n`.
    #[inline]
    pub fn add(self, n: u64) {
        slab::add(self.0, n);
    }

    /// The sum over all threads.
    pub fn value(self) -> u64 {
        slab::sum(self.0)
    }
}

/// A counter without a name, which nothing shows: what only load reports tell. Its slot is given to others when it is dropped.
#[derive(Debug)]
pub struct HiddenCounter(Counter);

impl HiddenCounter {
    /// At zero.
    pub fn new() -> HiddenCounter {
        HiddenCounter(Counter(registry::hidden_slot()))
    }

    /// Adds one.
    #[inline]
    pub fn inc(&self) {
        self.0.inc();
    }

    /// Adds `n`.
    #[inline]
    pub fn add(&self, n: u64) {
        self.0.add(n);
    }

    /// The sum over all threads.
    pub fn value(&self) -> u64 {
        self.0.value()
    }
}

impl Default for HiddenCounter {
    fn default() -> Self {
        HiddenCounter::new()
    }
}

impl Drop for HiddenCounter {
    fn drop(&mut self) {
        registry::release_hidden(self.0.0);
    }
}

/// A gauge without a name, which nothing shows. Its slot is given to others when it is dropped: nobody may have counted up what is not
/// counted down by then.
#[derive(Debug)]
pub struct HiddenGauge(Gauge);

impl HiddenGauge {
    /// At zero.
    pub fn new() -> HiddenGauge {
        HiddenGauge(Gauge(registry::hidden_slot()))
    }

    /// Adds one.
    #[inline]
    pub fn inc(&self) {
        self.0.inc();
    }

    /// Takes one away.
    #[inline]
    pub fn dec(&self) {
        self.0.dec();
    }

    /// The sum over all threads, as [`Gauge::value`].
    #[inline]
    pub fn value(&self) -> u64 {
        self.0.value()
    }
}

impl Default for HiddenGauge {
    fn default() -> Self {
        HiddenGauge::new()
    }
}

impl Drop for HiddenGauge {
    fn drop(&mut self) {
        registry::release_hidden(self.0.0);
    }
}

/// A number that goes up and down. Every thread holds its own share, and any thread may take down what another put up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Gauge(u32);

impl Gauge {
    /// Adds one.
    #[inline]
    pub fn inc(self) {
        slab::add(self.0, 1);
    }

    /// Takes one away.
    #[inline]
    pub fn dec(self) {
        slab::take(self.0, 1);
    }

    /// Adds `n`.
    #[inline]
    pub fn add(self, n: u64) {
        slab::add(self.0, n);
    }

    /// Takes `n` away.
    #[inline]
    pub fn sub(self, n: u64) {
        slab::take(self.0, n);
    }

    /// Makes the value `n`. For gauges that the control side alone writes: what workers add meanwhile may be lost.
    pub fn set(self, n: u64) {
        registry::set_gauge(self, n);
    }

    /// The sum over all threads: one load for each worker, cheap enough for a circuit breaker. A read that meets a
    /// decrement before the increment it belongs to sees 0, never less.
    #[inline]
    pub fn value(self) -> u64 {
        u64::try_from(slab::sum(self.0).cast_signed()).unwrap_or(0)
    }
}

/// A distribution of whole numbers: milliseconds or bytes, as Envoy's histogram of that name has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Histogram(u32);

impl Histogram {
    /// Records one value.
    #[inline]
    pub fn record(self, value: u64) {
        slab::record(self.0, value);
    }

    /// Everything that was recorded since the process began.
    pub fn summary(self) -> Summary {
        registry::summary(self)
    }
}

/// The counter of this name; its Prometheus labels are found in the name as Envoy finds them. Where a part of the name
/// comes from configuration (a cluster, a prefix), use a [`Scope`]: it knows where that part ends.
pub fn counter(name: &str) -> Counter {
    registry::counter(tags::from_name(name))
}

/// The gauge of this name; see [`counter`].
pub fn gauge(name: &str) -> Gauge {
    registry::gauge(tags::from_name(name))
}

/// The histogram of this name; see [`counter`].
pub fn histogram(name: &str) -> Histogram {
    registry::histogram(tags::from_name(name))
}

/// Envoy's number for the version of a resource or of a response, as in `version` of subscriptions; 0 before the first.
pub fn version_number(version: &str) -> u64 {
    if version.is_empty() { 0 } else { XxHash64::oneshot(0, version.as_bytes()) }
}

/// Sets the text readout of this name; see [`counter`].
pub fn set_text(name: &str, text: &str) {
    registry::set_text(tags::from_name(name), text);
}

#[cfg(test)]
mod tests;

//! From samples to a table of medians.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use serde_json::{Value, json};

use crate::measure::Sample;
use crate::proxy::Contender;

type Figure = (&'static str, fn(&Sample) -> f64);

/// What is shown of a sample: the name with its unit, and how it is had.
const FIGURES: [Figure; 10] = [
    ("push: CPU ms", |sample| millis(sample.push_cpu)),
    ("push: until all ACKed, ms", |sample| millis(sample.acked)),
    ("push: ACKed until last serves, ms", |sample| millis(sample.serving)),
    ("memory per cluster, KiB", |sample| sample.rss_per_cluster / 1024.0),
    ("same push again: CPU ms", |sample| millis(sample.again_cpu)),
    ("change: CPU ms", |sample| millis(sample.change_cpu)),
    ("change: visible p50 ms", |sample| millis(sample.change_p50)),
    ("change: visible p99 ms", |sample| millis(sample.change_p99)),
    ("light route p99 ms, quiet", |sample| millis(sample.quiet_p99)),
    ("light route p99 ms, during a push", |sample| millis(sample.busy_p99)),
];

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// A table in Markdown: each figure's median over the rounds, and its ratio to Envoy's.
pub(super) fn table(samples: &[Sample]) -> String {
    let mut groups: BTreeMap<(usize, bool), Vec<&Sample>> = BTreeMap::new();
    for sample in samples {
        groups.entry((sample.clusters, sample.delta)).or_default().push(sample);
    }
    let mut text =
        "| clusters | variant | figure | culvertd | Envoy | ratio |\n|---:|---|---|---:|---:|---:|\n".to_owned();
    for ((clusters, delta), group) in groups {
        let variant = if delta { "delta" } else { "SotW" };
        for (name, figure) in FIGURES {
            let of = |proxy: Contender| {
                median(group.iter().filter(|sample| sample.proxy == proxy).map(|sample| figure(sample)).collect())
            };
            let (ours, theirs) = (of(Contender::Culvert), of(Contender::Envoy));
            let ratio = ours.zip(theirs).map(|(ours, theirs)| ours / theirs);
            let show = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.2}"));
            // Writing to a string cannot fail.
            let _ = writeln!(
                text,
                "| {clusters} | {variant} | {name} | {} | {} | {} |",
                show(ours),
                show(theirs),
                show(ratio)
            );
        }
    }
    text
}

/// All samples.
pub(super) fn json(samples: &[Sample]) -> Value {
    let sample = |sample: &Sample| {
        let figures = FIGURES.iter().map(|(name, figure)| ((*name).to_owned(), json!(figure(sample))));
        let variant = if sample.delta { "delta" } else { "sotw" };
        let figures: serde_json::Map<_, _> = figures.collect();
        json!({ "proxy": sample.proxy.name(), "clusters": sample.clusters, "variant": variant, "figures": figures })
    };
    samples.iter().map(sample).collect()
}

/// The middle value, the upper of two.
fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

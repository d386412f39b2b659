//! `/stats`: what is asked for, and the answer as text or JSON.

use std::fmt::{self, Write};

use regex::Regex;
use serde_json::{Value as Json, json};

use super::{Kind, Metric, PROMETHEUS_BOUNDS, QUANTILES, Summary, Value};

/// Which statistics are asked for, and how histograms are shown.
#[derive(Debug, Default)]
pub struct Query {
    /// `filter`: the name, or part of it, matches.
    pub filter: Option<Regex>,
    /// `invert_filter`: those that `filter` does not match.
    pub invert_filter: bool,
    /// `usedonly`: only what has ever counted anything.
    pub used_only: bool,
    /// `type`: only this kind.
    pub kind: Option<Kind>,
    /// `histogram_buckets`
    pub histogram_buckets: HistogramBuckets,
}

/// How `/stats` shows a histogram.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub enum HistogramBuckets {
    /// Quantiles.
    #[default]
    Summary,
    /// How many values are at most each bound.
    Cumulative,
    /// How many values lie between each bound and the one before.
    Disjoint,
}

impl Query {
    /// Reads the parameters of a request for `/stats`; the error is the text of the 400 answer. Parameters that are not
    /// about the choice of statistics are passed over.
    pub fn parse<'a>(parameters: impl IntoIterator<Item = (&'a str, &'a str)>) -> Result<Query, String> {
        let mut query = Query::default();
        for (name, value) in parameters {
            match name {
                "usedonly" => query.used_only = true,
                "invert_filter" => query.invert_filter = true,
                "filter" => {
                    query.filter =
                        Some(Regex::new(value).map_err(|e| format!("Invalid re2 regex: {}\n", last_line(&e)))?);
                }
                "type" => {
                    query.kind = match value.to_ascii_lowercase().as_str() {
                        "all" | "" => None,
                        "counters" => Some(Kind::Counter),
                        "gauges" => Some(Kind::Gauge),
                        "histograms" => Some(Kind::Histogram),
                        "textreadouts" => Some(Kind::TextReadout),
                        _ => return Err("invalid &type= param\n".into()),
                    }
                }
                "histogram_buckets" => {
                    query.histogram_buckets = match value {
                        "summary" | "none" | "" => HistogramBuckets::Summary,
                        "cumulative" => HistogramBuckets::Cumulative,
                        "disjoint" => HistogramBuckets::Disjoint,
                        _ => return Err("usage: /stats?histogram_buckets=(cumulative|disjoint|summary)\n".into()),
                    }
                }
                _ => {}
            }
        }
        Ok(query)
    }

    /// Whether `metric` is asked for.
    pub fn wants(&self, metric: &Metric) -> bool {
        self.kind.is_none_or(|kind| kind == metric.kind())
            && (!self.used_only || metric.is_used())
            && self.filter.as_ref().is_none_or(|filter| filter.is_match(&metric.name()) != self.invert_filter)
    }
}

/// The part of a regex error that says what is wrong: the lines before it draw the expression.
fn last_line(error: &regex::Error) -> String {
    let text = error.to_string();
    text.lines().last().unwrap_or_default().trim_start_matches("error: ").to_owned()
}

/// Writes `name: value` lines: texts by name, then counters and gauges, then histograms.
pub fn write_text(out: &mut impl Write, metrics: &[Metric], buckets: HistogramBuckets) -> fmt::Result {
    for metric in metrics {
        if let Value::Text(text) = &metric.value {
            writeln!(out, "{}: {text:?}", metric.name())?;
        }
    }
    for metric in metrics {
        if let Value::Counter(value) | Value::Gauge { value, .. } = &metric.value {
            writeln!(out, "{}: {value}", metric.name())?;
        }
    }
    for metric in metrics {
        let Value::Histogram { interval, cumulative } = &metric.value else { continue };
        write!(out, "{}:", metric.name())?;
        match buckets {
            HistogramBuckets::Summary if cumulative.count() == 0 => out.write_str(" No recorded values")?,
            HistogramBuckets::Summary => {
                for q in QUANTILES {
                    let (now, ever) = (Number(interval.quantile(q)), Number(cumulative.quantile(q)));
                    write!(out, " P{}({now},{ever})", percent(q))?;
                }
            }
            HistogramBuckets::Cumulative | HistogramBuckets::Disjoint => {
                let counts = bucket_counts(interval, buckets).zip(bucket_counts(cumulative, buckets));
                for (bound, (now, ever)) in PROMETHEUS_BOUNDS.iter().zip(counts) {
                    write!(out, " B{bound}({now},{ever})")?;
                }
            }
        }
        writeln!(out)?;
    }
    Ok(())
}

/// `/stats?format=json`: one object a counter or gauge, and one for all histograms.
pub fn write_json(metrics: &[Metric], buckets: HistogramBuckets) -> Json {
    let mut stats = Vec::new();
    let mut histograms = Vec::new();
    for metric in metrics {
        if let Value::Text(text) = &metric.value {
            stats.push(json!({ "name": metric.name(), "value": &**text }));
        }
    }
    for metric in metrics {
        match &metric.value {
            Value::Text(_) => {}
            Value::Counter(value) | Value::Gauge { value, .. } => {
                stats.push(json!({ "name": metric.name(), "value": value }));
            }
            Value::Histogram { interval, cumulative } => histograms.push(match buckets {
                HistogramBuckets::Summary => {
                    // NaN has no number in JSON: it becomes null, as in Envoy.
                    let value = |q| json!({ "cumulative": cumulative.quantile(q), "interval": interval.quantile(q) });
                    json!({ "name": metric.name(), "values": QUANTILES.map(value) })
                }
                _ => {
                    let counts = bucket_counts(interval, buckets).zip(bucket_counts(cumulative, buckets));
                    let buckets: Vec<_> = PROMETHEUS_BOUNDS
                        .iter()
                        .zip(counts)
                        .map(
                            |(bound, (now, ever))| json!({ "upper_bound": bound, "interval": now, "cumulative": ever }),
                        )
                        .collect();
                    json!({ "name": metric.name(), "buckets": buckets })
                }
            }),
        }
    }
    if !histograms.is_empty() {
        stats.push(match buckets {
            HistogramBuckets::Summary => json!({ "histograms": {
                "supported_quantiles": QUANTILES.map(percent),
                "computed_quantiles": histograms,
            }}),
            _ => json!({ "histograms": histograms }),
        });
    }
    json!({ "stats": stats })
}

fn bucket_counts(summary: &Summary, buckets: HistogramBuckets) -> impl Iterator<Item = u64> {
    let mut below = 0;
    PROMETHEUS_BOUNDS.iter().map(move |bound| {
        let at_most = summary.at_most(*bound);
        let before = std::mem::replace(&mut below, at_most);
        if buckets == HistogramBuckets::Disjoint { at_most - before } else { at_most }
    })
}

/// 0.995 as 99.5, without the noise of binary fractions.
fn percent(q: f64) -> f64 {
    (q * 1000.0).round() / 10.0
}

/// A number as Envoy prints it: shortest form, `nan` where there is none.
struct Number(f64);

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_nan() { f.write_str("nan") } else { self.0.fmt(f) }
    }
}

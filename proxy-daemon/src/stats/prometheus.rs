//! `/stats/prometheus`: the text exposition format, as Envoy writes it.

use std::{
    collections::BTreeMap,
    fmt::{self, Write},
};

use super::{Kind, Metric, PROMETHEUS_BOUNDS, Summary, Value};

/// Writes the metrics: counters, gauges, then histograms, each family once, in the order of the families' names.
pub fn write_prometheus(out: &mut impl Write, metrics: &[Metric]) -> fmt::Result {
    let mut families: BTreeMap<(Kind, String), Vec<&Metric>> = BTreeMap::new();
    for metric in metrics {
        families.entry((metric.kind(), family_name(&metric.base_name()))).or_default().push(metric);
    }
    for ((kind, name), members) in families {
        let kind = match kind {
            Kind::Counter => "counter",
            // A text is a label of a gauge that says nothing.
            Kind::Gauge | Kind::TextReadout => "gauge",
            Kind::Histogram => "histogram",
        };
        writeln!(out, "# TYPE {name} {kind}")?;
        for metric in members {
            let labels = labels(metric);
            match &metric.value {
                Value::Counter(value) | Value::Gauge { value, .. } => writeln!(out, "{name}{{{labels}}} {value}")?,
                Value::Text(text) => {
                    let comma = if labels.is_empty() { "" } else { "," };
                    writeln!(out, "{name}{{{labels}{comma}text_value=\"{}\"}} 0", escaped(text))?;
                }
                Value::Histogram { cumulative, .. } => write_histogram(out, &name, &labels, cumulative)?,
            }
        }
        // Envoy sets its families apart by an empty line.
        writeln!(out)?;
    }
    Ok(())
}

fn write_histogram(out: &mut impl Write, name: &str, labels: &str, summary: &Summary) -> fmt::Result {
    let comma = if labels.is_empty() { "" } else { "," };
    for bound in PROMETHEUS_BOUNDS {
        writeln!(out, "{name}_bucket{{{labels}{comma}le=\"{bound}\"}} {}", summary.at_most(bound))?;
    }
    let count = summary.count();
    writeln!(out, "{name}_bucket{{{labels}{comma}le=\"+Inf\"}} {count}")?;
    writeln!(out, "{name}_sum{{{labels}}} {}", summary.sum())?;
    writeln!(out, "{name}_count{{{labels}}} {count}")
}

/// `envoy_` and the name, every character that Prometheus does not allow as `_`.
fn family_name(base: &str) -> String {
    let allowed = |c: char| if c.is_ascii_alphanumeric() || c == '_' { c } else { '_' };
    "envoy_".chars().chain(base.chars().map(allowed)).collect()
}

fn labels(metric: &Metric) -> String {
    let mut text = String::new();
    for (index, (label, value)) in metric.labels().enumerate() {
        text.push_str(if index > 0 { "," } else { "" });
        text.push_str(label);
        text.push_str("=\"");
        text.push_str(&escaped(value));
        text.push('"');
    }
    text
}

/// A label's value between its quotes.
fn escaped(value: &str) -> String {
    let mut text = String::with_capacity(value.len());
    for c in value.chars() {
        match c {
            '\\' => text.push_str("\\\\"),
            '"' => text.push_str("\\\""),
            '\n' => text.push_str("\\n"),
            c => text.push(c),
        }
    }
    text
}

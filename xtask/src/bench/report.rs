//! From samples to a table.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use serde_json::{Value, json};

use super::proxies::Contender;
use super::workloads::{Load, WORKLOADS};

/// One workload through one proxy in one round.
#[derive(Clone, Debug)]
pub(super) struct Sample {
    round: u32,
    proxy: Contender,
    workload: &'static str,
    cpu_us_per_request: f64,
    requests_per_second: f64,
    p50_us: f64,
    p99_us: f64,
    rss_mib: f64,
}

/// The medians over all rounds.
pub(super) struct Table {
    rows: Vec<Row>,
}

struct Row {
    workload: &'static str,
    proxy: Contender,
    cpu_us_per_request: f64,
    /// The median of the rounds' ratios to Envoy: what a machine's slow minute does to one round cancels out.
    ratio: Option<f64>,
    requests_per_second: f64,
    p50_us: f64,
    p99_us: f64,
    rss_mib: f64,
}

impl Sample {
    #[expect(clippy::cast_precision_loss, reason = "counts of requests and bytes are far below 2^52")]
    pub(super) fn new(
        round: u32,
        proxy: Contender,
        workload: &'static str,
        cpu: Duration,
        rss_bytes: u64,
        load: &Load,
    ) -> Self {
        let micros = |duration: Duration| duration.as_secs_f64() * 1e6;
        Self {
            round,
            proxy,
            workload,
            cpu_us_per_request: micros(cpu) / load.requests.max(1) as f64,
            requests_per_second: load.requests as f64 / load.elapsed.as_secs_f64(),
            p50_us: micros(load.p50),
            p99_us: micros(load.p99),
            rss_mib: rss_bytes as f64 / f64::from(1 << 20),
        }
    }
}

impl Table {
    pub(super) fn summarise(samples: &[Sample]) -> Self {
        let mut groups: BTreeMap<(usize, Contender), Vec<&Sample>> = BTreeMap::new();
        for sample in samples {
            let position = WORKLOADS.iter().position(|workload| workload.name == sample.workload).unwrap_or(usize::MAX);
            groups.entry((position, sample.proxy)).or_default().push(sample);
        }
        let envoy = |of: &Sample| {
            samples
                .iter()
                .find(|s| s.proxy == Contender::Envoy && s.round == of.round && s.workload == of.workload)
                .map(|envoy| of.cpu_us_per_request / envoy.cpu_us_per_request)
        };
        let rows = groups
            .into_iter()
            .map(|((_, proxy), group)| {
                let median_of = |value: fn(&Sample) -> f64| median(group.iter().map(|s| value(s)).collect());
                let ratios: Vec<f64> = group.iter().filter_map(|s| envoy(s)).filter(|r| r.is_finite()).collect();
                Row {
                    workload: group[0].workload,
                    proxy,
                    cpu_us_per_request: median_of(|s| s.cpu_us_per_request),
                    ratio: (!ratios.is_empty()).then(|| median(ratios)),
                    requests_per_second: median_of(|s| s.requests_per_second),
                    p50_us: median_of(|s| s.p50_us),
                    p99_us: median_of(|s| s.p99_us),
                    rss_mib: median_of(|s| s.rss_mib),
                }
            })
            .collect();
        Self { rows }
    }

    /// The medians and all samples.
    pub(super) fn json(&self, samples: &[Sample]) -> Value {
        let medians = self.rows.iter().map(|row| {
            json!({
                "workload": row.workload, "proxy": row.proxy.name(), "cpu_us_per_request": row.cpu_us_per_request,
                "ratio_to_envoy": row.ratio, "requests_per_second": row.requests_per_second, "p50_us": row.p50_us,
                "p99_us": row.p99_us, "rss_mib": row.rss_mib,
            })
        });
        let samples = samples.iter().map(|s| {
            json!({
                "round": s.round, "workload": s.workload, "proxy": s.proxy.name(),
                "cpu_us_per_request": s.cpu_us_per_request, "requests_per_second": s.requests_per_second,
                "p50_us": s.p50_us, "p99_us": s.p99_us, "rss_mib": s.rss_mib,
            })
        });
        json!({ "medians": medians.collect::<Vec<_>>(), "samples": samples.collect::<Vec<_>>() })
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "| workload | proxy | CPU us/request | of Envoy's | requests/s | p50 us | p99 us | RSS MiB |")?;
        writeln!(f, "|---|---|---:|---:|---:|---:|---:|---:|")?;
        for row in &self.rows {
            let ratio = row.ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}"));
            writeln!(
                f,
                "| {} | {} | {:.1} | {ratio} | {:.0} | {:.0} | {:.0} | {:.1} |",
                row.workload,
                row.proxy.name(),
                row.cpu_us_per_request,
                row.requests_per_second,
                row.p50_us,
                row.p99_us,
                row.rss_mib
            )?;
        }
        Ok(())
    }
}

/// The middle value; the mean of the two middle ones of an even number. `values` is not empty.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 { values[middle] } else { f64::midpoint(values[middle - 1], values[middle]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(round: u32, proxy: Contender, cpu_us: u64) -> Sample {
        let second = Duration::from_secs(1);
        let load = Load { requests: 1, elapsed: second, p50: second, p99: second };
        Sample::new(round, proxy, "http1-small", Duration::from_micros(cpu_us), 1 << 20, &load)
    }

    #[test]
    fn a_ratio_compares_within_a_round() {
        // The machine is half as fast in the second round; the ratio of the medians would be 20/60.
        let samples = [
            sample(1, Contender::Culvert, 10),
            sample(1, Contender::Envoy, 40),
            sample(2, Contender::Culvert, 20),
            sample(2, Contender::Envoy, 80),
            sample(3, Contender::Culvert, 20),
            sample(3, Contender::Envoy, 60),
        ];
        let table = Table::summarise(&samples);
        assert_eq!(table.rows.len(), 2);
        assert_eq!(table.rows[0].ratio, Some(0.25));
        assert_eq!(table.rows[1].ratio, Some(1.0));
    }

    #[test]
    fn medians() {
        assert!((median(vec![3.0, 1.0, 2.0]) - 2.0).abs() < f64::EPSILON);
        assert!((median(vec![4.0, 1.0]) - 2.5).abs() < f64::EPSILON);
    }
}

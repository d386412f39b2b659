//! Load reports of hosts (ORCA) in the headers or trailers of their responses, read as Envoy reads them.

use std::collections::{HashMap, HashSet};

use base64::{
    Engine as _,
    alphabet::STANDARD,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use http::{HeaderMap, HeaderName, HeaderValue};
use prost::Message;
use serde_json::Value;

use crate::config::model::{OrcaField, OrcaMap, OrcaMetric};

/// gRPC omits the padding.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// `xds.data.orca.v3.OrcaLoadReport`, without what is deprecated.
#[derive(Clone, PartialEq, Message)]
pub(super) struct LoadReport {
    #[prost(double, tag = "1")]
    pub(super) cpu_utilization: f64,
    #[prost(double, tag = "2")]
    pub(super) mem_utilization: f64,
    #[prost(map = "string, double", tag = "4")]
    pub(super) request_cost: HashMap<String, f64>,
    #[prost(map = "string, double", tag = "5")]
    pub(super) utilization: HashMap<String, f64>,
    #[prost(double, tag = "6")]
    pub(super) rps_fractional: f64,
    #[prost(double, tag = "7")]
    pub(super) eps: f64,
    #[prost(map = "string, double", tag = "8")]
    pub(super) named_metrics: HashMap<String, f64>,
    #[prost(double, tag = "9")]
    pub(super) application_utilization: f64,
}

impl LoadReport {
    /// What these headers or trailers report; `None`: nothing, or nothing that can be read.
    pub(super) fn of(headers: &HeaderMap) -> Option<LoadReport> {
        if let Some(value) = headers.get("endpoint-load-metrics-bin") {
            return LoadReport::binary(value.as_bytes());
        }
        let value = headers.get("endpoint-load-metrics")?.to_str().ok()?;
        let (format, rest) = value.split_once(' ')?;
        match format {
            "BIN" => LoadReport::binary(rest.as_bytes()),
            "TEXT" => LoadReport::text(rest),
            "JSON" => LoadReport::json(rest),
            _ => None,
        }
    }

    fn binary(value: &[u8]) -> Option<LoadReport> {
        let bytes = BASE64.decode(value).ok().filter(|bytes| !bytes.is_empty())?;
        LoadReport::decode(&*bytes).ok()
    }

    /// `name=value`, or `name:value`, with commas between them. One that is wrong, or is there twice, spoils the report.
    fn text(text: &str) -> Option<LoadReport> {
        let mut report = LoadReport::default();
        let mut names = HashSet::new();
        for item in text.split(',').map(str::trim).filter(|item| !item.is_empty()) {
            let (name, value) = item.split_once(['=', ':'])?;
            let value: f64 = value.trim().parse().ok()?;
            if !value.is_finite() || value < 0.0 || !names.insert(name) {
                return None;
            }
            match (OrcaField::named(name), name.split_once('.')) {
                (Some(field), _) => *report.field_mut(field) = value,
                // What a request costs cannot be told so.
                (None, Some((map @ ("named_metrics" | "utilization"), key))) if !key.is_empty() => {
                    report.map_mut(OrcaMap::named(map)?).insert(key.to_owned(), value);
                }
                (None, _) => return None,
            }
        }
        Some(report)
    }

    fn json(text: &str) -> Option<LoadReport> {
        let Value::Object(fields) = serde_json::from_str(text).ok()? else { return None };
        let mut report = LoadReport::default();
        for (name, value) in fields {
            let name = match name.as_str() {
                "cpuUtilization" => "cpu_utilization",
                "memUtilization" => "mem_utilization",
                "applicationUtilization" => "application_utilization",
                "rpsFractional" => "rps_fractional",
                "namedMetrics" => "named_metrics",
                "requestCost" => "request_cost",
                // Nothing goes by it.
                "rps" if value.is_u64() || value.as_str().is_some_and(|text| text.parse::<u64>().is_ok()) => continue,
                name => name,
            };
            match (OrcaField::named(name), OrcaMap::named(name), value) {
                (Some(_), _, Value::Null) | (_, Some(_), Value::Null) => {}
                (Some(field), _, value) => *report.field_mut(field) = double(&value)?,
                (_, Some(map), Value::Object(entries)) => {
                    let entries = entries.iter().map(|(key, value)| Some((key.clone(), double(value)?)));
                    *report.map_mut(map) = entries.collect::<Option<_>>()?;
                }
                _ => return None,
            }
        }
        Some(report)
    }

    fn field_mut(&mut self, field: OrcaField) -> &mut f64 {
        match field {
            OrcaField::Cpu => &mut self.cpu_utilization,
            OrcaField::Memory => &mut self.mem_utilization,
            OrcaField::Application => &mut self.application_utilization,
            OrcaField::Errors => &mut self.eps,
            OrcaField::Requests => &mut self.rps_fractional,
        }
    }

    fn field(&self, field: OrcaField) -> f64 {
        match field {
            OrcaField::Cpu => self.cpu_utilization,
            OrcaField::Memory => self.mem_utilization,
            OrcaField::Application => self.application_utilization,
            OrcaField::Errors => self.eps,
            OrcaField::Requests => self.rps_fractional,
        }
    }

    fn map_mut(&mut self, map: OrcaMap) -> &mut HashMap<String, f64> {
        match map {
            OrcaMap::Named => &mut self.named_metrics,
            OrcaMap::Cost => &mut self.request_cost,
            OrcaMap::Utilization => &mut self.utilization,
        }
    }

    fn map(&self, map: OrcaMap) -> &HashMap<String, f64> {
        match map {
            OrcaMap::Named => &self.named_metrics,
            OrcaMap::Cost => &self.request_cost,
            OrcaMap::Utilization => &self.utilization,
        }
    }

    /// Those of the metrics that the report has, with their names. Of a map that is the one before the dot, and the key.
    pub(super) fn each(&self, metrics: &[OrcaMetric], mut tell: impl FnMut((&str, &str), f64)) {
        for metric in metrics {
            match metric {
                OrcaMetric::Field(field, name) => tell(("", name), self.field(*field)),
                OrcaMetric::Entry(map, key, name) => {
                    if let Some(value) = self.map(*map).get(&**key) {
                        tell(("", name), *value);
                    }
                }
                OrcaMetric::All(map) => {
                    self.map(*map).iter().for_each(|(key, value)| tell((map.name(), key), *value));
                }
            }
        }
    }
}

/// What the fuzzer `load_report` feeds: the value of a header that says in which format the rest is.
pub fn fuzz(bytes: &[u8]) {
    let Ok(value) = HeaderValue::from_bytes(bytes) else { return };
    for name in ["endpoint-load-metrics", "endpoint-load-metrics-bin"] {
        let headers = HeaderMap::from_iter([(HeaderName::from_static(name), value.clone())]);
        if let Some(report) = LoadReport::of(&headers) {
            // What was read can be told.
            assert!(LoadReport::decode(&*report.encode_to_vec()).is_ok());
        }
    }
}

/// A number, or a text that is one.
fn double(value: &Value) -> Option<f64> {
    value.as_f64().or_else(|| value.as_str()?.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(name: &'static str, value: &str) -> Option<LoadReport> {
        LoadReport::of(&HeaderMap::from_iter([(name.parse().unwrap(), value.parse().unwrap())]))
    }

    #[test]
    fn formats() {
        let half = LoadReport { cpu_utilization: 0.5, rps_fractional: 100.0, ..LoadReport::default() };
        for value in [
            "TEXT rps_fractional=100,cpu_utilization=0.5",
            "TEXT rps_fractional:100, cpu_utilization=5e-1,,",
            r#"JSON {"rpsFractional": 100, "cpu_utilization": "0.5", "eps": null}"#,
            "BIN CQAAAAAAAOA/MQAAAAAAAFlA",
        ] {
            assert_eq!(read("endpoint-load-metrics", value), Some(half.clone()), "{value}");
        }
        assert_eq!(read("endpoint-load-metrics-bin", "CQAAAAAAAOA/MQAAAAAAAFlA"), Some(half));
        let unpadded = read("endpoint-load-metrics-bin", "CQAAAAAAAOA/MQAAAAAAAFlAOQAAAAAAAABAQg4KA3JpZhEAAAAAAAAQQA");
        assert_eq!(unpadded.unwrap().named_metrics["rif"], 4.0);
    }

    #[test]
    fn what_is_wrong_is_no_report() {
        for value in [
            "",
            "TEXT",
            "TEXT rps_fractional",
            "TEXT rps_fractional = 100",
            "TEXT eps=1,eps=1",
            "TEXT eps=nan",
            "TEXT eps=1e999",
            "TEXT eps=-1",
            "TEXT eps=\"1\"",
            "TEXT foo=1",
            "TEXT named_metrics.=1",
            "TEXT request_cost.a=1",
            "text eps=1",
            "eps=1",
            "JSON {\"eps\": 1, \"foo\": 1}",
            "JSON {\"eps\": true}",
            "JSON []",
            "BIN //8=",
            "BIN ",
            "BIN \u{7f}",
        ] {
            let value = http::HeaderValue::from_bytes(value.as_bytes());
            let Ok(value) = value else { continue };
            let headers = HeaderMap::from_iter([("endpoint-load-metrics".parse().unwrap(), value)]);
            assert_eq!(LoadReport::of(&headers), None, "{headers:?}");
        }
        assert_eq!(LoadReport::of(&HeaderMap::new()), None);
    }

    #[test]
    fn metrics_by_name() {
        let report =
            read("endpoint-load-metrics", "TEXT eps=3,named_metrics.a=1,named_metrics.b.c=2,utilization.u=0.5");
        let names = ["eps", "named_metrics.*", "named_metrics.b.c", "utilization.u", "utilization.v", "other", "x.y"];
        let metrics: Vec<_> = names.iter().filter_map(|name| OrcaMetric::named(name)).collect();
        let mut told = Vec::new();
        report.unwrap().each(&metrics, |(map, name), value| told.push(format!("{map}/{name}={value}")));
        told.sort();
        let all = ["/eps=3", "/named_metrics.b.c=2", "/utilization.u=0.5", "named_metrics/a=1", "named_metrics/b.c=2"];
        assert_eq!(told, all);
    }
}

use std::sync::Arc;

use super::{
    Counter, Gauge, Histogram, Lease, registry,
    tags::{self, TaggedName},
};

/// The front part of names, for example `cluster.users`, with the Prometheus labels that are part of it.
///
/// Envoy finds labels by looking at the finished name, so a cluster called `users.default` becomes the label `users` and a
/// metric called `cluster_default_...`. A scope is told which part is the label's value, and does not guess.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scope {
    name: String,
    base: String,
    labels: Vec<tags::Label>,
}

impl Scope {
    /// A scope without labels, for example `cluster_manager`.
    pub fn new(name: &str) -> Scope {
        Scope { name: name.to_owned(), base: name.to_owned(), labels: Vec::new() }
    }

    /// `cluster.<stat_name>`, with the label `envoy_cluster_name`.
    pub fn cluster(stat_name: &str) -> Scope {
        Scope::new("cluster").tagged("envoy_cluster_name", stat_name)
    }

    /// `listener.<address>`, with the label `envoy_listener_address`. The address is as configuration has it
    /// (`stat_prefix`, else `address:port`).
    pub fn listener(address: &str) -> Scope {
        Scope::new("listener").tagged("envoy_listener_address", address)
    }

    /// `http.<stat_prefix>`, with the label `envoy_http_conn_manager_prefix`.
    pub fn http(stat_prefix: &str) -> Scope {
        Scope::new("http").http_prefix(stat_prefix)
    }

    /// `listener.<address>.http.<stat_prefix>`: a connection manager's response codes by listener.
    pub fn listener_http(address: &str, stat_prefix: &str) -> Scope {
        Scope::listener(address).child("http").http_prefix(stat_prefix)
    }

    /// `tcp.<stat_prefix>`, with the label `envoy_tcp_prefix`.
    pub fn tcp(stat_prefix: &str) -> Scope {
        Scope::new("tcp").tagged("envoy_tcp_prefix", stat_prefix)
    }

    fn http_prefix(self, stat_prefix: &str) -> Scope {
        self.tagged("envoy_http_conn_manager_prefix", stat_prefix)
    }

    /// The scope `<this>.<part>`.
    pub fn child(mut self, part: &str) -> Scope {
        for text in [&mut self.name, &mut self.base] {
            text.push('.');
            text.push_str(part);
        }
        self
    }

    /// The scope `<this>.<value>`, where the value is a label and no part of the metric's name. As in Envoy, `:` in a
    /// value becomes `_`.
    pub fn tagged(mut self, label: &'static str, value: &str) -> Scope {
        let value: Arc<str> = value.replace(':', "_").into();
        self.name.push('.');
        self.name.push_str(&value);
        self.labels.push((label, value));
        self
    }

    /// The scope `<this>.worker_<index>`, with the label `envoy_worker_id`.
    pub fn worker(mut self, index: usize) -> Scope {
        self.name.push_str(&format!(".worker_{index}"));
        self.base.push_str(".worker");
        self.labels.push(("envoy_worker_id", index.to_string().into()));
        self
    }

    /// Whether something with these labels belongs to the scope, given that its name begins with the scope's.
    pub(super) fn owns(&self, labels: &[tags::Label]) -> bool {
        self.labels.iter().all(|label| labels.contains(label))
    }

    /// The scope's own name, without a dot at its end.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The counter `<scope>.<leaf>`.
    pub fn counter(&self, leaf: &str) -> Counter {
        registry::counter(self.full(leaf))
    }

    /// The gauge `<scope>.<leaf>`.
    pub fn gauge(&self, leaf: &str) -> Gauge {
        registry::gauge(self.full(leaf))
    }

    /// The histogram `<scope>.<leaf>`.
    pub fn histogram(&self, leaf: &str) -> Histogram {
        registry::histogram(self.full(leaf))
    }

    /// Sets the text readout `<scope>.<leaf>`.
    pub fn set_text(&self, leaf: &str, text: &str) {
        registry::set_text(self.full(leaf), text);
    }

    /// The counter `<scope>.<value>`, where the value is a label and no part of the metric's name.
    pub fn tagged_counter(&self, label: &'static str, value: &str) -> Counter {
        let Scope { name, base, labels } = self.clone().tagged(label, value);
        registry::counter(TaggedName { full: name.into(), base: base.into(), labels: labels.into(), exact: true })
    }

    /// A hold on the scope: what is in it stays until the last hold is dropped.
    pub fn lease(&self) -> Lease {
        Lease::new(self)
    }

    fn full(&self, leaf: &str) -> TaggedName {
        let mut labels = Vec::new();
        let leaf_base = tags::response_code(leaf, &mut labels);
        labels.extend_from_slice(&self.labels);
        TaggedName {
            full: format!("{}.{leaf}", self.name).into(),
            base: format!("{}.{}", self.base, leaf_base.as_deref().unwrap_or(leaf)).into(),
            labels: labels.into(),
            exact: true,
        }
    }
}

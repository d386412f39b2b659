use std::{borrow::Cow, sync::Arc};

use super::{
    Counter, Gauge, Histogram, Kind, Lease,
    group::Root,
    registry,
    tags::{self, TaggedName},
};

/// The front part of names, for example `cluster.users`, with the Prometheus labels that are part of it.
///
/// Envoy finds labels by looking at the finished name, so a cluster called `users.default` becomes the label `users` and a
/// metric called `cluster_default_...`. A scope is told which part is the label's value, and does not guess.
///
/// Cheap to clone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scope {
    /// Up to the last label.
    root: Arc<Root>,
    /// What comes after it, without dots at its ends.
    tail: Cow<'static, str>,
}

impl Scope {
    /// A scope without labels, for example `cluster_manager`.
    pub fn new(name: &str) -> Scope {
        let root = Arc::new(Root { name: "".into(), base: "".into(), labels: Box::new([]) });
        Scope { root, tail: name.to_owned().into() }
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
    pub fn child(self, part: &str) -> Scope {
        let tail = if self.tail.is_empty() { part.to_owned() } else { format!("{}.{part}", self.tail) };
        Scope { root: self.root, tail: tail.into() }
    }

    /// The scope `<this>.<value>`, where the value is a label and no part of the metric's name. As in Envoy, `:` in a
    /// value becomes `_`.
    pub fn tagged(self, label: &'static str, value: &str) -> Scope {
        let value = value.replace(':', "_");
        self.labelled(&value, None, (label, value.as_str().into()))
    }

    /// As [`tagged`](Self::tagged), with the value as it is: Envoy leaves `:` alone in what is below `vhost`.
    pub fn tagged_as_is(self, label: &'static str, value: &str) -> Scope {
        self.labelled(value, None, (label, value.into()))
    }

    /// The scope `<this>.name.<name>`, with the label `envoy_health_check_name`.
    pub fn health_check(self, name: &str) -> Scope {
        let name = name.replace(':', "_");
        self.labelled(&format!("name.{name}"), None, ("envoy_health_check_name", name.into()))
    }

    /// The scope `<this>.endpoint.<address>`, with the labels `envoy_endpoint_address` and, where it has a name, `envoy_endpoint_hostname`.
    pub fn endpoint(self, address: &str, hostname: &str) -> Scope {
        let part = format!("endpoint.{}", address.replace(':', "_"));
        let scope = self.labelled(&part, Some("endpoint"), ("envoy_endpoint_address", address.into()));
        if hostname.is_empty() {
            return scope;
        }
        let Root { name, base, labels } = &*scope.root;
        let labels = labels.iter().cloned().chain([("envoy_endpoint_hostname", hostname.into())]).collect();
        Scope { root: Arc::new(Root { name: name.clone(), base: base.clone(), labels }), tail: scope.tail }
    }

    /// The scope `<this>.worker_<index>`, with the label `envoy_worker_id`.
    pub fn worker(self, index: usize) -> Scope {
        self.labelled(&format!("worker_{index}"), Some("worker"), ("envoy_worker_id", index.to_string().into()))
    }

    /// The scope `<this>.<part>`, which is `<base>` in the metric's name.
    fn labelled(self, part: &str, base: Option<&str>, label: tags::Label) -> Scope {
        let dotted = |front: &str, parts: &[&str]| {
            let parts = parts.iter().filter(|part| !part.is_empty());
            parts.fold(front.to_owned(), |text, part| text + part + ".")
        };
        let name = format!("{}{part}.", dotted(&self.root.name, &[&self.tail]));
        let base = dotted(&self.root.base, &[&self.tail, base.unwrap_or_default()]);
        let labels = self.root.labels.iter().cloned().chain([label]).collect();
        Scope { root: Arc::new(Root { name: name.into(), base: base.into(), labels }), tail: "".into() }
    }

    /// Whether something with these labels belongs to the scope, given that its name begins with the scope's.
    pub(super) fn owns(&self, labels: &[tags::Label]) -> bool {
        self.root.labels.iter().all(|label| labels.contains(label))
    }

    /// The scope's own name, without a dot at its end.
    pub fn name(&self) -> String {
        let name = format!("{}{}", self.root.name, self.tail);
        name.trim_end_matches('.').to_owned()
    }

    /// Up to the last label.
    pub(super) fn root(&self) -> &Arc<Root> {
        &self.root
    }

    /// A name in the scope without the root in front.
    pub(super) fn leaf<'a>(&self, leaf: &'a str) -> Cow<'a, str> {
        if self.tail.is_empty() { leaf.into() } else { format!("{}.{leaf}", self.tail).into() }
    }

    /// The counter `<scope>.<leaf>`.
    pub fn counter(&self, leaf: &str) -> Counter {
        Counter(registry::slot(self, leaf, Kind::Counter))
    }

    /// The gauge `<scope>.<leaf>`.
    pub fn gauge(&self, leaf: &str) -> Gauge {
        Gauge(registry::slot(self, leaf, Kind::Gauge))
    }

    /// The histogram `<scope>.<leaf>`.
    pub fn histogram(&self, leaf: &str) -> Histogram {
        Histogram(registry::slot(self, leaf, Kind::Histogram))
    }

    /// Sets the text readout `<scope>.<leaf>`.
    pub fn set_text(&self, leaf: &str, text: &str) {
        registry::set_text_in(self, leaf, text);
    }

    /// The counter `<scope>.<value>`, where the value is a label and no part of the metric's name.
    pub fn tagged_counter(&self, label: &'static str, value: &str) -> Counter {
        let scope = self.clone().tagged(label, value);
        let without_dot = |name: &str| name.strip_suffix('.').unwrap_or(name).into();
        let Root { name, base, labels } = &*scope.root;
        let (full, base) = (without_dot(name), without_dot(base));
        registry::counter(TaggedName { full, base, labels: labels.iter().cloned().collect(), exact: true })
    }

    /// The same scope, which shares its name with what the registry has of it: for scopes that are kept, one for each of
    /// thousands of clusters.
    pub fn shared(self) -> Scope {
        registry::shared(self)
    }

    /// The same scope with an equal root.
    pub(super) fn with_root(self, root: Arc<Root>) -> Scope {
        Scope { root, tail: self.tail }
    }

    /// A hold on the scope: what is in it stays until the last hold is dropped.
    pub fn lease(&self) -> Lease {
        Lease::new(self)
    }

    /// The whole name of something in the scope.
    pub(super) fn whole(&self, leaf: &str) -> TaggedName {
        let (leaf, Root { name, base, labels }) = (self.leaf(leaf), &*self.root);
        let (full, base) = (format!("{name}{leaf}").into(), format!("{base}{leaf}").into());
        TaggedName { full, base, labels: labels.iter().cloned().collect(), exact: true }
    }

    /// The whole name, for scopes without labels.
    pub(super) fn full(&self, leaf: &str) -> TaggedName {
        let mut labels = Vec::new();
        let full = self.leaf(leaf);
        let base = tags::response_code(&full, &mut labels);
        TaggedName {
            base: base.as_deref().unwrap_or(&full).into(),
            full: full.into(),
            labels: labels.into(),
            exact: true,
        }
    }
}

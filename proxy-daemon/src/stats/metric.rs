//! One statistic with its value, as the admin port shows it.

use std::{borrow::Cow, cmp::Ordering, sync::Arc};

use super::{
    Kind, Scope, Summary,
    group::{Leaf, Root},
    tags::{self, Label, TaggedName},
};

/// A name, in the parts in which the registry keeps it.
#[derive(Debug, Clone)]
pub(super) enum Name {
    /// All of it.
    Whole(Arc<TaggedName>),
    /// A group's front part and the back part.
    Parts(Arc<Root>, Arc<Leaf>),
}

impl Name {
    /// The back part; empty where the name is whole.
    pub(super) fn leaf(&self) -> &str {
        self.parts().1
    }

    fn parts(&self) -> (&str, &str) {
        match self {
            Name::Whole(name) => (&name.full, ""),
            Name::Parts(root, leaf) => (&root.name, &leaf.name),
        }
    }
}

/// One statistic with its value at the time of the snapshot.
#[derive(Debug, Clone)]
pub struct Metric {
    pub(super) name: Name,
    pub(super) kind: Kind,
    /// Its value.
    pub value: Value,
}

impl Metric {
    /// A counter that somebody else keeps, for example the kernel's side.
    pub fn external(name: &str, value: u64) -> Metric {
        Metric::whole(name, Kind::Counter, Value::Counter(value))
    }

    /// A gauge that somebody else keeps.
    pub fn external_gauge(name: &str, value: u64) -> Metric {
        Metric::whole(name, Kind::Gauge, Value::Gauge { value, used: true })
    }

    /// The same, `<scope>.<leaf>`.
    pub fn gauge_in(scope: &Scope, leaf: &str, value: u64) -> Metric {
        let name = Name::Whole(Arc::new(scope.whole(leaf)));
        Metric { name, kind: Kind::Gauge, value: Value::Gauge { value, used: true } }
    }

    /// The same of a counter.
    pub fn counter_in(scope: &Scope, leaf: &str, value: u64) -> Metric {
        let name = Name::Whole(Arc::new(scope.whole(leaf)));
        Metric { name, kind: Kind::Counter, value: Value::Counter(value) }
    }

    /// A text that somebody else keeps.
    pub fn external_text(name: &str, text: &str) -> Metric {
        Metric::whole(name, Kind::TextReadout, Value::Text(text.into()))
    }

    fn whole(name: &str, kind: Kind, value: Value) -> Metric {
        Metric { name: Name::Whole(Arc::new(tags::from_name(name))), kind, value }
    }

    /// Its full name, as `/stats` prints it.
    pub fn name(&self) -> Cow<'_, str> {
        match self.name.parts() {
            (whole, "") => Cow::Borrowed(whole),
            (root, leaf) => Cow::Owned([root, leaf].concat()),
        }
    }

    /// The order of the names, and of the kinds where two have the same name.
    pub fn order(&self, other: &Metric) -> Ordering {
        let ((a, after_a), (b, after_b)) = (self.name.parts(), other.name.parts());
        // Most of a snapshot is in order, group by group: this decides without putting the parts together.
        let common = a.len().min(b.len());
        let names = a.as_bytes()[..common].cmp(&b.as_bytes()[..common]).then_with(|| {
            let (a, b) = (a.bytes().skip(common), b.bytes().skip(common));
            a.chain(after_a.bytes()).cmp(b.chain(after_b.bytes()))
        });
        names.then_with(|| self.kind.cmp(&other.kind))
    }

    /// What it is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Its name without the parts that are labels.
    pub fn base_name(&self) -> Cow<'_, str> {
        match &self.name {
            Name::Whole(name) => Cow::Borrowed(&name.base),
            Name::Parts(root, leaf) => Cow::Owned([&root.base, leaf.base.as_deref().unwrap_or(&leaf.name)].concat()),
        }
    }

    /// Label names and values, in the order in which they stand in the name, after those for response codes.
    pub fn labels(&self) -> impl Iterator<Item = (&'static str, &str)> {
        let (codes, labels): (&[Label], &[Label]) = match &self.name {
            Name::Whole(name) => (&[], &name.labels),
            Name::Parts(root, leaf) => (&leaf.labels, &root.labels),
        };
        codes.iter().chain(labels).map(|(label, value)| (*label, &**value))
    }

    /// Whether it ever counted anything: `usedonly`.
    pub fn is_used(&self) -> bool {
        match &self.value {
            Value::Counter(value) => *value != 0,
            Value::Gauge { used, .. } => *used,
            Value::Histogram { cumulative, .. } => cumulative.count() != 0,
            Value::Text(text) => !text.is_empty(),
        }
    }
}

/// A statistic's value.
#[derive(Debug, Clone)]
pub enum Value {
    /// A counter's.
    Counter(u64),
    /// A gauge's.
    Gauge {
        /// The sum over all threads.
        value: u64,
        /// Whether it was ever set, or counted up or down.
        used: bool,
    },
    /// A histogram's.
    Histogram {
        /// What was recorded between the last two flushes.
        interval: Summary,
        /// What was recorded since the process began.
        cumulative: Summary,
    },
    /// A text readout's.
    Text(Arc<str>),
}

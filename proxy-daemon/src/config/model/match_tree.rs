use std::{borrow::Cow, collections::HashMap, fmt::Debug, net::IpAddr};

use twox_hash::XxHash64;

use super::{Cidr, StringMatcher, ValueMatch};
use crate::{layered_runtime::RuntimeFraction, stats::Counter};

/// What a [`MatchTree`] takes values from: an `input` of `xds.type.matcher.v3.Matcher`.
pub trait MatchInput: Debug {
    /// What is told of a request, of a response, of a connection.
    type Of<'a>: ?Sized;

    /// The value; `None` where there is none, which is not the same as an empty one.
    fn value<'a>(&'a self, of: &'a Self::Of<'_>) -> Option<Cow<'a, str>>;

    /// Whether what it takes are values of metadata, which are no texts.
    fn is_metadata(&self) -> bool {
        false
    }

    /// Whether what is there in metadata, if anything, is as `wanted`.
    fn metadata_matches(&self, _of: &Self::Of<'_>, _wanted: &ValueMatch) -> bool {
        false
    }
}

/// `xds.type.matcher.v3.Matcher`: finds an action of type `A` by values that inputs of type `I` take.
#[derive(Debug)]
pub struct MatchTree<I, A> {
    /// How it is looked for.
    pub kind: MatchKind<I, A>,
    /// `on_no_match`
    pub otherwise: Option<Box<OnMatch<I, A>>>,
}

/// `Matcher.matcher_type`
#[derive(Debug)]
pub enum MatchKind<I, A> {
    /// The first that holds and comes to an action.
    List(Vec<(Predicate<I>, OnMatch<I, A>)>),
    /// `exact_match_map`
    Exact(I, HashMap<Box<str>, OnMatch<I, A>>),
    /// `prefix_match_map`: the longest that comes to an action.
    Prefixes(I, PrefixMap<OnMatch<I, A>>),
    /// Nothing matches.
    None,
}

/// `Matcher.OnMatch`
#[derive(Debug)]
pub enum OnMatch<I, A> {
    /// This is it.
    Action(A),
    /// Another matcher decides; where it finds nothing, this is none.
    Tree(Box<MatchTree<I, A>>),
}

/// `Matcher.MatcherList.Predicate`
#[derive(Debug)]
pub enum Predicate<I> {
    /// A value is there, and as it should be.
    Single(I, ValueMatcher),
    /// One of them holds.
    Any(Vec<Predicate<I>>),
    /// All of them hold.
    All(Vec<Predicate<I>>),
    /// It does not hold.
    Not(Box<Predicate<I>>),
}

/// What a value must be.
#[derive(Debug)]
pub enum ValueMatcher {
    /// Such a text.
    String(StringMatcher),
    /// An address within one of the ranges; counts what is no address.
    Ip(Box<[Cidr]>, Counter),
    /// The rest of its hash is at least `threshold`.
    ConsistentHashing {
        /// Of the hash.
        seed: u64,
        /// The first rest that will do.
        threshold: u64,
        /// What the hash is divided by; not 0.
        modulo: u64,
    },
    /// Its hash is in the share.
    RuntimeFraction {
        /// Of the hash.
        seed: u64,
        /// The share.
        share: RuntimeFraction,
    },
    /// Such a value of metadata; `invert`: any other one, or none.
    Metadata {
        /// The value.
        value: ValueMatch,
        /// Another one.
        invert: bool,
    },
}

/// Texts of which those are found that a text begins with, the longest first: a look-up by hash for each length that occurs.
#[derive(Debug)]
pub struct PrefixMap<T> {
    entries: HashMap<Box<str>, T>,
    /// Longest first.
    lengths: Box<[usize]>,
}

impl<T> PrefixMap<T> {
    /// A map of these prefixes; of two that are the same the last one counts.
    pub fn new(entries: impl IntoIterator<Item = (Box<str>, T)>) -> PrefixMap<T> {
        let entries: HashMap<_, _> = entries.into_iter().collect();
        let mut lengths: Vec<usize> = entries.keys().map(|prefix| prefix.len()).collect();
        lengths.sort_unstable_by(|a, b| b.cmp(a));
        lengths.dedup();
        PrefixMap { entries, lengths: lengths.into() }
    }

    /// What stands for the beginnings of `text`, the longest first.
    pub fn of<'a, 't>(&'a self, text: &'t str) -> impl Iterator<Item = &'a T> + use<'a, 't, T> {
        let beginnings = self.lengths.iter().filter_map(|length| text.get(..*length));
        beginnings.filter_map(|beginning| self.entries.get(beginning))
    }
}

impl ValueMatcher {
    fn matches(&self, value: &str) -> bool {
        match self {
            ValueMatcher::String(matcher) => matcher.matches(value),
            ValueMatcher::Ip(..) if value.is_empty() => false,
            ValueMatcher::Ip(ranges, failed) => match value.parse::<IpAddr>() {
                Ok(address) => ranges.iter().any(|range| holds(range, address)),
                Err(_) => {
                    failed.inc();
                    false
                }
            },
            ValueMatcher::ConsistentHashing { seed, threshold, modulo } => {
                XxHash64::oneshot(*seed, value.as_bytes()) % modulo >= *threshold
            }
            // Values of metadata have no text.
            ValueMatcher::Metadata { .. } => false,
            ValueMatcher::RuntimeFraction { seed, share } => share.includes(XxHash64::oneshot(*seed, value.as_bytes())),
        }
    }
}

/// An IPv4 address that is written as one of IPv6 is one of IPv6, as in Envoy.
fn holds(range: &Cidr, address: IpAddr) -> bool {
    match (range.network, address) {
        (IpAddr::V6(network), IpAddr::V6(address)) => {
            (network.to_bits() ^ address.to_bits()).leading_zeros() >= u32::from(range.prefix_len)
        }
        (_, IpAddr::V6(_)) => false,
        (_, address) => range.contains(address),
    }
}

impl<I: MatchInput> Predicate<I> {
    fn holds(&self, of: &I::Of<'_>) -> bool {
        match self {
            Predicate::Single(input, ValueMatcher::Metadata { value, invert }) => {
                input.metadata_matches(of, value) != *invert
            }
            Predicate::Single(input, matcher) => input.value(of).is_some_and(|value| matcher.matches(&value)),
            Predicate::Any(all) => all.iter().any(|predicate| predicate.holds(of)),
            Predicate::All(all) => all.iter().all(|predicate| predicate.holds(of)),
            Predicate::Not(predicate) => !predicate.holds(of),
        }
    }
}

impl<I: MatchInput, A> MatchTree<I, A> {
    /// Finds nothing.
    pub fn empty() -> MatchTree<I, A> {
        MatchTree { kind: MatchKind::None, otherwise: None }
    }

    /// The action that is found.
    pub fn find(&self, of: &I::Of<'_>) -> Option<&A> {
        let found = match &self.kind {
            MatchKind::List(list) => {
                list.iter().filter(|(predicate, _)| predicate.holds(of)).find_map(|(_, on)| on.find(of))
            }
            MatchKind::Exact(input, map) => input.value(of).and_then(|value| map.get(&*value)?.find(of)),
            MatchKind::Prefixes(input, map) => {
                input.value(of).and_then(|value| map.of(&value).find_map(|on| on.find(of)))
            }
            MatchKind::None => None,
        };
        found.or_else(|| self.otherwise.as_ref()?.find(of))
    }
}

impl<I: MatchInput, A> OnMatch<I, A> {
    fn find(&self, of: &I::Of<'_>) -> Option<&A> {
        match self {
            OnMatch::Action(action) => Some(action),
            OnMatch::Tree(tree) => tree.find(of),
        }
    }
}

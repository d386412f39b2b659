//! Subsets: hosts that have the metadata that a request asks for.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    sync::Arc,
};

use serde_json::Value as Json;

use super::{Ingredients, Pick, Picker, group::Making, layout::Level};
use crate::{
    config::model::{
        Criterion, LbMetadata, LbOptions, LbPolicy, LocalityLb, SelectorFallback, SubsetConfig, SubsetFallback,
    },
    upstream::Host,
};

/// The subsets of a cluster.
#[derive(Debug)]
pub(super) struct Subsets {
    config: Arc<SubsetConfig>,
    /// What holds for all of them.
    options: LbOptions,
    any: Option<Picker>,
    default: Option<Picker>,
    /// By their keys and values, as [`key`] writes them.
    found: HashMap<Box<str>, Subset>,
    /// Where no subset is found: by the keys that were asked for, as [`names`] writes them.
    fallbacks: HashMap<Box<str>, Option<SelectorFallback>>,
    /// How many hosts are in no subset because theirs has one already.
    pub(super) duplicates: u64,
}

#[derive(Debug)]
enum Subset {
    Hosts(Box<Picker>),
    /// `single_host_per_subset`
    Host(u32),
}

/// Nothing that metadata or its JSON holds.
const END: char = '\0';

/// Keys and values in one text, which no others have.
fn key<'a>(criteria: impl IntoIterator<Item = (&'a str, &'a str)>) -> String {
    let mut text = String::new();
    for (name, value) in criteria {
        push(&mut text, name, value);
    }
    text
}

fn push(text: &mut String, name: &str, value: &str) {
    text.push_str(name);
    text.push(END);
    text.push_str(value);
    text.push(END);
}

fn names<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    key(names.into_iter().map(|name| (name, "")))
}

impl Subsets {
    pub(super) fn new(config: &Arc<SubsetConfig>, of: &Ingredients<'_>, making: &mut Making<'_>) -> Subsets {
        let mut options = of.options.clone();
        if !config.locality_weight_aware && options.locality == LocalityLb::Weighted {
            options.locality = LocalityLb::default();
        }
        let wanted = |fallback: SubsetFallback| {
            let own = config.selectors.iter().any(|it| it.fallback == Some(SelectorFallback::To(fallback)));
            own || config.fallback == fallback || (config.panic_mode_any && fallback == SubsetFallback::Any)
        };
        let mut picker = |members: Option<&[u32]>| {
            let levels = match members {
                Some(members) => part(of.levels, members, config.scale_locality_weight),
                None => of.levels.to_vec(),
            };
            Picker::new(&Ingredients { options: &options, ..*of }, &levels, making)
        };
        let any = wanted(SubsetFallback::Any).then(|| picker(None));
        let default = wanted(SubsetFallback::Default).then(|| {
            let matches = |number: &u32| {
                let host = &of.hosts[*number as usize];
                has(host, &config.default_subset, config.list_as_any)
            };
            let numbers = 0..of.hosts.len() as u32;
            picker(Some(&numbers.filter(matches).collect::<Vec<_>>()))
        });
        let (members, singles, duplicates) = members(config, of.hosts);
        let many = members.into_iter().map(|(key, members)| (key, Subset::Hosts(Box::new(picker(Some(&members))))));
        let singles = singles.into_iter().map(|(key, host)| (key, Subset::Host(host)));
        let found = many.chain(singles).collect();
        Subsets { config: Arc::clone(config), options, any, default, found, fallbacks: fallbacks(config), duplicates }
    }

    /// How many subsets there are, and how many of them `before` had not.
    pub(super) fn difference(&self, before: Option<&Subsets>) -> (u64, u64) {
        let is_new = |key: &str| before.is_none_or(|before| !before.found.contains_key(key));
        let new = self.found.keys().filter(|key| is_new(key)).count();
        (self.found.len() as u64, new as u64)
    }

    pub(super) fn pick(&self, policy: &LbPolicy, cx: &mut Pick<'_>) -> Option<u32> {
        match cx.criteria.and_then(|asked| asked.fallbacks.as_ref()).filter(|_| self.config.fallback_list) {
            Some(lists) => lists.iter().find_map(|criteria| self.pick_by(policy, Some(criteria), cx)),
            None => self.pick_by(policy, cx.criteria.map(|asked| &*asked.criteria), cx),
        }
    }

    fn pick_by(&self, policy: &LbPolicy, criteria: Option<&[Criterion]>, cx: &mut Pick<'_>) -> Option<u32> {
        let Some(criteria) = criteria else { return self.fall_back(policy, cx) };
        // The first selector whose keys are all asked for says which ones matter.
        let asked = |name: &str| criteria.iter().any(|criterion| *criterion.name == *name);
        let selectors = || self.config.selectors.iter().map(|selector| &selector.keys);
        let redundant = self.config.allow_redundant_keys;
        let only = redundant.then(|| selectors().find(|keys| keys.iter().all(|name| asked(name)))).flatten();
        self.pick_within(policy, criteria, only, cx)
    }

    /// `only`: of the criteria, those with these names.
    fn pick_within(
        &self,
        policy: &LbPolicy,
        criteria: &[Criterion],
        only: Option<&BTreeSet<Box<str>>>,
        cx: &mut Pick<'_>,
    ) -> Option<u32> {
        let asked = |text: &mut String, values: bool| {
            text.clear();
            for Criterion { name, value } in
                criteria.iter().filter(|it| only.is_none_or(|only| only.contains(&it.name)))
            {
                push(text, name, if values { value } else { "" });
            }
        };
        let mut text = std::mem::take(&mut cx.turns.text);
        asked(&mut text, true);
        let subset = self.found.get(text.as_str());
        asked(&mut text, false);
        let fallback = self.fallbacks.get(text.as_str());
        cx.turns.text = text;
        if let Some(subset) = subset {
            cx.stats.lb_subsets_selected.inc();
            return match subset {
                Subset::Hosts(picker) => picker.pick(policy, &self.options, cx),
                Subset::Host(number) => Some(*number),
            };
        }
        match fallback.and_then(Option::as_ref) {
            None => self.fall_back(policy, cx),
            Some(SelectorFallback::To(SubsetFallback::None)) => None,
            Some(SelectorFallback::To(SubsetFallback::Any)) => self.any.as_ref()?.pick(policy, &self.options, cx),
            Some(SelectorFallback::To(SubsetFallback::Default)) => {
                self.default.as_ref()?.pick(policy, &self.options, cx)
            }
            // Fewer keys each time: it ends.
            Some(SelectorFallback::Keys(keys)) => self.pick_within(policy, criteria, Some(keys), cx),
        }
    }

    fn fall_back(&self, policy: &LbPolicy, cx: &mut Pick<'_>) -> Option<u32> {
        let picker = match self.config.fallback {
            SubsetFallback::None => None,
            SubsetFallback::Any => self.any.as_ref(),
            SubsetFallback::Default => self.default.as_ref(),
        };
        if let Some(number) = picker?.pick(policy, &self.options, cx) {
            cx.stats.lb_subsets_fallback.inc();
            return Some(number);
        }
        let any = self.any.as_ref().filter(|_| self.config.panic_mode_any)?;
        let number = any.pick(policy, &self.options, cx)?;
        cx.stats.lb_subsets_fallback_panic.inc();
        Some(number)
    }
}

/// The numbers of the hosts of each subset, the host of each subset that has but one, and how many such hosts are in none.
type Members = (HashMap<Box<str>, Vec<u32>>, HashMap<Box<str>, u32>, u64);

fn members(config: &SubsetConfig, hosts: &[Arc<Host>]) -> Members {
    let (mut many, mut singles, mut duplicates) = (HashMap::<Box<str>, Vec<u32>>::new(), HashMap::new(), 0);
    // Whichever selector makes a subset first says what kind it is.
    for (number, host) in (0_u32..).zip(hosts) {
        let Some(metadata) = host.metadata() else { continue };
        for selector in &config.selectors {
            for key in keys_of(metadata, &selector.keys, config.list_as_any) {
                let key = Box::<str>::from(key);
                if let Some(members) = many.get_mut(&key) {
                    if members.last() != Some(&number) {
                        members.push(number);
                    }
                } else if let Some(single) = singles.get_mut(&key) {
                    duplicates += 1;
                    // The first one of the first priority.
                    if host.priority < hosts[*single as usize].priority {
                        *single = number;
                    }
                } else if selector.single_host {
                    singles.insert(key, number);
                } else {
                    many.insert(key, vec![number]);
                }
            }
        }
    }
    (many, singles, duplicates)
}

/// The subsets by these keys that a host is in; none where it has not all of them.
fn keys_of(metadata: &LbMetadata, keys: &BTreeSet<Box<str>>, list_as_any: bool) -> Vec<String> {
    /// A host with lists under many keys would be in more subsets than there is memory for.
    const MANY: usize = 10_000;
    let mut found = vec![String::new()];
    for name in keys {
        let Some(value) = metadata.get(&**name) else { return Vec::new() };
        let values = match value {
            Json::Array(items) if list_as_any => items.as_slice(),
            value => std::slice::from_ref(value),
        };
        let with = |value: &Json, text: &String| {
            let mut text = text.clone();
            push(&mut text, name, &value.to_string());
            text
        };
        found = found.iter().flat_map(|text| values.iter().map(move |value| with(value, text))).take(MANY).collect();
    }
    found.retain(|text| !text.is_empty());
    found
}

/// Whether a host has all of this metadata.
fn has(host: &Host, wanted: &LbMetadata, list_as_any: bool) -> bool {
    wanted.iter().all(|(name, value)| match host.metadata().and_then(|metadata| metadata.get(name)) {
        Some(Json::Array(items)) if list_as_any => items.contains(value),
        Some(there) => there == value,
        None => false,
    })
}

/// The fallbacks of the selectors. As in Envoy, one whose keys begin those of a selector before it has none.
fn fallbacks(config: &SubsetConfig) -> HashMap<Box<str>, Option<SelectorFallback>> {
    let mut found = HashMap::new();
    for selector in &config.selectors {
        for len in 1..=selector.keys.len() {
            let last = len == selector.keys.len();
            let key = names(selector.keys.iter().take(len).map(|name| &**name));
            found.entry(key.into()).or_insert_with(|| selector.fallback.clone().filter(|_| last));
        }
    }
    found
}

/// The priorities with these hosts only, which are in order.
fn part(levels: &[Level], members: &[u32], scale: bool) -> Vec<Level> {
    let members: HashSet<u32> = members.iter().copied().collect();
    let keep = |hosts: &[u32]| -> Vec<u32> { hosts.iter().copied().filter(|host| members.contains(host)).collect() };
    let level = |level: &Level| {
        let mut part = level.clone();
        part.hosts = keep(&level.hosts);
        for group in &mut part.localities {
            let hosts = keep(&group.hosts);
            if scale && !group.hosts.is_empty() {
                let weight = f64::from(group.weight) * hosts.len() as f64 / group.hosts.len() as f64;
                // Not more than it was.
                group.weight = weight.round() as u32;
            }
            group.hosts = hosts;
        }
        part
    };
    levels.iter().map(level).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metadata(json: &str) -> LbMetadata {
        serde_json::from_str(json).unwrap()
    }

    fn set(names: &[&str]) -> BTreeSet<Box<str>> {
        names.iter().map(|name| Box::from(*name)).collect()
    }

    #[test]
    fn lists_stand_for_their_values() {
        let metadata = metadata(r#"{"a": ["x", "y"], "b": 1}"#);
        let keys = set(&["a", "b"]);
        assert_eq!(keys_of(&metadata, &keys, false), [key([("a", r#"["x","y"]"#), ("b", "1")])]);
        let both = [key([("a", "\"x\""), ("b", "1")]), key([("a", "\"y\""), ("b", "1")])];
        assert_eq!(keys_of(&metadata, &keys, true), both);
        assert!(keys_of(&metadata, &set(&["a", "c"]), true).is_empty());
    }

    #[test]
    fn a_selector_within_one_before_it_has_no_fallback() {
        let selector = |names: &[&str], fallback: SubsetFallback| SubsetSelector {
            keys: set(names),
            single_host: false,
            fallback: Some(SelectorFallback::To(fallback)),
        };
        use crate::config::model::SubsetSelector;
        let selectors = vec![
            selector(&["a", "b"], SubsetFallback::Any),
            selector(&["a"], SubsetFallback::Default),
            selector(&["b"], SubsetFallback::None),
        ];
        let found = fallbacks(&SubsetConfig { selectors, ..SubsetConfig::default() });
        assert_eq!(found[&*names(["a", "b"])], Some(SelectorFallback::To(SubsetFallback::Any)));
        assert_eq!(found[&*names(["a"])], None);
        assert_eq!(found[&*names(["b"])], Some(SelectorFallback::To(SubsetFallback::None)));
    }
}

//! `xds.type.matcher.v3.Matcher`, for whoever has inputs and actions of his own.

use culvert_xds_client::json::unpack;
use envoy_types::pb::{
    envoy::{
        extensions::matching::input_matchers::{
            consistent_hashing::v3::ConsistentHashing, ip::v3::Ip, metadata::v3::Metadata,
            runtime_fraction::v3::RuntimeFraction,
        },
        r#type::matcher::v3::{
            RegexMatcher, StringMatcher as EnvoyString,
            regex_matcher::{EngineType, GoogleRe2},
            string_matcher::MatchPattern as EnvoyPattern,
        },
    },
    google::protobuf::Any,
    xds::{
        core::v3::TypedExtensionConfig,
        r#type::matcher::v3::{
            Matcher, StringMatcher as ProtoString,
            matcher::{
                MatcherType, OnMatch as ProtoOnMatch,
                matcher_list::{
                    Predicate as ProtoPredicate,
                    predicate::{
                        MatchType, PredicateList, SinglePredicate, single_predicate::Matcher as SingleMatcher,
                    },
                },
                matcher_tree::{MatchMap, TreeType},
                on_match::OnMatch as OnMatchKind,
            },
            string_matcher::MatchPattern,
        },
    },
};
use prost::Name as _;

use super::{
    common::{Result, cidr, required, runtime_fraction, type_name},
    matcher, metadata_match,
    support::join,
};
use crate::{
    config::{
        FieldError,
        model::{MatchInput, MatchKind, MatchTree, OnMatch, Predicate, PrefixMap, ValueMatcher},
    },
    stats,
};

/// How deep matchers may be in each other, and predicates.
const MAX_DEPTH: usize = 32;

/// Metadata is matched by its own matcher, and by no other.
const MISFIT: &str = "Unsupported data input type: values of metadata go with the metadata matcher, and only they do";

/// What a matcher is made of, besides what all have.
pub(crate) trait MatchParts {
    /// What values are taken from.
    type Input: MatchInput;
    /// What is found.
    type Action;

    /// Reads an input; `None`: there is none of this type here.
    ///
    /// # Errors
    /// What is wrong with it, or why it is not honoured.
    fn input(&mut self, config: &Any, path: &str) -> Result<Option<Self::Input>>;

    /// Reads an action.
    ///
    /// # Errors
    /// What is wrong with it, or why it is not honoured.
    fn action(&mut self, config: &Any, path: &str) -> Result<Self::Action>;
}

type Tree<P> = MatchTree<<P as MatchParts>::Input, <P as MatchParts>::Action>;
type On<P> = OnMatch<<P as MatchParts>::Input, <P as MatchParts>::Action>;

/// Reads a matcher.
///
/// # Errors
/// The field that is wrong or not honoured.
pub(crate) fn match_tree<P: MatchParts>(matcher: &Matcher, path: &str, parts: &mut P) -> Result<Tree<P>> {
    Parser { parts, depth: 0 }.tree(matcher, path)
}

struct Parser<'p, P> {
    parts: &'p mut P,
    depth: usize,
}

impl<P: MatchParts> Parser<'_, P> {
    fn tree(&mut self, matcher: &Matcher, path: &str) -> Result<Tree<P>> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(FieldError::new(path, "is nested too deeply"));
        }
        let kind = match &matcher.matcher_type {
            None => MatchKind::None,
            Some(MatcherType::MatcherList(list)) => {
                let path = join(path, "matcher_list.matchers");
                let mut all = Vec::with_capacity(list.matchers.len());
                for (index, matcher) in list.matchers.iter().enumerate() {
                    let path = format!("{path}[{index}]");
                    let predicate = matcher.predicate.as_ref().ok_or_else(|| required(&path, "predicate"))?;
                    let on_match = matcher.on_match.as_ref().ok_or_else(|| required(&path, "on_match"))?;
                    let predicate = self.predicate(predicate, &join(&path, "predicate"), 0)?;
                    all.push((predicate, self.on_match(on_match, &join(&path, "on_match"))?));
                }
                MatchKind::List(all)
            }
            Some(MatcherType::MatcherTree(tree)) => {
                let path = join(path, "matcher_tree");
                let input = self.input(tree.input.as_ref(), &join(&path, "input"))?;
                if input.is_metadata() {
                    return Err(FieldError::new(join(&path, "input"), MISFIT));
                }
                match &tree.tree_type {
                    Some(TreeType::ExactMatchMap(map)) => {
                        let entries = self.entries(map, &join(&path, "exact_match_map"))?;
                        MatchKind::Exact(input, entries.into_iter().collect())
                    }
                    Some(TreeType::PrefixMatchMap(map)) => {
                        let entries = self.entries(map, &join(&path, "prefix_match_map"))?;
                        MatchKind::Prefixes(input, PrefixMap::new(entries))
                    }
                    // custom_match is refused by the table of honoured fields.
                    Some(TreeType::CustomMatch(_)) | None => return Err(required(&path, "exact_match_map")),
                }
            }
        };
        let otherwise = matcher.on_no_match.as_deref();
        let otherwise = otherwise.map(|on| self.on_match(on, &join(path, "on_no_match")).map(Box::new)).transpose()?;
        self.depth -= 1;
        Ok(MatchTree { kind, otherwise })
    }

    /// The entries of a map, in the order of their keys.
    fn entries(&mut self, map: &MatchMap, path: &str) -> Result<Vec<(Box<str>, On<P>)>> {
        let mut all: Vec<(&String, &ProtoOnMatch)> = map.map.iter().collect();
        all.sort_by_key(|(key, _)| *key);
        let entry = |(key, on): (&String, &ProtoOnMatch)| {
            Ok((key.as_str().into(), self.on_match(on, &format!("{path}.map[\"{key}\"]"))?))
        };
        all.into_iter().map(entry).collect()
    }

    fn on_match(&mut self, on: &ProtoOnMatch, path: &str) -> Result<On<P>> {
        Ok(match &on.on_match {
            Some(OnMatchKind::Matcher(matcher)) => OnMatch::Tree(Box::new(self.tree(matcher, &join(path, "matcher"))?)),
            Some(OnMatchKind::Action(action)) => {
                let path = join(path, "action.typed_config");
                OnMatch::Action(self.parts.action(action.typed_config.as_ref().unwrap_or(&Any::default()), &path)?)
            }
            None => return Err(required(path, "action")),
        })
    }

    fn predicate(&mut self, predicate: &ProtoPredicate, path: &str, depth: usize) -> Result<Predicate<P::Input>> {
        if depth > MAX_DEPTH {
            return Err(FieldError::new(path, "is nested too deeply"));
        }
        Ok(match &predicate.match_type {
            Some(MatchType::SinglePredicate(single)) => {
                let path = join(path, "single_predicate");
                let matcher = value_matcher(single, &path)?;
                let input = self.input(single.input.as_ref(), &join(&path, "input"))?;
                if input.is_metadata() != matches!(matcher, ValueMatcher::Metadata { .. }) {
                    return Err(FieldError::new(path, MISFIT));
                }
                Predicate::Single(input, matcher)
            }
            Some(MatchType::OrMatcher(any)) => {
                Predicate::Any(self.predicates(any, &join(path, "or_matcher"), depth)?)
            }
            Some(MatchType::AndMatcher(all)) => {
                Predicate::All(self.predicates(all, &join(path, "and_matcher"), depth)?)
            }
            Some(MatchType::NotMatcher(not)) => {
                Predicate::Not(Box::new(self.predicate(not, &join(path, "not_matcher"), depth + 1)?))
            }
            None => return Err(required(path, "single_predicate")),
        })
    }

    fn predicates(&mut self, list: &PredicateList, path: &str, depth: usize) -> Result<Vec<Predicate<P::Input>>> {
        let path = join(path, "predicate");
        if list.predicate.len() < 2 {
            return Err(FieldError::new(path, "must have at least two"));
        }
        let all = list.predicate.iter().enumerate();
        all.map(|(index, item)| self.predicate(item, &format!("{path}[{index}]"), depth + 1)).collect()
    }

    fn input(&mut self, config: Option<&TypedExtensionConfig>, path: &str) -> Result<P::Input> {
        let (config, path) = typed(config, path);
        self.parts.input(&config, &path)?.ok_or_else(|| {
            let text = format!("input of type {} is not supported by culvert here", type_name(&config));
            FieldError::new(path, text)
        })
    }
}

/// The message of an extension, and where it stands.
fn typed(config: Option<&TypedExtensionConfig>, path: &str) -> (Any, String) {
    let config = config.and_then(|config| config.typed_config.clone()).unwrap_or_default();
    (config, join(path, "typed_config"))
}

fn value_matcher(single: &SinglePredicate, path: &str) -> Result<ValueMatcher> {
    let config = match &single.matcher {
        Some(SingleMatcher::ValueMatch(value)) => {
            return Ok(ValueMatcher::String(string(value, &join(path, "value_match"))?));
        }
        Some(SingleMatcher::CustomMatch(config)) => config,
        None => return Err(required(path, "value_match")),
    };
    let (config, path) = typed(Some(config), &join(path, "custom_match"));
    let wanted = type_name(&config);
    Ok(if wanted == Ip::full_name() {
        let ip: Ip = unpack(&config, &path)?;
        let ranges = ip.cidr_ranges.iter().enumerate();
        let ranges = ranges.map(|(index, range)| cidr(range, &format!("{}[{index}]", join(&path, "cidr_ranges"))));
        ValueMatcher::Ip(
            ranges.collect::<Result<_>>()?,
            stats::counter(&format!("{}.ip_parsing_failed", ip.stat_prefix)),
        )
    } else if wanted == ConsistentHashing::full_name() {
        let hashing: ConsistentHashing = unpack(&config, &path)?;
        if hashing.modulo == 0 {
            return Err(FieldError::new(join(&path, "modulo"), "value must be greater than 0"));
        }
        let (threshold, modulo) = (u64::from(hashing.threshold), u64::from(hashing.modulo));
        if threshold > modulo {
            return Err(FieldError::new(join(&path, "threshold"), "must not be greater than modulo"));
        }
        ValueMatcher::ConsistentHashing { seed: hashing.seed, threshold, modulo }
    } else if wanted == Metadata::full_name() {
        let Metadata { value, invert } = unpack(&config, &path)?;
        let value = value.as_ref().ok_or_else(|| required(&path, "value"))?;
        ValueMatcher::Metadata { value: metadata_match::value(value, &join(&path, "value"))?, invert }
    } else if wanted == RuntimeFraction::full_name() {
        let fraction: RuntimeFraction = unpack(&config, &path)?;
        let share = fraction.runtime_fraction.as_ref().ok_or_else(|| required(&path, "runtime_fraction"))?;
        ValueMatcher::RuntimeFraction { seed: fraction.seed, share: runtime_fraction(share) }
    } else {
        return Err(FieldError::new(path, format!("matcher of type {wanted} is not supported by culvert here")));
    })
}

/// The same matcher in Envoy's own type.
fn string(value: &ProtoString, path: &str) -> Result<crate::config::model::StringMatcher> {
    let pattern = match &value.match_pattern {
        Some(MatchPattern::Exact(text)) => Some(EnvoyPattern::Exact(text.clone())),
        Some(MatchPattern::Prefix(text)) => Some(EnvoyPattern::Prefix(text.clone())),
        Some(MatchPattern::Suffix(text)) => Some(EnvoyPattern::Suffix(text.clone())),
        Some(MatchPattern::Contains(text)) => Some(EnvoyPattern::Contains(text.clone())),
        #[expect(deprecated, reason = "what every expression is")]
        Some(MatchPattern::SafeRegex(regex)) => Some(EnvoyPattern::SafeRegex(RegexMatcher {
            regex: regex.regex.clone(),
            engine_type: Some(EngineType::GoogleRe2(GoogleRe2::default())),
        })),
        // Refused by the table of honoured fields.
        Some(MatchPattern::Custom(_)) | None => None,
    };
    matcher::string(&EnvoyString { match_pattern: pattern, ignore_case: value.ignore_case }, path)
}

#[cfg(test)]
#[path = "match_tree_tests.rs"]
mod tests;

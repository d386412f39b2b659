//! The matcher that finds the policy of a response: `xds.type.matcher.v3.Matcher`, of what can be told of a response and its request.

use std::{borrow::Cow, collections::HashMap};

use culvert_xds_client::json::unpack;
use envoy_types::pb::{
    envoy::r#type::matcher::v3::{
        HttpRequestHeaderMatchInput, HttpResponseHeaderMatchInput, HttpResponseLocalReplyMatchInput,
        HttpResponseStatusCodeClassMatchInput, HttpResponseStatusCodeMatchInput, RegexMatcher,
        StringMatcher as EnvoyString,
        regex_matcher::{EngineType, GoogleRe2},
        string_matcher::MatchPattern as EnvoyPattern,
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
                    predicate::{MatchType, PredicateList, single_predicate::Matcher as SingleMatcher},
                },
                matcher_tree::{MatchMap, TreeType},
                on_match::OnMatch as OnMatchKind,
            },
            string_matcher::MatchPattern,
        },
    },
};
use http::{HeaderMap, HeaderName};
use prost::Name as _;

use crate::{
    config::{FieldError, model::StringMatcher, parse},
    http::{
        filters::type_name,
        stream::{RequestHead, ResponseHead},
    },
};

type Result<T> = std::result::Result<T, FieldError>;

/// How deep matchers may be in each other.
const MAX_DEPTH: usize = 32;

/// What is told of a response.
pub(super) struct Told<'a> {
    pub(super) response: &'a ResponseHead,
    /// It was made here.
    pub(super) local: bool,
    /// `None`: it was not kept.
    pub(super) request: Option<&'a RequestHead>,
}

/// A matcher whose actions are of type `A`.
#[derive(Debug)]
pub(super) struct Tree<A> {
    kind: Kind<A>,
    otherwise: Option<Box<OnMatch<A>>>,
}

#[derive(Debug)]
enum Kind<A> {
    /// The first that holds and comes to an action.
    List(Vec<(Predicate, OnMatch<A>)>),
    Exact(Input, HashMap<String, OnMatch<A>>),
    /// The longest first.
    Prefixes(Input, Vec<(String, OnMatch<A>)>),
    /// Nothing matches.
    None,
}

#[derive(Debug)]
enum OnMatch<A> {
    Action(A),
    Tree(Box<Tree<A>>),
}

#[derive(Debug)]
enum Predicate {
    Single(Input, StringMatcher),
    Any(Vec<Predicate>),
    All(Vec<Predicate>),
    Not(Box<Predicate>),
}

/// What a value is taken from.
#[derive(Debug, Clone)]
enum Input {
    Status,
    /// `4xx`
    StatusClass,
    /// `true` or `false`
    LocalReply,
    ResponseHeader(HeaderName),
    RequestHeader(HeaderName),
}

impl Input {
    fn value<'a>(&self, told: &Told<'a>) -> Option<Cow<'a, str>> {
        match self {
            Input::Status => Some(told.response.status.as_str().to_owned().into()),
            Input::StatusClass => Some(format!("{}xx", told.response.status.as_u16() / 100).into()),
            Input::LocalReply => Some(if told.local { "true" } else { "false" }.into()),
            Input::ResponseHeader(name) => joined(&told.response.headers, name),
            Input::RequestHeader(name) => joined(&told.request?.headers, name),
        }
    }
}

/// All values of a header, with commas between them.
fn joined<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<Cow<'a, str>> {
    let mut values = headers.get_all(name).iter().map(|value| String::from_utf8_lossy(value.as_bytes()));
    let first = values.next()?;
    Some(values.fold(first, |all, value| all + "," + value))
}

impl Predicate {
    fn holds(&self, told: &Told<'_>) -> bool {
        match self {
            Predicate::Single(input, matcher) => input.value(told).is_some_and(|value| matcher.matches(&value)),
            Predicate::Any(all) => all.iter().any(|predicate| predicate.holds(told)),
            Predicate::All(all) => all.iter().all(|predicate| predicate.holds(told)),
            Predicate::Not(predicate) => !predicate.holds(told),
        }
    }
}

impl<A> Tree<A> {
    /// The action for this response.
    pub(super) fn find(&self, told: &Told<'_>) -> Option<&A> {
        let found = match &self.kind {
            Kind::List(list) => {
                list.iter().filter(|(predicate, _)| predicate.holds(told)).find_map(|(_, on)| on.find(told))
            }
            Kind::Exact(input, map) => input.value(told).and_then(|value| map.get(&*value)?.find(told)),
            Kind::Prefixes(input, prefixes) => input.value(told).and_then(|value| {
                prefixes.iter().filter(|(prefix, _)| value.starts_with(prefix)).find_map(|(_, on)| on.find(told))
            }),
            Kind::None => None,
        };
        found.or_else(|| self.otherwise.as_ref()?.find(told))
    }
}

impl<A> OnMatch<A> {
    fn find(&self, told: &Told<'_>) -> Option<&A> {
        match self {
            OnMatch::Action(action) => Some(action),
            OnMatch::Tree(tree) => tree.find(told),
        }
    }
}

/// Reads a matcher, whose actions `action` reads.
pub(super) fn tree<A>(
    matcher: Option<&Matcher>,
    path: &str,
    action: &mut dyn FnMut(&Any, &str) -> Result<A>,
) -> Result<Tree<A>> {
    match matcher {
        Some(matcher) => Parser { action, depth: 0 }.tree(matcher, path),
        None => Ok(Tree { kind: Kind::None, otherwise: None }),
    }
}

struct Parser<'p, A> {
    action: &'p mut dyn FnMut(&Any, &str) -> Result<A>,
    depth: usize,
}

impl<A> Parser<'_, A> {
    fn tree(&mut self, matcher: &Matcher, path: &str) -> Result<Tree<A>> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(FieldError::new(path, "is nested too deeply"));
        }
        let kind = match &matcher.matcher_type {
            None => Kind::None,
            Some(MatcherType::MatcherList(list)) => {
                let path = format!("{path}.matcher_list.matchers");
                let mut all = Vec::with_capacity(list.matchers.len());
                for (index, matcher) in list.matchers.iter().enumerate() {
                    let path = format!("{path}[{index}]");
                    let predicate = matcher.predicate.as_ref().ok_or_else(|| missing(&path, "predicate"))?;
                    let on_match = matcher.on_match.as_ref().ok_or_else(|| missing(&path, "on_match"))?;
                    let predicate = predicate_of(predicate, &format!("{path}.predicate"), 0)?;
                    all.push((predicate, self.on_match(on_match, &format!("{path}.on_match"))?));
                }
                Kind::List(all)
            }
            Some(MatcherType::MatcherTree(tree)) => {
                let path = format!("{path}.matcher_tree");
                let input = input(tree.input.as_ref(), &format!("{path}.input"))?;
                match &tree.tree_type {
                    Some(TreeType::ExactMatchMap(map)) => {
                        let entries = self.entries(map, &format!("{path}.exact_match_map"))?;
                        Kind::Exact(input, entries.into_iter().collect())
                    }
                    Some(TreeType::PrefixMatchMap(map)) => {
                        let mut entries = self.entries(map, &format!("{path}.prefix_match_map"))?;
                        entries.sort_by_key(|(prefix, _)| std::cmp::Reverse(prefix.len()));
                        Kind::Prefixes(input, entries)
                    }
                    // custom_match is refused by the table of honoured fields.
                    Some(TreeType::CustomMatch(_)) | None => return Err(missing(&path, "exact_match_map")),
                }
            }
        };
        let otherwise = matcher.on_no_match.as_deref();
        let otherwise =
            otherwise.map(|on| self.on_match(on, &format!("{path}.on_no_match")).map(Box::new)).transpose()?;
        self.depth -= 1;
        Ok(Tree { kind, otherwise })
    }

    fn entries(&mut self, map: &MatchMap, path: &str) -> Result<Vec<(String, OnMatch<A>)>> {
        let entry =
            |(key, on): (&String, &ProtoOnMatch)| Ok((key.clone(), self.on_match(on, &format!("{path}.map[{key}]"))?));
        map.map.iter().map(entry).collect()
    }

    fn on_match(&mut self, on: &ProtoOnMatch, path: &str) -> Result<OnMatch<A>> {
        Ok(match &on.on_match {
            Some(OnMatchKind::Matcher(matcher)) => {
                OnMatch::Tree(Box::new(self.tree(matcher, &format!("{path}.matcher"))?))
            }
            Some(OnMatchKind::Action(action)) => {
                let path = format!("{path}.action.typed_config");
                OnMatch::Action((self.action)(action.typed_config.as_ref().unwrap_or(&Any::default()), &path)?)
            }
            None => return Err(missing(path, "action")),
        })
    }
}

fn missing(path: &str, field: &str) -> FieldError {
    FieldError::new(format!("{path}.{field}"), "is needed")
}

fn predicate_of(predicate: &ProtoPredicate, path: &str, depth: usize) -> Result<Predicate> {
    if depth > MAX_DEPTH {
        return Err(FieldError::new(path, "is nested too deeply"));
    }
    let list = |list: &PredicateList, field: &str| {
        let path = format!("{path}.{field}.predicate");
        if list.predicate.len() < 2 {
            return Err(FieldError::new(path, "must have at least two"));
        }
        let all = list.predicate.iter().enumerate();
        all.map(|(index, item)| predicate_of(item, &format!("{path}[{index}]"), depth + 1)).collect::<Result<_>>()
    };
    Ok(match &predicate.match_type {
        Some(MatchType::SinglePredicate(single)) => {
            let path = format!("{path}.single_predicate");
            let Some(SingleMatcher::ValueMatch(value)) = &single.matcher else {
                return Err(missing(&path, "value_match"));
            };
            let matcher = string(value, &format!("{path}.value_match"))?;
            Predicate::Single(input(single.input.as_ref(), &format!("{path}.input"))?, matcher)
        }
        Some(MatchType::OrMatcher(any)) => Predicate::Any(list(any, "or_matcher")?),
        Some(MatchType::AndMatcher(all)) => Predicate::All(list(all, "and_matcher")?),
        Some(MatchType::NotMatcher(not)) => {
            Predicate::Not(Box::new(predicate_of(not, &format!("{path}.not_matcher"), depth + 1)?))
        }
        None => return Err(missing(path, "single_predicate")),
    })
}

/// The same matcher in Envoy's own type.
fn string(matcher: &ProtoString, path: &str) -> Result<StringMatcher> {
    let pattern = match &matcher.match_pattern {
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
    parse::matcher::string(&EnvoyString { match_pattern: pattern, ignore_case: matcher.ignore_case }, path)
}

fn input(config: Option<&TypedExtensionConfig>, path: &str) -> Result<Input> {
    let nothing = Any::default();
    let config = config.and_then(|config| config.typed_config.as_ref()).unwrap_or(&nothing);
    let path = format!("{path}.typed_config");
    let header =
        |name: String| name.parse().map_err(|_| FieldError::new(format!("{path}.header_name"), "is not a header name"));
    let wanted = type_name(config);
    Ok(if wanted == HttpResponseStatusCodeMatchInput::full_name() {
        Input::Status
    } else if wanted == HttpResponseStatusCodeClassMatchInput::full_name() {
        Input::StatusClass
    } else if wanted == HttpResponseLocalReplyMatchInput::full_name() {
        Input::LocalReply
    } else if wanted == HttpResponseHeaderMatchInput::full_name() {
        let HttpResponseHeaderMatchInput { header_name } = unpack(config, &path)?;
        Input::ResponseHeader(header(header_name)?)
    } else if wanted == HttpRequestHeaderMatchInput::full_name() {
        let HttpRequestHeaderMatchInput { header_name } = unpack(config, &path)?;
        Input::RequestHeader(header(header_name)?)
    } else {
        return Err(FieldError::new(path, format!("input of type {wanted} is not supported by culvert here")));
    })
}

#[cfg(test)]
#[path = "matcher_tests.rs"]
mod tests;

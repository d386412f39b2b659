use culvert_xds_client::json::unpack;
use envoy_types::pb::{
    envoy::{
        config::core::v3::TypedExtensionConfig,
        config::route::v3::{
            CookieMatcher as ProtoCookie, HeaderMatcher as ProtoHeader, QueryParameterMatcher as ProtoQuery,
            RouteMatch as ProtoMatch, header_matcher::HeaderMatchSpecifier,
            query_parameter_matcher::QueryParameterMatchSpecifier, route_match::PathSpecifier,
        },
        extensions::path::r#match::uri_template::v3::UriTemplateMatchConfig,
        r#type::matcher::v3::{
            HttpRequestHeaderMatchInput, RegexMatchAndSubstitute, RegexMatcher, StringMatcher as ProtoString,
            string_matcher::MatchPattern,
        },
    },
    google::protobuf::Any,
};
use regex::Regex;

use super::{
    common::{Result, header_name, required, runtime_fraction, type_name},
    metadata_match::{filter_state, metadata},
    support::join,
    uri_template,
};
use crate::config::{
    FieldError,
    model::{
        CookieMatcher, HeaderMatcher, HeaderValueMatch, MatchedHeader, PathMatch, QueryParameterMatch,
        QueryParameterMatcher, RegexRewrite, RouteMatch, StringMatcher, StringPattern, SubstitutionPiece,
    },
};

/// The largest compiled expression, in bytes: one that needs more is refused.
const REGEX_LIMIT: usize = 1 << 20;

/// A `RouteMatch`, checked.
pub(crate) fn route_match(rule: &ProtoMatch, path: &str) -> Result<RouteMatch> {
    let path_match = match &rule.path_specifier {
        Some(PathSpecifier::Prefix(text)) => PathMatch::Prefix(text.as_str().into()),
        Some(PathSpecifier::Path(text)) => PathMatch::Path(text.as_str().into()),
        Some(PathSpecifier::SafeRegex(matcher)) => PathMatch::Regex(regex(matcher, &join(path, "safe_regex"))?),
        Some(PathSpecifier::ConnectMatcher(_)) => PathMatch::Connect,
        Some(PathSpecifier::PathSeparatedPrefix(text)) => PathMatch::PathSeparatedPrefix(text.as_str().into()),
        Some(PathSpecifier::PathMatchPolicy(policy)) => {
            PathMatch::Template(uri_template(policy, &join(path, "path_match_policy"))?)
        }
        None => return Err(required(path, "prefix")),
    };
    let cookies = rule.cookies.iter().enumerate();
    let cookies = cookies.map(|(index, item)| cookie(item, &format!("{}[{index}]", join(path, "cookies"))));
    let headers = rule.headers.iter().enumerate();
    let headers = headers.map(|(index, item)| header(item, &format!("{}[{index}]", join(path, "headers"))));
    let query = rule.query_parameters.iter().enumerate();
    let query = query.map(|(index, item)| parameter(item, &format!("{}[{index}]", join(path, "query_parameters"))));
    let state = rule.filter_state.iter().enumerate();
    let state = state.map(|(index, item)| filter_state(item, &format!("{}[{index}]", join(path, "filter_state"))));
    let told = rule.dynamic_metadata.iter().enumerate();
    let told = told.map(|(index, item)| metadata(item, &format!("{}[{index}]", join(path, "dynamic_metadata"))));
    Ok(RouteMatch {
        path: path_match,
        case_sensitive: rule.case_sensitive.is_none_or(|value| value.value),
        headers: headers.collect::<Result<_>>()?,
        query_parameters: query.collect::<Result<_>>()?,
        grpc: rule.grpc.is_some(),
        runtime_fraction: rule.runtime_fraction.as_ref().map(runtime_fraction),
        cookies: cookies.collect::<Result<_>>()?,
        certificate_presented: rule.tls_context.and_then(|tls| Some(tls.presented?.value)),
        certificate_validated: rule.tls_context.and_then(|tls| Some(tls.validated?.value)),
        dynamic_metadata: told.collect::<Result<_>>()?,
        filter_state: state.collect::<Result<_>>()?,
    })
}

/// A URI template as an extension has it: the expression that it stands for.
pub(crate) fn uri_template(policy: &TypedExtensionConfig, path: &str) -> Result<Regex> {
    let config = policy.typed_config.as_ref().ok_or_else(|| required(path, "typed_config"))?;
    let path = join(path, "typed_config");
    let config: UriTemplateMatchConfig = unpack(config, &path)?;
    uri_template::matcher(&config.path_template, &join(&path, "path_template"))
}

/// A `HeaderMatcher`, checked.
#[expect(deprecated, reason = "the fields that string_match replaced, which Envoy still takes")]
pub(crate) fn header(matcher: &ProtoHeader, path: &str) -> Result<HeaderMatcher> {
    use HeaderMatchSpecifier::{
        ContainsMatch, ExactMatch, PrefixMatch, PresentMatch, RangeMatch, SafeRegexMatch, StringMatch, SuffixMatch,
    };
    let name = matched_header(&matcher.name, &join(path, "name"))?;
    let plain = |pattern: StringPattern| HeaderValueMatch::String(StringMatcher { pattern, ignore_case: false });
    let value = match &matcher.header_match_specifier {
        None => HeaderValueMatch::Present(true),
        Some(PresentMatch(present)) => HeaderValueMatch::Present(*present),
        Some(RangeMatch(range)) => HeaderValueMatch::Range { start: range.start, end: range.end },
        Some(StringMatch(matcher)) => HeaderValueMatch::String(string(matcher, &join(path, "string_match"))?),
        Some(ExactMatch(text)) => plain(StringPattern::Exact(text.as_str().into())),
        Some(PrefixMatch(text)) => plain(StringPattern::Prefix(text.as_str().into())),
        Some(SuffixMatch(text)) => plain(StringPattern::Suffix(text.as_str().into())),
        Some(ContainsMatch(text)) => plain(StringPattern::Contains(text.as_str().into())),
        Some(SafeRegexMatch(matcher)) => plain(StringPattern::Regex(regex(matcher, &join(path, "safe_regex_match"))?)),
    };
    Ok(HeaderMatcher {
        name,
        value,
        invert_match: matcher.invert_match,
        treat_missing_header_as_empty: matcher.treat_missing_header_as_empty,
    })
}

/// The header of this name.
pub(crate) fn matched_header(name: &str, path: &str) -> Result<MatchedHeader> {
    Ok(match name {
        ":method" => MatchedHeader::Method,
        ":path" => MatchedHeader::Path,
        // Envoy keeps the host in `:authority`, whatever the protocol, and finds it under both names.
        ":authority" | "host" => MatchedHeader::Authority,
        ":scheme" => MatchedHeader::Scheme,
        name => MatchedHeader::Name(header_name(name, path)?),
    })
}

/// The header that an `HttpRequestHeaderMatchInput` names.
pub(crate) fn request_header_input(config: &Any, path: &str) -> Result<MatchedHeader> {
    let HttpRequestHeaderMatchInput { header_name } = unpack(config, path)?;
    matched_header(&header_name.to_ascii_lowercase(), &join(path, "header_name"))
}

/// An action of a matcher that is of none of the types that the matcher takes.
pub(crate) fn unknown_action(config: &Any, path: &str) -> FieldError {
    let name = type_name(config);
    FieldError::new(path, format!("Didn't find a registered implementation for an action of type {name}"))
}

pub(super) fn parameter(matcher: &ProtoQuery, path: &str) -> Result<QueryParameterMatcher> {
    let value = match &matcher.query_parameter_match_specifier {
        Some(QueryParameterMatchSpecifier::StringMatch(matcher)) => {
            QueryParameterMatch::String(string(matcher, &join(path, "string_match"))?)
        }
        Some(QueryParameterMatchSpecifier::PresentMatch(present)) => QueryParameterMatch::Present(*present),
        None => QueryParameterMatch::Present(true),
    };
    Ok(QueryParameterMatcher { name: matcher.name.clone(), value })
}

fn cookie(matcher: &ProtoCookie, path: &str) -> Result<CookieMatcher> {
    let value = matcher.string_match.as_ref().ok_or_else(|| required(path, "string_match"))?;
    let value = string(value, &join(path, "string_match"))?;
    Ok(CookieMatcher { name: matcher.name.clone(), value, invert_match: matcher.invert_match })
}

/// A `StringMatcher`, checked.
pub(crate) fn string(matcher: &ProtoString, path: &str) -> Result<StringMatcher> {
    let ignore_case = matcher.ignore_case;
    // The text is compared in lower case then.
    let text = |text: &String| if ignore_case { text.to_ascii_lowercase() } else { text.clone() }.into_boxed_str();
    let pattern = match &matcher.match_pattern {
        Some(MatchPattern::Exact(exact)) => StringPattern::Exact(text(exact)),
        Some(MatchPattern::Prefix(prefix)) => StringPattern::Prefix(text(prefix)),
        Some(MatchPattern::Suffix(suffix)) => StringPattern::Suffix(text(suffix)),
        Some(MatchPattern::Contains(part)) => StringPattern::Contains(text(part)),
        Some(MatchPattern::SafeRegex(_)) if ignore_case => {
            return Err(FieldError::new(join(path, "ignore_case"), "has no effect for safe_regex"));
        }
        Some(MatchPattern::SafeRegex(matcher)) => StringPattern::Regex(regex(matcher, &join(path, "safe_regex"))?),
        Some(MatchPattern::Custom(_)) => return Err(FieldError::unsupported(join(path, "custom"))),
        None => return Err(required(path, "exact")),
    };
    Ok(StringMatcher { pattern, ignore_case })
}

/// An expression that must match the whole text. Matching takes time linear in the text's length.
pub(crate) fn regex(matcher: &RegexMatcher, path: &str) -> Result<Regex> {
    compile(&format!("^(?:{})$", matcher.regex), matcher, path)
}

/// What of a text is replaced by what.
pub(crate) fn regex_rewrite(rewrite: &RegexMatchAndSubstitute, path: &str) -> Result<RegexRewrite> {
    let matcher = rewrite.pattern.as_ref().ok_or_else(|| required(path, "pattern"))?;
    let pattern = compile(&matcher.regex, matcher, &join(path, "pattern"))?;
    let refuse = |text: String| FieldError::new(join(path, "substitution"), text);
    let mut substitution = Vec::new();
    let mut literal = String::new();
    let mut rest = rewrite.substitution.chars();
    while let Some(next) = rest.next() {
        match (next, if next == '\\' { rest.next() } else { None }) {
            ('\\', Some('\\')) => literal.push('\\'),
            ('\\', Some(digit)) if digit.is_ascii_digit() => {
                let number = digit as usize - '0' as usize;
                if number >= pattern.captures_len() {
                    let most = pattern.captures_len() - 1;
                    return Err(refuse(format!(
                        "Substitution '{}' references group {number}, but {:?} has only {most}",
                        rewrite.substitution, matcher.regex
                    )));
                }
                if !literal.is_empty() {
                    substitution.push(SubstitutionPiece::Literal(std::mem::take(&mut literal).into()));
                }
                substitution.push(SubstitutionPiece::Group(number));
            }
            ('\\', _) => {
                let text = "a backslash must be followed by a digit or a backslash";
                return Err(refuse(format!("{:?}: {text}", rewrite.substitution)));
            }
            (other, _) => literal.push(other),
        }
    }
    if !literal.is_empty() {
        substitution.push(SubstitutionPiece::Literal(literal.into()));
    }
    Ok(RegexRewrite { pattern, substitution })
}

fn compile(expression: &str, matcher: &RegexMatcher, path: &str) -> Result<Regex> {
    let built = regex::RegexBuilder::new(expression).size_limit(REGEX_LIMIT).build();
    built.map_err(|error| {
        let text = error.to_string();
        // The crate draws the expression over several lines: the last one says what is wrong.
        let reason = text.lines().last().unwrap_or_default().trim_start_matches("error: ").to_owned();
        FieldError::new(join(path, "regex"), format!("{:?}: {reason}", matcher.regex))
    })
}

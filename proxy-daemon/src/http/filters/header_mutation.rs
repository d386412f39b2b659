//! `envoy.filters.http.header_mutation`: changes the headers of requests and of responses.

use std::sync::Arc;

use culvert_xds_client::json::unpack;
use envoy_types::pb::{
    envoy::{
        config::common::mutation_rules::v3::{HeaderMutation as ProtoMutation, header_mutation::Action},
        extensions::filters::http::header_mutation::v3::{
            HeaderMutation, HeaderMutationPerRoute, Mutations as ProtoMutations,
        },
    },
    google::protobuf::Any,
};
use http::{HeaderMap, HeaderName, header::HOST};

use super::{FilterCx, Flow, HttpFilter, HttpFilterFactory, PerRoute, PerRouteConfig};
use crate::{
    access_log::Record,
    config::{
        FieldError,
        model::{AddedValue, HeaderMutations, StringMatcher},
        parse,
    },
    http::{
        body::Body,
        headers::{mutate_request, mutate_response},
        stream::{RequestHead, ResponseHead, StreamCx},
    },
};

#[derive(Debug)]
struct HeaderMutationFactory {
    own: Arc<Mutations>,
    most_specific_wins: bool,
}

/// What one level asks for. Streams hold on to it.
#[derive(Debug, Default)]
struct Mutations {
    request: Vec<Mutation>,
    response: Vec<Mutation>,
    /// A response's header is made by a format, which may show the request's.
    shows_request: bool,
}

/// What becomes of requests' headers before their routes are chosen: `early_header_mutation_extensions`.
#[derive(Debug, Clone, Default)]
pub struct EarlyMutations(Arc<[Mutation]>);

impl EarlyMutations {
    /// Reads one extension's; `path` is that of its configuration.
    pub(crate) fn parse(items: &[ProtoMutation], path: &str) -> Result<EarlyMutations, FieldError> {
        let parse = |(index, item)| mutation(item, &format!("{path}.mutations[{index}]"));
        Ok(EarlyMutations(items.iter().enumerate().map(parse).collect::<Result<_, FieldError>>()?))
    }

    /// Changes a request that nobody has looked at yet. `record` is what can be told of it.
    pub(crate) fn apply(&self, headers: &mut HeaderMap, record: &Record<'_>) {
        mutate(headers, &self.0, record, mutate_request);
    }
}

#[derive(Debug)]
enum Mutation {
    Remove(HeaderName),
    RemoveOnMatch(StringMatcher),
    Append(HeaderMutations),
}

/// One stream's filter, where responses are changed: in this order.
#[derive(Debug)]
struct HeaderMutationFilter(Vec<Arc<Mutations>>);

type Append = fn(&mut HeaderMap, &HeaderMutations, &Record<'_>);

fn mutate(headers: &mut HeaderMap, mutations: &[Mutation], record: &Record<'_>, append: Append) {
    for mutation in mutations {
        match mutation {
            Mutation::Remove(name) => drop(headers.remove(name)),
            Mutation::RemoveOnMatch(matcher) => {
                let names = headers.keys().filter(|name| **name != HOST && matcher.matches(name.as_str()));
                let names: Vec<_> = names.cloned().collect();
                names.iter().for_each(|name| drop(headers.remove(name)));
            }
            Mutation::Append(header) => append(headers, header, record),
        }
    }
}

impl HeaderMutationFactory {
    /// The filter's own, then those of the levels, of which the last wins.
    fn in_order<'a>(&'a self, route: PerRoute<'a>, mut each: impl FnMut(&'a Arc<Mutations>)) {
        each(&self.own);
        if self.most_specific_wins {
            route.all().for_each(each);
        } else {
            route.all().rev().for_each(each);
        }
    }
}

impl HttpFilterFactory for HeaderMutationFactory {
    fn stream(&self, route: PerRoute<'_>) -> Option<Box<dyn HttpFilter>> {
        let mut changing = Vec::new();
        self.in_order(route, |mutations| {
            if !mutations.response.is_empty() {
                changing.push(Arc::clone(mutations));
            }
        });
        (!changing.is_empty()).then(|| Box::new(HeaderMutationFilter(changing)) as _)
    }

    fn request(
        &self,
        head: &mut RequestHead,
        _body: &mut Body,
        cx: &mut StreamCx,
        route: PerRoute<'_>,
        instances: &mut Vec<Box<dyn HttpFilter>>,
    ) -> Flow {
        self.in_order(route, |mutations| {
            cx.keeps_request |= mutations.shows_request;
            if !mutations.request.is_empty() {
                cx.format_request(head, |headers, record| mutate(headers, &mutations.request, record, mutate_request));
            }
        });
        instances.extend(self.stream(route));
        Flow::Continue
    }
}

impl HttpFilter for HeaderMutationFilter {
    fn response(&mut self, head: &mut ResponseHead, _body: &mut Body, cx: &mut StreamCx) -> Flow {
        let status = head.status;
        cx.format_response(status, &mut head.headers, None, |headers, record| {
            for mutations in &self.0 {
                mutate(headers, &mutations.response, record, mutate_response);
            }
        });
        Flow::Continue
    }
}

pub(super) fn parse(typed_config: &Any, cx: &FilterCx<'_>) -> Result<Arc<dyn HttpFilterFactory>, FieldError> {
    let HeaderMutation { mutations, most_specific_header_mutations_wins } = unpack(typed_config, cx.path)?;
    let own = Arc::new(self::mutations(mutations.unwrap_or_default(), cx.path)?);
    Ok(Arc::new(HeaderMutationFactory { own, most_specific_wins: most_specific_header_mutations_wins }))
}

pub(super) fn parse_per_route(config: &Any, path: &str) -> Result<PerRouteConfig, FieldError> {
    let HeaderMutationPerRoute { mutations } = unpack(config, path)?;
    Ok(Arc::new(Arc::new(self::mutations(mutations.unwrap_or_default(), path)?)))
}

fn mutations(mutations: ProtoMutations, path: &str) -> Result<Mutations, FieldError> {
    let ProtoMutations {
        request_mutations,
        response_mutations,
        // Refused by the table of honoured fields.
        query_parameter_mutations: _,
        response_trailers_mutations: _,
        request_trailers_mutations: _,
    } = mutations;
    let each = |items: &[ProtoMutation], field: &str| {
        let parse = |(index, item)| mutation(item, &format!("{path}.mutations.{field}[{index}]"));
        items.iter().enumerate().map(parse).collect::<Result<Vec<_>, FieldError>>()
    };
    let request = each(&request_mutations, "request_mutations")?;
    let response = each(&response_mutations, "response_mutations")?;
    let shows_request = response.iter().any(|mutation| match mutation {
        Mutation::Append(header) => {
            let mut added = header.request_add.iter().chain(&header.response_add);
            added.any(|add| matches!(add.value, AddedValue::Format(_)))
        }
        Mutation::Remove(_) | Mutation::RemoveOnMatch(_) => false,
    });
    Ok(Mutations { request, response, shows_request })
}

fn mutation(mutation: &ProtoMutation, path: &str) -> Result<Mutation, FieldError> {
    match &mutation.action {
        Some(Action::Remove(name)) => {
            if name.starts_with(':') || name.eq_ignore_ascii_case("host") {
                return Err(FieldError::new(format!("{path}.remove"), ":-prefixed or host headers may not be removed"));
            }
            let bad = |_| FieldError::new(format!("{path}.remove"), format!("{name:?} is not a header name"));
            HeaderName::try_from(name.as_str()).map(Mutation::Remove).map_err(bad)
        }
        Some(Action::Append(header)) => {
            let add = parse::headers_to_add(std::slice::from_ref(header), path, "append")?;
            // One of the two is looked at, by the direction.
            let header = HeaderMutations { request_add: add.clone(), response_add: add, ..HeaderMutations::default() };
            Ok(Mutation::Append(header))
        }
        Some(Action::RemoveOnMatch(remove)) => {
            let path = format!("{path}.remove_on_match.key_matcher");
            let matcher = remove.key_matcher.as_ref();
            let matcher = matcher.ok_or_else(|| FieldError::new(&path, "value is required"))?;
            Ok(Mutation::RemoveOnMatch(parse::matcher::string(matcher, &path)?))
        }
        None => Err(FieldError::new(format!("{path}.action"), "value is required")),
    }
}

//! `envoy.filters.http.header_mutation`: changes the headers of requests and of responses.

use std::{
    collections::BTreeMap,
    pin::Pin,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use culvert_xds_client::json::unpack;
use envoy_types::pb::{
    envoy::{
        config::{
            common::mutation_rules::v3::{HeaderMutation as ProtoMutation, header_mutation::Action},
            core::v3::{KeyValueMutation, key_value_append::KeyValueAppendAction},
        },
        extensions::filters::http::header_mutation::v3::{
            HeaderMutation, HeaderMutationPerRoute, Mutations as ProtoMutations,
        },
    },
    google::protobuf::{Any, value::Kind},
};
use http::{HeaderMap, HeaderName, header::HOST};
use http_body::{Body as _, Frame, SizeHint};

use super::{
    FilterCx, Flow, HttpFilter, HttpFilterFactory, PerRoute, PerRouteConfig,
    shared::{Kept, Shared},
};
use crate::{
    access_log::{Headers, Record},
    config::{
        FieldError,
        model::{AddedValue, HeaderMutations, StringMatcher},
        parse,
    },
    http::{
        body::{Body, BodyError, WrappedBody},
        headers::{mutate_request, mutate_response},
        path::{decode, encode, is_unreserved, set_path},
        stream::{Progress, RequestHead, ResponseHead, StreamCx},
    },
};

#[derive(Debug)]
struct HeaderMutationFactory {
    own: Shared<Mutations>,
    most_specific_wins: bool,
}

/// What one level asks for. Streams hold on to it.
#[derive(Debug, Default)]
struct Mutations {
    request: Vec<Mutation>,
    response: Vec<Mutation>,
    query: Vec<QueryMutation>,
    request_trailers: Vec<Mutation>,
    response_trailers: Vec<Mutation>,
    /// A response's header is made by a format, which may show the request's.
    shows_request: bool,
}

/// What becomes of requests' headers before their routes are chosen: `early_header_mutation_extensions`.
#[derive(Debug, Clone, Default)]
pub struct EarlyMutations(Arc<[Mutation]>);

impl EarlyMutations {
    /// Reads a list of them; `path` is that of the list.
    pub(crate) fn parse(items: &[ProtoMutation], path: &str) -> Result<EarlyMutations, FieldError> {
        let parse = |(index, item)| mutation(item, &format!("{path}[{index}]"));
        Ok(EarlyMutations(items.iter().enumerate().map(parse).collect::<Result<_, FieldError>>()?))
    }

    /// Whether there are none.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
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

impl Mutation {
    fn is_format(&self) -> bool {
        match self {
            Mutation::Append(header) => header.request_add.iter().any(|add| matches!(add.value, AddedValue::Format(_))),
            Mutation::Remove(_) | Mutation::RemoveOnMatch(_) => false,
        }
    }
}

/// A query's parameters as they are written, by their names without the escapes.
type Query = BTreeMap<Vec<u8>, Vec<String>>;

/// What becomes of a query's parameter of this name.
#[derive(Debug)]
struct QueryMutation {
    name: Box<str>,
    /// What is added to it, and how; `None`: it is taken away.
    append: Option<(AddedValue, KeyValueAppendAction)>,
}

impl QueryMutation {
    fn parse(mutation: &KeyValueMutation, path: &str) -> Result<QueryMutation, FieldError> {
        let append = match (&mutation.append, mutation.remove.as_str()) {
            (None, "") => return Err(FieldError::new(path, "one of 'append' or 'remove' must be specified")),
            (Some(_), remove) if !remove.is_empty() => {
                return Err(FieldError::new(path, "only one of 'append' or 'remove can be specified"));
            }
            (None, remove) => return Ok(QueryMutation { name: remove.into(), append: None }),
            (Some(append), _) => append,
        };
        let path = format!("{path}.append");
        let Some(record) = &append.record else {
            return Err(FieldError::new(format!("{path}.record"), "no record is set"));
        };
        let path = format!("{path}.record.value");
        let Some(Kind::StringValue(value)) = record.value.as_ref().and_then(|value| value.kind.as_ref()) else {
            return Err(FieldError::new(path, "only string values are allowed"));
        };
        let value = parse::added_value(value, &path)?;
        // Others have been refused.
        let action = KeyValueAppendAction::try_from(append.action).unwrap_or(KeyValueAppendAction::AppendIfExistsOrAdd);
        Ok(QueryMutation { name: record.key.as_str().into(), append: Some((value, action)) })
    }

    fn apply(&self, query: &mut Query, record: &Record<'_>) {
        let Some((value, action)) = &self.append else {
            query.remove(self.name.as_bytes());
            return;
        };
        let value = match value {
            AddedValue::Literal(value) => encode(value.as_bytes(), is_unreserved),
            AddedValue::Format(format) => encode(&format.bytes(record), is_unreserved),
        };
        let pair = format!("{}={value}", encode(self.name.as_bytes(), is_unreserved));
        let name = self.name.as_bytes();
        let known = query.contains_key(name);
        match action {
            KeyValueAppendAction::AppendIfExistsOrAdd => query.entry(name.to_vec()).or_default().push(pair),
            KeyValueAppendAction::AddIfAbsent if known => {}
            KeyValueAppendAction::OverwriteIfExists if !known => {}
            _ => drop(query.insert(name.to_vec(), vec![pair])),
        }
    }
}

/// Whether it stands for itself in a name of a query.
fn is_plain(byte: u8) -> bool {
    byte.is_ascii_graphic() && !b"\"#%&<=>".contains(&byte)
}

/// Changes the query of a request: its parameters are in the order of their names then, as in Envoy.
fn mutate_query(head: &mut RequestHead, mutations: &[QueryMutation], cx: &StreamCx) {
    let mut query: Query = BTreeMap::new();
    for pair in head.uri.query().unwrap_or_default().split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let (name, value) = (decode(name), decode(value));
        // Only what would be something else without an escape has one again.
        let pair = format!("{}={}", encode(&name, is_plain), encode(&value, |byte| is_plain(byte) || byte == b'='));
        query.entry(name).or_default().push(pair);
    }
    cx.format_request(head, |headers, record| {
        let record = Record { request_headers: Some(Headers::All(headers)), ..*record };
        mutations.iter().for_each(|mutation| mutation.apply(&mut query, &record));
    });
    let pairs: Vec<String> = query.into_values().flatten().collect();
    let path = head.uri.path().to_owned();
    let text = if pairs.is_empty() { path } else { format!("{path}?{}", pairs.join("&")) };
    // What is no path stays as it was.
    let _ = set_path(head, &text);
}

/// One stream's filter, where responses are changed: in this order.
#[derive(Debug)]
struct HeaderMutationFilter(Vec<Kept<Mutations>>);

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

/// Changes a body's trailers, where it has some. `of_response`: it is the response's, and its stream is told.
fn mutate_trailers(body: &mut Body, mutations: Kept<Mutations>, of_response: Option<&Rc<Progress>>) {
    if !body.is_end_stream() {
        let of_response = of_response.map(Rc::clone);
        body.wrap(|body| WithTrailers { body, mutations, of_response });
    }
}

struct WithTrailers {
    body: Body,
    mutations: Kept<Mutations>,
    of_response: Option<Rc<Progress>>,
}

impl WrappedBody for WithTrailers {}

impl http_body::Body for WithTrailers {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let mut frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        if let Some(Ok(frame)) = &mut frame
            && let Some(trailers) = frame.trailers_mut()
        {
            let mutations = match &self.of_response {
                Some(_) => &self.mutations.response_trailers,
                None => &self.mutations.request_trailers,
            };
            mutate(trailers, mutations, &Record::default(), mutate_response);
            if let Some(progress) = &self.of_response {
                progress.trailers.replace(Some(Box::new(trailers.clone())));
            }
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl HeaderMutationFactory {
    /// The filter's own, then those of the levels, of which the last wins.
    fn in_order<'a>(&'a self, route: PerRoute<'a>, mut each: impl FnMut(&'a Shared<Mutations>)) {
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
            if !mutations.response.is_empty() || !mutations.response_trailers.is_empty() {
                changing.push(mutations.keep());
            }
        });
        (!changing.is_empty()).then(|| Box::new(HeaderMutationFilter(changing)) as _)
    }

    fn request(
        &self,
        head: &mut RequestHead,
        body: &mut Body,
        cx: &mut StreamCx,
        route: PerRoute<'_>,
        instances: &mut Vec<Box<dyn HttpFilter>>,
    ) -> Flow {
        self.in_order(route, |mutations| {
            cx.keeps_request |= mutations.shows_request;
            if !mutations.request.is_empty() {
                cx.format_request(head, |headers, record| mutate(headers, &mutations.request, record, mutate_request));
            }
            if !mutations.query.is_empty() {
                mutate_query(head, &mutations.query, cx);
            }
            if !mutations.request_trailers.is_empty() {
                mutate_trailers(body, mutations.keep(), None);
            }
        });
        instances.extend(self.stream(route));
        Flow::Continue
    }
}

impl HttpFilter for HeaderMutationFilter {
    fn response(&mut self, head: &mut ResponseHead, body: &mut Body, cx: &mut StreamCx) -> Flow {
        let status = head.status;
        cx.format_response(status, &mut head.headers, None, |headers, record| {
            for mutations in &self.0 {
                mutate(headers, &mutations.response, record, mutate_response);
            }
        });
        for mutations in self.0.iter().filter(|mutations| !mutations.response_trailers.is_empty()) {
            mutate_trailers(body, mutations.clone(), Some(&cx.progress));
        }
        Flow::Continue
    }
}

pub(super) fn parse(typed_config: &Any, cx: &FilterCx<'_>) -> Result<Arc<dyn HttpFilterFactory>, FieldError> {
    let HeaderMutation { mutations, most_specific_header_mutations_wins } = unpack(typed_config, cx.path)?;
    let own = Shared::new(self::mutations(mutations.unwrap_or_default(), cx.path)?);
    Ok(Arc::new(HeaderMutationFactory { own, most_specific_wins: most_specific_header_mutations_wins }))
}

pub(super) fn parse_per_route(config: &Any, path: &str) -> Result<PerRouteConfig, FieldError> {
    let HeaderMutationPerRoute { mutations } = unpack(config, path)?;
    Ok(Arc::new(Shared::new(self::mutations(mutations.unwrap_or_default(), path)?)))
}

fn mutations(mutations: ProtoMutations, path: &str) -> Result<Mutations, FieldError> {
    let ProtoMutations {
        request_mutations,
        response_mutations,
        query_parameter_mutations,
        response_trailers_mutations,
        request_trailers_mutations,
    } = mutations;
    let each = |items: &[ProtoMutation], field: &str| {
        let parse = |(index, item)| mutation(item, &format!("{path}.mutations.{field}[{index}]"));
        items.iter().enumerate().map(parse).collect::<Result<Vec<_>, FieldError>>()
    };
    let request = each(&request_mutations, "request_mutations")?;
    let response = each(&response_mutations, "response_mutations")?;
    let shows_request = response.iter().any(Mutation::is_format);
    let query = query_parameter_mutations.iter().enumerate().map(|(index, item)| {
        QueryMutation::parse(item, &format!("{path}.mutations.query_parameter_mutations[{index}]"))
    });
    let trailers = |items: &[ProtoMutation], field: &str| {
        let mutations = each(items, field)?;
        // What formats tell is not kept until trailers come.
        match mutations.iter().position(Mutation::is_format) {
            Some(index) => {
                Err(FieldError::unsupported(format!("{path}.mutations.{field}[{index}].append.header.value")))
            }
            None => Ok(mutations),
        }
    };
    Ok(Mutations {
        request,
        response,
        query: query.collect::<Result<_, _>>()?,
        request_trailers: trailers(&request_trailers_mutations, "request_trailers_mutations")?,
        response_trailers: trailers(&response_trailers_mutations, "response_trailers_mutations")?,
        shows_request,
    })
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

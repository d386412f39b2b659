//! Changes of headers that other services ask for. A request that would get what is no header name or value is refused (see `illegal`),
//! in responses it is passed over; and no message grows beyond what a header map holds.

use envoy_types::pb::envoy::config::core::v3::{
    HeaderValueOption, header_value_option::HeaderAppendAction as ProtoAction,
};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Uri, header::HOST};

use super::{headers::append, illegal, path::set_path, stream::RequestHead};

/// What is changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Place {
    /// A header field.
    Header(HeaderName),
    /// `:path`, with the query.
    Path,
    /// `:method`
    Method,
    /// `:authority`, or `host`.
    Authority,
    /// `:status`
    Status,
    /// No header has this name.
    Nowhere(Box<str>),
}

impl Place {
    /// The header's name, in lower case.
    pub(super) fn name(&self) -> &str {
        match self {
            Place::Header(name) => name.as_str(),
            Place::Path => ":path",
            Place::Method => ":method",
            Place::Authority => ":authority",
            Place::Status => ":status",
            Place::Nowhere(name) => name,
        }
    }
}

/// How.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    /// In the place of what is there.
    Set,
    /// A further value.
    Add,
    /// Joined to the value that is there with a comma, and nothing where there is none.
    Join,
    /// Only where there is none.
    AddIfAbsent,
    /// In the place of what is there, and nothing where there is none.
    Overwrite,
}

/// One change.
#[derive(Debug, Clone)]
pub(super) struct Change {
    pub(super) place: Place,
    pub(super) value: HeaderValue,
    pub(super) action: Action,
}

impl Change {
    /// What is no header is so yet: requests that it changes are refused, and all else stays as it is.
    pub(super) fn new(name: &str, value: &[u8], action: Action) -> Change {
        let place = place(name).unwrap_or_else(|| Place::Nowhere(name.to_ascii_lowercase().into()));
        let value = HeaderValue::from_bytes(value).unwrap_or_else(|_| illegal::value());
        Change { place, value, action }
    }

    /// Whether it is of a header that there can be.
    pub(super) fn is_legal(&self) -> bool {
        !matches!(self.place, Place::Nowhere(_)) && !illegal::is_value(&self.value)
    }

    /// As a `HeaderValueOption` asks for it; `joins`: what `append`, the old field, stands for.
    pub(super) fn from_option(option: &HeaderValueOption, joins: Action) -> Option<Change> {
        let header = option.header.as_ref()?;
        #[expect(deprecated, reason = "the field that append_action replaced, which services still send")]
        let action = match (option.append, ProtoAction::try_from(option.append_action)) {
            (Some(append), _) if append.value => joins,
            (Some(_), _) | (None, Ok(ProtoAction::OverwriteIfExistsOrAdd) | Err(_)) => Action::Set,
            (None, Ok(ProtoAction::AppendIfExistsOrAdd)) => Action::Add,
            (None, Ok(ProtoAction::AddIfAbsent)) => Action::AddIfAbsent,
            (None, Ok(ProtoAction::OverwriteIfExists)) => Action::Overwrite,
        };
        let value = if header.raw_value.is_empty() { header.value.as_bytes() } else { &header.raw_value };
        Some(Change::new(&header.key, value, action))
    }

    /// Changes a request.
    pub(super) fn apply_to_request(&self, head: &mut RequestHead) {
        match &self.place {
            Place::Header(name) => self.apply(name, &mut head.headers),
            Place::Status => {}
            Place::Nowhere(name) => {
                if matches!(self.action, Action::Set | Action::Add | Action::AddIfAbsent) {
                    illegal::name(head, name);
                }
            }
            // There is always one.
            _ if !matches!(self.action, Action::Set | Action::Overwrite) => {}
            Place::Path if illegal::is_value(&self.value) => illegal::pseudo(head, ":path"),
            Place::Method if illegal::is_value(&self.value) => illegal::pseudo(head, ":method"),
            Place::Path => {
                if let Ok(path) = self.value.to_str() {
                    // Too long a path is none.
                    let _ = set_path(head, path);
                }
            }
            Place::Method => {
                if let Ok(method) = Method::from_bytes(self.value.as_bytes()) {
                    head.method = method;
                }
            }
            Place::Authority => {
                if head.uri.authority().is_some() {
                    head.uri = head.uri.path_and_query().map_or_else(Uri::default, |path| Uri::from(path.clone()));
                }
                head.headers.insert(HOST, self.value.clone());
            }
        }
    }

    /// Changes the headers of a response, or trailers.
    pub(super) fn apply_to_fields(&self, headers: &mut HeaderMap) {
        if let Place::Header(name) = &self.place
            && self.is_legal()
        {
            self.apply(name, headers);
        }
    }

    fn apply(&self, name: &HeaderName, headers: &mut HeaderMap) {
        let value = self.value.clone();
        let there = headers.contains_key(name);
        // A map that is full stays as it is.
        match self.action {
            Action::Set => drop(headers.try_insert(name, value)),
            Action::Overwrite if there => drop(headers.try_insert(name, value)),
            Action::Join if there => append(headers, name.clone(), &value, ","),
            Action::Add => drop(headers.try_append(name, value)),
            Action::AddIfAbsent if !there => drop(headers.try_append(name, value)),
            Action::Overwrite | Action::Join | Action::AddIfAbsent => {}
        }
    }
}

/// `None` for what is no header's name.
pub(super) fn place(name: &str) -> Option<Place> {
    let name = name.to_ascii_lowercase();
    Some(match name.as_str() {
        ":path" => Place::Path,
        ":method" => Place::Method,
        ":authority" | "host" => Place::Authority,
        ":status" => Place::Status,
        name => Place::Header(HeaderName::try_from(name).ok()?),
    })
}

/// A map as the list that a [`LocalReply`](super::stream::LocalReply) has.
pub(super) fn list(headers: HeaderMap) -> Vec<(HeaderName, HeaderValue)> {
    let mut last = None;
    // A further value of a header comes without its name.
    let named = headers.into_iter().filter_map(|(name, value)| {
        last = name.or_else(|| last.clone());
        Some((last.clone()?, value))
    });
    named.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn applied(before: &[(&'static str, &'static str)], action: Action) -> Vec<String> {
        let pair = |(name, value): &(&'static str, &'static str)| {
            (HeaderName::from_static(name), HeaderValue::from_static(value))
        };
        let mut headers = HeaderMap::from_iter(before.iter().map(pair));
        Change::new("X-A", b"new", action).apply_to_fields(&mut headers);
        headers.get_all("x-a").iter().map(|value| value.to_str().unwrap().to_owned()).collect()
    }

    #[test]
    fn headers_are_changed() {
        let (none, one): (&[_], &[_]) = (&[], &[("x-a", "old")]);
        assert_eq!(applied(none, Action::Set), ["new"]);
        assert_eq!(applied(one, Action::Set), ["new"]);
        assert_eq!(applied(one, Action::Add), ["old", "new"]);
        assert_eq!(applied(none, Action::Join), [""; 0]);
        assert_eq!(applied(one, Action::Join), ["old,new"]);
        assert_eq!(applied(one, Action::AddIfAbsent), ["old"]);
        assert_eq!(applied(none, Action::AddIfAbsent), ["new"]);
        assert_eq!(applied(none, Action::Overwrite), [""; 0]);
        assert_eq!(applied(one, Action::Overwrite), ["new"]);
        assert!(!Change::new("a b", b"", Action::Set).is_legal());
        assert!(!Change::new("a", b"\n", Action::Set).is_legal());
    }

    #[test]
    fn requests_are_changed_where_they_go() {
        let (mut head, ()) = http::Request::new(()).into_parts();
        head.uri = Uri::from_static("http://a.test/x?y");
        for (name, value) in [(":path", "/z"), ("host", "b.test"), (":method", "PUT"), (":status", "1")] {
            Change::new(name, value.as_bytes(), Action::Set).apply_to_request(&mut head);
        }
        assert_eq!((head.uri.to_string(), head.method.as_str()), ("/z".to_owned(), "PUT"));
        assert_eq!(head.headers[HOST], "b.test");
    }
}

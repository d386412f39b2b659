//! What an authorisation service says, and what comes of it.

use bytes::Bytes;
use envoy_types::pb::{
    envoy::{
        config::core::v3::HeaderValueOption,
        service::auth::v3::{CheckResponse, DeniedHttpResponse, check_response::HttpResponse},
    },
    google::protobuf::Struct,
};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header::HOST};

use super::super::ext_proc::rules::{Rules, is_value};
use crate::http::{
    changes::{Action, Change, Place, place},
    path::set_path,
    redirect::scheme,
    route_match::authority,
    stream::{MaxHeaders, RequestHead},
};

/// The most changes that are carried out of one list of them.
const MAX_CHANGES: usize = 1000;

/// Whether a request may pass.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It may.
    Ok,
    /// It may not.
    Denied,
    /// The service could not say.
    #[default]
    Error,
}

/// What an authorisation service says.
#[derive(Debug, Default)]
pub(super) struct Verdict {
    pub(super) outcome: Outcome,
    /// Of the answer to a request that may not pass.
    pub(super) status: Option<StatusCode>,
    pub(super) body: Bytes,
    pub(super) reply: Vec<Change>,
    /// To the request.
    pub(super) request: Vec<Change>,
    pub(super) remove: Vec<HeaderName>,
    pub(super) query_set: Vec<(String, String)>,
    pub(super) query_remove: Vec<String>,
    /// To the response.
    pub(super) response: Vec<Change>,
    pub(super) metadata: Option<Struct>,
}

/// As Envoy carries them out: by `append_action` in responses; in requests and answers that stays without effect, and only `append`
/// says what happens.
fn changes(options: &[HeaderValueOption], change: impl Fn(&HeaderValueOption) -> Option<Change>) -> Vec<Change> {
    options.iter().take(MAX_CHANGES).filter_map(change).collect()
}

/// `append` joins to what is there, and otherwise the value is set: of an answer, which has nothing yet, that is added.
fn by_append(option: &HeaderValueOption, otherwise: Action) -> Option<Change> {
    let header = option.header.as_ref()?;
    #[expect(deprecated, reason = "the one that Envoy looks at")]
    let joins = option.append.is_some_and(|append| append.value);
    Some(Change::new(&header.key, header.value.as_bytes(), if joins { Action::Join } else { otherwise }))
}

/// Whether a query can hold it as it is. As in Envoy, what is percent-encoded already would be once more.
fn is_encoded(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.*".contains(&byte))
}

/// As a header is removed; pseudo-headers and the host stay.
pub(super) fn removable(name: &str) -> Option<HeaderName> {
    match place(name)? {
        Place::Header(name) => Some(name),
        _ => None,
    }
}

impl Verdict {
    /// Of a gRPC service's answer.
    pub(super) fn of(response: CheckResponse) -> Verdict {
        let mut verdict = Verdict { metadata: response.dynamic_metadata, ..Verdict::default() };
        let code = response.status.map_or(0, |status| status.code);
        match (code, response.http_response) {
            (0, http) => {
                verdict.outcome = Outcome::Ok;
                if let Some(HttpResponse::OkResponse(ok)) = http {
                    verdict.request = changes(&ok.headers, |option| by_append(option, Action::Set));
                    verdict.response = changes(&ok.response_headers_to_add, |it| Change::from_option(it, Action::Add));
                    let remove = ok.headers_to_remove.iter().take(MAX_CHANGES);
                    verdict.remove = remove.filter_map(|name| removable(name)).collect();
                    let set = ok.query_parameters_to_set.into_iter().take(MAX_CHANGES);
                    verdict.query_set = set.map(|parameter| (parameter.key, parameter.value)).collect();
                    verdict.query_remove = ok.query_parameters_to_remove;
                    verdict.query_remove.truncate(MAX_CHANGES);
                    #[expect(deprecated, reason = "where older services have it")]
                    let older = ok.dynamic_metadata;
                    verdict.metadata = older.or(verdict.metadata);
                }
            }
            (_, Some(HttpResponse::ErrorResponse(error))) => verdict.answer(error),
            (_, http) => {
                verdict.outcome = Outcome::Denied;
                verdict.status = Some(StatusCode::FORBIDDEN);
                if let Some(HttpResponse::DeniedResponse(denied)) = http {
                    verdict.answer(denied);
                }
            }
        }
        verdict
    }

    fn answer(&mut self, answer: DeniedHttpResponse) {
        let code = answer.status.map_or(0, |status| status.code);
        let status = u16::try_from(code).ok().and_then(|code| StatusCode::from_u16(code).ok());
        self.status = status.or(self.status);
        self.body = answer.body.into();
        self.reply = changes(&answer.headers, |option| by_append(option, Action::Add));
    }

    /// Whether the request is not as it was.
    pub(super) fn changes_request(&self) -> bool {
        !(self.request.is_empty()
            && self.remove.is_empty()
            && self.query_set.is_empty()
            && self.query_remove.is_empty())
    }

    /// Leaves out what the service may not change of the request; whether the rest may be.
    pub(super) fn restrict(&mut self, validates: bool, rules: Option<&Rules>) -> bool {
        if validates {
            let legal = |change: &Change| change.is_legal();
            let told = self.query_set.iter().all(|(key, value)| is_encoded(key) && is_encoded(value));
            if !(self.request.iter().all(legal) && self.response.iter().all(legal) && told) {
                return false;
            }
        }
        let Some(rules) = rules else { return true };
        let allows = |change: &Change| {
            let name = change.place.name();
            // There is no joining to what stands in the request's line.
            let appends = name.starts_with(':') && change.action != Action::Set;
            !appends && rules.allows(name, false) && is_value(name, &change.value)
        };
        let removes = |name: &HeaderName| rules.allows(name.as_str(), true);
        if rules.is_error() && !(self.request.iter().all(allows) && self.remove.iter().all(removes)) {
            return false;
        }
        self.request.retain(allows);
        self.remove.retain(removes);
        true
    }

    /// Changes a request that may pass.
    pub(super) fn apply(&self, head: &mut RequestHead) {
        // Envoy's order: what is set, what is added, what is joined.
        let rank = |change: &&Change| match change.action {
            Action::Set => 0,
            Action::Join => 2,
            _ => 1,
        };
        for wanted in 0..3 {
            self.request.iter().filter(|change| rank(change) == wanted).for_each(|it| it.apply_to_request(head));
        }
        for name in self.remove.iter().filter(|name| **name != HOST) {
            head.headers.remove(name);
        }
        if !(self.query_set.is_empty() && self.query_remove.is_empty()) {
            self.set_query(head);
        }
    }

    /// Whether a request that was changed has more headers than one may have, or longer ones. As Envoy counts, with what stands in the
    /// request's line.
    pub(super) fn exceeds(&self, head: &RequestHead, max: MaxHeaders) -> bool {
        if self.request.is_empty() {
            return false;
        }
        let path = head.uri.path_and_query().map_or(0, |path| path.as_str().len());
        // One that is too long has not become the request's.
        let paths = self.request.iter().filter(|change| change.place == Place::Path).map(|change| change.value.len());
        let line = [
            (":path", paths.chain([path]).max().unwrap_or_default()),
            (":method", head.method.as_str().len()),
            (":scheme", scheme(head).len()),
            (":authority", if head.headers.contains_key(HOST) { 0 } else { authority(head).len() }),
        ];
        let line = &line[..if head.headers.contains_key(HOST) { 3 } else { 4 }];
        let of_line = line.iter().map(|(name, length)| name.len() + length);
        let bytes = of_line.chain(head.headers.iter().map(|(name, value)| name.as_str().len() + value.len()));
        head.headers.len() + line.len() > max.count as usize || bytes.sum::<usize>() > max.kilobytes as usize * 1024
    }

    fn set_query(&self, head: &mut RequestHead) {
        let mut parameters: Vec<(&str, &str)> = Vec::new();
        let query = head.uri.query().unwrap_or_default();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            parameters.push(pair.split_once('=').unwrap_or((pair, "")));
        }
        for (key, value) in &self.query_set {
            parameters.retain(|(name, _)| name != key);
            parameters.push((key, value));
        }
        parameters.retain(|(name, _)| !self.query_remove.iter().any(|key| key == name));
        // As Envoy writes them: by name.
        parameters.sort_by_key(|(name, _)| *name);
        let pairs: Vec<_> = parameters.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let path = head.uri.path();
        let path = if pairs.is_empty() { path.to_owned() } else { format!("{path}?{}", pairs.join("&")) };
        // Too long a path is none.
        let _ = set_path(head, &path);
    }

    /// The headers of the answer to a request that may not pass.
    pub(super) fn reply_headers(&self) -> Vec<(HeaderName, HeaderValue)> {
        let mut headers = HeaderMap::new();
        let own = [http::header::CONTENT_LENGTH, http::header::TRANSFER_ENCODING, http::header::CONNECTION];
        for change in &self.reply {
            if !matches!(&change.place, Place::Header(name) if own.contains(name)) {
                change.apply_to_fields(&mut headers);
            }
        }
        crate::http::changes::list(headers)
    }
}

//! Requests that are made the same before their routes are chosen: header names, paths and hosts, in Envoy's order.

use std::time::SystemTime;

use http::{
    HeaderValue, StatusCode,
    header::{HOST, LOCATION},
};

use super::{
    codec::h1::CodecError,
    conn_manager::ConnState,
    headers::{self, names::*},
    path::set_path,
    redirect,
    route_match::authority,
    stream::{LocalReply, RequestHead},
};
use crate::{
    access_log::{Record, ResponseFlags},
    config::model::{EscapedSlashes, RequestRules, StripPort, Underscores},
};

/// Applies the connection manager's rules; or answers what they refuse.
pub(super) fn apply(head: &mut RequestHead, state: &ConnState) -> Result<(), LocalReply> {
    let (config, local) = (state.config(), state.connection.local);
    let rules = &config.rules;
    if head.version != http::Version::HTTP_2 && headers::nominates_too_much(&head.headers) {
        state.count_protocol_error();
        return Err(CodecError::NOMINATED.into());
    }
    let has_underscore = |name: &http::HeaderName| name.as_str().contains('_');
    if rules.underscores != Underscores::Allow && head.headers.keys().any(has_underscore) {
        if rules.underscores == Underscores::Reject {
            state.count_protocol_error();
            state.manager.codecs.http1_rejected_with_underscores.inc();
            return Err(CodecError::UNDERSCORE.into());
        }
        let names: Vec<_> = head.headers.keys().filter(|name| has_underscore(name)).cloned().collect();
        let codecs = &state.manager.codecs;
        let counter = match head.version {
            http::Version::HTTP_2 => codecs.http2_dropped_with_underscores,
            _ => codecs.http1_dropped_with_underscores,
        };
        for name in &names {
            counter.add(head.headers.get_all(name).iter().count() as u64);
            head.headers.remove(name);
        }
    }
    if config.normalize_path && head.uri.path().contains("%00") {
        state.count_failed_normalization();
        return Err(refused(StatusCode::BAD_REQUEST));
    }
    if rules.escaped_slashes != EscapedSlashes::Keep
        && let Some(path) = unescaped(head.uri.path())
    {
        let redirects = rules.escaped_slashes == EscapedSlashes::Redirect;
        if rules.escaped_slashes == EscapedSlashes::Reject || redirects && headers::is_grpc(&head.headers) {
            state.count_failed_normalization();
            return Err(refused(StatusCode::BAD_REQUEST));
        }
        let query = head.uri.query().map(|query| format!("?{query}")).unwrap_or_default();
        // It is shorter than what was there.
        let _ = set_path(head, &(path + &query));
        if redirects {
            headers::normalize(head, config);
            state.count_redirected_path();
            let mut reply = refused(StatusCode::TEMPORARY_REDIRECT);
            let path = head.uri.path_and_query().map_or("/", |path| path.as_str());
            reply.headers.extend(HeaderValue::from_str(path).ok().map(|path| (LOCATION, path)));
            return Err(reply);
        }
    }
    if config.normalize_path || config.merge_slashes {
        headers::normalize(head, config);
    }
    if let Some(host) = host(authority(head), rules, local.port())
        && let Ok(host) = HeaderValue::from_str(&host)
    {
        if head.uri.authority().is_some() {
            head.uri = head.uri.path_and_query().cloned().map(http::Uri::from).unwrap_or_default();
        }
        head.headers.insert(HOST, host);
    }
    let trusts_peer = !config.use_remote_address || config.xff_num_trusted_hops > 0;
    if rules.append_x_forwarded_port && !(trusts_peer && head.headers.contains_key(X_FORWARDED_PORT)) {
        head.headers.insert(X_FORWARDED_PORT, HeaderValue::from(local.port()));
    }
    Ok(())
}

/// `early_header_mutation_extensions`: what they change is not trusted more than what a client sends.
pub(super) fn mutate_early(head: &mut RequestHead, state: &ConnState) {
    let (mutations, connection) = (&state.config().early_mutations, &state.connection);
    if mutations.is_empty() {
        return;
    }
    let (uri, host) = (head.uri.clone(), authority(head).to_owned());
    let record = Record {
        missing: "",
        start: SystemTime::now(),
        method: Some(head.method.as_str()),
        path: uri.path_and_query().map(|path| path.as_str()),
        authority: Some(&host),
        scheme: Some(redirect::scheme(head)),
        protocol: Some(super::protocol_name(head.version)),
        ..connection.record()
    };
    mutations.iter().for_each(|mutations| mutations.apply(&mut head.headers, &record));
}

fn refused(status: StatusCode) -> LocalReply {
    LocalReply::new(status, "", ResponseFlags::default(), "path_normalization_failed")
}

/// The path with its escaped slashes as slashes, where it has any.
pub(super) fn unescaped(path: &str) -> Option<String> {
    let mut found = false;
    let mut text = String::with_capacity(path.len());
    let mut rest = path;
    while let Some(at) = rest.find('%') {
        let slash = match rest.get(at + 1..at + 3) {
            Some("2F" | "2f") => Some('/'),
            Some("5C" | "5c") => Some('\\'),
            _ => None,
        };
        text.push_str(&rest[..at]);
        text.push(slash.unwrap_or('%'));
        found |= slash.is_some();
        rest = &rest[at + if slash.is_some() { 3 } else { 1 }..];
    }
    text.push_str(rest);
    found.then_some(text)
}

/// What a host becomes, where it changes. `own`: the listener's port.
fn host(host: &str, rules: &RequestRules, own: u16) -> Option<String> {
    if rules.strip_port == StripPort::None && !rules.strip_trailing_host_dot {
        return None;
    }
    let (mut name, mut port) = (host, None);
    // What stands in brackets is an address.
    let colon = host.rfind(':').filter(|colon| host.rfind(']').is_none_or(|bracket| bracket < *colon));
    if let Some(colon) = colon {
        (name, port) = (&host[..colon], Some(&host[colon..]));
    }
    if rules.strip_trailing_host_dot {
        name = name.strip_suffix('.').unwrap_or(name);
    }
    let number = port.and_then(|port| port[1..].parse::<u32>().ok());
    let strip = match rules.strip_port {
        StripPort::None => false,
        StripPort::Matching => number == Some(u32::from(own)),
        StripPort::Any => number.is_some(),
    };
    let port = port.filter(|_| !strip).unwrap_or_default();
    (name.len() + port.len() < host.len()).then(|| [name, port].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slashes_are_unescaped() {
        for (path, expected) in [
            ("/a", None),
            ("/a%2", None),
            ("/%25%20", None),
            ("/a%2Fb%2fc", Some("/a/b/c")),
            ("/%5C%5c%", Some("/\\\\%")),
            ("/%252F", None),
        ] {
            assert_eq!(unescaped(path).as_deref(), expected, "{path}");
        }
    }

    #[test]
    fn hosts_lose_ports_and_dots() {
        let rules = |strip_port, strip_trailing_host_dot| RequestRules {
            strip_port,
            strip_trailing_host_dot,
            ..RequestRules::default()
        };
        let (any, matching) = (rules(StripPort::Any, false), rules(StripPort::Matching, false));
        let (dot, both) = (rules(StripPort::None, true), rules(StripPort::Any, true));
        for (rules, from, expected) in [
            (&any, "a:80", Some("a")),
            (&any, "a:b", None),
            (&any, "[::1]", None),
            (&any, "[::1]:80", Some("[::1]")),
            (&matching, "a:80", Some("a")),
            (&matching, "a:81", None),
            (&dot, "a.b.", Some("a.b")),
            (&dot, "a.b.:80", Some("a.b:80")),
            (&both, "a.:80", Some("a")),
        ] {
            assert_eq!(host(from, rules, 80).as_deref(), expected, "{from} {rules:?}");
        }
    }
}

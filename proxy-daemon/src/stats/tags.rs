//! Prometheus labels out of dotted names: Envoy's default tag extraction, for names that no [`Scope`](super::Scope) made.

use std::sync::Arc;

/// A label's name and value.
pub(super) type Label = (&'static str, Arc<str>);

/// A statistic's name, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct TaggedName {
    /// As `/stats` prints it.
    pub(super) full: Arc<str>,
    /// Without the parts that are labels.
    pub(super) base: Arc<str>,
    /// In the order in which they stand in the name, after those for response codes.
    pub(super) labels: Arc<[Label]>,
    /// Whether a scope said what the labels are; else they are a guess.
    pub(super) exact: bool,
}

/// Takes `_200` or the `2` of `_2xx` off the end of a name that counts responses, as a label; returns what is left.
pub(super) fn response_code(name: &str, labels: &mut Vec<Label>) -> Option<String> {
    let at = name.rfind("_rq_")? + "_rq".len();
    let (stem, code) = (&name[..at], &name[at + 1..]);
    let is_number = |text: &str, len| text.len() == len && text.bytes().all(|b| b.is_ascii_digit());
    if is_number(code, 3) {
        labels.push(("envoy_response_code", code.into()));
        return Some(stem.to_owned());
    }
    let class = code.strip_suffix("xx").filter(|class| is_number(class, 1))?;
    labels.push(("envoy_response_code_class", class.into()));
    Some(format!("{stem}_xx"))
}

/// Takes a finished name apart. Like Envoy, it takes configured names to hold no dots, except listener addresses.
pub(super) fn from_name(name: &str) -> TaggedName {
    let mut labels = Vec::new();
    let base = response_code(name, &mut labels);
    let mut tokens: Vec<&str> = base.as_deref().unwrap_or(name).split('.').collect();
    let mut take = |tokens: &mut Vec<&str>, at: usize, count: usize, label| {
        // The last token is the statistic itself.
        if at + count < tokens.len() {
            let value = tokens.drain(at..at + count).collect::<Vec<_>>().join(".");
            labels.push((label, value.into()));
        }
    };
    match tokens[0] {
        "cluster" => take(&mut tokens, 1, 1, "envoy_cluster_name"),
        "tcp" => take(&mut tokens, 1, 1, "envoy_tcp_prefix"),
        "udp" => take(&mut tokens, 1, 1, "envoy_udp_prefix"),
        "ratelimit" => take(&mut tokens, 1, 1, "envoy_ratelimit_prefix"),
        "http" => {
            take(&mut tokens, 1, 1, "envoy_http_conn_manager_prefix");
            match tokens.get(1) {
                Some(&"rds") => take(&mut tokens, 2, 1, "envoy_rds_route_config"),
                Some(&"fault") => take(&mut tokens, 2, 1, "envoy_fault_downstream_cluster"),
                Some(&"user_agent") => take(&mut tokens, 2, 1, "envoy_http_user_agent"),
                _ => {}
            }
        }
        "listener" => {
            let address = tokens[1..].iter().take_while(|token| is_address_part(token)).count();
            if address > 0 {
                take(&mut tokens, 1, address, "envoy_listener_address");
            }
            if let Some(at) = tokens.iter().position(|token| *token == "http") {
                take(&mut tokens, at + 1, 1, "envoy_http_conn_manager_prefix");
            }
        }
        "vhost" => {
            take(&mut tokens, 1, 1, "envoy_virtual_host");
            match tokens.get(1) {
                Some(&"vcluster") => take(&mut tokens, 2, 1, "envoy_virtual_cluster"),
                Some(&"route") => take(&mut tokens, 2, 1, "envoy_route"),
                _ => {}
            }
        }
        "mongo" => {
            take(&mut tokens, 1, 1, "envoy_mongo_prefix");
            match tokens.get(1) {
                Some(&"cmd") => take(&mut tokens, 2, 1, "envoy_mongo_cmd"),
                Some(&"collection") => {
                    take(&mut tokens, 2, 1, "envoy_mongo_collection");
                    if tokens.get(2) == Some(&"callsite") {
                        take(&mut tokens, 3, 1, "envoy_mongo_callsite");
                    }
                }
                _ => {}
            }
        }
        _ => {}
    }
    if let Some(at) = tokens.iter().position(|token| worker_id(token).is_some()) {
        labels.extend(worker_id(tokens[at]).map(|id| ("envoy_worker_id", id.into())));
        tokens[at] = "worker";
    }
    TaggedName { full: name.into(), base: tokens.join(".").into(), labels: labels.into(), exact: false }
}

/// `0` of `worker_0`.
fn worker_id(token: &str) -> Option<&str> {
    token.strip_prefix("worker_").filter(|id| !id.is_empty() && id.bytes().all(|b| b.is_ascii_digit()))
}

/// Whether this may be part of an address in which `:` has become `_`. At least one digit or bracket: `cafe` is a name.
fn is_address_part(token: &str) -> bool {
    token.bytes().all(|b| b.is_ascii_hexdigit() || b"_[]".contains(&b))
        && token.bytes().any(|b| b.is_ascii_digit() || b == b'[')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken_apart(name: &str) -> String {
        let name = from_name(name);
        let labels = name.labels.iter().map(|(label, value)| format!(" {label}={value}"));
        labels.fold(name.base.to_string(), |text, label| text + &label)
    }

    #[test]
    fn finds_what_envoy_finds() {
        // Read off the real Envoy's /stats and /stats/prometheus, but for the order of the labels.
        for (name, expected) in [
            ("cluster.users.upstream_cx_total", "cluster.upstream_cx_total envoy_cluster_name=users"),
            ("cluster.users.upstream_rq_200", "cluster.upstream_rq envoy_response_code=200 envoy_cluster_name=users"),
            (
                "cluster.users.external.upstream_rq_2xx",
                "cluster.external.upstream_rq_xx envoy_response_code_class=2 envoy_cluster_name=users",
            ),
            ("cluster.users.upstream_rq_xx", "cluster.upstream_rq_xx envoy_cluster_name=users"),
            ("cluster.users.upstream_rq_0rtt", "cluster.upstream_rq_0rtt envoy_cluster_name=users"),
            ("cluster_manager.active_clusters", "cluster_manager.active_clusters"),
            ("http.admin.downstream_rq_total", "http.downstream_rq_total envoy_http_conn_manager_prefix=admin"),
            (
                "listener.127.0.0.1_19080.downstream_cx_total",
                "listener.downstream_cx_total envoy_listener_address=127.0.0.1_19080",
            ),
            ("listener.[__1]_80.downstream_cx_total", "listener.downstream_cx_total envoy_listener_address=[__1]_80"),
            ("listener.admin.downstream_cx_total", "listener.admin.downstream_cx_total"),
            (
                "listener.127.0.0.1_19080.http.ingress.downstream_rq_4xx",
                "listener.http.downstream_rq_xx envoy_response_code_class=4 envoy_listener_address=127.0.0.1_19080 \
                 envoy_http_conn_manager_prefix=ingress",
            ),
            (
                "listener.127.0.0.1_19080.worker_1.downstream_cx_active",
                "listener.worker.downstream_cx_active envoy_listener_address=127.0.0.1_19080 envoy_worker_id=1",
            ),
            (
                "http.in.rds.routes.config_reload",
                "http.rds.config_reload envoy_http_conn_manager_prefix=in envoy_rds_route_config=routes",
            ),
            ("server.live", "server.live"),
            ("cluster", "cluster"),
            ("cluster.x", "cluster.x"),
            ("", ""),
        ] {
            assert_eq!(taken_apart(name), expected, "{name}");
        }
    }
}

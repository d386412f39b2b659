//! When access logs have a line.

use super::harness::{Case, case};

/// With a deprecated field of the connection manager's own.
fn old(name: &'static str, field: &str, requests: &[&str]) -> Case {
    case(name, "set_metadata.v3.Config", "metadata: [{metadata_namespace: ns, value: {k: set}}]", requests)
        .of_manager(field)
}

fn of(name: &'static str, fields: &str, requests: &[&str]) -> Case {
    case(name, "set_metadata.v3.Config", "metadata: [{metadata_namespace: ns, value: {k: set}}]", requests)
        .of_manager("upgrade_configs: [{upgrade_type: websocket}]")
        .of_manager(&format!("access_log_options: {{{fields}}}"))
}

pub fn cases() -> Vec<Case> {
    let requests = ["GET /", "POST /\nx-do: 503\n\nbody", "GET /direct", "GET /\nx-do: reset", "GET /\nhost: a,b"];
    vec![
        of("a line at the end", "", &requests),
        of("flush_access_log_on_new_request", "flush_access_log_on_new_request: true", &requests),
        of("access_log_flush_interval", "access_log_flush_interval: 0.5s", &["GET /\nx-do: 200+delay=750", "GET /"]),
        old("flush_access_log_on_new_request of old", "flush_access_log_on_new_request: true", &requests),
        old("access_log_flush_interval of old", "access_log_flush_interval: 0.5s", &["GET /\nx-do: 200+delay=750"]),
        of("no tunnel", "flush_log_on_tunnel_successfully_established: true", &requests),
    ]
}

/// Of culvertd alone: the lines at the ends of tunnels are another matter.
pub fn tunnels() -> Vec<Case> {
    let request = ["GET /\nconnection: upgrade\nupgrade: websocket\nx-do: 101"];
    vec![of("a tunnel", "flush_log_on_tunnel_successfully_established: true", &request), of("no line", "", &request)]
}

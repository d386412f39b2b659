//! Requests for another protocol: where they may, and what becomes of the connection.

use super::harness::{Case, case};

const ALLOWED: &str = "upgrade_configs: [{upgrade_type: websocket}, {upgrade_type: gone, enabled: false}]";

fn ask(path: &str, protocol: &str, more: &str) -> String {
    format!("GET {path}\nconnection: Upgrade\nupgrade: {protocol}\nx-do: 101\n{more}")
}

fn with(name: &'static str, routes: &str, requests: &[String]) -> Case {
    case(name, routes, &requests.iter().map(String::as_str).collect::<Vec<_>>())
}

pub fn cases() -> Vec<Case> {
    let all = [
        ask("/", "websocket", "\nhello|again|bye"),
        ask("/", "WebSocket", "\nhello|end"),
        ask("/", "gone", "\nbye"),
        ask("/", "other", "\nbye"),
        "GET /\nupgrade: websocket".to_owned(),
        "GET /\nconnection: close\nupgrade: websocket".to_owned(),
        "GET /\nconnection: Upgrade\nupgrade: h2c\nconnection: close".to_owned(),
        "GET /\nconnection: keep-alive, Upgrade\nupgrade: websocket\nx-do: 101\n\nhello|bye".to_owned(),
        "GET /\nconnection: Upgrade\nupgrade: websocket\nx-do: 200".to_owned(),
        "GET /\nconnection: Upgrade\nupgrade: websocket\nx-do: 403+x-a=b".to_owned(),
        "GET /\nconnection: Upgrade\nupgrade: websocket\nx-do: 503,101\n\nbye".to_owned(),
        "GET /\nconnection: Upgrade\nupgrade: websocket\nx-do: reset".to_owned(),
        "GET /\nconnection: Upgrade\nupgrade: websocket\nx-do: 201".to_owned(),
        "GET /\nconnection: Upgrade\nupgrade: websocket\nx-do: 302+location=/b".to_owned(),
        "HEAD /\nconnection: Upgrade\nupgrade: websocket\nx-do: 200".to_owned(),
        "POST /\nconnection: Upgrade\nupgrade: websocket\nx-do: 101\n\nhello|bye".to_owned(),
        ask("/none", "websocket", "\nbye"),
    ];
    let to = |fields: &str| {
        format!("- {{match: {{prefix: /none}}, $1}}\n- {{match: {{prefix: /}}, route: {{cluster: a{fields}}}}}")
    };
    let mut cases = vec![
        with("upgrades nowhere", &to(""), &all),
        with("upgrades of the manager", &to(""), &all).of_manager(ALLOWED),
        with("upgrades of a route", &to(", upgrade_configs: [{upgrade_type: websocket}]"), &all),
        with("upgrades off for a route", &to(", upgrade_configs: [{upgrade_type: WEBSOCKET, enabled: false}]"), &all)
            .of_manager(ALLOWED),
        with("upgrades on for a route", &to(", upgrade_configs: [{upgrade_type: gone}]"), &all[..4])
            .of_manager(ALLOWED),
        with("upgrades that are tried again", &to(", retry_policy: {retry_on: 5xx}"), &all).of_manager(ALLOWED),
        with("upgrades and the route's timeout", &to(", timeout: 0.3s"), &[ask("/", "websocket", "\nhello")])
            .of_manager(ALLOWED),
        with(
            "upgrades that are late for the route",
            &to(", timeout: 0.5s"),
            &["101+delay=1500", "200+delay=1500", "101+delay=100"]
                .map(|does| ask("/", "websocket", "\nbye").replace("x-do: 101", &format!("x-do: {does}"))),
        )
        .of_manager(ALLOWED),
        with("upgrades and the idle timeout", &to(", idle_timeout: 0.4s"), &[ask("/", "websocket", "\nhello")])
            .of_manager(ALLOWED),
    ];
    // Filters of their own: what the route says to them goes by their names.
    let mutation = |name: &str| {
        format!(
            "{{name: {name}, typed_config: {{\"@type\": type.googleapis.com/envoy.extensions.filters.http.header_mutation.v3.HeaderMutation, \
             mutations: {{request_mutations: [{{append: {{header: {{key: x-up, value: {name}}}}}}}], response_mutations: [{{append: \
             {{header: {{key: x-down, value: {name}}}}}}}]}}}}}}"
        )
    };
    let router =
        "{name: last, typed_config: {\"@type\": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}";
    let own = format!(
        "upgrade_configs: [{{upgrade_type: websocket, filters: [{}, {}, {router}]}}, {{upgrade_type: gone, enabled: false, filters: [{}, {router}]}}, \
         {{upgrade_type: other}}]",
        mutation("first"),
        mutation("second"),
        mutation("third")
    );
    let told = "- {match: {prefix: /none}, $1}\n- {match: {prefix: /}, route: {cluster: a, upgrade_configs: [{upgrade_type: gone}]}, \
                typed_per_filter_config: {second: {\"@type\": \
                type.googleapis.com/envoy.extensions.filters.http.header_mutation.v3.HeaderMutationPerRoute, mutations: \
                {response_mutations: [{append: {header: {key: x-told, value: second}}}]}}, first: {\"@type\": \
                type.googleapis.com/envoy.config.route.v3.FilterConfig, disabled: true}}}";
    let asked =
        [&all[..5], &["GET /".to_owned(), ask("/none", "websocket", "\nbye"), ask("/none", "gone", "\nbye")]].concat();
    cases.push(with("upgrades with filters of their own", &to(""), &asked).of_manager(&own));
    cases.push(with("upgrades whose filters are told something", told, &asked).of_manager(&own));
    cases.push(
        with(
            "upgrades are matched by their headers",
            "- {match: {prefix: /, headers: [{name: upgrade, string_match: {exact: websocket}}]}, $b}\n- {match: {prefix: /}, $a}",
            &all[..2],
        )
        .of_manager(ALLOWED),
    );
    cases.push(
        with(
            "upgrades with a body",
            &to(""),
            &["GET /\nconnection: Upgrade\nupgrade: websocket\ncontent-length: 3\n\nabc".to_owned()],
        )
        .of_manager(ALLOWED)
        .differs("servers may take the body for the other protocol's, or for a request's"),
    );
    cases.push(
        with(
            "upgrades that nominate headers",
            &to(""),
            &["GET /\nconnection: Upgrade, x-a\nx-a: 1\nupgrade: websocket\nx-do: 101\n\nbye".to_owned()],
        )
        .of_manager(ALLOWED)
        .differs("what a client nominates concerns its own connection and does not go on"),
    );
    cases
}

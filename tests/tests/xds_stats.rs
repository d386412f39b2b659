//! What is counted of xDS, and what drains, in culvertd and in the real Envoy, of the same files.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use culvert_tests::daemon::{Daemon, Kind, free_port, scratch_dir};
use culvert_tests::wait_until;
use serde_json::Value;

const DEADLINE: Duration = Duration::from_secs(20);
const API: &str = "type.googleapis.com/envoy";

/// Moves a response to its place, as file sources want it.
fn publish(root: &Path, file: &str, version: u32, resources: &[String]) -> Result<()> {
    let mut text = format!("version_info: \"{version}\"\nresources:\n");
    for resource in resources {
        text.push_str(&format!("- {{{resource}}}\n"));
    }
    let (path, aside) = (root.join(format!("{file}.yaml")), root.join(format!("{file}.new")));
    fs::write(&aside, text)?;
    Ok(fs::rename(aside, path)?)
}

fn source(root: &Path, file: &str) -> String {
    format!("{{path_config_source: {{path: '{}/{file}.yaml'}}, resource_api_version: V3}}", root.display())
}

fn cluster(root: &Path, timeout: u32) -> String {
    format!(
        "'@type': {API}.config.cluster.v3.Cluster, name: users, type: EDS, connect_timeout: {timeout}s, \
         eds_cluster_config: {{eds_config: {}}}",
        source(root, "eds")
    )
}

fn endpoints(ports: &[u16]) -> String {
    let ports = ports.iter().map(|port| {
        format!("{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}}}}}")
    });
    let ports = ports.collect::<Vec<_>>().join(", ");
    format!(
        "'@type': {API}.config.endpoint.v3.ClusterLoadAssignment, cluster_name: users, endpoints: [{{lb_endpoints: \
         [{ports}]}}]"
    )
}

fn routes(name: &str, cluster: &str, more: &str) -> String {
    format!(
        "name: {name}, {more} virtual_hosts: [{{name: v, domains: ['*'], routes: [{{match: {{prefix: /}}, route: \
         {{cluster: {cluster}}}}}]}}]"
    )
}

/// A listener with a filter chain for each of the ports: `how` says where the routes come from.
fn listener(name: &str, port: u16, chains: &[(&str, &str)]) -> String {
    let chains = chains.iter().map(|(prefix, how)| {
        format!(
            "{{name: {prefix}, filter_chain_match: {{source_ports: [{}]}}, filters: [{{name: hcm, typed_config: {{'@type': \
             {API}.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager, stat_prefix: {prefix}, \
             {how}, http_filters: [{{name: router, typed_config: {{'@type': \
             {API}.extensions.filters.http.router.v3.Router}}}}]}}}}]}}",
            // Something that tells the chains apart.
            prefix.len()
        )
    });
    let chains = chains.collect::<Vec<_>>().join(", ");
    format!(
        "'@type': {API}.config.listener.v3.Listener, name: {name}, address: {{socket_address: {{address: 127.0.0.1, \
         port_value: {port}}}}}, filter_chains: [{chains}]"
    )
}

/// Everything that is counted of subscriptions and of what they deliver.
fn counted(daemon: &Daemon) -> Result<Vec<String>> {
    let text = daemon.admin("/stats")?;
    let wanted = |line: &&str| {
        let (name, _) = line.split_once(": ").unwrap_or_default();
        let leaf = name.rsplit_once('.').map_or("", |(_, leaf)| leaf);
        let of_cluster = leaf == "warming_state"
            || leaf.starts_with("update")
            || leaf.starts_with("version")
            || leaf.starts_with("assignment");
        let families = ["cluster_manager.", "listener_manager.", "http.web.rds.", "http.longer.rds."];
        let family = families.iter().any(|family| name.starts_with(family));
        // Known only of CDS and LDS.
        let duration = leaf == "update_duration" && !name.contains("manager.");
        (family || (name.starts_with("cluster.users.") && of_cluster) || name.starts_with("runtime.update"))
            && !duration
    };
    let times = |line: &str| match line.split_once(": ") {
        Some((name, value)) if name.ends_with("time") || name.ends_with("time_ms") => {
            format!("{name}: {}", if value == "0" { "never" } else { "some time" })
        }
        _ => line.to_owned(),
    };
    let mut lines: Vec<_> = text.lines().filter(wanted).map(times).collect();
    lines.sort();
    Ok(lines)
}

/// The listeners of `/config_dump`, with the states that each has.
fn listener_states(daemon: &Daemon) -> Result<Vec<String>> {
    let dump: Value = serde_json::from_str(&daemon.admin("/config_dump")?)?;
    let sections = dump["configs"].as_array().context("configs")?;
    let section = sections.iter().find(|it| it["@type"].as_str().is_some_and(|it| it.ends_with("ListenersConfigDump")));
    let mut states = Vec::new();
    for listener in section.context("listeners")?["dynamic_listeners"].as_array().into_iter().flatten() {
        let versions = ["active_state", "warming_state", "draining_state"].map(|state| {
            let version = listener[state]["version_info"].as_str().unwrap_or("-");
            // Envoy gives a listener that was updated in place the version from before.
            let version = if state == "draining_state" && version != "-" { "some" } else { version };
            format!("{state} {version}")
        });
        states.push(format!("{} {versions:?}", listener["name"]));
    }
    states.sort();
    Ok(states)
}

fn look(kind: Kind) -> Result<Vec<String>> {
    let root = scratch_dir()?;
    let (port, other) = (free_port()?, free_port()?);
    let rds = format!("rds: {{route_config_name: r, config_source: {}}}", source(&root, "rds"));
    let own = |cluster: &str, more: &str| format!("route_config: {{{}}}", routes("own", cluster, more));
    let route =
        |more: &str| format!("'@type': {API}.config.route.v3.RouteConfiguration, {}", routes("r", "users", more));
    publish(&root, "cds", 1, &[cluster(&root, 1)])?;
    publish(&root, "eds", 1, &[endpoints(&[1])])?;
    publish(&root, "rds", 1, &[route("")])?;
    let kept = own("users", "");
    publish(
        &root,
        "lds",
        1,
        &[listener("in", port, &[("web", &rds), ("longer", &kept)]), listener("out", other, &[("web", &rds)])],
    )?;
    let yaml = format!(
        "node: {{id: node, cluster: tests}}\ndynamic_resources: {{cds_config: {}, lds_config: {}}}\n",
        source(&root, "cds"),
        source(&root, "lds")
    );
    let daemon = Daemon::start(kind, &yaml)?;
    let becomes = |name: &str, value: u64| {
        wait_until(DEADLINE, &format!("{kind:?}: {name} to be {value}"), || {
            let stats = daemon.stats()?;
            ensure!(stats.get(name) == value, "{}", stats.get(name));
            Ok(())
        })
    };
    let mut seen = Vec::new();
    becomes("listener_manager.listener_create_success", 2)?;
    seen.push(counted(&daemon)?);

    // Nothing new under a new version, and something new.
    publish(&root, "eds", 2, &[endpoints(&[1])])?;
    becomes("cluster.users.update_success", 2)?;
    publish(&root, "eds", 3, &[endpoints(&[1, 2])])?;
    becomes("cluster.users.update_success", 3)?;
    // The same ones in another order.
    publish(&root, "eds", 4, &[endpoints(&[2, 1])])?;
    becomes("cluster.users.update_success", 4)?;
    publish(&root, "rds", 2, &[route("")])?;
    becomes("http.web.rds.r.update_success", 2)?;
    publish(&root, "rds", 3, &[route("request_headers_to_remove: [x],")])?;
    becomes("http.web.rds.r.update_success", 3)?;
    publish(&root, "cds", 2, &[cluster(&root, 1)])?;
    becomes("cluster_manager.cds.update_success", 2)?;
    seen.push(counted(&daemon)?);

    // One filter chain goes; a listener goes; a listener is replaced as a whole.
    publish(&root, "lds", 2, &[listener("in", port, &[("longer", &kept)]), listener("out", other, &[("web", &rds)])])?;
    becomes("listener_manager.listener_in_place_updated", 1)?;
    seen.push(counted(&daemon)?);
    let whole = format!("{}, per_connection_buffer_limit_bytes: 4096", listener("in", port, &[("longer", &kept)]));
    publish(&root, "lds", 3, std::slice::from_ref(&whole))?;
    becomes("listener_manager.listener_create_success", 4)?;
    becomes("listener_manager.total_listeners_draining", 2)?;
    // In Envoy a listener that drains is subscribed to its routes still.
    seen.push(counted(&daemon)?.into_iter().filter(|line| !line.starts_with("http.")).collect());
    seen.push(listener_states(&daemon)?);

    // Routes of a listener's own are held to the clusters, unless they say that they are not.
    let nobody = own("nobody", "");
    publish(&root, "lds", 4, &[whole.clone(), listener("new", other, &[("web", &nobody)])])?;
    becomes("listener_manager.lds.update_rejected", 1)?;
    let lenient = own("nobody", "validate_clusters: false,");
    publish(&root, "lds", 5, &[whole, listener("new", other, &[("web", &lenient)])])?;
    becomes("listener_manager.lds.update_success", 4)?;
    becomes("listener_manager.total_listeners_active", 2)?;
    Ok(seen.concat())
}

#[test]
fn subscriptions_and_what_drains_are_counted_as_by_envoy() -> Result<()> {
    let ours = look(Kind::Culvert)?;
    for expected in ["cluster.users.update_no_rebuild: 2", "http.web.rds.r.config_reload: 2"] {
        ensure!(ours.iter().any(|line| line == expected), "{ours:#?}");
    }
    let envoys = look(Kind::Envoy)?;
    let different = ours.iter().zip(&envoys).filter(|(ours, envoys)| ours != envoys).collect::<Vec<_>>();
    ensure!(ours.len() == envoys.len() && different.is_empty(), "ours and Envoy's: {different:#?}");
    Ok(())
}

//! Scoped routes from files and from the bootstrap, of culvertd and of the real Envoy on the same configuration.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};
use culvert_tests::daemon::{Daemon, Kind, fetch, free_port, scratch_dir};
use culvert_tests::http1::Request;
use culvert_tests::wait_until;
use serde_json::Value;

const DEADLINE: Duration = Duration::from_secs(10);
const SCOPE: &str = "type.googleapis.com/envoy.config.route.v3.ScopedRouteConfiguration";
const ROUTES: &str = "type.googleapis.com/envoy.config.route.v3.RouteConfiguration";

/// A route configuration that answers everything with `status`.
fn routes(name: &str, status: u16) -> String {
    format!(
        "name: {name}, virtual_hosts: [{{name: v, domains: ['*'], routes: [{{match: {{prefix: /}}, direct_response: \
         {{status: {status}}}}}]}}]"
    )
}

fn key(fragments: &[&str]) -> String {
    let fragments: Vec<_> = fragments.iter().map(|text| format!("{{string_key: {text}}}")).collect();
    format!("key: {{fragments: [{}]}}", fragments.join(", "))
}

/// Moves a response to its place, as file sources want it.
fn publish(path: &Path, version: u32, resources: &[String]) -> Result<()> {
    let mut text = format!("version_info: \"{version}\"\nresources:\n");
    for resource in resources {
        text.push_str(&format!("- {{{resource}}}\n"));
    }
    let aside = path.with_extension("new");
    fs::write(&aside, text)?;
    Ok(fs::rename(aside, path)?)
}

fn scope(name: &str, routes: &str, fragments: &[&str]) -> String {
    format!("\"@type\": {SCOPE}, name: {name}, route_configuration_name: {routes}, {}", key(fragments))
}

fn listener(port: u16, prefix: &str, scoped: &str) -> String {
    format!(
        r#"
  - name: {prefix}
    address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}
    filter_chains:
    - filters:
      - name: hcm
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: {prefix}
          http_filters:
          - {{name: router, typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}}}
          scoped_routes:
            name: {prefix}-scopes
            scope_key_builder:
              fragments:
              - {{header_value_extractor: {{name: x-tenant, element_separator: ";", element: {{separator: "=", key: id}}}}}}
              - {{header_value_extractor: {{name: x-zone, element_separator: ",", index: 1}}}}
            {scoped}
"#
    )
}

/// What a proxy answers, and what it shows of its scopes.
fn look(kind: Kind) -> Result<Vec<String>> {
    let dir = scratch_dir()?;
    let (srds, rds) = (dir.join("srds.yaml"), dir.join("rds.yaml"));
    publish(&rds, 1, &[format!("\"@type\": {ROUTES}, {}", routes("one", 201))])?;
    publish(
        &srds,
        1,
        &[
            scope("a", "one", &["a", "z"]),
            format!(
                "\"@type\": {SCOPE}, name: b, {}, route_configuration: {{{}}}",
                key(&["b", "z"]),
                routes("in", 202)
            ),
        ],
    )?;
    let file = |path: &Path| format!("{{path_config_source: {{path: '{}'}}}}", path.display());
    let dynamic = format!(
        "rds_config_source: {}\n            scoped_rds: {{scoped_rds_config_source: {}}}",
        file(&rds),
        file(&srds)
    );
    let inline = format!(
        "scoped_route_configurations_list: {{scoped_route_configurations: [{{name: i, {}, route_configuration: {{{}}}}}]}}",
        key(&["a", "z"]),
        routes("inline", 203)
    );
    let (port, inline_port) = (free_port()?, free_port()?);
    let yaml = format!(
        "node: {{id: node, cluster: tests}}\nstatic_resources:\n  listeners:{}{}",
        listener(port, "dynamic", &dynamic),
        listener(inline_port, "inline", &inline)
    );
    let daemon = Daemon::start(kind, &yaml)?;
    let get = |port: u16, tenant: &str, zone: &str| -> Result<u16> {
        Ok(fetch(port, Request::get("/").header("x-tenant", tenant).header("x-zone", zone))?.status)
    };
    let becomes = |tenant: &str, status: u16| {
        wait_until(DEADLINE, &format!("{tenant} to get {status}"), || {
            let now = get(port, tenant, "y,z")?;
            ensure!(now == status, "status {now}");
            Ok(())
        })
    };
    let mut seen = Vec::new();
    becomes("id=a", 201)?;
    for (tenant, zone) in [("id=a", "y,z"), ("x;id=b;id=a", "y,z"), ("id=a", "z"), ("id=c", "y,z"), ("id", "y,z")] {
        seen.push(format!("{tenant} {zone}: {}, {}", get(port, tenant, zone)?, get(inline_port, tenant, zone)?));
    }
    let dump: Value = serde_json::from_str(&daemon.admin("/config_dump")?)?;
    let scopes = dump["configs"].as_array().into_iter().flatten();
    for section in scopes.filter(|it| it["@type"].as_str().is_some_and(|it| it.ends_with("ScopedRoutesConfigDump"))) {
        for list in ["inline_scoped_route_configs", "dynamic_scoped_route_configs"] {
            let group = &section[list][0];
            seen.push(format!("{} {} {}", group["name"], group["version_info"], group["scoped_route_configs"]));
        }
    }
    let counted = |seen: &mut Vec<String>| -> Result<()> {
        let stats = daemon.stats()?;
        for leaf in ["all_scopes", "active_scopes", "config_reload", "update_success", "update_rejected"] {
            seen.push(format!("{leaf}: {}", stats.get(&format!("http.dynamic.scoped_rds.dynamic-scopes.{leaf}"))));
        }
        Ok(())
    };
    counted(&mut seen)?;

    publish(&srds, 2, &[scope("a", "one", &["a", "z"]), scope("c", "one", &["a", "z"])])?;
    wait_until(DEADLINE, "the conflict to be rejected", || {
        let rejected = daemon.stats()?.get("http.dynamic.scoped_rds.dynamic-scopes.update_rejected");
        ensure!(rejected == 1, "{rejected}");
        Ok(())
    })?;
    becomes("id=a", 201)?;
    publish(&srds, 3, &[scope("c", "one", &["c", "z"])])?;
    becomes("id=c", 201)?;
    for tenant in ["id=a", "id=b"] {
        seen.push(format!("{tenant}: {}", get(port, tenant, "y,z")?));
    }
    Ok(seen)
}

#[test]
fn scopes_are_chosen_shown_and_counted_as_by_envoy() -> Result<()> {
    let ours = look(Kind::Culvert)?;
    ensure!(ours.iter().any(|line| line == "id=a y,z: 201, 203"), "{ours:#?}");
    assert_eq!(ours, look(Kind::Envoy)?);
    Ok(())
}

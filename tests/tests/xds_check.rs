//! `culvert xds status --check` where something is wrong that no resource shows, or that is only missing.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use culvert_tests::binaries::binary;
use culvert_tests::bootstrap::ads_bootstrap;
use culvert_tests::control_plane::{ControlPlane, Push, Resource, Stream};
use culvert_tests::daemon::{Daemon, Kind, free_port};
use culvert_tests::wait_until;
use culvert_xds_client::json::{from_yaml, pack};
use envoy_types::pb::envoy::config::{cluster::v3::Cluster, listener::v3::Listener};
use prost::Name;

const DEADLINE: Duration = Duration::from_secs(20);

fn cluster(name: &str) -> Result<Resource> {
    let yaml = format!("{{ name: '{name}', type: STATIC, connect_timeout: 1s }}");
    let body = pack(&from_yaml::<Cluster>(&yaml)?);
    Ok(Resource { name: name.to_owned(), version: "1".to_owned(), body })
}

fn push(stream: &Stream, type_url: String, nonce: &str, resources: Vec<Resource>) {
    let (version, nonce) = (nonce.to_owned(), nonce.to_owned());
    stream.push(Push { type_url, version, nonce, resources, removed: Vec::new() });
}

/// The answer to a response: the text of a NACK.
fn answer(stream: &Stream, nonce: &str) -> Result<Option<String>> {
    wait_until(DEADLINE, "the answer", || {
        let request = stream.next(Duration::from_millis(100))?.context("no request yet")?;
        ensure!(request.nonce == nonce, "{request:?}");
        Ok(request.error)
    })
}

/// What `culvert xds status --check` prints, and what it exits with.
fn check(daemon: &Daemon) -> Result<(String, Option<i32>)> {
    let admin = format!("http://{}", daemon.admin_address());
    let output = Command::new(binary("culvert")?).args(["xds", "status", "--check", "--admin", &admin]).output()?;
    let text = [output.stdout, output.stderr].concat();
    Ok((String::from_utf8(text)?, output.status.code()))
}

fn shows(table: &str, words: &[&str]) -> Result<()> {
    let is = |line: &&str| words.iter().all(|word| line.contains(word));
    table.lines().find(is).with_context(|| format!("no line with {words:?} in\n{table}")).map(drop)
}

fn start(api: &str) -> Result<(ControlPlane, Stream, Daemon)> {
    let control = ControlPlane::start()?;
    let yaml = ads_bootstrap(control.address.port(), api);
    let served = std::thread::spawn(move || {
        let stream = control.stream(DEADLINE)?;
        push(&stream, Cluster::type_url(), "c1", vec![cluster("a")?]);
        push(&stream, Listener::type_url(), "l1", Vec::new());
        anyhow::Ok((control, stream))
    });
    let daemon = Daemon::start(Kind::Culvert, &yaml)?;
    let (control, stream) = served.join().map_err(|_| anyhow::anyhow!("the server panicked"))??;
    Ok((control, stream, daemon))
}

fn nacks_are_shown(api: &str) -> Result<()> {
    let (_control, stream, daemon) = start(api)?;
    for (nonce, second) in [("twice", "a"), ("nameless", "")] {
        push(&stream, Cluster::type_url(), nonce, vec![cluster("a")?, cluster(second)?]);
        let told = answer(&stream, nonce)?.context("a NACK")?;
        ensure!(told.contains("resources[1]"), "{told}");
        let (table, code) = check(&daemon)?;
        shows(&table, &["CDS", "rejected", nonce, &told])?;
        ensure!(code == Some(3), "{code:?}\n{table}");
        push(&stream, Cluster::type_url(), "good", vec![cluster("a")?]);
        ensure!(answer(&stream, "good")?.is_none());
        let (table, code) = check(&daemon)?;
        ensure!(code == Some(0) && !table.contains("rejected"), "{code:?}\n{table}");
    }
    Ok(())
}

#[test]
fn nacks_of_a_state_of_the_world_are_shown() -> Result<()> {
    nacks_are_shown("GRPC")
}

#[test]
fn incremental_nacks_are_shown() -> Result<()> {
    nacks_are_shown("DELTA_GRPC")
}

#[test]
fn a_listener_without_its_routes_fails_the_check() -> Result<()> {
    let (_control, stream, daemon) = start("GRPC")?;
    let manager =
        "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager";
    let router = "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router";
    let from = "{ ads: {}, resource_api_version: V3, initial_fetch_timeout: 0.2s }";
    let yaml = format!(
        "name: in\naddress: {{ socket_address: {{ address: 127.0.0.1, port_value: {} }} }}\nfilter_chains:\n- filters:\n  \
         - name: hcm\n    typed_config: {{ \"@type\": {manager}, stat_prefix: in, rds: {{ route_config_name: web, \
         config_source: {from} }}, http_filters: [{{ name: router, typed_config: {{ \"@type\": {router} }} }}] }}\n",
        free_port()?
    );
    let body = pack(&from_yaml::<Listener>(&yaml)?);
    let listener = Resource { name: "in".to_owned(), version: "1".to_owned(), body };
    push(&stream, Listener::type_url(), "l2", vec![listener]);
    let cluster =
        format!("{{ name: e, type: EDS, connect_timeout: 1s, eds_cluster_config: {{ eds_config: {from} }} }}");
    let body = pack(&from_yaml::<Cluster>(&cluster)?);
    let cluster = Resource { name: "e".to_owned(), version: "1".to_owned(), body };
    push(&stream, Cluster::type_url(), "c2", vec![cluster]);
    wait_until(DEADLINE, "the check to fail", || {
        let (table, code) = check(&daemon)?;
        shows(&table, &["LDS", "incomplete", "serves without the route configuration \"web\""])?;
        shows(&table, &["CDS", "incomplete", "serves without the endpoints \"e\""])?;
        shows(&table, &["RDS", "web", "missing", "has not sent it"])?;
        ensure!(code == Some(3), "{code:?}\n{table}");
        Ok(())
    })
}

#[test]
fn envoy_is_not_culvertd() -> Result<()> {
    let yaml = "static_resources: { clusters: [{ name: a, type: STATIC, connect_timeout: 1s }] }\n";
    let envoy = Daemon::start(Kind::Envoy, yaml)?;
    let (text, code) = check(&envoy)?;
    ensure!(code == Some(1) && text.contains("is not culvertd's admin address"), "{code:?} {text}");
    Ok(())
}

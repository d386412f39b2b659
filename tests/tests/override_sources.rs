//! Whose overrides are obeyed: of pods that the daemon's interception knows, and of clients with certificates. Both allowed and refused.

#[allow(dead_code, clippy::unwrap_used, reason = "shared with the daemon's own tests")]
#[path = "../../proxy-daemon/src/tls/testing.rs"]
mod testing;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use culvert_tests::app::App;
use culvert_tests::binaries::{binary, binary_arg};
use culvert_tests::daemon::{Daemon, Kind, free_port, scratch_dir};
use culvert_tests::lab::{Lab, Pod};
use culvert_tests::stats::admin_get;
use culvert_tests::wait_until;
use testing::{Authority, Issued, yaml};

const DEADLINE: Duration = Duration::from_secs(20);
/// An address that only the daemon knows.
const VIP: &str = "10.96.0.50";

/// The header by which a request asks to be answered with 418 in the place of `users`.
fn header() -> Result<String> {
    let arguments = ["override", "header", "--fault", "users=418", "--format", "baggage"];
    let output = Command::new(binary("culvert")?).args(arguments).output()?;
    ensure!(output.status.success(), "{output:?}");
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

/// HTTP to `users`, with an override filter that obeys these sources.
fn manager(sources: &str) -> String {
    format!(
        r#"
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: ingress
          route_config:
            virtual_hosts: [{{name: all, domains: ["*"], routes: [{{match: {{prefix: /}}, route: {{cluster: "users.default:80"}}}}]}}]
          http_filters:
          - name: culvert.filters.http.override
            typed_config:
              "@type": type.googleapis.com/culvert.extensions.filters.http.overrides.v1.Override
              original_dst_cluster: original_dst
              actions: [FAULT]
              sources: {sources}
              debug_response: true
          - name: envoy.filters.http.router
            typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
"#
    )
}

fn clusters(address: &str, port: u16) -> String {
    format!(
        r#"
  clusters:
  - {{name: original_dst, type: ORIGINAL_DST, lb_policy: CLUSTER_PROVIDED, connect_timeout: 1s}}
  - name: "users.default:80"
    type: STATIC
    connect_timeout: 5s
    load_assignment:
      cluster_name: users
      endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: {address}, port_value: {port}}}}}}}}}]}}]
"#
    )
}

/// Status, and what the proxy says about the overrides, out of what `curl -D -` prints.
fn told(answer: &str) -> Result<(u16, String)> {
    let status = answer.split_whitespace().nth(1).and_then(|status| status.parse().ok()).context(answer.to_owned())?;
    let said = answer.lines().find_map(|line| line.strip_prefix("x-culvert-override: ")).unwrap_or_default();
    Ok((status, said.trim().to_owned()))
}

const OBEYED: (u16, &str) = (418, "users.default:80: applied answered with status 418");
const REFUSED: (u16, &str) = (200, "users.default:80: refused source");

#[test]
fn certificates_that_are_named_are_obeyed() -> Result<()> {
    let (authority, stranger) = (Authority::new("ca"), Authority::new("stranger"));
    let own = authority.issue(&["localhost"], &[]);
    let users = App { pod: "users".into(), revision: "main".into(), upstream: None }.start()?;
    let port = free_port()?;
    let sources = "{principals: ['spiffe://mesh/ns/front/*', desk.test]}";
    // Certificates of strangers are let through, and count for nothing.
    let transport = format!(
        r#"
    - transport_socket:
        name: tls
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext
          common_tls_context:
            tls_certificates: [{{certificate_chain: {{inline_string: {}}}, private_key: {{inline_string: {}}}}}]
            validation_context: {{trusted_ca: {{inline_string: {}}}, trust_chain_verification: ACCEPT_UNTRUSTED}}
      filters:{}"#,
        yaml(&own.chain),
        yaml(&own.key),
        yaml(&authority.pem),
        manager(sources)
    );
    let bootstrap = format!(
        "static_resources:\n  listeners:\n  - name: web\n    address: {{socket_address: {{address: 127.0.0.1, port_value: \
         {port}}}}}\n    filter_chains:{transport}{}",
        clusters("127.0.0.1", users)
    );
    let daemon = Daemon::start(Kind::Culvert, &bootstrap)?;
    let (dir, header) = (scratch_dir()?, header()?);
    fs::write(dir.join("ca.pem"), &authority.pem)?;
    let ask = |name: &str, issued: Option<&Issued>| -> Result<(u16, String)> {
        let path = |file: &str| -> String { dir.join(format!("{name}.{file}")).display().to_string() };
        let mut curl = Command::new("curl");
        curl.args(["-sS", "-m", "20", "-D", "-", "-o", "/dev/null", "--cacert"]).arg(dir.join("ca.pem"));
        curl.args(["--resolve", &format!("localhost:{port}:127.0.0.1"), "-H", &header]);
        // What a client says of itself counts for nothing either.
        curl.args([
            "-H",
            "x-culvert-override-debug: 1",
            "-H",
            "x-forwarded-client-cert: URI=spiffe://mesh/ns/front/sa/a",
        ]);
        if let Some(Issued { chain, key }) = issued {
            fs::write(Path::new(&path("crt")), chain)?;
            fs::write(Path::new(&path("key")), key)?;
            curl.args(["--cert", &path("crt"), "--key", &path("key")]);
        }
        let output = curl.arg(format!("https://localhost:{port}/")).output()?;
        ensure!(output.status.success(), "{name}: {output:?}");
        told(&String::from_utf8(output.stdout)?)
    };
    let issued = |uri: &str, dns: &[&str]| authority.issue(dns, &[uri]);
    for (name, certificate, expected) in [
        ("front", Some(issued("spiffe://mesh/ns/front/sa/front", &[])), OBEYED),
        ("desk", Some(issued("spiffe://mesh/ns/people/sa/desk", &["desk.test"])), OBEYED),
        ("other", Some(issued("spiffe://mesh/ns/other/sa/front", &[])), REFUSED),
        ("longer", Some(issued("spiffe://mesh/ns/people/sa/desk", &["desk.test.evil"])), REFUSED),
        ("forged", Some(stranger.issue(&["desk.test"], &["spiffe://mesh/ns/front/sa/front"])), REFUSED),
        ("nobody", None, REFUSED),
    ] {
        let (status, said) = ask(name, certificate.as_ref())?;
        assert_eq!((status, said.as_str()), expected, "{name}");
    }
    assert_eq!(daemon.stats()?.get("http.ingress.override.refused.source"), 4);
    Ok(())
}

#[test]
fn pods_that_are_named_are_obeyed() -> Result<()> {
    let lab = Lab::new("sources")?;
    let (node, elsewhere) = (lab.node("node-a")?, lab.node("node-b")?);
    let (front, other, users) = (node.pod("front")?, node.pod("other")?, elsewhere.pod("users")?);
    let _users = users.spawn("lab-http", &[&binary_arg("lab-http")?, "--listen", "[::]:8080", "--pod", "users"])?;
    let manifests = lab.dir().join("pods");
    fs::create_dir_all(&manifests)?;
    let enrol = |pod: &Pod, name: &str| -> Result<()> {
        let text = format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: {name}, namespace: shop, labels: {{mesh: 'on'}}}}, spec: {{nodeName: \
             node-a}}, status: {{phase: Running, podIP: '{}'}}}}\n",
            pod.ipv4()
        );
        Ok(fs::write(manifests.join(format!("{name}.yaml")), text)?)
    };
    enrol(&front, "front-7d9f")?;
    enrol(&other, "other-1")?;
    let bootstrap = format!(
        r#"admin: {{address: {{socket_address: {{address: 127.0.0.1, port_value: 9901}}}}}}
static_resources:
  listeners:
  - name: outbound
    address: {{socket_address: {{address: "::", port_value: 15001, ipv4_compat: true}}}}
    transparent: true
    listener_filters:
    - {{name: a, typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.listener.original_dst.v3.OriginalDst}}}}
    - {{name: b, typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.listener.original_src.v3.OriginalSrc}}}}
    filter_chains:
    - filters:{}{}
bootstrap_extensions:
- name: culvert.bootstrap.interception
  typed_config:
    "@type": type.googleapis.com/culvert.extensions.bootstrap.interception.v1.Interception
    interfaces: ["veth-*"]
    uplinks: [eth0]
    shortcut_cgroup: {}
    pin_path: {}
    state_path: {}
    enrolment:
      pod_manifests: {}
      node_name: node-a
      selectors: [{{match_labels: {{mesh: 'on'}}}}]
"#,
        manager("{pods: ['shop/front-*']}"),
        clusters(&users.ipv4().to_string(), 8080),
        node.cgroup().display(),
        node.bpf_dir().join("culvert").display(),
        lab.dir().join("enrolled.json").display(),
        manifests.display(),
    );
    let path = lab.dir().join("culvertd.yaml");
    fs::write(&path, bootstrap)?;
    let path = path.display().to_string();
    let mut daemon = node.spawn("culvertd", &[&binary_arg("culvertd")?, "-c", &path, "--concurrency", "2"])?;
    wait_until(DEADLINE, "culvertd to be ready", || {
        daemon.check_running()?;
        node.inside(|| admin_get("127.0.0.1:9901", "/ready"))
    })?;
    let header = header()?;
    let ask = |pod: &Pod| -> Result<(u16, String)> {
        let (debug, url) = ("x-culvert-override-debug: 1", format!("http://{VIP}/"));
        let curl = ["curl", "-sS", "-m", "10", "-D", "-", "-o", "/dev/null", "-H", &header, "-H", debug, &url];
        told(&pod.run(&curl)?.success()?)
    };
    // Enrolled is who is redirected: nobody else is at that address.
    wait_until(DEADLINE, "both pods to be enrolled", || {
        ask(&front)?;
        ask(&other)
    })?;
    for (pod, expected) in [(&front, OBEYED), (&other, REFUSED)] {
        let (status, said) = ask(pod)?;
        assert_eq!((status, said.as_str()), expected, "{}", pod.name());
    }
    // The pod is the same and is called otherwise: whose name it is decides, not the address.
    fs::remove_file(manifests.join("front-7d9f.yaml"))?;
    enrol(&front, "back-1")?;
    wait_until(DEADLINE, "the pod's new name to be known", || {
        let (status, said) = ask(&front)?;
        ensure!((status, said.as_str()) == REFUSED, "{status} {said}");
        Ok(())
    })
}

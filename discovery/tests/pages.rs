//! `/metrics`, `/status` and the page for people, which is looked at with Chromium.

mod support;

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::path::Path;
use std::process::Command;

use culvert_xds_client::overrides::contexts::{CLUSTER, Carried, Counted, report};
use envoy_types::pb::envoy::config::core::v3::Node;
use envoy_types::pb::envoy::service::load_stats::v3::LoadStatsRequest;
use envoy_types::pb::envoy::service::load_stats::v3::load_reporting_service_client::LoadReportingServiceClient;
use support::{DEADLINE, Program};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

const SERVICES: &str = "
apiVersion: v1
kind: Service
metadata: {name: users}
spec: {clusterIP: 10.96.0.1, selector: {app: users}, ports: [{name: http, port: 80}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: users-1, labels: {kubernetes.io/service-name: users}}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints:
- {addresses: [10.1.0.1], zone: eu-1}
- {addresses: [10.1.0.2], conditions: {ready: false, serving: true, terminating: true}}
---
apiVersion: v1
kind: Pod
metadata: {name: users-x, labels: {app: users, culvert.dev/offloaded: 'true', culvert.dev/revision: feature-x}}
status: {podIP: 10.1.0.9}
";
/// A name that would be a script, were it not escaped.
const HOSTILE: &str = "%3Cimg%20src=x%20onerror=%22document.title='taken'%22%3E";

fn program(directory: &Path) -> Program {
    std::fs::write(directory.join("users.yaml"), SERVICES).unwrap();
    std::fs::write(directory.join("bad.yaml"), "kind: [").unwrap();
    let cluster = format!("east={},region=eu", directory.display());
    let program = Program::start(&["--cluster", &cluster, "--registration", "memory"]);
    let tags = "tags=%7B%22az%22%3A%22a%22%2C%22region%22%3A%22r%22%2C%22instance_id%22%3A%22i%22%7D";
    let form = format!("ip=10.0.0.1&port=80&revision=r&{tags}");
    assert_eq!(program.post(&format!("/v1/registration/{HOSTILE}"), &form).0, 200);
    assert_eq!(program.post("/v1/registration/orders", &form).0, 200);
    let share = r#"{"name": "checkout", "overrides": [{"service": "users", "revision": "feature-x"}]}"#;
    assert_eq!(program.request("POST", "/overrides/shares", "Content-Type: application/json\r\n", share).0, 201);
    program.until("/status", "all services", |status| {
        status["services"].as_array().unwrap().len() == 2 && !status["warnings"].as_array().unwrap().is_empty()
    });
    program
}

#[test]
fn metrics_are_prometheus_text() {
    let directory = tempfile::tempdir().unwrap();
    let program = program(directory.path());
    let (_, head, text) = program.request("GET", "/metrics", "", "");
    assert!(head.contains("text/plain; version=0.0.4"), "{head}");
    let mut families = BTreeSet::new();
    let mut family = String::new();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert!(matches!(kind, "counter" | "gauge"), "{line}");
            assert!(families.insert(name.to_owned()), "{name} comes twice");
            name.clone_into(&mut family);
        } else if !line.starts_with("# HELP ") {
            let (series, value) = line.rsplit_once(' ').unwrap();
            assert_eq!(series.split('{').next(), Some(family.as_str()));
            assert!(value.parse::<f64>().is_ok(), "{line}");
        }
    }
    for line in [
        "culvert_discovery_ready 1",
        "culvert_discovery_source_file_errors{cluster=\"east\"} 1",
        "culvert_discovery_source_stale{cluster=\"east\"} 0",
        "culvert_discovery_cluster_pods{cluster=\"east\"} 1",
        "culvert_discovery_services 2",
        "culvert_discovery_endpoints{health=\"healthy\"} 2",
        "culvert_discovery_endpoints{health=\"draining\"} 1",
        "culvert_discovery_offloaded_endpoints 1",
        "culvert_discovery_override_shares 1",
        "culvert_discovery_tunnels 0",
        "culvert_discovery_resources{kind=\"culvert\",type=\"Cluster\"} 3",
        "culvert_discovery_clients{agent=\"envoy\",variant=\"delta\"} 0",
        "culvert_discovery_registered_hosts 2",
        "culvert_discovery_registrations_check_ins_total 2",
    ] {
        assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
    }
    assert_eq!(program.post("/v1/registration/orders", "").0, 400);
    assert!(program.page("/metrics").contains("\nculvert_discovery_registrations_refused_total 1\n"));
}

#[test]
fn the_status_says_who_is_served_what() {
    let directory = tempfile::tempdir().unwrap();
    let program = program(directory.path());
    let status = program.json("/status");
    assert_eq!(status["version"], env!("CARGO_PKG_VERSION"));
    assert!(status["ready"] == true && status["started"].as_u64() > Some(1_700_000_000));
    let clusters = &status["served"]["culvert"]["type.googleapis.com/envoy.config.cluster.v3.Cluster"];
    assert_eq!((clusters["resources"].as_u64(), clusters["version"].as_str().map(str::len)), (Some(3), Some(16)));
}

/// The page as Chromium has it after its scripts have run.
fn seen_by_chromium(program: &Program, fragment: &str) -> Option<String> {
    let profile = tempfile::tempdir().unwrap();
    let output = Command::new("chromium")
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"])
        // Counts time only while nothing is under way, so that it is the same on a busy machine.
        .args(["--virtual-time-budget=5000", "--dump-dom"])
        .arg(format!("--user-data-dir={}", profile.path().display()))
        .arg(format!("http://{}/{fragment}", program.http))
        .output();
    match output {
        Ok(output) => {
            let page = String::from_utf8(output.stdout).unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            Some(page)
        }
        Err(error) => {
            let ci = std::env::var("CI").is_ok_and(|ci| ci == "true");
            assert!(!ci, "chromium is needed ({error}); `cargo xtask setup` installs it");
            eprintln!("not looked at: chromium cannot be started ({error})");
            None
        }
    }
}

/// What is between the tags of the element with this id.
fn part<'a>(page: &'a str, id: &str) -> &'a str {
    let start = page.find(&format!("id=\"{id}\"")).unwrap_or_else(|| panic!("no {id} in {page}"));
    let rest = &page[start..];
    &rest[..rest.find("</section>").or_else(|| rest.find("</p>")).unwrap()]
}

#[test]
fn the_page_shows_everything_and_escapes_names() {
    let directory = tempfile::tempdir().unwrap();
    let program = program(directory.path());
    // A node that says that it is for what there is not.
    let body = r#"{"node": {"id": "n7", "metadata": {"culvert.proxy": "gateway"}}}"#;
    let mut poll = std::net::TcpStream::connect(program.listen).unwrap();
    let head = "POST /v3/discovery:clusters HTTP/1.1\r\nHost: discovery\r\nConnection: close\r\nContent-Length";
    write!(poll, "{head}: {}\r\n\r\n{body}", body.len()).unwrap();
    let mut answer = String::new();
    poll.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
    let Some(page) = seen_by_chromium(&program, "#users.default%3A80") else { return };
    assert!(part(&page, "summary").contains("ready: 1 cluster, 2 service ports, 0 clients, 3 problems."), "{page}");
    let problems = part(&page, "problems");
    assert!(problems.contains("bad.yaml: not valid YAML") && problems.contains("(not in force)"), "{problems}");
    assert!(problems.contains("node n7: ") && problems.contains("is not node, sidecar or edge"), "{problems}");
    assert!(problems.contains("&lt;img src=x onerror=") && !page.contains("<img"), "{problems}");
    assert!(page.contains("<title>culvert-discovery</title>"));
    assert!(part(&page, "clusters").contains("<th scope=\"row\">east</th><td>eu</td>"), "{page}");
    let services = part(&page, "services");
    assert!(services.contains("<a href=\"#users.default%3A80\">users.default:80</a>"), "{services}");
    assert!(
        services.contains("orders.default:80") && services.contains("<caption>2 service ports</caption>"),
        "{services}"
    );
    let endpoints = part(&page, "endpoints");
    let expected = "<th scope=\"row\">10.1.0.2:8080</th><td>draining</td><td>east</td><td>eu</td>";
    assert!(endpoints.contains(expected) && endpoints.contains("2 endpoints of users.default:80"), "{endpoints}");
    assert!(part(&page, "offloaded").contains("feature-x"), "{page}");
    let shares = part(&page, "shares");
    assert!(shares.contains("checkout") && shares.contains("users=feature-x"), "{shares}");
    assert!(part(&page, "tunnels").contains("None."), "{page}");
    assert!(part(&page, "clients").contains("None."), "{page}");
}

/// Reports contexts as a daemon does that was asked to.
async fn report_contexts(program: &Program, counted: Vec<(Counted, Carried)>) {
    let mut client = LoadReportingServiceClient::connect(format!("http://{}", program.listen)).await.unwrap();
    let (sender, requests) = mpsc::channel(2);
    let node = Some(Node { id: "n".to_owned(), ..Node::default() });
    sender.send(LoadStatsRequest { node, cluster_stats: Vec::new() }).await.unwrap();
    let mut answers = client.stream_load_stats(ReceiverStream::new(requests)).await.unwrap().into_inner();
    let asked = answers.message().await.unwrap().unwrap();
    assert!(asked.send_all_clusters && asked.clusters == [CLUSTER], "{asked:?}");
    let cluster_stats = vec![report(counted, Default::default())];
    sender.send(LoadStatsRequest { node: None, cluster_stats }).await.unwrap();
    // Discovery ends the stream when it has read everything.
    drop(sender);
    assert_eq!(answers.message().await.unwrap(), None);
}

#[test]
fn who_drops_contexts_is_shown() {
    let directory = tempfile::tempdir().unwrap();
    let program = program(directory.path());
    if let Some(page) = seen_by_chromium(&program, "") {
        let contexts = part(&page, "contexts");
        assert!(contexts.contains("No proxy reports: "), "{contexts}");
    }
    let carried = |overrides, trace_only, nothing| Carried { overrides, trace_only, nothing };
    let counted = vec![
        (Counted::To("users.default:80".to_owned()), carried(23, 0, 4)),
        (Counted::From("10.1.0.1".to_owned()), carried(0, 2, 0)),
        (Counted::From("10.1.0.9".to_owned()), carried(0, 1, 5)),
        (Counted::To("orders.default:80".to_owned()), carried(0, 0, 9)),
        (Counted::To("<img>".to_owned()), carried(1, 0, 0)),
    ];
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { tokio::time::timeout(DEADLINE, report_contexts(&program, counted)).await.unwrap() });
    // Whose addresses are whose is found out aside.
    let told = |status: &serde_json::Value| status["contexts"]["services"][1]["went"]["trace_only"] == 3;
    let contexts = program.until("/status", "whose addresses they are", told)["contexts"].clone();
    let verdict = "DROPS them: it passes on trace headers, but not their baggage";
    // Also what none came to here: another replica may know more.
    let orders = serde_json::json!({
        "service": "orders.default", "drops": false, "verdict": "none came to it",
        "came": { "overrides": 0, "trace_only": 0, "nothing": 9 }, "went": { "overrides": 0, "trace_only": 0, "nothing": 0 },
    });
    let expected = serde_json::json!({ "reports": 1, "services": [orders, {
        "service": "users.default", "drops": true, "verdict": verdict,
        "came": { "overrides": 23, "trace_only": 0, "nothing": 4 }, "went": { "overrides": 0, "trace_only": 3, "nothing": 5 },
    }] });
    assert_eq!(contexts, expected);
    let metrics = program.page("/metrics");
    for line in [
        "culvert_discovery_context_reports_total 1",
        "culvert_discovery_context_requests_total{service=\"users.default\",direction=\"went\",carried=\"trace_only\"} 3",
        "culvert_discovery_context_requests_total{service=\"orders.default\",direction=\"came\",carried=\"nothing\"} 9",
        "culvert_discovery_context_dropped{service=\"users.default\"} 1",
    ] {
        assert!(metrics.lines().any(|found| found == line), "{line} is not in\n{metrics}");
    }
    assert!(!metrics.contains("culvert_discovery_context_dropped{service=\"orders.default\"}"), "{metrics}");
    assert!(!program.json("/status")["loads"].to_string().contains(CLUSTER));
    let Some(page) = seen_by_chromium(&program, "") else { return };
    let contexts = part(&page, "contexts");
    let row = "<th scope=\"row\">users.default</th><td>23</td><td>27</td><td>0</td><td>3</td><td>8</td>";
    assert!(!contexts.contains("orders.default"), "{contexts}");
    assert!(contexts.contains(row) && contexts.contains(&format!("<td class=\"bad\">{verdict}</td>")), "{contexts}");
}

#[test]
fn the_page_needs_nothing_from_elsewhere_and_can_be_read_aloud() {
    let program = Program::start(&["--registration", "memory"]);
    let (status, head, page) = program.request("GET", "/", "", "");
    assert_eq!(status, 200);
    let head = head.to_ascii_lowercase();
    assert!(head.contains("content-security-policy: default-src 'none'") && head.contains("nosniff"), "{head}");
    for outside in
        ["http://", "https://", "src=\"", "@import", "innerHTML", "insertAdjacentHTML", "document.write", "eval("]
    {
        assert!(!page.contains(outside), "{outside} is in the page");
    }
    for needed in [
        "<html lang=\"en\">",
        "<main ",
        "role=\"status\"",
        "scope = \"col\"",
        "scope = \"row\"",
        "\"caption\"",
        "<label>",
    ] {
        assert!(page.contains(needed), "{needed} is not in the page");
    }
    // Every section has a heading that names it, and every control a label.
    let named = page.matches("<section aria-labelledby=\"h-").count();
    assert_eq!((named, page.matches("<h2 id=\"h-").count()), (page.matches("<section").count(), named));
    assert_eq!(page.matches("<input").count(), page.matches("<label>").count());
}

//! What a ServiceManifest states holds for requests through the real Envoy, which is configured by the built program.

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use support::Program;
use support::envoy::{Asks, Envoy, free_port, get, serve, status, users, wait_until, write_manifests};

#[test]
fn envoy_does_as_the_manifest_says() {
    let directory = tempfile::tempdir().unwrap();
    let asked = Arc::new(AtomicUsize::new(0));
    let (backend, port, admin) = (serve(Arc::clone(&asked)), free_port(), free_port());
    // The service has the port of the listener: connections to the listener itself are then to that port.
    let manifest = "---
apiVersion: culvert.dev/v1alpha1
kind: ServiceManifest
metadata: {name: users}
spec:
  timeouts: {connect: 2s, request: 700ms, idle: 30s}
  retries: {attempts: 2, retryOn: [5xx]}
  circuitBreakers: {maxConnections: 11, maxPendingRequests: 22, maxRequests: 33, maxRetries: 44}
  outlierDetection: {consecutive5xx: 100, interval: 5s, baseEjectionTime: 10s, maxEjectionPercent: 50}
  rateLimit: {requests: 4, per: 1h}
";
    write_manifests(directory.path(), &(users(port, backend) + manifest));
    let cluster = format!("east={}", directory.path().display());
    let address = ["--outbound-port", &port.to_string(), "--outbound-address", "127.0.0.1"];
    let program = Program::start(&[&["--cluster", &cluster][..], &address].concat());
    let bootstrap = Asks { admin, xds: program.listen.port(), ..Asks::default() }.bootstrap();
    let _envoy = Envoy::start(&bootstrap);
    wait_until("Envoy to serve the service", || {
        get(admin, "/listeners").is_some_and(|listeners| listeners.contains("outbound"))
            && get(admin, "/clusters")
                .is_some_and(|text| text.contains(&format!("127.0.0.1:{backend}::health_flags::healthy")))
            && get(admin, "/config_dump").is_some_and(|dump| dump.contains(&format!("outbound_http_{port}")))
    });
    let clusters = get(admin, "/clusters").unwrap();
    for limit in ["max_connections::11", "max_pending_requests::22", "max_requests::33", "max_retries::44"] {
        let line = format!("users.default:{port}::default_priority::{limit}");
        assert!(clusters.contains(&line), "{line} is not in {clusters}");
    }
    let dump = get(admin, "/config_dump").unwrap();
    assert!(dump.contains("\"max_ejection_percent\": 50") && dump.contains("\"idle_timeout\": \"30s\""), "{dump}");

    // The first one may come before its routes.
    wait_until("an answer", || status(port, "/") == "200");
    asked.store(0, Ordering::SeqCst);
    assert_eq!(status(port, "/fail"), "500");
    assert_eq!(asked.load(Ordering::SeqCst), 3, "one try and two more");
    let started = Instant::now();
    assert_eq!(status(port, "/slow"), "504");
    // Envoy's timers are not exact to the millisecond.
    assert!(started.elapsed() >= Duration::from_millis(650));
    // Four requests in an hour: what was answered before counts.
    let answers: Vec<String> = (0..4).map(|_| status(port, "/")).collect();
    assert_eq!(answers.last().map(String::as_str), Some("429"), "{answers:?}");
    // Envoy rejected nothing of all that.
    let clients = program.json("/status")["clients"].clone();
    assert_eq!((&clients[0]["rejections"], &clients[0]["state"]), (&0.into(), &"in sync".into()), "{clients:#}");
}

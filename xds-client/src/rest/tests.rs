//! The poller against a real HTTP server in this process.

use std::{
    collections::VecDeque,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use http::header;
use http_body_util::Full;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpListener;

use super::*;
use crate::{
    ads::{Interest, type_url::CLUSTER},
    test_sink::{Notes, clusters, wait},
};

/// What the server answers, one after the other; the last for ever. A status of 0: not at all.
type Script = Arc<Mutex<VecDeque<(u16, String)>>>;

/// The path, the host and the body of a request.
type Requests = Arc<Mutex<Vec<(String, String, Value)>>>;

/// A server that plays a script, over HTTP/1.1.
async fn server(script: &[(u16, String)]) -> (String, Requests) {
    let (address, requests, _) = counting_server(script, true).await;
    (address, requests)
}

/// The same, with how many connections there have been; they may last for more than a request.
async fn counting_server(script: &[(u16, String)], keep_alive: bool) -> (String, Requests, Arc<AtomicUsize>) {
    let connections = Arc::new(AtomicUsize::new(0));
    let accepted = Arc::clone(&connections);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let script: Script = Arc::new(Mutex::new(script.iter().cloned().collect()));
    let requests = Requests::default();
    let seen = Arc::clone(&requests);
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            accepted.fetch_add(1, Relaxed);
            let (script, seen) = (Arc::clone(&script), Arc::clone(&seen));
            let service = service_fn(move |request: http::Request<Incoming>| {
                let (script, seen) = (Arc::clone(&script), Arc::clone(&seen));
                async move {
                    let path = request.uri().path().to_owned();
                    let host = request.headers()[header::HOST].to_str().unwrap().to_owned();
                    let body = request.into_body().collect().await?.to_bytes();
                    seen.lock().unwrap().push((path, host, serde_json::from_slice(&body).unwrap()));
                    let (status, body) = {
                        let mut script = script.lock().unwrap();
                        if script.len() > 1 { script.pop_front().unwrap() } else { script[0].clone() }
                    };
                    if status == 0 {
                        std::future::pending::<()>().await;
                    }
                    let response = http::Response::builder().status(status);
                    Ok::<_, hyper::Error>(response.body(Full::new(Bytes::from(body))).unwrap())
                }
            });
            let connection =
                http1::Builder::new().keep_alive(keep_alive).serve_connection(TokioIo::new(stream), service);
            tokio::spawn(connection);
        }
    });
    (address, requests, connections)
}

struct Running {
    notes: Arc<Notes>,
    stats: Arc<ClientStats>,
    interests: Interests,
    task: tokio::task::AbortHandle,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn start(addresses: &[&str]) -> Running {
    start_with(addresses, Duration::from_millis(500))
}

fn start_with(addresses: &[&str], request_timeout: Duration) -> Running {
    let notes = Arc::new(Notes::default());
    let rest = RestSource { cluster: "xds".to_owned(), refresh_delay: Duration::from_millis(10), request_timeout };
    let server = Server::plain(addresses.iter().map(ToString::to_string).collect());
    let node = Node { id: "node-1".to_owned(), ..Default::default() };
    let only = ResourceType::of(CLUSTER).unwrap();
    let client = RestClient::new(rest, server, only, (node, UnknownFields::Ignore), Arc::clone(&notes)).unwrap();
    let (stats, interests) = (client.stats(), client.interests());
    interests.set(CLUSTER, Interest::Wildcard);
    Running { notes, stats, interests, task: tokio::spawn(client.run()).abort_handle() }
}

#[tokio::test]
async fn a_poll_says_who_asks_and_what_is_in_force() {
    let (address, requests) = server(&[(200, clusters("1", &["a"])), (200, clusters("2", &["b"]))]).await;
    let running = start(&[&address]);
    running.notes.expect(&["connected true", "+a -", "+b -a"]).await;
    wait(|| requests.lock().unwrap().len() >= 3).await;
    let requests = requests.lock().unwrap();
    let (path, host, first) = &requests[0];
    assert_eq!((path.as_str(), host.as_str()), ("/v3/discovery:clusters", "xds"));
    assert_eq!((first["node"]["id"].as_str(), first["type_url"].as_str()), (Some("node-1"), Some(CLUSTER)));
    assert_eq!(first["version_info"], Value::Null);
    assert_eq!(requests[1].2["version_info"], "1");
    assert_eq!(requests[2].2["version_info"], "2");
}

#[tokio::test]
async fn polls_share_a_connection_as_long_as_the_server_lets_them() {
    for (keep_alive, shares) in [(true, true), (false, false)] {
        let (address, requests, connections) = counting_server(&[(200, clusters("1", &["a"]))], keep_alive).await;
        let running = start(&[&address]);
        wait(|| requests.lock().unwrap().len() >= 5).await;
        assert_eq!(connections.load(Relaxed) == 1, shares, "{connections:?}");
        assert_eq!(running.stats.of(CLUSTER).update_failure.load(Relaxed), 0, "a closed connection is no fault");
    }
}

#[tokio::test]
async fn an_answer_that_is_as_before_is_counted_and_not_applied_again() {
    let (address, _) = server(&[(200, clusters("1", &["a"]))]).await;
    let running = start(&[&address]);
    let counts = running.stats.of(CLUSTER);
    wait(|| counts.update_success.load(Relaxed) >= 3).await;
    running.notes.expect(&["connected true", "+a -"]).await;
    assert_eq!(counts.version(), "1");
}

#[tokio::test]
async fn a_server_that_fails_is_asked_again_and_changes_nothing() {
    let good = || (200, clusters("1", &["a"]));
    let (address, _) =
        server(&[good(), (503, String::new()), (200, "{".to_owned()), (0, String::new()), (304, String::new())]).await;
    let running = start(&[&address]);
    let counts = running.stats.of(CLUSTER);
    wait(|| counts.update_failure.load(Relaxed) == 2).await;
    wait(|| running.notes.all().len() == 4).await;
    running.notes.expect(&["connected true", "+a -", "connected false", "connected true"]).await;
    assert_eq!((counts.update_success.load(Relaxed), counts.update_rejected.load(Relaxed)), (1, 1));
}

#[tokio::test]
async fn a_rejected_answer_is_counted_each_time() {
    let (address, requests) = server(&[(200, clusters("1", &["bad", "a"]))]).await;
    let running = start(&[&address]);
    let counts = running.stats.of(CLUSTER);
    wait(|| counts.update_rejected.load(Relaxed) >= 2).await;
    assert_eq!(counts.update_success.load(Relaxed), 0);
    assert_eq!(running.notes.all(), ["connected true", "+bad,a -"]);
    assert_eq!(requests.lock().unwrap().last().unwrap().2["version_info"], Value::Null, "it is not in force");
}

/// As Envoy: a poll is an attempt, whatever comes of it, and the sink has to know for the resources that count for themselves.
#[tokio::test]
async fn each_poll_counts_for_what_became_of_it() {
    let (good, bad) = ((200, clusters("1", &["a"])), (200, clusters("2", &["bad"])));
    let nothing = |status: u16| (status, String::new());
    let script =
        [good.clone(), good, nothing(304), (200, "{".to_owned()), nothing(503), bad.clone(), bad, nothing(304)];
    let (address, _) = server(&script).await;
    let running = start(&[&address]);
    let counts = running.stats.of(CLUSTER);
    wait(|| running.notes.counted().len() >= 6).await;
    assert_eq!(
        running.notes.counted()[..6],
        ["Same { accepted: true }", "Unmodified", "Rejected", "failed", "Same { accepted: false }", "Unmodified"]
    );
    let counts = [&counts.update_success, &counts.update_rejected, &counts.update_failure];
    assert_eq!(counts.map(|counter| counter.load(Relaxed)), [2, 3, 1]);
    assert!(running.stats.of(CLUSTER).update_attempt.load(Relaxed) >= 8);
}

#[tokio::test]
async fn a_server_that_is_gone_is_no_fault_of_an_answer() {
    let (address, _) = server(&[(200, clusters("1", &["a"])), (503, String::new())]).await;
    let running = start(&[&address]);
    let counts = running.stats.of(CLUSTER);
    wait(|| counts.update_failure.load(Relaxed) >= 1).await;
    assert_eq!(counts.fault(), None);
    assert!(running.stats.connection().error.unwrap().contains("503"));
}

#[tokio::test]
async fn the_next_address_is_polled_when_one_does_not_answer() {
    let gone = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().to_string();
    let (address, _) = server(&[(200, clusters("1", &["a"]))]).await;
    let running = start(&[&gone, &address]);
    running.notes.expect(&["connected true", "+a -"]).await;
}

#[tokio::test]
async fn what_is_wrong_with_an_answer_is_told_until_it_is_right() {
    let bad = (200, "{nope".to_owned());
    let (address, requests) = server(&[bad.clone(), bad, (200, clusters("1", &["a"]))]).await;
    let running = start(&[&address]);
    let counts = running.stats.of(CLUSTER);
    wait(|| counts.fault().is_some()).await;
    running.notes.expect(&["connected true", "+a -"]).await;
    assert_eq!(counts.fault(), None);
    // Of an answer Envoy counts as rejected whatever is wrong with it.
    assert_eq!((counts.update_rejected.load(Relaxed), counts.update_failure.load(Relaxed)), (2, 0));
    drop(requests);
}

#[tokio::test]
async fn it_is_known_whether_the_server_is_there() {
    let (address, _) = server(&[(503, String::new()), (200, clusters("1", &["a"]))]).await;
    let running = start(&[&address]);
    let connection = running.stats.connection();
    assert_eq!((connection.transport, &*connection.server, connection.connected), ("REST", "cluster xds", false));
    running.notes.expect(&["connected true", "+a -"]).await;
    assert_eq!((running.stats.connection().connected, running.stats.connection().error), (true, None));
}

#[tokio::test]
async fn other_names_and_times_to_live_do_not_wait_for_a_server_that_is_slow() {
    let cluster: Value = serde_json::from_str(&clusters("1", &["a"])).unwrap();
    let wrapped = serde_json::json!({
        "version_info": "1",
        "resources": [{
            "@type": "type.googleapis.com/envoy.service.discovery.v3.Resource",
            "name": "a", "ttl": "0.5s", "resource": cluster["resources"][0],
        }],
    });
    let (address, requests) = server(&[(200, wrapped.to_string()), (0, String::new())]).await;
    // Longer than any test waits.
    let running = start_with(&[&address], crate::test_sink::PATIENCE * 3);
    running.notes.expect(&["connected true", "+a -", "+ -a"]).await;
    wait(|| requests.lock().unwrap().len() == 2).await;
    running.interests.set(CLUSTER, Interest::WildcardAnd(["b".to_owned()].into()));
    wait(|| requests.lock().unwrap().len() == 3).await;
    let names = requests.lock().unwrap()[2].2["resource_names"].to_string();
    assert!(names.contains("\"b\""), "{names}");
}

#[tokio::test]
async fn names_that_change_without_end_let_every_other_answer_be_waited_for() {
    let never = (0, String::new());
    let (address, requests) = server(&[never.clone(), never, (200, clusters("1", &["a"]))]).await;
    let running = start(&[&address]);
    for (name, count) in [("b", 1), ("c", 2)] {
        wait(|| requests.lock().unwrap().len() == count).await;
        running.interests.set(CLUSTER, Interest::WildcardAnd([name.to_owned()].into()));
    }
    running.notes.expect(&["connected true", "+a -"]).await;
    assert_eq!(running.stats.of(CLUSTER).update_failure.load(Relaxed), 1, "the second was given its time");
    let third = requests.lock().unwrap()[2].2["resource_names"].to_string();
    assert!(third.contains("\"c\""), "{third}");
}

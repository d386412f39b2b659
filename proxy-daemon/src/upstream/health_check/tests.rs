use std::{convert::Infallible, net::SocketAddr, sync::Mutex};

use ::http::{HeaderMap, Response, StatusCode, header::CONTENT_TYPE};
use bytes::Bytes;
use http_body_util::{BodyExt, StreamBody};
use hyper::{Request, body::Frame, body::Incoming, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};

use super::*;
use crate::config::model::{GrpcCheck, HeaderMutations, TcpCheck};

const DEADLINE: Duration = Duration::from_secs(10);

fn config(check: Check) -> HealthCheckConfig {
    let often = Duration::from_millis(20);
    HealthCheckConfig {
        name: String::new(),
        timeout: Duration::from_secs(5),
        interval: often,
        initial_jitter: Duration::ZERO,
        interval_jitter: Duration::ZERO,
        interval_jitter_percent: 0,
        unhealthy_threshold: 1,
        healthy_threshold: 1,
        reuse_connection: true,
        no_traffic_interval: often,
        no_traffic_healthy_interval: often,
        unhealthy_interval: often,
        unhealthy_edge_interval: often,
        healthy_edge_interval: often,
        always_log_failures: false,
        always_log_success: false,
        event_logs: Vec::new(),
        alpn_protocols: Vec::new(),
        socket_labels: None,
        check,
    }
}

fn start(config: HealthCheckConfig, address: SocketAddr, cluster: &str) -> HealthChecker {
    let stats = HealthCheckStats::new(Scope::cluster(cluster), "");
    HealthChecker::start(
        Arc::new(config),
        Target::plain(EndpointAddress::Ip(address)),
        Health::default(),
        stats,
        Arc::new(|| true),
    )
}

async fn until(checker: &HealthChecker, wanted: impl FnMut(&Health) -> bool) -> Health {
    let mut watch = checker.watch();
    *tokio::time::timeout(DEADLINE, watch.wait_for(wanted)).await.expect("in time").expect("it is checked")
}

/// Waits until this holds.
async fn eventually(holds: impl Fn() -> bool) {
    let looks = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(DEADLINE, looks).await.expect("in time");
}

fn stat(cluster: &str, leaf: &str) -> u64 {
    Scope::cluster(cluster).child("health_check").counter(leaf).value()
}

#[test]
fn blocks_are_found_in_their_order() {
    let blocks = |blocks: &[&str]| blocks.iter().map(|block| block.as_bytes().to_vec()).collect::<Vec<_>>();
    for (text, wanted, expected) in [
        ("abcabc", &["b", "a"][..], true),
        ("abc", &["b", "a"], false),
        ("abab", &["ab", "ab"], true),
        ("aba", &["ab", "ba"], false),
        ("", &[], true),
        ("", &[""], true),
        ("a", &["ab"], false),
    ] {
        assert_eq!(contains(text.as_bytes(), &blocks(wanted)), expected, "{text} {wanted:?}");
    }
}

/// Answers bytes with the bytes of `answer` at that time; counts connections.
async fn tcp_host(answer: Arc<Mutex<Vec<u8>>>) -> (SocketAddr, Arc<Mutex<u32>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let connections = Arc::new(Mutex::new(0));
    let counted = Arc::clone(&connections);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            *counted.lock().unwrap() += 1;
            let answer = Arc::clone(&answer);
            tokio::spawn(async move {
                let mut buffer = [0; 64];
                while stream.read(&mut buffer).await.is_ok_and(|read| read > 0) {
                    let answer = answer.lock().unwrap().clone();
                    // An empty answer closes.
                    if answer.is_empty() || stream.write_all(&answer).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    (address, connections)
}

fn ping() -> Check {
    Check::Tcp(TcpCheck { send: b"ping".to_vec(), receive: vec![b"po".to_vec(), b"ng".to_vec()] })
}

#[tokio::test]
async fn one_connection_serves_all_checks_until_it_breaks() {
    let answer = Arc::new(Mutex::new(b"pong".to_vec()));
    let (address, connections) = tcp_host(Arc::clone(&answer)).await;
    let checker = start(config(ping()), address, "tcp_reuse");
    until(&checker, |health| health.healthy).await;
    eventually(|| stat("tcp_reuse", "success") >= 5).await;
    assert_eq!(*connections.lock().unwrap(), 1);
    answer.lock().unwrap().clear();
    let health = until(&checker, |health| !health.healthy).await;
    assert!(!health.timed_out);
    assert!(stat("tcp_reuse", "network_failure") > 0);
    *answer.lock().unwrap() = b"pong".to_vec();
    until(&checker, |health| health.healthy).await;
    assert!(*connections.lock().unwrap() > 1);
    let gauge = Scope::cluster("tcp_reuse").child("health_check").gauge("healthy");
    assert_eq!(gauge.value(), 1);
    drop(checker);
    eventually(|| gauge.value() == 0).await;
}

#[tokio::test]
async fn connections_are_not_kept_where_they_shall_not_be() {
    let (address, connections) = tcp_host(Arc::new(Mutex::new(b"pong".to_vec()))).await;
    let checker = start(HealthCheckConfig { reuse_connection: false, ..config(ping()) }, address, "tcp_fresh");
    until(&checker, |health| health.healthy).await;
    eventually(|| *connections.lock().unwrap() >= 3).await;
}

#[tokio::test]
async fn a_host_that_says_too_much_is_not_listened_to_for_ever() {
    let (address, _) = tcp_host(Arc::new(Mutex::new(vec![b'x'; 1024 * 1024]))).await;
    let checker = start(config(ping()), address, "tcp_flood");
    // Healthy never; but it is an answer, and not a timeout.
    eventually(|| stat("tcp_flood", "failure") > 0).await;
    assert!(!checker.health().healthy && !checker.health().timed_out);
}

#[tokio::test]
async fn silence_is_a_timeout() {
    let (address, _) = tcp_host(Arc::new(Mutex::new(b"x".to_vec()))).await;
    let checker =
        start(HealthCheckConfig { timeout: Duration::from_millis(50), ..config(ping()) }, address, "tcp_late");
    until(&checker, |health| health.timed_out).await;
}

/// What a gRPC host answers: HTTP status, grpc-status in the trailers, body.
type Answer = (u16, &'static str, &'static [u8]);

const SERVES: &[u8] = &[0, 0, 0, 0, 2, 8, 1];
const DOES_NOT: &[u8] = &[0, 0, 0, 0, 2, 8, 2];

async fn grpc_host(answer: Arc<Mutex<Answer>>, seen: Arc<Mutex<Option<(String, HeaderMap, Bytes)>>>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (answer, seen) = (Arc::clone(&answer), Arc::clone(&seen));
            let service = service_fn(move |request: Request<Incoming>| {
                let (answer, seen) = (Arc::clone(&answer), Arc::clone(&seen));
                async move {
                    let (uri, headers) = (request.uri().to_string(), request.headers().clone());
                    let body = request.into_body().collect().await.unwrap().to_bytes();
                    *seen.lock().unwrap() = Some((uri, headers, body));
                    let (status, grpc_status, body) = *answer.lock().unwrap();
                    let mut trailers = HeaderMap::new();
                    if !grpc_status.is_empty() {
                        trailers.insert("grpc-status", grpc_status.parse().unwrap());
                    }
                    let frames =
                        [Ok::<_, Infallible>(Frame::data(Bytes::from_static(body))), Ok(Frame::trailers(trailers))];
                    let body = StreamBody::new(futures_util::stream::iter(frames));
                    let mut response = Response::new(body);
                    *response.status_mut() = StatusCode::from_u16(status).unwrap();
                    Ok::<_, Infallible>(response)
                }
            });
            let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            tokio::spawn(server.serve_connection(TokioIo::new(stream), service));
        }
    });
    address
}

#[tokio::test]
async fn grpc_hosts_say_whether_they_serve() {
    let answer: Arc<Mutex<Answer>> = Arc::new(Mutex::new((200, "0", SERVES)));
    let seen = Arc::default();
    let address = grpc_host(Arc::clone(&answer), Arc::clone(&seen)).await;
    let check = GrpcCheck {
        service_name: "svc".to_owned(),
        authority: "a.example".parse().unwrap(),
        authority_is_default: false,
        headers: HeaderMutations::default(),
    };
    let checker = start(config(Check::Grpc(check)), address, "grpc");
    until(&checker, |health| health.healthy).await;
    let (uri, headers, body) = seen.lock().unwrap().take().unwrap();
    assert_eq!(uri, "http://a.example/grpc.health.v1.Health/Check");
    assert_eq!(headers[CONTENT_TYPE], "application/grpc");
    assert_eq!((&headers["te"], &headers["user-agent"]), (&"trailers".parse().unwrap(), &"Envoy/HC".parse().unwrap()));
    assert_eq!(body, &b"\0\0\0\0\x05\x0a\x03svc"[..]);
    let bad: [Answer; 7] = [
        (200, "0", DOES_NOT),
        (200, "14", SERVES),
        (200, "", SERVES),
        (503, "0", SERVES),
        (200, "0", b""),
        (200, "0", &SERVES[..6]),
        (200, "0", &[1, 0, 0, 0, 2, 8, 1]),
    ];
    for bad in bad {
        *answer.lock().unwrap() = bad;
        until(&checker, |health| !health.healthy).await;
        *answer.lock().unwrap() = (200, "0", SERVES);
        until(&checker, |health| health.healthy).await;
    }
}

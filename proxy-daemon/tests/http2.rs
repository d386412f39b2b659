//! HTTP/2 on either side, with trailers and streaming, through the data plane's own handle.

#![allow(missing_docs, clippy::unwrap_used, reason = "a test")]

#[path = "support/executor.rs"]
mod executor;
mod support;

use std::{convert::Infallible, net::SocketAddr, sync::Arc};

use bytes::Bytes;
use culvert_proxy_daemon::{
    config::model::{ClusterConfig, Http2Options, LbPolicy, UpstreamProtocol},
    runtime::{DataPlane, Options},
};
use executor::LocalExecutor;
use http_body_util::{BodyExt, Full, StreamBody, channel::Channel};
use hyper::{Request, Response, body::Frame, service::service_fn};
use hyper_util::rt::TokioIo;
use support::{Upstream, cluster, http_listener};

fn run(test: impl Future<Output = ()>) {
    let local = tokio::task::LocalSet::new();
    local.block_on(&support::runtime(), test);
}

fn start() -> DataPlane {
    DataPlane::start(Options { workers: 1, drain_time: std::time::Duration::from_secs(5), interception: None }).unwrap()
}

/// An HTTP/2 server that sends back what it gets, then trailers.
async fn echo_with_trailers() -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::task::spawn_local(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let service = service_fn(|request: Request<hyper::body::Incoming>| async move {
                let authority = request.uri().authority().unwrap().to_string();
                let data = request.into_body().collect().await.unwrap().to_bytes();
                let mut trailers = http::HeaderMap::new();
                trailers.insert("grpc-status", "0".parse().unwrap());
                let frames = [Ok::<_, Infallible>(Frame::data(data)), Ok(Frame::trailers(trailers))];
                let body = StreamBody::new(tokio_stream_of(frames));
                Ok::<_, Infallible>(Response::builder().header("x-authority", authority).body(body).unwrap())
            });
            let connection =
                hyper::server::conn::http2::Builder::new(LocalExecutor).serve_connection(TokioIo::new(stream), service);
            tokio::task::spawn_local(async move { drop(connection.await) });
        }
    });
    address
}

fn tokio_stream_of<T>(items: impl IntoIterator<Item = T>) -> impl futures_util::Stream<Item = T> {
    futures_util::stream::iter(items)
}

fn http2_cluster(name: &str, host: SocketAddr) -> ClusterConfig {
    let protocol = UpstreamProtocol::Http2(Http2Options::default());
    ClusterConfig { protocol, ..cluster(name, [host], LbPolicy::RoundRobin) }
}

async fn client<B>(address: SocketAddr) -> hyper::client::conn::http2::SendRequest<B>
where
    B: http_body::Body<Data = Bytes> + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let (sender, connection) =
        hyper::client::conn::http2::handshake(LocalExecutor, TokioIo::new(stream)).await.unwrap();
    tokio::task::spawn_local(async move { drop(connection.await) });
    sender
}

#[test]
fn trailers_pass_from_http2_to_http2() {
    run(async {
        let plane = start();
        plane.upsert_cluster(http2_cluster("a", echo_with_trailers().await));
        let address = http_listener(&plane, "l", "a", |_| {}).await;
        let mut client = client(address).await;
        let request = Request::post("http://svc.test/x").body(Full::new(Bytes::from_static(b"payload"))).unwrap();
        let response = client.send_request(request).await.unwrap();
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["x-authority"], "svc.test");
        let collected = response.into_body().collect().await.unwrap();
        assert_eq!(collected.trailers().unwrap()["grpc-status"], "0");
        assert_eq!(collected.to_bytes(), "payload");
        plane.stop();
    });
}

#[test]
fn bodies_stream_while_the_request_is_open() {
    run(async {
        let plane = start();
        plane.upsert_cluster(http2_cluster("a", echo_with_trailers().await));
        let address = http_listener(&plane, "l", "a", |_| {}).await;
        let mut client = client(address).await;
        let (mut sender, body) = Channel::<Bytes, Infallible>::new(1);
        let response = client.send_request(Request::post("http://a/").body(body).unwrap());
        let feed = async move {
            for _ in 0..100 {
                sender.send_data(Bytes::from(vec![7; 10_000])).await.unwrap();
            }
        };
        let (response, ()) = futures_util::join!(response, feed);
        assert_eq!(response.unwrap().into_body().collect().await.unwrap().to_bytes().len(), 1_000_000);
        plane.stop();
    });
}

#[test]
fn http2_clients_reach_http1_hosts_on_one_connection() {
    run(async {
        let upstream = Upstream::http("one");
        let plane = start();
        plane.upsert_cluster(cluster("a", [upstream.address], LbPolicy::RoundRobin));
        let address = http_listener(&plane, "l", "a", |_| {}).await;
        let mut client = client::<Full<Bytes>>(address).await;
        for _ in 0..10 {
            let response = client.send_request(Request::get("http://svc.test/x").body(Full::default()).unwrap());
            assert_eq!(response.await.unwrap().into_body().collect().await.unwrap().to_bytes(), "one");
        }
        let seen = upstream.last_request();
        assert!(seen.contains("host: svc.test\r\n"), "{seen}");
        assert_eq!(upstream.connections(), 1);
        plane.stop();
    });
}

#[test]
fn a_grpc_request_gets_a_grpc_error() {
    run(async {
        let plane = start();
        plane.upsert_cluster(http2_cluster("a", support::closed_port()));
        let address = http_listener(&plane, "l", "a", |_| {}).await;
        let mut client = client::<Full<Bytes>>(address).await;
        let request = Request::post("http://a/pkg.Service/Method").header("content-type", "application/grpc");
        let response = client.send_request(request.body(Full::default()).unwrap()).await.unwrap();
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["grpc-status"], "14");
        assert!(response.headers()["grpc-message"].to_str().unwrap().contains("remote connection failure"));
        plane.stop();
    });
}

#[test]
fn many_streams_share_one_upstream_connection() {
    run(async {
        let plane = start();
        let config = http2_cluster("shared", echo_with_trailers().await);
        plane.upsert_cluster(config);
        let address = http_listener(&plane, "l", "shared", |_| {}).await;
        let client = client::<Full<Bytes>>(address).await;
        let requests = (0..50).map(|_| {
            let mut client = client.clone();
            async move {
                let request = Request::post("http://a/").body(Full::new(Bytes::from_static(b"x"))).unwrap();
                client.send_request(request).await.unwrap().into_body().collect().await.unwrap().to_bytes()
            }
        });
        let bodies = futures_util::future::join_all(requests).await;
        assert!(bodies.iter().all(|body| body == "x"));
        let stats = Arc::clone(&plane.clusters()["shared"]);
        assert_eq!(stats.stats.upstream_cx_total.value(), 1);
        assert_eq!(stats.stats.upstream_rq_total.value(), 50);
        plane.stop();
    });
}

/// An HTTP/2 server that resets its streams after so many messages of a response.
async fn breaks_off(messages: usize) -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::task::spawn_local(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::task::spawn_local(async move {
                let mut connection = h2::server::handshake(stream).await.unwrap();
                while let Some(Ok((_, mut respond))) = connection.accept().await {
                    let mut stream = respond.send_response(Response::new(()), false).unwrap();
                    for _ in 0..messages {
                        stream.send_data(Bytes::from(vec![b'm'; 1000]), false).unwrap();
                    }
                    tokio::task::spawn_local(async move {
                        // What was sent is on its way.
                        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                        stream.send_reset(h2::Reason::INTERNAL_ERROR);
                    });
                }
            });
        }
    });
    address
}

#[test]
fn what_came_before_a_host_reset_its_stream_is_the_clients() {
    run(async {
        let plane = start();
        plane.upsert_cluster(http2_cluster("a", breaks_off(20).await));
        let address = http_listener(&plane, "l", "a", |_| {}).await;
        let mut client = client::<Full<Bytes>>(address).await;
        for _ in 0..20 {
            let response = client.send_request(Request::get("http://a/").body(Full::default()).unwrap());
            let mut body = response.await.unwrap().into_body();
            let (mut length, mut broken) = (0, None);
            while let Some(frame) = body.frame().await {
                match frame {
                    Ok(frame) => length += frame.into_data().map_or(0, |data| data.len()),
                    Err(error) => {
                        broken = Some(error);
                        break;
                    }
                }
            }
            assert_eq!(length, 20_000);
            let error = broken.expect("the stream is reset");
            let error = std::error::Error::source(&error).unwrap().downcast_ref::<h2::Error>().unwrap();
            assert_eq!(error.reason(), Some(h2::Reason::INTERNAL_ERROR));
        }
        plane.stop();
    });
}

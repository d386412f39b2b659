//! What hosts report of their load apart from responses: a stream of `xds.service.orca.v3.OpenRcaService` to each host, as
//! `enable_oob_load_report` asks for.

use std::{
    collections::HashMap,
    sync::{Arc, Weak},
    time::Duration,
};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use envoy_types::pb::google::protobuf as pb;
use http::{
    HeaderValue, Method, Request, StatusCode, Uri, Version,
    header::{CONTENT_TYPE, TE},
    uri::{Authority, PathAndQuery, Scheme},
};
use http_body_util::{BodyExt, Full};
use prost::Message;
use tokio::{task::JoinHandle, time::timeout};

use super::{Cluster, LoadReport};
use crate::{
    config::model::{EndpointAddress, OrcaStream},
    http::headers::names::GRPC_STATUS,
    stats::{Counter, Gauge},
    upstream::{
        Host,
        health_check::{HttpConnection, Place, Target, Way, part},
        vitals::Vitals,
    },
};

/// Before each message: whether it is compressed, and its length.
const PREFIX: usize = 5;
/// The longest report that is read, in bytes. Envoy's number.
const MAX_REPORT: usize = 64 * 1024;
/// A stream that has failed is begun again after a part of this, of twice as much the next time, and so on up to the longest.
const FIRST_WAIT: Duration = Duration::from_secs(1);
const LONGEST_WAIT: Duration = Duration::from_secs(30);
/// A stream on which nothing has come for so many periods has failed.
const PATIENCE: u32 = 3;
/// `grpc-status`: the host does not know the service, and is not asked again.
const UNIMPLEMENTED: &[u8] = b"12";

/// `xds.service.orca.v3.OrcaLoadReportRequest`
#[derive(Clone, PartialEq, Message)]
struct LoadReportRequest {
    #[prost(message, optional, tag = "1")]
    report_interval: Option<pb::Duration>,
}

/// `cluster.<name>.lb_orca_oob.*`, as Envoy names them.
#[derive(Debug, Clone, Copy)]
struct Counted {
    active_sessions: Gauge,
    reports_received: Counter,
    report_errors: Counter,
    stream_failures: Counter,
    stream_terminated: Counter,
}

impl Counted {
    fn new(cluster: &Cluster) -> Counted {
        let scope = cluster.stats.scope().clone().child("lb_orca_oob");
        Counted {
            active_sessions: scope.gauge("active_sessions"),
            reports_received: scope.counter("reports_received"),
            report_errors: scope.counter("report_errors"),
            stream_failures: scope.counter("stream_failures"),
            stream_terminated: scope.counter("stream_terminated"),
        }
    }
}

/// The stream to a host, for as long as this lives.
struct Running {
    task: JoinHandle<()>,
    active: Gauge,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
        // One that has ended by itself is not counted any more.
        if !self.task.is_finished() {
            self.active.dec();
        }
    }
}

/// Keeps a stream to each host of a cluster, until the cluster is gone or replaced. Ends at once where none are wanted.
pub(crate) async fn watch(cluster: Weak<Cluster>) {
    let Some((mut changes, counted)) =
        cluster.upgrade().and_then(|cluster| Some((cluster.outside.as_ref()?.subscribe(), Counted::new(&cluster))))
    else {
        return;
    };
    // By where is what is known of a host, which a stream holds: no other host has it there.
    let mut streams: HashMap<usize, Running> = HashMap::new();
    loop {
        let Some(cluster) = cluster.upgrade().filter(|_| !*changes.borrow_and_update()) else { return };
        let hosts = cluster.hosts();
        let mut before = std::mem::take(&mut streams);
        for host in &hosts.hosts {
            let Some(vitals) = &host.vitals else { continue };
            let key = Arc::as_ptr(vitals).addr();
            let stream = before.remove(&key).or_else(|| begin(host, vitals, &cluster, counted));
            streams.extend(stream.map(|stream| (key, stream)));
        }
        drop((before, hosts, cluster));
        if changes.changed().await.is_err() {
            return;
        }
    }
}

fn begin(host: &Host, vitals: &Arc<Vitals>, cluster: &Cluster, counted: Counted) -> Option<Running> {
    let config = cluster.config.lb.weights.as_ref()?.stream.clone()?;
    let details = host.details();
    let socket = match &config.socket_labels {
        Some(labels) => {
            let localitys = details.and_then(|details| details.locality_socket_labels.as_deref());
            cluster.config.socket_matches.by(Some(labels), localitys)
        }
        None => host.socket,
    };
    let mut address = host.address.clone();
    if let (EndpointAddress::Ip(address), Some(port)) = (&mut address, config.port) {
        address.set_port(port);
    }
    let text = match &address {
        EndpointAddress::Ip(address) => address.to_string(),
        EndpointAddress::Dns { .. } | EndpointAddress::Pipe(_) => cluster.config.name.to_string(),
    };
    // What no request can say is said by none.
    let authority = config.authority.clone().or_else(|| host.hostname().parse().ok()).or_else(|| text.parse().ok());
    let authority = authority.unwrap_or_else(|| Authority::from_static("localhost"));
    let tls = cluster.sockets.get(socket).cloned();
    let place = Place::new(Way { address, host: host.text.clone(), tls, chosen: None });
    let target = Target { place, name: host.hostname().into(), host: None, bind: cluster.config.bind.clone() };
    let stream = Stream { config, target, authority, vitals: Arc::clone(vitals), counted };
    counted.active_sessions.inc();
    Some(Running { task: tokio::spawn(stream.run()), active: counted.active_sessions })
}

struct Stream {
    config: Arc<OrcaStream>,
    target: Target,
    authority: Authority,
    vitals: Arc<Vitals>,
    counted: Counted,
}

/// How a stream has ended.
enum End {
    /// The host does not know the service.
    Unknown,
    /// In any other way; whether a report had come.
    Failed { reported: bool },
}

impl Stream {
    async fn run(self) {
        // Hosts that come together are not asked together.
        tokio::time::sleep(part(self.config.period)).await;
        let mut wait = FIRST_WAIT;
        loop {
            match self.follow().await {
                End::Unknown => {
                    self.counted.stream_terminated.inc();
                    self.counted.active_sessions.dec();
                    return;
                }
                End::Failed { reported } => {
                    self.counted.stream_failures.inc();
                    if reported {
                        wait = FIRST_WAIT;
                    }
                    tokio::time::sleep(part(wait)).await;
                    wait = LONGEST_WAIT.min(wait * 2);
                }
            }
        }
    }

    /// Asks for reports, and takes those that come until the stream ends.
    async fn follow(&self) -> End {
        let patience = self.config.period.saturating_mul(PATIENCE);
        let mut reported = false;
        let failed = |reported| End::Failed { reported };
        let opened = timeout(patience, async {
            let mut connection = HttpConnection::open(&self.target, true).await.ok()?;
            let response = connection.send(self.request()).await.ok()?;
            Some((connection, response))
        });
        // The connection ends with the stream.
        let Ok(Some((_connection, response))) = opened.await else { return failed(reported) };
        let (head, mut body) = response.into_parts();
        if let Some(status) = head.headers.get(GRPC_STATUS) {
            return if status.as_bytes() == UNIMPLEMENTED { End::Unknown } else { failed(reported) };
        }
        // Envoy takes "not found" for a service that is not known.
        if head.status == StatusCode::NOT_FOUND {
            return End::Unknown;
        }
        if head.status != StatusCode::OK {
            return failed(reported);
        }
        let mut read = BytesMut::new();
        while let Ok(Some(Ok(frame))) = timeout(patience, body.frame()).await {
            if let Some(trailers) = frame.trailers_ref() {
                let unknown = trailers.get(GRPC_STATUS).is_some_and(|status| status.as_bytes() == UNIMPLEMENTED);
                return if unknown { End::Unknown } else { failed(reported) };
            }
            read.extend_from_slice(frame.data_ref().map(Bytes::as_ref).unwrap_or_default());
            while let Some(prefix) = read.first_chunk::<PREFIX>() {
                let [compressed, length @ ..] = *prefix;
                let length = u32::from_be_bytes(length) as usize;
                if compressed != 0 || length > MAX_REPORT {
                    return failed(reported);
                }
                if read.len() < PREFIX + length {
                    break;
                }
                read.advance(PREFIX);
                let message = read.split_to(length);
                if message.is_empty() {
                    continue;
                }
                let Ok(report) = LoadReport::decode(message) else { return failed(reported) };
                reported = true;
                self.counted.reports_received.inc();
                if !self.vitals.reports().is_some_and(|reports| reports.told_outside(&report)) {
                    self.counted.report_errors.inc();
                }
            }
        }
        failed(reported)
    }

    fn request(&self) -> Request<Full<Bytes>> {
        let period = self.config.period;
        // What a configuration can say fits.
        let period = pb::Duration { seconds: period.as_secs() as i64, nanos: period.subsec_nanos() as i32 };
        let message = LoadReportRequest { report_interval: Some(period) }.encode_to_vec();
        let mut body = BytesMut::with_capacity(PREFIX + message.len());
        body.put_u8(0);
        // A number: far shorter than 4 GiB.
        body.put_u32(message.len() as u32);
        body.extend_from_slice(&message);
        let mut request = Request::new(Full::new(body.freeze()));
        *request.method_mut() = Method::POST;
        *request.version_mut() = Version::HTTP_2;
        let mut uri = http::uri::Parts::default();
        uri.scheme = Some(if self.target.is_encrypted() { Scheme::HTTPS } else { Scheme::HTTP });
        uri.authority = Some(self.authority.clone());
        uri.path_and_query = Some(PathAndQuery::from_static("/xds.service.orca.v3.OpenRcaService/StreamCoreMetrics"));
        // All three parts: always valid.
        *request.uri_mut() = Uri::from_parts(uri).unwrap_or_default();
        request.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        request.headers_mut().insert(TE, HeaderValue::from_static("trailers"));
        request
    }
}

//! Hosts that report their load apart from responses (`enable_oob_load_report`): how culvertd and the real Envoy ask for that, and what both
//! make of what comes.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::{BufMut, Bytes, BytesMut};
use culvert_tests::bootstrap::Bootstrap;
use culvert_tests::daemon::fetch;
use culvert_tests::http1::Request;
use culvert_tests::{server, wait_until};

use super::*;

const DEADLINE: Duration = Duration::from_secs(60);
const HTTP2: &str = "typed_extension_protocol_options: {envoy.extensions.upstreams.http.v3.HttpProtocolOptions: \
                     {\"@type\": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, \
                     explicit_http_config: {http2_protocol_options: {}}}}";

/// What a host does when it is asked for reports.
#[derive(Clone, Copy)]
enum Says {
    /// So many requests a second at full load, again and again.
    Weight(u32),
    /// The same once, and then the stream fails.
    Once(u32),
    /// Reports of which nothing can be made.
    NoRequests,
    /// It does not know the service.
    Unknown,
    /// It is no service at all.
    NotFound,
    /// Something that is no report.
    Garbage,
}

type Seen = Arc<Mutex<BTreeSet<String>>>;

/// `xds.data.orca.v3.OrcaLoadReport` with `cpu_utilization` 0.5, behind gRPC's prefix.
fn report(weight: u32) -> Bytes {
    let mut message = BytesMut::new();
    message.put_u8(0x09);
    message.put_f64_le(0.5);
    message.put_u8(0x31);
    message.put_f64_le(f64::from(weight) / 2.0);
    let mut framed = BytesMut::new();
    framed.put_u8(0);
    framed.put_u32(message.len() as u32);
    framed.extend_from_slice(&message);
    framed.freeze()
}

/// A host over HTTP/2. Where it does not know the service, its responses report a weight of 9999.
fn host(says: Says, seen: &Seen) -> Result<u16> {
    let seen = Arc::clone(seen);
    server::start_async(move |stream| {
        let seen = Arc::clone(&seen);
        async move {
            let mut connection = h2::server::handshake(stream).await?;
            while let Some(request) = connection.accept().await {
                let (request, respond) = request?;
                let seen = Arc::clone(&seen);
                // A proxy that breaks off is no failure of the host.
                tokio::spawn(async move { drop(answer(request, respond, says, &seen).await) });
            }
            Ok(())
        }
    })
}

async fn answer(
    request: http::Request<h2::RecvStream>,
    mut respond: h2::server::SendResponse<Bytes>,
    says: Says,
    seen: &Seen,
) -> Result<()> {
    let (head, mut body) = request.into_parts();
    let mut response = http::Response::new(());
    if !head.uri.path().starts_with("/xds.") {
        if let Says::Unknown = says {
            let in_band = "TEXT rps_fractional=9999,cpu_utilization=1".parse()?;
            response.headers_mut().insert("endpoint-load-metrics", in_band);
        }
        respond.send_response(response, true)?;
        return Ok(());
    }
    let mut asked = Vec::new();
    while let Some(data) = body.data().await {
        asked.extend_from_slice(&data?);
    }
    // culvertd says how long its request is, which means nothing over HTTP/2.
    let headers = head.headers.iter().filter(|(name, _)| *name != http::header::CONTENT_LENGTH);
    let mut headers: Vec<_> = headers.map(|(name, value)| format!("{name}={value:?}")).collect();
    headers.sort();
    let authority = head.uri.authority().map(|authority| authority.host().to_owned());
    let note =
        format!("{} {} {authority:?} {:?} {headers:?} {asked:?}", head.method, head.uri.path(), head.uri.scheme_str());
    seen.lock().unwrap_or_else(PoisonError::into_inner).insert(note);
    response.headers_mut().insert("content-type", "application/grpc".parse()?);
    match says {
        Says::Unknown => {
            response.headers_mut().insert("grpc-status", "12".parse()?);
            respond.send_response(response, true)?;
        }
        Says::NotFound => {
            *response.status_mut() = http::StatusCode::NOT_FOUND;
            respond.send_response(response, true)?;
        }
        Says::Garbage => {
            let mut stream = respond.send_response(response, false)?;
            stream.send_data(Bytes::from_static(b"\0\0\0\0\x02\x09\xff"), false)?;
            std::future::pending().await
        }
        Says::Once(weight) => {
            let mut stream = respond.send_response(response, false)?;
            stream.send_data(report(weight), false)?;
            stream.send_trailers([("grpc-status".parse()?, "14".parse()?)].into_iter().collect())?;
        }
        Says::Weight(_) | Says::NoRequests => {
            let mut stream = respond.send_response(response, false)?;
            let report = if let Says::Weight(weight) = says { report(weight) } else { report(0) };
            // In two pieces.
            let (first, second) = (report.slice(..7), report.slice(7..));
            loop {
                stream.send_data(first.clone(), false)?;
                tokio::task::yield_now().await;
                stream.send_data(second.clone(), false)?;
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
    Ok(())
}

fn policy(settings: &str) -> String {
    let all = format!("enable_oob_load_report: true, weight_update_period: 0.1s, blackout_period: 0s, {settings}");
    typed("ClientSideWeightedRoundRobin", &all)
}

/// The weight of the host on each of these ports.
fn weights(daemon: &Daemon, cluster: &str, ports: &[u16]) -> Result<Vec<u64>> {
    let text = daemon.admin("/clusters")?;
    let of = |port: &u16| {
        let start = format!("{cluster}::127.0.0.1:{port}::weight::");
        text.lines().find_map(|line| line.strip_prefix(&start)?.parse().ok()).unwrap_or_default()
    };
    Ok(ports.iter().map(of).collect())
}

#[test]
fn hosts_report_on_streams() -> Result<()> {
    let mut all = Vec::new();
    for kind in [Kind::Envoy, Kind::Culvert] {
        let seen = Seen::default();
        let says = [
            Says::Weight(200),
            Says::Weight(700),
            Says::Once(300),
            Says::NoRequests,
            Says::Unknown,
            Says::NotFound,
            Says::Garbage,
        ];
        let ports: Vec<_> = says.iter().map(|says| host(*says, &seen)).collect::<Result<_>>()?;
        let (elsewhere, web) = (host(Says::Weight(500), &seen)?, free_port()?);
        let (streams, other_port) = (
            policy("oob_reporting_period: 0.5s"),
            policy(&format!(
                "oob_reporting_period: 1.5s, oob_reporting_config: {{port_value: {elsewhere}, authority: orca.test}}"
            )),
        );
        let routes = "- {name: all, domains: [\"*\"], routes: [{match: {path: /app}, route: {cluster: app}}]}";
        let bootstrap = Bootstrap::new().http(web, routes, &[]);
        let bootstrap = bootstrap.cluster("app", &ports, &[HTTP2, &streams]).cluster(
            "elsewhere",
            &ports[..1],
            &[HTTP2, &other_port],
        );
        let daemon = Daemon::start(kind, &bootstrap.yaml())?;
        // Those that report nothing of use have the median: of 200, 300 and 700.
        let expected = [200, 700, 300, 300, 300, 300, 300];
        wait_until(DEADLINE, "the weights", || {
            let found = weights(&daemon, "app", &ports)?;
            ensure!(found == expected, "{kind:?}: {found:?}");
            ensure!(weights(&daemon, "elsewhere", &ports[..1])? == [500], "{kind:?}");
            let stats = daemon.stats()?;
            let get = |name: &str| stats.get(&format!("cluster.app.lb_orca_oob.{name}"));
            let ended = (get("active_sessions"), get("stream_terminated"));
            ensure!(ended == (5, 2), "{kind:?}: {ended:?}");
            ensure!(get("reports_received") > 10 && get("report_errors") > 2 && get("stream_failures") > 2, "{kind:?}");
            Ok(())
        })?;
        // What responses say counts as well: that host is asked for no reports any more.
        let expected = [200, 700, 300, 500, 9999, 500, 500];
        wait_until(DEADLINE, "the weights by responses", || {
            ensure!(fetch(web, Request::get("/app"))?.status == 200, "{kind:?}");
            let found = weights(&daemon, "app", &ports)?;
            ensure!(found == expected, "{kind:?}: {found:?}");
            Ok(())
        })?;
        let seen = seen.lock().unwrap_or_else(PoisonError::into_inner).clone();
        all.push(seen);
    }
    assert_eq!(all[1], all[0], "how hosts are asked");
    Ok(())
}

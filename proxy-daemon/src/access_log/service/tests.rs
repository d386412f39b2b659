use envoy_types::pb::envoy::config::core::v3::{
    GrpcService,
    grpc_service::{EnvoyGrpc, TargetSpecifier},
};
use http::{HeaderMap, HeaderValue};

use super::*;
use crate::{
    access_log::{Headers, ResponseFlags},
    upstream::Clusters,
};

fn service(log_name: &str, buffer_bytes: usize) -> Arc<LogService> {
    let grpc = EnvoyGrpc { cluster_name: "nobody".to_owned(), ..EnvoyGrpc::default() };
    let grpc = GrpcService { target_specifier: Some(TargetSpecifier::EnvoyGrpc(grpc)), ..GrpcService::default() };
    Arc::new(LogService {
        kind: EntryKind::Http,
        log_name: log_name.into(),
        service: Service::parse(&grpc, None, "grpc_service").unwrap(),
        flush_interval: Duration::from_secs(1),
        buffer_bytes,
    })
}

#[test]
fn logs_that_say_the_same_share_a_service() {
    let first = share(&service("a", 1));
    assert!(Arc::ptr_eq(&first, &share(&service("a", 1))));
    assert!(!Arc::ptr_eq(&first, &share(&service("b", 1))));
    assert!(!Arc::ptr_eq(&first, &share(&service("a", 2))));
}

/// How many entries a worker took, and how many it dropped, where there is nobody to send them to.
async fn appended(service: &Arc<LogService>, count: usize) -> (u64, u64) {
    let before = (STATS.logs_written.value(), STATS.logs_dropped.value());
    (0..count).for_each(|_| append(service, &EntryParts::default(), &Record::default()));
    (STATS.logs_written.value() - before.0, STATS.logs_dropped.value() - before.1)
}

#[test]
fn what_nobody_takes_is_bounded() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build_local(tokio::runtime::LocalOptions::default())
        .unwrap();
    runtime.block_on(async {
        let service = share(&service("bounded", 1000));
        let length = EntryParts::default().of_request(&Record::default()).encoded_len();
        assert_eq!(appended(&service, 3).await, (0, 3), "no worker's thread");
        let logs = ServiceLogs::new(WorkerClusters::new(Arc::new(Clusters::new(1)), 0), None);
        let taken = 1000_usize.div_ceil(length) as u64;
        assert_eq!(appended(&service, 1000).await, (taken, 1000 - taken));
        drop(logs);
        assert_eq!(appended(&service, 1).await, (0, 1), "the thread ends");
    });
}

#[test]
fn entries_tell_what_is_known() {
    let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
    let (request, response) = (names(&["X-A", ":path", "x-none"]), names(&[":status"]));
    let state = names(&["envoy.filters.http.grpc_stats"]);
    let parts = EntryParts::parse([&request, &response, &[]], &state, "log").unwrap();
    let mut headers = HeaderMap::new();
    headers.append("x-a", HeaderValue::from_static("one"));
    headers.append("x-a", HeaderValue::from_bytes(b"\xfftwo").unwrap());
    headers.append("user-agent", HeaderValue::from_static("tester"));
    let record = Record {
        method: Some("GET"),
        path: Some("/p"),
        protocol: Some("HTTP/2"),
        request_headers: Some(Headers::All(&headers)),
        response_code: 204,
        response_flags: ResponseFlags::UAEX | ResponseFlags::DI,
        upstream_host: Some("[::1]:80"),
        log_type: "DownstreamStart",
        grpc_messages: Some((1, 2)),
        ..Record::default()
    };
    let entry = parts.of_request(&record);
    let (common, request) = (entry.common_properties.unwrap(), entry.request.unwrap());
    assert_eq!((request.request_method, entry.protocol_version, &*request.user_agent), (1, 3, "tester"));
    let mut shown: Vec<_> = request.request_headers.iter().map(|(name, value)| (&**name, &**value)).collect();
    shown.sort_unstable();
    assert_eq!(shown, [(":path", "/p"), ("x-a", "one,!two")]);
    assert_eq!(entry.response.unwrap().response_headers[":status"], "204");
    let flags = common.response_flags.unwrap();
    assert!(flags.delay_injected && flags.unauthorized_details.is_some() && !flags.no_route_found);
    assert_eq!(format!("{:?}", common.upstream_remote_address).matches("\"::1\"").count(), 1);
    assert_eq!((common.access_log_type, common.duration), (4, None), "it is not over");
    assert!(common.filter_state_objects.contains_key("envoy.filters.http.grpc_stats"));
}

#[test]
fn only_filter_state_that_there_is_can_be_logged() {
    let refused = |[request, state]: [&[String]; 2]| {
        EntryParts::parse([request, &[], &[]], state, "log").unwrap_err().to_string()
    };
    let named = ["x".to_owned(), "a b".to_owned()];
    let state = ["x".to_owned(), "envoy.network.ip".to_owned()];
    assert!(refused([&[], &state]).starts_with("log.common_config.filter_state_objects_to_log[1]: not supported"));
    assert!(refused([&named, &[]]).starts_with("log.additional_request_headers_to_log[1]: "));
}

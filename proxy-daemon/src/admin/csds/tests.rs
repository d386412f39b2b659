use envoy_types::pb::envoy::service::status::v3::client_status_discovery_service_client::ClientStatusDiscoveryServiceClient;
use serde_json::json;

use culvert_xds_client::json as proto_json;

use super::*;
use crate::admin::tests::{Admin, dumps::configuration};

fn request(yaml: &str) -> ClientStatusRequest {
    proto_json::from_yaml(yaml).unwrap()
}

fn entry<'a>(response: &'a ClientStatusResponse, kind: &str, name: &str) -> &'a GenericXdsConfig {
    let found = response.config[0].generic_xds_configs.iter();
    found
        .clone()
        .find(|it| it.name == name && it.type_url.ends_with(kind))
        .unwrap_or_else(|| panic!("no {kind} {name}"))
}

#[test]
fn every_resource_with_its_status() {
    let response = respond(&configuration(), &request("{}")).unwrap();
    assert_eq!(response.config[0].node.as_ref().unwrap().id, "n1");
    let shown = |kind, name| {
        let entry = entry(&response, kind, name);
        (entry.client_status().as_str_name(), entry.version_info.as_str(), entry.xds_config.is_some())
    };
    assert_eq!(shown(".Cluster", "a"), ("NACKED", "7", true), "the last good version is in force");
    assert_eq!(shown(".Cluster", "bad"), ("NACKED", "", false));
    assert_eq!(shown(".Cluster", "new"), ("ACKED", "7", true));
    assert_eq!(shown(".Listener", "web"), ("ACKED", "7", true));
    assert_eq!(shown(".RouteConfiguration", "now"), ("ACKED", "7", true));
    assert_eq!(shown(".RouteConfiguration", "later"), ("REQUESTED", "", false));
    assert_eq!(shown(".Secret", "to-come"), ("REQUESTED", "", false));
    assert_eq!(shown(".Cluster", "users"), ("UNKNOWN", "", true));
    assert!(entry(&response, ".Cluster", "users").is_static_resource);

    let file = entry(&response, ".Cluster", "/etc/cds.yaml");
    assert_eq!(file.client_status(), ClientResourceStatus::Nacked);
    assert_eq!(file.error_state.as_ref().unwrap().details, "resources[0].nme: no such field");
    let lost = entry(&response, ".ConfigSource", "ads: cluster xds");
    assert_eq!((lost.client_status(), &*lost.version_info), (ClientResourceStatus::Nacked, "GRPC"));
    assert_eq!(lost.error_state.as_ref().unwrap().details, "Connection refused");
    let nacked = entry(&response, ".Cluster", "a");
    assert_eq!(nacked.last_updated.as_ref().unwrap().seconds, 1_700_000_000);
    let error = nacked.error_state.as_ref().unwrap();
    assert_eq!((error.details.as_str(), error.version_info.as_str()), ("lb_policy: no", "7"));
    assert_eq!(proto_json::to_json(error)["failed_configuration"]["lb_policy"], "MAGLEV");
}

#[test]
fn what_is_warming_is_in_the_older_form() {
    let response = respond(&configuration(), &request("{}")).unwrap();
    let shown = proto_json::to_json(&response.config[0]);
    let kinds = shown["xds_config"].as_array().unwrap();
    assert_eq!(kinds[0]["cluster_config"]["dynamic_warming_clusters"][0]["cluster"]["name"], "new");
    let listener = &kinds[1]["listener_config"]["dynamic_listeners"][0];
    assert_eq!((&listener["name"], &listener["warming_state"]["version_info"]), (&json!("web"), &json!("8")));
    let lacking = &kinds[1]["listener_config"]["dynamic_listeners"][1];
    assert!(lacking["active_state"].is_object() && lacking["warming_state"].is_null(), "{lacking}");
    assert_eq!(
        (&lacking["name"], &lacking["error_state"]["details"]),
        (&json!("bare"), &json!("serves without the secret \"own\""))
    );
}

#[test]
fn content_can_be_left_out() {
    let response = respond(&configuration(), &request("exclude_resource_contents: true")).unwrap();
    assert!(response.config[0].generic_xds_configs.iter().all(|it| it.xds_config.is_none()));
    let error = entry(&response, ".Cluster", "a").error_state.as_ref().unwrap();
    assert_eq!((error.details.as_str(), &error.failed_configuration), ("lb_policy: no", &None));
}

#[test]
fn other_nodes_are_not_us() {
    let other = request("node_matchers: [{ node_id: { exact: n2 } }]");
    assert_eq!(respond(&configuration(), &other).unwrap(), ClientStatusResponse::default());
    let us = request("node_matchers: [{ node_id: { exact: n2 } }, { node_id: { exact: n1 } }]");
    assert_eq!(respond(&configuration(), &us).unwrap().config.len(), 1);
    let bad = request("node_matchers: [{ node_id: { safe_regex: { regex: '(' } } }]");
    assert_eq!(respond(&configuration(), &bad).unwrap_err().code(), tonic::Code::InvalidArgument);
}

#[tokio::test]
async fn both_methods_over_grpc_beside_http1() {
    let admin = Admin::start().await;
    let url = format!("http://{}", admin.address);
    let mut client = ClientStatusDiscoveryServiceClient::connect(url).await.unwrap();
    let fetched = client.fetch_client_status(request("{}")).await.unwrap().into_inner();
    assert_eq!(fetched, respond(&configuration(), &request("{}")).unwrap());

    let requests = [request("exclude_resource_contents: true"), request("node_matchers: [{ node_id: { exact: x } }]")];
    let mut answers = client.stream_client_status(stream::iter(requests)).await.unwrap().into_inner();
    assert!(answers.message().await.unwrap().unwrap().config[0].generic_xds_configs.len() > 5);
    assert_eq!(answers.message().await.unwrap().unwrap().config, []);
    assert_eq!(answers.message().await.unwrap(), None, "the stream ends with the requests");

    let bad = [request("node_matchers: [{ node_id: {} }]"), request("{}")];
    let mut answers = client.stream_client_status(stream::iter(bad)).await.unwrap().into_inner();
    assert_eq!(answers.message().await.unwrap_err().code(), tonic::Code::InvalidArgument);
    assert_eq!(admin.get("/ready").await.status, 503, "HTTP/1.1 on the same port");
    admin.stop().await;
}

//! `/config_dump` and `/init_dump` over a configuration that has something of everything.

use std::time::SystemTime;

use culvert_xds_client::{Any, json as proto_json};
use envoy_types::pb::envoy::{
    config::{
        bootstrap::v3::Bootstrap,
        cluster::v3::Cluster as ClusterMessage,
        core::v3::TypedExtensionConfig,
        listener::v3::Listener as ListenerMessage,
        route::v3::{RouteConfiguration, ScopedRouteConfiguration},
    },
    extensions::transport_sockets::tls::v3::Secret,
};
use prost::{Message, Name};

use super::*;
use crate::config::status::{
    Failure, Incomplete, Missing, Resource, Scoped, Snapshot, SourceFault, SourceState, Type, Unready, Version,
};
use culvert_xds_client::stats::{Connection, Fault};

const HTTP: &str =
    "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager";
const BOOTSTRAP: &str = r#"
node: { id: n1, metadata: { a: 1 } }
static_resources:
  clusters: [{ name: users }, { name: front, type: STRICT_DNS }]
  secrets: [{ name: fixed, generic_secret: { secret: { inline_string: hush } } }]
"#;

fn version<M: Message + Name + Default>(version: &str, yaml: &str) -> Arc<Version> {
    let message: M = proto_json::from_yaml(yaml).unwrap();
    let updated = SystemTime::UNIX_EPOCH + Duration::from_millis(1_700_000_000_123);
    Arc::new(Version { version: version.to_owned(), body: proto_json::pack(&message), updated })
}

fn listener(routes: &str) -> String {
    let manager = format!("{{ \"@type\": {HTTP}, stat_prefix: web, {routes} }}");
    format!("{{ name: web, filter_chains: [{{ filters: [{{ name: http, typed_config: {manager} }}] }}] }}")
}

fn of_type<M: Name>(resources: Vec<Resource>) -> Type {
    Type { type_url: M::type_url(), version: "7".to_owned(), resources }
}

fn active<M: Message + Name + Default>(name: &str, yaml: &str) -> Resource {
    Resource { name: name.to_owned(), active: Some(version::<M>("7", yaml)), ..Resource::default() }
}

fn snapshot() -> Snapshot {
    let failed = |attempt| Some(Arc::new(Failure { attempt, details: "lb_policy: no".to_owned() }));
    let clusters = vec![
        Resource {
            failure: failed(version::<ClusterMessage>("7", "{ name: a, lb_policy: MAGLEV }")),
            ..active::<ClusterMessage>("a", "{ name: a, type: EDS }")
        },
        Resource {
            name: "bad".into(),
            failure: failed(version::<ClusterMessage>("7", "{ name: bad }")),
            ..Resource::default()
        },
        Resource {
            name: "new".into(),
            warming: Some(version::<ClusterMessage>("7", "{ name: new }")),
            ..Resource::default()
        },
    ];
    let listeners = vec![Resource {
        warming: Some(version::<ListenerMessage>("8", &listener("rds: { route_config_name: later }"))),
        draining: Some(version::<ListenerMessage>("6", "{ name: web }")),
        ..active::<ListenerMessage>("web", &listener("route_config: { name: inline }"))
    }];
    let routes = vec![
        active::<RouteConfiguration>("now", "{ name: now }"),
        Resource { name: "later".into(), missing: Some(Missing::Requested), ..Resource::default() },
    ];
    let key = "{ name: key, tls_certificate: { private_key: { inline_string: hush }, certificate_chain: { inline_string: pub }, \
               password: { filename: hush } } }";
    let secrets = vec![
        active::<Secret>("key", key),
        Resource { name: "to-come".into(), missing: Some(Missing::Requested), ..Resource::default() },
    ];
    let filter = format!("{{ name: f, typed_config: {{ \"@type\": {HTTP}, stat_prefix: x }} }}");
    Snapshot {
        types: vec![
            of_type::<ClusterMessage>(clusters),
            of_type::<ListenerMessage>(listeners),
            of_type::<RouteConfiguration>(routes),
            of_type::<Secret>(secrets),
            of_type::<TypedExtensionConfig>(vec![active::<TypedExtensionConfig>("f", &filter)]),
        ],
        unready: vec![Unready {
            listener: "web".into(),
            is_static: false,
            targets: vec!["shared target RdsRouteConfigSubscription RDS init later".into()],
        }],
        incomplete: vec![Incomplete {
            type_url: ListenerMessage::type_url(),
            name: "bare".into(),
            lacks: vec!["the secret \"own\"".into()],
        }],
        faults: vec![SourceFault {
            version: String::new(),
            type_url: ClusterMessage::type_url(),
            place: "/etc/cds.yaml".into(),
            fault: Fault { details: "resources[0].nme: no such field".into(), since: SystemTime::UNIX_EPOCH },
        }],
        sources: vec![SourceState {
            name: "ads: cluster xds".into(),
            connection: Connection {
                transport: "GRPC",
                server: "cluster xds".into(),
                connected: false,
                since: SystemTime::UNIX_EPOCH,
                error: Some("Connection refused".into()),
            },
        }],
        scoped: vec![Scoped {
            name: "s".into(),
            scopes: vec![version::<ScopedRouteConfiguration>("9", "{ name: a, key: {} }")],
        }],
    }
}

pub(in crate::admin) fn configuration() -> Configuration {
    let bootstrap: Bootstrap = proto_json::from_yaml(BOOTSTRAP).unwrap();
    Configuration::new(&bootstrap, SystemTime::UNIX_EPOCH, snapshot)
}

fn names(dump: &Json) -> Vec<&str> {
    let configs = dump["configs"].as_array().unwrap().iter();
    configs.map(|config| config["@type"].as_str().unwrap().rsplit('.').next().unwrap()).collect()
}

fn part<'a>(dump: &'a Json, name: &str) -> &'a Json {
    let configs = dump["configs"].as_array().unwrap().iter();
    configs.clone().find(|config| config["@type"].as_str().unwrap().ends_with(name)).unwrap()
}

#[tokio::test]
async fn every_section_in_envoys_order() {
    let admin = Admin::start().await;
    let dump = admin.get("/config_dump").await.json();
    let sections = ["Bootstrap", "Clusters", "Ecds", "Listeners", "ScopedRoutes", "Routes", "Secrets"];
    assert_eq!(names(&dump), sections.map(|name| format!("{name}ConfigDump")));
    let bootstrap = part(&dump, "BootstrapConfigDump");
    assert_eq!(bootstrap["bootstrap"]["node"], json!({ "id": "n1", "metadata": { "a": 1 } }));
    assert_eq!(bootstrap["last_updated"], "1970-01-01T00:00:00Z");

    let clusters = part(&dump, "ClustersConfigDump");
    assert_eq!(clusters["version_info"], "7");
    assert_eq!(clusters["static_clusters"][1]["cluster"]["type"], "STRICT_DNS");
    let active = clusters["dynamic_active_clusters"].as_array().unwrap();
    assert_eq!(active.len(), 1, "one that was refused from the start is not shown");
    assert_eq!((&active[0]["version_info"], &active[0]["cluster"]["type"]), (&json!("7"), &json!("EDS")));
    assert_eq!(active[0]["last_updated"], "2023-11-14T22:13:20.123Z");
    assert_eq!(active[0]["error_state"]["failed_configuration"]["lb_policy"], "MAGLEV");
    assert_eq!(active[0]["error_state"]["details"], "lb_policy: no");
    assert_eq!(clusters["dynamic_warming_clusters"][0]["cluster"]["name"], "new");

    let listener = &part(&dump, "ListenersConfigDump")["dynamic_listeners"][0];
    assert_eq!(listener["name"], "web");
    let versions = ["active_state", "warming_state", "draining_state"].map(|state| &listener[state]["version_info"]);
    assert_eq!(versions, ["7", "8", "6"]);
    let routes = part(&dump, ".RoutesConfigDump");
    assert_eq!(routes["static_route_configs"][0]["route_config"]["name"], "inline");
    assert_eq!(routes["dynamic_route_configs"].as_array().unwrap().len(), 1, "what never came is not shown");
    assert_eq!(routes["dynamic_route_configs"][0]["route_config"]["name"], "now");
    assert_eq!(part(&dump, "ScopedRoutesConfigDump")["dynamic_scoped_route_configs"][0]["name"], "s");
    assert_eq!(part(&dump, "EcdsConfigDump")["ecds_filters"][0]["ecds_filter"]["name"], "f");
    admin.stop().await;
}

#[tokio::test]
async fn secrets_are_not_shown() {
    let admin = Admin::start().await;
    let answer = admin.get("/config_dump").await;
    assert!(!answer.body.contains("hush"), "{}", answer.body);
    let dump = answer.json();
    let secrets = part(&dump, "SecretsConfigDump");
    assert_eq!(
        secrets["dynamic_active_secrets"][0]["secret"]["tls_certificate"],
        json!({
            "private_key": { "inline_string": "[redacted]" },
            "certificate_chain": { "inline_string": "pub" },
            "password": { "filename": "[redacted]" },
        })
    );
    assert_eq!(secrets["dynamic_warming_secrets"], json!([{ "name": "to-come", "version_info": "uninitialized" }]));
    assert_eq!(secrets["static_secrets"][0]["secret"]["generic_secret"]["secret"]["inline_string"], "[redacted]");
    admin.stop().await;
}

#[tokio::test]
async fn one_list_and_masks() {
    let admin = Admin::start().await;
    let fixed = admin.get("/config_dump?resource=static_clusters&name_regex=us.*").await.json();
    assert_eq!(
        fixed,
        json!({ "configs": [{
            "@type": "type.googleapis.com/envoy.admin.v3.ClustersConfigDump.StaticCluster",
            "cluster": { "@type": "type.googleapis.com/envoy.config.cluster.v3.Cluster", "name": "users" },
            "last_updated": "1970-01-01T00:00:00Z",
        }] })
    );
    let mask = "/config_dump?resource=dynamic_active_clusters&mask=cluster.type,version_info&name_regex=a";
    assert_eq!(
        admin.get(mask).await.json(),
        json!({ "configs": [{
            "@type": "type.googleapis.com/envoy.admin.v3.ClustersConfigDump.DynamicCluster",
            "version_info": "7",
            "cluster": { "@type": "type.googleapis.com/envoy.config.cluster.v3.Cluster", "type": "EDS" },
        }] })
    );
    assert_eq!(
        admin.get("/config_dump?mask=bootstrap.node.id,last_updated").await.json(),
        json!({ "configs": [{
            "@type": "type.googleapis.com/envoy.admin.v3.BootstrapConfigDump",
            "bootstrap": { "node": { "id": "n1" } },
            "last_updated": "1970-01-01T00:00:00Z",
        }] })
    );
    let lists = admin.get("/config_dump?mask=static_clusters&name_regex=users").await.json();
    assert_eq!(lists["configs"].as_array().unwrap().len(), 1);
    assert_eq!(part(&lists, "ClustersConfigDump")["static_clusters"].as_array().unwrap().len(), 1);
    assert_eq!(part(&lists, "ClustersConfigDump").as_object().unwrap().len(), 2, "its type, and what is asked for");
    assert_eq!(admin.get("/config_dump?resource=static_listeners").await.json(), json!({}));
    admin.stop().await;
}

#[tokio::test]
async fn questions_without_an_answer() {
    let admin = Admin::start().await;
    let cases = [
        ("resource=bogus", 404, "bogus not found in config dump"),
        ("resource=static_endpoint_configs", 404, "static_endpoint_configs not found in config dump"),
        ("resource=bootstrap", 400, "bootstrap is not a repeated field. Use ?mask=bootstrap to get only this field"),
        ("mask=bogus", 400, "FieldMask bogus could not be successfully applied to any configs."),
        (
            "mask=static_clusters.cluster",
            400,
            "FieldMask static_clusters.cluster could not be successfully applied to any configs.",
        ),
        (
            "resource=static_clusters&mask=cluster",
            400,
            "FieldMask paths: \"cluster\"\n could not be successfully used.",
        ),
        (
            "resource=dynamic_listeners&mask=active_state.listener.name",
            400,
            "FieldMask paths: \"active_state.listener.name\"\n could not be successfully used.",
        ),
        ("name_regex=(", 400, "INVALID_ARGUMENT: Error while parsing name_regex from (: unclosed group"),
    ];
    for (query, status, body) in cases {
        let answer = admin.get(&format!("/config_dump?{query}")).await;
        assert_eq!((answer.status, answer.body.as_str()), (status, body), "{query}");
        assert!(answer.head.contains("content-type: text/plain\r\n"), "{}", answer.head);
    }
    for empty in ["resource=", "mask=", "name_regex=", "format=json"] {
        assert_eq!(admin.get(&format!("/config_dump?{empty}")).await.json()["configs"].as_array().unwrap().len(), 7);
    }
    admin.stop().await;
}

#[tokio::test]
async fn endpoints_come_from_the_data_plane() {
    let admin = Admin::start().await;
    assert_eq!(
        admin.get("/config_dump?include_eds").await.json()["configs"].as_array().unwrap().len(),
        7,
        "no clusters"
    );
    admin.data_plane.upsert_cluster(cluster("users"));
    admin.data_plane.upsert_cluster(cluster("dynamic"));
    let dump = admin.get("/config_dump?include_eds").await.json();
    assert_eq!(names(&dump)[3], "EndpointsConfigDump");
    let endpoints = part(&dump, "EndpointsConfigDump");
    assert_eq!(endpoints["dynamic_endpoint_configs"][0]["endpoint_config"]["cluster_name"], "dynamic");
    let assignment = &endpoints["static_endpoint_configs"][0]["endpoint_config"];
    assert_eq!(
        (&assignment["cluster_name"], &assignment["policy"]["overprovisioning_factor"]),
        (&json!("users"), &json!(140))
    );
    let group = &assignment["endpoints"][0];
    assert_eq!(group["locality"], json!({ "region": "eu", "zone": "eu-1" }));
    let one = &group["lb_endpoints"][0];
    assert_eq!(one["endpoint"]["health_check_config"], json!({}));
    assert_eq!(one["load_balancing_weight"], 1);
    assert!(["HEALTHY", "UNHEALTHY", "DEGRADED"].contains(&one["health_status"].as_str().unwrap()));
    let query = "/config_dump?include_eds&resource=static_endpoint_configs&mask=endpoint_config.cluster_name";
    let one = admin.get(query).await.json();
    assert_eq!(one["configs"][0]["endpoint_config"].as_object().unwrap().len(), 2, "{one}");
    admin.stop().await;
}

#[tokio::test]
async fn what_is_waited_for() {
    let admin = Admin::start().await;
    let dump = admin.get("/init_dump").await.json();
    let one = &dump["unready_targets_dumps"][0];
    assert!(one["name"].as_str().unwrap().starts_with("init manager Listener-local-init-manager web "), "{dump}");
    assert_eq!(one["target_names"], json!(["shared target RdsRouteConfigSubscription RDS init later"]));
    assert_eq!(admin.get("/init_dump?mask=listener").await.json(), dump);
    assert_eq!(admin.get("/init_dump?mask=bogus").await.json(), json!({}));
    assert_eq!(admin.get("/hot_restart_version").await.body, "disabled");
    admin.stop().await;
}

#[test]
fn unknown_types_and_bytes_do_not_stop_a_dump() {
    let broken = Any { type_url: "type.googleapis.com/of.nobody".into(), value: vec![0xff; 3] };
    assert_eq!(proto_json::any_to_json(&broken)["value"], "////");
}

use culvert_xds_client::{
    ads::Variant,
    source::{Source, Target},
};

use super::load;

const CLUSTERS: &str = "static_resources: { clusters: [{ name: xds, load_assignment: { cluster_name: xds, endpoints: [{ \
                        lb_endpoints: [{ endpoint: { address: { pipe: { path: /run/xds } } } }] }] } }] }\n";

/// Where clusters come from, as Debug text, or why the bootstrap is refused.
fn cds(source: &str) -> Result<crate::config::model::ConfigSource, String> {
    Ok(load(&format!("{CLUSTERS}dynamic_resources: {{ cds_config: {{ {source} }} }}"))?.cds.expect("it is set"))
}

fn api(fields: &str) -> Result<crate::config::model::ConfigSource, String> {
    cds(&format!("api_config_source: {{ transport_api_version: V3, {fields} }}"))
}

#[test]
fn a_grpc_source_is_read_whole() {
    let service = "grpc_services: [{ envoy_grpc: { cluster_name: xds, authority: a.b, max_receive_message_length: 9, \
                   retry_policy: { retry_back_off: { base_interval: 1s } } }, initial_metadata: [{ key: K, value: 'v%%' }] }]";
    let limits = "rate_limit_settings: { max_tokens: 3, fill_rate: 4 }, set_node_on_first_message_only: true";
    let source = api(&format!("api_type: DELTA_GRPC, {service}, {limits}")).unwrap();
    let Source::Grpc(grpc) = &*source.source else { panic!("{source:?}") };
    assert_eq!((grpc.variant, grpc.set_node_on_first_message_only), (Variant::Delta, true));
    assert_eq!((&grpc.service.target, grpc.service.authority.as_str()), (&Target::Cluster("xds".into()), "a.b"));
    assert_eq!(grpc.service.initial_metadata, [("k".to_owned(), "v%".to_owned())]);
    assert_eq!(grpc.service.max_receive_message_length, Some(9));
    let backoff = grpc.service.backoff.unwrap();
    assert_eq!((backoff.base.as_secs(), backoff.max.as_secs()), (1, 10));
    let limit = grpc.rate_limit.unwrap();
    assert_eq!((limit.max_tokens, limit.fill_interval.as_millis()), (3, 250));
    assert_eq!(source.initial_fetch_timeout.map(|it| it.as_secs()), Some(15));
    let bootstrap = load(CLUSTERS).unwrap();
    assert_eq!(bootstrap.sources.servers["xds"].endpoints, ["unix:/run/xds"]);
}

#[test]
fn files_and_polled_sources_are_read() {
    let source = cds("path_config_source: { path: /etc/passwd, watched_directory: { path: /etc } }").unwrap();
    assert!(matches!(&*source.source, Source::File(file) if file.watched_directory.is_some()));
    let source = cds("path: /etc/passwd, initial_fetch_timeout: 0s").unwrap();
    assert!(matches!(&*source.source, Source::File(file) if file.watched_directory.is_none()));
    assert_eq!(source.initial_fetch_timeout, None);
    let source = api("api_type: REST, cluster_names: [xds], refresh_delay: 2s").unwrap();
    let Source::Rest(rest) = &*source.source else { panic!("{source:?}") };
    assert_eq!((rest.refresh_delay.as_secs(), rest.request_timeout.as_secs()), (2, 1));
}

#[test]
fn sources_are_refused_as_envoy_refuses_them() {
    let service = "grpc_services: [{ envoy_grpc: { cluster_name: xds } }]";
    for (fields, expected) in [
        (format!("api_type: AGGREGATED_GRPC, {service}"), "Unsupported config source AGGREGATED_GRPC"),
        (format!("api_type: GRPC, cluster_names: [xds], {service}"), "must not have a cluster name specified"),
        ("api_type: GRPC".to_owned(), "must have either a gRPC service or a cluster name defined"),
        ("api_type: GRPC, grpc_services: [{ envoy_grpc: { cluster_name: nope } }]".to_owned(), "'nope' does not exist"),
        ("api_type: REST, cluster_names: [nope], refresh_delay: 1s".to_owned(), "'nope' does not exist"),
        ("api_type: REST, cluster_names: [xds]".to_owned(), "refresh_delay is required"),
        ("api_type: REST, cluster_names: [xds, a], refresh_delay: 1s".to_owned(), "singleton cluster name"),
        (format!("api_type: REST, cluster_names: [xds], {service}"), "must not have a gRPC service specified"),
    ] {
        let error = api(&fields).unwrap_err();
        assert!(error.contains(expected) && error.starts_with("dynamic_resources.cds_config"), "{fields}: {error}");
    }
    for (source, expected) in [
        ("self: {}", "Missing config source specifier"),
        ("path: /nowhere/x", "does not exist"),
        ("path_config_source: { path: /etc/passwd, watched_directory: { path: /nowhere } }", "does not exist"),
    ] {
        let error = cds(source).unwrap_err();
        assert!(error.contains(expected), "{source}: {error}");
    }
}

#[test]
fn collections_are_asked_for_as_envoy_asks_for_them() {
    let service = "grpc_services: [{ envoy_grpc: { cluster_name: xds } }]";
    let read = |locator: &str, source: &str| {
        let dynamic = format!(
            "dynamic_resources: {{ ads_config: {{ api_type: GRPC, transport_api_version: V3, {service} }}, cds_resources_locator: \
             '{locator}', {source} }}"
        );
        let read = load(&format!("{dynamic}\n{CLUSTERS}"));
        read.map(|bootstrap| (bootstrap.cds_collection, bootstrap.lds_collection)).map_err(|error| error.to_string())
    };
    let api = |kind: &str| {
        format!("cds_config: {{ api_config_source: {{ api_type: {kind}, transport_api_version: V3, {service} }} }}")
    };
    let ads = "cds_config: { ads: {} }".to_owned();
    let some = "xdstp://auth/envoy.config.cluster.v3.Cluster/foo/*?b=2&a=1";
    let named = (Some("xdstp://auth/envoy.config.cluster.v3.Cluster/foo/*?a=1&b=2".to_owned()), None);
    assert_eq!(read(some, &ads), Ok(named.clone()));
    assert_eq!(read(some, &api("DELTA_GRPC")), Ok(named));
    for (locator, source, expected) in [
        (some, api("GRPC"), "Unknown xdstp:// transport API type"),
        (
            some,
            "cds_config: { path_config_source: { path: /etc/passwd } }".to_owned(),
            "not supported config source specifier",
        ),
        (some, String::new(), "Missing or not supported config source specifier"),
        ("foo", ads.clone(), "foo does not have a xdstp:, http: or file: scheme"),
        (
            "xdstp://a/envoy.config.listener.v3.Listener/*",
            ads.clone(),
            "type does not match envoy.config.cluster.v3.Cluster",
        ),
        ("xdstp://a/envoy.config.cluster.v3.Cluster/one", ads.clone(), "not supported by culvert yet"),
        ("file:///a/b.yaml", ads.clone(), "not supported by culvert yet"),
    ] {
        let error = read(locator, &source).unwrap_err();
        assert!(error.contains(expected), "{locator} {source}: {error}");
    }
}

//! Manifests in files, for people: what is wrong with them, and what they become.

use std::net::Ipv6Addr;
use std::sync::Arc;

pub use culvert_kube_api::directory::is_manifest;
use culvert_xds_client::json::{ConfigError, any_to_json};
use serde_json::{Value, json};

use crate::kubernetes::convert::read_json;
use crate::kubernetes::manifest::{self, ManifestError, parse};
use crate::kubernetes::{EndpointSlice, Node, Objects, Pod, Service};
use crate::mesh::{NO_SERVICE, join};
use crate::registry::{Cluster, ClusterInfo, Registry, SourceHealth};
use crate::resources::edge::{EdgeListener, EdgeOptions};
use crate::resources::{ORIGINAL_DST_CLUSTER, Options, ProxyKind, Role, Snapshot, Viewer, type_url};
use crate::secrets::Secret;

/// The port of a service that a file has a manifest for and nothing else.
const EXAMPLE_PORT: u16 = 80;
/// The port of an edge proxy of which only manifests are known.
const EXAMPLE_EDGE_PORT: u16 = 8080;
/// The most faults of a document that are told.
const MAX_FAULTS: usize = 20;

/// What is wrong with a file, with line, column and field: of each document the first few faults, as far as they can be told apart.
///
/// Gives the objects of a file without faults, and what of it cannot hold.
///
/// # Errors
/// All faults.
pub fn check(text: &str) -> Result<(Objects, Vec<String>), Vec<ConfigError>> {
    let mut faults = Vec::new();
    for (first_line, document) in documents(text) {
        let mut of_document: Vec<_> =
            faults_of(document).into_iter().map(|error| located(error, document, first_line)).collect();
        // They were found in the order of the fields' names.
        of_document.sort_by_key(|fault| fault.position);
        faults.extend(of_document);
    }
    if !faults.is_empty() {
        return Err(faults);
    }
    // What only the whole file shows: an object that is in it twice.
    let objects = parse(text).map_err(|error| vec![located(error, text, 0)])?;
    let (_, warnings) = mesh_of(&objects, false);
    Ok((objects, warnings))
}

/// The faults of one document: a field that is wrong is taken out, and it is looked again.
fn faults_of(document: &str) -> Vec<ManifestError> {
    let mut values = match manifest::documents(document) {
        Ok(values) => values,
        Err(error) => return vec![error],
    };
    let mut faults = Vec::new();
    for value in &mut values {
        let mut taken_out: Vec<String> = Vec::new();
        while let Err(error) = manifest::check(value.clone()) {
            let field = match &error {
                ManifestError::Field { field, .. } if faults.len() < MAX_FAULTS => field.clone(),
                _ => {
                    faults.push(error);
                    break;
                }
            };
            // What is missing since it was taken out was no fault.
            let within = |taken: &String| taken.strip_prefix(&*field).is_some_and(|rest| rest.starts_with(['.', '[']));
            if !taken_out.iter().any(within) {
                faults.push(error);
            }
            if !take_out(value, &field) {
                break;
            }
            taken_out.push(field);
        }
    }
    faults
}

/// Takes a field out, by its path as errors have it: `spec.retries.retryOn[1]`. Gives whether it was there.
fn take_out(value: &mut Value, path: &str) -> bool {
    let (parent, last) = path.rsplit_once('.').unwrap_or(("", path));
    // Of a list with a fault nothing is looked at any more.
    let last = last.split('[').next().unwrap_or_default();
    let mut at = value;
    for part in parent.split('.').filter(|part| !part.is_empty()) {
        let Some(next) = at.get_mut(part) else { return false };
        at = next;
    }
    at.as_object_mut().is_some_and(|fields| fields.remove(last).is_some())
}

/// What the manifests of a file become for a culvertd that is for this, as a document of Envoy resources. Services that the file
/// does not have are taken to have the port 80; a sidecar is one of them all.
///
/// # Errors
/// As [`check`].
pub fn render(text: &str, role: Role) -> Result<Value, Vec<ConfigError>> {
    let (objects, _) = check(text)?;
    let (snapshot, _) = mesh_of(&objects, true);
    let set = match role {
        Role::Node => Arc::clone(snapshot.resources(ProxyKind::Culvert)),
        role => {
            let services =
                if role == Role::Sidecar { objects.manifests.keys().cloned().collect() } else { Default::default() };
            snapshot.view(&Viewer { kind: ProxyKind::Culvert, role, services, ..Viewer::default() }, None).set
        }
    };
    let shown =
        [type_url::CLUSTER, type_url::LISTENER, type_url::ROUTE].into_iter().filter_map(|kind| set.of_type(kind));
    let resources = shown.flat_map(|of_type| of_type.resources.values());
    // The passthrough cluster is the same whatever a manifest says, but routes and chains name it.
    Ok(json!({ "resources": resources.map(|resource| any_to_json(&resource.body())).collect::<Value>() }))
}

/// The mesh of one file's objects, and what was found about it.
fn mesh_of(objects: &Objects, complete: bool) -> (Snapshot, Vec<String>) {
    let mut objects = objects.clone();
    if complete {
        for (key, manifest) in &*objects.manifests.clone() {
            let name = manifest.protocol.map_or_else(|| "http".to_owned(), |protocol| protocol.to_string());
            let service = format!(
                "{{apiVersion: v1, kind: Service, metadata: {{name: '{}', namespace: '{}'}}, spec: {{ports: [{{name: {name}, \
                 port: {EXAMPLE_PORT}}}]}}}}",
                key.name, key.namespace
            );
            // A name with a dot is none of a service, and there is nothing to show.
            for (key, service) in &*parse(&service).map(|objects| objects.services).unwrap_or_default() {
                let services = Arc::make_mut(&mut objects.services);
                services.entry(key.clone()).or_insert_with(|| Arc::clone(service));
            }
        }
    }
    let cluster = Cluster {
        info: ClusterInfo { name: "this file".to_owned(), ..ClusterInfo::default() },
        objects: Some(Arc::new(objects)),
        health: SourceHealth::default(),
        drained: false,
    };
    let registry = Registry { version: 1, clusters: vec![cluster], ..Registry::default() };
    let mut mesh = join(&registry);
    // That a manifest's service is elsewhere is no fault of the file.
    let mut warnings = std::mem::take(&mut mesh.warnings);
    warnings.retain(|warning| !warning.contains("is of no service") && !warning.contains(NO_SERVICE));
    let listener = EdgeListener { address: Ipv6Addr::UNSPECIFIED.into(), port: EXAMPLE_EDGE_PORT, tls: None };
    let edge = Some(EdgeOptions { listeners: vec![listener], ..EdgeOptions::default() });
    (Snapshot::build(Arc::new(mesh), &Options { edge, ..Options::default() }), warnings)
}

/// The documents of a text, each with the number of lines before it.
fn documents(text: &str) -> Vec<(usize, &str)> {
    let mut documents = Vec::new();
    let (mut start, mut start_line, mut at) = (0, 0, 0);
    for (index, line) in text.split_inclusive('\n').enumerate() {
        if line.trim_end() == "---" {
            documents.push((start_line, &text[start..at]));
            (start, start_line) = (at + line.len(), index + 1);
        }
        at += line.len();
    }
    documents.push((start_line, &text[start..]));
    documents
}

fn located(error: ManifestError, document: &str, lines_before: usize) -> ConfigError {
    let mut located = match error {
        ManifestError::Field { object, field, reason } => {
            ConfigError::new(field, format!("{reason} ({object})")).locate(document)
        }
        other => ConfigError::new("", other.to_string()),
    };
    if let Some((line, _)) = &mut located.position {
        *line += lines_before as u64;
    } else if lines_before > 0 {
        located.position = Some((lines_before as u64 + 1, 1));
    }
    located
}

/// What the fuzzer `manifest` feeds: a file of manifests, or an object as an API server tells of it. What has no faults can be shown.
///
/// # Panics
/// What must hold does not.
pub fn fuzz(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    match check(text) {
        Ok(_) => Role::ALL.iter().for_each(|role| assert!(render(text, *role).is_ok(), "{role:?}")),
        Err(faults) => assert!(faults.iter().all(|fault| !fault.to_string().is_empty()) && !faults.is_empty()),
    }
    let _ = read_json::<Service>(text);
    let _ = read_json::<EndpointSlice>(text);
    let _ = read_json::<Pod>(text);
    let _ = read_json::<Node>(text);
    let _ = read_json::<Secret>(text);
}

/// The name of the cluster that is in every rendering.
pub const PASSTHROUGH: &str = ORIGINAL_DST_CLUSTER;

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::policy::tests::FULL;

    #[test]
    fn faults_have_lines_and_fields() {
        let bad = FULL.replace("per: 1s", "per: soon");
        let text = format!("{FULL}---\n{}---{bad}", FULL.replace("idle", "idel"));
        let faults = check(&text).unwrap_err();
        let found: Vec<_> = faults.iter().map(|fault| (fault.position.map(|(line, _)| line), &*fault.path)).collect();
        // FULL has 13 lines, the first of which is empty.
        assert_eq!(found, [(Some(21), "spec.timeouts.idel"), (Some(38), "spec.rateLimit.per")], "{faults:?}");
        assert!(faults[1].message.contains("ServiceManifest default/users"), "{faults:?}");
        let faults = check(
            "apiVersion: culvert.dev/v1alpha1\nkind: ServiceManifest\nmetadata: {name: users}\nspec:\n  protocol: quic\n  \
             timeouts: {connect: soon, idel: 2m}\n  rateLimit: {requests: 0, per: 1s}\n  retries: {attempts: 1, retryOn: [5xx, what]}\n",
        );
        let found: Vec<_> =
            faults.unwrap_err().into_iter().map(|it| (it.position.unwrap().0, it.path, it.message)).collect();
        let expected = [
            (5, "spec.protocol", "`quic` is not tcp"),
            (6, "spec.timeouts.connect", "`soon` is not a time"),
            (6, "spec.timeouts.idel", "unknown field `idel`"),
            (7, "spec.rateLimit.requests", "expected a number above 0"),
            (8, "spec.retries.retryOn[1]", "unknown variant `what`"),
        ];
        let is = |((line, path, message), expected): (&(u64, String, String), &(u64, &str, &str))| {
            *line == expected.0 && path == expected.1 && message.contains(expected.2)
        };
        assert!(found.len() == expected.len() && found.iter().zip(&expected).all(is), "{found:#?}");
        let faults = check("kind: [").unwrap_err();
        assert!(faults[0].message.contains("not valid YAML"), "{faults:?}");
        let twice = check(&format!("{FULL}---{FULL}")).unwrap_err();
        assert!(twice[0].message.contains("is defined twice"), "{twice:?}");
    }

    #[test]
    fn a_file_without_faults_may_still_not_make_sense() {
        let tcp = FULL.replace("http2", "tcp");
        let service = "---\n{apiVersion: v1, kind: Service, metadata: {name: users}, spec: {ports: [{port: 5432}]}}\n";
        let (objects, warnings) = check(&format!("{tcp}{service}")).unwrap();
        assert_eq!((objects.manifests.len(), warnings.len()), (1, 1));
        assert!(warnings[0].contains("cannot hold for port 5432, which speaks tcp"), "{warnings:?}");
        assert_eq!(check(FULL).unwrap().1, [""; 0]);
        // As objects have it that were stored when it was called so.
        let (objects, warnings) =
            check(&format!("{}{service}", FULL.replace("retryOn", "\"on\"").replace("http2", "http"))).unwrap();
        let manifest = objects.manifests.values().next().unwrap();
        assert_eq!(manifest.retries.as_ref().unwrap().conditions().map(BTreeSet::len), Some(3));
        assert!(warnings[0].contains("spec.retries.on is called retryOn now"), "{warnings:?}");
        assert_eq!(check(&FULL.replace("retryOn", "\"on\"")).unwrap().1.len(), 1, "without its service, too");
    }

    #[test]
    fn the_fuzzer_s_function_takes_what_is_good_and_what_is_not() {
        let pod = r#"{"metadata": {"name": "a", "labels": {"b": "c"}}, "spec": {"nodeName": "n"}, "status": {"podIP": "10.0.0.1"}}"#;
        let service =
            "---\napiVersion: v1\nkind: Service\nmetadata: {name: users}\nspec: {ports: [{name: http, port: 80}]}\n";
        let files = [FULL.to_owned(), format!("{FULL}{service}"), pod.to_owned()];
        files.iter().for_each(|file| fuzz(file.as_bytes()));
        let mut seed = fastrand::Rng::with_seed(8);
        for round in 0..500 {
            let mut bytes = files[round % files.len()].clone().into_bytes();
            for _ in 0..seed.usize(1..6) {
                let at = seed.usize(..bytes.len());
                match seed.u8(..4) {
                    0 => drop(bytes.drain(at..(at + seed.usize(..20)).min(bytes.len()))),
                    1 => bytes.insert(at, b"{}[]:,'-&*"[seed.usize(..10)]),
                    _ => bytes[at] = seed.u8(b' '..0x7f),
                }
            }
            fuzz(&bytes);
        }
    }

    #[test]
    fn a_rendering_has_what_was_stated() {
        let rendered = render(FULL, Role::Node).unwrap();
        let resources = rendered["resources"].as_array().unwrap();
        let of =
            |kind: &str| resources.iter().filter(|r| r["@type"].as_str().unwrap().ends_with(kind)).collect::<Vec<_>>();
        let cluster = of(".Cluster").into_iter().find(|cluster| cluster["name"] == "users.default:80").unwrap();
        assert_eq!(cluster["connect_timeout"], "0.250s");
        assert_eq!(cluster["circuit_breakers"]["thresholds"][0]["max_retries"], 4);
        assert_eq!(cluster["outlier_detection"]["max_ejection_percent"], 50);
        let check = &cluster["health_checks"][0];
        let http = &check["http_health_check"];
        assert_eq!((&http["path"], &http["codec_client_type"]), (&json!("/healthz"), &json!("HTTP2")));
        assert_eq!((&check["unhealthy_threshold"], &check["healthy_threshold"]), (&json!(4), &json!(1)));
        let options =
            &cluster["typed_extension_protocol_options"]["envoy.extensions.upstreams.http.v3.HttpProtocolOptions"];
        assert_eq!(options["common_http_protocol_options"]["idle_timeout"], "120s");
        assert!(options["explicit_http_config"]["http2_protocol_options"].is_object(), "{options}");
        let host = &of(".RouteConfiguration")[0]["virtual_hosts"][0];
        let route = &host["routes"][0]["route"];
        assert_eq!(route["timeout"], "1.500s");
        assert_eq!(route["retry_policy"]["retry_on"], "5xx,connect-failure,retriable-4xx");
        assert_eq!(
            (&route["retry_policy"]["num_retries"], &route["retry_policy"]["per_try_timeout"]),
            (&json!(3), &json!("0.500s"))
        );
        let limit = &host["typed_per_filter_config"]["envoy.filters.http.local_ratelimit"]["token_bucket"];
        assert_eq!(
            (&limit["max_tokens"], &limit["tokens_per_fill"], &limit["fill_interval"]),
            (&json!(200), &json!(100), &json!("1s"))
        );
        let listener = serde_json::to_string(&of(".Listener")[0]).unwrap();
        assert!(listener.contains("envoy.filters.http.local_ratelimit"), "{listener}");
        assert!(resources.iter().any(|resource| resource["name"] == PASSTHROUGH));
    }
}

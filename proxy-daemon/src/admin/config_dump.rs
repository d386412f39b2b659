//! `/config_dump`: the whole, or what is asked for.

use http::StatusCode;
use regex::Regex;
use serde_json::{Value as Json, json};

use super::request::{Parameters, Reply};

/// The fields that `resource` may name, and the message that each of their elements is.
const RESOURCES: &[(&str, &str)] = &[
    ("static_listeners", "ListenersConfigDump.StaticListener"),
    ("dynamic_listeners", "ListenersConfigDump.DynamicListener"),
    ("static_clusters", "ClustersConfigDump.StaticCluster"),
    ("dynamic_active_clusters", "ClustersConfigDump.DynamicCluster"),
    ("dynamic_warming_clusters", "ClustersConfigDump.DynamicCluster"),
    ("static_route_configs", "RoutesConfigDump.StaticRouteConfig"),
    ("dynamic_route_configs", "RoutesConfigDump.DynamicRouteConfig"),
    ("static_endpoint_configs", "EndpointsConfigDump.StaticEndpointConfig"),
    ("dynamic_endpoint_configs", "EndpointsConfigDump.DynamicEndpointConfig"),
];

/// Applies the parameters of a request to a whole dump.
pub(super) fn reply(mut dump: Json, parameters: &Parameters) -> Reply {
    if parameters.get("mask").is_some() {
        return Reply::bad_request("mask is not supported by culvert yet: use resource or name_regex\n");
    }
    if parameters.get("include_eds").is_none()
        && !parameters.get("resource").is_some_and(|resource| resource.contains("endpoint"))
        && let Some(configs) = dump["configs"].as_array_mut()
    {
        configs.retain(|config| !config["@type"].as_str().is_some_and(|name| name.ends_with("EndpointsConfigDump")));
    }
    if let Some(text) = parameters.get("name_regex").filter(|text| !text.is_empty()) {
        let Ok(regex) = Regex::new(&format!("^(?:{text})$")) else {
            return Reply::bad_request(format!("Error while parsing name_regex: {text} is not a regular expression\n"));
        };
        for config in dump["configs"].as_array_mut().into_iter().flatten() {
            for elements in config.as_object_mut().into_iter().flatten().filter_map(|(_, field)| field.as_array_mut()) {
                elements.retain(|element| names(element).any(|name| regex.is_match(name)));
            }
        }
    }
    match parameters.get("resource").filter(|resource| !resource.is_empty()) {
        None => Reply::json(&dump),
        Some(resource) => match elements_of(&dump, resource) {
            Some(configs) => Reply::json(&json!({ "configs": configs })),
            None => Reply::error(StatusCode::NOT_FOUND, format!("{resource} not found in config dump")),
        },
    }
}

/// The elements of a repeated field of any part of the dump, each with its type.
fn elements_of(dump: &Json, resource: &str) -> Option<Vec<Json>> {
    let (_, message) = RESOURCES.iter().find(|(name, _)| *name == resource)?;
    let found = dump["configs"].as_array()?.iter().filter_map(|config| config.get(resource)?.as_array()).flatten();
    let typed = found.map(|element| {
        let mut element = element.clone();
        element["@type"] = format!("type.googleapis.com/envoy.admin.v3.{message}").into();
        element
    });
    Some(typed.collect())
}

/// The names under which an element of a dump is known: its own, or that of the resource in it.
fn names(element: &Json) -> impl Iterator<Item = &str> {
    const WITHIN: [&str; 7] = [
        "",
        "/listener",
        "/cluster",
        "/route_config",
        "/endpoint_config",
        "/active_state/listener",
        "/warming_state/listener",
    ];
    WITHIN.into_iter().flat_map(move |path| {
        let resource = element.pointer(path);
        ["name", "cluster_name"].into_iter().filter_map(move |field| resource?.get(field)?.as_str())
    })
}

//! The node's pods: which are enrolled, and their enrolment by command. Not one of Envoy's endpoints.

use std::net::IpAddr;

use http::StatusCode;
use serde_json::json;

use super::{
    AdminState,
    request::{Parameters, Reply},
};
use crate::intercept::{InterceptError, Interception};

const NONE: &str = "this daemon intercepts nothing: its bootstrap has no extension culvert.bootstrap.interception\n";

pub(super) fn pods(state: &AdminState, _: &Parameters) -> Reply {
    let not_ready = state.data_plane.interception_faults();
    let all = |interception: &Interception| {
        json!({
            "pods": interception.pods(),
            "cgroups": interception.cgroups(),
            "not_ready": not_ready,
            "acceleration": interception.acceleration(),
        })
    };
    match state.data_plane.with_interception(all) {
        Some(pods) => Reply::json(&pods),
        None => Reply::error(StatusCode::NOT_FOUND, NONE),
    }
}

pub(super) fn enroll(state: &AdminState, parameters: &Parameters) -> Reply {
    if let Some(cgroup) = parameters.get("cgroup") {
        // It has nothing else to be said of.
        return match parameters.iter().find(|(name, _)| *name != "cgroup") {
            Some((other, _)) => Reply::bad_request(format!("{other} is for pods, and not for a cgroup\n")),
            None => reply(state, |interception| interception.enrol_cgroup(cgroup)),
        };
    }
    let mut addresses = Vec::new();
    for (_, text) in parameters.iter().filter(|(name, _)| *name == "address") {
        match text.parse::<IpAddr>() {
            Ok(address) => addresses.push(address.to_canonical()),
            Err(_) => return Reply::bad_request(format!("`{text}` is not an address\n")),
        }
    }
    let name = parameters.get("name").filter(|name| !name.is_empty()).map(str::to_owned);
    let [direction, policy, level] = ["direction", "failure_policy", "acceleration"].map(|name| parameters.get(name));
    reply(state, |interception| interception.enrol(name, addresses, direction, policy, level))
}

pub(super) fn unenroll(state: &AdminState, parameters: &Parameters) -> Reply {
    reply(state, |interception| interception.unenrol(parameters.get("pod").unwrap_or_default()))
}

pub(super) fn accelerate(state: &AdminState, parameters: &Parameters) -> Reply {
    let level = parameters.get("level").unwrap_or_default();
    reply(state, |interception| interception.accelerate(level, parameters.get("listener")))
}

fn reply(state: &AdminState, change: impl FnOnce(&Interception) -> Result<(), InterceptError>) -> Reply {
    match state.data_plane.with_interception(change) {
        Some(Ok(())) => Reply::ok(),
        Some(Err(error)) => Reply::bad_request(format!("{error}\n")),
        None => Reply::error(StatusCode::NOT_FOUND, NONE),
    }
}

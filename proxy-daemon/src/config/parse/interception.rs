use std::path::PathBuf;

use culvert_xds_client::api::culvert::extensions::bootstrap::interception::v1::{
    Interception, interception::FailurePolicy as ProtoPolicy,
};

use super::{common::Result, support::join};
use crate::{
    config::FieldError,
    intercept::{FailurePolicy, InterceptionConfig, Pod, Range},
};

/// A checked interception extension; `path` is its `typed_config`.
///
/// # Errors
/// The field that is wrong.
pub(super) fn interception(message: &Interception, path: &str) -> Result<InterceptionConfig> {
    let Interception {
        interfaces,
        uplinks,
        pods,
        excluded_ports,
        excluded_ranges,
        failure_policy: _, // read through its getter, which knows the enum
        outbound_listener,
        shortcut_cgroup,
        mark,
        route_table,
        pin_path,
    } = message;
    if interfaces.is_empty() {
        let text = "name the pods' host-side interfaces, for example \"veth*\"";
        return Err(FieldError::new(join(path, "interfaces"), text));
    }
    let policy = |policy| match policy {
        ProtoPolicy::FailOpen => FailurePolicy::Open,
        ProtoPolicy::FailClosed => FailurePolicy::Closed,
    };
    let common = policy(message.failure_policy());
    let mut enrolled = Vec::with_capacity(pods.len());
    for (index, pod) in pods.iter().enumerate() {
        let address = pod.address.parse().map_err(|_| {
            let path = format!("{}[{index}].address", join(path, "pods"));
            FieldError::new(path, format!("\"{}\" is not an IP address", pod.address))
        })?;
        let failure_policy = pod.failure_policy.map_or(common, |_| policy(pod.failure_policy()));
        enrolled.push(Pod { address, failure_policy });
    }
    let port = |(index, port): (usize, &u32)| {
        let path = format!("{}[{index}]", join(path, "excluded_ports"));
        let port = u16::try_from(*port).ok().filter(|port| *port != 0);
        port.ok_or_else(|| FieldError::new(path, format!("{} is not a TCP port", excluded_ports[index])))
    };
    let range = |(index, text): (usize, &String)| {
        let path = format!("{}[{index}]", join(path, "excluded_ranges"));
        Range::parse(text).map_err(|message| FieldError::new(path, message))
    };
    let or = |value: u32, default: u32| if value == 0 { default } else { value };
    let default = InterceptionConfig::default();
    Ok(InterceptionConfig {
        interfaces: interfaces.clone(),
        uplinks: uplinks.clone(),
        pods: enrolled,
        excluded_ports: excluded_ports.iter().enumerate().map(port).collect::<Result<_>>()?,
        excluded_ranges: excluded_ranges.iter().enumerate().map(range).collect::<Result<_>>()?,
        outbound_listener: Some(outbound_listener.clone())
            .filter(|name| !name.is_empty())
            .unwrap_or(default.outbound_listener),
        shortcut_cgroup: Some(PathBuf::from(shortcut_cgroup)).filter(|path| !path.as_os_str().is_empty()),
        mark: or(*mark, default.mark),
        route_table: or(*route_table, default.route_table),
        pin_path: if pin_path.is_empty() { default.pin_path } else { PathBuf::from(pin_path) },
        force_clsact: default.force_clsact,
    })
}

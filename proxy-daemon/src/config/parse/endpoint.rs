use std::sync::Arc;

use envoy_types::pb::envoy::config::{
    core::v3::{HealthStatus as ProtoHealth, Metadata},
    endpoint::v3::{
        ClusterLoadAssignment, LbEndpoint, LocalityLbEndpoints, cluster_load_assignment::Policy,
        endpoint::HealthCheckConfig, lb_endpoint::HostIdentifier,
    },
};
use envoy_types::pb::envoy::r#type::v3::fractional_percent::DenominatorType;

use super::{
    common::{Result, endpoint_address, header_value, ip, limit, number, port, required, socket_address},
    support::{self, join},
};
use crate::{
    config::{
        FieldError,
        model::{
            AssignmentPolicy, DropOverload, Endpoint, EndpointCheck, EndpointDetails, HealthStatus, LbMetadata,
            Locality, LocalityEndpoints,
        },
    },
    http::metadata::object,
};

/// The endpoints of an EDS resource. Names are not looked up there.
///
/// # Errors
/// The field that is wrong or not honoured.
pub fn endpoints(assignment: &ClusterLoadAssignment, path: &str) -> Result<Vec<LocalityEndpoints>> {
    support::check(assignment, path)?;
    assigned(assignment, false, path)
}

/// The endpoints that are written into a cluster, which has been checked; `names` are taken where they are looked up.
pub(super) fn written(assignment: &ClusterLoadAssignment, names: bool, path: &str) -> Result<Vec<LocalityEndpoints>> {
    if assignment.policy.as_ref().is_some_and(|policy| policy.endpoint_stale_after.is_some()) {
        let text = "is for EDS: what is written into a cluster stays";
        return Err(FieldError::new(join(path, "policy.endpoint_stale_after"), text));
    }
    assigned(assignment, names, path)
}

/// The endpoints of an assignment that has been checked; `names` are taken where they are looked up.
fn assigned(assignment: &ClusterLoadAssignment, names: bool, path: &str) -> Result<Vec<LocalityEndpoints>> {
    let policy = assignment.policy.as_ref().map(|policy| assignment_policy(policy, &join(path, "policy")));
    let policy = policy.transpose()?.unwrap_or_default();
    let parse = |(index, group): (usize, &LocalityLbEndpoints)| {
        let path = format!("{}[{index}]", join(path, "endpoints"));
        let labels = said(group.metadata.as_ref(), SOCKET_LABELS).map(Arc::new);
        let parse = |(index, endpoint): (usize, &LbEndpoint)| {
            lb_endpoint(endpoint, (names, labels.as_ref()), &format!("{}[{index}]", join(&path, "lb_endpoints")))
        };
        let locality = group.locality.clone().unwrap_or_default();
        Ok(LocalityEndpoints {
            locality: Locality { region: locality.region, zone: locality.zone, sub_zone: locality.sub_zone },
            // Nothing is said of the weight of a locality that has no name.
            weight: if group.locality.is_some() { number(group.load_balancing_weight, 0) } else { 0 },
            policy: policy.clone(),
            priority: group.priority,
            endpoints: group.lb_endpoints.iter().enumerate().map(parse).collect::<Result<_>>()?,
        })
    };
    assignment.endpoints.iter().enumerate().map(parse).collect()
}

fn assignment_policy(policy: &Policy, path: &str) -> Result<AssignmentPolicy> {
    let default = AssignmentPolicy::default();
    let drop_overload = match &policy.drop_overloads[..] {
        [] => None,
        [one] => {
            let share = one.drop_percentage.unwrap_or_default();
            let each = match share.denominator() {
                DenominatorType::Hundred => 10_000,
                DenominatorType::TenThousand => 100,
                DenominatorType::Million => 1,
            };
            let per_million = share.numerator.saturating_mul(each);
            if per_million > 1_000_000 {
                let path = join(&join(path, "drop_overloads[0]"), "drop_percentage");
                return Err(FieldError::new(path, "the numerator is greater than the denominator"));
            }
            Some(Arc::new(DropOverload { per_million, category: one.category.as_str().into() }))
        }
        several => {
            let count = several.len();
            let text = format!("Cluster drop_overloads config has {count} categories. Envoy only support one.");
            return Err(FieldError::new(join(path, "drop_overloads"), text));
        }
    };
    Ok(AssignmentPolicy {
        overprovisioning_factor: number(policy.overprovisioning_factor, default.overprovisioning_factor),
        weighted_priority_health: policy.weighted_priority_health,
        drop_overload,
        stale_after: limit(policy.endpoint_stale_after, None, path, "endpoint_stale_after")?,
    })
}

/// Where metadata says which of a cluster's transport sockets is meant.
const SOCKET_LABELS: &str = "envoy.transport_socket_match";

fn said(metadata: Option<&Metadata>, namespace: &str) -> Option<LbMetadata> {
    metadata?.filter_metadata.get(namespace).map(object)
}

/// `None` where it says nothing.
pub(super) fn endpoint_check(config: &HealthCheckConfig, path: &str) -> Result<Option<EndpointCheck>> {
    let address = config.address.as_ref();
    let check = EndpointCheck {
        address: address.map(|address| endpoint_address(address, false, &join(path, "address"))).transpose()?,
        port: (config.port_value > 0).then(|| port(config.port_value, path, "port_value")).transpose()?,
        hostname: match config.hostname.as_str() {
            "" => None,
            name => Some(header_value(name, &join(path, "hostname"))?),
        },
        disabled: config.disable_active_health_check,
    };
    Ok((check != EndpointCheck::default()).then_some(check))
}

pub(super) fn health_status(status: ProtoHealth) -> HealthStatus {
    match status {
        ProtoHealth::Unknown => HealthStatus::Unknown,
        ProtoHealth::Healthy => HealthStatus::Healthy,
        ProtoHealth::Unhealthy => HealthStatus::Unhealthy,
        ProtoHealth::Draining => HealthStatus::Draining,
        ProtoHealth::Timeout => HealthStatus::Timeout,
        ProtoHealth::Degraded => HealthStatus::Degraded,
    }
}

/// `names`: it may have one; `labels`: what its locality's metadata says of transport sockets.
fn lb_endpoint(
    endpoint: &LbEndpoint,
    (names, labels): (bool, Option<&Arc<LbMetadata>>),
    path: &str,
) -> Result<Endpoint> {
    let Some(HostIdentifier::Endpoint(host)) = &endpoint.host_identifier else {
        return Err(required(path, "endpoint"));
    };
    let address = host.address.as_ref().ok_or_else(|| required(path, "endpoint.address"))?;
    let also_path = join(path, "endpoint.additional_addresses");
    if names && !host.additional_addresses.is_empty() {
        return Err(FieldError::new(also_path, "additional_addresses are for STATIC and EDS clusters"));
    }
    let also = host.additional_addresses.iter().enumerate();
    let also = also.map(|(index, also)| {
        let path = format!("{also_path}[{index}]");
        let address = also.address.as_ref().ok_or_else(|| required(&path, "address"))?;
        let path = join(&path, "address");
        let (socket, port) = socket_address(address, &path)?;
        Ok((ip(socket, &path)?, port).into())
    });
    let metadata = endpoint.metadata.as_ref();
    let (check, check_path) = (host.health_check_config.as_ref(), join(path, "endpoint.health_check_config"));
    let details = EndpointDetails {
        metadata: said(metadata, "envoy.lb"),
        socket_labels: said(metadata, SOCKET_LABELS),
        locality_socket_labels: labels.cloned(),
        check: check.map(|check| endpoint_check(check, &check_path)).transpose()?.flatten(),
    };
    Ok(Endpoint {
        address: endpoint_address(address, names, &join(path, "endpoint.address"))?,
        additional_addresses: also.collect::<Result<_>>()?,
        weight: number(endpoint.load_balancing_weight, 1).max(1),
        health: health_status(endpoint.health_status()),
        hostname: host.hostname.as_str().into(),
        details: (details != EndpointDetails::default()).then(|| Arc::new(details)),
    })
}

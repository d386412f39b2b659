//! `/clusters`: every cluster with its limits and hosts.

use std::{fmt::Write as _, sync::Arc};

use regex::Regex;
use serde_json::{Value as Json, json};

use crate::{
    config::{
        dump::Configuration,
        model::{Discovery, EndpointAddress, HealthStatus},
    },
    upstream::{Cluster, ClusterMap, HealthFlag, Host, HostCounter},
};

/// Those whose names match, in the order of their names.
pub(super) fn choose(clusters: &ClusterMap, filter: Option<&Regex>) -> Vec<Arc<Cluster>> {
    let mut chosen: Vec<_> =
        clusters.values().filter(|c| filter.is_none_or(|f| f.is_match(&c.config.name))).cloned().collect();
    chosen.sort_by(|a, b| a.config.name.cmp(&b.config.name));
    chosen
}

/// Lines of `cluster::what::value` and `cluster::host::what::value`.
pub(super) fn text(clusters: &[Arc<Cluster>], config: &Configuration) -> String {
    let mut out = String::new();
    for cluster in clusters {
        // Writing to a String cannot fail.
        let _ = write_cluster(&mut out, cluster, !config.is_static_cluster(&cluster.config.name));
    }
    out
}

fn write_cluster(out: &mut String, cluster: &Cluster, added_via_api: bool) -> std::fmt::Result {
    let name = &cluster.config.name;
    writeln!(out, "{name}::observability_name::{}", observability_name(cluster))?;
    if let Some(outlier) = &cluster.outlier {
        for (prefix, local) in [("", false), ("local_origin_", true)] {
            let (average, threshold) = outlier.averages(local);
            writeln!(out, "{name}::outlier::{prefix}success_rate_average::{average}")?;
            writeln!(out, "{name}::outlier::{prefix}success_rate_ejection_threshold::{threshold}")?;
        }
    }
    for (priority, high) in [("default", false), ("high", true)] {
        let limits = cluster.limits(high);
        writeln!(out, "{name}::{priority}_priority::max_connections::{}", limits.max_connections())?;
        writeln!(out, "{name}::{priority}_priority::max_pending_requests::{}", limits.max_pending_requests())?;
        writeln!(out, "{name}::{priority}_priority::max_requests::{}", limits.max_requests())?;
        writeln!(out, "{name}::{priority}_priority::max_retries::{}", limits.max_retries())?;
    }
    writeln!(out, "{name}::added_via_api::{added_via_api}")?;
    if let Some(service) = eds_service_name(cluster) {
        writeln!(out, "{name}::eds_service_name::{service}")?;
    }
    for host in cluster.hosts().hosts.iter().chain(&cluster.named.all()) {
        let address = host.display();
        for (counter, stat) in HostCounter::ALL {
            writeln!(out, "{name}::{address}::{stat}::{}", host.counters.sum(counter))?;
        }
        writeln!(out, "{name}::{address}::hostname::{}", host.hostname())?;
        writeln!(out, "{name}::{address}::health_flags::{}", health_flags(host))?;
        writeln!(out, "{name}::{address}::weight::{}", host.weight)?;
        writeln!(out, "{name}::{address}::region::{}", host.locality.region)?;
        writeln!(out, "{name}::{address}::zone::{}", host.locality.zone)?;
        writeln!(out, "{name}::{address}::sub_zone::{}", host.locality.sub_zone)?;
        writeln!(out, "{name}::{address}::canary::{}", host.is_canary())?;
        writeln!(out, "{name}::{address}::priority::{}", host.priority)?;
        writeln!(out, "{name}::{address}::success_rate::{}", success_rate(host, false))?;
        writeln!(out, "{name}::{address}::local_origin_success_rate::{}", success_rate(host, true))?;
    }
    Ok(())
}

/// `alt_stat_name` where it is set, else the name.
fn observability_name(cluster: &Cluster) -> &str {
    let config = &cluster.config;
    if config.stat_name == config.name.replace(':', "_") { &config.name } else { &config.stat_name }
}

/// In percent; negative where outlier detection has nothing to say.
fn success_rate(host: &Host, local_origin: bool) -> f64 {
    host.vitals.as_ref().map_or(-1.0, |vitals| vitals.success_rate(local_origin))
}

fn health_flags(host: &Host) -> String {
    let has = |flag| host.vitals.as_ref().is_some_and(|vitals| vitals.has(flag));
    let said = |wanted: &[HealthStatus]| wanted.contains(&host.health);
    // In Envoy's order.
    let flags = [
        ("/failed_active_hc", has(HealthFlag::FailedActiveHc)),
        ("/failed_outlier_check", has(HealthFlag::FailedOutlierCheck)),
        ("/failed_eds_health", said(&[HealthStatus::Unhealthy, HealthStatus::Timeout])),
        ("/degraded_active_hc", has(HealthFlag::DegradedActiveHc)),
        ("/degraded_eds_health", said(&[HealthStatus::Degraded])),
        ("/pending_dynamic_removal", has(HealthFlag::PendingDynamicRemoval)),
        ("/pending_active_hc", has(HealthFlag::PendingActiveHc)),
        ("/excluded_via_immediate_hc_fail", has(HealthFlag::ExcludedViaImmediateHcFail)),
        ("/active_hc_timeout", has(HealthFlag::ActiveHcTimeout)),
        ("/eds_status_draining", said(&[HealthStatus::Draining])),
        ("/degraded_outlier_detection", has(HealthFlag::DegradedOutlier)),
    ];
    let text: String = flags.into_iter().filter(|(_, set)| *set).map(|(text, _)| text).collect();
    if text.is_empty() { "healthy".to_owned() } else { text }
}

/// An Envoy `Clusters` message.
pub(super) fn json(clusters: &[Arc<Cluster>], config: &Configuration) -> Json {
    let status = |cluster: &Arc<Cluster>| cluster_status(cluster, !config.is_static_cluster(&cluster.config.name));
    let statuses: Vec<_> = clusters.iter().map(status).collect();
    json!({ "cluster_statuses": statuses })
}

fn cluster_status(cluster: &Cluster, added_via_api: bool) -> Json {
    let thresholds = [(false, None), (true, Some("HIGH"))].map(|(high, priority)| {
        let limits = cluster.limits(high);
        let mut json = json!({
            "max_connections": limits.max_connections(),
            "max_pending_requests": limits.max_pending_requests(),
            "max_requests": limits.max_requests(),
            "max_retries": limits.max_retries(),
        });
        if let Some(priority) = priority {
            json["priority"] = priority.into();
        }
        json
    });
    let (hosts, named) = (cluster.hosts(), cluster.named.all());
    let hosts = hosts.hosts.iter().chain(&named);
    let mut status = json!({
        "name": &*cluster.config.name,
        "observability_name": observability_name(cluster),
        "circuit_breakers": { "thresholds": thresholds },
        "host_statuses": hosts.map(|host| host_status(host)).collect::<Vec<_>>(),
    });
    if let Some(outlier) = &cluster.outlier {
        for (field, local) in
            [("success_rate_ejection_threshold", false), ("local_origin_success_rate_ejection_threshold", true)]
        {
            let (_, threshold) = outlier.averages(local);
            if threshold >= 0.0 {
                status[field] = json!({ "value": threshold });
            }
        }
    }
    if added_via_api {
        status["added_via_api"] = true.into();
    }
    if let Some(service) = eds_service_name(cluster) {
        status["eds_service_name"] = service.into();
    }
    status
}

/// The name by which EDS knows the endpoints, where it is not the cluster's own.
fn eds_service_name(cluster: &Cluster) -> Option<&str> {
    match &cluster.config.discovery {
        Discovery::Eds { endpoints } if endpoints.name != cluster.config.name => Some(&endpoints.name),
        _ => None,
    }
}

fn host_status(host: &Host) -> Json {
    let stats = HostCounter::ALL.iter().map(|(counter, name)| {
        let mut json = json!({ "name": name });
        // As proto3 JSON: a 64-bit number is text, and what has its default is left out.
        match host.counters.sum(*counter) {
            0 => {}
            value => json["value"] = value.to_string().into(),
        }
        if matches!(counter, HostCounter::CxActive | HostCounter::RqActive) {
            json["type"] = "GAUGE".into();
        }
        json
    });
    let health = match host.health {
        HealthStatus::Unknown | HealthStatus::Healthy => "HEALTHY",
        HealthStatus::Unhealthy => "UNHEALTHY",
        HealthStatus::Draining => "DRAINING",
        HealthStatus::Timeout => "TIMEOUT",
        HealthStatus::Degraded => "DEGRADED",
    };
    let mut health_status = json!({ "eds_health_status": health });
    for (field, flag) in [
        ("failed_active_health_check", HealthFlag::FailedActiveHc),
        ("failed_outlier_check", HealthFlag::FailedOutlierCheck),
        ("failed_active_degraded_check", HealthFlag::DegradedActiveHc),
        ("pending_dynamic_removal", HealthFlag::PendingDynamicRemoval),
        ("pending_active_hc", HealthFlag::PendingActiveHc),
        ("excluded_via_immediate_hc_fail", HealthFlag::ExcludedViaImmediateHcFail),
        ("active_hc_timeout", HealthFlag::ActiveHcTimeout),
        ("failed_degraded_outlier_detection", HealthFlag::DegradedOutlier),
    ] {
        if host.vitals.as_ref().is_some_and(|vitals| vitals.has(flag)) {
            health_status[field] = true.into();
        }
    }
    let mut locality = json!({});
    for (field, value) in
        [("region", &host.locality.region), ("zone", &host.locality.zone), ("sub_zone", &host.locality.sub_zone)]
    {
        if !value.is_empty() {
            locality[field] = value.as_str().into();
        }
    }
    let mut status = json!({
        "address": address(&host.address),
        "stats": stats.collect::<Vec<_>>(),
        "health_status": health_status,
        "weight": host.weight,
        "locality": locality,
    });
    for (field, local) in [("success_rate", false), ("local_origin_success_rate", true)] {
        let rate = success_rate(host, local);
        if rate >= 0.0 {
            status[field] = json!({ "value": rate });
        }
    }
    if !host.hostname().is_empty() {
        status["hostname"] = host.hostname().into();
    }
    if host.priority > 0 {
        status["priority"] = host.priority.into();
    }
    status
}

fn address(address: &EndpointAddress) -> Json {
    match address {
        EndpointAddress::Ip(ip) => super::endpoints::socket_address(&ip.ip().to_string(), ip.port()),
        EndpointAddress::Dns { host, port } => super::endpoints::socket_address(host, *port),
        EndpointAddress::Pipe(path) => json!({ "pipe": { "path": path.display().to_string() } }),
    }
}

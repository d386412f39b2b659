//! `/stats`, `/stats/prometheus` and `/memory`.

use std::{collections::HashSet, fs};

use serde_json::json;

use super::{
    AdminState, ServerState,
    request::{Parameters, Reply},
};
use crate::stats::{self, HistogramBuckets, Kind, Metric, Query};

/// `/stats`
pub(super) fn stats(state: &AdminState, parameters: &Parameters) -> Reply {
    let format = parameters.get("format").unwrap_or("text");
    if !["text", "json", "prometheus", ""].contains(&format) {
        return Reply::bad_request("usage: /stats?format=(json|prometheus|text)\n\n");
    }
    if format == "prometheus" {
        return prometheus(state, parameters);
    }
    let query = match Query::parse(parameters.iter()) {
        Ok(query) => query,
        Err(text) => return Reply::bad_request(text),
    };
    let metrics = collect(state, &query);
    if format == "json" {
        let body = stats::write_json(&metrics, query.histogram_buckets).to_string();
        return Reply { content_type: "application/json", ..Reply::text(body) };
    }
    let mut body = String::new();
    // Writing to a String cannot fail.
    let _ = stats::write_text(&mut body, &metrics, query.histogram_buckets);
    Reply::text(body)
}

/// `/stats/prometheus`
pub(super) fn prometheus(state: &AdminState, parameters: &Parameters) -> Reply {
    let query = match Query::parse(parameters.iter()) {
        Ok(query) => query,
        Err(text) => return Reply::bad_request(text),
    };
    if query.histogram_buckets == HistogramBuckets::Disjoint {
        return Reply::bad_request("usage: /stats/prometheus?histogram_buckets=cumulative\n");
    }
    let mut metrics = collect(state, &query);
    if parameters.get("text_readouts").is_none() {
        metrics.retain(|metric| metric.kind() != Kind::TextReadout);
    }
    let mut body = String::new();
    // Writing to a String cannot fail.
    let _ = stats::write_prometheus(&mut body, &metrics);
    Reply::text(body)
}

fn collect(state: &AdminState, query: &Query) -> Vec<Metric> {
    refresh(state);
    let mut metrics = stats::snapshot();
    let extra: Vec<_> = state.extra_stats.iter().flat_map(|source| source()).collect();
    let names: HashSet<_> = extra.iter().map(|metric| metric.name().into_owned()).collect();
    metrics.retain(|metric| !names.contains(&*metric.name()));
    metrics.extend(extra);
    metrics.sort_by(Metric::order);
    metrics.retain(|metric| query.wants(metric));
    metrics
}

/// Brings the statistics up to date that are looked up, not counted.
pub(super) fn refresh(state: &AdminState) {
    let server_state = state.state.get();
    let set = |name, value| stats::gauge(name).set(value);
    set("server.live", u64::from(server_state == ServerState::Live));
    set("server.state", server_state as u64);
    set("server.uptime", state.started.elapsed().as_secs());
    set("server.concurrency", state.concurrency as u64);
    set("server.hot_restart_epoch", 0);
    set("server.tasks", state.data_plane.tasks() as u64);
    set("cluster_manager.active_clusters", state.data_plane.clusters().len() as u64);
    set("listener_manager.total_listeners_active", state.data_plane.listeners().len() as u64);
    set("listener_manager.workers_started", 1);
    let memory = Memory::read();
    set("server.memory_allocated", memory.anonymous);
    set("server.memory_heap_size", memory.anonymous);
    set("server.memory_physical_size", memory.resident);
}

/// What the kernel says of this process' memory, in bytes; 0 where it does not say.
#[derive(Default)]
struct Memory {
    anonymous: u64,
    resident: u64,
}

impl Memory {
    fn read() -> Memory {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            let kib = line.and_then(|line| line.split_whitespace().next()).and_then(|kib| kib.parse::<u64>().ok());
            kib.unwrap_or(0) * 1024
        };
        Memory { anonymous: field("RssAnon:"), resident: field("VmRSS:") }
    }
}

/// `/memory`
pub(super) fn memory() -> Reply {
    let memory = Memory::read();
    Reply::json(&json!({
        "allocated": memory.anonymous.to_string(),
        "heap_size": memory.anonymous.to_string(),
        // Of Envoy's allocator; ours has no such numbers.
        "pageheap_unmapped": "0",
        "pageheap_free": "0",
        "total_thread_cache": "0",
        "total_physical_bytes": memory.resident.to_string(),
    }))
}

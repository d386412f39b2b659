//! Routing side by side with the real Envoy: tables of routes and of requests to them. Both proxies get the same YAML and the same
//! requests; what clients see and what the services behind the proxies see must be the same.

mod actions;
mod connections;
mod counted;
mod harness;
mod hashes;
mod headers;
mod hedges;
mod http2;
mod limits;
mod managers;
mod matchers;
mod matches;
mod mirrors;
mod origins;
mod redirects;
mod replies;
mod retries;
mod rewrites;
mod trust;
mod upgrades;
mod upstream;

use anyhow::Result;

#[test]
fn matches_are_envoys() -> Result<()> {
    harness::compare(matches::cases())
}

#[test]
fn matchers_are_envoys() -> Result<()> {
    harness::compare_counting(matchers::cases(), &["ip_parsing_failed"])
}

#[test]
fn actions_are_envoys() -> Result<()> {
    harness::compare(actions::cases())
}

#[test]
fn header_mutations_are_envoys() -> Result<()> {
    harness::compare(headers::cases())
}

#[test]
fn retries_are_envoys() -> Result<()> {
    harness::compare(retries::cases())
}

#[test]
fn rewrites_are_envoys() -> Result<()> {
    harness::compare(rewrites::cases())
}

#[test]
fn retry_budgets_are_envoys() -> Result<()> {
    harness::compare_counting(
        retries::budgets(),
        &[
            "retries.upstream_rq_retry",
            "retries.upstream_rq_total",
            "recent.upstream_rq_retry",
            "recent.upstream_rq_total",
        ],
    )
}

#[test]
fn retries_over_http2_are_envoys() -> Result<()> {
    harness::compare_counting(
        http2::cases(),
        &["cluster.h2.upstream_rq_retry", "cluster.h2.upstream_rq_5", "cluster.h2.upstream_rq_total"],
    )
}

#[test]
fn redirects_are_envoys() -> Result<()> {
    harness::compare_counting(
        redirects::cases(),
        &[
            "internal_redirect",
            "ingress.rq_",
            "ingress.downstream_rq_total",
            "ingress.downstream_rq_http1_total",
            "ingress.downstream_rq_completed",
            "ingress.downstream_rq_3xx",
            "cluster.a.upstream_rq_3",
            "cluster.a.upstream_rq_completed",
        ],
    )
}

#[test]
fn counts_are_envoys() -> Result<()> {
    harness::compare_counting(
        counted::cases(),
        &[
            "vhost.",
            ".a.upstream_rq_completed",
            ".a.external.upstream_rq_",
            ".a.internal.upstream_rq_",
            "empty.upstream_rq_",
            "dead.upstream_rq_5",
            "dead.upstream_rq_total",
            "dead.upstream_rq_pending_failure_eject",
        ],
    )
}

#[test]
fn origins_are_told_as_by_envoy() -> Result<()> {
    harness::compare(origins::cases())
}

#[test]
fn hashes_are_envoys() -> Result<()> {
    harness::compare_counting(hashes::cases(), &["ring_hash_lb", "maglev_lb"])
}

#[test]
fn hedges_are_envoys() -> Result<()> {
    harness::compare_counting(
        hedges::cases(),
        &[
            "a.upstream_rq_retry",
            "a.upstream_rq_per",
            "a.upstream_rq_5",
            "a.upstream_rq_total",
            "a.upstream_rq_completed",
            "a.upstream_rq_timeout",
            ".a.upstream_rq_active",
        ],
    )
}

#[test]
fn upgrades_are_envoys() -> Result<()> {
    harness::compare(upgrades::cases())
}

#[test]
fn mirrors_are_envoys() -> Result<()> {
    harness::compare(mirrors::cases())
}

#[test]
fn managers_are_envoys() -> Result<()> {
    harness::compare(managers::cases())
}

#[test]
fn connections_are_envoys() -> Result<()> {
    harness::compare(connections::cases())
}

#[test]
fn trust_is_envoys() -> Result<()> {
    harness::compare(trust::cases())
}

#[test]
fn local_replies_are_envoys() -> Result<()> {
    harness::compare(replies::cases())
}

#[test]
fn limits_are_envoys() -> Result<()> {
    harness::compare(limits::cases())
}

use std::time::Duration;

/// How long the connections to the hosts of a cluster are kept, and what they may bring.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct PoolOptions {
    /// `common_http_protocol_options.max_connection_duration`: a connection is used no more after this; `None`: there is no limit.
    pub max_connection_duration: Option<Duration>,
    /// `common_http_protocol_options.max_connection_duration_jitter`: that is longer by up to this part of it.
    pub duration_jitter: f64,
    /// `close_connections_on_host_health_failure`: what a TCP proxy has with a host ends when the host is found to be ill.
    pub closes_failed: bool,
    /// `common_lb_config.close_connections_on_host_set_change`: no connection is used again after a change of the hosts.
    pub drains_on_change: bool,
    /// `preconnect_policy.per_upstream_preconnect_ratio`: so many connections to a host for each request that it has; `None`: those that
    /// requests need.
    pub preconnect: Option<f64>,
    /// `preconnect_policy.predictive_preconnect_ratio`: so many connections to all hosts for each request that they have, the next one
    /// included; `None`: those that requests need.
    pub predictive: Option<f64>,
    /// `connection_pool_per_downstream_connection`: requests of different clients' connections share no connection.
    pub per_client: bool,
    /// How large heads of responses may be.
    pub heads: HeadLimits,
}

impl PoolOptions {
    /// How long a connection is used.
    pub fn lifetime(&self) -> Option<Duration> {
        self.max_connection_duration.map(|limit| jittered(limit, self.duration_jitter))
    }
}

/// A limit, or one that is longer by up to `jitter` of it, by chance.
pub fn jittered(limit: Duration, jitter: f64) -> Duration {
    // Neither is negative, and limits are far from what a `Duration` can hold.
    limit + limit.mul_f64(fastrand::f64() * jitter)
}

/// Of a cluster's `common_http_protocol_options`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct HeadLimits {
    /// `max_response_headers_kb`, in KiB; `None`: 80 of HTTP/1, 60 of HTTP/2.
    pub kilobytes: Option<u32>,
    /// `max_headers_count`; `None`: 100.
    pub count: Option<u32>,
}

impl HeadLimits {
    /// `max_headers_count` where nothing else is said.
    pub const COUNT: u32 = 100;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_last_longer_by_chance() {
        let limit = Duration::from_secs(10);
        let options = |duration_jitter| PoolOptions {
            max_connection_duration: Some(limit),
            duration_jitter,
            ..PoolOptions::default()
        };
        assert_eq!(options(0.0).lifetime(), Some(limit));
        assert_eq!(PoolOptions::default().lifetime(), None);
        let drawn: Vec<_> = (0..1000).filter_map(|_| options(0.5).lifetime()).collect();
        let (least, most) = (drawn.iter().min().unwrap(), drawn.iter().max().unwrap());
        assert!(*least >= limit && *least < limit + Duration::from_secs(1), "{least:?}");
        assert!(*most > limit + Duration::from_secs(4) && *most <= limit + Duration::from_secs(5), "{most:?}");
    }
}

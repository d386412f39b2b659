use super::HealthStatus;

/// `common_lb_config.override_host_status`: how a host may stand that requests name by themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OverrideStatuses(u8);

impl OverrideStatuses {
    /// These, and no others.
    pub fn new(statuses: impl IntoIterator<Item = HealthStatus>) -> OverrideStatuses {
        OverrideStatuses(statuses.into_iter().fold(0, |all, status| all | 1 << status as u8))
    }

    /// Whether this is one of them.
    pub fn has(self, status: HealthStatus) -> bool {
        self.0 & 1 << status as u8 != 0
    }
}

impl Default for OverrideStatuses {
    fn default() -> OverrideStatuses {
        OverrideStatuses::new([HealthStatus::Unknown, HealthStatus::Healthy, HealthStatus::Degraded])
    }
}

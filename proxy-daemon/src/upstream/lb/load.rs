//! How much of the load each priority gets: Envoy's arithmetic, in whole percents.

/// The hosts of one priority, counted: their number, or the sum of their weights.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(in crate::upstream) struct Counts {
    pub(super) all: u64,
    pub(super) healthy: u64,
    pub(super) degraded: u64,
    /// Of all: those that are as if they were not there.
    pub(super) excluded: u64,
}

impl Counts {
    /// What the others are a part of.
    fn total(&self) -> u64 {
        self.all - self.excluded
    }
}

/// One priority, as the arithmetic sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::upstream) struct Level {
    /// Of all hosts.
    pub(super) hosts: Counts,
    /// Of their weights, where `weighted_priority_health` says so.
    pub(super) weights: Option<Counts>,
    pub(super) overprovisioning_factor: u32,
}

impl Level {
    /// What its healthy and its degraded hosts can take, in percent of the load.
    fn availability(&self) -> (u32, u32) {
        let counts = self.weights.unwrap_or(self.hosts);
        if self.hosts.total() == 0 || counts.total() == 0 {
            return (0, 0);
        }
        // At most 100.
        let of = |part: u64| (u64::from(self.overprovisioning_factor) * part / counts.total()).min(100) as u32;
        (of(counts.healthy), of(counts.degraded))
    }

    /// Whether fewer of its hosts may be used than `threshold` percent.
    pub(super) fn in_panic(&self, threshold: u32) -> bool {
        let Counts { healthy, degraded, .. } = self.hosts;
        let total = self.hosts.total();
        let percent = |part: u64| if total == 0 { 0.0 } else { 100.0 * part as f64 / total as f64 };
        percent(healthy) + percent(degraded) < f64::from(threshold.min(100))
    }
}

/// Shares of the load, in percent, by priority. Together they are 100.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(in crate::upstream) struct Shares {
    pub(super) healthy: Vec<u32>,
    pub(super) degraded: Vec<u32>,
}

/// A priority, and whether its degraded hosts are meant.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(in crate::upstream) struct Target {
    pub(in crate::upstream) priority: u16,
    pub(in crate::upstream) degraded: bool,
}

impl Shares {
    /// The target of a random number, or of a request's hash.
    pub(super) fn target(&self, number: u64) -> Target {
        // Fits: less than 100.
        let number = (number % 100) as u32;
        let mut sum = 0;
        for (degraded, shares) in [(false, &self.healthy), (true, &self.degraded)] {
            for (priority, share) in shares.iter().enumerate() {
                sum += share;
                if number < sum {
                    return Target { priority: priority as u16, degraded };
                }
            }
        }
        Target::default()
    }
}

/// What the priorities of a cluster come to.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::upstream) struct Load {
    pub(super) shares: Shares,
    /// Which priorities use all their hosts.
    pub(super) panic: Vec<bool>,
    /// What each can take, healthy and degraded.
    availability: Vec<(u32, u32)>,
    /// The target of each remainder by 100.
    targets: Box<[Target; 100]>,
}

impl Load {
    pub(in crate::upstream) fn new(levels: &[Level], panic_threshold: u32) -> Load {
        let availability: Vec<_> = levels.iter().map(Level::availability).collect();
        let total = total(&availability);
        let mut shares = distribute(&availability, total);
        let mut panic = vec![false; levels.len()];
        if panic_threshold == 0 && total == 0 {
            // Nothing can be used; somewhere requests must be told so.
            shares.healthy[0] = 100;
        } else {
            // Where there is enough for all of the load, nobody panics.
            panic = levels.iter().map(|level| total < 100 && level.in_panic(panic_threshold)).collect();
            if panic.iter().all(|panic| *panic) {
                shares = by_number(levels);
            }
        }
        let targets = Box::new(std::array::from_fn(|number| shares.target(number as u64)));
        Load { shares, panic, availability, targets }
    }

    /// The shares without the priorities that `excluded` names; `None` where nothing is left of them.
    pub(super) fn without(&self, excluded: impl Fn(usize) -> bool) -> Option<Shares> {
        let availability = self.availability.iter().enumerate();
        let availability: Vec<_> =
            availability.map(|(priority, it)| if excluded(priority) { (0, 0) } else { *it }).collect();
        let total = total(&availability);
        if total == 0 {
            return None;
        }
        let mut shares = Shares { healthy: vec![0; availability.len()], degraded: vec![0; availability.len()] };
        let mut left = 100;
        while left > 0 {
            for (share, (healthy, _)) in shares.healthy.iter_mut().zip(&availability) {
                give(&mut left, share, *healthy, total);
            }
            for (share, (_, degraded)) in shares.degraded.iter_mut().zip(&availability) {
                give(&mut left, share, *degraded, total);
            }
        }
        Some(shares)
    }

    /// The target of a random number, or of a request's hash.
    pub(in crate::upstream) fn target(&self, number: u64) -> Target {
        self.targets[(number % 100) as usize]
    }
}
/// What all can take together, at most 100.
fn total(availability: &[(u32, u32)]) -> u32 {
    availability.iter().map(|(healthy, degraded)| healthy + degraded).sum::<u32>().min(100)
}

/// Gives a priority what it can take, of what is left.
fn give(left: &mut u32, share: &mut u32, availability: u32, total: u32) {
    let part = (availability * 100 / total).min(*left);
    *share += part;
    *left -= part;
}

/// The load by what the priorities can take: first healthy hosts, then degraded ones.
fn distribute(availability: &[(u32, u32)], total: u32) -> Shares {
    let mut shares = Shares { healthy: vec![0; availability.len()], degraded: vec![0; availability.len()] };
    if total == 0 {
        return shares;
    }
    let mut left = 100;
    for (share, (healthy, _)) in shares.healthy.iter_mut().zip(availability) {
        give(&mut left, share, *healthy, total);
    }
    for (share, (_, degraded)) in shares.degraded.iter_mut().zip(availability) {
        give(&mut left, share, *degraded, total);
    }
    // What rounding left goes to the first that has any.
    let healthy = availability.iter().position(|(healthy, _)| *healthy > 0);
    let degraded = availability.iter().position(|(_, degraded)| *degraded > 0);
    match (healthy, degraded) {
        (Some(first), _) => shares.healthy[first] += left,
        (None, Some(first)) => shares.degraded[first] += left,
        (None, None) => {}
    }
    shares
}

/// The load where every priority panics: by the number of hosts.
fn by_number(levels: &[Level]) -> Shares {
    let all: u64 = levels.iter().map(|level| level.hosts.all).sum();
    let mut shares = Shares { healthy: vec![0; levels.len()], degraded: vec![0; levels.len()] };
    let Some(first) = levels.iter().position(|level| level.hosts.all > 0) else {
        if let Some(share) = shares.healthy.first_mut() {
            *share = 100;
        }
        return shares;
    };
    for (share, level) in shares.healthy.iter_mut().zip(levels) {
        // At most 100.
        *share = (100 * level.hosts.all / all) as u32;
    }
    shares.healthy[first] += 100 - shares.healthy.iter().sum::<u32>();
    shares
}

#[cfg(test)]
#[path = "load_tests.rs"]
mod tests;

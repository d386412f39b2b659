use super::*;

fn level(total: u64, healthy: u64, degraded: u64) -> Level {
    Level { hosts: Counts { all: total, healthy, degraded, excluded: 0 }, weights: None, overprovisioning_factor: 140 }
}

fn load(levels: &[(u64, u64, u64)], threshold: u32) -> (Vec<u32>, Vec<u32>, Vec<bool>) {
    let levels: Vec<_> = levels.iter().map(|(total, healthy, degraded)| level(*total, *healthy, *degraded)).collect();
    let Load { shares, panic, .. } = Load::new(&levels, threshold);
    (shares.healthy, shares.degraded, panic)
}

/// The tables of Envoy's documentation ("Priority levels", "Degraded endpoints", "Panic threshold").
#[test]
fn priorities_spill_over() {
    for (healthy, shares) in [
        ([100, 100], [100, 0]),
        ([72, 100], [100, 0]),
        ([71, 100], [99, 1]),
        ([50, 100], [70, 30]),
        ([25, 100], [35, 65]),
        ([0, 100], [0, 100]),
    ] {
        let found = load(&[(100, healthy[0], 0), (100, healthy[1], 0)], 50);
        assert_eq!((found.0, found.1), (shares.to_vec(), vec![0, 0]), "{healthy:?}");
    }
    // Not enough anywhere: what there is gets all.
    let (shares, _, panic) = load(&[(100, 25, 0), (100, 25, 0)], 0);
    assert_eq!((shares, panic), (vec![50, 50], vec![false, false]));
    let (shares, ..) = load(&[(100, 25, 0), (100, 0, 0)], 0);
    assert_eq!(shares, [100, 0]);
    for (healthy, shares) in [([100, 100, 100], [100, 0, 0]), ([72, 72, 100], [100, 0, 0]), ([71, 71, 100], [99, 1, 0])]
    {
        assert_eq!(load(&healthy.map(|healthy| (100, healthy, 0)), 50).0, shares, "{healthy:?}");
    }
    for (healthy, shares) in
        [([50, 60, 100], [70, 30, 0]), ([25, 100, 100], [35, 65, 0]), ([25, 25, 100], [35, 35, 30])]
    {
        assert_eq!(load(&healthy.map(|healthy| (100, healthy, 0)), 50).0, shares, "{healthy:?}");
    }
}

#[test]
fn degraded_hosts_come_after_healthy_ones() {
    assert_eq!(load(&[(100, 100, 0)], 50).1, [0]);
    assert_eq!(load(&[(100, 50, 50)], 50), (vec![70], vec![30], vec![false]));
    assert_eq!(load(&[(100, 0, 100)], 50), (vec![0], vec![100], vec![false]));
    // Healthy hosts of a later priority come before degraded ones of an earlier one.
    assert_eq!(load(&[(100, 25, 75), (100, 100, 0)], 50), (vec![35, 65], vec![0, 0], vec![false, false]));
    // Of Envoy's comment: 10/20/10 healthy and 20/10/0 degraded.
    let levels = [(1000, 72, 143), (1000, 143, 72), (1000, 72, 0)];
    assert_eq!(load(&levels, 0), (vec![16, 28, 14], vec![28, 14, 0], vec![false; 3]));
}

#[test]
fn a_priority_panics_only_where_the_whole_is_short() {
    assert_eq!(load(&[(100, 72, 0), (100, 25, 0)], 50).2, [false, false]);
    assert_eq!(load(&[(100, 25, 0), (100, 100, 0)], 50).2, [false, false]);
    assert_eq!(load(&[(100, 25, 0), (100, 45, 0)], 50).2, [true, true]);
    // All of them: by their number.
    assert_eq!(load(&[(100, 5, 0), (300, 5, 0)], 50).0, [25, 75]);
    assert_eq!(load(&[(1, 0, 0), (2, 0, 0)], 50).0, [34, 66]);
    assert_eq!(load(&[(0, 0, 0), (2, 0, 0)], 50).0, [0, 100]);
    assert_eq!(load(&[(0, 0, 0)], 50), (vec![100], vec![0], vec![true]));
    // Half of the hosts is enough.
    assert_eq!(load(&[(100, 50, 0), (1, 0, 0)], 50).2, [false, true]);
    assert_eq!(load(&[(100, 0, 0), (1, 0, 0)], 0), (vec![100, 0], vec![0, 0], vec![false, false]));
    assert_eq!(load(&[(100, 30, 30)], 61).2, [true]);
    assert_eq!(load(&[(100, 30, 30)], 60).2, [false]);
}

#[test]
fn weights_count_where_asked() {
    let hosts = Counts { all: 2, healthy: 1, ..Counts::default() };
    let weights = Counts { all: 100, healthy: 90, ..Counts::default() };
    let full = level(1, 1, 0);
    let heavy = Level { hosts, weights: Some(weights), overprovisioning_factor: 100 };
    assert_eq!(Load::new(&[heavy, full], 50).shares.healthy, [90, 10]);
    let light = Level { hosts, weights: None, overprovisioning_factor: 100 };
    assert_eq!(Load::new(&[light, full], 50).shares.healthy, [50, 50]);
}

#[test]
fn numbers_have_targets_by_share() {
    let load = Load::new(&[level(100, 50, 50)], 50);
    let degraded = (0..1000).filter(|number| load.target(*number).degraded).count();
    assert_eq!(degraded, 300);
    assert!(!load.target(69).degraded && load.target(70).degraded);
}

#[test]
fn excluded_hosts_are_as_if_they_were_not_there() {
    let one = Level { hosts: Counts { all: 5, healthy: 1, degraded: 0, excluded: 4 }, ..level(0, 0, 0) };
    let Load { shares, panic, .. } = Load::new(&[one, level(1, 1, 0)], 50);
    assert_eq!((shares.healthy, panic), (vec![100, 0], vec![false, false]));
    // But where all panic, they are.
    let gone = Level { hosts: Counts { all: 3, excluded: 3, ..Counts::default() }, ..level(0, 0, 0) };
    assert_eq!(Load::new(&[gone, level(1, 0, 0)], 50).shares.healthy, [75, 25]);
}

#[test]
fn priorities_can_be_left_out() {
    let load = Load::new(&[level(100, 100, 0), level(100, 100, 0), level(100, 30, 10)], 50);
    assert_eq!(load.shares.healthy, [100, 0, 0]);
    let shares = load.without(|priority| priority == 0).unwrap();
    assert_eq!((shares.healthy, shares.degraded), (vec![0, 100, 0], vec![0, 0, 0]));
    let shares = load.without(|priority| priority < 2).unwrap();
    // 42 % healthy and 14 % degraded of 56: 75 and 25.
    assert_eq!((shares.healthy, shares.degraded), (vec![0, 0, 75], vec![0, 0, 25]));
    assert_eq!(load.without(|_| true), None);
}

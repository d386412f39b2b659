use super::*;
use crate::config::model::{Check, TcpCheck};

/// Thresholds of 2 failures and 3 successes; every interval is of its own length.
fn config() -> HealthCheckConfig {
    let seconds = Duration::from_secs;
    HealthCheckConfig {
        name: String::new(),
        timeout: seconds(1),
        interval: seconds(10),
        initial_jitter: Duration::ZERO,
        interval_jitter: Duration::ZERO,
        interval_jitter_percent: 0,
        unhealthy_threshold: 2,
        healthy_threshold: 3,
        reuse_connection: true,
        no_traffic_interval: seconds(60),
        no_traffic_healthy_interval: seconds(61),
        unhealthy_interval: seconds(20),
        unhealthy_edge_interval: seconds(21),
        healthy_edge_interval: seconds(11),
        always_log_failures: false,
        always_log_success: false,
        event_logs: Vec::new(),
        alpn_protocols: Vec::new(),
        socket_labels: None,
        check: Check::Tcp(TcpCheck::default()),
    }
}

const PASS: Outcome = Outcome { result: Ok(Passed { degraded: false }), http_status: None };

fn fail(failure: Failure) -> Outcome {
    failure.into()
}

/// Records the outcomes; the transition and health after each.
fn run(session: &mut Session, outcomes: &[Outcome]) -> Vec<(Transition, bool)> {
    let config = config();
    outcomes.iter().map(|outcome| (session.record(&config, *outcome), session.health.healthy)).collect()
}

#[test]
fn the_first_pass_is_enough_and_later_ones_are_counted() {
    use Transition::{Changed, Pending, Unchanged};
    let mut session = Session::new(Health::default());
    assert_eq!(run(&mut session, &[PASS, PASS]), [(Changed, true), (Unchanged, true)]);
    let down = fail(Failure::Active);
    let up = [(Changed, false), (Pending, false), (Pending, false), (Changed, true)];
    assert_eq!(run(&mut session, &[down, PASS, PASS, PASS]), up);
    // A failure in between begins anew.
    let again = run(&mut session, &[down, PASS, PASS, down, PASS, PASS, PASS]);
    assert_eq!(again.last(), Some(&(Changed, true)));
    assert!(again[..6].iter().all(|(_, healthy)| !healthy));
    // A failure at first takes that away.
    let mut session = Session::new(Health::default());
    assert_eq!(run(&mut session, &[down, PASS]), [(Unchanged, false), (Pending, false)]);
}

#[test]
fn failures_that_may_pass_are_counted() {
    use Transition::{Changed, Pending};
    for failure in [Failure::Network, Failure::Timeout, Failure::Retriable] {
        let mut session = Session::new(Health { healthy: true, ..Health::default() });
        let down = fail(failure);
        let seen = run(&mut session, &[down, PASS, down, down]);
        assert_eq!(seen[0], (Pending, true), "{failure:?}");
        assert_eq!(seen[2..], [(Pending, true), (Changed, false)], "{failure:?}");
        assert_eq!(session.health.timed_out, failure == Failure::Timeout);
    }
}

#[test]
fn a_timeout_is_remembered_until_another_result() {
    let mut session = Session::new(Health::default());
    run(&mut session, &[fail(Failure::Timeout)]);
    assert!(session.health.timed_out);
    // Not healthy yet: Envoy keeps saying so.
    run(&mut session, &[PASS]);
    assert!(session.health.timed_out && !session.health.healthy);
    run(&mut session, &[fail(Failure::Network)]);
    assert!(!session.health.timed_out);
    run(&mut session, &[fail(Failure::Timeout), PASS, PASS, PASS]);
    assert!(!session.health.timed_out && session.health.healthy);
}

#[test]
fn degraded_comes_and_goes() {
    let mut session = Session::new(Health::default());
    let degraded = Outcome { result: Ok(Passed { degraded: true }), http_status: Some(200) };
    let seen = run(&mut session, &[degraded, degraded, PASS]);
    let seen: Vec<_> = seen.iter().map(|(transition, _)| *transition).collect();
    assert_eq!(seen, [Transition::Changed, Transition::Unchanged, Transition::Changed]);
    assert!(!session.health.degraded);
}

#[test]
fn each_situation_has_its_interval() {
    use Transition::{Changed, Pending, Unchanged};
    let session = Session::new(Health::default());
    let wait = |transition, passed, traffic| session.wait(&config(), transition, passed, traffic).as_secs();
    assert_eq!([wait(Unchanged, true, true), wait(Changed, true, true), wait(Pending, true, true)], [10, 10, 11]);
    assert_eq!([wait(Unchanged, false, true), wait(Changed, false, true), wait(Pending, false, true)], [20, 20, 21]);
    assert_eq!([wait(Unchanged, true, false), wait(Pending, true, false), wait(Unchanged, false, false)], [61, 60, 60]);
}

#[test]
fn jitter_adds_to_the_interval() {
    let config = HealthCheckConfig {
        interval_jitter: Duration::from_secs(5),
        interval_jitter_percent: 50,
        initial_jitter: Duration::MAX,
        ..config()
    };
    let session = Session::new(Health::default());
    let waits: Vec<_> =
        (0..1000).map(|_| session.wait(&config, Transition::Unchanged, true, true).as_secs_f64()).collect();
    assert!(waits.iter().all(|wait| (10.0..=20.0).contains(wait)));
    assert!(waits.iter().any(|wait| *wait > 16.0), "both are added");
    // The longest that can be configured does not overflow.
    let endless = HealthCheckConfig { interval: Duration::MAX, interval_jitter_percent: u32::MAX, ..config };
    assert_eq!(session.wait(&endless, Transition::Unchanged, true, true), Duration::MAX);
    part(Duration::MAX);
}

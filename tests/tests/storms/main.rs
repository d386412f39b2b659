//! Storms: hosts crash, hang, answer late, reset, fail, come and go, and names lead astray. culvertd and the real Envoy take turns on the
//! same storm: culvertd fails no more requests than Envoy, sends nothing to hosts that it knows are gone, and uses all of them again when
//! they are back.

mod churn;
mod clients;
mod hosts;
mod names;

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use clients::{Clients, Count};
use culvert_tests::bootstrap::Bootstrap;
use culvert_tests::daemon::{Daemon, Kind, free_port};
use culvert_tests::wait_until;
use hosts::{Hosts, Mood};

/// The hosts of a storm: the first five are of the first priority where there are two.
const HOSTS: u8 = 10;
const DEADLINE: Duration = Duration::from_secs(30);

/// At which millisecond which hosts come to which mood.
type Script = &'static [(u64, &'static [u8], Mood)];

const ALL: &[u8] = &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10];

/// Requests are retried, or not: a try takes a quarter of a second at most, and a host that fails three times in a row is ejected for half
/// a second at first.
const ROUTES: &str = "- {name: all, domains: ['*'], routes: [
    {match: {path: /plain}, route: {cluster: app, timeout: 0.25s}},
    {match: {path: /retried}, route: {cluster: app, timeout: 5s, retry_policy: {retry_on: '5xx,reset,connect-failure', num_retries: 4,
      per_try_timeout: 0.25s, host_selection_retry_max_attempts: 5, retry_host_predicate: [{name: envoy.retry_host_predicates.previous_hosts,
      typed_config: {'@type': type.googleapis.com/envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate}}]}}}]}";
const FIELDS: [&str; 3] = [
    "connect_timeout: 0.25s",
    "circuit_breakers: {thresholds: [{max_retries: 1000}]}",
    "common_lb_config: {healthy_panic_threshold: {value: 20}}",
];
const OUTLIERS: &str = "outlier_detection: {consecutive_5xx: 3, interval: 0.1s, base_ejection_time: 0.5s, max_ejection_time: 2s, \
                        max_ejection_percent: 80}";
const CHECKS: &str = "health_checks: [{timeout: 0.25s, interval: 0.1s, no_traffic_interval: 0.1s, unhealthy_threshold: 2, healthy_threshold: 1, \
                      http_health_check: {path: /check}}]";
/// Within this all hosts are to be used again once they are well: the longest ejection, a check, and a busy machine's share.
const RECOVERY: Duration = Duration::from_secs(7);

/// By what hosts are found to be ill: what one of them finds out hides what the other does not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Watch {
    Both,
    Checks,
    Outliers,
}

impl Watch {
    fn fields(self) -> Vec<&'static str> {
        let watching: &[&str] = match self {
            Watch::Both => &[OUTLIERS, CHECKS],
            Watch::Checks => &[CHECKS],
            Watch::Outliers => &[OUTLIERS],
        };
        [&FIELDS, watching].concat()
    }
}

fn bootstrap(listen: u16, port: u16, watch: Watch, priorities: bool) -> String {
    let group = |priority: u8, numbers: &[u8]| {
        let endpoint = |number: &u8| {
            format!("{{endpoint: {{address: {{socket_address: {{address: 127.0.3.{number}, port_value: {port}}}}}}}}}")
        };
        let endpoints: Vec<_> = numbers.iter().map(endpoint).collect();
        format!(
            "{{priority: {priority}, locality: {{zone: zone-{priority}}}, lb_endpoints: [{}]}}",
            endpoints.join(", ")
        )
    };
    let groups = match priorities {
        true => format!("{}, {}", group(0, &ALL[..5]), group(1, &ALL[5..])),
        false => group(0, ALL),
    };
    let assignment = format!("load_assignment: {{cluster_name: app, endpoints: [{groups}]}}");
    let fields: Vec<_> = watch.fields().into_iter().chain([assignment.as_str()]).collect();
    Bootstrap::new().http(listen, ROUTES, &[]).cluster_of("app", &fields).yaml()
}

/// One proxy in a storm: what came back without retries, and with them.
fn weather(kind: Kind, script: Script, watch: Watch, priorities: bool) -> Result<[Count; 2]> {
    let (hosts, listen) = (Hosts::start(HOSTS)?, free_port()?);
    let proxy = Daemon::start(kind, &bootstrap(listen, hosts.port, watch, priorities))?;
    let healthy = |number: u64, limit: Duration| {
        wait_until(limit, "the hosts to be found well", || {
            let found = proxy.stats()?.get("cluster.app.membership_healthy");
            ensure!(found == number, "{found} of {number} are");
            Ok(())
        })
    };
    healthy(HOSTS.into(), DEADLINE)?;
    let clients = Clients::start(listen, &["/plain", "/retried"]);
    let begun = Instant::now();
    for (at, numbers, mood) in script {
        // It is the script that takes its time, not the test that waits for something.
        std::thread::sleep(Duration::from_millis(*at).saturating_sub(begun.elapsed()));
        hosts.set(numbers, *mood);
    }
    let well = Instant::now();
    healthy(HOSTS.into(), RECOVERY).context("after the storm")?;
    let used: &[u8] = if priorities { &ALL[..5] } else { ALL };
    let before = hosts.served();
    wait_until(RECOVERY.saturating_sub(well.elapsed()), "all hosts to be used again", || {
        let now = hosts.served();
        let unused: Vec<_> =
            used.iter().filter(|number| now[usize::from(**number) - 1] == before[usize::from(**number) - 1]).collect();
        ensure!(unused.is_empty(), "{unused:?} are not");
        Ok(())
    })?;
    let counts = clients.stop()?;
    counts.try_into().map_err(|_| anyhow::anyhow!("two counts"))
}

fn storm(name: &str, script: Script, watch: Watch, priorities: bool) -> Result<()> {
    let envoy = weather(Kind::Envoy, script, watch, priorities).context("Envoy")?;
    let culvert = weather(Kind::Culvert, script, watch, priorities).context("culvertd")?;
    for (kind, [plain, retried]) in [("Envoy", &envoy), ("culvertd", &culvert)] {
        println!("{name}, {kind}: without retries {plain:?}, with retries {retried:?}");
    }
    for (which, envoy, culvert) in
        [("without retries", &envoy[0], &culvert[0]), ("with retries", &envoy[1], &culvert[1])]
    {
        // What is under way when a host turns is chance: one request a client, and a part of a percent.
        let chance = match watch {
            Watch::Both => 8 + envoy.requests / 200,
            // And when a check comes, or the third failure in a row; without anybody who looks it would be a tenth of all.
            Watch::Checks | Watch::Outliers => 8 + envoy.requests / 30,
        };
        ensure!(culvert.requests > 100, "{name} {which}: {culvert:?}");
        ensure!(
            culvert.failed() <= envoy.failed() + chance,
            "{name} {which}: culvertd failed {culvert:?}, Envoy {envoy:?}"
        );
    }
    Ok(())
}

const BAD: &[u8] = &[1, 2, 3];

#[test]
fn hosts_crash() -> Result<()> {
    storm("crash", &[(500, BAD, Mood::Crashed), (2500, BAD, Mood::Well)], Watch::Both, false)
}

#[test]
fn hosts_hang() -> Result<()> {
    storm("hang", &[(500, BAD, Mood::Hangs), (2500, BAD, Mood::Well)], Watch::Both, false)
}

#[test]
fn hosts_answer_late() -> Result<()> {
    storm("slow", &[(500, BAD, Mood::Slow), (2500, BAD, Mood::Well)], Watch::Both, false)
}

#[test]
fn hosts_reset() -> Result<()> {
    storm("reset", &[(500, BAD, Mood::Resets), (2500, BAD, Mood::Well)], Watch::Both, false)
}

#[test]
fn hosts_fail() -> Result<()> {
    storm("fail", &[(500, BAD, Mood::Fails), (2500, BAD, Mood::Well)], Watch::Both, false)
}

#[test]
fn everything_happens_at_once() -> Result<()> {
    const SCRIPT: Script = &[
        (300, &[1], Mood::Crashed),
        (400, &[2, 3], Mood::Fails),
        (600, &[4], Mood::Hangs),
        (800, &[1], Mood::Well),
        (900, &[2], Mood::Resets),
        (1000, &[5], Mood::Slow),
        (1200, &[1, 3], Mood::Crashed),
        (1500, &[4, 5], Mood::Well),
        (1700, &[1, 2, 3], Mood::Hangs),
        (2200, &[1, 2], Mood::Well),
        (2300, &[6, 7], Mood::Resets),
        (3000, ALL, Mood::Well),
    ];
    storm("all at once", SCRIPT, Watch::Both, false)
}

#[test]
fn a_locality_disappears() -> Result<()> {
    storm("locality", &[(500, &[1, 2, 3, 4, 5], Mood::Crashed), (2500, ALL, Mood::Well)], Watch::Both, true)
}

#[test]
fn hosts_fail_and_only_outlier_detection_sees_it() -> Result<()> {
    storm("fail, outliers", &[(500, BAD, Mood::Fails), (2500, BAD, Mood::Well)], Watch::Outliers, false)
}

#[test]
fn hosts_crash_and_only_outlier_detection_sees_it() -> Result<()> {
    storm("crash, outliers", &[(500, BAD, Mood::Crashed), (2500, BAD, Mood::Well)], Watch::Outliers, false)
}

#[test]
fn hosts_fail_and_only_checks_see_it() -> Result<()> {
    storm("fail, checks", &[(500, BAD, Mood::Fails), (2500, BAD, Mood::Well)], Watch::Checks, false)
}

/// Hosts that checks have found to be ill get nothing, for as long as they are; and once they are well, they are used within a few checks.
fn known_to_be_ill(kind: Kind) -> Result<()> {
    let (hosts, listen) = (Hosts::start(HOSTS)?, free_port()?);
    let proxy = Daemon::start(kind, &bootstrap(listen, hosts.port, Watch::Checks, false))?;
    let healthy = |number: u64| {
        wait_until(DEADLINE, "the hosts to be found so", || {
            let found = proxy.stats()?.get("cluster.app.membership_healthy");
            ensure!(found == number, "{found} of {number} are well");
            Ok(())
        })
    };
    healthy(HOSTS.into())?;
    let clients = Clients::start(listen, &["/plain", "/retried"]);
    wait_until(DEADLINE, "them to be used", || {
        ensure!(hosts.asked(BAD) > 10, "{}", hosts.asked(BAD));
        Ok(())
    })?;
    hosts.set(BAD, Mood::Fails);
    healthy(u64::from(HOSTS) - BAD.len() as u64)?;
    // What was under way to them; and Envoy's workers are told within its `update_merge_window`, a second after its main thread knows.
    std::thread::sleep(Duration::from_millis(if kind == Kind::Envoy { 2000 } else { 300 }));
    let before = [hosts.asked(BAD), hosts.asked(ALL)];
    wait_until(DEADLINE, "the others to be used", || {
        ensure!(hosts.asked(ALL) > before[1] + 500, "{} and {}", before[1], hosts.asked(ALL));
        Ok(())
    })?;
    let [ill, all] = [hosts.asked(BAD) - before[0], hosts.asked(ALL) - before[1]];
    ensure!(ill == 0, "{kind:?}: {ill} of {all} requests went to hosts that were known to be ill");
    hosts.set(BAD, Mood::Well);
    let (well, before) = (Instant::now(), hosts.asked(BAD));
    healthy(HOSTS.into())?;
    wait_until(DEADLINE, "them to be used again", || {
        ensure!(hosts.asked(BAD) > before + 10, "{before} and {}", hosts.asked(BAD));
        Ok(())
    })?;
    // A check comes every tenth of a second, and one that passes is enough; the rest is for a busy machine.
    ensure!(well.elapsed() < Duration::from_secs(4), "{kind:?}: it took {:?}", well.elapsed());
    clients.stop()?;
    Ok(())
}

#[test]
fn hosts_that_are_known_to_be_ill_get_nothing() -> Result<()> {
    known_to_be_ill(Kind::Envoy)?;
    known_to_be_ill(Kind::Culvert)
}

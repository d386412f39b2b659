//! What one worker has met, the others know; and TCP proxies, where connections are all that is met.

use std::io::Read as _;

use culvert_tests::app::Client;
use culvert_tests::bootstrap::Bootstrap;
use culvert_tests::server;

use super::*;

/// So many connections are on both of two workers, or the kernel has chosen the same one that often.
const CONNECTIONS: usize = 32;

#[test]
fn what_one_worker_has_met_the_others_know() -> Result<()> {
    let upstream = upstream()?;
    let case = Case {
        name: "shared",
        detection: "{interval: 60s, base_ejection_time: 60s, max_ejection_percent: 50, consecutive_5xx: 3}",
        hosts: &[1, 2],
        steps: Vec::new(),
        left: &[2],
        back: &[2],
    };
    for kind in [Kind::Culvert, Kind::Envoy] {
        let proxy = Proxy::start_with(kind, std::slice::from_ref(&case), upstream, &["--concurrency", "2"])?;
        let mut clients = Vec::new();
        for _ in 0..CONNECTIONS {
            clients.push(Client::new(&format!("http://127.0.0.1:{}", proxy.port))?);
        }
        let mut ask = |client: usize, fails: &str, key: usize| -> Result<u8> {
            let request = Request::get("/shared").header("x-key", &key.to_string()).header("x-fails", fails);
            let answer = clients[client].send(request)?;
            let address = answer.headers.get("x-host").unwrap_or_default().split(':').next().unwrap_or_default();
            address.rsplit('.').next().unwrap_or_default().parse().context("no host")
        };
        let (mut on_1, mut all) = (None, BTreeSet::new());
        for client in 0..CONNECTIONS {
            for key in 0..8 {
                let host = ask(client, "", key)?;
                all.insert(host);
                on_1 = on_1.or((host == 1).then_some(key));
            }
        }
        ensure!(all.len() == 2, "{kind:?} uses {all:?}");
        let key = on_1.context("no key of host 1")?;
        // One connection, which is of one worker.
        for _ in 0..3 {
            ensure!(ask(0, "1=500", key)? == 1, "{kind:?}: another host");
        }
        wait_until(DEADLINE, "the ejection", || {
            let flags = proxy.flags()?;
            ensure!(flags.iter().any(|line| line.contains("failed_outlier_check")), "{flags:?}");
            Ok(())
        })?;
        let mut everywhere = || {
            let hosts: Vec<u8> = (0..CONNECTIONS).map(|client| ask(client, "", key)).collect::<Result<_>>()?;
            ensure!(hosts.iter().all(|host| *host == 2), "{kind:?}: {hosts:?}");
            Ok(())
        };
        match kind {
            // Whoever sees the flag has seen the new hosts.
            Kind::Culvert => everywhere()?,
            Kind::Envoy => wait_until(DEADLINE, "all workers", everywhere)?,
        }
    }
    Ok(())
}

/// What connections of a TCP proxy come to: the counters, and which hosts are left.
#[test]
fn tcp_proxies_eject_as_envoy_does() -> Result<()> {
    let alive = server::start(|mut stream| Ok(stream.write_all(b"hi")?))?;
    let dead = free_port()?;
    let detections = [
        ("joined", "{interval: 60s, max_ejection_percent: 50, consecutive_5xx: 3, consecutive_gateway_failure: 100}"),
        (
            "gateway",
            "{interval: 60s, max_ejection_percent: 50, consecutive_5xx: 100, consecutive_gateway_failure: 3, \
             enforcing_consecutive_gateway_failure: 100}",
        ),
        (
            "split",
            "{interval: 60s, max_ejection_percent: 50, consecutive_5xx: 1, split_external_local_origin_errors: true, \
             consecutive_local_origin_failure: 3}",
        ),
        (
            "unenforced",
            "{interval: 60s, max_ejection_percent: 50, consecutive_5xx: 3, enforcing_consecutive_5xx: 0, \
             split_external_local_origin_errors: true, enforcing_consecutive_local_origin_failure: 0}",
        ),
        (
            "rate",
            "{interval: 0.5s, max_ejection_percent: 50, consecutive_5xx: 1000, success_rate_minimum_hosts: 100, \
             consecutive_gateway_failure: 1000, failure_percentage_minimum_hosts: 2, failure_percentage_request_volume: 1, \
             enforcing_failure_percentage: 100}",
        ),
    ];
    let run = |kind| -> Result<BTreeMap<String, u64>> {
        let (mut bootstrap, mut ports) = (Bootstrap::new(), Vec::new());
        for (name, detection) in detections {
            let port = free_port()?;
            let fields = format!("outlier_detection: {detection}");
            bootstrap = bootstrap.tcp(port, name).cluster(name, &[alive, dead], &[&fields]);
            ports.push((name, port));
        }
        let daemon = Daemon::start(kind, &bootstrap.yaml())?;
        let connects = |port: u16| -> Result<bool> {
            let mut stream = TcpStream::connect(("127.0.0.1", port))?;
            stream.set_read_timeout(Some(DEADLINE))?;
            let mut said = Vec::new();
            // A proxy that has no host closes, or resets.
            Ok(stream.read_to_end(&mut said).is_ok() && said == b"hi")
        };
        for (name, port) in ports {
            if name == "unenforced" {
                let failed = (0..10).map(|_| connects(port)).collect::<Result<Vec<_>>>()?;
                ensure!(failed.iter().filter(|alive| !**alive).count() == 5, "{kind:?}: {failed:?}");
                continue;
            }
            wait_until(DEADLINE, &format!("{kind:?}: {name}"), || {
                connects(port)?;
                let clusters = daemon.admin("/clusters")?;
                let ejected = format!("{name}::127.0.0.1:{dead}::health_flags::/failed_outlier_check");
                ensure!(clusters.contains(&ejected), "not ejected");
                Ok(())
            })?;
            wait_until(DEADLINE, &format!("{kind:?}: {name} alone"), || {
                let all = (0..6).map(|_| connects(port)).collect::<Result<Vec<_>>>()?;
                ensure!(all.iter().all(|alive| *alive), "{all:?}");
                Ok(())
            })?;
        }
        let stats = daemon.stats()?;
        let own = |name: &&str| name.contains(".outlier_detection.") && !name.ends_with("percentage");
        Ok(stats.names().filter(own).map(|name| (name.to_owned(), stats.get(name))).collect())
    };
    assert_eq!(run(Kind::Culvert)?, run(Kind::Envoy)?);
    Ok(())
}

//! Active health checks of servers that are spoken to otherwise than by plain HTTP, beside the real Envoy: over TLS, and Redis.

#[path = "../../proxy-daemon/src/tls/testing.rs"]
mod testing;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use culvert_tests::bootstrap::Bootstrap;
use culvert_tests::daemon::{Daemon, Kind};
use culvert_tests::server;
use culvert_tests::wait_until;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use testing::{Authority, Issued, yaml};

const DEADLINE: Duration = Duration::from_secs(60);
const TIMES: &str =
    "timeout: 5s, interval: 0.1s, no_traffic_interval: 0.1s, unhealthy_threshold: 1, healthy_threshold: 1";

/// Starts a proxy with these clusters, of one host each, and waits until the hosts have these flags; then some checks more.
fn run(kind: Kind, clusters: &[(&str, u16, String, &str)]) -> Result<()> {
    let mut bootstrap = Bootstrap::new();
    for (name, port, fields, _) in clusters {
        bootstrap = bootstrap.cluster(name, &[*port], &[fields]);
    }
    let daemon = Daemon::start(kind, &bootstrap.yaml())?;
    let wanted: BTreeMap<_, _> = clusters.iter().map(|(name, .., flags)| (*name, *flags)).collect();
    let as_wanted = || {
        let text = daemon.admin("/clusters")?;
        let flags = text.lines().filter_map(|line| {
            let (host, flags) = line.split_once("::health_flags::")?;
            Some((host.split_once("::")?.0, flags))
        });
        let flags: BTreeMap<_, _> = flags.collect();
        ensure!(flags == wanted, "{kind:?}: {flags:?}");
        Ok(())
    };
    wait_until(DEADLINE, "the flags", as_wanted)?;
    // They stay, and each check comes to the same.
    wait_until(DEADLINE, "more checks", || {
        let stats = daemon.stats()?;
        for (name, .., flags) in clusters {
            let count = |of: &str| stats.get(&format!("cluster.{name}.health_check.{of}"));
            let (passed, failed) = (count("success"), count("failure"));
            ensure!(passed + failed > 3, "{name}: {passed} and {failed}");
            let well = *flags == "healthy";
            assert!((well && failed == 0) || (!well && passed == 0), "{kind:?}: {name}: {passed} and {failed}");
            // Without an answer, or because of it.
            let network = count("network_failure");
            assert!(
                network == 0 || network == failed || network + 1 == failed,
                "{kind:?}: {name}: {network} of {failed}"
            );
        }
        Ok(())
    })?;
    as_wanted()
}

const FAILED: &str = "/failed_active_hc";

/// A server that answers 200 where the client has said that it speaks `check` in the handshake, or nothing; else 503.
fn tls_host(issued: &Issued) -> Result<(u16, Arc<Mutex<BTreeSet<String>>>)> {
    let chain = vec![CertificateDer::from_pem_slice(issued.chain.as_bytes())?];
    let key = PrivateKeyDer::from_pem_slice(issued.key.as_bytes())?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    let mut config = builder.with_no_client_auth().with_single_cert(chain, key)?;
    config.alpn_protocols = vec![b"check".to_vec(), b"http/1.1".to_vec()];
    let config = Arc::new(config);
    let said = Arc::new(Mutex::new(BTreeSet::new()));
    let noted = Arc::clone(&said);
    let port = server::start(move |stream| {
        let stream = StreamOwned::new(ServerConnection::new(Arc::clone(&config))?, stream);
        let mut stream = BufReader::new(stream);
        let mut line = String::new();
        while stream.read_line(&mut line)? > 0 {
            if line == "\r\n" {
                let alpn = stream.get_ref().conn.alpn_protocol().map(|name| String::from_utf8_lossy(name).into_owned());
                let alpn = alpn.unwrap_or_default();
                let status = if alpn == "http/1.1" { 503 } else { 200 };
                noted.lock().map_err(|_| anyhow::anyhow!("poisoned"))?.insert(alpn);
                write!(stream.get_mut(), "HTTP/1.1 {status} x\r\ncontent-length: 0\r\n\r\n")?;
            }
            line.clear();
        }
        Ok(())
    })?;
    Ok((port, said))
}

#[test]
fn checks_over_tls() -> Result<()> {
    let (own, other) = (Authority::new("own"), Authority::new("other"));
    let issued = own.issue(&["a.test"], &[]);
    let socket = |trusted: &Authority, name: &str, alpn: &str| {
        format!(
            "transport_socket: {{name: tls, typed_config: {{\"@type\": \
             type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext, sni: a.test, \
             common_tls_context: {{{alpn} validation_context: {{trusted_ca: {{inline_string: {}}}, \
             match_typed_subject_alt_names: [{{san_type: DNS, matcher: {{exact: {name}}}}}]}}}}}}}}\n    ",
            yaml(&trusted.pem)
        )
    };
    let http = |more: &str| format!("health_checks: [{{{TIMES}, {more} http_health_check: {{path: /}}}}]");
    let tcp = format!("health_checks: [{{{TIMES}, tcp_health_check: {{}}}}]");
    let check = "tls_options: {alpn_protocols: [check]},";
    let plain = "alpn_protocols: [http/1.1],";
    for kind in [Kind::Culvert, Kind::Envoy] {
        let (port, said) = tls_host(&issued)?;
        run(
            kind,
            &[
                ("own_alpn", port, socket(&own, "a.test", "") + &http(check), "healthy"),
                ("instead", port, socket(&own, "a.test", plain) + &http(check), "healthy"),
                ("cluster_alpn", port, socket(&own, "a.test", plain) + &http(""), FAILED),
                ("other_issuer", port, socket(&other, "a.test", "") + &http(check), FAILED),
                ("other_name", port, socket(&own, "b.test", "") + &http(check), FAILED),
                ("not_encrypted", port, http(""), FAILED),
                ("connection", port, socket(&own, "a.test", "") + &tcp, "healthy"),
                ("no_connection", port, socket(&other, "a.test", "") + &tcp, FAILED),
            ],
        )?;
        let said = said.lock().map_err(|_| anyhow::anyhow!("poisoned"))?;
        assert_eq!(*said, ["check", "http/1.1"].map(str::to_owned).into(), "{kind:?}");
    }
    Ok(())
}

/// What a Redis server is told on a connection: the first commands, as they were sent.
type Heard = Arc<Mutex<BTreeSet<String>>>;

/// A Redis server with a password (or without) that has a key `away` (or not).
fn redis(password: &'static str, away: bool, heard: &Heard) -> Result<u16> {
    let heard = Arc::clone(heard);
    server::start(move |stream| {
        let mut stream = BufReader::new(stream);
        let (mut known, mut told, mut line) = (password.is_empty(), String::new(), String::new());
        while stream.read_line(&mut line)? > 0 {
            let count: usize = line.trim_end().strip_prefix('*').context("no array")?.parse()?;
            told.push_str(&line);
            let mut words = Vec::new();
            for _ in 0..count {
                line.clear();
                stream.read_line(&mut line)?;
                told.push_str(&line);
                let length: usize = line.trim_end().strip_prefix('$').context("no string")?.parse()?;
                let mut word = vec![0; length + 2];
                stream.read_exact(&mut word)?;
                let word = String::from_utf8(word)?;
                told.push_str(&word);
                words.push(word.trim_end().to_owned());
            }
            let answer = match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
                ["auth" | "AUTH", given] | ["auth" | "AUTH", "user", given] if given == password => {
                    known = true;
                    "+OK"
                }
                ["auth" | "AUTH", ..] => "-WRONGPASS no",
                _ if !known => "-NOAUTH no",
                ["PING" | "ping"] => "+PONG",
                ["EXISTS" | "exists", "away"] if away => ":1",
                ["EXISTS" | "exists", _] => ":0",
                _ => "-ERR",
            };
            heard.lock().map_err(|_| anyhow::anyhow!("poisoned"))?.insert(told.clone());
            // Only what comes first on a connection is compared.
            if words[0].eq_ignore_ascii_case("auth") {
                // The next command belongs to it.
            } else {
                told.clear();
            }
            write!(stream.get_mut(), "{answer}\r\n")?;
            line.clear();
        }
        Ok(())
    })
}

#[test]
fn redis_servers() -> Result<()> {
    let check = |more: &str, redis: &str| {
        format!(
            "health_checks: [{{{TIMES}, {more} custom_health_check: {{name: envoy.health_checkers.redis, typed_config: {{\"@type\": \
             type.googleapis.com/envoy.extensions.health_checkers.redis.v3.Redis, {redis}}}}}}}]"
        )
    };
    let options = |options: &str| {
        format!(
            "\n    typed_extension_protocol_options: {{envoy.filters.network.redis_proxy: {{\"@type\": \
             type.googleapis.com/envoy.extensions.filters.network.redis_proxy.v3.RedisProtocolOptions, {options}}}}}"
        )
    };
    let (password, user) = ("auth_password: {inline_string: secret}", "auth_username: {inline_string: user}");
    let told = |kind| -> Result<BTreeSet<String>> {
        let heard = Heard::default();
        let (open, closed, away) =
            (redis("", false, &heard)?, redis("secret", false, &heard)?, redis("", true, &heard)?);
        let silent = server::start(|_| Ok(()))?;
        run(
            kind,
            &[
                ("ping", open, check("", ""), "healthy"),
                ("ping_once", open, check("reuse_connection: false,", ""), "healthy"),
                // The same key for all: Envoy asks all servers for the key that it has asked for first.
                ("no_key", open, check("", "key: away"), "healthy"),
                ("key", away, check("", "key: away"), FAILED),
                ("no_password", closed, check("", ""), FAILED),
                ("password", closed, check("", "") + &options(password), "healthy"),
                ("user", closed, check("", "key: away") + &options(&format!("{password}, {user}")), "healthy"),
                ("wrong", closed, check("", "") + &options("auth_password: {inline_string: guess}"), FAILED),
                ("silent", silent, check("", ""), FAILED),
            ],
        )?;
        let heard = heard.lock().map_err(|_| anyhow::anyhow!("poisoned"))?;
        Ok(heard.clone())
    };
    assert_eq!(told(Kind::Culvert)?, told(Kind::Envoy)?);
    Ok(())
}

/// Commands of checks are traffic of the cluster: `no_traffic_interval`, a minute, is not waited for.
#[test]
fn redis_servers_are_never_checked_at_leisure() -> Result<()> {
    for kind in [Kind::Envoy, Kind::Culvert] {
        let open = redis("", false, &Heard::default())?;
        let check = "health_checks: [{timeout: 5s, interval: 0.1s, unhealthy_threshold: 1, healthy_threshold: 1, \
                     custom_health_check: {name: envoy.health_checkers.redis, typed_config: {\"@type\": \
                     type.googleapis.com/envoy.extensions.health_checkers.redis.v3.Redis}}}]";
        let daemon = Daemon::start(kind, &Bootstrap::new().cluster("asked", &[open], &[check]).yaml())?;
        let stats = wait_until(Duration::from_secs(20), "more checks", || {
            let stats = daemon.stats()?;
            let passed = stats.get("cluster.asked.health_check.success");
            ensure!(passed > 3, "{kind:?}: {passed}");
            Ok(stats)
        })?;
        ensure!(stats.get("cluster.asked.upstream_rq_total") > 3, "{kind:?}: they are requests");
        ensure!(stats.get("cluster.asked.upstream_cx_total") == 1, "{kind:?}: on one connection");
        ensure!(stats.get("cluster.asked.upstream_cx_active") == 1, "{kind:?}: which is kept");
    }
    Ok(())
}

//! What culvertd says to input that it cannot use: one line that names the place, and exit status 1.

use std::net::TcpListener;
use std::time::Duration;

use anyhow::Result;
use culvert_tests::bootstrap::Bootstrap;
use culvert_tests::daemon::{culvertd_to_end, free_port};

const DEADLINE: Duration = Duration::from_secs(10);

/// Runs culvertd, which must fail, and returns its last line.
fn error_of(yaml: &str, flags: &[&str]) -> Result<String> {
    let ended = culvertd_to_end(Some(yaml), flags, DEADLINE)?;
    assert_eq!(ended.code, Some(1), "{yaml}\n{ended:?}");
    // Nothing but log lines comes before the one line of the error.
    let lines: Vec<&str> = ended.stderr.lines().collect();
    let errors = lines.iter().filter(|line| line.starts_with("culvertd: ")).count();
    assert_eq!(errors, 1, "one line says it:\n{}", ended.stderr);
    assert!(!ended.stderr.contains("panicked"), "{}", ended.stderr);
    Ok(lines.last().copied().unwrap_or_default().to_owned())
}

fn assert_names(error: &str, parts: &[&str]) {
    for part in parts {
        assert!(error.contains(part), "`{part}` is not in: {error}");
    }
}

/// A bootstrap that is right but for what the caller replaces in it.
fn good() -> String {
    let routes = "- {name: all, domains: [\"*\"], routes: [{match: {prefix: /}, route: {cluster: app}}]}";
    Bootstrap::new().http(10_000, routes, &["codec_type: AUTO"]).cluster("app", &[9], &[]).yaml()
}

#[test]
fn the_bootstrap_that_the_cases_spoil_is_good() -> Result<()> {
    let ended = culvertd_to_end(Some(&good()), &["--mode", "validate"], DEADLINE)?;
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(ended.stdout.contains("OK"), "{ended:?}");
    Ok(())
}

#[test]
fn a_bad_bootstrap_is_refused_with_the_place() -> Result<()> {
    let manager = "static_resources.listeners[0].filter_chains[0].filters[0].typed_config";
    let cases: Vec<(&str, String, Vec<String>)> = vec![
        ("broken YAML", format!("{}\n  - [unclosed", good()), vec!["bootstrap.yaml".into()]),
        ("an alias to itself", "a: &a [*a]\n".into(), vec!["bootstrap.yaml".into()]),
        (
            "an unknown field",
            good().replace("connect_timeout: 1s", "connect_timeuot: 1s"),
            vec!["static_resources.clusters[0]".into(), "connect_timeuot".into()],
        ),
        (
            "a wrong enum",
            good().replace("codec_type: AUTO", "codec_type: HTTP9"),
            vec![format!("{manager}.codec_type"), "HTTP9".into()],
        ),
        (
            "a wrong type",
            good().replace("port_value: 10000", "port_value: many"),
            vec!["static_resources.listeners[0].address.socket_address.port_value".into(), "many".into()],
        ),
        (
            "a bad duration",
            good().replace("connect_timeout: 1s", "connect_timeout: soon"),
            vec!["static_resources.clusters[0].connect_timeout".into()],
        ),
        (
            "a type URL that nobody knows",
            good().replace("http_connection_manager.v3.HttpConnectionManager", "http_connection_manager.v3.Nothing"),
            vec!["static_resources.listeners[0].filter_chains[0].filters[0]".into(), "Nothing".into()],
        ),
        (
            "a missing cluster",
            good().replace("route: {cluster: app}", "route: {cluster: nowhere}"),
            vec!["nowhere".into(), "static_resources.listeners[0]".into()],
        ),
        (
            "a bad address",
            good().replace("address: 127.0.0.1, port_value: 9}", "address: 127.0.0.300, port_value: 9}"),
            vec!["static_resources.clusters[0]".into(), "127.0.0.300".into()],
        ),
        (
            "a field that is not supported",
            good().replace("codec_type: AUTO", "http3_protocol_options: {}"),
            vec![format!("{manager}.http3_protocol_options"), "not supported".into()],
        ),
    ];
    for (name, yaml, parts) in cases {
        assert_ne!(yaml, good(), "{name}: nothing was spoiled");
        let error = error_of(&yaml, &["--mode", "validate"])?;
        for part in &parts {
            assert!(error.contains(part.as_str()), "{name}: `{part}` is not in: {error}");
        }
    }
    Ok(())
}

#[test]
fn a_file_that_is_not_there() -> Result<()> {
    let ended = culvertd_to_end(None, &["-c", "/nonexistent/bootstrap.yaml"], DEADLINE)?;
    assert_eq!(ended.code, Some(1));
    assert_names(&ended.stderr, &["/nonexistent/bootstrap.yaml", "No such file"]);
    Ok(())
}

#[test]
fn a_port_in_use() -> Result<()> {
    let taken = TcpListener::bind("127.0.0.1:0")?;
    let port = taken.local_addr()?.port();
    let yaml = good().replace("port_value: 10000", &format!("port_value: {port}")).replace("http_10000", "web");
    assert_names(&error_of(&yaml, &[])?, &["web", &format!("127.0.0.1:{port}"), "in use"]);

    let admin = format!(
        "admin: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}}}\n{}",
        good().replace("port_value: 10000", &format!("port_value: {}", free_port()?))
    );
    assert_names(&error_of(&admin, &[])?, &["admin", &format!("127.0.0.1:{port}"), "in use"]);
    Ok(())
}

#[test]
fn interception_that_cannot_work() -> Result<()> {
    let with = |fields: &str| {
        format!(
            "{}bootstrap_extensions:\n- name: culvert.bootstrap.interception\n  typed_config:\n    \"@type\": \
             type.googleapis.com/culvert.extensions.bootstrap.interception.v1.Interception\n{fields}",
            good()
        )
    };
    let error = error_of(&with("    interfaces: [\"veth*\"]\n    pods: [{address: 10.0.0.300}]\n"), &[])?;
    assert_names(&error, &["pods[0].address", "10.0.0.300"]);
    let error = error_of(&with("    interfaces: [\"veth*\"]\n    pods: [{address: 10.0.0.3}]\n"), &[])?;
    assert_names(&error, &["outbound_listener", "there is no listener `outbound`"]);
    let fields =
        "    interfaces: [\"veth*\"]\n    outbound_listener: http_10000\n    shortcut_cgroup: /no/such/cgroup\n";
    let error = error_of(&with(fields), &[])?;
    assert_names(&error, &["shortcut_cgroup", "/no/such/cgroup"]);
    Ok(())
}

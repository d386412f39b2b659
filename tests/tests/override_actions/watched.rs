//! What operators are told: beforehand by the command line, and afterwards by statistics.

use super::*;

#[test]
fn who_carries_contexts_is_counted() -> Result<()> {
    let mesh = Mesh::start("watch_context: true", "")?;
    mesh.ask(&feature_x())?;
    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00";
    mesh.send(Request::get("/").header("traceparent", trace))?;
    mesh.send(Request::get("/").header("b3", "0"))?;
    fetch(mesh.port, Request::get("/"))?;
    let stats = mesh.daemon.stats()?;
    for who in ["to.users.default_80", "from.127.0.0.1"] {
        let of = |leaf: &str| stats.get(&format!("override_context.{who}.{leaf}"));
        assert_eq!((of("overrides"), of("trace_only"), of("nothing")), (1, 2, 1), "{who}");
    }
    Ok(())
}

/// What `culvert override` prints.
fn culvert_override(arguments: &[&str]) -> Result<String> {
    let output = Command::new(binary("culvert")?).arg("override").args(arguments).output()?;
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "culvert override {arguments:?}: {out}{err}");
    Ok(out.into_owned())
}

#[test]
fn the_command_says_beforehand_what_daemons_do() -> Result<()> {
    let mut mesh = Mesh::start("actions: [DELAY]\n              debug_response: true", "")?;
    let sources = Sources { ranges: vec!["127.0.0.0/8".to_owned()], ..Sources::default() };
    mesh.set_policy(Policy { allowed: true, actions: Vec::new(), sources: Some(sources) }, "127.0.0.0/8")?;
    let flags = ["header", "--set", "users=feature-x", "--delay", "users=20s", "--format", "baggage"];
    let header = culvert_override(&flags)?;
    let admin = format!("http://{}", mesh.daemon.admin_address());
    let explained = culvert_override(&["explain", header.trim(), "--admin", &admin])?;
    for expected in [
        "listener web:\n  users.default:80\n",
        &format!("would be done: revision feature-x (127.0.0.1:{})\n", mesh.feature),
        "would be refused: delay over_limit\n",
        "if the service allows the client\n",
    ] {
        ensure!(explained.contains(expected), "{expected:?} is not in {explained}");
    }
    // And so it is.
    let (name, value) = header.trim().split_once(": ").context("a header")?;
    let answer = mesh.send(Request::get("/").header(name, value))?;
    assert_eq!(told(&answer), outcome("feature-x", "applied revision feature-x; refused delay over_limit"));
    Ok(())
}

#[test]
fn the_doctor_names_who_drops_contexts() -> Result<()> {
    let mesh = Mesh::start("watch_context: true", "")?;
    mesh.ask(&feature_x())?;
    // Discovery, which has it that `users` has the address that requests come from.
    let users = r#"{"service": "users.default", "envoy_cluster": "users.default:80",
                    "endpoints": [{"address": "127.0.0.1:80"}], "offloaded": []}"#;
    let status = format!(r#"{{"services": [{users}]}}"#);
    let discovery = server::start(move |stream| {
        let mut stream = BufReader::new(stream);
        Request::read(&mut stream)?;
        // The command reads until the connection ends.
        Response::new(200, "application/json", status.clone().into_bytes()).write(stream.get_mut(), false)
    })?;
    let (admin, discovery) =
        (format!("http://{}", mesh.daemon.admin_address()), format!("http://127.0.0.1:{discovery}"));
    let doctor = || culvert_override(&["doctor", "--admin", &admin, "--discovery", &discovery]);
    let said = doctor()?;
    ensure!(said.contains("users.default") && said.contains("passes on what came so far"), "{said}");
    // Another daemon, which has seen no overrides.
    let other = Mesh::start("watch_context: true", "")?;
    fetch(other.port, Request::get("/"))?;
    let other_admin = format!("http://{}", other.daemon.admin_address());
    let said = culvert_override(&["doctor", "--admin", &other_admin, "--discovery", &discovery])?;
    ensure!(said.contains("no request with overrides has been seen"), "{said}");
    Ok(())
}

//! What is done.

use super::*;

#[test]
fn a_request_gets_what_it_asks_for() -> Result<()> {
    let mesh =
        Mesh::start("actions: [FAULT, DELAY, TIMEOUT, DEBUG, SAMPLE, CONFIG]\n              debug_response: true", "")?;
    let (by, said) = mesh.outcome(&feature_x())?;
    assert_eq!((by, said), outcome("feature-x", "applied revision feature-x"));
    let address = users(|it| it.address = format!("127.0.0.1:{}", mesh.feature));
    assert_eq!(mesh.outcome(&address)?.0, "feature-x");
    assert_eq!(mesh.stat("applied")?, 2);

    let fault = mesh.ask(&users(|it| it.fault = Some(Fault { http_status: Some(418), grpc_status: None })))?;
    assert_eq!((fault.status, fault.text().as_str()), (418, "fault of an override"));
    assert_eq!(told(&fault).1, format!("{USERS}: applied answered with status 418"));
    let grpc = users(|it| it.fault = Some(Fault { http_status: None, grpc_status: Some(14) }));
    let grpc = Request::get("/")
        .header("ot-baggage-overrides", &grpc.to_baggage_item())
        .header("content-type", "application/grpc");
    let grpc = mesh.send(grpc)?;
    assert_eq!((grpc.status, grpc.headers.get("grpc-status")), (200, Some("14")));

    let before = Instant::now();
    let delayed =
        users(|it| (it.delay_ms, it.fault) = (300, Some(Fault { http_status: Some(503), grpc_status: None })));
    assert_eq!(mesh.ask(&delayed)?.status, 503);
    ensure!(before.elapsed() >= Duration::from_millis(300), "{:?}", before.elapsed());

    let message = users(|it| it.timeout_ms = 200).to_baggage_item();
    let late = mesh.send(Request::get("/slow").header("ot-baggage-overrides", &message))?;
    assert_eq!((late.status, late.text().as_str()), (504, "upstream request timeout"));

    let message = users(|it| {
        it.config = vec![ConfigValue { name: "new-checkout".to_owned(), value: "on, now".to_owned() }];
        it.sample = Some(true);
    });
    let request = Request::get("/").header("ot-baggage-overrides", &message.to_baggage_item());
    let request = request.header("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00");
    let seen = mesh.send(request.header("x-culvert-config", "forged=1"))?.text();
    ensure!(seen.contains("\nx-culvert-config: new-checkout=on%2C%20now\n") && !seen.contains("forged"), "{seen}");
    ensure!(seen.contains("\ntraceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\n"), "{seen}");
    assert_eq!(mesh.stat("config_removed")?, 1);
    for (action, count) in [("route", 2), ("fault", 3), ("delay", 1), ("timeout", 1), ("config", 1), ("sample", 1)] {
        assert_eq!(mesh.stat(&format!("action.{action}"))?, count, "{action}");
    }
    assert_eq!(mesh.stat("rejected")?, 0);
    // Other services are not concerned, and requests without overrides get nothing.
    let other = Overrides::new([("orders", "feature-x")])?;
    assert_eq!(mesh.outcome(&other)?, outcome("users", "nothing asked"));
    let plain = fetch(mesh.port, Request::get("/"))?;
    assert_eq!((told(&plain).0.as_str(), plain.headers.get("x-culvert-override")), ("users", None));
    Ok(())
}

#[test]
fn one_request_is_logged_and_no_other() -> Result<()> {
    let filter = "actions: [DEBUG]\n              limits: {debug_per_second: 1}\n              debug_response: true";
    let mesh = Mesh::start(filter, "")?;
    let admin = mesh.daemon.admin_address().rsplit_once(':').context("a port")?.1.parse()?;
    let level = Request { method: "POST".to_owned(), ..Request::get("/logging?level=info") };
    assert_eq!(fetch(admin, level)?.status, 200);
    mesh.ask(&users(|it| it.revision = "feature-x".to_owned()))?;
    let debug = users(|it| (it.debug, it.revision) = (true, "feature-y".to_owned()));
    let request = |path: &str| {
        let request = Request::get(path).header("ot-baggage-overrides", &debug.to_baggage_item());
        mesh.send(request.header("x-request-id", "me"))
    };
    let answer = request("/%0aforged?a=1")?;
    assert_eq!(told(&answer), outcome("users", "applied logged; refused route unlisted"));
    let lines = || -> Vec<String> {
        mesh.daemon.stderr().lines().filter(|line| line.contains("override: ")).map(str::to_owned).collect()
    };
    wait_until(DEADLINE, "the log", || {
        let lines = lines();
        ensure!(lines.len() == 2, "{lines:?}");
        Ok(())
    })?;
    let lines = lines();
    ensure!(lines[0].contains("GET users/%0aforged?a=1") && lines[0].contains("refused route unlisted"), "{lines:?}");
    ensure!(lines[1].contains("answered") && lines[1].contains("status=200"), "{lines:?}");
    // More than may be logged in a second.
    wait_until(DEADLINE, "more than one in a second", || {
        request("/")?;
        ensure!(mesh.stat("refused.debug_busy")? > 0, "not yet");
        Ok(())
    })
}

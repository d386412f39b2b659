//! What is not done, and why.

use super::*;

#[test]
fn nothing_is_done_that_is_not_allowed() -> Result<()> {
    let mut mesh = Mesh::start(
        "actions: [DELAY, TIMEOUT, CONFIG]\n              limits: {delay_ms: 100, overrides: 2, header_bytes: 2000, config_bytes: 20}\n              debug_response: true",
        "",
    )?;
    let fault = users(|it| it.fault = Some(Fault { http_status: Some(500), grpc_status: None }));
    assert_eq!(mesh.outcome(&fault)?, outcome("users", "refused fault action_not_allowed"));
    let delay = users(|it| (it.delay_ms, it.revision) = (101, "feature-x".to_owned()));
    assert_eq!(mesh.outcome(&delay)?, outcome("feature-x", "applied revision feature-x; refused delay over_limit"));
    let config =
        |value: &str| users(|it| it.config = vec![ConfigValue { name: "name".to_owned(), value: value.to_owned() }]);
    assert_eq!(mesh.outcome(&config(&"x".repeat(30)))?, outcome("users", "refused config over_limit"));
    let unlisted = users(|it| it.revision = "feature-y".to_owned());
    assert_eq!(mesh.outcome(&unlisted)?, outcome("users", "refused route unlisted"));
    for address in [format!("127.0.0.1:{}", mesh.port), "169.254.169.254".to_owned()] {
        assert_eq!(mesh.outcome(&users(|it| it.address = address))?, outcome("users", "refused route unlisted"));
    }
    let many = Overrides::new([("users", "feature-x"), ("a", "x"), ("b", "x")])?;
    assert_eq!(mesh.outcome(&many)?, outcome("users", "refused too_many"));
    let expired = Overrides::of(feature_x().overrides, now() - 1)?;
    assert_eq!(mesh.outcome(&expired)?, outcome("users", "refused expired"));
    let forged = Request::get("/").header("x-envoy-original-dst-host", &format!("127.0.0.1:{}", mesh.feature));
    assert_eq!(told(&mesh.send(forged)?).0, "users");

    let item = feature_x().to_baggage_item();
    for (header, value, reason) in [
        ("ot-baggage-overrides", "AAAA".repeat(501), "too_large"),
        ("ot-baggage-overrides", "not base64".to_owned(), "undecodable"),
        ("x-ot-span-context", "not base64".to_owned(), "undecodable"),
        ("uberctx-overrides", "%zz".to_owned(), "undecodable"),
        ("baggage", format!("overrides={item},overrides=CAE%3D"), "contradiction"),
        ("baggage", vec!["k=v"; 65].join(","), "too_large"),
    ] {
        let answer = mesh.send(Request::get("/").header(header, &value))?;
        assert_eq!(told(&answer), outcome("users", &format!("refused {reason}")), "{header}: {value}");
    }
    let twice = Request::get("/").header("baggage-overrides", &item).header("baggage-overrides", "CAE=");
    assert_eq!(told(&mesh.send(twice)?), outcome("users", "refused contradiction"));
    // Formats are looked at in their order: a damaged one is not made good by a later one.
    let both = Request::get("/").header("ot-baggage-overrides", "damaged").header("uberctx-overrides", &item);
    assert_eq!(told(&mesh.send(both)?), outcome("users", "refused undecodable"));
    for (reason, count) in [
        ("action_not_allowed", 1),
        ("over_limit", 2),
        ("unlisted", 3),
        ("too_many", 1),
        ("expired", 1),
        ("too_large", 2),
        ("undecodable", 4),
        ("contradiction", 2),
    ] {
        assert_eq!(mesh.stat(&format!("refused.{reason}"))?, count, "{reason}");
    }
    assert_eq!((mesh.stat("undecodable")?, mesh.stat("rejected")?, mesh.stat("header_removed")?), (8, 8, 1));

    // What the service itself says.
    mesh.set_policy(Policy { allowed: false, ..Policy::default() }, "\"policy\"")?;
    assert_eq!(mesh.outcome(&feature_x())?, outcome("users", "refused not_opted_in"));
    let actions = vec![Action::Delay.into()];
    mesh.set_policy(Policy { allowed: true, actions, ..Policy::default() }, "DELAY")?;
    let both = users(|it| (it.delay_ms, it.revision) = (1, "feature-x".to_owned()));
    assert_eq!(mesh.outcome(&both)?, outcome("users", "applied delayed by 1 ms; refused route action_not_opted_in"));
    let ranges = vec!["10.0.0.0/8".to_owned()];
    let sources = Sources { ranges, pods: vec!["*".to_owned()], ..Sources::default() };
    mesh.set_policy(Policy { allowed: true, actions: Vec::new(), sources: Some(sources) }, "10.0.0.0/8")?;
    assert_eq!(mesh.outcome(&feature_x())?, outcome("users", "refused service_source"));
    let ranges = vec!["127.0.0.0/8".to_owned()];
    let sources = Sources { ranges, ..Sources::default() };
    mesh.set_policy(Policy { allowed: true, actions: Vec::new(), sources: Some(sources) }, "127.0.0.0/8")?;
    assert_eq!(mesh.outcome(&feature_x())?.0, "feature-x");
    Ok(())
}

#[test]
fn production_opt_in_and_sources_hold_for_everything() -> Result<()> {
    for (filter, reason) in [
        ("mode: REFUSE_ALL", "production"),
        ("require_opt_in: true", "not_opted_in"),
        ("sources: {ranges: [10.0.0.0/8]}", "source"),
        ("sources: {pods: [\"*\"]}", "source"),
        ("sources: {principals: [\"*\"]}", "source"),
    ] {
        let mesh = Mesh::start(&format!("{filter}\n              debug_response: true"), "")?;
        // Whoever says to be someone else is still the same.
        let forged = Request::get("/").header("x-forwarded-for", "10.0.0.1").header("x-forwarded-client-cert", "URI=a");
        let forged = forged.header("ot-baggage-overrides", &feature_x().to_baggage_item());
        assert_eq!(told(&mesh.send(forged)?), outcome("users", &format!("refused {reason}")), "{filter}");
        assert_eq!(mesh.stat(&format!("refused.{reason}"))?, 1, "{filter}");
    }
    let mesh = Mesh::start("require_opt_in: false", "")?;
    assert_eq!(told(&mesh.ask(&feature_x())?), ("feature-x".to_owned(), "(nothing)".to_owned()), "nobody is told");
    Ok(())
}

#[test]
fn the_edge_strips_every_format() -> Result<()> {
    let mesh = Mesh::start("edge: STRIP\n              debug_response: true", "")?;
    let item = feature_x().to_baggage_item();
    let baggage = std::collections::BTreeMap::from([(BAGGAGE_ITEM.to_owned(), item.clone())]);
    let span = encode_ot_span_context(&SpanContext { trace_id: 1, span_id: 2, sampled: true, baggage });
    let w3c = format_baggage([("a", "b"), (BAGGAGE_ITEM, &item)]);
    let escaped = w3c.rsplit_once("overrides=").context("escaped")?.1;
    for (header, value) in [
        ("x-ot-span-context", &*span),
        ("ot-baggage-overrides", &item),
        ("baggage", &w3c),
        ("uberctx-overrides", escaped),
        ("jaeger-baggage", &w3c),
        ("baggage-overrides", &item),
    ] {
        let answer = mesh.send(Request::get("/").header(header, value).header("ot-baggage-mine", "stays"))?;
        let seen = answer.text();
        assert_eq!(told(&answer), ("users".to_owned(), "(nothing)".to_owned()), "{header}");
        ensure!(!seen.contains("overrides") && seen.contains("ot-baggage-mine: stays"), "{header}: {seen}");
        ensure!(!seen.contains("x-culvert-override-debug"), "{seen}");
        ensure!(!header.ends_with("baggage") || seen.contains(&format!("\n{header}: a=b\n")), "{seen}");
    }
    assert_eq!((mesh.stat("refused.stripped")?, mesh.stat("applied")?), (6, 0));
    Ok(())
}

#[test]
fn the_edge_may_let_internal_requests_keep_theirs() -> Result<()> {
    let mesh = Mesh::start("edge: STRIP_EXTERNAL", "")?;
    let from = |address: &str| -> Result<String> {
        let request = Request::get("/").header("ot-baggage-overrides", &feature_x().to_baggage_item());
        Ok(told(&mesh.send(request.header("x-forwarded-for", address))?).0)
    };
    assert_eq!((from("10.0.0.1")?.as_str(), from("192.0.2.1")?.as_str()), ("feature-x", "users"));
    assert_eq!(mesh.stat("refused.stripped")?, 1);
    Ok(())
}

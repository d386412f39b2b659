//! Signatures, and the keys that they are verified with.

use super::*;

/// The signing keys `overrides`, by their ids.
fn keys(number: u32, keys: &[(&str, &str)]) -> Push {
    let inline = |key: &str| DataSource {
        specifier: Some(Specifier::InlineBytes(key.as_bytes().to_vec())),
        ..DataSource::default()
    };
    let secrets = keys.iter().map(|(id, key)| ((*id).to_owned(), inline(key))).collect();
    let secret = Secret {
        name: "overrides".to_owned(),
        r#type: Some(secret::Type::GenericSecret(GenericSecret { secret: None, secrets })),
    };
    let body = Any { type_url: Secret::type_url(), value: secret.encode_to_vec() };
    Push {
        type_url: Secret::type_url(),
        version: number.to_string(),
        nonce: format!("secret-{number}"),
        resources: vec![Resource { name: "overrides".to_owned(), version: number.to_string(), body }],
        removed: Vec::new(),
    }
}

#[test]
fn signatures_are_verified_and_keys_rotate() -> Result<()> {
    let dir = scratch_dir()?;
    let put = |name: &str, key: &str| -> Result<()> {
        // As tools do it: the directory sees a move.
        fs::write(dir.join("next"), format!("{key}\n"))?;
        Ok(fs::rename(dir.join("next"), dir.join(name))?)
    };
    put("k1", KEY)?;
    put("k2", OTHER_KEY)?;
    let file = |name: &str| format!("{name}: {{filename: {}}}", dir.join(name).display());
    let secrets =
        format!("  secrets: [{{name: overrides, generic_secret: {{secrets: {{{}, {}}}}}}}]", file("k1"), file("k2"));
    let filter =
        "signing: {secret: overrides, required: true, max_lifetime_s: 3600}\n              debug_response: true";
    let mesh = Mesh::start(filter, &secrets)?;
    let ends = |after: u64| Overrides::of(feature_x().overrides, now() + after).unwrap();
    let (key, other) = (KEY.as_bytes(), OTHER_KEY.as_bytes());
    let good = ends(600).sign("k1", key)?;
    assert_eq!(mesh.outcome(&good)?, outcome("feature-x", "applied revision feature-x"));
    assert_eq!(mesh.outcome(&ends(600).sign("k2", other)?)?.0, "feature-x");
    let refused = |message: &Overrides, reason: &str| -> Result<()> {
        assert_eq!(mesh.outcome(message)?, outcome("users", &format!("refused {reason}")));
        Ok(())
    };
    refused(&feature_x(), "not_signed")?;
    refused(&ends(600).sign("k1", other)?, "bad_signature")?;
    refused(&ends(600).sign("k3", key)?, "unknown_key")?;
    refused(&ends(7200).sign("k1", key)?, "lasts_too_long")?;
    refused(&Overrides::of(feature_x().overrides, now() - 1)?.sign("k1", key)?, "expired")?;
    // Another set under a signature that is good.
    let signature = good.signed.clone().context("signed")?;
    let other_set = Overrides::of(users(|it| it.address = "127.0.0.1".to_owned()).overrides, now() + 600)?;
    let with = |signed: Signed| Overrides { signed: Some(signed), ..good.clone() };
    refused(&with(Signed { payload: other_set.encode_to_vec(), ..signature.clone() }), "bad_signature")?;
    // The same set with a later end.
    refused(&with(Signed { payload: ends(1200).encode_to_vec(), ..signature.clone() }), "bad_signature")?;
    refused(&with(Signed { key_id: "k2".to_owned(), ..signature.clone() }), "bad_signature")?;
    // Something beside what is signed.
    refused(&Overrides { overrides: feature_x().overrides, ..good.clone() }, "undecodable")?;
    // One that is not signed in a header that is looked at first.
    let request = Request::get("/").header("uberctx-overrides", &good.to_baggage_item());
    let request = request.header("ot-baggage-overrides", &feature_x().to_baggage_item());
    assert_eq!(told(&mesh.send(request)?), outcome("users", "refused not_signed"));

    // What was good ends with its time.
    let short = ends(2).sign("k1", key)?;
    wait_until(DEADLINE, "the message to end", || {
        let (_, said) = mesh.outcome(&short)?;
        ensure!(said.ends_with("refused expired"), "{said}");
        Ok(())
    })?;
    // The key is replaced: what it has signed means nothing any more.
    put("k1", OTHER_KEY)?;
    wait_until(DEADLINE, "the new key to be known", || {
        let (_, said) = mesh.outcome(&good)?;
        ensure!(said.ends_with("refused bad_signature"), "{said}");
        Ok(())
    })?;
    assert_eq!(mesh.outcome(&ends(600).sign("k1", other)?)?.0, "feature-x");
    fs::remove_dir_all(dir)?;
    Ok(())
}

#[test]
fn keys_are_told_and_rotated_over_ads() -> Result<()> {
    let filter = "signing: {secret: overrides, ads: true, required: true}\n              debug_response: true";
    let mesh = Mesh::start_with(filter, "", Some(keys(1, &[("k1", KEY)])))?;
    let set = || Overrides::of(feature_x().overrides, now() + 600);
    let (by_first, by_second) = (set()?.sign("k1", KEY.as_bytes())?, set()?.sign("k2", OTHER_KEY.as_bytes())?);
    assert_eq!(mesh.outcome(&by_first)?, outcome("feature-x", "applied revision feature-x"));
    assert_eq!(mesh.outcome(&by_second)?, outcome("users", "refused unknown_key"));
    let until = |message: &Overrides, expected: (String, String)| {
        wait_until(DEADLINE, &format!("{expected:?}"), || {
            let found = mesh.outcome(message)?;
            ensure!(found == expected, "{found:?}");
            Ok(())
        })
    };
    // The new key beside the old one, then alone.
    mesh.stream.push(keys(2, &[("k1", KEY), ("k2", OTHER_KEY)]));
    until(&by_second, outcome("feature-x", "applied revision feature-x"))?;
    assert_eq!(mesh.outcome(&by_first)?.0, "feature-x");
    mesh.stream.push(keys(3, &[("k2", OTHER_KEY)]));
    until(&by_first, outcome("users", "refused unknown_key"))?;
    assert_eq!(mesh.outcome(&by_second)?.0, "feature-x");
    // A key that is too short to sign anything leaves the last good ones in force.
    mesh.stream.push(keys(4, &[("k2", "short")]));
    wait_until(DEADLINE, "the short key to be refused", || {
        let request = mesh.stream.next(DEADLINE)?.context("the stream ended")?;
        let refused = request.error.is_some() && request.nonce == "secret-4";
        ensure!(refused, "{request:?}");
        Ok(())
    })?;
    assert_eq!(mesh.outcome(&by_second)?.0, "feature-x");
    Ok(())
}

#[test]
fn a_listener_whose_keys_are_missing_is_refused() -> Result<()> {
    let yaml = bootstrap(free_port()?, free_port()?, free_port()?, "signing: {secret: overrides}", "");
    let ended = culvertd_to_end(Some(&yaml), &["--mode", "validate"], DEADLINE)?;
    ensure!(ended.code != Some(0) && ended.stderr.contains("Unknown static secret: overrides"), "{ended:?}");
    Ok(())
}

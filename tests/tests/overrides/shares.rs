//! `culvert override share`: a token stands for a set of overrides, until it ends.

use anyhow::{Result, ensure};
use culvert_tests::daemon::scratch_dir;
use culvert_tests::wait_until;
use redb::ReadableTable as _;
use serde_json::Value;

use super::harness::{DEADLINE, Discovery, Mesh, culvert, header, refused};

fn share(discovery: &Discovery, arguments: &[&str]) -> Vec<String> {
    let access = ["--discovery", &discovery.url, "--token-file", &discovery.token_file];
    let all = [&["override", "share"], arguments, &access];
    all.concat().into_iter().map(str::to_owned).collect()
}

fn said(discovery: &Discovery, arguments: &[&str]) -> Result<String> {
    let arguments = share(discovery, arguments);
    culvert(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
}

fn refusal(discovery: &Discovery, arguments: &[&str]) -> Result<String> {
    let arguments = share(discovery, arguments);
    refused(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
}

fn json(discovery: &Discovery, arguments: &[&str]) -> Result<Value> {
    Ok(serde_json::from_str(&said(discovery, &[arguments, &["-o", "json"]].concat())?)?)
}

#[test]
fn a_token_stands_for_a_set_wherever_discovery_tells_of_it() -> Result<()> {
    let storage = format!("redb:{}", scratch_dir()?.join("shares.redb").display());
    let mut mesh = Mesh::start_with(&["--shares", &storage])?;
    let made = json(&mesh.discovery, &["create", "checkout", "--set", "users=feature-x", "--set", "orders=r2"])?;
    let token = made["token"].as_str().unwrap_or_default().to_owned();
    assert_eq!(made["unlisted"], serde_json::json!(["orders=r2"]));
    assert_eq!(made["expires"].as_i64().unwrap() - made["created"].as_i64().unwrap(), 8 * 3600);
    // The item of a share does not grow with the set.
    let headers = header(&["--share", &token, "--format", "baggage"])?;
    assert!(headers[0].1.len() < 50, "{headers:?}");
    mesh.until_revision(&headers, "feature-x")?;
    assert_eq!(mesh.revision(&[])?, "main");
    // What the header itself says counts before the share.
    let both = header(&["--share", &token, "--set", "users=other"])?;
    let rejected = mesh.stat("rejected")?;
    assert_eq!(mesh.revision(&both)?, "main");
    assert_eq!(mesh.stat("rejected")?, rejected + 1);

    let listed = said(&mesh.discovery, &["list"])?;
    assert!(listed.contains(&token) && listed.contains("users=feature-x,orders=r2"), "{listed}");
    let text = said(&mesh.discovery, &["show", &token])?;
    assert!(text.starts_with("checkout: token ") && text.contains("  orders -> revision r2\n"), "{text}");
    let error = refusal(&mesh.discovery, &["create", "checkout", "--set", "users=y"])?;
    assert!(error.contains("there is a share `checkout`; delete it first, or choose another name"), "{error}");
    // Who sees the status does not see the token.
    let status = mesh.discovery.status()?;
    assert_eq!(status["shares"][0]["name"], "checkout");
    assert!(!status.to_string().contains(&token));

    // It is there after a crash, and the daemon never forgets it meanwhile.
    mesh.discovery.restart()?;
    assert_eq!(mesh.revision(&headers)?, "feature-x");
    assert_eq!(json(&mesh.discovery, &["show", "checkout"])?["token"], *token);

    let unknown = mesh.stat("refused.share_unknown")?;
    assert!(said(&mesh.discovery, &["delete", "checkout"])?.contains("is refused from now on"));
    mesh.until_revision(&headers, "main")?;
    assert!(mesh.stat("refused.share_unknown")? > unknown);
    let error = refusal(&mesh.discovery, &["show", "checkout"])?;
    assert!(error.contains("there is no share `checkout`"), "{error}");
    assert_eq!(said(&mesh.discovery, &["list"])?.split(';').next(), Some("no shares"));
    Ok(())
}

#[test]
fn who_has_no_token_is_refused_and_nonsense_too() -> Result<()> {
    let discovery = Discovery::start(&[])?;
    let error = refused(&["override", "share", "list", "--discovery", &discovery.url])?;
    assert!(
        error.contains("the developers' token is needed; give the file that it is in with --token-file"),
        "{error}"
    );
    for (arguments, expected) in [
        (&["create", "a b", "--set", "users=x"][..], "name: `a b` is not 1 to 63"),
        (&["create", "a", "--set", "users=x", "--expires", "31d"], "1m to 30d are possible"),
        (&["create", "a", "--set", "Users=x"], "service `Users`"),
        (&["show", "../status"], "is no name of a share"),
        (&["delete", "nobody"], "there is no share `nobody`"),
    ] {
        let error = refusal(&discovery, arguments)?;
        assert!(error.contains(expected), "{arguments:?}: {error}");
    }
    Ok(())
}

/// A minute is the shortest: the store's clock is looked at, not waited for.
#[test]
fn a_share_that_has_ended_is_refused_as_such() -> Result<()> {
    let path = scratch_dir()?.join("shares.redb");
    let mut mesh = Mesh::start_with(&["--shares", &format!("redb:{}", path.display())])?;
    let token = json(&mesh.discovery, &["create", "old", "--set", "users=feature-x"])?;
    let token = token["token"].as_str().unwrap_or_default().to_owned();
    let headers = header(&["--share", &token])?;
    mesh.until_revision(&headers, "feature-x")?;
    // As if its time had passed while discovery was away.
    mesh.discovery.kill()?;
    {
        let table = redb::TableDefinition::<&str, &[u8]>::new("shares");
        let database = redb::Database::open(&path)?;
        let transaction = database.begin_write()?;
        {
            let mut table = transaction.open_table(table)?;
            let text = table.get("old")?.map(|value| value.value().to_vec()).unwrap_or_default();
            let mut share: Value = serde_json::from_slice(&text)?;
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs();
            share["expires"] = (now - 60).into();
            table.insert("old", serde_json::to_vec(&share)?.as_slice())?;
        }
        transaction.commit()?;
    }
    mesh.discovery.start_again()?;
    mesh.until_revision(&headers, "main")?;
    wait_until(DEADLINE, "the refusal to be counted", || {
        mesh.revision(&headers)?;
        ensure!(mesh.stat("refused.share_expired")? > 0);
        Ok(())
    })?;
    assert_eq!(mesh.stat("refused.share_unknown")?, 0);
    assert!(said(&mesh.discovery, &["show", "old"])?.contains("ended 20"));
    // Its name is free.
    assert_eq!(json(&mesh.discovery, &["create", "old", "--set", "users=y"])?["expired"], false);
    Ok(())
}

/// What a node may call limits what overrides do there, whoever made the share.
#[test]
fn a_share_does_at_a_node_what_that_may_call() -> Result<()> {
    let mesh = Mesh::start()?;
    let may_call = |services: &str| {
        let manifest = format!(
            "{{apiVersion: v1, kind: Service, metadata: {{name: c}}, spec: {{ports: [{{name: http, port: 80}}]}}}}\n---\n\
             {{apiVersion: culvert.dev/v1alpha1, kind: ServiceManifest, metadata: {{name: c}}, spec: {{egress: [{services}]}}}}\n"
        );
        mesh.discovery.write("c.yaml", &manifest)
    };
    let made = json(&mesh.discovery, &["create", "checkout", "--set", "users=feature-x"])?;
    let headers = header(&["--share", made["token"].as_str().unwrap_or_default()])?;
    mesh.until_revision(&headers, "feature-x")?;
    // The daemon's node is of the service c, and goes on without what it may not call.
    may_call("c")?;
    mesh.until_revision(&headers, "main")?;
    let overrides = mesh.daemon.admin("/overrides")?;
    ensure!(!overrides.contains("users.default:80"), "{overrides}");
    let refused = mesh.stat("refused.unlisted")?;
    assert_eq!(mesh.revision(&headers)?, "main");
    assert_eq!((mesh.stat("refused.unlisted")?, mesh.stat("refused.share_unknown")?), (refused + 1, 0));
    // It is the same share, as soon as it may.
    may_call("c, users")?;
    mesh.until_revision(&headers, "feature-x")
}

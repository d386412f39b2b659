//! Who discovery is to an API server.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_read_again_when_it_is_refused() {
    let api = with_users().await;
    api.behave(|behaviour| behaviour.tokens = ["one".to_owned()].into());
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("token");
    std::fs::write(&file, "one\n").unwrap();
    let config = KubernetesConfig { server: Some(api.url()), token_file: Some(file.clone()), ..Default::default() };
    let mut watched = Watched::start(config);
    watched.until_endpoints(&["1", "2"]).await;
    // The server wants the next one before it is there.
    api.behave(|behaviour| behaviour.tokens = ["two".to_owned()].into());
    api.cut_watches();
    watched
        .until("401", |cluster| cluster.health.error.as_ref().is_some_and(|error| error.contains("401 Unauthorized")))
        .await;
    api.put(SLICES, slice("users", &["10.1.0.3"]));
    std::fs::write(&file, "two\n").unwrap();
    watched.until_endpoints(&["3"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plugin_is_run_again_when_its_token_is_refused() {
    let api = with_users().await;
    let directory = tempfile::tempdir().unwrap();
    let (token, count) = (directory.path().join("token"), directory.path().join("count"));
    std::fs::write(&token, "one").unwrap();
    api.behave(|behaviour| behaviour.tokens = ["one".to_owned()].into());
    let script = format!(
        "echo x >> {}; echo \"{{\\\"status\\\": {{\\\"token\\\": \\\"$(cat {})\\\"}}}}\"",
        count.display(),
        token.display()
    );
    let exec = ExecConfig { command: "sh".into(), args: vec!["-c".into(), script], ..Default::default() };
    let mut watched =
        Watched::start(KubernetesConfig { server: Some(api.url()), exec: Some(exec), ..Default::default() });
    watched.until_endpoints(&["1", "2"]).await;
    assert_eq!(std::fs::read_to_string(&count).unwrap(), "x\n", "all watches share one token");
    std::fs::write(&token, "two").unwrap();
    api.behave(|behaviour| behaviour.tokens = ["two".to_owned()].into());
    api.put(SLICES, slice("users", &["10.1.0.3"]));
    watched.until_endpoints(&["3"]).await;
    api.cut_watches();
    eventually("new watches", || api.count(SLICES, "watch=true") >= 2).await;
    api.put(SLICES, slice("users", &["10.1.0.4"]));
    watched.until_endpoints(&["4"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_forbidden_is_named() {
    let api = with_users().await;
    api.behave(|behaviour| behaviour.refused = Some(PODS));
    let mut watched = Watched::of(&api);
    watched.until("the refusal", |cluster| cluster.health.stale).await;
    let Cluster { objects, health, .. } = watched.now();
    assert!(objects.is_none(), "nothing counts before all has been read");
    let error = health.error.unwrap();
    assert!(error.starts_with("Pods: 403 Forbidden: pods is forbidden"), "{error}");
    api.behave(|behaviour| behaviour.refused = None);
    watched.until_endpoints(&["1", "2"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kubeconfig_s_authority_and_client_certificate() {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let issue = |name: &str, issuer: Option<&rcgen::Issuer<'_, rcgen::KeyPair>>| {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        let certificate = match issuer {
            Some(issuer) => params.signed_by(&key, issuer).unwrap(),
            None => {
                params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
                params.self_signed(&key).unwrap()
            }
        };
        (certificate, key, params)
    };
    let (ca, ca_key, ca_params) = issue("ca", None);
    let issuer = rcgen::Issuer::new(ca_params, ca_key);
    let (server, server_key, _) = issue("server", Some(&issuer));
    let (client, client_key, _) = issue("client", Some(&issuer));
    let mut roots = rustls::RootCertStore::empty();
    roots.add(ca.der().clone()).unwrap();
    let verifier = rustls::server::WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
        .build()
        .unwrap();
    let tls = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(verifier)
        .with_single_cert(vec![server.der().clone()], server_key.serialize_der().try_into().unwrap())
        .unwrap();
    let api = KubeApi::start_with(Some(Arc::new(tls))).await;
    api.put(SLICES, slice("users", &["10.1.0.1"]));
    let directory = tempfile::tempdir().unwrap();
    let write = |name: &str, text: String| {
        let path = directory.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let (ca, client) = (write("ca.pem", ca.pem()), write("client.pem", client.pem()));
    let key = write("client.key", client_key.serialize_pem());
    let kubeconfig = write(
        "kubeconfig",
        format!(
            "{{apiVersion: v1, kind: Config, current-context: nowhere,
               clusters: [{{name: c, cluster: {{server: '{}', certificate-authority: {}}}}}],
               contexts: [{{name: here, context: {{cluster: c, user: u}}}}],
               users: [{{name: u, user: {{client-certificate: {}, client-key: {}}}}}]}}",
            api.url(),
            ca.display(),
            client.display(),
            key.display()
        ),
    );
    let context = Some("here".to_owned());
    let mut watched = Watched::start(KubernetesConfig { kubeconfig: Some(kubeconfig), context, ..Default::default() });
    watched.until_endpoints(&["1"]).await;
    // Without the certificate nobody is let in; with another authority nobody is believed.
    let mut nobody = Watched::start(KubernetesConfig {
        server: Some(api.url()),
        certificate_authority: Some(ca),
        ..Default::default()
    });
    nobody.until("the refusal", |cluster| cluster.health.stale).await;
    let mut distrusting = Watched::start(KubernetesConfig {
        server: Some(api.url()),
        certificate_authority: Some(client),
        ..Default::default()
    });
    distrusting.until("the distrust", |cluster| cluster.health.stale).await;
    let error = distrusting.now().health.error.unwrap();
    assert!(error.to_lowercase().contains("certificate"), "{error}");
}

//! SDS: secrets that listeners and clusters wait for.

use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::Secret as ProtoSecret;

use super::*;
use crate::{
    config::{model::INITIAL_FETCH_TIMEOUT, status::Incomplete},
    tls::testing::{Authority, Issued, yaml},
};

const TLS: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3";

pub(super) fn secret_url() -> String {
    ProtoSecret::type_url()
}

pub(super) fn certificate(name: &str, Issued { chain, key }: &Issued) -> Resource {
    let (chain, key) = (yaml(chain), yaml(key));
    let fields = format!("certificate_chain: {{ inline_string: {chain} }}, private_key: {{ inline_string: {key} }}");
    resource::<ProtoSecret>(name, &format!("{{ name: {name}, tls_certificate: {{ {fields} }} }}"))
}

pub(super) fn issuers(name: &str, pem: &str) -> Resource {
    let context = format!("{{ trusted_ca: {{ inline_string: {} }} }}", yaml(pem));
    resource::<ProtoSecret>(name, &format!("{{ name: {name}, validation_context: {context} }}"))
}

/// An `SdsSecretConfig`.
pub(super) fn sds(name: &str) -> String {
    format!("{{ name: {name}, sds_config: {ADS} }}")
}

pub(super) fn tcp_listener(name: &str, certificate: &str, more: &str) -> Resource {
    let tcp = "{ name: t, typed_config: { '@type': type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.\
               TcpProxy, stat_prefix: t, cluster: up } }";
    resource::<Listener>(
        name,
        &format!(
            "{{ name: {name}, address: {{ socket_address: {{ address: 127.0.0.1, port_value: 0 }} }}, filter_chains: [{{ filters: [{tcp}], \
             transport_socket: {{ name: tls, typed_config: {{ '@type': {TLS}.DownstreamTlsContext, common_tls_context: {{ \
             tls_certificate_sds_secret_configs: [{certificate}], {more} }} }} }} }}] }}"
        ),
    )
}

pub(super) fn cluster(name: &str, common: &str) -> Resource {
    resource::<Cluster>(
        name,
        &format!(
            "{{ name: {name}, transport_socket: {{ name: tls, typed_config: {{ '@type': {TLS}.UpstreamTlsContext, \
             common_tls_context: {{ {common} }} }} }} }}"
        ),
    )
}

#[test]
fn a_listener_warms_until_its_secrets_are_there_and_they_go_with_it() {
    let (store, calls) = running();
    let authority = Authority::new("ca");
    let trusted = format!("validation_context_sds_secret_config: {}", sds("trusted"));
    let lds = store.update(update(Listener::type_url(), vec![tcp_listener("in", &sds("own"), &trusted)]));
    assert_eq!(lds.rejected(), [], "it is bound; servers may send secrets only after that");
    assert_eq!(names(&lds, secret_url()), ["own", "trusted"]);
    let snapshot = store.snapshot();
    assert_eq!(snapshot.unready[0].targets, ["shared target SdsApi own", "shared target SdsApi trusted"]);
    assert_eq!(snapshot.of(&secret_url())[0].missing, Some(Missing::Requested));

    let first = certificate("own", &authority.issue(&["a.test"], &[]));
    let answer =
        store.update(update(secret_url(), vec![first.clone(), certificate("other", &authority.issue(&[], &[]))]));
    assert_eq!(answer.rejected(), [], "what nobody asked for is passed over");
    assert_eq!(calls.take(), ["secret own: tls_certificate"]);
    store.update(update(secret_url(), vec![issuers("trusted", &authority.pem)]));
    assert_eq!(calls.take(), ["secret trusted: validation_context", "listener in"]);

    // The same again is no news; another one is; what is removed stays.
    store.update(update(secret_url(), vec![first.clone()]));
    assert_eq!(calls.take(), [""; 0]);
    store.update(update(secret_url(), vec![certificate("own", &authority.issue(&["b.test"], &[]))]));
    assert_eq!(calls.take(), ["secret own: tls_certificate"]);
    store.update(removal(secret_url(), "own"));
    assert_eq!(calls.take(), [""; 0]);
    let kept = |store: &Fixture| store.snapshot().of(&secret_url()).len();
    assert_eq!(kept(&store), 2);

    // A second user has it at once, and the last one takes it along.
    let lds = store.update(update(Listener::type_url(), vec![tcp_listener("second", &sds("own"), "")]));
    assert_eq!(names(&lds, secret_url()), [""; 0], "nothing new is asked for");
    assert_eq!(calls.take(), ["listener second"]);
    let lds = store.update(removal(Listener::type_url(), "in"));
    assert_eq!(calls.take(), ["no listener in", "no secret trusted"]);
    assert_eq!(names(&lds, secret_url()), ["own"]);
    let lds = store.update(removal(Listener::type_url(), "second"));
    assert_eq!(calls.take(), ["no listener second", "no secret own"]);
    assert_eq!(lds.wanted.get(&secret_url()), Some(&Interest::None));
    assert_eq!(kept(&store), 0);
}

#[test]
fn a_bad_secret_is_refused_and_the_one_before_stays() {
    let (store, calls) = running();
    let authority = Authority::new("ca");
    let (one, two) = (authority.issue(&["a.test"], &[]), authority.issue(&["b.test"], &[]));
    store.update(update(Listener::type_url(), vec![tcp_listener("in", &sds("own"), "")]));
    store.update(update(secret_url(), vec![certificate("own", &one)]));
    assert_eq!(calls.take(), ["secret own: tls_certificate", "listener in"]);

    let mixed = Issued { chain: one.chain.clone(), key: two.key.clone() };
    let broken = Issued { chain: "no PEM".to_owned(), key: one.key.clone() };
    let mut misnamed = certificate("another", &two);
    "own".clone_into(&mut misnamed.name);
    for (bad, path) in [
        (certificate("own", &mixed), "tls_certificate.private_key: "),
        (certificate("own", &broken), "tls_certificate.certificate_chain: "),
        (misnamed, "name: "),
        (issuers("own", &authority.pem), "validation_context: a tls_certificate is wanted of this secret"),
    ] {
        let rejected = store.update(update(secret_url(), vec![bad])).rejected();
        assert_eq!(rejected[0].name, "own");
        assert!(rejected[0].message.starts_with(path), "{}", rejected[0].message);
        let snapshot = store.snapshot();
        let known = &snapshot.of(&secret_url())[0];
        assert!(known.failure.is_some() && known.active.is_some());
    }
    assert_eq!(calls.take(), [""; 0]);
    store.update(update(secret_url(), vec![certificate("own", &two)]));
    assert_eq!(calls.take(), ["secret own: tls_certificate"]);
    assert!(store.snapshot().of(&secret_url())[0].failure.is_none());
}

#[test]
fn a_refused_or_late_secret_is_not_waited_for() {
    let (store, calls) = running();
    let authority = Authority::new("ca");
    store.update(update(Listener::type_url(), vec![tcp_listener("in", &sds("own"), "")]));
    let answer = store.update(update(secret_url(), vec![issuers("own", &authority.pem)]));
    assert_eq!(answer.rejected().len(), 1);
    assert_eq!(calls.take(), ["listener in"], "it resets connections until then, as in Envoy");
    let lacking = |of: String, name: &str, secret: &str| Incomplete {
        type_url: of,
        name: name.to_owned(),
        lacks: vec![format!("the secret {secret:?}")],
    };
    let in_lacks = lacking(Listener::type_url(), "in", "own");
    assert_eq!(store.snapshot().incomplete, std::slice::from_ref(&in_lacks));
    store.update(update(Listener::type_url(), vec![tcp_listener("late", &sds("never"), "")]));
    assert_eq!(calls.take(), [""; 0]);
    assert_eq!(store.snapshot().incomplete.len(), 1, "that one warms");
    let common = format!("tls_certificate_sds_secret_configs: [{}]", sds("never"));
    store.update(update(Cluster::type_url(), vec![cluster("up", &common)]));
    store.later(INITIAL_FETCH_TIMEOUT);
    assert_eq!(calls.take(), ["listener late", "cluster up"]);
    let up_lacks = lacking(Cluster::type_url(), "up", "never");
    assert_eq!(store.snapshot().incomplete, [up_lacks, in_lacks, lacking(Listener::type_url(), "late", "never")]);
    let own = vec![certificate("own", &authority.issue(&[], &[])), certificate("never", &authority.issue(&[], &[]))];
    store.update(update(secret_url(), own));
    assert_eq!(store.snapshot().incomplete, []);
}

#[test]
fn a_cluster_warms_until_its_secrets_are_there() {
    let (store, calls) = running();
    let authority = Authority::new("ca");
    let common = format!(
        "tls_certificate_sds_secret_configs: [{}], combined_validation_context: {{ default_validation_context: {{}}, \
         validation_context_sds_secret_config: {} }}",
        sds("client"),
        sds("trusted")
    );
    let cds = store.update(update(Cluster::type_url(), vec![cluster("up", &common)]));
    assert!(cds.is_open());
    assert_eq!(names(&cds, secret_url()), ["client", "trusted"]);
    let secrets = vec![certificate("client", &authority.issue(&[], &[])), issuers("trusted", &authority.pem)];
    store.update(update(secret_url(), secrets));
    assert_eq!(
        calls.take(),
        ["secret client: tls_certificate", "secret trusted: validation_context", "cluster up"],
        "the secrets are there before the cluster"
    );
    assert_eq!(cds.rejected(), []);
    // A certificate is not what trusts others.
    let wrong = store.update(update(secret_url(), vec![certificate("trusted", &authority.issue(&[], &[]))]));
    assert_eq!(wrong.rejected()[0].message, "tls_certificate: a validation_context is wanted of this secret");
    let cds = store.update(removal(Cluster::type_url(), "up"));
    assert_eq!(calls.take(), ["no cluster up", "no secret client", "no secret trusted"]);
    assert_eq!(cds.wanted.get(&secret_url()), Some(&Interest::None));
}

#[test]
fn secrets_of_the_bootstrap_must_be_there() {
    let start = StartUp {
        cds: Some(ConfigSource::default()),
        lds: Some(ConfigSource::default()),
        secrets: [(model::SecretType::TlsCertificate, "fixed".into())].into(),
        ..StartUp::default()
    };
    let (store, calls) = start_up(start, Vec::new(), Vec::new());
    let common = |name: &str| format!("tls_certificate_sds_secret_configs: [{{ name: {name} }}]");
    let clusters = vec![cluster("good", &common("fixed")), cluster("bad", &common("missing"))];
    let cds = store.update(update(Cluster::type_url(), clusters));
    let rejected = cds.rejected();
    assert_eq!((rejected.len(), rejected[0].name.as_str()), (1, "bad"));
    assert_eq!(rejected[0].message, "transport_socket: Unknown static secret: missing");
    assert_eq!(calls.take(), ["cluster good"]);
    let other = cluster("other", "validation_context_sds_secret_config: { name: fixed }");
    let rejected = store.update(update(Cluster::type_url(), vec![other])).rejected();
    assert_eq!(rejected[0].message, "transport_socket: Unknown static secret: fixed", "it is a certificate");
    let bad = tcp_listener("in", "{ name: missing }", "");
    let good = tcp_listener("in2", "{ name: fixed }", "");
    let rejected = store.update(update(Listener::type_url(), vec![bad, good])).rejected();
    assert_eq!((rejected.len(), rejected[0].name.as_str()), (1, "in"));
    assert_eq!(rejected[0].message, "filter_chains[0].transport_socket: Unknown static secret: missing");
    assert_eq!(calls.take(), ["listener in2"]);
}

//! Secrets of SDS and of the bootstrap that are made of files, replaced as Kubernetes does it.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    time::Instant as Clock,
};

use envoy_types::pb::envoy::{
    admin::v3::SecretsConfigDump, extensions::transport_sockets::tls::v3::Secret as ProtoSecret,
};

use super::{
    secrets::{cluster, issuers, sds, secret_url, tcp_listener},
    *,
};
use crate::{
    stats,
    tls::testing::{Authority, Issued},
};

/// A mounted secret: `tls.crt -> ..data/tls.crt`, `..data -> ..<version>`, and `..data` is replaced.
struct Mounted {
    directory: tempfile::TempDir,
    version: usize,
}

impl Mounted {
    fn new(files: &[(&str, &str)]) -> Mounted {
        let mut mounted = Mounted { directory: tempfile::tempdir().unwrap(), version: 0 };
        mounted.replace(files);
        for (name, _) in files {
            symlink(Path::new("..data").join(name), mounted.file(name)).unwrap();
        }
        mounted
    }

    fn certificate(issued: &Issued) -> Mounted {
        Mounted::new(&[("tls.crt", &issued.chain), ("tls.key", &issued.key)])
    }

    fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn replace(&mut self, files: &[(&str, &str)]) {
        self.version += 1;
        let version = format!("..{}", self.version);
        fs::create_dir(self.file(&version)).unwrap();
        for (name, content) in files {
            fs::write(self.file(&version).join(name), content).unwrap();
        }
        symlink(version, self.file("..data_tmp")).unwrap();
        fs::rename(self.file("..data_tmp"), self.file("..data")).unwrap();
    }

    fn replace_certificate(&mut self, chain: &Issued, key: &Issued) {
        self.replace(&[("tls.crt", &chain.chain), ("tls.key", &key.key)]);
    }

    /// A `TlsCertificate`.
    fn yaml(&self, more: &str) -> String {
        let (chain, key) = (self.file("tls.crt"), self.file("tls.key"));
        format!(
            "{{ certificate_chain: {{ filename: {} }}, private_key: {{ filename: {} }}, {more} }}",
            chain.display(),
            key.display()
        )
    }

    fn secret(&self, name: &str) -> Resource {
        resource::<ProtoSecret>(name, &format!("{{ name: {name}, tls_certificate: {} }}", self.yaml("")))
    }
}

/// Waits for something to be done to the data plane because of a move.
fn rotated(store: &Fixture, calls: &Recorder) -> Vec<String> {
    until(store, || Some(calls.take()).filter(|lines| !lines.is_empty()))
}

fn until<T>(store: &Fixture, mut done: impl FnMut() -> Option<T>) -> T {
    let start = Clock::now();
    loop {
        store.rotate();
        if let Some(value) = done() {
            return value;
        }
        assert!(start.elapsed() < Duration::from_secs(10), "nothing has happened");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn failed(name: &str) -> u64 {
    stats::counter(&format!("sds.{name}.key_rotation_failed")).value()
}

#[test]
fn a_mounted_secret_is_followed_and_a_bad_one_is_passed_over() {
    let (store, calls) = running();
    let authority = Authority::new("ca");
    let [one, two, three] = [(); 3].map(|()| authority.issue(&["a.test"], &[]));
    let mut mounted = Mounted::certificate(&one);
    store.update(update(Listener::type_url(), vec![tcp_listener("in", &sds("rotated"), "")]));
    let received = mounted.secret("rotated");
    assert_eq!(store.update(update(secret_url(), vec![received.clone()])).rejected(), []);
    assert_eq!(calls.take(), ["secret rotated: tls_certificate", "listener in"]);
    let shown = || store.snapshot().of(&secret_url())[0].active.clone().unwrap();
    let first = shown();
    store.rotate();
    assert_eq!(calls.take(), [""; 0], "nothing has changed");

    mounted.replace_certificate(&two, &two);
    assert_eq!(rotated(&store, &calls), ["secret rotated: tls_certificate"]);
    assert!(shown().body != first.body && shown().updated > first.updated && shown().version == first.version);
    let text = json::to_json(&SecretsConfigDump {
        static_secrets: vec![envoy_types::pb::envoy::admin::v3::secrets_config_dump::StaticSecret {
            secret: Some(shown().body.clone()),
            ..Default::default()
        }],
        ..Default::default()
    });
    let text = text.to_string();
    assert!(text.contains("inline_bytes") && !text.contains("filename"), "what is in force is shown: {text}");

    // A key that does not belong to the certificate, and no key at all.
    mounted.replace_certificate(&three, &two);
    until(&store, || (failed("rotated") == 1).then_some(()));
    mounted.replace(&[("tls.crt", &three.chain)]);
    until(&store, || (failed("rotated") == 2).then_some(()));
    assert_eq!(calls.take(), [""; 0], "the one before stays");
    let failure = || store.snapshot().of(&secret_url())[0].failure.clone();
    let told = failure().expect("the failure is shown").details.clone();
    assert!(told.contains("tls_certificate.private_key") && told.contains("tls.key"), "{told}");
    assert!(shown().version == first.version && shown().body != first.body, "with what is in force");
    mounted.replace_certificate(&three, &three);
    assert_eq!(rotated(&store, &calls), ["secret rotated: tls_certificate"]);
    assert!(failure().is_none());

    // The same push again is no news, and does not bring back what the files held then.
    assert_eq!(store.update(update(secret_url(), vec![received])).rejected(), []);
    assert_eq!(calls.take(), [""; 0]);
    // Another one takes its place: the files are of no interest any more.
    let inline = secrets::certificate("rotated", &one);
    store.update(update(secret_url(), vec![inline]));
    assert_eq!(calls.take(), ["secret rotated: tls_certificate"]);
    assert!(store.lock().watched(Kind::Secrets).entries().all(|(.., entry)| entry.files.is_none()));
}

#[test]
fn a_watched_directory_takes_the_place_of_the_files_own() {
    let (store, calls) = running();
    let (old, new) = (Authority::new("old"), Authority::new("new"));
    let common = format!("validation_context_sds_secret_config: {}", sds("bundle"));
    store.update(update(Cluster::type_url(), vec![cluster("up", &common)]));
    let mut mounted = Mounted::new(&[("ca.crt", &old.pem)]);
    // By way of the link itself: nothing is ever moved into the directory that it leads to.
    let context = |directory: &Path| {
        let file = mounted.file("..data/ca.crt");
        let context = format!(
            "{{ trusted_ca: {{ filename: {} }}, watched_directory: {{ path: {} }} }}",
            file.display(),
            directory.display()
        );
        resource::<ProtoSecret>("bundle", &format!("{{ name: bundle, validation_context: {context} }}"))
    };
    let nowhere = store.update(update(secret_url(), vec![context(&mounted.file("nowhere"))])).rejected();
    assert!(nowhere[0].message.starts_with("validation_context.watched_directory: cannot watch "), "{nowhere:?}");
    calls.take();
    let good = context(mounted.directory.path());
    assert_eq!(store.update(update(secret_url(), vec![good])).rejected(), []);
    assert_eq!(calls.take(), ["secret bundle: validation_context"]);
    mounted.replace(&[("ca.crt", &new.pem)]);
    assert_eq!(rotated(&store, &calls), ["secret bundle: validation_context"]);
    // The last user takes the watch along.
    store.update(removal(Cluster::type_url(), "up"));
    assert_eq!(calls.take(), ["no cluster up", "no secret bundle"]);
    mounted.replace(&[("ca.crt", &old.pem)]);
    store.rotate();
    assert_eq!(calls.take(), [""; 0]);
}

#[test]
fn a_secret_that_was_refused_for_its_files_is_taken_when_they_are_good() {
    let (store, calls) = running();
    let authority = Authority::new("ca");
    let (one, two) = (authority.issue(&["a.test"], &[]), authority.issue(&["b.test"], &[]));
    let mut mounted = Mounted::certificate(&one);
    mounted.replace_certificate(&one, &two);
    store.update(update(Listener::type_url(), vec![tcp_listener("in", &sds("early"), "")]));
    let rejected = store.update(update(secret_url(), vec![mounted.secret("early")])).rejected();
    assert!(rejected[0].message.starts_with("tls_certificate.private_key: "), "{rejected:?}");
    assert_eq!(calls.take(), ["listener in"], "it is not waited for");
    mounted.replace_certificate(&two, &two);
    assert_eq!(rotated(&store, &calls), ["secret early: tls_certificate"]);
    let snapshot = store.snapshot();
    let known = &snapshot.of(&secret_url())[0];
    assert!(known.failure.is_none() && known.active.is_some());
    // A bad one that is sent afterwards does not end the following of the good one.
    assert_eq!(store.update(update(secret_url(), vec![issuers("early", &authority.pem)])).rejected().len(), 1);
    mounted.replace_certificate(&one, &one);
    assert_eq!(rotated(&store, &calls), ["secret early: tls_certificate"]);
}

#[test]
fn a_secret_of_the_bootstrap_is_followed_where_it_says_so() {
    let authority = Authority::new("ca");
    let (one, two) = (authority.issue(&["a.test"], &[]), authority.issue(&["b.test"], &[]));
    let mut mounted = Mounted::certificate(&one);
    let watched = format!("watched_directory: {{ path: {} }}", mounted.directory.path().display());
    let yaml = format!(
        "static_resources: {{ secrets: [{{ name: fixed_files, tls_certificate: {} }}, {{ name: unwatched, tls_certificate: {} }}] }}",
        mounted.yaml(&watched),
        mounted.yaml("")
    );
    let message: BootstrapMessage = json::from_yaml(&yaml).unwrap();
    let secrets = parse::bootstrap(&message).unwrap().secrets;
    let followed = secrets.into_iter().filter_map(|it| it.followed.map(|(message, path)| (it.name, message, path)));
    let (store, calls) = start_up(StartUp { followed: followed.collect(), ..StartUp::default() }, vec![], vec![]);
    rotated(&store, &calls);
    mounted.replace_certificate(&two, &one);
    until(&store, || (failed("fixed_files") == 1).then_some(()));
    assert_eq!(calls.take(), [""; 0]);
    let faults = store.snapshot().faults;
    assert_eq!((&*faults[0].place, &faults[0].type_url), ("fixed_files", &secret_url()));
    assert!(faults[0].fault.details.contains("private_key"), "{faults:?}");
    mounted.replace_certificate(&two, &two);
    assert_eq!(rotated(&store, &calls), ["secret fixed_files: tls_certificate"]);
    assert!(store.snapshot().faults.is_empty());
}

#[test]
fn contexts_do_not_follow_files() {
    let mounted = Mounted::certificate(&Authority::new("ca").issue(&["a.test"], &[]));
    let watched = mounted.yaml(&format!("watched_directory: {{ path: {} }}", mounted.directory.path().display()));
    let bad = cluster("up", &format!("tls_certificates: [{watched}]"));
    let (store, _) = running();
    let rejected = store.update(update(Cluster::type_url(), vec![bad])).rejected();
    assert!(
        rejected[0]
            .message
            .contains("tls_certificates[0].watched_directory: not supported by culvert yet outside of secrets"),
        "{rejected:?}"
    );
}

#[test]
fn files_are_not_read_while_the_store_is_locked() {
    let (store, calls) = running();
    let authority = Authority::new("ca");
    let [one, two] = [(); 2].map(|()| authority.issue(&["a.test"], &[]));
    let mut mounted = Mounted::certificate(&one);
    let hide = |mounted: &Mounted| fs::rename(mounted.file("..data"), mounted.file("..hidden")).unwrap();
    store.update(update(Listener::type_url(), vec![tcp_listener("in", &sds("aside"), "")]));
    let received = update(secret_url(), vec![mounted.secret("aside")]);
    let read = {
        let _locked = store.lock();
        read_ahead::read(&received)
    };
    hide(&mounted);
    store.changed(|state| {
        let id = state.updates.begin(Done::new(drop));
        store.take_named(state, Kind::Secrets, &Source::Ads, (received, read), id);
        state.updates.part_done(id);
    });
    store.workers();
    assert_eq!(calls.take(), ["secret aside: tls_certificate", "listener in"]);

    mounted.replace_certificate(&two, &two);
    // It may have been moved before it was watched: it is looked at once more.
    let moved = store.moved();
    let read = {
        let _locked = store.lock();
        moved.read()
    };
    hide(&mounted);
    store.take_read(read);
    assert_eq!(calls.take(), ["secret aside: tls_certificate"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn other_tasks_go_on_while_files_are_read() {
    let (told, other) = std::sync::mpsc::channel();
    let reading = tokio::spawn(async move {
        tokio::spawn(async move { told.send(()) });
        // A file that takes until another task of the same thread has run.
        read_ahead::aside(|| other.recv_timeout(Duration::from_secs(10)))
    });
    assert_eq!(reading.await.unwrap(), Ok(()));
}

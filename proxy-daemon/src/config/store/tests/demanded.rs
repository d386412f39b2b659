//! Names that requests need.

use super::*;
use crate::{
    config::store::demanded::{KEPT, MAX_BYTES, MAX_NAMES},
    on_demand::{self, MAX_NAME, Messages, OnDemand, Wait, Wanted},
};

impl Fixture {
    /// A request asks.
    fn ask(&self, (asking, messages): &mut (OnDemand, Messages), name: &str) -> Wait {
        let wait = asking.ask(Wanted::Cluster { source: Arc::default(), name: name.into() }).expect("there is room");
        self.heed(messages);
        wait
    }

    /// What requests have said is heard.
    fn heed(&self, messages: &mut Messages) {
        self.store.heed(messages.now());
    }
}

fn is_over(wait: &mut Wait) -> bool {
    let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
    std::pin::pin!(wait.over()).poll(&mut cx).is_ready()
}

fn cluster(name: &str) -> Resource {
    resource::<Cluster>(name, &format!("{{ name: '{name}' }}"))
}

fn interest(names: &[&str]) -> Interest {
    Interest::WildcardAnd(names.iter().map(|&name| name.to_owned()).collect())
}

#[tokio::test]
async fn requests_wait_for_a_cluster_until_it_can_be_used() {
    let (store, calls) = running();
    let mut requests = on_demand::channel();
    store.wanted();
    let (mut one, mut two) = (store.ask(&mut requests, "a"), store.ask(&mut requests, "a"));
    let mut other = store.ask(&mut requests, "b");
    assert_eq!(store.wanted().remove(&Cluster::type_url()), Some(interest(&["a", "b"])));
    assert!(!is_over(&mut one) && !is_over(&mut two));

    // It warms first.
    store.update(update(Cluster::type_url(), vec![eds_cluster("a")]));
    assert!(!is_over(&mut one));
    store.update(update(ClusterLoadAssignment::type_url(), vec![assignment("a", &[1])]));
    assert!(calls.take().iter().any(|line| line == "cluster a with 1"));
    assert!(is_over(&mut one) && is_over(&mut two) && !is_over(&mut other));
    assert!(is_over(&mut store.ask(&mut requests, "a")), "it is there");

    // What the server does not have is not asked for any longer, and what it removes may be asked for again.
    let absent = Update { absent: vec!["b".to_owned()], ..update(Cluster::type_url(), Vec::new()) };
    let told = store.update(absent);
    assert!(is_over(&mut other));
    assert_eq!(told.wanted.get(&Cluster::type_url()), Some(&interest(&["a"])));
    let told = store.update(removal(Cluster::type_url(), "a"));
    assert_eq!(told.wanted.get(&Cluster::type_url()), Some(&Interest::Wildcard));
    let mut again = store.ask(&mut requests, "a");
    assert!(!is_over(&mut again));
    store.update(update(Cluster::type_url(), vec![resource::<Cluster>("a", "{ name: a, connect_timeout: 0s }")]));
    assert!(is_over(&mut again), "it was refused");
    assert!(is_over(&mut store.ask(&mut requests, "a")), "what the server has was refused: not waited for");
    let mended = store.update(update(Cluster::type_url(), vec![cluster("a")]));
    assert_eq!(mended.rejected(), []);
    assert!(calls.take().iter().any(|line| line == "cluster a"));
}

#[tokio::test]
async fn names_that_nobody_waits_for_are_forgotten() {
    let (store, _) = running();
    let mut requests = on_demand::channel();
    let kept = store.ask(&mut requests, "kept");
    let had = store.ask(&mut requests, "had");
    store.update(update(Cluster::type_url(), vec![cluster("had")]));
    drop(had);
    for index in 0..MAX_NAMES {
        let name = format!("name-{index}").into();
        drop(requests.0.ask(Wanted::Cluster { source: Arc::default(), name }));
        // All at once, for the sake of time, but not more than there is room for.
        if index % 1000 == 0 {
            store.heed(&mut requests.1);
        }
    }
    store.heed(&mut requests.1);
    let names = |store: &Fixture| match store.wanted().remove(&Cluster::type_url()) {
        Some(Interest::WildcardAnd(names)) => names,
        other => panic!("{other:?}"),
    };
    let wanted = names(&store);
    assert_eq!(wanted.len(), MAX_NAMES);
    assert!(["kept", "had", "name-2"].iter().all(|name| wanted.contains(*name)), "the oldest have gone");
    store.later(KEPT);
    assert_eq!(names(&store), ["had", "kept"].map(str::to_owned).into());
    drop(kept);
    store.heed(&mut requests.1);
    store.later(KEPT * 2);
    assert_eq!(names(&store), ["had".to_owned()].into());
}

#[tokio::test]
async fn the_names_together_fit_into_a_request_that_any_server_takes() {
    let (store, _) = running();
    let mut requests = on_demand::channel();
    let long = |index: usize| format!("{index:0MAX_NAME$}");
    for index in 0..=MAX_BYTES / MAX_NAME {
        drop(requests.0.ask(Wanted::Cluster { source: Arc::default(), name: long(index).into() }));
    }
    store.heed(&mut requests.1);
    let Some(Interest::WildcardAnd(names)) = store.wanted().remove(&Cluster::type_url()) else { panic!("names") };
    assert_eq!(names.len(), MAX_BYTES / MAX_NAME);
    assert!(!names.contains(&long(0)) && names.contains(&long(1)), "the oldest has gone");
}

#[test]
fn sources_of_clusters_are_kept_apart() {
    use culvert_xds_client::source::FileSource;
    let (store, calls) = running();
    let other = Source::File(FileSource { path: "/other".into(), watched_directory: None });
    let mut requests = on_demand::channel();
    let wanted = Wanted::Cluster { source: Arc::new(other.clone()), name: "a".into() };
    let _wait = requests.0.ask(wanted).expect("there is room");
    store.heed(&mut requests.1);
    let bad = resource::<Cluster>("bad", "{ name: bad, connect_timeout: 0s }");
    assert_eq!(store.update(update(Cluster::type_url(), vec![bad, cluster("of-cds")])).rejected().len(), 1);
    let failed = || store.snapshot().of(&Cluster::type_url()).iter().any(|it| it.name == "bad" && it.failure.is_some());
    assert!(failed());
    store.update_from(&other, Update { complete: true, ..update(Cluster::type_url(), vec![cluster("a")]) });
    assert!(failed(), "the answer of another source says nothing of it");
    calls.take();

    store.update_from(&other, removal(Cluster::type_url(), "of-cds"));
    assert_eq!(calls.take(), [""; 0], "it is not that one's");
    // Both have it: it goes with the last.
    store.update(update(Cluster::type_url(), vec![cluster("a")]));
    store.update_from(&other, removal(Cluster::type_url(), "a"));
    assert_eq!(calls.take(), [""; 0]);
    store.update(removal(Cluster::type_url(), "a"));
    assert_eq!(calls.take(), ["no cluster a"]);
}

#[test]
fn a_source_is_told_of_single_names_where_it_is_asked_for_others() {
    use culvert_xds_client::source::FileSource;
    let (store, _) = running();
    store.wanted();
    let told = |source: &Source| {
        let mut wanted = store.wanted.lock().unwrap();
        let changes = std::iter::from_fn(|| wanted.try_recv().ok()).filter(|it| it.source == *source);
        changes.map(|it| it.change).collect::<Vec<_>>()
    };
    let one = |name: &str, wanted| vec![Change::Names(vec![(name.to_owned(), wanted)])];
    let mut requests = on_demand::channel();
    let mut ask = |source: &Source, name: &str| {
        let wanted = Wanted::Cluster { source: Arc::new(source.clone()), name: name.into() };
        let wait = requests.0.ask(wanted).expect("there is room");
        store.heed(&mut requests.1);
        wait
    };
    let absent = |source: &Source, name: &str| {
        let absent = vec![name.to_owned()];
        store.store.update(source, Update { absent, ..update(Cluster::type_url(), Vec::new()) }, Done::new(drop));
    };
    // Where everything is asked for, from the first on.
    let _a = ask(&Source::Ads, "a");
    assert_eq!(told(&Source::Ads), one("a", true));
    absent(&Source::Ads, "a");
    assert_eq!(told(&Source::Ads), one("a", false));
    // Elsewhere from the second on, to the last but one.
    let other = Source::File(FileSource { path: "/other".into(), watched_directory: None });
    let _b = ask(&other, "b");
    assert_eq!(told(&other), [Change::To(Interest::Names(["b".to_owned()].into()))]);
    let _c = ask(&other, "c");
    assert_eq!(told(&other), one("c", true));
    absent(&other, "b");
    assert_eq!(told(&other), one("b", false));
    absent(&other, "c");
    assert_eq!(told(&other), [Change::To(Interest::None)]);
}

#[test]
fn collections_are_asked_for_instead_of_everything() {
    let clusters = "xdstp://a/envoy.config.cluster.v3.Cluster/x/*";
    let listeners = "xdstp://a/envoy.config.listener.v3.Listener/x/*";
    let names = |names: &[&str]| Some(Interest::Names(names.iter().map(|&name| name.to_owned()).collect()));
    let start = StartUp {
        cds: Some(ConfigSource::default()),
        cds_collection: Some(clusters.to_owned()),
        lds: Some(ConfigSource::default()),
        lds_collection: Some(listeners.to_owned()),
        ..StartUp::default()
    };
    let (store, calls) = start_up(start, Vec::new(), Vec::new());
    assert_eq!(store.wanted().remove(&Cluster::type_url()), names(&[clusters]));
    let member = "xdstp://a/envoy.config.cluster.v3.Cluster/x/one";
    let mut told = store.update(update(Cluster::type_url(), vec![cluster(member)]));
    assert_eq!(calls.take(), [format!("cluster {member}")]);
    assert_eq!(told.wanted.remove(&Listener::type_url()), names(&[listeners]));
    // A name on demand stands beside it.
    let mut requests = on_demand::channel();
    let _wait = store.ask(&mut requests, "a");
    assert_eq!(store.wanted().remove(&Cluster::type_url()), names(&["a", clusters]));
    store.update(removal(Cluster::type_url(), member));
    assert_eq!(calls.take(), [format!("no cluster {member}")]);
}

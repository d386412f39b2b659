//! RTDS: before everything else.

use envoy_types::pb::envoy::service::runtime::v3::Runtime;

use super::*;
use crate::config::model::{INITIAL_FETCH_TIMEOUT, ResourceRef};

fn layer(name: &str, values: &str) -> Resource {
    resource::<Runtime>(name, &format!("{{ name: {name}, layer: {values} }}"))
}

/// A store that has asked for the layers `a` and `b`, and has a static cluster and CDS to come.
fn asking() -> (Fixture, Recorder) {
    let wanted = |name: &str| ResourceRef { name: name.into(), from: ConfigSource::default() };
    let need = |name: &str| Need::new(Kind::Runtime, wanted(name));
    let first = vec![need("a"), need("b")];
    let (clusters, _) = static_resources();
    let (store, calls) = start_up(
        StartUp { first, cds: Some(ConfigSource::default()), lds: None, ..StartUp::default() },
        clusters,
        Vec::new(),
    );
    let wanted = Interest::Names(["a".to_owned(), "b".to_owned()].into());
    assert_eq!(store.wanted(), BTreeMap::from([(Runtime::type_url(), wanted)]), "nothing else is asked for");
    assert_eq!(calls.take(), Vec::<String>::new());
    (store, calls)
}

#[test]
fn nothing_else_is_asked_for_until_the_layers_are_there() {
    let (store, calls) = asking();
    let told = store.update(update(Runtime::type_url(), vec![layer("a", "{ x: 1, y: { z: 2 } }")]));
    assert!(told.rejected().is_empty() && told.wanted.is_empty());
    assert_eq!(calls.take(), ["runtime a has 2"]);
    let told = store.update(update(Runtime::type_url(), vec![layer("b", "{}")]));
    assert!(told.rejected().is_empty());
    assert_eq!(names(&told, Cluster::type_url()), ["*"]);
    assert_eq!(names(&told, ClusterLoadAssignment::type_url()), ["users"]);
    assert_eq!(calls.take(), ["runtime b has 0", "cluster xds"]);
    // A layer that changes later changes nothing else, and one that is removed has no values.
    let told = store.update(update(Runtime::type_url(), vec![layer("a", "{ x: 2 }")]));
    assert!(told.rejected().is_empty() && told.wanted.is_empty());
    assert!(store.update(removal(Runtime::type_url(), "a")).rejected().is_empty());
    assert_eq!(calls.take(), ["runtime a has 1", "runtime a has 0"]);
    // The same again, which is news after the removal.
    store.update(update(Runtime::type_url(), vec![layer("a", "{ x: 2 }")]));
    assert_eq!(calls.take(), ["runtime a has 1"]);
}

#[test]
fn a_layer_that_is_refused_or_late_is_not_waited_for() {
    let (store, calls) = asking();
    let told = store.update(update(Runtime::type_url(), vec![layer("a", "{ x: [1] }")]));
    let rejected = told.rejected();
    assert_eq!(rejected[0].name, "a");
    assert_eq!(rejected[0].message, "layer.x: Invalid runtime entry value for x");
    assert!(told.wanted.is_empty(), "the other layer is still to come");
    store.later(INITIAL_FETCH_TIMEOUT);
    assert_eq!(store.wanted().get(&Cluster::type_url()), Some(&Interest::Wildcard));
    assert_eq!(calls.take(), ["cluster xds"]);
    let told = store.update(update(Runtime::type_url(), vec![layer("b", "{ x: 1 }")]));
    assert!(told.rejected().is_empty());
    assert_eq!(calls.take(), ["runtime b has 1"], "late is better than never");
    // Refused later on, it stays as it is.
    assert_eq!(store.update(update(Runtime::type_url(), vec![layer("b", "{ x: null }")])).rejected().len(), 1);
    assert_eq!(calls.take(), Vec::<String>::new());
}

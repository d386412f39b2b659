use http::Request;

use super::*;
use crate::config::parse;

fn scope(name: &str, key: &[&str]) -> Arc<Scope> {
    let key = key.iter().map(|fragment| (*fragment).into()).collect();
    Arc::new(Scope { name: name.into(), key, routes: ScopeRoutes::Named { name: name.into(), on_demand: false } })
}

fn by_header(element_separator: &str, pick: FragmentPick) -> FragmentBuilder {
    let header = MatchedHeader::Name("x-scope".parse().unwrap());
    FragmentBuilder { header, element_separator: element_separator.into(), pick }
}

fn element(separator: &str, key: &str) -> FragmentPick {
    FragmentPick::Element { separator: separator.into(), key: key.into() }
}

fn request(values: &[&str]) -> Parts {
    let mut request = Request::builder().uri("http://shop.example/").method("PUT");
    for value in values {
        request = request.header("x-scope", *value);
    }
    request.body(()).unwrap().into_parts().0
}

#[test]
fn a_fragment_is_picked_as_envoy_picks_it() {
    let first = || by_header("", FragmentPick::Index(0));
    for (builder, values, wanted) in [
        (first(), &["a;b"][..], Some("a;b")),
        (first(), &["a", "b"], Some("a")),
        (first(), &[], None),
        (by_header(";", FragmentPick::Index(1)), &["a;b"], Some("b")),
        (by_header(";", FragmentPick::Index(1)), &["a;"], Some("")),
        (by_header(";", FragmentPick::Index(2)), &["a;b"], None),
        (by_header(";", element("=", "k")), &["j=1;k=2=3;k=4"], Some("2=3")),
        (by_header(";", element("=", "k")), &["j=1; k=2"], None),
        (by_header(";", element("=", "k")), &["k"], Some("")),
        (by_header("", element("=", "k")), &["k=1;j=2"], Some("1;j=2")),
    ] {
        assert_eq!(extract(&builder, &request(values)), wanted, "{builder:?} {values:?}");
    }
    for (header, wanted) in [
        (MatchedHeader::Authority, "shop.example"),
        (MatchedHeader::Method, "PUT"),
        (MatchedHeader::Path, "/"),
        (MatchedHeader::Scheme, "http"),
    ] {
        let builder = FragmentBuilder { header, ..first() };
        assert_eq!(extract(&builder, &request(&[])), Some(wanted));
    }
}

#[test]
fn a_scope_is_found_by_all_of_its_key() {
    let scopes = [scope("ab", &["a", "b"]), scope("a", &["a"]), scope("b", &["b"]), scope("again", &["b"])];
    let table = ScopeTable::new(&scopes, |_| Arc::default());
    let find = |builder: &[FragmentBuilder], value: &str| {
        table.find(builder, &request(&[value])).map(|found| &*table.scopes[found].0.name)
    };
    let part = |index| by_header(",", FragmentPick::Index(index));
    assert_eq!(find(&[part(0)], "a"), Some("a"));
    assert_eq!(find(&[part(0)], "b"), Some("again"), "the last has it");
    assert_eq!(find(&[part(0)], "c"), None);
    assert_eq!(find(&[part(0), part(1)], "a,b"), Some("ab"));
    assert_eq!(find(&[part(0), part(1)], "a"), None, "half a key is none, and not the key of another scope");
    assert_eq!(find(&[part(0), part(1)], "a,c"), None);
}

#[test]
fn a_connection_sees_new_scopes_and_new_routes_of_a_scope() {
    let slot = Arc::<ScopeSlot>::default();
    let config = ScopedRoutes {
        name: "s".into(),
        key_builder: vec![by_header("", FragmentPick::Index(0))],
        scopes: crate::config::model::ScopeSource::Inline([].into()),
    };
    let finder = RouteFinder::new(&Routes::Scoped(Arc::new(config), Arc::clone(&slot)), &Arc::from([]));
    let status = |value: &str| {
        let route = finder.route(&request(&[value]), &MatchCx::default())?;
        Some(route.virtual_host().name.clone())
    };
    assert_eq!(status("a"), None, "nothing is there yet");
    let routes = |host: &str| {
        let yaml = format!(
            "{{ name: r, virtual_hosts: [{{ name: {host}, domains: ['*'], routes: [{{ match: {{ prefix: / }}, \
             direct_response: {{ status: 200 }} }}] }}] }}"
        );
        Arc::new(parse::route_config(&culvert_xds_client::json::from_yaml(&yaml).unwrap(), "").unwrap())
    };
    let (a, b) = (Arc::<RouteSlot>::default(), Arc::<RouteSlot>::default());
    slot.set(ScopeTable::new(&[scope("a", &["a"])], |_| Arc::clone(&a)));
    assert_eq!(status("a"), None, "the scope has no routes yet");
    a.set(routes("one"));
    assert_eq!(status("a").as_deref(), Some("one"));
    a.set(routes("two"));
    assert_eq!(status("a").as_deref(), Some("two"));
    b.set(routes("three"));
    slot.set(ScopeTable::new(&[scope("b", &["b"]), scope("a", &["a"])], |scope| {
        Arc::clone(if &*scope.name == "a" { &a } else { &b })
    }));
    assert_eq!((status("a").as_deref(), status("b").as_deref()), (Some("two"), Some("three")));
    slot.set(ScopeTable::new(&[], |_| Arc::default()));
    assert_eq!((status("a"), status("b")), (None, None));
}

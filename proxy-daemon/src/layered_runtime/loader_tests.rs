use std::{
    fs,
    os::unix::fs::symlink,
    time::{Duration, Instant},
};

use envoy_types::pb::google::protobuf::Struct;

use super::{
    super::{Fraction, Key, RuntimeFraction, RuntimeInteger, observe},
    *,
};

fn values(yaml: &str) -> LayerSource {
    let values: Struct = culvert_xds_client::json::from_yaml(yaml).unwrap();
    LayerSource::Static(check_values(&values).unwrap())
}

fn layer(name: &str, source: LayerSource) -> Layer {
    Layer { name: name.to_owned(), source }
}

fn entry(runtime: &Runtime, key: &str) -> Json {
    runtime.to_json()["entries"][key].clone()
}

#[test]
fn later_layers_win_and_the_admin_layer_takes_back() {
    let share = RuntimeFraction { default: Fraction::percent(100), key: Key::optional("share") };
    let limit = RuntimeInteger { default: 7, key: Key::optional("nest.limit") };
    assert!(share.includes(99) && limit.get() == 7, "nothing is loaded yet");
    let layers = vec![
        layer("base", values("{share: {numerator: 0}, nest: {limit: 3, deep: {x: q}}, list: 1}")),
        layer("over", values("{nest.limit: 4}")),
        layer("admin", LayerSource::Admin),
    ];
    let runtime = Runtime::start(layers).unwrap();
    assert!(!share.includes(0));
    assert_eq!(limit.get(), 4);
    assert_eq!(runtime.to_json()["layers"], json!(["base", "over", "admin"]));
    assert_eq!(entry(&runtime, "nest.limit"), json!({ "final_value": "4", "layer_values": ["3", "4", ""] }));
    assert_eq!(entry(&runtime, "nest.deep.x")["final_value"], "q");
    assert_eq!(entry(&runtime, "share")["final_value"], "{\"numerator\":0}");

    runtime.modify([("share", "50"), ("nest.limit", "9"), ("nest.limit", "10"), ("new", "1")]).unwrap();
    assert!(share.includes(49) && !share.includes(50));
    assert_eq!(limit.get(), 9, "of several values the first");
    assert_eq!(stats::gauge("runtime.admin_overrides_active").value(), 1);
    assert_eq!(stats::gauge("runtime.num_keys").value(), 5);
    assert_eq!(stats::gauge("runtime.num_layers").value(), 3);
    // A value of another type is none: the default, and not the layer below.
    runtime.modify([("nest.limit", "many")]).unwrap();
    assert_eq!(limit.get(), 7);
    assert!(matches!(runtime.modify([("nest.limit", "5"), ("share", "a: [")]), Err(ModifyError::Invalid(_))));
    assert_eq!(limit.get(), 7, "all or nothing");
    runtime.modify([("share", ""), ("nest.limit", ""), ("new", "")]).unwrap();
    assert!(!share.includes(0) && limit.get() == 4);
    assert_eq!(stats::gauge("runtime.admin_overrides_active").value(), 0);
    assert_eq!(Key::new("nest.limit").integer(), Some(4), "a key that is asked for later");
    assert_eq!(stats::counter("runtime.load_success").value(), 5);
}

#[test]
fn without_an_admin_layer_nothing_is_modified() {
    let runtime = Runtime::start(Vec::new()).unwrap();
    assert_eq!(runtime.modify([("a", "1")]).unwrap_err().to_string(), "No admin layer specified");
    assert_eq!(runtime.to_json(), json!({ "layers": [], "entries": {} }));
}

#[test]
fn the_control_planes_values_are_a_layer_of_their_own() {
    let wanted = |name: &str| ResourceRef { name: name.into(), from: Default::default() };
    let layers = vec![
        layer("base", values("{k: 1}")),
        layer("rtds", LayerSource::Rtds(wanted("r"))),
        layer("other", LayerSource::Rtds(wanted("o"))),
    ];
    let runtime = Runtime::start(layers).unwrap();
    assert_eq!(runtime.rtds().map(|wanted| &*wanted.name).collect::<Vec<_>>(), ["r", "o"]);
    let limit = Key::new("k");
    let given = |yaml: &str| check_values(&culvert_xds_client::json::from_yaml(yaml).unwrap()).unwrap();
    runtime.set_rtds(&Source::Ads, "r", given("{k: 2}"));
    assert_eq!((limit.integer(), limit.double()), (Some(2), Some(2.0)));
    runtime.set_rtds(&Source::Ads, "r", given("{k: 2.5}"));
    assert_eq!(limit.double(), Some(2.5));
    runtime.set_rtds(&Source::Ads, "r", given("{k: {numerator: 2}}"));
    assert_eq!(limit.double(), None);
    runtime.set_rtds(&Source::Ads, "r", given("{k: 2}"));
    assert_eq!(entry(&runtime, "k")["layer_values"], json!(["1", "2", ""]));
    runtime.set_rtds(&Source::Ads, "r", HashMap::new());
    assert_eq!(limit.integer(), Some(1));
}

#[test]
fn lists_and_nulls_are_no_values() {
    let bad = |yaml: &str| check_values(&culvert_xds_client::json::from_yaml(yaml).unwrap()).unwrap_err();
    assert_eq!(bad("{a: {b: [1]}}"), "a.b");
    assert_eq!(bad("{a: null}"), "a");
}

#[test]
fn observers_see_both_sides_until_they_have_enough() {
    let (sender, seen) = std::sync::mpsc::channel();
    observe(move |before, after| {
        let show = |values: &Values| values.get("o").map(|entry| entry.raw.clone());
        sender.send((show(before), show(after))).unwrap();
        after.get("o").is_none_or(|entry| entry.raw != "2")
    });
    let runtime = Runtime::start(vec![layer("admin", LayerSource::Admin)]).unwrap();
    for value in ["1", "2", "3"] {
        runtime.modify([("o", value)]).unwrap();
    }
    let seen: Vec<_> = seen.try_iter().collect();
    let some = |text: &str| Some(text.to_owned());
    assert_eq!(seen, [(None, None), (None, None), (None, some("1")), (some("1"), some("2"))]);
}

#[test]
fn a_swapped_link_is_read_again_and_files_below_are_not_watched() {
    let directory = tempfile::tempdir().unwrap();
    let at = |path: &str| directory.path().join(path);
    for (file, content) in [
        ("v1/app/a/limit", "1\n"),
        ("v1/app/text", "# no value\nhello  \n"),
        ("v2/app/a/limit", "2"),
        ("v3/app/x", "b: ["),
    ] {
        fs::create_dir_all(at(file).parent().unwrap()).unwrap();
        fs::write(at(file), content).unwrap();
    }
    symlink("v1", at("current")).unwrap();
    let disk = |subdirectory: &str| {
        LayerSource::Disk(DiskLayer { symlink_root: at("current"), subdirectory: subdirectory.into() })
    };
    let layers = vec![layer("disk", disk("app")), layer("none", disk("other"))];
    let limit = Key::new("a.limit");
    let runtime = Runtime::start(layers).unwrap();
    assert_eq!(limit.integer(), Some(1));
    assert_eq!(runtime.to_json()["layers"], json!(["disk"]), "a directory that is not there is no layer");
    assert_eq!(entry(&runtime, "text")["final_value"], "hello");

    let swap = |to: &str| {
        symlink(to, at("new")).unwrap();
        fs::rename(at("new"), at("current")).unwrap();
    };
    let loads = || stats::counter("runtime.load_success").value() + stats::counter("runtime.load_error").value();
    let wait = |reached: &dyn Fn() -> bool| {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !reached() {
            assert!(Instant::now() < deadline, "the swap was not noticed");
            std::thread::yield_now();
        }
    };
    // Neither this nor a move of something else is a reason to load.
    fs::write(at("v1/app/a/limit"), "7").unwrap();
    fs::rename(at("v1/app/text"), at("text")).unwrap();
    swap("v2");
    wait(&|| loads() >= 3);
    assert_eq!((loads(), limit.integer()), (3, Some(2)));
    // A file that is no value takes its layer out.
    swap("v3");
    wait(&|| loads() >= 4);
    assert_eq!(limit.integer(), None);
    assert_eq!(stats::counter("runtime.load_error").value(), 1);
    assert_eq!(runtime.to_json()["layers"], json!([]));
}

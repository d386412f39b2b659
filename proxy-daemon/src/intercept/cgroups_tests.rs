use std::time::Duration;

use super::*;

#[test]
fn patterns_find_directories_and_where_more_may_appear() {
    let root = tempfile::tempdir().unwrap();
    for name in ["a/x-1", "a/x-2", "b/x-3/y", "b/z"] {
        fs::create_dir_all(root.path().join(name)).unwrap();
    }
    fs::write(root.path().join("a/x-file"), "").unwrap();
    let found = |pattern: &str| {
        let (mut parents, mut found) = (Vec::new(), Vec::new());
        expand(&root.path().join(pattern), &mut parents, &mut found);
        // None is a cgroup.
        assert!(parents.is_empty());
        let strip = |path: PathBuf| path.strip_prefix(root.path()).unwrap().display().to_string();
        let mut found: Vec<_> = found.into_iter().map(strip).collect();
        found.sort();
        found
    };
    assert_eq!(found("a/x-*"), ["a/x-1", "a/x-2"]);
    assert_eq!(found("?/x-*"), ["a/x-1", "a/x-2", "b/x-3"]);
    assert_eq!(found("b/*/y"), ["b/x-3/y"]);
    assert_eq!(found("b/z"), ["b/z"]);
    assert!(found("c/*").is_empty());
}

/// Where cgroup v2 is mounted.
fn root() -> PathBuf {
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    let mut fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    PathBuf::from(fields.find(|fields| fields[2] == "cgroup2").expect("cgroup v2 is mounted")[1])
}

#[test]
fn a_cgroup_has_no_faults_of_its_neighbours() {
    let mut hooks = Hooks {
        role: Role::Host,
        patterns: Vec::new(),
        pins: PathBuf::from("/pins"),
        attached: HashMap::new(),
        faults: BTreeMap::new(),
    };
    assert!(!hooks.has_faults());
    for path in ["/cgroup/app2", "/cgroup/app/child", "/pins"] {
        hooks.faults.insert(PathBuf::from(path), format!("host.cgroups {path}: refused"));
    }
    assert!(hooks.has_faults() && hooks.faults().count() == 3);
    assert_eq!(hooks.fault_of(Path::new("/cgroup/app")), None);
    assert_eq!(hooks.fault_of(Path::new("/cgroup/app/child/")).unwrap(), "host.cgroups /cgroup/app/child: refused");
}

#[test]
fn cgroups_are_watched_where_more_may_appear() {
    let root = root();
    let (mut parents, mut found) = (Vec::new(), Vec::new());
    expand(&root.join("no-such-slice/*.service"), &mut parents, &mut found);
    assert!(found.is_empty());
    assert_eq!(parents.last(), Some(&root));
}

#[test]
fn a_directory_that_went_and_came_again_is_watched_anew() {
    const DEADLINE: Duration = Duration::from_secs(10);
    struct Slice(PathBuf);
    impl Drop for Slice {
        fn drop(&mut self) {
            let _ = fs::remove_dir(self.0.join("inner"));
            let _ = fs::remove_dir(&self.0);
        }
    }
    let (sender, events) = mpsc::channel();
    let watcher = notify::recommended_watcher(move |event| {
        let _ = sender.send(event);
    });
    let mut watches = Watches { watcher: watcher.unwrap(), known: HashMap::new() };
    let slice = Slice(root().join(format!("culvert-watches-{}", std::process::id())));
    fs::create_dir(&slice.0).unwrap();
    assert!(watches.set(vec![slice.0.clone()]));
    assert!(!watches.set(vec![slice.0.clone()]), "it is watched");

    // Both before anybody looks.
    fs::remove_dir(&slice.0).unwrap();
    fs::create_dir(&slice.0).unwrap();
    assert!(watches.set(vec![slice.0.clone()]), "by the number");
    watches.forget(&slice.0);
    assert!(watches.set(vec![slice.0.clone()]), "because something said so");

    fs::create_dir(slice.0.join("inner")).unwrap();
    let appeared = |event: notify::Result<notify::Event>| matches!(Event::of(event), Some(Event::Changed));
    while !appeared(events.recv_timeout(DEADLINE).expect("what appears is told")) {}
    // A look at it is no reason to look.
    fs::read_dir(&slice.0).unwrap().for_each(drop);
    fs::remove_dir(slice.0.join("inner")).unwrap();
    let next = loop {
        if let Some(event) = Event::of(events.recv_timeout(DEADLINE).expect("the removal is told")) {
            break event;
        }
    };
    assert!(matches!(next, Event::Gone(_)));
}

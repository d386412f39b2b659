use std::fs;

use tokio::sync::watch;

use super::*;
use crate::registry::{self, Cluster, ClusterInfo, Registry};

const DEADLINE: Duration = Duration::from_secs(20);

struct Watched {
    directory: tempfile::TempDir,
    registry: watch::Receiver<Arc<Registry>>,
}

fn service(name: &str, port: u32) -> String {
    format!("{{apiVersion: v1, kind: Service, metadata: {{name: {name}}}, spec: {{ports: [{{port: {port}}}]}}}}\n")
}

impl Watched {
    async fn start(files: &[(&str, &str)]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(directory.path().join(name), text).unwrap();
        }
        let info = ClusterInfo { name: "east".into(), ..Default::default() };
        let (mut handles, registry) = registry::start(vec![info]);
        let source = Directory::new(directory.path());
        tokio::spawn(source.run(handles.remove(0)));
        let mut watched = Self { directory, registry };
        watched.until("the first report", |cluster| cluster.objects.is_some()).await;
        watched
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    async fn until(&mut self, what: &str, holds: impl Fn(&Cluster) -> bool) {
        let reached = self.registry.wait_for(|registry| holds(&registry.clusters[0]));
        let reached = tokio::time::timeout(DEADLINE, reached).await.map(|reached| reached.is_ok());
        assert!(reached == Ok(true), "not reached: {what}: {:?}", self.registry.borrow().clusters[0]);
    }

    async fn until_services(&mut self, expected: &[&str]) {
        self.until(&format!("{expected:?}"), |cluster| services(cluster) == expected).await;
    }
}

fn services(cluster: &Cluster) -> Vec<&str> {
    cluster.objects.iter().flat_map(|objects| objects.services.keys()).map(|key| &*key.name).collect()
}

fn first_port(cluster: &Cluster, service: &str) -> Option<u16> {
    let objects = cluster.objects.as_ref()?;
    Some(objects.services.get(&ObjectKey::new("default", service))?.ports[0].port)
}

#[tokio::test(flavor = "multi_thread")]
async fn files_come_change_and_go() {
    let mut watched = Watched::start(&[("a.yaml", &service("a", 80))]).await;
    watched.until_services(&["a"]).await;
    fs::write(watched.path("b.yml"), service("b", 80)).unwrap();
    watched.until_services(&["a", "b"]).await;
    fs::write(watched.path("a.yaml"), service("c", 80)).unwrap();
    watched.until_services(&["b", "c"]).await;
    // The atomic way: write beside, rename over.
    fs::write(watched.path(".a.yaml.tmp"), service("d", 80)).unwrap();
    fs::rename(watched.path(".a.yaml.tmp"), watched.path("a.yaml")).unwrap();
    watched.until_services(&["b", "d"]).await;
    fs::rename(watched.path("a.yaml"), watched.path("a.yaml.bak")).unwrap();
    watched.until_services(&["b"]).await;
    fs::remove_file(watched.path("b.yml")).unwrap();
    watched.until_services(&[]).await;
    fs::write(watched.path("b.json"), service("e", 80)).unwrap();
    watched.until_services(&["e"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn temporary_files_are_not_manifests() {
    let broken = "a: [";
    let files = [
        (".hidden.yaml", broken),
        ("a.yaml~", broken),
        ("#a.yaml#", broken),
        (".a.yaml.swp", broken),
        ("4913", broken),
    ];
    let mut watched = Watched::start(&files).await;
    fs::create_dir(watched.path("directory.yaml")).unwrap();
    fs::write(watched.path("a.yaml"), service("a", 80)).unwrap();
    watched.until_services(&["a"]).await;
    let registry = watched.registry.borrow().clone();
    let errors: Vec<_> = registry.clusters[0].health.file_errors.iter().map(|error| &*error.error).collect();
    assert_eq!(errors, ["not a regular file"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_edit_keeps_the_last_good_version_of_its_file_alone() {
    let mut watched = Watched::start(&[("a.yaml", &service("a", 80)), ("b.yaml", &service("b", 80))]).await;
    fs::write(watched.path("a.yaml"), service("a", 70000)).unwrap();
    watched.until("the error", |cluster| !cluster.health.file_errors.is_empty()).await;
    // Other files still count.
    fs::write(watched.path("b.yaml"), service("b", 81)).unwrap();
    watched.until("the edit of b", |cluster| first_port(cluster, "b") == Some(81)).await;
    let registry = watched.registry.borrow().clone();
    let cluster = &registry.clusters[0];
    assert_eq!(first_port(cluster, "a"), Some(80));
    let [error] = &*cluster.health.file_errors else { panic!("one error expected: {:?}", cluster.health) };
    assert!(error.file.ends_with("a.yaml") && error.last_good_in_force, "{error:?}");
    assert_eq!(error.error, "Service default/a: spec.ports[0].port: port 70000 is out of range, 1 to 65535 are valid");
    fs::write(watched.path("a.yaml"), service("a", 82)).unwrap();
    watched.until("a to be mended", |cluster| first_port(cluster, "a") == Some(82)).await;
    assert_eq!(watched.registry.borrow().clusters[0].health.file_errors, []);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_file_from_the_start_is_not_in_force() {
    let mut watched = Watched::start(&[("a.yaml", "\u{0}"), ("b.yaml", &service("b", 80))]).await;
    watched.until_services(&["b"]).await;
    let registry = watched.registry.borrow().clone();
    assert!(!registry.clusters[0].health.file_errors[0].last_good_in_force);
    fs::remove_file(watched.path("a.yaml")).unwrap();
    watched.until("the error to go", |cluster| cluster.health.file_errors.is_empty()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_an_object_in_two_files_the_last_one_counts() {
    let mut watched = Watched::start(&[("a.yaml", &service("a", 80)), ("b.yaml", &service("a", 81))]).await;
    watched.until("b to count", |cluster| first_port(cluster, "a") == Some(81)).await;
    let registry = watched.registry.borrow().clone();
    let [warning] = &*registry.clusters[0].health.warnings else { panic!("one warning expected") };
    assert!(warning.contains("Service default/a is in several files") && warning.contains("b.yaml"), "{warning}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_that_goes_away_leaves_its_objects_and_is_found_again() {
    let mut watched = Watched::start(&[("a.yaml", &service("a", 80))]).await;
    let aside = tempfile::tempdir().unwrap();
    let moved = aside.path().join("moved");
    fs::rename(watched.directory.path(), &moved).unwrap();
    watched.until("stale", |cluster| cluster.health.stale).await;
    assert_eq!(services(&watched.registry.borrow().clusters[0]), ["a"]);
    fs::create_dir(watched.directory.path()).unwrap();
    fs::write(watched.path("b.yaml"), service("b", 80)).unwrap();
    watched.until_services(&["b"]).await;
    assert!(!watched.registry.borrow().clusters[0].health.stale);
    // And the new directory is watched.
    fs::write(watched.path("c.yaml"), service("c", 80)).unwrap();
    watched.until_services(&["b", "c"]).await;
}

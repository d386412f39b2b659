use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    sync::atomic::Ordering::Relaxed,
};

use envoy_types::pb::envoy::service::discovery::v3::DiscoveryResponse;
use prost::Message as _;

use tempfile::TempDir;

use super::*;
use crate::{
    ads::{Interest, type_url::CLUSTER},
    json,
    test_sink::{Notes, clusters, wait},
};

struct Running {
    notes: Arc<Notes>,
    stats: Arc<ClientStats>,
    interests: Interests,
    task: tokio::task::AbortHandle,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A client of all clusters in a file.
fn start(path: PathBuf, watched_directory: Option<PathBuf>) -> Running {
    start_with(path, watched_directory, UnknownFields::Ignore)
}

fn start_with(path: PathBuf, watched_directory: Option<PathBuf>, unknown: UnknownFields) -> Running {
    let notes = Arc::new(Notes::default());
    let file = FileSource { path, watched_directory };
    let client = FileClient::new(file, CLUSTER, (Node::default(), unknown), Arc::clone(&notes), Arc::default());
    let (stats, interests) = (client.stats(), client.interests());
    interests.set(CLUSTER, Interest::Wildcard);
    Running { notes, stats, interests, task: tokio::spawn(client.run()).abort_handle() }
}

/// Writes a file beside and moves it to its place.
fn replace(path: &Path, content: impl AsRef<[u8]>) {
    let beside = path.with_extension("new");
    fs::write(&beside, content).unwrap();
    fs::rename(beside, path).unwrap();
}

#[tokio::test]
async fn a_file_is_read_and_read_again_when_it_is_replaced() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("cds.yaml");
    fs::write(&path, clusters("1", &["a", "b"])).unwrap();
    let running = start(path.clone(), None);
    running.notes.expect(&["+a,b -"]).await;
    replace(&path, clusters("2", &["b", "c"]));
    wait(|| running.notes.all().len() == 2).await;
    let last = running.notes.all().pop().unwrap();
    assert!(last.contains('c') && last.ends_with("-a"), "{last}");
    let counts = running.stats.of(CLUSTER);
    wait(|| counts.update_success.load(Relaxed) == 2).await;
    assert_eq!(counts.version(), "2");
}

#[tokio::test]
async fn a_bad_file_is_counted_and_changes_nothing() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("cds.json");
    fs::write(&path, clusters("1", &["a"])).unwrap();
    let running = start(path.clone(), None);
    running.notes.expect(&["+a -"]).await;
    let counts = running.stats.of(CLUSTER);
    replace(&path, "{\"resources\": [{\"nothing\": 1}");
    wait(|| counts.update_failure.load(Relaxed) == 1).await;
    replace(&path, clusters("2", &["a", "bad"]));
    wait(|| counts.update_rejected.load(Relaxed) == 1).await;
    assert_eq!((counts.update_success.load(Relaxed), counts.update_attempt.load(Relaxed)), (1, 3));
    assert_eq!(counts.version(), "1");
}

#[tokio::test]
async fn binary_files_are_read_by_their_extension() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("cds.pb");
    let response: DiscoveryResponse = json::from_yaml(&clusters("1", &["a"])).unwrap();
    fs::write(&path, response.encode_to_vec()).unwrap();
    let running = start(path, None);
    running.notes.expect(&["+a -"]).await;
}

/// The way in which Kubernetes updates a ConfigMap: `file -> ..data/file`, `..data -> ..version`, and `..data` is replaced.
#[tokio::test]
async fn a_config_map_is_followed_through_its_links() {
    let directory = TempDir::new().unwrap();
    let at = |name: &str| directory.path().join(name);
    for (version, names) in [("..1", ["a"]), ("..2", ["b"])] {
        fs::create_dir(at(version)).unwrap();
        fs::write(at(version).join("cds.yaml"), clusters(version, &names)).unwrap();
    }
    symlink("..1", at("..data")).unwrap();
    symlink("..data/cds.yaml", at("cds.yaml")).unwrap();
    let running = start(at("cds.yaml"), Some(directory.path().to_owned()));
    running.notes.expect(&["+a -"]).await;
    symlink("..2", at("..data_tmp")).unwrap();
    fs::rename(at("..data_tmp"), at("..data")).unwrap();
    running.notes.expect(&["+a -", "+b -a"]).await;
}

#[tokio::test]
async fn a_write_in_place_is_not_taken_for_a_whole_file() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("cds.yaml");
    fs::write(&path, clusters("1", &["a"])).unwrap();
    let running = start(path.clone(), None);
    running.notes.expect(&["+a -"]).await;
    fs::write(&path, clusters("2", &["b"])).unwrap();
    fs::write(directory.path().join("other"), "").unwrap();
    // Events come in order: when the move is seen, the write has been passed over.
    replace(&path, clusters("3", &["c"]));
    running.notes.expect(&["+a -", "+c -a"]).await;
}

#[tokio::test]
async fn names_that_are_wanted_later_are_found_in_the_same_file() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("cds.yaml");
    fs::write(&path, clusters("1", &["a", "b"])).unwrap();
    let running = start(path, None);
    running.notes.expect(&["+a,b -"]).await;
    running.interests.set(CLUSTER, Interest::Names(["a".to_owned()].into()));
    wait(|| running.notes.all().len() > 1).await;
}

#[tokio::test]
async fn what_is_wrong_with_a_file_has_a_line_until_it_is_mended() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("cds.yaml");
    let unknown = "version_info: '1'\nresources:\n- '@type': type.googleapis.com/envoy.config.cluster.v3.Cluster\n  \
                   name: a\n  nme: a\n";
    fs::write(&path, unknown).unwrap();
    let running = start_with(path.clone(), Some(directory.path().to_owned()), UnknownFields::Reject);
    let counts = running.stats.of(CLUSTER);
    // As Envoy counts it: the file is in order but for a field that nobody knows.
    wait(|| counts.update_rejected.load(Relaxed) == 1).await;
    let fault = counts.fault().unwrap();
    assert!(fault.details.contains("resources[0]") && fault.details.contains("line 5, column 3"), "{fault:?}");
    // Something else is moved: the same fault, which counts and is no news.
    replace(&directory.path().join("other.yaml"), "");
    wait(|| counts.update_rejected.load(Relaxed) == 2).await;
    assert_eq!(counts.fault(), Some(fault.clone()));
    replace(&path, "resources: [");
    wait(|| counts.update_failure.load(Relaxed) == 1).await;
    assert_ne!(counts.fault().unwrap().details, fault.details);
    replace(&path, clusters("2", &["a"]));
    running.notes.expect(&["+a -"]).await;
    assert_eq!(counts.fault(), None);
    // It vanishes, and comes back as it was.
    fs::rename(&path, directory.path().join("away")).unwrap();
    replace(&directory.path().join("other.yaml"), "");
    wait(|| counts.fault().is_some()).await;
    replace(&path, clusters("2", &["a"]));
    wait(|| counts.fault().is_none()).await;
    running.notes.expect(&["+a -"]).await;
}

#[tokio::test]
async fn fields_that_nobody_knows_are_passed_over() {
    static LOG: json::Unknown = json::Unknown::new();
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("cds.yaml");
    fs::write(&path, clusters("1", &["a"]).replacen("\"name\"", "\"no_such\": 1, \"name\"", 1)).unwrap();
    let running = start_with(path.clone(), None, UnknownFields::Warn(&LOG));
    running.notes.expect(&["+a -"]).await;
    assert_eq!(LOG.count(), 1);
    // The same again is the same.
    replace(&path, clusters("2", &["a"]).replacen("\"name\"", "\"no_such\": 1, \"name\"", 1));
    wait(|| running.stats.of(CLUSTER).update_success.load(Relaxed) == 2).await;
    assert_eq!(LOG.count(), 1);
}

#[tokio::test]
async fn a_file_that_is_as_before_is_counted_and_not_applied_again() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("cds.yaml");
    fs::write(&path, clusters("1", &["a", "bad"])).unwrap();
    let running = start(path, Some(directory.path().to_owned()));
    let counts = running.stats.of(CLUSTER);
    wait(|| counts.update_rejected.load(Relaxed) == 1).await;
    replace(&directory.path().join("other.yaml"), "");
    wait(|| counts.update_rejected.load(Relaxed) == 2).await;
    assert_eq!(running.notes.all().len(), 1);
}

#[tokio::test]
async fn a_file_that_is_not_there_yet_is_a_fault_until_it_comes() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("cds.yaml");
    let running = start(path.clone(), None);
    let counts = running.stats.of(CLUSTER);
    wait(|| counts.update_failure.load(Relaxed) == 1).await;
    assert!(counts.fault().unwrap().details.starts_with("cannot read it: "));
    replace(&path, clusters("1", &["a"]));
    running.notes.expect(&["+a -"]).await;
    assert_eq!(counts.fault(), None);
}

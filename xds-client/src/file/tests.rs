use std::{fs, os::unix::fs::symlink, path::PathBuf, sync::atomic::Ordering::Relaxed};

use tempfile::TempDir;

use super::*;
use crate::{
    ads::{Interest, type_url::CLUSTER},
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
    let notes = Arc::new(Notes::default());
    let file = FileSource { path, watched_directory };
    let client = FileClient::new(file, CLUSTER, Node::default(), Arc::clone(&notes), Arc::default());
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
async fn what_is_wrong_with_a_file_has_a_line() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("cds.yaml");
    fs::write(
        &path,
        "version_info: '1'\nresources:\n- '@type': type.googleapis.com/envoy.config.cluster.v3.Cluster\n  nme: a\n",
    )
    .unwrap();
    let error = read(&path).await.unwrap_err().to_string();
    assert!(error.contains("resources[0]") && error.contains("line 4, column 3"), "{error}");
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

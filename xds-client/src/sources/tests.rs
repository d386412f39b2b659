//! Clients come and go with what is wanted.

use std::{
    fs,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
};

use tempfile::TempDir;
use tokio::task::JoinHandle;

use super::*;
use crate::{
    ads::{Done, Outcome, Update, type_url::CLUSTER},
    source::FileSource,
    test_sink::{clusters, wait},
};

/// Counts what it gets, and panics of the first few.
#[derive(Default)]
struct Counting {
    panics: usize,
    updates: AtomicUsize,
    lost: AtomicUsize,
}

impl Sink for Counting {
    fn update(&self, _: &Source, _: Update, done: Done) {
        assert!(self.updates.fetch_add(1, Relaxed) >= self.panics, "as the test wants it");
        done.finish(Outcome::default());
    }

    fn state(&self, _: &Source, connected: bool) {
        self.lost.fetch_add(usize::from(!connected), Relaxed);
    }
}

struct Fixture {
    sink: Arc<Counting>,
    stats: Arc<SourceStats>,
    subscriptions: Subscriptions,
    source: Source,
    task: JoinHandle<Infallible>,
    _directory: TempDir,
}

impl Drop for Fixture {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A file with a cluster, and nobody who wants it yet.
fn fixture(panics: usize) -> Fixture {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("cds.yaml");
    fs::write(&path, clusters("1", &["a"])).unwrap();
    let source = Source::File(FileSource { path, watched_directory: None });
    let (subscriptions, wanted) = Subscriptions::channel();
    let sink = Arc::new(Counting { panics, ..Counting::default() });
    let stats = Arc::new(SourceStats::default());
    let task = tokio::spawn(run(Config::default(), Arc::clone(&sink), wanted, Arc::clone(&stats)));
    Fixture { sink, stats, subscriptions, source, task, _directory: directory }
}

#[tokio::test]
async fn a_client_of_which_nothing_is_wanted_ends_with_its_statistics() {
    let fixture = fixture(0);
    fixture.subscriptions.set(fixture.source.clone(), CLUSTER, Interest::Wildcard);
    wait(|| fixture.sink.updates.load(Relaxed) == 1).await;
    assert_eq!(fixture.stats.clients().len(), 1);
    // The test has it, and those who run.
    assert_eq!(Arc::strong_count(&fixture.sink), 3);
    fixture.subscriptions.set(fixture.source.clone(), CLUSTER, Interest::None);
    wait(|| Arc::strong_count(&fixture.sink) == 2).await;
    assert!(fixture.stats.clients().is_empty());
    // Another time it is had anew.
    fixture.subscriptions.set(fixture.source.clone(), CLUSTER, Interest::Wildcard);
    wait(|| fixture.sink.updates.load(Relaxed) == 2).await;
}

#[tokio::test]
async fn a_client_that_panics_is_lost_and_started_again() {
    let fixture = fixture(1);
    fixture.subscriptions.set(fixture.source.clone(), CLUSTER, Interest::Wildcard);
    wait(|| fixture.sink.updates.load(Relaxed) == 2).await;
    assert_eq!(fixture.sink.lost.load(Relaxed), 1);
    let counts = fixture.stats.of(&fixture.source, CLUSTER).expect("it runs");
    wait(|| counts.update_success.load(Relaxed) == 1).await;
}

//! A sink for tests: rejects resources called "bad", and keeps notes.

use std::{
    sync::Mutex,
    time::{Duration, Instant},
};

use envoy_types::pb::envoy::config::cluster::v3::Cluster;

use crate::{
    ads::{Counted, Done, Outcome, Rejection, Sink, Update},
    json,
    source::Source,
};

/// How long a test waits for what must happen.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Default)]
pub(crate) struct Notes(Mutex<Vec<String>>, Mutex<Vec<String>>);

impl Notes {
    /// Everything so far.
    pub(crate) fn all(&self) -> Vec<String> {
        self.0.lock().unwrap().clone()
    }

    /// What only counts, so far.
    pub(crate) fn counted(&self) -> Vec<String> {
        self.1.lock().unwrap().clone()
    }

    /// Waits until there are as many notes as `expected`, which must be these.
    pub(crate) async fn expect(&self, expected: &[&str]) {
        wait(|| self.all().len() >= expected.len()).await;
        assert_eq!(self.all(), expected);
    }
}

impl Sink for Notes {
    fn update(&self, _: &Source, update: Update, done: Done) {
        let mut names: Vec<String> = update.added.iter().map(|resource| resource.name.clone()).collect();
        names.extend(update.unchanged.iter().map(|name| format!("={name}")));
        self.0.lock().unwrap().push(format!("+{} -{}", names.join(","), update.removed.join(",")));
        let bad = names.into_iter().filter(|name| name == "bad");
        let rejected = bad.map(|name| Rejection { name, message: "no".to_owned() }).collect();
        done.finish(Outcome { rejected });
    }

    fn counted(&self, _: &Source, _: &str, answer: Counted) {
        self.1.lock().unwrap().push(format!("{answer:?}"));
    }

    fn failed(&self, _: &Source, _: Option<&str>) {
        self.1.lock().unwrap().push("failed".to_owned());
    }

    fn state(&self, _: &Source, connected: bool) {
        self.0.lock().unwrap().push(format!("connected {connected}"));
    }
}

/// Waits until a condition holds.
pub(crate) async fn wait(holds: impl Fn() -> bool) {
    let started = Instant::now();
    while !holds() {
        assert!(started.elapsed() < PATIENCE, "it does not come to pass");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// A response with clusters of these names, as JSON.
pub(crate) fn clusters(version: &str, names: &[&str]) -> String {
    let cluster =
        |name: &&str| json::any_to_json(&json::pack(&Cluster { name: (*name).to_owned(), ..Default::default() }));
    let resources: Vec<_> = names.iter().map(cluster).collect();
    serde_json::json!({ "version_info": version, "resources": resources }).to_string()
}

//! Pods as Kubernetes tells of them.

use std::fs;
use std::path::PathBuf;

use culvert_proxy_daemon::intercept::{Enrolment, Interception, InterceptionConfig, PodStatus, Policy, Selector};

use super::Lab;

/// A directory of manifests, and a configuration that enrols the pods in it that have the label `mesh: on`.
pub struct Manifests {
    /// Where they are.
    pub directory: PathBuf,
}

impl Manifests {
    /// An empty one.
    pub fn new(lab: &Lab) -> Self {
        let directory = lab.state_path().parent().expect("a directory").join("pods");
        fs::create_dir_all(&directory).expect("a directory");
        Self { directory }
    }

    /// A configuration that goes by it.
    pub fn config(&self, lab: &Lab) -> InterceptionConfig {
        let match_labels = [("mesh".to_owned(), "on".to_owned())].into();
        let enrolment = Enrolment {
            pod_manifests: self.directory.clone(),
            kubernetes: None,
            node_name: String::new(),
            selectors: vec![Selector { match_labels, policy: Policy::default(), ..Selector::default() }],
        };
        InterceptionConfig { pods: Vec::new(), enrolment: Some(enrolment), ..lab.config() }
    }

    /// Writes a pod; the file changes in one step.
    pub fn write(&self, name: &str, mesh: &str, address: &str, more: &str) {
        let text = format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, uid: u-{name}, labels: {{mesh: '{mesh}'}}{more}}}\n\
             status: {{phase: Running, podIP: '{address}'}}\n"
        );
        let beside = self.directory.join(format!(".{name}"));
        fs::write(&beside, text).expect("write");
        fs::rename(beside, self.directory.join(format!("{name}.yaml"))).expect("rename");
    }

    /// Removes a pod.
    pub fn remove(&self, name: &str) {
        fs::remove_file(self.directory.join(format!("{name}.yaml"))).expect("remove");
    }
}

/// What is known of a pod.
pub fn pod(interception: &Interception, name: &str) -> Option<PodStatus> {
    interception.pods().into_iter().find(|pod| pod.name == name)
}

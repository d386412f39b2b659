//! Pods and cgroups that were enrolled by command, and the files in which they outlive a restart.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use culvert_proxy_ebpf::Acceleration;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::config::{FailurePolicy, Policy, Traffic};
use super::pods::{Known, Origin, acceleration_name, acceleration_of_name};

/// A pod that was enrolled by command.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Commanded {
    /// What it is called.
    pub(super) name: String,
    pub(super) addresses: Vec<IpAddr>,
    direction: String,
    failure_policy: String,
    /// Missing in files of earlier versions.
    #[serde(default = "shortcut")]
    acceleration: String,
    /// The interface that it had then: who has its address on another one is another pod.
    pub(super) interface: u32,
}

fn shortcut() -> String {
    acceleration_name(Acceleration::default()).to_owned()
}

impl Commanded {
    pub(super) fn new(name: String, addresses: Vec<IpAddr>, policy: Policy, interface: u32) -> Self {
        let (direction, failure_policy) = (policy.traffic.name().to_owned(), policy.failure_policy.name().to_owned());
        let acceleration = acceleration_name(policy.acceleration).to_owned();
        Self { name, addresses, direction, failure_policy, acceleration, interface }
    }

    /// What is done with its connections.
    pub(super) fn policy(&self) -> Option<Policy> {
        Some(Policy {
            failure_policy: FailurePolicy::of_name(&self.failure_policy)?,
            traffic: Traffic::of_name(&self.direction)?,
            acceleration: acceleration_of_name(&self.acceleration)?,
        })
    }

    /// As all pods are known.
    pub(super) fn known(&self) -> Known {
        Known {
            name: self.name.clone(),
            identity: format!("command {} {}", self.name, self.interface),
            origin: Origin::Command,
            addresses: self.addresses.clone(),
            wanted: self.policy().ok_or_else(|| "its policy is not known".to_owned()),
            leaving: false,
            version: 0,
            interface: Some(self.interface),
        }
    }
}

/// Reads the file; none is an empty one.
pub(super) fn read(path: &Path) -> Result<Vec<Commanded>, String> {
    let pods: Vec<Commanded> = read_list(path)?;
    match pods.iter().find(|pod| pod.policy().is_none()) {
        Some(pod) => Err(format!("{}: its direction, failure_policy or acceleration is unknown", pod.name)),
        None => Ok(pods),
    }
}

fn read_list<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>, String> {
    match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        text => serde_json::from_slice(&text.map_err(|error| error.to_string())?).map_err(|error| error.to_string()),
    }
}

/// The file of the cgroups, beside that of the pods: earlier releases, which an upgrade may be taken back to, know only pods.
pub(super) fn path_of_cgroups(path: &Path) -> PathBuf {
    path.with_extension("cgroups.json")
}

/// Reads the cgroups beside the file; none is an empty list.
pub(super) fn read_cgroups(path: &Path) -> Result<Vec<PathBuf>, String> {
    read_list(&path_of_cgroups(path))
}

/// Writes the cgroups beside the file.
pub(super) fn write_cgroups(path: &Path, cgroups: &[PathBuf]) -> io::Result<()> {
    write_list(&path_of_cgroups(path), cgroups)
}

/// Writes the file in one step.
pub(super) fn write(path: &Path, pods: &[Commanded]) -> io::Result<()> {
    write_list(path, pods)
}

fn write_list<T: Serialize>(path: &Path, list: &[T]) -> io::Result<()> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    let beside = path.with_extension("new");
    fs::write(&beside, serde_json::to_vec_pretty(list)?)?;
    fs::rename(&beside, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_enrolled_is_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state/enrolled.json");
        assert_eq!(read(&path), Ok(Vec::new()));
        let acceleration = Acceleration::Off;
        let policy = Policy { failure_policy: FailurePolicy::Closed, traffic: Traffic::Both, acceleration };
        let pods = vec![Commanded::new("a".to_owned(), vec!["10.0.0.1".parse().unwrap()], policy, 7)];
        write(&path, &pods).unwrap();
        assert_eq!(read(&path), Ok(pods.clone()));
        assert_eq!(pods[0].known().wanted, Ok(policy));
        let cgroups = vec![PathBuf::from("/sys/fs/cgroup/shop.slice")];
        assert_eq!(read_cgroups(&path), Ok(Vec::new()));
        write_cgroups(&path, &cgroups).unwrap();
        assert_eq!((read_cgroups(&path), read(&path)), (Ok(cgroups), Ok(pods)));
    }

    #[test]
    fn a_file_that_is_not_understood_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("enrolled.json");
        for text in [
            "{",
            "[{\"name\": 1}]",
            "[{\"name\":\"a\",\"addresses\":[],\"direction\":\"up\",\"failure_policy\":\"open\",\"interface\":1}]",
        ] {
            fs::write(&path, text).unwrap();
            assert!(read(&path).is_err(), "{text}");
        }
    }
}

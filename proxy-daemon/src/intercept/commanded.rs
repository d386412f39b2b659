//! Pods that were enrolled by command, and the file in which they outlive a restart.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::Path;

use culvert_proxy_ebpf::Acceleration;
use serde::{Deserialize, Serialize};

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

    fn policy(&self) -> Option<Policy> {
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
    let text = match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        text => text.map_err(|error| error.to_string())?,
    };
    let pods: Vec<Commanded> = serde_json::from_slice(&text).map_err(|error| error.to_string())?;
    match pods.iter().find(|pod| pod.policy().is_none()) {
        Some(pod) => Err(format!("{}: its direction, failure_policy or acceleration is unknown", pod.name)),
        None => Ok(pods),
    }
}

/// Writes the file in one step.
pub(super) fn write(path: &Path, pods: &[Commanded]) -> io::Result<()> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    let beside = path.with_extension("new");
    fs::write(&beside, serde_json::to_vec_pretty(pods)?)?;
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

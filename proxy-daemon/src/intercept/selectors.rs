//! Which pods are enrolled by what Kubernetes says of them.

use std::collections::BTreeMap;
use std::path::PathBuf;

use culvert_xds_client::api::culvert::extensions::bootstrap::interception::v1::interception::{
    Enrolment as Message, enrolment as message,
};

use culvert_kube_api::KubernetesConfig;

use super::config::{FieldError, Policy, absolute, at};

/// Where pods are read from, and which of them are enrolled.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Enrolment {
    /// A directory of manifests; empty where `kubernetes` is.
    pub pod_manifests: PathBuf,
    /// An API server.
    pub kubernetes: Option<KubernetesConfig>,
    /// Only pods of this node; empty: all that the manifests have.
    pub node_name: String,
    /// The first that matches a pod counts.
    pub selectors: Vec<Selector>,
}

/// Pods that it matches are enrolled.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selector {
    /// Names of namespaces; empty: any.
    pub namespaces: Vec<String>,
    /// Labels that a pod must have.
    pub match_labels: BTreeMap<String, String>,
    /// What is done with the pods' connections.
    pub policy: Policy,
}

impl Enrolment {
    pub(super) fn from_proto(proto: &Message, default: Policy) -> Result<Self, FieldError> {
        let Message { pod_manifests, node_name, selectors, kubernetes } = proto;
        let under = |(field, reason): FieldError| (format!("enrolment.{field}"), reason);
        let kubernetes = kubernetes.as_ref().map(api_server).transpose().map_err(under)?;
        let pod_manifests = match (&kubernetes, pod_manifests.is_empty()) {
            (Some(_), true) => PathBuf::new(),
            (Some(_), false) => {
                return Err(under(("pod_manifests".to_owned(), "is not possible beside `kubernetes`".to_owned())));
            }
            (None, _) => absolute(pod_manifests).map_err(|reason| under(("pod_manifests".to_owned(), reason)))?,
        };
        if selectors.is_empty() {
            return Err(under(("selectors".to_owned(), "without a selector no pod is enrolled".to_owned())));
        }
        let read = |(index, selector): (usize, &message::Selector)| {
            let message::Selector { namespaces, match_labels, failure_policy, direction, acceleration } = selector;
            if namespaces.iter().any(String::is_empty) || match_labels.keys().any(String::is_empty) {
                return Err(at("selectors", index, "a namespace or a label has no name"));
            }
            Ok(Selector {
                namespaces: namespaces.clone(),
                match_labels: match_labels.iter().map(|(key, value)| (key.clone(), value.clone())).collect(),
                policy: default.overridden(
                    *failure_policy,
                    *direction,
                    *acceleration,
                    &format!("selectors[{index}]"),
                )?,
            })
        };
        let selectors = selectors.iter().enumerate().map(read).collect::<Result<_, _>>().map_err(under)?;
        Ok(Self { pod_manifests, kubernetes, node_name: node_name.clone(), selectors })
    }

    /// What is done with the connections of a pod with these labels, if it is to be enrolled.
    pub(super) fn policy_of(&self, namespace: &str, labels: &BTreeMap<String, String>) -> Option<Policy> {
        self.selectors.iter().find(|selector| selector.matches(namespace, labels)).map(|selector| selector.policy)
    }
}

/// Where the API server is, and who the daemon is to it.
fn api_server(proto: &message::Kubernetes) -> Result<KubernetesConfig, FieldError> {
    let message::Kubernetes { in_cluster, kubeconfig, context, server, certificate_authority, token_file } = proto;
    let given = |text: &String| (!text.is_empty()).then(|| text.clone());
    let config = KubernetesConfig {
        kubeconfig: given(kubeconfig).map(PathBuf::from),
        context: given(context),
        in_cluster: *in_cluster,
        server: given(server),
        certificate_authority: given(certificate_authority).map(PathBuf::from),
        token_file: given(token_file).map(PathBuf::from),
        ..KubernetesConfig::default()
    };
    config.check().map_err(|reason| ("kubernetes".to_owned(), reason))?;
    Ok(config)
}

impl Selector {
    fn matches(&self, namespace: &str, labels: &BTreeMap<String, String>) -> bool {
        (self.namespaces.is_empty() || self.namespaces.iter().any(|name| name == namespace))
            && self.match_labels.iter().all(|(key, value)| labels.get(key) == Some(value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    fn selector(namespaces: &[&str], wanted: &[(&str, &str)]) -> Selector {
        let namespaces = namespaces.iter().map(|name| (*name).to_owned()).collect();
        Selector { namespaces, match_labels: labels(wanted), policy: Policy::default() }
    }

    #[test]
    fn namespaces_and_labels_must_both_match() {
        let selector = selector(&["shop", "bank"], &[("mesh", "on")]);
        assert!(selector.matches("bank", &labels(&[("mesh", "on"), ("app", "a")])));
        assert!(!selector.matches("default", &labels(&[("mesh", "on")])));
        assert!(!selector.matches("shop", &labels(&[("mesh", "off")])));
        assert!(!selector.matches("shop", &labels(&[])));
        assert!(super::Selector::default().matches("any", &labels(&[])));
    }

    #[test]
    fn pods_are_read_from_one_place() {
        let kubernetes = message::Kubernetes { in_cluster: true, ..Default::default() };
        let message = Message {
            node_name: "node-a".to_owned(),
            selectors: vec![message::Selector::default()],
            kubernetes: Some(kubernetes.clone()),
            ..Message::default()
        };
        let read = Enrolment::from_proto(&message, Policy::default()).unwrap();
        assert!(read.kubernetes.is_some_and(|kubernetes| kubernetes.in_cluster));
        let refused = |message: &Message| Enrolment::from_proto(message, Policy::default()).unwrap_err().0;
        let both = Message { pod_manifests: "/pods".to_owned(), ..message.clone() };
        assert_eq!(refused(&both), "enrolment.pod_manifests");
        let two = message::Kubernetes { server: "https://a".to_owned(), ..kubernetes };
        assert_eq!(refused(&Message { kubernetes: Some(two), ..message }), "enrolment.kubernetes");
    }

    #[test]
    fn bad_selectors_are_refused_by_their_paths() {
        let refused = |message: &Message| Enrolment::from_proto(message, Policy::default()).unwrap_err().0;
        let some = message::Selector::default();
        let message = Message { pod_manifests: "pods".to_owned(), selectors: vec![some.clone()], ..Message::default() };
        assert_eq!(refused(&message), "enrolment.pod_manifests");
        let message = Message { pod_manifests: "/pods".to_owned(), ..Message::default() };
        assert_eq!(refused(&message), "enrolment.selectors");
        let odd = message::Selector { direction: Some(9), ..some.clone() };
        let message = Message { pod_manifests: "/pods".to_owned(), selectors: vec![some, odd], ..Message::default() };
        assert_eq!(refused(&message), "enrolment.selectors[1].direction");
    }
}

//! What is configured about a cluster whose API server is watched.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Deserialize;

use crate::selector;

/// An API server, who discovery is to it, and what is read.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KubernetesConfig {
    /// A kubeconfig file. It is read again whenever a connection is made anew.
    pub kubeconfig: Option<PathBuf>,
    /// The context in the kubeconfig, if not its `current-context`.
    pub context: Option<String>,
    /// The API server of the cluster that discovery itself runs in, as its service account.
    #[serde(default)]
    pub in_cluster: bool,
    /// The URL of the API server.
    pub server: Option<String>,
    /// A file of PEM certificates that the server's is checked against; the system's otherwise.
    pub certificate_authority: Option<PathBuf>,
    /// A file with a bearer token; what is written into it counts from the next request on.
    pub token_file: Option<PathBuf>,
    /// A program that prints credentials.
    pub exec: Option<ExecConfig>,
    /// AWS credentials, for EKS.
    pub aws_iam: Option<AwsIamConfig>,
    /// Which Services are read.
    #[serde(default)]
    pub service_selector: String,
    /// Which EndpointSlices are read.
    #[serde(default)]
    pub endpoint_slice_selector: String,
    /// Which Pods are read.
    #[serde(default)]
    pub pod_selector: String,
    /// Whether Nodes are read, for the region and zone in their labels.
    #[serde(default)]
    pub nodes: bool,
    /// Whether ServiceManifests are read, the kind of which has to be defined there.
    #[serde(default)]
    pub service_manifests: bool,
    /// Whether Secrets are read that are labelled for it.
    #[serde(default)]
    pub secrets: bool,
}

/// A client-go credential plugin.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExecConfig {
    /// The program.
    pub command: String,
    /// Its arguments.
    #[serde(default)]
    pub args: Vec<String>,
    /// Environment variables beside those of discovery.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
}

/// EKS' way to know who somebody is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AwsIamConfig {
    /// The name of the cluster at EKS.
    pub cluster: String,
    /// The AWS region whose STS is asked.
    pub region: String,
    /// A profile in the shared credentials file.
    pub profile: Option<String>,
}

impl KubernetesConfig {
    /// Checks that it says one thing and not two.
    ///
    /// # Errors
    /// With the fields that contradict each other or are missing.
    pub fn check(&self) -> Result<(), String> {
        let wheres = [self.kubeconfig.is_some(), self.in_cluster, self.server.is_some()];
        if wheres.into_iter().filter(|given| *given).count() != 1 {
            return Err("kubernetes: one of `kubeconfig`, `in_cluster: true` and `server` is needed".to_owned());
        }
        for (field, selector) in [
            ("service_selector", &self.service_selector),
            ("endpoint_slice_selector", &self.endpoint_slice_selector),
            ("pod_selector", &self.pod_selector),
        ] {
            selector::check(selector).map_err(|error| format!("kubernetes.{field}: {error}"))?;
        }
        let whos = [self.token_file.is_some(), self.exec.is_some(), self.aws_iam.is_some()];
        if whos.into_iter().filter(|given| *given).count() > 1 {
            return Err("kubernetes: only one of `token_file`, `exec` and `aws_iam` is possible".to_owned());
        }
        if self.context.is_some() && self.kubeconfig.is_none() {
            return Err("kubernetes.context: is possible beside `kubeconfig` only".to_owned());
        }
        if self.certificate_authority.is_some() && self.server.is_none() {
            return Err("kubernetes.certificate_authority: is possible beside `server` only".to_owned());
        }
        if let Some(server) = &self.server {
            let uri: http::Uri = server.parse().map_err(|error| format!("kubernetes.server: {error}"))?;
            if !matches!(uri.scheme_str(), Some("https" | "http")) || uri.host().is_none() {
                return Err(format!("kubernetes.server: `{server}` is not of the form https://HOST:PORT"));
            }
            // A token that is sent in the clear is everybody's.
            if uri.scheme_str() == Some("http") && whos.contains(&true) && !is_loopback(&uri) {
                return Err("kubernetes.server: credentials are sent over https only".to_owned());
            }
        }
        if let Some(exec) = &self.exec
            && exec.command.is_empty()
        {
            return Err("kubernetes.exec.command: is empty".to_owned());
        }
        if let Some(AwsIamConfig { cluster, region, .. }) = &self.aws_iam {
            let header = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
            for (field, text) in [("cluster", cluster), ("region", region)] {
                if text.is_empty() || !text.bytes().all(header) {
                    return Err(format!("kubernetes.aws_iam.{field}: `{text}` is not a name at AWS"));
                }
            }
        }
        Ok(())
    }

    /// Where it reads from, before anything is known about it.
    pub fn location(&self) -> String {
        match (&self.kubeconfig, &self.server) {
            (Some(path), _) => match &self.context {
                Some(context) => format!("{} ({context})", path.display()),
                None => path.display().to_string(),
            },
            (None, Some(server)) => server.clone(),
            (None, None) => "in-cluster".to_owned(),
        }
    }
}

fn is_loopback(uri: &http::Uri) -> bool {
    let host = uri.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_place_and_at_most_one_identity() {
        let check = |text: &str| -> Result<(), String> {
            serde_saphyr::from_str::<KubernetesConfig>(text).map_err(|error| error.to_string())?.check()
        };
        for good in [
            "{in_cluster: true}",
            "{kubeconfig: /k, context: c, aws_iam: {cluster: c, region: eu-west-1}}",
            "{server: 'https://10.0.0.1:6443', certificate_authority: /ca, token_file: /t, nodes: true}",
            "{server: 'http://127.0.0.1:8001', token_file: /t}",
            "{server: 'https://x', exec: {command: c, args: [a], env: {A: b}}, pod_selector: 'a=b'}",
        ] {
            assert_eq!(check(good), Ok(()), "{good}");
        }
        for (bad, expected) in [
            ("{nodes: true}", "one of `kubeconfig`, `in_cluster: true` and `server`"),
            ("{in_cluster: true, kubeconfig: /k}", "one of `kubeconfig`"),
            ("{in_cluster: true, token_file: /t, exec: {command: c}}", "only one of `token_file`"),
            ("{in_cluster: true, context: c}", "kubernetes.context"),
            ("{in_cluster: true, certificate_authority: /ca}", "kubernetes.certificate_authority"),
            ("{server: '10.0.0.1:6443'}", "kubernetes.server"),
            ("{server: 'http://10.0.0.1', token_file: /t}", "credentials are sent over https only"),
            ("{in_cluster: true, exec: {command: ''}}", "kubernetes.exec.command"),
            ("{in_cluster: true, aws_iam: {cluster: 'a b', region: r}}", "kubernetes.aws_iam.cluster"),
            ("{in_cluster: true, kubeconf: /k}", "kubeconf"),
            (
                "{in_cluster: true, service_selector: 'mesh in (yes'}",
                "kubernetes.service_selector: `mesh in (yes`: `)` is missing",
            ),
            (
                "{in_cluster: true, pod_selector: 'a,b c'}",
                "kubernetes.pod_selector: `b c` of `a,b c`: `b c` is not the name of a label",
            ),
        ] {
            let error = check(bad).unwrap_err();
            assert!(error.contains(expected), "{bad}: {error:?} does not contain {expected:?}");
        }
    }
}

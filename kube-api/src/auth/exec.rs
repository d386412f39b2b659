//! Credentials that a program prints: client-go's credential plugins.

use std::process::Stdio;
use std::time::Duration;

use futures_util::future::BoxFuture;
use jiff::Timestamp;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::process::Command;

use super::{AuthError, ClusterAuth, Credential, Remembered};
use crate::config::ExecConfig;

/// How long the program may take.
const PATIENCE: Duration = Duration::from_secs(30);
const API_VERSION: &str = "client.authentication.k8s.io/v1";

/// A credential plugin.
#[derive(Debug)]
pub struct Exec {
    command: String,
    args: Vec<String>,
    env: Vec<(String, String)>,
    drop_env: Vec<String>,
    /// What the program is told in `KUBERNETES_EXEC_INFO`.
    info: Value,
    remembered: Remembered,
}

/// What the program prints.
#[derive(Deserialize)]
struct Printed {
    status: Option<Status>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Status {
    expiration_timestamp: Option<String>,
    token: Option<String>,
    client_certificate_data: Option<String>,
    client_key_data: Option<String>,
}

impl From<&ExecConfig> for Exec {
    fn from(config: &ExecConfig) -> Self {
        Self {
            command: config.command.clone(),
            args: config.args.clone(),
            env: config.env.iter().map(|(name, value)| (name.clone(), value.clone())).collect(),
            drop_env: Vec::new(),
            info: info(API_VERSION, None),
            remembered: Remembered::default(),
        }
    }
}

fn info(api_version: &str, cluster: Option<Value>) -> Value {
    let mut spec = json!({ "interactive": false });
    if let Some(cluster) = cluster {
        spec["cluster"] = cluster;
    }
    json!({ "apiVersion": api_version, "kind": "ExecCredential", "spec": spec })
}

impl Exec {
    /// The plugin of a kubeconfig's user.
    ///
    /// # Errors
    /// When it names no program, or one that must be able to ask somebody.
    pub fn of_kubeconfig(config: &kube::config::ExecConfig) -> Result<Self, AuthError> {
        let command = config.command.clone().filter(|command| !command.is_empty());
        let command = command.ok_or_else(|| AuthError("the kubeconfig's exec plugin has no command".to_owned()))?;
        if config.interactive_mode == Some(kube::config::ExecInteractiveMode::Always) {
            return Err(AuthError(format!("exec plugin `{command}` wants to ask somebody, and nobody is there")));
        }
        let variable = |variable: &std::collections::HashMap<String, String>| {
            Some((variable.get("name")?.clone(), variable.get("value")?.clone()))
        };
        let cluster = config.cluster.as_ref().filter(|_| config.provide_cluster_info);
        let cluster = cluster.and_then(|cluster| serde_json::to_value(cluster).ok());
        Ok(Self {
            command,
            args: config.args.clone().unwrap_or_default(),
            env: config.env.iter().flatten().filter_map(variable).collect(),
            drop_env: config.drop_env.clone().unwrap_or_default(),
            info: info(config.api_version.as_deref().unwrap_or(API_VERSION), cluster),
            remembered: Remembered::default(),
        })
    }

    async fn run(&self) -> Result<(Credential, Option<Timestamp>), AuthError> {
        let failed = |reason: String| AuthError(format!("exec plugin `{}`: {reason}", self.command));
        let mut command = Command::new(&self.command);
        for name in &self.drop_env {
            command.env_remove(name);
        }
        command
            .args(&self.args)
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .env("KUBERNETES_EXEC_INFO", self.info.to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        let child = command.spawn().map_err(|error| failed(format!("cannot be run: {error}")))?;
        let output = tokio::time::timeout(PATIENCE, child.wait_with_output())
            .await
            .map_err(|_| failed(format!("did not end in {} s", PATIENCE.as_secs())))?
            .map_err(|error| failed(error.to_string()))?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            let last = said.lines().rfind(|line| !line.trim().is_empty()).unwrap_or_default();
            return Err(failed(format!("{}: {}", output.status, last.chars().take(200).collect::<String>())));
        }
        let printed = std::str::from_utf8(&output.stdout).map_err(|error| failed(error.to_string()))?;
        // Some print YAML, which client-go takes.
        let options = serde_saphyr::options! { with_snippet: false };
        let printed: Printed = serde_saphyr::from_str_with_options(printed, options)
            .map_err(|_| failed("what it printed is not an ExecCredential".to_owned()))?;
        let status = printed.status.ok_or_else(|| failed("printed no status".to_owned()))?;
        let ends = status.expiration_timestamp.map(|text| text.parse()).transpose();
        let ends = ends.map_err(|error| failed(format!("expirationTimestamp: {error}")))?;
        let mut credential = match &status.token {
            Some(token) => Credential::bearer(token)?,
            None => Credential::default(),
        };
        if let (Some(certificate), Some(key)) = (status.client_certificate_data, status.client_key_data) {
            credential.identity = Some((certificate, key).into());
        }
        if credential == Credential::default() {
            return Err(failed("printed neither a token nor a client certificate".to_owned()));
        }
        Ok((credential, ends))
    }
}

impl ClusterAuth for Exec {
    fn credential(&self) -> BoxFuture<'_, Result<Credential, AuthError>> {
        Box::pin(self.remembered.get(Timestamp::now(), self.run()))
    }

    fn refused(&self) {
        self.remembered.refused();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Exec {
        let args = vec!["-c".to_owned(), script.to_owned()];
        Exec::from(&ExecConfig { command: "sh".into(), args, env: [("WHO".into(), "me".into())].into() })
    }

    #[tokio::test]
    async fn a_token_is_remembered_until_it_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let count = directory.path().join("count");
        let script = format!(
            r#"echo x >> {0}; echo "{{\"kind\": \"ExecCredential\", \"status\": {{\"token\": \"$WHO-$(wc -l < {0})\"}}}}""#,
            count.display()
        );
        let auth = shell(&script);
        let token = async || auth.credential().await.unwrap().authorization.unwrap().to_str().unwrap().to_owned();
        assert_eq!((token().await, token().await), ("Bearer me-1".to_owned(), "Bearer me-1".to_owned()));
        auth.refused();
        assert_eq!(token().await, "Bearer me-2");
    }

    #[tokio::test]
    async fn a_token_that_has_ended_is_got_anew() {
        let script = r#"echo "{status: {token: $$, expirationTimestamp: '2020-01-01T00:00:00Z'}}""#;
        let auth = shell(&script.replace("$$", "t$$"));
        let first = auth.credential().await.unwrap();
        assert_ne!(first, auth.credential().await.unwrap());
    }

    #[tokio::test]
    async fn certificates_are_taken_and_mistakes_are_told() {
        let both = shell(r#"echo '{"status": {"clientCertificateData": "C", "clientKeyData": "K"}}'"#);
        let identity = both.credential().await.unwrap().identity.unwrap();
        assert_eq!(*identity, ("C".to_owned(), "K".to_owned()));
        for (script, expected) in [
            ("echo no luck >&2; exit 3", "exec plugin `sh`: exit status: 3: no luck"),
            ("echo hello", "is not an ExecCredential"),
            ("echo '{}'", "printed no status"),
            ("echo '{\"status\": {}}'", "neither a token nor a client certificate"),
            ("echo '{\"status\": {\"token\": \"a\", \"expirationTimestamp\": \"soon\"}}'", "expirationTimestamp"),
        ] {
            let error = shell(script).credential().await.unwrap_err().to_string();
            assert!(error.contains(expected), "{error:?} does not contain {expected:?}");
        }
        let missing = Exec::from(&ExecConfig { command: "/no/such/plugin".into(), ..Default::default() });
        assert!(missing.credential().await.unwrap_err().to_string().contains("cannot be run"));
    }

    #[tokio::test]
    async fn the_program_is_told_about_the_cluster() {
        let auth =
            shell(r#"printf '{"status": {"token": "%s"}}' "$(echo "$KUBERNETES_EXEC_INFO" | tr -cd a-zA-Z0-9)""#);
        let token = auth.credential().await.unwrap().authorization.unwrap();
        let expected = "apiVersionclientauthenticationk8siov1kindExecCredentialspecinteractivefalse";
        assert_eq!(token.to_str().unwrap(), format!("Bearer {expected}"));
    }
}

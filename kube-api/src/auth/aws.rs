//! AWS IAM: what `aws eks get-token` prints, made in process.
//!
//! The token is a presigned URL of STS' GetCallerIdentity, which the API server calls to learn who we are. The URL is made
//! from credentials that are looked for where AWS' own tools look, in their order.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use futures_util::future::BoxFuture;
use http::{HeaderMap, HeaderName, HeaderValue, Method};
use jiff::Timestamp;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Deserialize;

use super::sigv4::{AwsCredentials, EMPTY_PAYLOAD, Request, presign};
use super::{AuthError, ClusterAuth, Credential, RENEW_BEFORE, Remembered};
use crate::config::AwsIamConfig;
use crate::connection::fetch;

/// How long a token is good for after it was signed, whatever the URL says.
const TOKEN_LIFE: Duration = Duration::from_secs(15 * 60);
/// What the URL says.
const URL_LIFE: u32 = 60;
/// Where EC2 tells an instance about itself.
const EC2_METADATA: &str = "http://169.254.169.254";
/// Where ECS tells a container about itself.
const ECS_METADATA: &str = "http://169.254.170.2";

/// An environment variable by its name.
type Env = Box<dyn Fn(&str) -> Option<String> + Send + Sync>;

/// A token for an EKS cluster.
pub struct AwsIam {
    config: AwsIamConfig,
    env: Env,
    remembered: Remembered,
}

impl fmt::Debug for AwsIam {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AwsIam").field("config", &self.config).finish_non_exhaustive()
    }
}

impl From<&AwsIamConfig> for AwsIam {
    fn from(config: &AwsIamConfig) -> Self {
        let env = Box::new(|name: &str| std::env::var(name).ok().filter(|value| !value.is_empty()));
        Self { config: config.clone(), env, remembered: Remembered::default() }
    }
}

/// The domain of AWS' services in a region.
fn domain(region: &str) -> &'static str {
    if region.starts_with("cn-") { "amazonaws.com.cn" } else { "amazonaws.com" }
}

/// The token: `k8s-aws-v1.` and the URL.
fn token(config: &AwsIamConfig, credentials: &AwsCredentials, now: Timestamp) -> String {
    let AwsIamConfig { cluster, region, .. } = config;
    let host = format!("sts.{region}.{}", domain(region));
    let path = presign(
        &Request {
            host: &host,
            path: "/",
            query: &[("Action", "GetCallerIdentity"), ("Version", "2011-06-15")],
            headers: &[("x-k8s-aws-id", cluster)],
            region,
            service: "sts",
            expires: URL_LIFE,
            payload: EMPTY_PAYLOAD,
        },
        credentials,
        now,
    );
    format!("k8s-aws-v1.{}", URL_SAFE_NO_PAD.encode(format!("https://{host}{path}")))
}

fn failed(what: &str, reason: impl fmt::Display) -> AuthError {
    AuthError(format!("AWS credentials: {what}: {reason}"))
}

/// Credentials as the metadata services give them.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Given {
    access_key_id: String,
    secret_access_key: String,
    #[serde(alias = "SessionToken")]
    token: Option<String>,
    expiration: Option<Expiration>,
}

/// STS' JSON has seconds, the others have RFC 3339.
#[derive(Deserialize)]
#[serde(untagged)]
enum Expiration {
    Seconds(f64),
    Text(String),
}

impl Given {
    fn checked(self, what: &str) -> Result<AwsCredentials, AuthError> {
        let Self { access_key_id, secret_access_key, token, expiration } = self;
        let ends = match expiration {
            None => None,
            #[expect(clippy::cast_possible_truncation, reason = "the fraction of a second does not matter")]
            Some(Expiration::Seconds(seconds)) => Timestamp::from_second(seconds as i64).ok(),
            Some(Expiration::Text(text)) => {
                Some(text.parse().map_err(|error| failed(what, format!("Expiration: {error}")))?)
            }
        };
        Ok(AwsCredentials { access_key_id, secret_access_key, session_token: token, ends })
    }
}

impl AwsIam {
    async fn new_token(&self, now: Timestamp) -> Result<(Credential, Option<Timestamp>), AuthError> {
        let credentials = self.credentials().await?;
        let ends = now + TOKEN_LIFE;
        let ends = credentials.ends.map_or(ends, |credentials_end| ends.min(credentials_end + RENEW_BEFORE));
        Ok((Credential::bearer(&token(&self.config, &credentials, now))?, Some(ends)))
    }

    fn env(&self, name: &str) -> Option<String> {
        (self.env)(name)
    }

    /// The first credentials that are found.
    async fn credentials(&self) -> Result<AwsCredentials, AuthError> {
        let profile = self.config.profile.clone().or_else(|| self.env("AWS_PROFILE"));
        if self.config.profile.is_none()
            && let (Some(access_key_id), Some(secret_access_key)) =
                (self.env("AWS_ACCESS_KEY_ID"), self.env("AWS_SECRET_ACCESS_KEY"))
        {
            let session_token = self.env("AWS_SESSION_TOKEN");
            return Ok(AwsCredentials { access_key_id, secret_access_key, session_token, ends: None });
        }
        if let Some(credentials) = self.of_file(profile.as_deref())? {
            return Ok(credentials);
        }
        if let (Some(file), Some(role)) = (self.env("AWS_WEB_IDENTITY_TOKEN_FILE"), self.env("AWS_ROLE_ARN")) {
            return self.of_web_identity(&file, &role).await;
        }
        let full = self.env("AWS_CONTAINER_CREDENTIALS_FULL_URI");
        let relative = self.env("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI").map(|path| format!("{ECS_METADATA}{path}"));
        if let Some(url) = relative.or(full) {
            return self.of_container(&url).await;
        }
        if self.env("AWS_EC2_METADATA_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true")) {
            return Err(failed("none", "not in the environment, not in a file, and EC2's metadata is switched off"));
        }
        self.of_instance().await
    }

    /// The shared credentials file. A profile that was asked for must be in it.
    fn of_file(&self, asked: Option<&str>) -> Result<Option<AwsCredentials>, AuthError> {
        let home = || Some(PathBuf::from(self.env("HOME")?).join(".aws/credentials"));
        let path = self.env("AWS_SHARED_CREDENTIALS_FILE").map(PathBuf::from).or_else(home);
        let found = path.as_ref().and_then(|path| Some((path, std::fs::read_to_string(path).ok()?)));
        let profile = asked.unwrap_or("default");
        let credentials = found.and_then(|(_, text)| profile_in(&text, profile));
        match (credentials, asked) {
            (None, Some(profile)) if self.config.profile.is_some() => {
                let place = path.map_or_else(|| "no home directory".to_owned(), |path| path.display().to_string());
                Err(failed("profile", format!("`{profile}` with a key and a secret is not in {place}")))
            }
            (credentials, _) => Ok(credentials),
        }
    }

    /// A service account's token for a role: EKS' "IAM roles for service accounts".
    async fn of_web_identity(&self, file: &str, role: &str) -> Result<AwsCredentials, AuthError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Answer {
            assume_role_with_web_identity_response: Response,
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Response {
            assume_role_with_web_identity_result: Outcome,
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Outcome {
            credentials: Given,
        }
        const WHAT: &str = "AssumeRoleWithWebIdentity";
        let token = std::fs::read_to_string(file).map_err(|error| failed(file, error))?;
        let session = self.env("AWS_ROLE_SESSION_NAME").unwrap_or_else(|| "culvert-discovery".to_owned());
        let encode = |text: &str| utf8_percent_encode(text.trim(), NON_ALPHANUMERIC).to_string();
        let region = &self.config.region;
        let url =
            self.env("AWS_ENDPOINT_URL_STS").unwrap_or_else(|| format!("https://sts.{region}.{}", domain(region)));
        let query = format!(
            "/?Action={WHAT}&Version=2011-06-15&RoleArn={}&RoleSessionName={}&WebIdentityToken={}",
            encode(role),
            encode(&session),
            encode(&token),
        );
        let headers = HeaderMap::from_iter([(http::header::ACCEPT, HeaderValue::from_static("application/json"))]);
        let body = fetch(Method::POST, &url, &query, headers).await.map_err(|error| failed(WHAT, error))?;
        let answer: Answer = serde_json::from_slice(&body).map_err(|_| failed(WHAT, "the answer is not understood"))?;
        let response = answer.assume_role_with_web_identity_response;
        response.assume_role_with_web_identity_result.credentials.checked(WHAT)
    }

    /// What EKS' and ECS' agents give a container.
    async fn of_container(&self, url: &str) -> Result<AwsCredentials, AuthError> {
        const WHAT: &str = "container credentials";
        let file = self.env("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE");
        let token = match file {
            Some(file) => Some(std::fs::read_to_string(&file).map_err(|error| failed(&file, error))?),
            None => self.env("AWS_CONTAINER_AUTHORIZATION_TOKEN"),
        };
        let mut headers = HeaderMap::new();
        if let Some(token) = token {
            let mut value = HeaderValue::try_from(token.trim()).map_err(|error| failed(WHAT, error))?;
            value.set_sensitive(true);
            headers.insert(http::header::AUTHORIZATION, value);
        }
        let uri: http::Uri = url.parse().map_err(|error| failed(WHAT, error))?;
        let path = uri.path_and_query().map_or("/", |path| path.as_str()).to_owned();
        let base = url.strip_suffix(&path).unwrap_or(url);
        let body = fetch(Method::GET, base, &path, headers).await.map_err(|error| failed(WHAT, error))?;
        let given: Given = serde_json::from_slice(&body).map_err(|_| failed(WHAT, "the answer is not understood"))?;
        given.checked(WHAT)
    }

    /// What EC2 gives an instance with a role, by version 2 of its metadata service.
    async fn of_instance(&self) -> Result<AwsCredentials, AuthError> {
        const WHAT: &str = "EC2 instance metadata";
        const ROLES: &str = "/latest/meta-data/iam/security-credentials/";
        let base = self.env("AWS_EC2_METADATA_SERVICE_ENDPOINT").unwrap_or_else(|| EC2_METADATA.to_owned());
        let base = base.trim_end_matches('/');
        let header = |name, value| HeaderMap::from_iter([(HeaderName::from_static(name), value)]);
        let wanted = header("x-aws-ec2-metadata-token-ttl-seconds", HeaderValue::from_static("300"));
        let session =
            fetch(Method::PUT, base, "/latest/api/token", wanted).await.map_err(|error| failed(WHAT, error))?;
        let session = HeaderValue::from_bytes(&session).map_err(|error| failed(WHAT, error))?;
        let get = async |path: &str| {
            let headers = header("x-aws-ec2-metadata-token", session.clone());
            fetch(Method::GET, base, path, headers).await.map_err(|error| failed(WHAT, error))
        };
        let roles = get(ROLES).await?;
        let role = String::from_utf8_lossy(&roles).lines().next().unwrap_or_default().trim().to_owned();
        let given = get(&format!("{ROLES}{role}")).await?;
        let given: Given = serde_json::from_slice(&given).map_err(|_| failed(WHAT, "the answer is not understood"))?;
        given.checked(WHAT)
    }
}

/// A profile's key and secret in a file of AWS' INI form.
fn profile_in(text: &str, profile: &str) -> Option<AwsCredentials> {
    let mut inside = false;
    let (mut key, mut secret, mut session_token) = (None, None, None);
    for line in text.lines().map(str::trim).filter(|line| !line.starts_with(['#', ';'])) {
        if let Some(section) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            inside = section.trim() == profile;
        } else if let (true, Some((name, value))) = (inside, line.split_once('=')) {
            let value = Some(value.trim().to_owned());
            match name.trim() {
                "aws_access_key_id" => key = value,
                "aws_secret_access_key" => secret = value,
                "aws_session_token" => session_token = value,
                _ => {}
            }
        }
    }
    Some(AwsCredentials { access_key_id: key?, secret_access_key: secret?, session_token, ends: None })
}

impl ClusterAuth for AwsIam {
    fn credential(&self) -> BoxFuture<'_, Result<Credential, AuthError>> {
        let now = Timestamp::now();
        Box::pin(self.remembered.get(now, self.new_token(now)))
    }

    fn refused(&self) {
        self.remembered.refused();
    }
}

#[cfg(test)]
#[path = "aws_tests.rs"]
mod tests;

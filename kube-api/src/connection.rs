//! Requests to an API server.

use std::error::Error;
use std::fmt::Write as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::header::{ACCEPT, AUTHORIZATION, RETRY_AFTER, USER_AGENT};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::BodyExt as _;
use kube::client::{Body, ClientBuilder};
use kube::config::{KubeConfigOptions, Kubeconfig};
use serde::Deserialize;
use tokio::sync::{Mutex, Notify};
use tokio::time::{Instant, timeout};

use crate::auth::{AuthError, AwsIam, ClusterAuth, Credential, Exec, Fixed, Identity, TokenFile};
use crate::config::KubernetesConfig;

/// How long a connection may take to be made.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long until the head of an answer is there. A list of a large cluster takes an API server some seconds.
const HEAD_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a body may pause.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);
/// How often it is told at most that requests succeed again.
const BETWEEN_RECOVERIES: Duration = Duration::from_secs(3);
/// The largest body that is read as a whole, in bytes.
const MAX_BODY: usize = 512 * 1024 * 1024;
/// The most that is read of an answer that is an error.
const MAX_ERROR: usize = 64 * 1024;
/// The longest line of a watch. etcd's objects are at most some MiB.
const MAX_LINE: usize = 64 * 1024 * 1024;
/// Where a pod finds its service account.
const SERVICE_ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// Why a request has no answer that can be used. Its text is one line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// The configuration, such as the kubeconfig, does not lead to an API server.
    #[error("{0}")]
    Config(String),
    /// There are no credentials.
    #[error(transparent)]
    Auth(#[from] AuthError),
    /// The server cannot be reached, or went away in the middle.
    #[error("{0}")]
    Transport(String),
    /// The server took too long.
    #[error("no answer in {} s", .0.as_secs())]
    Timeout(Duration),
    /// The server refused.
    #[error("{status}: {message}")]
    Status {
        /// Its status.
        status: StatusCode,
        /// What it said.
        message: String,
        /// When it wants to be asked again.
        retry_after: Option<Duration>,
    },
    /// The answer is not what it should be.
    #[error("{0}")]
    Nonsense(String),
}

/// An API server and who we are to it. All watches of a cluster share one.
pub struct Access {
    config: KubernetesConfig,
    /// The URL of the API server, or what leads to it.
    location: std::sync::Mutex<String>,
    /// Locked while credentials are got, and not while a request is answered.
    connection: Mutex<Option<Connection>>,
    /// Whether the last request has failed.
    failed: AtomicBool,
    /// Tells that requests succeed again.
    recovered: Notify,
    /// When it was told last.
    told: std::sync::Mutex<Option<Instant>>,
}

struct Connection {
    config: kube::Config,
    auth: Arc<dyn ClusterAuth>,
    /// The client, with the client certificate that it was made with; `None` to make it, and the rest, anew.
    client: Option<(kube::Client, Option<Identity>)>,
}

impl Access {
    /// Nothing is read or asked before the first request.
    pub fn new(config: KubernetesConfig) -> Self {
        let location = std::sync::Mutex::new(config.location());
        Self {
            config,
            location,
            connection: Mutex::new(None),
            failed: AtomicBool::new(false),
            recovered: Notify::new(),
            told: std::sync::Mutex::new(None),
        }
    }

    /// The URL of the API server, or what leads to it.
    pub fn location(&self) -> String {
        self.location.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Has what says where the API server is read again before the next request: it may have moved, and certificates
    /// may have been renewed. Credentials that are remembered stay.
    pub async fn renew(&self) {
        if let Some(connection) = &mut *self.connection.lock().await {
            connection.client = None;
        }
    }

    /// Waits until a request has succeeded after one that had not: what kept others from succeeding may be over, too.
    pub async fn recovered(&self) {
        self.recovered.notified().await;
    }

    /// Asks for `path`. A credential that is refused is got anew once.
    pub async fn get(&self, path: &str) -> Result<Response<Body>, RequestError> {
        let answer = self.ask(path).await;
        let had_failed = self.failed.swap(answer.is_err(), Ordering::Relaxed);
        if had_failed && answer.is_ok() {
            let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
            // Where some requests fail for good, the others are no news each time.
            if told.is_none_or(|told| told.elapsed() >= BETWEEN_RECOVERIES) {
                *told = Some(Instant::now());
                self.recovered.notify_waiters();
            }
        }
        answer
    }

    async fn ask(&self, path: &str) -> Result<Response<Body>, RequestError> {
        let (client, auth, credential) = self.prepare().await?;
        let refusal = match send_as(&client, path, &credential).await {
            Err(error @ RequestError::Status { status: StatusCode::UNAUTHORIZED, .. }) => error,
            answer => return answer,
        };
        auth.refused();
        let (client, _, newer) = self.prepare().await?;
        if newer == credential {
            return Err(refusal);
        }
        send_as(&client, path, &newer).await
    }

    async fn prepare(&self) -> Result<(kube::Client, Arc<dyn ClusterAuth>, Credential), RequestError> {
        let mut connection = self.connection.lock().await;
        let connection = match &mut *connection {
            Some(known) => {
                if known.client.is_none() {
                    let fresh = Connection::new(&self.config).await?;
                    if self.config.aws_iam.is_none() && self.config.exec.is_none() {
                        known.auth = fresh.auth;
                    }
                    known.config = fresh.config;
                }
                known
            }
            empty => empty.insert(Connection::new(&self.config).await?),
        };
        let url = connection.config.cluster_url.to_string();
        url.trim_end_matches('/').clone_into(&mut self.location.lock().unwrap_or_else(PoisonError::into_inner));
        let auth = Arc::clone(&connection.auth);
        let credential = auth.credential().await?;
        let client = match &connection.client {
            Some((client, identity)) if *identity == credential.identity => client.clone(),
            _ => {
                let mut config = connection.config.clone();
                if let Some(identity) = &credential.identity {
                    config.auth_info.client_certificate_data = Some(encode(&identity.0));
                    config.auth_info.client_key_data = Some(encode(&identity.1).into());
                }
                let client = client(config)?;
                connection.client = Some((client.clone(), credential.identity.clone()));
                client
            }
        };
        Ok((client, auth, credential))
    }
}

impl Connection {
    /// Reads what says where the API server is; nothing is connected yet.
    async fn new(config: &KubernetesConfig) -> Result<Self, RequestError> {
        let (mut kube_config, found) = locate(config).await?;
        let auth: Arc<dyn ClusterAuth> = match config {
            KubernetesConfig { token_file: Some(path), .. } => Arc::new(TokenFile::new(path)),
            KubernetesConfig { exec: Some(exec), .. } => Arc::new(Exec::from(exec)),
            KubernetesConfig { aws_iam: Some(aws), .. } => Arc::new(AwsIam::from(aws)),
            _ => found,
        };
        kube_config.connect_timeout = Some(CONNECT_TIMEOUT);
        kube_config.read_timeout = None;
        // Retries are ours: they are shown, and know what can be resumed.
        kube_config.default_retry = false;
        Ok(Self { config: kube_config, auth, client: None })
    }
}

async fn send_as(client: &kube::Client, path: &str, credential: &Credential) -> Result<Response<Body>, RequestError> {
    let mut headers = HeaderMap::new();
    if let Some(value) = &credential.authorization {
        headers.insert(AUTHORIZATION, value.clone());
    }
    send(client, Method::GET, path, headers).await
}

fn encode(pem: &str) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.encode(pem)
}

/// The API server, and who we are to it if it says that too.
async fn locate(config: &KubernetesConfig) -> Result<(kube::Config, Arc<dyn ClusterAuth>), RequestError> {
    let nobody = || Arc::new(Fixed::default());
    if let Some(path) = &config.kubeconfig {
        let failed = |error: &dyn Error| RequestError::Config(format!("{}: {}", path.display(), chain(error)));
        let kubeconfig = Kubeconfig::read_from(path).map_err(|error| failed(&error))?;
        let stated = config.context.as_ref().or(kubeconfig.current_context.as_ref()).filter(|name| !name.is_empty());
        let named: Vec<_> = kubeconfig.contexts.iter().map(|context| &*context.name).collect();
        let known = match named.is_empty() {
            true => "it has none".to_owned(),
            false => format!("it has {}", named.join(", ")),
        };
        let wrong = match stated {
            None => format!("it has no current-context, and `context` names none; {known}"),
            Some(name) if !named.contains(&&**name) => {
                format!("there is no context `{}`; {known}", name.escape_debug())
            }
            Some(_) => String::new(),
        };
        if !wrong.is_empty() {
            return Err(RequestError::Config(format!("{}: {wrong}", path.display())));
        }
        let options = KubeConfigOptions { context: config.context.clone(), ..Default::default() };
        let found = kube::Config::from_custom_kubeconfig(kubeconfig, &options).await;
        let mut found = found.map_err(|error| failed(&error))?;
        let auth = of_kubeconfig(&mut found)?;
        return Ok((found, auth));
    }
    if let Some(server) = &config.server {
        let uri = server.parse().map_err(|error| RequestError::Config(format!("{server}: {error}")))?;
        let mut found = kube::Config::new(uri);
        if let Some(path) = &config.certificate_authority {
            trust(&mut found, path)?;
        }
        return Ok((found, nobody()));
    }
    let variable = |name: &str| {
        std::env::var(name).map_err(|_| RequestError::Config(format!("in_cluster: {name} is not set: this is no pod")))
    };
    let (host, port) = (variable("KUBERNETES_SERVICE_HOST")?, variable("KUBERNETES_SERVICE_PORT")?);
    in_cluster(&host, &port, Path::new(SERVICE_ACCOUNT))
}

fn in_cluster(host: &str, port: &str, account: &Path) -> Result<(kube::Config, Arc<dyn ClusterAuth>), RequestError> {
    let host = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
    let uri = format!("https://{host}:{port}").parse();
    let mut found = kube::Config::new(uri.map_err(|error| RequestError::Config(format!("in_cluster: {error}")))?);
    trust(&mut found, &account.join("ca.crt"))?;
    Ok((found, Arc::new(TokenFile::new(account.join("token")))))
}

/// Has the server's certificate checked against those in this file, which is read again when it changes.
fn trust(config: &mut kube::Config, path: &Path) -> Result<(), RequestError> {
    std::fs::metadata(path).map_err(|error| RequestError::Config(format!("{}: {error}", path.display())))?;
    config.root_cert_file = Some(path.to_owned());
    // The file decides. Without this the system's authorities would be loaded as well, and small images have none.
    config.root_cert = Some(Vec::new());
    Ok(())
}

/// Takes the ways that we follow ourselves out of a kubeconfig's user. A client certificate and a password stay.
fn of_kubeconfig(config: &mut kube::Config) -> Result<Arc<dyn ClusterAuth>, RequestError> {
    use secrecy::ExposeSecret as _;
    let user = &mut config.auth_info;
    if let Some(provider) = &user.auth_provider {
        let name = &provider.name;
        return Err(RequestError::Config(format!(
            "the kubeconfig's auth-provider `{name}` is not supported; use exec"
        )));
    }
    let (token, file, exec) = (user.token.take(), user.token_file.take(), user.exec.take());
    Ok(match (token, file, exec) {
        (Some(token), ..) => Arc::new(Fixed(Credential::bearer(token.expose_secret())?)),
        (None, Some(file), _) => Arc::new(TokenFile::new(file)),
        (None, None, Some(exec)) => Arc::new(Exec::of_kubeconfig(&exec)?),
        (None, None, None) => Arc::new(Fixed::default()),
    })
}

fn client(mut config: kube::Config) -> Result<kube::Client, RequestError> {
    if config.cluster_url.scheme_str() == Some("http") {
        // No authority is needed, and so none of the system's is.
        config.root_cert.get_or_insert_default();
    }
    let builder = ClientBuilder::try_from(config).map_err(|error| RequestError::Config(chain(&error)))?;
    Ok(builder.build())
}

/// Sends a request to some other service by HTTP or HTTPS, and reads its answer.
pub async fn fetch(method: Method, base: &str, path: &str, headers: HeaderMap) -> Result<Bytes, RequestError> {
    let uri = base.parse().map_err(|error| RequestError::Config(format!("{base}: {error}")))?;
    let mut config = kube::Config::new(uri);
    config.connect_timeout = Some(CONNECT_TIMEOUT);
    config.default_retry = false;
    read_body(send(&client(config)?, method, path, headers).await?.into_body(), MAX_ERROR).await
}

async fn send(
    client: &kube::Client,
    method: Method,
    path: &str,
    headers: HeaderMap,
) -> Result<Response<Body>, RequestError> {
    let mut request = Request::new(Body::empty());
    *request.method_mut() = method;
    *request.uri_mut() = path.parse().map_err(|error| RequestError::Config(format!("{path}: {error}")))?;
    *request.headers_mut() = headers;
    let defaults = [(ACCEPT, "application/json"), (USER_AGENT, concat!("culvert/", env!("CARGO_PKG_VERSION")))];
    for (name, value) in defaults {
        request.headers_mut().entry(name).or_insert(HeaderValue::from_static(value));
    }
    let answered = timeout(HEAD_TIMEOUT, client.send(request)).await;
    let response = answered
        .map_err(|_| RequestError::Timeout(HEAD_TIMEOUT))?
        .map_err(|error| RequestError::Transport(chain(&error)))?;
    if response.status().is_success() {
        return Ok(response);
    }
    let seconds = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
    let status = response.status();
    // What cannot be read is not said.
    let body = read_body(response.into_body(), MAX_ERROR).await.unwrap_or_default();
    Err(RequestError::Status { status, message: message(&body), retry_after: seconds.map(Duration::from_secs) })
}

/// What an answer that is an error says: the `message` of Kubernetes' Status, else its first line.
fn message(body: &[u8]) -> String {
    #[derive(Deserialize)]
    struct Status {
        message: String,
    }
    let text = String::from_utf8_lossy(body);
    let said = serde_json::from_str::<Status>(&text).map(|status| status.message).unwrap_or(text.into_owned());
    said.lines().next().unwrap_or_default().chars().take(300).collect()
}

/// Reads a whole body.
pub async fn read_body(mut body: Body, at_most: usize) -> Result<Bytes, RequestError> {
    let mut read = BytesMut::new();
    while let Some(data) = next_data(&mut body, BODY_TIMEOUT).await? {
        if read.len() + data.len() > at_most {
            return Err(RequestError::Nonsense(format!("the answer is larger than {at_most} bytes")));
        }
        read.extend_from_slice(&data);
    }
    Ok(read.freeze())
}

/// Reads a list's page.
pub async fn read_page(body: Body) -> Result<Bytes, RequestError> {
    read_body(body, MAX_BODY).await
}

async fn next_data(body: &mut Body, patience: Duration) -> Result<Option<Bytes>, RequestError> {
    loop {
        let frame = timeout(patience, body.frame()).await.map_err(|_| RequestError::Timeout(patience))?;
        match frame {
            None => return Ok(None),
            Some(Err(error)) => return Err(RequestError::Transport(chain(&error))),
            // Trailers say nothing.
            Some(Ok(frame)) => {
                if let Ok(data) = frame.into_data() {
                    return Ok(Some(data));
                }
            }
        }
    }
}

/// The lines of a watch.
pub struct Lines {
    body: Body,
    buffer: BytesMut,
    /// How much of the buffer is known to have no end of a line.
    searched: usize,
}

impl Lines {
    /// The lines of an answer.
    pub fn new(body: Body) -> Self {
        Self { body, buffer: BytesMut::new(), searched: 0 }
    }

    /// The next line, `None` at the end of the stream. Half a line at the end was cut off and is dropped. May be dropped
    /// while it waits, and asked again.
    ///
    /// # Errors
    /// [`RequestError::Timeout`] when nothing came for `patience`, which does not end the stream.
    pub async fn next(&mut self, patience: Duration) -> Result<Option<Bytes>, RequestError> {
        loop {
            let unsearched = self.buffer.get(self.searched..).unwrap_or_default();
            if let Some(end) = unsearched.iter().position(|byte| *byte == b'\n') {
                let line = self.buffer.split_to(self.searched + end + 1);
                self.searched = 0;
                return Ok(Some(line.freeze()));
            }
            self.searched = self.buffer.len();
            if self.searched > MAX_LINE {
                return Err(RequestError::Nonsense(format!("the watch sent a line of more than {MAX_LINE} bytes")));
            }
            match next_data(&mut self.body, patience).await? {
                Some(data) => self.buffer.extend_from_slice(&data),
                None => return Ok(None),
            }
        }
    }
}

/// An error and what caused it, in one line. Layers repeat what is under them, which is left out.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let said = error.to_string();
        if !text.contains(&said) {
            let _ = write!(text, ": {said}");
        }
        cause = error.source();
    }
    text.replace('\n', " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_pod_s_service_account() {
        let directory = tempfile::tempdir().unwrap();
        let error = in_cluster("10.0.0.1", "443", directory.path()).err().unwrap().to_string();
        assert!(error.contains("ca.crt: No such file"), "{error}");
        std::fs::write(directory.path().join("ca.crt"), "").unwrap();
        std::fs::write(directory.path().join("token"), "pod").unwrap();
        let (config, auth) = in_cluster("fd00::1", "443", directory.path()).unwrap();
        assert_eq!(config.cluster_url.to_string(), "https://[fd00::1]:443/");
        assert_eq!(auth.credential().await, Credential::bearer("pod"));
    }

    #[tokio::test]
    async fn who_waits_is_told_when_requests_succeed_again() {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = Some(format!("http://{}", listener.local_addr().unwrap()));
        tokio::spawn(async move {
            for status in ["200 OK", "503 Service Unavailable", "200 OK"] {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    head.push(stream.read_u8().await.unwrap());
                }
                let answer = format!("HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: 2\r\n\r\n{{}}");
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        });
        let access = Arc::new(Access::new(KubernetesConfig { server, ..Default::default() }));
        let waiting = tokio::spawn({
            let access = Arc::clone(&access);
            async move { access.recovered().await }
        });
        tokio::task::yield_now().await;
        for (succeeds, told) in [(true, false), (false, false), (true, true)] {
            assert_eq!(access.get("/version").await.is_ok(), succeeds);
            if told {
                break;
            }
            tokio::task::yield_now().await;
            assert!(!waiting.is_finished(), "nothing is better than before");
        }
        timeout(Duration::from_secs(10), waiting).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn users_of_kubeconfigs() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("kubeconfig");
        let text = "{apiVersion: v1, kind: Config, current-context: a,
            clusters: [{name: c, cluster: {server: 'https://c.example:6443'}}],
            contexts: [{name: a, context: {cluster: c, user: token}}, {name: b, context: {cluster: c, user: exec}},
                       {name: d, context: {cluster: c, user: old}}],
            users: [{name: token, user: {token: t1}},
                    {name: exec, user: {exec: {apiVersion: client.authentication.k8s.io/v1beta1, command: sh, args: [-c, 'echo \"{status: {token: t2}}\"']}}},
                    {name: old, user: {auth-provider: {name: oidc, config: {}}}}]}";
        std::fs::write(&path, text).unwrap();
        let config = |context: Option<&str>| KubernetesConfig {
            kubeconfig: Some(path.clone()),
            context: context.map(str::to_owned),
            ..Default::default()
        };
        let connection = Connection::new(&config(None)).await.unwrap();
        assert_eq!(connection.config.cluster_url.to_string(), "https://c.example:6443/");
        assert_eq!(connection.auth.credential().await, Credential::bearer("t1"));
        let connection = Connection::new(&config(Some("b"))).await.unwrap();
        assert_eq!(connection.auth.credential().await, Credential::bearer("t2"));
        for (context, expected) in
            [("d", "auth-provider `oidc` is not supported"), ("e", "there is no context `e`; it has a, b, d")]
        {
            let error = Connection::new(&config(Some(context))).await.err().unwrap().to_string();
            assert!(error.contains(expected), "{error}");
        }
        std::fs::write(&path, text.replace("current-context: a,", "")).unwrap();
        let error = Connection::new(&config(None)).await.err().unwrap().to_string();
        assert!(error.ends_with("it has no current-context, and `context` names none; it has a, b, d"), "{error}");
        std::fs::write(&path, "{").unwrap();
        let error = Connection::new(&config(None)).await.err().unwrap().to_string();
        assert!(error.contains("kubeconfig") && !error.contains('\n'), "{error}");
    }
}

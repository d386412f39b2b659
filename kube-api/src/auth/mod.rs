//! Who discovery is to an API server.

mod aws;
mod exec;
mod sigv4;

use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::future::BoxFuture;
use http::HeaderValue;
use jiff::Timestamp;

pub use self::aws::AwsIam;
pub use self::exec::Exec;

/// How long before its end a credential is renewed.
const RENEW_BEFORE: Duration = Duration::from_secs(60);

/// A client certificate and its key, in PEM.
pub type Identity = Arc<(String, String)>;

/// What goes with a request, or with the connection under it.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Credential {
    /// The header `Authorization`.
    pub authorization: Option<HeaderValue>,
    /// A client certificate.
    pub identity: Option<Identity>,
}

/// Says what kind of credential it is, and not what it is.
impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { authorization, identity } = self;
        write!(f, "Credential {{ authorization: {}, identity: {} }}", authorization.is_some(), identity.is_some())
    }
}

impl Credential {
    /// A bearer token.
    ///
    /// # Errors
    /// When it has bytes that no header may have.
    pub fn bearer(token: &str) -> Result<Self, AuthError> {
        let mut value = HeaderValue::try_from(format!("Bearer {}", token.trim()))
            .map_err(|_| AuthError("the token has characters that no token has".to_owned()))?;
        value.set_sensitive(true);
        Ok(Self { authorization: Some(value), identity: None })
    }
}

/// Why there is no credential. One line, without secrets.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct AuthError(pub String);

/// A way to be somebody to an API server.
pub trait ClusterAuth: fmt::Debug + Send + Sync {
    /// The credential for the next request.
    fn credential(&self) -> BoxFuture<'_, Result<Credential, AuthError>>;

    /// The API server has refused the last credential: if it was remembered, it is not to be given again.
    fn refused(&self) {}
}

/// Always the same credential: a token in a kubeconfig, or none.
#[derive(Debug, Default)]
pub struct Fixed(pub Credential);

impl ClusterAuth for Fixed {
    fn credential(&self) -> BoxFuture<'_, Result<Credential, AuthError>> {
        let credential = self.0.clone();
        Box::pin(async move { Ok(credential) })
    }
}

/// A token in a file that somebody renews. It is read for each request, of which there are few.
#[derive(Debug)]
pub struct TokenFile {
    path: PathBuf,
    /// For when the file is being replaced, or was taken away.
    last: Mutex<Option<Credential>>,
}

impl TokenFile {
    /// The token in this file.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), last: Mutex::new(None) }
    }

    fn read(&self) -> Result<Credential, AuthError> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        match std::fs::read_to_string(&self.path) {
            Ok(token) if !token.trim().is_empty() => {
                let credential = Credential::bearer(&token)?;
                *last = Some(credential.clone());
                Ok(credential)
            }
            found => last.clone().ok_or_else(|| {
                let reason = found.err().map_or_else(|| "is empty".to_owned(), |error| error.to_string());
                AuthError(format!("token file {}: {reason}", self.path.display()))
            }),
        }
    }
}

impl ClusterAuth for TokenFile {
    fn credential(&self) -> BoxFuture<'_, Result<Credential, AuthError>> {
        Box::pin(async move { self.read() })
    }
}

/// Remembers a credential that costs something to get, until it is about to end or is refused.
#[derive(Debug, Default)]
struct Remembered {
    /// Locked while a new one is got, so that several requests get one.
    last: tokio::sync::Mutex<Option<(Credential, Option<Timestamp>)>>,
    refused: AtomicBool,
}

impl Remembered {
    async fn get(
        &self,
        now: Timestamp,
        new: impl Future<Output = Result<(Credential, Option<Timestamp>), AuthError>>,
    ) -> Result<Credential, AuthError> {
        let mut last = self.last.lock().await;
        let refused = self.refused.swap(false, Ordering::Relaxed);
        if let Some((credential, ends)) = &*last
            && !refused
            && ends.is_none_or(|ends| ends > now + RENEW_BEFORE)
        {
            return Ok(credential.clone());
        }
        let (credential, ends) = new.await.inspect_err(|_| self.refused.store(refused, Ordering::Relaxed))?;
        *last = Some((credential.clone(), ends));
        Ok(credential)
    }

    fn refused(&self) {
        self.refused.store(true, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(credential: &Credential) -> &str {
        credential.authorization.as_ref().unwrap().to_str().unwrap()
    }

    #[tokio::test]
    async fn a_token_file_counts_as_it_is_now_and_is_remembered_when_it_goes() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("token");
        let auth = TokenFile::new(&path);
        let error = auth.credential().await.unwrap_err().to_string();
        assert!(error.contains("token: No such file"), "{error}");
        std::fs::write(&path, "one\n").unwrap();
        assert_eq!(shown(&auth.credential().await.unwrap()), "Bearer one");
        std::fs::write(&path, "two").unwrap();
        assert_eq!(shown(&auth.credential().await.unwrap()), "Bearer two");
        std::fs::write(&path, "").unwrap();
        assert_eq!(shown(&auth.credential().await.unwrap()), "Bearer two");
        std::fs::remove_file(&path).unwrap();
        assert_eq!(shown(&auth.credential().await.unwrap()), "Bearer two");
        std::fs::write(&path, "three\nfour").unwrap();
        assert!(auth.credential().await.is_err());
    }

    #[tokio::test]
    async fn what_is_remembered_ends_by_time_and_by_refusal() {
        let remembered = Remembered::default();
        let start: Timestamp = "2024-01-01T00:00:00Z".parse().unwrap();
        let ask = async |after: u64, token: &str| {
            let ends = Some(start + Duration::from_secs(600));
            let new = std::future::ready(Credential::bearer(token).map(|credential| (credential, ends)));
            shown(&remembered.get(start + Duration::from_secs(after), new).await.unwrap()).to_owned()
        };
        assert_eq!(ask(0, "a").await, "Bearer a");
        assert_eq!(ask(539, "b").await, "Bearer a");
        assert_eq!(ask(540, "c").await, "Bearer c");
        remembered.refused();
        assert_eq!(ask(0, "d").await, "Bearer d");
        assert_eq!(ask(0, "e").await, "Bearer d");
    }

    #[test]
    fn secrets_are_not_shown() {
        let credential = Credential::bearer("secret").unwrap();
        assert!(!format!("{credential:?} {:?}", credential.authorization).contains("secret"));
    }
}

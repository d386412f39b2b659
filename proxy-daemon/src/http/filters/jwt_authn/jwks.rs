//! Keys (RFC 7517), and where they come from.

use std::{
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use arc_swap::ArcSwapOption;
use aws_lc_rs::{hmac, rsa::PublicKeyComponents, signature};
use http::{
    HeaderValue, Method, Request, StatusCode, Uri,
    header::{HOST, USER_AGENT},
};
use serde_json::{Map, Value};
use tokio::sync::Mutex;

use super::{
    Stats,
    token::{Status, Token, decode},
};
use crate::{
    http::{
        body::Body,
        call,
        stream::{RequestHead, StreamCx},
    },
    stats::Counter,
    upstream::WorkerCluster,
};

/// The longest set of keys that is fetched: 1 MiB.
const MAX_LENGTH: usize = 1 << 20;
/// The most keys of a set; the rest is passed over.
const MAX_KEYS: usize = 1000;

/// A set of public keys.
#[derive(Debug, PartialEq)]
pub(super) struct Keys(Vec<Key>);

#[derive(Debug, PartialEq)]
struct Key {
    id: String,
    algorithm: String,
    material: Material,
}

#[derive(Debug, PartialEq)]
enum Material {
    Rsa {
        modulus: Vec<u8>,
        exponent: Vec<u8>,
    },
    /// The point, and the curve's algorithm.
    Ec(Vec<u8>, &'static str),
    Ed25519(Vec<u8>),
    Secret(Vec<u8>),
}

impl Keys {
    /// Reads a set; keys that are of no use are passed over.
    ///
    /// # Errors
    /// What is wrong, in Envoy's words.
    pub(super) fn parse(bytes: &[u8]) -> Result<Keys, &'static str> {
        let set: Value = serde_json::from_slice(bytes).map_err(|_| "Jwks is an invalid JSON")?;
        let Some(keys) = set.get("keys") else { return Err("Jwks doesn't have [keys] field") };
        let Value::Array(keys) = keys else { return Err("[keys] in Jwks is not an array") };
        let keys: Vec<_> = keys.iter().take(MAX_KEYS).filter_map(|key| Key::parse(key.as_object()?)).collect();
        if keys.is_empty() { Err("Jwks doesn't have any valid public key") } else { Ok(Keys(keys)) }
    }

    /// Whether one of the keys has signed the token.
    pub(super) fn verify(&self, token: &Token) -> Result<(), Status> {
        let fits = |key: &&Key| {
            (token.key_id.is_empty() || key.id.is_empty() || token.key_id == key.id)
                && (key.algorithm.is_empty() || key.algorithm == token.algorithm)
        };
        let mut any = false;
        for key in self.0.iter().filter(fits) {
            any = true;
            if key.material.has_signed(token) {
                return Ok(());
            }
        }
        Err(if any { Status::VerificationFails } else { Status::NoSuchKey })
    }
}

impl Key {
    fn parse(key: &Map<String, Value>) -> Option<Key> {
        let text = |name: &str| key.get(name).and_then(Value::as_str);
        let bytes = |name: &str| decode(text(name)?).filter(|bytes| !bytes.is_empty());
        let trimmed = |bytes: Vec<u8>| bytes.into_iter().skip_while(|byte| *byte == 0).collect::<Vec<_>>();
        let material = match text("kty")? {
            "RSA" => Material::Rsa { modulus: trimmed(bytes("n")?), exponent: trimmed(bytes("e")?) },
            "EC" => {
                let (length, algorithm) = match text("crv")? {
                    "P-256" => (32, "ES256"),
                    "P-384" => (48, "ES384"),
                    "P-521" => (66, "ES512"),
                    _ => return None,
                };
                let mut point = vec![4];
                for coordinate in [bytes("x")?, bytes("y")?] {
                    let missing = usize::checked_sub(length, coordinate.len())?;
                    point.resize(point.len() + missing, 0);
                    point.extend(coordinate);
                }
                Material::Ec(point, algorithm)
            }
            "OKP" if text("crv")? == "Ed25519" => Material::Ed25519(bytes("x")?),
            "oct" => Material::Secret(bytes("k")?),
            _ => return None,
        };
        let id = text("kid").unwrap_or_default().to_owned();
        Some(Key { id, algorithm: text("alg").unwrap_or_default().to_owned(), material })
    }
}

impl Material {
    fn has_signed(&self, token: &Token) -> bool {
        let (message, algorithm) = (token.signed.as_bytes(), token.algorithm.as_str());
        let verified = match self {
            Material::Rsa { modulus, exponent } => {
                let parameters = match algorithm {
                    "RS256" => &signature::RSA_PKCS1_2048_8192_SHA256,
                    "RS384" => &signature::RSA_PKCS1_2048_8192_SHA384,
                    "RS512" => &signature::RSA_PKCS1_2048_8192_SHA512,
                    "PS256" => &signature::RSA_PSS_2048_8192_SHA256,
                    "PS384" => &signature::RSA_PSS_2048_8192_SHA384,
                    "PS512" => &signature::RSA_PSS_2048_8192_SHA512,
                    _ => return false,
                };
                let key = PublicKeyComponents { n: modulus, e: exponent };
                key.verify(parameters, message, &token.signature)
            }
            Material::Ec(point, curves) if *curves == algorithm => {
                let kind = match *curves {
                    "ES256" => &signature::ECDSA_P256_SHA256_FIXED,
                    "ES384" => &signature::ECDSA_P384_SHA384_FIXED,
                    _ => &signature::ECDSA_P521_SHA512_FIXED,
                };
                signature::UnparsedPublicKey::new(kind, point).verify(message, &token.signature)
            }
            Material::Ed25519(key) if algorithm == "EdDSA" => {
                signature::UnparsedPublicKey::new(&signature::ED25519, key).verify(message, &token.signature)
            }
            Material::Secret(secret) => {
                let kind = match algorithm {
                    "HS256" => hmac::HMAC_SHA256,
                    "HS384" => hmac::HMAC_SHA384,
                    "HS512" => hmac::HMAC_SHA512,
                    _ => return false,
                };
                hmac::verify(&hmac::Key::new(kind, secret), message, &token.signature)
            }
            Material::Ec(..) | Material::Ed25519(_) => return false,
        };
        verified.is_ok()
    }
}

/// Where a provider's keys come from.
#[derive(Debug)]
pub(super) enum KeySource {
    /// Written into the configuration.
    Local(Keys),
    /// Another service.
    Remote(Arc<Remote>),
}

/// `RemoteJwks`: fetched by the first request that needs the keys, for all workers, and again when they are too old. With `async_fetch`
/// that is done beside requests, which go by the old keys meanwhile; without it so do those whose tokens are known, and the others wait.
#[derive(Debug)]
pub(super) struct Remote {
    pub(super) cluster: Box<str>,
    pub(super) uri: Uri,
    pub(super) timeout: Option<Duration>,
    pub(super) cache_duration: Duration,
    pub(super) retry: Option<Retry>,
    /// `async_fetch`, and how long after a failed fetch the next one is made.
    pub(super) renewed: Option<Duration>,
    pub(super) state: State,
}

/// How often and when a fetch that fails is tried again.
#[derive(Debug, Clone, Copy)]
pub(super) struct Retry {
    pub(super) retries: u32,
    pub(super) base: Duration,
    pub(super) max: Duration,
}

impl Retry {
    /// How long the next attempt waits after so many.
    fn pause(&self, made: u32) -> Duration {
        let longest = self.base.saturating_mul(1 << made.min(20)).min(self.max);
        longest.mul_f64(fastrand::f64())
    }
}

#[derive(Debug, Default)]
pub(super) struct State {
    current: ArcSwapOption<Fetched>,
    /// When a fetch last failed. One fetch at a time: the others wait for it.
    fetch: Arc<Mutex<Option<Instant>>>,
}

#[derive(Debug)]
struct Fetched {
    keys: Keys,
    /// Another one for other keys.
    number: u64,
    at: Instant,
}

/// How long after a failed fetch tokens that are known cause no other one.
const AFTER_FAILURE: Duration = Duration::from_secs(1);
/// So long before keys are too old others are fetched beside requests, as in Envoy.
const AHEAD: Duration = Duration::from_secs(5);

impl Fetched {
    fn verify(&self, token: &Token) -> Result<u64, Status> {
        self.keys.verify(token).map(|()| self.number)
    }
}

impl Remote {
    fn is_fresh(&self, fetched: &Fetched) -> bool {
        self.renewed.is_some() || fetched.at.elapsed() < self.cache_duration
    }

    async fn verify(self: &Arc<Self>, token: &Token, cx: &StreamCx, stats: &Stats) -> Result<u64, Status> {
        // The usual way, which no other worker takes notice of.
        if let Some(fetched) = self.state.current.load().as_ref().filter(|fetched| self.is_fresh(fetched)) {
            self.renew(fetched, cx, stats);
            return fetched.verify(token);
        }
        self.get(cx, stats).await?.verify(token)
    }

    fn has_still(self: &Arc<Self>, number: u64, cx: &StreamCx, stats: &Stats) -> bool {
        let current = self.state.current.load();
        let Some(fetched) = current.as_ref() else { return true };
        self.renew(fetched, cx, stats);
        fetched.number == number
    }

    /// Has the keys fetched again beside this request where they are too old, or will be soon.
    fn renew(self: &Arc<Self>, fetched: &Fetched, cx: &StreamCx, stats: &Stats) {
        let (after, after_failure) = match self.renewed {
            Some(pause) if self.cache_duration > AHEAD => (self.cache_duration - AHEAD, pause),
            Some(pause) => (self.cache_duration, pause),
            None => (self.cache_duration, AFTER_FAILURE),
        };
        if fetched.at.elapsed() < after {
            return;
        }
        let Ok(mut failed_at) = Arc::clone(&self.state.fetch).try_lock_owned() else { return };
        if failed_at.is_some_and(|at| at.elapsed() < after_failure) {
            return;
        }
        let (remote, counters) = (Arc::clone(self), [stats.jwks_fetch_success, stats.jwks_fetch_failed]);
        let request = self.request(cx);
        tokio::task::spawn_local(async move {
            let keys = remote.load(request).await;
            remote.arrived(keys, &mut failed_at, counters);
        });
    }

    async fn get(&self, cx: &StreamCx, stats: &Stats) -> Result<Arc<Fetched>, Status> {
        let began = Instant::now();
        let mut failed_at = self.state.fetch.lock().await;
        // Somebody else has been faster.
        if let Some(fetched) = self.state.current.load_full().filter(|fetched| self.is_fresh(fetched)) {
            return Ok(fetched);
        }
        // What has failed since this request began to wait would fail again.
        if failed_at.is_some_and(|at| at >= began) {
            return Err(Status::FetchFailed);
        }
        let keys = self.load(self.request(cx)).await;
        let counters = [stats.jwks_fetch_success, stats.jwks_fetch_failed];
        self.arrived(keys, &mut failed_at, counters).ok_or(Status::FetchFailed)
    }

    /// Keeps what a fetch has come to.
    fn arrived(
        &self,
        keys: Option<Keys>,
        failed_at: &mut Option<Instant>,
        [success, failed]: [Counter; 2],
    ) -> Option<Arc<Fetched>> {
        let Some(keys) = keys else {
            failed.inc();
            *failed_at = Some(Instant::now());
            return None;
        };
        success.inc();
        *failed_at = None;
        let number = match &*self.state.current.load() {
            Some(known) if known.keys == keys => known.number,
            Some(known) => known.number + 1,
            None => 0,
        };
        let fetched = Arc::new(Fetched { keys, number, at: Instant::now() });
        self.state.current.store(Some(Arc::clone(&fetched)));
        Some(fetched)
    }

    /// What keys are asked for with, and where.
    fn request(&self, cx: &StreamCx) -> Option<(Rc<WorkerCluster>, RequestHead)> {
        let cluster = cx.worker.clusters.get(&self.cluster)?;
        let (mut head, ()) = Request::new(()).into_parts();
        head.method = Method::GET;
        head.uri = self.uri.path_and_query().map_or_else(Uri::default, |path| Uri::from(path.clone()));
        let host = self.uri.authority().map_or("", |authority| authority.as_str());
        head.headers.insert(HOST, HeaderValue::from_str(host).ok()?);
        head.headers.insert(USER_AGENT, HeaderValue::from_static("Go-browser"));
        call::mark(&mut head, cx);
        if let Some(limit) = self.timeout {
            call::expect_within(&mut head, limit);
        }
        Some((cluster, head))
    }

    async fn load(&self, request: Option<(Rc<WorkerCluster>, RequestHead)>) -> Option<Keys> {
        let (cluster, head) = request?;
        let call = async {
            let mut made = 0;
            loop {
                let answer = match call::send(&cluster, None, head.clone(), Body::Empty).await {
                    Ok(answer) => answer.read(MAX_LENGTH).await,
                    Err(failure) => Err(failure),
                };
                let failed = answer.as_ref().map_or(true, |(head, ..)| head.status.is_server_error());
                match self.retry.filter(|retry| failed && made < retry.retries) {
                    None => return answer,
                    Some(retry) => {
                        cluster.cluster.stats.upstream_rq_retry.inc();
                        cluster.cluster.stats.upstream_rq_retry_backoff_exponential.inc();
                        tokio::time::sleep(retry.pause(made)).await;
                        made += 1;
                    }
                }
            }
        };
        let (answer, body, _) = call::within(&cluster, self.timeout, call).await.ok()?;
        if answer.status != StatusCode::OK {
            return None;
        }
        Keys::parse(&body).ok()
    }
}

impl KeySource {
    /// The number of the set of keys of which one has signed the token.
    pub(super) async fn verify(&self, token: &Token, cx: &StreamCx, stats: &Stats) -> Result<u64, Status> {
        match self {
            KeySource::Local(keys) => keys.verify(token).map(|()| 0),
            KeySource::Remote(remote) => remote.verify(token, cx, stats).await,
        }
    }

    /// Whether the set of keys of that number is the one that counts. One that is too old counts on until another one, which is asked for
    /// beside this request, is there.
    pub(super) fn has_still(&self, number: u64, cx: &StreamCx, stats: &Stats) -> bool {
        match self {
            KeySource::Local(_) => true,
            KeySource::Remote(remote) => remote.has_still(number, cx, stats),
        }
    }
}

#[cfg(test)]
mod tests {
    use base64::Engine as _;

    use super::{super::token::BASE64, *};

    fn token(header: &str, key: &[u8]) -> Token {
        let signed = format!("{}.{}", BASE64.encode(header), BASE64.encode("{}"));
        let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), signed.as_bytes());
        Token::parse(&format!("{signed}.{}", BASE64.encode(tag.as_ref()))).unwrap()
    }

    #[test]
    fn a_key_is_chosen_by_its_name_and_algorithm() {
        let keys =
            Keys::parse(br#"{"keys": [{"kty": "oct", "kid": "a", "alg": "HS256", "k": "c2VjcmV0"}, {"kty": "x"}]}"#)
                .unwrap();
        assert_eq!(keys.verify(&token(r#"{"alg": "HS256"}"#, b"secret")), Ok(()));
        assert_eq!(keys.verify(&token(r#"{"alg": "HS256", "kid": "a"}"#, b"secret")), Ok(()));
        assert_eq!(keys.verify(&token(r#"{"alg": "HS256", "kid": "b"}"#, b"secret")), Err(Status::NoSuchKey));
        assert_eq!(keys.verify(&token(r#"{"alg": "HS384"}"#, b"secret")), Err(Status::NoSuchKey));
        assert_eq!(keys.verify(&token(r#"{"alg": "HS256"}"#, b"other")), Err(Status::VerificationFails));
    }

    #[test]
    fn a_public_key_is_no_secret() {
        // A token that is "signed" with what everybody knows.
        let keys = Keys::parse(br#"{"keys": [{"kty": "RSA", "n": "c2VjcmV0", "e": "AQAB"}]}"#).unwrap();
        assert_eq!(keys.verify(&token(r#"{"alg": "HS256"}"#, b"secret")), Err(Status::VerificationFails));
    }

    #[test]
    fn sets_without_keys_are_refused() {
        for (set, expected) in [
            ("", "Jwks is an invalid JSON"),
            ("{}", "Jwks doesn't have [keys] field"),
            ("{\"keys\": 1}", "[keys] in Jwks is not an array"),
            ("{\"keys\": [1]}", "Jwks doesn't have any valid public key"),
        ] {
            assert_eq!(Keys::parse(set.as_bytes()).unwrap_err(), expected);
        }
    }
}

//! jwt_authn with `jwt_cache_config`: tokens whose keys have left the set. Envoy lets what it has in its cache pass for as long as the token
//! says; culvertd verifies it again with the new keys.

use std::io::BufReader;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use aws_lc_rs::hmac;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64;
use culvert_tests::bootstrap::Bootstrap;
use culvert_tests::daemon::{Daemon, Kind, fetch, free_port};
use culvert_tests::http1::{Request, Response};
use culvert_tests::{server, wait_until};

const DEADLINE: Duration = Duration::from_secs(20);
/// How long a proxy waits for keys, as it is told below, and how long they may be waited for.
const LIMIT: Duration = Duration::from_secs(10);
const HANGING: Duration = Duration::from_secs(60);
const VIRTUAL_HOST: &str =
    "- {name: all, domains: [\"*\"], routes: [{match: {prefix: /}, direct_response: {status: 200}}]}";

/// A set with the key of this name, which is its secret too.
fn keys(name: &str) -> String {
    let secret = BASE64.encode(name);
    format!(r#"{{"keys": [{{"kty": "oct", "kid": "{name}", "alg": "HS256", "k": "{secret}"}}]}}"#)
}

/// A token of that key's.
fn token(name: &str) -> String {
    let header = BASE64.encode(format!(r#"{{"alg": "HS256", "kid": "{name}"}}"#));
    let text = format!("{header}.{}", BASE64.encode(r#"{"iss": "i"}"#));
    let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, name.as_bytes()), text.as_bytes());
    format!("{text}.{}", BASE64.encode(tag.as_ref()))
}

/// What whoever asks for keys gets.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Served {
    Keys(String),
    /// 503
    Failure,
    /// Nothing, for as long as this is so.
    Nothing,
}

/// A proxy, the keys that it can fetch, and how many have been asked for them and got nothing.
struct Rotated {
    daemon: Daemon,
    port: u16,
    served: Arc<Mutex<Served>>,
    hanging: Arc<AtomicUsize>,
}

impl Rotated {
    fn start(kind: Kind, first: &str) -> Result<Rotated> {
        let (served, hanging) = (Arc::new(Mutex::new(Served::Keys(keys(first)))), Arc::default());
        let (answers, asked) = (Arc::clone(&served), Arc::<AtomicUsize>::clone(&hanging));
        let service = server::start(move |mut stream| {
            let mut reader = BufReader::new(stream.try_clone()?);
            while Request::read(&mut reader)?.is_some() {
                let now = || answers.lock().unwrap_or_else(PoisonError::into_inner).clone();
                asked.fetch_add(usize::from(now() == Served::Nothing), Ordering::Relaxed);
                let (status, body) = wait_until(HANGING, "an answer", || match now() {
                    Served::Keys(keys) => Ok((200, keys)),
                    Served::Failure => Ok((503, String::new())),
                    Served::Nothing => bail!("there is none"),
                })?;
                Response::new(status, "application/json", body.into_bytes()).write(&mut stream, false)?;
            }
            Ok(())
        })?;
        let port = free_port()?;
        let yaml = Bootstrap::new().http(port, VIRTUAL_HOST, &[]).cluster("keys", &[service], &[]).yaml();
        let filter = "          http_filters:\n          - name: jwt\n            typed_config: {\"@type\": \
                      type.googleapis.com/envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication, providers: {p: \
                      {issuer: i, jwt_cache_config: {}, remote_jwks: {http_uri: {uri: \"http://keys.test/\", cluster: \
                      keys, timeout: 10s}, cache_duration: 0.2s}}}, rules: [{match: {prefix: /}, requires: \
                      {provider_name: p}}]}\n";
        let daemon = Daemon::start(kind, &yaml.replace("          http_filters:\n", filter))?;
        Ok(Rotated { daemon, port, served, hanging })
    }

    fn serve(&self, served: Served) {
        *self.served.lock().unwrap_or_else(PoisonError::into_inner) = served;
    }

    /// A token that is known passes, and does not wait for keys.
    fn passes(&self, name: &str) -> Result<()> {
        let began = Instant::now();
        let answer = self.ask(name)?;
        ensure!(answer == "200" && began.elapsed() < LIMIT / 2, "{answer} after {:?}", began.elapsed());
        Ok(())
    }

    /// What a request with a token of that key's is answered.
    fn ask(&self, name: &str) -> Result<String> {
        let bearer = format!("Bearer {}", token(name));
        let response = fetch(self.port, Request::get("/").header("authorization", &bearer))?;
        Ok(format!("{} {}", response.status, response.text()).trim_end().to_owned())
    }

    fn wait_for(&self, name: &str, status: &str) -> Result<String> {
        wait_until(DEADLINE, &format!("{status} for {name}"), || {
            let answer = self.ask(name)?;
            ensure!(answer.starts_with(status), "{answer}");
            Ok(answer)
        })
    }

    fn counted(&self, name: &str) -> Result<u64> {
        let stats = self.daemon.admin(&format!("/stats?filter=jwt_authn.{name}$"))?;
        stats.trim().rsplit(' ').next().context("no value")?.parse().with_context(|| stats.clone())
    }
}

const REFUSED: &str = "401 Jwks doesn't have key to match kid or alg from Jwt";

#[test]
fn a_token_goes_with_its_key_also_from_the_cache() -> Result<()> {
    for (kind, expected) in [(Kind::Envoy, "200"), (Kind::Culvert, REFUSED)] {
        let proxy = Rotated::start(kind, "old")?;
        proxy.wait_for("old", "200")?;
        ensure!(proxy.ask("new")?.starts_with("401"));
        proxy.serve(Served::Keys(keys("new")));
        // The new set has been fetched.
        proxy.wait_for("new", "200")?;
        let answer = proxy.ask("old")?;
        ensure!(answer == expected, "{kind:?}: {answer}");
    }
    Ok(())
}

#[test]
fn keys_are_fetched_also_where_all_tokens_are_known() -> Result<()> {
    let proxy = Rotated::start(Kind::Culvert, "old")?;
    proxy.wait_for("old", "200")?;
    proxy.serve(Served::Keys(keys("new")));
    let answer = proxy.wait_for("old", "401")?;
    ensure!(answer == REFUSED, "{answer}");
    Ok(())
}

#[test]
fn known_tokens_pass_with_keys_that_stay_and_where_none_can_be_fetched() -> Result<()> {
    let proxy = Rotated::start(Kind::Culvert, "old")?;
    proxy.wait_for("old", "200")?;
    let misses = proxy.counted("jwt_cache_miss")?;
    let counts = |name: &str, least: u64| {
        wait_until(DEADLINE, &format!("{least} of {name}"), || {
            let answer = proxy.ask("old")?;
            ensure!(answer == "200", "{answer}");
            let counted = proxy.counted(name)?;
            ensure!(counted >= least, "{counted}");
            Ok(())
        })
    };
    counts("jwks_fetch_success", 3)?;
    proxy.serve(Served::Failure);
    counts("jwks_fetch_failed", 2)?;
    let seen = proxy.counted("jwt_cache_miss")?;
    ensure!(seen == misses, "{seen} misses, and {misses} before");
    // What is not known needs keys.
    let answer = proxy.ask("new")?;
    ensure!(answer == "401 Jwks remote fetch is failed", "{answer}");
    Ok(())
}

#[test]
fn known_tokens_do_not_wait_for_keys() -> Result<()> {
    for kind in [Kind::Envoy, Kind::Culvert] {
        let proxy = Rotated::start(kind, "old")?;
        proxy.wait_for("old", "200")?;
        proxy.serve(Served::Nothing);
        thread::scope(|scope| {
            // Envoy fetches none for a token that is known.
            let waits = (kind == Kind::Envoy).then(|| scope.spawn(|| proxy.wait_for("new", "200")));
            wait_until(DEADLINE, "keys to be asked for", || {
                proxy.passes("old")?;
                ensure!(proxy.hanging.load(Ordering::Relaxed) > 0);
                Ok(())
            })?;
            for _ in 0..20 {
                proxy.passes("old").with_context(|| format!("{kind:?}"))?;
            }
            proxy.serve(Served::Keys(keys("new")));
            waits.map_or(Ok(()), |waits| waits.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?.map(drop))
        })?;
        proxy.wait_for("new", "200")?;
    }
    Ok(())
}

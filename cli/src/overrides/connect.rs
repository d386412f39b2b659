//! `culvert override connect`: this machine's end of a tunnel. `culvert_discovery::overrides::tunnels` is the other one, and
//! says how they talk.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use clap::Args;
use culvert_discovery::overrides::tunnels::{self, relay::relay};
use culvert_xds_client::overrides::Overrides;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode, header};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::net::{TcpStream, lookup_host};
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{sleep, timeout};

use super::access::{Access, refusal};
use super::terminal::{Terminal, bytes};

/// Shown after the help.
pub const HELP: &str = "\
Examples:
  culvert override connect users=localhost:8080                        as revision $USER
  culvert override connect users=localhost:8080 orders.shop:80=localhost:8081 --revision me
  curl $(culvert override header --set users=me --output curl) http://front/

Requests that name the revision then reach the program on this machine, as they would an offloaded pod; all others go where
they always go. What is needed: culvert-discovery with --tunnels and --developer-token-file, and that token here
(--token-file). The tunnel begins at this machine, so no port of it need be open to anybody.

A lost connection is made again; meanwhile, within seconds, the revision is gone, and requests that name it go where they would
have gone without it. If the name in --discovery has several addresses, as that of a headless Service has, a tunnel to each is
opened, since every replica serves proxies of its own. Through a port-forward, or an address that several replicas share, only
proxies of the replica that was met know the revision.";

/// How long a connect, and an answer to what was asked, may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// The longest pause before another try.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// How often the name of discovery is resolved again, for replicas that are new.
const RESOLVE: Duration = Duration::from_secs(15);
/// The most connections at a time in one tunnel; discovery allows as many as it is configured to.
const MAX_STREAMS: u32 = 1024;

/// Flags of `culvert override connect`.
#[derive(Debug, Args)]
pub struct Flags {
    /// A service (name, name.namespace or name.namespace:port), and the program here that is to answer for it
    #[arg(value_name = "SERVICE=HOST:PORT", required = true, value_parser = parse_target)]
    targets: Vec<Target>,

    /// What requests name it by [default: $USER]
    #[arg(long, value_name = "NAME", env = "USER")]
    revision: String,

    #[command(flatten)]
    access: Access,
}

/// A service, and who is to answer for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    service: String,
    host: String,
}

fn parse_target(text: &str) -> Result<Target, String> {
    let parts = text.split_once('=').filter(|(service, host)| {
        let port = host.rsplit_once(':').and_then(|(name, port)| port.parse::<u16>().ok().filter(|_| !name.is_empty()));
        !service.is_empty() && port.is_some_and(|port| port != 0)
    });
    let (service, host) = parts.ok_or("expected SERVICE=HOST:PORT, for example users=localhost:8080")?;
    Ok(Target { service: service.to_owned(), host: host.to_owned() })
}

/// What one connection is about.
#[derive(Debug)]
struct Wanted {
    target: Target,
    revision: String,
    token: String,
    /// What the header `host` says.
    authority: String,
    /// Tells this program's connection to an address from others'.
    session: String,
    /// The port of discovery that the last tunnel had, which proxies may still know.
    port: Mutex<LastPort>,
}

/// The port of the last tunnel.
#[derive(Debug, Default)]
struct LastPort {
    /// 0: there was none.
    number: u16,
    /// Since when the tunnel is lost, by the clock on the wall: others go slower while a machine sleeps.
    lost: Option<SystemTime>,
}

impl LastPort {
    /// What discovery is told, 0 after the time in which it gives the port to nobody else: proxies may know it as another one's since.
    fn claim(&self) -> u16 {
        // It may have noticed before we have.
        let ours = tunnels::QUARANTINE - tunnels::PING - tunnels::PING_TIMEOUT;
        let is_ours = self.lost.is_none_or(|lost| lost.elapsed().is_ok_and(|ago| ago < ours));
        if is_ours { self.number } else { 0 }
    }
}

impl Wanted {
    fn with_port<T>(&self, act: impl FnOnce(&mut LastPort) -> T) -> T {
        act(&mut self.port.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// What happened to a connection.
#[derive(Debug)]
enum Event {
    /// The tunnel is open; for this service's port. And for how many seconds no requests come yet.
    Open(String, u64),
    /// It could not be opened, or is lost.
    Down(Down),
    /// A connection was carried, or could not be.
    Carried(String),
}

#[derive(Debug, Clone)]
enum Down {
    /// Discovery could not be reached.
    Away(String),
    /// Discovery said no.
    Refused(String),
    /// It was open.
    Lost,
}

impl Down {
    fn reason(&self) -> &str {
        match self {
            Self::Away(reason) | Self::Refused(reason) => reason,
            Self::Lost => "the connection is lost",
        }
    }
}

type Key = (usize, SocketAddr);

/// Runs until it is interrupted.
///
/// # Errors
/// When the flags make no sense, or no tunnel can be opened at the start.
pub fn run(flags: Flags) -> anyhow::Result<String> {
    let names = flags.targets.iter().map(|target| target.service.split(':').next().unwrap_or_default());
    for name in names {
        Overrides::new([(name, &*flags.revision)]).with_context(|| format!("{name}, --revision {}", flags.revision))?;
    }
    let Some(token) = flags.access.token()? else {
        bail!("a tunnel needs the developers' token: give the file that it is in with --token-file");
    };
    let authority = flags.access.discovery.strip_prefix("http://").unwrap_or(&flags.access.discovery);
    let authority = authority.trim_end_matches('/').to_owned();
    ensure!(
        !authority.contains('/') && authority.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok()),
        "`{}` is not of the form http://HOST:PORT",
        flags.access.discovery
    );
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start")?;
    runtime.block_on(async {
        let terminal = Terminal::new();
        let connector = Connector { flags: &flags, token, authority, session: fastrand::u64(..), terminal: &terminal };
        tokio::select! {
            ended = connector.run() => ended,
            interrupted = tokio::signal::ctrl_c() => {
                terminal.line(&format!("closed: nothing answers for revision {} here any more", flags.revision));
                interrupted.context("cannot wait for an interrupt")
            }
        }
    })?;
    Ok(String::new())
}

struct Connector<'a> {
    flags: &'a Flags,
    token: String,
    authority: String,
    session: u64,
    terminal: &'a Terminal,
}

/// How a connection stands.
#[derive(Debug)]
struct State {
    open: bool,
    /// Whether it was open or not, it was said.
    told: bool,
    task: AbortHandle,
}

impl Connector<'_> {
    async fn run(&self) -> anyhow::Result<()> {
        let (events, mut happened) = mpsc::channel(64);
        let mut tasks = JoinSet::new();
        let mut states: BTreeMap<Key, State> = BTreeMap::new();
        let mut began = false;
        let mut failures: BTreeMap<Key, Down> = BTreeMap::new();
        loop {
            match timeout(PATIENCE, lookup_host(&self.authority)).await {
                Ok(Ok(found)) => {
                    let found: Vec<SocketAddr> = found.collect();
                    self.follow(&found, &mut states, &mut tasks, &events);
                }
                Ok(Err(error)) if !began => return Err(error).context(format!("cannot resolve {}", self.authority)),
                // Those that are known stay.
                _ => {}
            }
            let again = sleep(RESOLVE);
            tokio::pin!(again);
            loop {
                let (key, event) = tokio::select! {
                    () = &mut again => break,
                    Some(happened) = happened.recv() => happened,
                };
                if let Event::Down(down) = &event
                    && !began
                {
                    failures.insert(key, down.clone());
                    if failures.len() == states.len() {
                        bail!("{}", self.why_not(&failures));
                    }
                    continue;
                }
                if !std::mem::replace(&mut began, true) {
                    self.greet();
                }
                self.tell(&mut states, key, &event);
            }
        }
    }

    /// Begins connections to addresses that are new, and ends those to addresses that are gone and not connected.
    fn follow(
        &self,
        found: &[SocketAddr],
        states: &mut BTreeMap<Key, State>,
        tasks: &mut JoinSet<()>,
        events: &mpsc::Sender<(Key, Event)>,
    ) {
        states.retain(|(_, address), state| {
            let stays = state.open || found.contains(address);
            if !stays {
                state.task.abort();
            }
            stays
        });
        while tasks.try_join_next().is_some() {}
        for (index, target) in self.flags.targets.iter().enumerate() {
            for address in found {
                let key = (index, *address);
                states.entry(key).or_insert_with(|| {
                    let wanted = Wanted {
                        target: target.clone(),
                        revision: self.flags.revision.clone(),
                        token: self.token.clone(),
                        authority: self.authority.clone(),
                        session: format!("{:016x}-{address}", self.session),
                        port: Mutex::default(),
                    };
                    let task = tasks.spawn(keep_connected(key, Arc::new(wanted), events.clone()));
                    State { open: false, told: false, task }
                });
            }
        }
    }

    /// Why nothing could be begun: what was refused says more than what is away.
    fn why_not(&self, failures: &BTreeMap<Key, Down>) -> String {
        let refused = failures.values().find(|down| matches!(down, Down::Refused(..)));
        match refused.or_else(|| failures.values().next()) {
            Some(Down::Refused(reason)) => reason.clone(),
            Some(down) => format!(
                "no tunnel to {}: {}; is culvert-discovery running with --http at that address?",
                self.authority,
                down.reason()
            ),
            None => format!("{} has no address", self.authority),
        }
    }

    fn greet(&self) {
        let set: Vec<_> = self
            .flags
            .targets
            .iter()
            .map(|target| {
                let service = target.service.split(':').next().unwrap_or_default();
                format!("--set {service}={}", self.flags.revision)
            })
            .collect();
        let set = set.join(" ");
        self.terminal.plain(&format!("try: curl $(culvert override header {set} --output curl) http://..."));
    }

    fn tell(&self, states: &mut BTreeMap<Key, State>, key: Key, event: &Event) {
        let (index, address) = key;
        let target = &self.flags.targets[index];
        let others = states.iter().any(|(other, state)| *other != key && other.0 == index && state.open);
        let Some(state) = states.get_mut(&key) else { return };
        match event {
            Event::Open(cluster, wait) => {
                (state.open, state.told) = (true, false);
                let (host, revision) = (&target.host, &self.flags.revision);
                self.terminal.line(&format!("open: {cluster}, revision {revision} -> {host} (by {address})"));
                if *wait > 0 {
                    self.terminal.line(&format!(
                        "requests come in {wait} s: until then proxies may know its port as another revision's (by {address})"
                    ));
                }
            }
            Event::Down(down) => {
                let was_open = std::mem::replace(&mut state.open, false);
                // Each reason once, until it works again. An address beside one that works may be the same replica's other one.
                let quiet = !was_open && others && !matches!(down, Down::Lost);
                if was_open || (!state.told && !quiet) {
                    self.terminal.line(&format!(
                        "down: {} (by {address}): {}; trying again",
                        target.service,
                        down.reason()
                    ));
                }
                state.told |= !was_open;
            }
            Event::Carried(line) => self.terminal.line(line),
        }
        let open = states.values().filter(|state| state.open).count();
        let word = if open == 1 { "tunnel" } else { "tunnels" };
        self.terminal.state(&format!("{open} {word} open; Ctrl-C ends"));
    }
}

/// Keeps a tunnel open to one address, for ever.
async fn keep_connected(key: Key, wanted: Arc<Wanted>, events: mpsc::Sender<(Key, Event)>) {
    let mut pause = Duration::from_millis(250);
    loop {
        let down = connect(key, &wanted, &events).await;
        if matches!(down, Down::Lost) {
            wanted.with_port(|port| port.lost = Some(SystemTime::now()));
            pause = Duration::from_millis(250);
        }
        if events.send((key, Event::Down(down))).await.is_err() {
            return;
        }
        // Not all at the same time when discovery comes back.
        sleep(pause.mul_f64(0.5 + fastrand::f64() / 2.0)).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Opens a tunnel and serves it until it is lost.
async fn connect(key: Key, wanted: &Arc<Wanted>, events: &mpsc::Sender<(Key, Event)>) -> Down {
    let opened = match timeout(PATIENCE * 2, open(key.1, wanted)).await {
        Ok(opened) => opened,
        Err(_) => Err(Down::Away("no answer".to_owned())),
    };
    let (cluster, wait, upgraded) = match opened {
        Ok(opened) => opened,
        Err(down) => return down,
    };
    if events.send((key, Event::Open(cluster, wait))).await.is_err() {
        return Down::Lost;
    }
    let (about, told) = (Arc::clone(wanted), events.clone());
    let service = service_fn(move |request| {
        let carried = carry(key, Arc::clone(&about), told.clone(), request);
        async { Ok::<_, Infallible>(carried.await) }
    });
    // Why it ended is all the same.
    let _ = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .keep_alive_interval(tunnels::PING)
        .keep_alive_timeout(tunnels::PING_TIMEOUT)
        .initial_stream_window_size(tunnels::STREAM_WINDOW)
        .initial_connection_window_size(tunnels::TUNNEL_WINDOW)
        .max_send_buf_size(tunnels::SEND_BUFFER)
        .max_concurrent_streams(MAX_STREAMS)
        .serve_connection(upgraded, service)
        .await;
    Down::Lost
}

/// Asks discovery for a tunnel. Gives the service's port that it is for, in how many seconds requests come, and the connection.
async fn open(address: SocketAddr, wanted: &Wanted) -> Result<(String, u64, hyper::upgrade::Upgraded), Down> {
    let away = |error: &dyn std::error::Error| Down::Away(error.to_string());
    let stream = match timeout(PATIENCE, TcpStream::connect(address)).await {
        Ok(stream) => stream.map_err(|error| away(&error))?,
        Err(_) => return Err(Down::Away("it does not answer".to_owned())),
    };
    let _ = stream.set_nodelay(true);
    let (mut requests, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|error| away(&error))?;
    tokio::spawn(connection.with_upgrades());
    let request = Request::builder()
        .uri(tunnels::PATH)
        .header(header::HOST, &wanted.authority)
        .header(header::CONNECTION, "upgrade")
        .header(header::UPGRADE, tunnels::PROTOCOL)
        .header(header::AUTHORIZATION, format!("Bearer {}", wanted.token))
        .header(tunnels::SERVICE, &wanted.target.service)
        .header(tunnels::REVISION, &wanted.revision)
        .header(tunnels::SESSION, &wanted.session)
        .header(tunnels::PORT, wanted.with_port(|port| port.claim()))
        .body(Empty::<Bytes>::new())
        .map_err(|error| away(&error))?;
    let response = requests.send_request(request).await.map_err(|error| away(&error))?;
    let status = response.status();
    if status != StatusCode::SWITCHING_PROTOCOLS {
        let body = Limited::new(response.into_body(), 64 * 1024).collect().await;
        let body = body.map(|body| body.to_bytes()).unwrap_or_default();
        return Err(Down::Refused(refusal(status.as_u16(), &body)));
    }
    let told = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok());
    let number = told(tunnels::PORT).and_then(|port| port.parse().ok()).unwrap_or_default();
    wanted.with_port(|port| *port = LastPort { number, lost: None });
    // Older replicas do not say it.
    let wait = told(tunnels::WAIT).and_then(|wait| wait.parse().ok()).unwrap_or_default();
    let cluster = told(tunnels::CLUSTER);
    let cluster = cluster.unwrap_or(&wanted.target.service).to_owned();
    let upgraded = hyper::upgrade::on(response).await.map_err(|error| away(&error))?;
    Ok((cluster, wait, upgraded))
}

/// Carries one connection to the program on this machine.
async fn carry(
    key: Key,
    wanted: Arc<Wanted>,
    events: mpsc::Sender<(Key, Event)>,
    mut request: Request<Incoming>,
) -> Response<Empty<Bytes>> {
    let answer = |status: StatusCode| {
        let mut response = Response::new(Empty::new());
        *response.status_mut() = status;
        response
    };
    if request.method() != Method::CONNECT {
        return answer(StatusCode::METHOD_NOT_ALLOWED);
    }
    let host = &wanted.target.host;
    let reason = match timeout(PATIENCE, TcpStream::connect(host)).await {
        Ok(Ok(stream)) => {
            let _ = stream.set_nodelay(true);
            let from = request.headers().get("x-forwarded-for").and_then(|value| value.to_str().ok());
            let from = from.unwrap_or("a proxy").to_owned();
            let upgrade = hyper::upgrade::on(&mut request);
            let (wanted, started) = (Arc::clone(&wanted), Instant::now());
            tokio::spawn(async move {
                let Ok(upgraded) = upgrade.await else { return };
                let (received, sent) = relay(TokioIo::new(upgraded), stream, tunnels::IDLE).await;
                let (took, received, sent) = (started.elapsed().as_millis(), bytes(received), bytes(sent));
                let line = format!("{from} -> {}: {received} in, {sent} out, {took} ms", wanted.target.host);
                // The log may be behind, the connection is over anyway.
                let _ = events.try_send((key, Event::Carried(line)));
            });
            return answer(StatusCode::OK);
        }
        Ok(Err(error)) => error.to_string(),
        Err(_) => "it does not answer".to_owned(),
    };
    let line = format!("a request came, but {host} cannot be reached: {reason}; is your program running?");
    let _ = events.try_send((key, Event::Carried(line)));
    answer(StatusCode::BAD_GATEWAY)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_a_service_and_a_host_with_a_port() {
        let target = parse_target("users.shop:80=localhost:8080").unwrap();
        assert_eq!((&*target.service, &*target.host), ("users.shop:80", "localhost:8080"));
        for text in
            ["users", "users=", "=localhost:80", "users=localhost", "users=localhost:0", "users=:80", "users=a:b"]
        {
            assert!(parse_target(text).unwrap_err().contains("SERVICE=HOST:PORT"), "{text}");
        }
    }

    #[test]
    fn a_port_is_claimed_for_as_long_as_nobody_else_can_have_it() {
        let claim = |ago: Duration| LastPort { number: 7, lost: Some(SystemTime::now() - ago) }.claim();
        assert_eq!(LastPort { number: 7, lost: None }.claim(), 7);
        assert_eq!([1, 25, 30, 3600].map(|seconds| claim(Duration::from_secs(seconds))), [7, 7, 0, 0]);
        let later = SystemTime::now() + Duration::from_secs(60);
        assert_eq!(LastPort { number: 7, lost: Some(later) }.claim(), 0, "the clock was set back");
    }

    #[test]
    fn what_cannot_be_is_said_before_anything_is_tried() {
        let flags = |target: &str, revision: &str, discovery: &str, token_file: Option<&str>| Flags {
            targets: vec![parse_target(target).unwrap()],
            revision: revision.to_owned(),
            access: Access { discovery: discovery.to_owned(), token_file: token_file.map(Into::into) },
        };
        let url = "http://127.0.0.1:1";
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("token");
        std::fs::write(&file, "secret\n").unwrap();
        let file = file.to_str();
        for (flags, expected) in [
            (flags("Users=localhost:1", "me", url, file), "service `Users`"),
            (flags("users=localhost:1", "m e", url, file), "revision `m e`"),
            (flags("users=localhost:1", "me", url, None), "--token-file"),
            (flags("users=localhost:1", "me", url, Some("/nowhere")), "cannot read /nowhere"),
            (flags("users=localhost:1", "me", "http://host/path", file), "is not of the form"),
            (flags("users=localhost:1", "me", url, file), "is culvert-discovery running with --http at that address?"),
        ] {
            let error = format!("{:#}", run(flags).unwrap_err());
            assert!(error.contains(expected), "{error}");
        }
    }
}

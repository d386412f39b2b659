//! The name servers of one configuration: who is asked first, for how long, and who then. As c-ares, Envoy's resolver, does it: each
//! server is a resolver of its own to hickory, which would go through several of them within the time that one is given.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    task::{Context, Poll},
    time::{Duration, Instant},
};

use hickory_resolver::{
    Resolver,
    config::{LookupIpStrategy, NameServerConfig, ProtocolConfig, ResolveHosts, ResolverConfig, ResolverOpts},
    lookup_ip::LookupIp,
    net::{
        DnsError, NetError,
        runtime::{DnsUdpSocket, RuntimeProvider, TokioRuntimeProvider, TokioTime},
    },
    proto::op::ResponseCode,
    system_conf::parse_resolv_conf,
};
use tokio::{io::Interest, net::UdpSocket};

use crate::config::model::{DnsLookupFamily, DnsServers};

/// Who is asked where the configuration names nobody.
const SYSTEM: &str = "/etc/resolv.conf";
/// Nobody is waited for for less than this, however fast it has answered until now.
const LEAST_PATIENCE: Duration = Duration::from_millis(250);
/// So many times what an answer takes, a server is waited for.
const PATIENCE: u32 = 5;
/// What an answer takes is known after so many.
const KNOWN_AFTER: u32 = 3;
/// What comes sooner has not come from the server: it is in `/etc/hosts`, or was kept.
const NOT_ASKED: Duration = Duration::from_micros(50);
/// Whoever gives a look-up up after this has waited in vain.
const GIVEN_UP: Duration = Duration::from_millis(100);
/// A server that has failed is tried aside again after this.
const PROBED_AFTER: Duration = Duration::from_secs(5);
/// The log is told again of a server that does not answer after this.
const TOLD_AFTER: Duration = Duration::from_secs(600);

/// Those that are asked, one after the other.
#[derive(Debug)]
pub(super) struct Servers {
    /// In the order of the configuration.
    list: Vec<Arc<Server>>,
    /// Each is asked so often before a look-up has failed.
    tries: u32,
    rotates: bool,
    turn: AtomicUsize,
    /// What [`SYSTEM`] said, where they are those.
    system: Option<Vec<u8>>,
}

#[derive(Debug)]
struct Server {
    address: IpAddr,
    resolver: Resolver<Connected>,
    /// The same by TCP, for answers of which only the beginning came.
    over_tcp: Option<Resolver<Connected>>,
    caches: bool,
    /// The longest that it is waited for.
    timeout: Duration,
    record: Mutex<Record>,
}

/// Tokio's sockets, those of UDP connected: so the kernel tells of a server that is not there, which would be waited for otherwise.
#[derive(Clone, Default)]
struct Connected(TokioRuntimeProvider);

type Opened<S> = Pin<Box<dyn Future<Output = io::Result<S>> + Send>>;

impl RuntimeProvider for Connected {
    type Handle = <TokioRuntimeProvider as RuntimeProvider>::Handle;
    type Timer = <TokioRuntimeProvider as RuntimeProvider>::Timer;
    type Udp = Told;
    type Tcp = <TokioRuntimeProvider as RuntimeProvider>::Tcp;

    fn create_handle(&self) -> Self::Handle {
        self.0.create_handle()
    }

    fn connect_tcp(&self, server: SocketAddr, bind: Option<SocketAddr>, limit: Option<Duration>) -> Opened<Self::Tcp> {
        self.0.connect_tcp(server, bind, limit)
    }

    fn bind_udp(&self, local: SocketAddr, server: SocketAddr) -> Opened<Self::Udp> {
        let bound = self.0.bind_udp(local, server);
        Box::pin(async move {
            let socket = bound.await?;
            // Linux lets a connected socket be told where to send to all the same.
            socket.connect(server).await?;
            Ok(Told(socket))
        })
    }
}

/// A connected socket, which wakes whoever receives when there is an error as well: Tokio does so only when something can be read.
struct Told(UdpSocket);

type Received<'a> = Pin<Box<dyn Future<Output = io::Result<(usize, SocketAddr)>> + Send + 'a>>;

impl DnsUdpSocket for Told {
    type Time = TokioTime;

    fn poll_recv_from(&self, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<(usize, SocketAddr)>> {
        DnsUdpSocket::poll_recv_from(&self.0, cx, buf)
    }

    fn recv_from<'a, 'b, 'c>(&'a self, buf: &'b mut [u8]) -> Received<'c>
    where
        'a: 'c,
        'b: 'c,
        Self: 'c,
    {
        Box::pin(async move {
            tokio::select! {
                biased;
                received = self.0.recv_from(buf) => return received,
                ready = self.0.ready(Interest::ERROR) => drop(ready?),
            }
            match self.0.take_error()? {
                Some(error) => Err(error),
                // Somebody has had it.
                None => self.0.recv_from(buf).await,
            }
        })
    }

    fn poll_send_to(&self, cx: &mut Context<'_>, buf: &[u8], target: SocketAddr) -> Poll<io::Result<usize>> {
        self.0.poll_send_to(cx, buf, target)
    }
}

/// What is known of a server.
#[derive(Debug, Default, Clone, Copy)]
struct Record {
    /// Questions one after the other without an answer.
    failures: u32,
    /// Of the last question without an answer.
    failed_at: Option<Instant>,
    /// When the log was told of such a question.
    told_at: Option<Instant>,
    answers: u32,
    /// What an answer takes.
    latency: Duration,
}

impl Servers {
    /// `None`: there are none, and the system's library may know better.
    pub(super) fn new(servers: &DnsServers, family: DnsLookupFamily) -> Result<Option<Servers>, NetError> {
        let said = std::fs::read(SYSTEM).unwrap_or_default();
        let system = parse_resolv_conf(&said).ok();
        let (system, mut options) = system.unwrap_or_else(|| {
            let none = ResolverConfig::from_parts(None, Vec::new(), Vec::new());
            (none, ResolverOpts::default())
        });
        let given = servers.servers.iter().map(|address| {
            let mut server = NameServerConfig::udp_and_tcp(address.ip());
            server.connections.iter_mut().for_each(|connection| connection.port = address.port());
            server
        });
        let own = system.name_servers();
        let are_the_systems = servers.servers.is_empty() || servers.as_fallback && !own.is_empty();
        let used: Vec<_> = if are_the_systems { own.to_vec() } else { given.collect() };
        if used.is_empty() {
            return Ok(None);
        }
        let (domain, search) = match servers.no_search {
            true => (None, Vec::new()),
            false => (system.domain().cloned(), system.search().to_vec()),
        };
        options.ip_strategy = match family {
            DnsLookupFamily::Auto => LookupIpStrategy::Ipv6thenIpv4,
            DnsLookupFamily::V4Only => LookupIpStrategy::Ipv4Only,
            DnsLookupFamily::V6Only => LookupIpStrategy::Ipv6Only,
            DnsLookupFamily::V4Preferred => LookupIpStrategy::Ipv4thenIpv6,
            DnsLookupFamily::All => LookupIpStrategy::Ipv4AndIpv6,
        };
        options.timeout = servers.timeout;
        options.attempts = 0;
        options.num_concurrent_reqs = 1;
        options.use_hosts_file = ResolveHosts::Always;
        if !servers.cache.is_zero() {
            (options.positive_max_ttl, options.negative_max_ttl) = (Some(servers.cache), Some(servers.cache));
        }
        let resolver = |server: NameServerConfig| {
            let config = ResolverConfig::from_parts(domain.clone(), search.clone(), vec![server]);
            let mut builder = Resolver::builder_with_config(config, Connected::default());
            *builder.options_mut() = options.clone();
            builder.build()
        };
        let one = |server: NameServerConfig| {
            let mut by_tcp = server.clone();
            by_tcp.connections.retain(|connection| matches!(connection.protocol, ProtocolConfig::Tcp));
            let address = server.ip;
            let (first, over_tcp) = match servers.tcp {
                true => (resolver(by_tcp)?, None),
                false => (resolver(server)?, Some(resolver(by_tcp)?)),
            };
            Ok(Arc::new(Server {
                address,
                resolver: first,
                over_tcp,
                caches: !servers.cache.is_zero(),
                timeout: servers.timeout,
                record: Mutex::default(),
            }))
        };
        Ok(Some(Servers {
            list: used.into_iter().map(one).collect::<Result<_, NetError>>()?,
            tries: servers.tries.max(1),
            rotates: servers.rotate,
            turn: AtomicUsize::default(),
            system: are_the_systems.then_some(said),
        }))
    }

    /// Whether the system's servers are others by now.
    pub(super) fn are_outdated(&self) -> bool {
        self.system.as_ref().is_some_and(|said| *said != std::fs::read(SYSTEM).unwrap_or_default())
    }

    /// What the first that answers says, be it that there are no addresses.
    ///
    /// # Errors
    /// What the last one that was asked said, or that it said nothing.
    pub(super) async fn look_up(&self, name: &str) -> Result<LookupIp, NetError> {
        let mut order = self.list.clone();
        if self.rotates {
            let turn = self.turn.fetch_add(1, Relaxed) % order.len();
            order.rotate_left(turn);
        }
        order.sort_by_key(|server| server.record().failures);
        let mut said = NetError::NoConnections;
        for attempt in 0..self.tries {
            for server in &order {
                let hurry = (attempt + 1 < self.tries).then_some(attempt);
                match server.ask(name, hurry).await {
                    Err(error) if !error.is_no_records_found() => said = error,
                    answer => {
                        self.probe(name);
                        return answer;
                    }
                }
            }
        }
        Err(said)
    }

    /// Asks those that have failed a while ago as well, for whose answer nobody waits.
    fn probe(&self, name: &str) {
        for server in &self.list {
            let mut record = server.record();
            if record.failures > 0 && record.failed_at.is_none_or(|at| at.elapsed() >= PROBED_AFTER) {
                record.failed_at = Some(Instant::now());
                let (server, name) = (Arc::clone(server), name.to_owned());
                tokio::spawn(async move { server.ask(&name, None).await });
            }
        }
    }
}

impl Server {
    fn record(&self) -> MutexGuard<'_, Record> {
        // Each change is whole before anything can panic.
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks for a name; `hurry`: there will be another attempt after this one.
    async fn ask(&self, name: &str, hurry: Option<u32>) -> Result<LookupIp, NetError> {
        let started = Instant::now();
        let patience = match hurry {
            Some(attempt) => self.record().patience(attempt, self.timeout),
            None => self.timeout,
        };
        let mut question = Question { server: self, asked: started, open: true };
        let asked = tokio::time::timeout(patience, self.answer(name)).await;
        question.open = false;
        let answer = asked.unwrap_or(Err(NetError::Timeout));
        let mut record = self.record();
        match &answer {
            Err(error) if !error.is_no_records_found() => {
                let silent = matches!(error, NetError::Timeout | NetError::NoConnections | NetError::Io(_));
                if silent && record.told_at.is_none_or(|at| at.elapsed() >= TOLD_AFTER) {
                    record.told_at = Some(Instant::now());
                    tracing::warn!(server = %self.address, %name, "a name server does not answer: {error}");
                }
                record.failed(Instant::now());
            }
            _ => record.answered(started.elapsed()),
        }
        answer
    }

    async fn answer(&self, name: &str) -> Result<LookupIp, NetError> {
        if !self.caches {
            // It has one in any case.
            self.resolver.clear_cache();
        }
        let found = self.resolver.lookup_ip(name).await;
        match (&found, &self.over_tcp) {
            // Of an answer that is longer than was asked for, only the beginning has come.
            (Err(NetError::Proto(_)), Some(over_tcp)) => {
                over_tcp.clear_cache();
                over_tcp.lookup_ip(name).await.or(found)
            }
            _ => found,
        }
    }
}

/// One to a server. Where whoever asks gives it up after a while (`dns_query_timeout` of a cache of names), the server has failed to answer:
/// otherwise every look-up would begin with it, and end there.
struct Question<'a> {
    server: &'a Server,
    asked: Instant,
    open: bool,
}

impl Drop for Question<'_> {
    fn drop(&mut self) {
        if self.open && self.asked.elapsed() >= GIVEN_UP {
            self.server.record().failed(Instant::now());
        }
    }
}

impl Record {
    /// How long an answer is waited for: longer with each attempt, and at most for `timeout`.
    fn patience(&self, attempt: u32, timeout: Duration) -> Duration {
        if self.answers < KNOWN_AFTER {
            return timeout;
        }
        let usual = (self.latency * PATIENCE).max(LEAST_PATIENCE);
        usual.saturating_mul(1 << attempt.min(16)).min(timeout)
    }

    fn answered(&mut self, after: Duration) {
        if after < NOT_ASKED {
            return;
        }
        (self.failures, self.failed_at) = (0, None);
        self.latency = if self.answers == 0 { after } else { (self.latency * 7 + after) / 8 };
        self.answers = self.answers.saturating_add(1);
    }

    fn failed(&mut self, now: Instant) {
        self.failures = self.failures.saturating_add(1);
        self.failed_at = Some(now);
    }
}

/// Why nobody has answered, as Envoy's resolver says it, which access logs tell. What it has no words for is told in those that there are.
pub(super) fn in_envoys_words(error: NetError) -> io::Error {
    let words = match &error {
        NetError::Dns(DnsError::ResponseCode(code)) => match code {
            ResponseCode::ServFail => "DNS server returned general failure",
            ResponseCode::FormErr => "DNS server claims query was misformatted",
            ResponseCode::NotImp => "DNS server does not implement requested operation",
            ResponseCode::Refused => "DNS server refused query",
            _ => return io::Error::other(error),
        },
        NetError::Timeout => "Timeout while contacting DNS servers",
        NetError::NoConnections | NetError::Io(_) => "Could not contact DNS servers",
        _ => return io::Error::other(error),
    };
    io::Error::other(format!("cares_failure:{words}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_is_waited_for_as_it_has_answered() {
        let (mut record, timeout) = (Record::default(), Duration::from_secs(5));
        assert_eq!(record.patience(0, timeout), timeout, "nothing is known of it");
        for _ in 0..KNOWN_AFTER {
            record.answered(Duration::from_millis(100));
        }
        let patience = |record: &Record, attempt| record.patience(attempt, timeout).as_millis();
        assert_eq!([0, 1, 3, 40].map(|attempt| patience(&record, attempt)), [500, 1000, 4000, 5000]);
        (0..100).for_each(|_| record.answered(Duration::from_millis(1)));
        assert_eq!(patience(&record, 0), 250);
        record.failed(Instant::now());
        assert_eq!((record.failures, patience(&record, 0)), (1, 250));
        record.answered(Duration::from_millis(1));
        assert_eq!(record.failures, 0);
    }

    /// Answers every question, after a pause, with that there is no such name.
    async fn name_server(answers: bool) -> (SocketAddr, Arc<AtomicUsize>) {
        let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let (address, asked) = (socket.local_addr().unwrap(), Arc::new(AtomicUsize::default()));
        let count = Arc::clone(&asked);
        tokio::spawn(async move {
            let mut packet = [0; 512];
            while let Ok((length, from)) = socket.recv_from(&mut packet).await {
                count.fetch_add(1, Relaxed);
                if answers {
                    // A response, of a server that recurses: no such name.
                    (packet[2], packet[3]) = (0x81, 0x83);
                    // Without the record that the question had at its end.
                    packet[10..12].fill(0);
                    let question = packet[12..length].iter().position(|byte| *byte == 0).unwrap() + 12 + 5;
                    socket.send_to(&packet[..question], from).await.unwrap();
                }
            }
        });
        (address, asked)
    }

    #[tokio::test]
    async fn who_is_given_up_is_asked_last() {
        let ((silent, _), (answers, _)) = (name_server(false).await, name_server(true).await);
        let timeout = Duration::from_secs(60);
        let servers = DnsServers { servers: vec![silent, answers], timeout, no_search: true, ..DnsServers::default() };
        let servers = Servers::new(&servers, DnsLookupFamily::V4Only).unwrap().unwrap();
        assert!(tokio::time::timeout(2 * GIVEN_UP, servers.look_up("a.test.")).await.is_err(), "nobody answers");
        let answer = tokio::time::timeout(Duration::from_secs(30), servers.look_up("a.test.")).await;
        assert!(answer.expect("the other one is asked").unwrap_err().is_no_records_found());
    }

    #[tokio::test]
    async fn those_that_fail_are_asked_last() {
        let ((silent, asked), (answers, _)) = (name_server(false).await, name_server(true).await);
        let timeout = Duration::from_millis(300);
        let servers = DnsServers { servers: vec![silent, answers], timeout, no_search: true, ..DnsServers::default() };
        let servers = Servers::new(&servers, DnsLookupFamily::V4Only).unwrap().unwrap();
        let look_up = async || servers.look_up("a.test.").await.unwrap_err().is_no_records_found();
        assert!(look_up().await, "the second one answers");
        let before = asked.load(Relaxed);
        assert!(before > 0, "the first one comes first");
        assert!(look_up().await && look_up().await);
        assert_eq!(asked.load(Relaxed), before, "the first one comes last now");
    }

    #[tokio::test]
    async fn nobody_waits_for_a_server_that_is_not_there() {
        // Somebody had that port, and nobody has it now.
        let gone = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let (answers, _) = name_server(true).await;
        let timeout = Duration::from_secs(60);
        let servers = DnsServers { servers: vec![gone, answers], timeout, no_search: true, ..DnsServers::default() };
        let servers = Servers::new(&servers, DnsLookupFamily::V4Only).unwrap().unwrap();
        let began = Instant::now();
        assert!(servers.look_up("a.test.").await.unwrap_err().is_no_records_found(), "the second one answers");
        assert!(began.elapsed() < timeout / 2, "{:?}", began.elapsed());
        assert_eq!(servers.list.iter().map(|server| server.record().failures).collect::<Vec<_>>(), [1, 0]);
    }
}

//! Seeded simulation: the core against a model server, over a network that loses the connection with what is under way
//! and delivers types out of order, while resources change, go bad, and run out of time, updates are finished late, and
//! on-demand clusters are wanted and not wanted any more.
//!
//! Checked throughout: nothing in use disappears that the server did not remove and whose time has not run out; what is
//! past its time does; no response is answered before its update is finished; no change of interest has a nonce that is
//! known to be stale. Checked at the end: client and server
//! agree, and every response was answered, or superseded by an answer to a newer one.

mod server;
mod world;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use envoy_types::pb::envoy::config::core::v3::Node;
use envoy_types::pb::envoy::service::discovery::v3::Resource as Wrapper;
use prost::Message as _;

use self::server::Session;
use self::world::{TYPES, World, is_bad, is_on_demand, version_in};
use super::type_url::{CLUSTER, ENDPOINT, LISTENER, ROUTE};
use super::*;

const SEEDS: usize = 1000;
const STEPS: usize = 180;

/// A type's resources at the sink, which applies an update when it is handed out and says so later.
#[derive(Default)]
struct InForce(BTreeMap<String, u64>);

struct Simulation {
    rng: fastrand::Rng,
    variant: Variant,
    core: Core,
    start: Instant,
    /// In seconds.
    now: u64,
    in_force: BTreeMap<&'static str, InForce>,
    /// Until when what was received last of a resource is good.
    deadlines: BTreeMap<(&'static str, String), u64>,
    /// Clusters asked for by name, and those that were at some time.
    on_demand: BTreeSet<String>,
    given_up: BTreeSet<String>,
    world: World,
    session: Option<Session>,
    /// Something ran out of time on this stream: the server does not know, and will not send it again.
    expired: bool,
    to_server: VecDeque<Request>,
    to_client: VecDeque<Response>,
    applying: Vec<(Token, Outcome, Option<String>)>,
    /// Nonces of this stream whose updates are finished.
    finished: BTreeSet<String>,
    /// State of the world, on this stream: the newest nonce that came, by type, and how often each one was finished and
    /// not answered.
    newest: BTreeMap<String, String>,
    answerable: BTreeMap<String, usize>,
}

impl Simulation {
    fn new(seed: u64, variant: Variant) -> Self {
        let mut core = Core::new(Node::default(), variant);
        core.set_interest(CLUSTER, Interest::Wildcard);
        core.set_interest(LISTENER, Interest::Wildcard);
        Simulation {
            rng: fastrand::Rng::with_seed(seed),
            variant,
            core,
            start: Instant::now(),
            now: 0,
            in_force: TYPES.map(|type_url| (type_url, InForce::default())).into(),
            deadlines: BTreeMap::new(),
            on_demand: BTreeSet::new(),
            given_up: BTreeSet::new(),
            world: World::default(),
            session: None,
            expired: false,
            to_server: VecDeque::new(),
            to_client: VecDeque::new(),
            applying: Vec::new(),
            finished: BTreeSet::new(),
            newest: BTreeMap::new(),
            answerable: BTreeMap::new(),
        }
    }

    fn connect(&mut self) {
        self.disconnect();
        self.core.connected();
        self.expired = false;
        self.session = Some(Session { hasty: self.rng.bool(), partial: self.rng.bool(), ..Session::default() });
    }

    /// Whatever is under way is lost.
    fn disconnect(&mut self) {
        self.core.disconnected();
        self.session = None;
        self.to_server.clear();
        self.to_client.clear();
        self.finished.clear();
        self.newest.clear();
        self.answerable.clear();
        for (_, _, nonce) in &mut self.applying {
            *nonce = None;
        }
    }

    fn now(&self) -> Instant {
        self.start + Duration::from_secs(self.now)
    }

    /// The server takes a request, and checks that it answers nothing that is not finished.
    fn deliver_request(&mut self) -> bool {
        // All at once, or no more than can be sent.
        let limit = if self.rng.bool() { 1 } else { usize::MAX };
        let outgoing = self.core.outgoing_some(limit);
        let moved = !outgoing.is_empty();
        outgoing.iter().for_each(|request| self.check_nonce(request));
        self.to_server.extend(outgoing);
        let (Some(session), Some(request)) = (&mut self.session, self.to_server.pop_front()) else { return moved };
        let nonce = session.request(request);
        assert!(nonce.is_empty() || self.finished.contains(&nonce), "{nonce} was answered before it was finished");
        true
    }

    /// A state-of-the-world request that answers nothing must not have a nonce that the client could know to be stale:
    /// the server would pass over what it asks for.
    fn check_nonce(&mut self, request: &Request) {
        let Request::Sotw(request) = request else { return };
        let nonce = &request.response_nonce;
        if let Some(left @ 1..) = self.answerable.get_mut(nonce) {
            *left -= 1;
            return;
        }
        let newest = self.newest.get(&request.type_url).map_or("", String::as_str);
        assert_eq!(nonce, newest, "a change of interest with a stale nonce");
    }

    /// The server sends a response, or says of something that it is still good.
    fn respond(&mut self, heartbeat: bool) -> bool {
        let Some(session) = &mut self.session else { return false };
        let response = match heartbeat {
            true => session.heartbeat(&self.world, self.variant, &mut self.rng),
            false => session.response(&self.world, self.variant),
        };
        let Some(response) = response else { return false };
        // A server that repeats itself.
        if self.rng.u8(..10) == 0 {
            session.repeated(&response);
            self.to_client.push_back(response.clone());
        }
        self.to_client.push_back(response);
        true
    }

    /// The client takes a response: the first of some type.
    fn deliver_response(&mut self) -> bool {
        let types: Vec<&str> = self.to_client.iter().map(type_of).collect();
        let Some(first) = self.rng.choice(&types) else { return false };
        let at = types.iter().position(|it| it == first).expect("it was chosen from these");
        let response = self.to_client.remove(at).expect("it is there");
        let (nonce, deadlines) = self.read(&response);
        let Handled::Update(token, update) = self.core.handle(response, self.now()) else { return true };
        self.newest.insert(update.type_url.clone(), nonce.clone());
        for (name, version, deadline) in deadlines {
            // A heartbeat of what was refused, before the server heard of that, or of what has run out.
            if self.core.rejected(&token).contains(&&*name) {
                assert!(is_bad(version) || self.expired, "{name}: a heartbeat of what is in force was rejected");
                continue;
            }
            let key = (known(&update.type_url), name);
            match deadline {
                Some(deadline) => drop(self.deadlines.insert(key, deadline)),
                None => drop(self.deadlines.remove(&key)),
            }
        }
        if self.rng.u8(..50) == 0 {
            // The client's process is in trouble: as if it had never come, until the next stream.
            self.core.abandon(token);
            self.disconnect();
            return true;
        }
        let outcome = self.apply(&update, false);
        self.applying.push((token, outcome, Some(nonce)));
        true
    }

    /// A response's nonce, and of its resources the versions, and until when they are good.
    fn read(&self, response: &Response) -> (String, Vec<(String, u64, Option<u64>)>) {
        let deadline = |wrapper: &Wrapper| wrapper.ttl.map(|ttl| self.now + ttl.seconds.cast_unsigned());
        let of = |it: &Wrapper| (it.name.clone(), it.version.parse().expect("the world made it"), deadline(it));
        match response {
            Response::Sotw(response) => {
                let wrapped = |any: &Any| match any.type_url.ends_with("discovery.v3.Resource") {
                    true => of(&Wrapper::decode(any.value.as_slice()).unwrap()),
                    false => (super::resource::name_in(&any.value).unwrap(), version_in(any), None),
                };
                (response.nonce.clone(), response.resources.iter().map(wrapped).collect())
            }
            Response::Delta(response) => (response.nonce.clone(), response.resources.iter().map(of).collect()),
        }
    }

    fn apply(&mut self, update: &Update, is_expiry: bool) -> Outcome {
        let mut outcome = Outcome::default();
        let type_url = known(&update.type_url);
        for resource in &update.added {
            let version = version_in(&resource.body);
            if is_bad(version) {
                outcome.rejected.push(Rejection { name: resource.name.clone(), message: "bad".to_owned() });
            } else {
                self.in_force.get_mut(type_url).unwrap().0.insert(resource.name.clone(), version);
            }
        }
        for name in &update.unchanged {
            assert!(self.in_force[type_url].0.contains_key(&**name), "{name} is not here, and yet unchanged");
        }
        for name in &update.removed {
            // What was refused is removed as well.
            let Some(held) = self.in_force.get_mut(type_url).unwrap().0.remove(name) else { continue };
            let is_due = self.deadlines.get(&(type_url, name.clone())).is_some_and(|at| *at <= self.now);
            if is_expiry {
                assert!(is_due, "{type_url} {name} was removed before its time");
            } else {
                assert!([CLUSTER, LISTENER].contains(&type_url), "{type_url} {name} in use was removed");
                let given_up = type_url == CLUSTER && self.given_up.contains(name);
                assert!(
                    given_up || self.world.was_removed(type_url, name, held),
                    "{type_url} {name} was removed without the server's wish"
                );
            }
        }
        let users = [(CLUSTER, ENDPOINT), (LISTENER, ROUTE)];
        if let Some((_, of)) = users.iter().find(|(user, _)| *user == type_url) {
            let names: BTreeSet<String> = self.in_force[type_url].0.keys().cloned().collect();
            self.in_force.get_mut(of).unwrap().0.retain(|name, _| names.contains(name));
            self.core.set_interest(of, Interest::Names(names));
        }
        outcome
    }

    /// Some update, not always the oldest, is finished.
    fn finish(&mut self) -> bool {
        if self.applying.is_empty() {
            return false;
        }
        let last = self.applying.len() - 1;
        let at = if self.rng.bool() { 0 } else { self.rng.usize(..=last) };
        let (token, outcome, nonce) = self.applying.remove(at);
        self.core.finish(token, outcome);
        if let Some(nonce) = nonce {
            *self.answerable.entry(nonce.clone()).or_default() += 1;
            self.finished.insert(nonce);
        }
        true
    }

    fn wait(&mut self) {
        self.now += self.rng.u64(1..4);
        for (token, update) in self.core.expire(self.now()) {
            self.expired = true;
            let outcome = self.apply(&update, true);
            self.applying.push((token, outcome, None));
        }
        for ((type_url, name), _) in self.deadlines.iter().filter(|(_, at)| **at <= self.now) {
            assert!(!self.in_force[type_url].0.contains_key(name), "{type_url} {name} is past its time");
        }
        assert!(self.core.next_expiry().is_none_or(|at| at > self.now()));
    }

    fn demand(&mut self) {
        let name = format!("demand{}", self.rng.u8(..5));
        let wanted = !self.on_demand.remove(&name);
        self.core.set_wanted(CLUSTER, &name, wanted);
        if wanted {
            self.on_demand.insert(name)
        } else {
            self.given_up.insert(name)
        };
    }

    fn step(&mut self) {
        match self.rng.u8(..32) {
            0 => self.connect(),
            1 if self.rng.bool() => self.disconnect(),
            2..=6 => self.world.change(&mut self.rng),
            7 => self.demand(),
            8..=9 => self.wait(),
            10 => drop(self.respond(true)),
            11..=15 => drop(self.respond(false)),
            16..=21 => drop(self.deliver_response()),
            22..=26 => drop(self.deliver_request()),
            _ => drop(self.finish()),
        }
    }

    fn settle(&mut self) {
        self.world.repair();
        if self.session.is_none() || self.expired {
            self.connect();
        }
        let mut moves = 0;
        loop {
            let moved = self.deliver_request() | self.respond(false) | self.deliver_response() | self.finish();
            if self.session.is_none() {
                self.connect();
            } else if !moved {
                break;
            }
            moves += 1;
            assert!(moves < 10_000, "client and server never come to rest");
        }
    }

    fn check(&self) {
        for type_url in [CLUSTER, LISTENER] {
            let wanted = |name: &str| type_url == LISTENER || !is_on_demand(name) || self.on_demand.contains(name);
            let items = self.world.items(type_url).filter(|(name, _)| wanted(name));
            let expected: BTreeMap<String, u64> = items.map(|(name, item)| (name.clone(), item.version)).collect();
            let mut actual = self.in_force[type_url].0.clone();
            // Nobody has told the client to forget these.
            actual.retain(|name, _| wanted(name));
            assert_eq!(actual, expected, "{type_url} differ");
        }
        for (user, type_url) in [(CLUSTER, ENDPOINT), (LISTENER, ROUTE)] {
            for name in self.in_force[user].0.keys() {
                // What the server does not have any more stays as it was.
                if let Some(item) = self.world.item(type_url, name) {
                    let held = self.in_force[type_url].0.get(name);
                    assert_eq!(held, Some(&item.version), "{type_url} {name} differs");
                }
            }
        }
        assert!(self.session.as_ref().is_some_and(Session::is_answered), "a response was not answered");
    }
}

fn type_of(response: &Response) -> &str {
    match response {
        Response::Sotw(response) => &response.type_url,
        Response::Delta(response) => &response.type_url,
    }
}

fn known(type_url: &str) -> &'static str {
    TYPES.into_iter().find(|it| *it == type_url).expect("nothing else was asked for")
}

fn simulate(variant: Variant) {
    // By hand: more of them, and which one is the first.
    let number = |name: &str| std::env::var(name).ok().and_then(|number| number.parse::<u64>().ok());
    let first = number("SIMULATION_SEED").unwrap_or(0);
    let mut failed = Vec::new();
    for seed in (first..).take(number("SIMULATION_SEEDS").map_or(SEEDS, |it| usize::try_from(it).unwrap())) {
        let outcome = std::panic::catch_unwind(|| {
            let mut simulation = Simulation::new(seed, variant);
            for round in 0..3 {
                for _ in 0..STEPS / 3 {
                    simulation.step();
                }
                if round > 0 {
                    simulation.settle();
                    simulation.check();
                }
            }
        });
        if outcome.is_err() {
            eprintln!("seed {seed} of {variant:?} failed");
            failed.push(seed);
        }
    }
    assert!(failed.is_empty(), "seeds of {variant:?} that failed: {failed:?}");
}

#[test]
fn sotw_converges() {
    simulate(Variant::Sotw);
}

#[test]
fn delta_converges() {
    simulate(Variant::Delta);
}

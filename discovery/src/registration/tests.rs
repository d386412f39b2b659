use std::sync::atomic::Ordering::Relaxed;

use tokio::sync::Notify;

use super::*;
use crate::mesh::{MeshPort, MeshService};

fn host(service: &str, last: u8, tags: Value) -> Host {
    let mut all = json!({ "az": "eu-1a", "region": "eu", "instance_id": "i-1" });
    for (name, value) in tags.as_object().unwrap() {
        all[name] = value.clone();
    }
    Host {
        service: service.into(),
        ip_address: Ipv4Addr::new(10, 0, 0, last),
        service_repo_name: "repo".into(),
        port: 8080,
        revision: "r1".into(),
        last_check_in: 0,
        tags: all.as_object().unwrap().clone(),
    }
}

fn open(change: impl FnOnce(&mut Settings)) -> Registrations {
    let mut settings = Settings::new(Storage::Memory);
    change(&mut settings);
    Registrations::open(settings).unwrap()
}

async fn hosts(registrations: &Registrations, service: &str) -> Vec<Value> {
    let reply = registrations.carry_out(Call::OfService(service.into())).await;
    assert_eq!(reply.status, 200);
    let mut answer: Value = serde_json::from_str(&reply.body).unwrap();
    assert_eq!((&answer["service"], &answer["env"]), (&json!(service), &json!("development")));
    answer["hosts"].as_array_mut().unwrap().drain(..).collect()
}

#[tokio::test]
async fn heartbeats_keep_what_the_api_set_and_change_what_they_state() {
    let registrations = open(|_| ());
    let before = host("users", 1, json!({ "canary": true }));
    assert_eq!(registrations.carry_out(Call::CheckIn(before.clone())).await, Reply::ok(json!({})));
    let weight = |ip_address, weight| Call::SetWeight { service: "users".into(), ip_address, weight };
    assert_eq!(registrations.carry_out(weight(Some(before.ip_address), 7)).await, Reply::no_content());
    let again = Host { revision: "r2".into(), ..host("users", 1, json!({ "az": "eu-1b" })) };
    registrations.carry_out(Call::CheckIn(again)).await;
    let [found] = &*hosts(&registrations, "users").await else { panic!("one host expected") };
    let tags =
        json!({ "az": "eu-1b", "region": "eu", "instance_id": "i-1", "canary": true, "load_balancing_weight": 7 });
    assert_eq!((&found["tags"], &found["revision"]), (&tags, &json!("r2")));
    // All hosts of a service, of which there need not be any.
    registrations.carry_out(Call::CheckIn(host("users", 2, json!({})))).await;
    assert_eq!(registrations.carry_out(weight(None, 50)).await.status, 204);
    let weights: Vec<_> =
        hosts(&registrations, "users").await.iter().map(|host| host["tags"]["load_balancing_weight"].clone()).collect();
    assert_eq!(weights, [50, 50]);
    let none = Call::SetWeight { service: "nobody".into(), ip_address: None, weight: 1 };
    assert_eq!(registrations.carry_out(none).await.status, 204);
    let missing = registrations.carry_out(weight(Some(Ipv4Addr::LOCALHOST), 1)).await;
    assert_eq!((missing.status, &*missing.body), (404, "{\"error\": \"Host not found\"}\n"));
}

#[tokio::test]
async fn hosts_are_listed_by_service_and_by_repository_and_go_once() {
    let registrations = open(|_| ());
    for (service, last) in [("users", 1), ("users", 2), ("orders", 1)] {
        registrations.carry_out(Call::CheckIn(host(service, last, json!({})))).await;
    }
    assert_eq!(hosts(&registrations, "users").await.len(), 2);
    assert_eq!(hosts(&registrations, "user").await.len(), 0);
    let by_repository = registrations.carry_out(Call::OfRepository("repo".into())).await;
    let answer: Value = serde_json::from_str(&by_repository.body).unwrap();
    assert_eq!((&answer["service_repo_name"], answer["hosts"].as_array().unwrap().len()), (&json!("repo"), 3));
    let key = host("users", 1, json!({})).key();
    assert_eq!(registrations.carry_out(Call::Remove(key.clone())).await, Reply::ok(json!({})));
    let again = registrations.carry_out(Call::Remove(key)).await;
    assert_eq!((again.status, &*again.body), (400, "{}\n"));
    assert_eq!(hosts(&registrations, "users").await.len(), 1);
}

#[tokio::test]
async fn only_news_makes_a_new_mesh() {
    let registrations = open(|_| ());
    let changes = registrations.watch();
    let count = || *changes.borrow();
    registrations.carry_out(Call::CheckIn(host("users", 1, json!({})))).await;
    assert_eq!(count(), 1);
    registrations.carry_out(Call::CheckIn(host("users", 1, json!({})))).await;
    assert_eq!(count(), 1, "a heartbeat is no news");
    registrations.carry_out(Call::CheckIn(host("users", 1, json!({ "az": "b" })))).await;
    assert_eq!(count(), 2);
    assert_eq!(registrations.counters().check_ins.load(Relaxed), 3);
}

#[tokio::test]
async fn silent_hosts_go_and_those_that_check_in_stay() {
    let registrations = open(|settings| settings.ttl = Duration::from_millis(300));
    tokio::spawn(registrations.clone().run());
    registrations.loaded().await;
    registrations.carry_out(Call::CheckIn(host("users", 1, json!({})))).await;
    let mut changes = registrations.watch();
    let gone = async {
        loop {
            // One host keeps on saying that it is there, the other one does not.
            registrations.carry_out(Call::CheckIn(host("users", 2, json!({})))).await;
            if registrations.hosts().len() == 1 {
                return;
            }
            let _ = tokio::time::timeout(Duration::from_millis(20), changes.changed()).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), gone).await.unwrap();
    assert_eq!(registrations.hosts()[0].ip_address, Ipv4Addr::new(10, 0, 0, 2));
    assert_eq!(hosts(&registrations, "users").await.len(), 1);
    assert_eq!(registrations.counters().expired.load(Relaxed), 1);
}

#[tokio::test]
async fn there_is_a_limit_to_hosts_and_to_what_is_merged() {
    let registrations = open(|settings| settings.max_hosts = 1);
    assert_eq!(registrations.carry_out(Call::CheckIn(host("users", 1, json!({})))).await.status, 200);
    let refused = registrations.carry_out(Call::CheckIn(host("users", 2, json!({})))).await;
    assert_eq!((refused.status, refused.error.as_deref()), (507, Some("1 hosts are registered, more are not allowed")));
    // Who is known may go on checking in, but not with ever more tags.
    let big = "x".repeat(host::MAX_TAGS * 2 / 3);
    assert_eq!(registrations.carry_out(Call::CheckIn(host("users", 1, json!({ "a": big })))).await.status, 200);
    let refused = registrations.carry_out(Call::CheckIn(host("users", 1, json!({ "b": big })))).await;
    assert_eq!((refused.status, &*refused.body), (400, "{}\n"));
    assert_eq!(registrations.counters().refused.load(Relaxed), 2);
    assert!(!registrations.hosts()[0].tags.contains_key("b"));
}

/// A store that lets others work between the reading of its hosts and the answer.
#[derive(Debug, Default)]
struct Slow {
    hosts: Mutex<BTreeMap<HostKey, Host>>,
    was_read: Notify,
    answers: Notify,
}

#[tonic::async_trait]
impl Store for Arc<Slow> {
    async fn all(&self) -> Result<Vec<Host>, StoreError> {
        let hosts = self.hosts.lock().unwrap().values().cloned().collect();
        self.was_read.notify_one();
        self.answers.notified().await;
        Ok(hosts)
    }

    async fn of_service(&self, _service: &str) -> Result<Vec<Host>, StoreError> {
        Ok(Vec::new())
    }

    async fn update(&self, key: &HostKey, change: &Changer<'_>) -> Result<Outcome, StoreError> {
        let mut hosts = self.hosts.lock().unwrap();
        let before = hosts.get(key).cloned();
        match change(before.as_ref()) {
            Change::Keep => {}
            Change::Put(host) => drop(hosts.insert(key.clone(), host)),
            Change::Remove => drop(hosts.remove(key)),
        }
        Ok(Outcome { before, after: hosts.get(key).cloned() })
    }

    async fn version(&self) -> Result<Version, StoreError> {
        Ok(Version { incarnation: 1, count: 1 })
    }
}

#[tokio::test]
async fn what_changes_while_the_store_is_read_is_not_undone() {
    let store = Arc::new(Slow::default());
    let registrations = Registrations::with(Settings::new(Storage::Memory), Box::new(Arc::clone(&store)));
    registrations.carry_out(Call::CheckIn(host("users", 1, json!({})))).await;
    let last = |registrations: &Registrations| -> Vec<u8> {
        registrations.hosts().iter().map(|host| host.ip_address.octets()[3]).collect()
    };
    let refresh = || {
        let registrations = registrations.clone();
        tokio::spawn(async move { registrations.refresh().await })
    };
    let refreshing = refresh();
    store.was_read.notified().await;
    registrations.carry_out(Call::CheckIn(host("users", 2, json!({})))).await;
    registrations.carry_out(Call::Remove(host("users", 1, json!({})).key())).await;
    store.answers.notify_one();
    refreshing.await.unwrap();
    assert_eq!(last(&registrations), [2]);

    // It is read again, and once more others have the word, heartbeats or not.
    let other = host("users", 3, json!({}));
    store.hosts.lock().unwrap().insert(other.key(), other);
    let refreshing = refresh();
    store.was_read.notified().await;
    registrations.carry_out(Call::CheckIn(host("users", 2, json!({})))).await;
    store.answers.notify_one();
    refreshing.await.unwrap();
    assert_eq!(last(&registrations), [2, 3]);
    // And then it is known.
    tokio::time::timeout(Duration::from_secs(20), refresh()).await.expect("it is not read").unwrap();
}

#[test]
fn registered_hosts_are_services_of_the_mesh() {
    let settings = Settings::new(Storage::Memory);
    let known = |last: u8| crate::mesh::Endpoint {
        address: ([10, 0, 0, last], 8080).into(),
        other_family: None,
        locality: crate::mesh::Locality::default(),
        health: crate::mesh::Health::Draining,
        cluster: "east".into(),
        weight: None,
        canary: false,
    };
    let port = MeshPort {
        protocol: Protocol::Grpc,
        vips: vec![],
        external: None,
        endpoints: vec![known(1)],
        offloaded: vec![],
        targets: [8080].into(),
    };
    let both = crate::kubernetes::ObjectKey::new("default", "both");
    let registered = [
        host("both", 1, json!({})),
        host("both", 2, json!({})),
        host("Not_A_Label", 1, json!({})),
        host("my_users", 3, json!({ "canary": true, "load_balancing_weight": 9 })),
    ];
    let registered = join::Registered::new(&registered.map(Arc::new), &settings);
    let found: Vec<_> = registered.differing(&join::Registered::default()).map(|key| key.to_string()).collect();
    assert_eq!(found, ["default/both", "default/my_users"]);
    let joined = |key: &crate::kubernetes::ObjectKey, mut service: MeshService| {
        let mut warnings = Vec::new();
        registered.join(key, &mut service, &mut warnings);
        (service.ports[&80].clone(), warnings)
    };
    let (users, warnings) = joined(&crate::kubernetes::ObjectKey::new("default", "my_users"), MeshService::default());
    assert_eq!(warnings, [""; 0]);
    let endpoint = &users.endpoints[0];
    assert_eq!((users.protocol, endpoint.address.to_string()), (Protocol::Http1, "10.0.0.3:8080".to_owned()));
    assert_eq!((&*endpoint.locality.region, &*endpoint.locality.zone), ("eu", "eu-1a"));
    assert_eq!((endpoint.weight.map(u32::from), endpoint.canary, &*endpoint.cluster), (Some(9), true, "registered"));
    // What a cluster says of an address counts.
    let known_before = MeshService { ports: [(80, port)].into(), ..Default::default() };
    let (both, warnings) = joined(&both, known_before);
    assert_eq!((both.protocol, both.endpoints.len(), &both.endpoints[0]), (Protocol::Grpc, 2, &known(1)));
    assert!(warnings[0].contains("is grpc in a cluster, which counts; registered hosts speak http"), "{warnings:?}");
    let [name] = registered.warnings() else { panic!("one warning expected: {:?}", registered.warnings()) };
    assert!(name.contains("\"Not_A_Label\" is not in the mesh"), "{name}");
}

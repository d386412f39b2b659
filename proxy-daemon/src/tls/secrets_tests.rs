use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::*;

#[derive(Default)]
struct User {
    built: AtomicBool,
    calls: AtomicU64,
    changes: AtomicU64,
}

impl User {
    /// How often it was told, and of how many changes, since the last call.
    fn told(&self) -> (u64, u64) {
        (self.calls.swap(0, Ordering::Relaxed), self.changes.swap(0, Ordering::Relaxed))
    }
}

impl SecretUser for User {
    fn is_built(&self) -> bool {
        self.built.load(Ordering::Relaxed)
    }

    fn secrets_changed(&self, times: u64) {
        self.calls.fetch_add(1, Ordering::Relaxed);
        self.changes.fetch_add(times, Ordering::Relaxed);
    }
}

fn keys() -> Secret {
    Secret::ValidationContext(Arc::default())
}

fn name(name: &str) -> SecretName {
    SecretName { source: None, name: name.into() }
}

fn subscribe(secrets: &Arc<Secrets>, user: &Arc<User>, names: &[&str]) -> Subscribed {
    let names: Vec<_> = names.iter().map(|&name| SecretRef::Static(name.into())).collect();
    let user: Weak<dyn SecretUser> = Arc::downgrade(user) as Weak<dyn SecretUser>;
    secrets.subscribe(names.iter().map(|name| (SecretType::ValidationContext, name)), user)
}

#[test]
fn a_user_is_told_once_of_all_that_was_set() {
    let (secrets, user) = (Arc::new(Secrets::default()), Arc::new(User::default()));
    let _subscribed = subscribe(&secrets, &user, &["a", "b"]);
    secrets.put(name("a"), keys());
    assert_eq!(user.told(), (1, 1), "it waits");
    user.built.store(true, Ordering::Relaxed);
    secrets.put(name("a"), keys());
    secrets.put(name("b"), keys());
    secrets.put(name("c"), keys());
    assert_eq!(user.told(), (0, 0));
    secrets.tell();
    assert_eq!(user.told(), (1, 2));
    secrets.tell();
    assert_eq!(user.told(), (0, 0));
    secrets.set(name("b"), keys());
    assert_eq!(user.told(), (1, 1));
}

#[test]
fn a_name_is_known_as_long_as_there_is_a_secret_or_a_user() {
    let (secrets, user) = (Arc::new(Secrets::default()), Arc::new(User::default()));
    let (one, other) = (subscribe(&secrets, &user, &["a", "b"]), subscribe(&secrets, &user, &["a"]));
    secrets.put(name("b"), keys());
    assert_eq!(secrets.len(), 2);
    drop(one);
    assert_eq!(secrets.len(), 2);
    secrets.remove(&name("b"));
    assert_eq!(secrets.len(), 1);
    // Its user goes after it.
    secrets.put(name("a"), keys());
    secrets.remove(&name("a"));
    assert_eq!(secrets.len(), 1);
    drop(other);
    assert!(secrets.is_empty(), "{secrets:?}");
}
